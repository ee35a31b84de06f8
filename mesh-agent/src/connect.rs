//! The way to where a connection leads: a tunnel with both workloads' identities, or plaintext to what is outside of
//! the mesh; and, on the other node, the last hop to the application.
//!
//! A service's endpoint that cannot be reached is ejected and another one is tried, as long as nothing of the
//! connection was taken ([`crate::tunnel::lease`] has the rule).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    balance::How,
    frame::{Control, Open},
    identity::SpiffeId,
    model::{
        Endpoint, Name, Service, Workload,
        traffic::{Algorithm, HashBy, Traffic},
    },
    refusal::Reason,
    route::{self, Reached, Route, Transport},
    view::{Owner, Snapshot},
};
use tokio::{io::Interest, net::TcpStream};

use crate::{
    balance::{self, Attempt, Balancer, Client},
    drain::Drain,
    identity::{
        store::Identities,
        verify::{self, CertificateFault},
    },
    limits::Limits,
    local::Local,
    metrics::Metrics,
    net::{netns::Namespace, socket},
    record::Entry,
    refusal::{Failure, Refusal, Stop},
    tunnel::{
        Link, LinkError, Unverified,
        buffers::Buffer,
        lease::{self, NotOpened, Said},
        pool::{Key, Pool},
        read_some,
    },
    underway::{self, Underway},
};

/// First bytes that go with OPEN: with both frames' headers they fit into one TLS record.
pub(crate) const MAX_FIRST: usize = 16 * 1024 - 64;

/// Tunnels that are tried for one connection to one address: an idle one that was closed, and two new ones, should
/// the destination be closing tunnels as fast as they come.
const TUNNELS: u32 = 3;

/// What it takes to reach destinations; one per node.
#[derive(Debug, Clone)]
pub(crate) struct Connector {
    pub(crate) identities: Arc<Identities>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) balancer: Arc<Balancer>,
    pub(crate) underway: Arc<Underway>,
    pub(crate) limits: Limits,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) drain: Drain,
}

/// Who asks for a connection.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    /// The workload of this node.
    pub(crate) local: &'a Arc<Local>,
    /// Its identity.
    pub(crate) identity: &'a Arc<SpiffeId>,
    /// The application's connection, whose first bytes go along; `None` where the agent itself speaks.
    pub(crate) app: Option<&'a TcpStream>,
    /// Its own end, as the application knows it.
    pub(crate) address: SocketAddr,
    /// What it was decided on.
    pub(crate) view: &'a Snapshot,
}

/// A way that is open.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) way: Way,
    /// Counts as a connection of its endpoint for as long as it lives.
    pub(crate) attempt: Option<Box<Attempt>>,
}

/// How the destination was reached.
#[derive(Debug)]
pub(crate) enum Way {
    Tunnel(Lease),
    Plaintext(TcpStream),
}

/// A tunnel on lease to one connection.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) link: Box<Link>,
    key: Key,
}

/// Why one destination was not reached.
#[derive(Debug)]
pub(crate) enum Miss {
    /// It took nothing: another one may be tried.
    NotTaken(Refusal),
    /// That was it.
    Final(Stop),
}

impl From<Stop> for Miss {
    fn from(stop: Stop) -> Self {
        Self::Final(stop)
    }
}

impl Connector {
    /// Opens the way. What becomes known on it is written into the entry.
    /// `first`: bytes of the application that were read already.
    pub(crate) async fn open(
        &self,
        ask: &Ask<'_>,
        route: Route,
        mut first: First,
        entry: &mut Entry,
    ) -> Result<Opened, Stop> {
        match route {
            Route::Outside(to) => {
                entry.told().destination.address = Some(to);
                let opened = self.plaintext(ask, to, &mut first, entry).await;
                opened.map(|way| Opened { way, attempt: None }).map_err(Miss::stop)
            }
            Route::Workload(workload, to) => {
                let opened = self.reach(ask, &workload, to, &mut first, entry).await;
                opened.map(|way| Opened { way, attempt: None }).map_err(Miss::stop)
            }
            Route::Service { service, port, endpoints } => {
                // Unless another one was asked for, whose route leads to it.
                entry.told().destination.service.get_or_insert_with(|| service.name.clone());
                self.any_of(ask, (&service, port), &endpoints, &mut first, entry).await
            }
        }
    }

