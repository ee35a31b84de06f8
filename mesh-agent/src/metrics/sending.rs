//! What policies make of requests on their way: endpoints left alone, attempts made again, faults.

use mesh_core::{balance::Cause, model::Name};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// Labels of `nodemesh_retries_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ServiceLabels {
    /// The service, `namespace/name`.
    pub service: String,
}

/// Labels of `nodemesh_ejections_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EjectionLabels {
    /// The service, `namespace/name`.
    pub service: String,
    /// Why: a word of [`Cause`].
    pub cause: &'static str,
}

/// What came of sending a request to a second endpoint, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HedgeOutcome {
    /// The second one's answer was kept.
    Won,
    /// The first one's was.
    Lost,
    /// Neither's.
    Failed,
}

impl HedgeOutcome {
    const fn label(self) -> &'static str {
        match self {
            Self::Won => "won",
            Self::Lost => "lost",
            Self::Failed => "failed",
        }
    }
}

/// Labels of `nodemesh_hedges_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HedgeLabels {
    /// The service, `namespace/name`.
    pub service: String,
    /// Whose answer was kept: a word of [`HedgeOutcome`].
    pub outcome: &'static str,
}

/// Labels of `nodemesh_faults_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FaultLabels {
    /// The service that was asked, `namespace/name`.
    pub service: String,
    /// `delay` or `abort`.
    pub fault: &'static str,
}

/// Its counters.
#[derive(Debug, Default)]
pub(super) struct Sending {
    ejections: Family<EjectionLabels, Counter>,
    retries: Family<ServiceLabels, Counter>,
    faults: Family<FaultLabels, Counter>,
    hedges: Family<HedgeLabels, Counter>,
}

impl Sending {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "ejections",
            "Times that an endpoint of a service was left alone for a while, as too much failed there",
            self.ejections.clone(),
        );
        registry.register("retries", "Requests to a service that were tried again", self.retries.clone());
        registry.register(
            "faults",
            "Requests to a service that were delayed or answered with an error because a policy wants that",
            self.faults.clone(),
        );
        registry.register(
            "hedges",
            "Requests to a service that were sent to a second endpoint while the first one had not answered, by whose answer was kept",
            self.hedges.clone(),
        );
    }
}

fn of(service: &Name) -> ServiceLabels {
    ServiceLabels { service: service.to_string() }
}

impl super::Metrics {
    /// An endpoint of a service is left alone for a while.
    pub fn ejected(&self, service: &Name, cause: Cause) {
        let labels = EjectionLabels { service: service.to_string(), cause: cause.label() };
        self.sending.ejections.get_or_create(&labels).inc();
    }

    /// How often that was.
    pub fn ejections(&self, service: &Name, cause: Cause) -> u64 {
        let labels = EjectionLabels { service: service.to_string(), cause: cause.label() };
        self.sending.ejections.get_or_create(&labels).get()
    }

    /// A request to a service is tried again.
    pub fn tried_again(&self, service: &Name) {
        self.sending.retries.get_or_create(&of(service)).inc();
    }

    /// How often that was.
    pub fn retries(&self, service: &Name) -> u64 {
        self.sending.retries.get_or_create(&of(service)).get()
    }

    /// A request to a service was sent to a second endpoint, too.
    pub fn hedged(&self, service: &Name, outcome: HedgeOutcome) {
        let labels = HedgeLabels { service: service.to_string(), outcome: outcome.label() };
        self.sending.hedges.get_or_create(&labels).inc();
    }

    /// How often that was.
    pub fn hedges(&self, service: &Name, outcome: HedgeOutcome) -> u64 {
        let labels = HedgeLabels { service: service.to_string(), outcome: outcome.label() };
        self.sending.hedges.get_or_create(&labels).get()
    }

    /// Something goes wrong with a request to a service on purpose.
    pub fn fault(&self, service: &Name, fault: &'static str) {
        self.sending.faults.get_or_create(&FaultLabels { service: service.to_string(), fault }).inc();
    }

    /// How often that was.
    pub fn faults(&self, service: &Name, fault: &'static str) -> u64 {
        self.sending.faults.get_or_create(&FaultLabels { service: service.to_string(), fault }).get()
    }
}
