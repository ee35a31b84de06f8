//! How requests and connections to services are sent, to the wire and back.

use std::time::Duration;

use super::{
    UNKNOWN, WireError, error, proto,
    routes::{header_name, millis, status_from_proto, text_from_proto, text_to_proto},
};
use crate::model::{
    http::Timeouts,
    traffic::{
        Algorithm, Balancing, Ejection, FailureShare, Fault, FaultEffect, HashBy, Hedge, Limits, Retries,
        RetryBudget, Traffic,
    },
};

/// The highest status of gRPC.
const LAST_GRPC_STATUS: u32 = 16;

/// Nothing for what says nothing: most services and rules are not spoken of.
pub(super) fn to_proto(traffic: &Traffic) -> Option<proto::Traffic> {
    let faults = |faults: &Vec<Fault>| proto::Faults { faults: faults.iter().map(fault_to_proto).collect() };
    (!traffic.is_empty()).then(|| proto::Traffic {
        balancing: traffic.balancing.as_ref().map(balancing_to_proto),
        timeouts: traffic.timeouts.map(|it| proto::TrafficTimeouts {
            request_ms: millis(it.request),
            backend_ms: millis(it.backend),
        }),
        retries: traffic.retries.as_ref().map(|it| proto::Retries {
            attempts: it.attempts,
            codes: it.codes.iter().map(|code| (*code).into()).collect(),
            grpc_codes: it.grpc_codes.iter().map(|code| (*code).into()).collect(),
            every_method: it.every_method,
            backoff_ms: millis(Some(it.backoff)),
            budget_percent: it.budget.percent,
            budget_per_second: it.budget.per_second,
        }),
        limits: traffic.limits.map(|it| proto::Limits {
            connections: it.connections.unwrap_or(0),
            requests: it.requests.unwrap_or(0),
            pending: it.pending,
        }),
        ejection: traffic.ejection.map(|it| proto::Ejection {
            failures: it.failures,
            base_ms: millis(Some(it.base)),
            most_ms: millis(Some(it.most)),
            most_percent: it.most_percent,
            panic_percent: it.panic_percent,
            failure_percent: it.share.map_or(0, |share| share.percent),
            failure_minimum: it.share.map_or(0, |share| share.minimum),
            failure_window_ms: millis(it.share.map(|share| share.window)),
            retry_after_ms: millis(it.retry_after),
        }),
        faults: traffic.faults.as_ref().map(faults),
        hedge: traffic.hedge.as_ref().map(|it| proto::Hedge {
            after_ms: millis(Some(it.after)),
            calls: it.calls.clone(),
            budget_percent: it.budget.percent,
            budget_per_second: it.budget.per_second,
        }),
        reads_requests: traffic.reads_requests,
    })
}

fn balancing_to_proto(balancing: &Balancing) -> proto::Balancing {
    use proto::balancing::By;
    let algorithm = |it: proto::Algorithm| By::Algorithm(it.into());
    proto::Balancing {
        by: Some(match &balancing.algorithm {
            Algorithm::LeastLatency => algorithm(proto::Algorithm::LeastLatency),
            Algorithm::LeastRequests => algorithm(proto::Algorithm::LeastRequests),
            Algorithm::RoundRobin => algorithm(proto::Algorithm::RoundRobin),
            Algorithm::Random => algorithm(proto::Algorithm::Random),
            Algorithm::Hash(HashBy::Source) => algorithm(proto::Algorithm::HashSource),
            Algorithm::Hash(HashBy::Header(name)) => By::HashHeader(name.clone()),
            Algorithm::Hash(HashBy::Cookie(name)) => By::HashCookie(name.clone()),
        }),
        slow_start_ms: millis(balancing.slow_start),
    }
}

fn fault_to_proto(fault: &Fault) -> proto::Fault {
    use proto::fault::Effect;
    let headers = fault.headers.iter();
    proto::Fault {
        of_ten_thousand: fault.of_ten_thousand,
        headers: headers
            .map(|(name, value)| proto::ValueMatch { name: name.clone(), value: Some(text_to_proto(value)) })
            .collect(),
        effect: Some(match fault.effect {
            FaultEffect::Delay(time) => Effect::DelayMs(millis(Some(time))),
            FaultEffect::Abort(status) => Effect::Abort(status.into()),
            FaultEffect::AbortCall(status) => Effect::AbortCall(status.into()),
        }),
    }
}

pub(super) fn from_proto(key: &str, traffic: Option<&proto::Traffic>) -> Result<Traffic, WireError> {
    let Some(traffic) = traffic else { return Ok(Traffic::default()) };
    let faults = |it: &proto::Faults| it.faults.iter().map(|it| fault_from_proto(key, it)).collect();
    Ok(Traffic {
        balancing: traffic.balancing.as_ref().map(|it| balancing_from_proto(key, it)).transpose()?,
        timeouts: traffic
            .timeouts
            .as_ref()
            .map(|it| Timeouts { request: some_time(it.request_ms), backend: some_time(it.backend_ms) }),
        retries: traffic.retries.as_ref().map(|it| retries_from_proto(key, it)).transpose()?,
        limits: traffic.limits.as_ref().map(|it| Limits {
            connections: some(it.connections),
            requests: some(it.requests),
            pending: it.pending,
        }),
        ejection: traffic.ejection.as_ref().map(|it| ejection_from_proto(key, it)).transpose()?,
        faults: traffic.faults.as_ref().map(faults).transpose()?,
        hedge: traffic.hedge.as_ref().map(|it| hedge_from_proto(key, it)).transpose()?,
        reads_requests: traffic.reads_requests,
    })
}