    async fn any_of(
        &self,
        ask: &Ask<'_>,
        (service, port): (&Service, u16),
        endpoints: &[Endpoint],
        first: &mut First,
        entry: &mut Entry,
    ) -> Result<Opened, Stop> {
        let mut untried: Vec<&Endpoint> = endpoints.iter().collect();
        let mut last = Refusal::from(Reason::NoEndpoint);
        let traffic = service.port(port).map(|it| &it.traffic);
        let source = balance::value_of(ask.address.ip());
        let how = self.how(service, port, traffic, &source);
        let stays = service.choice.affinity.map(|seconds| {
            let (local, address) = (ask.local.id(), ask.address.ip());
            let client = Client { local, address, service: service.name.clone(), port };
            (client, Duration::from_secs(seconds.into()))
        });
        for _ in 0..self.limits.endpoint_attempts {
            let picked = match &stays {
                Some((client, _)) => self.balancer.pick_for(client, &untried, how.ejection),
                None => self.balancer.pick(&untried, &how),
            };
            let Some((index, attempt)) = picked else { break };
            let endpoint = untried.swap_remove(index);
            let to = SocketAddr::new(endpoint.address, endpoint.port);
            let Some(reached) = route::reached(ask.view, endpoint) else { continue };
            match self.endpoint(ask, reached, to, first, entry).await {
                Ok(way) => {
                    attempt.connected();
                    if let Some((client, long)) = stays {
                        self.balancer.stays(client, &attempt, long);
                    }
                    return Ok(Opened { way, attempt: Some(Box::new(attempt)) });
                }
                Err(Miss::NotTaken(refusal)) => {
                    attempt.failed();
                    tracing::debug!(%to, %refusal, "an endpoint is ejected");
                    last = refusal;
                }
                Err(Miss::Final(stop)) => return Err(stop),
            }
        }
        Err(last.into())
    }

    /// A place among the connections to the service at an address, where a policy says how many there may be.
    pub(crate) fn room(
        &self,
        view: &Snapshot,
        to: SocketAddr,
    ) -> Result<Option<underway::Connection>, Refusal> {
        let Some(Owner::Service(service)) = view.owner(to.ip()) else { return Ok(None) };
        self.room_at(service, to.port())
    }

    /// The same at the service that a route leads to, unless that is the one that was asked for.
    pub(crate) fn room_behind(
        &self,
        route: &Route,
        asked: &Name,
        asked_port: u16,
    ) -> Result<Option<underway::Connection>, Refusal> {
        match route {
            Route::Service { service, port, .. } if (&service.name, *port) != (asked, asked_port) => {
                self.room_at(service, *port)
            }
            _ => Ok(None),
        }
    }

    fn room_at(&self, service: &Service, port: u16) -> Result<Option<underway::Connection>, Refusal> {
        let limits = service.port(port).and_then(|it| it.traffic.limits);
        let Some(most) = limits.and_then(|it| it.connections) else { return Ok(None) };
        self.underway.to(&service.name, port).connection(most).map(Some)
    }

