//! A key with the certificates that go with it: asked for, checked when it arrives, kept in the run directory,
//! checked again when it is read back.
//!
//! A [`Credential`] that exists was valid when it was made: its key matches, it is the identity's, and it leads to a
//! root. Keys are never printed.

use std::{fmt, sync::Arc};

use mesh_core::{identity::SpiffeId, wire::proto};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::{crypto::ring, server::danger::ClientCertVerifier, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    hex,
    schedule::{Life, Renewal, renew_at, rotate_at},
    verify::{CertificateIdentityError, SpiffeClientVerifier, identity_of},
};
use crate::trust::root_store;

/// The most certificates in a chain, and the most roots: more is not a mesh's.
const MAX_CERTIFICATES: usize = 16;

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// No key or request could be made.
    #[error("no key can be made: {0}")]
    Key(#[from] rcgen::Error),
    /// The answer is empty or beyond all measure.
    #[error("there are {0} certificates, at least 1 and at most {MAX_CERTIFICATES} can be")]
    Count(usize),
    /// It names nobody of this mesh.
    #[error(transparent)]
    Identity(#[from] CertificateIdentityError),
    /// It is somebody else's.
    #[error("it is for {found}, not for {wanted}")]
    Other {
        /// Whom it names.
        found: Box<SpiffeId>,
        /// Whom it was asked for.
        wanted: Box<SpiffeId>,
    },
    /// It does not lead to a root, is not valid now, or is not for this key.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// The file is not one of ours, or was damaged.
    #[error("it cannot be read: {0}")]
    Format(#[from] serde_json::Error),
    /// Written by another version of the agent.
    #[error("its format is {0}, this version reads {FORMAT}")]
    Version(u32),
}

/// A new key and the request for a certificate for it.
pub struct KeyRequest {
    id: SpiffeId,
    key: KeyPair,
    csr: Vec<u8>,
}

impl KeyRequest {
    /// Makes a P-256 key on this machine.
    pub fn new(id: &SpiffeId) -> Result<Self, CredentialError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        let csr = params.serialize_request(&key)?.der().to_vec();
        Ok(Self { id: id.clone(), key, csr })
    }

    /// The request, PKCS#10 in DER.
    pub fn csr_der(&self) -> Vec<u8> {
        self.csr.clone()
    }

    /// Takes the answer. It has to lead to one of `roots`, or, when there are none yet, to one of its own.
    pub fn complete(
        self,
        answer: proto::Certificate,
        roots: &[CertificateDer<'static>],
        now: OffsetDateTime,
    ) -> Result<Credential, CredentialError> {
        let mut bundle: Vec<_> = answer.roots_der.into_iter().map(CertificateDer::from).collect();
        bundle.extend(roots.iter().filter(|root| !bundle.contains(root)).cloned().collect::<Vec<_>>());
        let credential = Credential::new(Parts {
            id: self.id,
            key: PrivatePkcs8KeyDer::from(self.key.serialize_der()),
            chain: answer.chain_der.into_iter().map(CertificateDer::from).collect(),
            bundle,
            obtained: now,
        })?;
        let trusted = if roots.is_empty() { &credential.bundle } else { roots };
        credential.check(trusted, now)?;
        Ok(credential)
    }
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRequest").field("id", &self.id).finish_non_exhaustive()
    }
}

struct Parts {
    id: SpiffeId,
    key: PrivatePkcs8KeyDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    bundle: Vec<CertificateDer<'static>>,
    obtained: OffsetDateTime,
}

/// A key and its certificates.
pub struct Credential {
    id: SpiffeId,
    key: PrivatePkcs8KeyDer<'static>,
    certified: Arc<CertifiedKey>,
    bundle: Vec<CertificateDer<'static>>,
    life: Life,
}

impl Credential {
    fn new(parts: Parts) -> Result<Self, CredentialError> {
        for count in [parts.chain.len(), parts.bundle.len()] {
            if count == 0 || count > MAX_CERTIFICATES {
                return Err(CredentialError::Count(count));
            }
        }
        let leaf = &parts.chain[0];
        let found = identity_of(leaf)?;
        if found != parts.id {
            return Err(CredentialError::Other { found: found.into(), wanted: parts.id.into() });
        }
        let life = Life { obtained: parts.obtained, expires: not_after(leaf)? };
        let key = parts.key.clone_key();
        let certified = CertifiedKey::from_der(parts.chain, key.into(), &ring::default_provider())?;
        Ok(Self { id: parts.id, key: parts.key, certified: Arc::new(certified), bundle: parts.bundle, life })
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// For TLS.
    pub fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    /// The roots that were known when it was issued.
    pub fn bundle(&self) -> &[CertificateDer<'static>] {
        &self.bundle
    }

    /// When it came and until when it is valid.
    pub fn life(&self) -> Life {
        self.life
    }

    /// Whether a peer with these roots would take it now.
    pub fn check(&self, roots: &[CertificateDer<'static>], now: OffsetDateTime) -> Result<(), rustls::Error> {
        let verifier = SpiffeClientVerifier::new(root_store(roots)?, self.id.trust_domain().clone())?;
        let seconds = u64::try_from(now.unix_timestamp()).unwrap_or(0);
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let (leaf, intermediates) =
            self.certified.cert.split_first().expect("checked when the credential was made");
        verifier.verify_client_cert(leaf, intermediates, now).map(|_| ())
    }

    /// The SHA-256 of the root that it leads to, the first of these that does.
    pub fn root(&self, roots: &[CertificateDer<'static>], now: OffsetDateTime) -> Option<[u8; 32]> {
        let found = roots.iter().find(|root| self.check(std::slice::from_ref(*root), now).is_ok());
        found.map(|root| Sha256::digest(root).into())
    }

    /// When to ask for the next one: in the second half of its life, soon when a root has come into the mesh since it
    /// was issued, now when peers with these roots refuse it.
    pub fn renewal(&self, roots: &[CertificateDer<'static>], now: OffsetDateTime, fraction: f64) -> Renewal {
        let mut renewal = Renewal::at(renew_at(self.life, fraction));
        if let Some(at) = rotate_at(&self.bundle, roots, self.life, now, fraction) {
            renewal.hasten(at);
        }
        if self.check(roots, now).is_err() {
            renewal.hasten(now);
        }
        renewal
    }

    /// As it is kept in the run directory.
    pub fn to_file(&self) -> Vec<u8> {
        let der = |list: &[CertificateDer<'_>]| list.iter().map(|one| one.to_vec()).collect();
        let file = File {
            format: FORMAT,
            identity: self.id.clone(),
            obtained: self.life.obtained,
            key_pkcs8: self.key.secret_pkcs8_der().to_vec(),
            chain: der(&self.certified.cert),
            bundle: der(&self.bundle),
        };
        serde_json::to_vec_pretty(&file).expect("texts and numbers only")
    }

    /// Reads what [`Credential::to_file`] wrote. Says nothing about roots and time: see [`Credential::check`].
    pub fn from_file(content: &[u8]) -> Result<Self, CredentialError> {
        let file: File = serde_json::from_slice(content)?;
        if file.format != FORMAT {
            return Err(CredentialError::Version(file.format));
        }
        Self::new(Parts {
            id: file.identity,
            key: file.key_pkcs8.into(),
            chain: file.chain.into_iter().map(CertificateDer::from).collect(),
            bundle: file.bundle.into_iter().map(CertificateDer::from).collect(),
            obtained: file.obtained,
        })
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("id", &self.id).field("life", &self.life).finish_non_exhaustive()
    }
}

/// The version of [`File`].
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    identity: SpiffeId,
    #[serde(with = "time::serde::rfc3339")]
    obtained: OffsetDateTime,
    #[serde(with = "hex")]
    key_pkcs8: Vec<u8>,
    #[serde(with = "hex::list")]
    chain: Vec<Vec<u8>>,
    #[serde(with = "hex::list")]
    bundle: Vec<Vec<u8>>,
}

/// A certificate's `notAfter`.
pub(super) fn not_after(
    certificate: &CertificateDer<'_>,
) -> Result<OffsetDateTime, CertificateIdentityError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|_| CertificateIdentityError::Malformed)?;
    Ok(parsed.validity().not_after.to_datetime())
}

#[cfg(test)]
pub(super) mod tests {
    use rcgen::{BasicConstraints, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer};
    use time::Duration;

    use super::*;

    /// An issuer for tests: a root that signs leaves itself.
    pub(in super::super) struct Authority {
        issuer: Issuer<'static, KeyPair>,
        pub(in super::super) root: CertificateDer<'static>,
    }

    impl Authority {
        pub(in super::super) fn new() -> Self {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let root = params.self_signed(&key).unwrap().der().clone();
            Self { issuer: Issuer::new(params, key), root }
        }

        pub(in super::super) fn answer(&self, csr: &[u8], life: Duration) -> proto::Certificate {
            let mut request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
            request.params.not_before = OffsetDateTime::now_utc() - Duration::minutes(5);
            request.params.not_after = OffsetDateTime::now_utc() + life;
            request.params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
            let leaf = request.signed_by(&self.issuer).unwrap();
            proto::Certificate {
                chain_der: vec![leaf.der().to_vec()],
                roots_der: vec![self.root.to_vec()],
                now_unix_ms: 0,
            }
        }

        pub(in super::super) fn credential(&self, id: &str, life: Duration) -> Credential {
            let request = KeyRequest::new(&SpiffeId::parse(id).unwrap()).unwrap();
            let answer = self.answer(&request.csr_der(), life);
            request.complete(answer, &[], OffsetDateTime::now_utc()).unwrap()
        }
    }

    const ID: &str = "spiffe://td/ns/shop/sa/web";

    fn request() -> KeyRequest {
        KeyRequest::new(&SpiffeId::parse(ID).unwrap()).unwrap()
    }

    #[test]
    fn a_credential_reads_back_from_its_file() {
        let credential = Authority::new().credential(ID, Duration::HOUR);
        let read = Credential::from_file(&credential.to_file()).unwrap();
        assert_eq!(read.id(), credential.id());
        assert_eq!(read.life(), credential.life());
        assert_eq!(read.bundle(), credential.bundle());
        read.check(read.bundle(), OffsetDateTime::now_utc()).unwrap();
        assert!(!format!("{credential:?}").contains("key"));
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let file = Authority::new().credential(ID, Duration::HOUR).to_file();
        let text = String::from_utf8(file).unwrap();
        for damaged in [
            text[..text.len() / 2].to_owned(),
            text.replace("\"format\": 1", "\"format\": 2"),
            text.replace("/sa/web", "/sa/db"),
            text.replace("\"chain\"", "\"chains\""),
            String::new(),
        ] {
            assert!(Credential::from_file(damaged.as_bytes()).is_err(), "{damaged}");
        }
    }

    #[test]
    fn an_answer_for_somebody_else_is_refused() {
        let authority = Authority::new();
        let other = KeyRequest::new(&SpiffeId::parse("spiffe://td/ns/shop/sa/db").unwrap()).unwrap();
        let answer = authority.answer(&other.csr_der(), Duration::HOUR);
        let error = request().complete(answer, &[], OffsetDateTime::now_utc()).unwrap_err();
        assert!(matches!(error, CredentialError::Other { .. }), "{error}");
    }

    #[test]
    fn an_answer_for_another_key_is_refused() {
        let answer = Authority::new().answer(&request().csr_der(), Duration::HOUR);
        let error = request().complete(answer, &[], OffsetDateTime::now_utc()).unwrap_err();
        assert!(matches!(error, CredentialError::Tls(rustls::Error::InconsistentKeys(_))), "{error}");
    }

    #[test]
    fn an_answer_must_lead_to_the_roots_in_force_and_be_valid() {
        let (authority, other) = (Authority::new(), Authority::new());
        let now = OffsetDateTime::now_utc();
        let try_with = |life, roots: &[CertificateDer<'static>], when| {
            let request = request();
            let answer = authority.answer(&request.csr_der(), life);
            request.complete(answer, roots, when).map(drop)
        };
        try_with(Duration::HOUR, &[authority.root.clone(), other.root.clone()], now).unwrap();
        try_with(Duration::HOUR, std::slice::from_ref(&other.root), now).unwrap_err();
        try_with(Duration::HOUR, &[], now + Duration::hours(2)).unwrap_err();
        try_with(-Duration::MINUTE, &[], now).unwrap_err();
    }

    #[test]
    fn an_answer_without_certificates_or_with_too_many_is_refused() {
        let now = OffsetDateTime::now_utc();
        let empty = proto::Certificate::default();
        assert!(matches!(request().complete(empty, &[], now), Err(CredentialError::Count(0))));
        let many =
            proto::Certificate { chain_der: vec![vec![0]; 17], roots_der: vec![vec![0]], now_unix_ms: 0 };
        assert!(matches!(request().complete(many, &[], now), Err(CredentialError::Count(17))));
    }
}
