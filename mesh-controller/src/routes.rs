//! Which routes are in force for which Services, and where their requests go: routes and grants as manifests want them
//! into the routes that agents have, with what became of each. Pure.
//!
//! A route is in force for those of its parents that accept it. What it refers to and may not have, or what is not there,
//! takes nothing else of it out of force: its share of the requests goes nowhere, and is answered so.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use mesh_core::model::{
    Name,
    http::{Backend, BackendTarget, Filters, Parent, RequestRoute, RouteKind, RouteRule},
};

use crate::model::{Model, ParentRef, Port, Route, Service};

/// What became of all routes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resolved {
    /// Those that are in force, by kind and name.
    pub routes: Vec<Arc<RequestRoute>>,
    /// All of them.
    pub outcomes: BTreeMap<(RouteKind, Name), Outcome>,
}

/// What became of one route.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Each parent, and why it does not accept the route.
    pub parents: Vec<(ParentRef, Option<NotAccepted>)>,
    /// References that lead nowhere, in their order.
    pub broken: Vec<Broken>,
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
    Conflicted(Name),
}

impl NotAccepted {
    /// The reason of the condition Accepted (Gateway API, `RouteConditionReason`).
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoService(_) | Self::NoPort(_) => "NoMatchingParent",
            Self::NoAddress(_) => "UnsupportedValue",
            Self::Conflicted(_) => "Conflicted",
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
                "Service {service} is headless: it has no address by which requests to it could be known"
            ),
            Self::Conflicted(service) => {
                write!(f, "a GRPCRoute speaks of the same ports of Service {service}, and comes before this")
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

/// Looks up what all routes refer to.
pub fn resolve(model: &Model) -> Resolved {
    let mut resolved = Resolved::default();
    let mut taken = Taken::default();
    // In the order of kinds: the ones that say more come first.
    for ((kind, name), route) in &model.routes {
        let mut outcome = Outcome::default();
        let mut parents = Vec::new();
        for parent in &route.parents {
            let verdict = accept(model, &taken, route, parent);
            if let Ok(accepted) = &verdict
                && !parents.contains(accepted)
            {
                parents.push(accepted.clone());
            }
            outcome.parents.push((parent.clone(), verdict.err()));
        }
        let mut references = References { model, route, parents: &parents, broken: vec![] };
        let rules = references.rules();
        outcome.broken = references.broken;
        resolved.outcomes.insert((*kind, name.clone()), outcome);
        if !parents.is_empty() {
            let (kind, name, created) = (*kind, name.clone(), route.created);
            parents.iter().for_each(|parent| taken.note(model, route, parent));
            resolved.routes.push(Arc::new(RequestRoute { kind, name, created, parents, rules }));
        }
    }
    resolved
}

/// The ports of which GRPCRoutes speak: the Service, its port, and whose requests, all or those of one namespace.
#[derive(Default)]
struct Taken(BTreeSet<(Name, u16, Option<String>)>);

impl Taken {
    fn note(&mut self, model: &Model, route: &Route, parent: &Parent) {
        if route.kind == RouteKind::Grpc
            && let Some(service) = model.services.get(&parent.service)
        {
            self.0.extend(places(route, service, parent.port));
        }
    }
}

/// What a route speaks of if this Service accepts it.
fn places<'a>(
    route: &'a Route,
    service: &'a Service,
    port: Option<u16>,
) -> impl Iterator<Item = (Name, u16, Option<String>)> + 'a {
    let is_consumers = route.name.namespace != service.name.namespace;
    let ports = service.ports.iter().map(|it| it.port).filter(move |it| port.is_none_or(|port| port == *it));
    ports.map(move |port| (service.name.clone(), port, is_consumers.then(|| route.name.namespace.clone())))
}

/// Whether a Service accepts a route, and for which port.
fn accept(model: &Model, taken: &Taken, route: &Route, parent: &ParentRef) -> Result<Parent, NotAccepted> {
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
    if route.kind == RouteKind::Http && places(route, service, port).all(|place| taken.0.contains(&place)) {
        return Err(NotAccepted::Conflicted(service.name.clone()));
    }
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
    fn rules(&mut self) -> Vec<RouteRule> {
        let mut rules = self.route.rules.clone();
        for (index, rule) in rules.iter_mut().enumerate() {
            let at = format!("spec.rules[{index}]");
            self.mirrors(&at, &mut rule.filters);
            for (index, Backend { to, filters, .. }) in rule.backends.iter_mut().enumerate() {
                let at = format!("{at}.backendRefs[{index}]");
                self.look_up(&at, to);
                self.mirrors(&at, filters);
            }
        }
        rules
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
