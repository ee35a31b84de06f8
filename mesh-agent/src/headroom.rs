//! How near the agent is to limits of the machine that end in refused connections: told before they are hit.
//!
//! Stands apart from what uses the descriptors: nobody who opens one has to count.

use std::{fs, sync::Arc, time::Duration};

use nix::sys::resource::{Resource, getrlimit};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// How often is looked: counting reads a directory with an entry for every descriptor.
const LOOK: Duration = Duration::from_secs(10);
/// From this part of a limit on, the log warns.
const WARN_PERCENT: u64 = 80;

/// Counts until it is told to stop.
pub async fn watch(metrics: Arc<Metrics>, stop: CancellationToken) {
    let mut timer = interval(LOOK);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut warned = false;
    loop {
        // Cancel-safe: a tick holds nothing.
        tokio::select! {
            () = stop.cancelled() => return,
            _ = timer.tick() => {}
        }
        let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else { continue };
        let Ok(open) = fs::read_dir("/proc/self/fd").map(|all| all.count() as u64) else { continue };
        metrics.open_files(open, limit);
        let near = is_near(open, limit);
        if near && !warned {
            tracing::warn!(
                open,
                limit,
                "open files are near their limit: raise LimitNOFILE of the agent's service"
            );
        }
        warned = near;
    }
}

fn is_near(used: u64, limit: u64) -> bool {
    used >= limit / 100 * WARN_PERCENT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warning_comes_before_the_limit() {
        assert!(!is_near(799, 1000) && is_near(800, 1000));
        assert!(!is_near(1_000_000, u64::MAX));
    }

    #[tokio::test]
    async fn open_files_and_their_limit_are_counted() {
        let (metrics, registry) = Metrics::new();
        let stop = CancellationToken::new();
        let watching = tokio::spawn(watch(metrics, stop.clone()));
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
        stop.cancel();
        watching.await.unwrap();
    }
}
