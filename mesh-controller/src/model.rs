//! Everything that the sources want, checked and in the mesh's words: the one input of every projection.
//!
//! Sources build it, nothing else changes it. It holds no times, no file names and nothing that agents reported.

mod authentication;
mod route;
mod traffic;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use mesh_core::{
    identity::{SpiffeId, TrustDomain},
    model::{Authentication, Distribution, Mode, Name, Place, Policy, http::RouteKind},
};
use serde::{Deserialize, Serialize};

pub use self::{
    authentication::{AuthenticationPolicy, Fetched, KeysAt},
    route::{ParentRef, ReferenceGrant, Route},
    traffic::{Takes, TrafficPolicy, TrafficTarget},
};

/// The kinds that the controller understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// Kubernetes' own; carries the enrolment and the mode of its workloads.
    Namespace,
    /// `nodemesh.io/v1alpha1`.
    Workload,
    /// Kubernetes' own.
    Service,
    /// Kubernetes' own; who serves a Service.
    EndpointSlice,
    /// `nodemesh.io/v1alpha1`.
    AuthorizationPolicy,
    /// `nodemesh.io/v1alpha1`; how requests and connections are sent.
    TrafficPolicy,
    /// `nodemesh.io/v1alpha1`; whose tokens requests bear.
    AuthenticationPolicy,
    /// The Gateway API's; where requests to a Service lead.
    HttpRoute,
    /// The Gateway API's; where calls to a Service lead.
    GrpcRoute,
    /// The Gateway API's; where connections to a Service lead that ask for a server by its name in TLS.
    TlsRoute,
    /// The Gateway API's; where connections to a Service lead.
    TcpRoute,
    /// The Gateway API's; which routes of other namespaces may lead here.
    ReferenceGrant,
}

impl Kind {
    /// All kinds, in the order in which a person reads them.
    pub const ALL: [Self; 12] = [
        Self::Namespace,
        Self::Workload,
        Self::Service,
        Self::EndpointSlice,
        Self::AuthorizationPolicy,
        Self::TrafficPolicy,
        Self::AuthenticationPolicy,
        Self::HttpRoute,
        Self::GrpcRoute,
        Self::TlsRoute,
        Self::TcpRoute,
        Self::ReferenceGrant,
    ];

    /// `kind:` in a manifest.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Workload => "Workload",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::AuthenticationPolicy => "AuthenticationPolicy",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::TlsRoute => "TLSRoute",
            Self::TcpRoute => "TCPRoute",
            Self::ReferenceGrant => "ReferenceGrant",
        }
    }

    /// `apiVersion:` in a manifest, and what a cluster is asked for first.
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Service => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::Workload | Self::AuthorizationPolicy | Self::AuthenticationPolicy | Self::TrafficPolicy => {
                "nodemesh.io/v1alpha1"
            }
            Self::HttpRoute | Self::GrpcRoute | Self::TlsRoute | Self::TcpRoute => {
                "gateway.networking.k8s.io/v1"
            }
            Self::ReferenceGrant => "gateway.networking.k8s.io/v1beta1",
        }
    }

    /// Other `apiVersion:` that mean the same, and that a cluster is asked for when it does not serve those before.
    pub const fn other_api_versions(self) -> &'static [&'static str] {
        match self {
            Self::HttpRoute => &["gateway.networking.k8s.io/v1beta1"],
            Self::ReferenceGrant => &["gateway.networking.k8s.io/v1"],
            // Of v1alpha2 some have no hostnames, or more rules than one: these are refused for that.
            Self::TlsRoute => &["gateway.networking.k8s.io/v1alpha3", "gateway.networking.k8s.io/v1alpha2"],
            Self::TcpRoute => &["gateway.networking.k8s.io/v1alpha2"],
            Self::Namespace
            | Self::Workload
            | Self::Service
            | Self::EndpointSlice
            | Self::AuthorizationPolicy
            | Self::TrafficPolicy
            | Self::AuthenticationPolicy
            | Self::GrpcRoute => &[],
        }
    }

    /// All `apiVersion:` that mean the same, the best first.
    pub fn api_versions(self) -> impl Iterator<Item = &'static str> {
        [self.api_version()].into_iter().chain(self.other_api_versions().iter().copied())
    }

    /// Whether it is one of routes.
    pub const fn is_route(self) -> bool {
        matches!(self, Self::HttpRoute | Self::GrpcRoute | Self::TlsRoute | Self::TcpRoute)
    }

    /// The kind with this name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What an object is called; unique in a model. A namespace has itself as its namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Namespace => write!(f, "Namespace {}", self.name.name),
            kind => write!(f, "{kind} {}", self.name),
        }
    }
}

