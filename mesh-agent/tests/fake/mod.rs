//! A controller for tests: real TLS, real gRPC, real certificates, and the views that a test hands it.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use mesh_agent::identity::verify::peer_identity;
use mesh_core::wire::proto::{self, watch_request::Body};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::{RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

mod services {
    #![allow(missing_docs, clippy::all, unreachable_pub, missing_debug_implementations)]
    include!(concat!(env!("OUT_DIR"), "/server/nodemesh.v1.rs"));
}

use services::{
    enrolment_server::{Enrolment, EnrolmentServer},
    node_server::{Node, NodeServer},
};

const SECRET: [u8; 32] = [0x5e; 32];

/// What an agent said.
#[derive(Debug)]
pub(crate) enum Event {
    /// A handshake failed.
    Refused,
    Join {
        node: String,
    },
    Renew {
        by: String,
    },
    Certify {
        identity: String,
    },
    Hello {
        version: String,
    },
    Ack {
        version: String,
        error: String,
    },
    Report(Vec<(String, i32, String)>),
}

/// The controller.
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    pub(crate) events: mpsc::UnboundedReceiver<Event>,
    shared: Arc<Shared>,
    accepting: tokio::task::AbortHandle,
}

struct Shared {
    events: mpsc::UnboundedSender<Event>,
    inner: Mutex<Inner>,
}

struct Inner {
    roots: Vec<Root>,
    /// The roots that are given out, and that clients may lead to.
    bundle: Vec<CertificateDer<'static>>,
    leaf_life: Duration,
    server_id: String,
    token_used: bool,
    refuse_renewals: bool,
    stream: Option<mpsc::Sender<Result<proto::ViewUpdate, Status>>>,
    connections: JoinSet<()>,
}

struct Root {
    certificate: CertificateDer<'static>,
    issuing_certificate: CertificateDer<'static>,
    issuing: Issuer<'static, KeyPair>,
}

impl Root {
    fn new(name: &str) -> Self {
        let ca = |name: String| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            params
        };
        let key = || KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let (root_params, root_key) = (ca(format!("{name} root")), key());
        let certificate = root_params.self_signed(&root_key).unwrap().der().clone();
        let root = Issuer::new(root_params, root_key);
        let (issuing_params, issuing_key) = (ca(format!("{name} issuing")), key());
        let issuing_certificate = issuing_params.signed_by(&issuing_key, &root).unwrap().der().clone();
        Self { certificate, issuing_certificate, issuing: Issuer::new(issuing_params, issuing_key) }
    }
}

impl Inner {
    /// The root under which everything is issued: the newest.
    fn root(&self) -> &Root {
        self.roots.last().unwrap()
    }

    fn issue(&self, csr: &[u8], identity: &str) -> proto::Certificate {
        let mut request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        leaf(&mut request.params, identity, self.leaf_life);
        let leaf = request.signed_by(&self.root().issuing).unwrap().der().to_vec();
        proto::Certificate {
            chain_der: vec![leaf, self.root().issuing_certificate.to_vec()],
            roots_der: self.bundle.iter().map(|root| root.to_vec()).collect(),
            now_unix_ms: 0,
        }
    }

