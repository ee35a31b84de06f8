//! The control plane under simulation: the controller's and the agents' real code, over a network, a time and chances
//! that a seed decides, through restarts, partitions, moves, rotations and clocks that are wrong.
//!
//! Every seed is one run of an hour that takes well under a second. A run that fails prints its seed, what happened in
//! it, and how to run it again. The seed decides events, delays, clocks and pauses; what happens within the same
//! moment tokio orders by chances of its own, so that a failure of that kind may take several runs to come back.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod chances;
mod mesh;
mod net;
mod run;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

/// Runs of a test run.
const SEEDS: u64 = 100;

/// The one seed to run, from the environment; as many as there are by default otherwise.
fn seeds() -> std::ops::Range<u64> {
    match std::env::var("NODEMESH_SEED") {
        Ok(text) => {
            let seed = text.parse().expect("NODEMESH_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..SEEDS,
    }
}

#[test]
fn views_and_certificates_stay_in_order_whatever_fails_in_between() {
    let (seeds, threads) = (seeds(), thread::available_parallelism().map_or(2, usize::from));
    let next = AtomicU64::new(seeds.start);
    let failed: Vec<u64> = thread::scope(|scope| {
        let work = || {
            let mut failed = vec![];
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds.end {
                    return failed;
                }
                let story = run::Story::default();
                if catch_unwind(AssertUnwindSafe(|| run::hour(seed, &story))).is_err() {
                    eprintln!("──── seed {seed} failed; what happened:\n{story}");
                    eprintln!("again: NODEMESH_SEED={seed} cargo test -p mesh-tests --test simulation");
                    failed.push(seed);
                }
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "seeds that failed: {failed:?}");
}
