//! A client of `web`, through two agents, of whose requests policies say something.

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use mesh_agent::{
    connection::{Direction, Limits},
    metrics::{Named, RequestLabels},
};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};

use crate::{
    app::{App, app, said},
    world::{Plan, World, connect, eventually, in_time, name},
};

pub(crate) struct Bed {
    pub(crate) world: World,
    pub(crate) plan: Plan,
    /// Where the client's connections to `web` are captured.
    pub(crate) at: SocketAddr,
    /// Where strangers' arrive.
    pub(crate) web: SocketAddr,
    pub(crate) listener: Option<TcpListener>,
}

impl Bed {
    pub(crate) async fn of(plan: Plan) -> Self {
        // Without spares, so that tunnels can be counted.
        let world = World::with(&plan, Limits { spares: 0, ..Limits::default() }, Limits::default());
        let (web, listener) = world.web().await;
        let at = world.outbound(web);
        Self { world, plan, at, web, listener: Some(listener) }
    }

    pub(crate) fn app(&mut self) -> App {
        app("web", self.listener.take().unwrap())
    }

    pub(crate) async fn client(&self) -> Client {
        Client::on(connect(self.at).await).await
    }

    /// How many requests the destination has answered so.
    pub(crate) fn answered(&self, status: u16, reason: &'static str) -> u64 {
        self.world.destination.metrics.requests(&RequestLabels {
            direction: Direction::Inbound,
            workload: Named(Some(name("web"))),
            service: Named(None),
            route: None,
            backend: Named(None),
            status: Some(status),
            grpc_status: None,
            reason,
        })
    }

    /// The destination's line of a request, or of a connection.
    pub(crate) async fn log(&self, is: impl Fn(&Value) -> bool) -> Value {
        eventually(async || self.world.destination.log().await.into_iter().find(&is)).await
    }
}

pub(crate) struct Client(pub(crate) http1::SendRequest<BoxBody<Bytes, Infallible>>);

impl Client {
    pub(crate) async fn on(stream: TcpStream) -> Self {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self(sender)
    }

    pub(crate) async fn send(
        &mut self,
        request: http::request::Builder,
    ) -> hyper::Result<Response<Incoming>> {
        let request = request.header("host", "web").body(Full::new(Bytes::new()).boxed()).unwrap();
        in_time(self.0.ready()).await?;
        in_time(self.0.send_request(request)).await
    }

    pub(crate) async fn ask(&mut self, request: http::request::Builder) -> (StatusCode, Value) {
        said(self.send(request).await.unwrap()).await
    }
}

/// What the application says that it has seen of a header.
pub(crate) fn header<'a>(said: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = said["headers"].as_array().unwrap().iter();
    headers.filter(|it| it[0] == name).map(|it| it[1].as_str().unwrap()).collect()
}
