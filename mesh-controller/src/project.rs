//! What each node must know, from the whole desired state and what agents reported. Pure: the same inputs always give
//! the same view, on every replica.
//!
//! What is the same for all nodes is built once ([`Common`]) and shared; a whole view adds the policies that select one of
//! the node's workloads. A view by demand ([`demand`]) has a part of it.

mod checked;
pub mod demand;
mod intake;
mod serving;

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, OnceLock},
};

use mesh_core::{
    model::{
        Authentication, Mode, Name, Policy, Service, Workload,
        http::{RequestRoute, RouteKind},
        intake::Intake,
    },
    view::{Delta, Key, Mesh, NodeView, Resource},
};

pub use self::checked::Failing;
use self::{
    checked::Checked,
    demand::{Changes, Holders},
    serving::{Ready, Slices, service},
};
use crate::{
    health::Heard,
    model::{self, Model},
    routes, traffic,
};

/// Everything that every node knows, and the policies to choose from.
#[derive(Debug, Clone)]
pub struct Common {
    mesh: Arc<Mesh>,
    /// What `workloads` was made of, in the same order.
    wanted: Vec<Arc<model::Workload>>,
    workloads: Vec<Arc<Workload>>,
    services: Vec<Arc<Service>>,
    policies: Vec<Arc<Policy>>,
    /// Those on end users, by name.
    authentications: Vec<Arc<Authentication>>,
    /// How much workloads take of which that is said, by their names.
    intakes: Vec<Arc<Intake>>,
    /// By kind and name.
    routes: Vec<Arc<RequestRoute>>,
    /// The workloads of each node, by namespace: what its policies are chosen by.
    by_node: BTreeMap<String, BTreeMap<String, Vec<Arc<Workload>>>>,
    /// Where in `policies`, which is sorted by name, each namespace's are.
    by_namespace: BTreeMap<String, Range<usize>>,
    /// Who has which address; made when it is first asked.
    holders: OnceLock<Arc<Holders>>,
    /// What is unhealthy, by service and port.
    failing: BTreeMap<(Name, u16), Vec<Failing>>,
    /// How many endpoints are not checked though a policy says so, as their workloads have too many checks.
    unchecked: usize,
}

impl Common {
    /// Builds it. `heard`: what agents said; the word of
    /// a workload that is not meant to be enrolled does not count. `default_mode` is that of workloads of which
    /// nobody says it.
    pub fn new(model: &Model, mesh: Arc<Mesh>, heard: &Heard, default_mode: Mode) -> Self {
        Self::after(&Self::nothing(mesh.clone()), model, mesh, heard, default_mode)
    }

    fn nothing(mesh: Arc<Mesh>) -> Self {
        let (wanted, workloads, services, policies, routes) = Default::default();
        let (by_node, by_namespace, holders, failing, unchecked) = Default::default();
        let (authentications, intakes) = Default::default();
        Self {
            mesh,
            wanted,
            workloads,
            services,
            policies,
            authentications,
            intakes,
            routes,
            by_node,
            by_namespace,
            holders,
            failing,
            unchecked,
        }
    }

