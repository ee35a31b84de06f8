//! Other kernels: Debian's packages, fetched by apt into `target/kernels` and unpacked there; nothing is installed.
//!
//! apt works on a directory of its own with one source, Debian's security archive, which has both kernels and is small;
//! it checks signatures and checksums. The machine's own sources, lists and packages stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    run::{clean, read, succeed, target},
    setup,
};

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

const SOURCE: &str = "http://deb.debian.org/debian-security bookworm-security main";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

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
    let home = target().join("kernels");
    let directory = home.join(kernel.package);
    if !directory.is_dir() {
        fs::create_dir_all(&home)?;
        let package = fetch(kernel, &home)?;
        // Unpacked beside, then renamed: a directory with the package's name is whole.
        let unfinished = home.join("unfinished");
        let _ = fs::remove_dir_all(&unfinished);
        succeed(clean("dpkg-deb").arg("--extract").arg(&package).arg(&unfinished))?;
        fs::rename(&unfinished, &directory)?;
        fs::remove_file(&package)?;
    }
    let release = kernel.package.trim_start_matches("linux-image-");
    let root = if directory.join("lib/modules").is_dir() { "lib" } else { "usr/lib" };
    Ok(Unpacked {
        image: directory.join(format!("boot/vmlinuz-{release}")),
        modules: directory.join(format!("{root}/modules/{release}/kernel")),
    })
}

fn fetch(kernel: &Kernel, home: &Path) -> Result<PathBuf> {
    setup::programs(&[("apt-get", "apt"), ("dpkg-deb", "dpkg")])?;
    ensure!(Path::new(KEYRING).is_file(), "{KEYRING} is missing: install debian-archive-keyring");
    eprintln!("  fetching {}", kernel.package);
    let apt = home.join("apt");
    for part in ["state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(apt.join(part))?;
    }
    let sources = apt.join("sources.list");
    fs::write(&sources, format!("deb [arch=amd64 signed-by={KEYRING}] {SOURCE}\n"))?;
    fs::write(apt.join("status"), "")?;
    let command = |program: &str| {
        let mut command = clean(program);
        command.current_dir(home).arg("-q");
        for (option, value) in [
            ("Dir::Etc::SourceList", sources.as_path()),
            ("Dir::Etc::SourceParts", Path::new("/dev/null")),
            ("Dir::State", &apt.join("state")),
            ("Dir::State::Status", &apt.join("status")),
            ("Dir::Cache", &apt.join("cache")),
            ("APT::Architecture", Path::new("amd64")),
            // Root may read below target/ where apt's own user may not.
            ("APT::Sandbox::User", Path::new("root")),
        ] {
            command.arg("-o").arg(format!("{option}={}", value.display()));
        }
        command
    };
    succeed(command("apt-get").arg("update"))?;
    if let Err(error) = succeed(command("apt-get").args(["download", kernel.package])) {
        let line = format!("^linux-image-{}\\..*-cloud-amd64$", kernel.version.replace('.', "\\."));
        let there = read(command("apt-cache").args(["search", "--names-only", &line])).unwrap_or_default();
        bail!("{error:#}; if it left the archive, put one of these into {}:\n{there}", file!());
    }
    let prefix = format!("{}_", kernel.package);
    fs::read_dir(home)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
        .with_context(|| format!("apt-get download left no {prefix}*.deb"))
}
