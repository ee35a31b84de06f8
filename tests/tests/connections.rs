//! Connections: what TCPRoutes and TLSRoutes of a service say, on real kernels and through real agents, from the manifest to
//! the wire.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::Arc,
};

use mesh_tests::{
    Server, WorkloadSpec, World,
    apps::{self, Handler},
    manifests::{Enrolment, Mode},
    until,
    wait::holds,
    workload::TIMEOUT,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer},
};
use serde_json::Value;

/// `shop/db` leads to version one, on the client's node; version two is on the other.
fn shop() -> World {
    World::shop()
        .namespace("shop", Enrolment::Enrolled, Mode::Strict)
        .with(WorkloadSpec::new("shop/db-1", "a").app("db-1"))
        .with(WorkloadSpec::new("shop/db-2", "b").app("db-2"))
        .service("shop/db", "db-1", 5432, 8080)
        .service("shop/db-1", "db-1", 5432, 8080)
        .service("shop/db-2", "db-2", 5432, 8080)
        .build()
        .unwrap()
}

fn connect(world: &World) -> Result<TcpStream, String> {
    let to = (world.service("shop/db").v4, 5432).into();
    world.workload("web").connect(to).map_err(|e| e.to_string())
}

/// Who greets a client, which waits to be spoken to.
fn greeted(world: &World) -> Result<String, String> {
    let mut said = String::new();
    let mut stream = connect(world)?;
    stream.write_all(b"x\n").map_err(|e| e.to_string())?;
    stream.read_to_string(&mut said).map_err(|e| e.to_string())?;
    Ok(said)
}

fn tcp_route(one: u32, two: u32) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {{namespace: shop, name: canary}}
spec:
  parentRefs: [{{group: '', kind: Service, name: db, port: 5432}}]
  rules:
  - backendRefs: [{{name: db-1, port: 5432, weight: {one}}}, {{name: db-2, port: 5432, weight: {two}}}]
"
    )
}

#[test]
fn a_canary_gets_its_share_of_connections_in_which_the_server_speaks_first() {
    let world = shop();
    let _apps: Vec<Server> = ["db-1", "db-2"]
        .map(|name| world.workload(name).serve(8080, apps::greeter(&format!("{name}\n"))).unwrap())
        .into();
    until("the service answers", TIMEOUT, || {
        let said = greeted(&world)?;
        holds(said.starts_with("db-1\n"), || said.clone())
    });
    world.yaml.write("route.yaml", &tcp_route(0, 1)).unwrap();
    until("the route is in force", TIMEOUT, || {
        let said = greeted(&world)?;
        holds(said == "db-2\nyou said: x\n", || said.clone())
    });
    let mut wire = world.capture().unwrap();
    assert!((0..10).all(|_| greeted(&world).unwrap().starts_with("db-2\n")));
    assert!(wire.plaintext(b"you said").unwrap().is_empty(), "by mutual TLS, as every connection");
    let line = world.agent("a").wait_log("the connection", |line: &Value| line["backend"] == "shop/db-2");
    assert_eq!(
        (&line["route"], &line["destination"]["service"], &line["destination"]["workload"]),
        (&"TCPRoute/shop/canary".into(), &"shop/db".into(), &"shop/db-2".into()),
        "{line}"
    );

    world.yaml.write("route.yaml", &tcp_route(3, 1)).unwrap();
    until("version one has its share again", TIMEOUT, || {
        let said = greeted(&world)?;
        holds(said.starts_with("db-1\n"), || said.clone())
    });
    // 100 of 400 are expected, with a standard deviation of 8.7.
    let by_two = (0..400).filter(|_| greeted(&world).unwrap().starts_with("db-2\n")).count();
    assert!((45..=155).contains(&by_two), "{by_two} of 400 by version two");
    let metrics = world.agent("a").metrics().unwrap();
    let counted = [("service", "shop/db"), ("route", "TCPRoute/shop/canary"), ("backend", "shop/db-2")];
    assert!(metrics.sum("nodemesh_routed_connections_total", &counted) >= (by_two + 10) as f64);

    let rows = world.meshctl(&["get", "routes"]).unwrap().stdout;
    assert!(rows.contains("every connection -> shop/db-1:5432 weight 3, shop/db-2:5432 weight 1"), "{rows}");
    let why = world.meshctl(&["why", "shop/web", "shop/db:5432"]).unwrap().stdout;
    assert!(why.contains("TCPRoute shop/canary") && why.contains("ALLOWED to shop/db-2"), "{why}");

    // What is said of requests is not in force, and that is told; connections go as before.
    world.yaml.write("policy.yaml", RETRIES).unwrap();
    until("the policy is told that nothing is read", TIMEOUT, || {
        let told = world.meshctl(&["get", "traffic"]).map_err(|e| format!("{e:#}"))?.stdout;
        let says = "Service shop/db, port 5432: retries is not in force, as TCPRoute shop/canary";
        holds(told.contains(says), || told.clone())
    });
    let why = world.meshctl(&["why", "shop/web", "shop/db:5432"]).unwrap().stdout;
    for says in
        ["at most 9 connections", "not in force, as no request is read: what a TrafficPolicy says of retries"]
    {
        assert!(why.contains(says), "{says}\n{why}");
    }
    assert!(greeted(&world).unwrap().ends_with("you said: x\n"));

    // What is not there is refused, and nothing goes to the service instead.
    world.yaml.write("route.yaml", &tcp_route(1, 0).replace("db-1", "gone")).unwrap();
    until("it leads nowhere", TIMEOUT, || {
        let said = greeted(&world);
        holds(said.is_err() || said.as_deref() == Ok(""), || format!("{said:?}"))
    });
    world.agent("a").wait_log("the refusal", |line: &Value| {
        line["reason"] == "no_backend" && line["route"] == "TCPRoute/shop/canary"
    });
    // Without the policy, for whom requests would be read again, which nobody speaks here.
    world.yaml.remove("policy.yaml").unwrap();
    world.yaml.remove("route.yaml").unwrap();
    until("all is as it was", TIMEOUT, || {
        let said = greeted(&world)?;
        holds(said.starts_with("db-1\n"), || said.clone())
    });
}

