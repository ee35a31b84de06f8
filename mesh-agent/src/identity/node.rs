//! The node's own certificate: got with a join token or a service-account token, kept over restarts of the agent, renewed
//! while it runs.
//!
//! The token is read only when there is no valid certificate. If the controller was away for longer than the
//! certificate's life the node has to join again, and does so by itself once a fresh token is in the file; one of a
//! service account is always fresh there. So is the file of roots beside it: a certificate that leads to none of them any
//! more, and is not renewed, counts as lost.

use std::{path::PathBuf, sync::Arc};

use mesh_core::{
    identity::{Subject, TrustDomain},
    view::Snapshot,
};
use rustls::ClientConfig;
use time::OffsetDateTime;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{
    CertificateStatus, Certificates, Roots,
    channel::ALPN_H2,
    credential::{Credential, CredentialError},
    issue::{self, IssueError, Issued},
    join::{JoinError, Proof, ProofFiles, join},
    roots_of,
    schedule::Renewal,
    store::client_config,
};
use crate::{
    config::{Config, HostPort},
    health::{Health, Kept},
    rpc::backoff,
    run_dir::{RunDir, RunDirError},
    surroundings::{Clock, Surroundings},
};

/// The node's key and certificate in the run directory.
pub const NODE_FILE: &str = "node.json";
/// The longest pause between two attempts to join.
const JOIN_RETRY_CAP: std::time::Duration = std::time::Duration::from_secs(5);
/// How often it is looked whether the certificate still leads to a root of the file.
const ROOTS_POLL: std::time::Duration = std::time::Duration::from_secs(30);
/// After a file could not be written, until the next attempt.
pub(super) const WRITE_RETRY: std::time::Duration = std::time::Duration::from_secs(10);

/// Why the agent cannot start as this node.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The run directory cannot be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// What is kept there cannot be read.
    #[error("{path} is damaged: {source}; remove it and start the agent with a fresh join token")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: CredentialError,
    },
    /// What is kept there is another node's.
    #[error(
        "{path} belongs to {found}, and this is node {node}; use another --run-dir, or remove it and join again"
    )]
    OtherNode {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Who we are.
        node: String,
    },
    /// There is no certificate and nothing to get one with.
    #[error(
        "this node has no valid certificate: give --join-token-file with a token of mesh-controller token --node {0}, or in \
         Kubernetes --join-service-account-token and --roots"
    )]
    NoToken(String),
    /// The join failed for good.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// No TLS configuration can be made.
    #[error("the node's certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// What the node needs to become itself.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// Its name.
    pub name: String,
    /// Where the controller is.
    pub controller: HostPort,
    /// Where its proof is.
    pub proof: ProofFiles,
}

impl From<&Config> for NodeSettings {
    fn from(config: &Config) -> Self {
        Self { name: config.node.clone(), controller: config.controller.clone(), proof: proof_files(config) }
    }
}

fn proof_files(config: &Config) -> ProofFiles {
    match (&config.join_service_account_token, &config.roots, &config.join_token_file) {
        (Some(token), Some(roots), _) => {
            ProofFiles::ServiceAccount { token: token.clone(), roots: roots.clone() }
        }
        (_, _, Some(token)) => ProofFiles::Token(token.clone()),
        _ => ProofFiles::Nowhere,
    }
}

/// A machine that is a node of the mesh.
#[derive(Debug)]
pub struct Node {
    settings: NodeSettings,
    run_dir: RunDir,
    credential: Credential,
    roots: Roots,
    renewal: Renewal,
    tls: watch::Sender<Arc<ClientConfig>>,
    certificates: watch::Sender<Certificates>,
    surroundings: Surroundings,
    health: Health,
    /// When to write again what could not be written.
    unsaved: Option<Instant>,
}

impl Node {
    /// The certificate of the run directory, or else one for the join token; for the latter it waits until the
    /// controller can be reached.
    pub async fn start(
        settings: NodeSettings,
        run_dir: RunDir,
        certificates: watch::Sender<Certificates>,
        surroundings: Surroundings,
        health: Health,
    ) -> Result<Self, NodeError> {
        let clock = &surroundings.clock;
        let kept =
            load(&settings, &run_dir, clock.now()).inspect_err(|error| health.damaged(Kept::Node, error))?;
        let joined = kept.is_none();
        let credential = match kept {
            Some(credential) => credential,
            None => {
                let Issued { credential, skew } = join_when_reachable(&settings, &surroundings).await?;
                health.skew(skew);
                tracing::info!(id = %credential.id(), expires = %credential.life().expires, "joined the mesh");
                credential
            }
        };
        let roots = credential.bundle().to_vec();
        let tls = watch::Sender::new(configure(&credential, &roots, clock)?);
        let renewal = credential.renewal(&roots, clock.now(), surroundings.chance.draw());
        let unsaved = None;
        let mut node = Self {
            settings,
            run_dir,
            credential,
            roots,
            renewal,
            tls,
            certificates,
            surroundings,
            health,
            unsaved,
        };
        if joined {
            node.save();
        }
        node.publish(None);
        Ok(node)
    }

