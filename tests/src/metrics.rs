//! Prometheus text, read: just enough to ask for a value by name and labels.

use std::collections::BTreeMap;

/// The samples of one scrape.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Debug, Clone, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads the text format; lines that are no samples are skipped.
    pub fn parse(text: &str) -> Self {
        Self { samples: text.lines().filter_map(sample).collect() }
    }

    /// The sum of all samples of this name that have these labels; 0 without any, as for a counter never touched.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).map(|sample| sample.value).sum()
    }

    /// The sum, or nothing if there is no such sample.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.find(name, labels).next().is_some().then(|| self.sum(name, labels))
    }

    fn find<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            sample.name == name
                && labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|v| v == value))
        })
    }
}

fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    // What stands behind is the trace of a request.
    let line = line.split_once(" # ").map_or(line, |(sample, _)| sample);
    let (series, rest) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, value) = rest.rsplit_once('}')?;
            ((name, labels), value)
        }
        None => {
            let (name, value) = line.split_once(' ')?;
            ((name, ""), value)
        }
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: series.0.to_owned(), labels: labels(series.1), value })
}

/// `a="x",b="y"`; values with quotes inside do not occur in bounded labels.
fn labels(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut rest = text;
    while let Some((key, after)) = rest.split_once("=\"") {
        let Some((value, after)) = after.split_once('"') else { break };
        found.insert(key.trim_start_matches(',').trim().to_owned(), value.to_owned());
        rest = after;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_some_labels() {
        let text = "# HELP x y\n# TYPE x counter\nx_total{a=\"1\",b=\"p,q\"} 3\nx_total{a=\"2\",b=\"r\"} 4 1700\ny 0.5 # {trace_id=\"7\"} 0.4 9.0\n# EOF\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.sum("x_total", &[]), 7.0);
        assert_eq!(metrics.sum("x_total", &[("b", "p,q")]), 3.0);
        assert_eq!(metrics.get("x_total", &[("a", "3")]), None);
        assert_eq!(metrics.get("y", &[]), Some(0.5));
    }
}
