//! How a machine becomes a node of the mesh: a join token, used once, or in Kubernetes the service-account token of the
//! agent's pod, for the node's first certificate.
//!
//! The machine knows no root yet. A join token names the hash of one, and the controller is believed only if its chain
//! leads to the root with that hash; beside a service-account token there is a file of roots. Who can read the token can
//! join, but who sits in between learns nothing.

use std::{fmt, io, path::PathBuf, sync::Arc};

use mesh_core::{
    identity::{SpiffeId, TrustDomain},
    wire::proto,
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::ring,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::{
    channel::{ALPN_H2, ConnectError, open},
    credential::{CredentialError, KeyRequest},
    hex,
    issue::{Issued, complete},
    verify::{self, identity_of},
};
use crate::{
    config::HostPort,
    rpc::{self, CALL_TIMEOUT, EnrolmentClient},
    surroundings::{Clock, Surroundings},
    trust::root_store,
};

/// Bytes of a token's secret.
const SECRET_BYTES: usize = 32;

/// Why a text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin as tokens of this version do.
    #[error("it must begin with 'nm1.': make one with mesh-controller token")]
    Version,
    /// It does not have a token's parts.
    #[error("it is cut short or damaged: make one with mesh-controller token")]
    Parts,
}

/// The right to become one node, once: `nm1.NODE.SECRET.HASH`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    text: String,
    node: String,
    root_sha256: [u8; 32],
}

impl JoinToken {
    /// Reads a token; space around it does not count.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let rest = text.strip_prefix("nm1.").ok_or(TokenError::Version)?;
        // From the end: a node's name may have dots.
        let mut parts = rest.rsplitn(3, '.');
        let (Some(hash), Some(secret), Some(node)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(TokenError::Parts);
        };
        let hash = hex::decode(hash).and_then(|bytes| bytes.try_into().ok());
        let secret = hex::decode(secret).filter(|bytes| bytes.len() == SECRET_BYTES);
        match (hash, secret) {
            (Some(root_sha256), Some(_)) if !node.is_empty() => {
                Ok(Self { text: text.to_owned(), node: node.to_owned(), root_sha256 })
            }
            _ => Err(TokenError::Parts),
        }
    }

    /// The node that it is for.
    pub fn node(&self) -> &str {
        &self.node
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("node", &self.node).finish_non_exhaustive()
    }
}

/// What a machine proves with that it is a node.
#[derive(Clone)]
pub enum Proof {
    /// A join token.
    Token(JoinToken),
    /// The service-account token of our pod, and the roots of which the controller has one.
    ServiceAccount {
        /// What the kubelet wrote for us.
        token: Zeroizing<String>,
        /// Any of them will do.
        roots: Vec<CertificateDer<'static>>,
    },
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(token) => token.fmt(f),
            Self::ServiceAccount { roots, .. } => {
                f.debug_struct("ServiceAccount").field("roots", &roots.len()).finish_non_exhaustive()
            }
        }
    }
}

/// Where a proof is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ProofFiles {
    /// There is none.
    #[default]
    Nowhere,
    /// `--join-token-file`.
    Token(PathBuf),
    /// Both are written for us and change: they are read whenever they are needed.
    ServiceAccount {
        /// `--join-service-account-token`.
        token: PathBuf,
        /// `--roots`.
        roots: PathBuf,
    },
}

impl ProofFiles {
    /// What they hold now; nothing when there are none.
    pub fn read(&self) -> Result<Option<Proof>, JoinError> {
        match self {
            Self::Nowhere => Ok(None),
            Self::Token(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| JoinError::File { path: path.clone(), source })?;
                Ok(Some(Proof::Token(JoinToken::parse(&text)?)))
            }
            Self::ServiceAccount { token: path, .. } => {
                let text = std::fs::read_to_string(path).map_err(|source| JoinError::AccountFile {
                    path: path.clone(),
                    reason: source.to_string(),
                })?;
                let token = Zeroizing::new(text.trim().to_owned());
                Ok(Some(Proof::ServiceAccount { token, roots: self.roots()?.unwrap_or_default() }))
            }
        }
    }

    /// The roots that are written for us, as they are now; nothing where none are.
    pub fn roots(&self) -> Result<Option<Vec<CertificateDer<'static>>>, JoinError> {
        let Self::ServiceAccount { roots: path, .. } = self else { return Ok(None) };
        let unusable = |reason: String| JoinError::AccountFile { path: path.clone(), reason };
        let text = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
        let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
        let roots = roots.map_err(|error| unusable(error.to_string()))?;
        match roots.len() {
            0 => Err(unusable("it has no certificate".to_owned())),
            _ => Ok(Some(roots)),
        }
    }
}

