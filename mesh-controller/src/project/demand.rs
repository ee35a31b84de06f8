//! Views by demand: a node's own workloads, and what the addresses are that it asked for. Stands apart from whole views,
//! which all nodes share: here each node has a part of its own.
//!
//! What was asked for is found by address. Who has an address that counts is in the view, with all of its own addresses, so
//! that an address which two claim is ambiguous here too; and of a service the addresses of its endpoints count, and its
//! routes with the services that they lead to. So whatever the view [`mesh_core::view::Snapshot::knows`], it says as the
//! whole view does.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use mesh_core::{
    model::{
        IpNet, Name, Service,
        http::{BackendTarget, RequestRoute},
    },
    view::{Delta, Demand, MAX_BLOCKS, NodeView, Resource},
};

use super::Common;

/// Lengths of the blocks that cover the mesh, finest first: nodes' ranges, then clusters', then everything.
const V4_BLOCKS: [u8; 7] = [24, 20, 16, 12, 8, 4, 0];
const V6_BLOCKS: [u8; 7] = [64, 56, 48, 40, 32, 16, 0];

/// Who has which address, and the blocks that all of these are in; and what is found by a service's name.
#[derive(Debug)]
pub(super) struct Holders {
    by_address: HashMap<IpAddr, Vec<Resource>>,
    services: HashMap<Name, Arc<Service>>,
    /// The routes of each service.
    routes: HashMap<Name, Vec<Arc<RequestRoute>>>,
    demand: Arc<Demand>,
}

impl Holders {
    fn of(common: &Common) -> Self {
        let mut by_address: HashMap<IpAddr, Vec<Resource>> = HashMap::new();
        let workloads = common.workloads.iter().cloned().map(Resource::Workload);
        for holder in workloads.chain(common.services.iter().cloned().map(Resource::Service)) {
            for address in addresses(&holder) {
                by_address.entry(*address).or_default().push(holder.clone());
            }
        }
        let mut routes: HashMap<Name, Vec<Arc<RequestRoute>>> = HashMap::new();
        for route in &common.routes {
            for parent in &route.parents {
                routes.entry(parent.service.clone()).or_default().push(route.clone());
            }
        }
        let services = common.services.iter().map(|it| (it.name.clone(), it.clone())).collect();
        let demand = Arc::new(Demand { blocks: blocks(by_address.keys()) });
        Self { by_address, services, routes, demand }
    }

    fn at(&self, address: &IpAddr) -> &[Resource] {
        self.by_address.get(address).map_or(&[], Vec::as_slice)
    }
}

/// What a resource is reached by.
fn addresses(resource: &Resource) -> &[IpAddr] {
    match resource {
        Resource::Workload(workload) => &workload.addresses,
        Resource::Service(service) => &service.addresses,
        Resource::Mesh(_)
        | Resource::Demand(_)
        | Resource::Nobody(_)
        | Resource::Policy(_)
        | Resource::Authentication(_)
        | Resource::Intake(_)
        | Resource::Route(_) => &[],
    }
}

/// The services that a route sends requests to, or copies of them.
fn targets(route: &RequestRoute) -> impl Iterator<Item = &Name> {
    let backends = route.rules.iter().flat_map(|rule| &rule.backends);
    let filters = backends.clone().map(|it| &it.filters).chain(route.rules.iter().map(|it| &it.filters));
    let mirrors = filters.flat_map(|it| &it.mirrors).map(|it| &it.to);
    backends.map(|it| &it.to).chain(mirrors).filter_map(|to| match to {
        BackendTarget::Service { service, .. } => Some(service),
        BackendTarget::Nowhere => None,
    })
}

/// The services that routes of connections to this one lead to.
fn behind(service: &Service) -> impl Iterator<Item = &Name> {
    let routes = service.ports.iter().flat_map(|port| &port.routes);
    routes.flat_map(|route| &route.backends).filter_map(|share| match &share.to {
        BackendTarget::Service { service, .. } => Some(service),
        BackendTarget::Nowhere => None,
    })
}

