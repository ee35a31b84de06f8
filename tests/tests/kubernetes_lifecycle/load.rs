//! What users of an application do all along: fifty requests a second, half of them on connections of their own, and two
//! hundred connections that stay and echo. Lives in the client's pod, and remembers how everything ended.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mesh_tests::{apps::BYE, netns::NetNs, until, wait::holds};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::{interval, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// Between two requests with connections of their own.
const NEW_EVERY: Duration = Duration::from_millis(40);
/// Connections that are kept for requests, each with one in [`KEPT_EVERY`].
const KEPT: usize = 5;
const KEPT_EVERY: Duration = Duration::from_millis(200);
/// As clients do, a kept connection is left after so many requests: after four seconds.
const KEPT_REQUESTS: usize = 20;
/// Connections that echo, each with a line in [`LONG_EVERY`].
const LONG: usize = 200;
const LONG_EVERY: Duration = Duration::from_secs(2);
/// How long anything may take: longer than every deadline of the agent.
const PATIENCE: Duration = Duration::from_secs(15);
/// After something failed, until it is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// How it went since the last look.
#[derive(Debug, Default, Clone)]
pub(crate) struct Seen {
    /// Requests that were answered, on connections of their own and on kept ones.
    pub(crate) answered: [usize; 2],
    /// Requests that were not, and connections that could not be opened.
    pub(crate) failed: Vec<String>,
    /// Lines that came back.
    pub(crate) echoed: usize,
    /// Long connections that the application ended in order.
    pub(crate) left: usize,
    /// Long connections that ended otherwise.
    pub(crate) lost: Vec<Lost>,
}

#[derive(Debug, Clone)]
#[allow(dead_code, reason = "what failed assertions print")]
pub(crate) struct Lost {
    /// The client's address, and port.
    pub(crate) from: SocketAddr,
    /// Since it was asked for.
    pub(crate) age: Duration,
    pub(crate) why: String,
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Seen>,
    /// Long connections that are open, by number, and when each last heard something.
    open: Mutex<BTreeMap<usize, Instant>>,
    /// When requests that are not answered yet were asked.
    asked: Mutex<Vec<Instant>>,
}

/// Runs until it is dropped.
pub(crate) struct Load {
    shared: Arc<Shared>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// In a pod, against an application at this address.
    pub(crate) fn start(pod: NetNs, http: SocketAddr, echo: SocketAddr) -> Self {
        let (shared, stop) = (Arc::new(Shared::default()), CancellationToken::new());
        let (told, stopped) = (shared.clone(), stop.clone());
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            pod.enter(|| runtime.block_on(stopped.run_until_cancelled(run(told, http, echo)))).unwrap();
        });
        Self { shared, stop, thread: Some(thread) }
    }

    /// Waits until everything runs.
    #[track_caller]
    pub(crate) fn await_running(&self, within: Duration) {
        until("all connections are open, and requests are answered", within, || {
            let open = self.shared.open().len();
            let seen = self.shared.seen().clone();
            holds(open == LONG && seen.answered.iter().all(|count| *count > 10), || {
                let last: Vec<_> = seen.failed.iter().rev().take(3).collect();
                format!("{open} of {LONG}, {:?} answered, {last:?}", seen.answered)
            })
        });
    }

    /// Waits until all connections are open that should be and each has heard something from now on, and until nothing
    /// waits any more that was asked before.
    #[track_caller]
    pub(crate) fn await_all_heard(&self, within: Duration) {
        let begun = Instant::now();
        until("all connections are open and go on", within, || {
            let heard = self.shared.open().values().filter(|heard| **heard > begun).count();
            let waiting = self.shared.asked().iter().filter(|asked| **asked <= begun).count();
            holds(heard == LONG && waiting == 0, || {
                format!("{heard} of {LONG}, {waiting} requests of before wait")
            })
        });
    }

    /// What has happened since the last time that this was asked.
    pub(crate) fn take(&self) -> Seen {
        std::mem::take(&mut *self.shared.seen())
    }

    /// Waits until there was load for so long that what has just been done would have shown.
    #[track_caller]
    pub(crate) fn await_more(&self, requests: usize) {
        let count = || {
            let seen = self.shared.seen();
            seen.answered.iter().sum::<usize>() + seen.failed.len()
        };
        let before = count();
        until("requests go on", Duration::from_secs(60), || {
            holds(count() >= before + requests, || format!("{} of {requests}", count() - before))
        });
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Seen {
    /// Nothing failed, nothing was lost, and there was something to lose.
    #[track_caller]
    pub(crate) fn assert_unharmed(&self, by: &str) {
        self.assert_served(by);
        assert!(
            self.lost.is_empty(),
            "{by}: {} long connections lost: {:#?}",
            self.lost.len(),
            self.some_lost()
        );
    }

    /// No request failed; long connections may have ended.
    #[track_caller]
    pub(crate) fn assert_served(&self, by: &str) {
        let failed: Vec<_> = self.failed.iter().take(10).collect();
        assert!(failed.is_empty(), "{by}: {} failed: {failed:#?}", self.failed.len());
        let [new, kept] = self.answered;
        assert!(new > 50 && kept > 50 && self.echoed > 200, "{by}: there was no load: {self}");
    }

    fn some_lost(&self) -> Vec<&Lost> {
        self.lost.iter().take(10).collect()
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { answered: [new, kept], failed, echoed, left, lost } = self;
        let (failed, lost) = (failed.len(), lost.len());
        write!(
            f,
            "{new} + {kept} requests answered, {failed} failed; {echoed} lines echoed, {left} left, {lost} lost"
        )
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<usize, Instant>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self) -> MutexGuard<'_, Vec<Instant>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, on a connection of its own or on a kept one, and remembers how that went; whether the connection stays, if it
    /// was answered.
    async fn asks(&self, kept: usize, work: impl Future<Output = io::Result<bool>>) -> Option<bool> {
        let begun = Instant::now();
        self.asked().push(begun);
        let answer = within(work).await;
        match &answer {
            Ok(_) => self.seen().answered[kept] += 1,
            Err(error) => {
                let which = ["a connection of its own", "a kept connection"][kept];
                self.seen().failed.push(format!("on {which}, after {:?}: {error}", begun.elapsed()));
            }
        }
        let mut asked = self.asked();
        if let Some(at) = asked.iter().position(|it| *it == begun) {
            asked.swap_remove(at);
        }
        answer.ok()
    }
}

async fn run(shared: Arc<Shared>, http: SocketAddr, echo: SocketAddr) {
    for number in 0..LONG {
        tokio::spawn(long(shared.clone(), number, echo));
    }
    for _ in 0..KEPT {
        tokio::spawn(kept(shared.clone(), http));
    }
    let mut ticks = interval(NEW_EVERY);
    loop {
        ticks.tick().await;
        let shared = shared.clone();
        tokio::spawn(async move {
            let asked = async { ask(&mut connect(http).await?, "close").await };
            shared.asks(0, asked).await;
        });
    }
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, work)
        .await
        .unwrap_or_else(|_| Err(io::Error::other(format!("not within {PATIENCE:?}"))))
}

