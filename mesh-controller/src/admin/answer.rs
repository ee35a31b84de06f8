//! What the HTTP API answers, as types that both ends share: the controller writes them, `meshctl` reads them.

use std::net::IpAddr;

use mesh_core::model::{Endpoint, Mode};
use serde::{Deserialize, Serialize};

use crate::{model::ModeFrom, review::Warning, source::Refused};

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What is wrong, and what to do.
    pub error: String,
}

/// `GET /api/v1/status`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The controller's version.
    pub version: String,
    /// The trust domain.
    pub trust_domain: String,
    /// The roots that are trusted, the newest first.
    pub roots: Vec<Root>,
    /// What is wrong with the controller itself, each with its cure; empty when nothing is.
    #[serde(default)]
    pub problems: Vec<String>,
    /// The nodes and their agents.
    pub agents: Vec<AgentRow>,
    /// The source's documents.
    pub documents: Documents,
}

/// A root certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// Of the certificate's DER, hex; what join tokens end with.
    pub sha256: String,
    /// Its name.
    #[serde(default)]
    pub subject: String,
    /// Since when it is in use, RFC 3339.
    #[serde(default)]
    pub since: String,
    /// Its end, RFC 3339.
    pub not_after: String,
    /// It signs; the others are only trusted.
    #[serde(default)]
    pub signs: bool,
    /// How many certificates that agents hold lead to it.
    #[serde(default)]
    pub certificates: usize,
}

/// A node's agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRow {
    /// The node.
    pub node: String,
    /// It watches now.
    pub connected: bool,
    /// When that last changed, RFC 3339; nothing if it never connected since the controller started.
    pub since: Option<String>,
    /// The agent's own version.
    pub agent_version: String,
    /// The newest version of its view.
    pub current_view: String,
    /// The version that it has put in force.
    pub acked_view: Option<String>,
    /// Both are the same.
    pub in_sync: bool,
    /// Why it could not put the last one in force.
    pub error: Option<String>,
    /// What is wrong on the node, as its agent says, each with its cure; empty when nothing is.
    #[serde(default)]
    pub problems: Vec<String>,
    /// How full what can become full there is.
    #[serde(default)]
    pub fills: Vec<Fill>,
    /// Its view has what it asked for, not the whole mesh.
    #[serde(default)]
    pub by_demand: bool,
    /// What its view has: workloads, services, policies and the like.
    #[serde(default)]
    pub resources: usize,
    /// The addresses that it asks for.
    #[serde(default)]
    pub addresses_asked: usize,
}

/// Something that can become full.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    /// As metrics name it.
    pub what: String,
    /// How much is in it.
    pub entries: u64,
    /// How much fits.
    pub limit: u64,
}

impl Fill {
    /// How full it is.
    pub fn percent(&self) -> u64 {
        u64::try_from(u128::from(self.entries) * 100 / u128::from(self.limit.max(1))).unwrap_or(u64::MAX)
    }
}

/// `GET /api/v1/certificates`, of one node with `?node=NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificates {
    /// The roots that are trusted, the newest first; it signs.
    pub roots: Vec<Root>,
    /// What agents hold, by node and identity.
    pub certificates: Vec<HeldCertificate>,
    /// Nodes whose agents do not say now what they hold: they are away, or of an older version.
    pub silent: Vec<String>,
}

/// A certificate that an agent holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldCertificate {
    /// Whose.
    pub identity: String,
    /// The node.
    pub node: String,
    /// Its end, RFC 3339; nothing while there is none.
    pub expires: Option<String>,
    /// The SHA-256 of the root that it leads to, hex.
    pub root: Option<String>,
    /// Why there is no newer one.
    pub error: Option<String>,
}

impl AgentRow {
    /// A node with workloads whose agent never connected.
    pub fn absent(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            connected: false,
            since: None,
            agent_version: String::new(),
            current_view: String::new(),
            acked_view: None,
            in_sync: false,
            error: None,
            problems: Vec::new(),
            fills: Vec::new(),
            by_demand: false,
            resources: 0,
            addresses_asked: 0,
        }
    }
}

