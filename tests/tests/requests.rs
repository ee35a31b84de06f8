//! Requests: what the routes of a service say, on real kernels and through real agents, from the manifest to the wire.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
};

use mesh_tests::{
    Server, WorkloadSpec, World, apps,
    manifests::{Enrolment, Mode},
    until,
    wait::holds,
    workload::TIMEOUT,
};
use serde_json::Value;

/// `shop/pay` leads to version one on the client's node, and to version two, on the other, for whoever asks for it.
const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: pay}
spec:
  parentRefs: [{group: '', kind: Service, name: pay, port: 80}]
  rules:
    - name: second
      matches:
        - path: {type: PathPrefix, value: /v2}
        - headers: [{name: version, value: two}]
      filters:
        - type: ResponseHeaderModifier
          responseHeaderModifier: {set: [{name: x-by, value: mesh}]}
      backendRefs: [{name: pay-2, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /v1}}]
      backendRefs: [{name: pay-1, port: 80}]
";

fn shop() -> World {
    let world = World::shop()
        .namespace("shop", Enrolment::Enrolled, Mode::Strict)
        .with(WorkloadSpec::new("shop/pay-1", "a").app("pay-1"))
        .with(WorkloadSpec::new("shop/pay-2", "b").app("pay-2"))
        .service("shop/pay", "pay-1", 80, 8080)
        .service("shop/pay-1", "pay-1", 80, 8080)
        .service("shop/pay-2", "pay-2", 80, 8080)
        .build()
        .unwrap();
    world.yaml.write("route.yaml", ROUTE).unwrap();
    world
}

/// What `shop/web` is answered by the service: everything, head and body.
fn ask(world: &World, request: &str) -> Result<String, String> {
    let to = (world.service("shop/pay").v4, 80).into();
    let mut stream = world.workload("web").connect(to).map_err(|e| e.to_string())?;
    let mut answer = String::new();
    // Its half stays open: a client that ends it before the answer has gone away.
    stream.write_all(request.as_bytes()).map_err(|e| e.to_string())?;
    stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
    Ok(answer)
}

fn get(path: &str, header: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: pay\r\nConnection: close\r\n{header}\r\n")
}

