//! What the protocols say, where it is easy to get wrong, at both places that read requests: the client's agent, by a route,
//! and the destination's, for a policy. Real sockets at both ends. Needs root, as the data path does.
//!
//! | file | what |
//! |---|---|
//! | `http1` | the lines of HTTP/1.1, from both ends, as they are on the wire |
//! | `http2` | streams beside each other: what becomes of the others when one stands still, breaks or is one too many |
//! | `bodies` | bodies while they pass: byte by byte, answered before they end, given up, larger than memory |
//! | `conformance` | what RFC 9113 and RFC 7541 say, as h2spec tries it |
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "../data_path/app.rs"]
#[allow(dead_code, reason = "these tests look at the bytes themselves")]
mod app;
mod bodies;
mod conformance;
mod http1;
mod http2;
#[path = "../data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use std::net::SocketAddr;

use mesh_core::model::{
    Action, Asks, Policy, Rule, Target,
    http::{Backend, BackendTarget, Filters, Parent, RequestRoute, RouteKind, RouteRule},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use world::*;

/// A client, and an application that it asks.
struct Bed {
    #[allow(dead_code, reason = "what is between the two ends with it")]
    world: World,
    plan: Plan,
    /// Where the client's connections are captured.
    at: SocketAddr,
    /// The application, which nobody serves yet.
    app: TcpListener,
}

impl Bed {
    /// The client's agent reads requests, as there is a route.
    async fn routed() -> Self {
        let mut plan = Plan::default();
        plan.service(&[]);
        let world = World::new(&plan);
        let (web, app) = world.web().await;
        plan.backend("web", "web", &[web]);
        let to = BackendTarget::Service { service: name("web"), port: 80 };
        let backends = vec![Backend { to, weight: 1, filters: Filters::default() }];
        plan.routes = vec![RequestRoute {
            kind: RouteKind::Http,
            name: name("route"),
            created: 0,
            parents: vec![Parent { service: name("service"), port: None }],
            rules: vec![RouteRule { backends, ..RouteRule::default() }],
        }];
        world.publish(&plan, "2");
        let at = world.outbound(VIP.parse().unwrap());
        Self { world, plan, at, app }
    }

    /// The application's agent does, as a policy says something of them.
    async fn authorized() -> Self {
        let delete = Asks { methods: vec!["DELETE".into()], ..Asks::default() };
        let to = vec![Target { any_of: delete, ..Target::default() }];
        let policy = Policy::new(name("requests"), Action::Deny, vec![Rule { from: vec![], to }]);
        let plan = Plan { policies: vec![policy], ..Plan::default() };
        let world = World::new(&plan);
        let (web, app) = world.web().await;
        let at = world.outbound(web);
        Self { world, plan, at, app }
    }

    /// The one and the other.
    async fn both() -> [Self; 2] {
        [Self::routed().await, Self::authorized().await]
    }

    /// The client's connection.
    async fn connect(&self) -> TcpStream {
        let stream = connect(self.at).await;
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// The application's.
    async fn accept(&self) -> TcpStream {
        accept(&self.app).await.0
    }
}

/// Sends text.
async fn say(stream: &mut TcpStream, text: &str) {
    in_time(stream.write_all(text.as_bytes())).await.unwrap();
}

/// Everything up to the first time that this text comes, and with it.
async fn hear(stream: &mut TcpStream, until: &str) -> String {
    let mut heard = vec![];
    while !heard.ends_with(until.as_bytes()) {
        let byte = in_time(stream.read_u8()).await;
        heard.push(byte.unwrap_or_else(|error| panic!("{error} after {}", String::from_utf8_lossy(&heard))));
    }
    String::from_utf8(heard).unwrap()
}

/// The other side ends, or breaks, at once.
async fn is_over(stream: &mut TcpStream) {
    let mut rest = vec![];
    let _ = in_time(stream.read_to_end(&mut rest)).await;
}
