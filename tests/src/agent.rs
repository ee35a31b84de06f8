//! An agent of a world: the process, and what it says of itself.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, setrlimit};
use serde_json::Value;

use crate::{
    controller::{CommandOutput, log_level, running},
    halt::Halted,
    http,
    metrics::Metrics,
    netns::{self, NetNs},
    process::{self, Program},
    wait,
};

/// Its admin interface, reachable inside the node's namespace only.
const ADMIN: &str = "127.0.0.1:15021";
/// How long it may take until it is ready, and until a line is in its log.
const READY: Duration = Duration::from_secs(20);
/// How long a stop may take: above twice the drain deadline of its command line.
pub const STOP: Duration = Duration::from_secs(15);
/// Shorter than the default, so that tests which stop an agent end soon.
const DRAIN_DEADLINE: Duration = Duration::from_secs(3);

/// How long agents drain, by their command line.
pub fn drain_deadline() -> Duration {
    wait::scaled(DRAIN_DEADLINE)
}

/// Everything that an agent's command line needs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The node's name.
    pub node: String,
    /// The node's namespace.
    pub netns: NetNs,
    /// `--controller`.
    pub controller: String,
    /// `--run-dir`, on tmpfs.
    pub run_dir: PathBuf,
    /// `--bpffs`.
    pub bpffs: PathBuf,
    /// `--cgroup`.
    pub cgroup: String,
    /// `--hold-new`.
    pub hold_new: Duration,
    /// `--addresses-per-workload`; its default unless said.
    pub addresses_per_workload: Option<usize>,
    /// More words of its command line.
    pub options: Vec<String>,
    /// Where token, access log and log are.
    pub directory: PathBuf,
}

/// An agent.
#[derive(Debug)]
pub struct Agent {
    settings: Settings,
    program: Mutex<Option<Program>>,
}

impl Agent {
    /// Writes the join token down. Not started yet.
    pub fn new(settings: Settings, token: &str) -> Result<Self> {
        let agent = Self { settings, program: Mutex::new(None) };
        fs::write(agent.token_file(), token).context("writing the join token")?;
        Ok(agent)
    }

    /// Starts it; see [`Agent::await_ready`].
    pub fn start(&self) -> Result<()> {
        self.start_changed(|_| ())
    }

    /// Starts it with so many files that it may open.
    pub fn start_with_files(&self, files: u64) -> Result<()> {
        let limit = move || setrlimit(Resource::RLIMIT_NOFILE, files, files).map_err(io::Error::from);
        self.start_changed(|command| {
            // SAFETY: between fork and exec only `setrlimit` runs, a plain system call without lock or allocation.
            unsafe { command.pre_exec(limit) };
        })
    }

    fn start_changed(&self, change: impl FnOnce(&mut Command)) -> Result<()> {
        let s = &self.settings;
        let mut command = s.netns.command(process::binaries()?.join("mesh-agent"));
        command.args(["--node", &s.node, "--controller", &s.controller]);
        command.arg("--join-token-file").arg(self.token_file());
        command.arg("--run-dir").arg(&s.run_dir).arg("--bpffs").arg(&s.bpffs);
        command.args(["--cgroup", &s.cgroup, "--admin-listen", ADMIN]);
        command.arg("--drain-deadline").arg(format!("{}s", drain_deadline().as_secs()));
        command.arg("--hold-new").arg(format!("{}ms", s.hold_new.as_millis()));
        if let Some(count) = s.addresses_per_workload {
            command.arg("--addresses-per-workload").arg(count.to_string());
        }
        command.args(&s.options);
        command.arg("--access-log").arg(self.access_log_file());
        command.env("RUST_LOG", log_level());
        change(&mut command);
        let mut program = self.program();
        ensure!(running(&mut program).is_err(), "the agent of {} runs already", s.node);
        *program = Some(Program::start("mesh-agent", &mut command, &self.log())?);
        Ok(())
    }

    /// Waits until it says that it is ready.
    pub fn await_ready(&self) -> Result<()> {
        wait::try_until(READY, || {
            running(&mut self.program())?;
            let answer = self.get("/readyz").map_err(|e| format!("{e:#}"))?;
            wait::holds(answer.status == 200, || answer.body)
        })
        .map_err(|complaint| {
            let log = process::tail(&self.log());
            anyhow::anyhow!("the agent of {} is not ready: {complaint}\n{log}", self.settings.node)
        })
    }

    /// SIGKILL: it gets no chance to clean up or to say goodbye.
    pub fn kill(&self) -> Result<()> {
        self.program().take().context("the agent does not run")?.kill()
    }

    /// Another one of this node, with settings that differ; not started yet. It begins with what this one has on the node.
    pub fn beside(&self, change: impl FnOnce(&mut Settings)) -> Result<Self> {
        let mut settings = self.settings.clone();
        change(&mut settings);
        fs::create_dir_all(&settings.directory)?;
        Self::new(settings, "none, as the node has joined")
    }

    /// Hands its process out, which runs on: another one can be started beside it.
    pub fn set_aside(&self) -> Result<Program> {
        self.program().take().context("the agent does not run")
    }

    /// Lets its control side stand still, as one that is busy for long, until what is returned is dropped.
    pub fn halt(&self) -> Result<Halted> {
        Halted::first_thread(self.pid().context("the agent does not run")?)
    }

