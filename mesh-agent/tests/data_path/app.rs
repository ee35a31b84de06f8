//! An application that speaks HTTP/1.1 and HTTP/2, and says what it was asked.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};

use crate::world::in_time;

/// An application that says what it was asked, and does what paths say.
pub(crate) struct App {
    served: Arc<AtomicUsize>,
    given_up: Arc<AtomicUsize>,
    connected: Arc<AtomicUsize>,
    #[allow(dead_code, reason = "for those who end it")]
    pub(crate) task: JoinHandle<()>,
}

impl App {
    /// Requests so far.
    pub(crate) fn served(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }

    /// Connections so far.
    #[allow(dead_code, reason = "for those who count them")]
    pub(crate) fn connected(&self) -> usize {
        self.connected.load(Ordering::Relaxed)
    }

    /// Requests for `/stalls` that nobody waits for any more.
    #[allow(dead_code, reason = "for those who give up")]
    pub(crate) fn given_up(&self) -> usize {
        self.given_up.load(Ordering::Relaxed)
    }
}

pub(crate) fn app(says: &'static str, listener: TcpListener) -> App {
    let (served, given_up) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let connected = Arc::<AtomicUsize>::default();
    let (counted, dropped, connects) = (served.clone(), given_up.clone(), connected.clone());
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            connects.fetch_add(1, Ordering::Relaxed);
            let (counted, dropped) = (counted.clone(), dropped.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let count = counted.fetch_add(1, Ordering::Relaxed);
                    let dropped = dropped.clone();
                    async move {
                        if stalls(says, request.uri().path()) {
                            let _counts = Dropped(dropped);
                            std::future::pending::<()>().await;
                        }
                        Ok::<_, Infallible>(respond(says, count, request).await)
                    }
                });
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
            });
        }
    });
    App { served, given_up, connected, task }
}

/// Counts when it is dropped.
struct Dropped(Arc<AtomicUsize>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// `/stalls/APP…`: that application never answers.
fn stalls(says: &str, path: &str) -> bool {
    let mut parts = path.split('/').skip(1);
    parts.next() == Some("stalls") && parts.next() == Some(says)
}

async fn respond(
    says: &str,
    count: usize,
    mut request: Request<Incoming>,
) -> Response<BoxBody<Bytes, Infallible>> {
    let path = request.uri().path().to_owned();
    let mut response = Response::new(Full::new(Bytes::new()).boxed());
    response.headers_mut().insert("x-app", says.parse().unwrap());
    if wants_time(says, &path, &mut response) {
        return response;
    }
    match path.as_str() {
        "/never" => std::future::pending().await,
        "/late" if count == 0 => std::future::pending().await,
        "/unready" if count < 2 => *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE,
        // Of one of several, which has failed.
        broken if broken == "/broken/all" || broken.strip_prefix("/broken/") == Some(says) => {
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        }
        "/die" if count == 0 => panic!("as asked"),
        "/trailers/say" | "/trailers/fail" => {
            let status = if path == "/trailers/say" { "7" } else { "13" };
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", status.parse().unwrap());
            let frames = [Ok(Frame::data(Bytes::from("body"))), Ok(Frame::trailers(trailers))];
            *response.body_mut() = BodyExt::boxed(StreamBody::new(futures_util::stream::iter(frames)));
        }
        "/upgrade" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut stream = TokioIo::new(upgrade.await.unwrap());
                let mut bytes = [0; 4];
                stream.read_exact(&mut bytes).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            });
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert("connection", "upgrade".parse().unwrap());
            response.headers_mut().insert("upgrade", "echo".parse().unwrap());
        }
        _ => {
            let headers: Vec<(String, String)> = request
                .headers()
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
                .collect();
            let (method, uri) = (request.method().to_string(), request.uri().to_string());
            let body = request.into_body().collect().await.map(|it| it.to_bytes()).unwrap_or_default();
            let said = json!({
                "app": says, "method": method, "uri": uri, "headers": headers, "length": body.len(),
                "body": String::from_utf8_lossy(&body[..body.len().min(100)]),
            });
            let said = said.to_string();
            // hyper leaves it to its user that an answer to HEAD has no body (RFC 9110, section 9.3.2) in HTTP/2.
            if method == Method::HEAD.as_str() {
                response.headers_mut().insert(header::CONTENT_LENGTH, said.len().into());
            } else {
                *response.body_mut() = Full::new(Bytes::from(said)).boxed();
            }
        }
    }
    response
}

/// `/stalls/APP/STATUS`: the other application answers so. `/busy/APP/STATUS/SECONDS` and, of calls, `/pushback/APP/MS`: that application wants to be asked later.
fn wants_time(says: &str, path: &str, response: &mut Response<BoxBody<Bytes, Infallible>>) -> bool {
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    match parts[..] {
        ["stalls", _, status] => *response.status_mut() = status.parse().unwrap(),
        ["busy", app, status, seconds] if app == says => {
            *response.status_mut() = status.parse().unwrap();
            response.headers_mut().insert(header::RETRY_AFTER, seconds.parse().unwrap());
        }
        ["pushback", app, ms] if app == says => {
            for (name, value) in
                [("content-type", "application/grpc"), ("grpc-status", "14"), ("grpc-retry-pushback-ms", ms)]
            {
                response.headers_mut().insert(name, value.parse().unwrap());
            }
        }
        _ => return false,
    }
    true
}

/// The status, and what the application said.
pub(crate) async fn said(response: Response<Incoming>) -> (StatusCode, Value) {
    let status = response.status();
    let body = in_time(response.into_body().collect()).await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}
