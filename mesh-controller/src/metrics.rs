//! The controller's counters. Names are a contract: dashboards and alerts use them.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

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

/// All of them, registered.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Documents of the source.
    pub documents: Family<DocumentLabels, Gauge<u64, AtomicU64>>,
    /// Agents that are watching.
    pub agents_connected: Gauge<u64, AtomicU64>,
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
    /// 1 once an agent has shown that this state was restored from an older one.
    pub restored: Gauge<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("nodemesh");
        let documents = Family::default();
        let agents_connected = Gauge::default();
        let views_sent = Counter::default();
        let certificates_issued = Family::default();
        let joins = Family::default();
        let handshakes_refused = Counter::default();
        let limit_hits = Family::default();
        let restored = Gauge::default();
        registry.register("documents", "Documents of the source, by state", documents.clone());
        registry.register("agents_connected", "Agents that watch their view", agents_connected.clone());
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
        Self {
            registry,
            documents,
            agents_connected,
            views_sent,
            certificates_issued,
            joins,
            handshakes_refused,
            limit_hits,
            restored,
        }
    }
}

impl Metrics {
    /// A limit was hit.
    pub fn limit_hit(&self, limit: Limit) {
        self.limit_hits.get_or_create(&LimitLabels { limit }).inc();
    }

    /// The Prometheus text format.
    pub fn text(&self) -> String {
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
        let text = metrics.text();
        for line in [
            "nodemesh_documents{state=\"refused\"} 2",
            "nodemesh_agents_connected 0",
            "nodemesh_views_sent_total 1",
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