    fn server_config(&self) -> ServerConfig {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        leaf(&mut params, &self.server_id, Duration::HOUR);
        let root = self.root();
        let leaf = params.signed_by(&key, &root.issuing).unwrap().der().clone();
        let mut clients = RootCertStore::empty();
        for root in &self.bundle {
            clients.add(root.clone()).unwrap();
        }
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(clients), provider.clone())
            .allow_unauthenticated()
            .build()
            .unwrap();
        let chain = vec![leaf, root.issuing_certificate.clone(), root.certificate.clone()];
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

fn leaf(params: &mut CertificateParams, identity: &str, life: Duration) {
    params.subject_alt_names = vec![SanType::URI(identity.to_owned().try_into().unwrap())];
    params.not_before = OffsetDateTime::now_utc() - Duration::minutes(5);
    params.not_after = OffsetDateTime::now_utc() + life;
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, events) = mpsc::unbounded_channel();
        let root = Root::new("first");
        let inner = Inner {
            bundle: vec![root.certificate.clone()],
            roots: vec![root],
            leaf_life: Duration::DAY,
            server_id: "spiffe://td/controller".into(),
            token_used: false,
            refuse_renewals: false,
            stream: None,
            connections: JoinSet::new(),
        };
        let shared = Arc::new(Shared { events: sender, inner: Mutex::new(inner) });
        let accepting = tokio::spawn(accept(listener, shared.clone())).abort_handle();
        Self { address, events, shared, accepting }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap()
    }

    /// The token with the hash of the current root.
    pub(crate) fn token(&self, node: &str) -> String {
        self.token_for_root(node, &Sha256::digest(&self.inner().root().certificate))
    }

    pub(crate) fn token_for_root(&self, node: &str, hash: &[u8]) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        format!("nm1.{node}.{}.{}", hex(&SECRET), hex(hash))
    }

    pub(crate) fn roots(&self) -> Vec<Vec<u8>> {
        self.inner().bundle.iter().map(|root| root.to_vec()).collect()
    }

    /// As the file of roots that a pod has.
    pub(crate) fn roots_pem(&self) -> String {
        use base64::Engine;
        let pem = |root: &CertificateDer<'_>| {
            let text = base64::engine::general_purpose::STANDARD.encode(root);
            format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
        };
        self.inner().bundle.iter().map(pem).collect()
    }

    pub(crate) fn refuse_renewals(&self, refuse: bool) {
        self.inner().refuse_renewals = refuse;
    }

    /// A handshake that a client has ended.
    pub(crate) async fn refused_handshake(&mut self) {
        self.expect(|event| matches!(event, Event::Refused).then_some(())).await;
    }

    pub(crate) fn set_leaf_life(&self, life: Duration) {
        self.inner().leaf_life = life;
    }

    pub(crate) fn serve_as(&self, identity: &str) {
        self.inner().server_id = identity.to_owned();
    }

    /// A new root under which everything is issued from now on, beside the old one.
    pub(crate) fn add_root(&self) {
        let root = Root::new("second");
        let mut inner = self.inner();
        inner.bundle.push(root.certificate.clone());
        inner.roots.push(root);
    }

    /// The old root goes.
    pub(crate) fn drop_first_root(&self) {
        self.inner().bundle.remove(0);
    }

    /// Sends an update on the stream that said hello last.
    pub(crate) async fn send(&self, update: proto::ViewUpdate) {
        let stream = self.inner().stream.clone().expect("an agent watches");
        stream.send(Ok(update)).await.unwrap();
    }

    /// Ends every connection.
    pub(crate) fn cut(&self) {
        let mut inner = self.inner();
        inner.stream = None;
        inner.connections.abort_all();
    }

    /// Ends every connection and takes no more.
    pub(crate) fn stop(&self) {
        self.accepting.abort();
        self.cut();
    }

    /// The next event that `choose` makes something of; others are passed over.
    pub(crate) async fn expect<T>(&mut self, mut choose: impl FnMut(Event) -> Option<T>) -> T {
        loop {
            let event = self.events.recv().await.expect("the controller runs");
            if let Some(found) = choose(event) {
                return found;
            }
        }
    }

    pub(crate) async fn hello(&mut self) -> String {
        self.expect(|event| match event {
            Event::Hello { version } => Some(version),
            _ => None,
        })
        .await
    }

    pub(crate) async fn ack(&mut self) -> (String, String) {
        self.expect(|event| match event {
            Event::Ack { version, error } => Some((version, error)),
            _ => None,
        })
        .await
    }

    /// What the answer to this version says; empty when it is in force.
    pub(crate) async fn expect_ack_of(&mut self, wanted: &str) -> String {
        self.expect(|event| match event {
            Event::Ack { version, error } if version == wanted => Some(error),
            _ => None,
        })
        .await
    }

    pub(crate) async fn report(&mut self) -> Vec<(String, i32, String)> {
        self.expect(|event| match event {
            Event::Report(report) => Some(report),
            _ => None,
        })
        .await
    }

    /// What was said so far.
    pub(crate) fn drain(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.try_recv().ok()).collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let config = shared.inner.lock().unwrap().server_config();
        let connection = serve(stream, config, shared.clone());
        shared.inner.lock().unwrap().connections.spawn(connection);
    }
}

async fn serve(stream: TcpStream, config: ServerConfig, shared: Arc<Shared>) {
    let Ok(stream) = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(stream).await else {
        let _ = shared.events.send(Event::Refused);
        return;
    };
    let peer = peer_identity(stream.get_ref().1.peer_certificates()).ok().map(|id| id.to_string());
    let caller = Caller { shared, peer };
    let routes = tonic::service::Routes::new(EnrolmentServer::new(caller.clone()))
        .add_service(NodeServer::new(caller));
    let mut server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    server.http2();
    let _ = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes)).await;
}

#[derive(Clone)]
struct Caller {
    shared: Arc<Shared>,
    peer: Option<String>,
}

