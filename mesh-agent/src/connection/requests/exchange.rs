//! What is told of a request: one line of the access log and one count, exactly once, when its answer has ended or the
//! client has gone; and its span, if it is of a trace that is recorded.

mod span;

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use http::{HeaderMap, Method, Version};
use mesh_core::{
    http::{
        Chosen,
        trace::{self, TraceId},
    },
    model::{Endpoint, Name},
    policy::{RuleRef, WouldRefuse},
    refusal::Reason,
};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use self::span::Traced;
use super::{
    attempt::{Try, has_failed},
    body::{Longer, grpc_status},
};
use crate::{
    live::Party,
    metrics::{AuditLabels, Before, Direction, Named, RequestEnd, RequestLabels},
    record::Recorder,
    refusal::Refusal,
};

/// Longest path that is logged, bytes: more of it is cut off.
const MAX_PATH: usize = 512;

/// Between whom a request is.
#[derive(Debug)]
pub(in crate::connection) struct Ends {
    pub(in crate::connection) recorder: Arc<Recorder>,
    /// Outbound: the source is a workload of this node, which asks a service.
    pub(in crate::connection) direction: Direction,
    pub(in crate::connection) source: Party,
    pub(in crate::connection) destination: Party,
    /// The port that was asked for.
    pub(in crate::connection) port: u16,
    /// What the request before it has counted.
    pub(in crate::connection) before: Arc<Before>,
}

/// A request that will be recorded.
#[derive(Debug)]
pub(in crate::connection) struct Exchange(Option<Box<Told>>);

/// What became known of a request.
#[derive(Debug)]
struct Told {
    ends: Ends,
    began: Instant,
    time: SystemTime,
    method: Method,
    path: String,
    protocol: Version,
    route: Option<Arc<str>>,
    rule: Option<Arc<str>>,
    would_refuse: Option<WouldRefuse>,
    backend: Option<Name>,
    attempts: u32,
    status: Option<u16>,
    grpc_status: Option<u16>,
    bytes_received: u64,
    refusal: Option<Refusal>,
    view: Option<Arc<str>>,
    complete: bool,
    /// Set if its own body was longer than it may be.
    longer: Option<Longer>,
    /// The trace that it is of.
    trace: Option<TraceId>,
    traced: Option<Box<Traced>>,
}

impl Exchange {
    /// A request has arrived.
    pub(in crate::connection) fn begin<B>(ends: Ends, request: &http::Request<B>) -> Self {
        let path = request.uri().path();
        let said = trace::read(request.headers());
        let traced = Traced::begin(&said, &ends, request).map(Box::new);
        let cut = (0..=path.len().min(MAX_PATH)).rev().find(|at| path.is_char_boundary(*at)).unwrap_or(0);
        Self(Some(Box::new(Told {
            ends,
            began: Instant::now(),
            time: SystemTime::now(),
            method: request.method().clone(),
            path: path[..cut].to_owned(),
            protocol: request.version(),
            route: None,
            rule: None,
            would_refuse: None,
            backend: None,
            attempts: 0,
            status: None,
            grpc_status: None,
            bytes_received: 0,
            refusal: None,
            view: None,
            complete: false,
            longer: None,
            trace: traced.as_ref().map(|traced| traced.place.trace).or(said.trace()),
            traced,
        })))
    }

    fn told(&mut self) -> Option<&mut Told> {
        self.0.as_deref_mut()
    }

    /// It is decided on this view.
    pub(in crate::connection) fn decided(&mut self, view: Arc<str>) {
        if let Some(told) = self.told() {
            told.view = Some(view);
        }
    }

    /// It comes from a workload with this identity.
    pub(super) fn comes_from(&mut self, identity: Arc<mesh_core::identity::SpiffeId>) {
        if let Some(told) = self.told() {
            told.ends.source.identity = Some(identity);
        }
    }

