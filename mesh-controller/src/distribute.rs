//! Which version of its view each node has, and what it must hear to have the newest.
//!
//! A version is `<generation>.<epoch>-<n>`: the epoch is drawn at start, so that nobody resumes from what another
//! process counted.
//! Per node the last [`KEPT`] differences are kept; an agent that comes back with one of these versions hears only what
//! changed since. An agent that is slow hears of many changes at once: nothing is queued per change, only the number
//! of the newest version waits for it.
//!
//! A node has a whole view or one by demand ([`crate::project::demand`]): the latter once the mesh is larger than
//! [`Hub`]'s setting, if its agent can do with it. What a node asked for is kept while its agent is away, and replaced by
//! what the agent says when it is back.
//!
//! A controller that has just started may have missed what agents said, and would then take captured workloads for
//! ones that are not. So agents that hold a view of an earlier start keep it until all enrolled workloads' agents have
//! said how these are ([`Hub::heard`]), or for [`SETTLE`].

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use mesh_core::{
    model::Name,
    version::Version,
    view::{Delta, Key, MAX_ASKED, NodeView, Resource},
    wire::{
        self,
        proto::{Condition as ProtoCondition, HeldCertificate, ViewUpdate},
    },
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    generation::Generation,
    model::Model,
    project::{
        Common,
        demand::{Changes, Concern, Demanded},
    },
    report::Reports,
    source::ledger::Ledger,
};

/// Differences kept per node: what an agent may miss and still resume.
pub const KEPT: usize = 64;
/// How long the word of every node is waited for after a start: an agent's longest pause between two attempts, and its
/// connect. Below an agent's limit for a call, as joins wait too.
pub const SETTLE: Duration = Duration::from_secs(8);
/// Longest error of an agent that is kept, characters.
const MAX_ERROR: usize = 1000;
/// Most problems, and most fills, of an agent that are kept.
const MAX_LINES: usize = 32;
/// Most certificates of an agent that are kept: four times what a node may have workloads.
const MAX_HELD: usize = 4096;
/// Longest version of an agent that is kept, characters.
const MAX_AGENT_VERSION: usize = 100;

/// Everything that is in force, at one moment.
#[derive(Debug, Clone)]
pub struct World {
    /// The desired state.
    pub model: Arc<Model>,
    /// Where it came from, and what was refused.
    pub ledger: Arc<Ledger>,
    /// What agents said.
    pub reports: Arc<Reports>,
    /// What views are made of.
    pub common: Arc<Common>,
}

/// All nodes and their views.
#[derive(Debug)]
pub struct Hub {
    generation: Arc<Generation>,
    /// The workloads, each with its node, whose agents' word is waited for; empty once views may go out to everybody.
    awaited: watch::Sender<BTreeMap<Name, String>>,
    world: watch::Sender<Arc<World>>,
    /// How many workloads and services a mesh may have for whole views; none: always by demand.
    whole_views_up_to: usize,
    nodes: Mutex<Nodes>,
}

/// All nodes whose agents ever connected since the start.
#[derive(Debug)]
struct Nodes {
    /// Views are by demand now.
    by_demand: bool,
    tracks: BTreeMap<String, Track>,
}

/// One node's view and who has heard of it.
#[derive(Debug)]
struct Track {
    has: Has,
    /// What its agent asks for; `None` for one that can do with whole views only.
    asked: Option<BTreeSet<IpAddr>>,
    number: u64,
    /// What led to the last versions, the newest last.
    steps: VecDeque<Delta>,
    newest: watch::Sender<u64>,
    agent: Agent,
}

/// A node's view, as far as it is not the world's.
#[derive(Debug)]
enum Has {
    /// What only this node's view has.
    Whole(NodeView),
    /// All of it. Boxed: it is the larger by far.
    Demanded(Box<Demanded>),
}

/// What is known of a node's agent.
#[derive(Debug, Default)]
struct Agent {
    /// Counts its connections; the last one is in force.
    connection: u64,
    /// Ends the connection that is in force.
    cancel: Option<CancellationToken>,
    version: String,
    acked: Option<String>,
    error: Option<String>,
    since: Option<SystemTime>,
    condition: Arc<Condition>,
}

