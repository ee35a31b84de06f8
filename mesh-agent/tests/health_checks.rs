//! Health checks over loopback: real servers of HTTP, gRPC and TCP, that are well, are not, and say nothing at all. Needs
//! root, as the agent's sockets do.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_agent::{
    checks::{
        Checks, MAX_CHECKS,
        probe::{self, ProbeError},
    },
    local::Local,
    metrics::Metrics,
    net::netns::Namespace,
    view::report::{Enrolment, HealthWord, ReportHandle},
};
use mesh_core::{
    health::Health,
    model::{
        Name,
        health::{Check, CheckedEndpoint, Pace, Probe},
    },
};
use tokio::{io::AsyncReadExt, net::TcpListener, runtime::Handle, time::timeout};

/// Longer than anything takes here.
const LONG: Duration = Duration::from_secs(20);

fn pay() -> Name {
    Name::new("shop", "pay")
}

fn local() -> Arc<Local> {
    let addresses = vec!["127.0.0.1".parse().unwrap()];
    Local::new(Name::new("shop", "pay-1"), addresses, Namespace::of_agent().unwrap()).into()
}

fn check(at: SocketAddr, probe: Probe) -> Check {
    Check {
        of: CheckedEndpoint { service: pay(), port: 80, address: at.ip() },
        port: at.port(),
        probe,
        pace: Pace {
            interval: Duration::from_millis(10),
            timeout: LONG,
            unhealthy_after: 3,
            healthy_after: 2,
        },
    }
}

fn get(path: &str) -> Probe {
    Probe::Http { path: path.into(), host: None, statuses: vec![(200, 399)] }
}

/// A server that answers as `status` says, and of gRPC with `serving`; it keeps the heads of what it was asked.
#[derive(Clone, Default)]
struct App {
    status: Arc<AtomicU16>,
    serving: Arc<AtomicU16>,
    heads: Arc<Mutex<Vec<String>>>,
}

impl App {
    async fn start(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        self.status.store(200, Ordering::Relaxed);
        self.serving.store(1, Ordering::Relaxed);
        let app = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let app = app.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let app = app.clone();
                        async move { Ok::<_, Infallible>(app.answer(request).await) }
                    });
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        at
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
        let (head, body) = request.into_parts();
        self.heads.lock().unwrap().push(format!("{} {} {:?}", head.method, head.uri, head.headers));
        if head.uri.path() == "/never" {
            return std::future::pending().await;
        }
        if head.uri.path() != "/grpc.health.v1.Health/Check" {
            let status = self.status.load(Ordering::Relaxed);
            return Response::builder().status(status).body(Full::default().boxed()).unwrap();
        }
        let asked = body.collect().await.unwrap().to_bytes();
        let (serving, mut trailers) = (self.serving.load(Ordering::Relaxed), HeaderMap::new());
        // What it does not have it does not know (grpc.health.v1: NOT_FOUND); 99 stands for that of the whole server.
        let unknown = asked.len() > 5 && &asked[7..] != b"shop.v1.Pay";
        let message = Bytes::from(vec![0, 0, 0, 0, 2, 8, u8::try_from(serving).unwrap()]);
        trailers.insert("grpc-status", if unknown { "5" } else { "0" }.parse().unwrap());
        let message = (!unknown).then(|| Frame::data(message));
        let frames = message.into_iter().chain([Frame::trailers(trailers)]).map(Ok::<_, Infallible>);
        let body = StreamBody::new(tokio_stream::iter(frames.collect::<Vec<_>>())).boxed();
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    }

    fn last_head(&self) -> String {
        self.heads.lock().unwrap().last().unwrap().clone()
    }
}

async fn ask(check: &Check) -> Result<(), ProbeError> {
    timeout(LONG, probe::ask(&Namespace::of_agent().unwrap(), check)).await.unwrap()
}

