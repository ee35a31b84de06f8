//! What one node must know: a set of resources, the difference between two sets, and the indexed snapshot that
//! connections are decided on.
//!
//! The controller projects a [`NodeView`] per node and sends differences; the agent applies them and builds a
//! [`Snapshot`] off the hot path. Applying `diff(a, b)` to `a` always gives `b`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use serde::Serialize;

use crate::{
    http::table::{Table, Tables},
    identity::{SpiffeId, TrustDomain},
    model::{
        Authentication, IpNet, Name, Policy, Service, Workload,
        http::{RequestRoute, RouteKind},
        intake::{Intake, PortIntake},
    },
    tcp,
};

/// Most addresses that a node may ask for at a time: what a view by demand is bounded by.
pub const MAX_ASKED: usize = 32_768;
/// Most blocks of a [`Demand`]: each is looked through for every address that is not known, and is an entry of a map of
/// the kernel programs.
pub const MAX_BLOCKS: usize = 128;

/// What the name of a policy on end users begins with in its key: whoever knows nothing of these takes it for an
/// authorization policy, and no object of Kubernetes has such a name.
pub(crate) const OF_USERS: &str = "authentication~";
/// The same for how much a workload takes; the rest of the name is the workload's.
pub(crate) const OF_INTAKE: &str = "limits~";

/// What the whole mesh shares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mesh {
    /// The trust domain of every identity.
    pub trust_domain: TrustDomain,
    /// The roots that certificates may lead to, DER; more than one during a rotation.
    #[serde(skip)]
    pub roots: Vec<Vec<u8>>,
}

/// That a view is by demand: it has the node's own workloads and what their addresses were asked for, and of everything
/// else says nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Demand {
    /// Every address of the mesh is in one of these. What is in none is outside of the mesh, and need not be asked for.
    pub blocks: Vec<IpNet>,
}

/// What a resource is called; unique within a view. Printed as `workload/NS/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// The one [`Mesh`].
    Mesh,
    /// The one [`Demand`].
    Demand,
    /// An address that is nobody's.
    Nobody(IpAddr),
    /// A workload.
    Workload(Name),
    /// A service.
    Service(Name),
    /// A policy.
    Policy(Name),
    /// A policy on end users.
    Authentication(Name),
    /// How much the workload of this name takes.
    Intake(Name),
    /// A route of requests.
    Route(RouteKind, Name),
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mesh => f.write_str("mesh"),
            Self::Demand => f.write_str("demand"),
            Self::Nobody(address) => write!(f, "nobody/{address}"),
            Self::Workload(name) => write!(f, "workload/{name}"),
            Self::Service(name) => write!(f, "service/{name}"),
            Self::Policy(name) => write!(f, "policy/{name}"),
            Self::Authentication(name) => write!(f, "policy/{}/{OF_USERS}{}", name.namespace, name.name),
            Self::Intake(name) => write!(f, "policy/{}/{OF_INTAKE}{}", name.namespace, name.name),
            Self::Route(RouteKind::Http, name) => write!(f, "http-route/{name}"),
            Self::Route(RouteKind::Grpc, name) => write!(f, "grpc-route/{name}"),
            // Routes of connections stand in the services that they speak of.
            Self::Route(RouteKind::Tls, name) => write!(f, "tls-route/{name}"),
            Self::Route(RouteKind::Tcp, name) => write!(f, "tcp-route/{name}"),
        }
    }
}

