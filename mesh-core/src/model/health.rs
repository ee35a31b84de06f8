//! Health checks of endpoints, as data: what policies say of a service, and what of that an agent does for a workload of
//! its node. What becomes of the answers is told in [`crate::health`].

use std::{fmt, net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize};

use super::Name;

/// Most checks of one workload: as many ports of services as it may serve and be checked for.
pub const MAX_CHECKS: usize = 32;

/// How the endpoints of a service are checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is asked.
    pub probe: Probe,
    /// At which port; none: where the endpoint serves.
    pub port: Option<u16>,
    /// How often, and how many answers count.
    pub pace: Pace,
    /// If fewer than this are healthy, percent, all are asked. In any case all are if none is.
    pub panic_percent: u32,
}

/// What an endpoint is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probe {
    /// Whether it takes a connection.
    Tcp,
    /// A GET of HTTP/1.1.
    Http {
        /// The path, with what follows it.
        path: String,
        /// The header `Host`; none: the endpoint's address.
        host: Option<String>,
        /// Statuses of a healthy one, each from a first to a last.
        statuses: Vec<(u16, u16)>,
    },
    /// `grpc.health.v1.Health/Check`, which has to say SERVING.
    Grpc {
        /// The service that is asked for; empty: the server as a whole.
        service: String,
    },
}

/// How often is asked, and how many answers count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// From one check to the next.
    pub interval: Duration,
    /// What has not answered by then has failed.
    pub timeout: Duration,
    /// So many failures in a row make it unhealthy. Never 0.
    pub unhealthy_after: u32,
    /// So many successes in a row make it healthy. Never 0.
    pub healthy_after: u32,
}

/// What is checked: an address that serves a port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CheckedEndpoint {
    /// The service.
    pub service: Name,
    /// Its port, as clients ask for it.
    pub port: u16,
    /// The endpoint's address.
    pub address: IpAddr,
}

impl fmt::Display for CheckedEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} at {}", self.service, self.port, self.address)
    }
}

impl std::str::FromStr for CheckedEndpoint {
    type Err = CheckedEndpointError;

    /// What [`fmt::Display`] prints.
    fn from_str(text: &str) -> Result<Self, CheckedEndpointError> {
        let parse = || {
            let (of, address) = text.split_once(" at ")?;
            let (service, port) = of.rsplit_once(':')?;
            let (service, port) = (service.parse().ok()?, port.parse().ok()?);
            Some(Self { service, port, address: address.parse().ok()? })
        };
        parse().ok_or_else(|| CheckedEndpointError(text.chars().take(300).collect()))
    }
}

/// A text does not name an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no endpoint: write NAMESPACE/SERVICE:PORT at ADDRESS")]
pub struct CheckedEndpointError(pub String);

/// One check that an agent does for a workload of its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Of what.
    pub of: CheckedEndpoint,
    /// The port that is asked.
    pub port: u16,
    /// What is asked.
    pub probe: Probe,
    /// How often.
    pub pace: Pace,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_read_as_it_is_printed() {
        for address in ["10.0.0.1", "fd00::1"] {
            let (service, address) = (Name::new("shop", "pay"), address.parse().unwrap());
            let endpoint = CheckedEndpoint { service, port: 80, address };
            assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
        }
        for text in ["", "shop/pay:80", "shop/pay at 10.0.0.1", "pay:80 at 10.0.0.1", "shop/pay:80 at x"] {
            assert!(text.parse::<CheckedEndpoint>().is_err(), "{text}");
        }
    }
}
