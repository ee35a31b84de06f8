//! What routes have taken of Services already: of which ports they speak, for whom and for which names, and how many bytes of
//! the views that have them.

use std::collections::{BTreeMap, BTreeSet, HashMap, hash_map};

use mesh_core::model::{
    Name,
    http::{Parent, RouteKind},
    tcp::Hostname,
};

use crate::model::{Model, Route, Service};

/// Most bytes of routes of connections that the ports of a Service have in all: they are told with the Service, to every agent
/// that knows it. Room for 10,000 names of servers.
pub(super) const MAX_BYTES: usize = 512 << 10;

/// What a route speaks of: the Service, its port, and whose requests or connections, all or those of one namespace.
type Place = (Name, u16, Option<String>);

/// What is spoken of already.
#[derive(Default)]
pub(super) struct Taken<'a> {
    /// By routes of which kind.
    kinds: BTreeMap<Place, RouteKind>,
    /// By which route of connections: all of the place, or this name of a server.
    names: HashMap<(Place, Option<&'a Hostname>), &'a Name>,
    /// How many bytes of routes of connections the Services have.
    bytes: BTreeMap<Name, usize>,
}

impl<'a> Taken<'a> {
    /// A Service has accepted a route.
    pub(super) fn note(&mut self, model: &Model, route: &'a Route, parent: &Parent) {
        let Some(service) = model.services.get(&parent.service) else { return };
        for place in places(route, service, parent.port) {
            let kind = *self.kinds.entry(place.clone()).or_insert(route.kind);
            if kind != route.kind || kind.is_of_requests() {
                continue;
            }
            *self.bytes.entry(service.name.clone()).or_default() += bytes(route);
            for name in names(route) {
                if let hash_map::Entry::Vacant(free) = self.names.entry((place.clone(), name)) {
                    free.insert(&route.name);
                }
            }
        }
    }

    /// Whether all that a route speaks of there is spoken of by another kind, and by which.
    pub(super) fn by_another(&self, route: &Route, service: &Service, port: Option<u16>) -> Option<RouteKind> {
        let mut by = None;
        for place in places(route, service, port) {
            match self.kinds.get(&place) {
                Some(kind) if *kind != route.kind => by = Some(*kind),
                _ => return None,
            }
        }
        by
    }

    /// Whether there is room at a Service for a route of connections.
    pub(super) fn has_room(&self, route: &Route, service: &Service, port: Option<u16>) -> bool {
        let there = self.bytes.get(&service.name).copied().unwrap_or_default();
        route.kind.is_of_requests()
            || there + bytes(route) * places(route, service, port).count() <= MAX_BYTES
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
