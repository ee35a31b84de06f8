//! Health, metrics and state over HTTP, for probes, Prometheus and people.
//!
//! Serves what others publish and decides nothing. Listens on loopback by default: none of it is a secret, none of it
//! is for strangers either.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{ConnectInfo, FromRef, Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use mesh_core::{
    identity::SpiffeId,
    model::{Name, Policy, Service, Workload, http::RequestRoute},
    view::{Demand, Snapshot},
};
use mesh_settings::{InForce, admin::Limits, log::LogFilter};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    health::Fill,
    identity::Certificates,
    live::{self, Connections},
    metrics::exposition::Format,
    rpc::Connection,
    view::{Enrolment, WorkloadState},
};

/// What the admin server asks the agent.
pub trait Observed: Send + Sync + 'static {
    /// `Err` with what is missing as long as the agent cannot carry traffic.
    fn ready(&self) -> Result<(), String>;

    /// The agent's state.
    fn state(&self) -> NodeState;

    /// The view in force.
    fn view(&self) -> Option<Arc<Snapshot>>;

    /// The connections that live now.
    fn connections(&self) -> &Connections;

    /// Its settings, as they were given.
    fn settings(&self) -> &[InForce];

    /// What its log says.
    fn log(&self) -> &LogFilter;
}

/// A line of `/api/v1/config`.
#[derive(Debug, Serialize)]
struct Setting<'a> {
    name: &'a str,
    value: &'a str,
    source: &'a str,
}

/// `/api/v1/state`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct NodeState {
    /// The node's name.
    pub node: String,
    /// The agent's version.
    pub agent_version: &'static str,
    /// Its process, to tell an agent from its successor.
    pub pid: u32,
    /// The version of the view in force; `None` before the first.
    pub view_version: Option<String>,
    /// Whether the controller can be reached.
    pub controller_connected: bool,
    /// Why not.
    pub controller_error: Option<String>,
    /// What is wrong with the control side, each with its cure; empty when nothing is.
    pub problems: Vec<String>,
    /// How full is what can become full.
    pub fills: Vec<Fill>,
    /// The view has what was asked for, not the whole mesh.
    pub by_demand: bool,
    /// Addresses of the mesh that connections use, or have used lately.
    pub addresses_asked: usize,
    /// The enrolled workloads of this node, by name.
    pub workloads: Vec<WorkloadStatus>,
}

/// One workload of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkloadStatus {
    /// `namespace/name`.
    pub name: Name,
    /// How far its capture is; `None` when nothing was said yet.
    pub enrolment: Option<Enrolment>,
    /// Why it is no further.
    pub reason: String,
    /// Its identity.
    pub identity: Option<SpiffeId>,
    /// Until when its certificate is valid; `None` when it has none.
    #[serde(serialize_with = "time::serde::rfc3339::option::serialize")]
    pub certificate_expires: Option<OffsetDateTime>,
    /// Why the last attempt at a newer one failed.
    pub certificate_error: Option<String>,
}

impl NodeState {
    /// The state that follows from what the control side publishes.
    pub fn new(
        node: &str,
        snapshot: Option<&Snapshot>,
        connection: &Connection,
        certificates: &Certificates,
        reports: &BTreeMap<Name, WorkloadState>,
    ) -> Self {
        let workload = |snapshot: &Snapshot, name: &Name| {
            let identity = snapshot.identity(name).map(|id| SpiffeId::clone(id));
            let certificate = identity.as_ref().and_then(|id| certificates.get(id));
            let report = reports.get(name);
            WorkloadStatus {
                name: name.clone(),
                enrolment: report.map(|report| report.enrolment),
                reason: report.map(|report| report.reason.clone()).unwrap_or_default(),
                certificate_expires: certificate.and_then(|certificate| certificate.expires),
                certificate_error: certificate.and_then(|certificate| certificate.error.clone()),
                identity,
            }
        };
        Self {
            node: node.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            view_version: snapshot.map(|snapshot| snapshot.version().to_owned()),
            controller_connected: *connection == Connection::Open,
            controller_error: match connection {
                Connection::Open => None,
                Connection::Away(reason) => Some(reason.clone()),
            },
            problems: Vec::new(),
            fills: Vec::new(),
            by_demand: snapshot.is_some_and(|snapshot| snapshot.demand().is_some()),
            addresses_asked: 0,
            workloads: snapshot
                .map(|snapshot| snapshot.local().map(|local| workload(snapshot, &local.name)).collect())
                .unwrap_or_default(),
        }
    }
}

#[derive(Clone)]
struct Shared {
    registry: Arc<Registry>,
    agent: Arc<dyn Observed>,
}