/// Why this machine did not become a node.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No token.
    #[error("cannot read the join token {path}: {source}")]
    File {
        /// `--join-token-file`.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// What is written for us in Kubernetes is not there, or not yet.
    #[error(
        "cannot use {path}: {reason}; mount a projected service-account token and the ConfigMap nodemesh-roots"
    )]
    AccountFile {
        /// `--join-service-account-token` or `--roots`.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The controller's chain leads to none of the roots that are written for us.
    #[error(
        "{source}; none of the roots of --roots leads to it: this is another controller, somebody in between, or the \
         file is not yet as the mesh's roots are now"
    )]
    Untrusted {
        /// What the handshake said.
        source: ConnectError,
    },
    /// Not a token.
    #[error("the join token cannot be used: {0}")]
    Token(#[from] TokenError),
    /// Another node's token.
    #[error(
        "the join token is for node {token}, this is node {node}: make one with mesh-controller token --node {node}"
    )]
    OtherNode {
        /// Whom the token is for.
        token: String,
        /// Who we are.
        node: String,
    },
    /// The node's name cannot be part of an identity.
    #[error("this node's name cannot be used: {0}")]
    Name(#[from] mesh_core::identity::IdentityError),
    /// No connection, or one to somebody who is not the controller of the token.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The controller said no.
    #[error(
        "the controller refused the join: {0}; if the token was used or has expired, make another with mesh-controller token"
    )]
    Refused(String),
    /// The controller does not take this service-account token; a later one of the same file it may.
    #[error("the controller did not take the service-account token: {0}")]
    Unproven(String),
    /// The controller takes no token such as this one.
    #[error("the controller refused the join: {0}")]
    Denied(String),
    /// The controller could not answer.
    #[error("the controller did not answer the join: {0}")]
    Unanswered(String),
    /// The answer is not a certificate for us.
    #[error("the controller's answer to the join cannot be used: {0}")]
    Answer(#[from] CredentialError),
    /// The controller's roots are not those that we were told.
    #[error("the controller's roots do not include the one that the join token, or the file of roots, names")]
    OtherRoots,
}

impl JoinError {
    /// Whether another attempt may succeed without anybody's doing.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect(error) => error.is_transient(),
            Self::Unanswered(_) | Self::Unproven(_) => true,
            Self::AccountFile { .. } | Self::Untrusted { .. } => true,
            Self::File { .. } | Self::Token(_) | Self::OtherNode { .. } | Self::Name(_) => false,
            Self::Refused(_) | Self::Denied(_) | Self::Answer(_) | Self::OtherRoots => false,
        }
    }
}

/// Trades the proof for a certificate.
pub async fn join(
    controller: &HostPort,
    node: &str,
    proof: &Proof,
    surroundings: &Surroundings,
) -> Result<Issued, JoinError> {
    if let Proof::Token(token) = proof
        && token.node != node
    {
        return Err(JoinError::OtherNode { token: token.node.clone(), node: node.to_owned() });
    }
    let tls = anchored(Anchor::of(proof)?, &surroundings.clock);
    let opened = open(controller, &surroundings.dial, tls).await;
    let (stream, found) = opened.map_err(|error| unreached(proof, error))?;
    let id = SpiffeId::node(found.trust_domain(), node)?;
    let request = KeyRequest::new(&id)?;
    let mut only = Some(stream);
    let channel = rpc::channel(move || {
        let stream = only.take().ok_or_else(|| io::Error::other("the connection of the join was lost"));
        std::future::ready(stream)
    });
    let (token, service_account_token) = match proof {
        Proof::Token(token) => (token.text.clone(), String::new()),
        Proof::ServiceAccount { token, .. } => (String::new(), token.to_string()),
    };
    let message = proto::JoinRequest {
        node: node.to_owned(),
        token,
        csr_der: request.csr_der(),
        service_account_token,
    };
    let mut client = EnrolmentClient::new(channel);
    let answer = tokio::time::timeout(CALL_TIMEOUT, client.join(message))
        .await
        .map_err(|_| JoinError::Unanswered(format!("nothing came within {CALL_TIMEOUT:?}")))?
        .map_err(|status| refusal(proof, status))?
        .into_inner();
    let told = |root: &Vec<u8>| match proof {
        Proof::Token(token) => sha256(root) == token.root_sha256,
        Proof::ServiceAccount { roots, .. } => roots.iter().any(|it| it.as_ref() == root),
    };
    if !answer.roots_der.iter().any(told) {
        return Err(JoinError::OtherRoots);
    }
    Ok(complete(request, answer, &[], &surroundings.clock)?)
}

/// The file of roots changes at a rotation, and reaches us after the controller: a chain that does not lead there may
/// lead there soon. A join token is for one root for good.
fn unreached(proof: &Proof, error: ConnectError) -> JoinError {
    match proof {
        Proof::ServiceAccount { .. } if error.is_untrusted() => JoinError::Untrusted { source: error },
        _ => JoinError::Connect(error),
    }
}

fn refusal(proof: &Proof, status: tonic::Status) -> JoinError {
    use tonic::Code;
    let text = format!("{} ({:?})", status.message(), status.code());
    match status.code() {
        Code::Unauthenticated if matches!(proof, Proof::ServiceAccount { .. }) => JoinError::Unproven(text),
        Code::PermissionDenied if matches!(proof, Proof::ServiceAccount { .. }) => JoinError::Denied(text),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted | Code::Unknown => {
            JoinError::Unanswered(text)
        }
        Code::ResourceExhausted | Code::Internal => JoinError::Unanswered(text),
        _ => JoinError::Refused(text),
    }
}

