//! The agent's counters. Names and labels are a contract: `docs/reference` lists them, dashboards rely on them.
//!
//! Label values are bounded: directions, outcomes, reasons out of fixed lists, and names of this node's workloads.

mod checks;
mod durations;
pub mod exposition;
mod requests;
mod sending;
mod spans;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use mesh_core::view::Snapshot;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

pub use self::{
    checks::CheckLabels,
    requests::{AttemptLabels, Before, Named, RequestEnd, RequestLabels, RequestTimeLabels},
    sending::{EjectionLabels, FaultLabels, HedgeLabels, HedgeOutcome, ServiceLabels},
    spans::SpanLabels,
};
use self::{checks::Checks, requests::Requests, sending::Sending, spans::Spans};
use crate::health::{Condition, Kept};

/// Which way a connection goes, seen from this node's workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The workload opened it.
    Outbound,
    /// The workload is asked for.
    Inbound,
}

impl EncodeLabelValue for Direction {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
        .encode(encoder)
    }
}

/// Labels of `nodemesh_connections_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ConnectionLabels {
    /// Which way.
    pub direction: Direction,
    /// The workload of this node, `namespace/name`.
    pub workload: String,
    /// `ok`, `refused` or `failed`.
    pub outcome: &'static str,
    /// The reason's label; empty for `ok`.
    pub reason: &'static str,
    /// `tunnel`, `plaintext`, or empty where it ended before that was known.
    pub transport: &'static str,
}

/// Labels of `nodemesh_policy_audit_refusals_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AuditLabels {
    /// The audited policy, `namespace/name`.
    pub policy: String,
    /// The workload of this node that was asked for, `namespace/name`.
    pub workload: String,
    /// The reason's label.
    pub reason: &'static str,
}

/// Labels of `nodemesh_routed_connections_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RoutedLabels {
    /// The workload of this node that connected, `namespace/name`.
    pub workload: String,
    /// The service that it asked for, `namespace/name`.
    pub service: String,
    /// The route that it fell under, `KIND/namespace/name`; empty for none.
    pub route: String,
    /// The service that it went to, `namespace/name`; empty for none.
    pub backend: String,
    /// `ok`, `refused` or `failed`.
    pub outcome: &'static str,
    /// The reason's label; empty for `ok`.
    pub reason: &'static str,
}

/// A set of one label, that says which way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DirectionLabels {
    /// Which way.
    pub direction: Direction,
}

/// Labels of `nodemesh_view_entries`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabels {
    /// `workload`, `service`, `policy`, `route` or `nobody`.
    pub kind: &'static str,
}

/// Labels of `nodemesh_bytes_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByteLabels {
    /// Which way the connection goes.
    pub direction: Direction,
    /// `sent`: from source to destination. `received`: the way back.
    pub flow: &'static str,
}

macro_rules! one_label {
    ($($(#[$doc:meta])* $name:ident { $label:ident: $type:ty })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
        pub struct $name {
            /// The label's value.
            pub $label: $type,
        }
    )*};
}

/// How the hold of a new pod ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldOutcome {
    /// It is captured.
    Captured,
    /// It is not meant to be.
    Outside,
    /// It took too long to know.
    Limit,
    /// Its veth is gone.
    Gone,
}

impl HoldOutcome {
    const fn label(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Outside => "outside",
            Self::Limit => "limit",
            Self::Gone => "gone",
        }
    }
}