impl FromRef<Shared> for Arc<Registry> {
    fn from_ref(shared: &Shared) -> Self {
        shared.registry.clone()
    }
}

/// Serves until it is told to stop. Requests under way are cut then: nobody's work depends on them.
pub async fn serve(
    listener: TcpListener,
    registry: Arc<Registry>,
    agent: Arc<dyn Observed>,
    shutdown: CancellationToken,
) {
    let app = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/api/v1/state", get(state))
        .route("/api/v1/view", get(view))
        .route("/api/v1/connections", get(connections))
        .route("/api/v1/config", get(config))
        .route("/api/v1/log-level", get(log_level).put(set_log_level))
        .with_state(Shared { registry, agent });
    mesh_settings::admin::serve(listener, app, Limits::default(), shutdown).await;
}

/// Serves metrics and nothing else, for whoever asks from elsewhere, until it is told to stop.
pub async fn serve_metrics(listener: TcpListener, registry: Arc<Registry>, shutdown: CancellationToken) {
    let app = Router::new().route("/metrics", get(metrics)).with_state(registry);
    mesh_settings::admin::serve(listener, app, Limits::default(), shutdown).await;
}

/// Opens the listener of a setting; an error names both, and the address.
pub async fn listen(setting: &str, address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("{setting} {address}: {error}")))
}

