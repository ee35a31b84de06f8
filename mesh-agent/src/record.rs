//! What is told of a connection: one access-log line and one count, exactly once, when it ends.
//!
//! An [`Entry`] is opened when a connection arrives, gathers what becomes known of it, and tells it when it is
//! dropped; [`Entry::finish`] says how it ended. An entry that is dropped without is a task that was dropped, and
//! says so.

use std::{
    sync::{Arc, MutexGuard, OnceLock},
    time::Instant,
};

use mesh_core::{
    model::Name,
    policy::{RuleRef, WouldRefuse},
    refusal::{Reason, Step},
};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    access_log::AccessLog,
    live::{Connections, Live, Party, Registered, Told, transport_label},
    metrics::{AuditLabels, ConnectionLabels, Counted, Direction, Flow, Metrics, RoutedLabels},
    quota::Share,
    refusal::{Failure, Stop},
    spans::Spans,
};

/// Who records: a node.
#[derive(Debug, Clone)]
pub(crate) struct Recorder {
    pub(crate) node: Arc<str>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) log: AccessLog,
    /// Where spans of requests go, if they are traced.
    pub(crate) spans: Option<Spans>,
    pub(crate) connections: Arc<Connections>,
}

/// A connection that will be recorded.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) live: Registered,
    pub(crate) rule: Option<RuleRef>,
    /// The version of the view that it was decided on; not the view, which would live as long as the connection.
    pub(crate) view: Option<Arc<str>>,
    /// Its place among the node's connections. Here, and not on the way, to keep that small.
    pub(crate) place: Option<Box<Share<u64>>>,
    /// The route of connections that it falls under.
    pub(crate) by: Option<Box<ByRoute>>,
    would_refuse: OnceLock<WouldRefuse>,
    unanswered: bool,
    recorder: Arc<Recorder>,
    began: Instant,
    result: Result<(), Stop>,
    withdrawn: bool,
    _active: Counted,
}

/// Where a route of connections led.
#[derive(Debug)]
pub(crate) struct ByRoute {
    /// The service that was asked for.
    service: Name,
    /// The route, `KIND/namespace/name`; none, if none is for what was asked for.
    pub(crate) route: Option<String>,
    /// The service that it led to, if it led to one that has endpoints.
    pub(crate) backend: Option<Name>,
}

impl ByRoute {
    pub(crate) fn of(service: &Name) -> Self {
        Self { service: service.clone(), route: None, backend: None }
    }
}

impl Recorder {
    /// Appends an event to the access log; one that its writer cannot keep up with is counted.
    pub(crate) fn write(&self, event: &impl Serialize) {
        match self.log.append(event) {
            Ok(true) => {}
            Ok(false) => drop(self.metrics.log_dropped().inc()),
            Err(error) => tracing::error!(%error, "an access-log line cannot be written as JSON"),
        }
    }

    /// A connection of this workload has arrived.
    pub(crate) fn begin(self: &Arc<Self>, direction: Direction, workload: &Name) -> Box<Entry> {
        let flow = Flow::new(self.metrics.bytes(direction).clone());
        Box::new(Entry {
            live: self.connections.begin(direction, workload, flow),
            rule: None,
            view: None,
            place: None,
            by: None,
            would_refuse: OnceLock::new(),
            unanswered: false,
            recorder: self.clone(),
            began: Instant::now(),
            result: Err(Failure::Dropped.into()),
            withdrawn: false,
            _active: Counted::new(self.metrics.active(direction)),
        })
    }
}

