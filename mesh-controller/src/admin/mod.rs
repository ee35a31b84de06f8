//! HTTP for people and Prometheus: health, metrics, and the JSON that `meshctl` shows.
//!
//! | module | what |
//! |---|---|
//! | [`answer`] | what the JSON is, for both ends |
//! | [`authentication`] | policies on end users, in words |
//! | [`route`] | routes of requests, in words |
//! | [`traffic`] | policies on how they are sent, in words |
//! | [`whole`] | one answer out of those of all controllers |
//! | [`why`] | one connection, decided and explained |
//! | [`request`] | one request over it |
//! | [`connection`] | itself, where connections are routed |
//! | [`user`] | whose it is |
//! | [`taken`] | whether its destination takes it |

pub mod answer;
mod authentication;
mod connection;
pub mod request;
mod route;
mod taken;
mod traffic;
mod user;
mod whole;
pub mod why;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use axum::{
    Json, Router,
    extract::{ConnectInfo, Query, State},
    http::{HeaderMap, StatusCode, header},
    routing::get,
};
use mesh_core::{
    identity::TrustDomain,
    model::{Action, Enforcement, Mode, Policy, Service},
};
use mesh_settings::{InForce, admin::Limits, log::LogFilter};
use serde::Deserialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use self::{
    answer::{
        AgentRow, AuthenticationRow, Certificates, Documents, Failure, Fill, HeldCertificate, LogLevel,
        OwnView, PolicyRow, Root, RouteRow, ServicePortRow, ServiceRow, Setting, Status, TrafficRow,
        UnhealthyRow, Why, WorkloadRow,
    },
    request::Request,
};
use crate::{
    ca::{self, Authority},
    digest::{digest, hex},
    distribute::{AgentState, Hub, World},
    metrics::Metrics,
    model::ModeFrom,
    others::Others,
    project::Failing,
    report::State as Reported,
    source::Presence,
};

/// What the answers are made from.
#[derive(Debug)]
pub struct Admin {
    /// Views and who watches them.
    pub hub: Arc<Hub>,
    /// The roots.
    pub authority: Arc<Authority>,
    /// Counted.
    pub metrics: Arc<Metrics>,
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// As they were given.
    pub settings: Vec<InForce>,
    /// What the log says.
    pub log: LogFilter,
    /// Whether what is in force is what the source says.
    pub presence: watch::Receiver<Presence>,
    /// Who else has agents.
    pub others: Others,
}

/// What is said of a controller that is cut off.
const AWAY: &str = "the API server does not answer: what is known stays in force; look at the network between this pod and it\n";

type Shared = State<Arc<Admin>>;

/// Serves until cancelled.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>, cancel: CancellationToken) {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/api/v1/status", get(status))
        .route("/api/v1/certificates", get(certificates))
        .route("/api/v1/workloads", get(workloads))
        .route("/api/v1/services", get(services))
        .route("/api/v1/policies", get(policies))
        .route("/api/v1/authentication", get(authentications))
        .route("/api/v1/routes", get(routes))
        .route("/api/v1/traffic", get(traffic))
        .route("/api/v1/views", get(views))
        .route("/api/v1/why", get(why))
        .route("/api/v1/config", get(config))
        .route("/api/v1/log-level", get(log_level).put(set_log_level))
        .with_state(admin);
    mesh_settings::admin::serve(listener, router, Limits::default(), cancel).await;
}

/// A controller listens only once it has read its source. One that the source has not answered for a while goes on serving
/// its agents; others shall not come to it.
async fn ready(State(admin): Shared) -> (StatusCode, &'static str) {
    match admin.presence.borrow().answered {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, AWAY),
    }
}

async fn metrics(State(admin): Shared) -> ([(&'static str, &'static str); 1], String) {
    let content = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    let presence = *admin.presence.borrow();
    admin.metrics.presence(presence.answered, presence.leads);
    let behind = admin.hub.agents().iter().filter(|it| it.connected && !in_sync(it)).count();
    admin.metrics.agents_behind.set(behind as u64);
    (content, admin.metrics.text())
}

