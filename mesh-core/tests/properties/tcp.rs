//! Which route a connection falls under: the table against the specification, read slowly.

use std::sync::Arc;

use mesh_core::{
    model::{
        Choice, Name, Service, ServicePort,
        http::{Parent, RequestRoute, RouteKind},
        tcp::{ConnectionRoute, Hostname},
        traffic::Traffic,
    },
    tcp::Table,
    view::{NodeView, Resource, Snapshot},
};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::arbitrary;

/// A name that a client asks for, in letters of either case, or none.
fn asked() -> impl Strategy<Value = Option<String>> {
    let written = (arbitrary::server(), any::<bool>());
    option::of(written.prop_map(|(name, upper)| if upper { name.to_uppercase() } else { name }))
}

/// Gateway API, `Hostname` and `TLSRouteSpec.hostnames`: how many labels of a name one is sure of; nothing if it is not for it.
fn sure_of(hostname: &Hostname, asked: &str) -> Option<usize> {
    let asked: Vec<String> = asked.to_lowercase().split('.').map(str::to_owned).collect();
    match hostname {
        Hostname::Exact(name) => {
            let whole: Vec<&str> = name.split('.').collect();
            // Before every domain, however long.
            (whole == asked).then_some(usize::MAX)
        }
        Hostname::Under(domain) => {
            let end: Vec<&str> = domain.split('.').collect();
            let longer = asked.len() > end.len();
            let ends = longer && asked[asked.len() - end.len()..].iter().zip(&end).all(|(a, b)| a == b);
            ends.then_some(end.len())
        }
    }
}

/// Looks at every hostname of every route, and keeps the one that comes first.
fn slowly(routes: &[Arc<ConnectionRoute>], asked: Option<&str>) -> Option<String> {
    let by_name = routes.iter().any(|route| route.kind == RouteKind::Tls);
    let mut best: Option<(usize, &ConnectionRoute)> = None;
    for route in routes {
        let sure = match (by_name, route.kind, asked) {
            (false, _, _) => Some(0),
            (true, RouteKind::Tls, Some(asked)) => {
                route.hostnames.iter().filter_map(|it| sure_of(it, asked)).max()
            }
            (true, _, _) => None,
        };
        let Some(sure) = sure else { continue };
        let first = best.is_none_or(|(other_sure, other)| {
            other_sure
                .cmp(&sure)
                .then_with(|| route.created.cmp(&other.created))
                .then_with(|| route.name.cmp(&other.name))
                .is_lt()
        });
        if first {
            best = Some((sure, route));
        }
    }
    best.map(|(_, route)| route.name.to_string())
}

/// Routes of different names: as objects of one kind have.
fn routes() -> impl Strategy<Value = Vec<Arc<ConnectionRoute>>> {
    vec(arbitrary::connection_route(), 0..5).prop_map(|mut routes| {
        routes.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
        routes.dedup_by(|a, b| (a.kind, &a.name) == (b.kind, &b.name));
        routes.into_iter().map(Arc::new).collect()
    })
}

/// Who decides of connections to `a/a`, port 80, from a namespace: `requests`, or the routes of these namespaces.
fn decided_by(
    connections: Vec<Arc<ConnectionRoute>>,
    requests: &[String],
    from: &str,
) -> Option<Vec<String>> {
    let name = Name::new("a", "a");
    let route = |namespace: &String| {
        Resource::Route(Arc::new(RequestRoute {
            kind: RouteKind::Http,
            name: Name::new(namespace, "r"),
            created: 0,
            parents: vec![Parent { service: name.clone(), port: None }],
            rules: vec![],
        }))
    };
    let port = ServicePort {
        name: String::new(),
        port: 80,
        endpoints: vec![],
        traffic: Traffic::default(),
        routes: connections,
    };
    let service =
        Service { name: name.clone(), addresses: vec![], ports: vec![port], choice: Choice::default() };
    let mesh = mesh_core::view::Mesh {
        trust_domain: mesh_core::identity::TrustDomain::parse("td").expect("a domain"),
        roots: vec![],
    };
    let all = [Resource::Mesh(Arc::new(mesh)), Resource::Service(Arc::new(service))];
    let view: NodeView = all.into_iter().chain(requests.iter().map(route)).collect();
    let snapshot = Snapshot::new("n", "1", &view).expect("a view");
    if snapshot.table(&name, 80, from).is_some() {
        assert!(snapshot.connections(&name, 80, from).is_none(), "one of the two decides");
        return Some(vec!["requests".to_owned()]);
    }
    let table = snapshot.connections(&name, 80, from)?;
    assert!(snapshot.connections(&name, 81, from).is_none());
    Some(
        ["a", "a.a", "b", "b.b.a"]
            .map(|it| table.choose(Some(it)).map(|it| it.name.to_string()).unwrap_or_default())
            .to_vec(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_table_chooses_as_the_specification_does(routes in routes(), asked in asked()) {
        let table = Table::new(&routes.iter().collect::<Vec<_>>());
        let chosen = table.as_ref().and_then(|it| it.choose(asked.as_deref())).map(|it| it.name.to_string());
        prop_assert_eq!(chosen, slowly(&routes, asked.as_deref()));
    }

    #[test]
    fn the_order_of_routes_never_shows(mut routes in routes(), asked in asked()) {
        let choose = |routes: &[Arc<ConnectionRoute>]| {
            let table = Table::new(&routes.iter().collect::<Vec<_>>());
            table.as_ref().and_then(|it| it.choose(asked.as_deref())).map(|it| it.name.to_string())
        };
        let forward = choose(&routes);
        routes.reverse();
        prop_assert_eq!(choose(&routes), forward);
    }

    #[test]
    fn any_name_is_looked_up(routes in routes(), asked in ".{0,40}") {
        if let Some(table) = Table::new(&routes.iter().collect::<Vec<_>>()) {
            table.choose(Some(&asked));
        }
    }

    /// GEP-1426, "Consumer routes", and GEP-1294, "Route types".
    #[test]
    fn a_consumers_routes_come_first_and_among_them_those_of_requests(
        routes in routes(),
        requests in proptest::sample::subsequence(vec!["a".to_owned(), "b".to_owned()], 0..=2),
        from in select(vec!["a", "b", "c"]),
    ) {
        let of = |namespace: &str| -> Vec<Arc<ConnectionRoute>> {
            routes.iter().filter(|it| it.name.namespace == namespace).cloned().collect()
        };
        let expected = [from, "a"].into_iter().find_map(|namespace| {
            if requests.iter().any(|it| it == namespace) {
                return Some(vec!["requests".to_owned()]);
            }
            let of_clients = of(namespace);
            let names = ["a", "a.a", "b", "b.b.a"];
            (!of_clients.is_empty())
                .then(|| names.map(|it| slowly(&of_clients, Some(it)).unwrap_or_default()).to_vec())
        });
        prop_assert_eq!(decided_by(routes.clone(), &requests, from), expected);
    }
}
