//! A controller in this process, and agents that speak to it as the real ones do.

// Each test file uses its own part of it, and a test's unwrap is its failure.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::FutureExt;
use hyper_util::rt::TokioIo;
use mesh_controller::{
    api::services::{enrolment_client::EnrolmentClient, node_client::NodeClient},
    ca::Authority,
    config::Config,
    controller::Controller,
    token::Tokens,
};
use mesh_core::wire::proto::{
    Ack, Certificate, Hello, JoinRequest, RenewRequest, Report, ViewUpdate, Wants, WatchRequest,
    watch_request::Body,
};
use mesh_settings::log::LogFilter;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{ring, verify_tls13_signature},
    server::ParsedCertificate,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Longer than anything here takes, short enough to end a test that waits for nothing.
const LIMIT: Duration = Duration::from_secs(20);

pub struct World {
    controller: Controller,
    source: tempfile::TempDir,
    state: tempfile::TempDir,
    whole_views_up_to: usize,
    started_in: Duration,
}

/// What a node has after it joined.
#[derive(Debug)]
pub struct Joined {
    pub certificate: Certificate,
    pub key: Vec<u8>,
}

impl Joined {
    pub fn identity(&self) -> String {
        identity_of(&self.certificate.chain_der[0])
    }
}

impl World {
    pub async fn start(manifests: &[(&str, String)]) -> Self {
        Self::start_with(manifests, usize::MAX).await
    }

    /// With whole views up to so many workloads and services.
    pub async fn start_with(manifests: &[(&str, String)], whole_views_up_to: usize) -> Self {
        let (source, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, text) in manifests {
            std::fs::write(source.path().join(name), text).unwrap();
        }
        Self::open(source, state, whole_views_up_to).await
    }

    async fn open(source: tempfile::TempDir, state: tempfile::TempDir, whole_views_up_to: usize) -> Self {
        let started = std::time::Instant::now();
        let config = Config { whole_views_up_to, ..config(&source, &state) };
        let controller = Controller::start(config, LogFilter::detached("info")).await.unwrap();
        Self { controller, source, state, whole_views_up_to, started_in: started.elapsed() }
    }

    /// How long the controller took from its start until agents are served.
    pub fn started_in(&self) -> Duration {
        self.started_in
    }

    pub async fn restart(self) -> Self {
        let Self { controller, source, state, whole_views_up_to, .. } = self;
        controller.stop().await;
        Self::open(source, state, whole_views_up_to).await
    }

    pub async fn stop(self) {
        self.controller.stop().await;
    }

    pub fn agents_address(&self) -> SocketAddr {
        self.controller.agents_address()
    }

