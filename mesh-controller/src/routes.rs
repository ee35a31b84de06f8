//! Which routes are in force for which Services, and where their requests and connections go: routes and grants as manifests want them
//! into the routes that agents have, with what became of each. Pure.
//!
//! A route is in force for those of its parents that accept it. What it refers to and may not have, or what is not there,
//! takes nothing else of it out of force: its share of the requests goes nowhere, and is answered so.

mod taken;
mod unread;

use std::{collections::BTreeMap, fmt, sync::Arc};

use mesh_core::model::{
    Name,
    http::{Backend, BackendTarget, Filters, Parent, RequestRoute, RouteKind, RouteRule},
    tcp::{ConnectionRoute, Share},
};

use self::taken::{Room, Taken, Wanted};
pub use self::unread::Unread;
use crate::{
    model::{Model, ParentRef, Port, Route},
    traffic,
};

/// What became of all routes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resolved {
    /// Those of requests that are in force, by kind and name.
    pub routes: Vec<Arc<RequestRoute>>,
    /// Those of connections that are in force, by the Service and the port that they are for; the older ones first.
    pub connections: BTreeMap<(Name, u16), Vec<Arc<ConnectionRoute>>>,
    /// All of them.
    pub outcomes: BTreeMap<(RouteKind, Name), Outcome>,
    /// What TrafficPolicies, by name, say of requests to ports whose connections are routed.
    pub unread: BTreeMap<Name, Vec<Unread>>,
}

/// What became of one route.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Each parent, and why it does not accept the route.
    pub parents: Vec<(ParentRef, Option<NotAccepted>)>,
    /// References that lead nowhere, in their order.
    pub broken: Vec<Broken>,
    /// Parents that accept the route, by their places, of whose connections it gets none: another one is older and for the
    /// same.
    pub behind: Vec<(usize, Name)>,
}

/// Why a Service does not accept a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotAccepted {
    /// There is no such Service.
    NoService(Name),
    /// The Service has no such port.
    NoPort(ParentRef),
    /// Its requests cannot be told from others.
    NoAddress(Name),
    /// All ports that the route speaks of have routes of a kind that says more.
    Conflicted(Name, RouteKind),
    /// The Service has no room for it beside the older ones.
    TooMany {
        /// The Service.
        service: Name,
        /// The kind of the route.
        kind: RouteKind,
        /// How many bytes the older ones leave.
        left: usize,
        /// How many it takes.
        takes: usize,
    },
}

impl NotAccepted {
    /// The reason of the condition Accepted (Gateway API, `RouteConditionReason`).
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoService(_) | Self::NoPort(_) => "NoMatchingParent",
            Self::NoAddress(_) => "UnsupportedValue",
            Self::Conflicted(..) => "Conflicted",
            Self::TooMany { .. } => "TooManyRoutes",
        }
    }

    /// What helps, where that is the same whatever else there is.
    pub const fn cure(&self) -> Option<&'static str> {
        match self {
            Self::NoService(_) | Self::NoPort(_) => None,
            Self::NoAddress(_) => Some("give the Service a clusterIP, or make another one for clients"),
            Self::Conflicted(..) => Some("give each kind a port of its own, or remove one of the routes"),
            Self::TooMany { kind: RouteKind::Grpc | RouteKind::Http, .. } => Some(
                "name the port in parentRefs if the route is for one, have fewer or shorter rules, or give some of the requests a \
                 Service of their own",
            ),
            Self::TooMany { kind: RouteKind::Tls | RouteKind::Tcp, .. } => {
                Some("name fewer servers, by *.DOMAIN where that is meant, or use more Services")
            }
        }
    }
}