impl std::str::FromStr for Key {
    type Err = crate::model::NameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || crate::model::NameError(text.chars().take(300).collect());
        match text {
            "mesh" => return Ok(Self::Mesh),
            "demand" => return Ok(Self::Demand),
            _ => {}
        }
        let (kind, name) = text.split_once('/').ok_or_else(bad)?;
        if kind == "nobody" {
            return name.parse().map(Self::Nobody).map_err(|_| bad());
        }
        let name: Name = name.parse()?;
        match kind {
            "workload" => Ok(Self::Workload(name)),
            "service" => Ok(Self::Service(name)),
            "policy" => Ok({
                let of = |word| name.name.strip_prefix(word).filter(|rest: &&str| !rest.is_empty());
                match (of(OF_USERS), of(OF_INTAKE)) {
                    (Some(of_users), _) => Self::Authentication(Name::new(name.namespace.clone(), of_users)),
                    (None, Some(workload)) => Self::Intake(Name::new(name.namespace.clone(), workload)),
                    (None, None) => Self::Policy(name),
                }
            }),
            "http-route" => Ok(Self::Route(RouteKind::Http, name)),
            "grpc-route" => Ok(Self::Route(RouteKind::Grpc, name)),
            _ => Err(bad()),
        }
    }
}

/// One thing that a node knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// What the whole mesh shares.
    Mesh(Arc<Mesh>),
    /// There is more than this view has.
    Demand(Arc<Demand>),
    /// An address that was asked for, and that neither a workload nor a service has.
    Nobody(IpAddr),
    /// A workload of any node.
    Workload(Arc<Workload>),
    /// A service.
    Service(Arc<Service>),
    /// A policy that selects a workload of this node.
    Policy(Arc<Policy>),
    /// A policy on end users that selects a workload of this node.
    Authentication(Arc<Authentication>),
    /// How much a workload of this node takes.
    Intake(Arc<Intake>),
    /// Where requests to services of this view lead.
    Route(Arc<RequestRoute>),
}

impl Resource {
    /// What it is called.
    pub fn key(&self) -> Key {
        match self {
            Self::Mesh(_) => Key::Mesh,
            Self::Demand(_) => Key::Demand,
            Self::Nobody(address) => Key::Nobody(*address),
            Self::Workload(workload) => Key::Workload(workload.name.clone()),
            Self::Service(service) => Key::Service(service.name.clone()),
            Self::Policy(policy) => Key::Policy(policy.name.clone()),
            Self::Authentication(policy) => Key::Authentication(policy.name.clone()),
            Self::Intake(intake) => Key::Intake(intake.workload.clone()),
            Self::Route(route) => Key::Route(route.kind, route.name.clone()),
        }
    }
}

/// Everything that one node knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeView {
    resources: BTreeMap<Key, Resource>,
}

/// What turns one view into another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Delta {
    /// New or changed.
    pub upserts: Vec<Resource>,
    /// Gone.
    pub removes: Vec<Key>,
}

impl Delta {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.removes.is_empty()
    }
}

impl FromIterator<Resource> for NodeView {
    fn from_iter<I: IntoIterator<Item = Resource>>(resources: I) -> Self {
        Self { resources: resources.into_iter().map(|resource| (resource.key(), resource)).collect() }
    }
}

impl NodeView {
    /// All resources, in the order of their keys.
    pub fn resources(&self) -> impl Iterator<Item = &Resource> {
        self.resources.values()
    }

    /// How many resources it has.
    pub fn len(&self) -> usize {
        self.resources.len()
    }

    /// Whether it has nothing.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// Puts a resource in; whether none had its name before.
    pub fn insert(&mut self, resource: Resource) -> bool {
        self.resources.insert(resource.key(), resource).is_none()
    }

    /// What has to be applied to `self` to get `next`.
    pub fn diff(&self, next: &Self) -> Delta {
        let changed = |(key, resource): &(&Key, &Resource)| self.resources.get(key) != Some(resource);
        Delta {
            upserts: next.resources.iter().filter(changed).map(|(_, resource)| resource.clone()).collect(),
            removes: self.resources.keys().filter(|key| !next.resources.contains_key(key)).cloned().collect(),
        }
    }

    /// Applies a difference.
    pub fn apply(&mut self, delta: Delta) {
        for key in delta.removes {
            self.resources.remove(&key);
        }
        self.resources.extend(delta.upserts.into_iter().map(|resource| (resource.key(), resource)));
    }
}

