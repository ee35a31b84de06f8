//! Health checks of this node's workloads, each by a task of its own, from within the workload's namespace: what is found
//! is told to the controller ([`ReportHandle`]), which tells whoever sends anything there.
//!
//! They run where connections do, so that whoever is slow to answer holds up nothing of the control side.
//!
//! An endpoint is checked by one agent, its own, whatever the number of its clients' nodes; and as the agent's sockets
//! are inside, checks meet neither policies nor capture. A check that changes begins anew, undecided, and so does every
//! check of an agent that has just started: what was said before stands until there is something else to say.
//!
//! | module | what |
//! |---|---|
//! | [`probe`] | one check: what is asked, and what counts as an answer |

pub mod probe;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{
    health::{Health, Tally},
    model::{
        Name,
        health::{Check, CheckedEndpoint},
    },
};
use tokio::{runtime::Handle, sync::Semaphore, time};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::probe::ProbeError;
use crate::{
    local::Local,
    metrics::Metrics,
    view::report::{HealthWord, ReportHandle},
};

/// Most checks of a node's workloads; what is beyond is not checked, and counts as healthy. Twice the workloads that a node
/// may have, as a workload seldom serves more than two services.
pub const MAX_CHECKS: usize = 2048;
/// Checks that are under way at once: more wait, so that a node whose workloads all stand still has that many sockets of
/// ours and no more.
const AT_ONCE: usize = 128;
/// Within this time after a workload came, or a check, it is first done: evenly spread, so that not all of a node are done
/// in the same moment.
const FIRST_WITHIN: Duration = Duration::from_secs(1);

/// The checks that are done.
#[derive(Debug)]
pub struct Checks {
    runtime: Handle,
    reports: ReportHandle,
    metrics: Arc<Metrics>,
    permits: Arc<Semaphore>,
    of: BTreeMap<Name, OfWorkload>,
    /// The limit was said to be hit.
    full: bool,
}

/// Those of one workload.
#[derive(Debug)]
struct OfWorkload {
    local: u64,
    wanted: Vec<Check>,
    /// Some of these are not done, as the node has too many.
    lacks_room: bool,
    running: BTreeMap<CheckedEndpoint, (Check, DropGuard)>,
}

impl Checks {
    /// None yet. They will run there.
    pub fn new(runtime: Handle, reports: ReportHandle, metrics: Arc<Metrics>) -> Self {
        let permits = Arc::new(Semaphore::new(AT_ONCE));
        Self { runtime, reports, metrics, permits, of: BTreeMap::new(), full: false }
    }

    /// From now on these are the checks of a workload: those that are as they were go on.
    pub fn follow(&mut self, local: &Arc<Local>, checks: &[Check]) {
        let is_full = self.len() >= MAX_CHECKS;
        let same =
            |it: &OfWorkload| it.local == local.id() && it.wanted == checks && (is_full || !it.lacks_room);
        if self.of.get(&local.name).map_or(checks.is_empty(), same) {
            return;
        }
        let before = self.of.remove(&local.name).filter(|it| it.local == local.id());
        let mut before = before.map(|it| it.running).unwrap_or_default();
        let mut room = MAX_CHECKS.saturating_sub(self.len());
        let (mut running, mut lacks_room) = (BTreeMap::new(), false);
        for check in checks.iter().filter(|check| local.addresses.contains(&check.of.address)) {
            if running.contains_key(&check.of) {
                continue;
            }
            if !self.has_room(&mut room, &local.name) {
                lacks_room = true;
                continue;
            }
            let going_on = before.remove(&check.of).filter(|(it, _)| it == check);
            let guard = going_on.map_or_else(|| self.start(local, check), |(_, guard)| guard);
            running.insert(check.of.clone(), (check.clone(), guard));
        }
        self.reports.checked(&local.name, running.keys().cloned());
        if !checks.is_empty() {
            let (local_id, wanted) = (local.id(), checks.to_vec());
            let of = OfWorkload { local: local_id, wanted, running, lacks_room };
            self.of.insert(local.name.clone(), of);
        }
    }

