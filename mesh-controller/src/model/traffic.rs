//! TrafficPolicies as manifests want them: what they are for is not looked up yet.

use std::fmt;

use mesh_core::model::{
    Name,
    health::HealthCheck,
    http::RouteKind,
    intake::{PortIntake, RateLimit, Sizes},
    traffic::Traffic,
};
use serde::{Deserialize, Serialize};

/// How requests and connections are sent to what it is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficPolicy {
    /// Its name.
    pub name: Name,
    /// `metadata.creationTimestamp`, seconds since 1970; 0 where nobody says it.
    pub created: i64,
    /// What it is for, all of its own namespace; in the order of `spec.targetRefs`.
    pub targets: Vec<TrafficTarget>,
    /// What it says to those who send.
    pub traffic: Traffic,
    /// How endpoints are checked: not by those who send anything there, so it is no part of what they are told.
    pub health_check: Option<HealthCheck>,
    /// What it says to those who take.
    pub takes: Takes,
}

/// What is said of what the workloads of a Service take. Each part that is left out is as without a policy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Takes {
    /// How many requests; none of these: as many as come.
    pub rates: Option<Vec<RateLimit>>,
    /// How large ones.
    pub sizes: Option<Sizes>,
}

impl Takes {
    /// What is said here, and where nothing is, what another one says.
    pub fn or(&self, other: &Self) -> Self {
        Self { rates: self.rates.clone().or_else(|| other.rates.clone()), sizes: self.sizes.or(other.sizes) }
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What it means for a port.
    pub fn of_port(self) -> PortIntake {
        PortIntake { sizes: self.sizes.unwrap_or_default(), rates: self.rates.unwrap_or_default() }
    }
}

/// What a policy is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficTarget {
    /// All Services of its namespace, where nothing nearer says the same.
    Namespace,
    /// A Service, or one of its ports.
    Service {
        /// Its name.
        name: String,
        /// The name of the port.
        port: Option<String>,
    },
    /// A route, or one of its rules.
    Route {
        /// Its kind.
        kind: RouteKind,
        /// Its name.
        name: String,
        /// The name of the rule.
        rule: Option<String>,
    },
}

impl fmt::Display for TrafficTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name, section) = match self {
            Self::Namespace => return f.write_str("its namespace"),
            Self::Service { name, port } => ("Service", name, port),
            Self::Route { kind, name, rule } => (kind.as_str(), name, rule),
        };
        write!(f, "{kind} {name}")?;
        section.iter().try_for_each(|section| write!(f, ", '{section}'"))
    }
}
