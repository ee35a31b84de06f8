//! An issuing certificate that somebody else makes and renews, mounted as files in cert-manager's shape: `tls.crt` (the
//! issuing certificate first, then what leads to the root), `tls.key`, `ca.crt` (the roots).
//!
//! Stands apart from what we make ourselves: nothing here is ever written, and its keys may be of other kinds.

use std::{fs, path::Path, time::Duration};

use rcgen::{Issuer, KeyPair, PKCS_RSA_SHA256};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};

use super::{Loaded, belongs, parsed, subject, validity};
use crate::digest::digest;

/// Most certificates of a file: more is not an issuer's.
const MAX_CERTIFICATES: usize = 16;
/// RFC 8410, RFC 5480 and RFC 3279: AlgorithmIdentifiers, without the sequence around them.
const RSA: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
const EC_P256: &[u8] = &[
    0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03,
    0x01, 0x07,
];
const EC_P384: &[u8] =
    &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
/// Bytes of an uncompressed point of P-384.
const P384_POINT_LEN: usize = 97;
/// DER's tags.
const INTEGER_ZERO: &[u8] = &[0x02, 0x01, 0x00];
const OCTETS: u8 = 0x04;
const SEQUENCE: u8 = 0x30;

/// Reads what is mounted, and checks that its parts belong together. An error names the file.
pub(super) fn load(dir: &Path) -> Result<Loaded, String> {
    // The kubelet swaps all files at once by one link: through it none is of another time than the others.
    let at_once = fs::canonicalize(dir.join("..data"));
    let dir = at_once.as_deref().unwrap_or(dir);
    let read = |name: &str| fs::read(dir.join(name)).map_err(|error| format!("{name}: {error}"));
    let [chain_pem, key_pem, roots_pem] = [read("tls.crt")?, read("tls.key")?, read("ca.crt")?];
    let chain = certificates("tls.crt", &chain_pem)?;
    let mut roots = certificates("ca.crt", &roots_pem)?;
    let issuing = chain[0].clone();
    if !parsed(&issuing)?.is_ca() {
        return Err(
            "tls.crt: its first certificate may not sign others; request one with isCA: true".to_owned()
        );
    }
    let key = key(&key_pem, &issuing)?;
    belongs(&issuing, &key, "tls.crt")?;
    // A root may be in both files; it is not sent, as whoever trusts it has it.
    let intermediates: Vec<_> =
        chain.into_iter().filter(|it| !roots.contains(it) || *it == issuing).collect();
    let anchor = anchor(&intermediates, &roots)?;
    // The one that it leads to comes first: it is what join tokens name.
    roots[..=anchor].rotate_right(1);
    let issuing_times = validity(&issuing)?;
    let digest = digest(&[chain_pem, key_pem, roots_pem].concat());
    let issuer = Issuer::from_ca_cert_der(&issuing, key).map_err(|error| format!("tls.crt: {error}"))?;
    let intermediates = intermediates.into_iter().filter(|it| !roots.contains(it)).collect();
    Ok(Loaded { stored: None, roots, intermediates, issuer, issuing_times, digest })
}

/// Whether it ends within this time.
pub(super) fn ends_within(loaded: &Loaded, time: Duration, now: std::time::SystemTime) -> bool {
    loaded.issuing_times.1 < now + time
}

fn certificates(file: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| format!("{file}: {error}"))?;
    match all.len() {
        1..=MAX_CERTIFICATES => Ok(all),
        other => Err(format!("{file}: it has {other} certificates, it must have 1 to {MAX_CERTIFICATES}")),
    }
}

/// The place of the root that the chain leads to.
fn anchor(chain: &[CertificateDer<'_>], roots: &[CertificateDer<'_>]) -> Result<usize, String> {
    let mut at = &chain[0];
    for _ in 0..=chain.len() {
        if let Some(place) = roots.iter().position(|root| root == at || is_signed_by(at, root)) {
            return Ok(place);
        }
        let Some(above) = chain.iter().find(|above| *above != at && is_signed_by(at, above)) else { break };
        at = above;
    }
    Err(format!(
        "tls.crt: it leads to none of the roots of ca.crt; {} is missing there",
        parsed(at)?.issuer()
    ))
}

fn is_signed_by(der: &CertificateDer<'_>, by: &CertificateDer<'_>) -> bool {
    let (Ok(one), Ok(other)) = (parsed(der), parsed(by)) else { return false };
    subject(by).is_ok_and(|name| name == one.issuer().to_string())
        && one.verify_signature(Some(other.public_key())).is_ok()
}

