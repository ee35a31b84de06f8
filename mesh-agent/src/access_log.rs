//! The access log: lines of JSON that wait in a bounded buffer for one writer thread. A slow disk costs lines, which are
//! counted, never connections.

use std::{
    cell::RefCell,
    fs::OpenOptions,
    io::{self, Write},
    mem,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::sync::oneshot;

use crate::{config::LogMode, metrics::Metrics};

/// Bytes of lines that wait for the writer at most: 4 MiB.
const ROOM: usize = 4 << 20;

/// Bytes that a buffer keeps when it is empty: what is written in one go as a rule.
const KEPT: usize = 64 << 10;

/// How long lines gather before the writer looks again: waking it for each would cost more than writing does.
const GATHER: Duration = Duration::from_millis(10);

thread_local! {
    /// Where a thread writes its line first: under the lock it is copied, no more.
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Where the lines go; cheap to clone.
#[derive(Debug, Clone)]
pub struct AccessLog {
    handle: Arc<Handle>,
    mode: LogMode,
}

/// The last one ends the writer.
#[derive(Debug)]
struct Handle(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    come: Condvar,
}

/// What the writer has not taken yet.
#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    flushed: Vec<oneshot::Sender<()>>,
    asleep: bool,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something has come.
    fn wake(&self, mut waiting: MutexGuard<'_, Waiting>) {
        if mem::take(&mut waiting.asleep) {
            drop(waiting);
            self.come.notify_one();
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut waiting = self.0.lock();
        waiting.closed = true;
        self.0.wake(waiting);
    }
}

impl AccessLog {
    /// Appends to a file, or writes to standard output for `-`. The writer is a thread that ends with the last clone.
    pub fn open(path: &Path, metrics: Arc<Metrics>) -> io::Result<Self> {
        if path == Path::new("-") {
            return Self::to(io::stdout(), metrics);
        }
        Self::to(OpenOptions::new().create(true).append(true).open(path)?, metrics)
    }

    /// Writes to anything.
    pub fn to(out: impl Write + Send + 'static, metrics: Arc<Metrics>) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let of_writer = shared.clone();
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write(&of_writer, Lines { out, torn: false }, &metrics))?;
        Ok(Self { handle: Arc::new(Handle(shared)), mode: LogMode::ON })
    }

    /// The same, of which not everything is logged.
    #[must_use]
    pub fn of(self, mode: LogMode) -> Self {
        Self { mode, ..self }
    }

    /// Whether something is logged. `usual`: nothing of it was refused, nor would have been, nor failed.
    pub(crate) fn wants(&self, usual: bool) -> bool {
        match self.mode {
            LogMode::Off => false,
            LogMode::Part(part) => !usual || part.takes(rand::random()),
        }
    }

    /// Appends a line; whether there was room for it.
    pub(crate) fn append(&self, event: &impl Serialize) -> serde_json::Result<bool> {
        LINE.with_borrow_mut(|line| {
            line.clear();
            serde_json::to_writer(&mut *line, event)?;
            line.push(b'\n');
            let Handle(shared) = &*self.handle;
            let mut waiting = shared.lock();
            if waiting.lines.len() + line.len() > ROOM {
                return Ok(false);
            }
            waiting.lines.extend_from_slice(line);
            shared.wake(waiting);
            Ok(true)
        })
    }

    /// Done when every line so far is written.
    pub async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        self.tell_when_flushed(done);
        // It ends after everything has been written, too.
        let _ = wait.await;
    }

    fn tell_when_flushed(&self, done: oneshot::Sender<()>) {
        let Handle(shared) = &*self.handle;
        let mut waiting = shared.lock();
        waiting.flushed.push(done);
        shared.wake(waiting);
    }
}

