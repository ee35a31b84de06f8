//! gRPC for agents, over TLS of which we know whose certificate the other side showed.
//!
//! | module | what |
//! |---|---|
//! | [`tls`] | handshakes, their limits, the peer's identity on every request |
//! | [`enrolment`] | how a machine becomes a node |
//! | [`node`] | what a node may ask for |
//! | [`limits`] | how often and how much of it |

pub mod enrolment;
pub mod limits;
pub mod node;
pub mod tls;

use std::{sync::Arc, time::Duration};

use mesh_core::{
    identity::{SpiffeId, TrustDomain},
    wire::proto::{Certificate, WorkloadReport},
};
use rustls::ServerConfig;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use crate::{
    attest::Attestor,
    ca::{Authority, SignError},
    clock::Clock,
    distribute::Hub,
    generation::Generation,
    metrics::{CertificateKind, CertificateLabels, Limit, Metrics},
    token::Tokens,
};

/// The generated services.
#[allow(missing_docs, clippy::all, unreachable_pub, missing_debug_implementations)]
pub mod services {
    include!(concat!(env!("OUT_DIR"), "/nodemesh.v1.rs"));
}

/// How often a silent connection is asked whether it is still there, and how long the answer may take.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Streams that one connection may have at once; an agent has one watch and its certificates.
const MAX_STREAMS: u32 = 128;
/// Longest message of a machine that joins: its name, a token and a certificate request.
const MAX_JOIN: usize = 64 * 1024;
/// Longest message of a node: a report of a thousand workloads with their reasons.
const MAX_WORD: usize = 1024 * 1024;
/// Most bytes of a request's header fields.
const MAX_HEADERS: u32 = 16 * 1024;
/// How long a request may take until its answer begins, a body that comes slowly included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What a node said of its workloads.
#[derive(Debug)]
pub struct NodeReport {
    /// The node, as its certificate names it.
    pub node: String,
    /// What it said.
    pub words: Vec<WorkloadReport>,
}

/// What the services stand on.
#[derive(Debug)]
pub struct Api {
    /// Views and who watches them.
    pub hub: Arc<Hub>,
    /// Signs.
    pub authority: Arc<Authority>,
    /// Which start of which state this is.
    pub generation: Arc<Generation>,
    /// Who may join.
    pub tokens: Tokens,
    /// Who may join by Kubernetes' word; nobody without.
    pub attestor: Option<Attestor>,
    /// How often anybody may ask.
    pub limits: limits::Limits,
    /// Where reports go.
    pub reports: mpsc::Sender<NodeReport>,
    /// Counted.
    pub metrics: Arc<Metrics>,
    /// The trust domain of every identity.
    pub trust_domain: TrustDomain,
    /// The time.
    pub clock: Clock,
    /// How long certificates live.
    pub certificate_ttl: Duration,
    /// The watches that are open.
    pub watches: TaskTracker,
    /// Ends them.
    pub cancel: CancellationToken,
    /// Sends agents to another controller.
    pub elsewhere: tls::Elsewhere,
}

impl Api {
    fn sign(&self, csr_der: &[u8], id: &SpiffeId) -> Result<Certificate, Status> {
        let issued =
            self.authority.sign(csr_der, id, self.certificate_ttl, self.clock.now()).map_err(|error| {
                match error {
                    SignError::Request(_) | SignError::Key => Status::invalid_argument(error.to_string()),
                    SignError::Make(_) | SignError::Ended => {
                        tracing::error!(%error, %id, "signing failed");
                        Status::internal(error.to_string())
                    }
                }
            })?;
        Ok(Certificate {
            chain_der: issued.chain.iter().map(|der| der.to_vec()).collect(),
            roots_der: self.authority.roots().iter().map(|der| der.to_vec()).collect(),
            now_unix_ms: self.clock.unix_ms(),
        })
    }

    /// Whether a node may ask for one more thing now.
    fn may_ask(&self, node: &str) -> Result<(), Status> {
        if self.limits.may_ask(node, Instant::now().into_std()) {
            return Ok(());
        }
        self.metrics.limit_hit(Limit::requests);
        Err(Status::resource_exhausted("this node asks more often than it may; ask again in a second"))
    }

    /// Hears which view an agent holds. One of a start that is still to come tells that this state was restored from
    /// a backup: what is known to be wrong in it is put right before the agent is answered.
    async fn hear(&self, node: &str, version: &str) {
        let Some(newer) = self.generation.hear(version) else { return };
        self.metrics.restored.set(1);
        let (tokens, generation) = (self.tokens.clone(), self.generation.clone());
        let righted = tokio::task::spawn_blocking(move || {
            let revoked = tokens.revoke_all().map_err(|error| error.to_string());
            (revoked, generation.keep(newer).map_err(|error| error.to_string()))
        });
        let own = self.generation.number();
        match righted.await {
            Ok((Ok(revoked), Ok(()))) => tracing::error!(
                node,
                own,
                newer,
                revoked,
                "this controller's state was restored from an older one: compare its manifests and roots with what \
                 should be; join tokens made before are void, as they may have been used"
            ),
            Ok((tokens, count)) => tracing::error!(
                node,
                own,
                newer,
                ?tokens,
                ?count,
                "this controller's state was restored from an older one, and it cannot be written: remove the files \
                 in its folder tokens, they may have been used"
            ),
            Err(error) => tracing::error!(%error, "putting a restored state right"),
        }
    }

    fn count_certificate(&self, kind: CertificateKind) {
        self.metrics.certificates_issued.get_or_create(&CertificateLabels { kind }).inc();
    }
}

/// Serves agents until cancelled; connections that are open then are told to go, and end with their watches.
pub async fn serve(
    listener: impl tls::Listen,
    tls: watch::Receiver<Arc<ServerConfig>>,
    api: Arc<Api>,
) -> Result<(), tonic::transport::Error> {
    let cancel = api.cancel.clone();
    let incoming = tls::incoming(listener, tls, api.metrics.clone(), api.elsewhere.clone(), cancel.clone());
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(Some(MAX_STREAMS))
        .http2_max_header_list_size(Some(MAX_HEADERS))
        .timeout(REQUEST_TIMEOUT)
        .add_service(
            services::enrolment_server::EnrolmentServer::from_arc(api.clone())
                .max_decoding_message_size(MAX_JOIN),
        )
        .add_service(services::node_server::NodeServer::from_arc(api).max_decoding_message_size(MAX_WORD))
        .serve_with_incoming_shutdown(incoming, cancel.cancelled_owned())
        .await
}
