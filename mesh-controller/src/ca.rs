//! The certificate authority: a root and an issuing certificate, kept in one file that only we can read or in a Secret
//! that several controllers share, and the signing of requests. Or an issuing certificate that is mounted.
//!
//! One file holds all of it, so that a crash leaves the old state or the new one. What cannot be read is an error, and
//! never a new root: a mesh whose root changes by accident refuses every connection.
//!
//! | module | what |
//! |---|---|
//! | [`keep`] | where the state is kept, and how two write to it |
//! | [`mounted`] | an issuing certificate of somebody else's |
//!
//! A rotated root keeps its predecessors in the bundle, and its own key is also certified by each of them (a cross
//! certificate), so that a peer which has not heard of the new root yet accepts what leads to it.

mod keep;
mod mounted;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
    time::{Duration, SystemTime},
};

use futures_util::FutureExt;
use kube::Client;
use mesh_core::{identity::SpiffeId, model::Name};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
    SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, X509Certificate};

use self::keep::Keep;
pub use self::keep::KeepError;
use crate::digest::{digest, hex};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long a root lives.
const ROOT_TTL: Duration = Duration::from_secs(3650 * 24 * 3600);
/// How long an issuing certificate lives; a new one takes over at half of it.
const ISSUING_TTL: Duration = Duration::from_secs(365 * 24 * 3600);
/// Certificates are good from some time before now: a clock that is five minutes behind must take them from one that is
/// five minutes ahead, with room left.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(900);
/// Bytes of an uncompressed P-256 point, the only kind of key that is certified.
const P256_POINT_LEN: usize = 65;
/// Most roots in the bundle: every peer holds it, and each rotation adds one.
const MAX_ROOTS: usize = 8;
/// How often a change is done again because somebody else wrote meanwhile.
const MAX_CONFLICTS: usize = 10;
/// A mounted issuing certificate that has less left is renewed too late, or not at all.
const MOUNTED_SHORT: Duration = Duration::from_secs(3600);
/// Version of the file's form.
const FORMAT: u32 = 1;

/// Why the authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The state cannot be read or written.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// What is kept is damaged.
    #[error(
        "the certificate authority in {place} is damaged: {reason}; restore it from a backup (only if there is \
         none, and every node shall join anew, move it away)"
    )]
    Damaged {
        /// The file or Secret.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// What is mounted is damaged.
    #[error("the issuer mounted at {dir} cannot be used: {reason}")]
    Mounted {
        /// Where.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It is not ours to change.
    #[error("the issuer is mounted from {0}: renew it, and its roots, where it is made")]
    NotOurs(PathBuf),
    /// Somebody else's authority has taken the place of the one in force.
    #[error(
        "{place} holds another authority, which has no root with the one in force in common: put back the one with the \
         root {root}, or start all controllers anew and let every node join anew"
    )]
    Another {
        /// The file or Secret.
        place: String,
        /// The newest root in force.
        root: String,
    },
    /// Others write all the time.
    #[error("{0} was changed by others {MAX_CONFLICTS} times while we tried: try again")]
    Contended(String),
    /// No more roots fit.
    #[error(
        "{place} has {MAX_ROOTS} roots already: remove those from it that no certificate leads to any more"
    )]
    TooManyRoots {
        /// The file or Secret.
        place: String,
    },
    /// No root has this fingerprint.
    #[error("no root, or more than one, begins with '{0}': write more of it; compare meshctl get roots")]
    UnknownRoot(String),
    /// It signs.
    #[error("root {0} signs: make another first, with mesh-controller rotate-root")]
    Signs(String),
    /// An older one would still lead to it.
    #[error(
        "root {root} is certified by the older root {older}, which is still trusted: retire that one first"
    )]
    NotOldest {
        /// What was to go.
        root: String,
        /// What has to go before.
        older: String,
    },
    /// Making a certificate failed.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// Why a request is not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request cannot be read, or its signature is not by its own key.
    #[error("the certificate request is not valid: {0}")]
    Request(rcgen::Error),
    /// Another kind of key.
    #[error("the certificate request has a key that is not of P-256")]
    Key,
    /// The issuing certificate has run out.
    #[error("the issuing certificate has ended: renew it; compare meshctl get roots")]
    Ended,
    /// Making the certificate failed.
    #[error("cannot make the certificate: {0}")]
    Make(rcgen::Error),
}