    /// Builds the next one. Workloads that are as they were are shared with this one: one change among ten thousand
    /// documents then costs one comparison of pointers for each of the others.
    pub fn after(before: &Self, model: &Model, mesh: Arc<Mesh>, heard: &Heard, default_mode: Mode) -> Self {
        let traffic = traffic::resolve(model);
        let (ready, slices, mut checked) =
            (Ready::new(model), Slices::new(model), Checked::new(&heard.unhealthy));
        let (services, resolved) = (model.services.values(), routes::resolve(model, &traffic));
        let service = |it| Arc::new(service(it, &ready, &slices, &traffic, &mut checked, &resolved));
        let services = services.map(service).collect();
        let Checked { mut of_workloads, failing, too_many: unchecked, .. } = checked;
        let mut old = before.wanted.iter().zip(&before.workloads).peekable();
        let mut next = |wanted: &Arc<model::Workload>| {
            while old.next_if(|(it, _)| it.name < wanted.name).is_some() {}
            let (enrolled, (mode, _)) = (model.enrolled(wanted), model.mode(wanted, default_mode));
            let captured = enrolled && heard.captured.contains(&wanted.name);
            // Who is not in the mesh has no agent that could check it.
            let checks = of_workloads.remove(&wanted.name).filter(|_| enrolled).unwrap_or_default();
            let same = |it: &Workload| {
                (it.enrolled, it.captured, it.mode) == (enrolled, captured, mode) && it.checks == checks
            };
            match old.next_if(|(it, _)| Arc::ptr_eq(it, wanted)) {
                Some((_, it)) if same(it) => it.clone(),
                _ => Arc::new(Workload { checks, ..workload(wanted, enrolled, captured, mode) }),
            }
        };
        let workloads: Vec<Arc<Workload>> = model.workloads.values().map(&mut next).collect();
        let mut by_node: BTreeMap<String, BTreeMap<String, Vec<Arc<Workload>>>> = BTreeMap::new();
        for workload in &workloads {
            let of_node = by_node.entry(workload.node.clone()).or_default();
            of_node.entry(workload.name.namespace.clone()).or_default().push(workload.clone());
        }
        let policies: Vec<Arc<Policy>> = model.policies.values().cloned().collect();
        let mut by_namespace: BTreeMap<String, Range<usize>> = BTreeMap::new();
        for (place, policy) in policies.iter().enumerate() {
            by_namespace.entry(policy.name.namespace.clone()).or_insert(place..place).end = place + 1;
        }
        let authentications: Vec<Arc<Authentication>> = model.authentications.values().cloned().collect();
        let intakes = intake::all(model, &traffic);
        let wanted = model.workloads.values().cloned().collect();
        let (routes, holders) = (resolved.routes, OnceLock::new());
        Self {
            mesh,
            wanted,
            workloads,
            services,
            policies,
            authentications,
            intakes,
            routes,
            by_node,
            by_namespace,
            holders,
            failing,
            unchecked,
        }
    }

    /// Workloads, services and routes: what every whole view has.
    pub fn size(&self) -> usize {
        self.workloads.len() + self.services.len() + self.routes.len()
    }

