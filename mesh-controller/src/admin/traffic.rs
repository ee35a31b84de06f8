//! TrafficPolicies in words: what they say, and what became of them.

use mesh_core::model::{
    health::{HealthCheck, Pace, Probe},
    intake::PortIntake,
    traffic::{Algorithm, Balancing, Fault, FaultEffect, HashBy, Hedge, Retries, Traffic},
};

use super::answer::{TrafficRow, TrafficTargetRow};
use crate::{
    model::Model,
    routes,
    traffic::{NotInForce, resolve},
};

/// All policies, by name.
pub(super) fn rows(model: &Model) -> Vec<TrafficRow> {
    let resolved = resolve(model);
    let unread = routes::resolve(model, &resolved).unread;
    let row = |(name, outcome): (_, crate::traffic::Outcome)| TrafficRow {
        says: model.traffic.get(&name).map_or_else(Vec::new, |policy| {
            let checks = policy.health_check.as_ref().map(checked);
            let takes = taken(&policy.takes.clone().of_port());
            words(&policy.traffic).into_iter().chain(checks).chain(takes).collect()
        }),
        targets: outcome
            .targets
            .into_iter()
            .map(|(target, why)| TrafficTargetRow {
                target: target.to_string(),
                accepted: why.is_none(),
                reason: why.as_ref().map_or("Accepted", NotInForce::reason).to_owned(),
                says: why.map(|why| why.to_string()).unwrap_or_default(),
            })
            .collect(),
        unread: unread.get(&name).into_iter().flatten().map(ToString::to_string).collect(),
        name: name.to_string(),
    };
    resolved.outcomes.into_iter().map(row).collect()
}

/// What is said, a line for each part.
pub(super) fn words(traffic: &Traffic) -> Vec<String> {
    let Traffic {
        balancing: by,
        timeouts,
        retries: again,
        limits,
        ejection,
        faults,
        hedge,
        reads_requests: _,
    } = traffic;
    let mut words = vec![];
    words.extend(by.as_ref().map(balancing));
    if let Some(times) = timeouts {
        let request = times.request.map(|time| format!("{time:?} for a request"));
        let attempt = times.backend.map(|time| format!("{time:?} for an attempt"));
        let said: Vec<String> = request.into_iter().chain(attempt).collect();
        words.push(if said.is_empty() { "as long as it takes".to_owned() } else { said.join(", ") });
    }
    words.extend(again.as_ref().map(retries));
    words.extend(hedge.as_ref().map(hedged));
    if let Some(limits) = limits {
        let connections = limits.connections.map(|most| format!("at most {most} connections"));
        let requests = limits
            .requests
            .map(|most| format!("at most {most} requests at once, and {} that wait", limits.pending));
        words.extend(connections.into_iter().chain(requests));
    }
    if let Some(ejection) = ejection {
        let share = ejection.share.map(|it| {
            format!(", or {} percent of at least {} requests within {:?},", it.percent, it.minimum, it.window)
        });
        words.push(format!(
            "who fails {} times in a row{} is left alone for {:?} to {:?}, at most {} percent of them",
            ejection.failures,
            share.unwrap_or_default(),
            ejection.base,
            ejection.most,
            ejection.most_percent
        ));
        let asked = |most| {
            format!("who answers 429 or 503 with Retry-After is left alone until then, for {most:?} at most")
        };
        words.extend(ejection.retry_after.map(asked));
    }
    words.extend(faults.iter().flatten().map(fault));
    words
}

fn checked(check: &HealthCheck) -> String {
    let asked = match &check.probe {
        Probe::Tcp => "by a connection".to_owned(),
        Probe::Http { path, .. } => format!("by GET {path}"),
        Probe::Grpc { service } if service.is_empty() => "by grpc.health.v1".to_owned(),
        Probe::Grpc { service } => format!("by grpc.health.v1 for {service}"),
    };
    let port = check.port.map(|port| format!(" at port {port}")).unwrap_or_default();
    let Pace { interval, timeout, unhealthy_after, healthy_after } = check.pace;
    format!(
        "checked {asked}{port} every {interval:?} within {timeout:?}: left out after {unhealthy_after} failures, back after \
         {healthy_after} successes, all asked if fewer than {} percent are healthy",
        check.panic_percent
    )
}

/// What is said of what a workload takes, a line for each limit.
pub(super) fn taken(intake: &PortIntake) -> Vec<String> {
    let head = intake.sizes.head.map(|bytes| format!("heads of requests of at most {bytes} bytes"));
    let body = intake.sizes.body.map(|bytes| format!("bodies of requests of at most {bytes} bytes"));
    let rates = intake.rates.iter().map(|rate| format!("at most {rate}, at each workload"));
    head.into_iter().chain(body).chain(rates).collect()
}

fn balancing(balancing: &Balancing) -> String {
    let by = match &balancing.algorithm {
        Algorithm::LeastLatency => "the faster of two".to_owned(),
        Algorithm::LeastRequests => "the one of two with less under way".to_owned(),
        Algorithm::RoundRobin => "one after the other".to_owned(),
        Algorithm::Random => "any".to_owned(),
        Algorithm::Hash(HashBy::Source) => "the same one for the same address".to_owned(),
        Algorithm::Hash(HashBy::Header(name)) => format!("the same one for the same header {name}"),
        Algorithm::Hash(HashBy::Cookie(name)) => format!("the same one for the same cookie {name}"),
    };
    let slowly = balancing.slow_start.map(|time| format!(", slowly for {time:?}")).unwrap_or_default();
    format!("{by}{slowly}")
}

fn retries(retries: &Retries) -> String {
    if retries.attempts == 0 {
        return "never tried again".to_owned();
    }
    let list = |codes: &[u16]| codes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut after = vec!["broken connections".to_owned()];
    after.extend((!retries.codes.is_empty()).then(|| list(&retries.codes)));
    after.extend(
        (!retries.grpc_codes.is_empty()).then(|| format!("grpc-status {}", list(&retries.grpc_codes))),
    );
    let which = if retries.every_method { "requests" } else { "safe requests" };
    let budget = retries.budget;
    format!(
        "{which} tried again up to {} times after {}, {} percent of all and {} a second",
        retries.attempts,
        after.join(", "),
        budget.percent,
        budget.per_second
    )
}

fn hedged(hedge: &Hedge) -> String {
    let Hedge { after, calls, budget } = hedge;
    let calls = if calls.is_empty() { String::new() } else { format!(" and calls of {}", calls.join(", ")) };
    format!(
        "safe requests{calls} sent to a second endpoint, too, after {after:?} without an answer, {} percent of all and {} a \
         second",
        budget.percent, budget.per_second
    )
}

fn fault(fault: &Fault) -> String {
    let share = f64::from(fault.of_ten_thousand) / 100.0;
    let headers: String =
        fault.headers.iter().map(|(name, value)| format!(" with {name}={}", value.as_str())).collect();
    let what = match fault.effect {
        FaultEffect::Delay(time) => format!("delayed by {time:?}"),
        FaultEffect::Abort(status) => format!("answered with {status}"),
        FaultEffect::AbortCall(status) => format!("answered with grpc-status {status}"),
    };
    format!("fault: {share} percent of requests{headers} {what}")
}
