//! Two nodes in one process, over loopback: real TCP, real TLS, no kernel programs. Small accept loops stand for the
//! capture: they say what the original destination was.
//!
//! | address | what |
//! |---|---|
//! | 127.0.1.1 | the client workload; its agent's tunnels come from 127.0.0.1, as loopback chooses |
//! | 127.0.2.1, 127.0.4.1 | server workloads `web` and `api`: inbound capture listens there |
//! | 127.0.3.1, 127.0.5.1 | where their applications really listen, on the same port |
//! | 127.0.9.9 | a stranger |

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use mesh_agent::{
    access_log::AccessLog,
    config::LogMode,
    connection::{Accepted, Direction, Limits, Local, Node, spawn},
    drain::Drain,
    identity::store::Identities,
    metrics::{ConnectionLabels, Metrics},
    net::netns::Namespace,
    record::Seen,
    spans::{Spans, Tracing},
    threads::Threads,
    wants::{Known, Wants},
};
use mesh_core::{
    identity::{SpiffeId, TrustDomain},
    model::{
        Choice, Endpoint, Mode, Name, Service, ServicePort, Workload, http::RequestRoute, traffic::Traffic,
    },
    view::{Demand, Mesh, NodeView, Resource, Snapshot},
};
use prometheus_client::registry::Registry;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::{crypto::ring, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    task::JoinHandle,
};

pub(crate) const CLIENT: &str = "127.0.1.1";
pub(crate) const WEB: &str = "127.0.2.1";
pub(crate) const WEB_APP: &str = "127.0.3.1";
pub(crate) const API: &str = "127.0.4.1";
pub(crate) const API_APP: &str = "127.0.5.1";
pub(crate) const STRANGER: &str = "127.0.9.9";
pub(crate) const VIP: &str = "10.96.0.1:80";
/// How long anything in these tests may take before it counts as hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn name(name: &str) -> Name {
    Name::new("shop", name)
}

pub(crate) fn identity(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://td/ns/shop/sa/{account}")).expect("an identity")
}

/// A root that signs leaves.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).expect("a root").der().clone();
        Self { issuer: Issuer::new(params, key), root }
    }

    /// What it signs leads to this.
    #[allow(dead_code, reason = "for applications that speak TLS themselves")]
    pub(crate) fn root(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    /// Signs whatever is asked for, with a new key.
    pub(crate) fn sign(
        &self,
        params: CertificateParams,
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        let leaf = params.signed_by(&key, &self.issuer).expect("a leaf").der().clone();
        (leaf, PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS#8"))
    }

    pub(crate) fn install(&self, identities: &Identities, of: &SpiffeId, as_whom: &SpiffeId) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri(&as_whom.to_string())];
        let (leaf, key) = self.sign(params);
        let key = ring::sign::any_supported_type(&key).expect("P-256");
        let certificate = Arc::new(CertifiedKey::new(vec![leaf], key));
        identities.install(of.clone(), certificate, std::slice::from_ref(&self.root)).expect("installs");
    }
}

/// A URI as an alternative name.
pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("ASCII"))
}

/// What the view says; change it and [`World::publish`].
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) workloads: Vec<Workload>,
    pub(crate) services: Vec<Service>,
    pub(crate) policies: Vec<mesh_core::model::Policy>,
    pub(crate) authentications: Vec<mesh_core::model::Authentication>,
    pub(crate) intakes: Vec<mesh_core::model::intake::Intake>,
    pub(crate) routes: Vec<RequestRoute>,
    /// Set: the view has not everything, and there is more in all of loopback.
    pub(crate) by_demand: bool,
}

pub(crate) fn workload(account: &str, addresses: &[&str]) -> Workload {
    Workload {
        name: name(account),
        uid: String::new(),
        node: "node".into(),
        service_account: account.into(),
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        labels: BTreeMap::new(),
        enrolled: true,
        captured: true,
        mode: Mode::Permissive,
        checks: vec![],
    }
}

