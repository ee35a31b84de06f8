//! To which endpoint a request is sent, and when it is tried again.
//!
//! A request that a backend certainly did not take is sent to another endpoint, whatever it is. One that a backend may
//! have taken is sent again only if the rule says so, or if it is a safe one (RFC 9110, section 9.2.1), and
//! only as long as such attempts are few beside all requests to the service ([`Budget`]): when everything fails, trying
//! again makes it worse.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use mesh_core::{
    balance::Budget,
    http::choose,
    identity::SpiffeId,
    model::{
        Endpoint, Name,
        http::{BackendTarget, Mirror, RouteRule},
    },
    refusal::Reason,
    route,
    view::Snapshot,
};

use super::{
    Asker, Declined,
    body::{Asking, Body},
    exchange::Exchange,
    upstream::{Unanswered, Used},
};
use crate::{balance::Attempt, refusal::Refusal};

/// How often a request that may be made twice is tried again where its rule does not say it.
const DEFAULT_RETRIES: u32 = 2;
/// The pause before the first of those; each next one is twice as long.
const DEFAULT_PAUSE: Duration = Duration::from_millis(25);
/// Services whose budget is remembered.
const MAX_BUDGETS: usize = 4096;

/// How many attempts may be made again, by service.
#[derive(Debug)]
pub(in super::super) struct Budgets {
    epoch: Instant,
    of: Mutex<HashMap<Name, Budget>>,
}

impl Default for Budgets {
    fn default() -> Self {
        Self { epoch: Instant::now(), of: Mutex::default() }
    }
}

impl Budgets {
    fn with<T>(&self, service: &Name, look: impl FnOnce(&mut Budget, Duration) -> T) -> T {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if of.len() >= MAX_BUDGETS && !of.contains_key(service) {
            of.clear();
        }
        look(of.entry(service.clone()).or_default(), self.epoch.elapsed())
    }
}

/// The endpoints that a request may be sent to.
#[derive(Debug)]
pub(super) struct Backends {
    service: Name,
    untried: Vec<Endpoint>,
    /// The one of the request's session.
    session: Option<SocketAddr>,
}

impl Backends {
    /// Those of a port of a service, as near to the client as the service wants.
    pub(super) fn new(
        view: &Snapshot,
        asker: &Asker,
        service: &Name,
        port: u16,
        session: Option<SocketAddr>,
    ) -> Result<Self, Declined> {
        let unready = |reason: Reason| Declined::new(StatusCode::SERVICE_UNAVAILABLE, reason);
        let source = view.workload(&asker.local.name).ok_or_else(|| unready(Reason::ViewMissing))?;
        let known = view.service(service).ok_or_else(|| unready(Reason::NoEndpoint))?;
        let untried = route::endpoints(known, port, asker.original.is_ipv4(), source).map_err(unready)?;
        Ok(Self { service: service.clone(), untried, session })
    }

    /// One for an attempt; none is asked twice before all were.
    fn pick(&mut self, asker: &Asker) -> Option<(Endpoint, Attempt)> {
        let balancer = &asker.node.inner.connector.balancer;
        let of_session = |it: &Endpoint| Some(SocketAddr::new(it.address, it.port)) == self.session;
        if let Some(at) = self.untried.iter().position(of_session) {
            let endpoint = self.untried.swap_remove(at);
            let (_, attempt) = balancer.pick(&[&endpoint])?;
            return Some((endpoint, attempt));
        }
        let (at, attempt) = balancer.pick(&self.untried.iter().collect::<Vec<_>>())?;
        Some((self.untried.swap_remove(at), attempt))
    }
}

/// A request that is being sent.
pub(super) struct Attempts<'a> {
    pub(super) asker: &'a Arc<Asker>,
    pub(super) view: &'a Snapshot,
    pub(super) own: &'a Arc<SpiffeId>,
    pub(super) rule: &'a RouteRule,
    pub(super) backends: Backends,
    pub(super) head: Request<()>,
    pub(super) body: Asking,
}

/// How one attempt ended.
enum Tried {
    Answered(Box<(Response<Incoming>, Used)>),
    NotSent(Refusal),
    Broke(Refusal),
    Late,
}

