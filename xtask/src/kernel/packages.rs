//! Other kernels: Debian's packages, fetched and unpacked into `target/kernels` from its security archive, which has all
//! of them and is small.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};

use crate::{debian::Archive, run::target};

/// A kernel to test on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    /// What `--kernel` calls it.
    pub(super) version: &'static str,
    /// Debian's package.
    package: &'static str,
}

/// The kernels. Debian takes superseded packages out of the archive after some months: then the newest of the line,
/// which `apt-cache search linux-image` tells, goes here.
const KERNELS: [Kernel; 2] = [
    Kernel { version: OLDEST, package: "linux-image-6.1.0-56-cloud-amd64" },
    Kernel { version: "6.12", package: "linux-image-6.12.117+deb12-cloud-amd64" },
];
/// The oldest: the one with the fewest features.
pub(super) const OLDEST: &str = "6.1";

const SOURCES: [&str; 1] = ["http://deb.debian.org/debian-security bookworm-security main"];

/// A kernel, unpacked.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// What an emulator boots.
    pub(super) image: PathBuf,
    /// `lib/modules/RELEASE/kernel`.
    pub(super) modules: PathBuf,
}

/// One kernel, or `all`.
pub(super) fn chosen(version: &str) -> Result<Vec<&'static Kernel>> {
    let kernels: Vec<_> = KERNELS.iter().filter(|k| version == "all" || k.version == version).collect();
    let known = KERNELS.map(|kernel| kernel.version).join(", ");
    ensure!(!kernels.is_empty(), "no kernel {version}; there are {known} and all");
    Ok(kernels)
}

/// Fetches and unpacks a kernel, unless it is there.
pub(super) fn unpacked(kernel: &Kernel) -> Result<Unpacked> {
    let archive = Archive { home: target().join("kernels"), sources: &SOURCES };
    let directory = archive.home.join(kernel.package);
    if let Err(error) = archive.unpacked(&[kernel.package], &directory) {
        let line = format!("^linux-image-{}\\..*-cloud-amd64$", kernel.version.replace('.', "\\."));
        let there = archive.search(&line);
        bail!("{error:#}; if it left the archive, put one of these into {}:\n{there}", file!());
    }
    let release = kernel.package.trim_start_matches("linux-image-");
    let root = if directory.join("lib/modules").is_dir() { "lib" } else { "usr/lib" };
    Ok(Unpacked {
        image: directory.join(format!("boot/vmlinuz-{release}")),
        modules: directory.join(format!("{root}/modules/{release}/kernel")),
    })
}
