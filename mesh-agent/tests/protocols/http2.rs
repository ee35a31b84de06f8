//! Streams of HTTP/2 beside each other: what becomes of the others when one stands still, breaks or is one too many.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures_util::{StreamExt, future::join_all, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::http2::{Builder, SendRequest},
    ext::Protocol,
    server::conn::http2 as server,
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_core::model::{Action, Asks, Policy, Rule, Target};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{Notify, watch},
};

use crate::{
    Bed,
    app::app,
    world::{connect, eventually, in_time, name},
};

type Answer = Result<Response<BoxBody<Bytes, io::Error>>, io::Error>;

/// A connection of the client's, which takes much before it is read.
async fn client(at: SocketAddr) -> SendRequest<Empty<Bytes>> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.initial_connection_window_size(64 << 20).initial_stream_window_size(64 << 10);
    let (sender, connection) = in_time(builder.handshake(TokioIo::new(connect(at).await))).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn request(method: Method, path: &str) -> Request<Empty<Bytes>> {
    Request::builder().method(method).uri(format!("http://web{path}")).body(Empty::new()).unwrap()
}

/// A request that an agent refuses, and no application hears of.
fn two_hosts(method: Method) -> Request<Empty<Bytes>> {
    let mut request = request(method, "/");
    for host in ["a", "b"] {
        request.headers_mut().append("host", host.parse().unwrap());
    }
    request
}

async fn get(sender: &SendRequest<Empty<Bytes>>, path: &str) -> hyper::Result<Response<Incoming>> {
    in_time(sender.clone().send_request(request(Method::GET, path))).await
}

async fn whole(response: Response<Incoming>) -> hyper::Result<Bytes> {
    Ok(in_time(response.into_body().collect()).await?.to_bytes())
}

/// An application that speaks HTTP/2 alone, with so many streams at once on each connection. The number of connections.
fn serve<F>(
    listener: TcpListener,
    streams: u32,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
) -> Arc<AtomicUsize>
where
    F: Future<Output = Answer> + Send + 'static,
{
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let mut builder = server::Builder::new(TokioExecutor::new());
            builder.max_concurrent_streams(streams);
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), service_fn(answer.clone())));
        }
    });
    connections
}

fn said(text: &'static str) -> Answer {
    Ok(Response::new(Full::new(Bytes::from_static(text.as_bytes())).map_err(|never| match never {}).boxed()))
}

/// An answer whose body goes on as long as somebody takes it.
fn endless() -> Answer {
    let frames = stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[7; 16 << 10]))));
    Ok(Response::new(BodyExt::boxed(StreamBody::new(frames))))
}

