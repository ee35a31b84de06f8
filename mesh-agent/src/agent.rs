//! Composition: what exists in an agent, who owns it, in which order it starts and stops.
//!
//! Start: cgroup (before the first socket), runtimes, kernel programs, control side, ownership of the node, admin
//! server, enrolment.
//! Stop: serves on until a successor takes over; then enrolment stands still with everything attached, connections
//! drain to the deadline, and the sockets go. Without a successor the guard refuses from then on what no agent takes.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use mesh_core::{model::Workload, view::Snapshot};
use mesh_settings::{InForce, log::LogFilter};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    runtime::Builder,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    access_log::AccessLog,
    admin::{self, NodeState, Observed},
    capture::{self, Holder, Kernel, Maps, Pins},
    checks::Checks,
    config::Config,
    connection::{Limits, Node},
    control::Control,
    drain::Drain,
    enrol::{
        Enroller,
        hold::{Before, Holds},
    },
    headroom::Headroom,
    health::{Condition, Fill},
    identity::{Certificates, store::Identities},
    live::Connections,
    metrics::Metrics,
    net::{cgroup, netns::Namespace, sysctl},
    ownership::{self, Ownership},
    privileges,
    record::Seen,
    rpc::Connection,
    run_dir::RunDir,
    spans::{Spans, Tracing},
    surroundings::Surroundings,
    threads::Threads,
    view::{Enrolment, ReportHandle, Role},
    wants::{Known, Wants},
};

/// Runs an agent until SIGTERM or SIGINT, and its connections on until they end or the deadline cuts them.
pub fn run(config: &Config, log_filter: LogFilter) -> anyhow::Result<()> {
    // Before anything enters another namespace.
    sysctl::make_writable()?;
    // Before there is any socket or thread.
    let agent_cgroup = cgroup::enter(&config.cgroup)?;
    Namespace::of_agent().context("cannot open the node's own network namespace")?;
    raise_descriptor_limit();
    // Before there is any other thread: capabilities are a thread's own, and threads inherit them.
    privileges::keep_needed()?;
    let threads = Threads::start().context("cannot start the threads of connections")?;
    let control = Builder::new_current_thread().thread_name("control").enable_all().build()?;
    control.block_on(serve(config, log_filter, &threads, agent_cgroup))
}

async fn serve(
    config: &Config,
    log_filter: LogFilter,
    threads: &Threads,
    agent_cgroup: u64,
) -> anyhow::Result<()> {
    let mut told = Told::listen()?;
    let mut ownership = Ownership::new(RunDir::open(&config.run_dir)?);
    let alone = match ownership.try_take()? {
        Ok(()) => true,
        Err(owner) => {
            tracing::warn!(?owner, "another agent owns this node: taking over from it, it will drain");
            false
        }
    };
    let mut kernel = Kernel::load(&config.bpffs)?;
    let pins = Pins::hold(&config.bpffs)?;
    let holder = Holder::of(&mut kernel)?;
    capture::log::forward(kernel.bpf_mut()).context("cannot read the kernel programs' log")?;

    let stop = CancellationToken::new();
    let identities = Arc::new(Identities::new());
    let (metrics, registry) = Metrics::new();
    let role = if alone { Role::Owner } else { Role::Successor };
    let surroundings = Surroundings::default();
    let mut control = tokio::select! {
        control = Control::start(config, identities.clone(), role, surroundings, stop.clone()) => control?,
        () = told.next_word() => return Ok(()),
    };
    let log = AccessLog::open(&config.access_log, metrics.clone())
        .with_context(|| format!("cannot open the access log {}", config.access_log.display()))?
        .of(config.access_log_mode);
    let spans = {
        let _inside = threads.first().enter();
        let (view, metrics) = (control.snapshots.clone(), metrics.clone());
        tracing(config).map(|tracing| Spans::start(&tracing, &config.node, view, metrics)).transpose()?
    };
    let node = {
        let _inside = threads.first().enter();
        let known = Known { view: control.snapshots.clone(), wants: control.wants.clone() };
        Node::new(
            config.node.clone(),
            known,
            identities.clone(),
            metrics.clone(),
            Seen { log: log.clone(), spans: spans.clone() },
            limits(config.stalled_memory),
            Drain::new(),
        )
    };
    let before = if alone {
        Before::now().context("cannot look at the node's links")?
    } else {
        // Not before there is something to serve with: until then the old one goes on as if we were not here.
        tokio::select! {
            taken = take_over(&mut ownership, &mut control) => taken?,
            () = told.next_word() => return Ok(()),
        }
    };
    // Only now: an agent that never gets here has changed nothing, and what the old one changed until now is seen.
    let maps = Maps::new(kernel.bpf_mut(), agent_cgroup)?;
    let in_force = CancellationToken::new();
    let headroom = Headroom::new(metrics.clone(), control.health.clone());
    let holds = match config.hold_new {
        Duration::ZERO => None,
        limit => Some(Holds::start(limit, holder, before).context("cannot hold new pods")?),
    };
    let enroller = Enroller {
        kernel,
        maps,
        pins,
        node: node.clone(),
        identities,
        threads: threads.clone(),
        metrics: metrics.clone(),
        headroom: headroom.clone(),
        reports: control.reports.clone(),
        checks: Checks::new(threads.first().clone(), control.reports.clone(), metrics.clone()),
        holds,
        run_dir: config.run_dir.clone(),
        in_force: in_force.clone(),
    };
    let observed = Arc::new(State::of(config, &control, &node, log_filter));
    let listener = admin::listen("--admin-listen", config.admin_listen).await?;
    let (shown, stand_down) = (CancellationToken::new(), CancellationToken::new());
    let registry = Arc::new(registry);
    let mut shows = vec![];
    if let Some(address) = config.metrics_listen {
        let listener = admin::listen("--metrics-listen", address).await?;
        shows.push(tokio::spawn(admin::serve_metrics(listener, registry.clone(), shown.clone())));
    }
    shows.push(tokio::spawn(admin::serve(listener, registry, observed.clone(), shown.clone())));
    tokio::spawn(headroom.watch(node.stalled().clone(), stop.clone()));
    tokio::spawn(follow(observed.clone(), metrics, stop.clone()));
    tracing::info!(node = config.node, admin = %SocketAddr::to_string(&config.admin_listen), "agent started");

    let mut enrolment = std::pin::pin!(enroller.run(control.snapshots.clone(), stand_down.clone()));
    let owned = own(&mut ownership, &in_force, &mut told, config.drain_deadline);
    let successor = tokio::select! {
        _ = &mut enrolment => anyhow::bail!("the control side has ended"),
        successor = owned => successor?,
    };
    // The loop owns the listeners: they are kept, standing still, until the connections have drained.
    let mut deadline = config.drain_deadline;
    let _held = if let Some(name) = successor {
        tracing::warn!(successor = ?name, "a newer agent takes over: standing down");
        stand_down.cancel();
        let held = enrolment.await;
        shown.cancel();
        for show in shows {
            show.await.context("the admin server has panicked")?;
        }
        control.become_the(Role::Predecessor);
        ownership.release();
        relay_on(&ownership, &node, &mut told, config.drain_deadline).await;
        Some(held)
    } else {
        tracing::warn!("no successor came: connections are cut");
        deadline = Duration::ZERO;
        None
    };
    let late = tokio::select! {
        late = node.drain().drain(deadline) => late,
        () = told.next_word() => node.drain().drain(Duration::ZERO).await,
    };
    if late > 0 {
        tracing::warn!(late, "connections were cut at the drain deadline");
    }
    control.stop().await;
    log.flush().await;
    if let Some(spans) = spans {
        spans.flush(LAST_SPANS).await;
    }
    Ok(())
}

