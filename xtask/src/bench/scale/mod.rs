//! What a large cluster costs the controller: fake nodes and pods behind a real API server, the real controller, and the
//! real control sides of as many agents.
//!
//! | module | what |
//! |---|---|
//! | [`population`] | nodes, pods and services |

mod population;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    cluster::Cluster,
    http, netns,
    process::{self, Program},
    wait,
};

use serde_json::json;

use self::population::Population;
use super::cost;
use crate::run::{cargo, clean, read, step, succeed, target_directory};

/// How many, and how often.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Arguments {
    /// Nodes, each with an agent.
    #[arg(long, default_value_t = 100)]
    nodes: usize,
    /// Pods, all enrolled.
    #[arg(long, default_value_t = 5000)]
    pods: usize,
    /// Services.
    #[arg(long, default_value_t = 500)]
    services: usize,
    /// Services that the pods of each service call.
    #[arg(long, default_value_t = 3)]
    uses: usize,
    /// Changes whose way to all agents is timed.
    #[arg(long, default_value_t = 30)]
    changes: usize,
    /// The controller's setting of this name, if it is not to be its default.
    #[arg(long)]
    whole_views_up_to: Option<usize>,
}

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// The variable that tells the controller where the API server is.
const KUBECONFIG: &str = "KUBECONFIG";

/// Runs it, and prints a table.
pub(super) fn scale(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.nodes > 0 && arguments.services > 0, "at least one node and one service");
    let many_agents = step("Build the agents' control sides", build_agents)?;
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let cluster = step("Bring a cluster up", || Cluster::up(&[]))?;
    let result = measure(arguments, &cluster, &many_agents, directory.path());
    cluster.down()?;
    for (what, value) in result? {
        println!("{what:<64} {value}");
    }
    Ok(())
}

fn build_agents() -> Result<PathBuf> {
    succeed(cargo().args(["build", "--release", "--package", "mesh-tests", "--bin", "many-agents"]))?;
    Ok(target_directory()?.join("release/many-agents"))
}

