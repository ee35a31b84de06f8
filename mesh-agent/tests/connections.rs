//! Connections that TCPRoutes and TLSRoutes lead, through two agents: where they go, what goes with them, and what is refused
//! with which reason. Needs root, as the data path does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_agent::{connection::Limits, metrics::RoutedLabels};
use mesh_core::model::{
    Name,
    http::{BackendTarget, RouteKind},
    tcp::{ConnectionRoute, Share},
    traffic,
};
use rcgen::{CertificateParams, SanType};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, crypto::ring};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use world::*;

fn share(service: &str, weight: u32) -> Share {
    Share { to: BackendTarget::Service { service: name(service), port: 80 }, weight }
}

fn tcp(backends: Vec<Share>) -> ConnectionRoute {
    ConnectionRoute { kind: RouteKind::Tcp, name: name("tcp"), created: 0, hostnames: vec![], backends }
}

fn tls(route: &str, hostname: &str, service: &str) -> ConnectionRoute {
    let (hostnames, backends) = (vec![hostname.parse().unwrap()], vec![share(service, 1)]);
    ConnectionRoute { kind: RouteKind::Tls, name: name(route), created: 0, hostnames, backends }
}

/// A client of a service that has endpoints of nobody's own, whose routes lead to the services `to-web` and `to-api`.
struct Bed {
    world: World,
    plan: Plan,
    at: SocketAddr,
    apps: [Option<TcpListener>; 2],
}

impl Bed {
    async fn new(routes: Vec<ConnectionRoute>) -> Self {
        Self::with(routes, Limits::default()).await
    }

    async fn with(routes: Vec<ConnectionRoute>, at_source: Limits) -> Self {
        let mut plan = Plan::default();
        plan.service(&[]);
        let world = World::with(&plan, at_source, Limits::default());
        let ((web_at, web), (api_at, api)) = (world.web().await, world.api().await);
        plan.backend("to-web", "web", &[web_at]);
        plan.backend("to-api", "api", &[api_at]);
        plan.backend("empty", "web", &[]);
        let at = world.outbound(VIP.parse().unwrap());
        let mut bed = Self { world, plan, at, apps: [Some(web), Some(api)] };
        bed.route(routes, "2");
        bed
    }

    fn route(&mut self, routes: Vec<ConnectionRoute>, version: &str) {
        self.plan.services[0].ports[0].routes = routes.into_iter().map(Arc::new).collect();
        self.world.publish(&self.plan, version);
    }

    /// Applications that say who they are and give back what they got.
    fn serve(&mut self) {
        for (says, listener) in ["web", "api"].into_iter().zip(&mut self.apps) {
            let listener = listener.take().unwrap();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(say(says, stream));
                }
            });
        }
    }

    /// Waits until one connection has arrived.
    async fn is_there(&self) {
        let connections = self.world.destination.node.connections();
        eventually(async || (connections.list(None, 1).total == 1).then_some(())).await;
    }

    /// How the only connection so far ended, as the client's agent tells it.
    async fn line(&self) -> Value {
        self.world.source.log_of(1).await.remove(0)
    }

    /// That what is sent is refused for this reason, and gets nowhere.
    async fn refused(&self, sent: &[u8], reason: &'static str) -> Value {
        let before = self.world.source.log().await.len();
        let answer = ask(self.at, sent).await;
        assert!(answer.is_err() || answer.is_ok_and(|it| it.is_empty()), "nobody answers");
        let line = self.world.source.log_of(before + 1).await.remove(before);
        assert_eq!((&line["outcome"], &line["reason"]), (&json!("refused"), &json!(reason)), "{line}");
        assert_eq!(line["destination"]["service"], "shop/service", "{line}");
        line
    }
}

async fn say(says: &str, mut stream: TcpStream) {
    let mut all = says.as_bytes().to_vec();
    if stream.read_to_end(&mut all).await.is_ok() {
        let _ = stream.write_all(&all).await;
    }
}

/// What a client says first that asks for a server, and offers so many bytes of names of protocols.
fn client_hello(server: &str, offered: usize) -> Vec<u8> {
    let mut config = client_config(RootCertStore::empty());
    config.alpn_protocols = vec![vec![b'x'; 199]; offered / 200];
    let server = server.to_owned().try_into().unwrap();
    let mut session = ClientConnection::new(Arc::new(config), server).unwrap();
    let mut bytes = vec![];
    while session.wants_write() {
        session.write_tls(&mut bytes).unwrap();
    }
    bytes
}