/// A namespace's say about its workloads.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Workloads without a word of their own are enrolled.
    pub enroll: bool,
    /// Whether those of its workloads that do not say it themselves take plaintext.
    #[serde(default)]
    pub mode: Option<Mode>,
}

/// Who says what a workload's mode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModeFrom {
    /// Its own label.
    Workload,
    /// Its namespace's label.
    Namespace,
    /// Neither: the controller's `--default-mode`.
    Default,
}

impl fmt::Display for ModeFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Workload => "workload",
            Self::Namespace => "namespace",
            Self::Default => "default",
        })
    }
}

/// A workload as its manifest wants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Its name.
    pub name: Name,
    /// `metadata.uid` of the pod that it is; empty for what is no pod.
    #[serde(default)]
    pub uid: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// Its own word on enrolment, which wins over its namespace's.
    pub enroll: Option<bool>,
    /// Its own word on whether it takes plaintext, which wins over its namespace's.
    #[serde(default)]
    pub mode: Option<Mode>,
    /// The node it runs on.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The account that gives it its identity.
    pub service_account: String,
    /// Services send connections to it.
    pub ready: bool,
}

impl Workload {
    /// Where it runs.
    pub fn place(&self) -> Place {
        Place::of(&self.node, &self.labels)
    }
}

/// A service as its manifest wants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: Name,
    /// Its virtual addresses; none for a headless one.
    pub addresses: Vec<IpAddr>,
    /// All of these labels; none selects nothing.
    pub selector: BTreeMap<String, String>,
    /// Its TCP ports.
    pub ports: Vec<Port>,
    /// How near endpoints have to be.
    #[serde(default)]
    pub distribution: Distribution,
    /// For how long a client keeps its endpoint, seconds.
    #[serde(default)]
    pub affinity: Option<u32>,
}

impl Service {
    /// Whether a workload of its namespace with these labels serves it.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.selector.is_empty() && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// One port of a [`Service`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// May be empty.
    pub name: String,
    /// What clients ask for.
    pub port: u16,
    /// What the workloads listen on; none if they have a name for it, which only EndpointSlices tell the number of.
    pub target: Option<u16>,
}

/// Some of the endpoints of a service, as whoever watches over them says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSlice {
    /// Its name.
    pub name: Name,
    /// The Service of its namespace whose endpoints they are; empty if it does not say.
    pub service: String,
    /// What they listen on, by the name of the Service's port.
    pub ports: Vec<(String, u16)>,
    /// Those that take connections, or still would.
    pub endpoints: Vec<SliceEndpoint>,
}

/// One endpoint of an [`EndpointSlice`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// The workload that it is said to be.
    pub workload: Option<Name>,
    /// Where it is said to run.
    #[serde(default)]
    pub place: Place,
    /// It is on its way out, and serves still: asked only where no other endpoint is ready.
    pub ending: bool,
}

/// One checked object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Object {
    /// A namespace.
    Namespace(Namespace),
    /// A workload; shared with every model that has it, as there are many.
    Workload(Arc<Workload>),
    /// A service.
    Service(Service),
    /// Some endpoints; shared with every model that has them, as there are many.
    EndpointSlice(Arc<EndpointSlice>),
    /// A policy.
    AuthorizationPolicy(Policy),
    /// How requests and connections are sent; shared with every model that has it.
    TrafficPolicy(Arc<TrafficPolicy>),
    /// A policy on end users.
    AuthenticationPolicy(AuthenticationPolicy),
    /// Where requests, calls or connections lead; shared with every model that has it, as one may be long.
    Route(Arc<Route>),
    /// Which routes of other namespaces may lead here.
    ReferenceGrant(ReferenceGrant),
}

impl Object {
    /// What it is called.
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Namespace(namespace) => ObjectKey {
                kind: Kind::Namespace,
                name: Name::new(namespace.name.clone(), namespace.name.clone()),
            },
            Self::Workload(workload) => ObjectKey { kind: Kind::Workload, name: workload.name.clone() },
            Self::Service(service) => ObjectKey { kind: Kind::Service, name: service.name.clone() },
            Self::EndpointSlice(slice) => ObjectKey { kind: Kind::EndpointSlice, name: slice.name.clone() },
            Self::AuthorizationPolicy(policy) => {
                ObjectKey { kind: Kind::AuthorizationPolicy, name: policy.name.clone() }
            }
            Self::TrafficPolicy(policy) => ObjectKey { kind: Kind::TrafficPolicy, name: policy.name.clone() },
            Self::AuthenticationPolicy(policy) => {
                ObjectKey { kind: Kind::AuthenticationPolicy, name: policy.said.name.clone() }
            }
            Self::Route(route) => ObjectKey { kind: route.kind.into(), name: route.name.clone() },
            Self::ReferenceGrant(grant) => ObjectKey { kind: Kind::ReferenceGrant, name: grant.name.clone() },
        }
    }
}

