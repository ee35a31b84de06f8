//! Where a captured connection leads: the original destination becomes a workload, a service's endpoints, or an
//! address outside of the mesh.
//!
//! Pure, so that `meshctl why` gives the agent's own answer.

use std::{net::SocketAddr, sync::Arc};

use crate::{
    model::{Endpoint, Mode, Name, Service, Workload},
    refusal::Reason,
    view::{Owner, Snapshot},
};

/// Where a connection leads.
#[derive(Debug, Clone)]
pub enum Route {
    /// To one workload, by its own address.
    Workload(Arc<Workload>, SocketAddr),
    /// To one of these endpoints, never empty.
    Service {
        /// The service that was asked for.
        service: Arc<Service>,
        /// Its ready endpoints of the address family that was asked for.
        endpoints: Vec<Endpoint>,
    },
    /// To an address that the mesh does not know: passed on as it is.
    Outside(SocketAddr),
}

impl Route {
    /// The service, where one was asked for.
    pub fn service(&self) -> Option<&Name> {
        match self {
            Self::Service { service, .. } => Some(&service.name),
            Self::Workload(..) | Self::Outside(_) => None,
        }
    }
}

/// How one hop to a chosen workload is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A tunnel: mutual TLS with the identities of both workloads.
    Tunnel,
    /// As the application speaks: the destination is outside of the mesh.
    Plaintext,
}

/// Resolves an original destination.
pub fn outbound(snapshot: &Snapshot, destination: SocketAddr) -> Result<Route, Reason> {
    if snapshot.ambiguous().contains(&destination.ip()) {
        return Err(Reason::DestinationUnknown);
    }
    match snapshot.owner(destination.ip()) {
        None => Ok(Route::Outside(destination)),
        Some(Owner::Workload(workload)) => Ok(Route::Workload(workload.clone(), destination)),
        Some(Owner::Service(service)) => {
            let port = service
                .ports
                .iter()
                .find(|port| port.port == destination.port())
                .ok_or(Reason::NoSuchServicePort)?;
            let endpoints: Vec<Endpoint> = port
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.address.is_ipv4() == destination.is_ipv4())
                .cloned()
                .collect();
            if endpoints.is_empty() {
                return Err(Reason::NoEndpoint);
            }
            Ok(Route::Service { service: service.clone(), endpoints })
        }
    }
}

/// How to speak to a workload: a tunnel once its agent has captured it; plaintext while that is not so, unless the
/// workload is strict.
pub fn transport(workload: &Workload) -> Result<Transport, Reason> {
    match (workload.enrolled, workload.captured, workload.mode) {
        (true, true, _) => Ok(Transport::Tunnel),
        (true, false, Mode::Strict) => Err(Reason::DestinationNotCaptured),
        (true, false, Mode::Permissive) | (false, _, _) => Ok(Transport::Plaintext),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::ServicePort,
        view::{NodeView, Resource, tests as fixture},
    };

    fn snapshot() -> Snapshot {
        let endpoint = |address: &str| Endpoint {
            workload: Name::new("shop", "web"),
            address: address.parse().unwrap(),
            port: 8080,
        };
        let service = Service {
            name: Name::new("shop", "web"),
            addresses: vec!["10.96.0.1".parse().unwrap(), "fd96::1".parse().unwrap()],
            ports: vec![
                ServicePort { name: "http".into(), port: 80, endpoints: vec![endpoint("10.0.0.1")] },
                ServicePort { name: "none".into(), port: 81, endpoints: vec![] },
            ],
        };
        let view: NodeView = [
            fixture::mesh(),
            Resource::Workload(Arc::new(fixture::workload("web", "10.0.0.1", "n"))),
            Resource::Service(Arc::new(service)),
        ]
        .into_iter()
        .collect();
        Snapshot::new("n", "1", &view).unwrap()
    }

    #[track_caller]
    fn check(destination: &str, expected: &str) {
        let got = match outbound(&snapshot(), destination.parse().unwrap()) {
            Ok(Route::Workload(w, address)) => format!("workload {} {address}", w.name),
            Ok(Route::Service { endpoints, .. }) => {
                format!("service {}:{}", endpoints[0].address, endpoints[0].port)
            }
            Ok(Route::Outside(address)) => format!("outside {address}"),
            Err(reason) => reason.label().to_owned(),
        };
        assert_eq!(got, expected);
    }

    #[test]
    fn destinations_resolve() {
        check("10.0.0.1:9999", "workload shop/web 10.0.0.1:9999");
        check("10.96.0.1:80", "service 10.0.0.1:8080");
        check("10.96.0.1:81", "no_endpoint");
        check("10.96.0.1:82", "no_such_service_port");
        check("[fd96::1]:80", "no_endpoint");
        check("192.0.2.1:443", "outside 192.0.2.1:443");
    }

    #[test]
    fn strict_is_never_spoken_to_in_plaintext_once_enrolled() {
        let base = fixture::workload("web", "10.0.0.1", "n");
        let with =
            |enrolled, captured, mode| transport(&Workload { enrolled, captured, mode, ..base.clone() });
        assert_eq!(with(true, true, Mode::Strict), Ok(Transport::Tunnel));
        assert_eq!(with(true, false, Mode::Strict), Err(Reason::DestinationNotCaptured));
        assert_eq!(with(true, false, Mode::Permissive), Ok(Transport::Plaintext));
        assert_eq!(with(false, false, Mode::Strict), Ok(Transport::Plaintext));
    }
}
