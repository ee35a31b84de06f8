//! A real Kubernetes for tests: brought up by `cargo xtask cluster`, talked to by kubectl, taken down with the test.
//!
//! `NODEMESH_KUBECONFIG` may name a cluster that is there already. It is not `KUBECONFIG` itself, so that a shell which
//! has that for other work does not get privileged pods into the wrong cluster by running tests.

pub mod machines;
pub mod mesh;
pub mod names;
pub mod shop;
pub mod traces;

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::Flock;

use crate::{netns, process};
use names::{NUMBERS, Names, OF_PEOPLE};

/// The kubeconfig of a cluster that takes the place of ours.
const THEIRS: &str = "NODEMESH_KUBECONFIG";
/// The image of busybox that pods of tests run from.
const TOOLS: &str = "NODEMESH_TOOLS_IMAGE";
/// The one that our clusters have.
const OWN_TOOLS: &str = "nodemesh.local/busybox:test";

/// A cluster that is up.
#[derive(Debug)]
pub struct Cluster {
    kubectl: PathBuf,
    kubeconfig: PathBuf,
    ours: Option<Ours>,
}

/// One that this test brought up.
#[derive(Debug)]
struct Ours {
    names: Names,
    _lock: Flock<File>,
}

impl Cluster {
    /// The one that the environment names, or else one of our own.
    pub fn at_hand() -> Result<Self> {
        match std::env::var_os(THEIRS) {
            Some(kubeconfig) => {
                Ok(Self { kubectl: "kubectl".into(), kubeconfig: kubeconfig.into(), ours: None })
            }
            None => Self::up(&[]),
        }
    }

    /// One of our own, with a number that no other test has; `options` are those of `cargo xtask cluster up`.
    pub fn up(options: &[&str]) -> Result<Self> {
        let ours = Ours::take()?;
        let names = ours.names;
        let cluster = Self { kubectl: names.kubectl(), kubeconfig: names.kubeconfig(), ours: Some(ours) };
        // A test that was killed has left its own, with whatever it did there.
        cluster.xtask("down", &[])?;
        cluster.bring_up(options)?;
        Ok(cluster)
    }

    /// Leaves it as it is, as a test does that is killed.
    pub fn abandon(mut self) {
        self.ours = None;
    }

    /// Brings it up; one that is up stays as it is, of one that has crashed nothing is kept. Returns what was said.
    pub fn bring_up(&self, options: &[&str]) -> Result<String> {
        self.xtask("up", options)
    }

    /// Takes it down. One that is not ours stays.
    pub fn down(mut self) -> Result<()> {
        self.end()
    }

    /// Its names, if it is ours.
    pub fn names(&self) -> Option<Names> {
        self.ours.as_ref().map(|ours| ours.names)
    }

    /// Runs kubectl and returns what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        netns::run(&mut self.command(arguments), None)
    }

    /// Makes what a manifest says.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        let made = netns::run(&mut self.command(&["apply", "-f", "-"]), Some(manifest));
        made.with_context(|| manifest.to_owned()).map(drop)
    }

    /// kubectl with the cluster's administrator's rights.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.env("KUBECONFIG", &self.kubeconfig).args(arguments);
        command
    }

    /// The kubeconfig, for clients other than kubectl.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The nodes' names; an error if there are fewer than two.
    pub fn nodes(&self) -> Result<Vec<String>> {
        let said = self.kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"])?;
        let nodes: Vec<String> = said.split_whitespace().map(str::to_owned).collect();
        ensure!(nodes.len() >= 2, "these tests need two nodes; there are {nodes:?}");
        Ok(nodes)
    }

    /// The image that pods of tests run from: busybox, as all its programs.
    pub fn tools_image() -> String {
        std::env::var(TOOLS).unwrap_or_else(|_| OWN_TOOLS.to_owned())
    }

    /// Makes images of the programs under test and gives them to all nodes. Into a cluster that is not ours whoever
    /// named it has brought them.
    pub fn load_images(&self) -> Result<()> {
        if self.ours.is_none() {
            return Ok(());
        }
        let directory = tempfile::tempdir()?;
        let mut make = Command::new(xtask()?);
        make.args(["image", "--from"]).arg(process::binaries()?).arg("--to").arg(directory.path());
        netns::run(&mut make, None)?;
        let files =
            ["agent.tar", "controller.tar"].map(|name| directory.path().join(name).display().to_string());
        self.xtask("load-image", &files.each_ref().map(String::as_str)).map(drop)
    }

    fn end(&mut self) -> Result<()> {
        if self.ours.is_some() {
            self.xtask("down", &[])?;
        }
        self.ours = None;
        Ok(())
    }

    fn xtask(&self, task: &str, arguments: &[&str]) -> Result<String> {
        let Some(ours) = &self.ours else { bail!("{THEIRS} names a cluster that is not ours to change") };
        let mut command = Command::new(xtask()?);
        command.args(["cluster", "--number", &ours.names.number().to_string(), task]).args(arguments);
        netns::run(&mut command, None)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            // The next test that takes the number removes it.
            #[allow(clippy::print_stderr, reason = "for whoever reads the test's output")]
            {
                eprintln!("{error:#}");
            }
        }
    }
}

impl Ours {
    fn take() -> Result<Self> {
        for number in OF_PEOPLE + 1..NUMBERS {
            let names = Names::new(number).context("a number below the end")?;
            if let Some(lock) = names.try_lock("tests")? {
                return Ok(Self { names, _lock: lock });
            }
        }
        bail!("all numbers of clusters are taken by tests that run")
    }
}

/// The program that `cargo xtask` runs, beside those under test.
fn xtask() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program's own path")?;
    if own.file_name() == Some("xtask".as_ref()) {
        return Ok(own);
    }
    let path = process::binaries()?.join("xtask");
    ensure!(path.is_file(), "{} is not there: cargo build --package xtask", path.display());
    Ok(path)
}
