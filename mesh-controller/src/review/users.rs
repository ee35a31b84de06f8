//! Policies on end users that nobody enforces, that reach further than they look, or that let nobody in; and claims that nobody
//! verifies.

use std::{collections::BTreeSet, sync::Arc};

use mesh_core::model::{Authentication, Policy, PortRange, Workload};

use super::Review;
use crate::model::{Kind, ObjectKey};

impl Review<'_> {
    pub(super) fn users(&mut self, policy: &Authentication) {
        let key = ObjectKey { kind: Kind::AuthenticationPolicy, name: policy.name.clone() };
        let all = self.workloads_of(&policy.name.namespace);
        let selected: Vec<Arc<Workload>> = all.iter().filter(|it| policy.selects(it)).cloned().collect();
        if selected.is_empty() {
            let cure = super::selector_cure(&policy.selector.labels, all);
            self.warn(&key, "spec.selector", "it selects no workload of its namespace", cure);
        }
        if policy.ports.is_empty() && policy.is_enforced() {
            self.warn(
                &key,
                "spec",
                "it names no port: what is no HTTP is refused at every port",
                "name those that speak HTTP: ports: [8080]",
            );
        }
        let issuers = |of: &Authentication| -> BTreeSet<String> {
            of.issuers.iter().map(|issuer| issuer.issuer.clone()).collect()
        };
        let shares_a_port = |other: &Authentication| {
            let meets = |ranges: &[PortRange], of: &Authentication| {
                ranges.iter().any(|it| of.has_port(it.first()) || of.has_port(it.last()))
            };
            (policy.ports.is_empty() && other.ports.is_empty())
                || meets(&policy.ports, other)
                || meets(&other.ports, policy)
        };
        let apart = self.model.authentications.values().find(|other| {
            other.name > policy.name
                && other.is_enforced()
                && policy.is_enforced()
                && selected.iter().any(|workload| other.selects(workload))
                && shares_a_port(other)
                && issuers(other).is_disjoint(&issuers(policy))
        });
        if let Some(other) = apart.cloned() {
            let reason = format!(
                "no token is of an issuer of this policy and of {} too, and both have to be content",
                other.name
            );
            self.warn(&key, "spec.issuers", reason, "name all issuers in one policy");
        }
    }

    /// Rules on claims of workloads whose requests' tokens nobody verifies.
    pub(super) fn claims_of_nobody(&mut self, key: &ObjectKey, policy: &Policy, selected: &[Arc<Workload>]) {
        let model = self.model;
        let verified = |workload: &Arc<Workload>| {
            model.authentications.values().any(|it| it.is_enforced() && it.selects(workload))
        };
        let Some(workload) = selected.iter().find(|workload| !verified(workload)) else { return };
        for (rule, place) in policy.rules.iter().zip(0..) {
            for (target, to) in rule.to.iter().zip(0..) {
                if target.any_of.claims.is_empty() && target.none_of.claims.is_empty() {
                    continue;
                }
                let reason = format!(
                    "no AuthenticationPolicy verifies tokens for {}, so nobody's claims are known there",
                    workload.name
                );
                let cure = "write one for it, or take the claims out of the rule";
                self.warn(key, &format!("spec.rules[{place}].to[{to}]"), reason, cure);
            }
        }
    }
}
