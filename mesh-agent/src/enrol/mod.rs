//! Keeps the enrolled workloads of this node captured: the reconcile loop between the view and the kernel.
//!
//! For every workload: find its namespace, open listeners, route, attach, guard. Then, again and again, *prove* that
//! all of it is still there and repair what is not. What the loop believes is never taken for what the kernel has.

pub mod discover;
mod enrolled;
mod grace;
pub mod hold;
mod sandbox;
pub mod uninstall;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    model::{Mode, Name, Workload},
    view::Snapshot,
};
use mesh_ebpf::abi::{KernelReason, MAX_WORKLOADS};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::{
    discover::Census,
    enrolled::{Enrolled, Incomplete},
    hold::Holds,
};
use crate::{
    capture::{Kernel, Maps, Pins, is_hold},
    checks::Checks,
    connection::Node,
    headroom::Headroom,
    identity::store::Identities,
    metrics::Metrics,
    net::socket,
    run_dir::RunDir,
    threads::Threads,
    view::report::{Enrolment, ReportHandle},
};

/// How often everything is proven. The promise is repair within 5 s; a removal is seen after at most this.
const PROVE_INTERVAL: Duration = Duration::from_secs(1);
/// From this many workloads at once on, the kernel is asked for expedited grace periods while they are enrolled.
const MANY: usize = 8;
/// How often a workload that was not found, or lacks its certificate, is looked for.
const SEARCH_INTERVAL: Duration = Duration::from_millis(100);

/// What the loop works with.
#[derive(Debug)]
pub struct Enroller {
    /// Programs.
    pub kernel: Kernel,
    /// Maps.
    pub maps: Maps,
    /// What keeps the maps pinned.
    pub pins: Pins,
    /// What connections need.
    pub node: Node,
    /// Certificates: nothing is captured before its certificate is there.
    pub identities: Arc<Identities>,
    /// Where connections run.
    pub threads: Threads,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How full the maps are is told here.
    pub headroom: Headroom,
    /// Where the controller and the admin API hear of it.
    pub reports: ReportHandle,
    /// Whether the captured workloads are well.
    pub checks: Checks,
    /// New pods, which are held until they are captured; `None` where nothing is held.
    pub holds: Option<Holds>,
    /// Where settings of namespaces from before enrolment are kept.
    pub run_dir: PathBuf,
    /// Cancelled by the loop when it has gone through all workloads once: new connections reach this agent.
    pub in_force: CancellationToken,
}

/// What a loop that stands still leaves in place: its listeners, for as long as this lives.
#[derive(Debug)]
pub struct Held {
    _enrolled: BTreeMap<Name, Enrolled>,
}

impl Enroller {
    /// Runs until it is told to stand down. Ends without detaching anything: the guard has the last word until the
    /// next agent.
    pub async fn run(
        mut self,
        mut view: watch::Receiver<Option<Arc<Snapshot>>>,
        stand_down: CancellationToken,
    ) -> Held {
        let mut enrolled: BTreeMap<Name, Enrolled> = BTreeMap::new();
        // The kernel counts on while no agent runs; the first look takes that in.
        let mut counted: HashMap<KernelReason, u64> = HashMap::new();
        let mut last_proof = tokio::time::Instant::now();
        let mut complete = false;
        // The view whose addresses are the captured destinations: with thousands of them, not to be gone through at
        // every turn.
        let mut synced: Option<Arc<Snapshot>> = None;
        loop {
            let snapshot = view.borrow_and_update().clone();
            if let Some(snapshot) = snapshot {
                let prove = last_proof.elapsed() >= PROVE_INTERVAL;
                if prove {
                    last_proof = tokio::time::Instant::now();
                }
                if !synced.as_ref().is_some_and(|last| Arc::ptr_eq(last, &snapshot))
                    && self.sync_destinations(&snapshot)
                {
                    synced = Some(snapshot.clone());
                }
                self.reconcile(&snapshot, &mut enrolled, prove).await;
                complete = enrolled.len() == snapshot.local().count();
                self.is_in_force();
            }
            let latest = view.borrow().clone();
            self.let_go(latest.as_deref(), &enrolled).await;
            self.count_refusals(&mut counted);
            let maps = &self.maps;
            self.headroom.maps(|| maps.fills());
            let settled_down = complete && !self.holds.as_ref().is_some_and(Holds::any);
            let wait = if settled_down { PROVE_INTERVAL } else { SEARCH_INTERVAL };
            tokio::select! {
                // All branches are cancel-safe.
                () = stand_down.cancelled() => break,
                more = Holds::more(self.holds.as_mut()) => if more.is_err() {
                    tracing::error!("nothing holds new pods any more: the agent ends, so that another one does");
                    break;
                },
                changed = view.changed() => if changed.is_err() { break },
                () = tokio::time::sleep(wait) => {}
            }
        }
        if let Some(holds) = self.holds.take() {
            holds.end().await;
        }
        Held { _enrolled: enrolled }
    }

