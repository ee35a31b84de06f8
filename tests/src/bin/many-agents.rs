//! The control sides of many agents in one process: each joins, holds certificates and follows its view over real TLS
//! and gRPC, says of every workload of its node that it is enrolled, and asks for the addresses that its connections
//! would use. No kernel, no connections of workloads: what a controller has to do for a large mesh is the same, on one
//! machine.
//!
//! Every line on standard output is an event of one node, in JSON: `{"node", "ms", "event"}` with the clock in
//! milliseconds since 1970. Events are `view` (with its `bytes` as one message, when it is the first), and `policy` (with its `name`, when one comes
//! into the view).
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use anyhow::{Context, Result, bail, ensure};
use mesh_agent::{
    config::{Config, Invocation},
    control::Control,
    identity::store::Identities,
    metrics::Direction,
    surroundings::Surroundings,
    view::{Enrolment, ReportHandle, Role},
    wants::{Asker, Held},
};
use mesh_core::{
    view::{Delta, Resource, Snapshot},
    wire,
};
use prost::Message;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

const USAGE: &str = "usage: many-agents HOST:PORT DIRECTORY NODE...: a join token of each node is in DIRECTORY/NODE.token, \
                     the addresses that its workloads use are in DIRECTORY/NODE.uses, one a line";
/// Who uses them.
const ASKER: Asker = (0, Direction::Outbound);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [controller, directory, nodes @ ..] = &words[..] else { bail!(USAGE) };
    ensure!(!nodes.is_empty(), USAGE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(controller, Path::new(directory), nodes))
}

/// Runs until one of them fails, which none should.
async fn run(controller: &str, directory: &Path, nodes: &[String]) -> Result<()> {
    let mut agents = JoinSet::new();
    for node in nodes {
        agents.spawn(agent(controller.to_owned(), directory.to_owned(), node.clone()));
    }
    match agents.join_next().await {
        Some(ended) => ended?,
        None => Ok(()),
    }
}

async fn agent(controller: String, directory: PathBuf, node: String) -> Result<()> {
    let config = config(&controller, &directory, &node)?;
    let uses = fs::read_to_string(directory.join(format!("{node}.uses")))?;
    let uses: Vec<IpAddr> = uses.lines().map(str::parse).collect::<Result<_, _>>()?;
    let (identities, surroundings) = (Arc::new(Identities::new()), Surroundings::default());
    let mut control =
        Control::start(&config, identities, Role::Owner, surroundings, CancellationToken::new())
            .await
            .with_context(|| format!("node {node} does not join"))?;
    let hold = |address: &IpAddr| control.wants.hold(ASKER, *address);
    // For as long as it runs.
    let _held: Vec<Held> = uses
        .iter()
        .map(hold)
        .collect::<Result<_, _>>()
        .map_err(|why| anyhow::anyhow!("node {node} may not ask: {why:?}"))?;
    let following = follow(&node, control.snapshots.clone(), control.reports.clone());
    tokio::select! {
        () = following => bail!("node {node} has no views any more"),
        ended = control.ended() => bail!("the control side of node {node} has ended: {ended:?}"),
    }
}

fn config(controller: &str, directory: &Path, node: &str) -> Result<Config> {
    let (run, token) = (directory.join(node), directory.join(format!("{node}.token")));
    let words = [
        "mesh-agent".into(),
        "--node".into(),
        node.into(),
        "--controller".into(),
        controller.into(),
        "--run-dir".into(),
        run.into_os_string(),
        "--join-token-file".into(),
        token.into_os_string(),
    ];
    match Invocation::parse::<std::ffi::OsString>(words)? {
        Invocation::Run(config) => Ok(*config),
        other => bail!("{other:?} is not a run"),
    }
}

/// Says what comes into the view, and reports every workload of the node as enrolled.
async fn follow(node: &str, mut views: watch::Receiver<Option<Arc<Snapshot>>>, reports: ReportHandle) {
    let mut policies = None;
    loop {
        if let Some(view) = views.borrow_and_update().clone() {
            let present: BTreeSet<String> = view.policies().map(|policy| policy.name.to_string()).collect();
            match &policies {
                None => say(node, "view", "bytes", size(&view).into()),
                Some(before) => {
                    present
                        .difference(before)
                        .for_each(|name| say(node, "policy", "name", name.as_str().into()));
                }
            }
            policies = Some(present);
            let local: BTreeSet<_> = view.local().map(|workload| workload.name.clone()).collect();
            for name in &local {
                reports.set(name, Enrolment::Enrolled, "");
            }
            for gone in reports.all().keys().filter(|name| !local.contains(name)) {
                reports.set(gone, Enrolment::Gone, "");
            }
        }
        if views.changed().await.is_err() {
            return;
        }
    }
}

fn say(node: &str, event: &str, key: &str, value: serde_json::Value) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    println!("{}", serde_json::json!({"node": node, "ms": now as u64, "event": event, key: value}));
}

/// The bytes of a view as one message.
fn size(view: &Snapshot) -> usize {
    let mesh = std::iter::once(Resource::Mesh(Arc::new(view.mesh().clone())));
    let upserts: Vec<Resource> = mesh
        .chain(view.demand().map(|demand| Resource::Demand(Arc::new(demand.clone()))))
        .chain(view.nobody().map(Resource::Nobody))
        .chain(view.workloads().cloned().map(Resource::Workload))
        .chain(view.services().cloned().map(Resource::Service))
        .chain(view.policies().cloned().map(Resource::Policy))
        .chain(view.authentications().cloned().map(Resource::Authentication))
        .chain(view.intakes().cloned().map(Resource::Intake))
        .chain(view.routes().cloned().map(Resource::Route))
        .collect();
    let delta = Delta { upserts, removes: vec![] };
    wire::update(view.version().to_owned(), true, &delta).encoded_len()
}
