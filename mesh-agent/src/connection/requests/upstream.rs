//! Connections to backends on which requests are sent, one after another or many at once, and those that are idle.
//!
//! Each belongs to one workload of this node, whose identity it has, and leads to one endpoint: a request of another
//! workload is never sent on it. A request is given back if it was certainly not taken, so that it can be sent again.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use http::{Request, Response, Version};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::{
    identity::SpiffeId,
    model::{Endpoint, Name},
    refusal::Reason,
    route::{self, Reached},
    view::Snapshot,
};

use tokio::sync::Notify;

use super::{
    super::{Node, outbound},
    body::{Body, Coming},
    line::Line,
    one::{One, unsent},
    settings::{self, FirstFrame, Takes},
    stream::{self, Upstream},
    websocket::{self, Way},
    within::Within,
};
use crate::{
    balance::Attempt,
    connect::{Ask, Miss},
    local::Local,
    metrics::{Direction, Metrics},
    record::Entry,
    refusal::Refusal,
    threads,
    trust::Led,
    underway::Place,
    wake::seldom,
};

/// Idle connections for one workload to one endpoint.
const IDLE_PER_KEY: usize = 64;
/// Requests on one connection of HTTP/2 before another is opened.
const STREAMS: usize = 100;
/// How often idle connections are looked through.
const REAP: Duration = Duration::from_secs(5);
/// What of an answer's head is read at most; hyper's smallest is 8 KiB.
const HEAD: usize = 128 * 1024;
/// What one stream of HTTP/2 may send before it is read.
const WINDOW: u32 = 256 << 10;
/// What all of a connection may: what its streams may, so that those whose clients do not read hold up no other.
const CONNECTION_WINDOW: u32 = WINDOW * STREAMS as u32;

/// The connections of this node's workloads to backends.
#[derive(Debug)]
pub(in super::super) struct Upstreams {
    of: Mutex<HashMap<Key, Of>>,
    /// Set before what is kept is dropped for the last time: looked at with that locked.
    stopped: AtomicBool,
    watch: Arc<Watch>,
    /// Of the same.
    waker: Waker,
}

/// Is woken when something comes by an idle connection: as a rule its end.
#[derive(Debug, Default)]
struct Watch(Notify);

impl Wake for Watch {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

/// Whose a connection is, and where it leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    local: u64,
    to: SocketAddr,
    own: Arc<SpiffeId>,
    /// The identity that the endpoint has; `None`: it is outside of the mesh.
    peer: Option<Arc<SpiffeId>>,
}

#[derive(Debug, Default)]
struct Of {
    idle: Vec<Idle>,
    shared: Vec<Shared>,
    /// One at a time opens another, so that those who come together share it.
    opening: Arc<tokio::sync::Mutex<()>>,
}

/// A connection whose answer has ended.
#[derive(Debug)]
struct Idle {
    one: One,
    since: Instant,
    /// The thread that used it last.
    thread: Option<usize>,
}

/// A connection that carries many requests at once.
#[derive(Debug, Clone)]
struct Shared {
    sender: http2::SendRequest<Body>,
    /// The thread that runs it.
    thread: Option<usize>,
    streams: Arc<AtomicUsize>,
    /// How many the other end takes at once, as far as it has said.
    most: Arc<AtomicUsize>,
    used: Arc<Mutex<Instant>>,
    takes: Takes,
}

/// What a request is sent on.
#[derive(Debug)]
enum Sender {
    One(One),
    Shared(Stream),
}

/// A request's place on a connection that carries many.
#[derive(Debug)]
struct Stream(Shared);

