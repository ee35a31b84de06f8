//! What is seen of requests by traces and by the access log, through two agents and a collector that reads spans by
//! OpenTelemetry's own types. Needs root, as the data path does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "data_path/app.rs"]
#[allow(dead_code, reason = "the tests of requests use the rest of it")]
mod app;
#[path = "data_path/bed.rs"]
#[allow(dead_code, reason = "the tests of requests use the rest of it")]
mod bed;
#[path = "data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bed::*;
use http::{Request, StatusCode};
use mesh_agent::{config::TracingProtocol, metrics::exposition::Format, spans::Tracing};
use mesh_core::model::{
    Action, Asks, Policy, Rule, Target,
    http::{Backend, BackendTarget, Filters},
    traffic::{Retries, RetryBudget, Traffic},
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{ResourceSpans, Span, span::SpanKind, status::StatusCode as SpanStatus},
};
use prost::Message as _;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;
use world::*;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A collector that remembers.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (collector, at) = (Self::default(), listener.local_addr().unwrap());
        let serving = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(serving);
        (collector, at)
    }

    /// All spans so far, of both agents.
    async fn spans(&self, world: &World) -> Vec<Span> {
        self.resources(world).await.iter().flat_map(spans_of).collect()
    }

    /// The same by whose they are, batch after batch.
    async fn resources(&self, world: &World) -> Vec<ResourceSpans> {
        for agent in [&world.source, &world.destination] {
            in_time(agent.spans.as_ref().unwrap().flush(PATIENCE)).await;
        }
        let requests = self.0.lock().unwrap();
        requests.iter().flat_map(|it| it.resource_spans.clone()).collect()
    }
}

fn spans_of(resource: &ResourceSpans) -> Vec<Span> {
    resource.scope_spans.iter().flat_map(|it| it.spans.clone()).collect()
}

/// What is said of a workload: of which kind its spans are, and its attributes.
fn whose(told: &ResourceSpans) -> (SpanKind, BTreeMap<String, serde_json::Value>) {
    let kinds: BTreeSet<i32> = spans_of(told).iter().map(|span| span.kind).collect();
    assert_eq!(kinds.len(), 1, "a workload asks, or is asked");
    let kind = SpanKind::try_from(*kinds.first().unwrap()).unwrap();
    (kind, attributes(&told.resource.as_ref().unwrap().attributes))
}

fn traced_by(at: SocketAddr, share: &str) -> Sees {
    let protocol = TracingProtocol::Grpc;
    let (endpoint, share) = (format!("http://{at}"), share.parse().unwrap());
    let tracing = Tracing { endpoint, protocol, roots: None, share };
    Sees { tracing: Some(tracing), log: None }
}

