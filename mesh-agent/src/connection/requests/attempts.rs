//! To which endpoint a request is sent, and when it is tried again.
//!
//! A request that a backend certainly did not take is sent to another endpoint, whatever it is. One that a backend may
//! have taken is sent again only if somebody says so, or if it is a safe one (RFC 9110, section 9.2.1), and
//! only as long as such attempts are few beside all requests to the service ([`mesh_core::balance::Budget`]): when
//! everything fails, trying again makes it worse.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use mesh_core::{
    http::{
        choose::{self, Terms},
        later::{self, Later},
    },
    identity::SpiffeId,
    model::{
        Endpoint,
        http::{BackendTarget, Mirror},
    },
    refusal::Reason,
    view::Snapshot,
};
use tokio::time::Instant;

use super::{
    Asker, Declined,
    backends::Backends,
    body::{Asking, Body, grpc_status},
    exchange::Exchange,
    heads,
    upstream::{Counted, Unanswered, Used},
};
use crate::{balance::Attempt, refusal::Refusal};

/// A request that is being sent.
pub(super) struct Attempts<'a> {
    pub(super) asker: &'a Arc<Asker>,
    pub(super) view: &'a Snapshot,
    pub(super) own: &'a Arc<SpiffeId>,
    pub(super) terms: &'a Terms<'a>,
    /// How long it was held up on purpose, which counts as a part of its time.
    pub(super) delayed: Duration,
    pub(super) backends: Backends<'a>,
    pub(super) head: Request<()>,
    pub(super) body: Asking,
}

/// How one attempt ended.
enum Tried {
    Answered(Box<(Response<Incoming>, Used)>),
    /// Certainly not by its endpoint: in so many tries at most it is worth another one.
    Untaken(Refusal, usize),
    Broke(Refusal),
    Late,
}

impl Tried {
    /// The status of its answer, or why there is none.
    fn told(&self) -> Result<u16, Reason> {
        match self {
            Self::Answered(answered) => Ok(answered.0.status().as_u16()),
            Self::Untaken(refusal, _) | Self::Broke(refusal) => Err(refusal.reason),
            Self::Late => Err(Reason::RequestTimeout),
        }
    }
}

