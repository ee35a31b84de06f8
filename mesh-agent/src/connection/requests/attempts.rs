//! To which endpoint a request is sent, and when it is tried again.
//!
//! A request that a backend certainly did not take is sent to another endpoint, whatever it is. One that a backend may
//! have taken is sent again only if somebody says so, or if it is a safe one (RFC 9110, section 9.2.1), and
//! only as long as such attempts are few beside all requests to the service ([`mesh_core::balance::Budget`]): when
//! everything fails, trying again makes it worse.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use http::{Response, StatusCode};
use mesh_core::{
    http::{
        choose,
        later::{self, Later},
    },
    model::http::{BackendTarget, Mirror},
    refusal::Reason,
};
use tokio::time::Instant;

use super::{
    Declined,
    attempt::{Sending, Tried, Try, Untaken, again, late, left, within},
    backends::Backends,
    body::{Asking, Coming},
    exchange::Exchange,
    upstream::{Counted, Used},
};

/// A request that is being sent.
pub(super) struct Attempts<'a> {
    pub(super) sending: Sending<'a>,
    /// How long it was held up on purpose, which counts as a part of its time.
    pub(super) delayed: Duration,
    pub(super) backends: Backends<'a>,
    pub(super) body: Asking,
    /// Whether it was sent to a second endpoint.
    pub(super) hedged: bool,
}

impl Attempts<'_> {
    /// Sends it until there is an answer to keep, within its times.
    pub(super) async fn run(
        &mut self,
        exchange: &mut Exchange,
    ) -> Result<(Response<Coming>, Used, SocketAddr), Declined> {
        let Sending { asker, terms, .. } = self.sending;
        let limit = terms.timeouts.request.map(|limit| limit.saturating_sub(self.delayed));
        let deadline = limit.map(|limit| Instant::now() + limit);
        let connector = &asker.node.inner.connector;
        let to = self.backends.to().clone();
        connector.underway.asked(&to, &terms.retries.budget, terms.hedge.map(|it| &it.budget));
        let mut place = within(deadline, self.backends.place()).await?.map_err(|refusal| {
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
            let first = Try { number: exchange.tried(&endpoint), endpoint, attempt };
            let (Try { endpoint, attempt, .. }, tried) =
                self.ask(first, &mut place, deadline, exchange).await;
            let (status, refusal) = match tried {
                Tried::Answered(answered) => {
                    let (response, used) = *answered;
                    let to = SocketAddr::new(endpoint.address, endpoint.port);
                    let pause = match self.sending.wants_other(&response) {
                        true => self.may_again(&mut again, self.later(&response), deadline),
                        false => None,
                    };
                    let Some(pause) = pause else {
                        let (service, metrics) = (self.backends.service().clone(), connector.metrics.clone());
                        let counted = Counted { attempt, _place: place, service, metrics };
                        return Ok((response, used.counting(counted), to));
                    };
                    // Nobody reads it: its connection is not kept for as long as this waits.
                    drop((response, used, attempt));
                    within(deadline, tokio::time::sleep(pause)).await?;
                    continue;
                }
                Tried::Untaken(Untaken { refusal, tries, body }) => {
                    unsent += 1;
                    self.body.put_back(body);
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

    /// When an answer's server wants to be asked again, or its service, if no other endpoint is there for it.
    fn later(&self, response: &Response<Coming>) -> Option<Later> {
        let said = later::of(response.headers(), SystemTime::now())?;
        let elsewhere = || self.backends.has_one_awake(&self.sending.asker.node.inner.connector.balancer);
        let of_endpoint = matches!(said, Later::NotBefore(_)) && later::is_too_much(response.status());
        (!of_endpoint || !elsewhere()).then_some(said)
    }

    /// After which pause the request may be sent once more, which is counted, if it may.
    fn may_again(&self, again: &mut u32, said: Option<Later>, deadline: Option<Instant>) -> Option<Duration> {
        let retries = &self.sending.terms.retries;
        if !self.sending.may_be_made_twice() || !self.body.is_kept() || *again >= retries.attempts {
            return None;
        }
        let connector = &self.sending.asker.node.inner.connector;
        let pause = choose::pause(retries.backoff, *again + 1, rand::random());
        let Some(pause) = choose::pause_for(pause, said, left(deadline)) else {
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
        let Sending { asker, view, own, head, .. } = self.sending;
        for mirror in mirrors.filter(|mirror| choose::is_mirrored(mirror, rand::random())) {
            let BackendTarget::Service { service, port } = &mirror.to else { continue };
            if !self.body.is_kept() {
                self.sending.asker.node.inner.connector.metrics.limit_hit("mirrored_body");
                continue;
            }
            let to = Backends::new(view, asker, (service, *port), None, head.headers());
            let balancer = &self.sending.asker.node.inner.connector.balancer;
            let Some((endpoint, attempt)) = to.ok().and_then(|mut to| to.pick(balancer)) else { continue };
            let Some(body) = self.body.next() else { continue };
            let request = again(head, body);
            let (asker, own) = (asker.clone(), own.clone());
            self.sending.asker.node.drain().spawn(async move {
                let Ok(view) = asker.node.view() else { return };
                let _attempt = attempt;
                let asking = asker.asking(&own, &view);
                let sent = Box::pin(asker.node.inner.upstreams.send(asking, &endpoint, request));
                let read = async {
                    let Ok((response, used)) = sent.await else { return };
                    let used = used.stand_alone();
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

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now())
}
