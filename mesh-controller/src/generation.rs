//! How many times this state has seen a controller start, so that one that was restored from an older state is told
//! from one that was merely restarted.
//!
//! Every version of a view names the generation that counted it. When an agent comes with a version of a generation
//! that is still to come, this state is a backup: what happened since is unknown here, and join tokens in it may have
//! been used. A version is believed only with the seal of this state in its epoch, so that no agent can make one up.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use mesh_core::version::Version;
use serde::{Deserialize, Serialize};

use crate::{
    digest::{digest, hex, unhex},
    store::{self, StoreError},
};

/// Bytes of what is drawn at a start, and of the seal's digest beside it in the epoch: not to be guessed online.
const DRAWN: usize = 6;
const SEALED: usize = 8;

/// A count that could not be kept; the controller runs all the same.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The state cannot be written.
    #[error("{0}; the next start cannot be told from this one")]
    Store(#[from] StoreError),
    /// The file is damaged.
    #[error(
        "{path} is damaged: {reason}; it is counted from 1 again, and a restored state is not noticed until then"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    generation: u64,
    /// Makes epochs that only this state can have made; 32 bytes, hex.
    seal: String,
}

/// One start of the controller.
#[derive(Debug)]
pub struct Generation {
    /// Where it is counted; nowhere by a replica.
    path: Option<PathBuf>,
    number: u64,
    seal: [u8; 32],
    epoch: String,
    /// The highest generation that was heard of.
    heard: AtomicU64,
}

impl Generation {
    /// Counts a start of the state in this directory. What keeps it from being counted is returned beside it.
    pub fn begin(state_dir: &Path) -> (Self, Option<GenerationError>) {
        let path = state_dir.join("generation.json");
        let (before, trouble) = match load(&path) {
            Ok(before) => (before, None),
            Err(error) => (None, Some(error)),
        };
        let (last, seal) = before.unwrap_or_else(|| (0, rand::random()));
        let number = last.saturating_add(1);
        let drawn: [u8; DRAWN] = rand::random();
        let epoch = epoch(&seal, number, &drawn);
        let begun = Self { path: Some(path), number, seal, epoch, heard: AtomicU64::new(number) };
        let kept = begun.keep(number).err().map(GenerationError::from);
        (begun, trouble.or(kept))
    }

    /// One start of several controllers that share their state: none of them can count the others', and each has versions
    /// of its own, so that an agent that goes from one to another is told everything and takes neither for a restored one.
    pub fn of_replica() -> Self {
        let (seal, drawn): ([u8; 32], [u8; DRAWN]) = (rand::random(), rand::random());
        let epoch = epoch(&seal, 1, &drawn);
        Self { path: None, number: 1, seal, epoch, heard: AtomicU64::new(1) }
    }

    /// Which start this is, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// What tells this start from all others in a version.
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Hears the version that an agent has. The generation in it, if it is later than any heard of, and this state
    /// made it: then this state is an older one, restored.
    pub fn hear(&self, version: &str) -> Option<u64> {
        let version: Version = version.parse().ok()?;
        let later = version.generation > self.heard.load(Ordering::Relaxed) && self.made(&version);
        (later && self.heard.fetch_max(version.generation, Ordering::Relaxed) < version.generation)
            .then_some(version.generation)
    }

    /// The next start counts on from here.
    pub fn keep(&self, number: u64) -> Result<(), StoreError> {
        let Some(path) = &self.path else { return Ok(()) };
        let stored = Stored { generation: number, seal: hex(&self.seal) };
        let bytes = serde_json::to_vec(&stored).expect("a number and a text are always JSON");
        store::replace(path, &bytes)
    }

    fn made(&self, version: &Version) -> bool {
        let drawn = version.epoch.get(..2 * DRAWN);
        drawn.is_some_and(|drawn| sealed(&self.seal, version.generation, drawn) == version.epoch)
    }
}

