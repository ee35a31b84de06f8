//! What Prometheus is shown: OpenMetrics' text, or, where it asks for them, Prometheus's own messages, which alone have native
//! histograms. Whoever asks for neither is shown Prometheus's older text, which has no place for traces: its readers stop at one.

use std::fmt::{self, Write as _};

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
    /// Prometheus's text, version 0.0.4.
    Plain,
    /// OpenMetrics 1.0.
    Text,
    /// Prometheus's messages, each after its length.
    Messages,
}

const MESSAGES: &str =
    "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited";

impl Format {
    /// What is wanted most, by `Accept` (RFC 9110, section 12.5.1). OpenMetrics and messages are for who names them; of what is
    /// wanted as much as something else, messages are shown if they stand before it, and OpenMetrics rather than plain text.
    pub fn wanted(accept: &str) -> Self {
        let (mut messages, mut text, mut plain) = (0.0, 0.0, 0.0);
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
                "application/vnd.google.protobuf" if ours && delimited && weight > f32::max(text, plain) => {
                    messages = f32::max(messages, weight);
                }
                "application/openmetrics-text" => text = f32::max(text, weight),
                "text/plain" => plain = f32::max(plain, weight),
                _ => {}
            }
        }
        if messages > 0.0 && messages >= f32::max(text, plain) {
            Self::Messages
        } else if text > 0.0 && text >= plain {
            Self::Text
        } else {
            Self::Plain
        }
    }

    /// The `Content-Type` that says so.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Plain => "text/plain; version=0.0.4; charset=utf-8",
            Self::Text => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Messages => MESSAGES,
        }
    }

    /// All that is registered.
    pub fn write(self, registry: &Registry) -> Result<Vec<u8>, fmt::Error> {
        match self {
            Self::Plain | Self::Text => {
                let mut all = String::new();
                text::encode(&mut all, registry)?;
                Ok(if self == Self::Plain { plain(&all)? } else { all }.into_bytes())
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

/// OpenMetrics' text as Prometheus's older one: a family is named as its samples are, and no sample has a trace beside it.
fn plain(open: &str) -> Result<String, fmt::Error> {
    let mut all = String::with_capacity(open.len());
    let mut help = None;
    for line in open.lines() {
        // Of a family its HELP comes first, then its TYPE.
        if let Some(said) = line.strip_prefix("# HELP ") {
            help = said.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|said| said.split_once(' '))
        {
            let (ending, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                _ => ("", kind),
            };
            if let Some((_, help)) = help.take().filter(|(of, _)| *of == name) {
                writeln!(all, "# HELP {name}{ending} {help}")?;
            }
            writeln!(all, "# TYPE {name}{ending} {kind}")?;
        } else if !line.starts_with('#') {
            // No label's value looks so: a quotation mark in one has a backslash before it.
            let sample = line.split_once(TRACE).map_or(line, |(sample, _)| sample);
            writeln!(all, "{sample}")?;
        }
    }
    Ok(all)
}

/// How a trace beside a sample begins.
const TRACE: &str = " # {trace_id=\"";

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
        for anything in ["", "*/*", "text/html", "text/plain", "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"] {
            check(anything, Format::Plain);
        }
        check("application/openmetrics-text;q=0.1,text/plain", Format::Plain);
        check("application/openmetrics-text;q=0,*/*", Format::Plain);
        check("text/plain,application/openmetrics-text", Format::Text);
        check("application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5,*/*;q=0.1", Format::Text);
        check(ours, Format::Messages);
        check(
            &format!("{ours},application/openmetrics-text;version=1.0.0;q=0.8,*/*;q=0.1"),
            Format::Messages,
        );
        check(&format!("{ours};q=0.5,application/openmetrics-text;version=1.0.0;q=0.8"), Format::Text);
        check(&format!("application/openmetrics-text;q=0.6, {ours};q=0.6"), Format::Text);
        check(&format!("text/plain;q=0.6, {ours};q=0.6"), Format::Plain);
        check(&format!("{ours};q=0"), Format::Plain);
        check(&format!("{ours};q=x"), Format::Plain);
        check("application/vnd.google.protobuf;proto=other;encoding=delimited", Format::Plain);
        check(
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text",
            Format::Plain,
        );
    }

    fn took(metrics: &Metrics, service: &str, milliseconds: u64, trace: Option<u128>) {
        let named = |name: &str| Named(Some(name.parse().unwrap()));
        let labels = RequestLabels {
            direction: Direction::Outbound,
            workload: named("shop/web"),
            service: named(service),
            route: None,
            backend: named(service),
            status: Some(200),
            grpc_status: None,
            reason: "",
        };
        let (took, trace) = (Duration::from_millis(milliseconds), trace.map(TraceId::random));
        metrics.request_ended(labels, &RequestEnd { attempts: 0, took, trace }, &Before::default());
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
    fn who_asks_for_plain_text_is_shown_no_trace_and_families_that_are_named_as_their_samples() {
        let (metrics, registry) = Metrics::new();
        took(&metrics, "shop/pay", 3, Some(0xabc));
        let text = String::from_utf8(Format::Plain.write(&registry).unwrap()).unwrap();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(said) = line.strip_prefix("# ") {
                let (word, rest) = said.split_once(' ').unwrap();
                assert!(["HELP", "TYPE"].contains(&word), "{line}");
                family = rest.split(' ').next().unwrap().to_owned();
                continue;
            }
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let name = sample.split('{').next().unwrap();
            let ending = name.strip_prefix(&family).unwrap_or_else(|| panic!("{line} is not of {family}"));
            assert!(["", "_bucket", "_sum", "_count"].contains(&ending), "{line} is not of {family}");
            assert!(value.parse::<f64>().is_ok() && !sample.contains('#'), "{line}");
        }
        let bucket = "nodemesh_request_duration_seconds_bucket{le=\"0.005\",";
        assert!(text.lines().any(|line| line.starts_with(bucket) && line.ends_with("} 1")), "{text}");
        for said in [
            "# HELP nodemesh_access_log_dropped_total ",
            "# TYPE nodemesh_access_log_dropped_total counter\nnodemesh_access_log_dropped_total 0\n",
            "# TYPE nodemesh_request_duration_seconds histogram\n",
        ] {
            assert!(text.contains(said), "no {said} in {text}");
        }
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
