//! What becomes of the health checks of this node's workloads.

use mesh_core::model::Name;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::sending::ServiceLabels;

/// Labels of `nodemesh_health_checks_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CheckLabels {
    /// The service, `namespace/name`.
    pub service: String,
    /// `passed` or `failed`.
    pub result: &'static str,
}

/// Its counters.
#[derive(Debug, Default)]
pub(super) struct Checks {
    done: Family<CheckLabels, Counter>,
    unhealthy: Family<ServiceLabels, Gauge>,
}

impl Checks {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "health_checks",
            "Health checks of this node's endpoints of a service that were done",
            self.done.clone(),
        );
        registry.register(
            "unhealthy_endpoints",
            "Endpoints of a service on this node that are unhealthy, by their checks",
            self.unhealthy.clone(),
        );
    }
}

impl super::Metrics {
    /// An endpoint of a service on this node was checked.
    pub fn health_checked(&self, service: &Name, passed: bool) {
        let result = if passed { "passed" } else { "failed" };
        self.checks.done.get_or_create(&CheckLabels { service: service.to_string(), result }).inc();
    }

    /// How often it was, with this result.
    pub fn health_checks(&self, service: &Name, result: &'static str) -> u64 {
        self.checks.done.get_or_create(&CheckLabels { service: service.to_string(), result }).get()
    }

    /// One more of a service's endpoints on this node is unhealthy, or one less.
    pub fn endpoint_unhealthy(&self, service: &Name, is: bool) {
        let gauge = self.checks.unhealthy.get_or_create(&ServiceLabels { service: service.to_string() });
        if is {
            gauge.inc()
        } else {
            gauge.dec()
        };
    }

    /// How many are.
    pub fn unhealthy_endpoints(&self, service: &Name) -> i64 {
        self.checks.unhealthy.get_or_create(&ServiceLabels { service: service.to_string() }).get()
    }
}
