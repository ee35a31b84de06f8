//! Everything of the agent that speaks with the controller: the node's certificate, its workloads' certificates, the
//! view. Runs on the one control thread, apart from the connections it serves.
//!
//! Nothing here is asked on a connection's way: it publishes into [`Identities`] and into watches.

use std::sync::Arc;

use mesh_core::{identity::TrustDomain, view::Snapshot};
use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    config::Config,
    health::{Condition, Health},
    identity::{
        Certificates,
        channel::controller_channel,
        node::{Node, NodeError, NodeSettings},
        store::Identities,
        workloads::Workloads,
    },
    rpc::Connection,
    run_dir::RunDir,
    surroundings::Surroundings,
    view::{ReportHandle, Role, View, cache::Cache},
    wants::Wants,
};

/// The control side of a running agent.
#[derive(Debug)]
pub struct Control {
    /// The trust domain that the node is in.
    pub trust_domain: TrustDomain,
    /// What connections are decided on; `None` until the first view came.
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// Whether the controller can be reached.
    pub connection: watch::Receiver<Connection>,
    /// The certificates of the node and of its workloads.
    pub certificates: watch::Receiver<Certificates>,
    /// What is wrong that no connection shows.
    pub condition: watch::Receiver<Condition>,
    /// Where whoever finds something wrong says so.
    pub health: Health,
    /// Where to say how workloads are.
    pub reports: ReportHandle,
    /// Where to say which addresses connections use.
    pub wants: Arc<Wants>,
    role: watch::Sender<Role>,
    tasks: JoinSet<()>,
    shutdown: CancellationToken,
}

impl Control {
    /// Becomes a node, if this machine is none yet, and starts to follow the controller. Returns at once when an
    /// earlier run left a valid certificate, otherwise when the node has joined.
    ///
    /// Has to be called on the control thread's runtime. `shutdown` ends what it starts.
    pub async fn start(
        config: &Config,
        identities: Arc<Identities>,
        role: Role,
        surroundings: Surroundings,
        shutdown: CancellationToken,
    ) -> Result<Self, NodeError> {
        let run_dir = RunDir::open(&config.run_dir)?;
        let published = watch::Sender::new(Certificates::new());
        let certificates = published.subscribe();
        let health = Health::default();
        let settings = NodeSettings::from(config);
        let mut node =
            Node::start(settings, run_dir.clone(), published.clone(), surroundings.clone(), health.clone())
                .await?;
        let trust_domain = node.trust_domain().clone();

        let role = watch::Sender::new(role);
        let wants = Wants::new(config.addresses_per_workload);
        let view = View::new(
            &config.node,
            trust_domain.clone(),
            Cache::new(run_dir.clone(), health.clone(), wants.clone()),
            role.subscribe(),
            surroundings.clone(),
            health.clone(),
            published.subscribe(),
        );
        let snapshots = view.snapshots();
        let kept = snapshots.borrow().clone();
        if let Some(kept) = &kept {
            node.adopt(kept);
        }
        let dial = surroundings.dial.clone();
        let (condition, told) = (health.subscribe(), health.clone());
        let roots = node.roots().clone();
        let mut workloads = Workloads::new(identities, run_dir, roots, published, surroundings, health);
        if let Some(kept) = &kept {
            workloads.adopt(kept);
        }

        let channel = controller_channel(config.controller.clone(), dial, node.tls());
        let (connection, reports) = (view.connection(), view.reports());
        let mut tasks = JoinSet::new();
        let node = node.run(channel.clone(), snapshots.clone(), shutdown.clone());
        tasks.spawn(node.instrument(tracing::info_span!("node")));
        let workloads =
            workloads.run(channel.clone(), snapshots.clone(), connection.clone(), shutdown.clone());
        tasks.spawn(workloads.instrument(tracing::info_span!("workloads")));
        tasks.spawn(view.run(channel, shutdown.clone()).instrument(tracing::info_span!("view")));
        Ok(Self {
            trust_domain,
            snapshots,
            connection,
            certificates,
            condition,
            health: told,
            reports,
            wants,
            role,
            tasks,
            shutdown,
        })
    }

    /// Waits until one of the tasks has ended: after a shutdown, or because of a defect. Can be dropped at any point.
    pub async fn ended(&mut self) -> Result<(), JoinError> {
        self.tasks.join_next().await.unwrap_or(Ok(()))
    }

    /// Takes another part beside the other agent of the node.
    pub fn become_the(&self, role: Role) {
        self.role.send_replace(role);
    }

    /// Ends all of it, with what must survive written to the run directory.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}