    /// What the whole mesh shares.
    pub fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }

    /// All workloads, by name.
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    /// All services, by name.
    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// What is unhealthy of a port of a service.
    pub fn failing(&self, service: &Name, port: u16) -> &[Failing] {
        self.failing.get(&(service.clone(), port)).map_or(&[], Vec::as_slice)
    }

    /// All that is unhealthy.
    pub fn all_failing(&self) -> impl Iterator<Item = &Failing> {
        self.failing.values().flatten()
    }

    /// How many endpoints are not checked though a policy says so, as their workloads have too many checks.
    pub fn unchecked(&self) -> usize {
        self.unchecked
    }

    /// All policies, by name.
    pub fn policies(&self) -> &[Arc<Policy>] {
        &self.policies
    }

    /// All policies on end users, by name.
    pub fn authentications(&self) -> &[Arc<Authentication>] {
        &self.authentications
    }

    /// How much workloads take of which that is said, by their names.
    pub fn intakes(&self) -> &[Arc<Intake>] {
        &self.intakes
    }

    /// All routes of requests that are in force, by kind and name.
    pub fn routes(&self) -> &[Arc<RequestRoute>] {
        &self.routes
    }

    /// The view of one node: [`Common::shared`] and [`Common::own`].
    pub fn view(&self, node: &str) -> NodeView {
        self.shared().chain(self.own(node).resources().cloned()).collect()
    }

    /// What every node's view has.
    fn shared(&self) -> impl Iterator<Item = Resource> {
        let mesh = std::iter::once(Resource::Mesh(self.mesh.clone()));
        mesh.chain(self.workloads.iter().cloned().map(Resource::Workload))
            .chain(self.services.iter().cloned().map(Resource::Service))
            .chain(self.routes.iter().cloned().map(Resource::Route))
    }

    /// What only this node's view has: the policies, on end users too, that select one of its workloads, and how much these
    /// take.
    pub fn own(&self, node: &str) -> NodeView {
        let local = self.by_node.get(node).into_iter().flatten();
        let policies = local.flat_map(|(namespace, workloads)| {
            let range = self.by_namespace.get(namespace).cloned().unwrap_or_default();
            let selects = |it: &&Arc<Policy>| workloads.iter().any(|workload| it.selects(workload));
            self.policies[range].iter().filter(selects)
        });
        policies.cloned().map(Resource::Policy).chain(self.of_users(node)).chain(self.taken(node)).collect()
    }

    fn taken(&self, node: &str) -> impl Iterator<Item = Resource> {
        let local = self.by_node.get(node).filter(|_| !self.intakes.is_empty());
        let workloads = local.into_iter().flat_map(|of_node| of_node.values().flatten());
        let of = |workload: &Arc<Workload>| {
            let found = self.intakes.binary_search_by(|it| it.workload.cmp(&workload.name)).ok()?;
            Some(Resource::Intake(self.intakes[found].clone()))
        };
        workloads.filter_map(of)
    }

    fn of_users(&self, node: &str) -> impl Iterator<Item = Resource> {
        let local = self.by_node.get(node);
        let selects = move |it: &&Arc<Authentication>| {
            let workloads = local.and_then(|of_node| of_node.get(&it.name.namespace)).into_iter().flatten();
            workloads.into_iter().any(|workload| it.selects(workload))
        };
        self.authentications.iter().filter(selects).cloned().map(Resource::Authentication)
    }

    /// What turns `self` into `next`: computed once, however many nodes hear of it.
    pub fn changes(&self, next: &Self) -> Changes {
        let mut changes = Changes::default();
        if self.mesh != next.mesh {
            changes.shared.upserts.push(Resource::Mesh(next.mesh.clone()));
            changes.of_mesh = true;
        }
        let Changes { shared, addresses, nodes, namespaces, services, .. } = &mut changes;
        sorted_diff(
            &self.workloads,
            &next.workloads,
            |it| &it.name,
            (Resource::Workload, Key::Workload),
            shared,
            |it| {
                addresses.extend(&it.addresses);
                nodes.insert(it.node.clone());
            },
        );
        sorted_diff(
            &self.services,
            &next.services,
            |it| &it.name,
            (Resource::Service, Key::Service),
            shared,
            |it| {
                addresses.extend(&it.addresses);
                services.insert(it.name.clone());
            },
        );
        for kind in RouteKind::OF_REQUESTS {
            sorted_diff(
                of_kind(&self.routes, kind),
                of_kind(&next.routes, kind),
                |it| &it.name,
                (Resource::Route, |name| Key::Route(kind, name)),
                shared,
                |it| services.extend(it.parents.iter().map(|parent| parent.service.clone())),
            );
        }
        sorted_diff(
            &self.policies,
            &next.policies,
            |it| &it.name,
            (Resource::Policy, Key::Policy),
            &mut Delta::default(),
            |it| {
                namespaces.insert(it.name.namespace.clone());
            },
        );
        sorted_diff(
            &self.authentications,
            &next.authentications,
            |it| &it.name,
            (Resource::Authentication, Key::Authentication),
            &mut Delta::default(),
            |it| {
                namespaces.insert(it.name.namespace.clone());
            },
        );
        sorted_diff(
            &self.intakes,
            &next.intakes,
            |it| &it.workload,
            (Resource::Intake, Key::Intake),
            &mut Delta::default(),
            |it| {
                namespaces.insert(it.workload.namespace.clone());
            },
        );
        changes
    }

    /// A view with every policy, in which any connection can be decided: what `why` looks at.
    pub fn view_of_all(&self) -> NodeView {
        let policies = self.policies.iter().cloned().map(Resource::Policy);
        let of_users = self.authentications.iter().cloned().map(Resource::Authentication);
        let intakes = self.intakes.iter().cloned().map(Resource::Intake);
        self.shared().chain(policies).chain(of_users).chain(intakes).collect()
    }
}