/// An answer whose body begins, and breaks when it is told to.
fn broken(told: Arc<Notify>) -> Answer {
    let begins = stream::iter([Ok(Frame::data(Bytes::from_static(b"some")))]);
    let breaks = stream::once(async move {
        told.notified().await;
        Err(io::ErrorKind::Other.into())
    });
    Ok(Response::new(BodyExt::boxed(StreamBody::new(begins.chain(Box::pin(breaks))))))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_ours_to_head_has_no_body() {
    for bed in Bed::both().await {
        let sender = client(bed.at).await;
        let app = app("web", bed.app);
        let response = in_time(sender.clone().send_request(two_hosts(Method::HEAD))).await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert!(whole(response).await.unwrap().is_empty());
        assert_eq!(app.served(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_holds_up_nobody_else() {
    for bed in Bed::both().await {
        let sender = client(bed.at).await;
        let answer = |request: Request<Incoming>| async move {
            if request.uri().path() == "/endless" { endless() } else { said("at once") }
        };
        serve(bed.app, 200, answer);
        // All of them on one connection to the backend, and more than its window has room for.
        let stalled = join_all((0..50).map(|_| get(&sender, "/endless"))).await;
        let stalled: Vec<_> = stalled.into_iter().map(Result::unwrap).collect();
        for _ in 0..10 {
            assert_eq!(whole(get(&sender, "/").await.unwrap()).await.unwrap(), "at once");
        }
        drop(stalled);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_does_not_look_whole_and_the_others_go_on() {
    for bed in Bed::both().await {
        let sender = client(bed.at).await;
        let now = Arc::new(Notify::new());
        let told = now.clone();
        let connections = serve(bed.app, 200, move |request: Request<Incoming>| {
            let told = told.clone();
            async move { if request.uri().path() == "/broken" { broken(told) } else { endless() } }
        });
        let mut lives = get(&sender, "/endless").await.unwrap();
        for _ in 0..3 {
            let mut broken = get(&sender, "/broken").await.unwrap();
            assert_eq!(in_time(broken.frame()).await.unwrap().unwrap().into_data().unwrap(), "some");
            now.notify_one();
            assert!(whole(broken).await.is_err());
        }
        for _ in 0..100 {
            in_time(lives.frame()).await.unwrap().unwrap();
        }
        assert_eq!(connections.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_its_client_gives_up_ends_at_the_application_too() {
    for bed in Bed::both().await {
        let sender = client(bed.at).await;
        let alive = watch::Sender::new(());
        let asked = alive.clone();
        serve(bed.app, 200, move |_| {
            let held = asked.subscribe();
            async move {
                let _held = held;
                std::future::pending().await
            }
        });
        let asks = tokio::spawn({
            let sender = sender.clone();
            async move { get(&sender, "/").await.map(drop) }
        });
        let there = async || (alive.receiver_count() == 1).then_some(());
        eventually(there).await;
        asks.abort();
        in_time(alive.closed()).await;
        assert!(!sender.is_closed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_to_a_backend_that_is_somebody_else_now_are_cut() {
    let Bed { world, mut plan, at, app } = Bed::routed().await;
    let sender = client(at).await;
    serve(app, 200, |_| async { endless() });
    let mut lives = get(&sender, "/").await.unwrap();
    in_time(lives.frame()).await.unwrap().unwrap();
    plan.workload("web").service_account = "other".into();
    world.publish_at_source(&plan, "3");
    let breaks = async { while lives.frame().await.expect("it does not look whole").is_ok() {} };
    in_time(breaks).await;
}

/// What an application of WebSockets speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaks {
    Http1,
    Http2,
    /// With WebSockets in it.
    Http2WithWebSockets,
}

/// An application that gives back what comes by a WebSocket. What it was asked: method, version, path and who it was for.
fn websockets(listener: TcpListener, speaks: Speaks) -> Arc<Mutex<Vec<String>>> {
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let seen = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let seen = seen.clone();
            let service = service_fn(move |request| {
                let response = websocket(request, &seen);
                async move { Ok::<_, io::Error>(response) }
            });
            let mut builder = auto::Builder::new(TokioExecutor::new());
            match speaks {
                Speaks::Http1 => builder = builder.http1_only(),
                Speaks::Http2 => {}
                Speaks::Http2WithWebSockets => {
                    builder.http2().enable_connect_protocol();
                }
            }
            tokio::spawn(async move {
                let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
            });
        }
    });
    asked
}

fn websocket(mut request: Request<Incoming>, seen: &Mutex<Vec<String>>) -> Response<Full<Bytes>> {
    let (uri, headers) = (request.uri(), request.headers());
    let host = uri.host().or_else(|| headers.get("host")?.to_str().ok()).unwrap_or_default();
    let said = format!("{} {:?} {} {host}", request.method(), request.version(), uri.path());
    seen.lock().unwrap().push(said);
    let mut response = Response::new(Full::default());
    match uri.path() {
        "/page" => return Response::new(Full::from("no WebSocket")),
        "/away" => {
            *response.status_mut() = StatusCode::FORBIDDEN;
            return response;
        }
        _ => {}
    }
    if request.method() == Method::GET {
        assert_eq!(headers["upgrade"], "websocket");
        assert_eq!(headers["sec-websocket-version"], "13");
        let key =
            if uri.path() == "/forged" { &b"another"[..] } else { headers["sec-websocket-key"].as_bytes() };
        let accept = accepts(key);
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        for (name, value) in
            [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-accept", &accept)]
        {
            response.headers_mut().insert(name, value.parse().unwrap());
        }
    } else {
        assert_eq!(request.extensions().get::<Protocol>().unwrap().as_str(), "websocket");
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let (mut from, mut to) = tokio::io::split(TokioIo::new(upgrade.await.unwrap()));
        tokio::io::copy(&mut from, &mut to).await.unwrap();
        to.shutdown().await.unwrap();
    });
    response
}

/// RFC 6455, section 1.3.
fn accepts(key: &[u8]) -> String {
    let text = [key, b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    BASE64_STANDARD.encode(ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, &text))
}

/// A client of WebSockets in HTTP/2, once it knows that they are offered.
async fn websocket_client(at: SocketAddr) -> SendRequest<Empty<Bytes>> {
    let stream = TokioIo::new(connect(at).await);
    let (sender, connection) = in_time(Builder::new(TokioExecutor::new()).handshake(stream)).await.unwrap();
    let (tells, mut offered) = watch::channel(false);
    let mut connection = Box::pin(connection);
    tokio::spawn(std::future::poll_fn(move |cx| {
        let polled = connection.as_mut().poll(cx);
        tells.send_replace(connection.is_extended_connect_protocol_enabled());
        polled
    }));
    // hyper looks at the settings when there is something to do. Nobody behind the agent hears of it, so that the WebSocket is the
    // first thing that is asked there.
    in_time(async {
        while !*offered.borrow_and_update() {
            let _ = sender.clone().send_request(two_hosts(Method::GET)).await;
        }
    })
    .await;
    sender
}

async fn asks_for(
    sender: &SendRequest<Empty<Bytes>>,
    protocol: &'static str,
    path: &str,
) -> Response<Incoming> {
    let mut asks = request(Method::CONNECT, path);
    asks.extensions_mut().insert(Protocol::from_static(protocol));
    in_time(sender.clone().send_request(asks)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_in_http2_reach_applications_in_whichever_way_they_speak_them() {
    for (speaks, expected) in [
        (Speaks::Http2WithWebSockets, "CONNECT HTTP/2.0 /chat web"),
        (Speaks::Http2, "GET HTTP/1.1 /chat web"),
        (Speaks::Http1, "GET HTTP/1.1 /chat web"),
    ] {
        for bed in Bed::both().await {
            let asked = websockets(bed.app, speaks);
            let sender = websocket_client(bed.at).await;
            let mut response = asks_for(&sender, "websocket", "/chat").await;
            assert_eq!(response.status(), StatusCode::OK, "{speaks:?}");
            assert!(!response.headers().contains_key("upgrade"), "{:?}", response.headers());
            let mut stream = TokioIo::new(in_time(hyper::upgrade::on(&mut response)).await.unwrap());
            for _ in 0..3 {
                let mut bytes = [0; 4];
                stream.write_all(b"ping").await.unwrap();
                in_time(stream.read_exact(&mut bytes)).await.unwrap();
                assert_eq!(&bytes, b"ping");
            }
            stream.shutdown().await.unwrap();
            assert_eq!(in_time(stream.read(&mut [0])).await.unwrap(), 0, "its end is said to both sides");
            assert_eq!(*asked.lock().unwrap(), [expected], "{speaks:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_websocket_after_all_is_told_to_its_client_and_costs_that_stream_alone() {
    for speaks in [Speaks::Http2WithWebSockets, Speaks::Http2, Speaks::Http1] {
        for bed in Bed::both().await {
            let _asked = websockets(bed.app, speaks);
            let sender = websocket_client(bed.at).await;
            assert_eq!(asks_for(&sender, "websocket", "/away").await.status(), StatusCode::FORBIDDEN);
            assert_eq!(asks_for(&sender, "connect-udp", "/chat").await.status(), StatusCode::NOT_IMPLEMENTED);
            if speaks != Speaks::Http2WithWebSockets {
                // To an extended CONNECT, 200 would mean that it is one.
                let page = asks_for(&sender, "websocket", "/page").await;
                assert_eq!(page.status(), StatusCode::BAD_GATEWAY, "{speaks:?}");
                // Nor is what goes over without having understood the question (RFC 6455, section 4.1).
                let forged = asks_for(&sender, "websocket", "/forged").await;
                assert_eq!(forged.status(), StatusCode::BAD_GATEWAY, "{speaks:?}");
            }
            assert_eq!(asks_for(&sender, "websocket", "/chat").await.status(), StatusCode::OK);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_on_get_is_one_on_websockets_in_whichever_version() {
    let bed = Bed::authorized().await;
    let mut plan = bed.plan.clone();
    let get = Asks { methods: vec!["GET".into()], paths: vec!["/chat".parse().unwrap()], ..Asks::default() };
    let to = vec![Target { any_of: get, ..Target::default() }];
    plan.policies = vec![Policy::new(name("chat"), Action::Deny, vec![Rule { from: vec![], to }])];
    bed.world.publish(&plan, "denied");
    let asked = websockets(bed.app, Speaks::Http2WithWebSockets);
    let sender = websocket_client(bed.at).await;
    assert_eq!(asks_for(&sender, "websocket", "/chat").await.status(), StatusCode::FORBIDDEN);
    assert_eq!(asks_for(&sender, "websocket", "/other").await.status(), StatusCode::OK);
    let asked = asked.lock().unwrap();
    assert!(asked.iter().all(|it| !it.contains("/chat")), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_requests_than_a_connection_takes_are_all_answered() {
    for bed in Bed::both().await {
        let sender = client(bed.at).await;
        serve(bed.app, 200, |_| async { said("yes") });
        // We take a thousand at once, a connection to a backend a hundred.
        let answers = join_all((0..1500).map(|_| async { whole(get(&sender, "/").await?).await })).await;
        assert!(answers.iter().all(|answer| answer.as_ref().is_ok_and(|it| it == "yes")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_takes_few_at_once_is_asked_on_more_connections() {
    let bed = Bed::routed().await;
    let sender = client(bed.at).await;
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = taken.clone();
    let connections = serve(bed.app, 2, move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        std::future::pending()
    });
    let mut waiting = vec![];
    for count in 1..=5 {
        let sender = sender.clone();
        waiting.push(tokio::spawn(async move { get(&sender, "/").await.map(drop) }));
        eventually(async || (taken.load(Ordering::Relaxed) == count).then_some(())).await;
    }
    assert_eq!(connections.load(Ordering::Relaxed), 3);
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
}