    pub fn admin_url(&self) -> String {
        format!("http://{}", self.controller.admin_address())
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.source.path().join(name), text).unwrap();
    }

    /// As `mesh-controller token` does.
    pub fn token(&self, node: &str, ttl: Duration) -> String {
        let root = Authority::open_in(self.state.path(), SystemTime::now()).unwrap().root_digest();
        Tokens::open(self.state.path()).unwrap().create(node, SystemTime::now() + ttl, &root).unwrap()
    }

    /// As `mesh-controller rotate-root` does.
    pub fn rotate_root(&self) {
        let authority = Authority::open_in(self.state.path(), SystemTime::now()).unwrap();
        authority.rotate_root(SystemTime::now()).now_or_never().unwrap().unwrap();
    }

    /// Joins once the controller answers with the root that the token pins (after a rotation it takes a moment).
    pub async fn join(&self, node: &str) -> Joined {
        let joined = async {
            loop {
                let token = self.token(node, LIMIT);
                match self.join_as(node, &token).await {
                    Ok(joined) => return joined,
                    Err(status) => assert_eq!(status.code(), tonic::Code::Unavailable, "{status}"),
                }
            }
        };
        tokio::time::timeout(LIMIT, joined).await.unwrap()
    }

    pub async fn join_as(&self, node: &str, token: &str) -> Result<Joined, Status> {
        // A token that pins nothing of use is shown to a controller that is trusted otherwise.
        let pinned = token.rsplit('.').next().filter(|root| root.len() == 64 && *root != "00".repeat(32));
        let trust = match pinned {
            Some(root) => Trust::Pinned(root.to_owned()),
            None => Trust::Roots(self.roots()),
        };
        let (csr_der, key) = csr();
        let channel = self.connect(trust, None).await?;
        let request =
            JoinRequest { node: node.into(), token: token.into(), csr_der, ..JoinRequest::default() };
        let certificate = EnrolmentClient::new(channel).join(request).await?.into_inner();
        Ok(Joined { certificate, key })
    }

    pub async fn stranger(&self) -> NodeClient<Channel> {
        NodeClient::new(self.connect(Trust::Roots(self.roots()), None).await.unwrap())
    }

    /// A connection of a machine that is no node.
    pub async fn enrolment(&self) -> EnrolmentClient<Channel> {
        EnrolmentClient::new(self.connect(Trust::Roots(self.roots()), None).await.unwrap())
    }

    /// A connection with a node's certificate that trusts only what the node was told.
    pub async fn client_with(&self, node: &Joined) -> NodeClient<Channel> {
        let trust = match self.roots().iter().any(|root| node.certificate.roots_der.contains(&root.to_vec()))
        {
            true => Trust::Roots(node.certificate.roots_der.iter().map(|der| der.clone().into()).collect()),
            // A stranger's certificate: what is asked is whether the controller takes it.
            false => Trust::Roots(self.roots()),
        };
        NodeClient::new(self.connect(trust, Some(node)).await.unwrap())
    }

    /// A connection, if a certificate and a key are a pair that can be shown.
    pub async fn try_client_with(&self, node: &Joined) -> Option<NodeClient<Channel>> {
        let key = ring::default_provider()
            .key_provider
            .load_private_key(PrivatePkcs8KeyDer::from(node.key.clone()).into())
            .unwrap();
        let chain: Vec<_> = node.certificate.chain_der.iter().map(|der| der.clone().into()).collect();
        // Without rustls' own check, so that it is the controller who says no.
        let unchecked = Arc::new(rustls::sign::CertifiedKey::new(chain, key));
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Trust::Roots(self.roots())))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(unchecked)));
        config.alpn_protocols = vec![b"h2".to_vec()];
        let mut client = NodeClient::new(self.connect_by(config).await.ok()?);
        // TLS 1.3 lets a client believe that it is through before its certificate was looked at.
        let asked = client.renew(RenewRequest { csr_der: csr().0 }).await;
        asked.is_ok().then_some(client)
    }

    /// As an agent that can do with whole views only.
    pub async fn watch(&self, node: &Joined, version: &str) -> Watch {
        self.watch_as(node, Hello { version: version.into(), ..Hello::default() }).await
    }

    pub async fn watch_as(&self, node: &Joined, hello: Hello) -> Watch {
        let mut client = self.client_with(node).await;
        let (words, receiver) = mpsc::channel(8);
        let hello = Hello { agent_version: "test".into(), ..hello };
        words.send(WatchRequest { body: Some(Body::Hello(hello)) }).await.unwrap();
        let updates = client.watch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Watch { words, updates }
    }

    fn roots(&self) -> Vec<CertificateDer<'static>> {
        Authority::open_in(self.state.path(), SystemTime::now()).unwrap().roots()
    }

    async fn connect(&self, trust: Trust, node: Option<&Joined>) -> Result<Channel, Status> {
        self.connect_by(client_config(trust, node)).await
    }

    async fn connect_by(&self, config: ClientConfig) -> Result<Channel, Status> {
        let config = Arc::new(config);
        let address = self.agents_address();
        let connector = tower::service_fn(move |_: Uri| {
            let config = config.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::from(address.ip());
                let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_static("https://controller");
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|error| Status::unavailable(format!("{error:?}")))
    }

    /// The lines of the authority's file, of which keys and certificates are.
    pub fn secrets(&self) -> Vec<String> {
        let authority = std::fs::read_to_string(self.state.path().join("ca/authority.json")).unwrap();
        assert!(authority.contains("PRIVATE KEY"));
        let long = |line: &&str| line.len() >= 40 && !line.contains("-----");
        // PEM within JSON has its line ends escaped.
        authority.replace("\\n", "\n").lines().filter(long).map(str::to_owned).collect()
    }

    /// A GET at the admin address.
    pub async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.controller.admin_address()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Asks until the answer is as expected.
    pub async fn until(&self, path: &str, expected: impl Fn(&str) -> bool) {
        let reached = async { while !expected(&self.get(path).await) {} };
        if tokio::time::timeout(LIMIT, reached).await.is_err() {
            panic!("{path} stays {}", self.get(path).await);
        }
    }

    /// Waits until a file of the state holds a text.
    pub async fn until_saved(&self, file: &str, text: &str) {
        let path = self.state.path().join(file);
        let saved = async {
            while !std::fs::read_to_string(&path).is_ok_and(|content| content.contains(text)) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, saved).await.unwrap();
    }
}

