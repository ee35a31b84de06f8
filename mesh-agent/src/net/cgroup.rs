//! The agent's own cgroup: by it the kernel's guard knows the agent's sockets from any workload's.
//!
//! Must be entered before the first socket is made and before there are threads that make some: a socket belongs to
//! the cgroup that its process was in (`sock_cgroup_data` in the kernel), accepted ones to their listener's.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The name of the cgroup that the process was started in: a container has one to itself, and leaves nothing behind.
pub const OWN: &str = ".";

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup2 is mounted.
    #[error("no cgroup2 file system is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified")]
    NoMount,
    /// The process's own is not below any mount.
    #[error(
        "cannot see the cgroup2 directory that this process is in; mount the host's /sys/fs/cgroup into the container, or \
         name a cgroup of the agent's own with --cgroup"
    )]
    Unseen,
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
/// number: what `bpf_skb_cgroup_id` gives for the process's sockets. [`OWN`] stays where it is.
pub fn enter(name: &str) -> Result<u64, CgroupError> {
    if name == OWN {
        return own();
    }
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
    if name == OWN {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let Some(root) = mount_point(&mounts) else { return Ok(()) };
    match fs::remove_dir(root.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The inode number of the directory that this process is in, found below whichever mount shows it.
fn own() -> Result<u64, CgroupError> {
    let read = |path| fs::read_to_string(path).map_err(|_| CgroupError::NoMount);
    let (cgroups, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
    let inside = cgroups.lines().find_map(|line| line.strip_prefix("0::")).ok_or(CgroupError::NoMount)?;
    let own = std::process::id().to_string();
    let is_here = |directory: &PathBuf| {
        let inhabitants = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        inhabitants.lines().any(|pid| pid == own)
    };
    let seen = mount_points(&mounts).filter_map(|(root, point)| below(&root, &point, inside)).find(is_here);
    let seen = seen.ok_or(CgroupError::Unseen)?;
    Ok(fs::metadata(&seen).map_err(|error| CgroupError::Enter { path: seen, error })?.ino())
}

/// Where a directory of the hierarchy is seen by a mount that shows it from `root` on.
fn below(root: &str, point: &str, directory: &str) -> Option<PathBuf> {
    let rest = Path::new(directory).strip_prefix(root).ok()?;
    Some(Path::new(point).join(rest))
}

fn make_and_enter(path: &Path) -> io::Result<u64> {
    fs::create_dir_all(path)?;
    fs::write(path.join("cgroup.procs"), std::process::id().to_string())?;
    Ok(fs::metadata(path)?.ino())
}

/// The first cgroup2 mount.
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mount_points(mountinfo).next().map(|(_, point)| point.into())
}

/// The cgroup2 mounts in `/proc/self/mountinfo` (proc_pid_mountinfo(5): the type follows the lone hyphen): what each shows
/// of the hierarchy, and where.
fn mount_points(mountinfo: &str) -> impl Iterator<Item = (String, String)> {
    mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3).map(str::to_owned);
        (after.split(' ').next() == Some("cgroup2")).then_some((fields.next()?, fields.next()?))
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

    #[test]
    fn a_containers_own_directory_is_found_below_any_mount_that_shows_it() {
        let seen = |root, directory| below(root, "/sys/fs/cgroup", directory);
        assert_eq!(seen("/", "/kubepods/pod1/c"), Some("/sys/fs/cgroup/kubepods/pod1/c".into()));
        assert_eq!(seen("/kubepods/pod1/c", "/kubepods/pod1/c"), Some("/sys/fs/cgroup/".into()));
        assert_eq!(seen("/", "/"), Some("/sys/fs/cgroup/".into()));
        assert_eq!(seen("/../../..", "/"), None);
    }
}