    /// How an endpoint is chosen for what is not read.
    fn how<'a>(
        &self,
        service: &Service,
        port: u16,
        traffic: Option<&'a Traffic>,
        source: &'a [u8],
    ) -> How<'a> {
        let balancing = traffic.and_then(|it| it.balancing.as_ref());
        let algorithm = balancing.map(|it| &it.algorithm);
        How {
            balancing,
            ejection: traffic.and_then(|it| it.ejection.as_ref()),
            turn: match algorithm {
                Some(Algorithm::RoundRobin) => self.underway.to(&service.name, port).turn(),
                _ => 0,
            },
            value: (algorithm == Some(&Algorithm::Hash(HashBy::Source))).then_some(source),
        }
    }

    /// The way to an endpoint of which nothing has been asked yet.
    pub(crate) async fn open_endpoint(
        &self,
        ask: &Ask<'_>,
        reached: Reached,
        to: SocketAddr,
        entry: &mut Entry,
    ) -> Result<Way, Miss> {
        self.endpoint(ask, reached, to, &mut First::default(), entry).await
    }

    async fn endpoint(
        &self,
        ask: &Ask<'_>,
        reached: Reached,
        to: SocketAddr,
        first: &mut First,
        entry: &mut Entry,
    ) -> Result<Way, Miss> {
        match reached {
            Reached::Workload(workload) => self.reach(ask, &workload, to, first, entry).await,
            Reached::Outside => {
                // What an endpoint that was tried before had for a name is not this one's.
                entry.told().destination.workload = None;
                entry.told().destination.identity = None;
                entry.told().destination.address = Some(to);
                self.plaintext(ask, to, first, entry).await
            }
        }
    }

    async fn reach(
        &self,
        ask: &Ask<'_>,
        workload: &Workload,
        to: SocketAddr,
        first: &mut First,
        entry: &mut Entry,
    ) -> Result<Way, Miss> {
        entry.told().destination.workload = Some(workload.name.clone());
        entry.told().destination.address = Some(to);
        if workload.name == ask.local.name {
            // To itself, by a service's address: within its pod, where nothing is captured and nobody else is.
            return self.plaintext(ask, to, first, entry).await;
        }
        match route::transport(workload).map_err(|reason| Miss::NotTaken(reason.into()))? {
            Transport::Tunnel => {
                let peer = ask
                    .view
                    .identity(&workload.name)
                    .ok_or_else(|| Miss::NotTaken(Reason::NoEndpoint.into()))?;
                entry.told().destination.identity = Some(peer.clone());
                entry.told().transport = Some(Transport::Tunnel);
                self.tunnel(ask, peer, to, first, entry).await.map(Way::Tunnel)
            }
            Transport::Plaintext => self.plaintext(ask, to, first, entry).await,
        }
    }

    async fn plaintext(
        &self,
        ask: &Ask<'_>,
        to: SocketAddr,
        first: &mut First,
        entry: &mut Entry,
    ) -> Result<Way, Miss> {
        entry.told().transport = Some(Transport::Plaintext);
        let dial = socket::dial(&ask.local.namespace, to, self.limits.dial_timeout);
        let stream = until_reset(ask.app, dial).await?.map_err(|e| Miss::NotTaken(dial_refusal(&e, to)))?;
        // Only there when a tunnel to another endpoint was tried before, or when they said where it leads.
        let mut rest = first.bytes();
        while !rest.is_empty() {
            let broken = |_| Stop::from(Failure::DestinationReset);
            stream.writable().await.map_err(broken)?;
            match stream.try_write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(broken(error).into()),
            }
        }
        entry.flow().sent(first.bytes().len());
        Ok(Way::Plaintext(stream))
    }

    /// A lease: on an idle tunnel if there is one, else on a new one; on another new one while tunnels turn out to be
    /// closed before they took anything.
    async fn tunnel(
        &self,
        ask: &Ask<'_>,
        peer: &Arc<SpiffeId>,
        to: SocketAddr,
        first: &mut First,
        entry: &mut Entry,
    ) -> Result<Lease, Miss> {
        let key = Key { local: ask.local.id(), destination: to };
        let mut idle = self.pool.checkout(key, ask.identity, peer, &ask.view.mesh().roots);
        self.dial_spare(key, ask, peer);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let link = match idle.take() {
                Some(link) => {
                    // Lets an application that speaks right after connect get its bytes in.
                    tokio::task::yield_now().await;
                    link
                }
                None => {
                    let dial = dial(self.clone(), ask.local.clone(), ask.identity.clone(), peer.clone(), to);
                    until_reset(ask.app, Box::pin(dial)).await?.map_err(Miss::NotTaken)?
                }
            };
            match self.lease(link, key, ask, first, entry).await {
                Err(Miss::NotTaken(refusal)) if refusal.reason == Reason::PeerLost && attempt < TUNNELS => {
                    tracing::debug!(%to, %refusal, "a tunnel was closed before it took anything, a new one is tried");
                }
                other => return other,
            }
        }
    }

    async fn lease(
        &self,
        mut link: Box<Link>,
        key: Key,
        ask: &Ask<'_>,
        first: &mut First,
        entry: &mut Entry,
    ) -> Result<Lease, Miss> {
        if let Some(app) = ask.app {
            first.read(app).map_err(|_| Stop::from(Failure::SourceReset))?;
        }
        let open = Open { source: ask.address, port: key.destination.port() };
        let asked = lease::open(&mut link, open, first.bytes());
        let asked = tokio::time::timeout(self.limits.open_timeout, until_reset(ask.app, asked)).await;
        let nothing_said = Said { own_end: false, peer_end: false };
        match asked {
            Ok(Ok(Ok(()))) => {
                entry.flow().sent(first.bytes().len());
                first.clear();
                Ok(Lease { link, key })
            }
            Ok(Ok(Err(NotOpened::NotTaken(error)))) => {
                Err(Miss::NotTaken(Refusal::new(Reason::PeerLost, error.to_string())))
            }
            Ok(Ok(Err(NotOpened::MaybeTaken(error)))) => {
                let reason = error.breach().unwrap_or(Reason::PeerLost);
                Err(Stop::from(Refusal::new(reason, error.to_string())).into())
            }
            Ok(Ok(Err(NotOpened::Refused(reason)))) => {
                if reason == Some(Reason::DialRefused) {
                    // Nobody listens there. An idle tunnel would hold the port, and an application that starts
                    // without SO_REUSEADDR could not bind it.
                    link.retire();
                    self.pool.abandon(&key);
                } else {
                    self.settle(Lease { link, key }, nothing_said);
                }
                Err(refused(reason))
            }
            Ok(Err(stop)) => {
                self.settle(Lease { link, key }, nothing_said);
                Err(stop.into())
            }
            Err(_) => {
                let detail = format!("no answer to OPEN within {:?}", self.limits.open_timeout);
                Err(Stop::from(Refusal::new(Reason::PeerLost, detail)).into())
            }
        }
    }

    /// Ends a lease in the background; the tunnel is idle again once the peer is READY.
    pub(crate) fn settle(&self, lease: Lease, said: Said) {
        let (pool, wait) = (self.pool.clone(), self.limits.ready_wait);
        self.drain.spawn(async move {
            if let Ok(link) = lease::settle(lease.link, said, wait).await {
                pool.put(lease.key, link);
            }
        });
    }

    /// Ends a lease that its destination has ended before us: whether that says that nothing was taken which it has not answered.
    pub(crate) async fn took_none(self, lease: Lease, said: Said) -> bool {
        let Lease { link, key } = lease;
        if !said.own_end && link.push(&Control::Fin).is_err() {
            return false;
        }
        match lease::settle(link, Said { own_end: true, ..said }, self.limits.ready_wait).await {
            Ok(link) => {
                self.pool.put(key, link);
                false
            }
            Err(error) => matches!(error, LinkError::Closed),
        }
    }

    fn dial_spare(&self, key: Key, ask: &Ask<'_>, peer: &Arc<SpiffeId>) {
        let Some(spare) = self.pool.wants_spare(key) else { return };
        let dial = dial(self.clone(), ask.local.clone(), ask.identity.clone(), peer.clone(), key.destination);
        let pool = self.pool.clone();
        self.drain.spawn(async move {
            match dial.await {
                Ok(link) => pool.put(key, link),
                Err(refusal) => tracing::debug!(%refusal, "no spare tunnel"),
            }
            drop(spare);
        });
    }
}

