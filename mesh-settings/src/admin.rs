//! Serves an admin interface over HTTP/1.1: what it answers is the program's, what a client may take is here.
//!
//! Stands apart so that agent and controller have the same bounds. Invariant: whatever a client sends or leaves unsent,
//! reads or leaves unread, its connection ends in bounded time, and there is a bounded number of them.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Extension, Router,
    extract::{ConnectInfo, DefaultBodyLimit},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

/// What clients may take. `Default` is what programs run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; more wait in the listener's queue: 64.
    pub connections: usize,
    /// How long a request's head may take, the wait for it included: 5 s, so an idle connection ends then, too.
    pub head_timeout: Duration,
    /// How long a connection takes new requests: 30 s. What is under way then has as long again, which is what a body
    /// that does not come and an answer that is not read may take.
    pub lifetime: Duration,
    /// Bytes of a request's head: 16 KiB.
    pub head: usize,
    /// Bytes of a request's body: 16 KiB, for a log filter.
    pub body: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            head_timeout: Duration::from_secs(5),
            lifetime: Duration::from_secs(30),
            head: 16 * 1024,
            body: 16 * 1024,
        }
    }
}

/// How long the listener rests when it cannot accept, so that it does not spin: the process has no descriptors left.
const REST: Duration = Duration::from_millis(50);

/// Serves until it is told to stop. Requests under way are cut then: nobody's work depends on them. Handlers get the
/// client as [`ConnectInfo`].
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: CancellationToken) {
    let router = router.layer(DefaultBodyLimit::max(limits.body));
    let mut connections = JoinSet::new();
    loop {
        // All branches only wait.
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept(), if connections.len() < limits.connections => accepted,
        };
        match accepted {
            Ok((stream, peer)) => connections.spawn(carry(stream, peer, router.clone(), limits)),
            Err(error) => {
                tracing::warn!(%error, "the admin listener cannot accept");
                sleep(REST).await;
                continue;
            }
        };
    }
}

async fn carry(stream: TcpStream, peer: SocketAddr, router: Router, limits: Limits) {
    let service = TowerToHyperService::new(router.layer(Extension(ConnectInfo(peer))));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.head_timeout).max_buf_size(limits.head);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    // The client's trouble is the client's. A branch that loses keeps the connection.
    tokio::select! {
        _ = &mut connection => return,
        () = sleep(limits.lifetime) => connection.as_mut().graceful_shutdown(),
    }
    let _ = tokio::time::timeout(limits.lifetime, connection).await;
}

#[cfg(test)]
mod tests {
    use axum::{
        extract::State,
        routing::{get, put},
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// More than the kernel takes for a client that does not read.
    const MUCH: usize = 64 << 20;

    /// Two connections at a time, and short waits.
    async fn start(limits: Limits) -> (SocketAddr, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let router = Router::new()
            .route("/", get(|| async { "here" }))
            .route("/much", get(|State(much): State<usize>| async move { vec![b'x'; much] }))
            .route("/echo", put(|body: String| async { body }))
            .with_state(MUCH);
        tokio::spawn(serve(listener, router, limits, stop.clone()));
        (address, stop)
    }

    fn short() -> Limits {
        let wait = Duration::from_millis(200);
        Limits { connections: 2, head_timeout: wait, lifetime: wait, ..Limits::default() }
    }

    async fn open(address: SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    /// All that comes until the server ends the connection.
    async fn rest(mut stream: TcpStream) -> String {
        let mut answer = vec![];
        // A reset is an end, too: the server had not read everything.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn ask(address: SocketAddr) -> String {
        rest(open(address, "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await).await
    }

    #[tokio::test]
    async fn whoever_is_slow_is_ended_and_others_get_their_turn() {
        let (address, _stop) = start(short()).await;
        let slow = [
            ("nothing", ""),
            ("half of HTTP/2's preface", "PRI * HTTP/2.0\r\n"),
            ("half a head", "GET / HTTP/1.1\r\nhost: x\r\n"),
            ("half a body", "PUT /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf"),
            ("no second request", "GET / HTTP/1.1\r\nhost: x\r\n\r\n"),
        ];
        for (what, text) in slow {
            // As many as there may be: the next one has to wait for their end.
            let held = [open(address, text).await, open(address, text).await];
            assert!(ask(address).await.ends_with("here"), "after {what}");
            for stream in held {
                rest(stream).await;
            }
        }
        // Who asks for much and reads nothing has no end to read: it is known by the turn of the others.
        let text = "GET /much HTTP/1.1\r\nhost: x\r\n\r\n";
        let _held = [open(address, text).await, open(address, text).await];
        assert!(ask(address).await.ends_with("here"), "after readers that do not read");
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused() {
        let (address, _stop) = start(Limits::default()).await;
        let head = format!("GET / HTTP/1.1\r\nhost: x\r\nlong: {}\r\n\r\n", "x".repeat(20_000));
        assert!(rest(open(address, &head).await).await.starts_with("HTTP/1.1 431"));
        let body = "x".repeat(17_000);
        let put = |head: &str, body: &str| {
            format!("PUT /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\n\r\n{body}")
        };
        let told = put(&format!("content-length: {}", body.len()), &body);
        assert!(rest(open(address, &told).await).await.starts_with("HTTP/1.1 413"));
        let chunked = put("transfer-encoding: chunked", &format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()));
        assert!(rest(open(address, &chunked).await).await.starts_with("HTTP/1.1 413"));
        let fits = put("content-length: 2", "ok");
        assert!(rest(open(address, &fits).await).await.ends_with("ok"));
    }

    #[tokio::test]
    async fn more_than_there_may_be_wait_for_their_turn() {
        let limits = Limits { connections: 1, ..Limits::default() };
        let (address, _stop) = start(limits).await;
        let mut held = open(address, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        held.read_exact(&mut [0; 1]).await.unwrap();
        let waiting = tokio::spawn(ask(address));
        held.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let first = rest(held).await;
        assert!(first.ends_with("here") && first.matches("here").count() == 2, "{first}");
        assert!(waiting.await.unwrap().ends_with("here"));
    }

    #[tokio::test]
    async fn the_end_waits_for_nobody() {
        let (address, stop) = start(Limits::default()).await;
        let silent = open(address, "").await;
        ask(address).await;
        stop.cancel();
        assert_eq!(rest(silent).await, "");
    }
}
