//! ★ The story of a connection. [`outbound`] and [`inbound`] tell it from top to bottom; every line there is a step
//! in a file with the step's name. `docs/LIFE_OF_A_CONNECTION.md` is the same story for readers.

mod hello;
mod identify;
mod inbound;
mod outbound;
mod preface;
mod requests;
mod routed;
mod server_name;
mod turn;

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::FutureExt;
use mesh_core::{refusal::Reason, view::Snapshot};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::Instant,
};

use crate::{
    balance::Balancer,
    connect::Connector,
    drain::Drain,
    identity::store::Identities,
    live::Connections,
    metrics::Metrics,
    net::socket,
    quota::{Quota, Share},
    record::{Entry, Recorder, Seen},
    refusal::{Refusal, Stop},
    relay::Carried,
    stalled::Stalled,
    threads::Threads,
    tunnel::{buffers::SIZE, pool::Pool},
    wake::seldom,
    wants::{self, Denied, Known, Wants},
};
pub use crate::{limits::Limits, local::Local, metrics::Direction};
use requests::{Routed, Upstreams};
use routed::Heard;
use turn::Turns;

/// A captured connection: what the kernel programs steered to the agent.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: TcpStream,
    /// Who opened it.
    pub peer: SocketAddr,
    /// What was asked for: the local address of the accepted socket.
    pub original: SocketAddr,
    /// Which way it goes.
    pub direction: Direction,
    /// The workload that it was captured at.
    pub workload: Arc<Local>,
}

/// What every connection needs of the node; cheap to clone.
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    view: watch::Receiver<Option<Arc<Snapshot>>>,
    recorder: Arc<Recorder>,
    connector: Connector,
    /// Connections by workload, whatever they are at.
    places: Arc<Quota<u64>>,
    turns: Arc<Turns>,
    /// Idle tunnels of other agents, by workload and source.
    idle: Arc<Quota<(u64, IpAddr)>>,
    stalled: Arc<Stalled>,
    /// Connections on which requests are sent.
    upstreams: Arc<Upstreams>,
    wants: Arc<Wants>,
    /// A descriptor that is kept for [`Node::refuse_one`].
    spare: Mutex<Option<File>>,
}

/// A view, and the word that an address of it is used, for as long as a connection is.
#[derive(Debug)]
struct Asked {
    view: Arc<Snapshot>,
    held: Option<wants::Held>,
}

/// A descriptor; `None` when even this one is not to be had.
fn descriptor() -> Option<File> {
    File::open("/dev/null").ok()
}

impl Node {
    /// A node of this name. Must be made on the runtime: it starts the task that looks after idle tunnels.
    pub fn new(
        name: String,
        Known { view, wants }: Known,
        identities: Arc<Identities>,
        metrics: Arc<Metrics>,
        Seen { log, spans }: Seen,
        limits: Limits,
        drain: Drain,
    ) -> Self {
        let pool = Pool::new(limits, metrics.clone());
        let upstreams = Arc::new(Upstreams::default());
        let (reaped, reaped_upstreams, stopping) = (pool.clone(), upstreams.clone(), drain.clone());
        drain.spawn(async move {
            tokio::select! {
                () = reaped.reap() => {}
                () = reaped_upstreams.reap(limits.idle_at_source) => {}
                () = stopping.draining() => {
                    reaped.stop();
                    reaped_upstreams.stop();
                }
            }
        });
        let connections = Arc::default();
        let recorder =
            Arc::new(Recorder { node: name.into(), metrics: metrics.clone(), log, spans, connections });
        let (balancer, underway) = (Balancer::new(), Arc::default());
        let connector = Connector { identities, pool, balancer, underway, limits, metrics, drain };
        let (places, turns, idle) = (Quota::new(), Turns::new(limits), Quota::new());
        let stalled = Arc::new(Stalled::new(limits.stalled_memory / SIZE));
        let spare = Mutex::new(descriptor());
        let inner =
            Inner { view, recorder, connector, places, turns, idle, stalled, upstreams, wants, spare };
        Self { inner: Arc::new(inner) }
    }

    /// Lets go of what is held for a workload whose enrolment ended: its idle tunnels, and with them its namespace.
    pub fn forget(&self, workload: &Local) {
        self.inner.connector.pool.forget(workload.id());
        self.inner.upstreams.forget(workload.id());
    }

    /// The connections that live now.
    pub fn connections(&self) -> &Arc<Connections> {
        &self.inner.recorder.connections
    }

