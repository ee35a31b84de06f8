//! How requests are sent, with every part in use or not.

use std::time::Duration;

use mesh_core::model::{
    http::Timeouts,
    traffic::{
        Algorithm, Balancing, Ejection, FailureShare, Fault, FaultEffect, HashBy, Hedge, Limits, Retries,
        RetryBudget, Traffic,
    },
};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{text_match, word};

fn time() -> impl Strategy<Value = Duration> {
    (1u64..9).prop_map(Duration::from_millis)
}

fn balancing() -> impl Strategy<Value = Balancing> {
    let algorithm = prop_oneof![
        select(vec![
            Algorithm::LeastLatency,
            Algorithm::LeastRequests,
            Algorithm::RoundRobin,
            Algorithm::Random,
            Algorithm::Hash(HashBy::Source),
        ]),
        word().prop_map(|name| Algorithm::Hash(HashBy::Header(name))),
        word().prop_map(|name| Algorithm::Hash(HashBy::Cookie(name))),
    ];
    (algorithm, option::of(time())).prop_map(|(algorithm, slow_start)| Balancing { algorithm, slow_start })
}

fn retries() -> impl Strategy<Value = Retries> {
    let budget = (0u32..100, 0u32..9).prop_map(|(percent, per_second)| RetryBudget { percent, per_second });
    let codes = vec(select(vec![500u16, 503]), 0..2);
    (0u32..3, codes, vec(0u16..=16, 0..2), any::<bool>(), time(), budget).prop_map(
        |(attempts, codes, grpc_codes, every_method, backoff, budget)| Retries {
            attempts,
            codes,
            grpc_codes,
            every_method,
            backoff,
            budget,
        },
    )
}

fn hedge() -> impl Strategy<Value = Hedge> {
    let budget = (0u32..100, 0u32..9).prop_map(|(percent, per_second)| RetryBudget { percent, per_second });
    (time(), vec(word(), 0..2), budget).prop_map(|(after, calls, budget)| Hedge { after, calls, budget })
}

fn ejection() -> impl Strategy<Value = Ejection> {
    let share = (1u32..=100, 1u32..9, time()).prop_map(|(percent, minimum, window)| FailureShare {
        percent,
        minimum,
        window,
    });
    (1u32..9, time(), time(), 0u32..=100, 0u32..=100, option::of(share), option::of(time())).prop_map(
        |(failures, base, most, most_percent, panic_percent, share, retry_after)| Ejection {
            failures,
            base,
            most,
            most_percent,
            panic_percent,
            share,
            retry_after,
        },
    )
}

fn fault() -> impl Strategy<Value = Fault> {
    let effect = prop_oneof![
        time().prop_map(FaultEffect::Delay),
        Just(FaultEffect::Abort(503)),
        (0u16..=16).prop_map(FaultEffect::AbortCall),
    ];
    (0u32..=10_000, vec((word(), text_match()), 0..2), effect)
        .prop_map(|(of_ten_thousand, headers, effect)| Fault { of_ten_thousand, headers, effect })
}

pub(crate) fn traffic() -> impl Strategy<Value = Traffic> {
    let timeouts =
        (option::of(time()), option::of(time())).prop_map(|(request, backend)| Timeouts { request, backend });
    let limits = (option::of(1u32..9), option::of(1u32..9), 0u32..9)
        .prop_map(|(connections, requests, pending)| Limits { connections, requests, pending });
    let parts = (
        option::of(balancing()),
        option::of(timeouts),
        option::of(retries()),
        option::of(limits),
        option::of(ejection()),
    );
    (parts, option::of(vec(fault(), 0..2)), option::of(hedge()), any::<bool>()).prop_map(
        |((balancing, timeouts, retries, limits, ejection), faults, hedge, reads_requests)| Traffic {
            balancing,
            timeouts,
            retries,
            limits,
            ejection,
            faults,
            hedge,
            reads_requests,
        },
    )
}
