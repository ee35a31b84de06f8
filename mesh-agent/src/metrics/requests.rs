//! Requests that have ended.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_core::{http::trace::TraceId, model::Name};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::{
    Direction,
    durations::{Both, Durations},
};

/// A name as the value of a label; empty for none. Not a text, as what is told of each request has several.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Named(pub Option<Name>);

impl EncodeLabelValue for Named {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        match &self.0 {
            Some(name) => name.as_str().encode(encoder),
            None => "".encode(encoder),
        }
    }
}

/// Labels of `nodemesh_requests_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// Outbound: decided where it comes from, by routes; inbound: where it arrives, by policies on requests.
    pub direction: Direction,
    /// The workload of this node: that asked, or that is asked, `namespace/name`.
    pub workload: Named,
    /// The service that it asked, `namespace/name`; empty where that is not known.
    pub service: Named,
    /// The route that it fell under, `KIND/namespace/name`; empty for none.
    pub route: Option<Arc<str>>,
    /// The service that it went to, `namespace/name`; empty for none.
    pub backend: Named,
    /// The answer's status; empty if there was none.
    pub status: Option<u16>,
    /// The status of a call of gRPC; empty where there is none.
    pub grpc_status: Option<u16>,
    /// Why it did not go well: a reason's label, `cut_short` if its answer did not come to its end; else empty.
    pub reason: &'static str,
}

/// Labels of `nodemesh_request_duration_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestTimeLabels {
    /// Which way, as in `nodemesh_requests_total`.
    pub direction: Direction,
    /// The workload of this node, `namespace/name`.
    pub workload: Named,
    /// The service that it asked, `namespace/name`; empty where that is not known.
    pub service: Named,
    /// The service that it went to, `namespace/name`; empty for none.
    pub backend: Named,
}

/// Labels of `nodemesh_request_attempts_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AttemptLabels {
    /// The workload of this node that asked, `namespace/name`.
    pub workload: Named,
    /// The service that it asked, `namespace/name`.
    pub service: Named,
    /// The service that the request went to in the end, `namespace/name`.
    pub backend: Named,
}

/// How a request ended, beside its labels.
#[derive(Debug)]
pub struct RequestEnd {
    /// At how many endpoints it was tried, one after the other.
    pub attempts: u32,
    /// From its head to the end of its answer.
    pub took: Duration,
    /// The trace that it is of, if that is recorded.
    pub trace: Option<TraceId>,
}

/// What the request before it has counted up, by the same connection: most have the same labels, and their counters need not be
/// looked for again.
#[derive(Debug, Default)]
pub struct Before(Mutex<Option<Found>>);

#[derive(Debug)]
struct Found {
    labels: RequestLabels,
    ended: Counter,
    /// `None` for one that nobody was asked for.
    attempts: Option<Counter>,
    took: Arc<Mutex<Both>>,
}

/// Their counters.
#[derive(Debug, Default)]
pub(super) struct Requests {
    ended: Family<RequestLabels, Counter>,
    attempts: Family<AttemptLabels, Counter>,
    took: Durations,
}

impl Requests {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "requests",
            "Requests that are read: of this node's workloads to services that have routes, and to workloads of which policies \
             say something of requests",
            self.ended.clone(),
        );
        registry.register_collector(Box::new(self.took.clone()));
        registry.register(
            "request_attempts",
            "Endpoints at which requests of this node's workloads were tried: more than requests that ended, where some \
             were made again",
            self.attempts.clone(),
        );
    }

    fn find(&self, labels: RequestLabels) -> Found {
        let RequestLabels { direction, workload, service, backend, .. } = labels.clone();
        let took = self.took.of(&RequestTimeLabels { direction, workload, service, backend });
        Found { ended: self.ended.get_or_create(&labels).clone(), attempts: None, took, labels }
    }

    fn attempts(&self, labels: &RequestLabels) -> Counter {
        let RequestLabels { workload, service, backend, .. } = labels.clone();
        self.attempts.get_or_create(&AttemptLabels { workload, service, backend }).clone()
    }
}

impl super::Metrics {
    /// A request ended.
    pub fn request_ended(&self, labels: RequestLabels, end: &RequestEnd, before: &Before) {
        let mut before = before.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match &mut *before {
            Some(found) if found.labels == labels => found,
            other => other.insert(self.requests.find(labels)),
        };
        found.ended.inc();
        if end.attempts > 0 {
            let Found { labels, attempts, .. } = found;
            let attempts = attempts.get_or_insert_with(|| self.requests.attempts(labels));
            attempts.inc_by(u64::from(end.attempts));
        }
        found.took.lock().unwrap_or_else(PoisonError::into_inner).observe(end.took, end.trace);
    }

    /// How many requests ended with these labels.
    pub fn requests(&self, labels: &RequestLabels) -> u64 {
        self.requests.ended.get_or_create(labels).get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn requests_of_a_connection_are_counted_by_what_each_of_them_is() {
        let (metrics, _) = Metrics::new();
        let named = |name| Named(Some(Name::new("shop", name)));
        let labels = |service, status| RequestLabels {
            direction: Direction::Outbound,
            workload: named("web"),
            service: named(service),
            route: None,
            backend: named(service),
            status: Some(status),
            grpc_status: None,
            reason: "",
        };
        let before = Before::default();
        let asked = [("pay", 200), ("pay", 200), ("pay", 503), ("cart", 503), ("pay", 200)];
        for (number, (service, status)) in asked.into_iter().enumerate() {
            let end = RequestEnd { attempts: number as u32, took: Duration::from_millis(1), trace: None };
            metrics.request_ended(labels(service, status), &end, &before);
        }
        let counts = [("pay", 200), ("pay", 503), ("cart", 503)];
        assert_eq!(counts.map(|(service, status)| metrics.requests(&labels(service, status))), [3, 1, 1]);
        let attempts = ["pay", "cart"].map(|service| metrics.requests.attempts(&labels(service, 200)).get());
        assert_eq!(attempts, [7, 3]);
    }
}
