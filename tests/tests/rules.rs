//! Rules of a service that change all the time under connections that live: from the manifest to the wire, on real kernels and
//! through real agents, no request fails for it, and none is answered by anything but a rule that was in force.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    convert::Infallible,
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_tests::{
    Workload, WorkloadSpec, World,
    manifests::{Enrolment, Mode},
    until,
    wait::scaled,
    workload::TIMEOUT,
};
use tokio::{
    net::TcpStream,
    runtime::Runtime,
    sync::{Mutex, watch},
    task::JoinHandle,
};

/// Changes that are waited for, and as many that are not.
const CHANGES: usize = 100;
/// Connections of HTTP/1.1.
const CONNECTIONS: usize = 2;
/// Requests at once on the one connection of HTTP/2.
const STREAMS: usize = 4;

/// A rule of this number: it leads to one of two backends, and its answers say which rule it is.
fn rule(number: usize) -> String {
    format!(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: shop, name: pay}}
spec:
  parentRefs: [{{group: '', kind: Service, name: pay, port: 80}}]
  rules:
    - filters:
        - type: ResponseHeaderModifier
          responseHeaderModifier: {{set: [{{name: x-rule, value: '{number}'}}]}}
      backendRefs: [{{name: {}, port: 80}}]
",
        backend(number)
    )
}

fn backend(number: usize) -> &'static str {
    ["pay-1", "pay-2"][number % 2]
}

/// Says its name in a header, in either version.
async fn serve(name: &'static str, listener: TcpListener) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let answer = service_fn(move |_: Request<Incoming>| async move {
                let answer = Response::builder().header("x-app", name).body(Full::new(Bytes::from("yes")));
                Ok::<_, Infallible>(answer.unwrap())
            });
            // Ends with an error where an agent ends a connection that it does not need any more.
            let _ =
                auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

/// What clients and those who change rules know of them.
#[derive(Default)]
struct Changes {
    /// The newest that was written.
    written: AtomicUsize,
    /// The newest that somebody was answered by: older ones are not in force any more.
    seen: AtomicUsize,
    done: AtomicBool,
}

/// Asks without pause, until there are no more changes. Tells by which rule it was answered; how often at last.
async fn asks<F>(changes: Arc<Changes>, tells: watch::Sender<usize>, ask: impl Fn() -> F) -> usize
where
    F: Future<Output = hyper::Result<Response<Incoming>>>,
{
    let mut asked = 0;
    while !changes.done.load(Ordering::SeqCst) {
        let oldest = changes.seen.load(Ordering::SeqCst);
        let answer = ask().await.unwrap_or_else(|error| panic!("request {asked}: {error:?}"));
        let newest = changes.written.load(Ordering::SeqCst);
        let (head, body) = answer.into_parts();
        assert_eq!(head.status, StatusCode::OK, "request {asked}: {:?}", head.headers);
        let number: usize = head.headers["x-rule"].to_str().unwrap().parse().unwrap();
        assert!((oldest..=newest).contains(&number), "rule {number} is not one of {oldest} to {newest}");
        assert_eq!(head.headers["x-app"], backend(number), "a rule is one with its backend");
        let body = body.collect().await.unwrap_or_else(|error| panic!("request {asked}: {error:?}"));
        assert_eq!(body.to_bytes(), "yes");
        changes.seen.fetch_max(number, Ordering::SeqCst);
        tells.send_replace(number);
        asked += 1;
    }
    asked
}

fn get(uri: &str) -> Request<Empty<Bytes>> {
    let request = Request::get(uri);
    // HTTP/2 has it in the URI.
    let request = if uri == "/" { request.header("host", "pay") } else { request };
    request.body(Empty::new()).unwrap()
}

/// A world, and clients that ask in it.
struct Scene {
    world: World,
    runtime: Runtime,
    changes: Arc<Changes>,
    clients: Vec<JoinHandle<usize>>,
    /// By which rule each client was last answered.
    seen: Vec<watch::Receiver<usize>>,
}

impl Scene {
    fn new() -> Self {
        let world = World::shop()
            .namespace("shop", Enrolment::Enrolled, Mode::Strict)
            .with(WorkloadSpec::new("shop/pay-1", "a").app("pay-1"))
            .with(WorkloadSpec::new("shop/pay-2", "b").app("pay-2"))
            .service("shop/pay", "nobody", 80, 8080)
            .service("shop/pay-1", "pay-1", 80, 8080)
            .service("shop/pay-2", "pay-2", 80, 8080)
            .build()
            .unwrap();
        let runtime = Runtime::new().unwrap();
        for name in ["pay-1", "pay-2"] {
            let workload: Workload = world.workload(name);
            let listener = workload.listen(workload.address.v4.into(), 8080).unwrap();
            listener.set_nonblocking(true).unwrap();
            runtime.spawn(serve(name, listener));
        }
        Self { world, runtime, changes: Arc::default(), clients: vec![], seen: vec![] }
    }

