//! What a cluster of ours runs, from below: processes of pods and of nodes, and what a person with a hand on the switch does
//! to them. Stands apart from what any user of Kubernetes can do.

use std::{
    fs::{self, File},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Cluster, xtask};
use crate::{netns, process};

/// What holds a pod's namespaces, and runs nothing.
const PAUSE: &str = "pause";

impl Cluster {
    /// The processes of a pod's containers.
    pub fn processes(&self, namespace: &str, pod: &str) -> Result<Vec<i32>> {
        let uid = ["--namespace", namespace, "get", "pod", pod, "-o", "jsonpath={.metadata.uid}"];
        let directory = format!("/pod{}/", self.kubectl(&uid)?);
        let is_of_pod = |process: &Path| {
            let cgroups = fs::read_to_string(process.join("cgroup")).unwrap_or_default();
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            cgroups.contains(&directory) && name.trim() != PAUSE
        };
        let processes = fs::read_dir("/proc").context("reading /proc")?.flatten();
        let of_pod = processes.filter(|process| is_of_pod(&process.path()));
        let pids: Vec<i32> = of_pod.filter_map(|it| it.file_name().to_string_lossy().parse().ok()).collect();
        ensure!(!pids.is_empty(), "no process of {namespace}/{pod} runs here");
        Ok(pids)
    }

    /// SIGKILL for everything that a pod runs; the kubelet starts it again.
    pub fn kill_pod(&self, namespace: &str, pod: &str) -> Result<()> {
        for pid in self.processes(namespace, pod)? {
            kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("killing {pid} of {pod}"))?;
        }
        Ok(())
    }

    /// SIGKILL for a program of a node, such as `kubelet`; what the node's first process is starts it again.
    pub fn kill_on_node(&self, node: &str, program: &str) -> Result<()> {
        let namespace = self.node_netns(node)?.name().to_owned();
        let is_it = |pid: &i32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).nth(1) == Some(program.as_bytes())
        };
        let mut found = netns::inhabitants(&[namespace])?;
        found.retain(is_it);
        ensure!(found.len() == 1, "one process is {program} on {node}, not {found:?}");
        kill(Pid::from_raw(found[0]), Signal::SIGKILL).with_context(|| format!("killing {program}"))
    }

    /// Switches a node off and on.
    pub fn reboot(&self, node: &str) -> Result<()> {
        self.xtask("reboot", &[node]).map(drop)
    }

    /// The files into which a pod's containers write, as their node has them. Open they outlive the pod, whose last lines
    /// the API may not give any more.
    pub fn open_logs(&self, namespace: &str, pod: &str) -> Result<Vec<File>> {
        let names = self.names().context("the disks of a cluster that is not ours cannot be read")?;
        let where_it_is = "jsonpath={.spec.nodeName} {.metadata.uid}";
        let said = self.kubectl(&["--namespace", namespace, "get", "pod", pod, "-o", where_it_is])?;
        let (node, uid) = said.split_once(' ').context("a pod that runs has a node")?;
        let node = node.parse().map_err(anyhow::Error::msg)?;
        let directory = format!("var/log/pods/{namespace}_{pod}_{uid}");
        let containers = fs::read_dir(names.machine_home(node).join(&directory));
        let mut files = vec![];
        for container in containers.with_context(|| directory.clone())? {
            for file in fs::read_dir(container?.path())? {
                files.push(File::open(file?.path())?);
            }
        }
        ensure!(!files.is_empty(), "nothing of {namespace}/{pod} is in {directory}");
        Ok(files)
    }

    /// Makes an image of a program that lies beside those under test, and gives it to all nodes; its name.
    pub fn load_program(&self, name: &str) -> Result<String> {
        let directory = tempfile::tempdir()?;
        let mut make = std::process::Command::new(xtask()?);
        make.args(["image", "--program"]).arg(process::binaries()?.join(name));
        netns::run(make.arg("--to").arg(directory.path()), None)?;
        let file = directory.path().join(format!("{name}.tar"));
        self.xtask("load-image", &[&file.display().to_string()])?;
        Ok(format!("nodemesh.local/{name}:test"))
    }
}
