//! The controller of a world, in a namespace of its own on the wire.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{http, metrics::Metrics, netns, netns::NetNs, process, process::Program, topology::Pair, wait};

/// Where agents find it.
const AGENTS_PORT: u16 = 15012;
/// Its admin interface, reachable inside its namespace only.
const ADMIN: &str = "127.0.0.1:15020";
/// How long it may take to serve.
const READY: Duration = Duration::from_secs(20);

/// A controller.
#[derive(Debug)]
pub struct Controller {
    netns: NetNs,
    address: Pair,
    source: PathBuf,
    state: PathBuf,
    log: PathBuf,
    options: Vec<String>,
    program: Mutex<Option<Program>>,
}

impl Controller {
    /// Of the directory of manifests `source`, with state and log under `directory` and more options for its command
    /// line. Not started yet.
    pub fn new(netns: NetNs, address: Pair, source: &Path, directory: &Path, options: Vec<String>) -> Self {
        Self {
            netns,
            address,
            source: source.to_owned(),
            state: directory.join("controller"),
            log: directory.join("controller.log"),
            options,
            program: Mutex::new(None),
        }
    }

    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Result<()> {
        let mut command = self.netns.command(process::binaries()?.join("mesh-controller"));
        command.arg("run").arg("--source").arg(&self.source).arg("--state-dir").arg(&self.state);
        command.args(["--listen", &format!("0.0.0.0:{AGENTS_PORT}"), "--admin-listen", ADMIN]);
        command.args(&self.options);
        command.env("RUST_LOG", log_level());
        *self.program() = Some(Program::start("mesh-controller", &mut command, &self.log)?);
        wait::try_until(READY, || {
            self.running()?;
            let answer = self.get("/readyz").map_err(|e| format!("{e:#}"))?;
            wait::holds(answer.status == 200, || answer.body)
        })
        .map_err(|complaint| {
            anyhow::anyhow!("the controller is not ready: {complaint}\n{}", process::tail(&self.log))
        })
    }

    /// SIGKILL.
    pub fn kill(&self) -> Result<()> {
        self.program().take().context("the controller does not run")?.kill()
    }

    /// SIGTERM, and its end.
    pub fn stop(&self, grace: Duration) -> Result<()> {
        let status = self.program().take().context("the controller does not run")?.stop(grace)?;
        anyhow::ensure!(status.success(), "the controller ended with {status}");
        Ok(())
    }

    /// SIGSTOP: it keeps its connections and answers nobody, as a machine does that swaps itself to death.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Drops every packet between it and the nodes, both ways: connections that stand stay open at both ends.
    pub fn cut_off(&self) -> Result<()> {
        self.rules("-A", "")
    }

    /// Ends [`Controller::cut_off`].
    pub fn reconnect(&self) -> Result<()> {
        self.rules("-D", "")
    }

    /// Drops this part of the packets each way, at random.
    pub fn lose(&self, part: f64) -> Result<()> {
        self.rules("-A", &format!("-m statistic --mode random --probability {part}"))
    }

    fn rules(&self, action: &str, which: &str) -> Result<()> {
        let rule = |chain: &str, way: &str| {
            self.netns
                .shell(&format!("iptables {action} {chain} {way} uplink -p tcp {which} -j DROP"))
                .map(drop)
        };
        rule("INPUT", "-i").and_then(|()| rule("OUTPUT", "-o"))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let program = self.program();
        let pid = program.as_ref().context("the controller does not run")?.pid();
        kill(Pid::from_raw(i32::try_from(pid)?), signal)
            .with_context(|| format!("{signal} to the controller"))
    }

    /// Where it keeps its state.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// A join token for a node.
    pub fn token(&self, node: &str) -> Result<String> {
        let mut command = Command::new(process::binaries()?.join("mesh-controller"));
        command.arg("token").arg("--state-dir").arg(&self.state).args(["--node", node]);
        Ok(netns::run(&mut command, None)?.trim().to_owned())
    }

    /// Makes a new root and issuing certificate; the running controller picks them up.
    pub fn rotate_root(&self) -> Result<()> {
        let mut command = Command::new(process::binaries()?.join("mesh-controller"));
        command.arg("rotate-root").arg("--state-dir").arg(&self.state);
        netns::run(&mut command, None).map(drop)
    }

    /// Where agents connect.
    pub fn endpoint(&self) -> SocketAddr {
        (self.address.v4, AGENTS_PORT).into()
    }

    /// Where its admin interface is: in which namespace, and there at which address.
    pub fn admin(&self) -> (&NetNs, SocketAddr) {
        (&self.netns, ADMIN.parse().expect("an address"))
    }

    /// An answer of its admin interface.
    pub fn get(&self, path: &str) -> Result<http::Answer> {
        http::get(&self.netns, ADMIN.parse()?, path)
    }

    /// Its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.get("/metrics")?.body))
    }

    /// `meshctl` beside it: exit status and what it printed.
    pub fn meshctl(&self, arguments: &[&str]) -> Result<CommandOutput> {
        let mut command = self.netns.command(process::binaries()?.join("meshctl"));
        command.args(["--controller", &format!("http://{ADMIN}")]).args(arguments);
        CommandOutput::of(&mut command)
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The namespace that it runs in.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    fn running(&self) -> Result<(), String> {
        running(&mut self.program())
    }

    fn program(&self) -> std::sync::MutexGuard<'_, Option<Program>> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a command line said.
#[derive(Debug, Clone)]
pub struct CommandOutput {
    /// Exit status 0.
    pub success: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl CommandOutput {
    /// Runs a command line to its end.
    pub fn of(command: &mut Command) -> Result<Self> {
        let output = command.output().with_context(|| format!("starting {command:?}"))?;
        Ok(Self {
            success: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

/// The log level of processes under test: `RUST_LOG` of the test run, else debug, so that a failure can be read.
pub(crate) fn log_level() -> String {
    std::env::var("RUST_LOG").unwrap_or_else(|_| "info,mesh_agent=debug,mesh_controller=debug".to_owned())
}

/// A process that has ended will not become ready: fails the wait with its exit status.
pub(crate) fn running(program: &mut Option<Program>) -> Result<(), String> {
    let Some(program) = program else { return Err("not started".to_owned()) };
    match program.ended() {
        Ok(None) => Ok(()),
        Ok(Some(status)) => Err(format!("ended with {status}")),
        Err(error) => Err(format!("{error:#}")),
    }
}