impl Default for Plan {
    fn default() -> Self {
        let workloads = vec![
            workload("client", &[CLIENT, "127.0.0.1"]),
            workload("web", &[WEB]),
            workload("api", &[API]),
        ];
        Self {
            workloads,
            services: vec![],
            policies: vec![],
            authentications: vec![],
            intakes: vec![],
            routes: vec![],
            by_demand: false,
        }
    }
}

impl Plan {
    pub(crate) fn workload(&mut self, account: &str) -> &mut Workload {
        self.workloads.iter_mut().find(|w| w.name == name(account)).expect("planned")
    }

    /// One service on [`VIP`] with these endpoints.
    pub(crate) fn service(&mut self, endpoints: &[(&str, SocketAddr)]) {
        let vip: SocketAddr = VIP.parse().expect("an address");
        let endpoints = endpoints
            .iter()
            .map(|(account, at)| Endpoint {
                workload: Some(name(account)),
                address: at.ip(),
                port: at.port(),
            })
            .collect();
        self.services = vec![Service {
            name: name("service"),
            addresses: vec![vip.ip()],
            ports: vec![ServicePort {
                name: String::new(),
                port: vip.port(),
                endpoints,
                traffic: Traffic::default(),
                routes: vec![],
            }],
            choice: Choice::default(),
        }];
    }

    /// One more service, on port 80, which has no address to be asked by.
    #[allow(dead_code, reason = "for those who ask by routes")]
    pub(crate) fn backend(&mut self, service: &str, account: &str, endpoints: &[SocketAddr]) {
        let endpoint =
            |at: &SocketAddr| Endpoint { workload: Some(name(account)), address: at.ip(), port: at.port() };
        self.services.push(Service {
            name: name(service),
            addresses: vec![],
            ports: vec![ServicePort {
                name: String::new(),
                port: 80,
                endpoints: endpoints.iter().map(endpoint).collect(),
                traffic: Traffic::default(),
                routes: vec![],
            }],
            choice: Choice::default(),
        });
    }

    pub(crate) fn snapshot(&self, version: &str, ca: &Ca) -> Arc<Snapshot> {
        let trust_domain = TrustDomain::parse("td").expect("a trust domain");
        let mesh = Resource::Mesh(Arc::new(Mesh { trust_domain, roots: vec![ca.root.to_vec()] }));
        let demand = Demand { blocks: vec!["127.0.0.0/8".parse().expect("a block")] };
        let view: NodeView = std::iter::once(mesh)
            .chain(self.workloads.iter().map(|w| Resource::Workload(Arc::new(w.clone()))))
            .chain(self.services.iter().map(|s| Resource::Service(Arc::new(s.clone()))))
            .chain(self.policies.iter().map(|p| Resource::Policy(Arc::new(p.clone()))))
            .chain(self.authentications.iter().map(|p| Resource::Authentication(Arc::new(p.clone()))))
            .chain(self.intakes.iter().map(|it| Resource::Intake(Arc::new(it.clone()))))
            .chain(self.routes.iter().map(|r| Resource::Route(Arc::new(r.clone()))))
            .chain(self.by_demand.then(|| Resource::Demand(Arc::new(demand))))
            .collect();
        Arc::new(Snapshot::new("node", version, &view).expect("a view"))
    }
}

/// What agents tell of what they see.
#[derive(Default)]
pub(crate) struct Sees {
    pub(crate) tracing: Option<Tracing>,
    pub(crate) log: Option<LogMode>,
}

