//! Builds the kernel programs into one object, which the agent's build embeds.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

use crate::{
    run::{clean, step, succeed, target},
    setup,
};

/// Name of package, binary and object.
const NAME: &str = "mesh-ebpf";
/// Little-endian BPF, as every machine that we run on.
const TARGET: &str = "bpfel-unknown-none";

/// Builds the object and returns where it is. It is only touched when it changed, so the agent is not rebuilt without
/// need.
pub(crate) fn build() -> Result<PathBuf> {
    step("Build the kernel programs", || {
        let directory = target().join("ebpf-build");
        let mut cargo = clean("rustup");
        cargo.args(["run", setup::NIGHTLY, "cargo", "build", "--package", NAME, "--bin", NAME]);
        cargo.args(["--features", "kernel", "--release", "--target", TARGET, "-Z", "build-std=core"]);
        cargo.arg("--target-dir").arg(&directory);
        let linker = setup::bpf_linker();
        // Debug information becomes BTF: the kernel wants it for maps with locks, people want it in verifier logs.
        cargo.env(
            "RUSTFLAGS",
            format!("-C linker={} -C debuginfo=2 -C link-arg=--btf -C target-cpu=v3", linker.display()),
        );
        // bpf-linker does its own link-time optimization over all bitcode; rustc's would only be in its way.
        cargo.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
        cargo.env("CARGO_PROFILE_RELEASE_DEBUG", "2");
        succeed(&mut cargo)?;

        let built = directory.join(TARGET).join("release").join(NAME);
        let object = target().join(NAME).join(format!("{NAME}.o"));
        let bytes = fs::read(&built).with_context(|| format!("reading {}", built.display()))?;
        if fs::read(&object).ok().as_ref() != Some(&bytes) {
            fs::create_dir_all(object.parent().context("the object is in a directory")?)?;
            fs::write(&object, &bytes).with_context(|| format!("writing {}", object.display()))?;
        }
        eprintln!("  {} ({} KiB)", object.display(), bytes.len() / 1024);
        Ok(object)
    })
}
