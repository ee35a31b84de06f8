//! The controller's counters. Names are a contract: dashboards and alerts use them.

use std::{sync::atomic::AtomicU64, time::SystemTime};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::store::{Part, Unsaved};

/// Whether a document is in force.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DocumentLabels {
    /// Which.
    pub state: DocumentState,
}

/// Values of [`DocumentLabels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum DocumentState {
    /// In force.
    accepted,
    /// Not.
    refused,
}

/// Whose certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CertificateLabels {
    /// Which.
    pub kind: CertificateKind,
}

/// Values of [`CertificateLabels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum CertificateKind {
    /// A node's.
    node,
    /// A workload's.
    workload,
}

/// How a join ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct JoinLabels {
    /// Which.
    pub result: JoinResult,
}

/// Values of [`JoinLabels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum JoinResult {
    /// The node is one of the mesh.
    ok,
    /// The token or the request was not good.
    refused,
    /// Something here failed.
    failed,
}

/// Which limit was hit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LimitLabels {
    /// Which.
    pub limit: Limit,
}

/// Values of [`LimitLabels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum Limit {
    /// Connections of one address, or of all.
    connections,
    /// Handshakes of one address.
    handshakes,
    /// Joins from one address.
    joins,
    /// What one node asks for.
    requests,
}

/// What becomes of an unhealthy endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EndpointLabels {
    /// `left_out` or `asked`.
    pub state: &'static str,
}

/// A part of the state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PartLabels {
    /// Which.
    pub part: &'static str,
}

/// A root.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RootLabels {
    /// The beginning of its SHA-256.
    pub root: String,
}

/// All of them, registered.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Documents of the source.
    pub documents: Family<DocumentLabels, Gauge<u64, AtomicU64>>,
    /// Agents that are watching.
    pub agents_connected: Gauge<u64, AtomicU64>,
    /// Of these, those that have not put in force what they were sent.
    pub agents_behind: Gauge<u64, AtomicU64>,
    /// 1 while views are by demand.
    pub views_by_demand: Gauge<u64, AtomicU64>,
    /// Updates sent to agents.
    pub views_sent: Counter,
    /// Certificates signed.
    pub certificates_issued: Family<CertificateLabels, Counter>,
    /// Joins tried.
    pub joins: Family<JoinLabels, Counter>,
    /// Limits that were hit.
    pub limit_hits: Family<LimitLabels, Counter>,
    /// Connections that ended because a limit was hit before they were served.
    pub handshakes_refused: Counter,
    /// What is in force and not on disk.
    pub unsaved: Unsaved,
    conditions: Family<JoinLabels, Counter>,
    unhealthy: Family<EndpointLabels, Gauge<u64, AtomicU64>>,
    unchecked: Gauge<u64, AtomicU64>,
    keys_fetched: Family<JoinLabels, Counter>,
    keys_failing: Gauge<u64, AtomicU64>,
    state_unsaved: Family<PartLabels, Gauge<u64, AtomicU64>>,
    root_expiry: Family<RootLabels, Gauge<f64, AtomicU64>>,
    source_connected: Gauge<u64, AtomicU64>,
    leader: Gauge<u64, AtomicU64>,
    /// 1 once an agent has shown that this state was restored from an older one.
    pub restored: Gauge<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("nodemesh");
        let documents = Family::default();
        let agents_connected = Gauge::default();
        let agents_behind = Gauge::default();
        let views_by_demand = Gauge::default();
        let views_sent = Counter::default();
        let certificates_issued = Family::default();
        let joins = Family::default();
        let handshakes_refused = Counter::default();
        let limit_hits = Family::default();
        let restored = Gauge::default();
        let state_unsaved = Family::default();
        let root_expiry = Family::default();
        let keys_fetched = Family::<JoinLabels, Counter>::default();
        let keys_failing = Gauge::default();
        let conditions = Family::<JoinLabels, Counter>::default();
        let unhealthy = Family::<EndpointLabels, Gauge<u64, AtomicU64>>::default();
        let unchecked = Gauge::default();
        let (source_connected, leader) = (Gauge::default(), Gauge::default());
        registry.register("documents", "Documents of the source, by state", documents.clone());
        registry.register("agents_connected", "Agents that watch their view", agents_connected.clone());
        registry.register(
            "agents_behind",
            "Agents that watch their view and have not put in force what they were sent",
            agents_behind.clone(),
        );
        registry.register(
            "views_by_demand",
            "1 while nodes are told of what they ask for, as the mesh is larger than whole views may be",
            views_by_demand.clone(),
        );
        registry.register("views_sent", "View updates sent to agents", views_sent.clone());
        registry.register("certificates_issued", "Certificates signed", certificates_issued.clone());
        registry.register("joins", "Joins, by result", joins.clone());
        registry.register(
            "handshakes_refused",
            "Connections of agents ended before or during their handshake",
            handshakes_refused.clone(),
        );
        registry.register("limit_hits", "Times that a limit was hit", limit_hits.clone());
        registry.register(
            "controller_restored",
            "1 once an agent has shown that the controller's state was restored from an older one",
            restored.clone(),
        );
        registry.register(
            "controller_source_connected",
            "1 while the source of what is wanted can be asked: the API server has answered within 15 s",
            source_connected.clone(),
        );
        registry.register(
            "controller_leader",
            "1 while this is the one of several controllers that writes status",
            leader.clone(),
        );
        registry.register(
            "controller_state_unsaved",
            "1 while the newest version of a part of the state is not on disk, or what is there cannot be used",
            state_unsaved.clone(),
        );
        registry.register(
            "keys_fetched",
            "Fetches of the keys of issuers that AuthenticationPolicies name by URL, by result",
            keys_fetched.clone(),
        );
        registry.register(
            "keys_failing",
            "URLs of issuers' keys of which the newest fetch failed; the last good keys stay in force",
            keys_failing.clone(),
        );
        registry.register(
            "pod_conditions_written",
            "Patches of pods' conditions, by result; failed ones are made again",
            conditions.clone(),
        );
        registry.register(
            "controller_unhealthy_endpoints",
            "Endpoints that are unhealthy, by their checks: left out, or asked all the same as too few are healthy",
            unhealthy.clone(),
        );
        registry.register(
            "controller_unchecked_endpoints",
            "Endpoints that are not checked though a policy says so, as their workload has too many checks",
            unchecked.clone(),
        );
        registry.register("root_expiry_seconds", "When a root expires, Unix time", root_expiry.clone());
        Self {
            registry,
            documents,
            agents_connected,
            agents_behind,
            views_by_demand,
            views_sent,
            certificates_issued,
            joins,
            handshakes_refused,
            limit_hits,
            restored,
            unsaved: Unsaved::default(),
            conditions,
            unhealthy,
            unchecked,
            keys_fetched,
            keys_failing,
            source_connected,
            leader,
            state_unsaved,
            root_expiry,
        }
    }
}

