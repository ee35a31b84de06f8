//! What agents have said of endpoints that they check: which are unhealthy, and what a new word makes of the one before.
//! Pure.
//!
//! Stands apart from [`report`](crate::report) because what is kept is kept in two places: with our state, or on the pods
//! ([`conditions`](crate::conditions)). Nothing that is not said makes an endpoint unhealthy.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::{
    health::Health,
    model::{
        Name,
        health::{CheckedEndpoint, MAX_CHECKS},
    },
    wire::{self, proto::EndpointHealth},
};

/// The endpoints of one workload that are unhealthy, each with why.
pub type Unhealthy = BTreeMap<CheckedEndpoint, String>;

/// What agents said, as far as it counts for what nodes are told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Heard {
    /// The workloads whose own agent says that their capture is in place.
    pub captured: BTreeSet<Name>,
    /// Those with endpoints that are unhealthy.
    pub unhealthy: BTreeMap<Name, Unhealthy>,
}

/// What is unhealthy of a workload after its own agent's word: what it does not speak of is not checked any more, and of what
/// is not decided yet the word before counts. So neither an agent that starts anew nor one that goes to another controller
/// makes anything healthy that is not.
pub fn after(words: &[EndpointHealth], before: &Unhealthy) -> Unhealthy {
    let words = words.iter().take(MAX_CHECKS).filter_map(wire::health::of_word);
    words
        .filter_map(|(endpoint, health, reason)| match health {
            Health::Healthy => None,
            Health::Unhealthy => Some((endpoint, reason)),
            Health::Undecided => before.get_key_value(&endpoint).map(|(it, why)| (it.clone(), why.clone())),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(port: u16) -> CheckedEndpoint {
        CheckedEndpoint { service: Name::new("shop", "pay"), port, address: [10, 0, 0, 1].into() }
    }

    #[test]
    fn the_word_before_counts_until_there_is_another_and_no_longer_than_it_is_checked() {
        let word = |port, health| wire::health::word(&endpoint(port), health, "503");
        let unhealthy = |ports: &[u16]| -> Unhealthy {
            ports.iter().map(|port| (endpoint(*port), "503".to_owned())).collect()
        };
        use Health::{Healthy, Undecided, Unhealthy as Bad};
        for (words, before, expected) in [
            (&[][..], &[80][..], &[][..]),
            (&[(80, Undecided)], &[], &[]),
            (&[(80, Undecided)], &[80, 81], &[80]),
            (&[(80, Healthy)], &[80], &[]),
            (&[(80, Bad), (81, Undecided)], &[], &[80]),
            (&[(80, Undecided), (81, Bad)], &[80], &[80, 81]),
        ] {
            let words: Vec<_> = words.iter().map(|(port, health)| word(*port, *health)).collect();
            assert_eq!(after(&words, &unhealthy(before)), unhealthy(expected), "{words:?}");
        }
    }
}