impl Attempts<'_> {
    /// Sends it until there is an answer to keep, within its times.
    pub(super) async fn run(
        &mut self,
        exchange: &mut Exchange,
    ) -> Result<(Response<Incoming>, Used, SocketAddr), Declined> {
        let limit = self.terms.timeouts.request.map(|limit| limit.saturating_sub(self.delayed));
        let deadline = limit.map(|limit| Instant::now() + limit);
        let connector = &self.asker.node.inner.connector;
        let to = self.backends.to().clone();
        connector.underway.asked(&to, &self.terms.retries.budget);
        let place = within(deadline, self.backends.place()).await?.map_err(|refusal| {
            connector.metrics.limit_hit("requests");
            Declined::new(StatusCode::SERVICE_UNAVAILABLE, refusal)
        })?;
        let (mut unsent, mut again) = (0, 0);
        loop {
            if is_over(deadline) {
                return Err(late());
            }
            let Some((endpoint, attempt)) = self.backends.pick(&connector.balancer) else {
                return Err(Declined::new(StatusCode::SERVICE_UNAVAILABLE, Reason::NoEndpoint));
            };
            exchange.tried(&endpoint);
            let tried = self.once(&endpoint, &attempt, deadline).await;
            exchange.attempt_ended(&endpoint, tried.told());
            let (status, refusal) = match tried {
                Tried::Answered(answered) => {
                    let (response, used) = *answered;
                    let to = SocketAddr::new(endpoint.address, endpoint.port);
                    let pause = match self.wants_other(&response) {
                        true => self.may_again(&mut again, self.later(&response), deadline),
                        false => None,
                    };
                    let Some(pause) = pause else {
                        let (service, metrics) = (self.backends.service().clone(), connector.metrics.clone());
                        let counted = Counted { attempt, _place: place, service, metrics };
                        return Ok((response, used.counting(counted), to));
                    };
                    within(deadline, tokio::time::sleep(pause)).await?;
                    continue;
                }
                Tried::Untaken(refusal, tries) => {
                    unsent += 1;
                    if unsent < connector.limits.endpoint_attempts.min(tries) && self.body.is_left() {
                        continue;
                    }
                    (StatusCode::SERVICE_UNAVAILABLE, refusal)
                }
                Tried::Broke(refusal) => (StatusCode::SERVICE_UNAVAILABLE, refusal),
                Tried::Late if is_over(deadline) => return Err(late()),
                Tried::Late => (StatusCode::GATEWAY_TIMEOUT, Reason::RequestTimeout.into()),
            };
            let Some(pause) = self.may_again(&mut again, None, deadline) else {
                return Err(Declined::new(status, refusal));
            };
            within(deadline, tokio::time::sleep(pause)).await?;
        }
    }

    /// One attempt, and what its end says of its endpoint.
    async fn once(&mut self, endpoint: &Endpoint, attempt: &Attempt, deadline: Option<Instant>) -> Tried {
        let Some(body) = self.body.next() else {
            return Tried::Broke(Refusal::new(Reason::BackendReset, "its body was sent already"));
        };
        let request = again(&self.head, body);
        let asking = self.asker.asking(self.own, self.view);
        let sent = self.asker.node.inner.upstreams.send(asking, endpoint, request);
        let own = self.terms.timeouts.backend.map(|limit| Instant::now() + limit);
        let Ok(sent) = within(own.into_iter().chain(deadline).min(), Box::pin(sent)).await else {
            self.ended(attempt, true);
            return Tried::Late;
        };
        match sent {
            Ok((response, used)) => {
                attempt.connected();
                // Of a call the end is said at its end, unless that is here.
                let status = grpc_status(response.headers());
                if status.is_some() || !heads::is_grpc(response.headers()) {
                    self.ended(attempt, has_failed(response.status(), status));
                }
                self.rests(attempt, &response);
                Tried::Answered(Box::new((response, used)))
            }
            Err(Unanswered::NotSent(request, refusal)) => {
                attempt.failed();
                self.body.put_back(request.into_body());
                Tried::Untaken(refusal, self.backends.count())
            }
            // By a server that goes away, or has no room: no failure of its own. Its connection takes no more, another may.
            Err(Unanswered::Declined(refusal)) => Tried::Untaken(refusal, usize::MAX),
            Err(Unanswered::Broke(refusal)) => {
                attempt.failed();
                self.ended(attempt, true);
                Tried::Broke(refusal)
            }
        }
    }

    /// What an endpoint took has ended.
    fn ended(&self, attempt: &Attempt, failed: bool) {
        if let Some(cause) = attempt.answered(failed) {
            self.asker.node.inner.connector.metrics.ejected(self.backends.service(), cause);
        }
    }

    /// An endpoint has answered: perhaps that it wants nothing for a while.
    fn rests(&self, attempt: &Attempt, response: &Response<Incoming>) {
        if later::is_too_much(response.status())
            && let Some(long) = later::retry_after(response.headers(), SystemTime::now())
            && let Some(cause) = attempt.rests(long)
        {
            self.asker.node.inner.connector.metrics.ejected(self.backends.service(), cause);
        }
    }

    /// When an answer's server wants to be asked again, or its service, if no other endpoint is there for it.
    fn later(&self, response: &Response<Incoming>) -> Option<Later> {
        let said = later::of(response.headers(), SystemTime::now())?;
        let elsewhere = || self.backends.has_one_awake(&self.asker.node.inner.connector.balancer);
        let of_endpoint = matches!(said, Later::NotBefore(_)) && later::is_too_much(response.status());
        (!of_endpoint || !elsewhere()).then_some(said)
    }

    /// Whether another answer than this one is wanted.
    fn wants_other(&self, response: &Response<Incoming>) -> bool {
        let retries = &self.terms.retries;
        let said = grpc_status(response.headers());
        retries.codes.contains(&response.status().as_u16())
            || said.is_some_and(|status| retries.grpc_codes.contains(&status))
    }

    /// After which pause the request may be sent once more, which is counted, if it may.
    fn may_again(&self, again: &mut u32, said: Option<Later>, deadline: Option<Instant>) -> Option<Duration> {
        let retries = &self.terms.retries;
        // PUT and DELETE are idempotent by the book, and not in every server.
        let may = retries.every_method || self.head.method().is_safe();
        if !may || !self.body.is_kept() || *again >= retries.attempts {
            return None;
        }
        let connector = &self.asker.node.inner.connector;
        let pause = choose::pause(retries.backoff, *again + 1, rand::random());
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let Some(pause) = choose::pause_for(pause, said, left) else {
            connector.metrics.limit_hit("retry_pause");
            return None;
        };
        if !connector.underway.may_again(self.backends.to(), &retries.budget) {
            connector.metrics.limit_hit("retries");
            return None;
        }
        connector.metrics.tried_again(self.backends.service());
        *again += 1;
        Some(pause)
    }

    /// Sends copies where the rule wants them, and throws their answers away. Only what is kept can be copied.
    pub(super) fn mirror<'m>(&mut self, mirrors: impl Iterator<Item = &'m Mirror>) {
        for mirror in mirrors.filter(|mirror| choose::is_mirrored(mirror, rand::random())) {
            let BackendTarget::Service { service, port } = &mirror.to else { continue };
            if !self.body.is_kept() {
                self.asker.node.inner.connector.metrics.limit_hit("mirrored_body");
                continue;
            }
            let to = Backends::new(self.view, self.asker, (service, *port), None, self.head.headers());
            let balancer = &self.asker.node.inner.connector.balancer;
            let Some((endpoint, attempt)) = to.ok().and_then(|mut to| to.pick(balancer)) else { continue };
            let Some(body) = self.body.next() else { continue };
            let request = again(&self.head, body);
            let (asker, own) = (self.asker.clone(), self.own.clone());
            self.asker.node.drain().spawn(async move {
                let Ok(view) = asker.node.view() else { return };
                let _attempt = attempt;
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

fn late() -> Declined {
    Declined::new(StatusCode::GATEWAY_TIMEOUT, Reason::RequestTimeout)
}

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now())
}

/// What comes of it until then, if there is an end to it.
async fn within<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Result<T, Declined> {
    match deadline {
        None => Ok(work.await),
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.map_err(|_| late()),
    }
}

fn again(head: &Request<()>, body: Body) -> Request<Body> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method().clone();
    *request.uri_mut() = head.uri().clone();
    *request.version_mut() = head.version();
    *request.headers_mut() = head.headers().clone();
    *request.extensions_mut() = head.extensions().clone();
    request
}

/// Whether an answer means that its endpoint fails: what of the statuses of gRPC is as the 500s of HTTP (UNKNOWN, INTERNAL,
/// UNAVAILABLE, DATA_LOSS).
pub(super) fn has_failed(status: StatusCode, grpc_status: Option<u16>) -> bool {
    status.is_server_error() || matches!(grpc_status, Some(2 | 13 | 14 | 15))
}
