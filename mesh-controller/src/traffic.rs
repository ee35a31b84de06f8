//! Which TrafficPolicies are in force for what: policies as manifests want them into what agents have for each port of a
//! Service and each rule of a route, with what became of each policy. Pure.
//!
//! Who is nearer to what is sent comes first, part by part: a rule before its route, a port before its Service, and that
//! before its namespace. Of two that are as near, the older one has the parts that both speak of, and the other one the
//! rest of its own.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
};

use mesh_core::model::{
    Name,
    health::HealthCheck,
    http::{RequestRoute, RouteKind},
    traffic::Traffic,
};

use crate::model::{Model, Takes, TrafficPolicy, TrafficTarget};

/// What became of all policies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resolved {
    at: BTreeMap<Place, Traffic>,
    checks: BTreeMap<Place, HealthCheck>,
    /// What is said to those who take, of Services and of their ports alone.
    takes: BTreeMap<Place, Takes>,
    /// Who says it: the policy that has a field of the spec at a place.
    by: BTreeMap<(Place, &'static str), Name>,
    /// All of them.
    pub outcomes: BTreeMap<Name, Outcome>,
}

/// What became of one policy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Each target, and why the policy is not, or not wholly, in force there.
    pub targets: Vec<(TrafficTarget, Option<NotInForce>)>,
}

/// Why a policy is not in force for a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotInForce {
    /// There is none.
    NoTarget,
    /// It has no port, or no rule, of that name.
    NoSection,
    /// Another policy says some of the same of the same.
    Conflicted {
        /// Which.
        with: Name,
        /// The fields of the spec that are not in force.
        parts: Vec<&'static str>,
    },
}

impl NotInForce {
    /// The reason of the condition Accepted (Gateway API, `PolicyConditionReason`).
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoTarget | Self::NoSection => "TargetNotFound",
            Self::Conflicted { .. } => "Conflicted",
        }
    }
}

impl fmt::Display for NotInForce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTarget => f.write_str("there is none of this name in the policy's namespace"),
            Self::NoSection => f.write_str("it has no port, or no rule, of this name"),
            Self::Conflicted { with, parts } => {
                write!(f, "{} is said by {with} already, which is older", parts.join(" and "))
            }
        }
    }
}

/// What something is said of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Namespace(String),
    Service(Name),
    Port(Name, u16),
    Route(RouteKind, Name),
    Rule(RouteKind, Name, usize),
}

/// Looks up what all policies are for.
pub fn resolve(model: &Model) -> Resolved {
    let mut all: Vec<&TrafficPolicy> = model.traffic.values().map(|it| &**it).collect();
    all.sort_by_key(|policy| (policy.created, &policy.name));
    let mut resolved = Resolved::default();
    for policy in all {
        let mut outcome = Outcome::default();
        for target in &policy.targets {
            let verdict = places(model, &policy.name.namespace, target).and_then(|place| {
                let traffic = of_place(&place, &policy.traffic);
                let conflict = take(&mut resolved.by, &place, policy);
                if let Some(check) = &policy.health_check {
                    resolved.checks.entry(place.clone()).or_insert_with(|| check.clone());
                }
                if !policy.takes.is_empty() {
                    let takes = resolved.takes.entry(place.clone()).or_default();
                    *takes = takes.or(&policy.takes);
                }
                let at = resolved.at.entry(place).or_default();
                *at = at.or(&traffic);
                conflict.map_or(Ok(()), Err)
            });
            outcome.targets.push((target.clone(), verdict.err()));
        }
        resolved.outcomes.insert(policy.name.clone(), outcome);
    }
    resolved
}

/// What a policy says of a place: who speaks of a Service itself wants its requests read, if it is of requests that he
/// speaks. Who speaks of a whole namespace cannot know that each port of it speaks HTTP.
fn of_place(place: &Place, traffic: &Traffic) -> Traffic {
    let is_of_service = matches!(place, Place::Service(_) | Place::Port(..));
    Traffic { reads_requests: is_of_service && traffic.is_of_requests(), ..traffic.clone() }
}

