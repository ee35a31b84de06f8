//! Named network namespaces: making them, running things inside.
//!
//! A thread enters with `setns` for the time of a closure; a child process enters between fork and exec. Not
//! `ip netns exec`: that mounts a fresh /sys and so hides bpffs from the agent.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait;

/// Where iproute2 keeps names of namespaces.
pub const NAMES: &str = "/run/netns";

/// A named network namespace, open.
#[derive(Debug, Clone)]
pub struct NetNs {
    name: String,
    file: Arc<File>,
}

impl NetNs {
    /// Makes `/run/netns/NAME`, with lo up, duplicate address detection off and the reverse path filter as asked.
    pub fn create(name: &str, rp_filter: bool) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]), None)?;
        let ns = Self::open(name)?;
        for scope in ["all", "default"] {
            ns.sysctl(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "0")?;
            ns.sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
            ns.sysctl(&format!("net/ipv6/conf/{scope}/accept_ra"), "0")?;
            ns.sysctl(&format!("net/ipv4/conf/{scope}/rp_filter"), if rp_filter { "1" } else { "0" })?;
        }
        ns.ip("link set lo up\n")?;
        Ok(ns)
    }

    /// Opens an existing one.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(NAMES).join(name);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file) })
    }

    /// Its name in /run/netns.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Removes the name; the namespace itself goes when nothing holds it any more.
    pub fn delete(&self) -> Result<()> {
        delete(&self.name)
    }

    /// Runs `work` with the calling thread inside the namespace. A socket made there stays there.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        struct WayBack(File);
        impl Drop for WayBack {
            fn drop(&mut self) {
                // A thread that cannot leave would run the rest of the test in the wrong place.
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("the namespace we came from is open");
            }
        }
        let home = File::open("/proc/thread-self/ns/net").context("opening the thread's own namespace")?;
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering {} (needs root)", self.name))?;
        let _way_back = WayBack(home);
        Ok(work())
    }

    /// A program that will run inside the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = self.file.clone();
        // SAFETY: between fork and exec only `setns` runs, a plain system call on a descriptor that the closure owns;
        // it takes no lock and does not allocate.
        unsafe {
            command.pre_exec(move || setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
        }
        command
    }

    /// Runs lines of `ip -batch` inside the namespace; the first that fails ends it.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]);
        run(&mut command, Some(batch)).with_context(|| format!("in namespace {}:\n{batch}", self.name))?;
        Ok(())
    }

    /// Sets `/proc/sys/KEY` inside the namespace.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys").join(key);
        self.enter(|| fs::write(&path, value))?
            .with_context(|| format!("writing {value} to {} in {}", path.display(), self.name))
    }

    /// Runs a shell line inside the namespace and returns what it printed; for tools that tests look through.
    pub fn shell(&self, line: &str) -> Result<String> {
        let mut command = self.command("sh");
        command.args(["-c", line]);
        run(&mut command, None)
    }
}

/// Removes a namespace's name.
pub fn delete(name: &str) -> Result<()> {
    run(Command::new("ip").args(["netns", "delete", name]), None)?;
    Ok(())
}

/// Ends the processes that live in these namespaces and waits until they are gone; several rounds, as a process may be
/// starting another.
pub fn end_processes(namespaces: &[String]) -> Result<()> {
    let ended = wait::try_until(Duration::from_secs(10), || {
        let left = inhabitants(namespaces).map_err(|error| format!("{error:#}"))?;
        for pid in &left {
            // Fails only for a process that has just ended.
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        wait::holds(left.is_empty(), || format!("processes {left:?} still run in {namespaces:?}"))
    });
    ended.map_err(anyhow::Error::msg)
}

/// Processes all of whose threads are in these namespaces, which are a world's or a cluster's.
///
/// Not `ip netns pids`, which tells the processes whose first thread is in one: the agents of other worlds look for
/// addresses in every namespace of the machine, and are in each of them for a moment, with one thread.
pub fn inhabitants(namespaces: &[String]) -> Result<Vec<i32>> {
    let identity = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    // A name may go meanwhile; then nobody is found by it.
    let of_names: HashSet<(u64, u64)> =
        namespaces.iter().filter_map(|name| identity(&Path::new(NAMES).join(name)).ok()).collect();
    let mut found = vec![];
    for process in fs::read_dir("/proc").context("reading /proc")? {
        let process = process.context("reading /proc")?;
        let Ok(pid) = process.file_name().to_string_lossy().parse() else { continue };
        // Threads and processes end while they are looked at: what is gone is nowhere.
        let Ok(threads) = fs::read_dir(process.path().join("task")) else { continue };
        let mut places =
            threads.filter_map(|thread| identity(&thread.ok()?.path().join("ns/net")).ok()).peekable();
        if places.peek().is_some() && places.all(|place| of_names.contains(&place)) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Runs a command to its end and returns its standard output; an error has the command and what it complained.
pub fn run(command: &mut Command, input: Option<&str>) -> Result<String> {
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