/// A new tunnel, from inside the source's namespace, to the workload that has this identity and no other.
async fn dial(
    connector: Connector,
    local: Arc<Local>,
    own: Arc<SpiffeId>,
    peer: Arc<SpiffeId>,
    to: SocketAddr,
) -> Result<Box<Link>, Refusal> {
    let trust = connector.identities.trust(&own)?;
    let config = connector.identities.client(&own)?;
    let limits = &connector.limits;
    let tcp =
        socket::dial(&local.namespace, to, limits.dial_timeout).await.map_err(|e| dial_refusal(&e, to))?;
    let handshake = Unverified::connect(tcp, config, to.ip());
    let new =
        timed(handshake, limits.handshake_timeout, &connector.metrics).await.map_err(
            |error| match error {
                None => Refusal::from(Reason::PeerHandshakeTimeout),
                Some(error) => {
                    let fault = certificate_fault(&error).map(CertificateFault::of_destination);
                    let reason = fault.unwrap_or(Reason::PeerHandshakeFailed);
                    Refusal::new(reason, format!("{to}: {error}"))
                }
            },
        )?;
    let proved = verify::peer_identity(Some(new.certificates()))
        .map_err(|error| Refusal::new(Reason::PeerCertificateIdentity, format!("{to}: {error}")))?;
    if proved != *peer {
        let detail = format!("{to} proved {proved}, the view has {peer}");
        return Err(Refusal::new(Reason::PeerIdentityMismatch, detail));
    }
    let until = verify::peer_until(Some(new.certificates()));
    let led = connector.identities.led(&trust, new.certificates());
    Ok(new.between(own, proved, until, led, &connector.metrics))
}

/// What is wrong with the peer's certificate, if that ended a handshake.
fn certificate_fault(error: &LinkError) -> Option<CertificateFault> {
    match error {
        LinkError::Tls(error) => CertificateFault::of(error),
        _ => None,
    }
}

