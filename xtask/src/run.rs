//! Steps with headings that a person can follow, and commands free of the environment of the cargo that runs us.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};

/// Set by the outer cargo and rustup for their own children; an inner cargo of another toolchain must not see them.
/// `LD_LIBRARY_PATH` is there because `cargo run` puts its toolchain's libraries into it, and bpf-linker has others.
const OF_OUTER_CARGO: [&str; 10] = [
    "CARGO",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_PATH",
    "CARGO_TARGET_DIR",
    "LD_LIBRARY_PATH",
    "RUSTC",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// Prefixes of what `cargo run` tells a program about its package.
const OF_OUR_PACKAGE: [&str; 3] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"];

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the workspace")
}

/// The workspace's own target directory: tools and kernel programs are there whatever `CARGO_TARGET_DIR` says, so that
/// the agent's build finds them.
pub(crate) fn target() -> PathBuf {
    root().join("target")
}

/// Where the cargo that runs us builds: the same, unless it is told of another.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let metadata = read(cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata).context("reading cargo metadata")?;
    let target = metadata["target_directory"].as_str().context("cargo names the target directory")?;
    Ok(target.into())
}

/// What our toolchain's rustc says of itself by `--print`, such as `host-tuple`.
pub(crate) fn of_rustc(what: &str) -> Result<String> {
    Ok(read(clean("rustc").arg(format!("--print={what}")))?.trim().to_owned())
}

/// Tells what happens, does it, and tells how long it took.
pub(crate) fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("\n▶ {title}");
    let started = Instant::now();
    let result = work().with_context(|| title.to_owned());
    let mark = if result.is_ok() { "✔" } else { "✘" };
    eprintln!("{mark} {title} ({:.1} s)", started.elapsed().as_secs_f32());
    result
}

/// A command that inherits nothing from the cargo that runs us.
pub(crate) fn clean(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    for name in OF_OUTER_CARGO {
        command.env_remove(name);
    }
    command.current_dir(root());
    command
}

/// The cargo that runs us, on this workspace. Without what `cargo run` says of our own package: build scripts that look
/// at it would run again at every change between this and a cargo that was typed.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        if OF_OUR_PACKAGE.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command.current_dir(root());
    command
}

/// Runs to the end with its output visible; an error unless it succeeds.
pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{}: {status}", line(command));
    }
    Ok(())
}

/// Runs to the end and returns what it printed; an error unless it succeeds.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!("{}: {}: {complaint}", line(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Where a program is, in `PATH` and where Debian keeps what only root runs.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    places.map(|place| place.join(program)).find(|file| file.is_file())
}