/// The routes of one kind.
fn of_kind(routes: &[Arc<RequestRoute>], kind: RouteKind) -> &[Arc<RequestRoute>] {
    let from = routes.partition_point(|route| route.kind < kind);
    let to = routes.partition_point(|route| route.kind <= kind);
    &routes[from..to]
}

/// The difference of two lists that are sorted by name, in one pass over both. A resource of theirs is made by the first of
/// two functions, and its key by the second. `touched` sees what was and what is of each that differs.
fn sorted_diff<T: Eq>(
    old: &[Arc<T>],
    new: &[Arc<T>],
    name: impl Fn(&T) -> &Name,
    (resource, key): (impl Fn(Arc<T>) -> Resource, impl Fn(Name) -> Key),
    delta: &mut Delta,
    mut touched: impl FnMut(&T),
) {
    let mut old = old.iter().peekable();
    let mut remove = |gone: &Arc<T>, touched: &mut dyn FnMut(&T)| {
        touched(gone);
        delta.removes.push(key(name(gone).clone()));
    };
    for next in new {
        while let Some(gone) = old.next_if(|it| name(it) < name(next)) {
            remove(gone, &mut touched);
        }
        let before = old.next_if(|it| name(it) == name(next));
        if before != Some(next) {
            before.into_iter().chain([next]).for_each(|it| touched(it));
            delta.upserts.push(resource(next.clone()));
        }
    }
    old.for_each(|gone| remove(gone, &mut touched));
}

/// The view of one node, when only one is wanted.
pub fn project(model: &Model, mesh: Arc<Mesh>, heard: &Heard, node: &str) -> NodeView {
    Common::new(model, mesh, heard, Mode::default()).view(node)
}