async fn connect(to: SocketAddr) -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

/// One request; whether the connection stays.
async fn ask(stream: &mut BufReader<TcpStream>, connection: &str) -> io::Result<bool> {
    let request = format!("GET / HTTP/1.1\r\nHost: shop\r\nConnection: {connection}\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes()).await?;
    let (mut length, mut stays, mut line) = (None, true, String::new());
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Err(io::Error::other("it ended before the answer"));
        }
        match line.trim_end().split_once(": ") {
            Some(("Content-Length", value)) => length = value.parse().ok(),
            Some(("Connection", value)) => stays = value == "keep-alive",
            None if line == "\r\n" => break,
            None if !line.starts_with("HTTP/1.1 200") => return Err(io::Error::other(line)),
            _ => {}
        }
    }
    let mut body = vec![0; length.ok_or_else(|| io::Error::other("an answer without length"))?];
    stream.read_exact(&mut body).await?;
    if body != crate::SECRET.as_bytes() {
        return Err(io::Error::other("another answer"));
    }
    Ok(stays)
}

/// Requests on connections that are kept for a while.
async fn kept(shared: Arc<Shared>, http: SocketAddr) {
    loop {
        let mut stream = None;
        for _ in 0..KEPT_REQUESTS {
            let asked = async {
                let open = match stream.take() {
                    Some(open) => open,
                    None => connect(http).await?,
                };
                let stays = ask(stream.insert(open), "keep-alive").await?;
                Ok(stays)
            };
            let answered = shared.asks(1, asked).await;
            if answered != Some(true) {
                stream = None;
            }
            sleep(if answered.is_some() { KEPT_EVERY } else { PAUSE }).await;
        }
    }
}

/// One connection that stays, and another when it has ended.
async fn long(shared: Arc<Shared>, number: usize, echo: SocketAddr) {
    sleep(LONG_EVERY.mul_f64(number as f64 / LONG as f64)).await;
    loop {
        let begun = Instant::now();
        let mut stream = match within(connect(echo)).await {
            Ok(stream) => stream,
            Err(error) => {
                shared
                    .seen()
                    .failed
                    .push(format!("opening one that echoes, after {:?}: {error}", begun.elapsed()));
                sleep(PAUSE).await;
                continue;
            }
        };
        let from = stream.get_ref().local_addr().unwrap();
        let ended = talk(&shared, number, &mut stream).await;
        shared.open().remove(&number);
        match ended {
            Ok(()) => shared.seen().left += 1,
            Err(error) => {
                let lost = Lost { from, age: begun.elapsed(), why: error.to_string() };
                shared.seen().lost.push(lost);
                sleep(PAUSE).await;
            }
        }
    }
}

/// Lines there and back; `Ok` when the application has said good-bye.
async fn talk(shared: &Shared, number: usize, stream: &mut BufReader<TcpStream>) -> io::Result<()> {
    for count in 0_u64.. {
        let next = tokio::time::Instant::now() + LONG_EVERY;
        let line = format!("{number} {count}\n");
        stream.get_mut().write_all(line.as_bytes()).await?;
        let mut back = vec![];
        within(stream.read_until(b'\n', &mut back)).await?;
        if back == BYE {
            return Ok(());
        }
        if back != line.as_bytes() {
            return Err(io::Error::other(match back.is_empty() {
                true => "it ended".to_owned(),
                false => format!("{line:?} came back as {:?}", String::from_utf8_lossy(&back)),
            }));
        }
        shared.open().insert(number, Instant::now());
        shared.seen().echoed += 1;
        let mut bye = vec![];
        // Cancel-safe enough: a word that has begun is the last one.
        tokio::select! {
            () = sleep_until(next) => {}
            read = stream.read_until(b'\n', &mut bye) => {
                read?;
                return match bye == BYE {
                    true => Ok(()),
                    false => Err(io::Error::other(format!("it ended: {:?}", String::from_utf8_lossy(&bye)))),
                };
            }
        }
    }
    Ok(())
}