/// Of this controller alone, or of all.
#[derive(Debug, Deserialize)]
struct Scope {
    #[serde(default)]
    here: bool,
}

async fn status(State(admin): Shared, Query(scope): Query<Scope>) -> Json<Status> {
    let mut status = own_status(&admin);
    if scope.here {
        return Json(status);
    }
    let (mut rows, mut silent) = (vec![std::mem::take(&mut status.agents)], vec![]);
    for (address, answer) in admin.others.ask::<Status>("/api/v1/status?here=true").await {
        match answer {
            Ok(theirs) => rows.push(theirs.agents),
            Err(error) => silent.push((address, error)),
        }
    }
    status.agents = whole::agents(rows);
    status.problems.extend(silent.into_iter().map(|(address, error)| {
        format!("the controller at {address} cannot be asked: {error}; of the agents that are connected to it nothing is known here")
    }));
    status.roots = all_certificates(&admin).await.roots;
    Json(status)
}

fn own_status(admin: &Admin) -> Status {
    let world = admin.hub.world();
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        trust_domain: admin.trust_domain.to_string(),
        roots: roots(admin),
        problems: problems(admin),
        agents: agents(&admin.hub, &world),
        documents: Documents {
            accepted: world.ledger.documents_accepted(),
            refused: world.ledger.documents_refused(),
            problems: world.ledger.refused().to_vec(),
        },
    }
}

/// The roots, with how many certificates lead to each.
fn roots(admin: &Admin) -> Vec<Root> {
    let conditions: Vec<_> = admin.hub.agents().into_iter().map(|agent| agent.condition).collect();
    let held = || conditions.iter().filter_map(|it| it.certificates.as_ref()).flatten();
    let root = |(place, der): (usize, &rustls_pki_types::CertificateDer<'_>)| {
        let sha256 = digest(der);
        let at = |time: fn((SystemTime, SystemTime)) -> SystemTime| {
            ca::validity(der).map_or_else(|error| error, |times| rfc3339(time(times)))
        };
        Root {
            sha256: hex(&sha256),
            subject: ca::subject(der).unwrap_or_else(|error| error),
            since: at(|(from, _)| from + ca::CLOCK_TOLERANCE),
            not_after: at(|(_, until)| until),
            signs: place == 0,
            certificates: held().filter(|it| it.root == Some(sha256)).count(),
        }
    };
    admin.authority.roots().iter().enumerate().map(root).collect()
}

/// What `certificates` is asked.
#[derive(Debug, Deserialize)]
struct OfNode {
    node: Option<String>,
    #[serde(default)]
    here: bool,
}

async fn certificates(State(admin): Shared, Query(of): Query<OfNode>) -> Json<Certificates> {
    let mut all = if of.here { own_certificates(&admin) } else { all_certificates(&admin).await };
    if let Some(node) = of.node {
        all.certificates.retain(|it| it.node == node);
        all.silent.retain(|it| *it == node);
    }
    Json(all)
}

/// Of the agents of all controllers that answer; the others' are silent.
async fn all_certificates(admin: &Admin) -> Certificates {
    let others = admin.others.ask("/api/v1/certificates?here=true").await;
    let others = others.into_iter().filter_map(|(_, answer)| answer.ok());
    whole::certificates(own_certificates(admin), others.collect())
}

fn own_certificates(admin: &Admin) -> Certificates {
    let world = admin.hub.world();
    let agents = admin.hub.agents();
    let says = |node: &str| {
        agents.iter().any(|it| it.node == node && it.connected && it.condition.certificates.is_some())
    };
    let mut silent: Vec<String> = world.model.nodes().into_iter().map(str::to_owned).collect();
    silent.extend(agents.iter().map(|agent| agent.node.clone()));
    silent.sort();
    silent.dedup();
    silent.retain(|node| !says(node));
    let held = agents.iter().flat_map(|agent| {
        agent.condition.certificates.iter().flatten().map(|it| HeldCertificate {
            identity: it.identity.clone(),
            node: agent.node.clone(),
            expires: it.expires.map(rfc3339),
            root: it.root.map(|root| hex(&root)),
            error: it.error.clone(),
        })
    });
    Certificates { roots: roots(admin), certificates: held.collect(), silent }
}

