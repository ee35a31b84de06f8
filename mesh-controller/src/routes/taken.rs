//! What routes have taken of Services already: of which ports they speak, for whom and for which names, and how many bytes of
//! the views that have them. Every agent that knows a Service is told all of its routes, so these have a bound.

use std::collections::{BTreeMap, BTreeSet, HashMap, hash_map};

use mesh_core::{
    model::{
        Name,
        http::{Parent, RequestRoute, RouteKind},
        tcp::Hostname,
    },
    wire,
};

use crate::model::{Model, Route, Service};

/// Most bytes of routes of connections that the ports of a Service have in all: they are told with the Service. Room for 10,000
/// names of servers.
const MAX_OF_CONNECTIONS: usize = 512 << 10;
/// Most bytes of routes of requests of one kind that the ports of a Service have in all, with what policies say of their rules.
/// 5,000 simple rules of one port, each with a path and a backend, take 245 KiB (a test measures it); the 4,096 that 256 routes may
/// have can take 512 bytes each. An agent takes 64 MiB at once.
const MAX_OF_REQUESTS: usize = 2 << 20;

/// The room at a Service that some kinds of routes have together. No kind of requests shares one with another, so that a new
/// route of a kind that comes first never takes an older one's room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Room {
    /// Whose it is.
    pub(super) kinds: &'static str,
    /// How large it is, bytes.
    pub(super) most: usize,
}

impl Room {
    pub(super) const fn of(kind: RouteKind) -> Self {
        match kind {
            RouteKind::Grpc => Self { kinds: "GRPCRoutes", most: MAX_OF_REQUESTS },
            RouteKind::Http => Self { kinds: "HTTPRoutes", most: MAX_OF_REQUESTS },
            RouteKind::Tls | RouteKind::Tcp => {
                Self { kinds: "TLSRoutes and TCPRoutes", most: MAX_OF_CONNECTIONS }
            }
        }
    }
}

/// A route that wants to be somewhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) route: &'a Route,
    /// What it takes at each port, bytes.
    bytes: usize,
}

impl<'a> Wanted<'a> {
    /// `told`: the route as agents are told of it, if it is one of requests.
    pub(super) fn new(route: &'a Route, told: &RequestRoute) -> Self {
        let bytes = if route.kind.is_of_requests() { wire::route_bytes(told) } else { bytes(route) };
        Self { route, bytes }
    }
}

/// What a route speaks of: the Service, its port, and whose requests or connections, all or those of one namespace.
type Place = (Name, u16, Option<String>);

/// What is spoken of already.
#[derive(Default)]
pub(super) struct Taken<'a> {
    /// By routes of which kind.
    kinds: BTreeMap<Place, RouteKind>,
    /// By which route of connections: all of the place, or this name of a server.
    names: HashMap<(Place, Option<&'a Hostname>), &'a Name>,
    /// How many bytes, of each Service's room.
    bytes: BTreeMap<(Name, Room), usize>,
}

impl<'a> Taken<'a> {
    /// A Service has accepted a route, besides as these parents.
    pub(super) fn note(&mut self, model: &Model, wanted: &Wanted<'a>, parent: &Parent, besides: &[Parent]) {
        let Some(service) = model.services.get(&parent.service) else { return };
        let (route, more) = (wanted.route, self.more(wanted, service, parent.port, besides));
        *self.bytes.entry((service.name.clone(), Room::of(route.kind))).or_default() += more;
        for place in places(route, service, parent.port) {
            let kind = *self.kinds.entry(place.clone()).or_insert(route.kind);
            if kind != route.kind || kind.is_of_requests() {
                continue;
            }
            for name in names(route) {
                if let hash_map::Entry::Vacant(free) = self.names.entry((place.clone(), name)) {
                    free.insert(&route.name);
                }
            }
        }
    }

    /// How many bytes a route takes at a Service, besides what it takes there as these parents.
    fn more(&self, wanted: &Wanted<'_>, service: &Service, port: Option<u16>, besides: &[Parent]) -> usize {
        let has = |(service, port, _): &Place| {
            besides.iter().any(|it| it.service == *service && it.port.is_none_or(|of| of == *port))
        };
        let may = |place: &Place| self.kinds.get(place).is_none_or(|kind| *kind == wanted.route.kind);
        let new = places(wanted.route, service, port).filter(|place| may(place) && !has(place));
        wanted.bytes * new.count()
    }

    /// Whether all that a route speaks of there is spoken of by another kind, and by which.
    pub(super) fn by_another(
        &self,
        route: &Route,
        service: &Service,
        port: Option<u16>,
    ) -> Option<RouteKind> {
        let mut by = None;
        for place in places(route, service, port) {
            match self.kinds.get(&place) {
                Some(kind) if *kind != route.kind => by = Some(*kind),
                _ => return None,
            }
        }
        by
    }

