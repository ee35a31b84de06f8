//! Hedging: where a policy wants it, a request that its endpoint has not answered for a while is sent to a second one, too. The
//! first answer to keep wins, and the other attempt is given up at once: its stream is reset, or its connection closed.
//!
//! Only what does no harm when it is made twice, and only with a body that is kept. A failure wins nothing as long as the other
//! endpoint may answer still.

use std::{
    pin::{Pin, pin},
    time::Duration,
};

use http::header;
use mesh_core::http::choose;
use tokio::time::Instant;

use super::{
    attempt::{Sending, Tried, Try},
    attempts::Attempts,
    exchange::Exchange,
    heads,
};
use crate::{metrics::HedgeOutcome, underway::Place};

/// What a span says of an attempt that was given up, as the other one had won.
const GIVEN_UP: &str = "hedged";

/// A second endpoint, and its place among the requests to the service, where a policy says how many there may be.
struct Second {
    to: Try,
    place: Option<Place>,
}

/// Which of two attempts was the last to say something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    First,
    Second,
}

/// How two attempts at once ended.
struct Raced {
    by: By,
    tried: Tried,
    /// How the other one did, if it was not given up.
    other: Option<Result<u16, &'static str>>,
}

impl Attempts<'_> {
    /// Asks one endpoint, and perhaps a second one: whose answer it is, or who was the last to fail, and how.
    pub(super) async fn ask(
        &mut self,
        first: Try,
        place: &mut Option<Place>,
        deadline: Option<Instant>,
        exchange: &mut Exchange,
    ) -> (Try, Tried) {
        let sending = self.sending;
        let Some(body) = self.body.next() else { return (first, Tried::sent_before()) };
        let Some(after) = self.hedged_after() else {
            let tried = sending.once(&first, body, deadline).await;
            exchange.attempt_ended(&first, tried.told());
            return (first, tried);
        };
        let mut second = None;
        let raced = {
            let mut one = Box::pin(sending.once(&first, body, deadline));
            match tokio::time::timeout(after, one.as_mut()).await {
                Ok(tried) => Raced { by: By::First, tried, other: None },
                Err(_) => {
                    second = self.second(exchange);
                    match (&second, self.body.next()) {
                        (Some(Second { to, .. }), Some(body)) => {
                            let two = pin!(Box::pin(sending.once(to, body, deadline)));
                            race(sending, one.as_mut(), two).await
                        }
                        _ => Raced { by: By::First, tried: one.await, other: None },
                    }
                }
            }
        };
        let Raced { by, tried, other } = raced;
        let Some(Second { to: second, place: its_place }) = second else {
            exchange.attempt_ended(&first, tried.told());
            return (first, tried);
        };
        let outcome = match by {
            _ if !sending.keeps(&tried) => HedgeOutcome::Failed,
            By::First => HedgeOutcome::Lost,
            By::Second => HedgeOutcome::Won,
        };
        sending.asker.node.inner.connector.metrics.hedged(sending.service, outcome);
        let (last, given_up) = match by {
            By::First => (first, second),
            By::Second => (second, first),
        };
        if by == By::Second && its_place.is_some() {
            *place = its_place;
        }
        if other.is_none() {
            given_up.attempt.outlasted();
        }
        exchange.attempt_ended(&given_up, other.unwrap_or(Err(GIVEN_UP)));
        exchange.attempt_ended(&last, tried.told());
        exchange.came_from(&last.endpoint);
        (last, tried)
    }

    /// After how long without an answer the request is sent to a second endpoint, if it may be.
    fn hedged_after(&self) -> Option<Duration> {
        let Sending { terms, head, .. } = self.sending;
        let hedge = terms.hedge.filter(|_| !self.hedged && self.body.is_kept())?;
        // What goes on in another protocol is none of two.
        let upgrades = head.headers().contains_key(header::UPGRADE);
        let is_call = heads::is_grpc(head.headers());
        let may = !upgrades && choose::is_hedged(hedge, head.method(), head.uri().path(), is_call);
        may.then_some(hedge.after)
    }

    /// A second endpoint, once for a request, if there is one for which there are room and budget.
    fn second(&mut self, exchange: &mut Exchange) -> Option<Second> {
        let connector = &self.sending.asker.node.inner.connector;
        let hedge = self.sending.terms.hedge.filter(|_| self.backends.has_another())?;
        let place = self.backends.place_at_once();
        let may = place.is_ok() && connector.underway.may_hedge(self.backends.to(), &hedge.budget);
        let (Ok(place), true) = (place, may) else {
            connector.metrics.limit_hit("hedges");
            return None;
        };
        let (endpoint, attempt) = self.backends.pick(&connector.balancer)?;
        self.hedged = true;
        Some(Second { to: Try { number: exchange.tried(&endpoint), endpoint, attempt }, place })
    }
}

/// Until one of two attempts has an answer to keep, or both have none. Whoever is not returned is given up by its drop.
async fn race(
    sending: Sending<'_>,
    mut one: Pin<&mut impl Future<Output = Tried>>,
    mut two: Pin<&mut impl Future<Output = Tried>>,
) -> Raced {
    // Cancel-safe: the one that is not ready is only borrowed.
    let (by, tried) = tokio::select! {
        biased;
        tried = one.as_mut() => (By::First, tried),
        tried = two.as_mut() => (By::Second, tried),
    };
    if sending.keeps(&tried) {
        return Raced { by, tried, other: None };
    }
    let other = Some(tried.told());
    // Its connection, and what it has answered, are nobody's from here on.
    drop(tried);
    match by {
        By::First => Raced { by: By::Second, tried: two.await, other },
        By::Second => Raced { by: By::First, tried: one.await, other },
    }
}