const RETRIES: &str = "
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {namespace: shop, name: db}
spec:
  targetRefs: [{kind: Service, name: db}]
  retries: {attempts: 3}
  limits: {connections: 9}
";

const TLS_ROUTES: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {namespace: shop, name: one}
spec:
  parentRefs: [{group: '', kind: Service, name: db}]
  hostnames: [one.db.example]
  rules: [{backendRefs: [{name: db-1, port: 5432}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {namespace: shop, name: others}
spec:
  parentRefs: [{group: '', kind: Service, name: db}]
  hostnames: ['*.db.example']
  rules: [{backendRefs: [{name: db-2, port: 5432}]}]
";

/// A server of TLS that says who it is, and its certificate.
fn server(says: &'static str, name: &str) -> (Handler, CertificateDer<'static>) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([name.to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let config = Arc::new(config);
    let handler: Handler = Arc::new(move |stream| {
        let connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(connection, stream);
        stream.write_all(says.as_bytes())?;
        stream.conn.send_close_notify();
        stream.flush()
    });
    (handler, cert.der().clone())
}

/// Who answers a client that asks for this name, and accepts the certificate of that name alone.
fn answered(world: &World, roots: &RootCertStore, name: &'static str) -> Result<String, String> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    let connection = ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(connection, connect(world)?);
    let mut said = String::new();
    stream.read_to_string(&mut said).map_err(|e| e.to_string())?;
    Ok(said)
}

#[test]
fn clients_reach_the_server_whose_name_they_ask_for_and_nobody_reads_what_they_say() {
    let world = shop();
    let mut roots = RootCertStore::empty();
    let mut apps = vec![];
    for (workload, name) in [("db-1", "one.db.example"), ("db-2", "two.db.example")] {
        let (handler, certificate) = server(workload, name);
        roots.add(certificate).unwrap();
        apps.push(world.workload(workload).serve(8080, handler).unwrap());
    }
    world.yaml.write("routes.yaml", TLS_ROUTES).unwrap();
    until("the routes are in force", TIMEOUT, || {
        let said = answered(&world, &roots, "two.db.example")?;
        holds(said == "db-2", || said.clone())
    });
    for (name, expected) in [("one.db.example", "db-1"), ("two.db.example", "db-2")] {
        assert_eq!(answered(&world, &roots, name).unwrap(), expected);
    }
    let refused = answered(&world, &roots, "db.example").unwrap_err();
    let line = world.agent("a").wait_log("the refusal", |line: &Value| line["reason"] == "no_server_name");
    assert!(line["detail"].as_str().unwrap().contains("'db.example'"), "{line} {refused}");
    // What is no TLS gets no further.
    let plain = greeted(&world);
    assert!(plain.is_err() || plain.as_deref() == Ok(""), "{plain:?}");
    world.agent("a").wait_log("the other refusal", |line: &Value| line["reason"] == "bad_hello");
    let why = world.meshctl(&["why", "shop/web", "shop/db:5432", "--server-name", "one.db.example"]).unwrap();
    assert!(why.stdout.contains("TLSRoute shop/one"), "{}", why.stdout);
}
