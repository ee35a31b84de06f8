//! Stopping without cutting: no new leases, let what runs finish, cut at the deadline.
//!
//! Every task of the data path is spawned here, so that none outlives the agent unseen.

use std::{future::Future, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFuture},
    task::TaskTracker,
};

/// How long tasks may take to record their end once they were cut.
const CUT_WAIT: Duration = Duration::from_secs(2);

/// The one owner of the data path's tasks; clones are handles on the same.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    tracker: TaskTracker,
    draining: CancellationToken,
    cut: CancellationToken,
}

impl Drain {
    /// Nothing runs, nothing is asked to stop.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs a tracked task.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        self.tracker.spawn(task)
    }

    /// Done when draining begins: accept loops stop, idle tunnels are closed. Cancel-safe.
    pub fn draining(&self) -> WaitForCancellationFuture<'_> {
        self.draining.cancelled()
    }

    /// Whether draining has begun.
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Done when the deadline has passed: what still runs ends now. Cancel-safe.
    pub fn cut(&self) -> WaitForCancellationFuture<'_> {
        self.cut.cancelled()
    }

    /// Tasks that run.
    pub fn tasks(&self) -> usize {
        self.tracker.len()
    }

    /// Asks everything to finish: a successor takes what is new.
    pub fn begin(&self) {
        self.draining.cancel();
    }

    /// Asks everything to finish, cuts what has not by the deadline, and returns how many tasks that were.
    pub async fn drain(&self, deadline: Duration) -> usize {
        self.begin();
        self.tracker.close();
        if tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok() {
            return 0;
        }
        let late = self.tracker.len();
        self.cut.cancel();
        if tokio::time::timeout(CUT_WAIT, self.tracker.wait()).await.is_err() {
            tracing::warn!(tasks = self.tracker.len(), "tasks did not end after the drain deadline");
        }
        late
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_finishes_in_time_is_not_cut_and_what_does_not_is() {
        let drain = Drain::new();
        let polite = drain.clone();
        drain.spawn(async move { polite.draining().await });
        assert_eq!(drain.drain(Duration::from_secs(5)).await, 0);

        let drain = Drain::new();
        let stubborn = drain.clone();
        drain.spawn(async move { stubborn.cut().await });
        assert_eq!(drain.drain(Duration::ZERO).await, 1);
        assert_eq!(drain.tasks(), 0);
    }
}
