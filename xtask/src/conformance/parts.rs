//! What the tests are made of, built from source once and kept below `target/conformance`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cluster::{dns, gateway_api},
    image::oci::{Image, NOBODY},
    run::{step, target},
};
use gateway_api::MODULE;

/// The module that the tests are in.
const SUITE: &str = "sigs.k8s.io/gateway-api/conformance";
/// What it makes its pods from.
const MANIFESTS: &str = "mesh/manifests.yaml";

/// Where everything is.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The program.
    pub(super) suite: PathBuf,
    /// The image of its pods.
    pub(super) echo: PathBuf,
}

/// Makes what is missing, for the cluster too; quick when nothing is.
pub(crate) fn prepare() -> Result<Parts> {
    dns::prepare()?;
    gateway_api::prepare()?;
    let directory = directory().join(MODULE.build_name(SUITE)?);
    let parts = Parts { suite: directory.join("suite"), echo: directory.join("echo.tar") };
    if !(parts.suite.exists() && parts.echo.exists()) {
        step("Set up: conformance tests of the Gateway API", || build(&directory, &parts))?;
    }
    Ok(parts)
}

/// What the tests leave.
pub(super) fn directory() -> PathBuf {
    target().join("conformance")
}

fn build(directory: &Path, parts: &Parts) -> Result<()> {
    eprintln!(
        "  building the suite {}, once, for three to five minutes on two cores",
        MODULE.version(SUITE)?
    );
    MODULE.fetch()?;
    fs::create_dir_all(directory)?;
    MODULE.build_tests(".", &parts.suite)?;
    // It must say what the suite reads, before any pod does.
    MODULE.test("./echo")?;
    let echo = directory.join("echo");
    MODULE.build("./echo", "", &echo)?;
    Image::new(&image_of_pods()?, &["/usr/bin/server"])
        .user(NOBODY)
        .file("usr/bin/server", 0o755, fs::read(&echo)?)
        .link("usr/bin/client", "server")
        .write(&parts.echo)
}

/// The name of the image that the suite's pods ask for. They take one that is there.
fn image_of_pods() -> Result<String> {
    let path = MODULE.sources(SUITE)?.join(MANIFESTS);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let names: BTreeSet<&str> = text.lines().filter_map(|line| line.trim().strip_prefix("image: ")).collect();
    ensure!(names.len() == 1, "{} names one image, not {names:?}", path.display());
    names.first().map(|name| (*name).to_owned()).context("there is one")
}