/// What is wrong with the controller itself.
fn problems(admin: &Admin) -> Vec<String> {
    let restored = admin.metrics.restored.get() == 1;
    let mut problems = Vec::new();
    if restored {
        problems.push(
            "restored from an older state: compare manifests and roots with what should be; join tokens made before \
             are void (until the next start)"
                .to_owned(),
        );
    }
    if !admin.presence.borrow().answered {
        problems.push(AWAY.trim().to_owned());
    }
    problems.extend(admin.metrics.unsaved.problems());
    problems
}

/// The agents that have connected, and the nodes with workloads whose agents have not.
fn agents(hub: &Hub, world: &World) -> Vec<AgentRow> {
    let known = hub.agents();
    let absent = |node: &&str| !known.iter().any(|agent| agent.node == **node);
    let mut rows: Vec<AgentRow> =
        world.model.nodes().into_iter().filter(absent).map(AgentRow::absent).collect();
    rows.extend(known.iter().map(agent));
    rows.sort_by(|a, b| a.node.cmp(&b.node));
    rows
}

/// Whether an agent has put in force what it was sent.
fn in_sync(state: &AgentState) -> bool {
    state.connected && state.acked.as_ref() == Some(&state.current)
}

fn agent(state: &AgentState) -> AgentRow {
    AgentRow {
        node: state.node.clone(),
        connected: state.connected,
        since: state.since.map(rfc3339),
        agent_version: state.agent_version.clone(),
        current_view: state.current.clone(),
        acked_view: state.acked.clone(),
        in_sync: in_sync(state),
        error: state.error.clone(),
        problems: state.condition.problems.clone(),
        fills: state
            .condition
            .fills
            .iter()
            .map(|(what, entries, limit)| Fill { what: what.clone(), entries: *entries, limit: *limit })
            .collect(),
        by_demand: state.by_demand,
        resources: state.resources,
        addresses_asked: state.asked,
    }
}

async fn workloads(State(admin): Shared) -> Json<Vec<WorkloadRow>> {
    let world = admin.hub.world();
    let row = |workload: &Arc<mesh_core::model::Workload>| {
        let reported = world.reports.of(&workload.name, &workload.node);
        let (enrolment, reason) = match reported {
            _ if !workload.enrolled => ("outside", String::new()),
            None => ("pending", format!("the agent of node {} has not reported it yet", workload.node)),
            Some(reported) => {
                let state = match reported.state {
                    Reported::Pending => "pending",
                    Reported::Enrolled => "enrolled",
                    Reported::Failed => "failed",
                };
                (state, reported.reason.clone())
            }
        };
        let wanted = world.model.workloads.get(&workload.name);
        WorkloadRow {
            name: workload.name.to_string(),
            node: workload.node.clone(),
            addresses: workload.addresses.clone(),
            identity: workload
                .identity(&admin.trust_domain)
                .map_or_else(|e| e.to_string(), |id| id.to_string()),
            mode: workload.mode,
            mode_from: wanted.map_or(ModeFrom::Default, |it| world.model.mode(it, Mode::default()).1),
            ready: wanted.is_some_and(|wanted| wanted.ready),
            enrolment: enrolment.to_owned(),
            reason,
        }
    };
    Json(world.common.workloads().iter().map(row).collect())
}

async fn services(State(admin): Shared) -> Json<Vec<ServiceRow>> {
    let common = admin.hub.world().common.clone();
    let unhealthy = |failing: &Failing| UnhealthyRow {
        endpoint: failing.endpoint.clone(),
        reason: failing.reason.clone(),
        asked: failing.asked,
    };
    let row = |service: &Arc<Service>| ServiceRow {
        name: service.name.to_string(),
        addresses: service.addresses.clone(),
        ports: service
            .ports
            .iter()
            .map(|port| ServicePortRow {
                name: port.name.clone(),
                port: port.port,
                endpoints: port.endpoints.clone(),
                unhealthy: common.failing(&service.name, port.port).iter().map(unhealthy).collect(),
            })
            .collect(),
    };
    Json(common.services().iter().map(row).collect())
}

