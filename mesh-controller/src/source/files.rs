//! A directory as a source: every `*.yaml` and `*.yml` below it, read again as soon as something changes.
//!
//! inotify says when to look, never what is there: each look reads the directory as it is, so renames, symlink swaps
//! (`..data`, as Kubernetes mounts a ConfigMap) and lost events all end in the same state. A slow poll catches what no
//! event announced. A file that is being written is waited for until it is closed, so that half of it is not taken
//! for the whole.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    document,
    ledger::{FileContent, Ledger},
    published::{Published, PublishedError, limit_documents},
};
use crate::{digest::digest, store::Unsaved};

/// Largest file that is read: a document is some hundred bytes, and parsing holds all of a file in memory.
pub const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Deepest subdirectory.
const MAX_DEPTH: usize = 16;
/// After the last event, how long nothing more must happen before a look.
const QUIET: Duration = Duration::from_millis(15);
/// However busy the directory is, the longest wait for quiet.
const LONGEST_QUIET: Duration = Duration::from_millis(50);
/// Longest wait for a writer to close its file.
const LONGEST_WRITE: Duration = Duration::from_secs(1);
/// The safety net.
const POLL: Duration = Duration::from_secs(5);
/// File systems stamp in ticks: a file changed this recently may change again within the same stamp.
const STAMP_SETTLES: Duration = Duration::from_secs(2);
/// Events that wait for a look. Losing one beyond is harmless: the look that is due reads everything.
const EVENT_QUEUE: usize = 1024;

/// The directory cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// It cannot be listed.
    #[error("cannot read the source directory {path}: {error}; create it, or name another with --source")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// What is in force cannot be published.
    #[error(transparent)]
    Published(#[from] PublishedError),
}

/// Reads a directory once: what `meshctl check` does.
pub fn check(root: &Path) -> Result<Ledger, FilesError> {
    let mut directory = Directory::open(root)?;
    directory.look();
    limit_documents(&mut directory.contents);
    Ok(Ledger::default().next(&directory.contents))
}

/// The lines of fields, each given with the line at which its document starts; the document's own where the file has
/// changed meanwhile.
pub fn lines(file: &Path, fields: &[(usize, &str)]) -> Vec<usize> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let documents = document::split(&text);
    let mut trees: BTreeMap<usize, document::Node> = BTreeMap::new();
    let wanted: BTreeSet<usize> = fields.iter().map(|(line, _)| *line).collect();
    for document in documents.iter().filter(|document| wanted.contains(&document.line())) {
        trees.extend(document.tree().ok().map(|tree| (document.line(), tree)));
    }
    fields.iter().map(|(line, field)| trees.get(line).map_or(*line, |tree| tree.line_of(field))).collect()
}

/// The files of a directory, as they were at the last look.
#[derive(Debug)]
struct Directory {
    root: PathBuf,
    read: BTreeMap<PathBuf, (Stamp, Arc<FileContent>)>,
    contents: BTreeMap<PathBuf, Arc<FileContent>>,
}

/// What tells that a file is unchanged without reading it; the digest tells it after reading.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    size: u64,
    changed: (i64, i64),
    /// It had been unchanged for long enough that an equal stamp means equal content.
    settled: bool,
    digest: [u8; 32],
}

impl Directory {
    fn open(root: &Path) -> Result<Self, FilesError> {
        let unreadable = |error| FilesError::Directory { path: root.to_owned(), error };
        fs::read_dir(root).map_err(unreadable)?;
        Ok(Self { root: root.to_owned(), read: BTreeMap::new(), contents: BTreeMap::new() })
    }

    /// Reads what has changed; `true` if anything has.
    fn look(&mut self) -> bool {
        let listing = Listing::of(&self.root);
        let mut contents = BTreeMap::new();
        for file in &listing.files {
            match self.content(file) {
                Ok(Some(content)) => drop(contents.insert(file.clone(), content)),
                Ok(None) => {}
                Err(error) => {
                    let content = FileContent::unreadable(
                        format!("the file cannot be read: {error}"),
                        error.cure().into(),
                    );
                    contents.insert(file.clone(), Arc::new(content));
                }
            }
        }
        for (directory, error) in listing.unreadable {
            // What is below stays as it was: not being able to look does not mean that it is gone.
            let below = self.contents.iter().filter(|(file, _)| file.starts_with(&directory));
            contents.extend(below.map(|(file, content)| (file.clone(), content.clone())));
            let reason = format!("the directory cannot be read: {error}");
            let content = FileContent::unreadable(reason, "correct its permissions".into());
            contents.insert(directory, Arc::new(content));
        }
        self.read.retain(|file, _| contents.contains_key(file));
        let changed = contents != self.contents;
        self.contents = contents;
        changed
    }

