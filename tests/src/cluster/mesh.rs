//! Nodemesh on a cluster, installed from deploy/manifests, and what its agents say of themselves.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Cluster, names::NODES, xtask};
use crate::{http, metrics::Metrics, netns, netns::NetNs, process, wire::Capture};

/// Where it is installed.
pub const NAMESPACE: &str = "nodemesh-system";
/// How long a step of an installation may take.
const ROLLED_OUT: &str = "--timeout=180s";
/// How long commands that are typed may take.
const TYPED: Duration = Duration::from_secs(600);
/// Lines of access logs that a failing test prints.
const REFUSALS: usize = 20;
/// An agent's admin interface, on its node's loopback.
const ADMIN: &str = "127.0.0.1:15021";

impl Cluster {
    /// Brings the images of the programs under test and installs them; returns once all of it serves.
    pub fn install(&self) -> Result<()> {
        self.install_with(|manifests| manifests)
    }

    /// The same with manifests that differ from those that we ship.
    pub fn install_with(&self, change: impl FnOnce(String) -> String) -> Result<()> {
        self.load_images()?;
        self.configure(change)
    }

    /// Applies manifests that differ from those that we ship, with the images that are there.
    pub fn configure(&self, change: impl FnOnce(String) -> String) -> Result<()> {
        self.apply(&change(manifests()?))?;
        self.await_installed()
    }

    /// Waits until controller and agents serve; says what there is when they do not.
    pub fn await_installed(&self) -> Result<()> {
        for what in ["deployment/nodemesh-controller", "daemonset/nodemesh-agent"] {
            let status = ["--namespace", NAMESPACE, "rollout", "status", what, ROLLED_OUT];
            if let Err(error) = self.kubectl(&status) {
                bail!("{what} is not there: {error:#}\n{}", self.state_of_mesh());
            }
        }
        Ok(())
    }

    /// Pods, events and logs of the mesh, for whoever reads a failed test.
    pub fn state_of_mesh(&self) -> String {
        let inside = ["--namespace", NAMESPACE];
        let looks: [&[&str]; 5] = [
            &["get", "pods", "-o", "wide"],
            &["get", "events", "--sort-by=.lastTimestamp"],
            &["logs", "--tail=60", "--prefix", "-l", "app.kubernetes.io/component=controller"],
            &["logs", "--tail=60", "--prefix", "-l", "app.kubernetes.io/component=agent"],
            &["logs", "--tail=20", "--prefix", "--previous", "-l", "app.kubernetes.io/name=nodemesh"],
        ];
        let said = looks.map(|look| match self.kubectl(&[&inside[..], look].concat()) {
            Ok(said) => said,
            Err(error) => format!("{error:#}"),
        });
        said.join("\n")
    }

    /// The last connections that did not end well, as the agents' access logs have them, and how many the kernel programs
    /// refused on each node: for whoever reads a failed test.
    pub fn refusals(&self) -> String {
        let mut said = match self.access_log() {
            Ok(lines) => {
                let is_bad = |line: &&Value| line["outcome"].as_str().is_some_and(|outcome| outcome != "ok");
                let bad: Vec<String> = lines.iter().filter(is_bad).map(Value::to_string).collect();
                bad[bad.len().saturating_sub(REFUSALS)..].to_vec()
            }
            Err(error) => vec![format!("{error:#}")],
        };
        for node in self.nodes().unwrap_or_default() {
            let metrics = self.ask_agent(&node, "/metrics").map(|answer| answer.body);
            let metrics =
                metrics.unwrap_or_else(|error| format!("nodemesh_kernel_refused of {node}: {error:#}"));
            let of_kernel = metrics.lines().filter(|line| line.starts_with("nodemesh_kernel_refused"));
            said.extend(of_kernel.map(|line| format!("{node}: {line}")));
        }
        said.join("\n")
    }

    /// Runs the Gateway API's conformance tests for meshes, with the mesh that is installed; the error has what fails.
    /// Returns their report.
    pub fn conformance(&self) -> Result<String> {
        let names = self.names().context("a cluster that is not ours has not what these tests need")?;
        let mut run = Command::new(xtask()?);
        run.args(["conformance", "--as-it-is", "--number", &names.number().to_string()]);
        netns::run(&mut run, None)?;
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/conformance/report.yaml");
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Runs commands as an administrator types them at the root of the source, with kubectl, helm and meshctl; the first
    /// that fails ends them. `tools` is a directory for what that takes.
    pub fn typed(&self, commands: &str, tools: &Path) -> Result<Command> {
        let helm = tools.join("helm");
        fs::write(&helm, format!("#!/bin/sh\nexec {} helm \"$@\"\n", xtask()?.display()))?;
        fs::set_permissions(&helm, fs::Permissions::from_mode(0o755))?;
        let kubectl = self.kubectl.parent().context("kubectl is in a directory")?;
        let own = [tools.to_owned(), kubectl.to_owned(), process::binaries()?];
        let others = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(own.into_iter().chain(std::env::split_paths(&others)))?;
        // Some wait until something holds.
        let mut command = Command::new("timeout");
        command.arg(TYPED.as_secs().to_string()).arg("bash");
        command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
        command.env("KUBECONFIG", &self.kubeconfig).env("PATH", path);
        // -x says each command, for whoever reads which one failed.
        command.args(["-euxo", "pipefail", "-c", commands]);
        Ok(command)
    }

    /// What an agent's admin interface answers, asked on its node.
    pub fn ask_agent(&self, node: &str, path: &str) -> Result<http::Answer> {
        http::get(&self.node_netns(node)?, ADMIN.parse()?, path)
    }

    /// An agent's metrics.
    pub fn agent_metrics(&self, node: &str) -> Result<Metrics> {
        Ok(Metrics::parse(&self.ask_agent(node, "/metrics")?.body))
    }

    /// The access logs of all agents: a line for each connection that has ended.
    pub fn access_log(&self) -> Result<Vec<Value>> {
        let of_agents =
            ["--namespace", NAMESPACE, "logs", "--tail=-1", "-l", "app.kubernetes.io/component=agent"];
        let said = self.kubectl(&of_agents)?;
        Ok(said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Sees everything that crosses the wire between the nodes from now on.
    pub fn capture(&self) -> Result<Capture> {
        let names = self.names().context("the wire of a cluster that is not ours cannot be looked at")?;
        Capture::start(&NetNs::open(&names.machine(super::names::Machine::Control))?)
    }

    /// The network namespace of a node.
    pub fn node_netns(&self, node: &str) -> Result<NetNs> {
        let names = self.names().context("the nodes of a cluster that is not ours cannot be entered")?;
        let machine = NODES.into_iter().find(|machine| machine.to_string() == node);
        NetNs::open(&names.machine(machine.with_context(|| format!("no node {node}"))?))
    }
}

/// deploy/manifests, of this source.
pub fn manifests() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/manifests/nodemesh.yaml");
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}