    /// The drain under which [`spawn`] runs connections.
    pub fn drain(&self) -> &Drain {
        &self.inner.connector.drain
    }

    /// Takes a connection that waits in a listener although no descriptor is left, to end it at once: a client that is
    /// refused knows what it is at, one that waits does not. Whether there was one to take.
    pub(crate) fn refuse_one(
        &self,
        listener: &TcpListener,
        to_accepted: impl FnOnce(TcpStream, SocketAddr) -> Option<Accepted>,
    ) -> bool {
        // One at a time, as there is one descriptor for all. Others may be faster than we are, at either end.
        let mut spare = self.inner.spare.lock().unwrap_or_else(PoisonError::into_inner);
        drop(spare.take());
        let taken = listener.accept().now_or_never();
        let Some(Ok((stream, peer))) = taken else {
            *spare = descriptor();
            return false;
        };
        let Some(accepted) = to_accepted(stream, peer) else {
            *spare = descriptor();
            return true;
        };
        let Accepted { peer, original, direction, workload, .. } = &accepted;
        let entry = self.begin(*direction, workload, *peer, *original);
        socket::reset(accepted.stream);
        *spare = descriptor();
        drop(spare);
        entry.finish(Err(Refusal::new(Reason::LimitDescriptors, "the agent may open no more files").into()));
        true
    }

    /// A captured connection, which will be recorded.
    fn begin(
        &self,
        direction: Direction,
        workload: &Local,
        peer: SocketAddr,
        original: SocketAddr,
    ) -> Box<Entry> {
        let entry = self.inner.recorder.begin(direction, &workload.name);
        entry.told().source.address = Some(peer);
        entry.told().destination.address = Some(original);
        entry
    }

    /// A place for one more connection of this workload.
    fn place(&self, workload: &Local) -> Result<Box<Share<u64>>, Refusal> {
        let all = self.limits().connections_total;
        let place = self.inner.places.take_fair(workload.id(), all);
        place
            .map(Box::new)
            .ok_or_else(|| Refusal::new(Reason::LimitDescriptors, format!("of {all} for the node")))
    }

    /// Bytes that wait for readers who do not read.
    pub fn stalled(&self) -> &Arc<Stalled> {
        &self.inner.stalled
    }

    /// How the bytes of a connection between a workload and somebody elsewhere are carried.
    fn carried<'a>(&'a self, entry: &'a Entry, workload: &Local, peer: IpAddr) -> Carried<'a> {
        Carried {
            flow: entry.flow(),
            direction: entry.direction(),
            wait: self.limits().ready_wait,
            readers: self.stalled().readers(workload.id(), peer),
        }
    }

    fn view(&self) -> Result<Arc<Snapshot>, Reason> {
        self.inner.view.borrow().clone().ok_or(Reason::ViewMissing)
    }

    /// The view, once it says what this address is that a connection of this workload is to or from: waits for the
    /// controller's answer if need be, and if that does not come in time returns a view that does not know it.
    async fn ask(&self, workload: &Local, direction: Direction, address: IpAddr) -> Result<Asked, Reason> {
        let view = self.view()?;
        if !wants::is_asked_for(&view, address) {
            return Ok(Asked { view, held: None });
        }
        let limit = self.limits().answer_wait;
        let now = Instant::now();
        let deadline = self.inner.wants.away().map_or(now, |since| since.min(now)) + limit;
        let held = loop {
            match self.inner.wants.hold((workload.id(), direction), address) {
                Ok(held) => break Some(held),
                Err(_) if view.knows(address) => break None,
                Err(Denied::Later(wait)) if Instant::now() + wait < deadline => {
                    tokio::time::sleep(wait).await
                }
                Err(_) => {
                    self.inner.connector.metrics.limit_hit("addresses");
                    return Ok(Asked { view, held: None });
                }
            }
        };
        drop(view);
        let mut views = self.inner.view.clone();
        let known = views.wait_for(|view| view.as_ref().is_some_and(|view| view.knows(address)));
        // Nothing more to do at a timeout, or when nobody will change the view any more: what there is does not know it.
        let _ = tokio::time::timeout_at(deadline, known).await;
        Ok(Asked { view: self.view()?, held })
    }

    /// Goes on knowing of an address that a connection of this workload leads to, if that costs nobody anything.
    fn hold(&self, workload: &Local, view: &Snapshot, address: IpAddr) -> Option<wants::Held> {
        let asked = wants::is_asked_for(view, address);
        asked.then(|| self.inner.wants.hold((workload.id(), Direction::Outbound), address).ok()).flatten()
    }

