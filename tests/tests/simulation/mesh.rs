//! A controller and agents, each with its files, its clock and its line, that can be stopped and started.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::FutureExt;
use mesh_agent::{
    config::{Config, Invocation},
    connection::Direction,
    control::Control,
    identity::{join::JoinToken, store::Identities},
    surroundings::{Chance, Clock, Surroundings},
    view::{Enrolment, Role},
};
use mesh_controller::{
    ca::Authority,
    clock::Clock as ControllerClock,
    controller::{Parts, Settings},
    distribute::Hub,
    source::ledger::{FileContent, Ledger},
    token::Tokens,
};
use mesh_core::{
    identity::SpiffeId,
    version::{Succession, Version},
    view::{NodeView, Resource, Snapshot},
    wire::addresses_of,
};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{chances::Chances, net::Net};

/// How long certificates live.
pub(crate) const CERTIFICATE_TTL: Duration = Duration::from_secs(30 * 60);
/// When a run begins.
const EPOCH: Duration = Duration::from_secs(1_800_000_000);

/// The time of a run: tokio's, which stands still while there is work, and what the wall clocks were set forward by.
#[derive(Debug, Clone)]
pub(crate) struct Time {
    begun: Instant,
    forward_ms: Arc<AtomicI64>,
}

impl Time {
    pub(crate) fn begin() -> Self {
        Self { begun: Instant::now(), forward_ms: Arc::default() }
    }

    /// Sets all wall clocks forward.
    pub(crate) fn jump(&self, by: Duration) {
        self.forward_ms.fetch_add(by.as_millis() as i64, Ordering::Relaxed);
    }

    /// A wall clock that is wrong by so many seconds.
    pub(crate) fn wall(&self, off_seconds: i64) -> SystemTime {
        let forward = Duration::from_millis(self.forward_ms.load(Ordering::Relaxed) as u64);
        let right = SystemTime::UNIX_EPOCH + EPOCH + self.begun.elapsed() + forward;
        let off = Duration::from_secs(off_seconds.unsigned_abs());
        if off_seconds < 0 { right - off } else { right + off }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }
}

/// The controller: what of it survives, and what runs.
pub(crate) struct Controller {
    state: tempfile::TempDir,
    ledger: watch::Sender<Arc<Ledger>>,
    time: Time,
    off_seconds: i64,
    whole_views_up_to: usize,
    net: Net,
    running: Option<RunningController>,
}

struct RunningController {
    hub: Arc<Hub>,
    cancel: CancellationToken,
    // Its tasks end when it is dropped.
    _parts: JoinSet<()>,
}

impl Controller {
    pub(crate) fn new(time: &Time, off_seconds: i64, whole_views_up_to: usize, net: &Net) -> Self {
        Self {
            state: tempfile::tempdir_in("/dev/shm").unwrap(),
            ledger: watch::Sender::default(),
            time: time.clone(),
            off_seconds,
            whole_views_up_to,
            net: net.clone(),
            running: None,
        }
    }

    fn now(&self) -> SystemTime {
        self.time.wall(self.off_seconds)
    }

    pub(crate) fn start(&mut self) {
        let (time, off) = (self.time.clone(), self.off_seconds);
        let settings = Settings {
            state_dir: self.state.path().to_owned(),
            trust_domain: "td".parse().unwrap(),
            certificate_ttl: CERTIFICATE_TTL,
            default_mode: mesh_core::model::Mode::default(),
            whole_views_up_to: self.whole_views_up_to,
            authority: Arc::new(Authority::open_in(self.state.path(), self.now()).unwrap()),
            bundle: None,
            attestor: None,
            pods: None,
            keys: mesh_controller::jwks::nothing(),
            metrics: Arc::default(),
        };
        let clock = ControllerClock::new(move || time.wall(off));
        let parts = Parts::assemble(settings, self.ledger.subscribe(), clock).unwrap();
        let (hub, cancel) = (parts.hub.clone(), parts.cancel.clone());
        let mut tasks = JoinSet::new();
        for (_, part) in parts.run(self.net.listen()) {
            tasks.spawn(part);
        }
        self.running = Some(RunningController { hub, cancel, _parts: tasks });
    }

    /// SIGKILL: connections are reset, nothing is said or written any more.
    pub(crate) fn kill(&mut self) {
        self.net.reset_controller();
        if let Some(running) = self.running.take() {
            running.cancel.cancel();
        }
    }

