//! How requests and connections to services are sent, as data: what TrafficPolicies say, after the controller has looked up
//! what they are for and which of them counts. Each part that is left out is as without a policy.
//!
//! Every value of these types means something. What they mean for one request is told in [`crate::balance`],
//! [`crate::http::choose`] and [`crate::http::fault`].

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::http::{TextMatch, Timeouts};

/// What is said of a port of a service, or of a rule of a route.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// Which endpoint is chosen.
    pub balancing: Option<Balancing>,
    /// How long a request may take.
    pub timeouts: Option<Timeouts>,
    /// When it is tried again.
    pub retries: Option<Retries>,
    /// How much may be under way at once.
    pub limits: Option<Limits>,
    /// Which endpoints are left alone for a while.
    pub ejection: Option<Ejection>,
    /// What goes wrong on purpose; each fault happens for itself, in this order.
    pub faults: Option<Vec<Fault>>,
    /// When it is sent to a second endpoint, too.
    pub hedge: Option<Hedge>,
    /// Whoever says something of the service itself, and not of all of a namespace, speaks of requests: they are read, on
    /// ports without routes, too.
    pub reads_requests: bool,
}

impl Traffic {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What is said here, and where nothing is, what another one says.
    pub fn or(&self, other: &Self) -> Self {
        Self {
            balancing: self.balancing.clone().or_else(|| other.balancing.clone()),
            timeouts: self.timeouts.or(other.timeouts),
            retries: self.retries.clone().or_else(|| other.retries.clone()),
            limits: self.limits.or(other.limits),
            ejection: self.ejection.or(other.ejection),
            faults: self.faults.clone().or_else(|| other.faults.clone()),
            hedge: self.hedge.clone().or_else(|| other.hedge.clone()),
            reads_requests: self.reads_requests || other.reads_requests,
        }
    }

    /// Whether something is said that means nothing without requests that are read.
    pub fn is_of_requests(&self) -> bool {
        self.parts_of_requests().next().is_some()
    }

    /// What of it is of connections of which nothing is read.
    pub fn of_connections(&self) -> Self {
        let limits = self.limits.filter(|it| it.connections.is_some());
        Self {
            balancing: self.balancing.clone().filter(|it| !it.algorithm.is_of_requests()),
            limits: limits.map(|it| Limits { connections: it.connections, ..Limits::default() }),
            ..Self::default()
        }
    }

    /// The parts that mean nothing without requests that are read, as policies call them: of each the field of the spec, and
    /// what in it is of requests.
    pub fn parts_of_requests(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let by_request = self.balancing.as_ref().is_some_and(|it| it.algorithm.is_of_requests());
        let limited = self.limits.is_some_and(|it| it.requests.is_some());
        [
            ("balancing", "balancing.hashBy", by_request),
            ("timeouts", "timeouts", self.timeouts.is_some()),
            ("retries", "retries", self.retries.is_some()),
            ("limits", "limits.requests", limited),
            ("ejection", "ejection", self.ejection.is_some()),
            ("faults", "faults", self.faults.is_some()),
            ("hedge", "hedge", self.hedge.is_some()),
        ]
        .into_iter()
        .filter_map(|(field, part, says)| says.then_some((field, part)))
    }
}

/// Which endpoint of a service is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Balancing {
    /// By what.
    pub algorithm: Algorithm,
    /// For so long after it has come an endpoint gets less than its share: from a tenth of it, evenly growing.
    pub slow_start: Option<Duration>,
}

/// By what an endpoint is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Algorithm {
    /// The faster of two, by how long it took of late and what is under way there.
    #[default]
    LeastLatency,
    /// That one of two with less under way.
    LeastRequests,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// The same one for the same value, as long as there is that one; where there is no value, as [`Self::LeastLatency`].
    Hash(HashBy),
}

impl Algorithm {
    fn is_of_requests(&self) -> bool {
        matches!(self, Self::Hash(HashBy::Header(_) | HashBy::Cookie(_)))
    }
}

/// Whose endpoint is the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HashBy {
    /// Requests' with the same value of this header.
    Header(String),
    /// Requests' with the same value of this cookie.
    Cookie(String),
    /// Those from the same address.
    Source,
}

/// When a request is tried again, besides what a backend certainly did not take: a connection that broke, and these
/// answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retries {
    /// How often, besides the first time; 0: never.
    pub attempts: u32,
    /// Statuses of answers.
    pub codes: Vec<u16>,
    /// Statuses of calls that are answered with nothing else (gRPC over HTTP/2, "Trailers-Only").
    pub grpc_codes: Vec<u16>,
    /// Requests of every method, not only of safe ones (RFC 9110, section 9.2.1).
    pub every_method: bool,
    /// The pause before the first of them; each next one is twice as long, and all vary by chance.
    pub backoff: Duration,
    /// How many requests to the service may be tried again.
    pub budget: RetryBudget,
}

