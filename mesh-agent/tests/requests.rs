//! Requests through two agents, from client to backend: under which rule they fall, what is changed on the way, what
//! happens when a backend does not answer, and what is recorded. Needs root, as the data path does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "data_path/app.rs"]
mod app;
#[path = "data_path/bed.rs"]
mod bed;
#[path = "data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use app::*;
use bed::*;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use mesh_core::model::http::{
    Backend, BackendTarget, Filters, HeaderEdits, PathEdit, PathMatch, PersistBy, Persistence, Redirect,
    RequestMatch, RequestRoute, Retry, Rewrite, RouteKind, RouteRule, TextMatch, Timeouts, ValueMatch,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Mutex, watch},
};
use world::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_where_its_rule_leads_by_a_tunnel_of_its_own_identity() {
    let header = ValueMatch { name: "version".into(), value: TextMatch::Exact("two".into()) };
    let by_header = RequestMatch { headers: vec![header], ..RequestMatch::default() };
    let rules = vec![
        rule(vec![prefix("/v1")], vec![to("web", 1)]),
        rule(vec![prefix("/v2"), by_header], vec![to("api", 1)]),
    ];
    let bed = Bed::new(rules).await;
    let mut client = bed.client().await;
    // One connection of the client's, and every request on its own way.
    for (request, expected) in [
        (Request::get("/v1/a"), Some("web")),
        (Request::get("/v2?x=1"), Some("api")),
        (Request::get("/other").header("Version", "two"), Some("api")),
        (Request::get("/v1").header("version", "two"), Some("web")),
        (Request::get("/other"), None),
    ] {
        let (status, said) = client.ask(request).await;
        match expected {
            Some(app) => assert_eq!((status, &said["app"]), (StatusCode::OK, &json!(app))),
            None => assert_eq!(status, StatusCode::NOT_FOUND),
        }
    }
    let line = bed.log("/v2").await;
    assert_eq!(
        (&line["route"], &line["rule"], &line["status"]),
        (&json!("HTTPRoute/shop/route"), &json!("1"), &json!(200))
    );
    assert_eq!(
        (&line["backend"], &line["destination"]["workload"]),
        (&json!("shop/api"), &json!("shop/api"))
    );
    assert_eq!(line["source"]["identity"], "spiffe://td/ns/shop/sa/client");
    let line = bed.log("/other").await;
    assert!(line["reason"] == "no_rule" || line["status"] == 200, "{line}");
    // Two backends, one connection each, whatever the number of requests.
    drop(client);
    assert_eq!((bed.web.served(), bed.api.served()), (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_are_as_the_weights_and_no_request_waits_for_another() {
    let bed = Bed::new(vec![rule(vec![], vec![to("web", 3), to("api", 1)])]).await;
    let clients: Vec<_> = (0..8)
        .map(|_| async {
            let mut client = bed.client().await;
            for _ in 0..100 {
                assert_eq!(client.get("/").await.0, StatusCode::OK);
            }
        })
        .collect();
    futures_util::future::join_all(clients).await;
    let share = bed.web.served() as f64 / (bed.web.served() + bed.api.served()) as f64;
    assert!((0.69..0.81).contains(&share), "{share}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_filters_say_is_done_on_the_way() {
    let edits = HeaderEdits {
        set: vec![("x-set".into(), "new".into())],
        add: vec![("x-add".into(), "more".into())],
        remove: vec!["x-gone".into()],
    };
    let filters = Filters {
        request_headers: edits,
        response_headers: HeaderEdits {
            set: vec![("x-seen".into(), "yes".into())],
            ..HeaderEdits::default()
        },
        rewrite: Some(Rewrite {
            hostname: Some("backend.example".into()),
            path: Some(PathEdit::Prefix("/new".into())),
        }),
        ..Filters::default()
    };
    let away = Redirect {
        scheme: Some("https".into()),
        hostname: Some("elsewhere".into()),
        path: Some(PathEdit::Full("/there".into())),
        port: None,
        status: 308,
    };
    let redirect = Filters { redirect: Some(away), ..Filters::default() };
    let bed = Bed::new(vec![
        RouteRule { filters, ..rule(vec![prefix("/old")], vec![to("web", 1)]) },
        RouteRule { filters: redirect, ..rule(vec![prefix("/away")], vec![]) },
    ])
    .await;
    let mut client = bed.client().await;
    let request = Request::get("/old/a?b=c")
        .header("x-set", "old")
        .header("x-add", "some")
        .header("x-gone", "1")
        .header("connection", "x-hop")
        .header("x-hop", "1");
    let response = client.send(request, "").await;
    assert_eq!(
        (&response.headers()["x-seen"], &response.headers()["x-app"]),
        (&"yes".parse().unwrap(), &"web".parse().unwrap())
    );
    let (_, said) = said(response).await;
    assert_eq!(said["uri"], "/new/a?b=c");
    let headers: Vec<(String, String)> = serde_json::from_value(said["headers"].clone()).unwrap();
    let of =
        |name: &str| headers.iter().filter(|it| it.0 == name).map(|it| it.1.as_str()).collect::<Vec<_>>();
    assert_eq!(
        (of("x-set"), of("x-add"), of("x-gone"), of("x-hop")),
        (vec!["new"], vec!["some", "more"], vec![], vec![])
    );
    assert_eq!(of("host"), ["backend.example"]);

    let response = client.send(Request::get("/away?q=1"), "").await;
    assert_eq!(response.status(), StatusCode::PERMANENT_REDIRECT);
    assert_eq!(response.headers()["location"], "https://elsewhere/there?q=1");
}

/// By which applications say which requests belong together (W3C Trace Context, B3): an agent that makes no spans spoils none.
#[tokio::test(flavor = "multi_thread")]
async fn headers_of_tracing_pass_unchanged() {
    let bed = Bed::new(vec![rule(vec![], vec![to("web", 1)])]).await;
    let sent = [
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("tracestate", "a=00f067aa0ba902b7,b=t61rcWkgMzE"),
        ("baggage", "user=one,tier=2;x=y"),
        ("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90"),
        ("x-b3-traceid", "80f198ee56343ba864fe8b2a57d3eff7"),
        ("x-b3-spanid", "e457b5a2e4d86bd1"),
        ("x-b3-parentspanid", "05e3ac9a4f6e3b90"),
        ("x-b3-sampled", "1"),
        ("x-b3-flags", "0"),
    ];
    let request = sent.iter().fold(Request::get("/"), |request, (name, value)| request.header(*name, *value));
    let (status, said) = bed.client().await.ask(request).await;
    assert_eq!(status, StatusCode::OK);
    let arrived: Vec<(String, String)> = serde_json::from_value(said["headers"].clone()).unwrap();
    for (name, value) in sent {
        let found: Vec<&str> = arrived.iter().filter(|it| it.0 == name).map(|it| it.1.as_str()).collect();
        assert_eq!(found, [value], "{name}");
    }
    let plain = bed.client().await.get("/").await.1;
    let plain: Vec<(String, String)> = serde_json::from_value(plain["headers"].clone()).unwrap();
    assert!(plain.iter().all(|it| sent.iter().all(|(name, _)| it.0 != *name)), "none is made up: {plain:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_leads_nowhere_is_answered_and_says_why_in_the_log_alone() {
    let nowhere = Backend { to: BackendTarget::Nowhere, weight: 1, filters: Filters::default() };
    let mut bed = Bed::new(vec![
        rule(vec![prefix("/nowhere")], vec![nowhere]),
        rule(vec![prefix("/nobody")], vec![]),
        rule(vec![prefix("/zero")], vec![to("web", 0)]),
        rule(vec![prefix("/empty")], vec![to("empty", 1)]),
        rule(vec![prefix("/refused")], vec![to("refused", 1)]),
    ])
    .await;
    bed.plan.backend("empty", "web", &[]);
    bed.plan.backend("refused", "web", &[SocketAddr::new(ip(WEB), 1)]);
    bed.world.publish(&bed.plan, "3");
    let mut client = bed.client().await;
    for (path, status, reason) in [
        ("/nowhere", 500, "no_backend"),
        ("/nobody", 500, "no_backend"),
        ("/zero", 500, "no_backend"),
        ("/empty", 503, "no_endpoint"),
        ("/refused", 503, "dial_refused"),
    ] {
        let response = client.send(Request::get(path), "").await;
        assert_eq!(response.status(), status, "{path}");
        let body = in_time(response.into_body().collect()).await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body).to_lowercase();
        assert!(!body.contains("shop") && !body.contains("127."), "{body}");
        let line = bed.log(path).await;
        assert_eq!((&line["outcome"], &line["reason"]), (&json!("refused"), &json!(reason)), "{line}");
    }
    // A call is told in its own way.
    let call = Request::post("/nowhere").header("content-type", "application/grpc");
    let response = client.send(call, "").await;
    assert_eq!(
        (response.status(), &response.headers()["grpc-status"]),
        (StatusCode::OK, &"14".parse().unwrap())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_tried_again_as_its_rule_says_and_given_up_when_its_time_is_over() {
    let retry = Retry { codes: vec![503], attempts: 3, backoff: Duration::from_millis(1) };
    let times = |request, backend| Timeouts {
        request: Some(Duration::from_millis(request)),
        backend: Some(Duration::from_millis(backend)),
    };
    let bed = Bed::new(vec![
        RouteRule { retry: Some(retry.clone()), ..rule(vec![prefix("/unready")], vec![to("web", 1)]) },
        RouteRule {
            retry: Some(retry),
            timeouts: times(10_000, 100),
            ..rule(vec![prefix("/late")], vec![to("api", 1)])
        },
        RouteRule { timeouts: times(100, 100), ..rule(vec![prefix("/never")], vec![to("web", 1)]) },
    ])
    .await;
    let mut client = bed.client().await;
    assert_eq!(client.get("/unready").await.0, StatusCode::OK);
    assert_eq!(bed.log("/unready").await["attempts"], 3);
    // A small body goes along each time.
    assert_eq!(client.send(Request::post("/late"), "once more").await.status(), StatusCode::OK);
    assert_eq!(bed.log("/late").await["attempts"], 2);
    assert_eq!(client.get("/never").await.0, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(bed.log("/never").await["reason"], "request_timeout");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_dies_is_not_noticed_by_who_may_ask_twice() {
    let bed = Bed::new(vec![rule(vec![], vec![to("web", 1)])]).await;
    let mut client = bed.client().await;
    assert_eq!(client.get("/die").await.0, StatusCode::OK);
    assert_eq!(bed.log("/die").await["attempts"], 2);
    drop(bed);

    // Without a rule of its own a POST is not made twice.
    let bed = Bed::new(vec![rule(vec![], vec![to("web", 1)])]).await;
    let mut client = bed.client().await;
    assert_eq!(client.ask(Request::post("/die")).await.0, StatusCode::SERVICE_UNAVAILABLE);
    let line = bed.log("/die").await;
    assert_eq!((&line["attempts"], &line["reason"]), (&json!(1), &json!("backend_reset")));
    // One that was closed while it was idle had taken nothing: even a POST goes to another.
    assert_eq!(client.ask(Request::post("/")).await.0, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_through_with_their_trailers_many_on_one_connection() {
    let mut bed = Bed::new(vec![]).await;
    let call = |service: &str| RequestMatch {
        path: PathMatch::Call { service: Some(TextMatch::Exact(service.into())), method: None },
        ..RequestMatch::default()
    };
    let rules =
        vec![rule(vec![call("trailers")], vec![to("web", 1)]), rule(vec![call("b")], vec![to("api", 1)])];
    bed.plan.routes = vec![RequestRoute { kind: RouteKind::Grpc, ..route(rules) }];
    bed.world.publish(&bed.plan, "3");
    let caller = bed.caller().await;
    let all: Vec<_> = (0..50).map(|_| caller.call("/b/c")).collect();
    for response in futures_util::future::join_all(all).await {
        assert_eq!(response.headers()["x-app"], "api");
    }
    let unknown = caller.call("/nobody/c").await;
    assert_eq!(
        (unknown.status(), &unknown.headers()["grpc-status"]),
        (StatusCode::OK, &"12".parse().unwrap())
    );
    drop(unknown);
    bed.plan.routes[0].rules[0].matches = vec![];
    bed.world.publish(&bed.plan, "4");
    let response = caller.call("/trailers/say").await;
    let collected = in_time(response.into_body().collect()).await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "7");
    assert_eq!(bed.log("/trailers/say").await["grpc_status"], 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_go_on_in_another_protocol() {
    let bed = Bed::new(vec![rule(vec![], vec![to("web", 1)])]).await;
    let mut client = bed.client().await;
    let asked = Request::get("/upgrade").header("connection", "Upgrade").header("upgrade", "echo");
    let mut response = client.send(asked, "").await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["upgrade"], "echo");
    let mut stream = TokioIo::new(in_time(hyper::upgrade::on(&mut response)).await.unwrap());
    stream.write_all(b"ping").await.unwrap();
    let mut bytes = [0; 4];
    in_time(stream.read_exact(&mut bytes)).await.unwrap();
    assert_eq!(&bytes, b"ping");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_could_be_read_in_two_ways_or_is_no_http_gets_no_further() {
    let bed = Bed::new(vec![rule(vec![], vec![to("web", 1)])]).await;
    for request in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\n folded: c\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "CONNECT b:80 HTTP/1.1\r\nHost: b:80\r\n\r\n",
        "\x05not http at all\r\n\r\n",
    ] {
        let mut stream = connect(bed.at).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = vec![];
        // It may be reset behind the answer: what it sent was not read to its end.
        let _ = in_time(stream.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 4") || answer.is_empty(), "{request:?}: {answer:?}");
    }
    assert_eq!(bed.web.served(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_encrypted_between_applications_is_carried_as_it_is() {
    let mut bed = Bed::new(vec![rule(vec![], vec![to("api", 1)])]).await;
    let (at, listener) = bed.world.web().await;
    echo(listener);
    bed.plan.services.clear();
    bed.plan.service(&[("web", at)]);
    bed.world.publish(&bed.plan, "3");
    let hello = [b"\x16\x03\x01\x00\x05".as_slice(), b"hello"].concat();
    assert_eq!(
        ask(bed.at, &hello).await.unwrap(),
        hello,
        "by the service itself, and not by its route's backend"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_come_and_go_under_a_connection_that_lives() {
    let mut bed = Bed::new(vec![rule(vec![], vec![to("web", 1)])]).await;
    let mut client = bed.client().await;
    assert_eq!(client.get("/").await.1["app"], "web");
    bed.plan.routes = vec![route(vec![rule(vec![], vec![to("api", 1)])])];
    bed.world.publish(&bed.plan, "3");
    assert_eq!(client.get("/").await.1["app"], "api");
    bed.plan.routes = vec![];
    bed.world.publish(&bed.plan, "4");
    for _ in 0..20 {
        assert_eq!(client.get("/").await.0, StatusCode::OK);
    }
    assert!(bed.web.served() > 1 && bed.api.served() > 1, "both serve the service itself");
    // A connection that begins now is one of bytes.
    let mut stream = connect(bed.at).await;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = vec![];
    in_time(stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.0 200"), "{}", String::from_utf8_lossy(&answer));
}

/// A rule of this number: it leads to one of two applications, and its answers say which rule it is.
fn numbered(number: usize) -> RequestRoute {
    let response_headers =
        HeaderEdits { set: vec![("x-rule".into(), number.to_string())], ..HeaderEdits::default() };
    let filters = Filters { response_headers, ..Filters::default() };
    route(vec![RouteRule { filters, ..rule(vec![], vec![to(["web", "api"][number % 2], 1)]) }])
}

/// Which rules there are, while they change.
#[derive(Default)]
struct Changes {
    /// The newest that may be in force.
    begun: AtomicUsize,
    /// The oldest that may be.
    in_force: AtomicUsize,
    done: AtomicBool,
}

/// Asks without pause, until there are no more changes: each answer has to be by a rule, whole, that was in force since it was
/// asked for. Tells of each.
async fn asks_throughout<F>(changes: Arc<Changes>, seen: watch::Sender<usize>, ask: impl Fn() -> F) -> usize
where
    F: Future<Output = Response<Incoming>>,
{
    let mut asked = 0;
    while !changes.done.load(Ordering::SeqCst) {
        let oldest = changes.in_force.load(Ordering::SeqCst);
        let answer = ask().await;
        let newest = changes.begun.load(Ordering::SeqCst);
        assert_eq!(answer.status(), StatusCode::OK, "request {asked}");
        let number: usize = answer.headers()["x-rule"].to_str().unwrap().parse().unwrap();
        assert!((oldest..=newest).contains(&number), "rule {number} was not in force: {oldest} to {newest}");
        assert_eq!(answer.headers()["x-app"], ["web", "api"][number % 2], "a rule is one with its backends");
        in_time(answer.into_body().collect()).await.unwrap();
        seen.send_replace(number);
        asked += 1;
    }
    asked
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_change_all_the_time_disturb_no_request() {
    const EACH: usize = 100;
    let mut bed = Bed::new(vec![]).await;
    bed.plan.routes = vec![numbered(0)];
    bed.world.publish(&bed.plan, "rule 0");
    let changes = Arc::new(Changes::default());
    let (mut clients, mut seen) = (vec![], vec![]);
    let tells = |seen: &mut Vec<_>| {
        let (tells, by) = watch::channel(0);
        seen.push(by);
        tells
    };
    // Each connection is opened once: one that ends fails its client.
    for _ in 0..2 {
        let client = Arc::new(Mutex::new(bed.client().await));
        let ask = move || {
            let client = client.clone();
            async move { client.lock().await.send(Request::get("/"), "").await }
        };
        clients.push(tokio::spawn(asks_throughout(changes.clone(), tells(&mut seen), ask)));
    }
    let streams = bed.caller().await.0;
    for _ in 0..4 {
        let sender = streams.clone();
        let ask = move || {
            let mut sender = sender.clone();
            let request = Request::get("http://service/").version(Version::HTTP_2).body(Empty::new());
            async move { in_time(sender.send_request(request.unwrap())).await.unwrap() }
        };
        clients.push(tokio::spawn(asks_throughout(changes.clone(), tells(&mut seen), ask)));
    }
    // First each waits until everybody was answered by it, then each follows the one before at once.
    for number in 1..=2 * EACH {
        bed.plan.routes = vec![numbered(number)];
        changes.begun.store(number, Ordering::SeqCst);
        bed.world.publish(&bed.plan, &format!("rule {number}"));
        changes.in_force.store(number, Ordering::SeqCst);
        if number > EACH && number < 2 * EACH {
            continue;
        }
        for seen in &mut seen {
            in_time(seen.wait_for(|seen| *seen == number)).await.expect("its client asks still");
        }
    }
    changes.done.store(true, Ordering::SeqCst);
    for client in clients {
        assert!(client.await.unwrap() > EACH, "it was answered by every rule that was waited for");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_stays_where_it_began() {
    let persistence = Persistence { name: "session".into(), by: PersistBy::Header, lifetime: None };
    let rule = RouteRule { persistence: Some(persistence), ..rule(vec![], vec![to("web", 1), to("api", 1)]) };
    let bed = Bed::new(vec![rule]).await;
    let mut client = bed.client().await;
    let first = client.send(Request::get("/"), "").await;
    let session = first.headers()["session"].clone();
    let (_, began) = said(first).await;
    for _ in 0..20 {
        let response = client.send(Request::get("/").header("session", session.clone()), "").await;
        assert!(!response.headers().contains_key("session"));
        assert_eq!(said(response).await.1["app"], began["app"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_pass_unchanged_both_ways() {
    let bed = Bed::new(vec![rule(vec![], vec![to("web", 1)])]).await;
    let mut stream = connect(bed.at).await;
    const LEN: usize = 40 << 20;
    let head =
        format!("POST /large HTTP/1.1\r\nHost: a\r\nContent-Length: {LEN}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    in_time(stream.write_all(&pattern(LEN, 1))).await.unwrap();
    let mut answer = vec![];
    in_time(stream.read_to_end(&mut answer)).await.unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.contains(&format!("\"length\":{LEN}")), "{answer}");
    let lines = eventually(async || {
        let lines = bed.world.source.log().await;
        lines.iter().any(|line| line["kind"] != "request").then_some(lines)
    })
    .await;
    let connection = lines.iter().find(|line| line["kind"] != "request").unwrap();
    assert_eq!(connection["outcome"], "ok", "{connection}");
    assert!(connection["bytes_sent"].as_u64().unwrap() > LEN as u64, "{connection}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_drains_keeps_no_connection_for_requests_to_come() {
    let bed = Bed::new(vec![rule(vec![], vec![to("web", 1)])]).await;
    let mut client = connect(bed.at).await;
    let begins = b"POST / HTTP/1.1\r\nhost: service\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n";
    client.write_all(begins).await.unwrap();
    eventually(async || (bed.web.served() == 1).then_some(())).await;
    let drain = bed.world.source.drain.clone();
    let drained = tokio::spawn(async move { drain.drain(Duration::from_secs(10)).await });
    eventually(async || bed.world.source.drain.is_draining().then_some(())).await;
    client.write_all(b"0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    in_time(client.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert_eq!(drained.await.unwrap(), 0, "the one to the backend is not waited for until it is cut");
    bed.web.task.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_drains_answers_what_is_under_way_and_takes_nothing_more() {
    let times = Timeouts { request: Some(Duration::from_secs(1)), backend: None };
    let bed = Bed::new(vec![RouteRule { timeouts: times, ..rule(vec![], vec![to("web", 1)]) }]).await;
    let mut client = bed.client().await;
    assert_eq!(client.get("/").await.0, StatusCode::OK);
    let under_way = tokio::spawn(async move { (client.get("/never").await.0, client) });
    eventually(async || (bed.web.served() == 2).then_some(())).await;
    assert_eq!(bed.world.source.drain.drain(Duration::from_secs(10)).await, 0);
    let (status, mut client) = under_way.await.unwrap();
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT, "it was answered, not cut");
    assert!(client.0.ready().await.is_err(), "the connection has ended");
    bed.web.task.abort();
}