/// One agent.
pub(crate) struct Agent {
    pub(crate) node: Node,
    pub(crate) identities: Arc<Identities>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) drain: Drain,
    threads: Threads,
    pub(crate) wants: Arc<Wants>,
    #[allow(dead_code, reason = "for the tests of what is seen")]
    pub(crate) spans: Option<Spans>,
    #[allow(dead_code, reason = "for the tests of what is seen")]
    pub(crate) registry: Registry,
    log: AccessLog,
    log_path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Agent {
    fn new(name: &str, view: watch::Receiver<Option<Arc<Snapshot>>>, limits: Limits, sees: &Sees) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let log_path = dir.path().join("access.log");
        let (identities, (metrics, registry), drain) =
            (Arc::new(Identities::new()), Metrics::new(), Drain::new());
        let log = AccessLog::open(&log_path, metrics.clone()).expect("a log");
        let log = sees.log.map_or(log.clone(), |mode| log.of(mode));
        let started =
            |tracing| Spans::start(tracing, name, view.clone(), metrics.clone()).expect("a collector");
        let spans = sees.tracing.as_ref().map(started);
        let wants = Wants::new(64);
        let node = Node::new(
            name.into(),
            Known { view, wants: wants.clone() },
            identities.clone(),
            metrics.clone(),
            Seen { log: log.clone(), spans: spans.clone() },
            limits,
            drain.clone(),
        );
        let threads = Threads::start().expect("threads");
        Self { node, identities, metrics, drain, threads, wants, spans, registry, log, log_path, _dir: dir }
    }

    /// The access log's lines so far.
    pub(crate) async fn log(&self) -> Vec<serde_json::Value> {
        self.log.flush().await;
        let text = std::fs::read_to_string(&self.log_path).expect("the log is there");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// The access log once it has at least `n` lines.
    pub(crate) async fn log_of(&self, n: usize) -> Vec<serde_json::Value> {
        eventually(async || {
            let lines = self.log().await;
            (lines.len() >= n).then_some(lines)
        })
        .await
    }
}

/// Waits for a condition.
pub(crate) async fn eventually<T>(condition: impl AsyncFn() -> Option<T>) -> T {
    tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the condition comes true in time")
}

pub(crate) async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("does not hang")
}

/// The source's agent, the destinations' agent, and what they know.
pub(crate) struct World {
    pub(crate) source: Agent,
    pub(crate) destination: Agent,
    pub(crate) ca: Ca,
    view: watch::Sender<Option<Arc<Snapshot>>>,
    at_destination: watch::Sender<Option<Arc<Snapshot>>>,
    client: Arc<Local>,
}

