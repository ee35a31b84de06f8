//! What Prometheus is shown: OpenMetrics' text, or, where it asks for them, Prometheus's own messages, which alone have native
//! histograms.

use std::fmt;

use prometheus_client::{
    encoding::{
        prometheus_protobuf::{
            self,
            prometheus_data_model::{Metric, MetricFamily},
        },
        text,
    },
    registry::Registry,
};
use prost::Message as _;

/// How metrics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0, which Prometheus reads as its own text.
    Text,
    /// Prometheus's messages, each after its length.
    Messages,
}

const MESSAGES: &str =
    "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited";

impl Format {
    /// What is wanted most, by `Accept` (RFC 9110, section 12.5.1): messages only where nothing textual is wanted more, or as much
    /// and before them.
    pub fn wanted(accept: &str) -> Self {
        let (mut messages, mut textual) = (0.0, 0.0);
        for one in accept.split(',') {
            let mut parts = one.split(';').map(|part| part.trim().to_ascii_lowercase());
            let kind = parts.next().unwrap_or_default();
            let (mut weight, mut ours, mut delimited) = (1.0, false, false);
            for part in parts {
                match part.split_once('=') {
                    Some(("q", value)) => weight = value.parse().unwrap_or(0.0),
                    Some(("proto", value)) => ours = value == "io.prometheus.client.metricfamily",
                    Some(("encoding", value)) => delimited = value == "delimited",
                    _ => {}
                }
            }
            match kind.as_str() {
                "application/vnd.google.protobuf" if ours && delimited && weight > textual => {
                    messages = f32::max(messages, weight);
                }
                "application/openmetrics-text" | "text/plain" => textual = f32::max(textual, weight),
                _ => {}
            }
        }
        if messages > 0.0 && messages >= textual { Self::Messages } else { Self::Text }
    }

    /// The `Content-Type` that says so.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Messages => MESSAGES,
        }
    }

    /// All that is registered.
    pub fn write(self, registry: &Registry) -> Result<Vec<u8>, fmt::Error> {
        match self {
            Self::Text => {
                let mut all = String::new();
                text::encode(&mut all, registry)?;
                Ok(all.into_bytes())
            }
            Self::Messages => {
                let mut all = vec![];
                for mut family in prometheus_protobuf::encode(registry)? {
                    join(&mut family);
                    family.encode_length_delimited(&mut all).map_err(|_| fmt::Error)?;
                }
                Ok(all)
            }
        }
    }
}

/// Makes one message of two that stand side by side and have the same labels: one with buckets of fixed bounds, then one with native
/// ones.
fn join(family: &mut MetricFamily) {
    family.metric.dedup_by(|native, classic| {
        let same = native.label == classic.label;
        same && is_native(native) && {
            let (Some(from), Some(to)) = (native.histogram.take(), classic.histogram.as_mut()) else {
                return false;
            };
            let bucket = std::mem::take(&mut to.bucket);
            *to = prometheus_protobuf::prometheus_data_model::Histogram { bucket, ..from };
            true
        }
    });
}

fn is_native(metric: &Metric) -> bool {
    metric.histogram.as_ref().is_some_and(|it| it.bucket.is_empty())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_core::http::trace::TraceId;

    use super::{super::*, *};

    #[track_caller]
    fn check(accept: &str, expected: Format) {
        assert_eq!(Format::wanted(accept), expected, "{accept}");
    }

    #[test]
    fn messages_are_for_who_wants_them_most() {
        let ours =
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
        check("", Format::Text);
        check("*/*", Format::Text);
        check("application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5,*/*;q=0.1", Format::Text);
        check(ours, Format::Messages);
        check(
            &format!("{ours},application/openmetrics-text;version=1.0.0;q=0.8,*/*;q=0.1"),
            Format::Messages,
        );
        check(&format!("{ours};q=0.5,application/openmetrics-text;version=1.0.0;q=0.8"), Format::Text);
        check(&format!("application/openmetrics-text;q=0.6, {ours};q=0.6"), Format::Text);
        check(&format!("{ours};q=0"), Format::Text);
        check(&format!("{ours};q=x"), Format::Text);
        check("application/vnd.google.protobuf;proto=other;encoding=delimited", Format::Text);
        check(
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text",
            Format::Text,
        );
    }

    fn took(metrics: &Metrics, service: &str, milliseconds: u64, trace: Option<u128>) {
        let named = |name: &str| Named(Some(name.parse().unwrap()));
        let labels = RequestTimeLabels {
            direction: Direction::Outbound,
            workload: named("shop/web"),
            service: named(service),
            backend: named(service),
        };
        metrics.request_took(&labels, Duration::from_millis(milliseconds), trace.map(TraceId::random));
    }

    #[test]
    fn a_text_has_the_trace_of_a_request_beside_its_bucket_and_no_native_buckets() {
        let (metrics, registry) = Metrics::new();
        took(&metrics, "shop/pay", 3, Some(0xabc));
        took(&metrics, "shop/pay", 30, None);
        let text = String::from_utf8(Format::Text.write(&registry).unwrap()).unwrap();
        let bucket = |bound| {
            let le = format!("_bucket{{le=\"{bound}\"");
            text.lines().find(|line| line.contains(&le)).unwrap_or_else(|| panic!("no {bound} in {text}"))
        };
        let traced = format!("}} 1 # {{trace_id=\"{:032x}\"}} 0.003 ", 0xabc);
        assert!(bucket("0.005").contains(&traced), "{}", bucket("0.005"));
        assert!(!bucket("0.05").contains('#'), "{}", bucket("0.05"));
        assert_eq!(text.matches("nodemesh_request_duration_seconds_count").count(), 1);
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn messages_have_both_kinds_of_buckets_in_one_and_their_traces() {
        let (metrics, registry) = Metrics::new();
        for service in ["shop/pay", "shop/db"] {
            took(&metrics, service, 3, Some(0xabc));
            took(&metrics, service, 30, None);
        }
        let written = Format::Messages.write(&registry).unwrap();
        let mut rest = &written[..];
        let mut families = vec![];
        while !rest.is_empty() {
            families.push(MetricFamily::decode_length_delimited(&mut rest).unwrap());
        }
        let durations = families.iter().find(|it| it.name == "nodemesh_request_duration_seconds").unwrap();
        assert_eq!(durations.metric.len(), 2, "one for each set of labels");
        for metric in &durations.metric {
            let histogram = metric.histogram.as_ref().unwrap();
            assert_eq!((histogram.sample_count, histogram.bucket.len()), (2, BUCKETS));
            // The first is an absolute count, each further one what it differs by.
            assert_eq!((histogram.positive_delta.as_slice(), histogram.schema), (&[1, 0][..], 3));
            let traces = histogram.bucket.iter().filter_map(|bucket| bucket.exemplar.as_ref());
            let values: Vec<f64> = traces.map(|it| it.value).collect();
            assert_eq!(values, [0.003]);
        }
        assert!(families.iter().any(|it| it.name == "nodemesh_access_log_dropped_total"));
    }

    /// Those of fixed bounds, and the one without.
    const BUCKETS: usize = 14;
}
