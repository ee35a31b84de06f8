//! A machine of the cluster: namespaces whose first process makes the mounts, starts the programs, and starts again
//! those that end, as an init system does. A kubelet that is killed comes back; a machine whose first process is killed
//! is gone with everything on it.

use std::{
    collections::BTreeMap,
    fmt::Display,
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use mesh_tests::{
    cluster::names::{Machine, Names},
    netns::NetNs,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
};

use super::{Options, Parts, control_plane, node};

/// Pause before a program that ended is started again.
const AGAIN: Duration = Duration::from_secs(1);
/// Pause between two looks at the programs.
const LOOK: Duration = Duration::from_millis(100);
/// What the kubelet sets for the whole machine: a node sees a file in their place, so the machine keeps its own values.
const SYSCTLS: [&str; 6] = [
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];
/// Directories that a node has for itself, with what must be in them.
const OWN: [(&str, &[&str]); 2] =
    [("/var/lib", &["containerd", "kubelet", "cni"]), ("/var/log", &["pods", "containers"])];
/// What is in a node's `/run`, which is a tmpfs as on any node.
const RUN: [&str; 3] = ["/run/containerd", "/run/lock", "/run/netns"];
/// What of it this machine reaches too: images are brought by containerd's socket.
const REACHED: &str = "/run/containerd";
const CGROUPS: &str = "/sys/fs/cgroup";

/// A program that a machine runs.
#[derive(Debug)]
pub(super) struct Program {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    after: Option<PathBuf>,
}

impl Program {
    /// One without arguments.
    pub(super) fn new(name: &'static str, program: PathBuf) -> Self {
        Self { name, program, arguments: vec![], environment: vec![], after: None }
    }

    /// One of Kubernetes' programs, which find what they call beside each other and where the machine has it.
    pub(super) fn kubernetes(parts: &Parts, name: &'static str) -> Self {
        Self::new(name, parts.kubernetes.clone()).argument(name).environment("PATH", parts.path())
    }

    pub(super) fn argument(mut self, argument: impl Display) -> Self {
        self.arguments.push(argument.to_string());
        self
    }

    /// `--name=value`.
    pub(super) fn flag(self, name: &str, value: impl Display) -> Self {
        self.argument(format!("--{name}={value}"))
    }

    /// `--name`.
    pub(super) fn switch(self, name: &str) -> Self {
        self.argument(format!("--{name}"))
    }

    pub(super) fn environment(mut self, name: &'static str, value: impl Display) -> Self {
        self.environment.push((name, value.to_string()));
        self
    }

    /// Is not started before this file is there.
    pub(super) fn after(mut self, file: impl Into<PathBuf>) -> Self {
        self.after = Some(file.into());
        self
    }

    fn start(&self, log: &Path) -> Result<Child> {
        let out = open(&log.join(format!("{}.log", self.name)))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        command.spawn().with_context(|| format!("starting {}", self.name))
    }
}

fn open(log: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(log);
    file.with_context(|| format!("opening {}", log.display()))
}

/// Starts a machine, from outside.
pub(super) fn start(names: Names, machine: Machine, parts: &Parts) -> Result<()> {
    let log = open(&names.machine_home(machine).join("log/machine.log"))?;
    // A session of its own: neither Ctrl-C nor the end of the terminal ends a machine.
    let mut command = NetNs::open(&names.machine(machine))?.command("setsid");
    command.args([
        "unshare",
        "--mount",
        "--uts",
        "--pid",
        "--fork",
        "--mount-proc",
        "--propagation",
        "private",
    ]);
    command.arg(std::env::current_exe()?).args(["cluster", "--number", &names.number().to_string()]);
    command.args(["machine", &machine.to_string()]);
    // Nothing of whoever typed the command: neither cargo's variables nor a proxy's.
    command.env_clear().env("PATH", parts.path());
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
    command.spawn().with_context(|| format!("starting {machine}"))?;
    Ok(())
}

/// Is the machine's first process; does not return.
pub(super) fn run(names: Names, machine: Machine, options: Options, parts: &Parts) -> Result<()> {
    println!("{machine}: {options:?}");
    fs::write("/proc/sys/kernel/hostname", machine.to_string()).context("setting the host name")?;
    let programs = match machine {
        Machine::Control => control_plane::programs(names, options, parts),
        Machine::Node(_) => {
            mounts(names, machine)?;
            cgroups(&names.machine(machine))?;
            node::programs(names, machine, options, parts)
        }
    };
    supervise(&programs, &names.machine_home(machine).join("log"))
}

/// Starts programs, starts again those that end, and reaps what lost its parent.
fn supervise(programs: &[Program], log: &Path) -> Result<()> {
    let mut waiting: Vec<(&Program, Instant)> =
        programs.iter().map(|program| (program, Instant::now())).collect();
    let mut running: BTreeMap<i32, &Program> = BTreeMap::new();
    loop {
        let is_due = |(program, at): &(&Program, Instant)| {
            Instant::now() >= *at && program.after.as_ref().is_none_or(|file| file.exists())
        };
        for (program, _) in waiting.extract_if(.., |entry| is_due(entry)) {
            let child = program.start(log)?;
            running.insert(i32::try_from(child.id()).context("a process id fits in i32")?, program);
        }
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => thread::sleep(LOOK),
            Ok(status) => {
                if let Some(program) = status.pid().and_then(|pid| running.remove(&pid.as_raw())) {
                    println!("{} ended: {status:?}; it is started again", program.name);
                    waiting.push((program, Instant::now() + AGAIN));
                }
            }
            Err(error) => return Err(error).context("waiting for programs"),
        }
    }
}

