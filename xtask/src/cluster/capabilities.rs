//! What a machine must have for a cluster: asked by trying, all of it at once, before anything is built.

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use nix::unistd::geteuid;

use crate::run::{clean, read};

/// Controllers of cgroup v1 that the kubelet insists on.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuacct", "cpuset", "memory", "pids"];
/// Controllers of cgroup v2 that it insists on.
const UNIFIED_CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];
const CGROUPS: &str = "/sys/fs/cgroup";

/// What must work in fresh namespaces, each with what it is for.
const TRIES: [(&str, &str); 6] = [
    (
        "ip link add probe type bridge",
        "bridges, which are the wire between machines (CAP_NET_ADMIN, module bridge)",
    ),
    ("ip link add probe type veth peer name other", "veth pairs (module veth)"),
    ("mount -t sysfs sysfs /sys", "a sysfs of a node's own"),
    ("mount -t bpf bpf /sys/fs/bpf", "a bpffs of a node's own (BPF in the kernel)"),
    ("iptables -t nat -L -n", "iptables' table nat, which kube-proxy writes to"),
    ("nft list ruleset", "nftables, which kube-proxy may write to instead"),
];

/// Fails with everything that is missing.
pub(super) fn check() -> Result<()> {
    let mut missing = vec![];
    if !geteuid().is_root() {
        missing.push("root".to_owned());
    }
    if let Err(error) = in_namespaces("true") {
        missing.push(format!(
            "namespaces for network, mounts, host name and processes (CAP_SYS_ADMIN): {error:#}"
        ));
    } else {
        for (line, what) in TRIES {
            if let Err(error) = in_namespaces(line) {
                missing.push(format!("{what}: {error:#}"));
            }
        }
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.split_whitespace().any(|word| word == "overlay") {
        missing.push("overlayfs, on which containers' files are (module overlay)".to_owned());
    }
    missing.extend(cgroups());
    ensure!(
        missing.is_empty(),
        "this machine cannot run a cluster; it lacks\n  - {}",
        missing.join("\n  - ")
    );
    Ok(())
}

/// Runs a shell's line where a machine of the cluster would be.
fn in_namespaces(line: &str) -> Result<String> {
    let mut attempt = clean("unshare");
    attempt.args(["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", line]);
    read(&mut attempt)
}

/// The controllers that are missing, of the version that this machine has.
fn cgroups() -> Option<String> {
    let root = Path::new(CGROUPS);
    let unified = fs::read_to_string(root.join("cgroup.controllers"));
    let missing: Vec<&str> = match &unified {
        Ok(there) => UNIFIED_CONTROLLERS
            .into_iter()
            .filter(|name| !there.split_whitespace().any(|c| c == *name))
            .collect(),
        Err(_) => {
            CONTROLLERS.into_iter().filter(|name| !root.join(name).join("cgroup.procs").exists()).collect()
        }
    };
    (!missing.is_empty()).then(|| format!("cgroup controllers {} in {CGROUPS}", missing.join(", ")))
}
