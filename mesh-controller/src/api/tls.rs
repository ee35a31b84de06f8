//! TLS for agents: one address for those that have a certificate and those that only have a token.
//!
//! A client certificate is optional in the handshake, and one that is shown must be good; which calls need one is said
//! call by call ([`Peer::node`]).

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use mesh_core::identity::{SpiffeId, Subject, TrustDomain};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, transport::server::Connected};
use x509_parser::{extensions::GeneralName, prelude::FromDer};

use super::limits::{CONNECTIONS, CONNECTIONS_OF_ADDRESS, HANDSHAKES_OF_ADDRESS, Place, Places};
use crate::{
    ca::{self, Authority, CaError},
    clock::Clock,
    metrics::{Limit, Metrics},
};

/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at once; more connections wait in the kernel's queue, so a flood costs bounded memory and processor.
const MAX_HANDSHAKES: usize = 256;
/// Connections that have shaken hands and wait to be served.
const SERVE_QUEUE: usize = 16;
/// After an accept that failed (no file descriptors), how long until the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no TLS configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No certificate for ourselves.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The parts do not go together.
    #[error("cannot make the TLS configuration: {0}")]
    Config(#[from] rustls::Error),
    /// The roots cannot verify clients.
    #[error("cannot verify clients with these roots: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// A configuration with a fresh certificate for the controller, and when to make the next.
pub fn server_config(
    authority: &Authority,
    trust_domain: &TrustDomain,
    ttl: Duration,
    clock: &Clock,
) -> Result<(Arc<ServerConfig>, SystemTime), TlsError> {
    let now = clock.now();
    let (issued, key) = authority.own(&SpiffeId::controller(trust_domain), ttl, now)?;
    let mut roots = RootCertStore::empty();
    for root in authority.roots() {
        roots.add(root)?;
    }
    let provider = Arc::new(ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(issued.chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would carry an old certificate's identity past its end.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let life = issued.not_after.duration_since(now).unwrap_or_default();
    Ok((Arc::new(config), now + life / 2))
}

/// Who is at the other end of a request's connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where from.
    pub address: SocketAddr,
    certificate: Option<PeerCertificate>,
}

#[derive(Debug, Clone)]
struct PeerCertificate {
    id: SpiffeId,
    not_after: SystemTime,
}

impl Peer {
    /// The node whose certificate the connection showed, and when that certificate ends.
    pub fn node<T>(
        request: &tonic::Request<T>,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<(String, SystemTime), Status> {
        let peer = request.extensions().get::<Self>();
        let certificate = peer.and_then(|peer| peer.certificate.as_ref()).ok_or_else(|| {
            Status::unauthenticated("this call needs the node's certificate; join first, with a token")
        })?;
        if certificate.not_after <= now {
            return Err(Status::unauthenticated(
                "the node's certificate has ended; connect with the renewed one",
            ));
        }
        match certificate.id.subject() {
            Subject::Node(node) if certificate.id.trust_domain() == trust_domain => {
                Ok((node.clone(), certificate.not_after))
            }
            _ => Err(Status::permission_denied(format!(
                "{} is not a node of {trust_domain}; connect with the node's own certificate",
                certificate.id
            ))),
        }
    }
}

/// Ends the connections of agents, so that they come again, to whichever controller their way leads them then.
#[derive(Debug, Clone, Default)]
pub struct Elsewhere {
    current: Arc<Mutex<CancellationToken>>,
}

impl Elsewhere {
    /// Ends those that are open now.
    pub fn send(&self) {
        std::mem::take(&mut *self.current()).cancel();
    }

    fn current(&self) -> MutexGuard<'_, CancellationToken> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that has shaken hands.
pub struct AgentStream {
    stream: TlsStream<Box<dyn Stream>>,
    peer: Peer,
    sent_elsewhere: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Of its address and of all, for as long as it is open.
    _places: (Place, OwnedSemaphorePermit),
}

impl std::fmt::Debug for AgentStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentStream").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Connected for AgentStream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for AgentStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.sent_elsewhere.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for AgentStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A connection, of TCP or simulated.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Where connections come in.
pub trait Listen: Send + 'static {
    /// The next connection, and where it is from. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = io::Result<(Box<dyn Stream>, SocketAddr)>> + Send;
}

impl Listen for TcpListener {
    async fn next(&mut self) -> io::Result<(Box<dyn Stream>, SocketAddr)> {
        let (stream, address) = self.accept().await?;
        stream.set_nodelay(true)?;
        Ok((Box::new(stream), address))
    }
}

/// The connections of a listener, after their handshakes. A handshake that fails or dawdles costs only itself.
pub fn incoming(
    listener: impl Listen,
    tls: watch::Receiver<Arc<ServerConfig>>,
    metrics: Arc<Metrics>,
    elsewhere: Elsewhere,
    cancel: CancellationToken,
) -> ReceiverStream<io::Result<AgentStream>> {
    let (sender, receiver) = mpsc::channel(SERVE_QUEUE);
    tokio::spawn(async move {
        // Cancel-safe: what `accept` drops, the kernel resets; the stream's end is what the server waits for.
        tokio::select! {
            () = cancel.cancelled() => {}
            () = accept(listener, tls, metrics, elsewhere, sender) => {}
        }
    });
    ReceiverStream::new(receiver)
}

async fn accept(
    mut listener: impl Listen,
    tls: watch::Receiver<Arc<ServerConfig>>,
    metrics: Arc<Metrics>,
    elsewhere: Elsewhere,
    served: mpsc::Sender<io::Result<AgentStream>>,
) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let all = Arc::new(Semaphore::new(CONNECTIONS));
    let (by_address, shaking) = (Places::default(), Places::default());
    loop {
        let permit = handshakes.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (stream, address) = match listener.next().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Dropped at once beyond the limits, so that a flood from one address holds nothing that others wait for.
        let Some(shaking) = shaking.take(address.ip(), HANDSHAKES_OF_ADDRESS) else {
            metrics.limit_hit(Limit::handshakes);
            continue;
        };
        let place = by_address.take(address.ip(), CONNECTIONS_OF_ADDRESS);
        let (Some(place), Ok(one)) = (place, all.clone().try_acquire_owned()) else {
            metrics.limit_hit(Limit::connections);
            continue;
        };
        let acceptor = TlsAcceptor::from(tls.borrow().clone());
        let (served, metrics) = (served.clone(), metrics.clone());
        let sent_elsewhere = elsewhere.current().clone();
        tokio::spawn(async move {
            match timeout(
                HANDSHAKE_TIMEOUT,
                handshake(stream, address, (place, one), sent_elsewhere, &acceptor),
            )
            .await
            {
                Ok(Ok(stream)) => drop(served.send(Ok(stream)).await),
                Ok(Err(error)) => {
                    metrics.handshakes_refused.inc();
                    tracing::info!(%address, %error, "handshake of an agent failed");
                }
                Err(_) => {
                    metrics.handshakes_refused.inc();
                    tracing::info!(%address, "handshake of an agent took too long");
                }
            }
            drop((permit, shaking));
        });
    }
}

async fn handshake(
    stream: Box<dyn Stream>,
    address: SocketAddr,
    places: (Place, OwnedSemaphorePermit),
    sent_elsewhere: CancellationToken,
    acceptor: &TlsAcceptor,
) -> io::Result<AgentStream> {
    let stream = acceptor.accept(stream).await?;
    let certificate = match stream.get_ref().1.peer_certificates().and_then(<[_]>::first) {
        Some(leaf) => Some(peer_certificate(leaf).map_err(io::Error::other)?),
        None => None,
    };
    let sent_elsewhere = Box::pin(sent_elsewhere.cancelled_owned());
    Ok(AgentStream { stream, peer: Peer { address, certificate }, sent_elsewhere, _places: places })
}

/// The identity in a certificate whose chain the handshake has verified (X509-SVID §2: exactly one URI name).
fn peer_certificate(leaf: &CertificateDer<'_>) -> Result<PeerCertificate, String> {
    let (_, parsed) =
        x509_parser::certificate::X509Certificate::from_der(leaf).map_err(|error| error.to_string())?;
    let san = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
    let names = san.map_or(&[][..], |san| san.value.general_names.as_slice());
    let [GeneralName::URI(uri)] = names else {
        return Err("the client's certificate must have one URI name and no other".to_owned());
    };
    let id = SpiffeId::parse(uri).map_err(|error| error.to_string())?;
    let (_, not_after) = ca::validity(leaf)?;
    Ok(PeerCertificate { id, not_after })
}