/// Notes who says what, and tells what was said before.
fn take(
    by: &mut BTreeMap<(Place, &'static str), Name>,
    place: &Place,
    policy: &TrafficPolicy,
) -> Option<NotInForce> {
    let (mut parts, mut with) = (vec![], None);
    for part in parts_of(policy) {
        match by.entry((place.clone(), part)) {
            Entry::Vacant(free) => drop(free.insert(policy.name.clone())),
            Entry::Occupied(other) if *other.get() == policy.name => {}
            Entry::Occupied(other) => {
                parts.push(part);
                with.get_or_insert_with(|| other.get().clone());
            }
        }
    }
    with.map(|with| NotInForce::Conflicted { with, parts })
}

/// The fields of the spec that say something.
fn parts_of(policy: &TrafficPolicy) -> impl Iterator<Item = &'static str> {
    let Traffic { balancing, timeouts, retries, limits, ejection, faults, hedge, reads_requests: _ } =
        &policy.traffic;
    let Takes { rates, sizes } = &policy.takes;
    [
        ("balancing", balancing.is_some()),
        ("timeouts", timeouts.is_some()),
        ("retries", retries.is_some()),
        ("limits", limits.is_some()),
        ("ejection", ejection.is_some()),
        ("faults", faults.is_some()),
        ("hedge", hedge.is_some()),
        ("healthCheck", policy.health_check.is_some()),
        ("rateLimits", rates.is_some()),
        ("sizeLimits", sizes.is_some()),
    ]
    .into_iter()
    .filter_map(|(part, says)| says.then_some(part))
}

/// Where a target is.
fn places(model: &Model, namespace: &str, target: &TrafficTarget) -> Result<Place, NotInForce> {
    match target {
        TrafficTarget::Namespace => Ok(Place::Namespace(namespace.to_owned())),
        TrafficTarget::Service { name, port } => {
            let name = Name::new(namespace, name);
            let service = model.services.get(&name).ok_or(NotInForce::NoTarget)?;
            let Some(wanted) = port else { return Ok(Place::Service(name)) };
            let port = service.ports.iter().find(|it| it.name == *wanted).ok_or(NotInForce::NoSection)?;
            Ok(Place::Port(name, port.port))
        }
        TrafficTarget::Route { kind, name, rule } => {
            let name = Name::new(namespace, name);
            let route = model.routes.get(&(*kind, name.clone())).ok_or(NotInForce::NoTarget)?;
            let Some(wanted) = rule else { return Ok(Place::Route(*kind, name)) };
            let found = route.rules.iter().position(|it| it.name == *wanted);
            Ok(Place::Rule(*kind, name, found.ok_or(NotInForce::NoSection)?))
        }
    }
}

impl Resolved {
    /// What is said of a port of a Service.
    pub fn of_port(&self, service: &Name, port: u16) -> Traffic {
        self.first_of(around(service, port))
    }

    /// What is said of the requests to a port of a Service: each part by the policy that counts, and whether that is one for
    /// the whole namespace.
    pub fn of_requests(&self, service: &Name, port: u16) -> Vec<(&Name, bool, &'static str)> {
        let places = around(service, port);
        let mut said: BTreeMap<&'static str, (&Name, bool, &'static str)> = BTreeMap::new();
        let counts = |place: &Place, field| {
            let nearest = places.iter().find(|it| self.by.contains_key(&((*it).clone(), field)));
            nearest == Some(place)
        };
        for place in &places {
            for (field, part) in self.at.get(place).into_iter().flat_map(Traffic::parts_of_requests) {
                if let Some(by) = self.by.get(&(place.clone(), field)).filter(|_| counts(place, field)) {
                    said.insert(field, (by, matches!(place, Place::Namespace(_)), part));
                }
            }
        }
        said.into_values().collect()
    }

    /// How the endpoints of a port of a Service are checked.
    pub fn check_of(&self, service: &Name, port: u16) -> Option<&HealthCheck> {
        if self.checks.is_empty() {
            return None;
        }
        around(service, port).iter().find_map(|place| self.checks.get(place))
    }

    /// What is said of what the workloads behind a port of a Service take.
    pub fn takes(&self, service: &Name, port: u16) -> Takes {
        let places = [Place::Port(service.clone(), port), Place::Service(service.clone())];
        let said = places.iter().filter_map(|place| self.takes.get(place));
        said.fold(Takes::default(), |nearer, farther| nearer.or(farther))
    }

    /// Whether anything is said of what any workload takes.
    pub fn speaks_of_takes(&self) -> bool {
        !self.takes.is_empty()
    }

    /// Tells the rules of a route what is said of them.
    pub fn tell(&self, route: &mut RequestRoute) {
        if !self.speaks_of_routes() {
            return;
        }
        let RequestRoute { kind, name, rules, .. } = route;
        for (index, rule) in rules.iter_mut().enumerate() {
            let places = [Place::Rule(*kind, name.clone(), index), Place::Route(*kind, name.clone())];
            rule.traffic = self.first_of(places);
        }
    }

    /// Whether a rule of some route is spoken of.
    fn speaks_of_routes(&self) -> bool {
        self.at.keys().any(|place| matches!(place, Place::Route(..) | Place::Rule(..)))
    }

    fn first_of<const N: usize>(&self, places: [Place; N]) -> Traffic {
        let said = places.iter().filter_map(|place| self.at.get(place));
        said.fold(Traffic::default(), |nearer, farther| nearer.or(farther))
    }
}

