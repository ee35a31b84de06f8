//! Network namespaces: entering one for the time of a system call that makes a socket there.
//!
//! A socket keeps the namespace that it was made in, whatever thread uses it later (`sock_net` in the kernel), so
//! only `socket()`, netlink and /proc/sys need to run inside; everything else happens where the runtime likes.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};

/// A handle on a network namespace; keeps it alive.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    inode: u64,
}

/// The agent's own namespace, opened before anything enters another one.
static OWN: OnceLock<File> = OnceLock::new();

fn own() -> io::Result<&'static File> {
    if OWN.get().is_none() {
        let file = File::open("/proc/self/ns/net")?;
        let _ = OWN.set(file);
    }
    OWN.get().ok_or_else(|| io::Error::other("the agent's own network namespace is not open"))
}

impl Namespace {
    /// Opens `/run/netns/NAME`, `/proc/PID/ns/net` or any other path of a network namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        own()?;
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }

    /// The namespace that the agent itself runs in. `/proc/self` says where the main thread is now, which may be inside
    /// another one when a second thread asks.
    pub fn of_agent() -> io::Result<Self> {
        let file = own()?.try_clone()?;
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }

    /// The namespace with this inode number, if a name or a process of this machine has it.
    pub fn find(inode: u64) -> io::Result<Option<Self>> {
        let own = Self::of_agent()?;
        if own.inode == inode {
            return Ok(Some(own));
        }
        // One that goes while we look is not there any more.
        let all = namespaces()?.into_iter().filter_map(|path| Self::open(&path).ok());
        Ok(all.into_iter().find(|namespace| namespace.inode == inode))
    }

    /// Another handle on it.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, inode: self.inode })
    }

    /// The namespace's inode number: equal for equal namespaces, as long as one handle is open.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `work` with the calling thread inside the namespace; 6–20 µs of overhead, so fit for a runtime's worker.
    ///
    /// If the way back fails the process is ended: a thread left in a pod's namespace would open the agent's
    /// sockets there.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        struct WayBack(BorrowedFd<'static>);
        impl Drop for WayBack {
            fn drop(&mut self) {
                if setns(self.0, CloneFlags::CLONE_NEWNET).is_err() {
                    std::process::abort();
                }
            }
        }
        let home = own()?.as_fd();
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
        let _way_back = WayBack(home);
        Ok(work())
    }
}

/// Paths of all network namespaces but the agent's own, each once: those with a name in `/run/netns` (where CNI plugins
/// and `ip netns` keep them) and those of processes.
pub fn namespaces() -> io::Result<Vec<PathBuf>> {
    let own = own()?.metadata()?.ino();
    let mut seen = HashSet::from([own]);
    let mut paths = Vec::new();
    let named = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    let of_processes = fs::read_dir("/proc")?
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit))
        .map(|entry| entry.path().join("ns/net"));
    for path in named.chain(of_processes) {
        // Processes and names come and go; what cannot be looked at is not there any more.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if seen.insert(metadata.ino()) {
            paths.push(path);
        }
    }
    Ok(paths)
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
