//! Which backend gets a request, whether a copy of it goes somewhere else too, and when it is tried again. The caller
//! brings the chance.

use std::{borrow::Cow, time::Duration};

use http::Method;

use super::later::Later;
use crate::model::{
    http::{Backend, Mirror, RouteRule, Timeouts},
    traffic::{Fault, Hedge, Retries, RetryBudget, Traffic},
};

/// When a request is tried again where nobody says it: if it is a safe one, and its connection broke.
const USUAL: Retries = Retries {
    attempts: 2,
    codes: vec![],
    grpc_codes: vec![],
    every_method: false,
    backoff: Duration::from_millis(25),
    budget: RetryBudget { percent: 20, per_second: 10 },
};

/// The longest pause between two attempts, without what chance adds.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// The backend for a request, by the weights; `None` if no backend has any. `chance`: any number, evenly spread.
pub fn backend(backends: &[Backend], chance: u64) -> Option<&Backend> {
    let sum: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut at = chance.checked_rem(sum)?;
    backends.iter().find(|backend| {
        let within = at < u64::from(backend.weight);
        at = at.saturating_sub(u64::from(backend.weight));
        within
    })
}

/// Whether a copy of a request goes to a mirror.
pub fn is_mirrored(mirror: &Mirror, chance: u64) -> bool {
    chance % u64::from(mirror.of.max(1)) < u64::from(mirror.copies)
}

/// How a request is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms<'a> {
    /// How long it may take.
    pub timeouts: Timeouts,
    /// When it is tried again.
    pub retries: Cow<'a, Retries>,
    /// What goes wrong with it on purpose.
    pub faults: &'a [Fault],
    /// When it is sent to a second endpoint, too.
    pub hedge: Option<&'a Hedge>,
}

/// What is said of a request under a rule: by the rule itself, by what policies say of the rule, and by what they say of
/// the service that was asked for, in this order.
pub fn terms<'a>(rule: &'a RouteRule, asked: &'a Traffic) -> Terms<'a> {
    let said = [&rule.traffic, asked];
    let timeouts = said.iter().find_map(|it| it.timeouts).unwrap_or_default();
    let retries = match &rule.retry {
        Some(retry) => Cow::Owned(Retries {
            attempts: retry.attempts,
            codes: retry.codes.clone(),
            every_method: true,
            backoff: retry.backoff,
            ..USUAL
        }),
        None => said.iter().find_map(|it| it.retries.as_ref()).map_or(Cow::Owned(USUAL), Cow::Borrowed),
    };
    Terms {
        timeouts: Timeouts {
            request: rule.timeouts.request.or(timeouts.request),
            backend: rule.timeouts.backend.or(timeouts.backend),
        },
        retries,
        faults: said.iter().find_map(|it| it.faults.as_deref()).unwrap_or_default(),
        hedge: said.iter().find_map(|it| it.hedge.as_ref()),
    }
}

/// Whether a request does no harm when it is made twice, as far as a policy says so: `is_call`, by gRPC.
pub fn is_hedged(hedge: &Hedge, method: &Method, path: &str, is_call: bool) -> bool {
    let named = |path: &str| hedge.calls.iter().any(|call| call == path);
    method.is_safe() || (is_call && path.strip_prefix('/').is_some_and(named))
}

/// The pause before the attempt with this number, from 1: what is said for certain, and up to a half more by chance, so
/// that those who failed together do not come back together.
pub fn pause(backoff: Duration, attempt: u32, chance: u32) -> Duration {
    let whole = backoff.saturating_mul(1u32 << attempt.saturating_sub(1).min(16)).min(MAX_PAUSE);
    whole + (whole / 2).mul_f64(f64::from(chance) / f64::from(u32::MAX))
}

