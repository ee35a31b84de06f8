//! Programs as files: what they load, and what of them is only for debuggers.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::run::{clean, read, succeed};

/// The shared libraries of a program, with the loader, by the paths under which it looks for them.
pub(crate) fn needed(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = read(clean("ldd").arg(program))?;
    ensure!(!listed.contains("not found"), "libraries of {} are missing:\n{listed}", program.display());
    let paths = listed.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(|word| PathBuf::from(word.trim_end_matches(':'))).collect())
}

/// A program without symbols and debug information.
pub(crate) fn stripped(program: &Path) -> Result<Vec<u8>> {
    let scratch = tempfile::NamedTempFile::new()?;
    succeed(clean("strip").arg("-o").arg(scratch.path()).arg(program))?;
    fs::read(scratch.path()).with_context(|| format!("reading {} without symbols", program.display()))
}
