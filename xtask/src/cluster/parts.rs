//! What a cluster is made of: Kubernetes, built from source once; containerd, runc and CNI plugins of Debian, unpacked;
//! images that its pods need. All of it below `target/kubernetes`, by version.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;

use super::capabilities;
use crate::{
    debian::Archive,
    go::Module,
    image::oci::{Image, NAMES},
    run::{clean, read, step, target},
    setup,
};

/// Links Kubernetes' programs into one.
const MODULE: Module = Module("xtask/kubernetes");
/// What it is about.
const KUBERNETES: &str = "k8s.io/kubernetes";

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

/// Where all of it is.
pub(super) fn home() -> PathBuf {
    target().join("kubernetes")
}

fn places() -> Result<Parts> {
    let built = home().join(MODULE.build_name(KUBERNETES)?);
    Ok(Parts {
        kubernetes: built.join("kubernetes"),
        packages: home().join(RELEASE),
        images: ["pause.tar", "busybox.tar"].map(|name| built.join(name)).into(),
    })
}

fn build(parts: &Parts) -> Result<()> {
    let directory = parts.kubernetes.parent().context("a program is in a directory")?;
    let pause = directory.join("pause");
    if parts.kubernetes.exists() && pause.exists() {
        return Ok(());
    }
    let version = MODULE.version(KUBERNETES)?;
    eprintln!(
        "  building Kubernetes {version} and etcd, once: five to ten minutes on two cores, 3 GB of Go's cache"
    );
    MODULE.fetch()?;
    fs::create_dir_all(directory)?;
    let minor = version.split('.').nth(1).context("a version has a minor number")?;
    let says = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"].map(|package| {
        format!("-X {package}.gitVersion={version} -X {package}.gitMajor=1 -X {package}.gitMinor={minor}")
    });
    MODULE.build("./pause", "", &pause)?;
    MODULE.build(".", &says.join(" "), &parts.kubernetes)
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
