//! Holds what leaves a new pod until it is captured, or known to be outside of the mesh.
//!
//! A veth is there before its pod runs anything, and a pod runs before the cluster's API says that it has an address. So
//! every new veth is held from its creation on, at the node's end. A packet that is dropped there is sent again by its
//! sender, and goes its right way then: a connection that was opened too early is late, not lost.
//!
//! A thread of its own holds, at once and whatever else is being done; the enrolment loop lets go.
//!
//! Invariant: every hold has an end that the kernel knows, also when the agent does not live to say it. That of a strict
//! pod is put off for as long as the agent lives and has not captured it: what left it before would be refused by its guard,
//! or by nobody.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use mesh_core::{model::Mode, view::Snapshot};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use tokio::{runtime::Builder, sync::watch};
use tokio_util::sync::CancellationToken;

use super::{
    discover::number_of,
    sandbox::{self, Sandbox},
};
use crate::{
    capture::Holder,
    metrics::{HoldOutcome, Metrics},
    net::{
        netlink::{LinkChanges, Netlink},
        netns::Namespace,
    },
    run_dir::{RunDir, RunDirError},
};

/// A file of the run directory, there once new veths are held and there is a view to say what becomes of them. It goes with
/// the run directory's tmpfs when the machine does: a pod that mounts it is not started by a node that boots before its
/// agent holds it.
pub const MARK: &str = "new-pods-are-held";

/// What new veths are compared with: those that were there before.
#[derive(Debug)]
pub struct Before(HashSet<u32>);

/// The veths of new pods that are held.
#[derive(Debug)]
pub struct Holds {
    shared: Arc<Shared>,
    /// Changes when something new is held; closed when the thread has ended.
    more: watch::Receiver<()>,
    stop: CancellationToken,
}

/// What the thread that holds and the loop that lets go have in common.
#[derive(Debug)]
struct Shared {
    limit: Duration,
    /// Those that are held, and since when: the thread enters them, the loop takes them out.
    held: Mutex<BTreeMap<u32, Instant>>,
    /// One veth at a time: who lets go waits for one hold at most, and is next.
    holder: tokio::sync::Mutex<Holder>,
}

/// The thread that holds has ended without being told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended;

/// The node's end of a veth whose other end is in another namespace.
#[derive(Debug, Clone, Copy)]
struct Veth {
    index: u32,
    /// The number by which the node's namespace knows the other.
    peers_namespace: i32,
}

/// What a veth is held for.
struct Situation<'a> {
    /// The pods of this node by uid; those that are meant to be captured have a mode.
    pods: &'a HashMap<&'a str, Option<Mode>>,
    /// Where pods are, by the numbers of their namespaces.
    places: &'a HashMap<i32, String>,
    /// Veths of captured workloads.
    captured: &'a HashSet<u32>,
}

/// What becomes of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    /// It ends.
    End(HoldOutcome),
    /// It goes on until its limit.
    Wait,
    /// It goes on, whatever its limit.
    PutOff,
}

impl Before {
    /// Those that are there now.
    pub fn now() -> io::Result<Self> {
        Ok(Self(indices(&veths()?)))
    }
}