/// How long the collector may take for the last spans.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// What is traced, if anything is.
fn tracing(config: &Config) -> Option<Tracing> {
    let endpoint = config.tracing_endpoint.clone()?;
    let (protocol, roots) = (config.tracing_protocol, config.tracing_roots.clone());
    Some(Tracing { endpoint, protocol, roots, share: config.tracing_sample })
}

/// Takes the node over from its present agent, once there is a view to serve it with. Returns the veths from before: what
/// comes from then on is not held by the old one for sure.
async fn take_over(ownership: &mut Ownership, control: &mut Control) -> anyhow::Result<Before> {
    control.snapshots.wait_for(Option::is_some).await.context("the control side has ended")?;
    let before = Before::now().context("cannot look at the node's links")?;
    ownership.take_over().await?;
    control.become_the(Role::Owner);
    Ok(before)
}

/// Owns the node until a successor wants to, whose name it returns; or, once the agent was told to end, at most to
/// the deadline. Until somebody takes over nothing changes: the node is better served by an agent that is about to
/// end than by none.
async fn own(
    ownership: &mut Ownership,
    in_force: &CancellationToken,
    told: &mut Told,
    deadline: Duration,
) -> anyhow::Result<Option<ownership::Name>> {
    let ended = async {
        told.next_word().await;
        tracing::info!(?deadline, "told to end: serving on until a successor takes over");
        tokio::select! {
            () = tokio::time::sleep(deadline) => {}
            () = told.next_word() => {}
        }
    };
    let owning = async {
        tokio::select! {
            name = ownership.claimed() => return Ok(name),
            () = in_force.cancelled() => {}
        }
        ownership.serves()?;
        anyhow::Ok(ownership.claimed().await)
    };
    tokio::select! {
        successor = owning => successor.map(Some),
        () = ended => Ok(None),
    }
}

/// Stood down: accepts what still comes until the successor serves, then lets what runs go on until the agent is told
/// to end. What may still come is bounded by the deadline, once it was told.
async fn relay_on(ownership: &Ownership, node: &Node, told: &mut Told, deadline: Duration) {
    let late = async {
        told.ever().await;
        tokio::time::sleep(deadline).await;
    };
    tokio::select! {
        _ = ownership.superseded() => {}
        () = late => tracing::error!("the successor does not serve"),
    }
    node.drain().begin();
    tracing::info!("the successor serves: connections go on, nothing new is taken");
    told.ever().await;
}

