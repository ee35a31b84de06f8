//! Buckets of tokens, against a slow reading of what they promise: of the requests that go on, there are in no time more than
//! a burst and what comes in that time.

use std::{collections::HashMap, time::Duration};

use mesh_core::{
    intake::rate::{Buckets, Counting, count},
    model::{
        Asks, Name,
        intake::{RateBy, RateLimit},
    },
};
use proptest::{collection::vec, prelude::*};

fn a_limit() -> impl Strategy<Value = RateLimit> {
    (1u32..6, prop_oneof![1u64..9, Just(1000)], 1u32..5).prop_map(|(requests, per, burst)| RateLimit {
        policy: Name::new("a", "b"),
        index: 0,
        by: RateBy::All,
        requests,
        per: Duration::from_millis(per),
        burst,
        only: Asks::default(),
    })
}

/// Who asks, and how long after the one before.
fn asking() -> impl Strategy<Value = Vec<(u64, Duration)>> {
    let pause = prop_oneof![Just(0), 0u64..3_000_000, 0u64..2_000_000_000].prop_map(Duration::from_nanos);
    vec((0u64..6, pause), 0..60)
}

/// How long a request has to wait, given when others went on: until it makes too many in no time that ends with it.
fn waits(limit: &RateLimit, went: &[Duration], now: Duration) -> Duration {
    let per = limit.per.as_nanos();
    let of = |first: usize| {
        // With those from this one on, and itself, so much has to have come besides a burst.
        let all = (went.len() - first + 1) as u128;
        let wanted = (all.saturating_sub(limit.burst.into()) * per).div_ceil(limit.requests.into());
        let ready =
            went[first] + Duration::from_nanos(u64::try_from(wanted).expect("a wait of less than centuries"));
        ready.saturating_sub(now)
    };
    (0..went.len()).map(of).max().unwrap_or_default()
}

fn ask(limit: &RateLimit, buckets: &mut Buckets, key: u64, now: Duration) -> (Duration, usize) {
    let counted = count(&mut [Counting { limit, buckets, key }], now);
    (counted.exceeded.first().map_or(Duration::ZERO, |(_, wait)| *wait), counted.shared)
}

proptest! {
    #[test]
    fn in_no_time_more_than_a_burst_and_what_comes_in_it(limit in a_limit(), asking in asking()) {
        let (mut buckets, mut now, mut went) = (Buckets::default(), Duration::ZERO, vec![]);
        for (_, pause) in asking {
            now += pause;
            let (wait, _) = ask(&limit, &mut buckets, 0, now);
            prop_assert_eq!(wait, waits(&limit, &went, now));
            if wait.is_zero() {
                went.push(now);
            }
        }
    }

    #[test]
    fn those_who_have_a_bucket_of_their_own_are_counted_as_if_there_were_nobody_else(
        limit in a_limit(), asking in asking(), most in 1usize..5,
    ) {
        let (mut buckets, mut now) = (Buckets::of(most), Duration::ZERO);
        let (mut went, mut shared_once): (HashMap<u64, Vec<Duration>>, _) = (HashMap::new(), vec![]);
        for (key, pause) in asking {
            now += pause;
            let (wait, shared) = ask(&limit, &mut buckets, key, now);
            prop_assert!(buckets.len() <= most);
            let own = went.entry(key).or_default();
            if shared > 0 {
                shared_once.push(key);
            } else if !shared_once.contains(&key) {
                prop_assert_eq!(wait, waits(&limit, own, now));
            }
            if wait.is_zero() {
                own.push(now);
            }
        }
    }

    #[test]
    fn of_several_limits_all_count_or_none(
        limits in vec(a_limit(), 1..4), asking in asking(),
    ) {
        let mut buckets: Vec<Buckets> = limits.iter().map(|_| Buckets::default()).collect();
        let (mut now, mut went) = (Duration::ZERO, vec![]);
        for (_, pause) in asking {
            now += pause;
            let mut all: Vec<Counting<'_>> = limits
                .iter()
                .zip(&mut buckets)
                .map(|(limit, buckets)| Counting { limit, buckets, key: 0 })
                .collect();
            let exceeded = count(&mut all, now).exceeded;
            let waits = limits.iter().map(|limit| waits(limit, &went, now)).enumerate();
            let expected: Vec<_> = waits.filter(|(_, wait)| !wait.is_zero()).collect();
            prop_assert_eq!(&exceeded, &expected);
            if exceeded.is_empty() {
                went.push(now);
            }
        }
    }
}