    /// Done when a view says that a live connection may not go on. Looks at every view that comes, and first at the one
    /// that is in force, should it be newer than what the connection was decided on. Cancel-safe.
    async fn each_view(&self, may_go_on: impl Fn(&Snapshot) -> Result<(), Refusal>) -> Refusal {
        // Nobody has ever looked through this receiver, so its clone has not seen the newest view yet.
        let mut views = self.inner.view.clone();
        while views.changed().await.is_ok() {
            let view = views.borrow_and_update().clone();
            // An agent that lost its view decides on the last one.
            if let Some(Err(refusal)) = view.map(|view| may_go_on(&view)) {
                return refusal;
            }
        }
        // Nobody will change the view any more.
        std::future::pending().await
    }

    /// Done when a connection of this workload must end now, with the reason. Cancel-safe.
    async fn cut(&self, workload: &Local) -> Refusal {
        tokio::select! {
            () = self.drain().cut() => Reason::AgentStopping.into(),
            () = workload.leaving() => Reason::WorkloadLeft.into(),
        }
    }

    fn limits(&self) -> &Limits {
        &self.inner.connector.limits
    }
}

/// Carries a captured connection to its end, in a task of its own on one of these threads, and records how that was.
pub fn spawn(accepted: Accepted, node: &Node, threads: &Threads) {
    let place = threads.place();
    let _inside = place.enter();
    let Accepted { stream, peer, original, direction, workload } = accepted;
    let stream = match place.take(stream) {
        Ok(stream) => stream,
        Err(error) => {
            let entry = node.begin(direction, &workload, peer, original);
            return entry.finish(Err(Refusal::new(Reason::LimitDescriptors, error.to_string()).into()));
        }
    };
    let accepted = Accepted { stream, peer, original, direction, workload };
    let (drain, node) = (node.drain().clone(), node.clone());
    // A task of its own kind for each direction: one for both would be as large as the larger of the two.
    match direction {
        Direction::Outbound => drop(drain.spawn(async move {
            let _place = place;
            serve_outbound(accepted, node).await;
        })),
        Direction::Inbound => drop(drain.spawn(async move {
            let _place = place;
            serve_inbound(accepted, node).await;
        })),
    }
}

/// Carries a connection that a workload opens.
pub async fn serve_outbound(accepted: Accepted, node: Node) {
    let mut entry = node.begin(Direction::Outbound, &accepted.workload, accepted.peer, accepted.original);
    // The story may be cut anywhere: what it leaves behind is reset here.
    let result = tokio::select! {
        result = outbound(&accepted, &node, &mut entry) => result,
        refusal = seldom(node.cut(&accepted.workload)) => Err(refusal.into()),
    };
    match result {
        Ok(Some(routed)) => Box::pin(requests::serve(accepted, *routed, &node, entry)).await,
        Ok(None) => end(accepted.stream, *entry, Ok(())),
        Err(stop) => end(accepted.stream, *entry, Err(stop)),
    }
}

/// The story of a connection that a workload opens. It begins anew, as one of bytes, where these are encrypted between the
/// applications, so that there are no requests to be read; and once it was heard which name the client asks for, where
/// routes go by that. No view is held while a client is waited for. What is returned is for a connection of requests, which has
/// not ended yet.
async fn outbound(accepted: &Accepted, node: &Node, entry: &mut Entry) -> Result<Option<Box<Routed>>, Stop> {
    let mut heard = Heard::Nothing;
    loop {
        heard = match outbound::serve(accepted, node, entry, heard).await? {
            outbound::Next::Ended => return Ok(None),
            outbound::Next::Requests(routed) => {
                if !Box::pin(requests::are_hidden(&accepted.stream)).await {
                    return Ok(Some(routed));
                }
                drop(routed);
                Heard::Tls
            }
            outbound::Next::Hello(waiting) => {
                let limit = node.limits().handshake_timeout;
                let hello = Box::pin(hello::read(&accepted.stream, limit)).await?;
                drop(waiting);
                Heard::Hello(hello.into())
            }
        };
    }
}

/// Ends the application's side of a connection as the connection ended, and records it.
fn end(stream: TcpStream, entry: Entry, result: Result<(), Stop>) {
    if result.is_ok() {
        socket::close(stream);
    } else {
        socket::reset(stream);
    }
    entry.finish(result);
}

/// Carries what arrives at a workload: one connection, or a tunnel with one after another.
pub async fn serve_inbound(accepted: Accepted, node: Node) {
    inbound::serve(accepted, &node).await;
}