async fn policies(State(admin): Shared) -> Json<Vec<PolicyRow>> {
    let world = admin.hub.world();
    let row = |policy: &Arc<Policy>| PolicyRow {
        name: policy.name.to_string(),
        action: match policy.action {
            Action::Allow => "Allow".to_owned(),
            Action::Deny => "Deny".to_owned(),
        },
        enforcement: match policy.enforcement {
            Enforcement::Enforce => "Enforce".to_owned(),
            Enforcement::Audit => "Audit".to_owned(),
        },
        selector: policy.selector.to_string(),
        selected: world
            .common
            .workloads()
            .iter()
            .filter(|workload| policy.selects(workload))
            .map(|workload| workload.name.to_string())
            .collect(),
        rules: policy.rules.iter().map(ToString::to_string).collect(),
    };
    Json(world.common.policies().iter().map(row).collect())
}

async fn authentications(State(admin): Shared) -> Json<Vec<AuthenticationRow>> {
    let world = admin.hub.world();
    Json(authentication::rows(&world.model, world.common.workloads()))
}

async fn routes(State(admin): Shared) -> Json<Vec<RouteRow>> {
    Json(route::rows(&admin.hub.world().model))
}

async fn traffic(State(admin): Shared) -> Json<Vec<TrafficRow>> {
    Json(traffic::rows(&admin.hub.world().model))
}

/// What each node's view has beside what all have.
async fn views(State(admin): Shared) -> Json<Vec<OwnView>> {
    let world = admin.hub.world();
    let own = |agent: AgentRow| OwnView {
        resources: world.common.own(&agent.node).resources().map(|it| it.key().to_string()).collect(),
        node: agent.node,
        version: agent.current_view,
    };
    Json(agents(&admin.hub, &world).into_iter().map(own).collect())
}

/// What `why` is asked.
#[derive(Debug, Deserialize)]
struct Question {
    source: String,
    destination: String,
    /// A method and a path.
    request: Option<String>,
    /// The request's, a line each.
    #[serde(default)]
    headers: String,
    /// The name that is asked for in TLS.
    server_name: Option<String>,
}

async fn why(
    State(admin): Shared,
    Query(question): Query<Question>,
) -> Result<Json<Why>, (StatusCode, Json<Failure>)> {
    let world = admin.hub.world();
    let request = question.request.as_ref().map(|line| Request::parse(line, &question.headers)).transpose();
    let answer = request.and_then(|request| {
        let Question { source, destination, server_name, .. } = &question;
        why::explain_asked(&world.common, source, destination, request.as_ref(), server_name.as_deref())
    });
    match answer {
        Ok(why) => Ok(Json(why)),
        Err(error) => Err((StatusCode::BAD_REQUEST, Json(Failure { error: error.to_string() }))),
    }
}

async fn config(State(admin): Shared) -> Json<Vec<Setting>> {
    let setting =
        |it: &InForce| Setting { name: it.name.clone(), value: it.value.clone(), source: it.source.clone() };
    Json(admin.settings.iter().map(setting).collect())
}

async fn log_level(State(admin): Shared) -> Json<LogLevel> {
    Json(LogLevel { filter: admin.log.current() })
}

/// Only from this machine, and not through a name that a web page may have made lead here.
async fn set_log_level(
    State(admin): Shared,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    filter: String,
) -> Result<Json<LogLevel>, (StatusCode, Json<Failure>)> {
    let failed = |status, error: String| (status, Json(Failure { error }));
    if !peer.ip().is_loopback() || !named_by_address(&headers) {
        let error = "the log level is changed from the controller's own machine, by its loopback address";
        return Err(failed(StatusCode::FORBIDDEN, error.into()));
    }
    admin.log.set(&filter).map_err(|error| failed(StatusCode::BAD_REQUEST, error.to_string()))?;
    tracing::info!(filter, "the log level was changed");
    Ok(Json(LogLevel { filter }))
}

/// Whether the request's Host is an address or `localhost`.
fn named_by_address(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let bare = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
    bare == "localhost" || bare.parse::<IpAddr>().is_ok()
}

fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_else(|_| "beyond the calendar".to_owned())
}