/// A signed certificate.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The leaf, then what it leads through, without roots.
    pub chain: Vec<CertificateDer<'static>>,
    /// When it ends.
    pub not_after: SystemTime,
}

/// What the file holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    /// The newest first; it signs.
    roots: Vec<String>,
    /// Key of the newest root.
    root_key: String,
    /// The newest root's key, certified by the older roots.
    crosses: Vec<String>,
    issuing: String,
    issuing_key: String,
}

/// The authority's state, ready to sign.
#[derive(Debug)]
struct Loaded {
    /// What is kept; nothing of what is mounted.
    stored: Option<Stored>,
    roots: Vec<CertificateDer<'static>>,
    /// The issuing certificate and the cross certificates.
    intermediates: Vec<CertificateDer<'static>>,
    issuer: Issuer<'static, KeyPair>,
    issuing_times: (SystemTime, SystemTime),
    /// The bytes that it was read from, to tell when another process has changed them.
    digest: [u8; 32],
}

/// Where an authority is.
#[derive(Clone)]
pub enum Place {
    /// Below a state directory.
    Directory(PathBuf),
    /// In a Secret.
    Secret(Client, Name),
    /// In a directory that somebody else fills.
    Mounted(PathBuf),
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(dir) => f.debug_tuple("Directory").field(dir).finish(),
            Self::Secret(_, name) => f.debug_tuple("Secret").field(name).finish(),
            Self::Mounted(dir) => f.debug_tuple("Mounted").field(dir).finish(),
        }
    }
}

/// Where it comes from, as far as it changes.
#[derive(Debug)]
enum Home {
    Kept(Keep),
    Mounted(PathBuf),
}

impl From<Place> for Home {
    fn from(place: Place) -> Self {
        match place {
            Place::Directory(state_dir) => Self::Kept(Keep::Directory(state_dir.join("ca"))),
            Place::Secret(client, name) => Self::Kept(Keep::Secret(client, name)),
            Place::Mounted(dir) => Self::Mounted(dir),
        }
    }
}

/// The certificate authority of a running controller.
#[derive(Debug)]
pub struct Authority {
    home: Home,
    loaded: RwLock<Arc<Loaded>>,
}

impl Authority {
    /// Reads the authority; makes it if it was never made.
    pub async fn open(place: Place, now: SystemTime) -> Result<Self, CaError> {
        let home = Home::from(place);
        let loaded = match &home {
            Home::Mounted(dir) => load_mounted(dir)?,
            Home::Kept(keep) => {
                change(keep, |current| match current {
                    Some(_) => Ok(None),
                    None => {
                        tracing::info!(place = %keep, "making a new certificate authority");
                        first(now).map(Some)
                    }
                })
                .await?
            }
        };
        Ok(Self { home, loaded: RwLock::new(Arc::new(loaded)) })
    }

    /// The same below a state directory, which waits for nothing.
    pub fn open_in(state_dir: &Path, now: SystemTime) -> Result<Self, CaError> {
        at_once(Self::open(Place::Directory(state_dir.to_owned()), now))
    }

    /// Reads the authority, which must have been made before.
    pub async fn existing(place: Place) -> Result<Self, CaError> {
        let home = Home::from(place);
        let loaded = read(&home).await?;
        Ok(Self { home, loaded: RwLock::new(Arc::new(loaded)) })
    }

    /// Makes a new root and an issuing certificate below it; the older roots stay in the bundle.
    pub async fn rotate_root(&self, now: SystemTime) -> Result<(), CaError> {
        let keep = self.keep()?;
        let rotated = |current: &Loaded| match current.roots.len() {
            0..MAX_ROOTS => rotated(current, now).map(Some),
            _ => Err(CaError::TooManyRoots { place: keep.to_string() }),
        };
        self.put(change(keep, existing(keep, rotated)).await?);
        Ok(())
    }