impl Entry {
    /// What is known of it; for one statement, never across a wait.
    pub(crate) fn told(&self) -> MutexGuard<'_, Told> {
        self.live.told()
    }

    /// Bytes can flow.
    pub(crate) fn opened(&self) {
        self.told().open = true;
    }

    /// The connection, for whoever counts its bytes elsewhere.
    pub(crate) fn shared(&self) -> Arc<Live> {
        self.live.shared()
    }

    /// Which way it goes.
    pub(crate) fn direction(&self) -> Direction {
        self.live.direction
    }

    /// Its bytes.
    pub(crate) fn flow(&self) -> &Flow {
        &self.live.flow
    }

    /// How it ended. Records it.
    pub(crate) fn finish(mut self, result: Result<(), Stop>) {
        self.result = result;
    }

    /// It was no connection but a tunnel, whose leases are recorded one by one.
    pub(crate) fn withdraw(mut self) {
        self.withdrawn = true;
    }

    /// It may be: by this rule, if one had to say so, and against this audited policy.
    pub(crate) fn allowed(&mut self, rule: Option<RuleRef>, would_refuse: Option<WouldRefuse>) {
        self.rule = rule;
        self.would_refuse(would_refuse);
    }

    /// What audited policies would have refused: counted once a connection, however often it is decided anew.
    pub(crate) fn would_refuse(&self, found: Option<WouldRefuse>) {
        let Some(found) = found else { return };
        let labels = AuditLabels {
            policy: found.policy.to_string(),
            workload: self.live.workload.to_string(),
            reason: found.reason.label(),
        };
        if self.would_refuse.set(found).is_ok() {
            self.recorder.metrics.audit_refused(&labels);
        }
    }

    /// It goes on in plaintext though it may be to the mesh: nobody has said in time what its destination is.
    pub(crate) fn unanswered(&mut self) {
        self.unanswered = true;
        self.recorder.metrics.plaintext_unanswered().inc();
    }

    /// The rule that refused, or else the one that allowed.
    fn deciding_rule(&self) -> Option<&RuleRef> {
        match &self.result {
            Err(Stop::Refused(refusal)) => refusal.rule.as_ref(),
            Ok(()) | Err(Stop::Failed(_)) => self.rule.as_ref(),
        }
    }

    fn write(&self) {
        let (bytes_sent, bytes_received) = self.flow().totals();
        let detail = self.result.as_ref().err().map(|stop| match stop {
            Stop::Refused(refusal) if refusal.detail.is_empty() => refusal.reason.says().to_owned(),
            Stop::Refused(refusal) => refusal.detail.to_string(),
            Stop::Failed(failure) => failure.to_string(),
        });
        let told = self.told();
        self.recorder.write(&Event {
            time: OffsetDateTime::from(self.live.time).format(&Rfc3339).unwrap_or_default(),
            duration_ms: self.began.elapsed().as_secs_f64() * 1000.0,
            direction: self.live.direction,
            node: &self.recorder.node,
            source: &told.source,
            destination: &told.destination,
            transport: transport_label(told.transport),
            route: self.by.as_ref().and_then(|by| by.route.as_deref()),
            backend: self.by.as_ref().and_then(|by| by.backend.as_ref()),
            rule: self.deciding_rule().map(ToString::to_string),
            would_refuse: self.would_refuse.get(),
            unanswered: self.unanswered,
            bytes_sent,
            bytes_received,
            outcome: outcome(&self.result),
            step: self.result.as_ref().err().map(|stop| match stop {
                Stop::Refused(refusal) => refusal.reason.step(),
                Stop::Failed(_) => Step::Relay,
            }),
            reason: reason(&self.result),
            detail,
            view: self.view.as_deref(),
        });
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.withdrawn {
            return;
        }
        if let Err(Stop::Refused(refusal)) = &self.result
            && let Some(limit) = refusal.reason.limit()
        {
            self.recorder.metrics.limit_hit(limit);
        }
        self.recorder.metrics.connection_ended(&ConnectionLabels {
            direction: self.live.direction,
            workload: self.live.workload.to_string(),
            outcome: outcome(&self.result),
            reason: reason(&self.result).unwrap_or(""),
            transport: transport_label(self.told().transport),
        });
        if let Some(by) = &self.by {
            self.recorder.metrics.connection_routed(&RoutedLabels {
                workload: self.live.workload.to_string(),
                service: by.service.to_string(),
                route: by.route.clone().unwrap_or_default(),
                backend: by.backend.as_ref().map(ToString::to_string).unwrap_or_default(),
                outcome: outcome(&self.result),
                reason: reason(&self.result).unwrap_or(""),
            });
        }
        let usual = self.result.is_ok() && self.would_refuse.get().is_none() && !self.unanswered;
        if self.recorder.log.wants(usual) {
            self.write();
        }
    }
}

/// Where a node tells what it sees.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The access log.
    pub log: AccessLog,
    /// Where spans of requests go, if they are traced.
    pub spans: Option<Spans>,
}

fn outcome(result: &Result<(), Stop>) -> &'static str {
    match result {
        Ok(()) => "ok",
        Err(Stop::Refused(_)) => "refused",
        Err(Stop::Failed(_)) => "failed",
    }
}

fn reason(result: &Result<(), Stop>) -> Option<&'static str> {
    match result {
        Ok(()) => None,
        Err(Stop::Refused(refusal)) => Some(Reason::label(refusal.reason)),
        Err(Stop::Failed(failure)) => Some(failure.label()),
    }
}

/// The access log's line. Sent and received are the source's words, on both nodes: sent is what it sent.
#[derive(Serialize)]
struct Event<'a> {
    time: String,
    duration_ms: f64,
    direction: Direction,
    node: &'a str,
    source: &'a Party,
    destination: &'a Party,
    transport: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backend: Option<&'a Name>,
    rule: Option<String>,
    would_refuse: Option<&'a WouldRefuse>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    unanswered: bool,
    bytes_sent: u64,
    bytes_received: u64,
    outcome: &'static str,
    step: Option<Step>,
    reason: Option<&'static str>,
    detail: Option<String>,
    view: Option<&'a str>,
}
