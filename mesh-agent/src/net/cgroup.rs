//! The agent's own cgroup: by it the kernel's guard knows the agent's sockets from any workload's.
//!
//! Must be entered before the first socket is made and before there are threads that make some: a socket belongs to
//! the cgroup that its process was in (`sock_cgroup_data` in the kernel), accepted ones to their listener's.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup2 is mounted.
    #[error("no cgroup2 file system is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified")]
    NoMount,
    /// The directory cannot be made or entered.
    #[error("cannot enter the cgroup {path}: {error}")]
    Enter {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Makes the directory `name` below the cgroup2 mount, moves this process there, and returns the directory's inode
/// number: what `bpf_skb_cgroup_id` gives for the process's sockets.
pub fn enter(name: &str) -> Result<u64, CgroupError> {
    let path = mount()?.join(name);
    let entered = make_and_enter(&path);
    entered.map_err(|error| CgroupError::Enter { path, error })
}

/// Where cgroup2 is mounted.
pub fn mount() -> Result<PathBuf, CgroupError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|_| CgroupError::NoMount)?;
    mount_point(&mounts).ok_or(CgroupError::NoMount)
}

/// Removes the cgroup, if there is one; no process may be in it.
pub fn remove(name: &str) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let Some(root) = mount_point(&mounts) else { return Ok(()) };
    match fs::remove_dir(root.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn make_and_enter(path: &Path) -> io::Result<u64> {
    fs::create_dir_all(path)?;
    fs::write(path.join("cgroup.procs"), std::process::id().to_string())?;
    Ok(fs::metadata(path)?.ino())
}

/// The first cgroup2 mount in `/proc/self/mountinfo` (proc_pid_mountinfo(5): the type follows the lone hyphen).
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let is_cgroup2 = after.split(' ').next() == Some("cgroup2");
        is_cgroup2.then(|| before.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_among_others() {
        let text = "31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                    32 31 0:28 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 none rw\n";
        assert_eq!(mount_point(text), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_point("31 23 0:27 / /sys rw - sysfs sysfs rw\n"), None);
    }
}