one_label! {
    /// Labels of `nodemesh_kernel_refused_total`.
    ReasonLabels { reason: String }
    /// Labels of `nodemesh_repairs_total`.
    WhatLabels { what: String }
    /// Labels of `nodemesh_holds_total`.
    OutcomeLabels { outcome: &'static str }
    /// Labels of `nodemesh_certificate_expiry_seconds`.
    IdentityLabels { identity: String }
    /// Labels of `nodemesh_tunnels`.
    StateLabels { state: &'static str }
    /// Labels of `nodemesh_handshakes_total`.
    ResultLabels { result: &'static str }
    /// Labels of `nodemesh_limit_hits_total`.
    LimitLabels { limit: &'static str }
    /// Labels of `nodemesh_state_unsaved` and `nodemesh_state_damaged_total`.
    FileLabels { file: &'static str }
    /// Labels of `nodemesh_kernel_map_entries` and `nodemesh_kernel_map_limit`.
    MapLabels { map: &'static str }
    /// Labels of `nodemesh_view_info`.
    VersionLabels { version: String }
}

/// The bytes of one direction's connections.
#[derive(Debug, Clone)]
pub struct ByteCounters {
    /// From source to destination.
    pub sent: Counter,
    /// From destination to source.
    pub received: Counter,
}

/// Everything that the agent counts.
#[derive(Debug)]
pub struct Metrics {
    connections: Family<ConnectionLabels, Counter>,
    routed: Family<RoutedLabels, Counter>,
    active: Family<DirectionLabels, Gauge>,
    requests: Requests,
    sending: Sending,
    spans: Spans,
    checks: Checks,
    audit_refusals: Family<AuditLabels, Counter>,
    outbound_bytes: ByteCounters,
    inbound_bytes: ByteCounters,
    kernel_refused: Family<ReasonLabels, Counter>,
    unprotected: Gauge,
    enrolled: Gauge,
    repairs: Family<WhatLabels, Counter>,
    holds: Family<OutcomeLabels, Counter>,
    view: Family<VersionLabels, Gauge>,
    view_entries: Family<KindLabels, Gauge>,
    addresses_asked: Gauge,
    plaintext_unanswered: Counter,
    controller_connected: Gauge,
    certificate_expiry: Family<IdentityLabels, Gauge<f64, AtomicU64>>,
    tunnels: Family<StateLabels, Gauge>,
    handshakes: Family<ResultLabels, Counter>,
    log_dropped: Counter,
    log_unwritten: Counter,
    limit_hits: Family<LimitLabels, Counter>,
    certificates_failing: Gauge,
    unsaved: Family<FileLabels, Gauge>,
    damaged: Family<FileLabels, Counter>,
    views_restored: Counter,
    clock_skew: Gauge<f64, AtomicU64>,
    open_files: Gauge,
    open_files_limit: Gauge,
    stalled_buffers: Gauge,
    stalled_buffers_limit: Gauge,
    map_entries: Family<MapLabels, Gauge>,
    map_limit: Family<MapLabels, Gauge>,
}

impl Metrics {
    /// All counters at zero, and the registry that prints them.
    pub fn new() -> (Arc<Self>, Registry) {
        let bytes = Family::<ByteLabels, Counter>::default();
        let of = |direction, flow| bytes.get_or_create(&ByteLabels { direction, flow }).clone();
        let both =
            |direction| ByteCounters { sent: of(direction, "sent"), received: of(direction, "received") };
        let metrics = Self {
            connections: Family::default(),
            routed: Family::default(),
            active: Family::default(),
            requests: Requests::default(),
            sending: Sending::default(),
            spans: Spans::default(),
            checks: Checks::default(),
            audit_refusals: Family::default(),
            outbound_bytes: both(Direction::Outbound),
            inbound_bytes: both(Direction::Inbound),
            kernel_refused: Family::default(),
            unprotected: Gauge::default(),
            enrolled: Gauge::default(),
            repairs: Family::default(),
            holds: Family::default(),
            view: Family::default(),
            view_entries: Family::default(),
            addresses_asked: Gauge::default(),
            plaintext_unanswered: Counter::default(),
            controller_connected: Gauge::default(),
            certificate_expiry: Family::default(),
            tunnels: Family::default(),
            handshakes: Family::default(),
            log_dropped: Counter::default(),
            log_unwritten: Counter::default(),
            limit_hits: Family::default(),
            certificates_failing: Gauge::default(),
            unsaved: Family::default(),
            damaged: Family::default(),
            views_restored: Counter::default(),
            clock_skew: Gauge::default(),
            open_files: Gauge::default(),
            open_files_limit: Gauge::default(),
            stalled_buffers: Gauge::default(),
            stalled_buffers_limit: Gauge::default(),
            map_entries: Family::default(),
            map_limit: Family::default(),
        };
        let mut registry = Registry::with_prefix("nodemesh");
        let m = &metrics;
        registry.register("connections", "Connections that ended", m.connections.clone());
        registry.register(
            "routed_connections",
            "Connections of this node's workloads that ended, to ports of services that have TCPRoutes or TLSRoutes",
            m.routed.clone(),
        );
        registry.register("connections_active", "Connections that are carried now", m.active.clone());
        m.requests.register(&mut registry);
        m.sending.register(&mut registry);
        m.spans.register(&mut registry);
        m.checks.register(&mut registry);
        registry.register(
            "policy_audit_refusals",
            "Connections that an audited policy would have refused, had it been enforced",
            m.audit_refusals.clone(),
        );
        registry.register("bytes", "Bytes of applications that were carried", bytes.clone());
        registry.register(
            "kernel_refused",
            "Packets and connections that the kernel programs refused",
            m.kernel_refused.clone(),
        );
        registry.register(
            "unprotected_workloads",
            "Enrolled workloads whose capture is not in place",
            m.unprotected.clone(),
        );
        registry.register("enrolled_workloads", "Workloads whose traffic is captured", m.enrolled.clone());
        registry.register(
            "repairs",
            "Pieces of capture that were missing and were put back",
            m.repairs.clone(),
        );
        registry.register(
            "holds",
            "New pods whose first packets were held, by how that ended",
            m.holds.clone(),
        );
        registry.register(
            "view_entries",
            "What the view in force has: workloads, services, policies, routes of requests, and addresses that are nobody's",
            m.view_entries.clone(),
        );
        registry.register(
            "addresses_asked",
            "Addresses of the mesh that connections use or have used lately: what a view by demand is made of",
            m.addresses_asked.clone(),
        );
        registry.register(
            "plaintext_unanswered",
            "Connections of permissive workloads that went on in plaintext, as nobody had said in time whether their \
             destination is of the mesh",
            m.plaintext_unanswered.clone(),
        );
        registry.register("view_info", "1 for the version of the view in force", m.view.clone());
        registry.register(
            "controller_connected",
            "1 while the controller's stream is open",
            m.controller_connected.clone(),
        );
        registry.register(
            "certificate_expiry_seconds",
            "When an identity's certificate expires, Unix time",
            m.certificate_expiry.clone(),
        );
        registry.register("tunnels", "Tunnels to other agents, at either end", m.tunnels.clone());
        registry.register("handshakes", "TLS handshakes of tunnels, at either end", m.handshakes.clone());
        registry.register(
            "access_log_dropped",
            "Access log lines that the writer could not keep up with",
            m.log_dropped.clone(),
        );
        registry.register(
            "access_log_unwritten",
            "Access log lines that could not be written, for want of room on the disk or the like",
            m.log_unwritten.clone(),
        );
        registry.register("limit_hits", "Times that a limit was hit", m.limit_hits.clone());
        registry.register(
            "certificates_failing",
            "Identities whose last attempt at a newer certificate failed",
            m.certificates_failing.clone(),
        );
        registry.register(
            "state_unsaved",
            "1 while the newest version of a file of the run directory could not be written",
            m.unsaved.clone(),
        );
        registry.register(
            "state_damaged",
            "Files of an earlier run that could not be used",
            m.damaged.clone(),
        );
        registry.register(
            "views_restored",
            "Views taken from a controller whose state was restored from an older one",
            m.views_restored.clone(),
        );
        registry.register(
            "clock_skew_seconds",
            "How far this node's clock is ahead of the controller's",
            m.clock_skew.clone(),
        );
        metrics.condition(&Condition::default());
        registry.register("open_files", "File descriptors that the agent has open", m.open_files.clone());
        registry.register("open_files_limit", "How many it may have", m.open_files_limit.clone());
        registry.register(
            "stalled_buffers",
            "Buffers (82 KiB) that wait for readers who do not read",
            m.stalled_buffers.clone(),
        );
        registry.register("stalled_buffers_limit", "How many may wait", m.stalled_buffers_limit.clone());
        registry.register(
            "kernel_map_entries",
            "Entries of the kernel programs' maps",
            metrics.map_entries.clone(),
        );
        registry.register("kernel_map_limit", "How many entries they take", metrics.map_limit.clone());
        (Arc::new(metrics), registry)
    }

    /// A connection ended.
    pub fn connection_ended(&self, labels: &ConnectionLabels) {
        self.connections.get_or_create(labels).inc();
    }

    /// A connection that a route was looked up for ended.
    pub fn connection_routed(&self, labels: &RoutedLabels) {
        self.routed.get_or_create(labels).inc();
    }

    /// How many of these ended with these labels.
    pub fn routed(&self, labels: &RoutedLabels) -> u64 {
        self.routed.get_or_create(labels).get()
    }

    /// How many connections ended with these labels.
    pub fn connections(&self, labels: &ConnectionLabels) -> u64 {
        self.connections.get_or_create(labels).get()
    }

    /// An audited policy would have refused a connection, or a request.
    pub fn audit_refused(&self, labels: &AuditLabels) {
        self.audit_refusals.get_or_create(labels).inc();
    }

    /// How many connections and requests audited policies would have refused with these labels.
    pub fn audit_refusals(&self, labels: &AuditLabels) -> u64 {
        self.audit_refusals.get_or_create(labels).get()
    }

    /// The gauge of connections that are carried.
    pub fn active(&self, direction: Direction) -> Gauge {
        self.active.get_or_create(&DirectionLabels { direction }).clone()
    }

    /// The byte counters of a direction.
    pub fn bytes(&self, direction: Direction) -> &ByteCounters {
        match direction {
            Direction::Outbound => &self.outbound_bytes,
            Direction::Inbound => &self.inbound_bytes,
        }
    }

    /// The kernel programs refused `delta` more packets or connections for this reason.
    pub fn kernel_refused(&self, reason: &str, delta: u64) {
        self.kernel_refused.get_or_create(&ReasonLabels { reason: reason.to_owned() }).inc_by(delta);
    }

    /// How many enrolled workloads lack a part of their capture.
    pub fn unprotected(&self, workloads: usize) {
        self.unprotected.set(workloads as i64);
    }

    /// How many workloads are captured.
    pub fn enrolled(&self, workloads: usize) {
        self.enrolled.set(workloads as i64);
    }

    /// The hold of a new pod has ended.
    pub fn held(&self, outcome: HoldOutcome) {
        self.holds.get_or_create(&OutcomeLabels { outcome: outcome.label() }).inc();
    }

    /// A missing piece of capture was put back.
    pub fn repaired(&self, what: &str) {
        self.repairs.get_or_create(&WhatLabels { what: what.to_owned() }).inc();
    }

    /// This version of the view is in force.
    pub fn view(&self, version: &str) {
        self.view.clear();
        self.view.get_or_create(&VersionLabels { version: version.to_owned() }).set(1);
    }

    /// What the view in force has.
    pub fn view_size(&self, view: &Snapshot) {
        let set = |kind, count: usize| {
            let gauge = self.view_entries.get_or_create(&KindLabels { kind });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        };
        set("workload", view.workloads().count());
        set("service", view.services().count());
        set("policy", view.policies().count());
        set("route", view.routes().count());
        set("nobody", view.nobody().count());
    }

    /// Addresses that connections use or have used lately.
    pub fn addresses_asked(&self, count: usize) {
        self.addresses_asked.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Connections that went on in plaintext, as nobody had said in time whether their destination is of the mesh.
    pub fn plaintext_unanswered(&self) -> &Counter {
        &self.plaintext_unanswered
    }

    /// Whether the controller's stream is open.
    pub fn controller_connected(&self, connected: bool) {
        self.controller_connected.set(i64::from(connected));
    }

    /// How many identities could not get a newer certificate the last time.
    pub fn certificates_failing(&self, identities: usize) {
        self.certificates_failing.set(identities as i64);
    }

    /// What is wrong with the control side.
    pub fn condition(&self, condition: &Condition) {
        for file in Kept::ALL {
            let labels = FileLabels { file: file.label() };
            self.unsaved.get_or_create(&labels).set(i64::from(condition.unsaved.contains_key(&file)));
            let damaged = condition.damaged.get(&file).map_or(0, |(count, _)| *count);
            raise(&self.damaged.get_or_create(&labels), damaged);
        }
        raise(&self.views_restored, condition.views_restored);
        self.clock_skew.set(condition.clock_skew_seconds.unwrap_or(0.0));
    }

    /// When an identity's certificate expires, Unix time in seconds; `None` for an identity that is gone.
    pub fn certificate_expiry(&self, identity: &str, expires: Option<f64>) {
        let labels = IdentityLabels { identity: identity.to_owned() };
        match expires {
            Some(at) => drop(self.certificate_expiry.get_or_create(&labels).set(at)),
            None => drop(self.certificate_expiry.remove(&labels)),
        }
    }

    /// The gauge of tunnels in a state, `busy` or `idle`.
    pub fn tunnels(&self, state: &'static str) -> Gauge {
        self.tunnels.get_or_create(&StateLabels { state }).clone()
    }

    /// A handshake ended: `ok`, `failed` or `timeout`.
    pub fn handshake(&self, result: &'static str) {
        self.handshakes.get_or_create(&ResultLabels { result }).inc();
    }

    /// How many handshakes ended so.
    pub fn handshakes(&self, result: &'static str) -> u64 {
        self.handshakes.get_or_create(&ResultLabels { result }).get()
    }

    /// A limit was hit.
    pub fn limit_hit(&self, limit: &'static str) {
        self.limit_hits.get_or_create(&LimitLabels { limit }).inc();
    }

    /// How often a limit was hit.
    pub fn limit_hits(&self, limit: &'static str) -> u64 {
        self.limit_hits.get_or_create(&LimitLabels { limit }).get()
    }

    /// Descriptors that are open, and how many may be.
    pub fn open_files(&self, open: u64, limit: u64) {
        self.open_files.set(i64::try_from(open).unwrap_or(i64::MAX));
        self.open_files_limit.set(i64::try_from(limit).unwrap_or(i64::MAX));
    }

    /// Buffers that wait for readers, and how many may.
    pub fn stalled_buffers(&self, waiting: u64, limit: u64) {
        self.stalled_buffers.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        self.stalled_buffers_limit.set(i64::try_from(limit).unwrap_or(i64::MAX));
    }

    /// Entries of a kernel map, and how many it takes.
    pub fn kernel_map(&self, map: &'static str, entries: u64, limit: u64) {
        let labels = MapLabels { map: map.trim_start_matches("kernel_map_") };
        self.map_entries.get_or_create(&labels).set(i64::try_from(entries).unwrap_or(i64::MAX));
        self.map_limit.get_or_create(&labels).set(i64::try_from(limit).unwrap_or(i64::MAX));
    }

    /// Access log lines that could not be written.
    pub fn log_unwritten(&self) -> &Counter {
        &self.log_unwritten
    }

    /// Access log lines that were dropped.
    pub fn log_dropped(&self) -> &Counter {
        &self.log_dropped
    }
}

/// Brings a counter to a total.
fn raise(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// A gauge that counts this value for as long as it lives.
#[derive(Debug)]
pub struct Counted(Gauge);

impl Counted {
    /// Counts one more.
    pub fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The bytes of one connection, counted while it runs.
#[derive(Debug)]
pub struct Flow {
    sent: AtomicU64,
    received: AtomicU64,
    total: ByteCounters,
}

impl Flow {
    /// A connection that has carried nothing yet.
    pub fn new(total: ByteCounters) -> Self {
        Self { sent: AtomicU64::new(0), received: AtomicU64::new(0), total }
    }

    /// `n` bytes went on from source to destination.
    pub fn sent(&self, n: usize) {
        self.sent.fetch_add(n as u64, Ordering::Relaxed);
        self.total.sent.inc_by(n as u64);
    }

    /// `n` bytes went on from destination to source.
    pub fn received(&self, n: usize) {
        self.received.fetch_add(n as u64, Ordering::Relaxed);
        self.total.received.inc_by(n as u64);
    }

    /// Bytes so far: sent, received.
    pub fn totals(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_core::model::Name;

    use super::*;

    #[test]
    fn names_are_the_contract_and_the_reference_of_them_is_generated() {
        let (metrics, registry) = Metrics::new();
        let labels = ConnectionLabels {
            direction: Direction::Outbound,
            workload: "shop/web".into(),
            outcome: "refused",
            reason: "dial_refused",
            transport: "tunnel",
        };
        metrics.connection_ended(&labels);
        metrics.audit_refused(&AuditLabels {
            policy: "shop/trial".into(),
            workload: "shop/web".into(),
            reason: "policy_deny",
        });
        metrics.kernel_refused("plaintext", 2);
        metrics.handshake("ok");
        metrics.certificate_expiry("spiffe://td/ns/a/sa/b", Some(12.0));
        metrics.repaired("listener");
        metrics.view("7");
        let busy = Counted::new(metrics.tunnels("busy"));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"nodemesh_connections_total{direction="outbound",workload="shop/web",outcome="refused",reason="dial_refused",transport="tunnel"} 1"#,
            r#"nodemesh_policy_audit_refusals_total{policy="shop/trial",workload="shop/web",reason="policy_deny"} 1"#,
            r#"nodemesh_kernel_refused_total{reason="plaintext"} 2"#,
            r#"nodemesh_handshakes_total{result="ok"} 1"#,
            r#"nodemesh_certificate_expiry_seconds{identity="spiffe://td/ns/a/sa/b"} 12.0"#,
            r#"nodemesh_repairs_total{what="listener"} 1"#,
            r#"nodemesh_view_info{version="7"} 1"#,
            r#"nodemesh_tunnels{state="busy"} 1"#,
            r#"nodemesh_bytes_total{direction="inbound",flow="sent"} 0"#,
            "nodemesh_unprotected_workloads 0",
            "nodemesh_enrolled_workloads 0",
            "nodemesh_controller_connected 0",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        drop(busy);
        assert_eq!(metrics.tunnels("busy").get(), 0);
        the_reference_is_generated(&metrics, &registry);
    }

    /// From metrics that the test above has counted: the library prints none that was never counted.
    fn the_reference_is_generated(metrics: &Metrics, registry: &Registry) {
        metrics.active(Direction::Outbound);
        metrics.limit_hit("idle_tunnels");
        metrics.kernel_map("kernel_map_destinations", 1, 65_536);
        metrics.view_entries.get_or_create(&KindLabels { kind: "workload" }).set(1);
        metrics.held(HoldOutcome::Captured);
        metrics.connection_routed(&RoutedLabels {
            workload: "shop/web".into(),
            service: "shop/db".into(),
            route: "TCPRoute/shop/db".into(),
            backend: "shop/db-v2".into(),
            outcome: "ok",
            reason: "",
        });
        let named = |name| Named(Some(Name::new("shop", name)));
        let labels = RequestLabels {
            direction: Direction::Outbound,
            workload: named("web"),
            service: named("pay"),
            route: Some("HTTPRoute/shop/pay".into()),
            backend: named("pay-v2"),
            status: Some(200),
            grpc_status: None,
            reason: "",
        };
        let end = RequestEnd { attempts: 2, took: Duration::from_millis(3), trace: None };
        metrics.request_ended(labels, &end, &Before::default());
        let pay = Name::new("shop", "pay");
        metrics.ejected(&pay, mesh_core::balance::Cause::Consecutive);
        metrics.tried_again(&pay);
        metrics.fault(&pay, "delay");
        metrics.hedged(&pay, HedgeOutcome::Won);
        metrics.spans_dropped("queue", 1);
        metrics.health_checked(&pay, true);
        metrics.endpoint_unhealthy(&pay, true);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        // How long requests take is a collector, and no descriptor.
        let registered = format!("{registry:?}").matches("Descriptor {").count() + 1;
        assert_eq!(text.matches("# HELP").count(), registered, "count every metric once, in the test");
        let page = mesh_settings::reference::metrics("Metrics of mesh-agent", &text);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/metrics-agent.md");
        mesh_settings::reference::check(path.as_ref(), &page).unwrap();
    }
}