    /// Whether there is room at a Service for a route that it has as these parents already; if not, how many bytes are left
    /// and how many it takes more.
    pub(super) fn has_room(
        &self,
        wanted: &Wanted<'_>,
        service: &Service,
        port: Option<u16>,
        besides: &[Parent],
    ) -> Result<(), (usize, usize)> {
        let room = Room::of(wanted.route.kind);
        let there = self.bytes.get(&(service.name.clone(), room)).copied().unwrap_or_default();
        let (left, more) = (room.most.saturating_sub(there), self.more(wanted, service, port, besides));
        if more <= left { Ok(()) } else { Err((left, more)) }
    }

    /// The route that has all that this one could have at a parent that accepts it.
    pub(super) fn behind(&self, model: &Model, route: &Route, parent: &Parent) -> Option<Name> {
        if route.kind.is_of_requests() {
            return None;
        }
        let service = model.services.get(&parent.service)?;
        let mut other = None;
        for place in places(route, service, parent.port) {
            if self.kinds.get(&place) != Some(&route.kind) {
                continue;
            }
            for name in names(route) {
                match self.names.get(&(place.clone(), name)) {
                    Some(by) if **by != route.name => other = Some(*by),
                    _ => return None,
                }
            }
        }
        other.cloned()
    }

    /// The ports at which a route of connections is in force.
    pub(super) fn ports(&self, model: &Model, route: &Route, parents: &[Parent]) -> BTreeSet<(Name, u16)> {
        let of_parent = |parent: &Parent| {
            let service = model.services.get(&parent.service);
            service.map(|it| places(route, it, parent.port).collect::<Vec<_>>()).unwrap_or_default()
        };
        let places = parents.iter().flat_map(of_parent);
        let ours = places.filter(|place| self.kinds.get(place) == Some(&route.kind));
        ours.map(|(service, port, _)| (service, port)).collect()
    }
}

/// The names of servers that a route of connections is for; of a TCPRoute it is none, and all.
fn names(route: &Route) -> impl Iterator<Item = Option<&Hostname>> {
    let all = (route.kind == RouteKind::Tcp).then_some(None);
    route.hostnames.iter().map(Some).chain(all)
}

/// About what a route of connections takes of a message, bytes.
fn bytes(route: &Route) -> usize {
    /// What a name of an object, a number and the like take.
    const EACH: usize = 64;
    let hostnames: usize = route.hostnames.iter().map(|it| it.to_string().len() + 2).sum();
    let backends = route.rules.iter().flat_map(|rule| &rule.backends).count();
    hostnames + EACH * (2 + backends)
}

/// What a route speaks of if this Service accepts it.
fn places<'a>(route: &'a Route, service: &'a Service, port: Option<u16>) -> impl Iterator<Item = Place> + 'a {
    let is_consumers = route.name.namespace != service.name.namespace;
    let ports = service.ports.iter().map(|it| it.port).filter(move |it| port.is_none_or(|port| port == *it));
    ports.map(move |port| (service.name.clone(), port, is_consumers.then(|| route.name.namespace.clone())))
}

#[cfg(test)]
mod tests {
    use mesh_core::model::http::{Backend, BackendTarget, Filters, PathMatch, RequestMatch, RouteRule};

    use super::*;

    /// As `cargo xtask bench --rules` has them, in routes of as many rules as one may have.
    fn simple(rules: usize) -> Vec<RequestRoute> {
        let service = || Name::new("bench", "http");
        let rule = |number: usize| {
            let path = PathMatch::Prefix(format!("/other/{number}"));
            let to = BackendTarget::Service { service: service(), port: 8080 };
            RouteRule {
                matches: vec![RequestMatch { path, ..RequestMatch::default() }],
                backends: vec![Backend { to, weight: 1, filters: Filters::default() }],
                ..RouteRule::default()
            }
        };
        let all: Vec<RouteRule> = (0..rules).map(rule).collect();
        let route = |(number, rules): (usize, &[RouteRule])| RequestRoute {
            kind: RouteKind::Http,
            name: Name::new("bench", format!("other-{number}")),
            created: 1_800_000_000,
            parents: vec![Parent { service: service(), port: None }],
            rules: rules.to_vec(),
        };
        all.chunks(16).enumerate().map(route).collect()
    }

    #[test]
    fn five_thousand_simple_rules_take_less_than_an_eighth_of_the_room() {
        let taken: usize = simple(5000).iter().map(wire::route_bytes).sum();
        assert_eq!(
            taken >> 10,
            245,
            "{taken} bytes: the comment of MAX_OF_REQUESTS and ADR 17 say how many KiB"
        );
        assert!(taken < MAX_OF_REQUESTS / 8, "{taken} of {MAX_OF_REQUESTS} bytes");
    }
}
