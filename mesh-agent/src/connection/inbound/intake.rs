//! How much of requests a workload takes: one that may come is measured and counted before its application sees it, and
//! whoever sent it is told what it was too much of.
//!
//! The names of policies, and who else asks, are in the access log alone. What clients are told is of RFC 6585, RFC 9110 and
//! draft-ietf-httpapi-ratelimit-headers-10.

use std::{fmt::Write, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::RETRY_AFTER};
use mesh_core::{
    http::matches::Asked,
    identity::SpiffeId,
    intake::{TooLarge, too_large},
    model::intake::{Intake, RateLimit},
    policy::{RuleRef, request::Reading},
    refusal::Reason,
};

use super::{super::requests::Declined, At};
use crate::{metrics::Metrics, rates::TooMany, refusal::Refusal};

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Whether its size may be: that of its head, and of its body if it says that.
pub(super) fn measure(intake: &Intake, port: u16, asked: &Asked<'_>) -> Result<(), TooLarge> {
    let sizes = intake.ports.get(&port).map(|it| it.sizes).unwrap_or_default();
    too_large(&sizes, asked).map_or(Ok(()), Err)
}

/// Takes what the request costs of what the workload takes.
pub(super) fn count(
    intake: &Arc<Intake>,
    at: &At,
    source: Option<&SpiffeId>,
    (headers, reading): (&HeaderMap, &Reading<'_>),
    metrics: &Metrics,
) -> Result<(), Declined> {
    let asked = at.workload.rates.ask(intake, at.original.port(), (source, headers, reading));
    (0..asked.shared).for_each(|_| metrics.limit_hit("rate_buckets"));
    asked.taken.map_err(|too_many| one_too_many(&too_many))
}

/// Its body was longer than it may be, as it came.
pub(super) fn longer() -> Declined {
    larger(TooLarge { reason: Reason::LimitBody, detail: "more came than may".to_owned() })
}

/// It is larger than it may be.
pub(super) fn larger(found: TooLarge) -> Declined {
    let status = match found.reason {
        Reason::LimitHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        _ => StatusCode::PAYLOAD_TOO_LARGE,
    };
    let refusal = Refusal::new(found.reason, found.detail);
    Declined::exhausted(status, HeaderMap::new(), None, refusal)
}

fn one_too_many(TooMany { limits, wait }: &TooMany) -> Declined {
    let seconds = whole_seconds(*wait);
    let (mut policies, mut states) = (String::new(), String::new());
    for (place, RateLimit { requests, per, .. }) in limits {
        let comma = if policies.is_empty() { "" } else { ", " };
        // Writing to a text does not fail.
        let _ = write!(policies, "{comma}\"{place}\";q={requests};w={}", per.as_secs());
        let _ = write!(states, "{comma}\"{place}\";r=0;t={seconds}");
    }
    let mut headers = HeaderMap::new();
    headers.insert(RETRY_AFTER, seconds.into());
    for (name, text) in [(RATE_LIMIT_POLICY, policies), (RATE_LIMIT, states)] {
        // Digits and signs that headers may have.
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(name, value);
        }
    }
    let detail: Vec<String> = limits.iter().map(|(_, limit)| limit.to_string()).collect();
    let rule =
        limits.first().map(|(_, limit)| RuleRef { policy: limit.policy.clone(), rule: limit.index as usize });
    let refusal = Refusal { rule, ..Refusal::new(Reason::LimitRate, detail.join("; ")) };
    Declined::exhausted(StatusCode::TOO_MANY_REQUESTS, headers, Some(*wait), refusal)
}

/// So that whoever waits for as long as he is told does not come too early.
fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}
