//! A connection to a port of a service that has TLSRoutes or a TCPRoute: which of them it falls under, and where that leads.
//! Decided once, when it is opened; what routes say later is for later connections.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{
    model::{Service, Workload},
    refusal::Reason,
    route::Route,
    tcp::{self, Table},
    view::{Owner, Snapshot},
};

use super::hello::Hello;
use crate::{
    connect::First,
    record::{ByRoute, Entry},
    refusal::Refusal,
};

/// What a client is known to have said.
#[derive(Debug)]
pub(super) enum Heard {
    /// Nothing was listened to.
    Nothing,
    /// It has begun to speak TLS, and so no request.
    Tls,
    /// The beginning of TLS, as a whole; boxed, as few connections have one.
    Hello(Box<Hello>),
}

impl Heard {
    /// What was read of it, to go on to the server.
    pub(super) fn first(&self) -> First {
        match self {
            Self::Nothing | Self::Tls => First::default(),
            Self::Hello(hello) => First::of(&hello.bytes),
        }
    }
}

/// The routes of connections to the port of a service that is asked for, if there are some.
#[derive(Debug)]
pub(super) struct Routes {
    pub(super) service: Arc<Service>,
    table: Arc<Table>,
}

impl Routes {
    /// Those for the connections of a workload.
    pub(super) fn of(view: &Snapshot, destination: SocketAddr, namespace: &str) -> Option<Self> {
        let Some(Owner::Service(service)) = view.owner(destination.ip()) else { return None };
        let table = view.connections(&service.name, destination.port(), namespace)?;
        Some(Self { service: service.clone(), table: table.clone() })
    }

    /// Whether it has to be listened which name the client asks for.
    pub(super) fn wait_for(&self, heard: &Heard) -> bool {
        self.table.is_by_name() && !matches!(heard, Heard::Hello(_))
    }

    /// Where a connection leads.
    pub(super) fn lead(
        &self,
        view: &Snapshot,
        source: &Workload,
        original: SocketAddr,
        heard: &Heard,
        entry: &mut Entry,
    ) -> Result<Route, Refusal> {
        let by = entry.by.insert(Box::new(ByRoute::of(&self.service.name)));
        let name = match heard {
            Heard::Hello(hello) => hello.name.as_deref(),
            Heard::Nothing | Heard::Tls => None,
        };
        let route = self.table.choose(name).ok_or_else(|| {
            let detail = name.map_or_else(|| "no name".to_owned(), |name| format!("'{name}'"));
            Refusal::new(Reason::NoServerName, format!("the client asks for {detail}"))
        })?;
        by.route = Some(format!("{}/{}", route.kind.as_str(), route.name));
        let to = tcp::share(&route.backends, rand::random());
        let led = tcp::to(view, source, to, original.is_ipv4());
        let led =
            led.map_err(|reason| Refusal::new(reason, format!("{} {}", route.kind.as_str(), route.name)));
        if let Ok(Route::Service { service, .. }) = &led {
            by.backend = Some(service.name.clone());
        }
        led
    }
}