/// The key, in whichever of the three forms it is written.
fn key(pem: &[u8], certificate: &CertificateDer<'_>) -> Result<KeyPair, String> {
    let unusable =
        |error: &dyn std::fmt::Display| format!("tls.key: {error}; use RSA, or ECDSA on P-256 or P-384");
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| unusable(&error))?;
    let is_p384 = parsed(certificate)?.public_key().subject_public_key.data.len() == P384_POINT_LEN;
    let (pkcs8, rsa) = match &key {
        PrivateKeyDer::Pkcs8(key) => {
            let der = key.secret_pkcs8_der().to_vec();
            let rsa = der.windows(RSA.len()).take(64).any(|window| window == RSA);
            (der, rsa)
        }
        PrivateKeyDer::Pkcs1(key) => (wrapped(RSA, key.secret_pkcs1_der()), true),
        PrivateKeyDer::Sec1(key) => {
            (wrapped(if is_p384 { EC_P384 } else { EC_P256 }, key.secret_sec1_der()), false)
        }
        _ => return Err(unusable(&"a form that is not known here")),
    };
    let pkcs8 = PrivatePkcs8KeyDer::from(pkcs8);
    let pair = match rsa {
        true => KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &PKCS_RSA_SHA256),
        false => KeyPair::try_from(&pkcs8),
    };
    pair.map_err(|error| unusable(&error))
}

/// A key of an older form as PKCS #8 (RFC 5208 §5).
fn wrapped(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    let parts = [INTEGER_ZERO.to_vec(), tagged(SEQUENCE, algorithm), tagged(OCTETS, key)];
    tagged(SEQUENCE, &parts.concat())
}

