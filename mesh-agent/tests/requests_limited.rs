//! Requests to a workload that takes only so many and only so large ones: which are answered by its agent, what their senders are
//! told, and what the application sees of the others. Needs root, as the data path does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "data_path/app.rs"]
mod app;
#[path = "data_path/guarded.rs"]
#[allow(dead_code, reason = "others look at headers that the application has seen")]
mod guarded;
#[path = "data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use std::{collections::BTreeMap, convert::Infallible, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use guarded::*;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::model::{
    Action, Asks, Policy, Rule,
    intake::{Intake, PortIntake, RateBy, RateLimit, Sizes},
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::*;

const HOUR: Duration = Duration::from_secs(3600);

/// Two in an hour: within a test none comes.
fn two(index: u32, by: RateBy) -> RateLimit {
    let only = Asks::default();
    RateLimit { policy: name("few"), index, by, requests: 2, per: HOUR, burst: 2, only }
}

fn sizes(head: Option<u32>, body: Option<u64>) -> PortIntake {
    PortIntake { sizes: Sizes { head, body }, ..PortIntake::default() }
}

fn rates(rates: Vec<RateLimit>) -> PortIntake {
    PortIntake { rates, ..PortIntake::default() }
}

impl Bed {
    /// A client, and `web`, which takes so much.
    async fn taking(of_port: PortIntake) -> Self {
        let mut bed = Self::of(Plan::default()).await;
        bed.limit(of_port, "2");
        bed
    }

    fn limit(&mut self, of_port: PortIntake, version: &str) {
        let ports = [(self.web.port(), of_port)].into();
        self.plan.intakes = vec![Intake { workload: name("web"), labels: BTreeMap::new(), ports }];
        self.world.publish(&self.plan, version);
    }

    async fn stranger(&self) -> Client {
        Client::on(connect_from(STRANGER, self.web).await.unwrap()).await
    }
}

fn told<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

