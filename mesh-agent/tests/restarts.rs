//! Requests to a service whose endpoints go away: what certainly was not taken goes elsewhere, whatever it is and whoever reads it,
//! and what must not be made twice is not put where it may be lost. Needs root, as the data path does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "data_path/app.rs"]
#[allow(dead_code, reason = "the tests of requests use the rest of it")]
mod app;
#[path = "data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use app::{App, app};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_agent::connection::Limits;
use mesh_core::model::{
    Action, Asks, Policy, Rule, Target,
    traffic::{Algorithm, Balancing, Traffic},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use world::*;

/// A client of a service whose endpoints, `web` and `api`, are asked in turn; the test itself serves them.
struct Service {
    world: World,
    at: SocketAddr,
    web: Option<TcpListener>,
    api: Option<TcpListener>,
}

impl Service {
    /// The endpoints' agents read requests, too, if there are policies that say something of them.
    async fn new(policies: Vec<Policy>, limits: Limits) -> Self {
        Self::behind(&Valve::new(), policies, limits).await
    }

    /// The same, with this between the agents of the client and of `web`.
    async fn behind(valve: &Valve, policies: Vec<Policy>, limits: Limits) -> Self {
        let mut plan = Plan { policies, ..Plan::default() };
        plan.service(&[]);
        let world = World::with(&plan, limits, Limits::default());
        let ((web_at, web), (api_at, api)) = (world.web_behind(valve).await, world.api().await);
        plan.service(&[("web", web_at), ("api", api_at)]);
        let balancing = Some(Balancing { algorithm: Algorithm::RoundRobin, slow_start: None });
        plan.services[0].ports[0].traffic = Traffic { reads_requests: true, balancing, ..Traffic::default() };
        world.publish(&plan, "2");
        let at = world.outbound(VIP.parse().unwrap());
        Self { world, at, web: Some(web), api: Some(api) }
    }

    fn api(&mut self) -> App {
        app("api", self.api.take().unwrap())
    }

    /// An application that takes one connection.
    fn web(&mut self) -> JoinHandle<()> {
        let listener = self.web.take().unwrap();
        tokio::spawn(async move {
            let (stream, _) = accept(&listener).await;
            let service = service_fn(async |_| {
                Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(r#"{"app": "web"}"#)))
            });
            let builder = auto::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        })
    }

    async fn log(&self, path: &str) -> Value {
        eventually(async || {
            let lines = self.world.source.log().await;
            lines.into_iter().find(|line| line["kind"] == "request" && line["path"] == path)
        })
        .await
    }
}

/// That DELETE is refused.
fn policy() -> Policy {
    let delete = Asks { methods: vec!["DELETE".into()], ..Asks::default() };
    let to = vec![Target { any_of: delete, ..Target::default() }];
    Policy::new(name("requests"), Action::Deny, vec![Rule { from: vec![], to }])
}

enum Client {
    One(http1::SendRequest<Full<Bytes>>),
    Many(http2::SendRequest<Full<Bytes>>),
}

impl Client {
    async fn new(version: Version, at: SocketAddr) -> Self {
        let stream = TokioIo::new(connect(at).await);
        if version == Version::HTTP_2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
            tokio::spawn(connection);
            return Self::Many(sender);
        }
        let (sender, connection) = http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        Self::One(sender)
    }

    /// The status, and what the application said.
    async fn ask(&mut self, method: Method, path: &str) -> (StatusCode, Value) {
        app::said(self.send(method, path).await.unwrap()).await
    }

    async fn send(&mut self, method: Method, path: &str) -> hyper::Result<Response<Incoming>> {
        let mut request = Request::new(Full::from("body"));
        *request.method_mut() = method;
        match self {
            Self::One(sender) => {
                *request.uri_mut() = path.parse().unwrap();
                request.headers_mut().insert("host", "service".parse().unwrap());
                in_time(sender.ready()).await.unwrap();
                in_time(sender.send_request(request)).await
            }
            Self::Many(sender) => {
                *request.uri_mut() = format!("http://service{path}").parse().unwrap();
                *request.version_mut() = Version::HTTP_2;
                in_time(sender.send_request(request)).await
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_application_that_is_gone_did_not_take_goes_elsewhere_whoever_reads_it() {
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let mut service = Service::new(vec![policy()], Limits::default()).await;
        let (_api, web) = (service.api(), service.web());
        let mut client = Client::new(version, service.at).await;
        let begin = [client.ask(Method::POST, "/1").await.1, client.ask(Method::POST, "/2").await.1];
        assert!(begin.iter().any(|said| said["app"] == "web"), "{version:?}: {begin:?}");
        // Its connection with its agent ends, and nobody listens any more; that of the two agents stays.
        web.abort();
        let _ = web.await;
        let mut attempts = vec![];
        for number in 0..4 {
            let path = format!("/after/{number}");
            let (status, said) = client.ask(Method::POST, &path).await;
            assert_eq!((status, &said["app"]), (StatusCode::OK, &json!("api")), "{version:?} {path}");
            attempts.push(service.log(&path).await["attempts"].as_u64().unwrap());
        }
        assert!(attempts.contains(&2), "{version:?}: {attempts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_not_be_made_twice_goes_by_a_connection_that_was_used_just_now() {
    for (longest, connections) in [(Duration::from_secs(3600), 1), (Duration::ZERO, 3)] {
        let limits = Limits { unsafe_after_idle: longest, ..Limits::default() };
        let mut service = Service::new(vec![], limits).await;
        drop(service.web.take());
        let api = service.api();
        let mut client = Client::new(Version::HTTP_11, service.at).await;
        // A safe one goes by whatever is there.
        for method in [Method::POST, Method::GET, Method::PUT, Method::DELETE, Method::GET] {
            assert_eq!(client.ask(method, "/").await.0, StatusCode::OK);
        }
        assert_eq!(api.connected(), connections, "{longest:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_a_thread_does_without_is_used_by_another() {
    // Clients that are there at once are on two threads, where there are two.
    let threads = std::thread::available_parallelism().unwrap().get();
    for (after, connections) in [(Duration::ZERO, 1), (Duration::from_secs(3600), threads.min(2))] {
        let limits = Limits { lent_after_idle: after, ..Limits::default() };
        let mut service = Service::new(vec![], limits).await;
        drop(service.web.take());
        let api = service.api();
        let mut clients = [
            Client::new(Version::HTTP_11, service.at).await,
            Client::new(Version::HTTP_11, service.at).await,
        ];
        for _ in 0..3 {
            for client in &mut clients {
                assert_eq!(client.ask(Method::GET, "/").await.0, StatusCode::OK);
            }
        }
        assert_eq!(api.connected(), connections, "after {after:?}");
    }
}

/// What `web` does with the request that comes after the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Web {
    /// It has closed before.
    Closed,
    /// It has said that it ends, and reads on.
    HalfClosed,
    /// It reads it, and closes.
    Closes,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_crosses_the_end_of_an_idle_connection_is_made_once() {
    for web in [Web::Closed, Web::HalfClosed, Web::Closes] {
        let valve = Valve::new();
        let mut service = Service::behind(&valve, vec![], Limits::default()).await;
        let _api = service.api();
        let listener = service.web.take().unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = accept(&listener).await;
            take_request(&mut stream).await;
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"app\": \"web\"}")
                .await
                .unwrap();
            stream
        });
        let mut client = Client::new(Version::HTTP_11, service.at).await;
        let first = [client.ask(Method::POST, "/1").await.1, client.ask(Method::POST, "/2").await.1];
        assert!(first.iter().any(|said| said["app"] == "web"), "{web:?}: {first:?}");
        let mut stream = in_time(serving).await.unwrap();
        // The other's turn, so that the next is this one's.
        if first[1]["app"] == "web" {
            assert_eq!(client.ask(Method::POST, "/3").await.1["app"], "api");
        }

        // What `web` does is not known at the client's agent when the request is sent.
        valve.close();
        if web != Web::Closes {
            stream.shutdown().await.unwrap();
        }
        let stream = (web != Web::Closed).then_some(stream);
        let ends = if web == Web::Closes { 0 } else { valve.holds_more(0).await };
        let served = async {
            if let Some(mut stream) = stream {
                take_request(&mut stream).await;
            }
            if web != Web::HalfClosed {
                // That it has closed.
                valve.holds_more(ends).await;
            }
            valve.open();
        };
        let ((status, said), ()) = tokio::join!(client.ask(Method::POST, "/crosses"), served);
        let line = service.log("/crosses").await;
        if web == Web::Closed {
            assert_eq!((status, &said["app"]), (StatusCode::OK, &json!("api")), "{said}");
            assert_eq!(line["attempts"], 2, "{line}");
        } else {
            assert_eq!(
                (status, &line["reason"]),
                (StatusCode::SERVICE_UNAVAILABLE, &json!("backend_reset")),
                "{web:?}"
            );
        }
    }
}

/// Serves one request of every connection by the first byte of an answer whose head says that it is so long, and ends. As what a
/// killed server had sent, all of that is there before the end.
fn breaks_off(listener: TcpListener, version: Version, length: Option<usize>) -> JoinHandle<()> {
    let answer = if version == Version::HTTP_2 { in_frames(length) } else { in_lines(length) };
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                if version == Version::HTTP_2 {
                    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
                }
                take(&mut stream, b"body").await;
                stream.write_all(&answer).await.unwrap();
                stream.shutdown().await.unwrap();
                // Closed with something unread it would be reset, and what it has sent with it.
                let _ = stream.read_to_end(&mut vec![]).await;
            });
        }
    })
}

