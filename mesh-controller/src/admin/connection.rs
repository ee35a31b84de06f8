//! A connection that is routed, by the very functions that the agents run, and told.

use std::sync::Arc;

use mesh_core::{
    model::{Service, http::BackendTarget, tcp::ConnectionRoute, traffic::Traffic},
    refusal::{Reason, Step},
    route::Route,
    tcp::{self, Table},
    view::Owner,
};

use super::{
    answer::End,
    request::answered,
    route::target,
    why::{Story, refused},
};

impl Story<'_> {
    /// The routes of connections to the destination, if it is a port of a service that has some.
    pub(super) fn connections(&self) -> Option<(Arc<Service>, Arc<Table>)> {
        let Owner::Service(service) = self.snapshot.owner(self.asked.ip())? else { return None };
        let namespace = &self.source.name.namespace;
        let table = self.snapshot.connections(&service.name, self.asked.port(), namespace)?;
        Some((service.clone(), table.clone()))
    }

    /// How a connection ends that falls under these routes.
    pub(super) fn connection(&mut self, service: &Service, table: &Table) -> Vec<End> {
        let by = if table.is_by_name() { ", by the name that a client asks for in TLS" } else { "" };
        let says = format!(
            "{} is service {}, whose connections at this port are routed{by}",
            self.asked, service.name
        );
        self.step(Step::Route, says);
        if let Some(port) = service.port(self.asked.port()) {
            // Which endpoint is chosen is for the backend's policies to say.
            self.sent(&Traffic { balancing: None, ..port.traffic.of_connections() });
            let unread: Vec<&str> = port.traffic.parts_of_requests().map(|(_, part)| part).collect();
            if !unread.is_empty() {
                let unread = unread.join(", ");
                let says =
                    format!("not in force, as no request is read: what a TrafficPolicy says of {unread}");
                self.step(Step::Connect, says);
            }
        }
        let to = service.name.to_string();
        if table.is_by_name() && self.server_name.is_none() {
            let says = "each connection is routed for itself: name one with --server-name db.example.com";
            return vec![answered(to, "routed", says)];
        }
        let Some(route) = table.choose(self.server_name) else {
            let name = self.server_name.unwrap_or_default();
            self.step(Step::Route, format!("no route is for the name '{name}'"));
            return vec![refused(to, "", Reason::NoServerName)];
        };
        self.step(Step::Route, format!("{} {}: {}", route.kind.as_str(), route.name, leads(route)));
        let shares: Vec<&BackendTarget> =
            route.backends.iter().filter(|it| it.weight > 0).map(|it| &it.to).collect();
        if shares.is_empty() {
            return vec![refused(to, "", Reason::NoBackend)];
        }
        shares.into_iter().flat_map(|share| self.share(&to, share)).collect()
    }

    /// How connections end that go to one backend.
    fn share(&mut self, to: &str, share: &BackendTarget) -> Vec<End> {
        match tcp::to(self.snapshot, self.source, Some(share), self.asked.is_ipv4()) {
            Ok(Route::Service { service, port, endpoints }) => {
                let says = format!("{}:{port} has {} ready endpoint(s)", service.name, endpoints.len());
                self.step(Step::Balance, says);
                service.port(port).iter().for_each(|port| self.sent(&port.traffic.of_connections()));
                self.endpoints(&endpoints)
            }
            Ok(Route::Workload(..) | Route::Outside(_)) => vec![],
            Err(reason) => {
                let to = if reason == Reason::NoBackend { to.to_owned() } else { target(share) };
                vec![refused(to, "", reason)]
            }
        }
    }
}

/// Where a route leads.
fn leads(route: &ConnectionRoute) -> String {
    let shares = route.backends.iter().map(|it| match route.backends.len() {
        1 => target(&it.to),
        _ => format!("{} weight {}", target(&it.to), it.weight),
    });
    shares.collect::<Vec<_>>().join(", ")
}
