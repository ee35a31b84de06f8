//! Whose turn it is to say who they are: handshakes are slow, dear, and come from anybody.
//!
//! A source's handshakes with one workload wait for each other, so that a flood queues behind itself and not before
//! others; what one workload and the node have under way is bounded besides. Invariant: a source that stays silent
//! holds up nobody but itself.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_core::refusal::Reason;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    limits::Limits,
    quota::{Quota, Share},
    refusal::Refusal,
};

/// Which source asks which workload ([`crate::local::Local::id`]).
type Key = (u64, IpAddr);

/// The handshakes of a node.
#[derive(Debug)]
pub(super) struct Turns {
    lanes: Mutex<HashMap<Key, Lane>>,
    by_workload: Arc<Quota<u64>>,
    all: Arc<Quota<()>>,
    limits: Limits,
}

#[derive(Debug)]
struct Lane {
    turns: Arc<Semaphore>,
    present: usize,
}

/// A handshake may go on for as long as this lives. Boxed where it is held: a connection outlives it.
#[derive(Debug)]
pub(super) struct Turn {
    _permit: OwnedSemaphorePermit,
    _of_workload: Share<u64>,
    _of_node: Share<()>,
    _present: Present,
}

/// Somebody in a lane, waiting or at work.
#[derive(Debug)]
struct Present {
    turns: Arc<Turns>,
    key: Key,
}

impl Turns {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { lanes: Mutex::default(), by_workload: Quota::new(), all: Quota::new(), limits })
    }

    /// Waits for the turn of this source at this workload; no longer than a handshake may take. Cancel-safe.
    pub(super) async fn wait(self: &Arc<Self>, workload: u64, source: IpAddr) -> Result<Box<Turn>, Refusal> {
        let limits = &self.limits;
        let full = |detail: String| Refusal::new(Reason::LimitHandshakes, detail);
        let entered = self.enter((workload, source));
        let (turns, present) =
            entered.ok_or_else(|| full(format!("{} of this source wait", limits.arrivals_per_source)))?;
        let permit = tokio::time::timeout(limits.handshake_timeout, turns.acquire_owned()).await;
        let Ok(Ok(_permit)) = permit else {
            return Err(full(format!("{} of this source are under way", limits.handshakes_per_source)));
        };
        let most = limits.handshakes_per_workload;
        let of_workload = self.by_workload.take(workload, most);
        let _of_workload =
            of_workload.ok_or_else(|| full(format!("{most} with the workload are under way")))?;
        let most = limits.handshakes_total;
        let of_node = self.all.take((), most);
        let _of_node = of_node.ok_or_else(|| full(format!("{most} of the node are under way")))?;
        Ok(Box::new(Turn { _permit, _of_workload, _of_node, _present: present }))
    }

    fn enter(self: &Arc<Self>, key: Key) -> Option<(Arc<Semaphore>, Present)> {
        let mut lanes = self.lanes();
        let lane = lanes.entry(key).or_insert_with(|| Lane {
            turns: Arc::new(Semaphore::new(self.limits.handshakes_per_source)),
            present: 0,
        });
        if lane.present >= self.limits.arrivals_per_source {
            return None;
        }
        lane.present += 1;
        Some((lane.turns.clone(), Present { turns: self.clone(), key }))
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<Key, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut lanes = self.turns.lanes();
        if let Some(lane) = lanes.get_mut(&self.key) {
            lane.present -= 1;
            if lane.present == 0 {
                lanes.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::*;

    fn turns() -> Arc<Turns> {
        Turns::new(Limits {
            handshakes_per_source: 2,
            arrivals_per_source: 3,
            handshakes_per_workload: 3,
            handshakes_total: 5,
            handshake_timeout: Duration::from_secs(60),
            ..Limits::default()
        })
    }

    fn source(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[tokio::test]
    async fn a_source_waits_for_itself_alone() {
        let turns = turns();
        let first = turns.wait(1, source(1)).await.unwrap();
        let _second = turns.wait(1, source(1)).await.unwrap();
        let mut third = Box::pin(turns.wait(1, source(1)));
        assert!((&mut third).now_or_never().is_none(), "two are under way");
        let fourth = turns.wait(1, source(1)).now_or_never().unwrap();
        assert_eq!(fourth.unwrap_err().reason, Reason::LimitHandshakes, "and one waits");
        assert!(turns.wait(1, source(2)).now_or_never().unwrap().is_ok(), "another source is served at once");
        drop(first);
        third.await.unwrap();
    }

    #[tokio::test]
    async fn workload_and_node_have_their_own_bounds_and_nothing_is_remembered() {
        let turns = turns();
        let mut held = vec![];
        for (workload, last) in [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)] {
            held.push(turns.wait(workload, source(last)).await.unwrap());
        }
        for workload in [1, 3] {
            let refused = turns.wait(workload, source(9)).await.unwrap_err();
            assert_eq!(refused.reason, Reason::LimitHandshakes);
        }
        drop(held);
        assert!(turns.lanes().is_empty());
    }
}
