//! `fuzz`: feeds arbitrary bytes to everything that reads bytes of others (`tests/fuzz`).
//!
//! Stands apart from cargo-fuzz, which it does the work of with two commands: what that would add is a tool to build
//! before every first test and a nightly compiler for AddressSanitizer, while the code that is fuzzed is safe Rust.
//! What is fuzzed here is compiled by the compiler that ships it, with libFuzzer's coverage and all debug assertions.
//! The layout is cargo-fuzz's, so `cargo fuzz run TARGET` in `tests/fuzz` works as well.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{
    run::{cargo, clean, of_rustc, root, step, succeed, target},
    setup,
};

/// The targets, as `tests/fuzz/Cargo.toml` has them.
const TARGETS: [&str; 5] = ["frames", "preface", "documents", "views", "packets"];
/// Runs of a target within the tests: seconds, with a seed that makes them the same everywhere.
const RUNS_IN_TESTS: u64 = 20_000;
/// Runs of a target that is asked for by hand.
pub(crate) const RUNS: u64 = 1_000_000;
/// Longest input, bytes: two of the largest control frames, a ClientHello, a few documents.
const MAX_LEN: u32 = 4096;
/// Longest run of one input, seconds, and most memory, MiB: what takes more is a finding.
const TIMEOUT_S: u32 = 10;
const MEMORY_MIB: u32 = 1024;
/// What cargo-fuzz passes, without a sanitizer.
const COVERAGE: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg",
    "fuzzing",
];

/// Runs one target, or all. What is found goes on from the last time (`target/fuzz/corpus`).
pub(crate) fn run(chosen: Option<&str>, runs: u64) -> Result<()> {
    if let Some(name) = chosen {
        ensure!(TARGETS.contains(&name), "there is no target '{name}'; there are: {}", TARGETS.join(", "));
    }
    let programs = build()?;
    for name in TARGETS.iter().filter(|name| chosen.is_none_or(|chosen| chosen == **name)) {
        let found = target().join("fuzz/corpus").join(name);
        fs::create_dir_all(&found).with_context(|| format!("making {}", found.display()))?;
        step(&format!("Fuzz {name}: {runs} runs"), || {
            fuzz(&programs, name, &[&format!("-runs={runs}"), &found.to_string_lossy()])
        })?;
    }
    Ok(())
}

/// The short run of the tests: the corpus of the repository, and what comes of it with always the same chances. What is
/// found goes to a directory that each run empties: libFuzzer writes into the first corpus that it is given, and the
/// repository's would grow, so that no run were the same as the one before.
pub(crate) fn in_tests() -> Result<()> {
    step("Check the format of the fuzz targets", || {
        succeed(cargo().args(["fmt", "--check", "--manifest-path", "tests/fuzz/Cargo.toml"]))
    })?;
    let programs = build()?;
    step(&format!("Fuzz: {RUNS_IN_TESTS} runs of each target"), || {
        TARGETS.iter().try_for_each(|name| {
            let found = target().join("fuzz/tests").join(name);
            if found.exists() {
                fs::remove_dir_all(&found).with_context(|| format!("emptying {}", found.display()))?;
            }
            fs::create_dir_all(&found).with_context(|| format!("making {}", found.display()))?;
            let runs = format!("-runs={RUNS_IN_TESTS}");
            fuzz(&programs, name, &[&runs, "-seed=1", &found.to_string_lossy()])
        })
    })
}

/// Makes the seeds that are missing.
pub(crate) fn seeds() -> Result<()> {
    step("Write the seeds", || {
        succeed(cargo().args(["run", "--quiet", "--package", "mesh-tests", "--example", "fuzz_seeds"]))
    })
}

/// Builds the targets, and returns the directory that they are in.
fn build() -> Result<PathBuf> {
    setup::cpp_compiler()?;
    step("Build the fuzz targets", || {
        let host = of_rustc("host-tuple")?;
        let directory = target().join("fuzz/build");
        let mut build = cargo();
        build.args(["build", "--release", "--manifest-path", "tests/fuzz/Cargo.toml"]);
        // Named, even though it is our own: flags are for what is fuzzed then, not for build scripts.
        build.args(["--target", &host]).arg("--target-dir").arg(&directory);
        build.env("RUSTFLAGS", COVERAGE.join(" ")).env_remove("CARGO_ENCODED_RUSTFLAGS");
        succeed(&mut build)?;
        Ok(directory.join(host).join("release"))
    })
}

fn fuzz(programs: &std::path::Path, name: &str, arguments: &[&str]) -> Result<()> {
    let artifacts = target().join("fuzz/artifacts").join(name);
    fs::create_dir_all(&artifacts).with_context(|| format!("making {}", artifacts.display()))?;
    let mut fuzz = clean(programs.join(name));
    fuzz.args(arguments).arg(root().join("tests/fuzz/corpus").join(name));
    fuzz.arg(format!("-max_len={MAX_LEN}")).arg(format!("-timeout={TIMEOUT_S}"));
    fuzz.arg(format!("-rss_limit_mb={MEMORY_MIB}")).arg(format!("-artifact_prefix={}/", artifacts.display()));
    fuzz.args(["-print_final_stats=1", "-verbosity=0"]);
    succeed(&mut fuzz).with_context(|| format!("the input that broke it is in {}", artifacts.display()))
}
