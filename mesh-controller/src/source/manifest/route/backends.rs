//! Where requests go.

use mesh_core::model::{
    Name,
    http::{Backend, BackendTarget, RouteKind},
};
use serde::Deserialize;

use super::{super::check::Check, MAX_ENTRIES, filters::RawFilter};

/// Largest weight (Gateway API).
const MAX_WEIGHT: u32 = 1_000_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawBackend {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<u16>,
    weight: Option<u32>,
    #[serde(default)]
    filters: Vec<RawFilter>,
}

impl RawBackend {
    /// One to which nothing is done on the way.
    pub(super) fn new(to: RawTarget, weight: Option<u32>) -> Self {
        let RawTarget { group, kind, namespace, name, port } = to;
        Self { group, kind, namespace, name, port, weight, filters: vec![] }
    }
}

/// What a reference says wherever it stands.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTarget {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) port: Option<u16>,
}

impl Check<'_> {
    pub(super) fn backends(
        &mut self,
        at: &str,
        kind: RouteKind,
        route: &Name,
        raw: Vec<RawBackend>,
    ) -> Vec<Backend> {
        self.limit(at, raw.len(), MAX_ENTRIES);
        let raw = raw.into_iter().take(MAX_ENTRIES).enumerate();
        raw.map(|(index, raw)| self.backend(&format!("{at}[{index}]"), kind, route, raw)).collect()
    }

    fn backend(&mut self, at: &str, kind: RouteKind, route: &Name, raw: RawBackend) -> Backend {
        let weight = raw.weight.unwrap_or(1);
        if weight > MAX_WEIGHT {
            let cure = format!("write at most {MAX_WEIGHT}: only the shares count");
            self.problem(&format!("{at}.weight"), format!("{weight} is too heavy"), cure);
        }
        let RawBackend { group, kind: of, namespace, name, port, filters, .. } = raw;
        let to = self.reference(at, route, RawTarget { group, kind: of, namespace, name, port });
        Backend { to, weight, filters: self.filters(&format!("{at}.filters"), kind, route, filters) }
    }

    /// A Service and its port; nowhere for what is none, which says nothing against the route itself.
    pub(super) fn reference(&mut self, at: &str, route: &Name, raw: RawTarget) -> BackendTarget {
        let is_service =
            raw.group.is_none_or(|it| it.is_empty()) && raw.kind.is_none_or(|it| it == "Service");
        let namespace = raw.namespace.unwrap_or_else(|| route.namespace.clone());
        self.name(&format!("{at}.namespace"), &namespace);
        self.name(&format!("{at}.name"), &raw.name);
        if !is_service {
            return BackendTarget::Nowhere;
        }
        let field = format!("{at}.port");
        let Some(port) = raw.port else {
            self.problem(&field, "this field is missing", "write 'port:' with one of the Service's ports");
            return BackendTarget::Nowhere;
        };
        self.port(&field, port);
        BackendTarget::Service { service: Name::new(namespace, raw.name), port }
    }
}