/// The source's documents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Documents {
    /// In force.
    pub accepted: usize,
    /// Not.
    pub refused: usize,
    /// What is wrong with the latter.
    pub problems: Vec<Refused>,
}

/// A line of `GET /api/v1/config`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The flag without its dashes.
    pub name: String,
    /// As it was given.
    pub value: String,
    /// Where: `flag`, `environment NAME`, `FILE:LINE` or `default`.
    pub source: String,
}

/// `GET /api/v1/log-level`, and the answer to `PUT`, whose body is the filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLevel {
    /// In force.
    pub filter: String,
}

/// What `meshctl get certificates` reads of an agent's `GET /api/v1/state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentState {
    /// The node.
    pub node: String,
    /// Its enrolled workloads.
    pub workloads: Vec<AgentWorkload>,
}

/// A workload's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentWorkload {
    /// `namespace/name`
    pub name: String,
    /// Its identity.
    pub identity: Option<String>,
    /// The certificate's end, RFC 3339; nothing if there is none.
    pub certificate_expires: Option<String>,
    /// Why there is no newer one.
    pub certificate_error: Option<String>,
}

/// An agent's `GET /api/v1/connections`, and the node that it is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// The node; the agent says it elsewhere.
    #[serde(default)]
    pub node: String,
    /// How many there are of those that were asked for; more than `connections` if the answer was cut.
    pub total: usize,
    /// The newest first.
    pub connections: Vec<ConnectionRow>,
}

/// A connection that lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionRow {
    /// `outbound` or `inbound`, seen from the node's workload.
    pub direction: String,
    /// `opening` until bytes can flow, then `open`.
    pub state: String,
    /// Who opened it.
    pub source: ConnectionEnd,
    /// Who was asked for.
    pub destination: ConnectionEnd,
    /// `tunnel`, `plaintext`, or empty while that is not decided.
    pub transport: String,
    /// When it was captured, RFC 3339.
    pub since: String,
    /// What its source sent.
    pub bytes_sent: u64,
    /// What its source received.
    pub bytes_received: u64,
}

/// One end of a connection, as far as it is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionEnd {
    /// `namespace/name`
    pub workload: Option<String>,
    /// What was asked for, if that was a service: `namespace/name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// What it proved, or has to prove.
    pub identity: Option<String>,
    /// Its own address.
    pub address: Option<String>,
}

/// What `meshctl check` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Documents that are good.
    pub accepted: usize,
    /// Documents that are not.
    pub refused: usize,
    /// What is wrong with the latter.
    pub problems: Vec<Refused>,
    /// What is good and suspicious.
    pub warnings: Vec<Warning>,
}

/// A line of `GET /api/v1/workloads`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadRow {
    /// `namespace/name`
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its identity.
    pub identity: String,
    /// Whether it takes plaintext.
    pub mode: Mode,
    /// Who says so.
    pub mode_from: ModeFrom,
    /// Services send connections to it.
    pub ready: bool,
    /// `outside`, `pending`, `enrolled` or `failed`.
    pub enrolment: String,
    /// Why it is not enrolled.
    pub reason: String,
}

/// A line of `GET /api/v1/services`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRow {
    /// `namespace/name`
    pub name: String,
    /// Its virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePortRow>,
}

/// One port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePortRow {
    /// May be empty.
    pub name: String,
    /// What clients ask for.
    pub port: u16,
    /// What serves it, ready only.
    pub endpoints: Vec<Endpoint>,
    /// What is unhealthy, by its checks.
    #[serde(default)]
    pub unhealthy: Vec<UnhealthyRow>,
}

/// An endpoint that is unhealthy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnhealthyRow {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Why.
    pub reason: String,
    /// It serves all the same, as too few are healthy.
    pub asked: bool,
}

/// A line of `GET /api/v1/policies`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRow {
    /// `namespace/name`
    pub name: String,
    /// `Allow` or `Deny`.
    pub action: String,
    /// `Enforce` or `Audit`.
    pub enforcement: String,
    /// Labels of the workloads that it selects.
    pub selector: String,
    /// The workloads that it selects now.
    pub selected: Vec<String>,
    /// Its rules, a line each.
    pub rules: Vec<String>,
}