/// The destination's side of a tunnel: its handshake, and whoever the certificate says.
pub(crate) async fn take(
    tcp: TcpStream,
    own: Arc<SpiffeId>,
    identities: &Identities,
    limits: &Limits,
    metrics: &Metrics,
) -> Result<Box<Link>, Refusal> {
    let trust = identities.trust(&own)?;
    let config = identities.server(&own)?;
    let handshake = Unverified::accept(tcp, config);
    let new = timed(handshake, limits.handshake_timeout, metrics).await.map_err(|error| match error {
        None => Refusal::from(Reason::HandshakeTimeout),
        Some(error) => {
            let fault = certificate_fault(&error).map(CertificateFault::of_source);
            Refusal::new(fault.unwrap_or(Reason::HandshakeFailed), error.to_string())
        }
    })?;
    let proved = verify::peer_identity(Some(new.certificates()))
        .map_err(|error| Refusal::new(Reason::CertificateIdentity, error.to_string()))?;
    let until = verify::peer_until(Some(new.certificates()));
    let led = identities.led(&trust, new.certificates());
    Ok(new.between(own, proved, until, led, metrics))
}

/// The last hop: to the application, inside its namespace, with the client's address.
pub(crate) async fn application(
    namespace: &Namespace,
    client: IpAddr,
    to: SocketAddr,
    timeout: Duration,
) -> Result<TcpStream, Refusal> {
    socket::dial_as(namespace, client, to, timeout).await.map_err(|error| dial_refusal(&error, to))
}

async fn timed(
    handshake: impl Future<Output = Result<Unverified, LinkError>>,
    limit: Duration,
    metrics: &Metrics,
) -> Result<Unverified, Option<LinkError>> {
    let (label, result) = match tokio::time::timeout(limit, handshake).await {
        Ok(Ok(new)) => ("ok", Ok(new)),
        Ok(Err(error)) => ("failed", Err(Some(error))),
        Err(_) => ("timeout", Err(None)),
    };
    metrics.handshake(label);
    result
}

/// Waits for something on behalf of an application, unless that resets its connection meanwhile.
async fn until_reset<T>(app: Option<&TcpStream>, work: impl Future<Output = T>) -> Result<T, Stop> {
    let Some(app) = app else { return Ok(work.await) };
    tokio::select! {
        biased;
        done = work => Ok(done),
        // An error of the wait itself means that the runtime stops.
        _ = app.ready(Interest::ERROR) => Err(Failure::SourceReset.into()),
    }
}

fn dial_refusal(error: &io::Error, to: SocketAddr) -> Refusal {
    let reason = match error.kind() {
        io::ErrorKind::ConnectionRefused => Reason::DialRefused,
        io::ErrorKind::TimedOut => Reason::DialTimeout,
        _ if socket::is_shortage(error) => Reason::LimitDescriptors,
        _ => Reason::DialFailed,
    };
    Refusal::new(reason, format!("{to}: {error}"))
}

/// What the destination's no means here: its own dial's failure counts as ours, for it is the same to the
/// application and to the endpoint's ejection; anything else is the destination's to explain.
fn refused(reason: Option<Reason>) -> Miss {
    let label = reason.map_or("an unknown reason", Reason::label);
    match reason {
        Some(reason @ (Reason::DialRefused | Reason::DialTimeout | Reason::DialFailed)) => {
            Miss::NotTaken(Refusal::new(reason, "said by the destination's agent"))
        }
        Some(
            Reason::LimitConnections
            | Reason::AgentStopping
            | Reason::ViewMissing
            | Reason::DestinationUnknown
            | Reason::SourceUnanswered,
        ) => Miss::NotTaken(Refusal::new(Reason::PeerRefused, label)),
        _ => Miss::Final(Refusal::new(Reason::PeerRefused, label).into()),
    }
}

impl Miss {
    pub(crate) fn stop(self) -> Stop {
        match self {
            Self::NotTaken(refusal) => refusal.into(),
            Self::Final(stop) => stop,
        }
    }
}

/// The first bytes of the application, kept until somebody took them.
#[derive(Debug, Default)]
pub(crate) struct First {
    buffer: Option<Buffer>,
    len: usize,
}

impl First {
    /// Bytes that were read already, [`MAX_FIRST`] at most.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let len = bytes.len().min(MAX_FIRST);
        let mut buffer = Buffer::take();
        buffer[..len].copy_from_slice(&bytes[..len]);
        Self { buffer: Some(buffer), len }
    }

    /// Reads what is there, once.
    fn read(&mut self, app: &TcpStream) -> io::Result<()> {
        if self.len > 0 {
            return Ok(());
        }
        let mut buffer = Buffer::take();
        match read_some(app, &mut buffer[..MAX_FIRST]) {
            // The end comes again when the relay reads.
            Ok(0) => Ok(()),
            Ok(n) => {
                self.len = n;
                self.buffer = Some(buffer);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[..self.len])
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}
