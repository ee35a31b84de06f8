//! Runs the tests in a virtual machine, emulated, and reads their results from its second serial line as they come.
//!
//! A machine that panics, hangs or ends early is a failure that shows the end of its console.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::Test;
use crate::run::clean;

/// Memory of the machine: the archive unpacked, and worlds.
const MEMORY: &str = "3G";
/// How long the machine may say nothing beside what a test may take: it boots, or looks after a test that was ended.
const SILENCE: Duration = Duration::from_secs(120);
/// Lines of the console that a failure shows.
const TAIL_LINES: usize = 60;

/// How a test ended.
#[derive(Debug)]
pub(super) struct Verdict {
    /// `program::test`.
    pub(super) name: String,
    passed: bool,
}

impl Verdict {
    pub(super) fn passed(&self) -> bool {
        self.passed
    }
}

/// Boots, and returns how each test ended; an error if not all of them did.
pub(super) fn run(image: &Path, archive: &Path, directory: &Path, tests: &[Test]) -> Result<Vec<Verdict>> {
    let expected = tests.len();
    let console = directory.join("console.log");
    let mut emulator = Emulator(command(image, archive, &console).spawn().context("starting the emulator")?);
    let results = emulator.0.stdout.take().context("the emulator's output is ours")?;
    let (sender, lines) = mpsc::channel();
    thread::Builder::new().name("results".into()).spawn(move || {
        for line in BufReader::new(results).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    })?;
    let mut verdicts = vec![];
    let mut started = Instant::now();
    loop {
        // They come in the order of the list: the next one is what it is at.
        let of_test = tests.get(verdicts.len()).map_or(0, Test::seconds);
        let silence = SILENCE + Duration::from_secs(of_test.into());
        let line = match lines.recv_timeout(silence) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                bail!("the machine says nothing for {silence:?}\n{}", tail(&console))
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the machine ended after {} of {expected} tests\n{}", verdicts.len(), tail(&console))
            }
        };
        let (word, rest) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
        match word {
            "start" => started = Instant::now(),
            "out" => eprintln!("    {rest}"),
            "passed" | "failed" => {
                let name = rest.replacen(' ', "::", 1);
                let passed = word == "passed";
                let mark = if passed { "✔" } else { "✘" };
                eprintln!("  {mark} {name} ({:.1} s)", started.elapsed().as_secs_f32());
                verdicts.push(Verdict { name, passed });
            }
            "done" if verdicts.len() == expected => return Ok(verdicts),
            "done" => bail!("{} tests of {expected} were run\n{}", verdicts.len(), tail(&console)),
            _ => {}
        }
    }
}

/// An emulator, ended with us.
#[derive(Debug)]
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(image: &Path, archive: &Path, console: &Path) -> Command {
    let mut qemu = clean("qemu-system-x86_64");
    // One thread for both processors: with a thread each, QEMU before 8.1 may go on running what the kernel has just
    // patched (a static key's int3), for ever.
    qemu.args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", MEMORY]);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.arg("-kernel").arg(image).arg("-initrd").arg(archive);
    // A panic ends the machine; random numbers come from the processor, there is nothing else to wait for.
    qemu.args(["-append", "console=ttyS0 panic=-1 random.trust_cpu=on loglevel=5 mitigations=off"]);
    qemu.arg("-serial").arg(format!("file:{}", console.display()));
    qemu.args(["-chardev", "stdio,id=results,signal=off", "-serial", "chardev:results"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    qemu
}

fn tail(console: &Path) -> String {
    let text =
        fs::read(console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!(
        "the end of {}:\n{}",
        console.display(),
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    )
}
