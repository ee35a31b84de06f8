//! Files that must be whole or absent: written beside their place, synced, renamed over it, readable by us alone.
//!
//! Stands apart because keys, tokens and reports all need the same care, and a crash at any instruction may leave
//! either the old file or the new one, never a part.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A file or directory of the state could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {error}{}", cure(.error))]
pub struct StoreError {
    /// What was tried.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// What the system said.
    pub error: io::Error,
}

/// What to do about an error of the file system.
fn cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room there",
        io::ErrorKind::ReadOnlyFilesystem => "; mount it writable",
        io::ErrorKind::PermissionDenied => {
            "; it has to belong to the controller's user, with mode 0700 (files: 0600)"
        }
        _ => "",
    }
}

/// A part of the state, as metrics name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The certificate authority.
    Authority,
    /// The count of starts.
    Generation,
    /// The keys of issuers that were fetched.
    Keys,
    /// The last good versions of refused documents.
    Kept,
    /// What agents said of their workloads.
    Reports,
    /// The roots that are published.
    Roots,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Authority, Self::Generation, Self::Keys, Self::Kept, Self::Reports, Self::Roots];

    /// The metric's label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Authority => "authority",
            Self::Generation => "generation",
            Self::Keys => "keys",
            Self::Kept => "kept",
            Self::Reports => "reports",
            Self::Roots => "roots",
        }
    }

    fn says(self) -> &'static str {
        match self {
            Self::Authority => "the certificate authority",
            Self::Generation => "the count of starts",
            Self::Keys => "the keys of issuers that were fetched",
            Self::Kept => "the last good versions of refused documents",
            Self::Reports => "what agents said of their workloads",
            Self::Roots => "the ConfigMap of the roots",
        }
    }
}

/// What of the state is in force and not on disk. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Unsaved {
    errors: Arc<Mutex<BTreeMap<Part, String>>>,
}

impl Unsaved {
    /// A part was written, or was not. Returns whether that is news.
    pub fn tried<E: std::fmt::Display>(&self, part: Part, result: &Result<(), E>) -> bool {
        match result {
            Ok(()) => self.errors().remove(&part).is_some(),
            Err(error) => {
                let error = error.to_string();
                self.errors().insert(part, error.clone()).is_none_or(|before| before != error)
            }
        }
    }

    /// Whether a part is to be written again.
    pub fn has(&self, part: Part) -> bool {
        self.errors().contains_key(&part)
    }

    /// Each as a line with its cure.
    pub fn problems(&self) -> Vec<String> {
        let line = |(part, error): (&Part, &String)| {
            format!("{}: not saved or not usable, what was in force stays: {error}", part.says())
        };
        self.errors().iter().map(line).collect()
    }

    fn errors(&self) -> MutexGuard<'_, BTreeMap<Part, String>> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StoreError {
    fn new(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self { action, path, error }
    }
}

/// Makes a directory that only we can read, with its parents.
pub fn private_dir(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(StoreError::new("create", path))
}

/// The file's bytes, or `None` when there is no such file.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::new("read", path)(error)),
    }
}

/// Puts a file (mode 0600) in place in one step, durable when this returns.
///
/// The file beside it is named after the process and a random number, so that two writers do not mix their bytes.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = parent.join(format!(".{name}.{:016x}", rand::random::<u64>()));
    let written = write_new(&beside, bytes)
        .and_then(|()| fs::rename(&beside, path).map_err(StoreError::new("replace", path)));
    if written.is_err() {
        // The error that matters is the first one; a file left behind is hidden and harmless.
        let _ = fs::remove_file(&beside);
    }
    written?;
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(StoreError::new("sync", parent))
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(StoreError::new("create", path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(StoreError::new("write", path))
}

/// Removes a file; `true` for exactly one caller when several try at once.
pub fn take(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::new("remove", path)(error)),
    }
}

/// Waits for, and holds, a lock between processes; released when the file is dropped.
pub fn lock(path: &Path) -> Result<File, StoreError> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(StoreError::new("open", path))?;
    file.lock().map_err(StoreError::new("lock", path))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_replaced_file_is_ours_alone_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_one_taker_gets_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        replace(&path, b"").unwrap();
        let takers = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| take(&path).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).filter(|taken| *taken).count()
        });
        assert_eq!(takers, 1);
    }
}
