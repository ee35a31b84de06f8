//! Where a captured connection leads: the original destination becomes a workload, a service's endpoints, or an
//! address outside of the mesh.
//!
//! Pure, so that `meshctl why` gives the agent's own answer.

use std::{net::SocketAddr, sync::Arc};

use crate::{
    model::{Choice, Distribution, Endpoint, Mode, Name, Place, Service, Workload},
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
        /// The service.
        service: Arc<Service>,
        /// Its port; where a route leads elsewhere, not the one that was asked for.
        port: u16,
        /// Its ready endpoints of the address family that was asked for, as near to the client as the service wants.
        endpoints: Vec<Endpoint>,
    },
    /// To an address that the mesh does not know: passed on as it is.
    Outside(SocketAddr),
}

impl Route {
    /// The service, if it leads to one.
    pub fn service(&self) -> Option<&Name> {
        match self {
            Self::Service { service, .. } => Some(&service.name),
            Self::Workload(..) | Self::Outside(_) => None,
        }
    }
}

/// What one endpoint of a service is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reached {
    /// A workload.
    Workload(Arc<Workload>),
    /// An address outside of the mesh: passed on as it is.
    Outside,
}

/// Who is at an endpoint; `None` if that cannot be told, and nothing must be sent there.
///
/// An endpoint that names its workload is that workload or nothing: an address which the workload does not have, or no
/// more, may be anybody's, and what is meant for the workload would leave as plaintext.
pub fn reached(snapshot: &Snapshot, endpoint: &Endpoint) -> Option<Reached> {
    let at = snapshot.workload_at(endpoint.address);
    match &endpoint.workload {
        Some(name) => at.filter(|workload| workload.name == *name).cloned().map(Reached::Workload),
        None if snapshot.ambiguous().contains(&endpoint.address) => None,
        None => match snapshot.owner(endpoint.address) {
            None => Some(Reached::Outside),
            Some(Owner::Workload(workload)) => Some(Reached::Workload(workload.clone())),
            // A virtual address stands for others, and is none itself.
            Some(Owner::Service(_)) => None,
        },
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

/// Resolves an original destination of a workload. [`Reason::DestinationUnanswered`]: a view by demand has not been told yet
/// what it is; [`unanswered`] says what becomes of that.
pub fn outbound(snapshot: &Snapshot, source: &Workload, destination: SocketAddr) -> Result<Route, Reason> {
    if snapshot.ambiguous().contains(&destination.ip()) {
        return Err(Reason::DestinationUnknown);
    }
    match snapshot.owner(destination.ip()) {
        None if !snapshot.knows(destination.ip()) => Err(Reason::DestinationUnanswered),
        None => Ok(Route::Outside(destination)),
        Some(Owner::Workload(workload)) => Ok(Route::Workload(workload.clone(), destination)),
        Some(Owner::Service(service)) => {
            let endpoints = endpoints(service, destination.port(), destination.is_ipv4(), source)?;
            Ok(Route::Service { service: service.clone(), port: destination.port(), endpoints })
        }
    }
}

/// The endpoints of a port of a service, of one address family, as near to the client as the service wants; never none.
pub fn endpoints(
    service: &Service,
    port: u16,
    is_ipv4: bool,
    source: &Workload,
) -> Result<Vec<Endpoint>, Reason> {
    let port = service.port(port).ok_or(Reason::NoSuchServicePort)?;
    let of_family = port.endpoints.iter().filter(|endpoint| endpoint.address.is_ipv4() == is_ipv4);
    let endpoints = near(of_family.cloned().collect(), &service.choice, source);
    if endpoints.is_empty() { Err(Reason::NoEndpoint) } else { Ok(endpoints) }
}

/// The endpoints that are near enough for a client.
fn near(endpoints: Vec<Endpoint>, choice: &Choice, client: &Workload) -> Vec<Endpoint> {
    if choice.distribution == Distribution::Any {
        return endpoints;
    }
    let client = client.place();
    let those = |is_near: &dyn Fn(&Place) -> bool| -> Vec<Endpoint> {
        let near = endpoints.iter().filter(|it| choice.places.get(&it.address).is_some_and(is_near));
        near.cloned().collect()
    };
    let on_node = || those(&|place| place.node == client.node);
    let in_zone = || those(&|place| !client.zone.is_empty() && place.zone == client.zone);
    let preferred = match choice.distribution {
        Distribution::Any => vec![],
        Distribution::SameZone => in_zone(),
        Distribution::SameNode => Some(on_node()).filter(|it| !it.is_empty()).unwrap_or_else(in_zone),
        Distribution::OnlySameNode => return on_node(),
    };
    if preferred.is_empty() { endpoints } else { preferred }
}

/// Where a connection leads whose destination nobody has said anything of in time: as if to an address outside of the mesh
/// if its source may speak plaintext, else nowhere. A strict destination refuses that plaintext itself.
pub fn unanswered(source: Mode, destination: SocketAddr) -> Result<Route, Reason> {
    match source {
        Mode::Permissive => Ok(Route::Outside(destination)),
        Mode::Strict => Err(Reason::DestinationUnanswered),
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
        model::{ServicePort, ZONE, traffic::Traffic},
        view::{NodeView, Resource, tests as fixture},
    };

    fn snapshot() -> Snapshot {
        let endpoint = |address: &str| Endpoint {
            workload: Some(Name::new("shop", "web")),
            address: address.parse().unwrap(),
            port: 8080,
        };
        let service = Service {
            name: Name::new("shop", "web"),
            addresses: vec!["10.96.0.1".parse().unwrap(), "fd96::1".parse().unwrap()],
            ports: vec![
                ServicePort {
                    name: "http".into(),
                    port: 80,
                    endpoints: vec![endpoint("10.0.0.1")],
                    traffic: Traffic::default(),
                    routes: vec![],
                },
                ServicePort {
                    name: "none".into(),
                    port: 81,
                    endpoints: vec![],
                    traffic: Traffic::default(),
                    routes: vec![],
                },
            ],
            choice: Choice::default(),
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
        let source = fixture::workload("web", "10.0.0.1", "n");
        let got = match outbound(&snapshot(), &source, destination.parse().unwrap()) {
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
    fn a_client_gets_endpoints_as_near_as_its_service_wants() {
        let endpoint = |n: u8| Endpoint { workload: None, address: [10, 0, 0, n].into(), port: 80 };
        let place = |(n, node, zone): (u8, &str, &str)| {
            (endpoint(n).address, Place { node: node.into(), zone: zone.into() })
        };
        // Of the fifth nobody knows where it is.
        let places = [(1, "a", "east"), (2, "b", "east"), (3, "c", "west"), (4, "d", "")].map(place);
        let gets = |distribution, node: &str, zone: &str| {
            let choice = Choice { distribution, affinity: None, places: places.clone().into() };
            let mut client = fixture::workload("client", "10.0.0.9", node);
            client.labels = [(ZONE.to_owned(), zone.to_owned())].into();
            let near = near((1..=5).map(endpoint).collect(), &choice, &client);
            near.iter().map(|it| it.address.to_string().split_off(7).parse().unwrap()).collect::<Vec<u8>>()
        };
        use Distribution::{Any, OnlySameNode, SameNode, SameZone};
        for (distribution, node, zone, expected) in [
            (Any, "a", "east", &[1, 2, 3, 4, 5][..]),
            (SameZone, "a", "east", &[1, 2]),
            (SameZone, "a", "north", &[1, 2, 3, 4, 5]),
            (SameZone, "d", "", &[1, 2, 3, 4, 5]),
            (SameNode, "a", "east", &[1]),
            (SameNode, "e", "east", &[1, 2]),
            (SameNode, "e", "north", &[1, 2, 3, 4, 5]),
            (OnlySameNode, "d", "west", &[4]),
            (OnlySameNode, "e", "west", &[]),
        ] {
            assert_eq!(gets(distribution, node, zone), expected, "{distribution:?} {node} {zone}");
        }
    }

    #[test]
    fn an_endpoint_is_its_workload_or_nothing_and_one_without_is_whoever_has_the_address() {
        for (workload, address, expected) in [
            (Some("shop/web"), "10.0.0.1", Some("shop/web")),
            (Some("shop/web"), "10.0.0.9", None),
            (Some("shop/gone"), "10.0.0.1", None),
            (Some("shop/gone"), "10.0.0.9", None),
            (None, "10.0.0.1", Some("shop/web")),
            (None, "192.0.2.1", Some("outside")),
            (None, "10.96.0.1", None),
        ] {
            let endpoint = Endpoint {
                workload: workload.map(|name| name.parse().unwrap()),
                address: address.parse().unwrap(),
                port: 80,
            };
            let got = reached(&snapshot(), &endpoint).map(|reached| match reached {
                Reached::Workload(workload) => workload.name.to_string(),
                Reached::Outside => "outside".to_owned(),
            });
            assert_eq!(got.as_deref(), expected, "{workload:?} {address}");
        }
    }

    #[test]
    fn what_a_view_by_demand_was_not_told_of_is_not_outside() {
        let destination = "10.0.0.1:80".parse().unwrap();
        let demand = crate::view::Demand { blocks: vec!["10.0.0.0/8".parse().unwrap()] };
        let view: NodeView = [fixture::mesh(), Resource::Demand(Arc::new(demand))].into_iter().collect();
        let snapshot = Snapshot::new("n", "1", &view).unwrap();
        let source = fixture::workload("web", "10.0.0.2", "n");
        assert_eq!(outbound(&snapshot, &source, destination).unwrap_err(), Reason::DestinationUnanswered);
        assert!(
            matches!(unanswered(Mode::Permissive, destination), Ok(Route::Outside(to)) if to == destination)
        );
        assert_eq!(unanswered(Mode::Strict, destination).unwrap_err(), Reason::DestinationUnanswered);
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