/// Chunks, without a length.
fn chunks(chunks: &[&'static [u8]]) -> BoxBody<Bytes, Infallible> {
    let frames: Vec<_> = chunks.iter().map(|it| Ok(Frame::data(Bytes::from_static(it)))).collect();
    BodyExt::boxed(StreamBody::new(stream::iter(frames)))
}

async fn post(client: &mut Client, body: BoxBody<Bytes, Infallible>) -> Response<Incoming> {
    let request = Request::post("/").header("host", "web").body(body).unwrap();
    in_time(client.0.ready()).await.unwrap();
    in_time(client.0.send_request(request)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_too_many_is_answered_with_when_to_come_again_and_does_not_reach_the_application() {
    let mut bed = Bed::taking(rates(vec![two(7, RateBy::All)])).await;
    let app = bed.app();
    let mut client = bed.client().await;
    for _ in 0..2 {
        assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::OK);
    }
    let refused = client.send(Request::get("/")).await.unwrap();
    let headers = refused.headers().clone();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = told(&headers, "retry-after").parse().unwrap();
    assert!((1790..=1800).contains(&wait), "{wait}");
    assert_eq!(told(&headers, "ratelimit-policy"), "\"0\";q=2;w=3600");
    assert_eq!(told(&headers, "ratelimit"), format!("\"0\";r=0;t={wait}"));
    let body = in_time(refused.into_body().collect()).await.unwrap().to_bytes();
    assert_eq!(body, "Too Many Requests", "and tells nobody whose limit it is");
    assert_eq!(bed.client().await.ask(Request::get("/")).await.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(app.served(), 2);
    let line = bed.log(|line| line["reason"] == "limit_rate").await;
    assert_eq!(
        (&line["outcome"], &line["status"], &line["rule"]),
        (&json!("refused"), &json!(429), &json!("shop/few[7]")),
        "{line}"
    );
    assert!(line["detail"].as_str().unwrap().contains("2 requests in 3600s from all together"), "{line}");
    bed.log(|_| bed.answered(429, "limit_rate") == 2).await;

    // Another limit beside it leaves it as it is; one that says something else begins anew.
    bed.limit(rates(vec![two(8, RateBy::Identity), two(7, RateBy::All)]), "3");
    assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::TOO_MANY_REQUESTS);
    bed.limit(rates(vec![RateLimit { burst: 3, ..two(7, RateBy::All) }]), "4");
    eventually(async || {
        let (status, _) = bed.client().await.ask(Request::get("/")).await;
        (status == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_identity_has_its_own_and_all_plaintext_one() {
    let mut bed = Bed::taking(rates(vec![two(0, RateBy::Identity)])).await;
    let _app = bed.app();
    let (mut client, mut stranger, mut other) =
        (bed.client().await, bed.stranger().await, bed.stranger().await);
    for _ in 0..2 {
        assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::OK);
    }
    assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(stranger.ask(Request::get("/")).await.0, StatusCode::OK);
    assert_eq!(other.ask(Request::get("/")).await.0, StatusCode::OK);
    assert_eq!(stranger.ask(Request::get("/")).await.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(bed.world.destination.metrics.limit_hits("rate_buckets"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_value_of_a_header_has_its_own_and_other_requests_are_not_counted() {
    let only = Asks { paths: vec!["/login*".parse().unwrap()], ..Asks::default() };
    let limit = RateLimit { only, ..two(0, RateBy::Header("x-tenant".into())) };
    let mut bed = Bed::taking(rates(vec![limit])).await;
    let _app = bed.app();
    let mut client = bed.client().await;
    let mut ask =
        async |path: &str, tenant: &str| client.ask(Request::get(path).header("x-tenant", tenant)).await.0;
    for tenant in ["a", "b"] {
        for _ in 0..2 {
            assert_eq!(ask("/login", tenant).await, StatusCode::OK);
        }
        // Nor by another way to write the path.
        for path in ["/login", "/LOGIN", "/%6cogin", "/x/../login"] {
            assert_eq!(ask(path, tenant).await, StatusCode::TOO_MANY_REQUESTS, "{path}");
        }
        assert_eq!(ask("/cart", tenant).await, StatusCode::OK);
    }
    // A header that is taken away on the way to the application makes nobody another one.
    let mut hidden = async |tenant: &str| {
        let request = Request::get("/login").header("x-tenant", tenant).header("connection", "x-tenant");
        client.ask(request).await.0
    };
    let statuses = [hidden("c").await, hidden("d").await, hidden("e").await];
    assert_eq!(statuses, [StatusCode::OK, StatusCode::OK, StatusCode::TOO_MANY_REQUESTS]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_ask_is_told_so_and_costs_nothing() {
    let deny = Policy::new(
        name("no-puts"),
        Action::Deny,
        vec![Rule {
            from: vec![],
            to: vec![mesh_core::model::Target {
                any_of: Asks { methods: vec!["PUT".into()], ..Asks::default() },
                ..mesh_core::model::Target::default()
            }],
        }],
    );
    let mut bed = Bed::of(Plan { policies: vec![deny], ..Plan::default() }).await;
    let limits = PortIntake { sizes: Sizes { head: None, body: Some(4) }, rates: vec![two(0, RateBy::All)] };
    bed.limit(limits, "2");
    let app = bed.app();
    let mut client = bed.client().await;
    let large = || Request::put("/").header("content-length", "0");
    for _ in 0..3 {
        assert_eq!(client.ask(large()).await.0, StatusCode::FORBIDDEN);
    }
    let too_large = post(&mut client, Full::new(Bytes::from_static(b"12345")).boxed()).await;
    assert_eq!(too_large.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let mut client = bed.client().await;
    for _ in 0..2 {
        assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::OK);
    }
    assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(app.served(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_is_taken_up_to_its_limit_whether_or_not_it_says_its_length() {
    let mut bed = Bed::taking(sizes(None, Some(10))).await;
    let _app = bed.app();
    for (body, status) in [
        (Full::new(Bytes::from_static(b"0123456789")).boxed(), StatusCode::OK),
        (Full::new(Bytes::from_static(b"0123456789a")).boxed(), StatusCode::PAYLOAD_TOO_LARGE),
        (chunks(&[b"01234", b"56789"]), StatusCode::OK),
        (chunks(&[b"01234", b"56789", b"a"]), StatusCode::PAYLOAD_TOO_LARGE),
    ] {
        let mut client = bed.client().await;
        let response = post(&mut client, body).await;
        assert_eq!(response.status(), status);
        let (_, said) = app::said(response).await;
        assert_eq!(said["length"], if status == StatusCode::OK { json!(10) } else { json!(null) });
    }
    bed.log(|_| bed.answered(413, "limit_body") == 2).await;
    let line = bed.log(|line| line["reason"] == "limit_body").await;
    assert_eq!(line["outcome"], "refused", "{line}");

    // A client that waits for leave is answered before it has sent anything (RFC 9110, section 10.1.1).
    let mut client = connect(bed.at).await;
    let head = b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 11\r\nexpect: 100-continue\r\n\r\n";
    client.write_all(head).await.unwrap();
    let mut first = [0; 12];
    in_time(client.read_exact(&mut first)).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 413");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_at_once_that_is_too_long_is_answered_and_the_others_go_on() {
    let mut bed = Bed::taking(sizes(None, Some(10))).await;
    let _app = bed.app();
    let stream = TokioIo::new(connect(bed.at).await);
    let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let ask = |body: BoxBody<Bytes, Infallible>| {
        let request = Request::post("http://web/").version(Version::HTTP_2).body(body).unwrap();
        let mut sender = sender.clone();
        async move { in_time(sender.send_request(request)).await.unwrap().status() }
    };
    let statuses = tokio::join!(
        ask(chunks(&[b"0123456789"])),
        ask(chunks(&[b"0123456789", b"a"])),
        ask(Full::new(Bytes::from_static(b"0123456789a")).boxed()),
        ask(chunks(&[b"01234"])),
    );
    let large = StatusCode::PAYLOAD_TOO_LARGE;
    assert_eq!(statuses, (StatusCode::OK, large, large, StatusCode::OK));
    assert_eq!(ask(chunks(&[b"again"])).await, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_has_begun_is_cut_when_the_body_becomes_too_long() {
    let mut bed = Bed::taking(sizes(None, Some(10))).await;
    let listener = bed.listener.take().unwrap();
    let mut client = connect(bed.at).await;
    client
        .write_all(b"POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n5\r\n01234\r\n")
        .await
        .unwrap();
    let (mut app, _) = accept(&listener).await;
    let asked = in_time(app.read(&mut [0; 1024])).await.unwrap();
    assert!(asked > 0, "before it answers it is asked");
    app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun").await.unwrap();
    let mut first = [0; 15];
    in_time(client.read_exact(&mut first)).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    client.write_all(b"a\r\n0123456789\r\n").await.unwrap();
    let mut rest = vec![];
    let _ = in_time(client.read_to_end(&mut rest)).await;
    assert!(rest.len() < 100, "it has ended before its end: {}", String::from_utf8_lossy(&rest));
    let line = bed.log(|line| line["reason"] == "limit_body").await;
    assert_eq!((&line["outcome"], &line["status"]), (&json!("refused"), &json!(200)), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_taken_up_to_its_limit() {
    let head = "GET / HTTP/1.1\r\nx-pad: \r\nhost: web\r\n\r\n".len();
    let mut bed = Bed::taking(sizes(Some(u32::try_from(head + 500).unwrap()), None)).await;
    let app = bed.app();
    let mut client = bed.client().await;
    let mut ask = async |pad: usize| client.ask(Request::get("/").header("x-pad", "a".repeat(pad))).await.0;
    assert_eq!(ask(500).await, StatusCode::OK);
    assert_eq!(ask(501).await, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(app.served(), 1);
    let line = bed.log(|line| line["reason"] == "limit_headers").await;
    assert_eq!(line["status"], 431, "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_beyond_a_limit_has_exhausted_its_resource() {
    let limits = PortIntake { sizes: Sizes { head: None, body: Some(10) }, rates: vec![two(0, RateBy::All)] };
    let mut bed = Bed::taking(limits).await;
    let app = bed.app();
    let stream = TokioIo::new(connect(bed.at).await);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let mut call = async |body: &'static [u8]| {
        let request = Request::post("http://web/trailers/say")
            .version(Version::HTTP_2)
            .header("content-type", "application/grpc")
            .body(Full::new(Bytes::from_static(body)))
            .unwrap();
        in_time(sender.send_request(request)).await.unwrap()
    };
    let long = call(b"0123456789a").await;
    assert_eq!((long.status(), told(long.headers(), "grpc-status")), (StatusCode::OK, "8"));
    assert!(!long.headers().contains_key("grpc-retry-pushback-ms"), "again it would be as long");
    for _ in 0..2 {
        let whole = in_time(call(b"").await.into_body().collect()).await.unwrap();
        assert_eq!(whole.trailers().unwrap()["grpc-status"], "7", "the application's own");
    }
    let one_too_many = call(b"").await;
    assert_eq!(told(one_too_many.headers(), "grpc-status"), "8");
    let wait: u64 = told(one_too_many.headers(), "grpc-retry-pushback-ms").parse().unwrap();
    assert!((1_790_000..=1_800_001).contains(&wait), "{wait}");
    assert!(!one_too_many.headers().contains_key("retry-after"));
    assert_eq!(app.served(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_refused_and_so_is_what_began_before() {
    for (bytes, reason) in
        [(&b"EHLO mail\r\n\r\n"[..], "bad_request"), (b"\x16\x03\x01\x00\x05hello", "requests_unreadable")]
    {
        let mut bed = Bed::taking(sizes(None, Some(10))).await;
        let app = bed.app();
        let mut client = connect(bed.at).await;
        client.write_all(bytes).await.unwrap();
        let mut answer = vec![];
        let ended = in_time(client.read_to_end(&mut answer)).await;
        assert!(ended.is_err() || answer.starts_with(b"HTTP/1.1 400"), "{reason}: {answer:?}");
        let line = bed.log(|line| line["kind"].is_null()).await;
        assert_eq!((&line["outcome"], &line["reason"]), (&json!("refused"), &json!(reason)), "{line}");
        assert_eq!(app.served(), 0);
    }
    let mut bed = Bed::of(Plan::default()).await;
    let listener = bed.listener.take().unwrap();
    let mut client = connect(bed.at).await;
    client.write_all(b"bytes").await.unwrap();
    let (mut app, _) = accept(&listener).await;
    in_time(app.read_exact(&mut [0; 5])).await.unwrap();
    bed.limit(rates(vec![two(0, RateBy::All)]), "2");
    is_reset(&client).await;
    let line = bed.log(|line| line["kind"].is_null()).await;
    assert_eq!(line["reason"], "requests_unreadable", "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_is_limited_too_and_other_ports_are_left_alone() {
    let mut bed = Bed::taking(sizes(None, Some(0))).await;
    let _app = bed.app();
    let (sender, connection) =
        http1::handshake(TokioIo::new(connect_from(STRANGER, bed.web).await.unwrap())).await.unwrap();
    tokio::spawn(connection);
    let mut client = Client(sender);
    assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::OK);
    assert_eq!(post(&mut client, chunks(&[b"a"])).await.status(), StatusCode::PAYLOAD_TOO_LARGE);

    let mut bed = Bed::of(Plan::default()).await;
    let ports = [(1, rates(vec![two(0, RateBy::All)]))].into();
    bed.plan.intakes = vec![Intake { workload: name("web"), labels: BTreeMap::new(), ports }];
    bed.world.publish(&bed.plan, "2");
    let server = echo(bed.listener.take().unwrap());
    for _ in 0..3 {
        assert_eq!(world::ask(bed.at, b"bytes").await.unwrap(), b"bytes");
    }
    server.abort();
}
