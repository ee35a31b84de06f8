//! The span of a request, by OpenTelemetry's conventions for HTTP and RPC: a client's where it comes from, a server's where it
//! arrives. What the mesh alone knows is in attributes that begin with `nodemesh.`.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, Method, Uri, Version, header};
use mesh_core::{
    http::trace::{self, Place},
    model::{Endpoint, Name},
};

use super::{super::heads, Ends, Told};
use crate::{
    metrics::Direction,
    spans::{
        Whose,
        otlp::{self, Event, KeyValue, attribute},
    },
};

/// Most attempts that are told of a request; how many more there were is said.
const MOST_EVENTS: usize = 32;
/// Longest host that is told, bytes.
const MAX_HOST: usize = 255;

/// A request's place in its trace, and what only its span tells.
#[derive(Debug)]
pub(super) struct Traced {
    pub(super) place: Place,
    /// The workload that it is of; none where it is not recorded.
    whose: Option<Whose>,
    host: String,
    is_call: bool,
    events: Vec<Event>,
    dropped_events: u32,
}

impl Traced {
    pub(super) fn begin<B>(said: &trace::Said, ends: &Ends, request: &http::Request<B>) -> Option<Self> {
        let spans = ends.recorder.spans.as_ref()?;
        let place = trace::place(said, spans.share(), || (rand::random(), rand::random()))?;
        let own = match ends.direction {
            Direction::Outbound => &ends.source,
            Direction::Inbound => &ends.destination,
        };
        let whose = own.workload.clone().filter(|_| place.sampled).map(|name| spans.whose(name));
        let host = host(request.uri(), request.headers()).unwrap_or_default();
        let is_call = heads::is_grpc(request.headers());
        Some(Self { place, whose, host, is_call, events: vec![], dropped_events: 0 })
    }

    /// An attempt has ended: with this status, or without one, for this reason.
    pub(super) fn tried(&mut self, attempt: u32, endpoint: &Endpoint, ended: Result<u16, &'static str>) {
        if !self.place.sampled {
            return;
        }
        if self.events.len() >= MOST_EVENTS {
            self.dropped_events += 1;
            return;
        }
        let mut attributes = vec![
            attribute("nodemesh.attempt", attempt),
            attribute("network.peer.address", endpoint.address.to_string()),
            attribute("network.peer.port", endpoint.port),
        ];
        if let Some(workload) = &endpoint.workload {
            attributes.push(attribute("nodemesh.destination.workload", workload.to_string()));
        }
        attributes.push(match ended {
            Ok(status) => attribute("http.response.status_code", status),
            Err(why) => attribute("error.type", why),
        });
        let (time, name) = (nanoseconds(SystemTime::now()), "nodemesh.attempt".to_owned());
        self.events.push(Event { time, name, attributes });
    }
}