async fn ready(State(shared): State<Shared>) -> Response {
    match shared.agent.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn metrics(State(registry): State<Arc<Registry>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = Format::wanted(accept.unwrap_or_default());
    match format.write(&registry) {
        Ok(all) => ([(header::CONTENT_TYPE, format.content_type())], all).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn state(State(shared): State<Shared>) -> Json<NodeState> {
    Json(shared.agent.state())
}

/// `/api/v1/view`: what the node knows of the mesh. Roots are left to `/api/v1/state`'s certificates and the controller.
#[derive(Debug, Serialize)]
struct View<'a> {
    version: &'a str,
    /// What it is bounded by, if it is one by demand.
    #[serde(skip_serializing_if = "Option::is_none")]
    demand: Option<&'a Demand>,
    /// Addresses that were asked for and are not of the mesh.
    nobody: BTreeSet<IpAddr>,
    trust_domain: String,
    workloads: Vec<&'a Workload>,
    services: Vec<&'a Service>,
    policies: Vec<&'a Policy>,
    routes: Vec<&'a RequestRoute>,
}

async fn view(State(shared): State<Shared>) -> Response {
    let Some(view) = shared.agent.view() else {
        return failed(StatusCode::SERVICE_UNAVAILABLE, &"no view of the mesh yet");
    };
    Json(View {
        version: view.version(),
        demand: view.demand(),
        nobody: view.nobody().collect(),
        trust_domain: view.mesh().trust_domain.to_string(),
        workloads: view.workloads().map(AsRef::as_ref).collect(),
        services: view.services().map(AsRef::as_ref).collect(),
        policies: view.policies().map(AsRef::as_ref).collect(),
        routes: view.routes().map(AsRef::as_ref).collect(),
    })
    .into_response()
}

/// What `/api/v1/connections` may be asked.
#[derive(Debug, Deserialize)]
struct Wanted {
    /// Those of one workload, at either end.
    workload: Option<String>,
    /// At most so many.
    limit: Option<usize>,
}

async fn connections(State(shared): State<Shared>, Query(wanted): Query<Wanted>) -> Response {
    let workload = match wanted.workload.map(|name| name.parse::<Name>()).transpose() {
        Ok(workload) => workload,
        Err(error) => return failed(StatusCode::BAD_REQUEST, &error),
    };
    let limit = wanted.limit.unwrap_or(live::ANSWER);
    if !(1..=live::MOST).contains(&limit) {
        let error = format!("a limit of {limit}: an answer has between 1 and {} connections", live::MOST);
        return failed(StatusCode::BAD_REQUEST, &error);
    }
    Json(shared.agent.connections().list(workload.as_ref(), limit)).into_response()
}

/// Why a question has no answer.
fn failed(status: StatusCode, error: &impl ToString) -> Response {
    (status, Json(serde_json::json!({"error": error.to_string()}))).into_response()
}

async fn config(State(shared): State<Shared>) -> Response {
    let settings = shared.agent.settings().iter();
    let rows: Vec<_> =
        settings.map(|it| Setting { name: &it.name, value: &it.value, source: &it.source }).collect();
    Json(rows).into_response()
}

async fn log_level(State(shared): State<Shared>) -> Response {
    Json(serde_json::json!({"filter": shared.agent.log().current()})).into_response()
}

/// Only from this machine, and not through a name that a web page may have made lead here.
async fn set_log_level(
    State(shared): State<Shared>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    filter: String,
) -> Response {
    if !peer.ip().is_loopback() || !named_by_address(&headers) {
        let error = "the log level is changed from the agent's own machine, by its loopback address";
        return failed(StatusCode::FORBIDDEN, &error);
    }
    match shared.agent.log().set(&filter) {
        Ok(()) => {
            tracing::info!(filter, "the log level was changed");
            Json(serde_json::json!({"filter": filter})).into_response()
        }
        Err(error) => failed(StatusCode::BAD_REQUEST, &error),
    }
}

/// Whether the request's Host is an address or `localhost`.
fn named_by_address(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let bare = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
    bare == "localhost" || bare.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use prometheus_client::metrics::counter::Counter;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    struct Agent(Mutex<Result<(), String>>, LogFilter, Connections);

    impl Observed for Agent {
        fn ready(&self) -> Result<(), String> {
            self.0.lock().unwrap().clone()
        }

        fn view(&self) -> Option<Arc<Snapshot>> {
            None
        }

        fn connections(&self) -> &Connections {
            &self.2
        }

        fn settings(&self) -> &[InForce] {
            &[]
        }

        fn log(&self) -> &LogFilter {
            &self.1
        }

        fn state(&self) -> NodeState {
            let away = Connection::Away("no route".into());
            NodeState::new("n1", None, &away, &Certificates::new(), &BTreeMap::new())
        }
    }

    async fn ask(address: SocketAddr, path: &str) -> String {
        send(address, &format!("GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n")).await
    }

    async fn put_log_level(address: SocketAddr, host: &str, filter: &str) -> String {
        let length = filter.len();
        let head = "connection: close\r\ncontent-type: text/plain";
        send(
            address,
            &format!("PUT /api/v1/log-level HTTP/1.1\r\nhost: {host}\r\n{head}\r\ncontent-length: {length}\r\n\r\n{filter}"),
        )
        .await
    }

    async fn send(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn probes_prometheus_and_people_are_answered() {
        let mut registry = Registry::default();
        let repairs: Counter = Counter::default();
        registry.register("nodemesh_repairs", "What was put back", repairs.clone());
        repairs.inc();
        let unready = Mutex::new(Err("no view yet".into()));
        let agent = Arc::new(Agent(unready, LogFilter::detached("info"), Connections::default()));
        let listener = listen("--admin-listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let registry = Arc::new(registry);
        let elsewhere = listen("--metrics-listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let metrics_alone = elsewhere.local_addr().unwrap();
        let metrics_server = tokio::spawn(serve_metrics(elsewhere, registry.clone(), shutdown.clone()));
        let server = tokio::spawn(serve(listener, registry, agent.clone(), shutdown.clone()));

        assert!(ask(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let answer = ask(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("no view yet\n"), "{answer}");
        *agent.0.lock().unwrap() = Ok(());
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        let answer = ask(address, "/metrics").await;
        assert!(answer.contains("nodemesh_repairs_total 1"), "{answer}");
        assert!(ask(metrics_alone, "/metrics").await.contains("nodemesh_repairs_total 1"));
        assert!(ask(metrics_alone, "/api/v1/state").await.starts_with("HTTP/1.1 404"));
        let answer = ask(address, "/api/v1/state").await;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let state: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(state["node"], "n1");
        assert_eq!(state["controller_connected"], false);
        assert_eq!(state["controller_error"], "no route");

        let answer = ask(address, "/api/v1/connections?workload=shop/web&limit=10").await;
        assert!(answer.ends_with(r#"{"total":0,"connections":[]}"#), "{answer}");
        for (query, cure) in [("workload=web", "NAMESPACE/NAME"), ("limit=0", "between 1 and 10000")] {
            let answer = ask(address, &format!("/api/v1/connections?{query}")).await;
            assert!(answer.starts_with("HTTP/1.1 400") && answer.contains(cure), "{answer}");
        }

        let answer = put_log_level(address, "127.0.0.1:15021", "debug").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(put_log_level(address, "attacker.example", "trace").await.starts_with("HTTP/1.1 403"));
        let answer = put_log_level(address, "localhost", "inof").await;
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("is not a level"), "{answer}");
        assert!(ask(address, "/api/v1/log-level").await.ends_with("{\"filter\":\"debug\"}"));

        // Somebody who connects and says nothing does not hold up the end.
        let _silent = TcpStream::connect(address).await.unwrap();
        shutdown.cancel();
        server.await.unwrap();
        metrics_server.await.unwrap();
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_named_with_its_setting() {
        let taken = listen("--admin-listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = listen("--admin-listen", taken.local_addr().unwrap()).await.unwrap_err().to_string();
        assert!(error.contains("--admin-listen 127.0.0.1:"), "{error}");
    }
}