impl Attempts<'_> {
    /// Sends it until there is an answer to keep, within the rule's times.
    pub(super) async fn run(
        &mut self,
        exchange: &mut Exchange,
    ) -> Result<(Response<Incoming>, Used, SocketAddr), Declined> {
        let late = || Declined::new(StatusCode::GATEWAY_TIMEOUT, Reason::RequestTimeout);
        match self.rule.timeouts.request {
            None => Box::pin(self.attempts(exchange)).await,
            Some(limit) => match tokio::time::timeout(limit, Box::pin(self.attempts(exchange))).await {
                Ok(result) => result,
                Err(_) => Err(late()),
            },
        }
    }

    async fn attempts(
        &mut self,
        exchange: &mut Exchange,
    ) -> Result<(Response<Incoming>, Used, SocketAddr), Declined> {
        let limits = *self.asker.node.limits();
        let budgets = &self.asker.node.inner.budgets;
        let service = self.backends.service.clone();
        budgets.with(&service, Budget::asked);
        let all = self.backends.untried.clone();
        let (mut unsent, mut again) = (0, 0);
        loop {
            if self.backends.untried.is_empty() {
                self.backends.untried.clone_from(&all);
            }
            let Some((endpoint, attempt)) = self.backends.pick(self.asker) else {
                return Err(Declined::new(StatusCode::SERVICE_UNAVAILABLE, Reason::NoEndpoint));
            };
            exchange.tried(&endpoint);
            let (status, refusal) = match self.once(&endpoint, &attempt).await {
                Tried::Answered(answered) => {
                    let (response, used) = *answered;
                    let to = SocketAddr::new(endpoint.address, endpoint.port);
                    if !self.wants_other(response.status()) || !self.may_again(&mut again, &service) {
                        return Ok((response, used.counting(attempt), to));
                    }
                    self.pause(again).await;
                    continue;
                }
                Tried::NotSent(refusal) => {
                    attempt.failed();
                    unsent += 1;
                    if unsent < limits.endpoint_attempts && (unsent < all.len()) {
                        continue;
                    }
                    (StatusCode::SERVICE_UNAVAILABLE, refusal)
                }
                Tried::Broke(refusal) => {
                    attempt.failed();
                    (StatusCode::SERVICE_UNAVAILABLE, refusal)
                }
                Tried::Late => (StatusCode::GATEWAY_TIMEOUT, Reason::RequestTimeout.into()),
            };
            if !self.may_again(&mut again, &service) {
                return Err(Declined::new(status, refusal));
            }
            self.pause(again).await;
        }
    }

    /// One attempt.
    async fn once(&mut self, endpoint: &Endpoint, attempt: &Attempt) -> Tried {
        let Some(body) = self.body.next() else {
            return Tried::Broke(Refusal::new(Reason::BackendReset, "its body was sent already"));
        };
        let request = again(&self.head, body);
        let asking = self.asker.asking(self.own, self.view);
        let sent = self.asker.node.inner.upstreams.send(asking, endpoint, request);
        let sent = match self.rule.timeouts.backend {
            None => Box::pin(sent).await,
            Some(limit) => match tokio::time::timeout(limit, Box::pin(sent)).await {
                Ok(sent) => sent,
                Err(_) => return Tried::Late,
            },
        };
        match sent {
            Ok((response, used)) => {
                attempt.connected();
                Tried::Answered(Box::new((response, used)))
            }
            Err(Unanswered::NotSent(request, refusal)) => {
                self.body.put_back(request.into_body());
                Tried::NotSent(refusal)
            }
            Err(Unanswered::Broke(refusal)) => Tried::Broke(refusal),
        }
    }

    /// Whether the rule wants another answer than one with this status.
    fn wants_other(&self, status: StatusCode) -> bool {
        self.rule.retry.as_ref().is_some_and(|retry| retry.codes.contains(&status.as_u16()))
    }

    /// Whether the request may be sent once more, which is counted.
    fn may_again(&self, again: &mut u32, service: &Name) -> bool {
        let most = match &self.rule.retry {
            Some(retry) => retry.attempts,
            None if may_be_made_twice(self.head.method()) => DEFAULT_RETRIES,
            None => 0,
        };
        if !self.body.is_kept() || *again >= most {
            return false;
        }
        let node = &self.asker.node.inner;
        if !node.budgets.with(service, Budget::take) {
            node.connector.metrics.limit_hit("retries");
            return false;
        }
        *again += 1;
        true
    }

    async fn pause(&self, attempt: u32) {
        let usual = mesh_core::model::http::Retry {
            codes: vec![],
            attempts: DEFAULT_RETRIES,
            backoff: DEFAULT_PAUSE,
        };
        let retry = self.rule.retry.as_ref().unwrap_or(&usual);
        tokio::time::sleep(choose::pause(retry, attempt, rand::random())).await;
    }

    /// Sends copies where the rule wants them, and throws their answers away. Only what is kept can be copied.
    pub(super) fn mirror<'m>(&mut self, mirrors: impl Iterator<Item = &'m Mirror>) {
        for mirror in mirrors.filter(|mirror| choose::is_mirrored(mirror, rand::random())) {
            let BackendTarget::Service { service, port } = &mirror.to else { continue };
            if !self.body.is_kept() {
                self.asker.node.inner.connector.metrics.limit_hit("mirrored_body");
                continue;
            }
            let Ok(mut backends) = Backends::new(self.view, self.asker, service, *port, None) else {
                continue;
            };
            let Some(body) = self.body.next() else { continue };
            let request = again(&self.head, body);
            let (asker, own) = (self.asker.clone(), self.own.clone());
            self.asker.node.drain().spawn(async move {
                let Ok(view) = asker.node.view() else { return };
                let Some((endpoint, _attempt)) = backends.pick(&asker) else { return };
                let asking = asker.asking(&own, &view);
                let sent = Box::pin(asker.node.inner.upstreams.send(asking, &endpoint, request));
                let read = async {
                    let Ok((response, used)) = sent.await else { return };
                    if http_body_util::BodyExt::collect(http_body_util::Limited::new(response, MOST_MIRRORED))
                        .await
                        .is_ok()
                    {
                        used.give_back();
                    }
                };
                // Late is not an error: nobody waits for it.
                let _ = tokio::time::timeout(MIRROR_TIME, read).await;
            });
        }
    }
}

/// Most of an answer to a copy that is read before its connection is given up.
const MOST_MIRRORED: usize = 1 << 20;
/// How long a copy may take.
const MIRROR_TIME: Duration = Duration::from_secs(30);

fn again(head: &Request<()>, body: Body) -> Request<Body> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method().clone();
    *request.uri_mut() = head.uri().clone();
    *request.version_mut() = head.version();
    *request.headers_mut() = head.headers().clone();
    *request.extensions_mut() = head.extensions().clone();
    request
}

/// Safe methods alone (RFC 9110, section 9.2.1): PUT and DELETE are idempotent by the book, and not in every server.
fn may_be_made_twice(method: &Method) -> bool {
    method.is_safe()
}
