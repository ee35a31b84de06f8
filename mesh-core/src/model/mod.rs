//! Workloads, services and policies as the mesh sees them, after every source (a directory, Kubernetes) was read.
//!
//! Stands apart from the manifests: those are parsed in the controller, checked, and turned into these. Names are
//! checked there; these types are what both sides of the wire agree on.

mod authentication;
pub mod health;
pub mod http;
pub mod intake;
mod policy;
mod request;
pub mod tcp;
pub mod traffic;

use std::{
    collections::BTreeMap,
    fmt,
    hash::{Hash, Hasher},
    net::IpAddr,
    sync::Arc,
};

use serde::{Deserialize, Serialize, Serializer};

pub use self::authentication::{
    Algorithm, Authentication, ClaimHeader, ClaimPattern, KeyMaterial, TokenIssuer, TokenPlace, VerifyingKey,
};
pub use self::policy::{
    Action, Enforcement, Expression, IdentityPattern, IpNet, Operator, PatternError, Policy, PortRange,
    PortRangeError, Rule, Selector, Source, Target, Traits,
};
pub use self::request::{Asks, HeaderPattern, TextPattern, TextPatternError};
use self::{tcp::ConnectionRoute, traffic::Traffic};
use crate::identity::{IdentityError, SpiffeId, TrustDomain};

/// The label that says in which zone something runs (Kubernetes, "Well-Known Labels").
pub const ZONE: &str = "topology.kubernetes.io/zone";

/// The namespaced name of an object, printed as `namespace/name`. Cheap to clone: what is told of a request has several.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Name(Arc<Parts>);

/// The two parts of a [`Name`].
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Parts {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// Both, as they are printed.
    text: Box<str>,
}

impl Name {
    /// A name from its two parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        let (namespace, name) = (namespace.into(), name.into());
        let text = format!("{namespace}/{name}").into();
        Self(Arc::new(Parts { namespace, name, text }))
    }

    /// As it is printed.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl Hash for Parts {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl std::ops::Deref for Name {
    type Target = Parts;
    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// A text is not of the form `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a name: write NAMESPACE/NAME")]
pub struct NameError(pub String);

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl std::str::FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.split_once('/') {
            Some((ns, name)) if !ns.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::new(ns, name))
            }
            _ => Err(NameError(text.chars().take(300).collect())),
        }
    }
}

/// Whether plaintext from sources outside of the mesh is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Mutual TLS where the source can, plaintext where it cannot.
    #[default]
    Permissive,
    /// Mutual TLS or nothing.
    Strict,
}

impl Mode {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Permissive, Self::Strict];

    /// The word of labels, settings and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text is neither mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a mode: write permissive or strict")]
pub struct ModeError(pub String);

impl std::str::FromStr for Mode {
    type Err = ModeError;
    fn from_str(text: &str) -> Result<Self, ModeError> {
        let found = Self::ALL.into_iter().find(|mode| mode.as_str() == text);
        found.ok_or_else(|| ModeError(text.chars().take(100).collect()))
    }
}

/// One running instance with an identity and addresses: a pod, a process on a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Its name.
    pub name: Name,
    /// `metadata.uid` of the pod that it is: its processes are found by it, and one that comes after it under the same
    /// name is another. Empty for what is no pod.
    pub uid: String,
    /// The node it runs on.
    pub node: String,
    /// The account that gives it its identity.
    pub service_account: String,
    /// Its addresses, at most one of a family counts for capture; all are recognised as its own.
    pub addresses: Vec<IpAddr>,
    /// `metadata.labels`, what selectors look at.
    pub labels: BTreeMap<String, String>,
    /// Its traffic is meant to be captured.
    pub enrolled: bool,
    /// Its own agent has said that capture is in place: sources may speak TLS to it.
    pub captured: bool,
    /// Whether it takes plaintext.
    pub mode: Mode,
    /// What its own agent checks of it; at most [`health::MAX_CHECKS`].
    #[serde(default)]
    pub checks: Vec<health::Check>,
}

impl Workload {
    /// Where it runs.
    pub fn place(&self) -> Place {
        Place::of(&self.node, &self.labels)
    }

    /// The identity that its certificates carry.
    pub fn identity(&self, trust_domain: &TrustDomain) -> Result<SpiffeId, IdentityError> {
        SpiffeId::workload(trust_domain, &self.name.namespace, &self.service_account)
    }
}

/// The name and virtual addresses that clients use for a set of endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: Name,
    /// `spec.clusterIPs`.
    pub addresses: Vec<IpAddr>,
    /// `spec.ports`, those of TCP, each with the endpoints that are ready.
    pub ports: Vec<ServicePort>,
    /// Which of the endpoints a client gets.
    #[serde(default)]
    pub choice: Choice,
}

impl Service {
    /// One of its ports, by what clients ask for.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|it| it.port == port)
    }
}

/// Which of a service's endpoints a client gets, where it is not all the same.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Choice {
    /// How near they have to be.
    pub distribution: Distribution,
    /// `spec.sessionAffinity: ClientIP`: for how long after its last new connection a client keeps its endpoint, seconds.
    pub affinity: Option<u32>,
    /// Where the endpoints are, by address; of those that are not here nobody knows. Empty where it does not matter.
    pub places: BTreeMap<IpAddr, Place>,
}

/// How near an endpoint has to be to its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Distribution {
    /// All are the same.
    #[default]
    Any,
    /// `spec.trafficDistribution: PreferSameZone` (or `PreferClose`): those of the client's zone, if there are any.
    SameZone,
    /// `spec.trafficDistribution: PreferSameNode`: those of the client's node, if there are any, or else of its zone.
    SameNode,
    /// `spec.internalTrafficPolicy: Local`: those of the client's node, or none.
    OnlySameNode,
}

impl Distribution {
    /// All.
    pub const ALL: [Self; 4] = [Self::Any, Self::SameZone, Self::SameNode, Self::OnlySameNode];
}

/// Where something runs; empty where that is not known.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Place {
    /// The node.
    pub node: String,
    /// The node's zone.
    pub zone: String,
}

impl Place {
    /// Of a workload on this node with these labels.
    pub fn of(node: &str, labels: &BTreeMap<String, String>) -> Self {
        Self { node: node.to_owned(), zone: labels.get(ZONE).cloned().unwrap_or_default() }
    }
}

/// One port of a service and what serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// `spec.ports[].name`, may be empty.
    pub name: String,
    /// `spec.ports[].port`.
    pub port: u16,
    /// Ready endpoints only.
    pub endpoints: Vec<Endpoint>,
    /// How requests and connections to it are sent.
    #[serde(default)]
    pub traffic: Traffic,
    /// Where connections to it lead. None: to the endpoints.
    #[serde(default)]
    pub routes: Vec<Arc<ConnectionRoute>>,
}

/// One address and port that serves a service: a workload's, or one outside of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Endpoint {
    /// The workload; none for an address that nobody said to be a workload's, such as the API server's.
    pub workload: Option<Name>,
    /// Its address, of the family of the virtual address that was asked for.
    pub address: IpAddr,
    /// The workload's port (`spec.ports[].targetPort`).
    pub port: u16,
}