/// How an agent is, as it says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Condition {
    /// What is wrong on its node.
    pub problems: Vec<String>,
    /// What it holds; `None` before it said so.
    pub certificates: Option<Vec<Held>>,
    /// How full what can become full is: name, entries, limit.
    pub fills: Vec<(String, u64, u64)>,
}

/// A certificate that an agent holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Whose.
    pub identity: String,
    /// Its end; `None` while there is none.
    pub expires: Option<SystemTime>,
    /// The SHA-256 of the root that it leads to.
    pub root: Option<[u8; 32]>,
    /// Why there is no newer one.
    pub error: Option<String>,
}

impl Condition {
    /// What an agent said, cut to what is kept.
    fn of(said: ProtoCondition) -> Self {
        let cut = |text: String| text.chars().take(MAX_ERROR).collect::<String>();
        let held = |it: HeldCertificate| Held {
            identity: cut(it.identity),
            expires: u64::try_from(it.expires_unix)
                .ok()
                .filter(|seconds| *seconds > 0)
                .and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))),
            root: it.root_sha256.try_into().ok(),
            error: Some(cut(it.error)).filter(|error| !error.is_empty()),
        };
        Self {
            problems: said.problems.into_iter().take(MAX_LINES).map(cut).collect(),
            certificates: Some(said.certificates.into_iter().take(MAX_HELD).map(held).collect()),
            fills: said
                .fills
                .into_iter()
                .take(MAX_LINES)
                .map(|it| (cut(it.what), it.entries, it.limit))
                .collect(),
        }
    }
}

/// What `meshctl status` says of an agent.
#[derive(Debug, Clone)]
pub struct AgentState {
    /// The node.
    pub node: String,
    /// It watches now.
    pub connected: bool,
    /// When that last changed.
    pub since: Option<SystemTime>,
    /// The agent's own version.
    pub agent_version: String,
    /// The newest version of its view.
    pub current: String,
    /// The version that it has put in force.
    pub acked: Option<String>,
    /// Why it could not put the last one in force.
    pub error: Option<String>,
    /// How it is, as it said last.
    pub condition: Arc<Condition>,
    /// Its view is one by demand.
    pub by_demand: bool,
    /// What its view has.
    pub resources: usize,
    /// The addresses that it asks for.
    pub asked: usize,
}

impl Hub {
    /// A hub with a first state of the world, and whole views up to so many workloads and services. The first start of a
    /// state waits for nobody's word: nobody has one.
    pub fn new(world: World, generation: Arc<Generation>, whole_views_up_to: usize) -> Arc<Self> {
        let by_demand = world.common.size() > whole_views_up_to;
        let nodes = Mutex::new(Nodes { by_demand, tracks: BTreeMap::new() });
        let enrolled = world.common.workloads().iter().filter(|workload| workload.enrolled);
        let awaited = match generation.number() {
            1 => BTreeMap::new(),
            _ => enrolled.map(|workload| (workload.name.clone(), workload.node.clone())).collect(),
        };
        let (awaited, world) = (watch::Sender::new(awaited), watch::Sender::new(Arc::new(world)));
        Arc::new(Self { generation, awaited, world, whole_views_up_to, nodes })
    }

    /// This node's agent has said how these workloads are, and what it said is in force.
    pub fn heard(&self, node: &str, workloads: &BTreeSet<Name>) {
        self.hear(|name, of| of == node && workloads.contains(name));
    }

    fn hear(&self, heard: impl Fn(&Name, &str) -> bool) {
        self.awaited.send_if_modified(|awaited| {
            let before = awaited.len();
            awaited.retain(|name, node| !heard(name, node));
            before > 0 && awaited.is_empty()
        });
    }

    /// Nobody's word is waited for any longer.
    pub fn settle(&self) {
        let silent = self.awaited.send_replace(BTreeMap::new());
        if !silent.is_empty() {
            let nodes: BTreeSet<&String> = silent.values().collect();
            tracing::warn!(
                workloads = silent.len(),
                ?nodes,
                "not reported since the start; going on without"
            );
        }
    }