/// Gives a node its own `/run`, `/var/lib`, `/var/log`, `/sys` and bpffs.
fn mounts(names: Names, machine: Machine) -> Result<()> {
    let home = names.machine_home(machine);
    // What is mounted on the node is seen by pods that ask for it, and the other way round, as on any node.
    set("/", MsFlags::MS_SHARED | MsFlags::MS_REC)?;
    // The cluster's files are below /var/lib themselves, and must not be hidden.
    let clusters = names.home();
    let clusters = clusters.parent().context("a cluster's home is in a directory")?;
    let kept = home.join(clusters.strip_prefix("/")?);
    fs::create_dir_all(&kept)?;
    bind(clusters, &kept)?;
    for (place, inside) in OWN {
        let own = home.join(place.trim_start_matches('/'));
        for directory in inside {
            fs::create_dir_all(own.join(directory))?;
        }
        bind(&own, Path::new(place))?;
    }
    let none: Option<&str> = None;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))
        .context("mounting /run")?;
    for directory in RUN {
        fs::create_dir_all(directory)?;
    }
    let reached = home.join(REACHED.trim_start_matches('/'));
    fs::create_dir_all(&reached)?;
    bind(&reached, Path::new(REACHED))?;
    // Network devices in /sys are those of the namespace in which it was mounted.
    let aside = home.join("cgroups");
    fs::create_dir_all(&aside)?;
    bind(Path::new(CGROUPS), &aside)?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("mounting /sys")?;
    bind(&aside, Path::new(CGROUPS))?;
    set(&aside, MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    umount2(&aside, MntFlags::MNT_DETACH).context("unmounting the second view of cgroups")?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).context("mounting bpffs")?;

    for key in SYSCTLS {
        let real = Path::new("/proc/sys").join(key);
        let own = home.join("sysctl").join(key);
        fs::create_dir_all(own.parent().context("a setting is in a directory")?)?;
        fs::write(&own, fs::read(&real).with_context(|| format!("reading {}", real.display()))?)?;
        bind(&own, &real)?;
    }
    Ok(())
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .with_context(|| format!("mounting {} at {}", from.display(), to.display()))
}

fn set(place: impl AsRef<Path>, propagation: MsFlags) -> Result<()> {
    let none: Option<&str> = None;
    let place = place.as_ref();
    mount(none, place, none, propagation, none).with_context(|| format!("changing {}", place.display()))
}

/// Makes the cgroup below which a node's pods are, in every hierarchy: the kubelet wants it to be there.
fn cgroups(name: &str) -> Result<()> {
    for root in super::sweep::hierarchies()? {
        let own = root.join(name);
        fs::create_dir_all(&own).with_context(|| format!("making {}", own.display()))?;
        // A cpuset of version 1 is empty at first, and what is empty runs nothing.
        for key in ["cpuset.cpus", "cpuset.mems"] {
            if root.join("cgroup.controllers").exists() {
                continue;
            }
            if let Ok(all) = fs::read(root.join(key)) {
                fs::write(own.join(key), all)
                    .with_context(|| format!("writing {key} of {}", own.display()))?;
            }
        }
        // In version 2 a controller is there for children only when the parent says so.
        if let Ok(there) = fs::read_to_string(root.join("cgroup.controllers")) {
            for controller in there.split_whitespace() {
                fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
                    .with_context(|| format!("giving {controller} to {}", own.display()))?;
            }
        }
    }
    Ok(())
}