    /// Waits until the process that was started last is the one that serves.
    pub fn await_serving(&self) -> Result<()> {
        let pid = self.pid().context("the agent does not run")?;
        wait::try_until(READY, || {
            running(&mut self.program())?;
            let state = self.state().map_err(|e| format!("{e:#}"))?;
            wait::holds(state["pid"] == pid, || format!("{} answers, not {pid}", state["pid"]))
        })
        .map_err(anyhow::Error::msg)?;
        self.await_ready()
    }

    /// SIGTERM, and its end after draining.
    pub fn stop(&self) -> Result<()> {
        let program = self.program().take().context("the agent does not run")?;
        let status = program.stop(STOP)?;
        ensure!(status.success(), "the agent of {} ended with {status}", self.settings.node);
        Ok(())
    }

    /// Removes everything it ever put on the node; it must not run.
    pub fn uninstall(&self) -> Result<()> {
        let mut command = self.settings.netns.command(process::binaries()?.join("mesh-agent"));
        command.arg("uninstall").arg("--bpffs").arg(&self.settings.bpffs);
        command.arg("--run-dir").arg(&self.settings.run_dir).args(["--cgroup", &self.settings.cgroup]);
        netns::run(&mut command, None).map(drop)
    }

    /// Its run directory.
    pub fn run_dir(&self) -> &Path {
        &self.settings.run_dir
    }

    /// Its control group, below the root of the hierarchy.
    pub fn cgroup(&self) -> &str {
        &self.settings.cgroup
    }

    /// Whether its process is there.
    pub fn is_running(&self) -> bool {
        running(&mut self.program()).is_ok()
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.program().as_ref().map(Program::pid)
    }

    /// Where its admin interface is: in which namespace, and there at which address.
    pub fn admin(&self) -> (&NetNs, SocketAddr) {
        (&self.settings.netns, ADMIN.parse().expect("an address"))
    }

    /// An answer of its admin interface.
    pub fn get(&self, path: &str) -> Result<http::Answer> {
        http::get(&self.settings.netns, ADMIN.parse()?, path)
    }

    /// Its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.get("/metrics")?.body))
    }

    /// `/api/v1/state`.
    pub fn state(&self) -> Result<Value> {
        let answer = self.get("/api/v1/state")?;
        serde_json::from_str(&answer.body).with_context(|| format!("not JSON: {}", answer.body))
    }

    /// `meshctl` on its node: exit status and what it printed.
    pub fn meshctl(&self, arguments: &[&str]) -> Result<CommandOutput> {
        let mut command = self.settings.netns.command(process::binaries()?.join("meshctl"));
        command.args(["--agent", &format!("http://{ADMIN}")]).args(arguments);
        CommandOutput::of(&mut command)
    }

    /// Waits until it holds exactly this many workloads enrolled, and none unprotected.
    pub fn await_enrolled(&self, expected: usize, deadline: Duration) -> Result<()> {
        wait::try_until(deadline, || {
            running(&mut self.program())?;
            let metrics = self.metrics().map_err(|e| format!("{e:#}"))?;
            let enrolled = metrics.sum("nodemesh_enrolled_workloads", &[]);
            let unprotected = metrics.sum("nodemesh_unprotected_workloads", &[]);
            #[expect(clippy::cast_precision_loss, reason = "a few hundred workloads")]
            let settled = enrolled == expected as f64 && unprotected == 0.0;
            wait::holds(settled, || format!("{enrolled} of {expected} enrolled, {unprotected} unprotected"))
        })
        .map_err(|complaint| {
            let state = self.state().map_or_else(|e| format!("{e:#}"), |state| state.to_string());
            anyhow::anyhow!("the agent of {}: {complaint}\nstate: {state}", self.settings.node)
        })
    }

    /// The access log so far: a line per connection that has ended.
    pub fn access_log(&self) -> Result<Vec<Value>> {
        let text = match fs::read_to_string(self.access_log_file()) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(error).context("reading the access log"),
        };
        // The last line may still be being written.
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        complete
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
            .collect()
    }

    /// Waits for a line of the access log; panics with the whole log if it does not come.
    #[track_caller]
    pub fn wait_log(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait::until(&format!("access log of {}: {what}", self.settings.node), READY, || {
            let lines = self.access_log().map_err(|e| format!("{e:#}"))?;
            let all = || lines.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
            lines.iter().find(|line| wanted(line)).cloned().ok_or_else(all)
        })
    }

    /// Its log file.
    pub fn log(&self) -> PathBuf {
        self.settings.directory.join(format!("agent-{}.log", self.settings.node))
    }

    /// Its access log.
    pub fn access_log_file(&self) -> PathBuf {
        self.settings.directory.join(format!("access-{}.log", self.settings.node))
    }

    /// Puts another join token in place of the one that it used.
    pub fn give_token(&self, token: &str) -> Result<()> {
        fs::write(self.token_file(), token).context("writing the join token")
    }

    /// Where it pins.
    pub fn bpffs(&self) -> &Path {
        &self.settings.bpffs
    }

    fn token_file(&self) -> PathBuf {
        self.settings.directory.join(format!("token-{}", self.settings.node))
    }

    fn program(&self) -> MutexGuard<'_, Option<Program>> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