impl Caller {
    fn say(&self, event: Event) {
        let _ = self.shared.events.send(event);
    }

    fn node(&self) -> Result<String, Status> {
        let node = self.peer.clone().filter(|peer| peer.starts_with("spiffe://td/node/"));
        node.ok_or_else(|| Status::unauthenticated("no node certificate"))
    }
}

#[tonic::async_trait]
impl Enrolment for Caller {
    async fn join(
        &self,
        request: Request<proto::JoinRequest>,
    ) -> Result<Response<proto::Certificate>, Status> {
        let request = request.into_inner();
        self.say(Event::Join { node: request.node.clone() });
        let mut inner = self.shared.inner.lock().unwrap();
        match request.service_account_token.as_str() {
            "" => {}
            "good" => {
                let identity = format!("spiffe://td/node/{}", request.node);
                return Ok(Response::new(inner.issue(&request.csr_der, &identity)));
            }
            "expired" => return Err(Status::unauthenticated("the token has expired")),
            other => return Err(Status::permission_denied(other)),
        }
        if std::mem::replace(&mut inner.token_used, true) {
            return Err(Status::permission_denied("the token was used"));
        }
        Ok(Response::new(inner.issue(&request.csr_der, &format!("spiffe://td/node/{}", request.node))))
    }
}

#[tonic::async_trait]
impl Node for Caller {
    async fn renew(
        &self,
        request: Request<proto::RenewRequest>,
    ) -> Result<Response<proto::Certificate>, Status> {
        let node = self.node()?;
        self.say(Event::Renew { by: node.clone() });
        let inner = self.shared.inner.lock().unwrap();
        if inner.refuse_renewals {
            return Err(Status::unavailable("not now"));
        }
        Ok(Response::new(inner.issue(&request.get_ref().csr_der, &node)))
    }

    async fn certify(
        &self,
        request: Request<proto::CertifyRequest>,
    ) -> Result<Response<proto::Certificate>, Status> {
        self.node()?;
        let request = request.into_inner();
        self.say(Event::Certify { identity: request.identity.clone() });
        let inner = self.shared.inner.lock().unwrap();
        Ok(Response::new(inner.issue(&request.csr_der, &request.identity)))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<proto::ViewUpdate, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<proto::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.node()?;
        let mut incoming = request.into_inner();
        let (updates, queue) = mpsc::channel(16);
        let caller = self.clone();
        tokio::spawn(async move {
            let shared = caller.shared.clone();
            while let Some(Ok(message)) = incoming.next().await {
                let event = match message.body.expect("a body") {
                    Body::Hello(hello) => {
                        shared.inner.lock().unwrap().stream = Some(updates.clone());
                        Event::Hello { version: hello.version }
                    }
                    Body::Ack(ack) => Event::Ack { version: ack.version, error: ack.error },
                    Body::Report(report) => Event::Report(
                        report
                            .workloads
                            .into_iter()
                            .map(|one| (one.workload, one.state, one.reason))
                            .collect(),
                    ),
                    // What it says of itself is for people.
                    Body::Condition(_) | Body::Wants(_) => continue,
                };
                caller.say(event);
            }
            // The agent's half has ended: so does ours, unless a later stream took over.
            let mut inner = shared.inner.lock().unwrap();
            if inner.stream.as_ref().is_some_and(|stream| stream.same_channel(&updates)) {
                inner.stream = None;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }
}

/// A network between agent and controller that can hold everything back without closing anything.
pub(crate) struct Wire {
    held: watch::Sender<bool>,
    carrying: tokio::task::AbortHandle,
}

impl Wire {
    /// A wire to the controller and the address of its other end.
    pub(crate) async fn to(controller: SocketAddr) -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let held = watch::Sender::new(false);
        let gate = held.subscribe();
        let carrying = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let gate = gate.clone();
                connections.spawn(async move {
                    let (near_in, near_out) = near.into_split();
                    let (far_in, far_out) = TcpStream::connect(controller).await.unwrap().into_split();
                    tokio::join!(carry(near_in, far_out, gate.clone()), carry(far_in, near_out, gate));
                });
            }
        });
        (Self { held, carrying: carrying.abort_handle() }, address)
    }

    pub(crate) fn hold(&self) {
        self.held.send_replace(true);
    }

    pub(crate) fn release(&self) {
        self.held.send_replace(false);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.carrying.abort();
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut held: watch::Receiver<bool>) {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        if held.wait_for(|held| !held).await.is_err() || to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}