/// What an address is to the mesh.
#[derive(Debug, Clone)]
pub enum Owner {
    /// A workload's address.
    Workload(Arc<Workload>),
    /// A service's virtual address.
    Service(Arc<Service>),
}

/// A view, indexed for decisions; immutable, shared by every connection that was decided on it.
#[derive(Debug)]
pub struct Snapshot {
    node: String,
    version: Arc<str>,
    mesh: Arc<Mesh>,
    by_address: HashMap<IpAddr, Owner>,
    workloads: BTreeMap<Name, Arc<Workload>>,
    services: BTreeMap<Name, Arc<Service>>,
    policies: BTreeMap<Name, Arc<Policy>>,
    authentications: BTreeMap<Name, Arc<Authentication>>,
    intakes: BTreeMap<Name, Arc<Intake>>,
    routes: Vec<Arc<RequestRoute>>,
    tables: Tables,
    identities: HashMap<Name, Arc<SpiffeId>>,
    ambiguous: BTreeSet<IpAddr>,
    demand: Option<Arc<Demand>>,
    nobody: HashSet<IpAddr>,
}

/// Why a view cannot be put in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The view lacks the `mesh` resource.
    #[error("the view has no 'mesh' resource, so no trust domain: the controller must send it first")]
    NoMesh,
    /// A workload's account cannot be part of an identity.
    #[error("workload {workload}: {error}")]
    Identity {
        /// Which.
        workload: Name,
        /// What is wrong.
        error: crate::identity::IdentityError,
    },
}

impl Snapshot {
    /// Indexes a view for the node with this name.
    ///
    /// An address that two workloads claim belongs to neither: [`Snapshot::ambiguous`] lists it.
    pub fn new(node: &str, version: &str, view: &NodeView) -> Result<Self, SnapshotError> {
        let (mut mesh, mut demand, mut nobody) = (None, None, HashSet::new());
        let mut workloads = BTreeMap::new();
        let mut services = BTreeMap::new();
        let mut policies = BTreeMap::new();
        let mut authentications = BTreeMap::new();
        let mut intakes = BTreeMap::new();
        let mut routes = Vec::new();
        for resource in view.resources() {
            match resource {
                Resource::Mesh(found) => mesh = Some(found.clone()),
                Resource::Demand(found) => demand = Some(found.clone()),
                Resource::Nobody(address) => drop(nobody.insert(*address)),
                Resource::Workload(found) => drop(workloads.insert(found.name.clone(), found.clone())),
                Resource::Service(found) => drop(services.insert(found.name.clone(), found.clone())),
                Resource::Policy(found) => drop(policies.insert(found.name.clone(), found.clone())),
                Resource::Authentication(found) => {
                    drop(authentications.insert(found.name.clone(), found.clone()));
                }
                Resource::Intake(found) => drop(intakes.insert(found.workload.clone(), found.clone())),
                Resource::Route(found) => routes.push(found.clone()),
            }
        }
        let mesh = mesh.ok_or(SnapshotError::NoMesh)?;
        let mut by_address: HashMap<IpAddr, Owner> = HashMap::new();
        let mut ambiguous = BTreeSet::new();
        let mut identities = HashMap::new();
        for workload in workloads.values() {
            let identity = workload
                .identity(&mesh.trust_domain)
                .map_err(|error| SnapshotError::Identity { workload: workload.name.clone(), error })?;
            identities.insert(workload.name.clone(), Arc::new(identity));
        }
        let owners = workloads
            .values()
            .flat_map(|w| w.addresses.iter().map(|a| (*a, Owner::Workload(w.clone()))))
            .chain(
                services.values().flat_map(|s| s.addresses.iter().map(|a| (*a, Owner::Service(s.clone())))),
            );
        for (address, owner) in owners {
            if by_address.insert(address, owner).is_some() {
                ambiguous.insert(address);
            }
        }
        for address in &ambiguous {
            by_address.remove(address);
        }
        let tables = Tables::new(&services, &routes);
        Ok(Self {
            node: node.to_owned(),
            version: version.into(),
            mesh,
            by_address,
            workloads,
            services,
            policies,
            authentications,
            intakes,
            routes,
            tables,
            identities,
            ambiguous,
            demand,
            nobody,
        })
    }