impl Metrics {
    /// A pod's condition was written, or was not.
    pub fn conditions_written(&self, done: bool) {
        let result = if done { JoinResult::ok } else { JoinResult::failed };
        self.conditions.get_or_create(&JoinLabels { result }).inc();
    }

    /// So many endpoints are unhealthy, and so many are not checked that should be.
    pub fn health(&self, left_out: usize, asked: usize, unchecked: usize) {
        for (state, count) in [("left_out", left_out), ("asked", asked)] {
            self.unhealthy.get_or_create(&EndpointLabels { state }).set(count as u64);
        }
        self.unchecked.set(unchecked as u64);
    }

    /// An issuer's keys were fetched, or could not be.
    pub fn keys_fetched(&self, done: bool) {
        let result = if done { JoinResult::ok } else { JoinResult::failed };
        self.keys_fetched.get_or_create(&JoinLabels { result }).inc();
    }

    /// Of so many URLs the newest fetch failed.
    pub fn keys_failing(&self, count: usize) {
        self.keys_failing.set(count as u64);
    }

    /// How this controller stands.
    pub fn presence(&self, source_connected: bool, leads: bool) {
        self.source_connected.set(u64::from(source_connected));
        self.leader.set(u64::from(leads));
    }

    /// A limit was hit.
    pub fn limit_hit(&self, limit: Limit) {
        self.limit_hits.get_or_create(&LimitLabels { limit }).inc();
    }

    /// These are the roots: the beginning of each one's SHA-256, and its end.
    pub fn roots(&self, roots: impl Iterator<Item = (String, SystemTime)>) {
        self.root_expiry.clear();
        for (root, until) in roots {
            let seconds = until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
            self.root_expiry.get_or_create(&RootLabels { root }).set(seconds);
        }
    }

    /// The Prometheus text format.
    pub fn text(&self) -> String {
        for part in Part::ALL {
            let unsaved = u64::from(self.unsaved.has(part));
            self.state_unsaved.get_or_create(&PartLabels { part: part.label() }).set(unsaved);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a String never fails");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_those_of_the_contract_and_the_reference_of_them_is_generated() {
        let metrics = Metrics::default();
        metrics.documents.get_or_create(&DocumentLabels { state: DocumentState::refused }).set(2);
        metrics.joins.get_or_create(&JoinLabels { result: JoinResult::ok }).inc();
        let labels = CertificateLabels { kind: CertificateKind::workload };
        metrics.certificates_issued.get_or_create(&labels).inc();
        metrics.views_sent.inc();
        metrics.limit_hit(Limit::connections);
        metrics.conditions_written(true);
        metrics.keys_fetched(false);
        metrics.health(2, 1, 0);
        metrics.presence(true, false);
        metrics.unsaved.tried(Part::Reports, &Err::<(), _>("no space"));
        metrics.roots([("ab12".to_owned(), SystemTime::UNIX_EPOCH)].into_iter());
        let text = metrics.text();
        for line in [
            "nodemesh_documents{state=\"refused\"} 2",
            "nodemesh_agents_connected 0",
            "nodemesh_views_sent_total 1",
            "nodemesh_controller_unhealthy_endpoints{state=\"left_out\"} 2",
            "nodemesh_controller_source_connected 1",
            "nodemesh_controller_leader 0",
            "nodemesh_controller_state_unsaved{part=\"reports\"} 1",
            "nodemesh_controller_state_unsaved{part=\"kept\"} 0",
            "nodemesh_root_expiry_seconds{root=\"ab12\"} 0.0",
            "nodemesh_certificates_issued_total{kind=\"workload\"} 1",
            "nodemesh_joins_total{result=\"ok\"} 1",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
        }
        let registered = format!("{:?}", metrics.registry).matches("Descriptor {").count();
        assert_eq!(text.matches("# HELP").count(), registered, "count every metric once, above");
        let page = mesh_settings::reference::metrics("Metrics of mesh-controller", &text);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/metrics-controller.md");
        mesh_settings::reference::check(path.as_ref(), &page).unwrap();
    }
}
