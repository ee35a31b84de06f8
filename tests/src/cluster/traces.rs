//! What is on a node and in a pod, line by line, so that a test can say that nothing of the mesh stayed there: what was
//! there before, and nothing else, is there afterwards.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::{Context, Result};

use super::Cluster;
use crate::{
    attached,
    netns::{self, NetNs},
};

/// What lists rules, routes, listeners and queueing disciplines, each line with the word that it begins with.
const LISTS: [(&str, &str); 6] = [
    ("rule", "ip rule show"),
    ("rule of IPv6", "ip -6 rule show"),
    ("route", "ip route show table all"),
    ("route of IPv6", "ip -6 route show table all"),
    ("listener", "ss -Hltn | awk '{print $4}'"),
    ("discipline", "tc qdisc show"),
];
/// Settings of a network namespace that enrolment could change.
const SETTINGS: [&str; 2] = ["/proc/sys/net/ipv4", "/proc/sys/net/ipv6"];
/// Where a node could have files of the mesh.
const FILES: [&str; 3] = ["sys/fs/bpf", "run", "var/lib"];

impl Cluster {
    /// The network namespace of a pod.
    pub fn pod_netns(&self, namespace: &str, pod: &str) -> Result<NetNs> {
        let uid =
            self.kubectl(&["--namespace", namespace, "get", "pod", pod, "-o", "jsonpath={.metadata.uid}"])?;
        let of_pod = format!("pod{uid}");
        for entry in fs::read_dir("/proc")?.flatten() {
            // Processes end while they are looked at.
            let cgroup = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            let netns = cgroup.contains(&of_pod).then(|| entry.path().join("ns/net").display().to_string());
            if let Some(Ok(netns)) = netns.as_deref().map(NetNs::open) {
                return Ok(netns);
            }
        }
        anyhow::bail!("no process of pod {namespace}/{pod} runs on this machine")
    }

    /// What is in a pod.
    pub fn traces_in_pod(&self, namespace: &str, pod: &str) -> Result<BTreeSet<String>> {
        let netns = self.pod_netns(namespace, pod)?;
        let mut found = lists(&netns)?;
        found.extend(settings(&netns)?);
        found.extend(programs(&netns)?);
        Ok(found)
    }

    /// What is on a node; of the links to its pods only what is attached to them, as pods come and go.
    pub fn traces_on_node(&self, node: &str) -> Result<BTreeSet<String>> {
        let netns = self.node_netns(node)?;
        let mut found = lists(&netns)?;
        found.extend(settings(&netns)?);
        found.retain(|line| !line.contains("veth"));
        found.extend(programs(&netns)?);
        let kubelet = kubelet(&netns)?;
        for place in FILES {
            let root = Path::new("/proc").join(kubelet.to_string()).join("root").join(place);
            let mut find = Command::new("find");
            find.arg(&root).args(["-maxdepth", "2", "-name", "*nodemesh*"]);
            let files = netns::run(&mut find, None)?;
            found.extend(files.lines().map(|file| format!("file {file}")));
        }
        Ok(found)
    }
}

fn lists(netns: &NetNs) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (what, list) in LISTS {
        // The kernel's own for a link's own address come when it has seen that nobody else has that.
        let of_a_link = |line: &&str| line.contains("fe80::") && line.contains("proto kernel");
        let said = netns.shell(list)?;
        let lines = said.lines().filter(|line| !of_a_link(line));
        found.extend(lines.map(|line| format!("{what} {}", line.trim())));
    }
    Ok(found)
}

fn settings(netns: &NetNs) -> Result<Vec<String>> {
    netns.enter(|| {
        let mut found = vec![];
        let mut left: Vec<_> = SETTINGS.map(Into::into).into();
        while let Some(path) = left.pop() {
            match fs::read_dir(&path) {
                Ok(entries) => left.extend(entries.flatten().map(|entry| entry.path())),
                // Some can only be written, or not be read while they are not set.
                Err(_) => found.extend(
                    fs::read_to_string(&path)
                        .map(|value| format!("setting {} {}", path.display(), value.trim())),
                ),
            }
        }
        found
    })
}

fn programs(netns: &NetNs) -> Result<Vec<String>> {
    let mut found = vec![];
    let links = netns.shell("ip -o link show")?;
    for link in links.lines().filter_map(|line| line.split([' ', ':', '@']).nth(2)) {
        let programs = attached::programs(netns, link)?;
        found.extend(programs.iter().map(|program| format!("program on {link}: {program:?}")));
    }
    Ok(found)
}

/// The process of a node's kubelet, which has the node's files.
fn kubelet(netns: &NetNs) -> Result<i32> {
    let inhabitants = netns::inhabitants(&[netns.name().to_owned()])?;
    let is_kubelet = |pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"kubelet")
    };
    inhabitants.into_iter().find(is_kubelet).context("a node has a kubelet")
}
