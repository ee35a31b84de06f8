//! How a machine becomes a node of the mesh: a join token, used once, for the node's first certificate.
//!
//! The machine knows no root yet. The token names the hash of one, and the controller is believed only if its chain
//! leads to the root with that hash: who can read the token can join, but who sits in between learns nothing.

use std::{fmt, io, path::PathBuf, sync::Arc};

use mesh_core::{
    identity::{SpiffeId, TrustDomain},
    wire::proto,
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::ring,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};

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
    /// The controller could not answer.
    #[error("the controller did not answer the join: {0}")]
    Unanswered(String),
    /// The answer is not a certificate for us.
    #[error("the controller's answer to the join cannot be used: {0}")]
    Answer(#[from] CredentialError),
    /// The controller's roots are not those of the token.
    #[error("the controller's roots do not include the one that the join token names")]
    OtherRoots,
}

impl JoinError {
    /// Whether another attempt with the same token may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect(error) => error.is_transient(),
            Self::Unanswered(_) => true,
            Self::File { .. } | Self::Token(_) | Self::OtherNode { .. } | Self::Name(_) => false,
            Self::Refused(_) | Self::Answer(_) | Self::OtherRoots => false,
        }
    }
}

/// Trades the token for a certificate.
pub async fn join(
    controller: &HostPort,
    node: &str,
    token: &JoinToken,
    surroundings: &Surroundings,
) -> Result<Issued, JoinError> {
    if token.node != node {
        return Err(JoinError::OtherNode { token: token.node.clone(), node: node.to_owned() });
    }
    let (stream, found) = open(controller, &surroundings.dial, pinning(token, &surroundings.clock)).await?;
    let id = SpiffeId::node(found.trust_domain(), node)?;
    let request = KeyRequest::new(&id)?;
    let mut only = Some(stream);
    let channel = rpc::channel(move || {
        let stream = only.take().ok_or_else(|| io::Error::other("the connection of the join was lost"));
        std::future::ready(stream)
    });
    let message =
        proto::JoinRequest { node: node.to_owned(), token: token.text.clone(), csr_der: request.csr_der() };
    let mut client = EnrolmentClient::new(channel);
    let answer = tokio::time::timeout(CALL_TIMEOUT, client.join(message))
        .await
        .map_err(|_| JoinError::Unanswered(format!("nothing came within {CALL_TIMEOUT:?}")))?
        .map_err(refusal)?
        .into_inner();
    if !answer.roots_der.iter().any(|root| sha256(root) == token.root_sha256) {
        return Err(JoinError::OtherRoots);
    }
    Ok(complete(request, answer, &[], &surroundings.clock)?)
}

fn refusal(status: tonic::Status) -> JoinError {
    use tonic::Code;
    let text = format!("{} ({:?})", status.message(), status.code());
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted | Code::Unknown => {
            JoinError::Unanswered(text)
        }
        Code::ResourceExhausted | Code::Internal => JoinError::Unanswered(text),
        _ => JoinError::Refused(text),
    }
}

/// TLS 1.3 without a client certificate, to the controller whose root the token pins.
fn pinning(token: &JoinToken, clock: &Clock) -> Arc<ClientConfig> {
    let verifier = Arc::new(PinnedVerifier { root_sha256: token.root_sha256 });
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

/// Believes a server whose chain ends in the root with this hash, leads there, and whose leaf is the controller's.
#[derive(Debug)]
struct PinnedVerifier {
    root_sha256: [u8; 32],
}

impl PinnedVerifier {
    fn trust_domain(
        &self,
        leaf: &CertificateDer<'_>,
        root: &CertificateDer<'_>,
    ) -> Result<TrustDomain, Error> {
        if sha256(root) != self.root_sha256 {
            return Err(verify::invalid(NotPinned));
        }
        let id = identity_of(leaf).map_err(verify::invalid)?;
        if id == SpiffeId::controller(id.trust_domain()) {
            Ok(id.trust_domain().clone())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let (root, issuers) = intermediates.split_last().ok_or_else(|| verify::invalid(NotPinned))?;
        let trust_domain = self.trust_domain(end_entity, root)?;
        let roots = root_store(&[root.clone().into_owned()])?;
        verify::SpiffeServerVerifier::new(roots, trust_domain).verify_server_cert(
            end_entity,
            issuers,
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
