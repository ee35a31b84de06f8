//! Connections that come and go in the background of a test, and what went wrong with any of them.

use std::{
    fmt::Display,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{Workload, apps, wait};

/// What a short connection carries each way.
const SHORT_BYTES: usize = 20_000;

/// Connections that come and go in the background, and what went wrong with any of them.
#[derive(Debug, Default)]
pub struct Load {
    stop: Arc<AtomicBool>,
    ended: Arc<AtomicUsize>,
    errors: Arc<Mutex<Vec<String>>>,
    workers: Vec<JoinHandle<()>>,
}

impl Load {
    /// Nothing runs yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One connection after another, each carried out by `one`.
    pub fn run(
        &mut self,
        what: &str,
        from: &Workload,
        to: SocketAddr,
        one: fn(&Workload, SocketAddr) -> io::Result<()>,
    ) {
        let (stop, ended, errors) = (self.stop.clone(), self.ended.clone(), self.errors.clone());
        let (from, what) = (from.clone(), format!("{what} from {} to {to}", from.name));
        self.workers.push(thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                match one(&from, to) {
                    Ok(()) => drop(ended.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => {
                        let text = format!("{what}, {:?} after its begin: {error}", begun.elapsed());
                        errors.lock().expect("no worker panics").push(text);
                        return;
                    }
                }
            }
        }));
    }

    /// How many have come to their end.
    pub fn ended(&self) -> usize {
        self.ended.load(Ordering::Relaxed)
    }

    /// Asserts that nothing has gone wrong.
    #[track_caller]
    pub fn assert_unharmed(&self, after: impl Display) {
        let errors = self.errors.lock().expect("no worker panics");
        assert!(errors.is_empty(), "{after}: {errors:#?}");
    }

    /// Waits until so many more connections have come to their end.
    #[track_caller]
    pub fn await_more(&self, count: usize) {
        let before = self.ended();
        wait::until("connections come and go", Duration::from_secs(20), || {
            let stopped = self.errors.lock().expect("no worker panics").len();
            wait::holds(self.ended() >= before + count || stopped > 0, || {
                format!("{} ended", self.ended() - before)
            })
        });
    }

    /// Lets the last ones end; how many there were. Nothing may have gone wrong.
    #[track_caller]
    pub fn finish(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            worker.join().expect("no worker panics");
        }
        self.assert_unharmed("at the end");
        self.ended()
    }
}

/// A few kilobytes there and back, to the last byte and a proper end.
pub fn short(from: &Workload, to: SocketAddr) -> io::Result<()> {
    let sent = apps::noise(SHORT_BYTES);
    let answer = from.exchange(to, &sent)?;
    same(&sent, &answer)
}

/// Whether what came back is what was sent.
pub fn same(sent: &[u8], answer: &[u8]) -> io::Result<()> {
    if sent == answer {
        return Ok(());
    }
    Err(io::Error::other(format!("{} bytes were sent and {} others came back", sent.len(), answer.len())))
}
