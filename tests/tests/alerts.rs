//! The alert rules that we ship are rules, and name metrics that exist.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::BTreeSet;

use serde_json::Value;

const RULES: &str = include_str!("../../deploy/alerts/nodemesh.yaml");
const FAULTS: &str = include_str!("../../docs/operate/faults.md");

/// Every metric of agent and controller, those with labels touched once so that they print.
fn metrics() -> String {
    let (agent, registry) = mesh_agent::metrics::Metrics::new();
    agent.certificate_expiry("spiffe://td/ns/a/sa/b", Some(1.0));
    agent.kernel_map("kernel_map_destinations", 1, 2);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let controller = mesh_controller::metrics::Metrics::default();
    let state = mesh_controller::metrics::DocumentState::refused;
    controller.documents.get_or_create(&mesh_controller::metrics::DocumentLabels { state }).set(0);
    controller.roots([("ab".to_owned(), std::time::SystemTime::now())].into_iter());
    text + &controller.text()
}

/// Names of metrics in a text.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("nodemesh_")).map(str::to_owned).collect()
}

#[test]
fn every_alert_names_metrics_that_exist_and_says_what_it_means() {
    let rules: Value = serde_saphyr::from_str(RULES).unwrap();
    let rules = rules["groups"][0]["rules"].as_array().unwrap().clone();
    assert!(rules.len() >= 10);
    let text = metrics();
    let samples: BTreeSet<&str> = text.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    for rule in rules {
        let name = rule["alert"].as_str().unwrap();
        assert!(
            rule["annotations"]["summary"].is_string() && rule["labels"]["severity"].is_string(),
            "{name}"
        );
        let used = named(rule["expr"].as_str().unwrap());
        assert!(!used.is_empty(), "{name}");
        for metric in used {
            assert!(samples.contains(metric.as_str()), "{name} uses {metric}, which nobody has");
        }
    }
}

#[test]
fn every_metric_of_the_documented_faults_exists() {
    let text = metrics();
    for metric in named(FAULTS) {
        assert!(text.contains(&format!("\n{metric}")), "docs/operate/faults.md names {metric}");
    }
}