impl Stream {
    fn of(shared: Shared) -> Self {
        shared.streams.fetch_add(1, Ordering::Relaxed);
        Self(shared)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
        *self.0.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// A connection after its answer's head.
#[derive(Debug)]
pub(in crate::connection) struct Used {
    sender: Option<Sender>,
    key: Key,
    upstreams: Arc<Upstreams>,
    counted: Option<Box<Counted>>,
}

/// What an answer counts as until it has ended.
#[derive(Debug)]
pub(super) struct Counted {
    /// A load of its endpoint.
    pub(super) attempt: Attempt,
    /// One of the requests to the service, where a policy says how many there may be.
    pub(super) _place: Option<Place>,
    pub(super) service: Name,
    pub(super) metrics: Arc<Metrics>,
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asking<'a> {
    pub(super) node: &'a Node,
    pub(super) local: &'a Arc<Local>,
    pub(super) own: &'a Arc<SpiffeId>,
    /// The application's own end.
    pub(super) address: SocketAddr,
    pub(super) view: &'a Snapshot,
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// The backend took nothing; the request.
    NotSent(Box<Request<Body>>, Refusal),
    /// The backend said that it has not looked at the request, and never will; what was sent of it is gone.
    Declined(Refusal),
    /// The connection broke, and the backend may have taken the request.
    Broke(Refusal),
}

impl Default for Upstreams {
    fn default() -> Self {
        let watch = Arc::<Watch>::default();
        Self {
            of: Mutex::default(),
            stopped: AtomicBool::new(false),
            waker: Waker::from(watch.clone()),
            watch,
        }
    }
}

impl Upstreams {
    /// Sends a request to an endpoint, and waits for the head of its answer.
    pub(super) async fn send(
        self: &Arc<Self>,
        from: Asking<'_>,
        endpoint: &Endpoint,
        mut request: Request<Body>,
    ) -> Result<(Response<Coming>, Used), Unanswered> {
        let to = SocketAddr::new(endpoint.address, endpoint.port);
        let Some(reached) = route::reached(from.view, endpoint) else {
            let nobody = Refusal::new(Reason::NoEndpoint, format!("who is at {to} cannot be told"));
            return Err(Unanswered::NotSent(request.into(), nobody));
        };
        let peer = match &reached {
            Reached::Workload(workload) => from.view.identity(&workload.name).cloned(),
            Reached::Outside => None,
        };
        let key = Key { local: from.local.id(), to, own: from.own.clone(), peer };
        let extended = websocket::is_extended(&request);
        let mut many = request.version() == Version::HTTP_2;
        let mut way = Way::Stream;
        // Its server may end an idle connection just when this is sent, and nobody could say that it was not taken.
        let limits = from.node.limits();
        let longest = if request.method().is_safe() { Duration::MAX } else { limits.unsafe_after_idle };
        let idle = (limits.lent_after_idle, longest);
        loop {
            let (sender, fresh) = match self.checkout(&key, many, idle).await {
                Some(sender) => (sender, false),
                None => match self.open(&key, from, reached.clone(), many).await {
                    Ok(sender) => (sender, true),
                    Err(refusal) => return Err(Unanswered::NotSent(request.into(), refusal)),
                },
            };
            if extended && let Sender::Shared(stream) = &sender {
                if !stream.0.takes.clone().websockets().await {
                    (way, many) = (websocket::as_upgrade(&mut request, rand::random()), false);
                    continue;
                }
                way = websocket::as_stream(&mut request);
            }
            match sender.send(request).await {
                Ok((mut response, sender)) => {
                    if extended {
                        websocket::answered(&mut response, &way);
                    }
                    return Ok((
                        response.map(Coming::from),
                        Used { sender: Some(sender), key, upstreams: self.clone(), counted: None },
                    ));
                }
                // One that was closed while it was idle: the next one may be open, and a new one is.
                Err((Some(unsent), _)) if !fresh => request = *unsent,
                Err((Some(unsent), error)) => {
                    return Err(Unanswered::NotSent(unsent, broke(to, &error)));
                }
                Err((None, error)) if is_declined(&error) => {
                    return Err(Unanswered::Declined(broke(to, &error)));
                }
                Err((None, error)) => return Err(Unanswered::Broke(broke(to, &error))),
            }
        }
    }

    async fn checkout(&self, key: &Key, many: bool, idle: (Duration, Duration)) -> Option<Sender> {
        if many {
            return self.of(key, Of::shared).flatten().map(|shared| Sender::Shared(Stream::of(shared)));
        }
        loop {
            let mut one = self.of(key, |of| of.idle(idle)).flatten()?;
            // As a rule it is; a moment after an answer's end its connection may not have noticed yet.
            if one.is_ready().await {
                return Some(Sender::One(one));
            }
        }
    }

    async fn open(
        self: &Arc<Self>,
        key: &Key,
        from: Asking<'_>,
        reached: Reached,
        many: bool,
    ) -> Result<Sender, Refusal> {
        let opening = self.lock().entry(key.clone()).or_default().opening.clone();
        let _turn = if many { Some(opening.lock().await) } else { None };
        if many && let Some(shared) = self.of(key, Of::shared).flatten() {
            return Ok(Sender::Shared(Stream::of(shared)));
        }
        let opened = Opened::new(key.to, from, reached).await?;
        if many {
            let shared = opened.shared(from).await?;
            self.keep(key, |of| of.shared.push(shared.clone()));
            return Ok(Sender::Shared(Stream::of(shared)));
        }
        opened.one(from).await.map(Sender::One)
    }

    fn of<T>(&self, key: &Key, look: impl FnOnce(&mut Of) -> T) -> Option<T> {
        self.lock().get_mut(key).map(look)
    }

    /// Puts something among what is kept, unless nothing is.
    fn keep(&self, key: &Key, put: impl FnOnce(&mut Of)) {
        let mut all = self.lock();
        if !self.stopped.load(Ordering::Acquire) {
            put(all.entry(key.clone()).or_default());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Of>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes what was idle for too long, until dropped.
    pub(in super::super) async fn reap(&self, idle: Duration) {
        let mut timer = tokio::time::interval(REAP);
        loop {
            tokio::select! {
                _ = timer.tick() => {}
                () = self.watch.0.notified() => {}
            }
            self.lock().retain(|_, of| {
                of.idle.retain_mut(|it| it.is_good(&self.waker) && it.since.elapsed() < idle);
                of.shared.retain(|shared| !shared.is_idle(idle));
                !of.idle.is_empty() || !of.shared.is_empty() || Arc::strong_count(&of.opening) > 1
            });
        }
    }

    /// Closes what is idle, and keeps nothing any more; what is in use ends when it is done.
    pub(in super::super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.lock().clear();
    }

    /// Closes what is held for a workload that leaves.
    pub(in super::super) fn forget(&self, local: u64) {
        self.lock().retain(|key, _| key.local != local);
    }
}

impl Idle {
    /// Whether it can be used again. What has come by it is looked at.
    fn is_good(&mut self, watch: &Waker) -> bool {
        if self.one.is_rung() { self.one.rest(watch) } else { !self.one.is_closed() }
    }
}

impl Of {
    /// The one that this thread used last, or else one that its own did without for so long, if it has not been idle for longer than
    /// it may. Not one that still sends: whoever took it would wait for another client's body.
    fn idle(&mut self, (lent_after, longest): (Duration, Duration)) -> Option<One> {
        let may = |it: &Idle, shortest: Duration| {
            it.one.has_sent_all() && (shortest..=longest).contains(&it.since.elapsed())
        };
        let own = threads::own();
        let of_own = self.idle.iter().rposition(|it| it.thread == own && may(it, Duration::ZERO));
        let last = of_own.or_else(|| self.idle.iter().rposition(|it| may(it, lent_after)))?;
        Some(self.idle.remove(last).one)
    }

    /// Of those of this thread that can take more, the one with the fewest requests.
    fn shared(&mut self) -> Option<Shared> {
        self.shared.retain(|shared| !shared.sender.is_closed());
        let own = threads::own();
        let free = self.shared.iter().filter(|shared| shared.thread == own && shared.takes_more());
        free.min_by_key(|shared| shared.streams.load(Ordering::Relaxed)).cloned()
    }
}

impl Shared {
    fn takes_more(&self) -> bool {
        let most = self.most.load(Ordering::Relaxed).clamp(1, STREAMS);
        self.streams.load(Ordering::Relaxed) < most
    }

    fn is_idle(&self, long: Duration) -> bool {
        let used = *self.used.lock().unwrap_or_else(PoisonError::into_inner);
        self.sender.is_closed() || (self.streams.load(Ordering::Relaxed) == 0 && used.elapsed() >= long)
    }
}

impl Sender {
    /// The answer's head, and itself; or the request, if it was not sent.
    async fn send(
        self,
        request: Request<Body>,
    ) -> Result<(Response<Incoming>, Self), (Option<Box<Request<Body>>>, hyper::Error)> {
        match self {
            Self::One(mut one) => {
                let response = one.send(request).await?;
                Ok((response, Self::One(one)))
            }
            Self::Shared(mut stream) => {
                let response = stream.0.sender.try_send_request(request).await.map_err(unsent)?;
                Ok((response, Self::Shared(stream)))
            }
        }
    }
}

impl Used {
    /// The same, which counts until its end.
    pub(super) fn counting(self, counted: Counted) -> Self {
        Self { counted: Some(Box::new(counted)), ..self }
    }

    /// The same, of whose answer nothing counts any more.
    pub(super) fn uncounted(self) -> Self {
        Self { counted: None, ..self }
    }

    /// The answer has ended, as its endpoint's success or failure.
    pub(super) fn ended(&self, failed: bool) {
        if let Some(Counted { attempt, service, metrics, .. }) = self.counted.as_deref()
            && let Some(cause) = attempt.answered(failed)
        {
            metrics.ejected(service, cause);
        }
    }

    /// Polls what of the answer is still to come, and the connection that it comes by.
    pub(super) fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut waits: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        match &mut self.sender {
            Some(Sender::One(one)) => one.poll(cx, waits),
            Some(Sender::Shared(_)) | None => waits(cx),
        }
    }

    /// The same, of which the answer comes though nobody polls the connection by [`Used::poll`].
    pub(super) fn stand_alone(mut self) -> Self {
        if let Some(Sender::One(one)) = &mut self.sender {
            one.stand_alone();
        }
        self
    }

    /// The answer has ended well: another request can be sent.
    pub(super) fn give_back(mut self) {
        if let Some(Sender::One(mut one)) = self.sender.take()
            && one.rest(&self.upstreams.waker)
        {
            self.upstreams.keep(&self.key, |of| {
                if of.idle.len() < IDLE_PER_KEY {
                    of.idle.push(Idle { one, since: Instant::now(), thread: threads::own() });
                }
            });
        }
    }
}

/// A way that is open, before it is spoken on.
struct Opened {
    stream: Upstream,
    entry: Box<Entry>,
    led: Option<Led>,
}

impl Opened {
    async fn new(to: SocketAddr, from: Asking<'_>, reached: Reached) -> Result<Self, Refusal> {
        let connector = &from.node.inner.connector;
        let mut entry = from.node.inner.recorder.begin(Direction::Outbound, &from.local.name);
        {
            let mut told = entry.told();
            told.source.workload = Some(from.local.name.clone());
            told.source.identity = Some(from.own.clone());
            told.source.address = Some(from.address);
        }
        let ask =
            Ask { local: from.local, identity: from.own, app: None, address: from.address, view: from.view };
        match Box::pin(connector.open_endpoint(&ask, reached, to, &mut entry)).await {
            Ok(way) => {
                entry.opened();
                let led = match &way {
                    crate::connect::Way::Tunnel(lease) => Some(lease.link.led().clone()),
                    crate::connect::Way::Plaintext(_) => None,
                };
                Ok(Self { stream: Upstream::new(way, connector), entry, led })
            }
            Err(miss) => {
                entry.withdraw();
                Err(match miss {
                    Miss::NotTaken(refusal) => refusal,
                    Miss::Final(crate::refusal::Stop::Refused(refusal)) => refusal,
                    Miss::Final(crate::refusal::Stop::Failed(failure)) => {
                        Refusal::new(Reason::BackendReset, failure.to_string())
                    }
                })
            }
        }
    }

    async fn one(self, from: Asking<'_>) -> Result<One, Refusal> {
        let Self { stream, entry, led } = self;
        let owed = stream.owed();
        let (stream, line) = Line::over(stream);
        let (sender, connection) = http1().handshake(TokioIo::new(stream)).await.map_err(unspoken)?;
        drive(line.until_gone(std::future::ready(Ok(()))), from, entry, led);
        Ok(One::new(sender, connection, owed))
    }

    async fn shared(self, from: Asking<'_>) -> Result<Shared, Refusal> {
        let Self { stream, entry, led } = self;
        let (stream, line) = Line::over(stream);
        let (stream, taken_in) = FirstFrame::of(stream);
        let within = Within::default();
        let builder = http2(within.clone());
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(unspoken)?;
        let most = Arc::new(AtomicUsize::new(STREAMS));
        let told = most.clone();
        let (connection, takes) = settings::told(connection, taken_in, move |connection| {
            told.store(connection.current_max_send_streams(), Ordering::Relaxed);
        });
        let connection = line.until_gone(within.run(connection));
        drive(connection, from, entry, led);
        let used = Arc::new(Mutex::new(Instant::now()));
        Ok(Shared { sender, thread: threads::own(), streams: Arc::default(), most, used, takes })
    }
}

/// Waits until a connection ends, or may not go on.
fn drive(
    connection: impl Future<Output = Result<(), hyper::Error>> + Send + 'static,
    from: Asking<'_>,
    entry: Box<Entry>,
    led: Option<Led>,
) {
    let (node, local) = (from.node.clone(), from.local.clone());
    let place = local.admit(usize::MAX);
    from.node.drain().spawn(async move {
        let _place = place;
        let ended = tokio::select! {
            ended = connection => ended.map_err(|error| error.to_string()),
            refusal = seldom(node.each_view(|view| {
                outbound::stays_trusted(view, led.as_ref())?;
                outbound::goes_on(view, &local.name, &entry)
            })) => Err(refusal.to_string()),
            refusal = seldom(node.cut(&local)) => Err(refusal.to_string()),
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection to a backend ended");
        }
        entry.withdraw();
    });
}

/// How HTTP/1.1 is spoken to a backend, or to an application of this node.
pub(in crate::connection) fn http1() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.preserve_header_case(true).max_buf_size(HEAD);
    builder
}

/// How HTTP/2 is, with what runs the connection itself.
pub(in crate::connection) fn http2<E: Clone>(executor: E) -> http2::Builder<E> {
    let mut builder = http2::Builder::new(executor);
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEAD as u32);
    builder
}

/// The other end does not speak it.
pub(in crate::connection) fn unspoken(error: hyper::Error) -> Refusal {
    Refusal::new(Reason::BackendReset, error.to_string())
}

/// Whether a server has said of a request that it was not processed in any way: of a stream by a GOAWAY without an error, which ends
/// those above the last one that it names and no others, or by REFUSED_STREAM (RFC 9113, sections 6.8 and 8.7); or its agent
/// has, by the end of the tunnel.
pub(in crate::connection) fn is_declined(error: &hyper::Error) -> bool {
    let mut causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.any(|cause| {
        let of_stream = cause.downcast_ref::<h2::Error>().is_some_and(|error| {
            let leaves = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
            let refuses = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
            error.is_remote() && (leaves || refuses)
        });
        of_stream || stream::is_closed(cause)
    })
}

/// A connection to a backend broke, and with it what was under way.
pub(super) fn broke(to: SocketAddr, error: &hyper::Error) -> Refusal {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Refusal::new(Reason::BackendReset, format!("{to}: {error}{cause}"))
}