fn host(uri: &Uri, headers: &HeaderMap) -> Option<String> {
    let named =
        headers.get(header::HOST).and_then(|host| host.to_str().ok()?.parse::<http::uri::Authority>().ok());
    let host = uri.host().or_else(|| named.as_ref().map(|it| it.host()))?;
    (host.len() <= MAX_HOST).then(|| host.to_owned())
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl Told {
    /// Its span, if it is recorded.
    pub(super) fn span(&mut self, took: Duration) -> Option<(Whose, otlp::Span)> {
        let mut traced = self.traced.take().filter(|traced| traced.place.sampled)?;
        let whose = traced.whose.take()?;
        let place = traced.place;
        let client = self.ends.direction == Direction::Outbound;
        let failed = self.error(client, traced.is_call);
        let mut attributes = vec![
            attribute("url.scheme", "http"),
            attribute("url.path", self.path.as_str()),
            attribute("network.protocol.name", "http"),
            attribute("network.protocol.version", version(self.protocol)),
            attribute("server.port", self.ends.port),
        ];
        if !traced.host.is_empty() {
            attributes.push(attribute("server.address", std::mem::take(&mut traced.host)));
        }
        let name = self.names(traced.is_call, &mut attributes);
        if let Some(status) = self.status {
            attributes.push(attribute("http.response.status_code", status));
        }
        if self.attempts > 1 {
            attributes.push(attribute("http.request.resend_count", self.attempts - 1));
        }
        self.ends_of(client, &mut attributes);
        if let Some(failed) = &failed {
            attributes.push(attribute("error.type", failed.as_str()));
        }
        if let Some(refusal) = &self.refusal {
            attributes.push(attribute("nodemesh.refusal.reason", refusal.reason.label()));
        }
        let start = nanoseconds(self.time);
        let remote = place.parent.map_or(0, |_| otlp::REMOTE);
        let span = otlp::Span {
            trace_id: place.trace.to_bytes().to_vec(),
            span_id: place.span.to_bytes().to_vec(),
            parent_span_id: place.parent.map(|parent| parent.to_bytes().to_vec()).unwrap_or_default(),
            name,
            kind: if client { otlp::CLIENT } else { otlp::SERVER },
            start,
            end: start.saturating_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)),
            attributes,
            events: traced.events,
            dropped_events: traced.dropped_events,
            status: failed
                .map(|_| otlp::Status { message: self.detail().unwrap_or_default(), code: otlp::ERROR }),
            flags: u32::from(place.flags) | otlp::REMOTE_KNOWN | remote,
        };
        Some((whose, span))
    }

    /// What it is called, and by what attributes.
    fn names(&self, is_call: bool, attributes: &mut Vec<KeyValue>) -> String {
        let known = [
            Method::GET,
            Method::HEAD,
            Method::POST,
            Method::PUT,
            Method::DELETE,
            Method::CONNECT,
            Method::OPTIONS,
            Method::TRACE,
            Method::PATCH,
        ]
        .contains(&self.method);
        if known {
            attributes.push(attribute("http.request.method", self.method.as_str()));
        } else {
            attributes.push(attribute("http.request.method", "_OTHER"));
            attributes.push(attribute("http.request.method_original", self.method.as_str()));
        }
        if !is_call {
            // A path may be anything, and spans of one name are told together.
            return if known { self.method.to_string() } else { "HTTP".to_owned() };
        }
        let method = self.path.trim_start_matches('/').to_owned();
        attributes.push(attribute("rpc.system.name", "grpc"));
        attributes.push(attribute("rpc.method", method.as_str()));
        if let Some(status) = self.grpc_status {
            attributes.push(attribute("rpc.response.status_code", call_status(status)));
        }
        method
    }

    /// Between whom it was.
    fn ends_of(&self, client: bool, attributes: &mut Vec<KeyValue>) {
        let (source, destination) = (&self.ends.source, &self.ends.destination);
        let peer: Option<SocketAddr> = if client { destination.address } else { source.address };
        if let Some(peer) = peer {
            attributes.push(attribute("network.peer.address", peer.ip().to_string()));
            attributes.push(attribute("network.peer.port", peer.port()));
        }
        if let Some(address) = source.address.filter(|_| !client) {
            attributes.push(attribute("client.address", address.ip().to_string()));
        }
        let names: [(&str, &Option<Name>); 4] = [
            ("nodemesh.source.workload", &source.workload),
            ("nodemesh.destination.workload", &destination.workload),
            ("nodemesh.destination.service", &destination.service),
            ("nodemesh.backend", &self.backend),
        ];
        for (key, name) in names {
            attributes.extend(name.as_ref().map(|name| attribute(key, name.to_string())));
        }
        if let Some(identity) = &source.identity {
            attributes.push(attribute("nodemesh.source.identity", identity.to_string()));
        }
        for (key, text) in [("nodemesh.route", &self.route), ("nodemesh.rule", &self.rule)] {
            attributes.extend(text.as_deref().map(|text| attribute(key, text)));
        }
    }

    /// What went wrong, in a word: to a client all that it did not want, to a server what is its own fault.
    fn error(&self, client: bool, is_call: bool) -> Option<String> {
        let reason = self.reason();
        if !reason.is_empty() {
            return Some(reason.to_owned());
        }
        if let Some(status) = self.grpc_status.filter(|_| is_call) {
            let own = matches!(status, 2 | 4 | 12 | 13 | 14 | 15);
            return (own || client && status != 0).then(|| call_status(status).to_owned());
        }
        let from = if client { 400 } else { 500 };
        self.status.filter(|status| *status >= from).map(|status| status.to_string())
    }
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "2",
        Version::HTTP_10 => "1.0",
        _ => "1.1",
    }
}

/// The name of a status of gRPC ("Status codes and their use in gRPC").
fn call_status(status: u16) -> &'static str {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    NAMES.get(usize::from(status)).copied().unwrap_or("UNKNOWN")
}
