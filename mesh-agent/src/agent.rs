//! Composition: what exists in an agent, who owns it, in which order it starts and stops.
//!
//! Start: cgroup (before the first socket), runtimes, control side, kernel programs, enrolment, admin server.
//! Stop: enrolment stands still with everything attached, connections drain to the deadline, then the sockets go; from
//! then on the guard refuses what no other agent takes.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context;
use mesh_core::view::Snapshot;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{self, NodeState, Observed},
    capture::{self, Kernel, Maps},
    config::Config,
    connection::{Limits, Node},
    control::Control,
    drain::Drain,
    enrol::Enroller,
    identity::{Certificates, store::Identities},
    metrics::Metrics,
    net::{cgroup, netns::Namespace},
    record::AccessLog,
    rpc::Connection,
    view::{Enrolment, ReportHandle},
};

/// Runs an agent until SIGTERM or SIGINT.
pub fn run(config: &Config) -> anyhow::Result<()> {
    // Before there is any socket or thread.
    let agent_cgroup = cgroup::enter(&config.cgroup)?;
    Namespace::of_agent().context("cannot open the node's own network namespace")?;
    raise_descriptor_limit();
    let data = Builder::new_multi_thread().thread_name("data").enable_all().build()?;
    let control = Builder::new_current_thread().thread_name("control").enable_all().build()?;
    control.block_on(serve(config, &data, agent_cgroup))?;
    data.shutdown_background();
    Ok(())
}

async fn serve(config: &Config, data: &Runtime, agent_cgroup: u64) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut kernel = Kernel::load(&config.bpffs)?;
    let maps = Maps::new(kernel.bpf_mut(), agent_cgroup)?;
    capture::log::forward(kernel.bpf_mut()).context("cannot read the kernel programs' log")?;

    let stop = CancellationToken::new();
    let identities = Arc::new(Identities::new());
    let (metrics, registry) = Metrics::new();
    let control = tokio::select! {
        control = Control::start(config, identities.clone(), stop.clone()) => control?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let log = AccessLog::open(&config.access_log)
        .with_context(|| format!("cannot open the access log {}", config.access_log.display()))?;
    let node = {
        let _inside = data.enter();
        let (name, view) = (config.node.clone(), control.snapshots.clone());
        Node::new(
            name,
            view,
            identities.clone(),
            metrics.clone(),
            log.clone(),
            Limits::default(),
            Drain::new(),
        )
    };
    let enroller = Enroller {
        kernel,
        maps,
        node: node.clone(),
        identities,
        data: data.handle().clone(),
        metrics: metrics.clone(),
        reports: control.reports.clone(),
        run_dir: config.run_dir.clone(),
    };
    let observed = Arc::new(State::of(&config.node, &control));
    let listener = admin::listen(config.admin_listen).await?;
    tokio::spawn(admin::serve(listener, Arc::new(registry), observed.clone(), stop.clone()));
    tokio::spawn(follow(observed.clone(), metrics, stop.clone()));
    tracing::info!(node = config.node, admin = %SocketAddr::to_string(&config.admin_listen), "agent started");

    // The loop owns the listeners: it is kept, standing still, until the connections have drained.
    let mut enrolment = std::pin::pin!(enroller.run(control.snapshots.clone(), stop.clone()));
    tokio::select! {
        () = &mut enrolment => {}
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
    }
    let late = node.drain().drain(config.drain_deadline).await;
    if late > 0 {
        tracing::warn!(late, "connections were cut at the drain deadline");
    }
    control.stop().await;
    log.flush().await;
    Ok(())
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
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    connection: watch::Receiver<Connection>,
    certificates: watch::Receiver<Certificates>,
    reports: ReportHandle,
}

impl State {
    fn of(node: &str, control: &Control) -> Self {
        Self {
            node: node.to_owned(),
            snapshots: control.snapshots.clone(),
            connection: control.connection.clone(),
            certificates: control.certificates.clone(),
            reports: control.reports.clone(),
        }
    }
}

impl Observed for State {
    fn ready(&self) -> Result<(), String> {
        let view =
            self.snapshots.borrow().clone().ok_or("no view of the mesh yet: is the controller reachable?")?;
        let reports = self.reports.all();
        let undecided = |name| {
            !reports
                .get(name)
                .is_some_and(|report| matches!(report.enrolment, Enrolment::Enrolled | Enrolment::Failed))
        };
        match view.local().find(|workload| undecided(&workload.name)) {
            Some(workload) => Err(format!("{} is not enrolled yet", workload.name)),
            None => Ok(()),
        }
    }

    fn state(&self) -> NodeState {
        let view = self.snapshots.borrow().clone();
        let connection = self.connection.borrow().clone();
        let certificates = self.certificates.borrow().clone();
        NodeState::new(&self.node, view.as_deref(), &connection, &certificates, &self.reports.all())
    }
}

/// Keeps the metrics of the control side true.
async fn follow(state: Arc<State>, metrics: Arc<Metrics>, stop: CancellationToken) {
    let mut snapshots = state.snapshots.clone();
    let mut connection = state.connection.clone();
    let mut certificates = state.certificates.clone();
    let mut shown: Vec<String> = Vec::new();
    loop {
        if let Some(view) = snapshots.borrow_and_update().as_ref() {
            metrics.view(view.version());
        }
        metrics.controller_connected(*connection.borrow_and_update() == Connection::Open);
        let current = certificates.borrow_and_update().clone();
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
            else => return,
        }
    }
}