    /// Makes a new issuing certificate below the same root, whatever is left of the old one; what was signed stays valid.
    pub async fn rotate_issuing(&self, now: SystemTime) -> Result<(), CaError> {
        let keep = self.keep()?;
        self.put(change(keep, existing(keep, |current| renewed(current, now).map(Some))).await?);
        Ok(())
    }

    /// Takes a root out of the bundle: what leads to it alone is refused from now on. Which: its SHA-256 in hex, or the
    /// beginning of it. Only the oldest can go: each root certifies the next, and one whose elder is still trusted
    /// would be trusted through it.
    pub async fn retire_root(&self, which: &str) -> Result<(), CaError> {
        let keep = self.keep()?;
        self.put(change(keep, existing(keep, |current| without(current, which).map(Some))).await?);
        Ok(())
    }

    /// Makes a new issuing certificate once half of the old one's life is over; `true` if it did, or somebody else had.
    pub async fn renew_issuing(&self, now: SystemTime) -> Result<bool, CaError> {
        let Home::Kept(keep) = &self.home else {
            let loaded = self.loaded();
            if mounted::ends_within(&loaded, MOUNTED_SHORT, now) {
                tracing::warn!("the mounted issuing certificate ends within an hour, and is not renewed");
            }
            return Ok(false);
        };
        if !is_half_over(&self.loaded(), now) {
            return Ok(false);
        }
        let renewed = |current: &Loaded| match is_half_over(current, now) {
            true => renewed(current, now).map(Some),
            false => Ok(None),
        };
        self.put(change(keep, existing(keep, renewed)).await?);
        Ok(true)
    }

    /// Takes over what another process (`rotate-root`, another controller, whoever fills the mounted directory) has
    /// changed; `true` if it had. A Secret that is gone is made again, as it is in force here.
    pub async fn reload(&self) -> Result<bool, CaError> {
        let current = self.loaded();
        let next =
            match &self.home {
                Home::Mounted(dir) => load_mounted(dir)?,
                Home::Kept(keep @ Keep::Secret(..)) => change(keep, |found| match (found, &current.stored) {
                    (None, Some(stored)) => {
                        tracing::warn!(place = %keep, "the certificate authority was gone; it is put back");
                        Ok(Some(stored.clone()))
                    }
                    _ => Ok(None),
                })
                .await?,
                Home::Kept(Keep::Directory(_)) => read(&self.home).await?,
            };
        if next.digest == current.digest {
            return Ok(false);
        }
        if let Home::Kept(keep) = &self.home
            && !next.roots.iter().any(|root| current.roots.contains(root))
        {
            let root = hex(&digest(&current.roots[0]));
            return Err(CaError::Another { place: keep.to_string(), root });
        }
        self.put(next);
        Ok(true)
    }

    /// Others may have it too, and change it.
    pub fn is_shared(&self) -> bool {
        !matches!(self.home, Home::Kept(Keep::Directory(_)))
    }

    fn keep(&self) -> Result<&Keep, CaError> {
        match &self.home {
            Home::Kept(keep) => Ok(keep),
            Home::Mounted(dir) => Err(CaError::NotOurs(dir.clone())),
        }
    }

