//! Which root a peer's certificate led to, so that what was opened under a root ends when that is withdrawn.
//!
//! Stands apart from [`crate::identity::verify`], which answers a handshake and keeps nothing: TLS libraries say that a chain
//! leads to a root, and not to which. While there is one root, that is known without looking; while there are more, a
//! chain is verified once again, against each by itself.

use std::sync::Arc;

use rustls::{
    RootCertStore, client::verify_server_cert_signed_by_trust_anchor, crypto::ring, server::ParsedCertificate,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;

/// The roots that are trusted, each also by itself.
#[derive(Debug)]
pub struct Trust {
    roots: Vec<(CertificateDer<'static>, Arc<RootCertStore>)>,
}

/// To which of these roots a chain led: to more than one by a cross certificate. None of them: nobody knows to which.
#[derive(Debug, Clone)]
pub struct Led {
    trust: Arc<Trust>,
    roots: Arc<[usize]>,
}

impl Trust {
    /// These roots, the newest first; fails when one of them is not a certificate.
    pub fn new(roots: &[CertificateDer<'static>]) -> Result<Arc<Self>, rustls::Error> {
        let each =
            |root: &CertificateDer<'static>| Ok((root.clone(), root_store(std::slice::from_ref(root))?));
        Ok(Arc::new(Self { roots: roots.iter().map(each).collect::<Result<_, rustls::Error>>()? }))
    }

    /// The roots that this chain leads to, the newest first; the chain led to one of them in its handshake.
    pub fn led(self: &Arc<Self>, chain: &[CertificateDer<'_>], now: OffsetDateTime) -> Led {
        let all = 0..self.roots.len();
        let roots = match self.roots.as_slice() {
            [_] => all.collect(),
            each => all.filter(|root| leads(chain, &each[*root].1, now)).collect(),
        };
        Led { trust: self.clone(), roots }
    }
}

impl Led {
    /// Whether a root of its is among these. Where nobody knows which those are, all that they may be have to be.
    pub fn holds(&self, roots: &[Vec<u8>]) -> bool {
        let among = |root: &CertificateDer<'_>| roots.iter().any(|other| other.as_slice() == root.as_ref());
        if self.roots.is_empty() {
            return self.trust.roots.iter().all(|(root, _)| among(root));
        }
        self.roots.iter().any(|root| among(&self.trust.roots[*root].0))
    }

    /// What ended it, for a person.
    pub fn withdrawn(&self) -> String {
        use sha2::{Digest, Sha256};
        let name = |root: usize| {
            let digest: [u8; 32] = Sha256::digest(&self.trust.roots[root].0).into();
            digest[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let root = self.roots.first().map_or_else(|| "one of several".to_owned(), |root| name(*root));
        format!("the root that it led to, {root}, was withdrawn")
    }
}

/// Roots as rustls wants them; fails when one of them is not a certificate.
pub(crate) fn root_store(roots: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(Arc::new(store))
}

fn leads(chain: &[CertificateDer<'_>], root: &RootCertStore, now: OffsetDateTime) -> bool {
    let Some((leaf, intermediates)) = chain.split_first() else { return false };
    let seconds = u64::try_from(now.unix_timestamp()).unwrap_or(0);
    let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    ParsedCertificate::try_from(leaf).is_ok_and(|leaf| {
        verify_server_cert_signed_by_trust_anchor(&leaf, root, intermediates, now, algorithms).is_ok()
    })
}