/// The whole desired state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Model {
    /// By name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// By name.
    pub workloads: BTreeMap<Name, Arc<Workload>>,
    /// By name.
    pub services: BTreeMap<Name, Service>,
    /// By name.
    pub slices: BTreeMap<Name, Arc<EndpointSlice>>,
    /// By name; shared as they are by every view that has them.
    pub policies: BTreeMap<Name, Arc<Policy>>,
    /// By name.
    pub traffic: BTreeMap<Name, Arc<TrafficPolicy>>,
    /// By name, with the keys that are known: those of the manifests, until [`Model::put_in_keys`].
    pub authentications: BTreeMap<Name, Arc<Authentication>>,
    /// Those of whose issuers the keys are elsewhere.
    pub keys_elsewhere: BTreeMap<Name, AuthenticationPolicy>,
    /// By kind and name.
    pub routes: BTreeMap<(RouteKind, Name), Arc<Route>>,
    /// By name.
    pub grants: BTreeMap<Name, ReferenceGrant>,
}

impl<'a> FromIterator<&'a Object> for Model {
    fn from_iter<I: IntoIterator<Item = &'a Object>>(objects: I) -> Self {
        let mut model = Self::default();
        for object in objects {
            match object {
                Object::Namespace(it) => drop(model.namespaces.insert(it.name.clone(), it.clone())),
                Object::Workload(it) => drop(model.workloads.insert(it.name.clone(), it.clone())),
                Object::Service(it) => drop(model.services.insert(it.name.clone(), it.clone())),
                Object::EndpointSlice(it) => drop(model.slices.insert(it.name.clone(), it.clone())),
                Object::AuthorizationPolicy(it) => {
                    drop(model.policies.insert(it.name.clone(), Arc::new(it.clone())));
                }
                Object::TrafficPolicy(it) => drop(model.traffic.insert(it.name.clone(), it.clone())),
                Object::AuthenticationPolicy(it) => model.take_authentication(it),
                Object::Route(it) => drop(model.routes.insert((it.kind, it.name.clone()), it.clone())),
                Object::ReferenceGrant(it) => drop(model.grants.insert(it.name.clone(), it.clone())),
            }
        }
        model
    }
}

impl Model {
    fn take_authentication(&mut self, policy: &AuthenticationPolicy) {
        let name = &policy.said.name;
        self.authentications.insert(name.clone(), Arc::new(policy.said.clone()));
        if !policy.elsewhere.is_empty() {
            self.keys_elsewhere.insert(name.clone(), policy.clone());
        }
    }

    /// Takes over keys that were fetched.
    pub fn put_in_keys(&mut self, fetched: &Fetched) {
        for (name, policy) in &self.keys_elsewhere {
            self.authentications.insert(name.clone(), Arc::new(policy.with_keys(fetched)));
        }
    }

    /// Whether a workload's traffic is meant to be captured: its own word, else its namespace's, else no.
    pub fn enrolled(&self, workload: &Workload) -> bool {
        let of_namespace = || self.namespaces.get(&workload.name.namespace).is_some_and(|ns| ns.enroll);
        workload.enroll.unwrap_or_else(of_namespace)
    }

    /// Whether a workload takes plaintext, and who says so: itself, else its namespace, else the mesh's default.
    pub fn mode(&self, workload: &Workload, default: Mode) -> (Mode, ModeFrom) {
        let of_namespace = || self.namespaces.get(&workload.name.namespace).and_then(|ns| ns.mode);
        match (workload.mode, of_namespace()) {
            (Some(own), _) => (own, ModeFrom::Workload),
            (None, Some(of_namespace)) => (of_namespace, ModeFrom::Namespace),
            (None, None) => (default, ModeFrom::Default),
        }
    }

    /// The nodes that have a workload.
    pub fn nodes(&self) -> BTreeSet<&str> {
        self.workloads.values().map(|workload| workload.node.as_str()).collect()
    }

    /// Whether an enrolled workload of this node has this identity: only then may the node have its certificate.
    pub fn node_has_identity(&self, node: &str, identity: &SpiffeId, trust_domain: &TrustDomain) -> bool {
        self.workloads.values().any(|workload| {
            workload.node == node
                && self.enrolled(workload)
                && SpiffeId::workload(trust_domain, &workload.name.namespace, &workload.service_account)
                    .is_ok_and(|id| id == *identity)
        })
    }
}
