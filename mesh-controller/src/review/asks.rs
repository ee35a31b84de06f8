//! Rules on requests that reach further than they look.

use mesh_core::model::Policy;

use super::Review;
use crate::model::ObjectKey;

impl Review<'_> {
    /// Rules on requests of every port: whatever else their workloads speak is refused.
    pub(super) fn requests_of_every_port(&mut self, key: &ObjectKey, policy: &Policy) {
        for (rule, place) in policy.rules.iter().zip(0..) {
            for (target, to) in rule.to.iter().zip(0..) {
                if target.is_of_requests() && target.ports.is_empty() {
                    self.warn(
                        key,
                        &format!("spec.rules[{place}].to[{to}]"),
                        "it is about requests, and names no port: what is no HTTP is refused at every port",
                        "name those that speak HTTP: ports: [8080]",
                    );
                }
            }
        }
    }
}