/// TLS 1.3 without a client certificate, to the controller that leads to what the proof names.
fn anchored(anchor: Anchor, clock: &Clock) -> Arc<ClientConfig> {
    let verifier = Arc::new(AnchoredVerifier { anchor });
    let provider = Arc::new(ring::default_provider());
    let mut config = ClientConfig::builder_with_details(provider, Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])
        .expect("ring speaks TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// The chain's last certificate is not the root of the token.
#[derive(Debug, thiserror::Error)]
#[error(
    "the controller's chain does not end in the root that the join token names: this is another controller, or somebody in between"
)]
struct NotPinned;

/// To what the controller's chain has to lead.
#[derive(Debug)]
enum Anchor {
    /// The root with this hash, which ends the chain.
    Pinned([u8; 32]),
    /// One of these.
    Roots(Arc<RootCertStore>),
}

impl Anchor {
    fn of(proof: &Proof) -> Result<Self, JoinError> {
        match proof {
            Proof::Token(token) => Ok(Self::Pinned(token.root_sha256)),
            Proof::ServiceAccount { roots, .. } => {
                Ok(Self::Roots(root_store(roots).map_err(CredentialError::Tls)?))
            }
        }
    }

    /// The roots that this chain has to lead to.
    fn roots(&self, intermediates: &[CertificateDer<'_>]) -> Result<Arc<RootCertStore>, Error> {
        match self {
            Self::Roots(roots) => Ok(roots.clone()),
            Self::Pinned(hash) => {
                let pinned = intermediates.last().filter(|root| sha256(root) == *hash);
                let root = pinned.ok_or_else(|| verify::invalid(NotPinned))?;
                root_store(&[root.clone().into_owned()])
            }
        }
    }
}

/// Believes a server whose chain leads to the anchor, and whose leaf is the controller's.
#[derive(Debug)]
struct AnchoredVerifier {
    anchor: Anchor,
}

/// The trust domain of the controller's certificate.
fn trust_domain(leaf: &CertificateDer<'_>) -> Result<TrustDomain, Error> {
    let id = identity_of(leaf).map_err(verify::invalid)?;
    if id == SpiffeId::controller(id.trust_domain()) {
        Ok(id.trust_domain().clone())
    } else {
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }
}

impl ServerCertVerifier for AnchoredVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let roots = self.anchor.roots(intermediates)?;
        verify::SpiffeServerVerifier::new(roots, trust_domain(end_entity)?).verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(verify::only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify::tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        verify::schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_and_does_not_print_its_secret() {
        let (secret, hash) = ("5e".repeat(32), "0f".repeat(32));
        let token = JoinToken::parse(&format!(" nm1.node-1.rack.example.{secret}.{hash}\n")).unwrap();
        assert_eq!(token.node(), "node-1.rack.example");
        assert_eq!(token.root_sha256, [0x0f; 32]);
        assert!(!format!("{token:?}").contains("5e5e"));
    }

    #[test]
    fn a_service_account_token_is_read_with_its_roots_and_does_not_print() {
        let scratch = tempfile::tempdir().unwrap();
        let (token, roots) = (scratch.path().join("token"), scratch.path().join("roots.pem"));
        let files = ProofFiles::ServiceAccount { token: token.clone(), roots: roots.clone() };
        let unusable = |expected: &str| {
            let error = files.read().unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.is_transient(), "the kubelet writes it, by and by");
        };
        unusable("token: No such file");
        std::fs::write(&token, "a.secret.b\n").unwrap();
        unusable("roots.pem: No such file");
        std::fs::write(&roots, "").unwrap();
        unusable("roots.pem: it has no certificate");
        std::fs::write(&roots, "-----BEGIN CERTIFICATE-----\n***\n-----END CERTIFICATE-----\n").unwrap();
        unusable("roots.pem");
        std::fs::write(&roots, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".repeat(2))
            .unwrap();
        let proof = files.read().unwrap().unwrap();
        assert!(!format!("{proof:?}").contains("secret"));
        let Proof::ServiceAccount { token, roots } = proof else { panic!("another kind of proof") };
        assert_eq!((token.as_str(), roots.len()), ("a.secret.b", 2));
    }

    #[test]
    fn what_is_no_token_is_refused_with_its_cure() {
        let (secret, hash) = ("5e".repeat(32), "0f".repeat(32));
        for (text, expected) in [
            (String::new(), TokenError::Version),
            (format!("nm2.a.{secret}.{hash}"), TokenError::Version),
            (format!("nm1.{secret}.{hash}"), TokenError::Parts),
            (format!("nm1..{secret}.{hash}"), TokenError::Parts),
            (format!("nm1.a.{}.{hash}", &secret[2..]), TokenError::Parts),
            (format!("nm1.a.{secret}.{}", &hash[1..]), TokenError::Parts),
            (format!("nm1.a.{secret}.{hash}0"), TokenError::Parts),
        ] {
            let error = JoinToken::parse(&text).unwrap_err();
            assert_eq!(error, expected, "{text}");
            assert!(error.to_string().contains("mesh-controller token"));
        }
    }
}