fn some(number: u32) -> Option<u32> {
    Some(number).filter(|number| *number > 0)
}

fn some_time(ms: u64) -> Option<Duration> {
    Some(Duration::from_millis(ms)).filter(|time| !time.is_zero())
}

fn balancing_from_proto(key: &str, balancing: &proto::Balancing) -> Result<Balancing, WireError> {
    use proto::balancing::By;
    let field = "traffic.balancing";
    let algorithm = match balancing.by.as_ref().ok_or_else(|| error(key, field, UNKNOWN))? {
        By::HashHeader(name) => Algorithm::Hash(HashBy::Header(header_name(key, field, name)?)),
        By::HashCookie(name) => Algorithm::Hash(HashBy::Cookie(name.clone())),
        By::Algorithm(number) => match proto::Algorithm::try_from(*number) {
            Ok(proto::Algorithm::LeastLatency) => Algorithm::LeastLatency,
            Ok(proto::Algorithm::LeastRequests) => Algorithm::LeastRequests,
            Ok(proto::Algorithm::RoundRobin) => Algorithm::RoundRobin,
            Ok(proto::Algorithm::Random) => Algorithm::Random,
            Ok(proto::Algorithm::HashSource) => Algorithm::Hash(HashBy::Source),
            Err(_) => return Err(error(key, field, UNKNOWN)),
        },
    };
    Ok(Balancing { algorithm, slow_start: some_time(balancing.slow_start_ms) })
}

fn retries_from_proto(key: &str, retries: &proto::Retries) -> Result<Retries, WireError> {
    let codes = retries.codes.iter().map(|code| status_from_proto(key, "traffic.retries.codes", *code));
    let grpc_codes = retries.grpc_codes.iter().map(|code| grpc_status(key, *code));
    Ok(Retries {
        attempts: retries.attempts,
        codes: codes.collect::<Result<_, _>>()?,
        grpc_codes: grpc_codes.collect::<Result<_, _>>()?,
        every_method: retries.every_method,
        backoff: Duration::from_millis(retries.backoff_ms),
        budget: RetryBudget { percent: retries.budget_percent, per_second: retries.budget_per_second },
    })
}

fn hedge_from_proto(key: &str, hedge: &proto::Hedge) -> Result<Hedge, WireError> {
    let after =
        some_time(hedge.after_ms).ok_or_else(|| error(key, "traffic.hedge.after_ms", "after no time"))?;
    let budget = RetryBudget { percent: hedge.budget_percent, per_second: hedge.budget_per_second };
    Ok(Hedge { after, calls: hedge.calls.clone(), budget })
}

fn grpc_status(key: &str, status: u32) -> Result<u16, WireError> {
    match u16::try_from(status) {
        Ok(known) if status <= LAST_GRPC_STATUS => Ok(known),
        _ => Err(error(key, "traffic", format_args!("{status} is no status of gRPC"))),
    }
}

fn ejection_from_proto(key: &str, ejection: &proto::Ejection) -> Result<Ejection, WireError> {
    if ejection.failures == 0 {
        return Err(error(key, "traffic.ejection.failures", "after none"));
    }
    Ok(Ejection {
        failures: ejection.failures,
        base: Duration::from_millis(ejection.base_ms),
        most: Duration::from_millis(ejection.most_ms),
        most_percent: ejection.most_percent.min(100),
        panic_percent: ejection.panic_percent.min(100),
        share: share_from_proto(key, ejection)?,
        retry_after: some_time(ejection.retry_after_ms),
    })
}

fn share_from_proto(key: &str, ejection: &proto::Ejection) -> Result<Option<FailureShare>, WireError> {
    let Some(percent) = some(ejection.failure_percent) else { return Ok(None) };
    let field = "traffic.ejection.failure_window_ms";
    let window = some_time(ejection.failure_window_ms).ok_or_else(|| error(key, field, "within no time"))?;
    Ok(Some(FailureShare { percent: percent.min(100), minimum: ejection.failure_minimum.max(1), window }))
}

fn fault_from_proto(key: &str, fault: &proto::Fault) -> Result<Fault, WireError> {
    use proto::fault::Effect;
    let field = "traffic.faults";
    let header = |it: &proto::ValueMatch| {
        let value = it.value.as_ref().ok_or_else(|| error(key, field, "a match without a value"))?;
        Ok((header_name(key, field, &it.name)?, text_from_proto(key, field, value)?))
    };
    Ok(Fault {
        of_ten_thousand: fault.of_ten_thousand,
        headers: fault.headers.iter().map(header).collect::<Result<_, _>>()?,
        effect: match fault.effect.as_ref().ok_or_else(|| error(key, field, UNKNOWN))? {
            Effect::DelayMs(ms) => FaultEffect::Delay(Duration::from_millis(*ms)),
            Effect::Abort(status) => FaultEffect::Abort(status_from_proto(key, field, *status)?),
            Effect::AbortCall(status) => FaultEffect::AbortCall(grpc_status(key, *status)?),
        },
    })
}