impl fmt::Display for NotAccepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoService(service) => {
                write!(
                    f,
                    "there is no Service {service}, or it is only another name for something (ExternalName)"
                )
            }
            Self::NoPort(ParentRef { service, port, section, .. }) => {
                write!(f, "Service {service} has no TCP port")?;
                port.iter().try_for_each(|port| write!(f, " {port}"))?;
                section.iter().try_for_each(|name| write!(f, " that is called '{name}'"))
            }
            Self::NoAddress(service) => write!(
                f,
                "Service {service} is headless: it has no address by which what is sent to it could be known"
            ),
            Self::Conflicted(service, by) => {
                let by = by.as_str();
                write!(f, "{by}s speak of the same ports of Service {service}, and come before this")
            }
            Self::TooMany { service, kind, left, takes } => {
                let Room { kinds, most } = Room::of(*kind);
                let field = if *kind == RouteKind::Tls { "spec.hostnames" } else { "spec.rules" };
                write!(
                    f,
                    "{kinds} of Service {service} have {} KiB in all, counted for each port: the older ones leave {left} bytes, \
                     and this one takes {takes} with its {field}",
                    most >> 10
                )
            }
        }
    }
}

/// A reference that leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// Where it stands.
    pub field: String,
    /// Why.
    pub why: Why,
}

/// Why a reference leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// It is to something else than a Service.
    Kind,
    /// No grant of the Service's namespace permits it.
    NotPermitted(Name),
    /// There is no such Service.
    NoService(Name),
    /// The Service has no such port.
    NoPort(Name, u16),
}

impl Why {
    /// The reason of the condition ResolvedRefs (Gateway API, `RouteConditionReason`).
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Kind => "InvalidKind",
            Self::NotPermitted(_) => "RefNotPermitted",
            Self::NoService(_) | Self::NoPort(..) => "BackendNotFound",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind => f.write_str("only Services can be referred to"),
            Self::NotPermitted(service) => {
                write!(f, "no ReferenceGrant of namespace {} permits it", service.namespace)
            }
            Self::NoService(service) => write!(f, "there is no Service {service}"),
            Self::NoPort(service, port) => write!(f, "Service {service} has no TCP port {port}"),
        }
    }
}

/// Looks up what all routes refer to. `traffic`: what policies say of their rules, which these are told.
pub fn resolve(model: &Model, traffic: &traffic::Resolved) -> Resolved {
    let mut resolved = Resolved::default();
    let mut taken = Taken::default();
    // In the order of kinds: the ones that say more come first. Of one kind the older ones do, so that a new one never
    // takes another's place.
    let mut all: Vec<&Arc<Route>> = model.routes.values().collect();
    all.sort_by_key(|route| (route.kind, route.created, &route.name));
    for route in all {
        let mut told = told(route, traffic);
        let wanted = Wanted::new(route, &told);
        let mut outcome = Outcome::default();
        let mut parents = Vec::new();
        for parent in &route.parents {
            let verdict = accept(model, &taken, &wanted, parent, &parents);
            if let Ok(accepted) = &verdict {
                if !parents.contains(accepted) {
                    taken.note(model, &wanted, accepted, &parents);
                    parents.push(accepted.clone());
                }
                let behind = taken.behind(model, route, accepted);
                outcome.behind.extend(behind.map(|name| (parent.index, name)));
            }
            outcome.parents.push((parent.clone(), verdict.err()));
        }
        let mut references = References { model, route, parents: &parents, broken: vec![] };
        references.rules(&mut told.rules);
        outcome.broken = references.broken;
        resolved.outcomes.insert((route.kind, route.name.clone()), outcome);
        if route.kind.is_of_requests() {
            if !parents.is_empty() {
                resolved.routes.push(Arc::new(RequestRoute { parents, ..told }));
            }
            continue;
        }
        let RequestRoute { kind, name, created, rules, .. } = told;
        let share = |it: Backend| Share { to: it.to, weight: it.weight };
        let backends = rules.into_iter().flat_map(|rule| rule.backends).map(share).collect();
        let hostnames = route.hostnames.clone();
        let of_connections = Arc::new(ConnectionRoute { kind, name, created, hostnames, backends });
        for (service, port) in taken.ports(model, route, &parents) {
            resolved.connections.entry((service, port)).or_default().push(of_connections.clone());
        }
    }
    resolved.routes.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    resolved.unread = unread::all(traffic, &resolved.connections);
    resolved
}

