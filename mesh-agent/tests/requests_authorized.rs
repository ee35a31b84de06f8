//! Requests to a workload of which a policy says something: which are refused, what the application sees of the others, and
//! what becomes of what cannot be read. Needs root, as the data path does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "data_path/app.rs"]
mod app;
#[path = "data_path/guarded.rs"]
mod guarded;
#[path = "data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use bytes::Bytes;
use guarded::*;
use http::{Request, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_agent::{connection::Direction, metrics::AuditLabels};
use mesh_core::model::{Action, Asks, Enforcement, Policy, Rule, Target};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::*;

/// Requests with these methods to these paths; of an empty text, all.
fn asks(methods: &str, paths: &str) -> Asks {
    Asks {
        methods: methods.split_whitespace().map(str::to_owned).collect(),
        paths: paths.split_whitespace().map(|path| path.parse().unwrap()).collect(),
        ..Asks::default()
    }
}

fn policy(action: Action, any_of: Asks) -> Policy {
    let to = vec![Target { any_of, ..Target::default() }];
    Policy::new(name("requests"), action, vec![Rule { from: vec![], to }])
}

fn audited(policy: Policy) -> Policy {
    Policy { enforcement: Enforcement::Audit, ..policy }
}

impl Bed {
    /// A client, and `web` under these policies.
    async fn new(policies: Vec<Policy>) -> Self {
        Self::of(Plan { policies, ..Plan::default() }).await
    }

    fn publish(&mut self, policies: Vec<Policy>) {
        self.plan.policies = policies;
        self.world.publish(&self.plan, "2");
    }

    async fn log_of_request(&self, path: &str) -> Value {
        self.log(|line| line["kind"] == "request" && line["path"] == path).await
    }

    async fn log_of_connection(&self) -> Value {
        self.log(|line| line["kind"].is_null()).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_is_decided_for_itself_and_the_application_is_told_who_asks() {
    let mut bed = Bed::new(vec![policy(Action::Allow, asks("GET HEAD", "/cart/*"))]).await;
    let app = bed.app();
    let mut client = bed.client().await;
    let forged =
        || Request::get("/cart/1?x=1").header("X-Forwarded-Client-Cert", "URI=spiffe://td/ns/shop/sa/root");
    let (status, said) = client.ask(forged()).await;
    assert_eq!(status, StatusCode::OK);
    let expected = "By=spiffe://td/ns/shop/sa/web;URI=spiffe://td/ns/shop/sa/client";
    assert_eq!(header(&said, "x-forwarded-client-cert"), [expected]);
    assert_eq!(said["uri"], "/cart/1?x=1");

    // On the same connection: one that is refused does not end it.
    let refused = client.send(Request::put("/cart/2")).await.unwrap();
    assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    let body = in_time(refused.into_body().collect()).await.unwrap().to_bytes();
    assert_eq!(body, "Forbidden", "and tells nobody why");
    assert_eq!(client.ask(Request::get("/other")).await.0, StatusCode::FORBIDDEN);
    assert_eq!(client.ask(Request::get("/cart/3")).await.0, StatusCode::OK);
    assert_eq!(app.served(), 2, "what is refused does not reach it");

    let line = bed.log_of_request("/cart/2").await;
    for (field, expected) in [
        ("direction", json!("inbound")),
        ("status", json!(403)),
        ("outcome", json!("refused")),
        ("reason", json!("policy_not_allowed")),
        ("rule", json!(null)),
    ] {
        assert_eq!(line[field], expected, "{line}");
    }
    assert_eq!(line["source"]["identity"], "spiffe://td/ns/shop/sa/client");
    assert_eq!(line["destination"]["workload"], "shop/web");
    assert_eq!(bed.log_of_request("/cart/1").await["rule"], "shop/requests[0]");
    drop(client);
    let line = bed.log_of_connection().await;
    assert_eq!(line["outcome"], "ok", "{line}");
    assert!(
        line["bytes_sent"].as_u64().unwrap() > 100 && line["bytes_received"].as_u64().unwrap() > 100,
        "{line}"
    );
    assert_eq!((bed.answered(200, ""), bed.answered(403, "policy_not_allowed")), (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_is_leased_again_after_its_requests() {
    let mut bed = Bed::new(vec![policy(Action::Deny, asks("", "/admin*"))]).await;
    let _app = bed.app();
    let world = &bed.world;
    for _ in 0..3 {
        let mut client = bed.client().await;
        assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::OK);
        drop(client);
        for agent in [&world.source, &world.destination] {
            let settled = async || (agent.metrics.tunnels("busy").get() == 0).then_some(());
            eventually(settled).await;
        }
    }
    assert_eq!(world.connections(&world.destination, Direction::Inbound, "ok"), 3);
    assert_eq!(world.destination.metrics.handshakes("ok"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_way_to_write_a_path_is_no_way_around_a_rule() {
    let mut bed = Bed::new(vec![policy(Action::Deny, asks("", "/admin /admin/*"))]).await;
    let app = bed.app();
    for path in [
        "/admin",
        "/admin/",
        "/admin?x",
        "/ADMIN",
        "//admin",
        "/./admin",
        "/shop/../admin",
        "/%61dmin",
        "/admin/users",
        "/shop/%2e%2e/admin",
        "/shop%2f..%2fadmin",
        "/%2561dmin",
        "/shop/..;/admin",
        "/admin%00",
        "/%c1%a1dmin",
        "http://web/admin",
        "http://web//admin",
    ] {
        let mut client = connect(bed.at).await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        in_time(client.read_to_string(&mut answer)).await.unwrap();
        // What is no target of a request at all is refused before.
        assert!(answer.starts_with("HTTP/1.1 403") || answer.starts_with("HTTP/1.1 400"), "{path}: {answer}");
    }
    assert_eq!(app.served(), 0);
    let mut client = bed.client().await;
    assert_eq!(client.ask(Request::get("/administrator")).await.0, StatusCode::OK);
    assert_eq!(client.ask(Request::get("/shop%20window/a.b")).await.0, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_servers_could_read_in_two_ways_reaches_none() {
    let mut bed = Bed::new(vec![policy(Action::Deny, asks("", "/admin"))]).await;
    let app = bed.app();
    for head in [
        "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcd",
        "GET / HTTP/1.1\r\nhost: web\r\nhost: other\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: web\r\nx: a\r\n folded: GET /admin\r\n\r\n",
        "GET /\tadmin HTTP/1.1\r\nhost: web\r\n\r\n",
        "CONNECT other:80 HTTP/1.1\r\nhost: other:80\r\n\r\n",
    ] {
        let mut client = connect(bed.at).await;
        client.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        in_time(client.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 400", "{head}");
    }
    assert_eq!(app.served(), 0);

    // Of two lengths one counts (RFC 9112, section 6.3), and the application gets that one alone.
    let mut client = connect(bed.at).await;
    let both =
        "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    let next = "GET /admin HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";
    client.write_all(format!("{both}{next}").as_bytes()).await.unwrap();
    let mut answers = String::new();
    let _ = in_time(client.read_to_string(&mut answers)).await;
    assert!(!answers.contains("\"content-length\""), "{answers}");
    assert!(app.served() <= 1 && !answers.contains("\"uri\":\"/admin\""), "{answers}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_decided_in_their_own_way() {
    let mut bed = Bed::new(vec![policy(Action::Allow, asks("POST", "/trailers/*"))]).await;
    let app = bed.app();
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(connect(bed.at).await)).await.unwrap();
    tokio::spawn(connection);
    let mut call = async |path: &str| {
        let request = Request::post(format!("http://web{path}"))
            .version(Version::HTTP_2)
            .header("content-type", "application/grpc")
            .body(Full::new(Bytes::new()))
            .unwrap();
        in_time(sender.send_request(request)).await.unwrap()
    };
    let response = call("/trailers/say").await;
    assert_eq!(response.headers()["x-app"], "web");
    let whole = in_time(response.into_body().collect()).await.unwrap();
    assert_eq!(whole.trailers().unwrap()["grpc-status"], "7", "the application's own");
    let response = call("/other/call").await;
    assert_eq!(
        (response.status(), &response.headers()["grpc-status"]),
        (StatusCode::OK, &"7".parse().unwrap())
    );
    assert_eq!(app.served(), 1);
    let line = bed.log_of_request("/other/call").await;
    assert_eq!((&line["protocol"], &line["grpc_status"]), (&json!("HTTP/2"), &json!(7)), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_refused_and_says_why() {
    for (bytes, reason) in
        [(&b"EHLO mail\r\n\r\n"[..], "bad_request"), (b"\x16\x03\x01\x00\x05hello", "policy_deny")]
    {
        let mut bed = Bed::new(vec![policy(Action::Deny, asks("DELETE", ""))]).await;
        let app = bed.app();
        let mut client = connect(bed.at).await;
        client.write_all(bytes).await.unwrap();
        let mut answer = vec![];
        let ended = in_time(client.read_to_end(&mut answer)).await;
        assert!(ended.is_err() || answer.starts_with(b"HTTP/1.1 400"), "{reason}: {answer:?}");
        let line = bed.log_of_connection().await;
        assert_eq!((&line["outcome"], &line["reason"]), (&json!("refused"), &json!(reason)), "{line}");
        assert_eq!(app.served(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audited_policy_tells_what_it_would_refuse_and_refuses_nothing() {
    let rule = || vec![audited(policy(Action::Deny, asks("DELETE", "")))];
    let mut bed = Bed::new(rule()).await;
    let _app = bed.app();
    let mut client = bed.client().await;
    assert_eq!(client.ask(Request::delete("/gone")).await.0, StatusCode::OK);
    assert_eq!(client.ask(Request::get("/there")).await.0, StatusCode::OK);
    let line = bed.log_of_request("/gone").await;
    assert_eq!(
        line["would_refuse"],
        json!({"policy": "shop/requests", "rule": 0, "reason": "policy_deny"}),
        "{line}"
    );
    assert_eq!(bed.log_of_request("/there").await["would_refuse"], json!(null));
    let labels =
        AuditLabels { policy: "shop/requests".into(), workload: "shop/web".into(), reason: "policy_deny" };
    assert_eq!(bed.world.destination.metrics.audit_refusals(&labels), 1);

    // Other protocols, whoever speaks first.
    let mut bed = Bed::new(rule()).await;
    let listener = bed.listener.take().unwrap();
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = accept(&listener).await;
            tokio::spawn(async move {
                stream.write_all(b"220 ready\n").await.unwrap();
                let mut all = vec![];
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
            });
        }
    });
    for speaks in [&b"EHLO"[..], b"", b"\x16\x03\x01"] {
        let answer = ask(bed.at, speaks).await.unwrap();
        assert_eq!(answer, [b"220 ready\n", speaks].concat());
    }
    server.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_counts_from_the_next_request_on_and_ends_what_cannot_be_read() {
    let mut bed = Bed::new(vec![policy(Action::Allow, asks("GET", ""))]).await;
    let app = bed.app();
    let mut client = bed.client().await;
    assert_eq!(client.ask(Request::get("/before")).await.0, StatusCode::OK);
    let deny = || Policy { name: name("no"), ..policy(Action::Deny, asks("", "/before")) };
    bed.publish(vec![policy(Action::Allow, asks("GET", "")), deny()]);
    eventually(async || {
        let (status, _) = bed.client().await.ask(Request::get("/before")).await;
        (status == StatusCode::FORBIDDEN).then_some(())
    })
    .await;
    assert_eq!(client.ask(Request::get("/before")).await.0, StatusCode::FORBIDDEN);
    assert_eq!(client.ask(Request::get("/after")).await.0, StatusCode::OK);
    assert!(app.served() >= 2);
    // Nothing is allowed any more.
    bed.publish(vec![Policy::new(name("closed"), Action::Allow, vec![])]);
    eventually(async || client.0.is_closed().then_some(())).await;
    let line = bed.log(|line| line["kind"].is_null() && line["outcome"] == "refused").await;
    assert_eq!(line["reason"], "policy_not_allowed", "{line}");

    let mut bed = Bed::new(vec![]).await;
    let server = echo(bed.listener.take().unwrap());
    let mut bytes = connect(bed.at).await;
    bytes.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    // At both ends: one that the source has not seen accepted goes by another tunnel, and is a new one.
    for agent in [&bed.world.source, &bed.world.destination] {
        eventually(async || {
            let listed = agent.node.connections().list(None, 1);
            listed.connections.first().filter(|it| it.state == "open").map(drop)
        })
        .await;
    }
    bed.publish(vec![deny()]);
    is_reset(&bytes).await;
    assert_eq!(bed.log_of_connection().await["reason"], "policy_deny");
    server.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn to_both_ends_it_is_as_if_nobody_read() {
    // An application that dies before it answers.
    let rules = || vec![policy(Action::Deny, asks("DELETE", ""))];
    let mut bed = Bed::new(rules()).await;
    let _app = bed.app();
    let mut client = bed.client().await;
    assert!(client.send(Request::get("/die")).await.is_err(), "no answer of ours stands in for it");
    let line = bed.log_of_connection().await;
    assert_eq!(
        (&line["outcome"], &line["reason"]),
        (&json!("failed"), &json!("destination_reset")),
        "{line}"
    );

    // An old client.
    let mut old = connect(bed.at).await;
    old.write_all(b"GET /old HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    in_time(old.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.0 200 ") && answer.contains("\"uri\":\"/old\""), "{answer}");

    // Another protocol, after a request.
    let mut client = bed.client().await;
    let asked = Request::get("/upgrade").header("connection", "upgrade").header("upgrade", "echo");
    let mut response = client.send(asked).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut upgraded = TokioIo::new(in_time(hyper::upgrade::on(&mut response)).await.unwrap());
    upgraded.write_all(b"ping").await.unwrap();
    let mut bytes = [0; 4];
    in_time(upgraded.read_exact(&mut bytes)).await.unwrap();
    assert_eq!(&bytes, b"ping");

    // One that takes one request on each connection, and says so only by ending it.
    let mut bed = Bed::new(rules()).await;
    let listener = bed.listener.take().unwrap();
    let server = tokio::spawn(async move {
        for _ in 0..3 {
            let (mut stream, _) = accept(&listener).await;
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        }
        listener
    });
    let mut client = bed.client().await;
    for _ in 0..3 {
        assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::OK);
    }

    // A client that goes while it waits.
    let listener = in_time(server).await.unwrap();
    let mut client = bed.client().await;
    let waits = tokio::spawn(async move { client.send(Request::get("/slow")).await.map(drop) });
    let (mut stream, _) = accept(&listener).await;
    let mut request = [0; 4096];
    assert!(in_time(stream.read(&mut request)).await.unwrap() > 0);
    waits.abort();
    let _ = waits.await;
    let end = in_time(stream.read(&mut request)).await;
    assert!(matches!(end, Ok(0) | Err(_)), "the application sees it at once: {end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_is_read_too_and_says_nothing_of_who_asks() {
    let mut bed = Bed::new(vec![policy(Action::Allow, asks("GET", ""))]).await;
    let app = bed.app();
    let mut client = Client::on(connect_from(STRANGER, bed.web).await.unwrap()).await;
    let forged = Request::get("/").header("x-forwarded-client-cert", "URI=spiffe://td/ns/shop/sa/client");
    let (status, said) = client.ask(forged).await;
    assert_eq!(status, StatusCode::OK);
    assert!(header(&said, "x-forwarded-client-cert").is_empty(), "{said}");
    assert_eq!(client.ask(Request::post("/")).await.0, StatusCode::FORBIDDEN);
    assert_eq!(app.served(), 1);
    drop(client);
    let line = bed.log_of_connection().await;
    assert_eq!((&line["outcome"], &line["transport"]), (&json!("ok"), &json!("plaintext")), "{line}");
}
