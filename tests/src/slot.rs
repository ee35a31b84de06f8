//! Which world this is on the machine: a number from 0, held by a file lock for as long as the process lives.
//!
//! Every name and address of a world is made from its number (`nm3-…`, `10.3.0.0/16`), so worlds never meet, agents
//! that look for an address in /run/netns find the right one, and whatever has the name of an unlocked number was left
//! by a run that died. Holding the lock means owning all such names.

use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use crate::{netns, wait};

/// Directory of locks and of the worlds' files.
const WORLDS: &str = "/run/nodemesh-worlds";
/// Where pins live.
const BPFFS: &str = "/sys/fs/bpf";
/// A tmpfs, for what must not touch a disk.
const MEMORY: &str = "/dev/shm";
/// Numbers there are: the second octet of a world's addresses.
const NUMBERS: u8 = 200;

/// A number, held.
#[derive(Debug)]
pub struct Slot {
    number: u8,
    _lock: Flock<File>,
}

impl Slot {
    /// Takes the lowest free number, after removing whatever dead runs left under any free number.
    pub fn take() -> Result<Self> {
        fs::create_dir_all(WORLDS).with_context(|| format!("making {WORLDS} (worlds need root)"))?;
        let mut mine = None;
        for number in 0..NUMBERS {
            // Numbers are taken from below: an unused file ends the search, once there is one for us.
            let known = lock_path(number).exists();
            if mine.is_some() && !known {
                break;
            }
            let Some(lock) = try_lock(number)? else { continue };
            let slot = Self { number, _lock: lock };
            if known {
                slot.sweep()?;
            }
            mine.get_or_insert(slot);
        }
        mine.with_context(|| format!("all {NUMBERS} numbers of worlds are taken; see {WORLDS}"))
    }

    /// The number.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The first part of every name.
    pub fn prefix(&self) -> String {
        format!("nm{}", self.number)
    }

    /// The world's own directory: YAML, state, logs.
    pub fn directory(&self) -> PathBuf {
        Path::new(WORLDS).join(self.prefix())
    }

    /// Where the agent of a node pins.
    pub fn bpffs(&self, node: &str) -> PathBuf {
        Path::new(BPFFS).join(self.node_name(node))
    }

    /// The tmpfs directory of a node's agent.
    pub fn run_dir(&self, node: &str) -> PathBuf {
        Path::new(MEMORY).join(self.node_name(node))
    }

    /// What a node's agent calls its cgroup, its pins and its keys.
    pub fn node_name(&self, node: &str) -> String {
        format!("nodemesh-{}-{node}", self.prefix())
    }

    /// Removes everything that has the number: processes, namespaces, pins, cgroups, files.
    pub fn sweep(&self) -> Result<()> {
        let namespaces = names(Path::new(netns::NAMES), &format!("{}-", self.prefix()))?;
        netns::end_processes(&namespaces)?;
        let ours = format!("nodemesh-{}-", self.prefix());
        for name in names(Path::new(BPFFS), &ours)? {
            remove_tree(&Path::new(BPFFS).join(name))?;
        }
        for namespace in namespaces {
            netns::delete(&namespace)?;
        }
        if let Some(root) = cgroup2_root()? {
            for name in names(&root, &ours)? {
                // The kernel lets go of a cgroup a moment after its last process.
                let path = root.join(name);
                wait::try_until(Duration::from_secs(5), || {
                    remove_cgroup(&path).map_err(|e| format!("removing {}: {e}", path.display()))
                })
                .map_err(anyhow::Error::msg)?;
            }
        }
        for name in names(Path::new(MEMORY), &ours)? {
            remove_tree(&Path::new(MEMORY).join(name))?;
        }
        if self.directory().exists() {
            remove_tree(&self.directory())?;
        }
        Ok(())
    }
}

fn lock_path(number: u8) -> PathBuf {
    Path::new(WORLDS).join(format!("nm{number}.lock"))
}

fn try_lock(number: u8) -> Result<Option<Flock<File>>> {
    let path = lock_path(number);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => bail!("locking {}: {error}", path.display()),
    }
}

/// Entries of a directory that begin with `prefix`; none when there is no such directory.
fn names(directory: &Path, prefix: &str) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(error).with_context(|| format!("reading {}", directory.display())),
    };
    let mut found = vec![];
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            found.push(name);
        }
    }
    Ok(found)
}

/// A cgroup is removed by its directory; the files in it go with it.
fn remove_cgroup(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn remove_tree(path: &Path) -> Result<()> {
    // Not remove_dir_all: bpffs answers its directory reads without file types on some kernels, and a pin is a file.
    if path.is_dir() && !path.is_symlink() {
        for name in names(path, "")? {
            remove_tree(&path.join(name))?;
        }
        fs::remove_dir(path).with_context(|| format!("removing {}", path.display()))
    } else {
        fs::remove_file(path).with_context(|| format!("removing {}", path.display()))
    }
}

/// Where cgroup2 is mounted, from /proc/mounts.
pub fn cgroup2_root() -> Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    Ok(mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    }))
}