impl World {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self::with(plan, Limits::default(), Limits::default())
    }

    /// Agents that see what this says.
    #[allow(dead_code, reason = "for the tests of what is seen")]
    pub(crate) fn seeing(plan: &Plan, sees: &Sees) -> Self {
        Self::of(plan, Limits::default(), Limits::default(), sees)
    }

    pub(crate) fn with(plan: &Plan, at_source: Limits, at_destination: Limits) -> Self {
        Self::of(plan, at_source, at_destination, &Sees::default())
    }

    fn of(plan: &Plan, at_source: Limits, at_destination: Limits, sees: &Sees) -> Self {
        let ca = Ca::new();
        let (view, watched) = watch::channel(Some(plan.snapshot("1", &ca)));
        // Connections to backends are shared as widely as they may be, whatever threads their clients are on: who must not share one
        // is seen to have another.
        let usual = at_source.lent_after_idle == Limits::default().lent_after_idle;
        let lent_after_idle = if usual { Duration::ZERO } else { at_source.lent_after_idle };
        let at_source = Limits { lent_after_idle, ..at_source };
        let source = Agent::new("node-a", watched, at_source, sees);
        let (view_b, watched) = watch::channel(view.borrow().clone());
        let destination = Agent::new("node-b", watched, at_destination, sees);
        ca.install(&source.identities, &identity("client"), &identity("client"));
        for account in ["web", "api"] {
            ca.install(&destination.identities, &identity(account), &identity(account));
        }
        Self { source, destination, ca, view, at_destination: view_b, client: local("client", CLIENT) }
    }

    /// The view that is in force, without keeping it.
    pub(crate) fn view(&self) -> Weak<Snapshot> {
        self.view.borrow().as_ref().map(Arc::downgrade).expect("there is always one")
    }

    pub(crate) fn publish(&self, plan: &Plan, version: &str) {
        self.publish_at_source(plan, version);
        self.publish_at_destination(plan, version);
    }

    pub(crate) fn publish_at_source(&self, plan: &Plan, version: &str) {
        self.view.send_replace(Some(plan.snapshot(version, &self.ca)));
    }

    pub(crate) fn publish_at_destination(&self, plan: &Plan, version: &str) {
        self.at_destination.send_replace(Some(plan.snapshot(version, &self.ca)));
    }

    /// An application of `web` that really listens, behind the destination's agent.
    pub(crate) async fn web(&self) -> (SocketAddr, TcpListener) {
        self.captured("web", WEB, WEB_APP).await
    }

    /// The same for `api`.
    pub(crate) async fn api(&self) -> (SocketAddr, TcpListener) {
        self.captured("api", API, API_APP).await
    }

    /// `web`, of whose agent this lets through what it says to the source's.
    #[allow(dead_code, reason = "for the tests of what crosses on its way")]
    pub(crate) async fn web_behind(&self, valve: &Valve) -> (SocketAddr, TcpListener) {
        self.captured_behind("web", WEB, WEB_APP, Some(valve.clone())).await
    }

    async fn captured(&self, account: &str, address: &str, app: &str) -> (SocketAddr, TcpListener) {
        self.captured_behind(account, address, app, None).await
    }

    async fn captured_behind(
        &self,
        account: &str,
        address: &str,
        app: &str,
        valve: Option<Valve>,
    ) -> (SocketAddr, TcpListener) {
        loop {
            let listener = listen(&SocketAddr::new(ip(app), 0));
            let port = listener.local_addr().expect("bound").port();
            let outside = SocketAddr::new(ip(address), port);
            // The port may be taken on the other address.
            let Some(captured) = try_listen(&outside) else { continue };
            let original = listener.local_addr().expect("bound");
            let workload = local(account, address);
            self.capture(captured, &self.destination, (Direction::Inbound, original), workload, valve);
            return (outside, listener);
        }
    }

    fn capture(
        &self,
        at: TcpListener,
        by: &Agent,
        (direction, original): (Direction, SocketAddr),
        workload: Arc<Local>,
        valve: Option<Valve>,
    ) {
        let (node, drain, threads) = (by.node.clone(), by.drain.clone(), by.threads.clone());
        by.drain.spawn(async move {
            loop {
                let (stream, peer) = tokio::select! {
                    accepted = at.accept() => accepted.expect("accepts"),
                    () = drain.draining() => return,
                };
                let stream = match &valve {
                    Some(valve) => valve.before(stream).await,
                    None => stream,
                };
                let accepted = Accepted { stream, peer, original, direction, workload: workload.clone() };
                spawn(accepted, &node, &threads);
            }
        });
    }

    /// Where the client's connections to `to` are captured.
    pub(crate) fn outbound(&self, to: SocketAddr) -> SocketAddr {
        let listener = listen(&SocketAddr::new(ip(CLIENT), 0));
        let at = listener.local_addr().expect("bound");
        self.capture(listener, &self.source, (Direction::Outbound, to), self.client.clone(), None);
        at
    }

    pub(crate) fn connections(&self, agent: &Agent, direction: Direction, outcome: &'static str) -> u64 {
        let workload = if direction == Direction::Outbound { "shop/client" } else { "shop/web" };
        let labels = ConnectionLabels {
            direction,
            workload: workload.into(),
            outcome,
            reason: "",
            transport: "tunnel",
        };
        agent.metrics.connections(&labels)
    }
}

/// Lets through what an agent says to another, or holds it back. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Valve {
    open: watch::Sender<bool>,
    /// Bytes that were held back.
    held: watch::Sender<usize>,
}

#[allow(dead_code, reason = "for the tests of what crosses on its way")]
impl Valve {
    pub(crate) fn new() -> Self {
        Self { open: watch::Sender::new(true), held: watch::Sender::new(0) }
    }

    pub(crate) fn close(&self) {
        self.open.send_replace(false);
        self.held.send_replace(0);
    }

    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    /// Waits until more bytes than so many are held back; returns how many.
    pub(crate) async fn holds_more(&self, than: usize) -> usize {
        *in_time(self.held.subscribe().wait_for(|held| *held > than)).await.expect("there is a sender")
    }