    pub(crate) fn runs(&self) -> bool {
        self.running.is_some()
    }

    /// New manifests: they are read whether it runs or not, as a directory is.
    pub(crate) fn read(&self, manifests: &str) {
        let files = BTreeMap::from([(PathBuf::from("mesh.yaml"), Arc::new(FileContent::parse(manifests)))]);
        let next = self.ledger.borrow().next(&files);
        assert_eq!(next.documents_refused(), 0, "{:?}", next.refused());
        self.ledger.send_replace(Arc::new(next));
    }

    /// What a node should know whose agent asks for these addresses.
    pub(crate) fn view(&self, node: &str, asked: &BTreeSet<IpAddr>) -> NodeView {
        let hub = &self.running.as_ref().expect("the controller runs").hub;
        let common = &hub.world().common;
        if hub.by_demand() { common.demanded(node, asked).view().clone() } else { common.view(node) }
    }

    pub(crate) fn token(&self, node: &str) -> String {
        let root = Authority::open_in(self.state.path(), self.now()).unwrap().root_digest();
        let until = self.now() + Duration::from_secs(24 * 3600);
        Tokens::open(self.state.path()).unwrap().create(node, until, &root).unwrap()
    }

    pub(crate) fn rotate_root(&self) {
        let authority = Authority::open_in(self.state.path(), self.now()).unwrap();
        authority.rotate_root(self.now()).now_or_never().unwrap().unwrap();
    }
}

/// An agent: what of it survives, and what runs.
pub(crate) struct Agent {
    pub(crate) node: String,
    files: tempfile::TempDir,
    pub(crate) surroundings: Surroundings,
    running: Option<RunningAgent>,
}

struct RunningAgent {
    control: Control,
    identities: Arc<Identities>,
    /// Identities that had a certificate once in this run, and that the view has named ever since.
    held: BTreeSet<SpiffeId>,
    _enroller: JoinSet<()>,
}

impl Agent {
    pub(crate) fn new(node: &str, time: &Time, off_seconds: i64, net: &Net, chances: &Chances) -> Self {
        let (time, draws) = (time.clone(), chances.fork());
        let surroundings = Surroundings {
            clock: Clock::new(move || time.wall(off_seconds).into()),
            chance: Chance::new(move || draws.fraction()),
            dial: net.dial_from(node),
        };
        let files = tempfile::tempdir_in("/dev/shm").unwrap();
        Self { node: node.to_owned(), files, surroundings, running: None }
    }

    pub(crate) fn give(&self, token: &str) {
        std::fs::write(self.files.path().join("token"), token).unwrap();
    }

    /// A token that was used; none before the first.
    pub(crate) fn token(&self) -> JoinToken {
        JoinToken::parse(&std::fs::read_to_string(self.files.path().join("token")).unwrap()).unwrap()
    }