    /// It may be: by this rule, if one had to say so, and against this audited policy.
    pub(in crate::connection) fn allowed(
        &mut self,
        rule: Option<RuleRef>,
        would_refuse: Option<WouldRefuse>,
    ) {
        if let Some(told) = self.told() {
            told.rule = rule.map(|rule| rule.to_string().into());
            told.would_refuse = would_refuse;
        }
    }

    /// It falls under this rule.
    pub(super) fn falls_under(&mut self, chosen: &Chosen<'_>) {
        if let Some(told) = self.told() {
            told.route = Some(chosen.said.route.clone());
            told.rule = Some(chosen.said.rule.clone());
        }
    }

    /// It goes to a backend.
    pub(super) fn goes_to(&mut self, backend: &Name) {
        if let Some(told) = self.told() {
            told.backend = Some(backend.clone());
        }
    }

    /// It goes on: whoever is asked next is told of our span, as of its parent.
    pub(in crate::connection) fn goes_on(&mut self, headers: &mut HeaderMap) {
        if let Some(traced) = self.told().and_then(|told| told.traced.as_ref()) {
            traced.place.write(headers);
        }
    }

    /// An attempt at an endpoint has ended: with an answer of this status, or with none for this reason.
    pub(super) fn attempt_ended(&mut self, attempt: &Try, ended: Result<u16, &'static str>) {
        if let Some(traced) = self.told().and_then(|told| told.traced.as_mut()) {
            traced.tried(attempt.number, &attempt.endpoint, ended);
        }
    }

    /// It is tried at an endpoint: for which time.
    pub(super) fn tried(&mut self, endpoint: &Endpoint) -> u32 {
        self.came_from(endpoint);
        self.told().map_or(0, |told| {
            told.attempts += 1;
            told.attempts
        })
    }

    /// It is at this endpoint, or its answer is from there.
    pub(super) fn came_from(&mut self, endpoint: &Endpoint) {
        if let Some(told) = self.told() {
            told.ends.destination.workload = endpoint.workload.clone();
            told.ends.destination.address = Some(std::net::SocketAddr::new(endpoint.address, endpoint.port));
        }
    }

    /// It is answered with this head.
    pub(in crate::connection) fn answered(&mut self, status: http::StatusCode, headers: &HeaderMap) {
        if let Some(told) = self.told() {
            told.status = Some(status.as_u16());
            told.grpc_status = grpc_status(headers);
        }
    }

    /// It is not answered by a backend, for this reason.
    pub(in crate::connection) fn refused(&mut self, refusal: Refusal) {
        if let Some(told) = self.told() {
            if let Some(rule) = &refusal.rule {
                told.rule = Some(rule.to_string().into());
            }
            told.refusal = Some(refusal);
        }
    }

    /// Its body is measured: what it is broken off for is told here, should its answer have begun then.
    pub(in crate::connection) fn is_measured(&mut self) -> Longer {
        let longer = Longer::default();
        if let Some(told) = self.told() {
            told.longer = Some(longer.clone());
        }
        longer
    }

    /// Bytes of the answer's body went by.
    pub(super) fn received(&mut self, n: usize) {
        if let Some(told) = self.told() {
            told.bytes_received += n as u64;
        }
    }

    /// The answer's last word.
    pub(super) fn trailers(&mut self, trailers: &HeaderMap) {
        if let Some(told) = self.told() {
            told.grpc_status = grpc_status(trailers).or(told.grpc_status);
        }
    }

    /// All of the answer has come.
    pub(in crate::connection) fn complete(&mut self) {
        if let Some(mut told) = self.0.take() {
            told.complete = true;
        }
    }
}