    /// Waits until views may go out to everybody. Cancel-safe.
    pub async fn settled(&self) {
        let mut awaited = self.awaited.subscribe();
        // Cannot fail: we hold the sender.
        let _ = awaited.wait_for(BTreeMap::is_empty).await;
    }

    /// What is in force now.
    pub fn world(&self) -> Arc<World> {
        self.world.borrow().clone()
    }

    /// Puts a new state of the world in force, and tells the agents whose views it changes.
    pub fn publish(&self, world: World) {
        let common = world.common.clone();
        let mut nodes = self.nodes();
        // Within the lock: a node that connects sees this world, or is among those that hear of it.
        let before = self.world.send_replace(Arc::new(world));
        let changes = before.common.changes(&common);
        // Back to whole views a tenth below: a mesh about as large as the limit must not turn to and fro.
        let room = if nodes.by_demand { self.whole_views_up_to / 10 } else { 0 };
        nodes.by_demand = common.size() > self.whole_views_up_to - room;
        let by_demand = nodes.by_demand;
        for (node, track) in &mut nodes.tracks {
            track.follow(node, &before.common, &common, &changes, by_demand);
        }
    }

    /// Whether views are by demand, for agents that can do with it.
    pub fn by_demand(&self) -> bool {
        self.nodes().by_demand
    }

    /// Takes an agent's connection; an older one of the same node ends.
    ///
    /// `resume` is the version that the agent has, as it says; `asked` what it asks for, `None` if it can do with whole
    /// views only.
    pub fn connect(
        self: &Arc<Self>,
        node: &str,
        resume: &str,
        agent_version: &str,
        asked: Option<BTreeSet<IpAddr>>,
    ) -> Subscription {
        let mut nodes = self.nodes();
        let Nodes { by_demand, tracks } = &mut *nodes;
        let common = self.world().common.clone();
        let asked = asked.map(|asked| asked.into_iter().take(MAX_ASKED).collect());
        let track = match tracks.entry(node.to_owned()) {
            Entry::Vacant(entry) => entry.insert(Track::new(node, &common, asked, *by_demand)),
            Entry::Occupied(entry) => {
                let track = entry.into_mut();
                track.ask_for(node, &common, asked, *by_demand);
                track
            }
        };
        let cancel = CancellationToken::new();
        if let Some(older) = track.agent.cancel.replace(cancel.clone()) {
            older.cancel();
        }
        track.agent.connection += 1;
        track.agent.version = agent_version.chars().take(MAX_AGENT_VERSION).collect();
        track.agent.since = Some(SystemTime::now());
        let has = self.number(resume);
        if resume.is_empty() {
            // It has nothing in force, and nothing to say of its workloads before it has a view.
            self.hear(|_, of| of == node);
        }
        let acks = Acks { hub: self.clone(), node: node.to_owned(), connection: track.agent.connection };
        Subscription {
            acks,
            has,
            waits: has.is_none() && !resume.is_empty(),
            first: true,
            newest: track.newest.subscribe(),
            replaced: cancel,
        }
    }

    /// All agents that ever connected since the start.
    pub fn agents(&self) -> Vec<AgentState> {
        let nodes = self.nodes();
        let shared = self.world().common.size() + 1;
        let state = |(node, track): (&String, &Track)| AgentState {
            node: node.clone(),
            connected: track.agent.cancel.is_some(),
            since: track.agent.since,
            agent_version: track.agent.version.clone(),
            current: self.version(track.number),
            acked: track.agent.acked.clone(),
            error: track.agent.error.clone(),
            condition: track.agent.condition.clone(),
            by_demand: matches!(track.has, Has::Demanded(_)),
            resources: match &track.has {
                Has::Whole(own) => own.len() + shared,
                Has::Demanded(demanded) => demanded.view().len(),
            },
            asked: track.asked.as_ref().map_or(0, BTreeSet::len),
        };
        nodes.tracks.iter().map(state).collect()
    }

    /// The nodes whose agents watch here.
    pub fn connected_nodes(&self) -> BTreeSet<String> {
        let nodes = self.nodes();
        let connected = nodes.tracks.iter().filter(|(_, track)| track.agent.cancel.is_some());
        connected.map(|(node, _)| node.clone()).collect()
    }

