//! `image`: OCI images of agent and controller, made here without Docker.
//!
//! They hold the very programs that are tested, linked with glibc, and the few libraries that these load, loader
//! included; see docs/adr/0012-cluster-for-tests.md for why not musl.

pub(crate) mod oci;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    check, ebpf, elf,
    run::{clean, read, step, target},
    setup,
};
use oci::{Image, NAMES, NOBODY};

/// What an image may be large, compressed as a registry carries it.
const LIMIT_MB: u64 = 40;
/// Nothing answers under this name, so that an image which is not there is not fetched from a stranger.
const REGISTRY: &str = "nodemesh.local";

/// One image.
struct Content {
    name: &'static str,
    description: &'static str,
    /// The first one is what the image runs.
    programs: &'static [&'static str],
    user: u32,
}

const IMAGES: [Content; 2] = [
    Content {
        name: "agent",
        description: "Nodemesh's agent, one per node: captures, decides, carries, records",
        programs: &["mesh-agent"],
        // Loads kernel programs and enters network namespaces: with capabilities of root only.
        user: 0,
    },
    Content {
        name: "controller",
        description: "Nodemesh's controller: tells every node what it must know, signs certificates; and meshctl",
        programs: &["mesh-controller", "meshctl"],
        user: NOBODY,
    },
];

/// Makes the images: from programs that are built, or from a release build.
pub(crate) fn make(from: Option<PathBuf>, to: Option<PathBuf>) -> Result<()> {
    setup::programs(&[("strip", "binutils")])?;
    let binaries = match from {
        Some(directory) => directory,
        None => {
            setup::kernel_toolchain()?;
            ebpf::build()?;
            check::build_release()?
        }
    };
    let to = to.unwrap_or_else(directory);
    step("Make the images of agent and controller", || {
        fs::create_dir_all(&to)?;
        for content in &IMAGES {
            let path = to.join(format!("{}.tar", content.name));
            image(content, &binaries)?.write(&path)?;
            let size = fs::metadata(&path)?.len();
            eprintln!("  {} {:.1} MB: {}", name(content), size as f64 / 1e6, path.display());
            ensure!(size <= LIMIT_MB * 1_000_000, "{} is larger than {LIMIT_MB} MB", path.display());
        }
        Ok(())
    })
}

/// Makes an image of one program, `NAME.tar`.
pub(crate) fn of_program(program: &Path, to: Option<PathBuf>) -> Result<()> {
    setup::programs(&[("strip", "binutils")])?;
    let name = program.file_name().context("a program has a name")?.to_string_lossy();
    let image = Image::new(&format!("{REGISTRY}/{name}:test"), &[&format!("/usr/bin/{name}")]).user(NOBODY);
    let to = to.unwrap_or_else(directory);
    fs::create_dir_all(&to)?;
    let image = image.file("etc/passwd", 0o644, NAMES.as_bytes().to_vec());
    with_programs(image, [program.to_owned()])?.write(&to.join(format!("{name}.tar")))
}

/// The archives that are there.
pub(crate) fn made() -> Result<Vec<PathBuf>> {
    let paths = IMAGES.iter().map(|content| directory().join(format!("{}.tar", content.name)));
    Ok(paths.filter(|path| path.is_file()).collect())
}

fn directory() -> PathBuf {
    target().join("images")
}

/// `REGISTRY/agent:0.1.0`.
fn name(content: &Content) -> String {
    format!("{REGISTRY}/{}:{}", content.name, env!("CARGO_PKG_VERSION"))
}

fn image(content: &Content, binaries: &Path) -> Result<Image> {
    let first = content.programs.first().context("an image has a program")?;
    let image = Image::new(&name(content), &[&format!("/usr/bin/{first}")])
        .user(content.user)
        .label("title", &format!("nodemesh {}", content.name))
        .label("description", content.description)
        .label("version", env!("CARGO_PKG_VERSION"))
        .label("licenses", env!("CARGO_PKG_LICENSE"))
        .label("revision", &revision())
        .file("etc/passwd", 0o644, NAMES.as_bytes().to_vec())
        .directory("tmp", 0o1777);
    with_programs(image, content.programs.iter().map(|program| binaries.join(program)))
}

/// Puts programs into an image, and what they load.
fn with_programs(mut image: Image, programs: impl IntoIterator<Item = PathBuf>) -> Result<Image> {
    let mut libraries = BTreeSet::new();
    for path in programs {
        let name = path.file_name().context("a program has a name")?.to_string_lossy();
        image = image.file(&format!("usr/bin/{name}"), 0o755, elf::stripped(&path)?);
        libraries.extend(elf::needed(&path)?);
    }
    for library in libraries {
        let content = fs::read(&library).with_context(|| format!("reading {}", library.display()))?;
        image = image.file(&library.to_string_lossy(), 0o755, content);
    }
    Ok(image)
}

/// The commit, with a mark when files differ from it; nothing outside of a repository.
fn revision() -> String {
    let said = read(clean("git").args(["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]));
    said.unwrap_or_default().trim().to_owned()
}
