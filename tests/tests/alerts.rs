//! The rules that we ship are rules, name metrics and labels that exist, and do what they say: by Prometheus's own tool.
//!
//! What they do on a real mesh is in `prometheus.rs`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use mesh_tests::{prometheus::promtool, promql::Known};
use serde_json::Value;

const RULES: &str = include_str!("../../deploy/alerts/nodemesh.yaml");
const TESTS: [(&str, &str); 2] = [
    ("nodemesh_test.yaml", include_str!("../../deploy/alerts/nodemesh_test.yaml")),
    ("nodemesh_days_test.yaml", include_str!("../../deploy/alerts/nodemesh_days_test.yaml")),
];
const OBSERVE: &str = include_str!("../../docs/operate/observe.md");
const FAULTS: &str = include_str!("../../docs/operate/faults.md");

fn known() -> Known {
    let agent = include_str!("../../docs/reference/metrics-agent.md");
    let controller = include_str!("../../docs/reference/metrics-controller.md");
    Known::of_reference(&[agent, controller]).unwrap()
}

/// The rules of all groups, in order.
fn rules() -> Vec<Value> {
    let all: Value = serde_saphyr::from_str(RULES).unwrap();
    let groups = all["groups"].as_array().unwrap();
    groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

fn alerts() -> BTreeSet<String> {
    rules().iter().filter_map(|rule| rule["alert"].as_str().map(str::to_owned)).collect()
}

#[test]
fn every_rule_names_what_exists_and_every_alert_says_what_it_means() {
    let mut known = known();
    let rules = rules();
    for rule in rules.iter().filter(|rule| rule["record"].is_string()) {
        let name = rule["record"].as_str().unwrap();
        let by: &[&str] = if name.starts_with("service:") { &["service"] } else { &[] };
        known.record(name, by);
    }
    for rule in &rules {
        let name = rule["alert"].as_str().or(rule["record"].as_str()).unwrap();
        let missing = known.missing_from(rule["expr"].as_str().unwrap());
        assert!(missing.is_empty(), "{name} uses what nobody has: {missing:?}");
        let told = rule["annotations"]["summary"].is_string() && rule["labels"]["severity"].is_string();
        assert!(told || rule["record"].is_string(), "{name}");
    }
    assert_eq!(alerts().len(), rules.iter().filter(|rule| rule["alert"].is_string()).count(), "names differ");
}

#[test]
fn every_alert_is_tested_to_fire_and_not_to() {
    let mut looked: BTreeMap<String, (u32, u32)> = BTreeMap::new();
    for (file, text) in TESTS {
        let all: Value = serde_saphyr::from_str(text).unwrap();
        for group in all["tests"].as_array().unwrap() {
            for look in group["promql_expr_test"].as_array().into_iter().flatten() {
                let alert = group["name"].as_str().unwrap();
                let expression = look["expr"].as_str().unwrap();
                assert!(expression.contains(&format!("alertname=\"{alert}\"")), "{file}: {expression}");
                let (fires, silent) = looked.entry(alert.to_owned()).or_default();
                let expected = look["exp_samples"].as_array().is_some_and(|it| !it.is_empty());
                *if expected { fires } else { silent } += 1;
            }
        }
    }
    for alert in alerts() {
        let (fires, silent) = looked.remove(&alert).unwrap_or_default();
        assert!(
            fires > 0 && silent > 0,
            "{alert} is tested to fire {fires} times, and not to {silent} times"
        );
    }
    assert!(looked.is_empty(), "no such alerts: {looked:?}");
}

#[test]
fn prometheus_takes_the_rules_and_finds_that_they_do_what_their_tests_say() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/alerts");
    let said = promtool(&directory, &["check", "rules", "nodemesh.yaml"]).unwrap();
    assert!(said.contains(&format!("{} rules found", rules().len())), "{said}");
    let files = TESTS.map(|(file, _)| file);
    promtool(&directory, &[&["test", "rules"], &files[..]].concat()).unwrap();
}

#[test]
fn the_pages_name_metrics_that_exist_and_every_alert() {
    let known = known();
    for (page, text) in [("faults.md", FAULTS), ("observe.md", OBSERVE)] {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for metric in words.filter(|word| word.starts_with("nodemesh_") && *word != "nodemesh_test") {
            // A native histogram has its name without more to it.
            let is_there = known.has(metric) || known.has(&format!("{metric}_bucket"));
            assert!(is_there, "docs/operate/{page} names {metric}");
        }
    }
    let named = OBSERVE.split('`').filter(|word| word.starts_with("Nodemesh")).map(str::to_owned);
    assert_eq!(named.collect::<BTreeSet<_>>(), alerts(), "in docs/operate/observe.md, and in the rules");
}

#[test]
fn prometheus_takes_the_configurations_of_the_page() {
    let directory = tempfile::tempdir().unwrap();
    let blocks: Vec<&str> =
        OBSERVE.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(blocks.len(), 2);
    for block in blocks {
        // Debian's Prometheus knows no Kubernetes.
        let found_by = "kubernetes_sd_configs: [{role: pod, namespaces: {names: [nodemesh-system]}}]";
        let block = block.replace(found_by, "static_configs: []");
        fs::write(directory.path().join("prometheus.yml"), block).unwrap();
        promtool(directory.path(), &["check", "config", "prometheus.yml"]).unwrap();
    }
}
