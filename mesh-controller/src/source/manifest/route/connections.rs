//! TLSRoutes and TCPRoutes: one rule each, that has backends and nothing else.

use std::sync::Arc;

use mesh_core::model::{
    Name,
    http::{RouteKind, RouteRule},
    tcp::Hostname,
};
use serde::Deserialize;

use super::{
    super::{Raw, check::Check},
    RawParent,
    backends::{RawBackend, RawTarget},
};
use crate::model::{Object, Route};

/// Most names of servers of a route (Gateway API).
const MAX_HOSTNAMES: usize = 1024;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::source::manifest) struct RawTlsRoute {
    #[serde(default)]
    parent_refs: Vec<RawParent>,
    #[serde(default)]
    hostnames: Vec<String>,
    rules: Vec<RawRule>,
    #[serde(rename = "useDefaultGateways")]
    _use_default_gateways: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::source::manifest) struct RawTcpRoute {
    #[serde(default)]
    parent_refs: Vec<RawParent>,
    rules: Vec<RawRule>,
    #[serde(rename = "useDefaultGateways")]
    _use_default_gateways: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRule {
    name: Option<String>,
    #[serde(default)]
    backend_refs: Vec<RawShare>,
}

/// A backend of connections, to which nothing can be done on the way.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawShare {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<u16>,
    weight: Option<u32>,
}

impl From<RawShare> for RawBackend {
    fn from(raw: RawShare) -> Self {
        let RawShare { group, kind, namespace, name, port, weight } = raw;
        Self::new(RawTarget { group, kind, namespace, name, port }, weight)
    }
}

impl Check<'_> {
    pub(in crate::source::manifest) fn tls_route(&mut self, raw: Raw<RawTlsRoute>) -> Object {
        let (name, created) = (self.namespaced(&raw.metadata), self.created(&raw.metadata));
        let hostnames = self.hostnames(raw.spec.hostnames);
        let parents = self.parents(&name, raw.spec.parent_refs);
        let rules = self.connection_rules(RouteKind::Tls, &name, raw.spec.rules);
        Object::Route(Arc::new(Route { kind: RouteKind::Tls, name, created, parents, hostnames, rules }))
    }

    pub(in crate::source::manifest) fn tcp_route(&mut self, raw: Raw<RawTcpRoute>) -> Object {
        let (name, created) = (self.namespaced(&raw.metadata), self.created(&raw.metadata));
        let parents = self.parents(&name, raw.spec.parent_refs);
        let rules = self.connection_rules(RouteKind::Tcp, &name, raw.spec.rules);
        let hostnames = vec![];
        Object::Route(Arc::new(Route { kind: RouteKind::Tcp, name, created, parents, hostnames, rules }))
    }

    fn hostnames(&mut self, raw: Vec<String>) -> Vec<Hostname> {
        let field = "spec.hostnames";
        self.limit(field, raw.len(), MAX_HOSTNAMES);
        if raw.is_empty() {
            let reason = "it is for no name, and so for no connection";
            self.problem(field, reason, "write the names that clients ask for, or make it a TCPRoute");
        }
        let mut hostnames: Vec<Hostname> = Vec::new();
        for (index, text) in raw.iter().take(MAX_HOSTNAMES).enumerate() {
            match text.parse() {
                Ok(hostname) => hostnames.push(hostname),
                Err(_) => {
                    let shown: String = text.chars().take(300).collect();
                    let cure = "write one in lower case, such as db.example.com or *.example.com";
                    self.problem(
                        &format!("{field}[{index}]"),
                        format!("'{shown}' is not a name of a server"),
                        cure,
                    );
                }
            }
        }
        hostnames
    }

    /// The only rule.
    fn connection_rules(&mut self, kind: RouteKind, route: &Name, raw: Vec<RawRule>) -> Vec<RouteRule> {
        let field = "spec.rules";
        if raw.len() != 1 {
            let reason = format!("a {} has one rule, and this one has {}", kind.as_str(), raw.len());
            self.problem(field, reason, "write one, or make a route of each");
        }
        let rule = |raw: RawRule| {
            let at = format!("{field}[0]");
            let backends: Vec<RawBackend> = raw.backend_refs.into_iter().map(RawBackend::from).collect();
            let at_backends = format!("{at}.backendRefs");
            if backends.is_empty() {
                let reason = "it leads nowhere";
                self.problem(&at_backends, reason, "write at least one Service, with its port");
            }
            RouteRule {
                name: self.rule_name(&at, raw.name),
                backends: self.backends(&at_backends, kind, route, backends),
                ..RouteRule::default()
            }
        };
        raw.into_iter().take(1).map(rule).collect()
    }
}
