//! What policies say of requests to ports whose connections are routed: nothing of these is read, so it is not in force there.
//! Stands apart from what policies are for, as it is no mistake of theirs alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use mesh_core::model::{Name, http::RouteKind, tcp::ConnectionRoute};

use crate::traffic;

/// Most routes that are named.
const MAX_NAMED: usize = 3;

/// What a policy says of the requests to one port, and what is not in force as connections to it are routed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unread {
    /// The Service.
    pub service: Name,
    /// Its port.
    pub port: u16,
    /// Policies for the whole namespace have their say there, and none that is nearer.
    pub of_namespace: bool,
    /// What is not in force, by the fields of the policy's spec.
    pub parts: Vec<&'static str>,
    /// The routes, the older ones first.
    pub by: Vec<(RouteKind, Name)>,
    /// The namespaces whose workloads' connections alone are routed; none: those of all.
    pub clients: BTreeSet<String>,
}

impl Unread {
    /// What helps.
    pub const fn cure(&self) -> &'static str {
        match self.of_namespace {
            true => {
                "if requests to it can be read, route them by an HTTPRoute or GRPCRoute instead; if not, nothing has to be done"
            }
            false => {
                "if requests to it can be read, route them by an HTTPRoute or GRPCRoute instead; if not, name the other ports \
                 by sectionName, or say it of other Services"
            }
        }
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, port, parts, by, clients, .. } = self;
        write!(f, "Service {service}, port {port}: {} ", parts.join(" and "))?;
        f.write_str(if parts.len() == 1 { "is" } else { "are" })?;
        f.write_str(" not in force")?;
        if !clients.is_empty() {
            let clients: Vec<&str> = clients.iter().map(String::as_str).collect();
            write!(f, " for the workloads of namespace {}", clients.join(" and "))?;
        }
        let named: Vec<String> =
            by.iter().take(MAX_NAMED).map(|(kind, name)| format!("{} {name}", kind.as_str())).collect();
        write!(f, ", as {}", named.join(" and "))?;
        if by.len() > MAX_NAMED {
            write!(f, " and {} more", by.len() - MAX_NAMED)?;
        }
        let routes = if by.len() == 1 { "routes" } else { "route" };
        write!(f, " {routes} its connections, of which nothing is read")
    }
}

/// All that is not in force, by the policies that say it, in the order of Services and ports.
pub(super) fn all(
    traffic: &traffic::Resolved,
    connections: &BTreeMap<(Name, u16), Vec<Arc<ConnectionRoute>>>,
) -> BTreeMap<Name, Vec<Unread>> {
    let mut all: BTreeMap<Name, Vec<Unread>> = BTreeMap::new();
    for ((service, port), routes) in connections {
        let clients: Option<BTreeSet<String>> =
            routes.iter().map(|route| route.clients(service).map(str::to_owned)).collect();
        let mut of_port: BTreeMap<(&Name, bool), Vec<&'static str>> = BTreeMap::new();
        for (policy, of_namespace, part) in traffic.of_requests(service, *port) {
            of_port.entry((policy, of_namespace)).or_default().push(part);
        }
        for ((policy, of_namespace), parts) in of_port {
            all.entry(policy.clone()).or_default().push(Unread {
                service: service.clone(),
                port: *port,
                of_namespace,
                parts,
                by: routes.iter().map(|route| (route.kind, route.name.clone())).collect(),
                clients: clients.clone().unwrap_or_default(),
            });
        }
    }
    all
}