fn in_lines(length: Option<usize>) -> Vec<u8> {
    match length {
        Some(length) => format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{{").into_bytes(),
        None => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n".to_vec(),
    }
}

/// The types of frames (RFC 9113, section 6) and a flag of theirs.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const END_HEADERS: u8 = 4;

/// Of the first stream.
fn in_frames(length: Option<usize>) -> Vec<u8> {
    // `:status: 200` by its number, `content-length` with the number of its name (RFC 7541, appendix A: 8 and 28).
    let mut fields = vec![0x80 | 8];
    if let Some(length) = length.map(|length| length.to_string()) {
        fields.extend([0x0f, 28 - 0x0f, u8::try_from(length.len()).unwrap()]);
        fields.extend(length.as_bytes());
    }
    [frame(HEADERS, END_HEADERS, 1, &fields), frame(DATA, 0, 1, b"{")].concat()
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    [&[0, 0, u8::try_from(payload.len()).unwrap(), kind, flags, 0, 0, 0, stream], payload].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_answer_that_breaks_off_is_asked_for_elsewhere_if_its_request_may_be() {
    let (short, long) = (Some(64 * 1024), Some(64 * 1024 + 1));
    for version in [Version::HTTP_11, Version::HTTP_2] {
        for policies in [vec![], vec![policy()]] {
            for (method, length, elsewhere) in [
                (Method::GET, short, true),
                (Method::POST, short, false),
                (Method::GET, long, false),
                (Method::GET, None, false),
            ] {
                let case = format!("{version:?} {method} {length:?}");
                // No machine is so slow that what comes at once does not come soon.
                let limits = Limits { short_answer: Duration::from_secs(3600), ..Limits::default() };
                let mut service = Service::new(policies.clone(), limits).await;
                let (_api, _web) = (service.api(), breaks_off(service.web.take().unwrap(), version, length));
                let mut broken = 0;
                for path in ["/1", "/2"] {
                    let mut client = Client::new(version, service.at).await;
                    let (head, mut body) = client.send(method.clone(), path).await.unwrap().into_parts();
                    assert_eq!(head.status, StatusCode::OK, "{case}");
                    let first = in_time(body.frame()).await.unwrap().unwrap().into_data().unwrap();
                    assert_eq!(first[0], b'{', "{case}: what came before is not lost");
                    broken += usize::from(in_time(body.collect()).await.is_err());
                }
                let lines = [service.log("/1").await, service.log("/2").await];
                let attempts: Vec<_> = lines.iter().filter_map(|line| line["attempts"].as_u64()).collect();
                assert_eq!(broken, usize::from(!elsewhere), "{case}: {attempts:?}");
                assert_eq!(attempts.contains(&2), elsewhere, "{case}: {attempts:?}");
            }
        }
    }
}

/// Reads a request of HTTP/1.1 with its body.
async fn take_request(stream: &mut TcpStream) {
    take(stream, b"\r\n\r\nbody").await;
}

/// Reads until these bytes have come.
async fn take(stream: &mut TcpStream, until: &[u8]) {
    let mut said = vec![];
    while !said.windows(until.len()).any(|it| it == until) {
        assert!(in_time(stream.read_buf(&mut said)).await.unwrap() > 0, "ends before");
    }
}