impl Holds {
    /// Starts the thread that holds every veth which was not there before, from its creation on. `limit`: how long a
    /// hold may last. Goes on with what an earlier agent held.
    pub fn start(limit: Duration, holder: Holder, before: Before) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { limit, held: Mutex::default(), holder: tokio::sync::Mutex::new(holder) });
        let (tell, more) = watch::channel(());
        let stop = CancellationToken::new();
        let thread = Thread { shared: shared.clone(), known: before.0, tell, stop: stop.clone() };
        thread::Builder::new().name("hold".to_owned()).spawn(move || thread.run())?;
        Ok(Self { shared, more, stop })
    }

    /// Ends the thread, and waits for that. What is held stays held.
    pub(super) async fn end(mut self) {
        self.stop.cancel();
        while self.more.changed().await.is_ok() {}
    }

    /// Done when something new is held; never without holds. Cancel-safe.
    pub(super) async fn more(holds: Option<&mut Self>) -> Result<(), Ended> {
        let Some(holds) = holds else { return std::future::pending().await };
        holds.more.changed().await.map_err(|_| Ended)
    }

    /// Whether something is held.
    pub(super) fn any(&self) -> bool {
        !self.shared.held().is_empty()
    }

    /// Says that what is new is held.
    pub(super) fn tell(&self, run_dir: &RunDir) -> Result<(), RunDirError> {
        run_dir.write(MARK, b"")
    }

    /// Lets go of a veth whose workload is captured now, if it is held.
    pub(super) async fn captured(&self, index: u32, metrics: &Metrics) -> anyhow::Result<()> {
        let is_held = self.shared.held().contains_key(&index);
        if is_held { self.let_go(&[(index, HoldOutcome::Captured)], metrics).await } else { Ok(()) }
    }

    /// Lets go of what needs to be held no longer.
    pub(super) async fn resolve(
        &self,
        view: Option<&Snapshot>,
        captured: &HashSet<u32>,
        metrics: &Metrics,
    ) -> anyhow::Result<()> {
        let held = self.shared.held().clone();
        let there: HashMap<u32, Veth> = veths()?.into_iter().map(|veth| (veth.index, veth)).collect();
        let places = places()?;
        let pods: HashMap<&str, Option<Mode>> = view
            .into_iter()
            .flat_map(Snapshot::workloads)
            .filter(|workload| !workload.uid.is_empty())
            .map(|workload| (workload.uid.as_str(), workload.enrolled.then_some(workload.mode)))
            .collect();
        let situation = Situation { pods: &pods, places: &places, captured };
        let (mut ended, mut put_off) = (Vec::new(), Vec::new());
        for (index, since) in &held {
            let late = since.elapsed() >= self.shared.limit;
            match situation.decide(there.get(index).copied(), late) {
                Decision::End(outcome) => ended.push((*index, outcome)),
                Decision::Wait => {}
                Decision::PutOff => put_off.push(*index),
            }
        }
        if !put_off.is_empty() {
            let mut holder = self.shared.holder.lock().await;
            put_off.iter().try_for_each(|index| holder.put_off(*index, self.shared.limit))?;
        }
        if ended.is_empty() { Ok(()) } else { self.let_go(&ended, metrics).await }
    }

    async fn let_go(&self, ended: &[(u32, HoldOutcome)], metrics: &Metrics) -> anyhow::Result<()> {
        // A hold that is entered is in place once the holder is to be had.
        let mut holder = self.shared.holder.lock().await;
        for (index, outcome) in ended {
            holder.let_go(*index)?;
            let held_ms = self.shared.held().remove(index).map(|since| since.elapsed().as_millis());
            if *outcome == HoldOutcome::Limit {
                let seconds = self.shared.limit.as_secs();
                tracing::warn!(
                    ifindex = index,
                    "not known to be captured or outside after {seconds} s: no longer held"
                );
            }
            tracing::debug!(ifindex = index, held_ms, ?outcome, "no longer held");
            metrics.held(*outcome);
        }
        Ok(())
    }
}

impl Drop for Holds {
    /// Ends the thread, also of an agent that fails.
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, BTreeMap<u32, Instant>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn hold(&self, index: u32) -> anyhow::Result<()> {
        let mut holder = self.holder.lock().await;
        self.held().insert(index, Instant::now());
        holder.hold(index, self.limit)
    }
}

/// What the thread works with. It stands apart from the enrolment loop, whose turns last as long as they last.
#[derive(Debug)]
struct Thread {
    shared: Arc<Shared>,
    /// All veths that were looked at.
    known: HashSet<u32>,
    /// Dropped when the thread ends, however that is.
    tell: watch::Sender<()>,
    stop: CancellationToken,
}

impl Thread {
    fn run(mut self) {
        let runtime = Builder::new_current_thread().enable_io().build();
        if let Err(error) = runtime.and_then(|runtime| runtime.block_on(self.follow())) {
            tracing::error!(%error, "cannot follow the node's links");
        }
    }

    /// Until it is told to stop.
    async fn follow(&mut self) -> io::Result<()> {
        let changes = LinkChanges::here()?;
        if let Err(error) = self.go_on().await {
            tracing::error!(error = format!("{error:#}"), "cannot go on with what an earlier agent held");
        }
        loop {
            if let Err(error) = self.hold_new().await {
                tracing::error!(
                    error = format!("{error:#}"),
                    "cannot hold a new pod: what it sends may leave in the clear"
                );
            }
            tokio::select! {
                // Both are cancel-safe.
                () = self.stop.cancelled() => return Ok(()),
                changed = changes.next() => changed?,
            }
        }
    }