#[test]
fn a_request_goes_where_its_route_says_and_by_mutual_tls() {
    let world = shop();
    let _apps = ["pay-1", "pay-2"].map(|name| world.workload(name).serve(8080, apps::http(name)).unwrap());
    until("the route is in force", TIMEOUT, || {
        let answer = ask(&world, &get("/v2", ""))?;
        holds(answer.contains("pay-2 saw"), || answer.clone())
    });
    let mut wire = world.capture().unwrap();
    let client = world.workload("web").address.v4.to_string();
    for (path, header, expected) in [
        ("/v1/x", "", "pay-1 saw "),
        ("/v2/x?y=z", "", "pay-2 saw "),
        ("/", "Version: two\r\n", "pay-2 saw "),
        ("/v1", "Version: two\r\n", "pay-1 saw "),
    ] {
        let answer = ask(&world, &get(path, header)).unwrap();
        assert!(answer.contains(&format!("{expected}{client}")), "{path} {header}: {answer}");
        assert_eq!(answer.contains("x-by: mesh"), expected.starts_with("pay-2"), "{answer}");
    }
    let nowhere = ask(&world, &get("/v3", "")).unwrap();
    assert!(nowhere.starts_with("HTTP/1.1 404 "), "{nowhere}");
    assert!(wire.plaintext(b"saw ").unwrap().is_empty());
    let line = world.agent("a").wait_log("the request", |line: &Value| line["path"] == "/v2/x");
    assert_eq!(
        (&line["route"], &line["rule"], &line["backend"], &line["status"]),
        (&"HTTPRoute/shop/pay".into(), &"second".into(), &"shop/pay-2".into(), &200.into())
    );
    let metrics = world.agent("a").metrics().unwrap();
    let counted = [("service", "shop/pay"), ("backend", "shop/pay-2"), ("status", "200")];
    assert!(metrics.sum("nodemesh_requests_total", &counted) >= 2.0);

    // Who may not, may not by a route either: the backend's own agent says no, and the client is told nothing of why.
    let policy = "
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: pay-2, namespace: shop}
spec: {selector: {matchLabels: {app: pay-2}}, action: Deny, rules: [{}]}
";
    world.yaml.write("policy.yaml", policy).unwrap();
    until("the policy is in force", TIMEOUT, || {
        let answer = ask(&world, &get("/v2", ""))?;
        holds(answer.starts_with("HTTP/1.1 503 ") && !answer.contains("policy"), || answer.clone())
    });
    let denied = world.agent("a").wait_log("the refusal", |line: &Value| line["status"] == 503);
    assert_eq!(denied["reason"], "peer_refused", "{denied}");

    // Or only some of what it asks: its backend's agent reads each request for itself.
    let policy = policy.replace("[{}]", "[{to: [{ports: [8080], paths: [/v2/admin*]}]}]");
    world.yaml.write("policy.yaml", &policy).unwrap();
    until("the policy on requests is in force", TIMEOUT, || {
        let answer = ask(&world, &get("/v2", ""))?;
        holds(answer.contains("pay-2 saw"), || answer.clone())
    });
    for path in ["/v2/admin", "/v2/x/%2e%2e/Admin/users"] {
        let answer = ask(&world, &get(path, "")).unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 ") && !answer.contains("policy"), "{path}: {answer}");
    }
    assert!(ask(&world, &get("/v2/administer-not", "")).unwrap().starts_with("HTTP/1.1 403 "));
    assert!(ask(&world, &get("/v2/other", "")).unwrap().contains("pay-2 saw"));
    let told = |line: &Value| line["direction"] == "inbound" && line["path"] == "/v2/admin";
    let line = world.agent("b").wait_log("the refused request", told);
    assert_eq!(
        (&line["status"], &line["reason"], &line["rule"]),
        (&403.into(), &"policy_deny".into(), &"shop/pay-2[0]".into()),
        "{line}"
    );
    assert_eq!(line["source"]["workload"], "shop/web");
    let metrics = world.agent("b").metrics().unwrap();
    let counted = [("direction", "inbound"), ("workload", "shop/pay-2"), ("reason", "policy_deny")];
    assert!(metrics.sum("nodemesh_requests_total", &counted) >= 3.0);

    // And on whose behalf, by a token that the same agent verifies. This one is good until the year 2096.
    let keys = include_str!("../../mesh-core/src/authentication/vectors/jwks.json").replace('\n', "");
    let token = include_str!("../../mesh-core/src/authentication/vectors/tokens.txt").lines().next().unwrap();
    let users = format!(
        "
apiVersion: nodemesh.io/v1alpha1
kind: AuthenticationPolicy
metadata: {{name: users, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: pay-2}}}}
  ports: [8080]
  issuers: [{{issuer: 'https://id.example', audiences: [shop], jwks: {{inline: '{keys}'}}}}]
"
    );
    world.yaml.write("users.yaml", &users).unwrap();
    until("the policy on end users is in force", TIMEOUT, || {
        let answer = ask(&world, &get("/v2", ""))?;
        holds(answer.starts_with("HTTP/1.1 401 "), || answer.clone())
    });
    let answer = ask(&world, &get("/v2", "Authorization: Bearer x\r\n")).unwrap();
    assert!(answer.to_lowercase().contains("www-authenticate: bearer error=\"invalid_token\""), "{answer}");
    let bearing = format!("Authorization: Bearer {token}\r\n");
    assert!(ask(&world, &get("/v2", &bearing)).unwrap().contains("pay-2 saw"));
    assert!(ask(&world, &get("/v2/admin", &bearing)).unwrap().starts_with("HTTP/1.1 403 "));
    let line = world.agent("b").wait_log("the refusal", |line: &Value| line["reason"] == "token_malformed");
    assert_eq!(line["status"], 401, "{line}");
}

/// An issuer that publishes keys by https, on the controller's own machine.
struct Issuer {
    certificate: String,
    keys: Arc<Mutex<String>>,
    _server: Server,
}