    /// The trust domain that the node is in.
    pub fn trust_domain(&self) -> &TrustDomain {
        self.credential.id().trust_domain()
    }

    /// The roots in force.
    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    /// For connections to the controller; changes as certificate and roots do.
    pub fn tls(&self) -> watch::Receiver<Arc<ClientConfig>> {
        self.tls.subscribe()
    }

    /// Takes the roots of a view. If one of them is new, a certificate under it is asked for soon.
    pub fn adopt(&mut self, snapshot: &Snapshot) {
        let roots = roots_of(snapshot);
        if roots == self.roots {
            return;
        }
        let configured = configure(&self.credential, &roots, &self.surroundings.clock);
        match configured {
            // Nobody is told: the next connection uses the new roots, and one that stands needs not end for them.
            Ok(tls) => self.tls.send_if_modified(|current| {
                *current = tls;
                false
            }),
            Err(error) => {
                return tracing::error!(%error, "the view's roots cannot be used, the last ones stay");
            }
        };
        self.roots = roots;
        let (now, fraction) = (self.surroundings.clock.now(), self.surroundings.chance.draw());
        self.renewal.hasten_to(&self.credential.renewal(&self.roots, now, fraction));
    }

    /// Renews until it is told to stop.
    pub async fn run(
        mut self,
        channel: Channel,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        shutdown: CancellationToken,
    ) {
        let mut look = Instant::now();
        loop {
            if look <= Instant::now() {
                look = Instant::now() + ROOTS_POLL;
                if self.is_lost() {
                    tracing::warn!("the node's certificate leads to none of the roots of --roots any more");
                    self.renewal.hasten(self.surroundings.clock.now());
                }
            }
            if self.unsaved.is_some_and(|again| again <= Instant::now()) {
                self.save();
            }
            let until_save = self.unsaved.map(|again| again.saturating_duration_since(Instant::now()));
            let until_due = self.renewal.pause(self.surroundings.clock.now(), Instant::now());
            let pause = until_save.map_or(until_due, |save| save.min(until_due));
            let pause = match self.settings.proof {
                ProofFiles::ServiceAccount { .. } => pause.min(ROOTS_POLL),
                ProofFiles::Nowhere | ProofFiles::Token(_) => pause,
            };
            // All branches can be dropped at any point: each only waits.
            tokio::select! {
                () = shutdown.cancelled() => return,
                Ok(()) = snapshots.changed() => {
                    let snapshot = snapshots.borrow_and_update().clone();
                    if let Some(snapshot) = snapshot {
                        self.adopt(&snapshot);
                    }
                    continue;
                }
                () = tokio::time::sleep(pause) => {}
            }
            if !self.renewal.pause(self.surroundings.clock.now(), Instant::now()).is_zero() {
                continue;
            }
            // A renewal that is dropped half-way costs the controller a certificate and us nothing.
            let renewed = tokio::select! {
                () = shutdown.cancelled() => return,
                renewed = self.renew(channel.clone()) => renewed,
            };
            match renewed {
                Ok(renewed) => self.put_in_force(renewed),
                Err(error) => self.keep(&error),
            }
        }
    }

    async fn renew(&self, channel: Channel) -> Result<Renewed, RenewError> {
        let clock = &self.surroundings.clock;
        if clock.now() < self.credential.life().expires {
            let renewed = issue::renew(channel, self.credential.id(), &self.roots, clock).await;
            if renewed.is_ok() || !self.is_lost() {
                return Ok(Renewed { issued: renewed?, roots: self.roots.clone() });
            }
        }
        let (settings, proof) = (&self.settings, proof(&self.settings)?);
        let issued = join(&settings.controller, &settings.name, &proof, &self.surroundings).await?;
        // Those that were in force may be those of a mesh that has moved on.
        Ok(Renewed { roots: issued.credential.bundle().to_vec(), issued })
    }

    /// The roots that are written for us are others than those that the certificate leads to.
    fn is_lost(&self) -> bool {
        let written = self.settings.proof.roots().ok().flatten();
        written.is_some_and(|roots| self.credential.check(&roots, self.surroundings.clock.now()).is_err())
    }

    fn put_in_force(&mut self, renewed: Renewed) {
        let Renewed { issued: Issued { credential, skew }, roots } = renewed;
        self.health.skew(skew);
        match configure(&credential, &roots, &self.surroundings.clock) {
            Ok(tls) => drop(self.tls.send_replace(tls)),
            Err(error) => return self.keep(&RenewError::Tls(error)),
        }
        tracing::info!(id = %credential.id(), expires = %credential.life().expires, "node certificate renewed");
        let (now, fraction) = (self.surroundings.clock.now(), self.surroundings.chance.draw());
        self.renewal = credential.renewal(&roots, now, fraction);
        (self.credential, self.roots) = (credential, roots);
        self.save();
        self.publish(None);
    }