/// A route as agents would be told of it if all of its parents accepted it, and all that it refers to was there.
fn told(route: &Route, traffic: &traffic::Resolved) -> RequestRoute {
    let parents = route.parents.iter().map(|it| Parent { service: it.service.clone(), port: it.port });
    let mut told = RequestRoute {
        kind: route.kind,
        name: route.name.clone(),
        created: route.created,
        parents: parents.collect(),
        rules: route.rules.clone(),
    };
    if route.kind.is_of_requests() {
        traffic.tell(&mut told);
    }
    told
}

/// Whether a Service accepts a route that it has as these parents already, and for which port.
fn accept(
    model: &Model,
    taken: &Taken<'_>,
    wanted: &Wanted<'_>,
    parent: &ParentRef,
    besides: &[Parent],
) -> Result<Parent, NotAccepted> {
    let no_service = || NotAccepted::NoService(parent.service.clone());
    let service = model.services.get(&parent.service).ok_or_else(no_service)?;
    if service.addresses.is_empty() {
        return Err(NotAccepted::NoAddress(service.name.clone()));
    }
    let is_meant = |it: &&Port| {
        parent.port.is_none_or(|port| port == it.port)
            && parent.section.as_ref().is_none_or(|name| *name == it.name)
    };
    let found = service.ports.iter().find(is_meant);
    let found = found.ok_or_else(|| NotAccepted::NoPort(parent.clone()))?;
    let all = parent.port.is_none() && parent.section.is_none();
    let port = (!all).then_some(found.port);
    if let Some(by) = taken.by_another(wanted.route, service, port) {
        return Err(NotAccepted::Conflicted(service.name.clone(), by));
    }
    taken.has_room(wanted, service, port, besides).map_err(|(left, takes)| {
        let (service, kind) = (service.name.clone(), wanted.route.kind);
        NotAccepted::TooMany { service, kind, left, takes }
    })?;
    Ok(Parent { service: service.name.clone(), port })
}

/// Looks up what one route refers to.
struct References<'a> {
    model: &'a Model,
    route: &'a Route,
    /// Those that accept it.
    parents: &'a [Parent],
    broken: Vec<Broken>,
}

impl References<'_> {
    fn rules(&mut self, rules: &mut [RouteRule]) {
        for (index, rule) in rules.iter_mut().enumerate() {
            let at = format!("spec.rules[{index}]");
            self.mirrors(&at, &mut rule.filters);
            for (index, Backend { to, filters, .. }) in rule.backends.iter_mut().enumerate() {
                let at = format!("{at}.backendRefs[{index}]");
                self.look_up(&at, to);
                self.mirrors(&at, filters);
            }
        }
    }

    fn mirrors(&mut self, at: &str, filters: &mut Filters) {
        for mirror in &mut filters.mirrors {
            self.look_up(&format!("{at}.filters"), &mut mirror.to);
        }
    }

    fn look_up(&mut self, at: &str, to: &mut BackendTarget) {
        if let Err(why) = self.found(to) {
            self.broken.push(Broken { field: at.to_owned(), why });
            *to = BackendTarget::Nowhere;
        }
    }

    fn found(&self, to: &BackendTarget) -> Result<(), Why> {
        let BackendTarget::Service { service: name, port } = to else { return Err(Why::Kind) };
        // Before it is looked up: who may not refer to it is not told whether it is there.
        if !self.may_refer_to(name) {
            return Err(Why::NotPermitted(name.clone()));
        }
        let service = self.model.services.get(name).ok_or_else(|| Why::NoService(name.clone()))?;
        let has = service.ports.iter().any(|it| it.port == *port);
        if has { Ok(()) } else { Err(Why::NoPort(name.clone(), *port)) }
    }

    /// A route may send requests to Services of its own namespace, of those whose requests it is about anyway, and where a
    /// grant says so.
    fn may_refer_to(&self, service: &Name) -> bool {
        let (kind, own, namespace) = (self.route.kind, &self.route.name.namespace, &service.namespace);
        let of_parent = || self.parents.iter().any(|it| it.service.namespace == *namespace);
        let grants = self.model.grants.range(Name::new(namespace, "")..);
        let mut grants = grants.take_while(|(name, _)| name.namespace == *namespace);
        namespace == own || of_parent() || grants.any(|(_, grant)| grant.permits(kind, own, service))
    }
}