    fn is_in_force(&self) {
        if self.in_force.is_cancelled() {
            return;
        }
        self.in_force.cancel();
        let told = RunDir::open(&self.run_dir).and_then(|run_dir| match &self.holds {
            Some(holds) => holds.tell(&run_dir),
            None => run_dir.remove(hold::MARK),
        });
        if let Err(error) = told {
            tracing::error!(%error, "cannot say whether new pods are held: those that wait for it do not start");
        }
    }

    async fn let_go(&self, view: Option<&Snapshot>, enrolled: &BTreeMap<Name, Enrolled>) {
        let Some(holds) = self.holds.as_ref().filter(|holds| holds.any()) else { return };
        let captured = enrolled.values().map(|present| present.node_ifindex).collect();
        tell_failed(holds.resolve(view, &captured, &self.metrics).await);
    }

    /// Lets go of a workload that was captured just now: others may take long.
    async fn let_go_of(&self, captured: &Enrolled) {
        if let Some(holds) = &self.holds {
            tell_failed(holds.captured(captured.node_ifindex, &self.metrics).await);
        }
    }

    async fn reconcile(&mut self, view: &Snapshot, enrolled: &mut BTreeMap<Name, Enrolled>, prove: bool) {
        let wanted: BTreeMap<&Name, &Arc<Workload>> =
            view.local().map(|workload| (&workload.name, workload)).collect();
        let stays = |(name, present): &(&Name, &Enrolled)| {
            wanted.get(name).is_some_and(|workload| present.is(workload))
        };
        let gone: Vec<Name> =
            enrolled.iter().filter(|entry| !stays(entry)).map(|(name, _)| name.clone()).collect();
        for name in gone {
            if let Some(old) = enrolled.remove(&name) {
                self.unenrol(old).await;
            }
        }
        for (name, workload) in &wanted {
            self.reports.is_pod(name, &workload.uid);
        }
        self.sweep(&wanted, enrolled);
        for (name, present) in enrolled.iter_mut() {
            if let Some(workload) = wanted.get(name) {
                self.follow(present, workload);
                self.checks.follow(present.local(), &workload.checks);
            }
        }
        if prove {
            self.prove(enrolled).await;
        }
        self.enrol_missing(view, &wanted, enrolled).await;
        self.publish(&wanted, enrolled);
    }

    /// Makes the view's addresses the captured destinations; whether that worked.
    fn sync_destinations(&mut self, view: &Snapshot) -> bool {
        let wanted: HashSet<IpAddr> = view.captured_addresses().collect();
        // Where the view has not everything, the rest of the mesh is captured by the blocks that it is in.
        let blocks = view.demand().map_or(&[][..], |demand| &demand.blocks);
        match self.maps.set_destinations(&wanted, blocks) {
            Ok(false) => true,
            Ok(true) => {
                let addresses = wanted.len();
                tracing::warn!(
                    addresses,
                    "more than the map of destinations holds: capturing every destination"
                );
                true
            }
            Err(error) => {
                tracing::error!(%error, "cannot write the map of destinations; what was in it stays");
                false
            }
        }
    }

    /// The mode of a workload may change while it is enrolled.
    fn follow(&mut self, present: &mut Enrolled, workload: &Workload) {
        let strict = workload.mode == Mode::Strict;
        if present.is_strict() != strict
            && let Err(error) = present.set_strict(&mut self.maps, strict)
        {
            tracing::error!(workload = %workload.name, %error, "cannot change the guard's mode");
        }
    }

    /// Removes what earlier agents left for workloads that are not wanted any more.
    fn sweep(&mut self, wanted: &BTreeMap<&Name, &Arc<Workload>>, enrolled: &BTreeMap<Name, Enrolled>) {
        let wanted_owners: HashSet<String> = wanted.keys().map(|name| enrolled::owner(name)).collect();
        // Where there are holds they see to their own, also to those of an earlier agent.
        let stays = |owner: &String| wanted_owners.contains(owner) || self.holds.is_some() && is_hold(owner);
        let owners = self.kernel.owners().unwrap_or_default();
        for owner in owners.into_iter().filter(|owner| !stays(owner)).collect::<Vec<_>>() {
            if let Err(error) = self.kernel.detach(&owner) {
                tracing::error!(%owner, %error, "cannot remove the programs of a workload that is gone");
            }
        }
        // A new agent keeps old guards until it has enrolled their workloads anew.
        if wanted.len() == enrolled.len() {
            let guarded: BTreeSet<u32> = enrolled.values().map(|e| e.node_ifindex).collect();
            for ifindex in self.maps.guarded() {
                if !guarded.contains(&ifindex) {
                    self.maps.unguard(ifindex);
                }
            }
        }
    }