fn to_web() -> Vec<mesh_core::model::http::RouteRule> {
    vec![rule(vec![], vec![to("web", 1)])]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(all: &[KeyValue]) -> BTreeMap<String, serde_json::Value> {
    let value = |it: &KeyValue| match it.value.clone().unwrap().value.unwrap() {
        Value::StringValue(text) => json!(text),
        Value::IntValue(number) => json!(number),
        other => panic!("{other:?}"),
    };
    all.iter().map(|it| (it.key.clone(), value(it))).collect()
}

/// What the application says that it has seen of a header.
fn seen(said: &serde_json::Value, name: &str) -> Option<String> {
    let headers: Vec<(String, String)> = serde_json::from_value(said["headers"].clone()).unwrap();
    headers.into_iter().find(|it| it.0 == name).map(|it| it.1)
}

/// A request that both agents read.
async fn read_by_both(sees: &Sees) -> Bed {
    let mut bed = Bed::seeing(to_web(), sees).await;
    let any_of = Asks { methods: vec!["GET".to_owned()], ..Asks::default() };
    let rules = vec![Rule { from: vec![], to: vec![Target { any_of, ..Target::default() }] }];
    bed.plan.policies = vec![Policy::new(name("requests"), Action::Allow, rules)];
    bed.world.publish(&bed.plan, "guarded");
    bed
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_of_both_agents_stand_between_the_clients_and_the_applications() {
    let (collector, at) = Collector::start().await;
    let bed = read_by_both(&traced_by(at, "0%")).await;
    let request = Request::get("/cart?secret=1")
        .header("traceparent", format!("00-{TRACE}-{PARENT}-01"))
        .header("tracestate", "a=1,b=2");
    let (status, said) = bed.client().await.ask(request).await;
    assert_eq!((status, seen(&said, "tracestate").as_deref()), (StatusCode::OK, Some("a=1,b=2")));
    let line = bed.log("/cart").await;
    assert_eq!(line["trace_id"], TRACE);

    let spans = collector.spans(&bed.world).await;
    let of = |kind: SpanKind| spans.iter().find(|span| span.kind == kind as i32).unwrap();
    let (client, server) = (of(SpanKind::Client), of(SpanKind::Server));
    assert_eq!(spans.len(), 2);
    assert_eq!((hex(&client.trace_id), hex(&server.trace_id)), (TRACE.to_owned(), TRACE.to_owned()));
    assert_eq!(hex(&client.parent_span_id), PARENT);
    assert_eq!(server.parent_span_id, client.span_id);
    let expected = format!("00-{TRACE}-{}-01", hex(&server.span_id));
    assert_eq!(seen(&said, "traceparent"), Some(expected), "the application's parent is the nearest agent");
    assert_eq!(line["span_id"], hex(&client.span_id));
    assert!(client.start_time_unix_nano <= server.start_time_unix_nano && client.name == "GET");

    let all = attributes(&client.attributes);
    for (key, value) in [
        ("http.request.method", json!("GET")),
        ("url.path", json!("/cart")),
        ("http.response.status_code", json!(200)),
        ("server.address", json!("service")),
        ("network.protocol.version", json!("1.1")),
        ("nodemesh.source.workload", json!("shop/client")),
        ("nodemesh.destination.workload", json!("shop/web")),
        ("nodemesh.backend", json!("shop/web")),
        ("nodemesh.route", json!("HTTPRoute/shop/route")),
    ] {
        assert_eq!(all.get(key), Some(&value), "{key} in {all:?}");
    }
    assert!(!format!("{spans:?}").contains("secret"));
    let all = attributes(&server.attributes);
    assert_eq!(all["nodemesh.source.identity"], identity("client").to_string());

    // One that the destination's agent refuses.
    let refused = Request::delete("/cart/1").header("traceparent", format!("00-{TRACE}-{PARENT}-01"));
    assert_eq!(bed.client().await.ask(refused).await.0, StatusCode::FORBIDDEN);
    let spans = collector.spans(&bed.world).await;
    let refused = spans.iter().find(|it| it.kind == SpanKind::Server as i32 && it.name == "DELETE").unwrap();
    assert_eq!(attributes(&refused.attributes)["nodemesh.refusal.reason"], "policy_not_allowed");
    assert_eq!(refused.status.as_ref().unwrap().code, SpanStatus::Error as i32);
}

/// The client is a pod of a Job, `web` a process on a machine that says what it is of, and of `api` nothing is known.
fn of_three_kinds(plan: &mut Plan) {
    let client = plan.workload("client");
    client.uid = "9f2d".to_owned();
    client.labels = BTreeMap::from([("batch.kubernetes.io/job-name".to_owned(), "import".to_owned())]);
    plan.workload("web").labels =
        BTreeMap::from([("app.kubernetes.io/name".to_owned(), "shop-web".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_is_its_workloads_and_not_its_agents() {
    let (collector, at) = Collector::start().await;
    let mut bed = read_by_both(&traced_by(at, "100%")).await;
    of_three_kinds(&mut bed.plan);
    bed.plan.routes =
        vec![route(vec![rule(vec![prefix("/api")], vec![to("api", 1)]), rule(vec![], vec![to("web", 1)])])];
    bed.world.publish(&bed.plan, "of three kinds");
    let mut client = bed.client().await;
    for path in ["/", "/api", "/", "/api"] {
        assert_eq!(client.get(path).await.0, StatusCode::OK);
    }
    let told = collector.resources(&bed.world).await;
    let mut spans = BTreeMap::new();
    for resource in &told {
        let (kind, said) = whose(resource);
        let service = said["service.name"].as_str().unwrap().to_owned();
        let expected = match service.as_str() {
            "import" => vec![
                ("k8s.job.name", "import"),
                ("k8s.namespace.name", "shop"),
                ("k8s.pod.name", "client"),
                ("k8s.pod.uid", "9f2d"),
                ("k8s.node.name", "node-a"),
                ("service.instance.id", "shop.client"),
            ],
            "shop-web" => vec![("host.name", "node-b"), ("service.instance.id", "shop.web")],
            "api" => vec![("host.name", "node-b"), ("service.instance.id", "shop.api")],
            other => panic!("{other}: {said:?}"),
        };
        assert_eq!(kind, if service == "import" { SpanKind::Client } else { SpanKind::Server });
        for (key, value) in expected.into_iter().chain([
            ("service.namespace", "shop"),
            ("telemetry.sdk.name", "nodemesh-agent"),
            ("telemetry.sdk.language", "rust"),
            ("telemetry.sdk.version", env!("CARGO_PKG_VERSION")),
        ]) {
            assert_eq!(said.get(key), Some(&json!(value)), "{key} of {service} in {said:?}");
        }
        let own = if kind == SpanKind::Client {
            "nodemesh.source.workload"
        } else {
            "nodemesh.destination.workload"
        };
        let workload = said["service.instance.id"].as_str().unwrap().replace('.', "/");
        for span in spans_of(resource) {
            assert_eq!(attributes(&span.attributes)[own], json!(workload));
        }
        *spans.entry(service).or_insert(0) += spans_of(resource).len();
    }
    let expected = [("import", 4), ("shop-web", 2), ("api", 2)];
    assert_eq!(spans, expected.map(|(service, n)| (service.to_owned(), n)).into());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_recorded_is_what_the_parent_says_or_else_the_share() {
    let (collector, at) = Collector::start().await;
    let none = Bed::seeing(to_web(), &traced_by(at, "0%")).await;
    let mut client = none.client().await;
    let unsampled = format!("00-{TRACE}-{PARENT}-00");
    for (header, value) in [("traceparent", unsampled.as_str()), ("traceparent", "nonsense"), ("b3", "0")] {
        let (_, said) = client.ask(Request::get("/").header(header, value)).await;
        assert_eq!(seen(&said, header).as_deref(), Some(value), "it goes on as it came");
    }
    assert_eq!(seen(&client.get("/").await.1, "traceparent"), None);
    assert_eq!(collector.spans(&none.world).await, []);

    let all = Bed::seeing(to_web(), &traced_by(at, "100%")).await;
    let mut client = all.client().await;
    let (_, said) = client.ask(Request::get("/").header("traceparent", &unsampled)).await;
    assert_eq!(seen(&said, "traceparent"), Some(unsampled), "what is decided is respected");
    let odd = Request::get("/odd").header("traceparent", "nonsense").header("tracestate", "a=1");
    let (_, said) = client.ask(odd).await;
    let spans = collector.spans(&all.world).await;
    let [span] = spans.as_slice() else { panic!("{spans:?}") };
    assert!(span.parent_span_id.is_empty(), "it begins a new trace");
    let expected = format!("00-{}-{}-01", hex(&span.trace_id), hex(&span.span_id));
    assert_eq!((seen(&said, "traceparent"), seen(&said, "tracestate")), (Some(expected), None));
    let b3 = Request::get("/b3").header("b3", format!("{TRACE}-{PARENT}-1"));
    let (_, said) = client.ask(b3).await;
    let spans = collector.spans(&all.world).await;
    let span = spans.iter().find(|it| hex(&it.parent_span_id) == PARENT).unwrap();
    assert_eq!(seen(&said, "b3"), Some(format!("{TRACE}-{}-1-{PARENT}", hex(&span.span_id))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_measurement_leads_to_the_trace_of_a_request_that_is_recorded() {
    let (_collector, at) = Collector::start().await;
    let bed = read_by_both(&traced_by(at, "0%")).await;
    let mut client = bed.client().await;
    // The latter two fall into the same bucket as a rule, and are not recorded.
    let other = TRACE.replace('4', "5");
    for (path, context) in [
        ("/recorded", Some(format!("00-{TRACE}-{PARENT}-01"))),
        ("/not", Some(format!("00-{other}-{PARENT}-00"))),
        ("/last", None),
    ] {
        let request = Request::get(path);
        let request = context.iter().fold(request, |request, it| request.header("traceparent", it));
        assert_eq!(client.ask(request).await.0, StatusCode::OK);
    }
    for agent in [&bed.world.source, &bed.world.destination] {
        eventually(async || agent.log().await.iter().any(|line| line["path"] == "/last").then_some(())).await;
        let shown = |format: Format| String::from_utf8(format.write(&agent.registry).unwrap()).unwrap();
        let text = shown(Format::Text);
        let traced: Vec<_> = text.split(" # {").skip(1).map(|rest| rest.split('}').next().unwrap()).collect();
        assert_eq!(traced, [format!("trace_id=\"{TRACE}\"")]);
        assert!(!shown(Format::Plain).contains(TRACE));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_are_events_and_calls_are_told_as_calls() {
    let (collector, at) = Collector::start().await;
    let mut bed = Bed::seeing(vec![], &traced_by(at, "100%")).await;
    bed.plan.routes = vec![];
    let retries = Retries {
        attempts: 4,
        codes: vec![503],
        grpc_codes: vec![],
        every_method: false,
        backoff: Duration::from_millis(1),
        budget: RetryBudget::default(),
    };
    let traffic = Traffic { retries: Some(retries), reads_requests: true, ..Traffic::default() };
    bed.plan.services[0].ports[0].traffic = traffic;
    bed.world.publish(&bed.plan, "retried");
    assert_eq!(bed.client().await.get("/unready").await.0, StatusCode::OK);
    let spans = collector.spans(&bed.world).await;
    let [span] = spans.as_slice() else { panic!("{spans:?}") };
    let statuses: Vec<_> = span
        .events
        .iter()
        .map(|event| attributes(&event.attributes)["http.response.status_code"].clone())
        .collect();
    let last = statuses.len() - 1;
    assert!(
        last >= 2 && statuses[..last].iter().all(|it| *it == 503) && statuses[last] == 200,
        "{statuses:?}"
    );
    assert_eq!(attributes(&span.attributes)["http.request.resend_count"], last);
    let attempts: Vec<_> =
        span.events.iter().map(|event| attributes(&event.attributes)["nodemesh.attempt"].clone()).collect();
    assert_eq!(attempts, (1..=last + 1).map(|attempt| json!(attempt)).collect::<Vec<_>>());

    let answer = bed.caller().await.call("/trailers/fail").await;
    in_time(http_body_util::BodyExt::collect(answer.into_body())).await.unwrap();
    let spans = collector.spans(&bed.world).await;
    let call = attributes(&spans.last().unwrap().attributes);
    assert_eq!((&call["rpc.system.name"], &call["rpc.method"]), (&json!("grpc"), &json!("trailers/fail")));
    assert_eq!(
        (&call["rpc.response.status_code"], &call["error.type"]),
        (&json!("INTERNAL"), &json!("INTERNAL"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_is_known_by_its_certificate() {
    let (collector, at) = Collector::start().await;
    let certified = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let builder =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let mut config = builder.with_single_cert(vec![certified.cert.der().clone()], key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let by_tls = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut on = TcpStream::connect(at).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut on).await;
            });
        }
    });
    let roots = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(roots.path(), certified.cert.pem()).unwrap();
    let tracing = Tracing {
        endpoint: format!("https://{by_tls}"),
        protocol: TracingProtocol::Grpc,
        roots: Some(roots.path().to_owned()),
        share: "100%".parse().unwrap(),
    };
    let bed = Bed::seeing(to_web(), &Sees { tracing: Some(tracing), log: None }).await;
    assert_eq!(bed.client().await.get("/").await.0, StatusCode::OK);
    assert_eq!(collector.spans(&bed.world).await.len(), 1);
}

/// A collector that is spoken to by HTTP: what it is asked, and what it answers, one after the other; at last always 200.
#[derive(Clone)]
struct Posted {
    asked: Arc<Mutex<Vec<(String, String, ExportTraceServiceRequest)>>>,
    answers: Arc<Mutex<VecDeque<axum::response::Response>>>,
}

impl Posted {
    async fn start(answers: Vec<axum::response::Response>) -> (Self, SocketAddr) {
        let posted = Self { asked: Arc::default(), answers: Arc::new(Mutex::new(answers.into())) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let of = posted.clone();
        let answer = async move |method: http::Method,
                                 uri: http::Uri,
                                 headers: http::HeaderMap,
                                 body: bytes::Bytes| {
            let content = headers["content-type"].to_str().unwrap().to_owned();
            let request = ExportTraceServiceRequest::decode(body).unwrap();
            of.asked.lock().unwrap().push((format!("{method} {uri}"), content, request));
            of.answers.lock().unwrap().pop_front().unwrap_or_default()
        };
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await });
        (posted, at)
    }
}

fn answers(status: u16) -> axum::response::Response {
    let answer = http::Response::builder().status(status).header("retry-after", "0");
    answer.body(axum::body::Body::empty()).unwrap()
}

async fn posting_to(endpoint: String) -> Bed {
    let (protocol, share) = (TracingProtocol::Http, "100%".parse().unwrap());
    let tracing = Tracing { endpoint, protocol, roots: None, share };
    Bed::seeing(to_web(), &Sees { tracing: Some(tracing), log: None }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_go_by_http_and_again_only_where_the_collector_wants_that() {
    let partial = ExportTraceServiceResponse {
        partial_success: Some(ExportTracePartialSuccess {
            rejected_spans: 1,
            error_message: "no".to_owned(),
        }),
    };
    let partial = axum::response::Response::new(axum::body::Body::from(partial.encode_to_vec()));
    let said = vec![answers(503), answers(200), answers(400), answers(307), partial, answers(429)];
    let (collector, at) = Posted::start(said).await;
    let mut bed = posting_to(format!("http://{at}")).await;
    of_three_kinds(&mut bed.plan);
    bed.world.publish(&bed.plan, "of three kinds");
    let spans = bed.world.source.spans.as_ref().unwrap();
    let mut client = bed.client().await;
    // Of each request the one span, and how often it was sent; how many were given up by then.
    for (sent, lost) in [(2, 0), (1, 1), (1, 2), (1, 3), (2, 3), (1, 3)] {
        collector.asked.lock().unwrap().clear();
        assert_eq!(client.get("/").await.0, StatusCode::OK);
        in_time(spans.flush(PATIENCE)).await;
        let asked = collector.asked.lock().unwrap().clone();
        assert_eq!((asked.len(), bed.world.source.metrics.spans_lost("collector")), (sent, lost));
        for (line, content, request) in &asked {
            assert_eq!((line.as_str(), content.as_str()), ("POST /v1/traces", "application/x-protobuf"));
            let [told] = request.resource_spans.as_slice() else { panic!("{request:?}") };
            let (kind, said) = whose(told);
            assert_eq!((spans_of(told).len(), kind), (1, SpanKind::Client));
            assert_eq!(
                (&said["service.name"], &said["service.namespace"]),
                (&json!("import"), &json!("shop"))
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_go_by_http_to_the_path_of_the_endpoint() {
    let (collector, at) = Posted::start(vec![]).await;
    let bed = posting_to(format!("http://{at}/otlp/v1/traces")).await;
    bed.client().await.get("/").await;
    in_time(bed.world.source.spans.as_ref().unwrap().flush(PATIENCE)).await;
    assert_eq!(collector.asked.lock().unwrap()[0].0, "POST /otlp/v1/traces");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_disturbs_no_request_and_costs_so_much_and_no_more() {
    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let bed = Bed::seeing(to_web(), &traced_by(silent.local_addr().unwrap(), "100%")).await;
    let mut client = bed.client().await;
    let lost = || bed.world.source.metrics.spans_lost("queue");
    let mut asked = 0;
    while lost() == 0 {
        assert_eq!(client.get("/").await.0, StatusCode::OK);
        asked += 1;
        // What waits, and what is on its way.
        assert!(asked <= 4096 + 512 + 1);
    }
    let began = Instant::now();
    bed.world.source.spans.as_ref().unwrap().flush(Duration::from_millis(50)).await;
    assert!(began.elapsed() < Duration::from_secs(5), "the end of an agent does not wait for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_log_of_errors_has_what_went_wrong_and_nothing_else() {
    let nowhere = Backend { to: BackendTarget::Nowhere, weight: 1, filters: Filters::default() };
    let rules =
        || vec![rule(vec![prefix("/nowhere")], vec![nowhere.clone()]), rule(vec![], vec![to("web", 1)])];
    let sees = |mode: &str| Sees { tracing: None, log: Some(mode.parse().unwrap()) };
    let ask = async |bed: &Bed| {
        let mut client = bed.client().await;
        for path in ["/fine", "/broken/all", "/nowhere"] {
            client.get(path).await;
        }
        // Of a request the line is there before its answer's end is.
        let lines = bed.world.source.log().await;
        lines
            .into_iter()
            .map(|line| line["path"].as_str().unwrap_or("a connection").to_owned())
            .collect::<Vec<_>>()
    };
    let bed = Bed::seeing(rules(), &sees("errors")).await;
    assert_eq!(ask(&bed).await, ["/broken/all", "/nowhere"]);
    let bed = Bed::seeing(rules(), &sees("off")).await;
    assert_eq!(ask(&bed).await, [""; 0]);
    assert_eq!(bed.world.source.metrics.log_dropped().get(), 0, "what is not wanted is not lost");
}
