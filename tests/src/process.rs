//! A program under test: started with its output in a file, ended with the world.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait;

/// Lines of a log that a failing test prints.
const TAIL_LINES: usize = 60;

/// A running program.
#[derive(Debug)]
pub struct Program {
    child: Child,
    name: String,
}

impl Program {
    /// Starts it; output and errors go to the end of `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let open = || OpenOptions::new().create(true).append(true).open(log);
        let out = open().with_context(|| format!("opening {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("starting {name}: {command:?}"))?;
        Ok(Self { child, name: name.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("waiting for {}", self.name))
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM; an error if it has not ended within `grace`.
    pub fn stop(self, grace: Duration) -> Result<ExitStatus> {
        self.terminate()?;
        self.await_end(grace)
    }

    /// SIGTERM, and nothing more.
    pub fn terminate(&self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).context("a process id fits in i32")?);
        kill(pid, Signal::SIGTERM).with_context(|| format!("stopping {}", self.name))
    }

    /// Waits until it has ended; an error if it has not within `grace`.
    pub fn await_end(mut self, grace: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        wait::try_until(grace, || {
            let ended = self.child.try_wait().map_err(|e| e.to_string())?;
            ended.ok_or_else(|| format!("{name} still runs after {grace:?}"))
        })
        .map_err(anyhow::Error::msg)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The directory of the binaries under test: `NODEMESH_BIN_DIR`, or the one that this program was built into.
pub fn binaries() -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("NODEMESH_BIN_DIR") {
        return Ok(directory.into());
    }
    let own = std::env::current_exe().context("finding this program's own path")?;
    own.ancestors()
        .skip(1)
        .find(|directory| directory.join("mesh-agent").is_file())
        .map(Path::to_owned)
        .context("mesh-agent is not built: run `cargo xtask test`, or set NODEMESH_BIN_DIR")
}

/// The last lines of a log, for a person.
pub fn tail(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
