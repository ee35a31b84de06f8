//! The rules for one port of a service, in the order in which they count, and of which ports there are some.
//!
//! Several routes of one service are as one: of all matches of all their rules the most specific one counts that a
//! request is as (Gateway API, `HTTPRouteRule.matches`, `GRPCRouteRule.matches`). That order does not depend on the
//! request, so it is made once: a path is looked up among the exact ones, then the patterns, then its prefixes from the
//! longest on. `tests/properties/http.rs` compares it with the specification, read slowly.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::matches::Asked;
use crate::{
    model::{
        Name, Service,
        http::{PathMatch, RequestMatch, RequestRoute, RouteKind, RouteRule, TextMatch},
    },
    tcp,
};

/// The tables of all services that have routes.
#[derive(Debug, Default)]
pub struct Tables(HashMap<Name, Vec<OfPort>>);

/// The table for one port of a service.
#[derive(Debug)]
struct OfPort {
    port: u16,
    /// The namespace whose workloads it is for; `None`: for all that have none of their own.
    clients: Option<String>,
    routes: Routes,
}

/// What the routes of a port are of.
#[derive(Debug)]
enum Routes {
    /// Of requests.
    Requests(Arc<Table>),
    /// Of connections.
    Connections(Arc<tcp::Table>),
}

/// What a route speaks of: a service, its port, and the namespace whose workloads' requests, or all.
type Place<'a> = (&'a Name, u16, Option<&'a str>);

impl Tables {
    /// Those of these services. A route of another namespace than its service is for the clients of its own namespace, in
    /// the place of all others (GEP-1426, "Consumer routes").
    pub fn new(services: &BTreeMap<Name, Arc<Service>>, routes: &[Arc<RequestRoute>]) -> Self {
        let mut of_ports: BTreeMap<Place<'_>, Vec<Arc<RequestRoute>>> = BTreeMap::new();
        for route in routes {
            for parent in &route.parents {
                let Some(service) = services.get(&parent.service) else { continue };
                let own = route.name.namespace == parent.service.namespace;
                let clients = (!own).then_some(route.name.namespace.as_str());
                let spoken_of = |port: &u16| parent.port.is_none_or(|wanted| wanted == *port);
                for port in service.ports.iter().map(|port| port.port).filter(spoken_of) {
                    let of_port = of_ports.entry((&service.name, port, clients)).or_default();
                    // Two parents may name the same port.
                    if !of_port.iter().any(|it| Arc::ptr_eq(it, route)) {
                        of_port.push(route.clone());
                    }
                }
            }
        }
        let mut tables = Self::default();
        for ((service, port, clients), routes) in of_ports {
            let routes = Routes::Requests(Arc::new(Table::new(&routes)));
            let of_port = OfPort { port, clients: clients.map(str::to_owned), routes };
            tables.0.entry(service.clone()).or_default().push(of_port);
        }
        services.values().for_each(|service| tables.add_connections(service));
        tables
    }

    /// The routes of connections to a service. Those of requests come before them, for the same clients (GEP-1294, "Route
    /// types").
    fn add_connections(&mut self, service: &Service) {
        for port in service.ports.iter().filter(|port| !port.routes.is_empty()) {
            let clients: BTreeSet<_> = port.routes.iter().map(|it| it.clients(&service.name)).collect();
            for clients in clients {
                let of_service = self.0.entry(service.name.clone()).or_default();
                if of_service.iter().any(|it| it.is_for(port.port, clients)) {
                    continue;
                }
                let all = port.routes.iter();
                let routes: Vec<_> = all.filter(|it| it.clients(&service.name) == clients).collect();
                of_service.extend(tcp::Table::new(&routes).map(|table| OfPort {
                    port: port.port,
                    clients: clients.map(str::to_owned),
                    routes: Routes::Connections(Arc::new(table)),
                }));
            }
        }
    }

    fn find(&self, service: &Name, port: u16, client_namespace: &str) -> Option<&Routes> {
        let of_service = self.0.get(service)?;
        let find = |clients: Option<&str>| of_service.iter().find(|it| it.is_for(port, clients));
        find(Some(client_namespace)).or_else(|| find(None)).map(|it| &it.routes)
    }

    /// The table for the requests that workloads of a namespace send to a port of a service.
    pub fn get(&self, service: &Name, port: u16, client_namespace: &str) -> Option<&Arc<Table>> {
        match self.find(service, port, client_namespace)? {
            Routes::Requests(table) => Some(table),
            Routes::Connections(_) => None,
        }
    }

    /// The table for the connections that workloads of a namespace open to a port of a service.
    pub fn connections(&self, service: &Name, port: u16, client_namespace: &str) -> Option<&Arc<tcp::Table>> {
        match self.find(service, port, client_namespace)? {
            Routes::Connections(table) => Some(table),
            Routes::Requests(_) => None,
        }
    }
}

impl OfPort {
    fn is_for(&self, port: u16, clients: Option<&str>) -> bool {
        self.port == port && self.clients.as_deref() == clients
    }
}

/// Rules in their order.
#[derive(Debug, Default)]
pub struct Table {
    entries: Vec<Entry>,
    /// Places in `entries`, in their order, of those with this path.
    exact: HashMap<String, Vec<usize>>,
    /// Of those whose path is not looked up.
    others: Vec<usize>,
    /// Of those with this prefix.
    prefixes: HashMap<String, Vec<usize>>,
    /// Of the longest prefix, bytes: no longer part of a path need be looked up.
    longest: usize,
    grpc: bool,
}

