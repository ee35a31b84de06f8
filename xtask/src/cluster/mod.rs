//! `cluster`: a real Kubernetes of two nodes on this machine, for tests and for people, from nothing in 20 seconds.
//!
//! | module | what it does |
//! |---|---|
//! | [`parts`] | what it is made of: Kubernetes built from source, Debian's containerd, images |
//! | [`capabilities`] | says what this machine lacks |
//! | [`certificates`] | the cluster's CA, and who is who to the API server |
//! | [`network`] | the wire between machines, and the way there from here |
//! | [`control_plane`], [`node`] | which programs a machine runs, with which settings |
//! | [`machine`] | the first process of a machine: mounts, starts, starts again |
//! | [`dns`], [`gateway_api`] | what a cluster has when asked for: names, the Gateway API's kinds |
//! | [`sweep`] | takes everything down, also what a crash left |
//!
//! A machine of the cluster is a network, mount, host name and process namespace. When its first process ends the
//! kernel ends all others, and the mounts go with them: that is what makes taking it down certain.

mod capabilities;
mod certificates;
mod control_plane;
pub(crate) mod dns;
pub(crate) mod gateway_api;
mod machine;
mod network;
mod node;
mod parts;
mod sweep;

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Subcommand, ValueEnum};
use mesh_tests::{
    cluster::names::{MACHINES, Machine, NODES, Names, OF_PEOPLE},
    process,
};
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use crate::run::{clean, read, step, succeed, target};
pub(crate) use parts::{Parts, prepare};

/// How long the API server may take until it answers.
const API_DEADLINE: Duration = Duration::from_secs(120);
/// How long nodes, and what runs on them, may take until they are ready, as kubectl says it.
const READY_DEADLINE: &str = "120s";
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Which of the clusters that this machine may have at once; tests take numbers from 1 up.
    #[arg(long, global = true, env = "NODEMESH_CLUSTER", default_value_t = OF_PEOPLE)]
    number: u8,
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Build what is missing, and bring the cluster up, unless it is.
    Up(Options),
    /// Take the cluster down, also one that crashed. Leaves nothing.
    Down,
    /// Say which nodes and pods there are, with their addresses, and where KUBECONFIG is.
    Status,
    /// Switch a node off, as by its power, and on again. Its disk stays; returns when it has been switched on.
    Reboot {
        /// Which.
        node: Machine,
    },
    /// Give images, as `cargo xtask image` makes them, to both nodes.
    LoadImage {
        /// Archives; those that `cargo xtask image` made, without any.
        files: Vec<PathBuf>,
    },
    /// Run kubectl of the cluster's version on it.
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build everything that `up` needs, and nothing else.
    Prepare,
    /// The first process of a machine; `up` starts it.
    #[command(hide = true)]
    Machine { name: Machine },
}

/// What a cluster can be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
pub(crate) struct Options {
    /// How kube-proxy makes services' addresses work.
    #[arg(long, value_enum, default_value_t = Proxy::Iptables)]
    proxy: Proxy,
    /// How the CNI plugin connects a pod with its node.
    #[arg(long, value_enum, default_value_t = Shape::Ptp)]
    cni: Shape,
    /// Which addresses machines, pods and services have.
    #[arg(long, value_enum, default_value_t = Families::Ipv4)]
    families: Families,
    /// With names of services and pods. A cluster that is up gets them too.
    #[arg(long)]
    dns: bool,
    /// With the Gateway API's kinds, of the standard channel. A cluster that is up gets them too.
    #[arg(long)]
    gateway_api: bool,
}

impl Options {
    /// Those of a cluster that the Gateway API's conformance tests run on.
    pub(crate) const FOR_CONFORMANCE: Self = Self {
        proxy: Proxy::Iptables,
        cni: Shape::Ptp,
        families: Families::Ipv4,
        dns: true,
        gateway_api: true,
    };

    /// Those of one node.
    fn of_node(self, index: u8) -> Self {
        let first = index == 0;
        let proxy = match self.proxy {
            Proxy::Mixed if first => Proxy::Iptables,
            Proxy::Mixed => Proxy::Nftables,
            same => same,
        };
        let cni = match self.cni {
            Shape::Mixed if first => Shape::Ptp,
            Shape::Mixed => Shape::Bridge,
            same => same,
        };
        Self { proxy, cni, ..self }
    }

