//! What processes cost: CPU time, memory and descriptors, from /proc.

use std::{collections::HashSet, fs};

use anyhow::{Context, Result};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{SysconfVar, sysconf},
};

/// As many descriptors as the system lets us have, for us and the programs that we start.
pub(super) fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("asking for the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of open files")
}

/// These processes and all their descendants.
pub(super) fn with_children(roots: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut known: HashSet<u32> = roots.collect();
    loop {
        let before = known.len();
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        for pid in all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
            if stat(pid).is_some_and(|fields| fields[1].parse().is_ok_and(|parent| known.contains(&parent))) {
                known.insert(pid);
            }
        }
        if known.len() == before {
            return known.into_iter().collect();
        }
    }
}

/// User and system CPU time that the processes have used, in seconds.
pub(super) fn cpu_seconds(processes: &[u32]) -> f64 {
    let ticks: u64 = processes
        .iter()
        .filter_map(|pid| stat(*pid))
        .filter_map(|fields| Some(fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?))
        .sum();
    let a_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    ticks as f64 / a_second as f64
}

/// Resident memory of the processes in KiB, each page divided by how many share it.
pub(super) fn memory_kib(processes: &[u32]) -> u64 {
    let of = |pid: &u32| -> Option<u64> {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        line.split_whitespace().next()?.parse().ok()
    };
    processes.iter().filter_map(of).sum()
}

/// Resident memory of one process in KiB, shared pages counted whole.
pub(super) fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Open descriptors of one process.
pub(super) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count).unwrap_or(0)
}

/// Fields of /proc/PID/stat after the name, from the state on.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split(' ').map(str::to_owned).collect())
}
