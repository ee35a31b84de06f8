//! One attempt at one endpoint: how it ends, and what its end says of the endpoint.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{Request, Response, StatusCode};
use mesh_core::{
    http::{choose::Terms, later},
    identity::SpiffeId,
    model::{Endpoint, Name},
    refusal::Reason,
    view::Snapshot,
};
use tokio::time::Instant;

use super::{
    Asker, Declined,
    body::{Body, Coming, grpc_status},
    heads,
    upstream::{Unanswered, Used, broke},
};
use crate::{balance::Attempt, refusal::Refusal};

/// What is the same for all attempts at the endpoints of one service.
#[derive(Clone, Copy)]
pub(super) struct Sending<'a> {
    pub(super) asker: &'a Arc<Asker>,
    pub(super) view: &'a Snapshot,
    pub(super) own: &'a Arc<SpiffeId>,
    pub(super) terms: &'a Terms<'a>,
    pub(super) service: &'a Name,
    pub(super) head: &'a Request<()>,
    /// How many endpoints there are.
    pub(super) count: usize,
}

/// One endpoint that is asked.
pub(super) struct Try {
    /// Which of the request's attempts it is, from 1.
    pub(super) number: u32,
    pub(super) endpoint: Endpoint,
    pub(super) attempt: Attempt,
}

/// How one attempt ended.
pub(super) enum Tried {
    Answered(Box<(Response<Coming>, Used)>),
    /// Certainly not by its endpoint.
    Untaken(Untaken),
    Broke(Refusal),
    Late,
}

/// Why an endpoint took nothing.
pub(super) struct Untaken {
    pub(super) refusal: Refusal,
    /// In so many tries at most it is worth another one.
    pub(super) tries: usize,
    /// What was to be sent, if that is still there.
    pub(super) body: Option<Body>,
}

impl Tried {
    /// Nothing is left to be sent.
    pub(super) fn sent_before() -> Self {
        Self::Broke(Refusal::new(Reason::BackendReset, "its body was sent already"))
    }

    /// The status of its answer, or why there is none.
    pub(super) fn told(&self) -> Result<u16, &'static str> {
        match self {
            Self::Answered(answered) => Ok(answered.0.status().as_u16()),
            Self::Untaken(Untaken { refusal, .. }) | Self::Broke(refusal) => Err(refusal.reason.label()),
            Self::Late => Err(Reason::RequestTimeout.label()),
        }
    }
}

impl Sending<'_> {
    pub(super) async fn once(self, to: &Try, body: Body, deadline: Option<Instant>) -> Tried {
        let Try { endpoint, attempt, .. } = to;
        let may_again = body.is_whole() && self.may_be_made_twice();
        let request = again(self.head, body);
        let asking = self.asker.asking(self.own, self.view);
        let sent = self.asker.node.inner.upstreams.send(asking, endpoint, request);
        let own = self.terms.timeouts.backend.map(|limit| Instant::now() + limit);
        let Ok(sent) = within(own.into_iter().chain(deadline).min(), Box::pin(sent)).await else {
            self.ended(attempt, true);
            return Tried::Late;
        };
        let answered = match sent {
            Ok(answered) if may_again => self.whole_if_short(answered, endpoint).await,
            other => other,
        };
        match answered {
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
                let body = Some(request.into_body());
                Tried::Untaken(Untaken { refusal, tries: self.count, body })
            }
            // By a server that goes away, or has no room: no failure of its own. Its connection takes no more, another may.
            Err(Unanswered::Declined(refusal)) => {
                Tried::Untaken(Untaken { refusal, tries: usize::MAX, body: None })
            }
            Err(Unanswered::Broke(refusal)) => {
                attempt.failed();
                self.ended(attempt, true);
                Tried::Broke(refusal)
            }
        }
    }

    /// Waits for the rest of an answer that is short and comes soon: what breaks off before any of it has been passed on can be asked
    /// for once more.
    async fn whole_if_short(
        self,
        (mut response, mut used): (Response<Coming>, Used),
        endpoint: &Endpoint,
    ) -> Result<(Response<Coming>, Used), Unanswered> {
        let soon = self.asker.node.limits().short_answer;
        let coming = response.body_mut();
        if coming.is_short()
            && let Ok(Err(error)) = tokio::time::timeout(soon, coming.gather(&mut used)).await
        {
            let from = SocketAddr::new(endpoint.address, endpoint.port);
            return Err(Unanswered::Broke(broke(from, &error)));
        }
        Ok((response, used))
    }

    /// Whether it may be sent again although somebody may have done what it asks.
    pub(super) fn may_be_made_twice(self) -> bool {
        // PUT and DELETE are idempotent by the book, and not in every server.
        self.terms.retries.every_method || self.head.method().is_safe()
    }

    /// Whether this is an answer, and no other is wanted.
    pub(super) fn keeps(self, tried: &Tried) -> bool {
        matches!(tried, Tried::Answered(answered) if !self.wants_other(&answered.0))
    }

    /// Whether another answer than this one is wanted.
    pub(super) fn wants_other(self, response: &Response<Coming>) -> bool {
        let retries = &self.terms.retries;
        let said = grpc_status(response.headers());
        retries.codes.contains(&response.status().as_u16())
            || said.is_some_and(|status| retries.grpc_codes.contains(&status))
    }

    /// What an endpoint took has ended.
    fn ended(self, attempt: &Attempt, failed: bool) {
        if let Some(cause) = attempt.answered(failed) {
            self.asker.node.inner.connector.metrics.ejected(self.service, cause);
        }
    }

    /// An endpoint has answered: perhaps that it wants nothing for a while.
    fn rests(self, attempt: &Attempt, response: &Response<Coming>) {
        if later::is_too_much(response.status())
            && let Some(long) = later::retry_after(response.headers(), SystemTime::now())
            && let Some(cause) = attempt.rests(long)
        {
            self.asker.node.inner.connector.metrics.ejected(self.service, cause);
        }
    }
}

pub(super) fn late() -> Declined {
    Declined::new(StatusCode::GATEWAY_TIMEOUT, Reason::RequestTimeout)
}

/// What comes of it until then, if there is an end to it.
pub(super) async fn within<T>(
    deadline: Option<Instant>,
    work: impl Future<Output = T>,
) -> Result<T, Declined> {
    match deadline {
        None => Ok(work.await),
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.map_err(|_| late()),
    }
}

/// How much time is left.
pub(super) fn left(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

pub(super) fn again(head: &Request<()>, body: Body) -> Request<Body> {
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
