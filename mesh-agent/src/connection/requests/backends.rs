//! The endpoints that one request may be sent to, and by what one of them is chosen.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderMap, StatusCode};
use mesh_core::{
    balance::How,
    model::{
        Endpoint, Name,
        traffic::{Algorithm, Balancing, HashBy, Traffic},
    },
    refusal::Reason,
    route,
    view::Snapshot,
};

use super::{Asker, Declined, heads};
use crate::{
    balance::{self, Attempt, Balancer},
    refusal::Refusal,
    underway::{Place, ToPort},
};

/// What is said where nobody says anything.
pub(super) const NOTHING: &Traffic = &Traffic {
    balancing: None,
    timeouts: None,
    retries: None,
    limits: None,
    ejection: None,
    faults: None,
    hedge: None,
    reads_requests: false,
};

/// The endpoints of a port of a service, as near to the client as the service wants.
#[derive(Debug)]
pub(super) struct Backends<'a> {
    service: &'a Name,
    to: Arc<ToPort>,
    traffic: &'a Traffic,
    all: Vec<Endpoint>,
    /// Places in `all`, in their order, so that turns go round.
    untried: Vec<usize>,
    /// The one of the request's session.
    session: Option<SocketAddr>,
    turn: u64,
    /// The value whose endpoint is the same each time.
    value: Option<Vec<u8>>,
}

impl<'a> Backends<'a> {
    /// Those for a request with these headers.
    pub(super) fn new(
        view: &'a Snapshot,
        asker: &Asker,
        (service, port): (&'a Name, u16),
        session: Option<SocketAddr>,
        headers: &HeaderMap,
    ) -> Result<Self, Declined> {
        let unready = |reason: Reason| Declined::new(StatusCode::SERVICE_UNAVAILABLE, reason);
        let source = view.workload(&asker.local.name).ok_or_else(|| unready(Reason::ViewMissing))?;
        let known = view.service(service).ok_or_else(|| unready(Reason::NoEndpoint))?;
        let all = route::endpoints(known, port, asker.original.is_ipv4(), source).map_err(unready)?;
        let traffic = known.port(port).map_or(NOTHING, |it| &it.traffic);
        let to = asker.node.inner.connector.underway.to(service, port);
        let (untried, turn) = ((0..all.len()).collect(), to.turn());
        let value = traffic.balancing.as_ref().and_then(|it| value(it, asker, headers));
        Ok(Self { service, to, traffic, all, untried, session, turn, value })
    }

    pub(super) fn service(&self) -> &Name {
        self.service
    }

    pub(super) fn to(&self) -> &Arc<ToPort> {
        &self.to
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Whether another endpoint may be asked though this one has said that it wants nothing for a while. Where nobody says that
    /// such a word is of one endpoint, it is of all.
    pub(super) fn has_one_awake(&self, balancer: &Balancer) -> bool {
        let of_one = self.traffic.ejection.as_ref().is_some_and(|it| it.retry_after.is_some());
        of_one && balancer.has_one_awake(&self.all)
    }

    /// Whether there is an endpoint that was not asked, and that the request may go to.
    pub(super) fn has_another(&self) -> bool {
        self.session.is_none() && !self.untried.is_empty()
    }

    /// A place among the requests to the service for a second attempt, without waiting; none is needed where no policy says
    /// how many there may be.
    pub(super) fn place_at_once(&self) -> Result<Option<Place>, Refusal> {
        match &self.traffic.limits {
            Some(limits) if limits.requests.is_some() => self.to.request_at_once(limits).map(Some),
            _ => Ok(None),
        }
    }

    /// A place among the requests to the service, where a policy says how many there may be.
    pub(super) async fn place(&self) -> Result<Option<Place>, Refusal> {
        match &self.traffic.limits {
            Some(limits) if limits.requests.is_some() => self.to.request(limits).await.map(Some),
            _ => Ok(None),
        }
    }

    /// One for an attempt; none is asked twice before all were.
    pub(super) fn pick(&mut self, balancer: &Arc<Balancer>) -> Option<(Endpoint, Attempt)> {
        if self.untried.is_empty() {
            self.untried.extend(0..self.all.len());
        }
        let how = How {
            balancing: self.traffic.balancing.as_ref(),
            ejection: self.traffic.ejection.as_ref(),
            turn: self.turn,
            value: self.value.as_deref(),
        };
        let of_session = |it: &Endpoint| Some(SocketAddr::new(it.address, it.port)) == self.session;
        let untried: Vec<_> = self.untried.iter().map(|at| &self.all[*at]).collect();
        let (at, attempt) = match untried.iter().position(|it| of_session(it)) {
            Some(at) => (at, balancer.pick(&untried[at..=at], &how)?.1),
            None => balancer.pick(&untried, &how)?,
        };
        Some((self.all[self.untried.remove(at)].clone(), attempt))
    }
}

/// The value whose endpoint is the same each time, if the request has one.
fn value(balancing: &Balancing, asker: &Asker, headers: &HeaderMap) -> Option<Vec<u8>> {
    let Algorithm::Hash(by) = &balancing.algorithm else { return None };
    match by {
        HashBy::Header(name) => headers.get(name).map(|value| value.as_bytes().to_vec()),
        HashBy::Cookie(name) => heads::cookie(headers, name).map(|value| value.as_bytes().to_vec()),
        HashBy::Source => Some(balance::value_of(asker.peer.ip()).to_vec()),
    }
}
