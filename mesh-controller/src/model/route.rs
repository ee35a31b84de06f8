//! Routes of requests and of connections, and who may send some to whom, as manifests want it: what they refer to is not looked up yet.

use mesh_core::model::{
    Name,
    http::{RouteKind, RouteRule},
    tcp::Hostname,
};
use serde::{Deserialize, Serialize};

use super::Kind;

impl From<RouteKind> for Kind {
    fn from(kind: RouteKind) -> Self {
        match kind {
            RouteKind::Grpc => Self::GrpcRoute,
            RouteKind::Http => Self::HttpRoute,
            RouteKind::Tls => Self::TlsRoute,
            RouteKind::Tcp => Self::TcpRoute,
        }
    }
}

/// An HTTPRoute, GRPCRoute, TLSRoute or TCPRoute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Which of these.
    pub kind: RouteKind,
    /// Its name.
    pub name: Name,
    /// `metadata.creationTimestamp`, seconds since 1970; 0 where nobody says it.
    pub created: i64,
    /// Those of its parents that are Services: of others it is not ours to speak.
    pub parents: Vec<ParentRef>,
    /// Of a TLSRoute: the names of servers that it is for. Of others none: they mean nothing in a mesh.
    #[serde(default)]
    pub hostnames: Vec<Hostname>,
    /// Its rules; of connections there is one, that has backends and nothing else. Where one leads is as it was written, and
    /// nowhere if that is no Service.
    pub rules: Vec<RouteRule>,
}

/// A Service that a route wants to be for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentRef {
    /// Its place in `spec.parentRefs`, from 0.
    pub index: usize,
    /// The Service.
    pub service: Name,
    /// The number of one of its ports.
    pub port: Option<u16>,
    /// The name of one of its ports.
    pub section: Option<String>,
}

/// Which routes of other namespaces may lead to Services of this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferenceGrant {
    /// Its name.
    pub name: Name,
    /// Routes of these kinds and namespaces; others it may speak of besides, and they are not kept.
    pub from: Vec<(RouteKind, String)>,
    /// Services with these names; none: all.
    pub to: Vec<Option<String>>,
}

impl ReferenceGrant {
    /// Whether routes of a kind and a namespace may lead to this Service.
    pub fn permits(&self, kind: RouteKind, namespace: &str, service: &Name) -> bool {
        self.name.namespace == service.namespace
            && self.from.iter().any(|(of, from)| *of == kind && from == namespace)
            && self.to.iter().any(|name| name.as_ref().is_none_or(|name| *name == service.name))
    }
}