    /// All roots, the newest first.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.loaded().roots.clone()
    }

    /// The newest root, what tokens pin.
    pub fn root_digest(&self) -> [u8; 32] {
        digest(&self.loaded().roots[0])
    }

    /// Signs a request for an identity: the request says the public key and nothing else.
    pub fn sign(
        &self,
        csr_der: &[u8],
        id: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Issued, SignError> {
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der.to_vec()))
                .map_err(SignError::Request)?;
        let key = request.public_key;
        if key.algorithm() != &PKCS_ECDSA_P256_SHA256 || key.der_bytes().len() != P256_POINT_LEN {
            return Err(SignError::Key);
        }
        if self.loaded().issuing_times.1 <= now {
            return Err(SignError::Ended);
        }
        self.leaf(&key, id, ttl, now).map_err(SignError::Make)
    }

    /// A certificate and a fresh key for ourselves; the chain ends with the root, so that a joining agent can compare
    /// it with its token.
    pub fn own(
        &self,
        id: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<(Issued, PrivateKeyDer<'static>), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut issued = self.leaf(&key, id, ttl, now)?;
        issued.chain.push(self.loaded().roots[0].clone());
        Ok((issued, PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }

    fn leaf(
        &self,
        key: &impl PublicKeyData,
        id: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Issued, rcgen::Error> {
        let loaded = self.loaded();
        let not_after = (now + ttl).min(loaded.issuing_times.1);
        let mut params = params(DistinguishedName::new(), now, not_after);
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(key, &loaded.issuer)?;
        let chain = std::iter::once(leaf.der().clone()).chain(loaded.intermediates.iter().cloned()).collect();
        Ok(Issued { chain, not_after })
    }

    fn loaded(&self) -> Arc<Loaded> {
        self.loaded.read().expect("no holder of this lock panics").clone()
    }

    fn put(&self, loaded: Loaded) {
        *self.loaded.write().expect("no holder of this lock panics") = Arc::new(loaded);
    }
}

/// The result of what waits for files alone.
fn at_once<T>(done: impl Future<Output = T>) -> T {
    done.now_or_never().expect("files are read and written without waiting")
}

/// Reads, makes something else of it, and puts it back, until nobody else has written meanwhile; `make` that returns
/// nothing leaves it as it is.
async fn change(
    keep: &Keep,
    make: impl Fn(Option<&Loaded>) -> Result<Option<Stored>, CaError>,
) -> Result<Loaded, CaError> {
    for _ in 0..MAX_CONFLICTS {
        let kept = keep.read().await?;
        let current = kept.as_ref().map(|kept| parse(keep, &kept.bytes)).transpose()?;
        let Some(stored) = make(current.as_ref())? else {
            return current.ok_or_else(|| missing(keep));
        };
        let bytes = serde_json::to_vec_pretty(&stored).expect("texts are always JSON");
        // What would not be readable is never written over what is.
        let next = parse(keep, &bytes)?;
        if keep.replace(&bytes, kept.as_ref()).await? {
            return Ok(next);
        }
    }
    Err(CaError::Contended(keep.to_string()))
}

/// For [`change`], of what has to be there.
fn existing(
    keep: &Keep,
    make: impl Fn(&Loaded) -> Result<Option<Stored>, CaError>,
) -> impl Fn(Option<&Loaded>) -> Result<Option<Stored>, CaError> {
    move |current| make(current.ok_or_else(|| missing(keep))?)
}

async fn read(home: &Home) -> Result<Loaded, CaError> {
    match home {
        Home::Mounted(dir) => load_mounted(dir),
        Home::Kept(keep) => parse(keep, &keep.read().await?.ok_or_else(|| missing(keep))?.bytes),
    }
}

fn load_mounted(dir: &Path) -> Result<Loaded, CaError> {
    mounted::load(dir).map_err(|reason| CaError::Mounted { dir: dir.to_owned(), reason })
}

fn missing(keep: &Keep) -> CaError {
    CaError::Damaged { place: keep.to_string(), reason: "it is gone".into() }
}

/// Reads what is kept and checks that its parts belong together.
fn parse(keep: &Keep, bytes: &[u8]) -> Result<Loaded, CaError> {
    parts(bytes).map_err(|reason| CaError::Damaged { place: keep.to_string(), reason })
}

fn is_half_over(loaded: &Loaded, now: SystemTime) -> bool {
    let (from, until) = loaded.issuing_times;
    now >= from + until.duration_since(from).unwrap_or_default() / 2
}

/// What is kept of an authority that is kept.
fn stored(loaded: &Loaded) -> &Stored {
    loaded.stored.as_ref().expect("only what is kept is changed")
}

/// A new authority.
fn first(now: SystemTime) -> Result<Stored, CaError> {
    let (root, root_key) = new_root(now)?;
    let root_pem = root.pem();
    let issuer = Issuer::from_ca_cert_der(root.der(), &root_key)?;
    let (issuing, issuing_key) = new_issuing(&issuer, now, now + ROOT_TTL)?;
    Ok(Stored {
        format: FORMAT,
        roots: vec![root_pem],
        root_key: root_key.serialize_pem(),
        crosses: vec![],
        issuing,
        issuing_key,
    })
}

/// The same authority under a new root.
fn rotated(current: &Loaded, now: SystemTime) -> Result<Stored, CaError> {
    let mut next = first(now)?;
    let new_key = KeyPair::from_pem(&next.root_key)?;
    let old_key = KeyPair::from_pem(&stored(current).root_key)?;
    let old_root = &current.roots[0];
    let (_, old_until) = validity(old_root).map_err(unreadable)?;
    let old_issuer = Issuer::from_ca_cert_der(old_root, &old_key)?;
    let mut cross = ca_params(root_name(&new_key), now, old_until, BasicConstraints::Unconstrained);
    cross.use_authority_key_identifier_extension = true;
    next.crosses = vec![cross.signed_by(&new_key, &old_issuer)?.pem()];
    // Roots before the last one are reached through the crosses that lead from it to them.
    next.crosses.extend(stored(current).crosses.iter().cloned());
    next.roots.extend(stored(current).roots.iter().cloned());
    Ok(next)
}

/// The same root with a new issuing certificate.
fn renewed(current: &Loaded, now: SystemTime) -> Result<Stored, CaError> {
    let root_key = KeyPair::from_pem(&stored(current).root_key)?;
    let (_, until) = validity(&current.roots[0]).map_err(unreadable)?;
    let issuer = Issuer::from_ca_cert_der(&current.roots[0], &root_key)?;
    let (issuing, issuing_key) = new_issuing(&issuer, now, until)?;
    Ok(Stored { issuing, issuing_key, ..stored(current).clone() })
}

/// The same authority without its oldest root, which has to be the one that is meant.
fn without(current: &Loaded, which: &str) -> Result<Stored, CaError> {
    let names: Vec<String> = current.roots.iter().map(|root| hex(&digest(root))).collect();
    let mut meant = names.iter().filter(|name| !which.is_empty() && name.starts_with(which));
    let (Some(root), None) = (meant.next(), meant.next()) else {
        return Err(CaError::UnknownRoot(which.to_owned()));
    };
    if *root == names[0] {
        return Err(CaError::Signs(root.clone()));
    }
    let oldest = names.last().expect("the file has a root");
    if root != oldest {
        return Err(CaError::NotOldest { root: root.clone(), older: oldest.clone() });
    }
    let mut next = stored(current).clone();
    next.roots.pop();
    // What the retired root has certified leads nowhere any more.
    let gone = current.roots.last().and_then(|root| subject(root).ok());
    next.crosses.retain(|pem| {
        let issuer = certificate(pem).and_then(|der| Ok(parsed(&der)?.issuer().to_string()));
        issuer.ok() != gone
    });
    Ok(next)
}

/// Of a root that was read before.
fn unreadable(reason: String) -> CaError {
    CaError::Damaged { place: "memory".to_owned(), reason }
}

fn new_root(now: SystemTime) -> Result<(rcgen::Certificate, KeyPair), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let params = ca_params(root_name(&key), now, now + ROOT_TTL, BasicConstraints::Unconstrained);
    Ok((params.self_signed(&key)?, key))
}

fn new_issuing(
    root: &Issuer<'_, &KeyPair>,
    now: SystemTime,
    root_until: SystemTime,
) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let until = (now + ISSUING_TTL).min(root_until);
    let mut params = ca_params(name("issuing", &key), now, until, BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    Ok((params.signed_by(&key, root)?.pem(), key.serialize_pem()))
}

fn root_name(key: &KeyPair) -> DistinguishedName {
    name("root", key)
}

/// Names differ from key to key, so that a chain is never built through the wrong one.
fn name(role: &str, key: &KeyPair) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, format!("Nodemesh {role} {}", &hex(&digest(key.public_key_raw()))[..16]));
    name
}

