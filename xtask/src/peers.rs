//! Programs of others that speak what the agent reads: client and server of gRPC's own interoperability tests, and h2spec,
//! which tries what RFC 9113 and RFC 7541 say. And one of ours, made of nothing but Go's own net/http, and
//! golang.org/x/net for the WebSockets that net/http lacks.
//!
//! They are built as they are, from source, once, into `target/peers`, under names that tests know.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    go::Module,
    run::{step, target},
};

/// Requires all of them, each in one version.
const MODULE: Module = Module("tests/peers");
/// What the build is named after.
const GRPC: &str = "google.golang.org/grpc";
/// The programs, each with its package.
const PROGRAMS: [(&str, &str); 4] = [
    ("h2spec", "github.com/summerwind/h2spec/cmd/h2spec"),
    ("interop-client", "google.golang.org/grpc/interop/client"),
    ("interop-server", "google.golang.org/grpc/interop/server"),
    ("web", "nodemesh.io/test-peers/web"),
];
/// Says which build the programs are of.
const BUILT: &str = "built";

/// Builds what is missing or of another version; quick when nothing is. Returns where the programs are.
pub(crate) fn prepare() -> Result<PathBuf> {
    let directory = target().join("peers");
    let wanted = MODULE.build_name(GRPC)?;
    if fs::read_to_string(directory.join(BUILT)).ok().as_ref() != Some(&wanted) {
        step("Set up: gRPC's interoperability tests, h2spec, Go's net/http", || build(&directory, &wanted))?;
    }
    Ok(directory)
}

fn build(directory: &Path, name: &str) -> Result<()> {
    eprintln!("  building them, once, for about a minute on two cores");
    MODULE.fetch()?;
    fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    for (program, package) in PROGRAMS {
        MODULE.build(package, "", &directory.join(program))?;
    }
    // Last, so that what it names is whole.
    fs::write(directory.join(BUILT), name).context("naming the build")
}
