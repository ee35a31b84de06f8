//! What rules and dashboards ask Prometheus for: whether the metrics and labels that an expression names are there.
//!
//! The metrics are those of docs/reference, which the programs' own tests hold to what they print. Prometheus itself says
//! whether an expression is one; a name that nobody has is none of its errors, and finds nothing for ever.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};

/// Labels that Prometheus gives to what it reads.
const OF_TARGETS: [&str; 2] = ["job", "instance"];
/// What Prometheus makes of a target by itself.
const UP: &str = "up";
/// Words before labels in parentheses.
const GROUPING: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];

/// Metrics, each with its labels.
#[derive(Debug, Clone, Default)]
pub struct Known(BTreeMap<String, BTreeSet<String>>);

impl Known {
    /// Those of the tables of docs/reference: agent's, controller's.
    pub fn of_reference(pages: &[&str]) -> Result<Self> {
        let mut known = Self::default();
        known.0.insert(UP.to_owned(), BTreeSet::new());
        for row in pages.iter().flat_map(|page| page.lines()).filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = row.split(" | ").collect();
            let name = cells[0].trim_matches(['|', ' ', '`']);
            let labels = cells.get(2).with_context(|| format!("no labels in {row}"))?;
            let labels = labels.split(',').map(|it| it.trim_matches([' ', '`', '|']).to_owned());
            known.0.entry(name.to_owned()).or_default().extend(labels.filter(|it| !it.is_empty()));
        }
        ensure!(known.0.len() > 40, "the reference has {} metrics only", known.0.len());
        Ok(known)
    }

    /// Adds what a rule records by these labels.
    pub fn record(&mut self, name: &str, labels: &[&str]) {
        self.0.insert(name.to_owned(), labels.iter().map(ToString::to_string).collect());
    }

    /// Whether there is such a metric.
    pub fn has(&self, metric: &str) -> bool {
        self.0.contains_key(metric)
    }

    /// Everything that an expression names and nobody has.
    pub fn missing_from(&self, expression: &str) -> Vec<String> {
        let named = Named::of(expression);
        let mut missing = vec![];
        let mut all: BTreeSet<&str> = OF_TARGETS.into();
        for (metric, labels) in &named.metrics {
            let Some(has) = self.0.get(metric) else {
                missing.push(metric.clone());
                continue;
            };
            all.extend(has.iter().map(String::as_str));
            let there = |label: &&String| has.contains(*label) || OF_TARGETS.contains(&label.as_str());
            missing.extend(labels.iter().filter(|label| !there(label)).map(|it| format!("{metric}{{{it}}}")));
        }
        if named.metrics.is_empty() && !expression.starts_with("vector(") {
            missing.push("any metric".to_owned());
        }
        missing.extend(named.grouped.into_iter().filter(|label| !all.contains(label.as_str())));
        missing
    }
}

/// What an expression names.
#[derive(Debug, Default, PartialEq)]
struct Named {
    /// Metrics, each with the labels that it is selected by.
    metrics: Vec<(String, Vec<String>)>,
    /// Labels that are grouped or matched by.
    grouped: Vec<String>,
}

impl Named {
    fn of(expression: &str) -> Self {
        let mut named = Self::default();
        let mut rest = without_strings(expression);
        while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || c == '_' || c.is_ascii_digit())
        {
            let word = word(&rest[start..]);
            let after = rest[start + word.len()..].trim_start().to_owned();
            let grouping = GROUPING.contains(&word.as_str());
            if let Some(list) = after.strip_prefix('(').filter(|_| grouping) {
                let (inside, left) = list.split_once(')').unwrap_or((list, ""));
                named.grouped.extend(words(inside));
                rest = left.to_owned();
            } else if let Some(matchers) = after.strip_prefix('{') {
                let (inside, left) = matchers.split_once('}').unwrap_or((matchers, ""));
                let labels = inside.split(',').filter_map(|matcher| words(matcher).into_iter().next());
                named.metrics.push((word, labels.collect()));
                rest = left.to_owned();
            } else {
                if word.starts_with("nodemesh_") || word.contains(':') || word == UP {
                    named.metrics.push((word, vec![]));
                }
                rest = after;
            }
        }
        named
    }
}

/// Strings emptied, durations in brackets left out.
fn without_strings(expression: &str) -> String {
    let outside = expression.split('"').step_by(2).collect::<Vec<_>>().join("\"\"");
    outside.split('[').map(|part| part.split_once(']').map_or(part, |(_, rest)| rest)).collect()
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | ':')).collect()
}

fn words(text: &str) -> Vec<String> {
    let separate = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    text.split(separate).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        let mut known = Known::default();
        known.record("nodemesh_x_total", &["reason", "service"]);
        known.record("service:nodemesh_x:rate5m", &["service"]);
        known.record(UP, &[]);
        known
    }

    #[test]
    fn what_an_expression_names_is_there() {
        for expression in [
            "vector(0.001)",
            r#"sum by (service, instance) (rate(nodemesh_x_total{reason=~"a,b{c}|d", job="agent"}[5m])) > 0.1"#,
            "service:nodemesh_x:rate5m / on (service) group_left () sum(nodemesh_x_total) by (service) * 3600",
            "up == 0 and on (job, instance) last_over_time(nodemesh_x_total[1d])",
            "nodemesh_x_total unless last_over_time(nodemesh_x_total[1h] offset 10m)",
        ] {
            assert_eq!(known().missing_from(expression), Vec::<String>::new(), "{expression}");
        }
    }

    #[test]
    fn what_nobody_has_is_named() {
        for (expression, missing) in [
            ("rate(nodemesh_y_total[5m])", "nodemesh_y_total"),
            (r#"nodemesh_x_total{rason="a"}"#, "nodemesh_x_total{rason}"),
            ("sum by (servise) (nodemesh_x_total)", "servise"),
            (r#"other{a="b"}"#, "other"),
            ("1 + 2", "any metric"),
            ("service:nodemesh_x:rate7m", "service:nodemesh_x:rate7m"),
        ] {
            assert_eq!(known().missing_from(expression), [missing], "{expression}");
        }
    }

    #[test]
    fn the_reference_is_read_with_its_labels() {
        let pages = [
            include_str!("../../docs/reference/metrics-agent.md"),
            include_str!("../../docs/reference/metrics-controller.md"),
        ];
        let known = Known::of_reference(&pages).unwrap();
        assert!(known.has("nodemesh_documents") && known.has("nodemesh_open_files"));
        assert_eq!(known.missing_from(r#"nodemesh_limit_hits_total{limit="joins"}"#), Vec::<String>::new());
        assert_eq!(known.missing_from(r#"nodemesh_open_files{le="1"}"#), ["nodemesh_open_files{le}"]);
    }
}
