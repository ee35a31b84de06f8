//! `generate`: the reference in docs/reference, from the programs' own definitions.
//!
//! The tests that compare the reference with the programs write it instead when told to, so that what is written is
//! what is tested.

use anyhow::Result;

use crate::run::{cargo, step, succeed};

/// Makes those tests write; mesh-settings reads it.
const WRITE: &str = "NODEMESH_WRITE_REFERENCE";
/// What the names of those tests have in common.
const TESTS: &str = "is_generated";

/// What can be written alone.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Part {
    /// docs/reference.
    Reference,
    /// deploy/dashboards, from what docs/reference says.
    Dashboards,
    /// deploy/manifests, and the chart's copies of what is in deploy.
    Manifests,
}

pub(crate) fn reference() -> Result<()> {
    step("Write docs/reference", || {
        let packages = ["--package", "mesh-agent", "--package", "mesh-controller"];
        let mut tests = cargo();
        tests.env(WRITE, "1").args(["test", "--quiet", "--lib", "--bins"]).args(packages);
        succeed(tests.args(["--", TESTS]))
    })
}