fn ca_params(
    name: DistinguishedName,
    now: SystemTime,
    until: SystemTime,
    constraints: BasicConstraints,
) -> CertificateParams {
    let mut params = params(name, now, until);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn params(name: DistinguishedName, now: SystemTime, until: SystemTime) -> CertificateParams {
    let mut serial: [u8; 16] = rand::random();
    // RFC 5280 §4.1.2.2: positive, and not empty.
    serial[0] = serial[0] & 0x7f | 0x40;
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    params.not_before = (now - CLOCK_TOLERANCE).into();
    params.not_after = until.into();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params
}

fn parts(bytes: &[u8]) -> Result<Loaded, String> {
    let stored: Stored = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if stored.format != FORMAT {
        return Err(format!("its format is {}, this version knows {FORMAT}", stored.format));
    }
    let roots = stored.roots.iter().map(|pem| certificate(pem)).collect::<Result<Vec<_>, _>>()?;
    let root = roots.first().ok_or("it has no root")?;
    let crosses = stored.crosses.iter().map(|pem| certificate(pem)).collect::<Result<Vec<_>, _>>()?;
    let issuing = certificate(&stored.issuing)?;
    let root_key = KeyPair::from_pem(&stored.root_key).map_err(|error| format!("root_key: {error}"))?;
    belongs(root, &root_key, "root")?;
    let issuing_key =
        KeyPair::from_pem(&stored.issuing_key).map_err(|error| format!("issuing_key: {error}"))?;
    belongs(&issuing, &issuing_key, "issuing certificate")?;
    signed_by(&issuing, root)?;
    let issuing_times = validity(&issuing)?;
    let issuer = Issuer::from_ca_cert_der(&issuing, issuing_key).map_err(|error| error.to_string())?;
    let intermediates = std::iter::once(issuing).chain(crosses).collect();
    Ok(Loaded { digest: digest(bytes), stored: Some(stored), roots, intermediates, issuer, issuing_times })
}

fn certificate(pem: &str) -> Result<CertificateDer<'static>, String> {
    use rustls_pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| format!("a certificate: {error}"))
}

