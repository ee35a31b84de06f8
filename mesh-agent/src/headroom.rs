//! How near the agent is to limits that end in refused connections or workloads: told before they are hit, as metrics,
//! in the admin state, to the controller and by the log.
//!
//! Stands apart from what uses descriptors and maps: nobody who opens or enters one has to count.

use std::{fs, sync::Arc, time::Duration};

use nix::sys::resource::{Resource, getrlimit};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    health::{Fill, Health},
    metrics::Metrics,
    stalled::Stalled,
};

/// How often is looked: counting descriptors reads a directory with an entry for each, counting a map all its keys.
const LOOK: Duration = Duration::from_secs(10);
const RAISE_FILES: &str = "connections are refused beyond it; raise LimitNOFILE of the agent's service";
const RAISE_STALLED: &str = "connections that stall are ended beyond it; raise --stalled-memory, or find who does not read: \
                             meshctl connections";

/// Where it is told.
#[derive(Debug, Clone)]
pub struct Headroom {
    metrics: Arc<Metrics>,
    health: Health,
    /// When maps are counted again.
    due: Option<Instant>,
}

impl Headroom {
    /// Told here and there; nothing was counted yet.
    pub fn new(metrics: Arc<Metrics>, health: Health) -> Self {
        Self { metrics, health, due: None }
    }

    /// Counts descriptors, and what waits for readers, until it is told to stop.
    pub async fn watch(self, stalled: Arc<Stalled>, stop: CancellationToken) {
        let mut timer = interval(LOOK);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Cancel-safe: a tick holds nothing.
            tokio::select! {
                () = stop.cancelled() => return,
                _ = timer.tick() => {}
            }
            let (entries, limit) = (stalled.waiting() as u64, stalled.most() as u64);
            self.metrics.stalled_buffers(entries, limit);
            self.health.filled(&[Fill { what: "stalled_buffers", entries, limit, cure: RAISE_STALLED }]);
            let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else { continue };
            let Ok(open) = fs::read_dir("/proc/self/fd").map(|all| all.count() as u64) else { continue };
            self.metrics.open_files(open, limit);
            self.health.filled(&[Fill { what: "open_files", entries: open, limit, cure: RAISE_FILES }]);
        }
    }

    /// Takes the fill of the kernel programs' maps, if it is time to count them again.
    pub fn maps(&mut self, count: impl FnOnce() -> Vec<Fill>) {
        let now = Instant::now();
        if self.due.is_some_and(|due| now < due) {
            return;
        }
        self.due = Some(now + LOOK);
        let fills = count();
        for fill in &fills {
            self.metrics.kernel_map(fill.what, fill.entries, fill.limit);
        }
        self.health.filled(&fills);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn open_files_and_their_limit_are_counted() {
        let (metrics, registry) = Metrics::new();
        let stop = CancellationToken::new();
        let health = Health::default();
        let told = health.subscribe();
        let watching =
            tokio::spawn(Headroom::new(metrics, health).watch(Arc::new(Stalled::new(7)), stop.clone()));
        let counted = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            let value = |name: &str| {
                text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<i64>().ok()).unwrap_or(0)
            };
            (value("nodemesh_open_files "), value("nodemesh_open_files_limit "))
        };
        while counted().0 == 0 {
            tokio::task::yield_now().await;
        }
        assert!(counted().0 > 2 && counted().1 > counted().0, "{:?}", counted());
        assert!(told.borrow().fills["open_files"].entries > 2);
        assert_eq!(
            (told.borrow().fills["stalled_buffers"].entries, told.borrow().fills["stalled_buffers"].limit),
            (0, 7)
        );
        stop.cancel();
        watching.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn maps_are_counted_again_when_it_is_time() {
        let (metrics, _) = Metrics::new();
        let health = Health::default();
        let told = health.subscribe();
        let mut headroom = Headroom::new(metrics, health);
        let fill = |entries| vec![Fill { what: "kernel_map_x", entries, limit: 100, cure: "split" }];
        headroom.maps(|| fill(1));
        headroom.maps(|| unreachable!("it is not time yet"));
        tokio::time::advance(LOOK).await;
        headroom.maps(|| fill(81));
        assert!(told.borrow().problems()[0].contains("kernel_map_x are at 81 %"));
    }
}
