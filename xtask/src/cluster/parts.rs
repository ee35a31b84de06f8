//! What a cluster is made of: Kubernetes, built from source once; containerd, runc and CNI plugins of Debian, unpacked;
//! images that its pods need. All of it below `target/kubernetes`, by version.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;
use sha2::{Digest, Sha256};

use super::capabilities;
use crate::{
    debian::Archive,
    image::oci::{Image, NAMES},
    run::{clean, find, read, root, step, succeed, target},
    setup,
};

/// Where the module is that links Kubernetes' programs into one.
const MODULE: &str = "xtask/kubernetes";
/// Its files: another content is another build.
const SOURCES: [&str; 4] = ["go.mod", "go.sum", "main.go", "pause/main.go"];
/// The oldest Go that builds this Kubernetes.
const OLDEST_GO: (u32, u32) = (1, 24);
/// Packages between two lines that tell how far the build is.
const TELL_EVERY: usize = 200;

/// Unpacked, not installed: a service would be started, and Docker's own containerd would be removed.
const PACKAGES: [&str; 5] =
    ["containerd", "runc", "containernetworking-plugins", "libseccomp2", "busybox-static"];
/// One release of Debian, so that every machine runs the same containerd.
const RELEASE: &str = "bookworm";
const DEBIAN: [&str; 2] = [
    "http://deb.debian.org/debian bookworm main",
    "http://deb.debian.org/debian-security bookworm-security main",
];

/// Programs that nodes call, each with its Debian package.
const PROGRAMS: [(&str, &str); 8] = [
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
    ("unshare", "util-linux"),
    ("setsid", "util-linux"),
    ("mount", "mount"),
    ("strip", "binutils"),
];

/// The image of a pod's first process.
pub(super) const PAUSE_IMAGE: &str = "nodemesh.local/pause:test";
/// The image that tests run their pods from: busybox.
const TOOLS_IMAGE: &str = "nodemesh.local/busybox:test";

/// Where everything is.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The program that is all of Kubernetes' programs.
    pub(super) kubernetes: PathBuf,
    packages: PathBuf,
    /// What every node has from the start.
    pub(super) images: Vec<PathBuf>,
}

impl Parts {
    /// A file of Debian's packages, by its path where they are installed.
    pub(super) fn tool(&self, path: &str) -> PathBuf {
        self.packages.join(path)
    }

    /// `PATH` of what runs on a node.
    pub(super) fn path(&self) -> String {
        let own = ["usr/bin", "usr/sbin"].map(|directory| self.tool(directory).display().to_string());
        format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", own.join(":"))
    }
}

/// Makes what is missing; quick when nothing is. Fails, and says all that is missing, where no cluster can run.
pub(crate) fn prepare() -> Result<Parts> {
    step("Set up: Kubernetes, containerd, images", || {
        ensure!(geteuid().is_root(), "a cluster needs root: it is made of namespaces; run with sudo");
        setup::programs(&PROGRAMS)?;
        capabilities::check()?;
        let parts = places()?;
        let archive = Archive { home: home(), sources: &DEBIAN };
        fs::create_dir_all(&archive.home)?;
        archive.unpacked(&PACKAGES, &parts.packages)?;
        build(&parts)?;
        images(&parts)?;
        Ok(parts)
    })
}

/// What an earlier [`prepare`] has made.
pub(super) fn made() -> Result<Parts> {
    let parts = places()?;
    ensure!(parts.kubernetes.exists(), "Kubernetes is not built: cargo xtask cluster up");
    Ok(parts)
}

fn home() -> PathBuf {
    target().join("kubernetes")
}

fn places() -> Result<Parts> {
    let mut hash = Sha256::new();
    for name in SOURCES {
        hash.update(
            fs::read(root().join(MODULE).join(name)).with_context(|| format!("reading {MODULE}/{name}"))?,
        );
    }
    let hash: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let built = home().join(format!("{}-{hash}", version()?));
    Ok(Parts {
        kubernetes: built.join("kubernetes"),
        packages: home().join(RELEASE),
        images: ["pause.tar", "busybox.tar"].map(|name| built.join(name)).into(),
    })
}

/// `v1.34.4`, as go.mod has it.
fn version() -> Result<String> {
    let module = fs::read_to_string(root().join(MODULE).join("go.mod"))?;
    let version = module.lines().find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes "));
    version.map(str::to_owned).context("go.mod names a version of k8s.io/kubernetes")
}