/// What something that is said of a port can be said of, the nearest first.
fn around(service: &Name, port: u16) -> [Place; 3] {
    [
        Place::Port(service.clone(), port),
        Place::Service(service.clone()),
        Place::Namespace(service.namespace.clone()),
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_core::model::{
        Distribution,
        health::{Pace, Probe},
        http::{RouteRule, Timeouts},
        intake::Sizes,
        traffic::{Algorithm, Balancing, Limits},
    };

    use super::*;
    use crate::model::{Object, Port, Route, Service};

    fn service(name: &str) -> Object {
        let port = |name: &str, port| Port { name: name.to_owned(), port, target: Some(8080) };
        Object::Service(Service {
            name: Name::new("shop", name),
            addresses: vec!["10.96.0.1".parse().unwrap()],
            selector: BTreeMap::new(),
            ports: vec![port("http", 80), port("admin", 81)],
            distribution: Distribution::Any,
            affinity: None,
        })
    }

    fn route() -> Object {
        let rule = |name: &str| RouteRule { name: name.to_owned(), ..RouteRule::default() };
        let rules = vec![rule("a"), rule("b")];
        let name = Name::new("shop", "canary");
        Object::Route(
            Route { kind: RouteKind::Http, name, created: 0, parents: vec![], hostnames: vec![], rules }
                .into(),
        )
    }

    fn policy(name: &str, created: i64, targets: &[TrafficTarget], traffic: Traffic) -> Object {
        let (name, targets) = (Name::new("shop", name), targets.to_vec());
        let takes = Takes::default();
        Object::TrafficPolicy(
            TrafficPolicy { name, created, targets, traffic, health_check: None, takes }.into(),
        )
    }

    fn taking(name: &str, created: i64, targets: &[TrafficTarget], takes: Takes) -> Object {
        let (name, targets) = (Name::new("shop", name), targets.to_vec());
        let traffic = Traffic::default();
        Object::TrafficPolicy(
            TrafficPolicy { name, created, targets, traffic, health_check: None, takes }.into(),
        )
    }

    fn of_service(port: Option<&str>) -> TrafficTarget {
        TrafficTarget::Service { name: "web".into(), port: port.map(str::to_owned) }
    }

    fn of_route(rule: Option<&str>) -> TrafficTarget {
        let (kind, name) = (RouteKind::Http, "canary".to_owned());
        TrafficTarget::Route { kind, name, rule: rule.map(str::to_owned) }
    }

    fn times(seconds: u64) -> Traffic {
        let request = Some(Duration::from_secs(seconds));
        Traffic { timeouts: Some(Timeouts { request, backend: None }), ..Traffic::default() }
    }

    fn balanced() -> Traffic {
        let balancing = Balancing { algorithm: Algorithm::Random, slow_start: None };
        Traffic { balancing: Some(balancing), ..Traffic::default() }
    }

    fn resolved(policies: &[Object]) -> Resolved {
        let objects = [service("web"), service("db"), route()];
        resolve(&objects.iter().chain(policies).collect())
    }

    #[test]
    fn who_is_nearer_comes_first_part_by_part() {
        let all = resolved(&[
            policy("ns", 0, &[TrafficTarget::Namespace], Traffic { ..times(1).or(&balanced()) }),
            policy("web", 0, &[of_service(None)], times(2)),
            policy("http", 0, &[of_service(Some("http"))], times(3)),
            policy("canary", 0, &[of_route(None)], times(4)),
            policy("b", 0, &[of_route(Some("b"))], times(5)),
        ]);
        let web = |port| all.of_port(&Name::new("shop", "web"), port);
        assert_eq!((web(80).timeouts, web(81).timeouts), (times(3).timeouts, times(2).timeouts));
        assert_eq!(web(80).balancing, balanced().balancing);
        let db = all.of_port(&Name::new("shop", "db"), 80);
        assert_eq!(db.timeouts, times(1).timeouts);
        assert!(web(81).reads_requests && !db.reads_requests, "a namespace does not say that all is HTTP");
        let Object::Route(route) = route() else { panic!() };
        let mut route = RequestRoute {
            kind: route.kind,
            name: route.name.clone(),
            created: 0,
            parents: vec![],
            rules: route.rules.clone(),
        };
        all.tell(&mut route);
        let said: Vec<_> = route.rules.iter().map(|rule| rule.traffic.timeouts).collect();
        assert_eq!(said, [times(4).timeouts, times(5).timeouts]);
    }

    #[test]
    fn what_connections_have_too_reads_nothing() {
        let limits = Some(Limits { connections: Some(1), requests: None, pending: 0 });
        let all = resolved(&[
            policy("web", 0, &[of_service(None)], balanced()),
            policy("web-2", 0, &[of_service(None)], Traffic { limits, ..Traffic::default() }),
        ]);
        assert!(!all.of_port(&Name::new("shop", "web"), 80).reads_requests);
    }

    #[test]
    fn of_two_that_say_the_same_the_older_one_counts_and_the_other_keeps_its_rest() {
        let all = resolved(&[
            policy("a-newer", 2, &[of_service(None)], times(2).or(&balanced())),
            policy("older", 1, &[of_service(None)], times(1)),
        ]);
        let web = all.of_port(&Name::new("shop", "web"), 80);
        assert_eq!((web.timeouts, web.balancing), (times(1).timeouts, balanced().balancing));
        let (_, verdict) = &all.outcomes[&Name::new("shop", "a-newer")].targets[0];
        let verdict = verdict.clone().expect("it is not wholly in force");
        assert_eq!(verdict.reason(), "Conflicted");
        assert_eq!(verdict.to_string(), "timeouts is said by shop/older already, which is older");
        assert_eq!(all.outcomes[&Name::new("shop", "older")].targets[0].1, None);
    }

    #[test]
    fn of_checks_too_the_nearest_counts_and_the_older_one() {
        let check = |name: &str, created, target, port| {
            let Object::TrafficPolicy(of) = policy(name, created, &[target], Traffic::default()) else {
                panic!()
            };
            let second = Duration::from_secs(1);
            let pace = Pace { interval: second, timeout: second, unhealthy_after: 1, healthy_after: 1 };
            let check = HealthCheck { probe: Probe::Tcp, port: Some(port), pace, panic_percent: 0 };
            Object::TrafficPolicy(TrafficPolicy { health_check: Some(check), ..(*of).clone() }.into())
        };
        let all = resolved(&[
            check("ns", 0, TrafficTarget::Namespace, 1),
            check("web", 2, of_service(None), 2),
            check("older", 1, of_service(None), 3),
            check("http", 3, of_service(Some("http")), 4),
        ]);
        let port_of = |service: &str, port| all.check_of(&Name::new("shop", service), port).unwrap().port;
        assert_eq!([port_of("web", 80), port_of("web", 81), port_of("db", 80)], [Some(4), Some(3), Some(1)]);
        let verdict = all.outcomes[&Name::new("shop", "web")].targets[0].1.clone().unwrap();
        assert_eq!(verdict.to_string(), "healthCheck is said by shop/older already, which is older");
        assert!(!all.of_port(&Name::new("shop", "web"), 80).reads_requests);
    }

    #[test]
    fn what_workloads_take_is_told_to_nobody_who_sends_and_the_nearest_counts() {
        let sizes = |head| Takes { sizes: Some(Sizes { head: Some(head), body: None }), rates: None };
        let all = resolved(&[
            taking("web", 0, &[of_service(None)], Takes { rates: Some(vec![]), ..sizes(1) }),
            taking("http", 0, &[of_service(Some("http"))], sizes(2)),
            taking("newer", 1, &[of_service(Some("http"))], sizes(3)),
        ]);
        let web = |port| all.takes(&Name::new("shop", "web"), port);
        assert_eq!(web(80), Takes { rates: Some(vec![]), ..sizes(2) });
        assert_eq!(web(81), Takes { rates: Some(vec![]), ..sizes(1) });
        assert_eq!(all.takes(&Name::new("shop", "db"), 80), Takes::default());
        assert_eq!(all.of_port(&Name::new("shop", "web"), 80), Traffic::default());
        let (_, verdict) = &all.outcomes[&Name::new("shop", "newer")].targets[0];
        let says = verdict.as_ref().map(ToString::to_string).unwrap_or_default();
        assert_eq!(says, "sizeLimits is said by shop/http already, which is older");
    }

    #[test]
    fn what_is_not_there_takes_nothing_else_out_of_force() {
        let nobody = TrafficTarget::Service { name: "nobody".into(), port: None };
        let targets = [nobody, of_service(Some("nothing")), of_route(Some("c")), of_service(Some("http"))];
        let all = resolved(&[policy("p", 0, &targets, times(1))]);
        let outcome = &all.outcomes[&Name::new("shop", "p")];
        let said: Vec<_> =
            outcome.targets.iter().map(|(_, why)| why.as_ref().map(NotInForce::reason)).collect();
        assert_eq!(said, [Some("TargetNotFound"), Some("TargetNotFound"), Some("TargetNotFound"), None]);
        assert_eq!(all.of_port(&Name::new("shop", "web"), 80).timeouts, times(1).timeouts);
        assert_eq!(all.of_port(&Name::new("shop", "web"), 81), Traffic::default());
    }
}
