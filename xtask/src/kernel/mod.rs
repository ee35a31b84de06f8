//! `test --kernel`: the tests that are about the kernel, on other kernels, in virtual machines.
//!
//! | module | what it does |
//! |---|---|
//! | [`packages`] | which kernels there are; fetches and unpacks them |
//! | [`initrd`] | packs kernel modules, programs under test, tests and what they call into one archive |
//! | [`cpio`] | the archive's format |
//! | [`machine`] | runs the archive on a kernel and reads what the tests say |
//!
//! The virtual machine is emulated (no KVM needed), has no disk and no network, and ends with its tests.

mod cpio;
mod initrd;
mod machine;
mod packages;

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

use crate::{
    check, ebpf,
    run::{cargo, find, step, target},
    setup,
};
use machine::Verdict;

/// Tests that are about the kernel: what loads, attaches, captures, guards, is attacked, is repaired, is taken over.
const TESTS: [&str; 15] = [
    "kernel_features",
    "kernel_maps",
    "first_light",
    "guard",
    "services",
    "policy",
    "restart",
    "fail_closed",
    "hostile_workload",
    "upgrade",
    "enrolment",
    "operations",
    "identity",
    "streams",
    "by_demand",
];

/// Tests of those above that stay out, each with its reason.
const LEFT_OUT: [(&str, &str); 0] = [];

/// Seconds that one test may take.
const SECONDS: u32 = 300;
/// Tests that take longer when all of it is emulated, and the seconds that each may take.
const LONG: [(&str, u32); 6] = [
    ("fifty_kills_under_load_show_no_plaintext_refuse_at_once_and_heal_within_a_second", 1800),
    ("twenty_upgrades_under_load_lose_nothing", 1800),
    ("what_is_taken_away_is_refused_repaired_within_five_seconds_and_counted", 900),
    ("two_hundred_and_fifty_workloads_are_enrolled_within_ten_seconds", 900),
    ("forty_megabytes_both_ways_at_once_are_the_same_bytes", 900),
    ("forty_megabytes_either_way_are_the_same_bytes", 900),
];

/// What `cargo xtask test` runs of it on the oldest kernel: that the programs load, carry, refuse.
const SMOKE: [&str; 3] = ["kernel_features", "first_light", "guard"];

/// Programs that this needs beside those of the worlds, each with its Debian package.
const PROGRAMS: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
];

/// One test to run: its program and its name in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Test {
    program: String,
    name: String,
}

impl Test {
    /// How long it may take.
    fn seconds(&self) -> u32 {
        LONG.iter().find(|(name, _)| *name == self.name).map_or(SECONDS, |(_, seconds)| *seconds)
    }
}

/// The tests on one kernel, or on `all`.
pub(crate) fn test(version: &str, filter: Option<&str>) -> Result<()> {
    setup::everything()?;
    ebpf::build()?;
    let binaries = check::build_binaries()?;
    on(version, &TESTS, filter, &binaries)
}

/// The few on the oldest kernel that belong to every run of the tests; everything is built already.
pub(crate) fn smoke(binaries: &Path) -> Result<()> {
    on(packages::OLDEST, &SMOKE, None, binaries)
}

fn on(version: &str, programs: &[&str], filter: Option<&str>, binaries: &Path) -> Result<()> {
    let kernels = packages::chosen(version)?;
    step("Set up: emulator", || setup::programs(&PROGRAMS))?;
    let executables = step("Build the tests", test_executables)?;
    let mut tests = vec![];
    for program in programs {
        let (_, path) = executables
            .iter()
            .find(|(name, _)| name == program)
            .with_context(|| format!("there is no tests/tests/{program}.rs"))?;
        let listed = crate::run::read(crate::run::clean(path).args(["--list", "--format", "terse"]))?;
        let names = listed.lines().filter_map(|line| line.strip_suffix(": test"));
        tests.extend(names.map(|name| Test { program: (*program).to_owned(), name: name.to_owned() }));
    }
    for (name, why) in LEFT_OUT {
        eprintln!("  left out: {name}: {why}");
    }
    tests.retain(|test| LEFT_OUT.iter().all(|(name, _)| *name != test.name));
    let full_name = |test: &Test| format!("{}::{}", test.program, test.name);
    tests.retain(|test| filter.is_none_or(|filter| full_name(test).contains(filter)));
    ensure!(!tests.is_empty(), "no test has {filter:?} in its name");

    let mut failed = vec![];
    for kernel in kernels {
        let title = format!("{} tests on Linux {}", tests.len(), kernel.version);
        let result = step(&title, || {
            let unpacked = packages::unpacked(kernel)?;
            let directory = target().join("kernels").join(format!("run-{}", kernel.version));
            fs::create_dir_all(&directory)?;
            let archive = directory.join("initrd.cpio");
            initrd::write(&archive, &unpacked, binaries, &executables, &tests)?;
            let verdicts = machine::run(&unpacked.image, &archive, &directory, &tests)?;
            let bad: Vec<_> = verdicts.iter().filter(|verdict| !verdict.passed()).collect();
            ensure!(bad.is_empty(), "failed: {}", names(&bad));
            Ok(())
        });
        if let Err(error) = result {
            eprintln!("{error:#}");
            failed.push(kernel.version);
        }
    }
    ensure!(failed.is_empty(), "tests failed on Linux {}", failed.join(", "));
    Ok(())
}

fn names(verdicts: &[&Verdict]) -> String {
    verdicts.iter().map(|verdict| verdict.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The test programs of worlds, by name.
fn test_executables() -> Result<Vec<(String, std::path::PathBuf)>> {
    let mut build = cargo();
    build.args(["test", "--quiet", "--package", "mesh-tests", "--no-run", "--message-format", "json"]);
    let said = crate::run::read(&mut build)?;
    let mut found = vec![];
    for line in said.lines().filter(|line| line.starts_with('{')) {
        let message: serde_json::Value = serde_json::from_str(line).context("reading cargo's messages")?;
        let is_test = message["target"]["kind"][0] == "test";
        if let (true, Some(name), Some(path)) =
            (is_test, message["target"]["name"].as_str(), message["executable"].as_str())
        {
            found.push((name.to_owned(), path.into()));
        }
    }
    Ok(found)
}

/// A program of the host that goes into the archive.
fn program(name: &str) -> Result<std::path::PathBuf> {
    let path = find(name).with_context(|| format!("{name} is not installed"))?;
    Ok(fs::canonicalize(path)?)
}