impl Told {
    fn outcome(&self) -> &'static str {
        match (&self.refusal, self.complete) {
            (Some(_), _) => "refused",
            (None, true) => "ok",
            (None, false) => "failed",
        }
    }

    /// The bounded label of why it did not go well.
    fn reason(&self) -> &'static str {
        match (&self.refusal, self.complete) {
            (Some(refusal), _) => refusal.reason.label(),
            (None, true) => "",
            (None, false) => "cut_short",
        }
    }

    fn detail(&self) -> Option<String> {
        self.refusal.as_ref().map(ToString::to_string)
    }

    /// Whether it is one of many that went well.
    fn is_usual(&self) -> bool {
        let status = self.status.and_then(|status| http::StatusCode::from_u16(status).ok());
        let failed = status.is_some_and(|status| has_failed(status, self.grpc_status));
        self.outcome() == "ok" && !failed && self.would_refuse.is_none()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        if self.longer.as_ref().is_some_and(Longer::is) && !self.complete && self.refusal.is_none() {
            self.refusal = Some(Refusal::new(Reason::LimitBody, "its answer had begun"));
        }
        let recorded = self.traced.as_ref().map(|it| it.place).filter(|place| place.sampled);
        let span = self.span(took);
        let Ends { recorder, direction, source, destination, port, before } = &self.ends;
        let direction = *direction;
        let workload = match direction {
            Direction::Outbound => &source.workload,
            Direction::Inbound => &destination.workload,
        };
        let metrics = &recorder.metrics;
        if let (Some(found), Some(workload)) = (&self.would_refuse, workload) {
            let (policy, reason) = (found.policy.to_string(), found.reason.label());
            metrics.audit_refused(&AuditLabels { policy, workload: workload.to_string(), reason });
        }
        let labels = RequestLabels {
            direction,
            workload: Named(workload.clone()),
            service: Named(destination.service.clone()),
            route: self.route.clone(),
            backend: Named(self.backend.clone()),
            status: self.status,
            grpc_status: self.grpc_status,
            reason: self.reason(),
        };
        let trace = recorded.map(|place| place.trace);
        metrics.request_ended(labels, &RequestEnd { attempts: self.attempts, took, trace }, before);
        if let (Some(spans), Some((whose, span))) = (&recorder.spans, span) {
            spans.tell(whose, span);
        }
        if !recorder.log.wants(self.is_usual()) {
            return;
        }
        recorder.write(&Event {
            time: OffsetDateTime::from(self.time).format(&Rfc3339).unwrap_or_default(),
            kind: "request",
            duration_ms: took.as_secs_f64() * 1000.0,
            direction,
            node: &recorder.node,
            source,
            destination,
            port: *port,
            protocol: match self.protocol {
                Version::HTTP_2 => "HTTP/2",
                Version::HTTP_10 => "HTTP/1.0",
                _ => "HTTP/1.1",
            },
            method: self.method.as_str(),
            path: &self.path,
            route: self.route.as_deref(),
            rule: self.rule.as_deref(),
            would_refuse: self.would_refuse.as_ref(),
            backend: self.backend.as_ref(),
            attempts: self.attempts,
            status: self.status,
            grpc_status: self.grpc_status,
            bytes_received: self.bytes_received,
            outcome: self.outcome(),
            step: self.refusal.as_ref().map(|refusal| Reason::step(refusal.reason)),
            reason: Some(self.reason()).filter(|reason| !reason.is_empty()),
            detail: self.detail(),
            view: self.view.as_deref(),
            trace_id: self.trace.map(|trace| trace.to_string()),
            span_id: recorded.map(|place| place.span.to_string()),
        });
    }
}

/// The access log's line of a request.
#[derive(Serialize)]
struct Event<'a> {
    time: String,
    kind: &'static str,
    duration_ms: f64,
    direction: Direction,
    node: &'a str,
    source: &'a Party,
    destination: &'a Party,
    port: u16,
    protocol: &'static str,
    method: &'a str,
    path: &'a str,
    route: Option<&'a str>,
    rule: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    would_refuse: Option<&'a WouldRefuse>,
    backend: Option<&'a Name>,
    attempts: u32,
    status: Option<u16>,
    grpc_status: Option<u16>,
    bytes_received: u64,
    outcome: &'static str,
    step: Option<mesh_core::refusal::Step>,
    reason: Option<&'static str>,
    detail: Option<String>,
    view: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    span_id: Option<String>,
}
