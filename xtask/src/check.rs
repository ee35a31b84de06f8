//! `test` and `ci`: format, lints, build, and the tests in the order of what they need.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    chart, cluster, conformance, ebpf, fuzz, kernel, peers, profile,
    run::{cargo, of_rustc, step, succeed, target_directory},
    setup,
};

/// What users run.
const PROGRAMS: [&str; 3] = ["mesh-agent", "mesh-controller", "meshctl"];

/// Everything that needs neither root nor the kernel toolchain nor any tool beside cargo.
pub(crate) fn pure(filter: Option<&str>) -> Result<()> {
    if filter.is_none() {
        step("Check the format", || succeed(cargo().args(["fmt", "--all", "--check"])))?;
    }
    step("Pure tests", || {
        let run = |package: &[&str]| {
            let mut tests = cargo();
            tests.args(["test", "--quiet", "--no-fail-fast"]).args(package);
            succeed(tests.arg("--").args(filter))
        };
        run(&["--workspace", "--lib", "--bins"])?;
        run(&["--package", "mesh-agent", "--test", "control"])?;
        run(&["--package", "mesh-tests", "--test", "simulation"])?;
        run(&["--package", "mesh-controller", "--package", "xtask", "--tests"])
    })
}

/// Everything. Fails, and says why, on a machine that cannot run all of it.
pub(crate) fn everything(filter: Option<&str>) -> Result<()> {
    setup::everything()?;
    if filter.is_none() {
        step("Check the format", || succeed(cargo().args(["fmt", "--all", "--check"])))?;
    }
    // Side by side, as the last crates of each build leave a core idle. Before the tests, each of which has a limited time.
    let (binaries, nextest) = std::thread::scope(|scope| {
        let others = filter.is_none().then(|| scope.spawn(prepare_others));
        let built = build_all(filter);
        let others = others.map_or(Ok(()), |it| it.join().unwrap_or_else(|it| std::panic::resume_unwind(it)));
        let built = built?;
        others.map(|()| built)
    })?;
    step("Tests: pure ones, then worlds one at a time", || {
        let mut tests = cargo();
        tests.env("PATH", with_tool(&nextest)?).env("NODEMESH_BIN_DIR", &binaries);
        tests.args(["nextest", "run", "--workspace"]).args(filter);
        succeed(&mut tests)
    })?;
    if filter.is_none() { kernel::smoke(&binaries) } else { Ok(()) }
}

/// What is ours: lints it, and builds all of it. The directory of the programs that worlds run, and nextest.
fn build_all(filter: Option<&str>) -> Result<(PathBuf, PathBuf)> {
    ebpf::build()?;
    if filter.is_none() {
        step("Lint", || {
            let mut clippy = cargo();
            clippy.args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]);
            succeed(&mut clippy)
        })?;
    }
    let binaries = build_binaries()?;
    let nextest = setup::nextest()?;
    step("Build the tests", || {
        let mut build = cargo();
        build.env("PATH", with_tool(&nextest)?).args(["nextest", "run", "--workspace", "--no-run"]);
        succeed(&mut build)
    })?;
    Ok((binaries, nextest))
}

/// What tests run beside that: Kubernetes, its conformance tests, helm, programs of others that speak HTTP/2; and what
/// is fuzzed, compiled in a way of its own.
fn prepare_others() -> Result<()> {
    fuzz::in_tests()?;
    cluster::prepare()?;
    conformance::prepare()?;
    peers::prepare()?;
    chart::check()
}

/// What a merge must pass.
pub(crate) fn ci() -> Result<()> {
    everything(None)?;
    let deny = setup::cargo_deny()?;
    step("Check dependencies", || {
        let mut check = cargo();
        check.env("PATH", with_tool(&deny)?).args(["deny", "--workspace", "check"]);
        succeed(&mut check)
    })
}

/// Builds what worlds run, and returns the directory that it is in.
pub(crate) fn build_binaries() -> Result<PathBuf> {
    step("Build controller and agent", || {
        succeed(&mut build())?;
        Ok(target_directory()?.join("debug"))
    })
}

/// The same as users get it, laid out by the profile that is kept.
pub(crate) fn build_release() -> Result<PathBuf> {
    build_with(&profile::flags()?, "profiled")
}

/// The same in a target directory of its own, with these words for rustc; not for what runs while it is built.
pub(crate) fn build_with(flags: &[String], directory: &str) -> Result<PathBuf> {
    step(&format!("Build controller and agent: {directory}"), || {
        let host = of_rustc("host-tuple")?;
        let directory = target_directory()?.join(directory);
        let mut build = build();
        build.args(["--release", "--target", &host]).arg("--target-dir").arg(&directory);
        succeed(build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")))?;
        Ok(directory.join(host).join("release"))
    })
}

/// Builds what users run, and puts it somewhere.
pub(crate) fn release(to: Option<&Path>) -> Result<()> {
    setup::kernel_toolchain()?;
    ebpf::build()?;
    let built = build_release()?;
    if let Some(to) = to {
        put(&built, to)?;
    }
    println!("{} are in {}", PROGRAMS.join(", "), to.unwrap_or(&built).display());
    Ok(())
}

/// Copies what users run into a directory, which need not be there yet.
fn put(built: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    for program in PROGRAMS {
        fs::copy(built.join(program), to.join(program))
            .with_context(|| format!("copying {program} to {}", to.display()))?;
    }
    Ok(())
}

fn build() -> Command {
    let mut build = cargo();
    build.args(["build", "--package", "mesh-agent", "--package", "mesh-controller", "--bins"]);
    build
}

/// `PATH` with a tool's directory before everything else.
fn with_tool(tool: &std::path::Path) -> Result<std::ffi::OsString> {
    let own = tool.parent().context("a tool is in a directory")?.to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::iter::once(own).chain(std::env::split_paths(&path))).context("a PATH")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_put_where_nothing_was_yet_and_over_what_was() {
        let directory = tempfile::tempdir().unwrap();
        let (built, to) = (directory.path().join("built"), directory.path().join("not/there"));
        fs::create_dir(&built).unwrap();
        for text in ["old", "new"] {
            for program in PROGRAMS {
                fs::write(built.join(program), text).unwrap();
            }
            put(&built, &to).unwrap();
            for program in PROGRAMS {
                assert_eq!(fs::read_to_string(to.join(program)).unwrap(), text);
            }
        }
    }
}