pub struct Watch {
    words: mpsc::Sender<WatchRequest>,
    updates: Streaming<ViewUpdate>,
}

impl Watch {
    pub async fn update(&mut self) -> ViewUpdate {
        tokio::time::timeout(LIMIT, self.updates.message()).await.unwrap().unwrap().unwrap()
    }

    /// How the watch ends.
    pub async fn end(mut self) -> Status {
        tokio::time::timeout(LIMIT, self.updates.message()).await.unwrap().unwrap_err()
    }

    pub async fn say(&self, word: impl Into<Word>) {
        self.words.send(WatchRequest { body: Some(word.into().0) }).await.unwrap();
    }
}

pub struct Word(Body);

impl From<Ack> for Word {
    fn from(ack: Ack) -> Self {
        Self(Body::Ack(ack))
    }
}

impl From<Wants> for Word {
    fn from(wants: Wants) -> Self {
        Self(Body::Wants(wants))
    }
}

impl From<Report> for Word {
    fn from(report: Report) -> Self {
        Self(Body::Report(report))
    }
}

fn config(source: &tempfile::TempDir, state: &tempfile::TempDir) -> Config {
    Config {
        source: mesh_controller::source::Place::Directory(source.path().to_owned()),
        state_dir: state.path().to_owned(),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        admin_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        trust_domain: "td".parse().unwrap(),
        default_mode: mesh_core::model::Mode::Permissive,
        whole_views_up_to: usize::MAX,
        certificate_ttl: Duration::from_secs(3600),
        ca_secret: None,
        issuer_dir: None,
        roots_config_map: None,
        join_service_account: None,
        controllers: None,
        log_level: "info".into(),
        in_force: vec![],
    }
}

pub fn namespace(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{nodemesh.io/enroll: 'true'}}}}\n"
    )
}

pub fn workload(name: &str, node: &str, address: &str) -> String {
    format!(
        "---\napiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop, labels: \
         {{app: {name}}}}}\nspec: {{node: {node}, addresses: [{address}], serviceAccount: {name}}}\n"
    )
}

/// A request and the key that signed it (PKCS #8).
pub fn csr() -> (Vec<u8>, Vec<u8>) {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let request = CertificateParams::default().serialize_request(&key).unwrap();
    (request.der().to_vec(), key.serialize_der())
}

/// A request that asks for a name.
pub fn csr_naming(uri: &str) -> Vec<u8> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
    params.serialize_request(&key).unwrap().der().to_vec()
}

/// The one URI name of a certificate.
pub fn identity_of(der: &[u8]) -> String {
    let (_, certificate) = X509Certificate::from_der(der).unwrap();
    let san = certificate.subject_alternative_name().unwrap().unwrap();
    let [GeneralName::URI(uri)] = san.value.general_names.as_slice() else { panic!("{san:?}") };
    (*uri).to_owned()
}

/// Which servers an agent trusts.
#[derive(Debug)]
enum Trust {
    /// One whose chain ends with the root of this hash.
    Pinned(String),
    /// One whose chain leads to these.
    Roots(Vec<CertificateDer<'static>>),
}

fn client_config(trust: Trust, node: Option<&Joined>) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(trust));
    let mut config = match node {
        None => builder.with_no_client_auth(),
        Some(node) => {
            let chain = node.certificate.chain_der.iter().map(|der| der.clone().into()).collect();
            builder.with_client_auth_cert(chain, PrivatePkcs8KeyDer::from(node.key.clone()).into()).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = |hash: &String| {
            let last = intermediates
                .last()
                .filter(|last| mesh_controller::digest::hex(&mesh_controller::digest::digest(last)) == *hash);
            last.map(|root| vec![root.clone().into_owned()])
        };
        let roots = match self {
            Self::Roots(roots) => roots.clone(),
            Self::Pinned(hash) => {
                pinned(hash).ok_or(rustls::Error::General("the chain does not end with the root".into()))?
            }
        };
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots);
        let algorithms = ring::default_provider().signature_verification_algorithms.all;
        let leaf = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, &store, intermediates, now, algorithms)?;
        assert_eq!(identity_of(end_entity), "spiffe://td/controller");
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unreachable!("only TLS 1.3 is offered")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &ring::default_provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