fn said(outcome: Result<(), ProbeError>) -> String {
    outcome.map_or_else(|error| error.to_string(), |()| "well".to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn http_is_well_by_its_status_and_is_asked_for_what_the_policy_says() {
    let app = App::default();
    let at = app.start().await;
    assert_eq!(said(ask(&check(at, get("/healthz?deep=1"))).await), "well");
    let head = app.last_head();
    assert!(
        head.starts_with("GET /healthz?deep=1 ") && head.contains(&format!("\"host\": \"{at}\"")),
        "{head}"
    );
    app.status.store(503, Ordering::Relaxed);
    assert_eq!(said(ask(&check(at, get("/"))).await), "it answered 503");
    let statuses = vec![(503, 503)];
    let probe = Probe::Http { path: "/".into(), host: Some("pay.example".into()), statuses };
    assert_eq!(said(ask(&check(at, probe)).await), "well");
    assert!(app.last_head().contains("\"host\": \"pay.example\""), "{}", app.last_head());
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_is_well_only_if_it_says_serving() {
    let app = App::default();
    let at = app.start().await;
    let grpc = |service: &str| check(at, Probe::Grpc { service: service.into() });
    for service in ["", "shop.v1.Pay"] {
        assert_eq!(said(ask(&grpc(service)).await), "well", "{service}");
    }
    assert_eq!(said(ask(&grpc("shop.v1.Other")).await), "it answered with grpc-status 5");
    app.serving.store(2, Ordering::Relaxed);
    assert_eq!(said(ask(&grpc("")).await), "it is not SERVING (status 2)");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_no_connection_or_says_nothing_in_time_is_not_well_however_it_is_asked() {
    // Takes connections, as the kernel does it for it, and never a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = silent.local_addr().unwrap();
    let soon = |probe| {
        let check = check(at, probe);
        Check { pace: Pace { timeout: Duration::from_millis(50), ..check.pace }, ..check }
    };
    assert_eq!(said(ask(&soon(Probe::Tcp)).await), "well");
    for probe in [get("/"), Probe::Grpc { service: String::new() }] {
        assert_eq!(said(ask(&soon(probe)).await), "no answer within 50ms");
    }
    drop(silent);
    for probe in [Probe::Tcp, get("/"), Probe::Grpc { service: String::new() }] {
        let outcome = said(ask(&check(at, probe)).await);
        assert!(outcome.starts_with("it takes no connection: Connection refused"), "{outcome}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_head_and_what_is_no_answer_at_all_are_bounded() {
    use tokio::io::AsyncWriteExt;
    for (words, endless) in [("HTTP/1.1 200 OK\r\n", true), ("SSH-2.0-x\r\n", false)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let mut sent = words.len();
            let _ = stream.write_all(words.as_bytes()).await;
            while endless && stream.write_all(&[b'x'; 1024]).await.is_ok() {
                sent += 1024;
            }
            sent
        });
        let outcome = said(ask(&check(at, get("/"))).await);
        assert!(outcome.starts_with("not an answer"), "{outcome}");
        let sent = timeout(LONG, server).await.unwrap().unwrap();
        assert!(sent < 16 << 20, "{sent} bytes were taken");
    }
}

/// Checks that run, and what is said of them.
struct Running {
    checks: Checks,
    reports: ReportHandle,
    metrics: Arc<Metrics>,
    local: Arc<Local>,
}

impl Running {
    fn new() -> Self {
        let (metrics, _) = Metrics::new();
        let (reports, local) = (ReportHandle::default(), local());
        reports.set(&local.name, Enrolment::Enrolled, "");
        let checks = Checks::new(Handle::current(), reports.clone(), metrics.clone());
        Self { checks, reports, metrics, local }
    }

    fn word(&self, of: &CheckedEndpoint) -> Option<HealthWord> {
        self.reports.health_of(&self.local.name).remove(of)
    }

    /// Waits until this is said of the endpoint.
    async fn until(&self, of: &CheckedEndpoint, health: Health) -> HealthWord {
        let said = async {
            loop {
                let changed = self.reports.changed();
                match self.word(of) {
                    Some(word) if word.health == health => return word,
                    _ => changed.await,
                }
            }
        };
        timeout(LONG, said).await.unwrap_or_else(|_| panic!("{health:?} was never said"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_fails_is_said_to_be_unhealthy_and_healthy_again_when_it_is() {
    let app = App::default();
    let at = app.start().await;
    let (mut running, check) = (Running::new(), check(at, get("/healthz")));
    running.checks.follow(&running.local.clone(), std::slice::from_ref(&check));
    assert_eq!(running.word(&check.of), Some(HealthWord::default()), "nothing is known at first");
    running.until(&check.of, Health::Healthy).await;
    app.status.store(500, Ordering::Relaxed);
    assert_eq!(running.until(&check.of, Health::Unhealthy).await.reason, "it answered 500");
    assert_eq!(running.metrics.unhealthy_endpoints(&pay()), 1);
    assert!(running.metrics.health_checks(&pay(), "failed") >= 3);
    app.status.store(204, Ordering::Relaxed);
    running.until(&check.of, Health::Healthy).await;
    assert_eq!(running.metrics.unhealthy_endpoints(&pay()), 0);
    assert!(running.metrics.health_checks(&pay(), "passed") >= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_is_no_longer_wanted_is_not_done_and_counts_nowhere() {
    let app = App::default();
    let at = app.start().await;
    app.status.store(500, Ordering::Relaxed);
    let (mut running, check) = (Running::new(), check(at, get("/")));
    let local = running.local.clone();
    running.checks.follow(&local, std::slice::from_ref(&check));
    running.until(&check.of, Health::Unhealthy).await;
    // The same again changes nothing; another one begins anew.
    running.checks.follow(&local, std::slice::from_ref(&check));
    assert_eq!(running.word(&check.of).unwrap().health, Health::Unhealthy);
    running.checks.follow(&local, &[]);
    assert_eq!(running.word(&check.of), None);
    let ended = async {
        while running.metrics.unhealthy_endpoints(&pay()) != 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, ended).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_are_checked_than_may_be_and_no_address_of_anybody_else() {
    let mut running = Running::new();
    let local = running.local.clone();
    let at = |port| check(SocketAddr::from(([127, 0, 0, 1], 1)), Probe::Tcp).with_port(port);
    let elsewhere = check(SocketAddr::from(([192, 0, 2, 1], 1)), Probe::Tcp);
    let mut checks: Vec<Check> = (0..=u16::try_from(MAX_CHECKS).unwrap()).map(at).collect();
    checks.insert(0, elsewhere);
    running.checks.follow(&local, &checks);
    assert_eq!(running.reports.health_of(&local.name).len(), MAX_CHECKS);
    assert_eq!(running.metrics.limit_hits("health_checks"), 1);
}

trait WithPort {
    fn with_port(self, port: u16) -> Self;
}

impl WithPort for Check {
    /// The same of another port of the service.
    fn with_port(self, port: u16) -> Self {
        Self { of: CheckedEndpoint { port, ..self.of }, ..self }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_never_answer_keep_nobody_else_from_being_checked() {
    // More than are under way at once, each for a while.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let accepted = Arc::new(AtomicUsize::new(0));
    let counted = accepted.clone();
    let silent_at = silent.local_addr().unwrap();
    tokio::spawn(async move {
        let mut kept = vec![];
        while let Ok((stream, _)) = silent.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            kept.push(stream);
        }
    });
    let app = App::default();
    let well = check(app.start().await, get("/")).with_port(9999);
    let slow = |port| {
        let check = check(silent_at, get("/")).with_port(port);
        let pace = Pace { timeout: Duration::from_millis(200), ..check.pace };
        Check { pace, ..check }
    };
    let checks: Vec<Check> = (0..300).map(slow).chain([well.clone()]).collect();
    let mut running = Running::new();
    let local = running.local.clone();
    running.checks.follow(&local, &checks);
    running.until(&well.of, Health::Healthy).await;
    running.until(&slow(299).of, Health::Unhealthy).await;
    assert!(accepted.load(Ordering::Relaxed) >= 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_never_answers_sees_each_connection_end_all_the_same() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = silent.local_addr().unwrap();
    for probe in [get("/"), Probe::Grpc { service: String::new() }] {
        let of_it = check(at, probe);
        let of_it = Check { pace: Pace { timeout: Duration::from_millis(20), ..of_it.pace }, ..of_it };
        let (outcome, accepted) = tokio::join!(ask(&of_it), silent.accept());
        assert_eq!(said(outcome), "no answer within 20ms");
        let (mut stream, _) = accepted.unwrap();
        // All that was asked, and then the end, or a reset.
        let ended = async { while let Ok(1..) = stream.read(&mut [0; 1024]).await {} };
        timeout(LONG, ended).await.unwrap();
    }
}