    /// How many agents watch.
    pub fn connected(&self) -> usize {
        self.nodes().tracks.values().filter(|track| track.agent.cancel.is_some()).count()
    }

    fn version(&self, number: u64) -> String {
        let (generation, epoch) = (self.generation.number(), self.generation.epoch().to_owned());
        Version { generation, epoch, number }.to_string()
    }

    /// The number in a version of this epoch.
    fn number(&self, version: &str) -> Option<u64> {
        let version: Version = version.parse().ok()?;
        (version.epoch == self.generation.epoch()).then_some(version.number)
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().expect("no holder of this lock panics")
    }
}

impl Has {
    fn of(node: &str, common: &Common, asked: Option<&BTreeSet<IpAddr>>, by_demand: bool) -> Self {
        match asked.filter(|_| by_demand) {
            Some(asked) => Self::Demanded(Box::new(common.demanded(node, asked))),
            None => Self::Whole(common.own(node)),
        }
    }

    /// The view, if it is one by demand.
    fn by_demand(&self) -> Option<NodeView> {
        match self {
            Self::Whole(_) => None,
            Self::Demanded(demanded) => Some(demanded.view().clone()),
        }
    }

    /// The whole of it. `common` is what it was made of.
    fn view(&self, node: &str, common: &Common) -> NodeView {
        match self {
            Self::Whole(_) => common.view(node),
            Self::Demanded(demanded) => demanded.view().clone(),
        }
    }
}

impl Track {
    fn new(node: &str, common: &Common, asked: Option<BTreeSet<IpAddr>>, by_demand: bool) -> Self {
        let has = Has::of(node, common, asked.as_ref(), by_demand);
        let (steps, newest, agent) = (VecDeque::new(), watch::channel(1).0, Agent::default());
        Self { has, asked, number: 1, steps, newest, agent }
    }

    /// The world has gone from one state to the next.
    fn follow(&mut self, node: &str, before: &Common, next: &Common, changes: &Changes, by_demand: bool) {
        let step = match (&mut self.has, self.asked.as_ref().filter(|_| by_demand)) {
            (Has::Whole(own), None) => {
                let next = next.own(node);
                let own = std::mem::replace(own, next.clone()).diff(&next);
                let mut step = changes.shared.clone();
                step.upserts.extend(own.upserts);
                step.removes.extend(own.removes);
                step
            }
            (Has::Demanded(held), Some(asked)) => match next.concerns(before, changes, node, held) {
                Concern::Nothing => return,
                Concern::Policies => {
                    let step = before.own(node).diff(&next.own(node));
                    held.change_policies(step.clone());
                    step
                }
                Concern::Everything => {
                    let next = next.demanded(node, asked);
                    let step = held.view().diff(next.view());
                    **held = next;
                    step
                }
            },
            (has, asked) => {
                let was = has.view(node, before);
                *has = Has::of(node, next, asked, by_demand);
                was.diff(&has.view(node, next))
            }
        };
        self.advance(step);
    }

    /// The agent asks for these and no others.
    fn ask_for(&mut self, node: &str, common: &Common, asked: Option<BTreeSet<IpAddr>>, by_demand: bool) {
        if asked == self.asked {
            return;
        }
        let was = self.has.view(node, common);
        self.has = Has::of(node, common, asked.as_ref(), by_demand);
        self.asked = asked;
        self.advance(was.diff(&self.has.view(node, common)));
    }

    /// The agent asks for more, and gives up some.
    fn wants(&mut self, node: &str, common: &Common, more: Vec<IpAddr>, less: &[IpAddr]) {
        let Some(asked) = &mut self.asked else { return };
        let before = asked.len();
        for address in less {
            asked.remove(address);
        }
        let fewer = asked.len() < before;
        let room = MAX_ASKED - asked.len();
        let new: Vec<IpAddr> = more.into_iter().filter(|it| !asked.contains(it)).take(room).collect();
        asked.extend(&new);
        let Has::Demanded(held) = &mut self.has else { return };
        let step = if fewer {
            let next = common.demanded(node, asked);
            let step = held.view().diff(next.view());
            **held = next;
            step
        } else {
            held.ask(common, &new)
        };
        self.advance(step);
    }