    /// Only these workloads are there still. Of the others it is said before that they are not enrolled any more: of an
    /// enrolled one, that nothing is spoken of would mean that nothing is checked.
    pub fn retain(&mut self, is_there: impl Fn(&Name) -> bool) {
        self.of.retain(|name, _| {
            let stays = is_there(name);
            if !stays {
                self.reports.checked(name, std::iter::empty());
            }
            stays
        });
    }

    fn len(&self) -> usize {
        self.of.values().map(|it| it.running.len()).sum()
    }

    fn has_room(&mut self, room: &mut usize, workload: &Name) -> bool {
        let has = *room > 0;
        *room = room.saturating_sub(1);
        if !has {
            self.metrics.limit_hit("health_checks");
            if !std::mem::replace(&mut self.full, true) {
                tracing::warn!(%workload, "this node has {MAX_CHECKS} health checks, its limit: more are not done");
            }
        }
        has
    }

    fn start(&self, local: &Arc<Local>, check: &Check) -> DropGuard {
        let stop = CancellationToken::new();
        let run = Run {
            check: check.clone(),
            local: local.clone(),
            reports: self.reports.clone(),
            permits: self.permits.clone(),
            unhealthy: Unhealthy::new(&check.of.service, self.metrics.clone()),
        };
        let stopped = stop.clone();
        self.runtime.spawn(async move {
            // Cancel-safe: what is dropped is a check whose outcome nobody wants.
            tokio::select! {
                () = stopped.cancelled_owned() => {}
                () = run.run() => {}
            }
        });
        stop.drop_guard()
    }
}

/// One check, again and again.
struct Run {
    check: Check,
    local: Arc<Local>,
    reports: ReportHandle,
    permits: Arc<Semaphore>,
    unhealthy: Unhealthy,
}

impl Run {
    async fn run(mut self) {
        let pace = self.check.pace;
        let spread = pace.interval.min(FIRST_WITHIN);
        let mut next = Instant::now() + spread.mul_f64(rand::random::<f64>());
        let mut tally = Tally::default();
        loop {
            time::sleep_until(next.into()).await;
            let Ok(permit) = self.permits.acquire().await else { return };
            // From its beginning to the next one's: what takes long is not asked more often for that.
            next = Instant::now() + pace.interval;
            let outcome = probe::ask(&self.local.namespace, &self.check).await;
            drop(permit);
            if outcome.as_ref().is_err_and(ProbeError::is_ours) {
                // Whoever was to be asked: it says nothing of him.
                self.unhealthy.metrics.limit_hit("open_files");
                continue;
            }
            self.unhealthy.metrics.health_checked(&self.check.of.service, outcome.is_ok());
            if let Some(health) = tally.heard(outcome.is_ok(), &pace) {
                self.tell(health, outcome.err().map(|it| it.to_string()).unwrap_or_default());
            }
        }
    }

    fn tell(&mut self, health: Health, reason: String) {
        let (workload, endpoint) = (&self.local.name, &self.check.of);
        match health {
            Health::Unhealthy => tracing::warn!(%workload, %endpoint, reason, "unhealthy"),
            _ => tracing::info!(%workload, %endpoint, "healthy"),
        }
        self.unhealthy.count(health == Health::Unhealthy);
        self.reports.health(workload, endpoint, HealthWord { health, reason });
    }
}

/// Counts as an unhealthy endpoint for as long as it is one and is checked.
struct Unhealthy {
    service: Name,
    metrics: Arc<Metrics>,
    counted: bool,
}

impl Unhealthy {
    fn new(service: &Name, metrics: Arc<Metrics>) -> Self {
        Self { service: service.clone(), metrics, counted: false }
    }

    fn count(&mut self, is_unhealthy: bool) {
        if self.counted != is_unhealthy {
            self.metrics.endpoint_unhealthy(&self.service, is_unhealthy);
        }
        self.counted = is_unhealthy;
    }
}

impl Drop for Unhealthy {
    fn drop(&mut self) {
        self.count(false);
    }
}
