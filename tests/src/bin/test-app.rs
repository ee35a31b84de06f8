//! An application as people run it, for tests of what becomes of its connections: HTTP on 8080 and an echo of lines on
//! 7000. Told to end it takes no new connection, answers requests on those that it has with `Connection: close`, says
//! [`mesh_tests::apps::BYE`] to whoever echoes, and ends when nobody is left or after [`GRACE`].

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use mesh_tests::{apps::BYE, wait};
use nix::sys::signal::{SigSet, Signal};
use socket2::SockRef;

/// How long connections may take to end.
const GRACE: Duration = Duration::from_secs(20);

/// What all connections share.
#[derive(Debug, Default)]
struct App {
    body: String,
    ends: AtomicBool,
    next: AtomicU64,
    /// Those that live; `true` for those that echo.
    connections: Mutex<BTreeMap<u64, (bool, TcpStream)>>,
}

fn main() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    // Before there is another thread: all of them inherit it.
    signals.thread_block()?;
    let body = std::env::args().nth(1).context("give the text of every answer")?;
    let app = Arc::new(App { body, ..App::default() });
    let listeners = [(8080, false), (7000, true)].map(|(port, echoes)| listen(app.clone(), port, echoes));
    signals.wait()?;
    app.ends.store(true, Ordering::SeqCst);
    for listener in listeners {
        // Ends `accept` with an error (Linux); cannot fail for a listening socket.
        let _ = SockRef::from(&listener?).shutdown(Shutdown::Both);
    }
    for (_, stream) in app.connections().values_mut().filter(|(echoes, _)| *echoes) {
        // Fails for one that has just ended.
        let _ = stream.write_all(BYE);
    }
    let begun = Instant::now();
    let left = || app.connections().len();
    let ended = wait::try_until(GRACE, || wait::holds(left() == 0, || format!("{} connections", left())));
    eprintln!("ended after {:?}: {ended:?}", begun.elapsed());
    Ok(())
}

fn listen(app: Arc<App>, port: u16, echoes: bool) -> Result<TcpListener> {
    let listener = TcpListener::bind(SocketAddr::from(([0; 4], port)))?;
    let accepting = listener.try_clone()?;
    thread::spawn(move || {
        while let Ok((stream, _)) = accepting.accept() {
            let app = app.clone();
            thread::spawn(move || {
                let number = app.next.fetch_add(1, Ordering::Relaxed);
                // An error is its client's to tell.
                let _ = app.serve(number, &stream, echoes);
                app.connections().remove(&number);
                let _ = stream.shutdown(Shutdown::Both);
            });
        }
    });
    Ok(listener)
}

impl App {
    fn connections(&self) -> MutexGuard<'_, BTreeMap<u64, (bool, TcpStream)>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, number: u64, stream: &TcpStream, echoes: bool) -> io::Result<()> {
        stream.set_nodelay(true)?;
        self.connections().insert(number, (echoes, stream.try_clone()?));
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut writes = stream.try_clone()?;
        if echoes {
            if self.ends.load(Ordering::SeqCst) {
                writes.write_all(BYE)?;
            }
            let mut line = vec![];
            while lines.read_until(b'\n', &mut line)? > 0 {
                writes.write_all(&std::mem::take(&mut line))?;
            }
            return Ok(());
        }
        loop {
            let (mut line, mut asked) = (String::new(), false);
            while lines.read_line(&mut line)? > 0 && line != "\r\n" {
                asked = true;
                line.clear();
            }
            if !asked {
                return Ok(());
            }
            let ends = self.ends.load(Ordering::SeqCst);
            let connection = if ends { "close" } else { "keep-alive" };
            let (length, body) = (self.body.len(), &self.body);
            writes.write_all(
                format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n{body}"
                )
                .as_bytes(),
            )?;
            if ends {
                return Ok(());
            }
        }
    }
}