    /// An agent's end of a connection of which this is before the other.
    async fn before(&self, stream: TcpStream) -> TcpStream {
        let listener = listen(&SocketAddr::new(ip("127.0.0.1"), 0));
        let (ours, theirs) =
            tokio::join!(TcpStream::connect(listener.local_addr().expect("bound")), listener.accept());
        let (ours, (theirs, _)) = (ours.expect("connects"), theirs.expect("accepts"));
        stream.set_nodelay(true).expect("an option of TCP");
        ours.set_nodelay(true).expect("an option of TCP");
        let ((mut from_agent, mut to_agent), (mut from_source, mut to_source)) =
            (ours.into_split(), stream.into_split());
        let valve = self.clone();
        tokio::spawn(async move {
            let mut open = valve.open.subscribe();
            let (mut waiting, mut ended) = (vec![], false);
            while !ended || !waiting.is_empty() {
                tokio::select! {
                    read = from_agent.read_buf(&mut waiting), if !ended => {
                        let n = read.unwrap_or(0);
                        ended = n == 0;
                        if !*open.borrow() {
                            valve.held.send_modify(|held| *held += n);
                        }
                    }
                    changed = open.changed() => changed.expect("there is a sender"),
                }
                if *open.borrow_and_update() {
                    if to_source.write_all(&waiting).await.is_err() {
                        return;
                    }
                    waiting.clear();
                }
            }
            let _ = to_source.shutdown().await;
        });
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from_source, &mut to_agent).await;
            let _ = to_agent.shutdown().await;
        });
        theirs
    }
}

pub(crate) fn local(account: &str, address: &str) -> Arc<Local> {
    let namespace = Namespace::of_agent().expect("our own");
    Arc::new(Local::new(name(account), vec![ip(address)], namespace))
}

fn try_listen(at: &SocketAddr) -> Option<TcpListener> {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(*at).ok()?;
    socket.listen(2048).ok()
}

pub(crate) fn listen(at: &SocketAddr) -> TcpListener {
    try_listen(at).expect("listens")
}

/// The client's application connects; `to` is where that is captured.
pub(crate) async fn connect(to: SocketAddr) -> TcpStream {
    connect_from(CLIENT, to).await.expect("the capture takes every connection")
}

/// Fails where the agent is so quick to refuse that the reset is there first.
pub(crate) async fn connect_from(address: &str, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(ip(address), 0)).expect("binds");
    in_time(socket.connect(to)).await
}

pub(crate) async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    in_time(listener.accept()).await.expect("accepts")
}

/// Serves every connection by giving back what it sent, after it ended. Nobody listens any more once it is aborted.
pub(crate) fn echo(listener: TcpListener) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = vec![];
                if stream.read_to_end(&mut all).await.is_ok() {
                    let _ = stream.write_all(&all).await;
                }
            });
        }
    })
}

/// One request, half closed, and the whole answer.
pub(crate) async fn ask(to: SocketAddr, request: &[u8]) -> std::io::Result<Vec<u8>> {
    ask_from(CLIENT, to, request).await
}

pub(crate) async fn ask_from(address: &str, to: SocketAddr, request: &[u8]) -> std::io::Result<Vec<u8>> {
    in_time(async {
        let mut stream = connect_from(address, to).await?;
        stream.write_all(request).await?;
        stream.shutdown().await?;
        let mut answer = vec![];
        stream.read_to_end(&mut answer).await?;
        Ok(answer)
    })
    .await
}

/// Bytes that show when any of them is lost, doubled or moved.
pub(crate) fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut bytes = Vec::with_capacity(len + 4);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Closes with a RST.
pub(crate) fn reset(stream: TcpStream) {
    mesh_agent::net::socket::reset(stream);
}

/// Waits for a reset without reading.
pub(crate) async fn is_reset(stream: &TcpStream) {
    in_time(stream.ready(tokio::io::Interest::ERROR)).await.expect("waits");
}

/// Writes until nothing more fits for a while.
pub(crate) async fn fill(stream: &TcpStream) -> usize {
    try_fill(stream).await.expect("there is no end before it is full")
}

/// The same, or the error that came first.
pub(crate) async fn try_fill(stream: &TcpStream) -> std::io::Result<usize> {
    let chunk = vec![7; 256 * 1024];
    let mut written = 0;
    while tokio::time::timeout(Duration::from_millis(300), stream.writable()).await.is_ok() {
        match stream.try_write(&chunk) {
            Ok(n) => written += n,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}