fn write(shared: &Shared, mut out: Lines<impl Write>, metrics: &Metrics) {
    let (mut lines, mut broken) = (Vec::new(), false);
    loop {
        let flushed = {
            let mut waiting = shared.lock();
            while waiting.lines.is_empty() && waiting.flushed.is_empty() {
                if waiting.closed {
                    return;
                }
                waiting.asleep = true;
                waiting = shared.come.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            mem::swap(&mut waiting.lines, &mut lines);
            mem::take(&mut waiting.flushed)
        };
        let result = out.write(&lines);
        if let Err(Unwritten { error, lost }) = &result {
            if !broken {
                tracing::error!(%error, "the access log cannot be written: lines are lost, and counted");
            }
            metrics.log_unwritten().inc_by(*lost);
        }
        broken = result.is_err();
        lines.clear();
        lines.shrink_to(KEPT);
        for done in flushed {
            // A closed receiver has stopped waiting.
            let _ = done.send(());
        }
        std::thread::sleep(GATHER);
    }
}

/// Lines of which is known how many were not written. What is written of a line when the disk is full is ended as a line of
/// its own, once there is room.
#[derive(Debug)]
struct Lines<W> {
    out: W,
    torn: bool,
}

/// Why lines were not written, and how many, a torn one included.
#[derive(Debug)]
struct Unwritten {
    error: io::Error,
    lost: u64,
}

impl<W: Write> Lines<W> {
    fn write(&mut self, lines: &[u8]) -> Result<(), Unwritten> {
        let mut written = 0;
        self.write_from(lines, &mut written).map_err(|error| {
            let lost = lines[written..].iter().filter(|byte| **byte == b'\n').count() as u64;
            self.torn |= written > 0 && lines[written - 1] != b'\n';
            Unwritten { error, lost }
        })
    }

    fn write_from(&mut self, lines: &[u8], written: &mut usize) -> io::Result<()> {
        if self.torn && !lines.is_empty() {
            self.out.write_all(b"\n")?;
            self.torn = false;
        }
        while *written < lines.len() {
            match self.out.write(&lines[*written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => *written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_did_not_go_well_is_logged_unless_nothing_is() {
        let (metrics, _) = Metrics::new();
        let wants = |mode: &str| {
            let log = AccessLog::to(io::sink(), metrics.clone()).unwrap().of(mode.parse().unwrap());
            (log.wants(true), log.wants(false))
        };
        assert_eq!(wants("on"), (true, true));
        assert_eq!(wants("100%"), (true, true));
        assert_eq!(wants("errors"), (false, true));
        assert_eq!(wants("off"), (false, false));
        let half: LogMode = "50%".parse().unwrap();
        let log = AccessLog::to(io::sink(), metrics.clone()).unwrap().of(half);
        let logged = (0..10_000).filter(|_| log.wants(true)).count();
        // By 20 standard deviations.
        assert!((4_000..6_000).contains(&logged), "{logged}");
        assert!("some".parse::<LogMode>().unwrap_err().to_string().contains("on, errors, off"));
    }

    #[tokio::test]
    async fn lines_that_a_full_disk_takes_are_counted() {
        let (metrics, _) = Metrics::new();
        let log = AccessLog::open(Path::new("/dev/full"), metrics.clone()).unwrap();
        for _ in 0..500 {
            assert!(log.append(&serde_json::json!({ "a": "connection" })).unwrap());
        }
        log.flush().await;
        assert_eq!(metrics.log_unwritten().get(), 500);
        assert_eq!(metrics.log_dropped().get(), 0, "that is another thing");
    }

    /// Takes so many bytes.
    struct Disk(Vec<u8>, usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(self.1 - self.0.len());
            self.0.extend_from_slice(&bytes[..n]);
            if n == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(n) }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_that_was_torn_does_not_spoil_the_next() {
        let mut lines = Lines { out: Disk(vec![], 6), torn: false };
        let unwritten = lines.write(b"one\ntwo\nthree\n").unwrap_err();
        assert_eq!((unwritten.error.kind(), unwritten.lost), (io::ErrorKind::StorageFull, 2));
        lines.out.1 = 100;
        lines.write(b"four\n").unwrap();
        assert_eq!(lines.out.0, b"one\ntw\nfour\n");
    }

    /// Takes nothing until it is let go.
    struct Held(std::sync::mpsc::Receiver<()>, Arc<Mutex<Vec<u8>>>);

    impl Write for Held {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Whoever lets it go for good has dropped the other end.
            let _ = self.0.recv();
            self.1.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_slow_disk_costs_lines_and_memory_is_bounded() {
        let (metrics, _) = Metrics::new();
        let (go, held) = std::sync::mpsc::channel();
        let written = Arc::default();
        let log = AccessLog::to(Held(held, Arc::clone(&written)), metrics).unwrap();
        let line = serde_json::json!({ "path": "x".repeat(1000) });
        let (mut taken, mut refused) = (0, 0);
        while refused < 10 {
            match log.append(&line).unwrap() {
                true => taken += 1,
                false => refused += 1,
            }
            assert!(taken < 2 * ROOM / 1000 + 2, "what waits is bounded, and what the writer has in hand");
        }
        drop(go);
        log.flush().await;
        let lines = written.lock().unwrap().iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(lines, taken, "what was taken is written");
        assert!(log.append(&line).unwrap(), "there is room again");
    }
}
