//! A client of a service, through two agents, whose endpoints are two applications.

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Empty, Full, combinators::BoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::model::http::{
    Backend, BackendTarget, Filters, Parent, PathMatch, RequestMatch, RequestRoute, RouteKind, RouteRule,
};
use serde_json::Value;

use crate::{
    app::{App, app, said},
    world::{Plan, Sees, VIP, World, connect, eventually, in_time, name},
};

pub(crate) fn to(account: &str, weight: u32) -> Backend {
    let to = BackendTarget::Service { service: name(account), port: 80 };
    Backend { to, weight, filters: Filters::default() }
}

pub(crate) fn rule(matches: Vec<RequestMatch>, backends: Vec<Backend>) -> RouteRule {
    RouteRule { matches, backends, ..RouteRule::default() }
}

pub(crate) fn prefix(path: &str) -> RequestMatch {
    RequestMatch { path: PathMatch::Prefix(path.into()), ..RequestMatch::default() }
}

pub(crate) fn route(rules: Vec<RouteRule>) -> RequestRoute {
    let parents = vec![Parent { service: name("service"), port: None }];
    RequestRoute { kind: RouteKind::Http, name: name("route"), created: 0, parents, rules }
}

/// A client of a service with these rules, whose backends are `web` and `api`.
pub(crate) struct Bed {
    pub(crate) world: World,
    pub(crate) plan: Plan,
    pub(crate) web: App,
    pub(crate) api: App,
    pub(crate) at: SocketAddr,
}

impl Bed {
    pub(crate) async fn new(rules: Vec<RouteRule>) -> Self {
        Self::seeing(rules, &Sees::default()).await
    }

    /// The same, with agents that see what this says.
    pub(crate) async fn seeing(rules: Vec<RouteRule>, sees: &Sees) -> Self {
        let mut plan = Plan::default();
        plan.service(&[]);
        let world = World::seeing(&plan, sees);
        let ((web_at, web), (api_at, api)) = (world.web().await, world.api().await);
        plan.service(&[("web", web_at), ("api", api_at)]);
        plan.backend("web", "web", &[web_at]);
        plan.backend("api", "api", &[api_at]);
        plan.routes = vec![route(rules)];
        world.publish(&plan, "2");
        let at = world.outbound(VIP.parse().unwrap());
        Self { world, plan, web: app("web", web), api: app("api", api), at }
    }

    pub(crate) async fn client(&self) -> Client {
        let (sender, connection) = http1::handshake(TokioIo::new(connect(self.at).await)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Client(sender)
    }

    pub(crate) async fn caller(&self) -> Caller {
        let stream = TokioIo::new(connect(self.at).await);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        Caller(sender)
    }

    pub(crate) async fn log(&self, path: &str) -> Value {
        eventually(async || {
            let lines = self.world.source.log().await;
            lines.into_iter().find(|line| line["kind"] == "request" && line["path"] == path)
        })
        .await
    }
}

/// A client of gRPC.
pub(crate) struct Caller(pub(crate) http2::SendRequest<Empty<Bytes>>);

impl Caller {
    pub(crate) async fn call(&self, path: &str) -> Response<Incoming> {
        let request = Request::post(format!("http://service{path}"))
            .version(Version::HTTP_2)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Empty::new())
            .unwrap();
        in_time(self.0.clone().send_request(request)).await.unwrap()
    }
}

pub(crate) struct Client(pub(crate) http1::SendRequest<BoxBody<Bytes, Infallible>>);

impl Client {
    pub(crate) async fn send(
        &mut self,
        request: http::request::Builder,
        body: &'static str,
    ) -> Response<Incoming> {
        let request = request.header("host", "service").body(Full::new(Bytes::from(body)).boxed()).unwrap();
        in_time(self.0.ready()).await.unwrap();
        in_time(self.0.send_request(request)).await.unwrap()
    }

    pub(crate) async fn get(&mut self, path: &str) -> (StatusCode, Value) {
        self.ask(Request::get(path)).await
    }

    pub(crate) async fn ask(&mut self, request: http::request::Builder) -> (StatusCode, Value) {
        said(self.send(request, "").await).await
    }
}