fn epoch(seal: &[u8; 32], generation: u64, drawn: &[u8; DRAWN]) -> String {
    sealed(seal, generation, &hex(drawn))
}

/// The drawn part, and a part of the digest that only the seal's holder can make. Cut short, the digest cannot be
/// continued by whoever does not have the seal.
fn sealed(seal: &[u8; 32], generation: u64, drawn: &str) -> String {
    let bytes = [seal.as_slice(), &generation.to_be_bytes(), drawn.as_bytes()].concat();
    format!("{drawn}{}", hex(&digest(&bytes)[..SEALED]))
}

fn load(path: &Path) -> Result<Option<(u64, [u8; 32])>, GenerationError> {
    let Some(bytes) = store::read(path)? else { return Ok(None) };
    let damaged = |reason: String| GenerationError::Damaged { path: path.to_owned(), reason };
    let stored: Stored = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    let seal = unhex(&stored.seal).ok_or_else(|| damaged("seal: not 32 bytes in hex".to_owned()))?;
    Ok(Some((stored.generation, seal)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(dir: &Path) -> Generation {
        let (generation, trouble) = Generation::begin(dir);
        assert!(trouble.is_none(), "{trouble:?}");
        generation
    }

    fn version(of: &Generation) -> String {
        format!("{}.{}-3", of.number(), of.epoch())
    }

    #[test]
    fn starts_are_counted_and_a_version_of_a_later_one_tells_of_a_restored_state() {
        let dir = tempfile::tempdir().unwrap();
        let first = begin(dir.path());
        let backup = std::fs::read(dir.path().join("generation.json")).unwrap();
        let (second, third) = (begin(dir.path()), begin(dir.path()));
        assert_eq!([first.number(), second.number(), third.number()], [1, 2, 3]);
        assert_ne!(first.epoch(), second.epoch());
        assert_eq!(third.hear(&version(&second)), None, "an earlier start of the same state");

        std::fs::write(dir.path().join("generation.json"), backup).unwrap();
        let restored = begin(dir.path());
        assert_eq!(restored.number(), 2);
        assert_eq!(restored.hear(&version(&third)), Some(3));
        assert_eq!(restored.hear(&version(&third)), None, "said once");
        restored.keep(3).unwrap();
        assert_eq!(begin(dir.path()).number(), 4);
    }

    #[test]
    fn a_replica_takes_no_other_for_a_restored_state_and_no_agent_does() {
        let (one, other) = (Generation::of_replica(), Generation::of_replica());
        assert_ne!(one.epoch(), other.epoch());
        assert_eq!(other.hear(&version(&one)), None);
        let [held, next] = [&one, &other].map(|of| version(of).parse::<Version>().unwrap());
        assert_eq!(next.after(&held), mesh_core::version::Succession::Onward);
        assert_eq!(held.after(&next), mesh_core::version::Succession::Onward);
    }

    #[test]
    fn a_version_that_this_state_did_not_make_tells_nothing() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let generation = begin(dir.path());
        let forged = [
            format!("99.{}-1", generation.epoch()),
            version(&begin(other.path())).replacen("1.", "99.", 1),
            format!("99.{}-1", "a".repeat(64)),
            "99.a-1".to_owned(),
            String::new(),
        ];
        for version in forged {
            assert_eq!(generation.hear(&version), None, "{version}");
        }
    }

    #[test]
    fn a_count_that_is_damaged_or_cannot_be_kept_is_told_and_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation.json"), "{").unwrap();
        let (generation, trouble) = Generation::begin(dir.path());
        assert_eq!(generation.number(), 1);
        assert!(trouble.unwrap().to_string().contains("generation.json is damaged"));
        let (generation, trouble) = Generation::begin(&dir.path().join("none"));
        assert_eq!(generation.number(), 1);
        assert!(trouble.unwrap().to_string().contains("cannot be told"));
    }
}