    async fn prove(&mut self, enrolled: &mut BTreeMap<Name, Enrolled>) {
        match self.pins.ensure() {
            Ok(repaired) => (0..repaired).for_each(|_| self.metrics.repaired("pin")),
            Err(error) => tracing::error!(error = format!("{error:#}"), "cannot pin the maps again"),
        }
        let mut lost = Vec::new();
        for (name, present) in enrolled.iter_mut() {
            match present.prove(&mut self.kernel, &mut self.maps, &self.node, &self.threads).await {
                Ok(repaired) => {
                    // Repaired is not yet proven: it counts as unprotected until the next proof finds it whole.
                    present.whole = repaired.is_empty();
                    for what in repaired {
                        tracing::warn!(workload = %name, what, "capture was tampered with; repaired");
                        self.metrics.repaired(what);
                    }
                }
                Err(error) if lacks_descriptors(&error) => {
                    present.whole = false;
                    let error = format!("{error:#}");
                    tracing::warn!(workload = %name, error, "cannot look: raise LimitNOFILE of the agent's service");
                }
                Err(error) => {
                    tracing::warn!(workload = %name, error = format!("{error:#}"), "lost; looking for it anew");
                    lost.push(name.clone());
                }
            }
        }
        for name in lost {
            self.metrics.repaired("namespace");
            if let Some(old) = enrolled.remove(&name) {
                self.end(&old).await;
                self.reports.set(&name, Enrolment::Pending, "its namespace, or its address there, is gone");
            }
        }
    }

    async fn enrol_missing(
        &mut self,
        view: &Snapshot,
        wanted: &BTreeMap<&Name, &Arc<Workload>>,
        enrolled: &mut BTreeMap<Name, Enrolled>,
    ) {
        let missing: Vec<&Arc<Workload>> = wanted
            .iter()
            .filter(|(name, _)| !enrolled.contains_key(**name))
            .map(|(_, workload)| *workload)
            .collect();
        if missing.is_empty() {
            return;
        }
        let census = match Census::take(missing.iter().map(AsRef::as_ref)) {
            Ok(census) => census,
            Err(error) => {
                tracing::error!(%error, "cannot look at the node's network namespaces");
                return;
            }
        };
        let local: HashSet<IpAddr> = wanted.values().flat_map(|w| w.addresses.iter().copied()).collect();
        let _quick = (missing.len() > MANY).then(grace::Expedited::begin);
        for workload in missing {
            let name = &workload.name;
            if enrolled.len() >= MAX_WORKLOADS as usize {
                self.failed(name, &format!("this node has {MAX_WORKLOADS} enrolled workloads, its limit"));
                continue;
            }
            // The kernel programs know listeners by address: two workloads cannot have the same one, and the one that
            // has it still is let go of when its namespace no longer has it.
            let holds = |other: &&Enrolled| other.addresses().iter().any(|a| workload.addresses.contains(a));
            if let Some(other) = enrolled.values().find(holds) {
                let reason = format!("an address of it is still that of {}", other.name());
                self.reports.set(name, Enrolment::Pending, &reason);
                continue;
            }
            match Enrolled::new(workload, &census, &local, view, self).await {
                Ok(new) => {
                    tracing::info!(workload = %name, "enrolled");
                    self.let_go_of(&new).await;
                    // Before it is said to be enrolled: from then on what is not spoken of counts as not checked.
                    self.checks.follow(new.local(), &workload.checks);
                    enrolled.insert(name.clone(), new);
                    self.reports.set(name, Enrolment::Enrolled, "");
                }
                Err(Incomplete::Waiting(reason)) => {
                    self.reports.set(name, Enrolment::Pending, &reason);
                }
                Err(Incomplete::Failed(error)) => self.failed(name, &format!("{error:#}")),
            }
        }
    }

    fn failed(&self, name: &Name, reason: &str) {
        if self.reports.set(name, Enrolment::Failed, reason) {
            tracing::error!(workload = %name, reason, "cannot enrol");
        }
    }

    async fn unenrol(&mut self, old: Enrolled) {
        let name = old.name().clone();
        tracing::info!(workload = %name, "no longer enrolled");
        self.end(&old).await;
        old.remove(&mut self.kernel, &mut self.maps, &self.run_dir).await;
        self.reports.set(&name, Enrolment::Gone, "");
    }

    /// Ends what goes through a workload's capture, and waits for that a while.
    async fn end(&mut self, old: &Enrolled) {
        old.stop_listening(&mut self.maps);
        old.leave(&self.node).await;
    }

    fn publish(&mut self, wanted: &BTreeMap<&Name, &Arc<Workload>>, enrolled: &BTreeMap<Name, Enrolled>) {
        self.checks.retain(|name| enrolled.contains_key(name));
        for name in self.reports.all().keys().filter(|name| !wanted.contains_key(name)) {
            self.reports.set(name, Enrolment::Gone, "");
        }
        self.metrics.enrolled(enrolled.len());
        let whole = enrolled.values().filter(|present| present.whole).count();
        self.metrics.unprotected(wanted.len() - whole);
    }

    fn count_refusals(&self, counted: &mut HashMap<KernelReason, u64>) {
        for (reason, total) in self.maps.refused() {
            let before = counted.insert(reason, total).unwrap_or(0);
            self.metrics.kernel_refused(reason.label(), total.saturating_sub(before));
        }
    }
}

fn tell_failed(let_go: anyhow::Result<()>) {
    if let Err(error) = let_go {
        tracing::error!(
            error = format!("{error:#}"),
            "cannot let go of a new pod before its hold ends by itself"
        );
    }
}

/// Whether something could not be looked at for want of descriptors, which says nothing of the workload.
fn lacks_descriptors(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref()).any(socket::is_shortage)
}