type Table = Vec<(&'static str, String)>;

fn measure(arguments: &Arguments, cluster: &Cluster, many_agents: &Path, directory: &Path) -> Result<Table> {
    let mut table = Table::new();
    let population = Population::settle(cluster, arguments, directory.join("kwok.log"))?;
    cluster.kubectl(&["apply", "-f", "deploy/crds"])?;
    cluster.kubectl(&["wait", "crd", "--all", "--for=condition=Established", "--timeout=60s"])?;

    let mut controller = Controller::new(cluster, directory, arguments.whole_views_up_to)?;
    let cold = step("The controller starts", || timed(|| controller.start()))?;
    table.push(("controller: start until it serves", seconds(cold)));
    table.push(("controller: memory with no agent", mebibytes(controller.pid())));
    let idle = cost::cpu_seconds(&[controller.pid()]);
    table.push(("controller: CPU of the start", format!("{idle:.1} s")));

    let nodes: Vec<String> = (0..arguments.nodes).map(population::node).collect();
    step("Join tokens", || nodes.iter().try_for_each(|node| controller.token(node)))?;
    for (node, uses) in nodes.iter().zip(population.uses(arguments)) {
        fs::write(directory.join(format!("{node}.uses")), uses.join("\n")).context("writing what is used")?;
    }
    let begun = Instant::now();
    let mut agents = Agents::start(many_agents, &controller, &nodes)?;
    let views = step("All agents join and get their views", || agents.views(&nodes))?;
    table.push(("all agents: join, first view", seconds(begun.elapsed())));
    step("All agents are in sync", || controller.in_sync(nodes.len()))?;
    table.push(("all agents: certificates, reports, in sync", seconds(begun.elapsed())));
    table.push(("controller: memory with all agents", mebibytes(controller.pid())));
    let joined = cost::cpu_seconds(&[controller.pid()]) - idle;
    table.push(("controller: CPU until then", format!("{joined:.1} s")));
    let sizes: Vec<u64> = views.values().copied().collect();
    let (least, most) = (sizes.iter().min().unwrap_or(&0), sizes.iter().max().unwrap_or(&0));
    table.push(("a node's view on the wire", format!("{} to {} KiB", least / 1024, most / 1024)));

    let before = cost::cpu_seconds(&[controller.pid()]);
    let latencies =
        step(&format!("{} changes", arguments.changes), || changes(arguments, cluster, &mut agents, &nodes))?;
    let used = cost::cpu_seconds(&[controller.pid()]) - before;
    let last = latencies.iter().filter_map(|it| it.iter().max().copied()).collect();
    table.push(("a change: from kubectl's start to an agent that has it", at(latencies.concat())));
    table.push(("a change: to the last agent", at(last)));
    table
        .push(("controller: CPU of a change", format!("{:.0} ms", used * 1000.0 / arguments.changes as f64)));

    drop(agents);
    step("All agents are gone", || controller.in_sync(0))?;
    let begun = Instant::now();
    let agents = Agents::start(many_agents, &controller, &nodes)?;
    step("All agents start again", || controller.in_sync(nodes.len()))?;
    table.push(("restart of all agents at once until in sync", seconds(begun.elapsed())));
    controller.kill()?;
    let again = timed(|| {
        step("The controller starts again", || controller.start())?;
        step("All agents are in sync", || controller.in_sync(nodes.len()))
    })?;
    table.push(("restart of the controller until all agents are in sync", seconds(again)));
    table.push(("controller: memory at the end", mebibytes(controller.pid())));
    drop(agents);
    Ok(table)
}

/// Middle and end of times in milliseconds.
fn at(mut times: Vec<u64>) -> String {
    times.sort_unstable();
    let at =
        |part: f64| times.get((times.len().saturating_sub(1) as f64 * part) as usize).copied().unwrap_or(0);
    format!("p50 {} ms, p99 {} ms", at(0.5), at(0.99))
}

/// Makes changes, one after the other: of each, the milliseconds from its start to each agent that has it.
fn changes(
    arguments: &Arguments,
    cluster: &Cluster,
    agents: &mut Agents,
    nodes: &[String],
) -> Result<Vec<Vec<u64>>> {
    let mut latencies = vec![];
    for number in 0..arguments.changes {
        let namespace = population::namespace(number);
        let name = format!("change-{number}");
        // Audited, and selecting all: every node with a pod of the namespace has to hear of it.
        let policy = json!({
            "apiVersion": "nodemesh.io/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"action": "Allow", "enforcement": "Audit", "rules": [{}]},
        });
        let path = format!("/apis/nodemesh.io/v1alpha1/namespaces/{namespace}/authorizationpolicies");
        // Raw: kubectl asks nothing else before.
        let mut post = cluster.command(&["create", "--raw", &path, "-f", "-"]);
        let begun = now_ms();
        netns::run(&mut post, Some(&policy.to_string()))?;
        let heard = agents.hear(&format!("{namespace}/{name}"), nodes, arguments)?;
        latencies.push(heard.into_iter().map(|at| at.saturating_sub(begun)).collect());
    }
    Ok(latencies)
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A program that ends with this one, however that ends.
fn mortal(program: &Path) -> Command {
    let mut command = clean("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed())
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn mebibytes(pid: u32) -> String {
    format!("{} MiB", cost::resident_kib(pid) / 1024)
}

/// The controller, on this machine's own network.
struct Controller {
    command: PathBuf,
    kubeconfig: PathBuf,
    directory: PathBuf,
    listen: SocketAddr,
    admin: SocketAddr,
    whole_views_up_to: Option<usize>,
    program: Option<Program>,
}

impl Controller {
    fn new(cluster: &Cluster, directory: &Path, whole_views_up_to: Option<usize>) -> Result<Self> {
        // Ports that are free now; nobody else takes any here.
        let free = || TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        Ok(Self {
            command: process::binaries()?.join("mesh-controller"),
            kubeconfig: cluster.kubeconfig().to_owned(),
            directory: directory.to_owned(),
            listen: free()?,
            admin: free()?,
            whole_views_up_to,
            program: None,
        })
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn start(&mut self) -> Result<()> {
        let log = self.directory.join("controller.log");
        let mut command = mortal(&self.command);
        command.args(["run", "--source", "kube", "--state-dir"]).arg(self.state());
        command.args(["--listen", &self.listen.to_string(), "--admin-listen", &self.admin.to_string()]);
        if let Some(limit) = self.whole_views_up_to {
            command.args(["--whole-views-up-to", &limit.to_string()]);
        }
        command.env(KUBECONFIG, &self.kubeconfig).env("RUST_LOG", "info");
        self.program = Some(Program::start("mesh-controller", &mut command, &log)?);
        let ready = wait::try_until(PATIENCE, || {
            let answer = http::get_here(self.admin, "/readyz").map_err(|error| format!("{error:#}"))?;
            wait::holds(answer.status == 200, || answer.body)
        });
        ready.map_err(|complaint| anyhow::anyhow!("{complaint}\n{}", process::tail(&log)))
    }

    fn pid(&self) -> u32 {
        self.program.as_ref().map_or(0, Program::pid)
    }

    fn kill(&mut self) -> Result<()> {
        self.program.take().context("it does not run")?.kill()
    }

    fn token(&self, node: &str) -> Result<()> {
        let mut token = clean(&self.command);
        let token = read(token.args(["token", "--node", node, "--state-dir"]).arg(self.state()))?;
        let path = self.directory.join(format!("{node}.token"));
        fs::write(&path, token).with_context(|| format!("writing {}", path.display()))
    }

    /// So many agents are connected, and have put in force what there is.
    fn in_sync(&self, wanted: usize) -> Result<()> {
        let settled = wait::try_until(PATIENCE, || {
            let answer =
                http::get_here(self.admin, "/api/v1/status").map_err(|error| format!("{error:#}"))?;
            let status: serde_json::Value =
                serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
            let agents = status["agents"].as_array().map_or(&[][..], Vec::as_slice);
            let connected = agents.iter().filter(|agent| agent["connected"] == true);
            let (all, in_sync) = connected
                .fold((0, 0), |(all, synced), it| (all + 1, synced + usize::from(it["in_sync"] == true)));
            wait::holds(all == wanted && in_sync == wanted, || {
                format!("{all} agents are connected and {in_sync} in sync, of {wanted}")
            })
        });
        settled.map_err(anyhow::Error::msg)
    }
}

/// What an agent said.
#[derive(Debug)]
struct Event {
    node: String,
    ms: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    View { bytes: u64 },
    Policy { name: String },
}

/// The agents' control sides.
struct Agents {
    program: Child,
    events: Receiver<Event>,
    log: PathBuf,
}

impl Agents {
    fn start(program: &Path, controller: &Controller, nodes: &[String]) -> Result<Self> {
        let log = controller.directory.join("agents.log");
        let errors = File::options().create(true).append(true).open(&log)?;
        let mut command = mortal(program);
        command.arg(controller.listen.to_string()).arg(&controller.directory).args(nodes);
        let mut program =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors).spawn().context("starting")?;
        let said = BufReader::new(program.stdout.take().context("its output is ours")?);
        let (sender, events) = channel();
        thread::spawn(move || {
            for event in said.lines().map_while(Result::ok).filter_map(|line| parse(&line)) {
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Ok(Self { program, events, log })
    }

    fn next(&self) -> Result<Event> {
        let event = self.events.recv_timeout(PATIENCE);
        event.with_context(|| format!("the agents say nothing more\n{}", process::tail(&self.log)))
    }

    /// The bytes of every node's first view.
    fn views(&self, nodes: &[String]) -> Result<BTreeMap<String, u64>> {
        let mut views = BTreeMap::new();
        while views.len() < nodes.len() {
            let event = self.next()?;
            if let What::View { bytes } = event.what {
                views.insert(event.node, bytes);
            }
        }
        Ok(views)
    }

    /// When each node that has pods of its namespace got a policy, in milliseconds since 1970.
    fn hear(&mut self, policy: &str, nodes: &[String], arguments: &Arguments) -> Result<Vec<u64>> {
        let wanted = holders(policy, nodes, arguments)?;
        let mut heard = BTreeMap::new();
        while heard.len() < wanted.len() {
            let event = self.next()?;
            match event.what {
                What::Policy { name } if name == policy => drop(heard.insert(event.node, event.ms)),
                _ => {}
            }
        }
        Ok(heard.into_values().collect())
    }
}

/// The nodes that have a pod of a policy's namespace.
fn holders(policy: &str, nodes: &[String], arguments: &Arguments) -> Result<BTreeSet<String>> {
    let Some((namespace, _)) = policy.split_once('/') else { bail!("{policy} has no namespace") };
    let places = (0..arguments.pods).map(|pod| population::place_of(pod, nodes.len(), arguments.services));
    let of_namespace = places.filter(|(app, _)| population::namespace(*app) == namespace);
    Ok(of_namespace.map(|(_, node)| nodes[node].clone()).collect())
}

impl Drop for Agents {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn parse(line: &str) -> Option<Event> {
    let event: serde_json::Value = serde_json::from_str(line).ok()?;
    let text = |key: &str| event[key].as_str().map(str::to_owned);
    let what = match event["event"].as_str()? {
        "view" => What::View { bytes: event["bytes"].as_u64()? },
        "policy" => What::Policy { name: text("name")? },
        _ => return None,
    };
    Some(Event { node: text("node")?, ms: event["ms"].as_u64()?, what })
}
