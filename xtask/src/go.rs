//! Go modules of this repository: programs that tests run, built from source.
//!
//! What a module builds is kept by the content of its files: it is built once, and anew when they change.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::run::{clean, find, read, root, succeed};

/// Packages between two lines that tell how far a build is.
const TELL_EVERY: usize = 200;

/// A directory of the repository with a go.mod.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Module(pub(crate) &'static str);

impl Module {
    /// Tells builds apart: the version of what it is about, as go.mod has it, and what its files contain.
    pub(crate) fn build_name(self, about: &str) -> Result<String> {
        let mut hash = Sha256::new();
        for path in files(&self.directory())? {
            hash.update(fs::read(&path).with_context(|| format!("reading {}", path.display()))?);
        }
        let hash: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("{}-{hash}", self.version(about)?))
    }

    /// The version of a module that go.mod requires, or of `go` itself.
    pub(crate) fn version(self, of: &str) -> Result<String> {
        let path = self.directory().join("go.mod");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let version = text.lines().find_map(|line| {
            let mut words = line.split_whitespace().skip_while(|word| *word == "require");
            (words.next() == Some(of)).then(|| words.next()).flatten()
        });
        version.map(str::to_owned).with_context(|| format!("{} names no version of {of}", path.display()))
    }

    /// Fails unless there is a Go that can build it; fetches the sources that it needs.
    pub(crate) fn fetch(self) -> Result<()> {
        let oldest = self.version("go")?;
        let wanted = format!("{} is built from source by Go {oldest} or newer (https://go.dev/dl)", self.0);
        ensure!(find("go").is_some(), "{wanted}; there is no go in PATH");
        let said = read(clean("go").args(["env", "GOVERSION"]))?;
        ensure!(numbers(&said) >= numbers(&oldest), "{wanted}; this is {}", said.trim());
        succeed(self.go().args(["mod", "download"]))
    }

    /// Where the sources are of a module that it requires.
    pub(crate) fn sources(self, of: &str) -> Result<PathBuf> {
        let said = read(self.go().args(["list", "-m", "-f", "{{.Dir}}", of]))?;
        Ok(PathBuf::from(said.trim()))
    }

    /// Builds a static program of it. Tells now and then how far it is. A program that is there is whole.
    pub(crate) fn build(self, package: &str, linker: &str, program: &Path) -> Result<()> {
        let packages = read(self.go().args(["list", "-deps", package]))?.lines().count();
        let mut build = self.go();
        build.args(["build", "-v"]);
        finished(program, |unfinished| {
            followed(options(&mut build, linker, unfinished).arg(package), packages)
        })
    }

    /// Builds the program that its tests are.
    pub(crate) fn build_tests(self, package: &str, program: &Path) -> Result<()> {
        let mut build = self.go();
        build.args(["test", "-c"]);
        finished(program, |unfinished| succeed(options(&mut build, "", unfinished).arg(package)))
    }

    /// Runs its tests.
    pub(crate) fn test(self, package: &str) -> Result<()> {
        succeed(self.go().args(["test", "-trimpath", "-buildvcs=false", package]))
    }

    fn directory(self) -> PathBuf {
        root().join(self.0)
    }

    fn go(self) -> Command {
        let mut go = clean("go");
        go.current_dir(self.directory()).env("CGO_ENABLED", "0").env("GOWORK", "off");
        go
    }
}

/// What every program is built with.
fn options<'a>(build: &'a mut Command, linker: &str, to: &Path) -> &'a mut Command {
    build.args(["-trimpath", "-buildvcs=false", "-ldflags", &format!("-s -w {linker}"), "-o"]).arg(to)
}

/// Gives a program its name once it is whole.
fn finished(program: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let unfinished = program.with_extension("unfinished");
    make(&unfinished)?;
    fs::rename(&unfinished, program).with_context(|| format!("making {}", program.display()))
}

/// All files below a directory, in order of their paths.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        if path.is_dir() { found.extend(files(&path)?) } else { found.push(path) }
    }
    found.sort();
    Ok(found)
}

/// `go1.26.8` or `1.26.0` → (1, 26).
fn numbers(version: &str) -> Option<(u32, u32)> {
    let version = version.trim();
    let mut numbers =
        version.strip_prefix("go").unwrap_or(version).split(['.', '-', 'r', 'b', ' ']).map(str::parse);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_of_go_has_two_numbers() {
        assert_eq!(numbers("go1.26.8\n"), Some((1, 26)));
        assert_eq!(numbers("go1.25rc1"), Some((1, 25)));
        assert_eq!(numbers("go1.24-custom"), Some((1, 24)));
        assert_eq!(numbers("1.24.0"), Some((1, 24)));
        assert_eq!(numbers("devel"), None);
    }

    #[test]
    fn versions_are_those_of_go_mod() {
        let module = Module("xtask/kubernetes");
        let version = module.version("k8s.io/kubernetes").expect("a version");
        assert!(version.starts_with("v1."), "{version}");
        assert!(module.version("go").expect("a version").starts_with("1."));
        assert!(module.version("k8s.io/nothing").is_err());
        assert!(module.build_name("k8s.io/kubernetes").expect("a name").starts_with(&version));
    }
}
