//! Finds pods' network namespaces by the uid that the kubelet gives to their cgroups.
//!
//! A pod's first process is that of its sandbox: the runtime starts it before any container, in the namespace that the
//! network plugin has set up, and it lives as long as the sandbox does. Where processes of the pod went since, by
//! `nsenter` or `unshare`, is no evidence of where the pod is.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use crate::net::netns::Namespace;

/// Where the first process of a pod is.
#[derive(Debug)]
pub(super) enum Sandbox {
    /// In this namespace.
    In(Namespace),
    /// More than one process may be the first, and they are in different namespaces.
    Ambiguous,
    /// In one in which the first process of another pod is, too.
    Shared(String),
}

/// A process that may be a pod's first.
#[derive(Debug)]
struct Candidate {
    /// Its directory below `/proc`, open: whoever gets its number later is not taken for it.
    process: File,
    started: u64,
    inode: u64,
}

/// The sandboxes of the pods that are wanted, by uid, as far as they run on this machine.
pub(super) fn find(wanted: impl Fn(&str) -> bool) -> io::Result<HashMap<String, Sandbox>> {
    let of_node = Namespace::of_agent()?.inode();
    let mut first: HashMap<String, Vec<Candidate>> = HashMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        if !entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        // Processes come and go; what cannot be looked at is not there any more.
        let Some(uid) = uid_of(&entry.path()) else { continue };
        let Some(candidate) = Candidate::of(&entry.path(), &uid) else { continue };
        // A pod of the node's network; or one whose first process is started there, and moved then.
        if candidate.inode == of_node {
            continue;
        }
        let so_far = first.entry(uid).or_default();
        match so_far.first().map_or(candidate.started, |other| other.started) {
            earliest if candidate.started < earliest => *so_far = vec![candidate],
            earliest if candidate.started == earliest => so_far.push(candidate),
            _ => {}
        }
    }
    let wanted = first.iter().filter(|(uid, _)| wanted(uid));
    Ok(wanted.filter_map(|(uid, candidates)| Some((uid.clone(), decide(uid, candidates, &first)?))).collect())
}

fn decide(uid: &str, candidates: &[Candidate], all: &HashMap<String, Vec<Candidate>>) -> Option<Sandbox> {
    let first = candidates.first()?;
    if candidates.iter().any(|other| other.inode != first.inode) {
        return Some(Sandbox::Ambiguous);
    }
    let is_there = |others: &[Candidate]| others.iter().any(|other| other.inode == first.inode);
    if let Some((other, _)) = all.iter().find(|(other, theirs)| *other != uid && is_there(theirs)) {
        return Some(Sandbox::Shared(other.clone()));
    }
    Namespace::open(&first.path().join("ns/net")).ok().map(Sandbox::In)
}

impl Candidate {
    fn of(path: &Path, uid: &str) -> Option<Self> {
        let mut candidate = Self { process: File::open(path).ok()?, started: 0, inode: 0 };
        let path = candidate.path();
        // Again, by the open directory: now it is known that all of it is of one process.
        uid_of(&path).filter(|found| found == uid)?;
        candidate.started = started(&fs::read_to_string(path.join("stat")).ok()?)?;
        candidate.inode = fs::metadata(path.join("ns/net")).ok()?.ino();
        Some(candidate)
    }

    fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.process.as_raw_fd().to_string())
    }
}

fn uid_of(process: &Path) -> Option<String> {
    pod_uid(&fs::read_to_string(process.join("cgroup")).ok()?)
}

/// When a process was started, in ticks since boot: field 22 of `/proc/PID/stat` (proc_pid_stat(5)); the second, the
/// program's name, may have blanks and parentheses.
fn started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The uid of the pod whose cgroups a process is in, from `/proc/PID/cgroup` (cgroups(7)). The outermost directory that
/// is a pod's counts: what a pod calls those within its own is its own business. Hierarchies that disagree are no pod.
fn pod_uid(cgroups: &str) -> Option<String> {
    let mut uids =
        cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2)?.split('/').find_map(of_directory));
    let uid = uids.next()?;
    uids.all(|other| other == uid).then_some(uid)
}

/// The uid in the name of a pod's directory: `podUID`, or systemd's `kubepods-burstable-podUID.slice`, in which `-`
/// separates parents, so that it is written `_`.
fn of_directory(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    let is_uid = uid.starts_with(|c: char| c.is_ascii_hexdigit())
        && uid.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    is_uid.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a7e5bfa-1f6c-4b8e-9d53-0c1d6c1f0b11";

    #[track_caller]
    fn check(cgroups: &str, expected: Option<&str>) {
        assert_eq!(pod_uid(cgroups).as_deref(), expected, "{cgroups}");
    }

    #[test]
    fn a_pod_is_known_by_its_cgroups_of_both_drivers_and_both_versions() {
        let slice = "kubepods-burstable-pod0a7e5bfa_1f6c_4b8e_9d53_0c1d6c1f0b11.slice";
        for cgroups in [
            format!("0::/kubepods/burstable/pod{UID}/7c1e\n"),
            format!("0::/kubepods.slice/kubepods-burstable.slice/{slice}/cri-containerd-7c1e.scope\n"),
            "0::/kubepods.slice/kubepods-pod0a7e5bfa_1f6c_4b8e_9d53_0c1d6c1f0b11.slice/x.scope\n".into(),
            format!("9:cpu,cpuacct:/kubepods/pod{UID}/7c1e\n3:memory:/kubepods/pod{UID}/7c1e\n0::/\n"),
            format!("0::/../../besteffort/pod{UID}/7c1e\n"),
            format!("0::/node-a/kubepods/pod{UID}\n"),
        ] {
            check(&cgroups, Some(UID));
        }
        check(
            "0::/kubepods/pod5d41402abc4b2a76b9719d911017c592/x\n",
            Some("5d41402abc4b2a76b9719d911017c592"),
        );
    }

    #[test]
    fn what_is_no_pods_cgroup_is_no_pod() {
        for cgroups in [
            "",
            "0::/\n",
            "0::/system.slice/podman.service\n",
            "0::/pod\n",
            "0::/user.slice/a-podman.slice\n",
        ] {
            check(cgroups, None);
        }
    }

    #[test]
    fn a_pod_does_not_pass_for_another_by_the_names_of_its_own_cgroups() {
        check(&format!("0::/kubepods/pod{UID}/7c1e/podffff-1\n"), Some(UID));
        check(&format!("2:cpu:/kubepods/pod{UID}/7c1e\n0::/kubepods/podffff-1/7c1e\n"), None);
    }

    #[test]
    fn the_start_of_a_process_is_read_past_its_name() {
        let stat = "17 (a) 1 (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 0";
        assert_eq!(started(stat), Some(4711));
        assert_eq!(started("17 (a"), None);
    }
}
