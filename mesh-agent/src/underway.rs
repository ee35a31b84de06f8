//! What is under way from this node to each port of a service, where a policy counts it: connections, requests and those
//! that wait to be sent, what is left of the budget for trying again, and whose turn it is.
//!
//! Stands apart from [`crate::balance`], which knows endpoints and not whose they are. What one limit counts is this node's
//! alone: agents do not tell each other.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_core::{
    balance::Budget,
    model::{
        Name,
        traffic::{Limits, RetryBudget},
    },
    refusal::Reason,
};
use tokio::sync::oneshot;

use crate::refusal::Refusal;

/// Ports of services that are remembered; at the limit those to which nothing is under way are forgotten.
const MAX_PORTS: usize = 4096;

/// All ports of services that this node's workloads ask.
#[derive(Debug)]
pub(crate) struct Underway {
    epoch: Instant,
    to: Mutex<HashMap<(Name, u16), Arc<ToPort>>>,
}

/// One port of a service.
#[derive(Debug, Default)]
pub(crate) struct ToPort {
    turn: AtomicU64,
    connections: AtomicU32,
    budget: Mutex<Budget>,
    hedges: Mutex<Budget>,
    requests: Mutex<Requests>,
}

#[derive(Debug, Default)]
struct Requests {
    sent: u32,
    /// In the order in which they came.
    waiting: VecDeque<oneshot::Sender<Place>>,
}

impl Default for Underway {
    fn default() -> Self {
        Self { epoch: Instant::now(), to: Mutex::default() }
    }
}

impl Underway {
    pub(crate) fn to(&self, service: &Name, port: u16) -> Arc<ToPort> {
        let mut to = lock(&self.to);
        if to.len() >= MAX_PORTS {
            to.retain(|_, it| Arc::strong_count(it) > 1);
        }
        to.entry((service.clone(), port)).or_default().clone()
    }

    /// A request is asked for: so many may be tried again, and hedged.
    pub(crate) fn asked(&self, to: &ToPort, again: &RetryBudget, hedges: Option<&RetryBudget>) {
        lock(&to.budget).asked(again, self.now());
        if let Some(budget) = hedges {
            lock(&to.hedges).asked(budget, self.now());
        }
    }

    /// Whether a request may be sent to a second endpoint, which is counted.
    pub(crate) fn may_hedge(&self, to: &ToPort, budget: &RetryBudget) -> bool {
        lock(&to.hedges).take(budget, self.now())
    }

    /// Whether a request may be tried again, which is counted.
    pub(crate) fn may_again(&self, to: &ToPort, budget: &RetryBudget) -> bool {
        lock(&to.budget).take(budget, self.now())
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }
}

impl ToPort {
    /// How many times it was asked before.
    pub(crate) fn turn(&self) -> u64 {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes one of so many connections, for as long as the result lives.
    pub(crate) fn connection(self: &Arc<Self>, most: u32) -> Result<Connection, Refusal> {
        let taken = Connection(self.clone());
        if self.connections.fetch_add(1, Ordering::Relaxed) >= most {
            return Err(Refusal::new(Reason::LimitServiceConnections, format!("its policy says {most}")));
        }
        Ok(taken)
    }

    /// Takes a place for a request, for as long as the result lives; waits for one if it may. Cancel-safe: who does not wait
    /// any longer takes none.
    pub(crate) async fn request(self: &Arc<Self>, limits: &Limits) -> Result<Place, Refusal> {
        let place = {
            let mut requests = lock(&self.requests);
            let most = limits.requests.unwrap_or(u32::MAX);
            if requests.sent < most {
                requests.sent += 1;
                return Ok(Place(self.clone()));
            }
            requests.waiting.retain(|waiter| !waiter.is_closed());
            if requests.waiting.len() >= limits.pending as usize {
                let says = format!("its policy says {most}, and {} that wait", limits.pending);
                return Err(Refusal::new(Reason::LimitRequests, says));
            }
            let (waiter, place) = oneshot::channel();
            requests.waiting.push_back(waiter);
            place
        };
        // The sender is dropped unused by nobody: the port lives as long as its places.
        place.await.map_err(|_| Reason::LimitRequests.into())
    }

    /// The same without waiting: who waits comes first.
    pub(crate) fn request_at_once(self: &Arc<Self>, limits: &Limits) -> Result<Place, Refusal> {
        let mut requests = lock(&self.requests);
        let most = limits.requests.unwrap_or(u32::MAX);
        if requests.sent >= most {
            return Err(Refusal::new(Reason::LimitRequests, format!("its policy says {most}")));
        }
        requests.sent += 1;
        Ok(Place(self.clone()))
    }

    /// A place is free: it is the next one's who waits.
    fn leave(self: &Arc<Self>) {
        let next = {
            let mut requests = lock(&self.requests);
            let next = loop {
                match requests.waiting.pop_front() {
                    Some(waiter) if waiter.is_closed() => {}
                    next => break next,
                }
            };
            if next.is_none() {
                requests.sent -= 1;
            }
            next
        };
        if let Some(waiter) = next {
            // Should it have gone at this moment, its place is dropped, and so left again.
            drop(waiter.send(Place(self.clone())));
        }
    }
}

/// One of the connections to a port of a service.
#[derive(Debug)]
pub(crate) struct Connection(Arc<ToPort>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place among the requests that are at a port of a service.
#[derive(Debug)]
pub(crate) struct Place(Arc<ToPort>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.leave();
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn to() -> Arc<ToPort> {
        Underway::default().to(&Name::new("shop", "web"), 80)
    }

    #[tokio::test]
    async fn so_many_are_sent_so_many_wait_in_turn_and_others_are_refused() {
        let (to, limits) = (to(), Limits { connections: None, requests: Some(1), pending: 2 });
        let first = to.request(&limits).await.unwrap();
        let mut second = Box::pin(to.request(&limits));
        let mut third = Box::pin(to.request(&limits));
        assert!(second.as_mut().now_or_never().is_none());
        assert!(third.as_mut().now_or_never().is_none());
        let refused = to.request(&limits).now_or_never().expect("an answer at once");
        assert_eq!(refused.unwrap_err().reason, Reason::LimitRequests);
        assert_eq!(to.request_at_once(&limits).unwrap_err().reason, Reason::LimitRequests);
        drop(first);
        let second = second.now_or_never().expect("a place").unwrap();
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        assert!(third.now_or_never().is_some());
    }

    #[tokio::test]
    async fn who_does_not_wait_any_longer_takes_no_place() {
        let (to, limits) = (to(), Limits { connections: None, requests: Some(1), pending: 1 });
        let first = to.request(&limits).await.unwrap();
        let mut gone = Box::pin(to.request(&limits));
        assert!(gone.as_mut().now_or_never().is_none());
        drop(gone);
        let mut waits = Box::pin(to.request(&limits));
        assert!(waits.as_mut().now_or_never().is_none(), "the one that has gone is in nobody's way");
        drop(first);
        // A place is its own, and it goes before it takes it.
        drop(waits);
        assert!(to.request(&limits).now_or_never().is_some_and(|place| place.is_ok()));
    }

    #[test]
    fn connections_are_counted_for_as_long_as_they_live() {
        let to = to();
        let first = to.connection(1).unwrap();
        assert_eq!(to.connection(1).unwrap_err().reason, Reason::LimitServiceConnections);
        drop(first);
        assert!(to.connection(1).is_ok());
    }
}