/// Few blocks that all of these addresses are in. Of one length for a family, so that an address more or less seldom
/// changes them.
fn blocks<'a>(addresses: impl Iterator<Item = &'a IpAddr>) -> Vec<IpNet> {
    let (v4, v6): (Vec<&IpAddr>, Vec<&IpAddr>) = addresses.partition(|address| address.is_ipv4());
    let cover = |of: Vec<&IpAddr>, lengths: [u8; 7]| {
        let at = |length| -> BTreeSet<IpNet> {
            of.iter().filter_map(|it| IpNet::new(**it, length).ok()).map(|it| it.trunc()).collect()
        };
        lengths.into_iter().map(at).find(|found| found.len() <= MAX_BLOCKS / 2).unwrap_or_default()
    };
    cover(v4, V4_BLOCKS).into_iter().chain(cover(v6, V6_BLOCKS)).collect()
}

/// What differs between one state and the next.
#[derive(Debug, Default)]
pub struct Changes {
    /// Of what every whole view has.
    pub shared: Delta,
    /// The mesh itself is not what it was.
    pub(super) of_mesh: bool,
    /// The addresses that a workload or service which differs has or had.
    pub(super) addresses: HashSet<IpAddr>,
    /// The nodes that a workload which differs is or was on.
    pub(super) nodes: HashSet<String>,
    /// The namespaces of policies that differ.
    pub(super) namespaces: BTreeSet<String>,
    /// The services that differ, and those of routes that do.
    pub(super) services: HashSet<Name>,
}

/// A view by demand.
#[derive(Debug, Clone, Default)]
pub struct Demanded {
    view: NodeView,
    /// The addresses that count: who has one of them is in the view.
    addresses: HashSet<IpAddr>,
    /// The names that count: the services with them are in the view, with their routes.
    services: HashSet<Name>,
}

/// What of a view by demand a change can make another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Concern {
    /// Nothing.
    Nothing,
    /// The policies of its node ([`Common::own`]), and nothing else.
    Policies,
    /// Anything.
    Everything,
}

impl Demanded {
    /// Takes what has changed of the policies of its node.
    pub fn change_policies(&mut self, policies: Delta) {
        self.view.apply(policies);
    }

    /// The view.
    pub fn view(&self) -> &NodeView {
        &self.view
    }

    /// Puts in who has these addresses, and what hangs on them; returns what is new.
    fn reach(&mut self, holders: &Holders, from: impl IntoIterator<Item = IpAddr>) -> Vec<Resource> {
        let mut new = Vec::new();
        let mut next: Vec<IpAddr> = from.into_iter().collect();
        while let Some(address) = next.pop() {
            if !self.addresses.insert(address) {
                continue;
            }
            for holder in holders.at(&address) {
                match holder {
                    Resource::Service(service) => {
                        next.extend(self.reach_service(holders, &service.name, &mut new));
                    }
                    holder => {
                        if self.view.insert(holder.clone()) {
                            next.extend(addresses(holder));
                            new.push(holder.clone());
                        }
                    }
                }
            }
        }
        new
    }

    /// Puts in a service, its routes, the services that these lead to, and so on; returns the addresses that count then.
    fn reach_service(&mut self, holders: &Holders, name: &Name, new: &mut Vec<Resource>) -> Vec<IpAddr> {
        let mut reached = Vec::new();
        let mut next = vec![name];
        while let Some(name) = next.pop() {
            if !self.services.insert(name.clone()) {
                continue;
            }
            if let Some(service) = holders.services.get(name) {
                next.extend(behind(service));
                let endpoints = service.ports.iter().flat_map(|port| &port.endpoints);
                reached.extend(service.addresses.iter().copied().chain(endpoints.map(|it| it.address)));
                let service = Resource::Service(service.clone());
                self.view.insert(service.clone());
                new.push(service);
            }
            for route in holders.routes.get(name).into_iter().flatten() {
                let resource = Resource::Route(route.clone());
                if self.view.insert(resource.clone()) {
                    next.extend(targets(route));
                    new.push(resource);
                }
            }
        }
        reached
    }