fn build(parts: &Parts) -> Result<()> {
    let directory = parts.kubernetes.parent().context("a program is in a directory")?;
    let pause = directory.join("pause");
    if parts.kubernetes.exists() && pause.exists() {
        return Ok(());
    }
    go_is_new_enough()?;
    fs::create_dir_all(directory)?;
    let version = version()?;
    eprintln!(
        "  building Kubernetes {version} and etcd, once: five to ten minutes on two cores, 3 GB of Go's cache"
    );
    succeed(go().args(["mod", "download"]))?;
    let packages = read(go().args(["list", "-deps", "./..."]))?.lines().count();

    let minor = version.split('.').nth(1).context("a version has a minor number")?;
    let mut flags = "-s -w".to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        flags += &format!(
            " -X {package}.gitVersion={version} -X {package}.gitMajor=1 -X {package}.gitMinor={minor}"
        );
    }
    let unfinished = directory.join("unfinished");
    let mut link = go();
    link.args(["build", "-v", "-trimpath", "-buildvcs=false", "-ldflags", &flags, "-o"])
        .arg(&unfinished)
        .arg(".");
    followed(&mut link, packages)?;
    succeed(
        go().args(["build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o"])
            .arg(&pause)
            .arg("./pause"),
    )?;
    fs::rename(&unfinished, &parts.kubernetes)?;
    Ok(())
}

fn go() -> Command {
    let mut go = clean("go");
    go.current_dir(root().join(MODULE)).env("CGO_ENABLED", "0").env("GOWORK", "off");
    go
}

fn go_is_new_enough() -> Result<()> {
    let (major, minor) = OLDEST_GO;
    let wanted =
        format!("Kubernetes is built from source by Go {major}.{minor} or newer (https://go.dev/dl)");
    ensure!(find("go").is_some(), "{wanted}; there is no go in PATH");
    let said = read(clean("go").args(["env", "GOVERSION"]))?;
    ensure!(go_version(&said).is_some_and(|there| there >= OLDEST_GO), "{wanted}; this is {}", said.trim());
    Ok(())
}

/// `go1.26.8` → (1, 26).
fn go_version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.trim().strip_prefix("go")?.split(['.', '-', 'r', 'b', ' ']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Runs `go build -v`, which says a line for each package, and tells now and then how far it is.
fn followed(build: &mut Command, packages: usize) -> Result<()> {
    let mut child = build.stderr(Stdio::piped()).spawn().context("starting go")?;
    let said = BufReader::new(child.stderr.take().context("go's messages are ours")?);
    let mut last = vec![];
    for (count, line) in (1..).zip(said.lines()) {
        last.push(line?);
        if count % TELL_EVERY == 0 {
            eprintln!("  {count} of at most {packages} packages");
            last.clear();
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("go build: {status}\n{}", last.join("\n"));
    }
    Ok(())
}

/// Writes the images that are not there.
fn images(parts: &Parts) -> Result<()> {
    let built = parts.kubernetes.parent().context("a program is in a directory")?;
    let [pause, tools] = &parts.images[..] else { bail!("there are two images") };
    if !pause.exists() {
        Image::new(PAUSE_IMAGE, &["/pause"])
            .file("pause", 0o755, fs::read(built.join("pause"))?)
            .write(pause)?;
    }
    if !tools.exists() {
        busybox(&parts.tool("bin/busybox"))?.write(tools)?;
    }
    Ok(())
}

/// busybox under all its names.
fn busybox(program: &Path) -> Result<Image> {
    let mut image = Image::new(TOOLS_IMAGE, &["/bin/sh"])
        .file("bin/busybox", 0o755, fs::read(program)?)
        .directory("tmp", 0o1777);
    image = image.file("etc/passwd", 0o644, NAMES.as_bytes().to_vec());
    for name in read(clean(program).arg("--list"))?.lines().filter(|name| *name != "busybox") {
        image = image.link(&format!("bin/{name}"), "busybox");
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_of_go_has_two_numbers() {
        assert_eq!(go_version("go1.26.8\n"), Some((1, 26)));
        assert_eq!(go_version("go1.25rc1"), Some((1, 25)));
        assert_eq!(go_version("go1.24-custom"), Some((1, 24)));
        assert_eq!(go_version("devel"), None);
    }

    #[test]
    fn the_version_of_kubernetes_is_that_of_its_module() {
        let version = version().expect("a version");
        assert!(version.starts_with("v1."), "{version}");
    }
}