    /// A connection of the client's.
    fn connect(&self) -> std::io::Result<TokioIo<TcpStream>> {
        let to = (self.world.service("shop/pay").v4, 80).into();
        let stream = self.world.workload("web").connect(to)?;
        stream.set_nonblocking(true)?;
        let _inside = self.runtime.enter();
        TcpStream::from_std(stream).map(TokioIo::new)
    }

    /// Opens all connections, once: one that ends fails its client.
    fn start(&mut self) {
        for _ in 0..CONNECTIONS {
            let stream = self.connect().unwrap();
            let (sender, connection) = self.runtime.block_on(http1::handshake(stream)).unwrap();
            self.runtime.spawn(connection);
            let sender = Arc::new(Mutex::new(sender));
            let ask = move || {
                let sender = sender.clone();
                async move {
                    let mut sender = sender.lock().await;
                    sender.ready().await?;
                    sender.send_request(get("/")).await
                }
            };
            self.client(|changes, tells| asks(changes, tells, ask));
        }
        let stream = self.connect().unwrap();
        let handshake = http2::handshake(TokioExecutor::new(), stream);
        let (sender, connection) = self.runtime.block_on(handshake).unwrap();
        self.runtime.spawn(connection);
        for _ in 0..STREAMS {
            let sender = sender.clone();
            let ask = move || {
                let mut sender = sender.clone();
                async move { sender.send_request(get("http://pay/")).await }
            };
            self.client(|changes, tells| asks(changes, tells, ask));
        }
    }

    fn client<F>(&mut self, asks: impl FnOnce(Arc<Changes>, watch::Sender<usize>) -> F)
    where
        F: Future<Output = usize> + Send + 'static,
    {
        let (tells, seen) = watch::channel(0);
        self.clients.push(self.runtime.spawn(asks(self.changes.clone(), tells)));
        self.seen.push(seen);
    }

    fn write(&self, number: usize) {
        self.changes.written.store(number, Ordering::SeqCst);
        self.world.yaml.write("route.yaml", &rule(number)).unwrap();
    }

    /// Until every client was answered by this rule.
    fn await_rule(&mut self, number: usize) {
        for seen in &mut self.seen {
            let is_there = async {
                let seen = seen.wait_for(|seen| *seen == number);
                tokio::time::timeout(scaled(TIMEOUT), seen).await.map(|it| it.is_ok())
            };
            let seen = self.runtime.block_on(is_there);
            assert_eq!(seen, Ok(true), "rule {number} comes into force, and all clients ask still");
        }
    }
}

#[test]
fn rules_that_change_all_the_time_disturb_no_request() {
    let mut scene = Scene::new();
    scene.write(0);
    until("the first rule is in force", TIMEOUT, || {
        let stream = scene.connect().map_err(|error| error.to_string())?;
        let first = async {
            let (mut sender, connection) = http1::handshake(stream).await?;
            tokio::spawn(connection);
            sender.send_request(get("/")).await
        };
        let answer = scene.runtime.block_on(first).map_err(|error| error.to_string())?;
        answer.headers().get("x-rule").map(drop).ok_or_else(|| answer.status().to_string())
    });
    scene.start();
    for number in 1..=CHANGES {
        scene.write(number);
        scene.await_rule(number);
    }
    // As fast as they can be written: the controller need not tell of each.
    for number in CHANGES + 1..=2 * CHANGES {
        scene.write(number);
    }
    scene.await_rule(2 * CHANGES);
    scene.changes.done.store(true, Ordering::SeqCst);
    for client in scene.clients.drain(..) {
        assert!(scene.runtime.block_on(client).unwrap() > CHANGES);
    }
    let metrics = scene.world.agent("a").metrics().unwrap();
    let ended =
        |reason| metrics.sum("nodemesh_requests_total", &[("service", "shop/pay"), ("reason", reason)]);
    assert!(
        ended("") > 0.0 && ended("") == metrics.sum("nodemesh_requests_total", &[("service", "shop/pay")])
    );
}