    /// Answers for addresses that were not asked for before; returns what is new in the view.
    pub fn ask(&mut self, common: &Common, asked: &[IpAddr]) -> Delta {
        let holders = common.holders();
        let mut upserts = self.reach(holders, asked.iter().copied());
        for address in asked.iter().filter(|address| holders.at(address).is_empty()) {
            if self.view.insert(Resource::Nobody(*address)) {
                upserts.push(Resource::Nobody(*address));
            }
        }
        Delta { upserts, removes: Vec::new() }
    }
}

impl Common {
    fn holders(&self) -> &Holders {
        self.holders.get_or_init(|| Arc::new(Holders::of(self)))
    }

    /// The view by demand of a node that asks for these addresses.
    pub fn demanded(&self, node: &str, asked: &BTreeSet<IpAddr>) -> Demanded {
        let holders = self.holders();
        let mut demanded = Demanded { view: self.own(node), ..Demanded::default() };
        demanded.view.insert(Resource::Mesh(self.mesh.clone()));
        demanded.view.insert(Resource::Demand(holders.demand.clone()));
        let local = self.by_node.get(node).into_iter().flat_map(|of_node| of_node.values().flatten());
        for workload in local {
            demanded.view.insert(Resource::Workload(workload.clone()));
            demanded.reach(holders, workload.addresses.iter().copied());
        }
        let asked: Vec<IpAddr> = asked.iter().copied().collect();
        demanded.ask(self, &asked);
        demanded
    }