/// When a request is sent to a second endpoint, while the first one has not answered yet: if its method is a safe one (RFC
/// 9110, section 9.2.1), or if it is one of these calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hedge {
    /// After so long without the head of an answer. Never 0.
    pub after: Duration,
    /// Calls that do no harm when they are made twice, `package.Service/Method`.
    pub calls: Vec<String>,
    /// How many requests may be.
    pub budget: RetryBudget,
}

/// How many requests to a service may be tried again, or hedged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryBudget {
    /// Of all that are asked, percent.
    pub percent: u32,
    /// In a second, however few are asked.
    pub per_second: u32,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { percent: 20, per_second: 10 }
    }
}

/// How much may be under way at once, from one node to a port of a service. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Connections of the node's workloads to it.
    pub connections: Option<u32>,
    /// Requests that are at its endpoints.
    pub requests: Option<u32>,
    /// Requests that wait until one of those is answered; more are refused at once. None: no request waits.
    pub pending: u32,
}

/// When an endpoint is left alone for a while, beside one that takes no connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ejection {
    /// After so many failures in a row: answers of 500 and more, calls that failed at the server, connections that broke.
    pub failures: u32,
    /// For how long the first time; twice as long each time that follows without a success between.
    pub base: Duration,
    /// For how long at most.
    pub most: Duration,
    /// How many of the endpoints at most, percent.
    pub most_percent: u32,
    /// If fewer than this serve, percent, all are asked again.
    pub panic_percent: u32,
    /// Or after too many failures among all that it took of late.
    pub share: Option<FailureShare>,
    /// Or when it answers 429 or 503 with `Retry-After`: until then, for so long at most. Never 0; none: for nobody's word.
    pub retry_after: Option<Duration>,
}

/// How many failures are too many among all that an endpoint took of late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureShare {
    /// From this many on, percent; from 1 to 100.
    pub percent: u32,
    /// Of at least so many requests: of fewer ones a share means little. Never 0.
    pub minimum: u32,
    /// Within this time. Never 0.
    pub window: Duration,
}

/// What goes wrong on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Of ten thousand requests that it is for, this many.
    pub of_ten_thousand: u32,
    /// The requests that have all of these headers; none: all requests.
    pub headers: Vec<(String, TextMatch)>,
    /// What happens.
    pub effect: FaultEffect,
}

/// What happens to a request on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultEffect {
    /// It waits before it goes on.
    Delay(Duration),
    /// It is answered with this status, and goes nowhere.
    Abort(u16),
    /// The call is answered with this status of gRPC, and goes nowhere.
    AbortCall(u16),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_of_whoever_says_it_first() {
        let timeouts = |ms| Some(Timeouts { request: Some(Duration::from_millis(ms)), backend: None });
        let limits = Some(Limits { connections: Some(1), requests: None, pending: 0 });
        let near = Traffic { timeouts: timeouts(1), ..Traffic::default() };
        let far = Traffic { timeouts: timeouts(2), limits, ..Traffic::default() };
        let both = near.or(&far);
        assert_eq!((both.timeouts, both.limits), (timeouts(1), limits));
        assert_eq!(near.or(&Traffic::default()), near);
        assert_eq!(Traffic::default().or(&far), far);
    }

    #[test]
    fn what_connections_have_too_needs_no_requests() {
        let of = |algorithm| Traffic {
            balancing: Some(Balancing { algorithm, slow_start: None }),
            ..Traffic::default()
        };
        assert!(!of(Algorithm::RoundRobin).is_of_requests());
        assert!(!of(Algorithm::Hash(HashBy::Source)).is_of_requests());
        assert!(of(Algorithm::Hash(HashBy::Header("x-user".into()))).is_of_requests());
        let limits = |requests| Some(Limits { connections: Some(9), requests, pending: 0 });
        assert!(!Traffic { limits: limits(None), ..Traffic::default() }.is_of_requests());
        assert!(Traffic { limits: limits(Some(1)), ..Traffic::default() }.is_of_requests());
    }

    #[test]
    fn what_is_of_connections_is_not_of_requests() {
        let all = Traffic {
            balancing: Some(Balancing { algorithm: Algorithm::RoundRobin, slow_start: None }),
            timeouts: Some(Timeouts::default()),
            limits: Some(Limits { connections: Some(9), requests: Some(1), pending: 1 }),
            faults: Some(vec![]),
            ..Traffic::default()
        };
        let parts: Vec<_> = all.parts_of_requests().map(|(_, part)| part).collect();
        assert_eq!(parts, ["timeouts", "limits.requests", "faults"]);
        let left = all.of_connections();
        assert!(!left.is_of_requests());
        let limits = Some(Limits { connections: Some(9), requests: None, pending: 0 });
        assert_eq!(left, Traffic { balancing: all.balancing, limits, ..Traffic::default() });
        let by_header =
            Balancing { algorithm: Algorithm::Hash(HashBy::Header("x".into())), slow_start: None };
        let by_header = Traffic { balancing: Some(by_header), ..Traffic::default() };
        assert_eq!(by_header.of_connections(), Traffic::default());
    }
}
