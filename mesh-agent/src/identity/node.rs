//! The node's own certificate: got with a join token, kept over restarts of the agent, renewed while it runs.
//!
//! The token is read only when there is no valid certificate. If the controller was away for longer than the
//! certificate's life the node has to join again, and does so by itself once a fresh token is in the file.

use std::{path::PathBuf, sync::Arc, time::Instant};

use mesh_core::{
    identity::{Subject, TrustDomain},
    view::Snapshot,
};
use rustls::ClientConfig;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{
    CertificateStatus, Certificates, Roots,
    channel::ALPN_H2,
    credential::{Credential, CredentialError},
    issue::{self, IssueError},
    join::{JoinError, JoinToken, join},
    roots_of,
    schedule::Renewal,
    store::client_config,
};
use crate::{
    config::{Config, HostPort},
    rpc::backoff,
    run_dir::{RunDir, RunDirError},
};

/// The node's key and certificate in the run directory.
pub const NODE_FILE: &str = "node.json";
/// The longest pause between two attempts to join.
const JOIN_RETRY_CAP: std::time::Duration = std::time::Duration::from_secs(5);

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
        "this node has no valid certificate: give --join-token-file with a token of mesh-controller token --node {0}"
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
    /// The join token, if one was given.
    pub token_file: Option<PathBuf>,
}

impl From<&Config> for NodeSettings {
    fn from(config: &Config) -> Self {
        Self {
            name: config.node.clone(),
            controller: config.controller.clone(),
            token_file: config.join_token_file.clone(),
        }
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
}

impl Node {
    /// The certificate of the run directory, or else one for the join token; for the latter it waits until the
    /// controller can be reached.
    pub async fn start(
        settings: NodeSettings,
        run_dir: RunDir,
        certificates: watch::Sender<Certificates>,
    ) -> Result<Self, NodeError> {
        let credential = match load(&settings, &run_dir)? {
            Some(credential) => credential,
            None => {
                let joined = join_when_reachable(&settings).await?;
                run_dir.write(NODE_FILE, &joined.to_file())?;
                tracing::info!(id = %joined.id(), expires = %joined.life().expires, "joined the mesh");
                joined
            }
        };
        let roots = credential.bundle().to_vec();
        let tls = watch::Sender::new(configure(&credential, &roots)?);
        let renewal = credential.renewal(&roots, OffsetDateTime::now_utc(), rand::random());
        let node = Self { settings, run_dir, credential, roots, renewal, tls, certificates };
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
        let configured = configure(&self.credential, &roots);
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
        let now = OffsetDateTime::now_utc();
        self.renewal.hasten_to(&self.credential.renewal(&self.roots, now, rand::random()));
    }

    /// Renews until it is told to stop.
    pub async fn run(
        mut self,
        channel: Channel,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        shutdown: CancellationToken,
    ) {
        loop {
            let pause = self.renewal.pause(OffsetDateTime::now_utc(), Instant::now());
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
            if !self.renewal.pause(OffsetDateTime::now_utc(), Instant::now()).is_zero() {
                continue;
            }
            // A renewal that is dropped half-way costs the controller a certificate and us nothing.
            let renewed = tokio::select! {
                () = shutdown.cancelled() => return,
                renewed = self.renew(channel.clone()) => renewed,
            };
            match renewed {
                Ok(credential) => self.put_in_force(credential),
                Err(error) => self.keep(&error),
            }
        }
    }

    async fn renew(&self, channel: Channel) -> Result<Credential, RenewError> {
        if OffsetDateTime::now_utc() < self.credential.life().expires {
            return Ok(issue::renew(channel, self.credential.id(), &self.roots).await?);
        }
        Ok(join(&self.settings.controller, &self.settings.name, &token(&self.settings)?).await?)
    }

    fn put_in_force(&mut self, credential: Credential) {
        match configure(&credential, &self.roots) {
            Ok(tls) => drop(self.tls.send_replace(tls)),
            Err(error) => return self.keep(&RenewError::Tls(error)),
        }
        if let Err(error) = self.run_dir.write(NODE_FILE, &credential.to_file()) {
            tracing::error!(%error, "the node's certificate is in force but would not survive a restart");
        }
        tracing::info!(id = %credential.id(), expires = %credential.life().expires, "node certificate renewed");
        self.renewal = credential.renewal(&self.roots, OffsetDateTime::now_utc(), rand::random());
        self.credential = credential;
        self.publish(None);
    }

    fn keep(&mut self, error: &RenewError) {
        tracing::warn!(%error, expires = %self.credential.life().expires, "the node's certificate was not renewed");
        self.renewal.failed(Instant::now(), rand::random());
        self.publish(Some(error.to_string()));
    }

    fn publish(&self, error: Option<String>) {
        let status = CertificateStatus { expires: Some(self.credential.life().expires), error };
        self.certificates.send_modify(|all| drop(all.insert(self.credential.id().clone(), status)));
    }
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

fn configure(credential: &Credential, roots: &Roots) -> Result<Arc<ClientConfig>, rustls::Error> {
    let trust_domain = credential.id().trust_domain();
    client_config(credential.certified(), roots, trust_domain, &[ALPN_H2]).map(Arc::new)
}

/// What an earlier run of the agent left; `None` when there is nothing, or nothing valid any more.
fn load(settings: &NodeSettings, run_dir: &RunDir) -> Result<Option<Credential>, NodeError> {
    let path = run_dir.path(NODE_FILE);
    let Some(content) = run_dir.read(NODE_FILE)? else { return Ok(None) };
    let credential = Credential::from_file(&content)
        .map_err(|source| NodeError::Damaged { path: path.clone(), source })?;
    if *credential.id().subject() != Subject::Node(settings.name.clone()) {
        let found = credential.id().to_string();
        return Err(NodeError::OtherNode { path, found, node: settings.name.clone() });
    }
    match credential.check(credential.bundle(), OffsetDateTime::now_utc()) {
        Ok(()) => Ok(Some(credential)),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the node's certificate is no longer valid, joining again");
            Ok(None)
        }
    }
}

fn token(settings: &NodeSettings) -> Result<JoinToken, NodeError> {
    let path = settings.token_file.as_ref().ok_or_else(|| NodeError::NoToken(settings.name.clone()))?;
    let text =
        std::fs::read_to_string(path).map_err(|source| JoinError::File { path: path.clone(), source })?;
    Ok(JoinToken::parse(&text).map_err(JoinError::from)?)
}

async fn join_when_reachable(settings: &NodeSettings) -> Result<Credential, NodeError> {
    let mut failures = 0;
    loop {
        let error = match join(&settings.controller, &settings.name, &token(settings)?).await {
            Ok(credential) => return Ok(credential),
            Err(error) if !error.is_transient() => return Err(error.into()),
            Err(error) => error,
        };
        failures += 1;
        let pause = backoff(failures, rand::random(), JOIN_RETRY_CAP);
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
        load(&NodeSettings { name: "n1".into(), controller, token_file: None }, &run_dir)
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
