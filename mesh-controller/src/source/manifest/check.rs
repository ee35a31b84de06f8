//! What is checked the same way in every kind: names, labels, addresses, ports, lengths.
//!
//! Stands apart so that each kind's file only says what is special about it.

use std::{collections::BTreeMap, net::IpAddr};

use mesh_core::model::Name;

use super::{
    super::{
        Problem,
        document::{Node, one_of},
    },
    RawMetadata,
};
use crate::model::Kind;

/// Labels with this prefix are ours: one that is not known is a mistake.
const OUR_PREFIX: &str = "nodemesh.io/";
/// Most addresses of a workload or a service; what a pod or a dual-stack service has is two.
const MAX_ADDRESSES: usize = 16;
/// Longest name: a DNS subdomain's (RFC 1123).
pub(super) const MAX_NAME: usize = 253;
/// Longest value of a label, and longest name within its key (Kubernetes, "Labels and Selectors").
pub(super) const MAX_LABEL: usize = 63;
/// Most labels of an object or a selector, so that one object cannot fill every node.
const MAX_LABELS: usize = 256;
/// Most entries of any list in a policy or of a service's ports, so that one object cannot fill every node.
pub(super) const MAX_ENTRIES: usize = 1024;

/// Gathers everything that is wrong with one document, so that it is corrected in one go.
pub(super) struct Check<'a> {
    pub(super) tree: &'a Node,
    pub(super) problems: Vec<Problem>,
}

impl Check<'_> {
    pub(super) fn problem(&mut self, field: &str, reason: impl Into<String>, cure: impl Into<String>) {
        let line = self.tree.line_of(field);
        self.problems.push(Problem {
            line,
            field: field.to_owned(),
            reason: reason.into(),
            cure: cure.into(),
        });
    }

    pub(super) fn api_version(&self, kind: Kind) -> Result<(), Problem> {
        let expected = kind.api_version();
        let found = self.tree.text(&["apiVersion"]);
        if found.is_some_and(|it| kind.api_versions().any(|version| version == it)) {
            return Ok(());
        }
        Err(Problem {
            line: self.tree.line_of("apiVersion"),
            field: "apiVersion".into(),
            reason: found.map_or("this field is missing".into(), |it| format!("a {kind} is not of '{it}'")),
            cure: format!("write apiVersion: {expected}"),
        })
    }

    pub(super) fn namespaced(&mut self, metadata: &RawMetadata) -> Name {
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        self.name("metadata.namespace", namespace);
        self.name("metadata.name", &metadata.name);
        Name::new(namespace, &metadata.name)
    }

    /// What Kubernetes calls a DNS subdomain (RFC 1123): also what an identity's path may hold.
    pub(super) fn name(&mut self, field: &str, text: &str) {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        let ends = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let valid = text.len() <= MAX_NAME
            && text.chars().all(inner)
            && text.chars().next().is_some_and(ends)
            && text.chars().next_back().is_some_and(ends);
        if !valid {
            let shown: String = text.chars().take(100).collect();
            self.problem(
                field,
                format!("'{shown}' is not a name"),
                "use 1 to 253 of a-z, 0-9, '-' and '.', with a letter or digit at both ends",
            );
        }
    }

    /// The labels of a selector or of an object, as Kubernetes restricts them.
    pub(super) fn labels(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        self.limit(field, labels.len(), MAX_LABELS);
        for (key, value) in labels {
            let at = format!("{field}.{key}");
            self.label_key(&at, key);
            self.label_value(&at, value);
        }
    }

    /// A label's key: a name, after a domain and `/` where it has one.
    pub(super) fn label_key(&mut self, at: &str, key: &str) {
        let (prefix, name) = key.rsplit_once('/').unwrap_or(("a", key));
        if !is_label_word(name) || prefix.is_empty() || prefix.len() > MAX_NAME {
            self.problem(
                at,
                format!("'{}' is not a label's key", key.chars().take(100).collect::<String>()),
                "use up to 63 letters, digits, '-', '_' and '.', after a domain and '/' where it has one",
            );
        }
    }

    /// A label's value, which may be empty.
    pub(super) fn label_value(&mut self, at: &str, value: &str) {
        if !value.is_empty() && !is_label_word(value) {
            self.problem(
                at,
                format!("'{}' is not a label's value", value.chars().take(100).collect::<String>()),
                "use up to 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends",
            );
        }
    }

    /// Labels of ours that the kind does not have.
    pub(super) fn our_labels(&mut self, labels: &BTreeMap<String, String>, known: &[&str]) {
        self.labels("metadata.labels", labels);
        for label in labels.keys().filter(|label| label.starts_with(OUR_PREFIX)) {
            if !known.contains(&label.as_str()) {
                self.problem(
                    &format!("metadata.labels.{label}"),
                    format!("the label '{label}' means nothing here"),
                    one_of(label, known),
                );
            }
        }
    }

    pub(super) fn addresses(&mut self, field: &str, texts: &[String]) -> Vec<IpAddr> {
        self.limit(field, texts.len(), MAX_ADDRESSES);
        let mut addresses = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            let field = format!("{field}[{index}]");
            let Some(address) = self.address(&field, text) else { continue };
            if addresses.contains(&address) {
                self.problem(&field, format!("{address} stands here twice"), "remove one of them");
            }
            addresses.push(address);
        }
        addresses
    }

    pub(super) fn address(&mut self, field: &str, text: &str) -> Option<IpAddr> {
        let Ok(address) = text.parse::<IpAddr>() else {
            let shown: String = text.chars().take(100).collect();
            let cure =
                "write an IPv4 or IPv6 address, such as 10.1.0.11 or fd01::11, without a prefix length";
            self.problem(field, format!("'{shown}' is not an address"), cure);
            return None;
        };
        let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        if mapped || address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            self.problem(
                field,
                format!("{address} is not an address that others can connect to"),
                "write the unicast address that it has on its node",
            );
            return None;
        }
        Some(address)
    }

    pub(super) fn port(&mut self, field: &str, port: u16) {
        if port == 0 {
            self.problem(field, "0 is not a port", "write a number from 1 to 65535");
        }
    }

    pub(super) fn limit(&mut self, field: &str, len: usize, max: usize) {
        if len > max {
            let cure = format!("split it: at most {max} are taken");
            self.problem(field, format!("{len} entries are too many"), cure);
        }
    }
}

fn is_label_word(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let chars = || text.chars();
    text.len() <= MAX_LABEL && chars().all(inner) && ends(chars().next()) && ends(chars().next_back())
}
