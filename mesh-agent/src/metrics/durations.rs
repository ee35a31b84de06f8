//! How long requests take: in buckets of fixed bounds, each with the trace of a request that fell into it, and in the finer
//! buckets of a native histogram.
//!
//! A collector of its own, as the library has traces beside the former buckets alone, and a text has no place for the latter.
//! Both are counted under one lock, so that neither is ever shown without the other.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use mesh_core::http::trace::TraceId;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder},
    metrics::{
        MetricType,
        exemplar::HistogramWithExemplars,
        histogram::{Histogram, NativeHistogramConfig},
    },
};

use super::RequestTimeLabels;

/// Without the registry's prefix.
const NAME: &str = "request_duration_seconds";
/// Upper bounds of what requests take, seconds: a millisecond to ten seconds.
const BOUNDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// By how much a native bucket's bounds differ, at most: a quantile is wrong by less than a tenth.
const GROWTH: f64 = 1.1;
/// Native buckets of one set of labels, at most: a range of one to a million at this growth. What is wider becomes coarser.
const MOST_NATIVE: usize = 160;

/// What is told of a request beside its bucket: where to look for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Seen {
    trace_id: Trace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Trace(TraceId);

impl EncodeLabelValue for Trace {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        fmt::Write::write_fmt(encoder, format_args!("{}", self.0))
    }
}

/// What requests with the same labels took.
#[derive(Debug)]
pub(super) struct Both {
    classic: HistogramWithExemplars<Seen>,
    native: Histogram,
}

impl Both {
    fn new() -> Self {
        let native = NativeHistogramConfig::with_bucket_factor(GROWTH).max_buckets(MOST_NATIVE);
        Self {
            classic: HistogramWithExemplars::new(BOUNDS.into_iter()),
            native: Histogram::new_native(native),
        }
    }

    /// A request took so long; of which trace it is, if that is recorded.
    pub(super) fn observe(&self, took: Duration, trace: Option<TraceId>) {
        let seconds = took.as_secs_f64();
        let seen = trace.map(|trace| Seen { trace_id: Trace(trace) });
        let at = trace.map(|_| SystemTime::now());
        self.classic.observe(seconds, seen, at);
        self.native.observe(seconds);
    }
}

/// By labels; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Durations(Arc<RwLock<HashMap<RequestTimeLabels, Arc<Mutex<Both>>>>>);

impl Durations {
    /// Those with these labels.
    pub(super) fn of(&self, labels: &RequestTimeLabels) -> Arc<Mutex<Both>> {
        if let Some(both) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(labels) {
            return both.clone();
        }
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.entry(labels.clone()).or_insert_with(|| Arc::new(Mutex::new(Both::new()))).clone()
    }
}

impl Collector for Durations {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if all.is_empty() {
            return Ok(());
        }
        let help = "From a request's head to the end of its answer";
        let mut encoder = encoder.encode_descriptor(NAME, help, None, MetricType::Histogram)?;
        for (labels, both) in &*all {
            let both = both.lock().unwrap_or_else(PoisonError::into_inner);
            both.classic.encode(encoder.encode_family(labels)?)?;
            // A text takes none, and says so before it has written anything; of a message the two become one afterwards.
            let _ = both.native.encode(encoder.encode_family(labels)?);
        }
        Ok(())
    }
}
