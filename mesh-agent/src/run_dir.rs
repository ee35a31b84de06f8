//! The agent's run directory: what must survive a restart of the agent and must not survive the machine.
//!
//! Keys are in it, and keys never go to a disk in clear: it has to be on a tmpfs, and opening it anywhere else is
//! refused. Files are 0600 and replaced atomically, so a crash leaves the old one or the new one.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

/// The largest file that is read back: a view of a large mesh. More is not ours.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Why the run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Keys would reach a disk.
    #[error(
        "{0} is not on a tmpfs, and keys must not reach a disk: choose a --run-dir under /run or mount a tmpfs there"
    )]
    NotTmpfs(PathBuf),
    /// The file system said no.
    #[error("cannot {what} {path}: {source}{}", cure(.source))]
    Io {
        /// What was being done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

/// A directory on a tmpfs that only its owner can enter.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Opens the directory, and makes it when it does not exist.
    pub fn open(path: &Path) -> Result<Self, RunDirError> {
        let dir = Self { path: path.to_owned() };
        dir.make(path)?;
        let file_system = statfs(path).map_err(|error| failed("examine", path)(error.into()))?;
        if file_system.filesystem_type() != TMPFS_MAGIC {
            return Err(RunDirError::NotTmpfs(path.to_owned()));
        }
        Ok(dir)
    }

    /// Where a file of this name is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// When a file was last replaced; `None` when there is no such file.
    pub fn replaced(&self, name: &str) -> Option<SystemTime> {
        fs::metadata(self.path(name)).and_then(|metadata| metadata.modified()).ok()
    }

    /// A file's content; `None` when there is no such file.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, RunDirError> {
        let path = self.path(name);
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let mut content = Vec::new();
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut content).map_err(failed("read", &path))?;
        if content.len() as u64 > MAX_FILE_BYTES {
            return Err(failed("read", &path)(io::ErrorKind::FileTooLarge.into()));
        }
        Ok(Some(content))
    }

    /// Writes a file, or replaces it as a whole. Folders in the name are made.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), RunDirError> {
        let path = self.path(name);
        if let Some(folder) = path.parent() {
            self.make(folder)?;
        }
        // An agent and its successor may write at the same time, each its own whole file.
        let fresh = path.with_extension(format!("{}.new", std::process::id()));
        let written = write_whole(&fresh, content)
            .and_then(|()| fs::rename(&fresh, &path).map_err(failed("replace", &path)));
        if written.is_err() {
            // What fits of a file that does not would keep the next from fitting. The first error is the one to tell.
            let _ = fs::remove_file(&fresh);
        }
        written
    }

    /// Removes a file, if there is one.
    pub fn remove(&self, name: &str) -> Result<(), RunDirError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// The names of the files with this extension in a folder, each with the folder's name before it.
    pub fn list(&self, folder: &str, extension: &str) -> Result<Vec<String>, RunDirError> {
        let path = self.path(folder);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list", &path)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed("list", &path))?.file_name();
            match name.to_str() {
                Some(name) if Path::new(name).extension().is_some_and(|found| found == extension) => {
                    names.push(format!("{folder}/{name}"));
                }
                _ => {}
            }
        }
        names.sort();
        Ok(names)
    }

    fn make(&self, folder: &Path) -> Result<(), RunDirError> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed("create", folder))
    }
}

fn write_whole(path: &Path, content: &[u8]) -> Result<(), RunDirError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("create", path))?;
    // What a crash left behind under this name keeps its mode when it is opened again.
    file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(failed("protect", path))?;
    file.write_all(content).map_err(failed("write", path))
}

/// What to do about an error of the file system.
fn cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; make room there, or give --run-dir a larger tmpfs"
        }
        io::ErrorKind::ReadOnlyFilesystem => "; mount it writable",
        io::ErrorKind::PermissionDenied => {
            "; it has to belong to the agent's user, with mode 0700 (files: 0600)"
        }
        io::ErrorKind::FileTooLarge => "; it is not one of the agent's: remove it",
        _ => "",
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    move |source| RunDirError::Io { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    #[test]
    fn a_directory_that_is_not_on_tmpfs_is_refused() {
        // Not a disk, but no tmpfs either, and there on every machine.
        let error = RunDir::open(Path::new("/proc/self")).unwrap_err();
        assert!(matches!(error, RunDirError::NotTmpfs(_)), "{error}");
        assert!(error.to_string().contains("--run-dir"));
    }

    #[test]
    fn files_are_private_and_replaced_whole() {
        let scratch = scratch();
        let dir = RunDir::open(&scratch.path().join("agent")).unwrap();
        dir.write("keys/a.json", b"first").unwrap();
        dir.write("keys/a.json", b"2nd").unwrap();
        assert_eq!(dir.read("keys/a.json").unwrap().unwrap(), b"2nd");
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir.path("keys/a.json")), 0o600);
        assert_eq!(mode(dir.path("keys")), 0o700);
        assert_eq!(dir.list("keys", "json").unwrap(), ["keys/a.json"]);
        dir.remove("keys/a.json").unwrap();
        dir.remove("keys/a.json").unwrap();
        assert_eq!(dir.read("keys/a.json").unwrap(), None);
        assert!(dir.list("keys", "json").unwrap().is_empty());
        assert!(dir.list("none", "json").unwrap().is_empty());
    }

    #[test]
    fn what_a_crash_left_open_to_others_is_closed() {
        let scratch = scratch();
        let dir = RunDir::open(scratch.path()).unwrap();
        let left = dir.path(&format!("a.{}.new", std::process::id()));
        fs::write(&left, b"left").unwrap();
        fs::set_permissions(&left, fs::Permissions::from_mode(0o644)).unwrap();
        dir.write("a.json", b"key").unwrap();
        assert_eq!(fs::metadata(dir.path("a.json")).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