fn parsed<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    Ok(X509Certificate::from_der(der).map_err(|error| format!("a certificate: {error}"))?.1)
}

fn belongs(der: &CertificateDer<'_>, key: &KeyPair, what: &str) -> Result<(), String> {
    if parsed(der)?.public_key().subject_public_key.data == key.public_key_raw() {
        return Ok(());
    }
    Err(format!("the key of the {what} is not the one in its certificate"))
}

fn signed_by(der: &CertificateDer<'_>, root: &CertificateDer<'_>) -> Result<(), String> {
    let root = parsed(root)?;
    let verified = parsed(der)?.verify_signature(Some(root.public_key()));
    verified.map_err(|_| "the issuing certificate is not signed by the newest root".to_owned())
}

/// From when until when a certificate is good.
pub fn validity(der: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), String> {
    let validity = parsed(der)?.validity().clone();
    let time = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs());
    Ok((time(validity.not_before.timestamp()), time(validity.not_after.timestamp())))
}

/// A certificate's own name.
pub fn subject(der: &CertificateDer<'_>) -> Result<String, String> {
    Ok(parsed(der)?.subject().to_string())
}

/// Whether the newest root ends within a year: time to rotate, with what it may still sign in mind.
pub fn ends_soon(roots: &[CertificateDer<'_>], now: SystemTime) -> bool {
    let until = roots.first().and_then(|root| validity(root).ok());
    until.is_some_and(|(_, until)| until < now + DAY * 365)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use mesh_core::identity::TrustDomain;
    use rustls::{
        RootCertStore, client::verify_server_cert_signed_by_trust_anchor, crypto::ring,
        server::ParsedCertificate,
    };
    use rustls_pki_types::UnixTime;

    use super::*;

    fn now() -> SystemTime {
        SystemTime::now()
    }

    fn id() -> SpiffeId {
        SpiffeId::workload(&TrustDomain::parse("td").unwrap(), "shop", "web").unwrap()
    }

    fn csr(params: CertificateParams) -> Vec<u8> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        params.serialize_request(&key).unwrap().der().to_vec()
    }

    #[track_caller]
    pub(super) fn leads_to(
        chain: &[CertificateDer<'static>],
        root: &CertificateDer<'static>,
        at: SystemTime,
    ) -> bool {
        let mut store = RootCertStore::empty();
        store.add(root.clone()).unwrap();
        let leaf = ParsedCertificate::try_from(&chain[0]).unwrap();
        let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap());
        let algorithms = ring::default_provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&leaf, &store, &chain[1..], at, algorithms).is_ok()
    }

    #[test]
    fn the_authority_is_made_once_and_read_ever_after() {
        let dir = tempfile::tempdir().unwrap();
        let made = Authority::open_in(dir.path(), now()).unwrap();
        let read = Authority::open_in(dir.path(), now()).unwrap();
        assert_eq!(made.roots(), read.roots());
        let mode = std::fs::metadata(dir.path().join("ca/authority.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let issued = made.sign(&csr(CertificateParams::default()), &id(), DAY, now()).unwrap();
        assert!(leads_to(&issued.chain, &read.roots()[0], now()));
        assert!(!leads_to(&issued.chain, &read.roots()[0], now() + DAY * 2), "it has an end");
    }

    #[test]
    fn the_request_says_the_key_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open_in(dir.path(), now()).unwrap();
        let mut greedy = CertificateParams::new(vec!["other.example".to_owned()]).unwrap();
        greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issued = authority.sign(&csr(greedy), &id(), DAY, now()).unwrap();
        let leaf = parsed(&issued.chain[0]).unwrap();
        assert!(!leaf.is_ca());
        let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names.len(), 1);
        assert!(format!("{names:?}").contains("spiffe://td/ns/shop/sa/web"));
    }

    #[test]
    fn a_request_that_is_not_signed_by_its_key_or_of_another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open_in(dir.path(), now()).unwrap();
        let mut forged = csr(CertificateParams::default());
        let last = forged.len() - 1;
        forged[last] ^= 1;
        assert!(matches!(authority.sign(&forged, &id(), DAY, now()), Err(SignError::Request(_))));
        assert!(matches!(authority.sign(b"nonsense", &id(), DAY, now()), Err(SignError::Request(_))));
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let other = CertificateParams::default().serialize_request(&key).unwrap();
        assert!(matches!(authority.sign(other.der(), &id(), DAY, now()), Err(SignError::Key)));
    }

    #[test]
    fn damage_is_an_error_and_never_a_new_root() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open_in(dir.path(), now()).unwrap();
        let path = dir.path().join("ca/authority.json");
        let good = std::fs::read_to_string(&path).unwrap();
        let other = tempfile::tempdir().unwrap();
        Authority::open_in(other.path(), now()).unwrap();
        let other: Stored =
            serde_json::from_slice(&std::fs::read(other.path().join("ca/authority.json")).unwrap()).unwrap();
        let stored: Stored = serde_json::from_str(&good).unwrap();
        let mixed = |change: &dyn Fn(&mut Stored)| {
            let mut stored = stored.clone();
            change(&mut stored);
            serde_json::to_string(&stored).unwrap()
        };
        for bad in [
            String::new(),
            "{".to_owned(),
            good.replace("BEGIN", "BEGUN"),
            mixed(&|stored| stored.format = 2),
            mixed(&|stored| stored.roots.clear()),
            mixed(&|stored| stored.root_key = other.root_key.clone()),
            mixed(&|stored| stored.issuing_key = other.issuing_key.clone()),
            mixed(&|stored| {
                stored.roots = other.roots.clone();
                stored.root_key = other.root_key.clone();
            }),
        ] {
            std::fs::write(&path, &bad).unwrap();
            let error = Authority::open_in(dir.path(), now()).unwrap_err().to_string();
            assert!(error.contains("authority.json is damaged") && error.contains("backup"), "{error}");
            assert!(authority.reload().now_or_never().unwrap().is_err());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), bad, "it is left as it was");
        }
    }

    #[test]
    fn a_rotated_root_is_picked_up_and_those_who_know_only_the_old_one_still_verify() {
        let dir = tempfile::tempdir().unwrap();
        let running = Authority::open_in(dir.path(), now()).unwrap();
        let first_root = running.roots()[0].clone();
        let old_leaf = running.sign(&csr(CertificateParams::default()), &id(), DAY, now()).unwrap();
        assert!(!running.reload().now_or_never().unwrap().unwrap());
        for rotations in 1..=2 {
            Authority::open_in(dir.path(), now())
                .unwrap()
                .rotate_root(now())
                .now_or_never()
                .unwrap()
                .unwrap();
            assert!(running.reload().now_or_never().unwrap().unwrap());
            let roots = running.roots();
            assert_eq!(roots.len(), rotations + 1);
            let new_leaf = running.sign(&csr(CertificateParams::default()), &id(), DAY, now()).unwrap();
            for root in &roots {
                assert!(leads_to(&new_leaf.chain, root, now()), "{rotations}");
            }
            assert!(leads_to(&old_leaf.chain, &first_root, now()));
        }
    }

    #[test]
    fn only_the_oldest_root_that_does_not_sign_is_retired_and_nothing_leads_to_it_then() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open_in(dir.path(), now()).unwrap();
        let name = |place: usize| hex(&digest(&authority.roots()[place]));
        let error = authority.retire_root(&name(0)).now_or_never().unwrap().unwrap_err().to_string();
        assert!(error.contains("signs") && error.contains("rotate-root"), "{error}");
        let oldest = authority.roots()[0].clone();
        authority.rotate_root(now()).now_or_never().unwrap().unwrap();
        authority.rotate_root(now()).now_or_never().unwrap().unwrap();
        let error = authority.retire_root(&name(1)).now_or_never().unwrap().unwrap_err().to_string();
        assert!(error.contains(&format!("older root {}", name(2))), "{error}");
        for wrong in ["", "xyz"] {
            assert!(
                matches!(authority.retire_root(wrong).now_or_never().unwrap(), Err(CaError::UnknownRoot(_))),
                "{wrong}"
            );
        }
        let kept = authority.roots()[1].clone();
        authority.retire_root(&name(2)[..16]).now_or_never().unwrap().unwrap();
        assert_eq!(authority.roots().len(), 2);
        let leaf = authority.sign(&csr(CertificateParams::default()), &id(), DAY, now()).unwrap();
        assert!(leads_to(&leaf.chain, &authority.roots()[0], now()) && leads_to(&leaf.chain, &kept, now()));
        assert!(!leads_to(&leaf.chain, &oldest, now()), "its cross certificate went with it");
        assert_eq!(Authority::open_in(dir.path(), now()).unwrap().roots(), authority.roots());
    }

    #[test]
    fn the_issuing_certificate_is_renewed_at_half_life() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open_in(dir.path(), now()).unwrap();
        assert!(!authority.renew_issuing(now() + DAY * 180).now_or_never().unwrap().unwrap());
        let later = now() + DAY * 190;
        assert!(authority.renew_issuing(later).now_or_never().unwrap().unwrap());
        assert!(!authority.renew_issuing(later).now_or_never().unwrap().unwrap());
        assert_eq!(authority.roots().len(), 1);
        let issued = authority.sign(&csr(CertificateParams::default()), &id(), DAY, later).unwrap();
        assert!(leads_to(&issued.chain, &authority.roots()[0], later));
    }

    #[test]
    fn our_own_chain_ends_with_the_root_that_tokens_pin() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open_in(dir.path(), now()).unwrap();
        authority.rotate_root(now()).now_or_never().unwrap().unwrap();
        let own = SpiffeId::controller(&TrustDomain::parse("td").unwrap());
        let (issued, _key) = authority.own(&own, DAY, now()).unwrap();
        assert_eq!(digest(issued.chain.last().unwrap()), authority.root_digest());
        assert!(leads_to(&issued.chain, &authority.roots()[0], now()));
    }

    #[test]
    fn of_many_that_begin_at_once_one_makes_the_authority() {
        let dir = tempfile::tempdir().unwrap();
        let roots = std::thread::scope(|scope| {
            let open = || Authority::open_in(dir.path(), now()).unwrap().roots();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(roots.iter().all(|it| *it == roots[0]), "{roots:?}");
    }

    #[test]
    fn another_authority_in_its_place_is_not_taken_over() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let running = Authority::open_in(dir.path(), now()).unwrap();
        Authority::open_in(other.path(), now()).unwrap();
        let file = |dir: &tempfile::TempDir| dir.path().join("ca/authority.json");
        std::fs::copy(file(&other), file(&dir)).unwrap();
        let error = running.reload().now_or_never().unwrap().unwrap_err().to_string();
        assert!(
            error.contains("no root with the one in force") && error.contains(&hex(&running.root_digest())),
            "{error}"
        );
    }
}