    /// A file's content, from memory if it has not changed; `None` if it is gone.
    fn content(&mut self, file: &Path) -> Result<Option<Arc<FileContent>>, FileError> {
        let metadata = match fs::metadata(file) {
            Ok(metadata) => metadata,
            // A link that leads nowhere is no removal: what it led to may be on its way.
            Err(error) if error.kind() == io::ErrorKind::NotFound && file.is_symlink() => {
                return Err(FileError::Dangling);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if !metadata.is_file() {
            return Err(FileError::NotAFile);
        }
        if metadata.len() > MAX_FILE_BYTES {
            return Err(FileError::TooLarge(metadata.len()));
        }
        let known = self.read.get(file);
        if let Some((_, content)) = known.filter(|(stamp, _)| stamp.settled && stamp.is_of(&metadata)) {
            return Ok(Some(content.clone()));
        }
        let mut bytes = Vec::new();
        fs::File::open(file)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(FileError::TooLarge(bytes.len() as u64));
        }
        let stamp = Stamp::new(&metadata, &bytes);
        let content = match known.filter(|(known, _)| known.digest == stamp.digest) {
            Some((_, content)) => content.clone(),
            None => {
                let before = known.map_or_else(Arc::default, |(_, content)| content.clone());
                Arc::new(before.next(std::str::from_utf8(&bytes)?))
            }
        };
        self.read.insert(file.to_owned(), (stamp, content.clone()));
        Ok(Some(content))
    }
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is not UTF-8: {0}")]
    Utf8(#[from] std::str::Utf8Error),
    #[error("it has {0} bytes, more than {MAX_FILE_BYTES}")]
    TooLarge(u64),
    #[error("it is no regular file: a directory behind a link, a pipe, a socket or a device")]
    NotAFile,
    #[error("it is a link that leads nowhere")]
    Dangling,
}

impl FileError {
    fn cure(&self) -> &'static str {
        match self {
            Self::Io(_) => "correct its permissions",
            Self::Utf8(_) => "save it as UTF-8",
            Self::TooLarge(_) => "split it into several files",
            Self::NotAFile => "remove it, or give it a name that does not end in .yaml or .yml",
            Self::Dangling => "remove the link, or put back what it leads to",
        }
    }
}

impl Stamp {
    fn new(metadata: &fs::Metadata, bytes: &[u8]) -> Self {
        let age = metadata.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
        Self {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            settled: age.is_some_and(|age| age > STAMP_SETTLES),
            digest: digest(bytes),
        }
    }

    fn is_of(&self, metadata: &fs::Metadata) -> bool {
        self.inode == (metadata.dev(), metadata.ino())
            && self.size == metadata.len()
            && self.changed == (metadata.ctime(), metadata.ctime_nsec())
    }
}

/// The manifests below a directory.
#[derive(Debug, Default)]
struct Listing {
    files: BTreeSet<PathBuf>,
    unreadable: Vec<(PathBuf, io::Error)>,
}

impl Listing {
    fn of(root: &Path) -> Self {
        let mut listing = Self::default();
        let mut directories = vec![(root.to_owned(), 0)];
        while let Some((directory, depth)) = directories.pop() {
            if let Err(error) = listing.add(&directory, depth, &mut directories) {
                listing.unreadable.push((directory, error));
            }
        }
        listing
    }

    fn add(&mut self, at: &Path, depth: usize, below: &mut Vec<(PathBuf, usize)>) -> io::Result<()> {
        for entry in fs::read_dir(at)? {
            let entry = entry?;
            let name = entry.file_name();
            // Hidden: editors' files, and the versions behind a ConfigMap's links.
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            // Links to directories are not followed, so there is no circle to walk in.
            if entry.file_type()?.is_dir() {
                if depth < MAX_DEPTH {
                    below.push((path, depth + 1));
                }
            } else if path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
                self.files.insert(path);
            }
        }
        Ok(())
    }
}

