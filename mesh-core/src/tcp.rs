//! Connections that are routed: which route one falls under, and where it leads. Pure, so that `meshctl why` gives the agent's
//! own answer. The caller brings the chance, and the name that the client has asked for.
//!
//! Stands apart from [`crate::http`]: of these connections nothing is read but the beginning of TLS, and of that only where
//! routes are by name. `tests/properties/tcp.rs` compares the table with the specification, read slowly.

use std::{collections::HashMap, sync::Arc};

use crate::{
    model::{
        Workload,
        http::{BackendTarget, RouteKind},
        tcp::{ConnectionRoute, Hostname, Share},
    },
    refusal::Reason,
    route::{self, Route},
    view::Snapshot,
};

/// The routes for one port of a service, of one kind: for whom they are does not matter here.
#[derive(Debug)]
pub enum Table {
    /// A TCPRoute: every connection.
    Every(Arc<ConnectionRoute>),
    /// TLSRoutes: by the name that the client asks for.
    ByName(Names),
}

/// Routes by names of servers, in lower case.
#[derive(Debug, Default)]
pub struct Names {
    exact: HashMap<String, Arc<ConnectionRoute>>,
    /// By what names end with, without its first dot.
    under: HashMap<String, Arc<ConnectionRoute>>,
}

impl Table {
    /// The table of these routes, if there are any. Of two kinds the more specific one counts, and of two routes that are for
    /// the same the older one, then the first by name (Gateway API, "Conflicts").
    pub fn new(routes: &[&Arc<ConnectionRoute>]) -> Option<Self> {
        let kind = routes.iter().map(|route| route.kind).min()?;
        let mut routes: Vec<_> = routes.iter().filter(|route| route.kind == kind).collect();
        routes.sort_by_key(|route| (route.created, &route.name));
        if kind == RouteKind::Tcp {
            return routes.first().map(|route| Self::Every(Arc::clone(route)));
        }
        let mut names = Names::default();
        for route in routes {
            for hostname in &route.hostnames {
                let (of, name) = match hostname {
                    Hostname::Exact(name) => (&mut names.exact, name),
                    Hostname::Under(domain) => (&mut names.under, domain),
                };
                of.entry(name.clone()).or_insert_with(|| Arc::clone(route));
            }
        }
        Some(Self::ByName(names))
    }

    /// Whether the name that a client asks for has to be known.
    pub fn is_by_name(&self) -> bool {
        matches!(self, Self::ByName(_))
    }

    /// The route that a connection falls under. `name`: what the client asks for in TLS, if it does. A name that is written
    /// out comes before a domain, and a longer domain before a shorter one.
    pub fn choose(&self, name: Option<&str>) -> Option<&Arc<ConnectionRoute>> {
        match self {
            Self::Every(route) => Some(route),
            Self::ByName(names) => names.choose(name?),
        }
    }
}

impl Names {
    fn choose(&self, name: &str) -> Option<&Arc<ConnectionRoute>> {
        let name = name.to_ascii_lowercase();
        let domains = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
        let under = || domains.filter(|_| !name.starts_with('.')).find_map(|domain| self.under.get(domain));
        self.exact.get(&name).or_else(under)
    }
}

/// Where a connection of a route goes, by the weights; `None` if nothing has any. `chance`: any number, evenly spread.
pub fn share(shares: &[Share], chance: u64) -> Option<&BackendTarget> {
    let sum: u64 = shares.iter().map(|share| u64::from(share.weight)).sum();
    let mut at = chance.checked_rem(sum)?;
    let found = shares.iter().find(|share| {
        let within = at < u64::from(share.weight);
        at = at.saturating_sub(u64::from(share.weight));
        within
    });
    found.map(|share| &share.to)
}

/// The way to what a connection of this workload goes to.
pub fn to(
    snapshot: &Snapshot,
    source: &Workload,
    to: Option<&BackendTarget>,
    is_ipv4: bool,
) -> Result<Route, Reason> {
    let Some(BackendTarget::Service { service, port }) = to else { return Err(Reason::NoBackend) };
    let service = snapshot.service(service).ok_or(Reason::NoBackend)?;
    let endpoints = route::endpoints(service, *port, is_ipv4, source)?;
    Ok(Route::Service { service: service.clone(), port: *port, endpoints })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Name;

    #[test]
    fn shares_are_as_the_weights() {
        let to = |port| BackendTarget::Service { service: Name::new("shop", "db"), port };
        let shares = [(1, 1), (2, 0), (3, 3)].map(|(port, weight)| Share { to: to(port), weight });
        let chosen: Vec<_> = (0..4000).map(|chance| share(&shares, chance).unwrap()).collect();
        let counts = [1, 2, 3].map(|port| chosen.iter().filter(|it| ***it == to(port)).count());
        assert_eq!(counts, [1000, 0, 3000]);
        assert!(share(&shares[1..2], 7).is_none());
        assert!(share(&[], 7).is_none());
    }
}