/// A line of `GET /api/v1/authentication`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthenticationRow {
    /// `namespace/name`
    pub name: String,
    /// A request without a token is refused.
    pub required: bool,
    /// `Enforce` or `Audit`.
    pub enforcement: String,
    /// Labels of the workloads that it selects.
    pub selector: String,
    /// Their ports; none: all.
    pub ports: Vec<String>,
    /// The workloads that it selects now.
    pub selected: Vec<String>,
    /// Whose tokens are taken.
    pub issuers: Vec<IssuerRow>,
}

/// An issuer of a policy on end users.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerRow {
    /// The claim `iss`.
    pub issuer: String,
    /// One of these has to be in `aud`.
    pub audiences: Vec<String>,
    /// The places that its tokens are looked for in.
    pub places: Vec<String>,
    /// Keys that its tokens are verified with; without any no token of it is taken.
    pub keys: usize,
    /// Where its keys are fetched; `None`: they are in the policy.
    pub url: Option<String>,
}

/// A line of `GET /api/v1/routes`: a route that has Services as parents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteRow {
    /// `HTTPRoute`, `GRPCRoute`, `TLSRoute` or `TCPRoute`.
    pub kind: String,
    /// `namespace/name`
    pub name: String,
    /// The Services that it wants to be for.
    pub parents: Vec<RouteParentRow>,
    /// References that lead nowhere, each with its place and why.
    pub broken: Vec<String>,
    /// Its rules, a line each.
    pub rules: Vec<String>,
}

/// A line of `GET /api/v1/traffic`: a policy on how requests and connections are sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficRow {
    /// `namespace/name`
    pub name: String,
    /// What it is for.
    pub targets: Vec<TrafficTargetRow>,
    /// What it says, a line for each part.
    pub says: Vec<String>,
    /// What of it is not in force as connections are routed, and nothing of them is read: a line for each port.
    #[serde(default)]
    pub unread: Vec<String>,
}

/// What a policy is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficTargetRow {
    /// Its kind and name, and the port or rule that is meant.
    pub target: String,
    /// The policy is wholly in force there.
    pub accepted: bool,
    /// The reason of the policy's condition `Accepted`, if it was for this alone.
    pub reason: String,
    /// Why not; empty if it is.
    pub says: String,
}

/// A parent of a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteParentRow {
    /// `namespace/name`, with a port's number or name if one is meant.
    pub service: String,
    /// The route is in force there.
    pub accepted: bool,
    /// The reason of the route's condition `Accepted`.
    pub reason: String,
    /// Why not; empty if it is.
    pub says: String,
}

/// A line of `GET /api/v1/views`: what a node's view has beside the workloads and services, which are everybody's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnView {
    /// The node.
    pub node: String,
    /// Its newest version; empty before its agent came.
    pub version: String,
    /// Keys of resources.
    pub resources: Vec<String>,
}

/// `GET /api/v1/why`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// The workload that would connect.
    pub source: String,
    /// What it would connect to.
    pub destination: String,
    /// What happens, in order.
    pub steps: Vec<WhyStep>,
    /// How it ends; with several endpoints that differ, each has its own end.
    pub ends: Vec<End>,
}

/// One step of a connection's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyStep {
    /// The step's name, as in the access log.
    pub step: String,
    /// What it finds.
    pub says: String,
}

/// How a connection ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// What it reaches or would have reached: a workload and its address.
    pub to: String,
    /// `allowed` or `refused`; of a request also `answered`, by the source's agent itself, and `routed` where none was named.
    pub verdict: String,
    /// `tunnel` or `plaintext`; empty when it does not get that far.
    pub transport: String,
    /// The rule that decided, `namespace/policy[index]`.
    pub rule: Option<String>,
    /// Whether the destination takes plaintext; nothing where no agent decides.
    pub mode: Option<Mode>,
    /// The audited policy that would refuse it, with rule and reason, were it enforced.
    pub would_refuse: Option<String>,
    /// The reason's label, as in metrics and access log.
    pub reason: Option<String>,
    /// What happened, for a person.
    pub says: String,
    /// What to do about it.
    pub cure: String,
}
