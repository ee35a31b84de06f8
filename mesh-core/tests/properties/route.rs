//! Where connections lead.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use mesh_core::{
    identity::TrustDomain,
    model::{Choice, Distribution, Endpoint, Mode, Service, Workload},
    refusal::Reason,
    route::{self, Route, Transport},
    view::{Mesh, NodeView, Resource, Snapshot},
};
use proptest::{collection::vec, prelude::*};

use super::arbitrary;

fn snapshot(workloads: &[Workload], services: &[Service]) -> Snapshot {
    let mesh = Mesh { trust_domain: TrustDomain::parse("td").expect("a trust domain"), roots: vec![] };
    let view: NodeView = std::iter::once(Resource::Mesh(Arc::new(mesh)))
        .chain(workloads.iter().map(|it| Resource::Workload(Arc::new(it.clone()))))
        .chain(services.iter().map(|it| Resource::Service(Arc::new(it.clone()))))
        .collect();
    Snapshot::new("a", "1", &view).expect("a view")
}

/// What a destination leads to; of a service, the set that may be chosen from.
fn leads_to(
    snapshot: &Snapshot,
    from: &Workload,
    to: SocketAddr,
) -> Result<(String, BTreeSet<Endpoint>), Reason> {
    Ok(match route::outbound(snapshot, from, to)? {
        Route::Workload(workload, address) => (format!("{} {address}", workload.name), BTreeSet::new()),
        Route::Service { service, endpoints, .. } => {
            (service.name.to_string(), endpoints.into_iter().collect())
        }
        Route::Outside(address) => (address.to_string(), BTreeSet::new()),
    })
}

proptest! {
    #[test]
    fn the_declared_order_of_endpoints_never_shows(
        workloads in vec(arbitrary::workload(), 0..4), services in vec(arbitrary::service(), 1..3),
        from in arbitrary::workload(), ip in arbitrary::address(), port in arbitrary::port(),
    ) {
        let mut backwards = services.clone();
        for port in backwards.iter_mut().flat_map(|service| &mut service.ports) {
            port.endpoints.reverse();
        }
        let to = SocketAddr::new(ip, port);
        prop_assert_eq!(
            leads_to(&snapshot(&workloads, &services), &from, to),
            leads_to(&snapshot(&workloads, &backwards), &from, to)
        );
    }

    #[test]
    fn a_route_leads_to_who_alone_has_the_address(
        workloads in vec(arbitrary::workload(), 0..4), services in vec(arbitrary::service(), 0..3),
        from in arbitrary::workload(), ip in arbitrary::address(), port in arbitrary::port(),
    ) {
        let snapshot = snapshot(&workloads, &services);
        let claims = snapshot.workloads().flat_map(|it| &it.addresses).filter(|it| **it == ip).count()
            + snapshot.services().flat_map(|it| &it.addresses).filter(|it| **it == ip).count();
        match (claims, route::outbound(&snapshot, &from, SocketAddr::new(ip, port))) {
            (0, Ok(Route::Outside(to))) => prop_assert_eq!(to, SocketAddr::new(ip, port)),
            (1, Ok(Route::Workload(workload, _))) => prop_assert!(workload.addresses.contains(&ip)),
            (1, Ok(Route::Service { service, endpoints, .. })) => {
                prop_assert!(service.addresses.contains(&ip) && !endpoints.is_empty());
                prop_assert!(endpoints.iter().all(|it| it.address.is_ipv4() == ip.is_ipv4()));
                let Choice { distribution, places, .. } = &service.choice;
                let is_here = |it: &Endpoint| places.get(&it.address).is_some_and(|it| it.node == from.node);
                prop_assert!(*distribution != Distribution::OnlySameNode || endpoints.iter().all(is_here));
            }
            (1, Err(reason)) => prop_assert!(matches!(reason, Reason::NoSuchServicePort | Reason::NoEndpoint)),
            (2.., Err(reason)) => prop_assert_eq!(reason, Reason::DestinationUnknown),
            (claims, route) => prop_assert!(false, "{claims} claims, {route:?}"),
        }
    }

    #[test]
    fn an_enrolled_strict_workload_is_never_spoken_to_in_plaintext(workload in arbitrary::workload()) {
        let enrolled = Workload { enrolled: true, mode: Mode::Strict, ..workload };
        prop_assert_ne!(route::transport(&enrolled), Ok(Transport::Plaintext));
    }
}
