//! Debian's packages, fetched by apt into a directory below `target` and unpacked there: nothing is installed.
//!
//! apt works on a directory of its own with the sources that it is given; it checks signatures and checksums. The
//! machine's own sources, lists and packages stay as they are, so it works the same on any distribution that has apt.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    run::{clean, read, succeed},
    setup,
};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Some of Debian's archive.
#[derive(Debug)]
pub(crate) struct Archive {
    /// Where apt keeps its lists and packages arrive.
    pub(crate) home: PathBuf,
    /// `URI SUITE COMPONENT`, a line each.
    pub(crate) sources: &'static [&'static str],
}

impl Archive {
    /// Fetches packages and unpacks them into `directory`, unless that exists. A directory that exists is whole.
    pub(crate) fn unpacked(&self, packages: &[&str], directory: &Path) -> Result<()> {
        if directory.is_dir() {
            return Ok(());
        }
        let fetched = self.fetch(packages)?;
        let unfinished = self.home.join("unfinished");
        let _ = fs::remove_dir_all(&unfinished);
        for package in &fetched {
            succeed(clean("dpkg-deb").arg("--extract").arg(package).arg(&unfinished))?;
        }
        fs::rename(&unfinished, directory)?;
        for package in &fetched {
            fs::remove_file(package)?;
        }
        Ok(())
    }

    /// The packages whose names match, for a person.
    pub(crate) fn search(&self, pattern: &str) -> String {
        read(self.command("apt-cache").args(["search", "--names-only", pattern])).unwrap_or_default()
    }

    fn fetch(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        setup::programs(&[("apt-get", "apt"), ("dpkg-deb", "dpkg")])?;
        ensure!(Path::new(KEYRING).is_file(), "{KEYRING} is missing: install debian-archive-keyring");
        eprintln!("  fetching {}", packages.join(" "));
        for part in ["apt/state/lists/partial", "apt/cache/archives/partial"] {
            fs::create_dir_all(self.home.join(part))?;
        }
        let lines =
            self.sources.iter().map(|source| format!("deb [arch=amd64 signed-by={KEYRING}] {source}\n"));
        fs::write(self.sources_list(), lines.collect::<String>())?;
        fs::write(self.home.join("apt/status"), "")?;
        succeed(self.command("apt-get").arg("update"))?;
        succeed(self.command("apt-get").arg("download").args(packages))?;
        packages.iter().map(|package| self.arrived(package)).collect()
    }

    /// The file of a package that has been fetched.
    fn arrived(&self, package: &str) -> Result<PathBuf> {
        let prefix = format!("{package}_");
        for entry in fs::read_dir(&self.home).with_context(|| format!("reading {}", self.home.display()))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                return Ok(entry.path());
            }
        }
        bail!("apt-get download left no {prefix}*.deb")
    }

    fn sources_list(&self) -> PathBuf {
        self.home.join("apt/sources.list")
    }

    fn command(&self, program: &str) -> Command {
        let apt = self.home.join("apt");
        let mut command = clean(program);
        command.current_dir(&self.home).arg("-q");
        for (option, value) in [
            ("Dir::Etc::SourceList", self.sources_list().as_path()),
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
    }
}