fn client_config(roots: RootCertStore) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_of_connections_are_as_the_weights_and_go_by_tunnels() {
    let mut bed = Bed::new(vec![tcp(vec![share("to-web", 3), share("empty", 0), share("to-api", 1)])]).await;
    bed.serve();
    let mut by_web = 0;
    for _ in 0..400 {
        let answer = ask(bed.at, b" hears").await.unwrap();
        assert!(answer.ends_with(b" hears"), "{answer:?}");
        by_web += usize::from(answer.starts_with(b"web"));
    }
    // 300 are expected, with a standard deviation of 8.7.
    assert!((245..=355).contains(&by_web), "{by_web} of 400");
    let lines = bed.world.source.log_of(400).await;
    let of = |backend: &str| lines.iter().filter(|line| line["backend"] == backend).count();
    assert_eq!((of("shop/to-web"), of("shop/to-api")), (by_web, 400 - by_web));
    let line = lines.iter().find(|line| line["backend"] == "shop/to-api").unwrap();
    assert_eq!(
        (
            &line["route"],
            &line["destination"]["service"],
            &line["destination"]["workload"],
            &line["transport"]
        ),
        (&json!("TCPRoute/shop/tcp"), &json!("shop/service"), &json!("shop/api"), &json!("tunnel")),
        "{line}"
    );
    let labels = RoutedLabels {
        workload: "shop/client".into(),
        service: "shop/service".into(),
        route: "TCPRoute/shop/tcp".into(),
        backend: "shop/to-web".into(),
        outcome: "ok",
        reason: "",
    };
    assert_eq!(bed.world.source.metrics.routed(&labels), by_web as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_leads_nowhere_is_refused_and_its_share_with_it() {
    let nowhere = Share { to: BackendTarget::Nowhere, weight: 1 };
    let mut bed = Bed::new(vec![tcp(vec![nowhere.clone()])]).await;
    bed.serve();
    let line = bed.refused(b"x", "no_backend").await;
    assert_eq!(line["route"], "TCPRoute/shop/tcp", "{line}");
    for (version, backends, reason) in [
        ("3", vec![share("to-web", 0)], "no_backend"),
        ("4", vec![share("nobody", 1)], "no_backend"),
        ("5", vec![share("empty", 1)], "no_endpoint"),
    ] {
        bed.route(vec![tcp(backends)], version);
        bed.refused(b"x", reason).await;
    }
    bed.route(vec![tcp(vec![share("to-web", 1), nowhere])], "6");
    let mut served = 0;
    for _ in 0..100 {
        served += usize::from(ask(bed.at, b"").await.is_ok_and(|it| it == b"web"));
    }
    // 50 are expected, with a standard deviation of 5.
    assert!((20..=80).contains(&served), "{served} of 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_come_and_go_for_connections_to_come_and_those_that_live_go_on() {
    let mut bed = Bed::new(vec![tcp(vec![share("to-web", 1)])]).await;
    bed.serve();
    let mut living = connect(bed.at).await;
    living.write_all(b" before").await.unwrap();
    bed.is_there().await;
    bed.route(vec![tcp(vec![share("to-api", 1)])], "3");
    assert_eq!(ask(bed.at, b"").await.unwrap(), b"api");
    // One of other namespaces' clients is not for this one.
    let elsewhere = ConnectionRoute { name: Name::new("bank", "tcp"), ..tcp(vec![share("to-web", 1)]) };
    bed.route(vec![elsewhere, tcp(vec![share("to-api", 1)])], "4");
    assert_eq!(ask(bed.at, b"").await.unwrap(), b"api");
    // Without one it is the service itself.
    bed.route(vec![], "5");
    let endpoints = bed.plan.services[1].ports[0].endpoints.clone();
    bed.plan.services[0].ports[0].endpoints = endpoints;
    bed.world.publish(&bed.plan, "6");
    assert_eq!(ask(bed.at, b"").await.unwrap(), b"web");
    living.write_all(b" and after").await.unwrap();
    living.shutdown().await.unwrap();
    let mut answer = vec![];
    in_time(living.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"web before and after");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_has_no_more_connections_than_its_policy_says() {
    let mut bed = Bed::new(vec![tcp(vec![share("to-web", 1)])]).await;
    bed.serve();
    let limits = traffic::Limits { connections: Some(1), requests: None, pending: 0 };
    bed.plan.services[1].ports[0].traffic.limits = Some(limits);
    bed.world.publish(&bed.plan, "3");
    let mut first = connect(bed.at).await;
    first.write_all(b"!").await.unwrap();
    bed.is_there().await;
    bed.refused(b"x", "limit_service_connections").await;
    first.shutdown().await.unwrap();
    let mut answer = vec![];
    in_time(first.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"web!");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_reaches_the_server_whose_name_it_asks_for_and_sees_its_certificate() {
    let routes = vec![tls("web", "web.example", "to-web"), tls("all", "*.example", "to-api")];
    let mut bed = Bed::new(routes).await;
    for (listener, server) in bed.apps.iter_mut().zip(["web.example", "api.example"]) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::DnsName(server.try_into().unwrap())];
        let (certificate, key) = bed.world.ca.sign(params);
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let (acceptor, listener) = (TlsAcceptor::from(Arc::new(config)), listener.take().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let _ = stream.write_all(server.as_bytes()).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
    }
    let mut roots = RootCertStore::empty();
    roots.add(bed.world.ca.root()).unwrap();
    let connector = TlsConnector::from(Arc::new(client_config(roots)));
    for server in ["web.example", "api.example", "web.example"] {
        let stream = connect(bed.at).await;
        let mut stream = in_time(connector.connect(server.try_into().unwrap(), stream)).await.unwrap();
        let mut said = String::new();
        in_time(stream.read_to_string(&mut said)).await.unwrap();
        assert_eq!(said, server, "the certificate was that of the name");
    }
    let lines = bed.world.source.log_of(3).await;
    let routes: Vec<_> = lines.iter().map(|line| line["route"].as_str().unwrap()).collect();
    assert_eq!(
        routes.iter().filter(|it| **it == "TLSRoute/shop/web").count(),
        2,
        "{routes:?}, the others by TLSRoute/shop/all"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hello_arrives_as_it_was_sent_however_it_was_cut() {
    let mut bed = Bed::new(vec![tls("web", "db.example.com", "to-web")]).await;
    bed.serve();
    let hello = [client_hello("db.example.com", 400).as_slice(), b" and more"].concat();
    let expected = [b"web", hello.as_slice()].concat();
    assert_eq!(ask(bed.at, &hello).await.unwrap(), expected);

    let mut stream = connect(bed.at).await;
    stream.set_nodelay(true).unwrap();
    for byte in &hello {
        stream.write_all(std::slice::from_ref(byte)).await.unwrap();
        tokio::task::yield_now().await;
    }
    stream.shutdown().await.unwrap();
    let mut answer = vec![];
    in_time(stream.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, expected);

    let long = client_hello("db.example.com", 15_000);
    assert_eq!(ask(bed.at, &long).await.unwrap(), [b"web", long.as_slice()].concat());
    let lines = bed.world.source.log_of(3).await;
    assert_eq!(lines[0]["bytes_sent"], hello.len(), "all is counted, once: {}", lines[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_route_is_for_or_is_no_hello_is_refused_with_its_reason() {
    let mut bed = Bed::new(vec![tls("web", "db.example.com", "to-web")]).await;
    bed.serve();
    let line = bed.refused(&client_hello("other.example.com", 0), "no_server_name").await;
    let detail = line["detail"].as_str().unwrap();
    assert!(detail.contains("other.example.com") && line["route"].is_null(), "{line}");
    bed.refused(&client_hello("10.0.0.1", 0), "no_server_name").await;
    bed.refused(&client_hello("db.example.com", 20_000), "bad_hello").await;
    let hello = client_hello("db.example.com", 0);
    bed.refused(&hello[..hello.len() - 1], "bad_hello").await;
    for other in ["GET / HTTP/1.1\r\n\r\n", "\0\0\0\u{8}\u{4}", ""] {
        bed.refused(other.as_bytes(), "bad_hello").await;
    }
    let labels = RoutedLabels {
        workload: "shop/client".into(),
        service: "shop/service".into(),
        route: String::new(),
        backend: String::new(),
        outcome: "refused",
        reason: "no_server_name",
    };
    assert_eq!(bed.world.source.metrics.routed(&labels), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_say_whom_it_asks_for_is_not_waited_for_for_ever() {
    let limits = Limits { handshake_timeout: Duration::from_millis(100), ..Limits::default() };
    let bed = Bed::with(vec![tls("web", "db.example.com", "to-web")], limits).await;
    let mut silent = connect(bed.at).await;
    assert!(in_time(silent.read_u8()).await.is_err());
    let line = bed.line().await;
    assert_eq!((&line["outcome"], &line["reason"]), (&json!("refused"), &json!("hello_timeout")), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_a_policy_speaks_of_are_not_read_where_connections_are_routed() {
    let mut bed = Bed::new(vec![tcp(vec![share("to-web", 1)])]).await;
    bed.serve();
    bed.plan.services[0].ports[0].traffic.reads_requests = true;
    bed.world.publish(&bed.plan, "3");
    assert_eq!(ask(bed.at, b"\x05 no http").await.unwrap(), b"web\x05 no http");
    let line = bed.line().await;
    assert_eq!((&line["outcome"], &line["kind"]), (&json!("ok"), &Value::Null), "{line}");
}
