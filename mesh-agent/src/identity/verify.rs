//! Checks a peer's certificate the SPIFFE way: the chain must lead to a root of the trust domain, and the one URI SAN
//! is the identity (X509-SVID §3–5). DNS names and common names mean nothing.
//!
//! Stands apart from `rustls`' own verifiers because those check a DNS name, which workloads do not have.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::{
    identity::{SpiffeId, TrustDomain},
    refusal::Reason,
};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{WebPkiSupportedAlgorithms, ring, verify_tls13_signature},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::{extensions::GeneralName, prelude::FromDer};

/// Why a certificate carries no identity of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateIdentityError {
    /// Not X.509, or its SAN extension cannot be read.
    #[error("the certificate cannot be read")]
    Malformed,
    /// X509-SVID §2 wants exactly one URI SAN.
    #[error("the certificate has {0} URI names, it must have exactly one")]
    UriCount(usize),
    /// The URI is not an identity.
    #[error(transparent)]
    Identity(#[from] mesh_core::identity::IdentityError),
    /// The identity is of another trust domain.
    #[error("{0} is not of this trust domain")]
    Foreign(SpiffeId),
    /// X509-SVID §4.3: a leaf signs handshakes, and no certificates or revocation lists.
    #[error("the certificate may not sign handshakes, or may sign more than that")]
    Purpose,
    /// No certificate at all.
    #[error("the peer sent no certificate")]
    Missing,
}

/// The identity in a leaf certificate. Does not check the chain: the handshake did.
pub fn identity_of(leaf: &CertificateDer<'_>) -> Result<SpiffeId, CertificateIdentityError> {
    let malformed = |_| CertificateIdentityError::Malformed;
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(leaf)
        .map_err(|_| CertificateIdentityError::Malformed)?;
    let usage = certificate.key_usage().map_err(malformed)?.map(|extension| extension.value);
    if usage.is_some_and(|usage| !usage.digital_signature() || usage.key_cert_sign() || usage.crl_sign()) {
        return Err(CertificateIdentityError::Purpose);
    }
    let san = certificate.subject_alternative_name().map_err(malformed)?;
    let uris: Vec<&str> = san
        .map(|extension| &extension.value.general_names)
        .into_iter()
        .flatten()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris.as_slice() {
        [uri] => Ok(SpiffeId::parse(uri)?),
        other => Err(CertificateIdentityError::UriCount(other.len())),
    }
}

/// The identity of a peer after its handshake.
pub fn peer_identity(chain: Option<&[CertificateDer<'_>]>) -> Result<SpiffeId, CertificateIdentityError> {
    identity_of(chain.and_then(<[_]>::first).ok_or(CertificateIdentityError::Missing)?)
}

/// Until when a peer's certificate is valid, after its handshake; long ago for one that cannot be read.
pub fn peer_until(chain: Option<&[CertificateDer<'_>]>) -> SystemTime {
    let leaf = chain.and_then(<[_]>::first);
    let seconds = leaf.and_then(|leaf| {
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(leaf).ok()?;
        u64::try_from(parsed.validity().not_after.timestamp()).ok()
    });
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.unwrap_or(0))
}

fn check_identity(leaf: &CertificateDer<'_>, trust_domain: &TrustDomain) -> Result<(), Error> {
    let id = identity_of(leaf).and_then(|id| {
        if id.trust_domain() == trust_domain { Ok(()) } else { Err(CertificateIdentityError::Foreign(id)) }
    });
    id.map_err(invalid)
}

/// A certificate that the handshake must not take, with the reason.
pub(super) fn invalid(reason: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::new(reason))))
}

/// Why a handshake failed, for a person: rustls prints our own reasons as debug text.
pub fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(reason)) => reason.0.to_string(),
        other => other.to_string(),
    }
}

/// What is wrong with a peer's certificate, as far as its handshake tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateFault {
    /// There is none.
    Missing,
    /// Its time has passed.
    Expired,
    /// Its time has not come.
    NotYetValid,
    /// It leads to none of our roots, or is none of ours otherwise.
    Untrusted,
    /// Not for this end of a connection, or not for connections.
    Purpose,
    /// It carries no identity of this mesh, or more than one.
    Identity,
}

impl CertificateFault {
    /// The fault that ended a handshake; `None` if the certificate was not why.
    pub fn of(error: &Error) -> Option<Self> {
        let fault = match error {
            Error::NoCertificatesPresented => return Some(Self::Missing),
            Error::InvalidCertificate(fault) => fault,
            _ => return None,
        };
        Some(match fault {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                Self::Purpose
            }
            CertificateError::Other(reason) => match reason.0.downcast_ref() {
                Some(CertificateIdentityError::Purpose) => Self::Purpose,
                Some(_) => Self::Identity,
                None => Self::Untrusted,
            },
            _ => Self::Untrusted,
        })
    }

    /// Why a source with it is refused.
    pub fn of_source(self) -> Reason {
        match self {
            Self::Missing => Reason::CertificateMissing,
            Self::Expired => Reason::CertificateExpired,
            Self::NotYetValid => Reason::CertificateNotYetValid,
            Self::Untrusted => Reason::CertificateUntrusted,
            Self::Purpose => Reason::CertificatePurpose,
            Self::Identity => Reason::CertificateIdentity,
        }
    }

    /// Why nothing is opened to a destination with it. A server always shows one.
    pub fn of_destination(self) -> Reason {
        match self {
            Self::Missing => Reason::PeerHandshakeFailed,
            Self::Expired => Reason::PeerCertificateExpired,
            Self::NotYetValid => Reason::PeerCertificateNotYetValid,
            Self::Untrusted => Reason::PeerCertificateUntrusted,
            Self::Purpose => Reason::PeerCertificatePurpose,
            Self::Identity => Reason::PeerCertificateIdentity,
        }
    }
}

/// What a verifier says to a TLS 1.2 signature; none of our configurations negotiates it.
pub(super) fn only_tls13() -> Error {
    Error::General("only TLS 1.3 is spoken here".into())
}

/// Whether a server's handshake was signed with its certificate's key.
pub(super) fn tls13_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    verify_tls13_signature(message, certificate, signature, &algorithms())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    ring::default_provider().signature_verification_algorithms
}

/// The signatures that are understood.
pub(super) fn schemes() -> Vec<SignatureScheme> {
    algorithms().supported_schemes()
}

/// Verifies servers' certificates against the roots of one trust domain. Whose certificate it must be is for the
/// caller to check with [`peer_identity`], before it sends a byte.
#[derive(Debug)]
pub struct SpiffeServerVerifier {
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
}

impl SpiffeServerVerifier {
    /// A verifier for a trust domain with these roots.
    pub fn new(roots: Arc<RootCertStore>, trust_domain: TrustDomain) -> Arc<Self> {
        Arc::new(Self { roots, trust_domain })
    }
}

impl ServerCertVerifier for SpiffeServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            algorithms().all,
        )?;
        check_identity(end_entity, &self.trust_domain)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

/// Verifies clients' certificates against the roots of one trust domain; a client without one is refused.
#[derive(Debug)]
pub struct SpiffeClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: TrustDomain,
}

impl SpiffeClientVerifier {
    /// A verifier for a trust domain with these roots. Fails when there is no root.
    pub fn new(roots: Arc<RootCertStore>, trust_domain: TrustDomain) -> Result<Arc<Self>, Error> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, Arc::new(ring::default_provider()))
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(Arc::new(Self { chain, trust_domain }))
    }
}

impl ClientCertVerifier for SpiffeClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        check_identity(end_entity, &self.trust_domain)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