    /// One value, or two with a comma between them, as Kubernetes' programs take what there is of each family.
    fn both(self, ipv4: impl std::fmt::Display, ipv6: impl std::fmt::Display) -> String {
        match self.families {
            Families::Ipv4 => ipv4.to_string(),
            Families::Dual => format!("{ipv4},{ipv6}"),
        }
    }
}

/// Families of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Families {
    Ipv4,
    /// IPv6 besides.
    Dual,
}

/// kube-proxy's mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Proxy {
    Iptables,
    Nftables,
    /// iptables on the first node, nftables on the second.
    Mixed,
}

/// The CNI plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Shape {
    /// A route for each pod.
    Ptp,
    /// A bridge for a node's pods.
    Bridge,
    /// Routes on the first node, a bridge on the second.
    Mixed,
}

/// Runs one of the commands.
pub(crate) fn cluster(arguments: Arguments) -> Result<()> {
    let names = Names::new(arguments.number).context("clusters have the numbers 0 to 9")?;
    match arguments.task {
        Task::Up(options) => up(names, options),
        Task::Down => {
            let _lock = lock(names)?;
            step("Take the cluster down", || sweep::everything(names))
        }
        Task::Status => status(names),
        Task::Reboot { node } => reboot(names, node),
        Task::LoadImage { files } => load(names, files),
        Task::Kubectl { arguments } => succeed(kubectl(names).args(arguments)),
        Task::Prepare => prepare().map(drop),
        Task::Machine { name } => machine::run(names, name, options(names)?, &parts::made()?),
    }
}

/// Brings it up, unless it is.
pub(crate) fn up(names: Names, options: Options) -> Result<()> {
    let parts = prepare()?;
    let dns = options.dns.then(dns::prepare).transpose()?;
    let _lock = lock(names)?;
    if is_up(names) {
        println!("the cluster is up; `cargo xtask cluster down` takes it down");
    } else {
        bring_up(names, options, &parts)?;
    }
    if options.gateway_api {
        step("Define the Gateway API's kinds", || gateway_api::apply(names))?;
    }
    if let Some(image) = dns {
        step("Start the cluster's DNS", || {
            import(names, &parts, &[image])?;
            dns::start(names)
        })?;
    }
    say_where(names)
}

fn bring_up(names: Names, options: Options, parts: &Parts) -> Result<()> {
    step("Bring the cluster up: a control plane and two nodes", || {
        sweep::everything(names)?;
        files(names, options, parts)?;
        certificates::write(names)?;
        network::make(names, options)?;
        for machine in MACHINES {
            machine::start(names, machine, parts)?;
        }
        await_api(names)?;
        await_nodes(names)?;
        import(names, parts, &parts.images)
    })
}

fn reboot(names: Names, node: Machine) -> Result<()> {
    ensure!(matches!(node, Machine::Node(_)), "only nodes are switched off: {NODES:?}");
    let parts = parts::made()?;
    let _lock = lock(names)?;
    step("Switch the node off and on", || {
        network::unplug(names, node)?;
        sweep::machines(names, &[node])?;
        node::forget(names, node)?;
        network::plug_in_again(names, node, options(names)?)?;
        machine::start(names, node, &parts)
    })
}

/// Held while the cluster is changed.
fn lock(names: Names) -> Result<Flock<File>> {
    let lock = names.try_lock("change")?;
    lock.with_context(|| format!("another command is at work on cluster {}", names.number()))
}

/// The directories, and kubectl.
fn files(names: Names, options: Options, parts: &Parts) -> Result<()> {
    for machine in MACHINES {
        fs::create_dir_all(names.machine_home(machine).join("log"))?;
    }
    for node in NODES {
        node::write(names, node, options, parts)?;
    }
    fs::create_dir_all(names.home().join("bin"))?;
    symlink(&parts.kubernetes, names.kubectl())?;
    let path = options_file(names);
    fs::write(&path, serde_json::to_vec(&options)?).with_context(|| format!("writing {}", path.display()))
}

fn options_file(names: Names) -> PathBuf {
    names.home().join("options.json")
}