/// The same where the server has said when it wants to be asked again; `None`: not at all, or later than anybody waits for
/// who has so much time `left`. What is no exact time varies by chance after it, too.
pub fn pause_for(pause: Duration, said: Option<Later>, left: Option<Duration>) -> Option<Duration> {
    let said = match said {
        None => return Some(pause),
        Some(Later::Never) => return None,
        Some(Later::NotBefore(time)) => (time, time.saturating_add(pause)),
        Some(Later::Exactly(time)) => (time, time),
    };
    let (asked_for, pause) = said;
    (asked_for <= MAX_PAUSE && left.is_none_or(|left| pause < left)).then_some(pause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::http::{BackendTarget, Filters, Retry};

    #[test]
    fn shares_are_as_the_weights() {
        let backend_of = |weight| Backend { to: BackendTarget::Nowhere, weight, filters: Filters::default() };
        let backends = [1, 0, 3].map(backend_of);
        let mut counts = [0; 3];
        for chance in 0..4000u64 {
            let chosen = backend(&backends, chance).unwrap();
            counts[backends.iter().position(|it| std::ptr::eq(it, chosen)).unwrap()] += 1;
        }
        assert_eq!(counts, [1000, 0, 3000]);
        assert!(backend(&[backend_of(0)], 7).is_none());
        assert!(backend(&[], 7).is_none());
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let backoff = Duration::from_millis(100);
        assert_eq!(pause(backoff, 1, 0), Duration::from_millis(100));
        assert_eq!(pause(backoff, 1, u32::MAX), Duration::from_millis(150));
        assert_eq!(pause(backoff, 3, u32::MAX), Duration::from_millis(600));
        assert_eq!(pause(backoff, 40, 0), MAX_PAUSE);
    }

    #[test]
    fn what_is_safe_and_the_calls_that_are_named_are_hedged_and_nothing_else() {
        let hedge = Hedge {
            after: Duration::from_millis(1),
            calls: vec!["shop.Cart/Get".into()],
            budget: RetryBudget::default(),
        };
        for (method, path, is_call, expected) in [
            (Method::GET, "/", false, true),
            (Method::HEAD, "/shop.Cart/Get", false, true),
            (Method::POST, "/shop.Cart/Get", true, true),
            (Method::POST, "/shop.Cart/Get", false, false),
            (Method::POST, "/shop.Cart/Add", true, false),
            (Method::POST, "/shop.Cart/Get/", true, false),
            (Method::PUT, "/", false, false),
            (Method::CONNECT, "/", false, false),
        ] {
            assert_eq!(is_hedged(&hedge, &method, path, is_call), expected, "{method} {path} {is_call}");
        }
    }

    #[test]
    fn a_server_is_not_asked_before_it_wants_to_be_and_nobody_waits_for_ever() {
        let ms = Duration::from_millis;
        let pause = |said, left| pause_for(ms(20), said, left);
        assert_eq!(pause(None, Some(ms(1))), Some(ms(20)));
        assert_eq!(pause(Some(Later::Never), None), None);
        assert_eq!(pause(Some(Later::NotBefore(ms(1000))), None), Some(ms(1020)));
        assert_eq!(pause(Some(Later::Exactly(ms(5))), None), Some(ms(5)));
        assert_eq!(pause(Some(Later::NotBefore(ms(1000))), Some(ms(1020))), None);
        assert_eq!(pause(Some(Later::Exactly(ms(1000))), Some(ms(1001))), Some(ms(1000)));
        assert_eq!(pause(Some(Later::NotBefore(MAX_PAUSE)), None), Some(MAX_PAUSE + ms(20)));
        assert_eq!(pause(Some(Later::Exactly(MAX_PAUSE + ms(1))), None), None);
        assert_eq!(pause(Some(Later::NotBefore(Duration::MAX)), None), None);
    }

    #[test]
    fn what_a_rule_says_comes_before_what_is_said_of_it_and_that_before_the_service() {
        let ms = Duration::from_millis;
        let times = |request| Some(Timeouts { request: Some(ms(request)), backend: None });
        let retries = |attempts| Some(Retries { attempts, ..USUAL });
        let service = Traffic { timeouts: times(3), retries: retries(3), ..Traffic::default() };
        let said = Traffic { timeouts: times(2), ..Traffic::default() };
        let retry = Some(Retry { codes: vec![503], attempts: 1, backoff: ms(1) });
        let mut rule = RouteRule { traffic: said, ..RouteRule::default() };
        let of = |rule: &RouteRule| {
            let terms = terms(rule, &service);
            (terms.timeouts.request, terms.retries.attempts, terms.retries.every_method)
        };
        assert_eq!(of(&RouteRule::default()), (Some(ms(3)), 3, false));
        assert_eq!(of(&rule), (Some(ms(2)), 3, false));
        (rule.timeouts, rule.retry) = (times(1).unwrap(), retry);
        assert_eq!(of(&rule), (Some(ms(1)), 1, true));
        assert_eq!(terms(&RouteRule::default(), &Traffic::default()).retries.into_owned(), USUAL);
    }
}