    fn advance(&mut self, step: Delta) {
        if step.is_empty() {
            return;
        }
        self.number += 1;
        self.steps.push_back(step);
        if self.steps.len() > KEPT {
            self.steps.pop_front();
        }
        self.newest.send_replace(self.number);
    }

    /// What changed since a version, as one difference; `None` if that version is not known any more.
    fn since(&self, number: u64) -> Option<Delta> {
        let behind = usize::try_from(self.number.checked_sub(number)?).ok()?;
        let from = self.steps.len().checked_sub(behind)?;
        let mut changes: BTreeMap<Key, Option<Resource>> = BTreeMap::new();
        for step in self.steps.iter().skip(from) {
            changes.extend(step.removes.iter().map(|key| (key.clone(), None)));
            changes.extend(step.upserts.iter().map(|resource| (resource.key(), Some(resource.clone()))));
        }
        let mut delta = Delta::default();
        for (key, change) in changes {
            match change {
                Some(resource) => delta.upserts.push(resource),
                None => delta.removes.push(key),
            }
        }
        Some(delta)
    }
}

/// One agent's connection.
#[derive(Debug)]
pub struct Subscription {
    acks: Acks,
    /// What the agent has, or is about to have.
    has: Option<u64>,
    /// It holds another start's view, and keeps it until the hub has settled.
    waits: bool,
    first: bool,
    newest: watch::Receiver<u64>,
    replaced: CancellationToken,
}

impl Subscription {
    /// The next update, at once the first time (empty if the agent has the newest version already); `None` once
    /// a newer connection of the node took over. Cancel-safe.
    pub async fn next(&mut self) -> Option<ViewUpdate> {
        loop {
            if self.replaced.is_cancelled() {
                return None;
            }
            if self.waits {
                let hub = self.acks.hub.clone();
                // Cancel-safe: neither branch holds anything.
                tokio::select! {
                    () = self.replaced.cancelled() => return None,
                    () = hub.settled() => self.waits = false,
                }
            }
            if let Some(update) = self.update() {
                return Some(update);
            }
            // Cancel-safe: neither branch holds anything.
            tokio::select! {
                () = self.replaced.cancelled() => {}
                changed = self.newest.changed() => changed.ok()?,
            }
        }
    }

    fn update(&mut self) -> Option<ViewUpdate> {
        self.newest.mark_unchanged();
        let nodes = self.acks.hub.nodes();
        let track = nodes.tracks.get(&self.acks.node)?;
        if !self.first && self.has == Some(track.number) {
            return None;
        }
        let known = self.has.and_then(|number| track.since(number));
        let complete = known.is_none();
        let number = track.number;
        // Within the lock, as the world that this number stands for.
        let (world, demanded) =
            (self.acks.hub.world(), known.is_none().then(|| track.has.by_demand()).flatten());
        drop(nodes);
        let whole = || demanded.unwrap_or_else(|| world.common.view(&self.acks.node));
        let delta = known.unwrap_or_else(|| NodeView::default().diff(&whole()));
        self.has = Some(number);
        self.first = false;
        Some(wire::update(self.acks.hub.version(number), complete, &delta))
    }

    /// Where the agent's answers go.
    pub fn acks(&self) -> Acks {
        self.acks.clone()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.acks.agent(|agent| {
            agent.cancel = None;
            agent.since = Some(SystemTime::now());
        });
    }
}

/// What the agent of one connection says of its versions.
#[derive(Debug, Clone)]
pub struct Acks {
    hub: Arc<Hub>,
    node: String,
    connection: u64,
}

impl Acks {
    /// Takes an answer; an empty error means that the version is in force.
    pub fn take(&self, version: &str, error: &str) {
        self.agent(|agent| {
            if error.is_empty() {
                agent.acked = Some(version.chars().take(MAX_ERROR).collect());
                agent.error = None;
            } else {
                agent.error = Some(error.chars().take(MAX_ERROR).collect());
            }
        });
    }

