//! What becomes of spans.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// Labels of `nodemesh_spans_dropped_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SpanLabels {
    /// `queue`: too many waited; `collector`: it did not want them.
    pub why: &'static str,
}

/// Its counters.
#[derive(Debug, Default)]
pub(super) struct Spans {
    exported: Counter,
    dropped: Family<SpanLabels, Counter>,
}

impl Spans {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("spans_exported", "Spans that the collector has taken", self.exported.clone());
        registry.register(
            "spans_dropped",
            "Spans that the collector has not: too many waited, or it refused them",
            self.dropped.clone(),
        );
    }
}

impl super::Metrics {
    /// The collector has taken spans.
    pub fn spans_exported(&self, count: u64) {
        self.spans.exported.inc_by(count);
    }

    /// Spans are lost.
    pub fn spans_dropped(&self, why: &'static str, count: u64) {
        self.spans.dropped.get_or_create(&SpanLabels { why }).inc_by(count);
    }

    /// How many.
    pub fn spans_lost(&self, why: &'static str) -> u64 {
        self.spans.dropped.get_or_create(&SpanLabels { why }).get()
    }
}