/// One match of one rule.
#[derive(Debug)]
struct Entry {
    route: Arc<RequestRoute>,
    rule: usize,
    said: Said,
    matched: RequestMatch,
}

/// What is told of a request that falls under a rule; made once, as it is told often.
#[derive(Debug, Clone)]
pub struct Said {
    /// The route, `KIND/namespace/name`.
    pub route: Arc<str>,
    /// The rule's name, or its place in its route, from 0.
    pub rule: Arc<str>,
}

impl Said {
    fn of_rule(route: &Arc<str>, rule: &RouteRule, index: usize) -> Self {
        let rule = if rule.name.is_empty() { index.to_string().into() } else { rule.name.as_str().into() };
        Self { route: route.clone(), rule }
    }
}

/// The rule that a request falls under.
#[derive(Debug, Clone, Copy)]
pub struct Chosen<'a> {
    /// Its route.
    pub route: &'a RequestRoute,
    /// Its place in the route, from 0.
    pub index: usize,
    /// Itself.
    pub rule: &'a RouteRule,
    /// What the request's path is as.
    pub path: &'a PathMatch,
    /// What is told of it.
    pub said: &'a Said,
}

impl Table {
    /// The rules of these routes, all of which speak of the same port of a service to the same clients. Of the kinds
    /// among them the most specific one counts.
    pub fn new(routes: &[Arc<RequestRoute>]) -> Self {
        let grpc = routes.iter().any(|route| route.kind == RouteKind::Grpc);
        let kind = if grpc { RouteKind::Grpc } else { RouteKind::Http };
        let mut entries = Vec::new();
        for route in routes.iter().filter(|route| route.kind == kind) {
            let name: Arc<str> = format!("{}/{}", route.kind.as_str(), route.name).into();
            for (index, rule) in route.rules.iter().enumerate() {
                let (every, said) = ([every(kind)], Said::of_rule(&name, rule, index));
                let matches = if rule.matches.is_empty() { &every[..] } else { &rule.matches };
                entries.extend(matches.iter().cloned().map(|matched| {
                    let (route, said) = (route.clone(), said.clone());
                    Entry { route, rule: index, said, matched }
                }));
            }
        }
        // Stable: what is alike stays in the order of its route's rules.
        entries.sort_by(|a, b| {
            let age = |entry: &Entry| (entry.route.created, entry.route.name.clone());
            rank(&a.matched).cmp(&rank(&b.matched)).then_with(|| age(a).cmp(&age(b)))
        });
        let mut table = Self { entries, grpc, ..Self::default() };
        for (place, entry) in table.entries.iter().enumerate() {
            match &entry.matched.path {
                PathMatch::Exact(path) => table.exact.entry(path.clone()).or_default().push(place),
                PathMatch::Prefix(prefix) => {
                    table.longest = table.longest.max(prefix.len());
                    table.prefixes.entry(prefix.clone()).or_default().push(place);
                }
                PathMatch::Pattern(_) | PathMatch::Call { .. } => table.others.push(place),
            }
        }
        table
    }

    /// Whether its routes are of calls: what falls under none of them is answered in gRPC's way.
    pub fn is_grpc(&self) -> bool {
        self.grpc
    }

    /// The rule that a request falls under.
    pub fn choose(&self, asked: &Asked<'_>) -> Option<Chosen<'_>> {
        let path = asked.path();
        let first = |places: &[usize]| {
            places.iter().copied().find(|at| self.entries[*at].matched.rest_matches(asked))
        };
        let exact = || first(self.exact.get(path)?);
        let others = || {
            let mut places = self.others.iter().copied();
            places.find(|at| self.entries[*at].matched.matches(asked))
        };
        let prefix = || {
            let cuts = path.rmatch_indices('/').map(|(at, _)| at);
            let mut ends = [path.len()].into_iter().chain(cuts).skip_while(|end| *end > self.longest);
            ends.find_map(|end| first(self.prefixes.get(&path[..end])?))
        };
        let at = exact().or_else(others).or_else(prefix)?;
        let Entry { route, rule, said, matched } = &self.entries[at];
        Some(Chosen { route, index: *rule, rule: &route.rules[*rule], path: &matched.path, said })
    }
}

/// What a rule says that says no match.
fn every(kind: RouteKind) -> RequestMatch {
    let path = match kind {
        RouteKind::Grpc => PathMatch::Call { service: None, method: None },
        RouteKind::Http | RouteKind::Tls | RouteKind::Tcp => PathMatch::default(),
    };
    RequestMatch { path, ..RequestMatch::default() }
}

/// How specific a match is: the smaller comes first.
fn rank(matched: &RequestMatch) -> impl Ord {
    let len = |text: &Option<TextMatch>| text.as_ref().map_or(0, |it| it.as_str().chars().count());
    let path = match &matched.path {
        PathMatch::Exact(path) => (3, path.chars().count(), 0),
        // The specification leaves their place to us: a pattern says more than a prefix.
        PathMatch::Pattern(pattern) => (2, pattern.as_str().chars().count(), 0),
        PathMatch::Call { service, method } => (1, len(service), len(method)),
        PathMatch::Prefix(prefix) => (0, prefix.chars().count(), 0),
    };
    Reverse((path, matched.method.is_some(), matched.headers.len(), matched.query.len()))
}