    /// The node that it is for.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The version that the controller gave it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The same, for whoever keeps it longer than the view.
    pub fn shared_version(&self) -> Arc<str> {
        self.version.clone()
    }

    /// What the whole mesh shares.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Who has this address; `None` for addresses outside of the mesh and for ambiguous ones.
    pub fn owner(&self, address: IpAddr) -> Option<&Owner> {
        self.by_address.get(&address)
    }

    /// Whether the view says what this address is. One by demand does not of what it was not asked for; then
    /// [`Snapshot::owner`] has nobody, which means nothing.
    pub fn knows(&self, address: IpAddr) -> bool {
        let Some(demand) = &self.demand else { return true };
        self.by_address.contains_key(&address)
            || self.ambiguous.contains(&address)
            || self.nobody.contains(&address)
            || !demand.blocks.iter().any(|block| block.contains(&address))
    }

    /// Set if the view has not everything.
    pub fn demand(&self) -> Option<&Demand> {
        self.demand.as_deref()
    }

    /// The addresses that were asked for and are nobody's.
    pub fn nobody(&self) -> impl Iterator<Item = IpAddr> {
        self.nobody.iter().copied()
    }

    /// The workload with this address.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        match self.by_address.get(&address) {
            Some(Owner::Workload(workload)) => Some(workload),
            Some(Owner::Service(_)) | None => None,
        }
    }

    /// The workload with this name.
    pub fn workload(&self, name: &Name) -> Option<&Arc<Workload>> {
        self.workloads.get(name)
    }

    /// All workloads, by name.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The enrolled workloads of this node.
    pub fn local(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values().filter(|workload| workload.enrolled && workload.node == self.node)
    }

    /// The service with this name.
    pub fn service(&self, name: &Name) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All routes of requests.
    pub fn routes(&self) -> impl Iterator<Item = &Arc<RequestRoute>> {
        self.routes.iter()
    }

    /// The rules for what workloads of a namespace ask of a port of a service; `None` where there are none, and bytes are
    /// carried as they come.
    pub fn table(&self, service: &Name, port: u16, client_namespace: &str) -> Option<&Arc<Table>> {
        self.tables.get(service, port, client_namespace)
    }

    /// The routes of connections that workloads of a namespace open to a port of a service; `None` where there are none, or
    /// where those of requests come before them.
    pub fn connections(&self, service: &Name, port: u16, client_namespace: &str) -> Option<&Arc<tcp::Table>> {
        self.tables.connections(service, port, client_namespace)
    }

    /// The identity of a workload of this view.
    pub fn identity(&self, name: &Name) -> Option<&Arc<SpiffeId>> {
        self.identities.get(name)
    }

    /// The policies that select a workload.
    pub fn policies_of<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a Policy> + Clone {
        let namespace = &workload.name.namespace;
        self.policies
            .range(Name::new(namespace, "")..)
            .take_while(move |(name, _)| name.namespace == *namespace)
            .map(|(_, policy)| policy.as_ref())
            .filter(move |policy| policy.selects(workload))
    }

    /// The policies on end users that select a workload, by name.
    pub fn authentications_of<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = &'a Authentication> + Clone {
        let namespace = &workload.name.namespace;
        self.authentications
            .range(Name::new(namespace, "")..)
            .take_while(move |(name, _)| name.namespace == *namespace)
            .map(|(_, policy)| policy.as_ref())
            .filter(move |policy| policy.selects(workload))
    }

    /// All policies on end users, by name.
    pub fn authentications(&self) -> impl Iterator<Item = &Arc<Authentication>> {
        self.authentications.values()
    }

    /// How much a workload takes.
    pub fn intake(&self, workload: &Name) -> Option<&Arc<Intake>> {
        self.intakes.get(workload)
    }

    /// How much a workload takes at a port; `None` where nobody limits it.
    pub fn port_intake(&self, workload: &Name, port: u16) -> Option<&PortIntake> {
        self.intakes.get(workload)?.ports.get(&port)
    }

    /// How much each workload takes of which that is said, by name.
    pub fn intakes(&self) -> impl Iterator<Item = &Arc<Intake>> {
        self.intakes.values()
    }

    /// All policies, by name.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// Every address whose connections are captured: workloads' and services', and the ambiguous ones, so that
    /// nothing to them leaves as plaintext.
    pub fn captured_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.by_address.keys().chain(&self.ambiguous).copied()
    }

    /// Addresses that more than one workload or service claims.
    pub fn ambiguous(&self) -> &BTreeSet<IpAddr> {
        &self.ambiguous
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::Mode;

    pub(crate) fn mesh() -> Resource {
        let trust_domain = TrustDomain::parse("td").expect("a valid trust domain");
        Resource::Mesh(Arc::new(Mesh { trust_domain, roots: vec![vec![1]] }))
    }

    pub(crate) fn workload(name: &str, address: &str, node: &str) -> Workload {
        Workload {
            name: Name::new("shop", name),
            uid: String::new(),
            node: node.into(),
            service_account: name.into(),
            addresses: vec![address.parse().expect("an address")],
            labels: BTreeMap::new(),
            enrolled: true,
            captured: true,
            mode: Mode::Permissive,
            checks: vec![],
        }
    }

    #[test]
    fn an_address_of_two_workloads_belongs_to_neither_and_stays_captured() {
        let view: NodeView = [
            mesh(),
            Resource::Workload(Arc::new(workload("a", "10.0.0.1", "n"))),
            Resource::Workload(Arc::new(workload("b", "10.0.0.1", "n"))),
        ]
        .into_iter()
        .collect();
        let snapshot = Snapshot::new("n", "1", &view).unwrap();
        let address = "10.0.0.1".parse().unwrap();
        assert!(snapshot.owner(address).is_none());
        assert!(snapshot.captured_addresses().any(|a| a == address));
    }

    #[test]
    fn a_view_without_mesh_is_not_put_in_force() {
        assert_eq!(Snapshot::new("n", "1", &NodeView::default()).unwrap_err(), SnapshotError::NoMesh);
    }

    #[test]
    fn keys_print_and_parse_the_same() {
        for text in [
            "mesh",
            "demand",
            "nobody/10.0.0.1",
            "nobody/fd00::1",
            "workload/shop/web",
            "service/shop/web",
            "policy/shop/web",
            "policy/shop/limits~web",
            "http-route/shop/web",
            "grpc-route/shop/web",
        ] {
            assert_eq!(text.parse::<Key>().unwrap().to_string(), text);
        }
        assert!("pod/shop/web".parse::<Key>().is_err());
        assert!("workload/web".parse::<Key>().is_err());
        assert!("nobody/web".parse::<Key>().is_err());
    }

    #[test]
    fn a_view_by_demand_knows_its_own_what_was_answered_and_what_is_outside_of_every_block() {
        let own = Resource::Workload(Arc::new(workload("a", "10.0.0.1", "n")));
        let demand = Demand { blocks: vec!["10.0.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()] };
        let asked = "10.0.0.9".parse().unwrap();
        let parts = [mesh(), own.clone(), Resource::Demand(Arc::new(demand)), Resource::Nobody(asked)];
        let snapshot = Snapshot::new("n", "1", &parts.into_iter().collect()).unwrap();
        for (address, known) in [
            ("10.0.0.1", true),
            ("10.0.0.9", true),
            ("10.0.0.8", false),
            ("10.0.1.8", true),
            ("fd00::1", false),
        ] {
            assert_eq!(snapshot.knows(address.parse().unwrap()), known, "{address}");
        }
        let whole = Snapshot::new("n", "1", &[mesh(), own].into_iter().collect()).unwrap();
        assert!(whole.knows("10.0.0.8".parse().unwrap()), "what a whole view does not have is outside");
    }
}