    /// Takes what it asks for, and what it gives up.
    pub fn wants(&self, more: Vec<IpAddr>, less: &[IpAddr]) {
        let mut nodes = self.hub.nodes();
        let track = nodes.tracks.get_mut(&self.node);
        if let Some(track) = track.filter(|track| track.agent.connection == self.connection) {
            track.wants(&self.node, &self.hub.world().common, more, less);
        }
    }

    /// Takes what it says of itself.
    pub fn condition(&self, said: ProtoCondition) {
        let condition = Arc::new(Condition::of(said));
        self.agent(|agent| agent.condition = condition);
    }

    /// Does something to the agent's state, unless a newer connection took over.
    fn agent(&self, change: impl FnOnce(&mut Agent)) {
        let mut nodes = self.hub.nodes();
        let track = nodes.tracks.get_mut(&self.node);
        if let Some(track) = track.filter(|track| track.agent.connection == self.connection) {
            change(&mut track.agent);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use mesh_core::{identity::TrustDomain, model::Mode, view::Mesh};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        health::Heard,
        model::{Object, Workload},
    };

    fn world(workloads: &[(&str, u8)]) -> World {
        let objects: Vec<Object> = workloads
            .iter()
            .map(|(name, last)| {
                Object::Workload(Arc::new(Workload {
                    name: format!("s/{name}").parse().unwrap(),
                    uid: String::new(),
                    labels: BTreeMap::new(),
                    enroll: Some(true),
                    mode: None,
                    node: "n".into(),
                    addresses: vec![[10, 0, 0, *last].into()],
                    service_account: "default".into(),
                    ready: true,
                }))
            })
            .collect();
        let model: Model = objects.iter().collect();
        let mesh = Arc::new(Mesh { trust_domain: TrustDomain::parse("td").unwrap(), roots: vec![] });
        let common = Arc::new(Common::new(&model, mesh, &Heard::default(), Mode::default()));
        World { model: Arc::new(model), ledger: Arc::default(), reports: Arc::default(), common }
    }

    /// Of the first start of a state.
    fn hub(world: World) -> Arc<Hub> {
        Hub::new(world, start(tempfile::tempdir().unwrap().path()), usize::MAX)
    }

    fn start(dir: &std::path::Path) -> Arc<Generation> {
        Arc::new(Generation::begin(dir).0)
    }

    /// What an agent has after these updates.
    fn apply(view: &mut NodeView, update: &ViewUpdate) {
        if update.complete {
            *view = NodeView::default();
        }
        view.apply(wire::delta(update).unwrap());
    }

    #[test]
    fn the_first_update_is_complete_then_only_changes_come() {
        let hub = hub(world(&[("a", 1), ("b", 2)]));
        let mut agent = hub.connect("n", "", "1", None);
        let first = agent.next().now_or_never().flatten().unwrap();
        assert!(first.complete && first.upserts.len() == 3);
        assert!(agent.next().now_or_never().is_none(), "nothing has changed");
        hub.publish(world(&[("a", 1), ("b", 2)]));
        assert!(agent.next().now_or_never().is_none(), "still nothing has changed");
        hub.publish(world(&[("a", 1), ("c", 3)]));
        let second = agent.next().now_or_never().flatten().unwrap();
        assert!(!second.complete);
        assert_eq!((second.upserts.len(), second.removes.as_slice()), (1, &["workload/s/b".to_owned()][..]));
    }

    #[test]
    fn many_changes_reach_a_slow_agent_as_one() {
        let hub = hub(world(&[]));
        let mut agent = hub.connect("n", "", "1", None);
        agent.next().now_or_never().flatten().unwrap();
        for last in 1..10 {
            hub.publish(world(&[("a", last)]));
        }
        let update = agent.next().now_or_never().flatten().unwrap();
        assert_eq!(update.upserts.len(), 1);
        assert!(agent.next().now_or_never().is_none());
    }

    #[test]
    fn a_newer_connection_of_the_node_ends_the_older_one() {
        let hub = hub(world(&[]));
        let mut older = hub.connect("n", "", "1", None);
        older.next().now_or_never().flatten().unwrap();
        let newer = hub.connect("n", "", "2", None);
        assert!(older.next().now_or_never().unwrap().is_none());
        older.acks().take("x", "");
        drop(older);
        let state = hub.agents().remove(0);
        assert_eq!((state.connected, state.acked, state.agent_version.as_str()), (true, None, "2"));
        newer.acks().take(&state.current, "");
        newer.acks().take("later", "cannot");
        let state = hub.agents().remove(0);
        assert_eq!((state.acked, state.error), (Some(state.current), Some("cannot".to_owned())));
        drop(newer);
        assert_eq!(hub.connected(), 0);
    }

    #[test]
    fn a_version_of_another_epoch_or_too_old_is_answered_completely() {
        let hub = hub(world(&[]));
        let mut agent = hub.connect("n", "", "1", None);
        let first = agent.next().now_or_never().flatten().unwrap().version;
        for round in 0..=KEPT {
            hub.publish(world(&[("a", round as u8)]));
        }
        for version in [first.as_str(), "1.other-1", "", "-1", "nonsense"] {
            let update = hub.connect("n", version, "1", None).next().now_or_never().flatten().unwrap();
            assert!(update.complete, "{version}");
        }
        let ahead = format!("{}-99999", first.split_once('-').unwrap().0);
        assert!(hub.connect("n", &ahead, "1", None).next().now_or_never().flatten().unwrap().complete);
    }

    #[test]
    fn after_a_start_who_holds_a_view_keeps_it_until_every_node_has_been_heard() {
        let dir = tempfile::tempdir().unwrap();
        let earlier = start(dir.path());
        let version = format!("1.{}-1", earlier.epoch());
        let hub = Hub::new(world(&[("a", 1)]), start(dir.path()), usize::MAX);
        let mut holds = hub.connect("m", &version, "1", None);
        let mut fresh = hub.connect("k", "", "1", None);
        assert!(fresh.next().now_or_never().flatten().is_some(), "who has nothing waits for nobody");
        assert!(holds.next().now_or_never().is_none());
        let words = BTreeSet::from(["s/a".parse().unwrap()]);
        hub.heard("m", &words);
        hub.heard("n", &BTreeSet::new());
        hub.publish(world(&[("a", 2)]));
        assert!(
            holds.next().now_or_never().is_none(),
            "the workload's own node is n, and it must speak of it"
        );
        hub.heard("n", &words);
        let update = holds.next().now_or_never().flatten().unwrap();
        assert!(update.complete && update.version.starts_with("2."), "{}", update.version);

        let hub = Hub::new(world(&[("a", 1)]), start(dir.path()), usize::MAX);
        let mut holds = hub.connect("m", &version, "1", None);
        assert!(holds.next().now_or_never().is_none());
        hub.settle();
        assert!(
            holds.next().now_or_never().flatten().is_some(),
            "a node that stays silent holds nobody up for ever"
        );
    }

    proptest! {
        #[test]
        fn resuming_from_any_kept_version_gives_the_newest_view(
            history in prop::collection::vec(prop::collection::btree_map("[a-d]", 1u8..4, 0..4), 1..12),
            from in 0usize..12,
        ) {
            let worlds: Vec<World> = history
                .iter()
                .map(|entry| world(&entry.iter().map(|(name, last)| (name.as_str(), *last)).collect::<Vec<_>>()))
                .collect();
            let hub = hub(worlds[0].clone());
            let mut follower = hub.connect("n", "", "1", None);
            let mut view = NodeView::default();
            let mut seen = vec![];
            for world in &worlds {
                hub.publish(world.clone());
                if let Some(update) = follower.next().now_or_never().flatten() {
                    apply(&mut view, &update);
                    seen.push((update.version, view.clone()));
                }
            }
            let newest = worlds.last().unwrap().common.view("n");
            prop_assert_eq!(&view, &newest);
            let (version, mut old) = seen[from % seen.len()].clone();
            let update = hub.connect("n", &version, "1", None).next().now_or_never().flatten().unwrap();
            prop_assert!(!update.complete);
            apply(&mut old, &update);
            prop_assert_eq!(&old, &newest);
        }

        #[test]
        fn an_agent_that_asks_has_at_any_time_the_view_of_what_it_asked_for(
            worlds in prop::collection::vec(prop::collection::btree_map("[a-f]", 1u8..9, 0..6), 1..8),
            asks in prop::collection::vec((1u8..9, any::<bool>()), 8),
            up_to in 0usize..5,
            away in 0usize..8,
        ) {
            let of = |entry: &BTreeMap<String, u8>| {
                world(&entry.iter().map(|(name, last)| (name.as_str(), *last)).collect::<Vec<_>>())
            };
            let hub = Hub::new(of(&worlds[0]), start(tempfile::tempdir().unwrap().path()), up_to);
            let (mut asked, mut view, mut version) = (BTreeSet::new(), NodeView::default(), String::new());
            let mut agent = hub.connect("m", "", "1", Some(asked.clone()));
            for (round, (next, (last, more))) in worlds.iter().zip(asks).enumerate() {
                hub.publish(of(next));
                let address = IpAddr::from([10, 0, 0, last]);
                if more {
                    asked.insert(address);
                    agent.acks().wants(vec![address], &[]);
                } else {
                    asked.remove(&address);
                    agent.acks().wants(vec![], &[address]);
                }
                if round == away {
                    agent = hub.connect("m", &version, "1", Some(asked.clone()));
                }
                if let Some(update) = agent.next().now_or_never().flatten() {
                    apply(&mut view, &update);
                    version = update.version;
                }
                let common = &hub.world().common;
                let expected = match hub.by_demand() {
                    true => common.demanded("m", &asked).view().clone(),
                    false => common.view("m"),
                };
                prop_assert_eq!(&view, &expected);
            }
        }
    }

    #[test]
    fn an_agent_that_cannot_ask_has_everything_and_one_that_can_its_own_and_what_it_asked_for() {
        let hub = Hub::new(world(&[("a", 1), ("b", 2)]), start(tempfile::tempdir().unwrap().path()), 0);
        let mut old = hub.connect("k", "", "1", None);
        assert_eq!(old.next().now_or_never().flatten().unwrap().upserts.len(), 3);
        let keys =
            |update: ViewUpdate| -> Vec<String> { update.upserts.into_iter().map(|it| it.key).collect() };
        let mut agent = hub.connect("m", "", "1", Some(BTreeSet::new()));
        assert_eq!(keys(agent.next().now_or_never().flatten().unwrap()), ["mesh", "demand"]);
        agent.acks().wants(vec![[10, 0, 0, 2].into(), [10, 0, 0, 9].into()], &[]);
        let update = agent.next().now_or_never().flatten().unwrap();
        assert!(!update.complete);
        assert_eq!(keys(update), ["nobody/10.0.0.9", "workload/s/b"]);
        let state = hub.agents().into_iter().find(|it| it.node == "m").unwrap();
        assert_eq!((state.by_demand, state.resources, state.asked), (true, 4, 2));
        hub.publish(world(&[("a", 3), ("b", 2)]));
        assert!(agent.next().now_or_never().is_none(), "a is none of its business");
        hub.publish(world(&[("a", 3), ("b", 2), ("c", 9)]));
        let update = agent.next().now_or_never().flatten().unwrap();
        assert_eq!(update.removes, ["nobody/10.0.0.9"]);
        assert_eq!(keys(update), ["workload/s/c"]);
        agent.acks().wants(vec![], &[[10, 0, 0, 9].into()]);
        assert_eq!(agent.next().now_or_never().flatten().unwrap().removes, ["workload/s/c"]);
    }

    #[test]
    fn views_turn_by_demand_above_the_limit_and_whole_again_a_tenth_below() {
        let of = |count: u8| {
            let names: Vec<String> = (0..count).map(|number| format!("w{number}")).collect();
            world(&names.iter().zip(1..).map(|(name, last)| (name.as_str(), last)).collect::<Vec<_>>())
        };
        let hub = Hub::new(of(20), start(tempfile::tempdir().unwrap().path()), 20);
        for (size, by_demand) in [(20, false), (21, true), (20, true), (19, true), (18, false), (20, false)] {
            hub.publish(of(size));
            assert_eq!(hub.by_demand(), by_demand, "{size}");
        }
    }
}