/// A watched directory: looks once when opened, then whenever something changes.
#[derive(Debug)]
pub struct Source {
    directory: Directory,
    published: Published,
}

impl Source {
    /// Reads the directory. The last good versions of what is refused are kept in `kept_file` over restarts.
    pub fn open(root: &Path, kept_file: PathBuf) -> Result<Self, FilesError> {
        let mut source = Self { directory: Directory::open(root)?, published: Published::open(kept_file)? };
        source.look();
        Ok(source)
    }

    /// What is in force, now and as it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Ledger>> {
        self.published.subscribe()
    }

    /// The same, which says there what it could not save.
    pub fn telling(self, unsaved: Unsaved) -> Self {
        Self { published: self.published.telling(unsaved), ..self }
    }

    /// Follows the directory until cancelled.
    pub async fn follow(mut self, cancel: CancellationToken) {
        let (sender, mut events) = mpsc::channel(EVENT_QUEUE);
        let mut watched = Watched::new(&self.directory.root, &sender);
        loop {
            // First a look: what changed before the watch was in place has caused no event.
            let looked = tokio::task::spawn_blocking(move || {
                self.look();
                self
            });
            self = match looked.await {
                Ok(source) => source,
                Err(error) => {
                    tracing::error!(%error, "reading the source directory failed");
                    return;
                }
            };
            // Cancel-safe: an event taken by `recv` is settled before the next turn.
            tokio::select! {
                () = cancel.cancelled() => return,
                event = events.recv() => {
                    if let Some(event) = event {
                        settle(event, &mut events).await;
                    }
                }
                () = tokio::time::sleep(POLL) => watched.renew(&self.directory.root, &sender),
            }
        }
    }

    fn look(&mut self) {
        if self.directory.look() || self.published.is_empty() {
            self.published.publish(self.directory.contents.clone());
        } else {
            self.published.save_again();
        }
    }
}

/// The inotify watch on a directory.
struct Watched {
    watcher: Option<RecommendedWatcher>,
    inode: Option<(u64, u64)>,
}

impl Watched {
    fn new(root: &Path, events: &mpsc::Sender<Event>) -> Self {
        let inode = inode(root);
        match watcher(root, events.clone()) {
            Ok(watcher) => Self { watcher: Some(watcher), inode },
            Err(error) => {
                tracing::warn!(%error, poll = ?POLL, "cannot watch the source directory: changes are only polled");
                Self { watcher: None, inode }
            }
        }
    }

    /// Watches again if there is no watch, or if the directory was replaced by another.
    fn renew(&mut self, root: &Path, events: &mpsc::Sender<Event>) {
        if self.watcher.is_none() || inode(root) != self.inode {
            *self = Self::new(root, events);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn watcher(root: &Path, events: mpsc::Sender<Event>) -> notify::Result<RecommendedWatcher> {
    let forward = move |event: notify::Result<Event>| match event {
        // Opening and reading, which our own looks do, change nothing.
        Ok(event) if event.kind.is_access() && !is_close_after_write(&event) => {}
        Ok(event) => drop(events.try_send(event)),
        Err(error) => tracing::warn!(%error, "watching the source directory"),
    };
    let mut watcher = notify::recommended_watcher(forward)?;
    watcher.watch(root, RecursiveMode::Recursive)?;
    Ok(watcher)
}

fn is_close_after_write(event: &Event) -> bool {
    event.kind == EventKind::Access(AccessKind::Close(AccessMode::Write))
}

/// Waits, after a first event, until nothing more happens and no file is being written, within limits.
async fn settle(first: Event, events: &mut mpsc::Receiver<Event>) {
    let start = Instant::now();
    let mut writing = HashSet::new();
    let mut next = Some(first);
    while let Some(event) = next {
        for path in &event.paths {
            match event.kind {
                EventKind::Modify(ModifyKind::Data(_)) => drop(writing.insert(path.clone())),
                EventKind::Access(_) | EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => {
                    writing.remove(path);
                }
                EventKind::Any | EventKind::Create(_) | EventKind::Modify(_) | EventKind::Other => {}
            }
        }
        let until = if writing.is_empty() {
            (Instant::now() + QUIET).min(start + LONGEST_QUIET)
        } else {
            start + LONGEST_WRITE
        };
        next = timeout_at(until, events.recv()).await.ok().flatten();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(name: &str) -> String {
        format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}}}\nspec: {{node: n, \
             addresses: [10.0.0.1]}}\n"
        )
    }

