//! `profile`: how often which of the agent's code runs under load, counted once and kept beside that code. Release builds lay it out
//! by that (profile-guided optimisation, `-Cprofile-use` of rustc).
//!
//! Code that has changed since it was counted is compiled as without, so a profile that is old costs speed and nothing else. That is
//! also so on other architectures than the one where it was counted.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use flate2::{Compression, GzBuilder, read::GzDecoder};

use crate::{
    bench, check, ebpf,
    run::{clean, root, step, succeed, target},
    setup,
};

/// What was counted, in LLVM's indexed form, packed.
const PACKED: &str = "mesh-agent/agent.profdata.gz";
/// With what such a form begins.
const MAGIC: &[u8] = b"\xfflprofi\x81";
/// Bytes at a gzip's end that tell its content: checksum and length (RFC 1952, section 2.3.1).
const TRAILER: usize = 8;

/// What rustc is told for a release build.
pub(crate) fn flags() -> Result<Vec<String>> {
    let packed = fs::read(root().join(PACKED)).with_context(|| format!("reading {PACKED}"))?;
    let trailer = packed.last_chunk::<TRAILER>().with_context(|| format!("{PACKED} is cut short"))?;
    // Its content is in its name, as cargo compares what rustc is told.
    let path = directory().join(format!("{:016x}.profdata", u64::from_le_bytes(*trailer)));
    if !path.is_file() {
        fs::create_dir_all(directory())?;
        let partial = path.with_extension("partial");
        fs::write(&partial, unpacked(&packed)?)?;
        fs::rename(&partial, &path)?;
    }
    Ok(vec![format!("-Cprofile-use={}", path.display()), "-Cllvm-args=-no-pgo-warn-mismatch".into()])
}

/// Counts anew, under the loads that `bench` measures.
pub(crate) fn record() -> Result<()> {
    setup::everything()?;
    ebpf::build()?;
    let profdata = setup::profdata()?;
    let counts = directory().join("counts");
    if counts.is_dir() {
        fs::remove_dir_all(&counts)?;
    }
    fs::create_dir_all(&counts)?;
    let programs = check::build_with(&["-Cprofile-generate".to_owned()], "counting")?;
    // SAFETY: no other thread runs that could read the environment.
    unsafe { std::env::set_var("LLVM_PROFILE_FILE", counts.join("%p.profraw")) };
    bench::exercise(&programs)?;
    step("Keep what was counted", || {
        let merged = directory().join("counted");
        let mut merge = clean(profdata);
        succeed(merge.args(["merge", "--sparse", "--output"]).arg(&merged).args(raw(&counts)?))?;
        let mut packed = GzBuilder::new().write(vec![], Compression::best());
        packed.write_all(&fs::read(&merged)?)?;
        let packed = packed.finish()?;
        eprintln!("  {PACKED}: {} KB", packed.len() / 1000);
        Ok(fs::write(root().join(PACKED), packed)?)
    })
}

fn directory() -> PathBuf {
    target().join("profile")
}

fn unpacked(packed: &[u8]) -> Result<Vec<u8>> {
    let mut profile = vec![];
    GzDecoder::new(packed).read_to_end(&mut profile).with_context(|| format!("unpacking {PACKED}"))?;
    ensure!(profile.starts_with(MAGIC), "{PACKED} has no profile: cargo xtask profile makes one");
    Ok(profile)
}

/// What each process has counted.
fn raw(counts: &Path) -> Result<Vec<PathBuf>> {
    let files: Vec<_> = fs::read_dir(counts)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    ensure!(!files.is_empty(), "no program has counted anything");
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_that_is_kept_is_one() {
        let packed = fs::read(root().join(PACKED)).unwrap();
        assert!(unpacked(&packed).unwrap().len() > 1_000_000);
        assert!(unpacked(&packed[..packed.len() / 2]).is_err());
    }
}
