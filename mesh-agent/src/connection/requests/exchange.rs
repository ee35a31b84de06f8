//! What is told of a request: one line of the access log and one count, exactly once, when its answer has ended or the
//! client has gone.

use std::time::{Instant, SystemTime};

use http::{HeaderMap, Method, Version};
use mesh_core::{http::Chosen, model::Name, refusal::Reason};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{Asker, body::grpc_status};
use crate::{
    live::Party,
    metrics::{Direction, RequestLabels, RequestTimeLabels},
    record::Recorder,
    refusal::Refusal,
};

/// Longest path that is logged, bytes: more of it is cut off.
const MAX_PATH: usize = 512;

/// A request that will be recorded.
#[derive(Debug)]
pub(super) struct Exchange(Option<Box<Told>>);

/// What became known of a request.
#[derive(Debug)]
struct Told {
    recorder: Recorder,
    began: Instant,
    time: SystemTime,
    source: Party,
    destination: Party,
    port: u16,
    method: Method,
    path: String,
    protocol: Version,
    route: Option<String>,
    rule: Option<String>,
    backend: Option<Name>,
    attempts: u32,
    status: Option<u16>,
    grpc_status: Option<u16>,
    bytes_received: u64,
    refusal: Option<Refusal>,
    view: Option<std::sync::Arc<str>>,
    complete: bool,
}

impl Exchange {
    /// A request has arrived.
    pub(super) fn begin<B>(of: &Asker, request: &http::Request<B>) -> Self {
        let path = request.uri().path();
        let cut = (0..=path.len().min(MAX_PATH)).rev().find(|at| path.is_char_boundary(*at)).unwrap_or(0);
        Self(Some(Box::new(Told {
            recorder: of.node.inner.recorder.clone(),
            began: Instant::now(),
            time: SystemTime::now(),
            source: Party {
                workload: Some(of.local.name.clone()),
                address: Some(of.peer),
                ..Party::default()
            },
            destination: Party { service: Some(of.service.clone()), ..Party::default() },
            port: of.port,
            method: request.method().clone(),
            path: path[..cut].to_owned(),
            protocol: request.version(),
            route: None,
            rule: None,
            backend: None,
            attempts: 0,
            status: None,
            grpc_status: None,
            bytes_received: 0,
            refusal: None,
            view: None,
            complete: false,
        })))
    }

    fn told(&mut self) -> Option<&mut Told> {
        self.0.as_deref_mut()
    }

    /// It was decided on this view, by this workload's identity.
    pub(super) fn decided(
        &mut self,
        view: std::sync::Arc<str>,
        identity: std::sync::Arc<mesh_core::identity::SpiffeId>,
    ) {
        if let Some(told) = self.told() {
            told.view = Some(view);
            told.source.identity = Some(identity);
        }
    }

    /// It falls under this rule.
    pub(super) fn falls_under(&mut self, chosen: &Chosen<'_>) {
        if let Some(told) = self.told() {
            told.route = Some(format!("{}/{}", chosen.route.kind.as_str(), chosen.route.name));
            let named = Some(chosen.rule.name.clone()).filter(|name| !name.is_empty());
            told.rule = Some(named.unwrap_or_else(|| chosen.index.to_string()));
        }
    }

    /// It goes to a backend.
    pub(super) fn goes_to(&mut self, backend: &Name) {
        if let Some(told) = self.told() {
            told.backend = Some(backend.clone());
        }
    }

    /// It is tried at an endpoint.
    pub(super) fn tried(&mut self, endpoint: &mesh_core::model::Endpoint) {
        if let Some(told) = self.told() {
            told.attempts += 1;
            told.destination.workload = endpoint.workload.clone();
            told.destination.address = Some(std::net::SocketAddr::new(endpoint.address, endpoint.port));
        }
    }

    /// It is answered with this head.
    pub(super) fn answered(&mut self, status: http::StatusCode, headers: &HeaderMap) {
        if let Some(told) = self.told() {
            told.status = Some(status.as_u16());
            told.grpc_status = grpc_status(headers);
        }
    }

    /// It is not answered by a backend, for this reason.
    pub(super) fn refused(&mut self, refusal: Refusal) {
        if let Some(told) = self.told() {
            told.refusal = Some(refusal);
        }
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
    pub(super) fn complete(&mut self) {
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
}

impl Drop for Told {
    fn drop(&mut self) {
        let workload = self.source.workload.as_ref().map(ToString::to_string).unwrap_or_default();
        let service = self.destination.service.as_ref().map(ToString::to_string).unwrap_or_default();
        let backend = self.backend.as_ref().map(ToString::to_string).unwrap_or_default();
        let took = self.began.elapsed();
        let metrics = &self.recorder.metrics;
        metrics.request_ended(&RequestLabels {
            workload: workload.clone(),
            service: service.clone(),
            route: self.route.clone().unwrap_or_default(),
            backend: backend.clone(),
            status: self.status.map(|status| status.to_string()).unwrap_or_default(),
            grpc_status: self.grpc_status.map(|status| status.to_string()).unwrap_or_default(),
            reason: self.reason(),
        });
        metrics.request_took(&RequestTimeLabels { workload, service, backend }, took);
        self.recorder.write(&Event {
            time: OffsetDateTime::from(self.time).format(&Rfc3339).unwrap_or_default(),
            kind: "request",
            duration_ms: took.as_secs_f64() * 1000.0,
            direction: Direction::Outbound,
            node: &self.recorder.node,
            source: &self.source,
            destination: &self.destination,
            port: self.port,
            protocol: match self.protocol {
                Version::HTTP_2 => "HTTP/2",
                Version::HTTP_10 => "HTTP/1.0",
                _ => "HTTP/1.1",
            },
            method: self.method.as_str(),
            path: &self.path,
            route: self.route.as_deref(),
            rule: self.rule.as_deref(),
            backend: self.backend.as_ref(),
            attempts: self.attempts,
            status: self.status,
            grpc_status: self.grpc_status,
            bytes_received: self.bytes_received,
            outcome: self.outcome(),
            step: self.refusal.as_ref().map(|refusal| Reason::step(refusal.reason)),
            reason: Some(self.reason()).filter(|reason| !reason.is_empty()),
            detail: self.refusal.as_ref().map(ToString::to_string),
            view: self.view.as_deref(),
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
}