/// A workload as agents see it.
fn workload(wanted: &model::Workload, enrolled: bool, captured: bool, mode: Mode) -> Workload {
    Workload {
        name: wanted.name.clone(),
        uid: wanted.uid.clone(),
        node: wanted.node.clone(),
        service_account: wanted.service_account.clone(),
        addresses: wanted.addresses.clone(),
        labels: wanted.labels.clone(),
        enrolled,
        captured,
        mode,
        checks: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        identity::TrustDomain,
        model::{
            Action, Distribution, Place, Selector, ZONE,
            http::{Backend, BackendTarget, Filters, RouteRule},
        },
        view::Snapshot,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Namespace, Object, ParentRef, Port, ReferenceGrant, Route};

    fn mesh() -> Arc<Mesh> {
        Arc::new(Mesh { trust_domain: TrustDomain::parse("td").unwrap(), roots: vec![vec![1]] })
    }

    fn namespace(name: &str, enroll: bool, mode: Mode) -> Object {
        Object::Namespace(Namespace { name: name.into(), enroll, mode: Some(mode) })
    }

    fn a_workload(name: &str, node: &str, address: &str, ready: bool, enroll: Option<bool>) -> Object {
        Object::Workload(Arc::new(model::Workload {
            name: name.parse().unwrap(),
            uid: String::new(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            enroll,
            mode: None,
            node: node.into(),
            addresses: vec![address.parse().unwrap()],
            service_account: "default".into(),
            ready,
        }))
    }

    fn a_service(name: &str, selector: &[(&str, &str)]) -> Object {
        Object::Service(model::Service {
            name: name.parse().unwrap(),
            addresses: vec!["10.96.0.1".parse().unwrap()],
            selector: selector.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ports: vec![Port { name: String::new(), port: 80, target: Some(8080) }],
            distribution: Distribution::Any,
            affinity: None,
        })
    }

    fn a_policy(name: &str, selector: &[(&str, &str)]) -> Object {
        let labels = selector.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Object::AuthorizationPolicy(Policy {
            selector: Selector { labels, ..Selector::default() },
            ..Policy::new(name.parse().unwrap(), Action::Deny, vec![])
        })
    }

    fn a_route(kind: RouteKind, name: &str, parent: &str, backend: &str) -> Object {
        let service = |name: &str| name.parse::<Name>().unwrap();
        let parent = ParentRef { index: 0, service: service(parent), port: None, section: None };
        let to = BackendTarget::Service { service: service(backend), port: 80 };
        let backends = vec![Backend { to, weight: 1, filters: Filters::default() }];
        let rules = vec![RouteRule { backends, ..RouteRule::default() }];
        let (name, parents) = (name.parse().unwrap(), vec![parent]);
        Object::Route(Arc::new(Route {
            kind,
            name,
            created: 0,
            parents,
            hostnames: vec!["a".parse().unwrap()],
            rules,
        }))
    }

    #[test]
    fn where_endpoints_are_is_told_of_services_that_it_matters_to_as_workloads_say_it_themselves() {
        let zone = |workload: Object, zone: &str| {
            let Object::Workload(workload) = workload else { panic!() };
            let mut workload = Arc::unwrap_or_clone(workload);
            workload.labels.insert(ZONE.into(), zone.into());
            Object::Workload(Arc::new(workload))
        };
        let web = zone(a_workload("shop/web", "a", "10.0.0.1", true, None), "east");
        let api = zone(a_workload("shop/api", "b", "10.0.0.2", true, None), "west");
        let said = |address: &str, workload: Option<&str>, node: &str| model::SliceEndpoint {
            address: address.parse().unwrap(),
            workload: workload.map(|name| name.parse().unwrap()),
            place: Place { node: node.into(), zone: String::new() },
            ending: false,
        };
        let slice = Object::EndpointSlice(Arc::new(model::EndpointSlice {
            name: "shop/of-web".parse().unwrap(),
            service: "web".into(),
            ports: vec![(String::new(), 8080)],
            endpoints: vec![said("10.0.0.2", Some("shop/api"), "wrong"), said("192.0.2.1", None, "c")],
        }));
        for distribution in Distribution::ALL {
            let Object::Service(service) = a_service("shop/web", &[("app", "web")]) else { panic!() };
            let service = Object::Service(model::Service { distribution, affinity: Some(60), ..service });
            let view = view(&[web.clone(), api.clone(), slice.clone(), service], &[], "a");
            let service = Snapshot::new("a", "1", &view).unwrap();
            let choice = &service.service(&"shop/web".parse().unwrap()).unwrap().choice;
            assert_eq!((choice.distribution, choice.affinity), (distribution, Some(60)));
            let places: Vec<_> =
                choice.places.iter().map(|(at, it)| format!("{at} {} {}", it.node, it.zone)).collect();
            let expected = ["10.0.0.1 a east", "10.0.0.2 b west", "192.0.2.1 c "];
            assert_eq!(places, if distribution == Distribution::Any { &[][..] } else { &expected });
        }
    }

    fn view(objects: &[Object], captured: &[&str], node: &str) -> NodeView {
        let captured = captured.iter().map(|name| name.parse().unwrap()).collect();
        let heard = Heard { captured, ..Heard::default() };
        project(&objects.iter().collect(), mesh(), &heard, node)
    }

    fn only_workload(view: &NodeView) -> Arc<Workload> {
        Snapshot::new("n", "1", view).unwrap().workloads().next().unwrap().clone()
    }

    #[test]
    fn the_workloads_own_word_on_enrolment_wins_over_its_namespaces() {
        for (of_namespace, own, expected) in
            [(false, None, false), (true, None, true), (true, Some(false), false), (false, Some(true), true)]
        {
            let objects = [
                namespace("shop", of_namespace, Mode::Strict),
                a_workload("shop/a", "n", "10.0.0.1", true, own),
            ];
            let got = only_workload(&view(&objects, &["shop/a"], "n"));
            assert_eq!((got.enrolled, got.captured, got.mode), (expected, expected, Mode::Strict));
        }
    }

    #[test]
    fn the_workloads_own_mode_wins_over_its_namespaces_and_that_over_the_default() {
        use Mode::{Permissive, Strict};
        for (default, of_namespace, own, expected) in [
            (Permissive, None, None, Permissive),
            (Strict, None, None, Strict),
            (Strict, Some(Permissive), None, Permissive),
            (Permissive, Some(Strict), None, Strict),
            (Strict, Some(Strict), Some(Permissive), Permissive),
            (Permissive, Some(Permissive), Some(Strict), Strict),
            (Permissive, None, Some(Strict), Strict),
        ] {
            let namespace =
                Object::Namespace(Namespace { name: "shop".into(), enroll: true, mode: of_namespace });
            let Object::Workload(workload) = a_workload("shop/a", "n", "10.0.0.1", true, None) else {
                panic!()
            };
            let objects = [
                namespace,
                Object::Workload(Arc::new(model::Workload { mode: own, ..Arc::unwrap_or_clone(workload) })),
            ];
            let model: Model = objects.iter().collect();
            let common = Common::new(&model, mesh(), &Heard::default(), default);
            assert_eq!(common.workloads()[0].mode, expected, "{default:?} {of_namespace:?} {own:?}");
        }
    }

    #[test]
    fn without_its_namespace_a_workload_is_outside_and_permissive() {
        let got = only_workload(&view(&[a_workload("shop/a", "n", "10.0.0.1", true, None)], &[], "n"));
        assert_eq!((got.enrolled, got.mode), (false, Mode::Permissive));
    }

    #[test]
    fn a_service_has_the_ready_workloads_of_its_namespace_that_match() {
        let objects = [
            a_workload("shop/a", "n", "10.0.0.1", true, None),
            a_workload("shop/b", "m", "10.0.0.2", true, None),
            a_workload("shop/down", "m", "10.0.0.3", false, None),
            a_workload("other/c", "m", "10.0.0.4", true, None),
            a_service("shop/web", &[("app", "web")]),
            a_service("shop/none", &[]),
            a_service("shop/strangers", &[("app", "db")]),
        ];
        let snapshot = Snapshot::new("n", "1", &view(&objects, &[], "n")).unwrap();
        let endpoints = |name: &str| -> Vec<String> {
            let service = snapshot.service(&name.parse().unwrap()).unwrap();
            service.ports[0].endpoints.iter().map(|e| format!("{}:{}", e.address, e.port)).collect()
        };
        assert_eq!(endpoints("shop/web"), ["10.0.0.1:8080", "10.0.0.2:8080"]);
        assert!(endpoints("shop/none").is_empty());
        assert!(endpoints("shop/strangers").is_empty());
    }

    #[test]
    fn a_policy_goes_only_to_nodes_that_have_a_workload_it_selects() {
        let objects = [
            a_workload("shop/a", "n", "10.0.0.1", true, None),
            a_workload("other/b", "m", "10.0.0.2", true, None),
            a_policy("shop/all", &[]),
            a_policy("shop/web", &[("app", "web")]),
            a_policy("shop/db", &[("app", "db")]),
        ];
        let policies = |node| -> Vec<String> {
            view(&objects, &[], node)
                .resources()
                .map(Resource::key)
                .filter(|key| matches!(key, Key::Policy(_)))
                .map(|key| key.to_string())
                .collect()
        };
        assert_eq!(policies("n"), ["policy/shop/all", "policy/shop/web"]);
        assert!(policies("m").is_empty());
        assert!(policies("unknown").is_empty());
    }

    fn arbitrary_objects() -> impl Strategy<Value = Vec<Object>> {
        let namespaces = prop::collection::vec(
            ("[ab]", any::<bool>()).prop_map(|(name, enroll)| namespace(&name, enroll, Mode::Permissive)),
            0..3,
        );
        let workloads = prop::collection::vec(
            ("[ab]/[a-d]", "[nm]", 1u8..200, any::<bool>(), any::<Option<bool>>()).prop_map(
                |(name, node, last, ready, enroll)| {
                    a_workload(&name, &node, &format!("10.0.0.{last}"), ready, enroll)
                },
            ),
            0..8,
        );
        let services = prop::collection::vec(
            ("[ab]/[xy]", any::<bool>())
                .prop_map(|(name, all)| a_service(&name, if all { &[("app", "web")] } else { &[] })),
            0..3,
        );
        let policies = prop::collection::vec("[ab]/[pq]".prop_map(|name| a_policy(&name, &[])), 0..3);
        let kind = prop::sample::select(&RouteKind::ALL[..]);
        let routes = prop::collection::vec(
            (kind.clone(), "[ab]/[rs]", "[ab]/[xy]", "[ab]/[xy]")
                .prop_map(|(kind, name, parent, backend)| a_route(kind, &name, &parent, &backend)),
            0..4,
        );
        let grants = prop::collection::vec(
            ("[ab]/g", kind, "[ab]").prop_map(|(name, kind, from)| {
                let (name, from) = (name.parse().unwrap(), vec![(kind, from)]);
                Object::ReferenceGrant(ReferenceGrant { name, from, to: vec![None] })
            }),
            0..2,
        );
        (namespaces, workloads, services, policies, routes, grants)
            .prop_map(|(a, b, c, d, e, f)| [a, b, c, d, e, f].concat())
    }

    proptest! {
        #[test]
        fn the_order_of_objects_never_shows(objects in arbitrary_objects()) {
            // One object of a name: which of two duplicates wins is the source's business.
            let unique: BTreeMap<String, Object> =
                objects.iter().map(|object| (object.key().to_string(), object.clone())).collect();
            let forward: Vec<Object> = unique.values().cloned().collect();
            let backward: Vec<Object> = unique.values().rev().cloned().collect();
            for node in ["n", "m"] {
                prop_assert_eq!(view(&forward, &["a/a"], node), view(&backward, &["a/a"], node));
            }
        }

        #[test]
        fn the_shared_difference_and_a_nodes_own_make_the_next_view(
            before in arbitrary_objects(), after in arbitrary_objects(),
        ) {
            // Some objects stay, shared, as they do in a ledger.
            let before_objects: Vec<Object> = before.iter().step_by(2).cloned().collect();
            let common = |before: &Common, objects: &[Object]| {
                Common::after(before, &objects.iter().collect(), mesh(), &Heard::default(), Mode::default())
            };
            let before = common(&Common::nothing(mesh()), &before);
            let after = common(&before, &[&before_objects[..], &after].concat());
            for node in ["n", "m"] {
                let mut view = before.view(node);
                view.apply(before.changes(&after).shared);
                view.apply(before.own(node).diff(&after.own(node)));
                prop_assert_eq!(view, after.view(node));
            }
        }

        #[test]
        fn every_view_can_be_put_in_force_and_decides_as_the_view_of_all_does(objects in arbitrary_objects()) {
            let model: Model = objects.iter().collect();
            let common = Common::new(&model, mesh(), &Heard::default(), Mode::default());
            let all = Snapshot::new("", "1", &common.view_of_all()).unwrap();
            for node in ["n", "m"] {
                let snapshot = Snapshot::new(node, "1", &common.view(node)).unwrap();
                prop_assert!(snapshot.routes().eq(all.routes()));
                for workload in snapshot.local() {
                    let here: Vec<&Policy> = snapshot.policies_of(workload).collect();
                    let everywhere: Vec<&Policy> = all.policies_of(workload).collect();
                    prop_assert_eq!(here, everywhere);
                }
            }
        }
    }
}