    /// How much of this view these changes, that led to this state from `before`, can make another.
    pub fn concerns(&self, before: &Self, changes: &Changes, node: &str, held: &Demanded) -> Concern {
        let has_policies = |namespace: &String| {
            self.by_node.get(node).is_some_and(|of_node| of_node.contains_key(namespace))
        };
        if changes.of_mesh
            || changes.nodes.contains(node)
            || changes.addresses.iter().any(|address| held.addresses.contains(address))
            || changes.services.iter().any(|name| held.services.contains(name))
            || before.holders().demand != self.holders().demand
        {
            return Concern::Everything;
        }
        if changes.namespaces.iter().any(has_policies) { Concern::Policies } else { Concern::Nothing }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mesh_core::{
        identity::TrustDomain,
        model::{
            Choice, Distribution, Endpoint, Mode, Name, Place, Policy, Service, ServicePort, Workload, ZONE,
            http::{Backend, Filters, Mirror, Parent, RouteKind, RouteRule},
            tcp::{ConnectionRoute, Share},
            traffic::Traffic,
        },
        route,
        view::{Mesh, Owner, Snapshot},
    };
    use proptest::{collection::vec, option, prelude::*, sample::select};

    use super::*;

    /// Few, so that some are claimed twice, and some by nobody.
    fn an_address() -> impl Strategy<Value = IpAddr> {
        let v4 = (0u8..3, 0u8..5).prop_map(|(third, last)| IpAddr::from([10, 0, third, last]));
        let v6 = (0u16..4).prop_map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last]));
        prop_oneof![3 => v4, 1 => v6]
    }

    fn a_name() -> impl Strategy<Value = Name> {
        (select(&["a", "b"][..]), select(&["p", "q", "r", "s", "t"][..]))
            .prop_map(|(namespace, name)| Name::new(namespace, name))
    }

    fn a_zone() -> impl Strategy<Value = Option<String>> {
        option::of(select(&["east", "west"][..]).prop_map(str::to_owned))
    }

    /// Where some endpoints are, and how near a client wants one.
    fn a_choice() -> impl Strategy<Value = Choice> {
        let place = (select(&["n", "m", "o"][..]), a_zone())
            .prop_map(|(node, zone)| Place { node: node.into(), zone: zone.unwrap_or_default() });
        let places = prop::collection::btree_map(an_address(), place, 0..8);
        (select(&Distribution::ALL[..]), option::of(1u32..9), places)
            .prop_map(|(distribution, affinity, places)| Choice { distribution, affinity, places })
    }

    fn a_workload() -> impl Strategy<Value = Workload> {
        let node = select(&["n", "m", "o"][..]);
        (a_name(), node, vec(an_address(), 0..3), any::<bool>(), a_zone()).prop_map(
            |(name, node, addresses, captured, zone)| Workload {
                name,
                uid: String::new(),
                node: node.into(),
                service_account: "default".into(),
                addresses,
                labels: zone.into_iter().map(|zone| (ZONE.to_owned(), zone)).collect(),
                enrolled: true,
                captured,
                mode: Mode::Permissive,
                checks: vec![],
            },
        )
    }

    fn a_service() -> impl Strategy<Value = Service> {
        let endpoint = (option::of(a_name()), an_address()).prop_map(|(workload, address)| Endpoint {
            workload,
            address,
            port: 8080,
        });
        let leads = vec(vec(a_name(), 0..2).prop_map(|to| a_connection_route(&to)), 0..2);
        (a_name(), vec(an_address(), 0..2), vec(endpoint, 0..4), a_choice(), leads).prop_map(
            |(name, addresses, endpoints, choice, routes)| {
                let ports = vec![ServicePort {
                    name: String::new(),
                    port: 80,
                    endpoints,
                    traffic: Traffic::default(),
                    routes,
                }];
                Service { name, addresses, ports, choice }
            },
        )
    }

    /// A route of connections to some services.
    fn a_connection_route(to: &[Name]) -> Arc<ConnectionRoute> {
        let share = |service: &Name| Share {
            to: BackendTarget::Service { service: service.clone(), port: 80 },
            weight: 1,
        };
        Arc::new(ConnectionRoute {
            kind: RouteKind::Tcp,
            name: Name::new("a", "r"),
            created: 0,
            hostnames: vec![],
            backends: to.iter().map(share).collect(),
        })
    }

    /// A route for some services, to some others.
    fn a_route() -> impl Strategy<Value = RequestRoute> {
        let port = option::of(select(&[80u16, 81][..]));
        let parents = vec((a_name(), port).prop_map(|(service, port)| Parent { service, port }), 1..3);
        let to = |service| BackendTarget::Service { service, port: 80 };
        let mirror = option::of(a_name().prop_map(move |it| Mirror { to: to(it), copies: 1, of: 1 }));
        let kind = select(&RouteKind::OF_REQUESTS[..]);
        (kind, a_name(), parents, vec(a_name(), 0..3), mirror).prop_map(
            move |(kind, name, parents, backends, mirror)| {
                let filters = Filters { mirrors: mirror.into_iter().collect(), ..Filters::default() };
                let backend = |name| Backend { to: to(name), weight: 1, filters: Filters::default() };
                let backends = backends.into_iter().map(backend).collect();
                let rules = vec![RouteRule { filters, backends, ..RouteRule::default() }];
                RequestRoute { kind, name, created: 0, parents, rules }
            },
        )
    }

    /// A state as `Common::after` makes one, of any workloads, services, policies and routes.
    fn a_common() -> impl Strategy<Value = Common> {
        let (policies, routes) = (vec(a_name(), 0..3), vec(a_route(), 0..4));
        (vec(a_workload(), 0..8), vec(a_service(), 0..6), policies, routes, any::<bool>()).prop_map(
            |(workloads, services, policies, routes, root)| {
                let trust_domain = TrustDomain::parse("td").unwrap();
                let mesh = Arc::new(Mesh { trust_domain, roots: vec![vec![u8::from(root)]] });
                let mut common = Common::nothing(mesh);
                let by_name: BTreeMap<_, _> = workloads.into_iter().map(|it| (it.name.clone(), it)).collect();
                common.workloads = by_name.into_values().map(Arc::new).collect();
                let by_name: BTreeMap<_, _> = services.into_iter().map(|it| (it.name.clone(), it)).collect();
                common.services = by_name.into_values().map(Arc::new).collect();
                let by_key: BTreeMap<_, _> =
                    routes.into_iter().map(|it| ((it.kind, it.name.clone()), it)).collect();
                common.routes = by_key.into_values().map(Arc::new).collect();
                let names: BTreeSet<Name> = policies.into_iter().collect();
                let deny = |name| Policy::new(name, mesh_core::model::Action::Deny, vec![]);
                common.policies = names.into_iter().map(|name| Arc::new(deny(name))).collect();
                for workload in &common.workloads {
                    let of_node = common.by_node.entry(workload.node.clone()).or_default();
                    of_node.entry(workload.name.namespace.clone()).or_default().push(workload.clone());
                }
                for (place, policy) in common.policies.iter().enumerate() {
                    let range = common.by_namespace.entry(policy.name.namespace.clone());
                    range.or_insert(place..place).end = place + 1;
                }
                common
            },
        )
    }

    fn asked() -> impl Strategy<Value = BTreeSet<IpAddr>> {
        prop::collection::btree_set(an_address(), 0..5)
    }

    fn all() -> Vec<IpAddr> {
        let v4 = (0..3).flat_map(|third| (0..5).map(move |last| IpAddr::from([10, 0, third, last])));
        let v6 = (0..4).map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last]));
        let outside = ["192.0.2.1", "fd01::1"].map(|text| text.parse().unwrap());
        v4.chain(v6).chain(outside).collect()
    }

    fn owner(snapshot: &Snapshot, address: IpAddr) -> Option<Resource> {
        snapshot.owner(address).map(|owner| match owner {
            Owner::Workload(workload) => Resource::Workload(workload.clone()),
            Owner::Service(service) => Resource::Service(service.clone()),
        })
    }

    proptest! {
        #[test]
        fn what_it_knows_it_says_as_the_whole_view_does(common in a_common(), asked in asked()) {
            let whole = Snapshot::new("n", "1", &common.view("n")).unwrap();
            let part = Snapshot::new("n", "1", common.demanded("n", &asked).view()).unwrap();
            for address in &asked {
                prop_assert!(part.knows(*address), "{address} was asked for");
            }
            for address in all().into_iter().filter(|address| part.knows(*address)) {
                prop_assert_eq!(owner(&part, address), owner(&whole, address), "{}", address);
                prop_assert_eq!(
                    part.ambiguous().contains(&address), whole.ambiguous().contains(&address), "{}", address
                );
            }
            for service in part.services() {
                for endpoint in service.ports.iter().flat_map(|port| &port.endpoints) {
                    prop_assert_eq!(route::reached(&part, endpoint), route::reached(&whole, endpoint));
                }
            }
            // Requests to each service, too: by the same rules, to the same services.
            for service in part.services() {
                prop_assert_eq!(Some(service), whole.service(&service.name));
                let [led, expected] = [&part, &whole].map(|view| -> Vec<_> {
                    let is_of = |it: &&Arc<RequestRoute>| it.parents.iter().any(|it| it.service == service.name);
                    view.routes().filter(is_of).cloned().collect()
                });
                prop_assert_eq!(&led, &expected, "routes of {}", &service.name);
                for target in led.iter().flat_map(|route| targets(route)) {
                    prop_assert_eq!(part.service(target), whole.service(target), "{} leads there", target);
                }
            }
            prop_assert!(part.local().eq(whole.local()), "its own workloads");
            // Near endpoints and those to stay with, too: every client of the node is led to the same ones.
            for client in part.local() {
                for address in all().into_iter().filter(|address| part.knows(*address)) {
                    let [led, expected] = [&part, &whole]
                        .map(|view| format!("{:?}", route::outbound(view, client, (address, 80).into())));
                    prop_assert_eq!(led, expected, "{} to {}", &client.name, address);
                }
            }
            prop_assert!(part.policies().eq(whole.policies()), "and what is decided by there");
        }

        #[test]
        fn asking_step_by_step_makes_the_same_view(common in a_common(), first in asked(), then in asked()) {
            let mut held = common.demanded("n", &first);
            let mut view = held.view().clone();
            let new: Vec<IpAddr> = then.difference(&first).copied().collect();
            view.apply(held.ask(&common, &new));
            let both = &first | &then;
            prop_assert_eq!(&view, held.view());
            let at_once = common.demanded("n", &both);
            prop_assert_eq!(&view, at_once.view());
        }

        #[test]
        fn whom_a_change_does_not_concern_has_the_same_view(
            before in a_common(), after in a_common(), keep in 0..4, asked in asked(),
        ) {
            // Mostly the same, so that there is somebody whom a change does not concern, or by its policies alone.
            let mut after = after;
            if keep == 3 {
                let mut routes = before.routes.clone();
                if let Some(changed) = after.routes.first() {
                    routes.retain(|it| (it.kind, &it.name) != (changed.kind, &changed.name));
                    routes.push(changed.clone());
                    routes.sort_by_key(|it| (it.kind, it.name.clone()));
                }
                after = Common { routes, ..before.clone() };
            }
            if keep == 2 {
                let (policies, by_namespace) = (after.policies, after.by_namespace);
                after = Common { policies, by_namespace, ..before.clone() };
            }
            if keep == 1 {
                after.mesh = before.mesh.clone();
                after.routes = before.routes.clone();
                after.services = before.services.clone();
                after.policies = before.policies.clone();
                after.by_namespace = before.by_namespace.clone();
                let changed = after.workloads.first().cloned();
                after.workloads = before.workloads.clone();
                if let Some(changed) = changed {
                    match after.workloads.binary_search_by(|it| it.name.cmp(&changed.name)) {
                        Ok(at) => after.workloads[at] = changed,
                        Err(at) => after.workloads.insert(at, changed),
                    }
                }
                after.by_node = BTreeMap::new();
                for workload in &after.workloads {
                    let of_node = after.by_node.entry(workload.node.clone()).or_default();
                    of_node.entry(workload.name.namespace.clone()).or_default().push(workload.clone());
                }
            }
            let changes = before.changes(&after);
            for node in ["n", "m", "o"] {
                let mut held = before.demanded(node, &asked);
                let next = after.demanded(node, &asked);
                match after.concerns(&before, &changes, node, &held) {
                    Concern::Nothing => {}
                    Concern::Policies => held.change_policies(before.own(node).diff(&after.own(node))),
                    Concern::Everything => continue,
                }
                prop_assert_eq!(held.view(), next.view());
            }
        }

        #[test]
        fn all_addresses_are_in_few_blocks(addresses in vec(any::<[u8; 4]>(), 0..400), wide in vec(any::<[u8; 16]>(), 0..100)) {
            let all: Vec<IpAddr> =
                addresses.into_iter().map(IpAddr::from).chain(wide.into_iter().map(IpAddr::from)).collect();
            let blocks = blocks(all.iter());
            prop_assert!(blocks.len() <= MAX_BLOCKS);
            prop_assert!(all.iter().all(|address| blocks.iter().any(|block| block.contains(address))));
        }
    }

    #[test]
    fn it_grows_with_what_was_asked_for_and_not_with_the_mesh() {
        let trust_domain = TrustDomain::parse("td").unwrap();
        let mut common = Common::nothing(Arc::new(Mesh { trust_domain, roots: vec![vec![1]] }));
        let address = |number: u8| IpAddr::from([10, 0, number, 1]);
        let name = |number: u8| Name::new("a", format!("w{number:03}"));
        let workload = |number: u8| Workload {
            name: name(number),
            uid: String::new(),
            node: "o".into(),
            service_account: "default".into(),
            addresses: vec![address(number)],
            labels: BTreeMap::new(),
            enrolled: true,
            captured: true,
            mode: Mode::Permissive,
            checks: vec![],
        };
        common.workloads = (0..200).map(|number| Arc::new(workload(number))).collect();
        let endpoint = |number| Endpoint { workload: Some(name(number)), address: address(number), port: 80 };
        let port = ServicePort {
            name: String::new(),
            port: 80,
            endpoints: (0..5).map(endpoint).collect(),
            traffic: Traffic::default(),
            routes: vec![],
        };
        let virtual_address = IpAddr::from([10, 96, 0, 1]);
        let addresses = vec![virtual_address];
        common.services = vec![Arc::new(Service {
            name: Name::new("a", "s"),
            addresses,
            ports: vec![port],
            choice: Choice::default(),
        })];
        let sizes =
            [vec![], vec![address(9)], vec![virtual_address], vec![virtual_address, address(1), address(9)]]
                .map(|asked| common.demanded("n", &asked.into_iter().collect()).view().len());
        assert_eq!(sizes, [2, 3, 8, 9], "the mesh and its blocks, and what was asked for");
    }

    #[test]
    fn a_service_that_was_asked_for_brings_those_that_its_routes_lead_to_and_no_others() {
        let trust_domain = TrustDomain::parse("td").unwrap();
        let mut common = Common::nothing(Arc::new(Mesh { trust_domain, roots: vec![vec![1]] }));
        let names = ["a", "b", "c", "d"].map(|name| Name::new("ns", name));
        let address = |place: u8| IpAddr::from([10, 96, 0, place]);
        let service = |(place, name): (u8, &Name)| {
            let addresses = vec![address(place)];
            Arc::new(Service { name: name.clone(), addresses, ports: vec![], choice: Choice::default() })
        };
        common.services = (0..).zip(&names).map(service).collect();
        let route = |from: usize, to: usize| {
            let to = BackendTarget::Service { service: names[to].clone(), port: 80 };
            let backends = vec![Backend { to, weight: 1, filters: Filters::default() }];
            Arc::new(RequestRoute {
                kind: RouteKind::Http,
                name: names[from].clone(),
                created: 0,
                parents: vec![Parent { service: names[from].clone(), port: None }],
                rules: vec![RouteRule { backends, ..RouteRule::default() }],
            })
        };
        common.routes = vec![route(0, 1), route(1, 2)];
        let services = |asked: u8| -> Vec<String> {
            let demanded = common.demanded("n", &[address(asked)].into());
            let keys = demanded.view().resources().map(|it| it.key().to_string());
            keys.filter(|key| key.contains('/')).collect()
        };
        let [a, b, c] = ["a", "b", "c"].map(|name| format!("service/ns/{name}"));
        let [from_a, from_b] = ["a", "b"].map(|name| format!("http-route/ns/{name}"));
        assert_eq!(services(0), [&*a, &*b, &*c, &*from_a, &*from_b]);
        assert_eq!(services(1), [&*b, &*c, &*from_b]);
        assert_eq!(services(3), ["service/ns/d"]);
    }

    #[test]
    fn a_service_brings_those_that_its_routes_of_connections_lead_to() {
        let trust_domain = TrustDomain::parse("td").unwrap();
        let mut common = Common::nothing(Arc::new(Mesh { trust_domain, roots: vec![vec![1]] }));
        let address = |place: u8| IpAddr::from([10, 96, 0, place]);
        let service = |(place, name, to): (u8, &str, &[Name])| {
            let routes = vec![a_connection_route(to)];
            let port = ServicePort {
                name: String::new(),
                port: 80,
                endpoints: vec![],
                traffic: Traffic::default(),
                routes,
            };
            let (name, addresses) = (Name::new("ns", name), vec![address(place)]);
            Arc::new(Service { name, addresses, ports: vec![port], choice: Choice::default() })
        };
        let leads = |to: &str| [Name::new("ns", to)];
        common.services =
            [(0, "a", &leads("b")[..]), (1, "b", &leads("c")), (2, "c", &[]), (3, "d", &leads("a"))]
                .map(service)
                .into();
        let knows = |asked: u8| {
            let demanded = common.demanded("n", &[address(asked)].into());
            let snapshot = Snapshot::new("n", "", demanded.view()).unwrap();
            snapshot.services().map(|it| it.name.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(knows(0), ["a", "b", "c"]);
        assert_eq!(knows(2), ["c"]);
        assert_eq!(knows(3), ["a", "b", "c", "d"]);
    }

    #[test]
    fn blocks_are_the_nodes_ranges_while_these_are_few() {
        let of = |texts: &[&str]| -> Vec<String> {
            let all: Vec<IpAddr> = texts.iter().map(|text| text.parse().unwrap()).collect();
            blocks(all.iter()).iter().map(ToString::to_string).collect()
        };
        assert_eq!(of(&[]), [""; 0]);
        assert_eq!(
            of(&["10.1.0.7", "10.1.0.9", "10.1.2.1", "fd00::1:1"]),
            ["10.1.0.0/24", "10.1.2.0/24", "fd00::/64"]
        );
        let many: Vec<IpAddr> = (0..=255).map(|third| IpAddr::from([10, 1, third, 1])).collect();
        let wider: Vec<IpNet> =
            (0..16).map(|at| IpNet::new([10, 1, at * 16, 0].into(), 20).unwrap()).collect();
        assert_eq!(blocks(many.iter()), wider);
    }
}