    fn save(&mut self) {
        let written = self.run_dir.write(NODE_FILE, &self.credential.to_file());
        self.health.written(Kept::Node, &written);
        self.unsaved = written.is_err().then(|| Instant::now() + WRITE_RETRY);
        if let Err(error) = written {
            tracing::error!(%error, "the node's certificate is in force but would not survive a restart");
        }
    }

    fn keep(&mut self, error: &RenewError) {
        tracing::warn!(%error, expires = %self.credential.life().expires, "the node's certificate was not renewed");
        self.renewal.failed(Instant::now(), self.surroundings.chance.draw());
        self.publish(Some(error.to_string()));
    }

    fn publish(&self, error: Option<String>) {
        let root = self.credential.root(&self.roots, self.surroundings.clock.now());
        let status = CertificateStatus { expires: Some(self.credential.life().expires), root, error };
        self.certificates.send_modify(|all| drop(all.insert(self.credential.id().clone(), status)));
    }
}

/// A new certificate, and the roots to go with it.
struct Renewed {
    issued: Issued,
    roots: Roots,
}

#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error("it has expired, and joining again failed: {0}")]
    Join(#[from] JoinError),
    #[error("it has expired: {0}")]
    Token(#[from] NodeError),
    #[error(transparent)]
    Tls(rustls::Error),
}

fn configure(
    credential: &Credential,
    roots: &Roots,
    clock: &Clock,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let trust_domain = credential.id().trust_domain();
    client_config(credential.certified(), roots, trust_domain, &[ALPN_H2], clock).map(Arc::new)
}

/// What an earlier run of the agent left; `None` when there is nothing, or nothing valid any more.
fn load(
    settings: &NodeSettings,
    run_dir: &RunDir,
    now: OffsetDateTime,
) -> Result<Option<Credential>, NodeError> {
    let path = run_dir.path(NODE_FILE);
    let Some(content) = run_dir.read(NODE_FILE)? else { return Ok(None) };
    let credential = Credential::from_file(&content)
        .map_err(|source| NodeError::Damaged { path: path.clone(), source })?;
    if *credential.id().subject() != Subject::Node(settings.name.clone()) {
        let found = credential.id().to_string();
        return Err(NodeError::OtherNode { path, found, node: settings.name.clone() });
    }
    match credential.check(credential.bundle(), now) {
        Ok(()) => Ok(Some(credential)),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the node's certificate is no longer valid, joining again");
            Ok(None)
        }
    }
}

fn proof(settings: &NodeSettings) -> Result<Proof, NodeError> {
    settings.proof.read()?.ok_or_else(|| NodeError::NoToken(settings.name.clone()))
}

async fn try_join(settings: &NodeSettings, surroundings: &Surroundings) -> Result<Issued, NodeError> {
    let proof = proof(settings)?;
    Ok(join(&settings.controller, &settings.name, &proof, surroundings).await?)
}

async fn join_when_reachable(
    settings: &NodeSettings,
    surroundings: &Surroundings,
) -> Result<Issued, NodeError> {
    let mut failures = 0;
    loop {
        let error = match try_join(settings, surroundings).await {
            Ok(issued) => return Ok(issued),
            Err(NodeError::Join(error)) if error.is_transient() => error,
            Err(error) => return Err(error),
        };
        failures += 1;
        let pause = backoff(failures, surroundings.chance.draw(), JOIN_RETRY_CAP);
        tracing::warn!(%error, ?pause, "cannot join yet, trying again");
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::identity::SpiffeId;
    use time::Duration;

    use super::*;
    use crate::identity::credential::{KeyRequest, tests::Authority};

    fn kept(content: &[u8]) -> Result<Option<Credential>, NodeError> {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::open(scratch.path()).unwrap();
        run_dir.write(NODE_FILE, content).unwrap();
        let controller = "controller:15012".parse().unwrap();
        let settings = NodeSettings { name: "n1".into(), controller, proof: ProofFiles::Nowhere };
        load(&settings, &run_dir, OffsetDateTime::now_utc())
    }

    #[test]
    fn a_valid_certificate_is_used_again_and_an_expired_one_is_not() {
        let authority = Authority::new();
        let valid = authority.credential("spiffe://td/node/n1", Duration::HOUR);
        assert!(kept(&valid.to_file()).unwrap().is_some());

        let request = KeyRequest::new(&SpiffeId::parse("spiffe://td/node/n1").unwrap()).unwrap();
        let answer = authority.answer(&request.csr_der(), -Duration::MINUTE);
        let then = OffsetDateTime::now_utc() - 2 * Duration::MINUTE;
        let expired = request.complete(answer, &[], then).unwrap();
        assert!(kept(&expired.to_file()).unwrap().is_none());
    }

    #[test]
    fn another_nodes_file_is_an_error_with_its_cure() {
        for other in ["spiffe://td/node/n2", "spiffe://td/ns/shop/sa/n1"] {
            let error = kept(&Authority::new().credential(other, Duration::HOUR).to_file()).unwrap_err();
            assert!(matches!(error, NodeError::OtherNode { .. }));
            assert!(error.to_string().contains("--run-dir"), "{error}");
        }
    }
}