    /// Holds on what an earlier agent held: for the whole limit, as nobody says since when that was.
    async fn go_on(&mut self) -> anyhow::Result<()> {
        let left = self.shared.holder.lock().await.held()?;
        let there = indices(&veths()?);
        for index in left {
            if there.contains(&index) {
                self.known.insert(index);
                self.hold(index).await?;
            } else {
                self.shared.holder.lock().await.let_go(index)?;
            }
        }
        Ok(())
    }

    /// Holds what is new; the first error of several.
    async fn hold_new(&mut self) -> anyhow::Result<()> {
        let there = indices(&veths()?);
        self.known.retain(|index| there.contains(index));
        let mut all = Ok(());
        for index in there {
            // What comes when this agent stands down is its successor's.
            if !self.stop.is_cancelled() && self.known.insert(index) {
                all = all.and(self.hold(index).await);
            }
        }
        all
    }

    async fn hold(&self, index: u32) -> anyhow::Result<()> {
        let held = self.shared.hold(index).await;
        self.tell.send_replace(());
        tracing::debug!(ifindex = index, "held");
        held
    }
}

impl Situation<'_> {
    fn decide(&self, veth: Option<Veth>, late: bool) -> Decision {
        let Some(veth) = veth else { return Decision::End(HoldOutcome::Gone) };
        if self.captured.contains(&veth.index) {
            return Decision::End(HoldOutcome::Captured);
        }
        let meant = self.places.get(&veth.peers_namespace).and_then(|uid| self.pods.get(uid.as_str()));
        match meant {
            Some(None) => Decision::End(HoldOutcome::Outside),
            Some(Some(Mode::Strict)) => Decision::PutOff,
            _ if late => Decision::End(HoldOutcome::Limit),
            _ => Decision::Wait,
        }
    }
}

/// The uids of the pods that run here, by the numbers of their namespaces.
fn places() -> io::Result<HashMap<i32, String>> {
    let of_node = Namespace::of_agent()?;
    let mut places = HashMap::new();
    for (uid, sandbox) in sandbox::find(|_| true)? {
        if let Sandbox::In(namespace) = sandbox
            && let Some(number) = number_of(&namespace, &of_node)?
        {
            places.insert(number, uid);
        }
    }
    Ok(places)
}

fn indices(veths: &[Veth]) -> HashSet<u32> {
    veths.iter().map(|veth| veth.index).collect()
}

/// The node's ends of all veths.
fn veths() -> io::Result<Vec<Veth>> {
    let links =
        Netlink::open(&Namespace::of_agent()?)?.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => veth(&link),
            _ => None,
        })
        .collect())
}

fn veth(link: &LinkMessage) -> Option<Veth> {
    let is_veth = link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    });
    let peers_namespace = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(number) => Some(*number),
        _ => None,
    })?;
    is_veth.then_some(Veth { index: link.header.index, peers_namespace })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(veth: Option<Veth>, late: bool, expected: Decision) {
        let pods = HashMap::from([
            ("strict", Some(Mode::Strict)),
            ("permissive", Some(Mode::Permissive)),
            ("outside", None),
        ]);
        let places = ["strict", "permissive", "outside", "new"].map(str::to_owned);
        let places = (1..).zip(places).collect();
        let captured = HashSet::from([7]);
        let situation = Situation { pods: &pods, places: &places, captured: &captured };
        assert_eq!(situation.decide(veth, late), expected);
    }

    #[test]
    fn a_hold_lasts_until_it_is_known_where_the_pod_belongs_and_beyond_its_limit_for_strict_ones_alone() {
        let of = |index, peers_namespace| Some(Veth { index, peers_namespace });
        check(of(7, 1), false, Decision::End(HoldOutcome::Captured));
        check(of(8, 1), false, Decision::PutOff);
        check(of(8, 2), false, Decision::Wait);
        check(of(8, 3), false, Decision::End(HoldOutcome::Outside));
        check(of(8, 4), false, Decision::Wait);
        check(of(8, 5), false, Decision::Wait);
        check(of(8, 1), true, Decision::PutOff);
        check(of(8, 2), true, Decision::End(HoldOutcome::Limit));
        check(of(8, 5), true, Decision::End(HoldOutcome::Limit));
        check(None, false, Decision::End(HoldOutcome::Gone));
    }
}
