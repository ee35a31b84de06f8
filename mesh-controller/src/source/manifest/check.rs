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
        if found == Some(expected) {
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
        let valid = text.len() <= 253
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

    /// Labels of ours that the kind does not have.
    pub(super) fn our_labels(&mut self, labels: &BTreeMap<String, String>, known: &[&str]) {
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
