//! The threads that carry connections: one for each processor, each with a runtime of its own.
//!
//! A connection stays on the thread that it was given to, with the tunnels and the connections to backends that it uses. So what
//! it wakes runs next on the same processor, and no other thread waits for it, or has to be woken for it
//! (docs/adr/0027-connections-stay-on-a-thread.md).

use std::{
    cell::Cell,
    io,
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use tokio::{
    net::TcpStream,
    runtime::{Builder, EnterGuard, Handle},
};

thread_local! {
    static OWN: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Which of the threads this one is, from 0, if it is one of them.
pub(crate) fn own() -> Option<usize> {
    OWN.get()
}

/// All of them; clones are the same. They end with the process.
#[derive(Debug, Clone)]
pub struct Threads(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    threads: Vec<Thread>,
    listeners: AtomicUsize,
}

#[derive(Debug)]
struct Thread {
    runtime: Handle,
    carried: Arc<AtomicUsize>,
}

impl Threads {
    /// Starts as many as there are processors.
    pub fn start() -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, NonZero::get);
        let threads = (0..count).map(Thread::start).collect::<io::Result<_>>()?;
        Ok(Self(Arc::new(Inner { threads, listeners: AtomicUsize::new(0) })))
    }

    /// Where what there is one of for a node runs.
    pub fn first(&self) -> &Handle {
        &self.0.threads[0].runtime
    }

    /// Where the next listener is served: on one after the other.
    pub(crate) fn for_listener(&self) -> &Handle {
        let next = self.0.listeners.fetch_add(1, Ordering::Relaxed);
        &self.0.threads[next % self.0.threads.len()].runtime
    }

    /// A place for a connection on the thread that carries the fewest: the calling one, unless another has fewer.
    pub(crate) fn place(&self) -> Place {
        let threads = &self.0.threads;
        let carried = |at: usize| threads[at].carried.load(Ordering::Relaxed);
        let fewest = (0..threads.len()).min_by_key(|at| (carried(*at), Some(*at) != own())).unwrap_or(0);
        let Thread { runtime, carried } = &threads[fewest];
        carried.fetch_add(1, Ordering::Relaxed);
        Place { runtime: runtime.clone(), carried: carried.clone(), is_here: Some(fewest) == own() }
    }
}

impl Thread {
    fn start(at: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let run = move || {
            OWN.set(Some(at));
            runtime.block_on(std::future::pending::<()>());
        };
        thread::Builder::new().name(format!("data-{at}")).spawn(run)?;
        Ok(Self { runtime: handle, carried: Arc::default() })
    }
}

/// A connection's place on a thread, until dropped.
#[derive(Debug)]
pub(crate) struct Place {
    runtime: Handle,
    carried: Arc<AtomicUsize>,
    is_here: bool,
}

impl Place {
    /// What is spawned until the guard is dropped runs there.
    pub(crate) fn enter(&self) -> EnterGuard<'_> {
        self.runtime.enter()
    }

    /// The same socket, looked after by that thread.
    pub(crate) fn take(&self, stream: TcpStream) -> io::Result<TcpStream> {
        if self.is_here { Ok(stream) } else { moved(stream) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.carried.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The same socket, looked after by the thread in whose runtime this is called. Nobody may wait for it.
pub(crate) fn moved(stream: TcpStream) -> io::Result<TcpStream> {
    TcpStream::from_std(stream.into_std()?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn a_connection_goes_to_the_thread_that_carries_the_fewest() {
        let threads = Threads::start().unwrap();
        let count = threads.0.threads.len();
        let carried = || -> Vec<usize> {
            threads.0.threads.iter().map(|thread| thread.carried.load(Ordering::Relaxed)).collect()
        };
        let mut places: Vec<Place> = (0..2 * count).map(|_| threads.place()).collect();
        assert_eq!(carried(), vec![2; count]);
        places.truncate(count);
        assert_eq!(carried().iter().sum::<usize>(), count, "what has ended counts no more");
    }

    #[test]
    fn of_threads_that_carry_the_same_the_own_one_is_taken() {
        let threads = Threads::start().unwrap();
        for thread in &threads.0.threads {
            let (told, tells) = std::sync::mpsc::channel();
            let all = threads.clone();
            thread.runtime.spawn(async move { told.send(all.place().is_here).unwrap() });
            assert!(tells.recv().unwrap());
        }
    }

    #[test]
    fn a_socket_is_looked_after_by_the_thread_that_it_was_moved_to() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let threads = Threads::start().unwrap();
        let accepted = listener.accept().unwrap().0;
        accepted.set_nonblocking(true).unwrap();
        let mut stream = {
            let _inside = threads.first().enter();
            TcpStream::from_std(accepted).unwrap()
        };
        for (at, thread) in threads.0.threads.iter().enumerate().rev() {
            let (told, tells) = std::sync::mpsc::channel();
            thread.runtime.spawn(async move {
                let mut stream = moved(stream).unwrap();
                let mut word = [0; 5];
                stream.read_exact(&mut word).await.unwrap();
                stream.write_all(&word).await.unwrap();
                told.send(stream).unwrap();
            });
            // No other one does anything until it is told.
            let others = threads.0.threads.iter().enumerate().filter(|(other, _)| *other != at);
            let _stopped: Vec<_> = others
                .map(|(_, other)| {
                    let (go, goes) = std::sync::mpsc::channel::<()>();
                    let (stops, stopped) = std::sync::mpsc::channel();
                    other.runtime.spawn(async move {
                        stops.send(()).unwrap();
                        let _ = goes.recv();
                    });
                    stopped.recv().unwrap();
                    go
                })
                .collect();
            client.write_all(b"hello").unwrap();
            let mut word = [0; 5];
            client.read_exact(&mut word).unwrap();
            assert_eq!(&word, b"hello");
            stream = tells.recv().unwrap();
        }
    }
}