fn options(names: Names) -> Result<Options> {
    let path = options_file(names);
    let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// kubectl, with the cluster's administrator's rights and nobody else's.
pub(crate) fn kubectl(names: Names) -> Command {
    let mut command = clean(names.kubectl());
    command.env("KUBECONFIG", names.kubeconfig());
    command
}

/// The API server answers and all nodes are ready.
fn is_up(names: Names) -> bool {
    if !names.kubectl().exists() {
        return false;
    }
    let ready = "{range .items[*]}{.status.conditions[?(@.type==\"Ready\")].status} {end}";
    let mut ask = kubectl(names);
    ask.args(["get", "nodes", "--request-timeout=5s", "-o", &format!("jsonpath={ready}")]);
    read(&mut ask)
        .is_ok_and(|said| said.split_whitespace().filter(|ready| *ready == "True").count() == NODES.len())
}

fn await_api(names: Names) -> Result<()> {
    let deadline = Instant::now() + API_DEADLINE;
    loop {
        let mut ask = kubectl(names);
        let Err(error) = read(ask.args(["get", "--raw=/readyz", "--request-timeout=5s"])) else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            bail!("no answer of the API server: {error:#}\n{}", logs(names, Machine::Control));
        }
        thread::sleep(PAUSE);
    }
}

fn await_nodes(names: Names) -> Result<()> {
    for node in NODES {
        let name = format!("node/{node}");
        for what in ["create", "condition=Ready"] {
            let timeout = format!("--timeout={READY_DEADLINE}");
            let wait = read(kubectl(names).args(["wait", &name, &format!("--for={what}"), &timeout]));
            wait.with_context(|| logs(names, node))?;
        }
    }
    // Made by the controller manager; no pod can be made before.
    let mut wait = kubectl(names);
    wait.args(["wait", "serviceaccount/default", "--for=create", &format!("--timeout={READY_DEADLINE}")]);
    read(&mut wait).with_context(|| logs(names, Machine::Control)).map(drop)
}

/// The ends of a machine's logs.
fn logs(names: Names, machine: Machine) -> String {
    let directory = names.machine_home(machine).join("log");
    let mut said = format!("logs are in {}", directory.display());
    for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
        said.push_str(&format!("\n--- {}\n{}", entry.path().display(), process::tail(&entry.path())));
    }
    said
}

fn status(names: Names) -> Result<()> {
    ensure!(is_up(names), "the cluster is not up: cargo xtask cluster up");
    for what in [
        &["get", "nodes", "-o", "wide"][..],
        &["get", "pods", "-A", "-o", "wide"],
        &["get", "services", "-A"],
    ] {
        println!("━━ {}", what[1]);
        succeed(kubectl(names).args(what))?;
    }
    say_where(names)
}

fn say_where(names: Names) -> Result<()> {
    for machine in MACHINES {
        let inside = format!("nsenter --net=/run/netns/{}", names.machine(machine));
        println!("{machine:<8} {}   {inside}", names.of_machine(machine));
    }
    println!("export KUBECONFIG={}", names.kubeconfig().display());
    println!("kubectl  {}   or: cargo xtask cluster kubectl …", names.kubectl().display());
    Ok(())
}

/// Gives images to both nodes.
pub(crate) fn load(names: Names, files: Vec<PathBuf>) -> Result<()> {
    ensure!(is_up(names), "the cluster is not up: cargo xtask cluster up");
    let files = if files.is_empty() { crate::image::made()? } else { files };
    ensure!(
        !files.is_empty(),
        "there is no image in {}: cargo xtask image",
        target().join("images").display()
    );
    step("Give images to both nodes", || import(names, &parts::made()?, &files))
}

fn import(names: Names, parts: &Parts, images: &[PathBuf]) -> Result<()> {
    for image in images {
        for node in NODES {
            let socket = node::socket(names, node);
            let mut import = clean(parts.tool("usr/bin/ctr"));
            import.arg("--address").arg(&socket).args(["--namespace", "k8s.io", "image", "import"]);
            import.arg(absolute(image)?);
            let said =
                read(&mut import).with_context(|| format!("loading {} into {node}", image.display()))?;
            eprint!("  {node}: {said}");
        }
    }
    Ok(())
}

/// Commands run at the workspace's root, whatever the directory that a path was typed in.
fn absolute(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).with_context(|| format!("there is no {}", path.display()))
}