    fn config(&self) -> Config {
        let (run, token) = (self.files.path().join("run"), self.files.path().join("token"));
        let words = ["mesh-agent", "--node", &self.node, "--controller", "controller:15012", "--run-dir"];
        let words =
            words.map(Into::into).into_iter().chain([run.into(), "--join-token-file".into(), token.into()]);
        match Invocation::parse::<std::ffi::OsString>(words).unwrap() {
            Invocation::Run(config) => *config,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn start(&mut self) {
        let identities = Arc::new(Identities::with_clock(self.surroundings.clock.clone()));
        let (surroundings, shutdown) = (self.surroundings.clone(), CancellationToken::new());
        let control = Control::start(&self.config(), identities.clone(), Role::Owner, surroundings, shutdown)
            .await
            .unwrap();
        let mut enroller = JoinSet::new();
        enroller.spawn(enrol(control.snapshots.clone(), control.reports.clone()));
        enroller.spawn(watch_versions(control.snapshots.clone()));
        self.running = Some(RunningAgent { control, identities, held: BTreeSet::new(), _enroller: enroller });
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.running = None;
    }

    /// What it asks for.
    pub(crate) fn asked(&self) -> BTreeSet<IpAddr> {
        let all = self.running.as_ref().map(|running| running.control.wants.all()).unwrap_or_default();
        addresses_of(&all).collect()
    }

    /// A connection of the node uses an address, for a moment.
    pub(crate) fn connects(&self, address: IpAddr) {
        if let Some(running) = &self.running {
            drop(running.control.wants.hold((1, Direction::Outbound), address));
        }
    }

    /// What holds at any moment: who had a certificate, and is still of this node, has one that is valid.
    pub(crate) fn check(&mut self) {
        let Some(running) = &mut self.running else { return };
        let Some(snapshot) = running.control.snapshots.borrow().clone() else { return };
        let wanted: BTreeSet<SpiffeId> = local_identities(&snapshot);
        running.held.retain(|id| wanted.contains(id));
        for id in wanted {
            let has = running.identities.client(&id).is_ok();
            assert!(has || !running.held.contains(&id), "{} lost the certificate of {id}", self.node);
            if has {
                running.held.insert(id);
            }
        }
        let (now, own) = (self.surroundings.clock.now(), format!("spiffe://td/node/{}", self.node));
        let certificates = running.control.certificates.borrow();
        let node = &certificates[&own.parse().unwrap()];
        assert!(node.expires.unwrap() > now, "{}'s own certificate has run out: {node:?}", self.node);
        assert_eq!(running.control.condition.borrow().views_restored, 0);
    }

    /// What holds once everything has been in order for a while; or what does not.
    pub(crate) fn settled(&self, expected: &NodeView) -> Result<(), String> {
        let running = self.running.as_ref().ok_or("it does not run")?;
        let snapshot = running.control.snapshots.borrow().clone().ok_or("it has no view")?;
        let connection = running.control.connection.borrow().clone();
        if resources(&snapshot) != *expected {
            let difference = resources(&snapshot).diff(expected);
            return Err(format!("view {} lacks {difference:?}; {connection:?}", snapshot.version()));
        }
        let own: SpiffeId = format!("spiffe://td/node/{}", self.node).parse().unwrap();
        let certificates = running.control.certificates.borrow();
        let certified: BTreeSet<&SpiffeId> = certificates
            .iter()
            .filter(|(id, it)| **id != own && it.expires.is_some())
            .map(|(id, _)| id)
            .collect();
        let wanted = local_identities(&snapshot);
        let known: BTreeSet<&SpiffeId> = certificates.keys().filter(|id| **id != own).collect();
        if certified != wanted.iter().collect() || known != certified {
            return Err(format!("certificates {certificates:?}, wanted {wanted:?}; {connection:?}"));
        }
        Ok(())
    }
}

fn local_identities(snapshot: &Snapshot) -> BTreeSet<SpiffeId> {
    snapshot.local().filter_map(|it| snapshot.identity(&it.name)).map(|id| SpiffeId::clone(id)).collect()
}

/// A snapshot as the view that it was made of.
fn resources(snapshot: &Snapshot) -> NodeView {
    let mesh = std::iter::once(Resource::Mesh(Arc::new(snapshot.mesh().clone())));
    let demand = snapshot.demand().map(|demand| Resource::Demand(Arc::new(demand.clone())));
    mesh.chain(demand)
        .chain(snapshot.nobody().map(Resource::Nobody))
        .chain(snapshot.workloads().cloned().map(Resource::Workload))
        .chain(snapshot.services().cloned().map(Resource::Service))
        .chain(snapshot.policies().cloned().map(Resource::Policy))
        .chain(snapshot.authentications().cloned().map(Resource::Authentication))
        .chain(snapshot.intakes().cloned().map(Resource::Intake))
        .chain(snapshot.routes().cloned().map(Resource::Route))
        .collect()
}

/// What the enrolment loop says: the node's workloads are captured, others are gone.
async fn enrol(
    mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    reports: mesh_agent::view::ReportHandle,
) {
    loop {
        if let Some(snapshot) = snapshots.borrow_and_update().clone() {
            let local: BTreeSet<_> = snapshot.local().map(|workload| workload.name.clone()).collect();
            for name in &local {
                reports.set(name, Enrolment::Enrolled, "");
            }
            for gone in reports.all().keys().filter(|name| !local.contains(name)) {
                reports.set(gone, Enrolment::Gone, "");
            }
        }
        if snapshots.changed().await.is_err() {
            return;
        }
    }
}

/// Within one start of the controller, versions never go back; and this controller is never restored.
async fn watch_versions(mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>) {
    let mut held: Option<Version> = None;
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        if let Some(next) = snapshot.map(|snapshot| snapshot.version().parse::<Version>().unwrap()) {
            if let Some(held) = &held {
                assert_eq!(next.after(held), Succession::Onward, "{held} then {next}");
            }
            held = Some(next);
        }
        if snapshots.changed().await.is_err() {
            return;
        }
    }
}