/// Being told to end, by SIGTERM or SIGINT; the second time means at once.
#[derive(Debug)]
struct Told {
    terminate: Signal,
    interrupt: Signal,
    already: bool,
}

impl Told {
    fn listen() -> std::io::Result<Self> {
        let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt, already: false })
    }

    /// Done when the agent is told to end, or told again. Cancel-safe.
    async fn next_word(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        self.already = true;
    }

    /// Done when the agent has ever been told to end. Cancel-safe.
    async fn ever(&mut self) {
        if !self.already {
            self.next_word().await;
        }
    }
}

/// The limits, with as many connections as there are descriptors for.
fn limits(stalled_memory: usize) -> Limits {
    let limits = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((descriptors, _)) => Limits::with_descriptors(descriptors),
        Err(_) => Limits::default(),
    };
    Limits { stalled_memory, ..limits }
}

/// Two descriptors a connection at each agent: as many as the system lets us have.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(limit) => tracing::info!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files to its hard limit"),
    }
}

/// What the admin server tells.
#[derive(Debug)]
struct State {
    node: String,
    settings: Vec<InForce>,
    log: LogFilter,
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    connection: watch::Receiver<Connection>,
    certificates: watch::Receiver<Certificates>,
    condition: watch::Receiver<Condition>,
    reports: ReportHandle,
    wants: Arc<Wants>,
    connections: Arc<Connections>,
}

impl State {
    fn of(config: &Config, control: &Control, node: &Node, log: LogFilter) -> Self {
        Self {
            node: config.node.clone(),
            settings: config.in_force.clone(),
            log,
            snapshots: control.snapshots.clone(),
            connection: control.connection.clone(),
            certificates: control.certificates.clone(),
            condition: control.condition.clone(),
            reports: control.reports.clone(),
            wants: control.wants.clone(),
            connections: node.connections().clone(),
        }
    }
}

impl Observed for State {
    fn ready(&self) -> Result<(), String> {
        let view =
            self.snapshots.borrow().clone().ok_or("no view of the mesh yet: is the controller reachable?")?;
        let reports = self.reports.all();
        // A pod may be on its way up or down for as long as it takes: that it was looked for is enough.
        let undecided = |workload: &&Arc<Workload>| match reports.get(&workload.name) {
            None => true,
            Some(report) if workload.uid.is_empty() => {
                !matches!(report.enrolment, Enrolment::Enrolled | Enrolment::Failed)
            }
            Some(_) => false,
        };
        match view.local().find(undecided) {
            Some(workload) => Err(format!("{} is not enrolled yet", workload.name)),
            None => Ok(()),
        }
    }

    fn view(&self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow().clone()
    }

    fn connections(&self) -> &Connections {
        &self.connections
    }

    fn settings(&self) -> &[InForce] {
        &self.settings
    }

    fn log(&self) -> &LogFilter {
        &self.log
    }

    fn state(&self) -> NodeState {
        let view = self.snapshots.borrow().clone();
        let connection = self.connection.borrow().clone();
        let certificates = self.certificates.borrow().clone();
        let condition = self.condition.borrow().clone();
        NodeState {
            problems: condition.problems(),
            fills: condition.fills.into_values().collect::<Vec<Fill>>(),
            addresses_asked: self.wants.len(),
            ..NodeState::new(&self.node, view.as_deref(), &connection, &certificates, &self.reports.all())
        }
    }
}

/// How often what changes with connections is counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);

/// Keeps the metrics of the control side true.
async fn follow(state: Arc<State>, metrics: Arc<Metrics>, stop: CancellationToken) {
    let mut snapshots = state.snapshots.clone();
    let mut connection = state.connection.clone();
    let mut certificates = state.certificates.clone();
    let mut condition = state.condition.clone();
    let mut shown: Vec<String> = Vec::new();
    let mut timer = tokio::time::interval(COUNT_INTERVAL);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if let Some(view) = snapshots.borrow_and_update().as_ref() {
            metrics.view(view.version());
            metrics.view_size(view);
        }
        metrics.addresses_asked(state.wants.len());
        metrics.controller_connected(*connection.borrow_and_update() == Connection::Open);
        metrics.condition(&condition.borrow_and_update());
        let current = certificates.borrow_and_update().clone();
        metrics.certificates_failing(current.values().filter(|status| status.error.is_some()).count());
        for gone in shown.iter().filter(|id| !current.keys().any(|key| key.to_string() == **id)) {
            metrics.certificate_expiry(gone, None);
        }
        shown = current.keys().map(ToString::to_string).collect();
        for (id, status) in &current {
            let expires = status.expires.map(|at| at.unix_timestamp() as f64);
            metrics.certificate_expiry(&id.to_string(), expires);
        }
        tokio::select! {
            // All branches are cancel-safe.
            () = stop.cancelled() => return,
            Ok(()) = snapshots.changed() => {}
            Ok(()) = connection.changed() => {}
            Ok(()) = certificates.changed() => {}
            Ok(()) = condition.changed() => {}
            _ = timer.tick() => {}
        }
    }
}