    struct World {
        dir: tempfile::TempDir,
        state: tempfile::TempDir,
        receiver: watch::Receiver<Arc<Ledger>>,
        cancel: CancellationToken,
    }

    impl World {
        fn start(prepare: impl FnOnce(&Path)) -> Self {
            let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            prepare(dir.path());
            let source = Source::open(dir.path(), state.path().join("kept.json")).unwrap();
            let (receiver, cancel) = (source.subscribe(), CancellationToken::new());
            tokio::spawn(source.follow(cancel.clone()));
            Self { dir, state, receiver, cancel }
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.dir.path().join(name), text).unwrap();
        }

        async fn until_workloads(&mut self, expected: &[&str]) {
            let names = |ledger: &Arc<Ledger>| -> Vec<String> {
                ledger.model().workloads.keys().map(|name| name.name.clone()).collect()
            };
            let reached = self.receiver.wait_for(|ledger| names(ledger) == expected);
            // Shorter than the poll: the events must have done it.
            let limit = tokio::time::timeout(POLL - Duration::from_secs(1), reached);
            assert!(limit.await.is_ok(), "never {expected:?}");
        }
    }

    impl Drop for World {
        fn drop(&mut self) {
            self.cancel.cancel();
        }
    }

    #[tokio::test]
    async fn files_that_appear_change_move_and_go_are_followed() {
        let mut world = World::start(|dir| fs::write(dir.join("a.yaml"), workload("a")).unwrap());
        world.until_workloads(&["a"]).await;
        world.write("b.yml", &workload("b"));
        world.write("ignored.txt", &workload("c"));
        world.until_workloads(&["a", "b"]).await;
        fs::rename(world.dir.path().join("a.yaml"), world.dir.path().join("z.yaml")).unwrap();
        world.write("b.yml", &(workload("b") + &workload("c")));
        world.until_workloads(&["a", "b", "c"]).await;
        fs::remove_file(world.dir.path().join("z.yaml")).unwrap();
        world.until_workloads(&["b", "c"]).await;
        fs::create_dir(world.dir.path().join("below")).unwrap();
        world.write("below/d.yaml", &workload("d"));
        world.until_workloads(&["b", "c", "d"]).await;
    }

    #[tokio::test]
    async fn a_config_map_is_swapped_whole() {
        use std::os::unix::fs::symlink;
        let mut world = World::start(|dir| {
            fs::create_dir(dir.join("..1")).unwrap();
            fs::write(dir.join("..1/a.yaml"), workload("old")).unwrap();
            symlink("..1", dir.join("..data")).unwrap();
            symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
        });
        world.until_workloads(&["old"]).await;
        let dir = world.dir.path().to_owned();
        fs::create_dir(dir.join("..2")).unwrap();
        fs::write(dir.join("..2/a.yaml"), workload("new")).unwrap();
        symlink("..2", dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
        world.until_workloads(&["new"]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_being_written_is_waited_for_within_limits() {
        let event = |kind| Event::new(kind).add_path("a.yaml".into());
        let written = EventKind::Modify(ModifyKind::Data(notify::event::DataChange::Any));
        let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
        let (sender, mut events) = mpsc::channel(8);

        let start = Instant::now();
        settle(event(written), &mut events).await;
        assert_eq!(start.elapsed(), LONGEST_WRITE, "nobody closed it");

        let start = Instant::now();
        sender.send(event(closed)).await.unwrap();
        settle(event(written), &mut events).await;
        assert!(start.elapsed() <= LONGEST_QUIET, "it was closed");
    }

    #[tokio::test]
    async fn the_last_good_version_survives_a_restart() {
        let mut world = World::start(|dir| fs::write(dir.join("a.yaml"), workload("a")).unwrap());
        world.until_workloads(&["a"]).await;
        world.write("a.yaml", &workload("a").replace("10.0.0.1", "nonsense"));
        world.receiver.wait_for(|ledger| ledger.documents_refused() == 1).await.unwrap();
        let restarted = Source::open(world.dir.path(), world.state.path().join("kept.json")).unwrap();
        assert_eq!(restarted.subscribe().borrow().model().workloads.len(), 1);
        assert_eq!(restarted.subscribe().borrow().documents_refused(), 1);
    }

    #[test]
    fn files_that_are_too_large_or_not_text_are_refused_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.yaml"), workload("a")).unwrap();
        fs::write(dir.path().join("b.yaml"), vec![b'#'; MAX_FILE_BYTES as usize + 1]).unwrap();
        fs::write(dir.path().join("c.yaml"), [0xff, 0xfe]).unwrap();
        let ledger = check(dir.path()).unwrap();
        assert_eq!((ledger.documents_accepted(), ledger.documents_refused()), (1, 2));
        assert!(ledger.refused()[0].reason.contains("more than"), "{:?}", ledger.refused());
        assert!(ledger.refused()[1].reason.contains("UTF-8"), "{:?}", ledger.refused());
    }

    #[test]
    fn what_is_no_file_is_refused_alone() {
        use std::os::unix::{fs::symlink, net::UnixListener};
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("a.yaml"), workload("a")).unwrap();
        fs::create_dir(at("b.yaml")).unwrap();
        fs::write(at("b.yaml/b.yaml"), workload("b")).unwrap();
        symlink("nowhere", at("c.yaml")).unwrap();
        nix::unistd::mkfifo(&at("d.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _socket = UnixListener::bind(at("e.yaml")).unwrap();
        symlink("b.yaml", at("f.yaml")).unwrap();
        symlink("g.yaml", at("g.yaml")).unwrap();
        let ledger = check(dir.path()).unwrap();
        assert_eq!((ledger.documents_accepted(), ledger.documents_refused()), (2, 5));
        let reasons: Vec<&str> = ledger.refused().iter().map(|it| it.reason.as_str()).collect();
        for (reason, part) in reasons.iter().zip([
            "leads nowhere",
            "no regular file",
            "no regular file",
            "no regular file",
            "cannot",
        ]) {
            assert!(reason.contains(part), "{part}: {reasons:#?}");
        }
    }

    /// As [`World::until_workloads`], with time for the poll: nothing tells of a directory that comes back.
    async fn until_polled(world: &mut World, expected: usize, refused: usize) {
        let reached = world
            .receiver
            .wait_for(|it| (it.documents_accepted(), it.documents_refused()) == (expected, refused));
        assert!(tokio::time::timeout(POLL * 3, reached).await.is_ok(), "never {expected} and {refused}");
    }

    #[tokio::test]
    async fn what_was_in_force_outlives_a_link_that_dangles_and_a_directory_that_is_gone() {
        use std::os::unix::fs::symlink;
        let mut world = World::start(|dir| {
            fs::create_dir(dir.join("..1")).unwrap();
            fs::write(dir.join("..1/a.yaml"), workload("a")).unwrap();
            symlink("..1/a.yaml", dir.join("a.yaml")).unwrap();
        });
        world.until_workloads(&["a"]).await;
        let dir = world.dir.path().to_owned();
        fs::rename(dir.join("..1"), dir.join("..2")).unwrap();
        until_polled(&mut world, 0, 1).await;
        world.until_workloads(&["a"]).await;
        fs::rename(dir.join("..2"), dir.join("..1")).unwrap();
        until_polled(&mut world, 1, 0).await;

        let away = dir.with_extension("away");
        fs::rename(&dir, &away).unwrap();
        until_polled(&mut world, 1, 1).await;
        world.until_workloads(&["a"]).await;
        fs::rename(&away, &dir).unwrap();
        until_polled(&mut world, 1, 0).await;
        world.write("b.yaml", &workload("b"));
        world.until_workloads(&["a", "b"]).await;
    }

    #[test]
    fn a_missing_directory_says_so() {
        let error = check(Path::new("/nowhere/at/all")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all") && error.contains("--source"), "{error}");
    }
}
