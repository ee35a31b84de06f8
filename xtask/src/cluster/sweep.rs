//! Takes a cluster down: processes, namespaces, links, cgroups, files. Goes by names, so that it also removes what a crash
//! left of any of them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use mesh_tests::{
    cluster::names::{MACHINES, Machine, Names},
    netns, wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How long the kernel may take to end everything.
const DEADLINE: Duration = Duration::from_secs(30);

/// Removes all of it; nothing to remove is fine.
pub(super) fn everything(names: Names) -> Result<()> {
    let link = names.prefix();
    if Path::new("/sys/class/net").join(&link).exists() {
        netns::run(Command::new("ip").args(["link", "delete", &link]), None)?;
    }
    machines(names, &MACHINES)?;
    let home = names.home();
    if home.exists() {
        fs::remove_dir_all(&home).with_context(|| format!("removing {}", home.display()))?;
    }
    // Stays when another cluster's files are in it.
    if let Some(clusters) = home.parent() {
        let _ = fs::remove_dir(clusters);
    }
    Ok(())
}

/// Removes what of these machines is gone when one is switched off: processes, namespaces, cgroups. Its files stay.
pub(super) fn machines(names: Names, machines: &[Machine]) -> Result<()> {
    let namespaces: Vec<String> = machines
        .iter()
        .map(|machine| names.machine(*machine))
        .filter(|name| Path::new(netns::NAMES).join(name).exists())
        .collect();
    first_processes(&namespaces)?;
    netns::end_processes(&namespaces)?;
    for machine in machines {
        for root in hierarchies()? {
            cgroup(&root.join(names.machine(*machine)))?;
        }
    }
    namespaces.iter().try_for_each(|namespace| netns::delete(namespace))
}

/// Ends the machines' first processes, before all others, so that the kernel ends what is on them, in pods too.
fn first_processes(namespaces: &[String]) -> Result<()> {
    for pid in netns::inhabitants(namespaces)?.into_iter().filter(|pid| is_first(*pid)) {
        // Fails only for a process that has just ended.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    // `unshare` stays until the first process has been reaped, which is after the kernel has ended all others.
    wait::try_until(DEADLINE, || {
        let mut left = netns::inhabitants(namespaces).map_err(|error| format!("{error:#}"))?;
        left.retain(|pid| is_parent_of_first(*pid));
        wait::holds(left.is_empty(), || format!("processes {left:?} still run"))
    })
    .map_err(anyhow::Error::msg)
}

/// It is the first process of a namespace within ours.
fn is_first(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let inside = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    inside.is_some_and(|pids| {
        let pids: Vec<&str> = pids.split_whitespace().collect();
        pids.len() == 2 && pids[1] == "1"
    })
}

/// It is the `unshare` that made a machine.
fn is_parent_of_first(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "unshare")
}

/// Where cgroup hierarchies are mounted.
pub(super) fn hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    let mut roots: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let (place, kind) = (words.get(1)?, words.get(2)?);
            (kind.starts_with("cgroup") && place.starts_with("/sys/fs/cgroup")).then(|| PathBuf::from(place))
        })
        .collect();
    // A node sees what is mounted below its own /sys too.
    roots.sort();
    roots.dedup();
    Ok(roots)
}

/// Removes a cgroup and those below it. The kernel lets go of one a moment after its last process.
fn cgroup(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            cgroup(&entry.path())?;
        }
    }
    let removed = wait::try_until(DEADLINE, || {
        for pid in fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines() {
            // Left by a machine whose first process ended without us; fails only for one that has just ended.
            let _ = kill(Pid::from_raw(pid.parse().map_err(|e| format!("{pid}: {e}"))?), Signal::SIGKILL);
        }
        match fs::remove_dir(path) {
            Err(error) if path.exists() => Err(format!("removing {}: {error}", path.display())),
            _ => Ok(()),
        }
    });
    removed.map_err(anyhow::Error::msg)
}
