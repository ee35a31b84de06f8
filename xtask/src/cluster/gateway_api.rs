//! The definitions of the Gateway API's kinds, of its standard channel: those of the module that its conformance tests
//! are built with. A cluster has them when asked for.

use std::{fs, path::PathBuf};

use anyhow::Result;
use mesh_tests::cluster::names::Names;

use super::{READY_DEADLINE, kubectl};
use crate::{
    go::Module,
    run::{read, step, target},
};

/// The conformance tests, and what they need.
pub(crate) const MODULE: Module = Module("xtask/conformance");
/// The module that has the definitions.
const GATEWAY_API: &str = "sigs.k8s.io/gateway-api";
/// Where it has them.
const DEFINITIONS: &str = "config/crd/standard";

/// Fetches them, unless they are there. Returns their directory.
pub(crate) fn prepare() -> Result<PathBuf> {
    let directory = target().join("gateway-api").join(MODULE.version(GATEWAY_API)?);
    if directory.is_dir() {
        return Ok(directory);
    }
    step("Set up: definitions of the Gateway API", || {
        MODULE.fetch()?;
        let unfinished = directory.with_extension("unfinished");
        fs::create_dir_all(&unfinished)?;
        for entry in fs::read_dir(MODULE.sources(GATEWAY_API)?.join(DEFINITIONS))? {
            let entry = entry?;
            fs::write(unfinished.join(entry.file_name()), fs::read(entry.path())?)?;
        }
        fs::rename(&unfinished, &directory)?;
        Ok(())
    })?;
    Ok(directory)
}

/// Applies them; returns once they are in force.
pub(super) fn apply(names: Names) -> Result<()> {
    read(kubectl(names).args(["apply", "--server-side", "--filename"]).arg(prepare()?))?;
    let timeout = format!("--timeout={READY_DEADLINE}");
    read(kubectl(names).args(["wait", "crd", "--all", "--for=condition=Established", &timeout])).map(drop)
}