impl Issuer {
    fn start(world: &World, at: SocketAddr) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![at.ip().to_string()]).unwrap();
        let own = params.self_signed(&key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.der().clone()], key.serialize_der().try_into().unwrap())
            .unwrap();
        let (config, keys) = (Arc::new(config), Arc::new(Mutex::new(String::new())));
        let published = keys.clone();
        let answer: apps::Handler = Arc::new(move |stream| {
            let session = rustls::ServerConnection::new(config.clone()).map_err(io::Error::other)?;
            let mut stream = rustls::StreamOwned::new(session, stream);
            let mut head = vec![];
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                head.extend(byte);
            }
            let keys = published.lock().unwrap().clone();
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{keys}", keys.len())?;
            stream.conn.send_close_notify();
            stream.flush()
        });
        let listener = world.controller().admin().0.enter(|| TcpListener::bind(at)).unwrap().unwrap();
        let server = Server::start(vec![listener], answer).unwrap();
        Self { certificate: own.pem(), keys, _server: server }
    }

    /// From now on these are its keys. A controller that starts again asks for them.
    fn publish(&self, world: &World, keys: &[&Value]) {
        *self.keys.lock().unwrap() = serde_json::json!({ "keys": keys }).to_string();
        world.controller().kill().unwrap();
        world.controller().start().unwrap();
    }
}

#[test]
fn keys_of_a_url_reach_the_agents_and_so_do_those_that_take_their_place() {
    let world = World::shop().service("shop/pay", "db", 80, 8080).build().unwrap();
    let app = world.workload("db").serve(8080, apps::http("db")).unwrap();
    let at = ([127, 0, 0, 1], 8443).into();
    let issuer = Issuer::start(&world, at);
    let set = include_str!("../../mesh-core/src/authentication/vectors/jwks.json");
    let set: Value = serde_json::from_str(set).unwrap();
    let key = |id: &str| set["keys"].as_array().unwrap().iter().find(|key| key["kid"] == id).unwrap();
    let tokens: Vec<&str> =
        include_str!("../../mesh-core/src/authentication/vectors/tokens.txt").lines().collect();
    // Of the one key, and of the one that takes its place.
    let (old, new) = (tokens[0], tokens[tokens.len() - 1]);
    *issuer.keys.lock().unwrap() = serde_json::json!({ "keys": [key("rsa")] }).to_string();
    let bundle = issuer.certificate.replace('\n', "\n        ");
    let users = format!(
        "
apiVersion: nodemesh.io/v1alpha1
kind: AuthenticationPolicy
metadata: {{name: users, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: db}}}}
  ports: [8080]
  issuers:
  - issuer: https://id.example
    audiences: [shop]
    jwks:
      url: https://{at}/keys
      caBundle: |
        {bundle}
"
    );
    world.yaml.write("users.yaml", &users).unwrap();
    let awaited = |what: &str, of_old: &str, of_new: &str| {
        until(what, TIMEOUT, || {
            for (token, status) in [(old, of_old), (new, of_new)] {
                let answer = ask(&world, &get("/", &format!("Authorization: Bearer {token}\r\n")))?;
                holds(answer.starts_with(&format!("HTTP/1.1 {status} ")), || answer.clone())?;
            }
            Ok(())
        });
    };
    awaited("the key is fetched", "200", "401");
    let listed = world.meshctl(&["get", "authentication"]).unwrap().stdout;
    for part in ["shop/users", "https://id.example", "1 key(s) of https://127.0.0.1:8443/keys", "shop/db"] {
        assert!(listed.contains(part), "{part} is not in\n{listed}");
    }
    issuer.publish(&world, &[key("rsa"), key("ed")]);
    awaited("both keys count", "200", "200");
    issuer.publish(&world, &[key("ed")]);
    awaited("the old key counts no more", "401", "200");
    let refused = |line: &Value| line["reason"] == "token_key_unknown" && line["direction"] == "inbound";
    world.agent("b").wait_log("the refusal of the old key", refused);
    drop(app);
}