/// DER: tag, length, content (X.690 §8.1).
fn tagged(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let significant = length.iter().position(|byte| *byte != 0).map_or(&[][..], |first| &length[first..]);
    let mut der = vec![tag];
    match content.len() {
        0..=0x7f => der.push(content.len() as u8),
        _ => {
            der.push(0x80 | significant.len() as u8);
            der.extend(significant);
        }
    }
    der.extend(content);
    der
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::SystemTime};

    use futures_util::FutureExt;
    use rcgen::{BasicConstraints, PKCS_ECDSA_P256_SHA256};

    use super::{
        super::{Authority, CaError, DAY, Place, SignError, ca_params, name, new_root},
        *,
    };

    fn now() -> SystemTime {
        SystemTime::now()
    }

    /// Keys as cert-manager and openssl write them.
    const KEYS: [&str; 3] = [
        include_str!("../../tests/data/rsa.key"),
        include_str!("../../tests/data/p256.key"),
        include_str!("../../tests/data/p384.key"),
    ];

    /// A directory as a kubelet mounts it: every file a link through `..data`, which is swapped at once.
    struct Mount {
        dir: tempfile::TempDir,
        editions: usize,
    }

    impl Mount {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["tls.crt", "tls.key", "ca.crt"] {
                std::os::unix::fs::symlink(format!("..data/{name}"), dir.path().join(name)).unwrap();
            }
            Self { dir, editions: 0 }
        }

        fn put(&mut self, [chain, key, roots]: [&str; 3]) {
            self.editions += 1;
            let edition = self.dir.path().join(format!("..edition-{}", self.editions));
            fs::create_dir(&edition).unwrap();
            for (file, content) in [("tls.crt", chain), ("tls.key", key), ("ca.crt", roots)] {
                fs::write(edition.join(file), content).unwrap();
            }
            let next = self.dir.path().join("..next");
            std::os::unix::fs::symlink(&edition, &next).unwrap();
            fs::rename(next, self.dir.path().join("..data")).unwrap();
        }

        fn path(&self) -> PathBuf {
            self.dir.path().to_owned()
        }

        fn open(&self) -> Result<Authority, CaError> {
            Authority::open(Place::Mounted(self.path()), now()).now_or_never().unwrap()
        }
    }

    /// A root, and an issuing certificate below it for a key, which ends after a time.
    struct Issuing {
        root_pem: String,
        root: CertificateDer<'static>,
        chain: String,
        key: String,
    }

    fn issuing(key_pem: &str, life: Duration) -> Issuing {
        let (root, root_key) = new_root(now()).unwrap();
        below(root, root_key, key_pem, life)
    }

    fn below(root: rcgen::Certificate, root_key: KeyPair, key_pem: &str, life: Duration) -> Issuing {
        let issuer = Issuer::from_ca_cert_der(root.der(), root_key).unwrap();
        // The curve is read from the certificate, which is still to be made.
        let pair = match PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).unwrap() {
            PrivateKeyDer::Pkcs1(key) => {
                let pkcs8 = PrivatePkcs8KeyDer::from(wrapped(RSA, key.secret_pkcs1_der()));
                KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &PKCS_RSA_SHA256).unwrap()
            }
            PrivateKeyDer::Sec1(key) => {
                let curve = if key_pem.len() > 260 { EC_P384 } else { EC_P256 };
                KeyPair::try_from(&PrivatePkcs8KeyDer::from(wrapped(curve, key.secret_sec1_der()))).unwrap()
            }
            _ => KeyPair::from_pem(key_pem).unwrap(),
        };
        let params = ca_params(name("issuing", &pair), now(), now() + life, BasicConstraints::Constrained(0));
        let chain = params.signed_by(&pair, &issuer).unwrap().pem();
        Issuing { root_pem: root.pem(), root: root.der().clone(), chain, key: key_pem.to_owned() }
    }

    fn csr() -> Vec<u8> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        rcgen::CertificateParams::default().serialize_request(&key).unwrap().der().to_vec()
    }

    fn id() -> mesh_core::identity::SpiffeId {
        "spiffe://td/ns/shop/sa/web".parse().unwrap()
    }

    #[test]
    fn it_signs_with_keys_of_every_kind_that_cert_manager_makes() {
        for key in KEYS {
            let (mut mount, made) = (Mount::new(), issuing(key, DAY * 90));
            mount.put([&made.chain, &made.key, &made.root_pem]);
            let authority = mount.open().unwrap();
            let issued = authority.sign(&csr(), &id(), DAY, now()).unwrap();
            assert_eq!(issued.chain.len(), 2, "the root is not sent");
            assert!(super::super::tests::leads_to(&issued.chain, &made.root, now()));
        }
    }

    #[test]
    fn a_renewal_is_followed_and_damage_leaves_what_was_in_force() {
        let (mut mount, old) = (Mount::new(), issuing(KEYS[1], DAY * 90));
        mount.put([&old.chain, &old.key, &old.root_pem]);
        let authority = mount.open().unwrap();
        let reload = || authority.reload().now_or_never().unwrap();
        assert!(!reload().unwrap());

        let new = issuing(KEYS[0], DAY * 90);
        for (bad, expected) in [
            ([old.chain.as_str(), &new.key, &old.root_pem], "tls.crt"),
            ([&new.chain, &new.key, &old.root_pem], "leads to none of the roots of ca.crt"),
            ([&old.root_pem[..40], &old.key, &old.root_pem], "tls.crt"),
            ([&old.chain, "", &old.root_pem], "tls.key"),
            ([&old.chain, &old.key, ""], "ca.crt: it has 0 certificates"),
        ] {
            mount.put(bad);
            let error = reload().unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("mounted at"), "{error}");
            assert!(mount.open().is_err());
            authority.sign(&csr(), &id(), DAY, now()).unwrap();
        }

        // Both roots are told first, then the new one signs: it is then the one that tokens name.
        let both = [new.root_pem.as_str(), &old.root_pem].concat();
        mount.put([&old.chain, &old.key, &both]);
        assert!(reload().unwrap());
        assert_eq!(authority.roots(), [old.root.clone(), new.root.clone()]);
        mount.put([&new.chain, &new.key, &both]);
        assert!(reload().unwrap());
        assert_eq!(authority.roots(), [new.root.clone(), old.root]);
        let issued = authority.sign(&csr(), &id(), DAY, now()).unwrap();
        assert!(super::super::tests::leads_to(&issued.chain, &new.root, now()));
    }

    #[test]
    fn it_is_not_changed_here_and_signs_nothing_beyond_its_end() {
        let (mut mount, made) = (Mount::new(), issuing(KEYS[1], DAY));
        mount.put([&made.chain, &made.key, &made.root_pem]);
        let authority = mount.open().unwrap();
        let error = authority.rotate_root(now()).now_or_never().unwrap().unwrap_err();
        assert!(matches!(error, CaError::NotOurs(_)), "{error}");
        assert!(!authority.renew_issuing(now() + DAY / 2).now_or_never().unwrap().unwrap());
        assert!(authority.sign(&csr(), &id(), DAY * 7, now()).unwrap().not_after <= now() + DAY);
        let late = authority.sign(&csr(), &id(), DAY, now() + DAY * 2);
        assert!(matches!(late, Err(SignError::Ended)));
    }

    #[test]
    fn a_certificate_that_may_not_sign_is_refused_with_its_cure() {
        let (mut mount, made) = (Mount::new(), issuing(KEYS[1], DAY));
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let leaf = rcgen::CertificateParams::default().self_signed(&key).unwrap().pem();
        mount.put([&leaf, &key.serialize_pem(), &made.root_pem]);
        assert!(mount.open().unwrap_err().to_string().contains("isCA: true"));
    }
}
