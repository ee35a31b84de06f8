//! The traffic secrets of a session, and the keys that come from them (RFC 8446 §7.2, §7.3).
//!
//! rustls tells them in the handshake, through the hook that is there for key logs; they go to the session that is at
//! work on this thread and nowhere else. With them nothing of rustls has to live as long as the tunnel: what it would
//! keep for later keys is 2 KB at each end, most of it the peer's certificates.

use std::cell::RefCell;

use ring::{
    aead::{AES_256_GCM, Algorithm, NONCE_LEN, UnboundKey},
    hkdf::{HKDF_SHA256, HKDF_SHA384, KeyType, Prk},
};
use rustls::{Error, KeyLog};
use zeroize::Zeroizing;

/// The longest: of SHA-384.
const MAX_SECRET: usize = 48;
/// The longest key: of AES-256 and ChaCha20.
const MAX_KEY: usize = 32;

/// The secrets of both directions; each is there once the handshake has come to it.
#[derive(Debug, Default)]
pub struct TrafficSecrets {
    /// Under which the client seals.
    pub client: Option<Secret>,
    /// Under which the server seals.
    pub server: Option<Secret>,
}

thread_local! {
    /// What the handshake at work on this thread has told.
    static TOLD: RefCell<TrafficSecrets> = RefCell::default();
}

impl TrafficSecrets {
    /// Runs a step of a handshake, and takes the secrets that it told.
    pub fn hear<T>(&mut self, step: impl FnOnce() -> T) -> T {
        // Of a handshake that was none of a tunnel, by the same configuration.
        TOLD.take();
        let done = step();
        let TrafficSecrets { client, server } = TOLD.take();
        self.client = client.or(self.client.take());
        self.server = server.or(self.server.take());
        done
    }
}

/// The hook of rustls' configurations.
#[derive(Debug)]
pub struct ToTunnel;

impl KeyLog for ToTunnel {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        TOLD.with_borrow_mut(|told| match label {
            CLIENT => told.client = Secret::new(secret),
            SERVER => told.server = Secret::new(secret),
            _ => {}
        });
    }

    fn will_log(&self, label: &str) -> bool {
        label == CLIENT || label == SERVER
    }
}

/// What rustls calls the secrets of RFC 8446 §7.1, client_application_traffic_secret_0 and its counterpart.
const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";

/// The secret of one direction; overwritten when it is dropped.
pub struct Secret {
    bytes: Zeroizing<[u8; MAX_SECRET]>,
    len: u8,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// `None` for one that is longer than any of TLS 1.3.
    pub fn new(secret: &[u8]) -> Option<Self> {
        let mut bytes = Zeroizing::new([0; MAX_SECRET]);
        bytes.get_mut(..secret.len())?.copy_from_slice(secret);
        Some(Self { bytes, len: secret.len() as u8 })
    }

    /// The key and the IV of this secret (RFC 8446 §7.3).
    pub fn key(&self, algorithm: &'static Algorithm) -> Result<(UnboundKey, [u8; NONCE_LEN]), Error> {
        let mut key = Zeroizing::new([0; MAX_KEY]);
        let key = &mut key[..algorithm.key_len()];
        self.expand(algorithm, b"key", key)?;
        let mut iv = [0; NONCE_LEN];
        self.expand(algorithm, b"iv", &mut iv)?;
        let key = UnboundKey::new(algorithm, key).map_err(|_| Error::EncryptError)?;
        Ok((key, iv))
    }

    /// The secret after this one (RFC 8446 §7.2).
    pub fn next(&self, algorithm: &'static Algorithm) -> Result<Self, Error> {
        let mut next = Self { bytes: Zeroizing::new([0; MAX_SECRET]), len: self.len };
        self.expand(algorithm, b"traffic upd", &mut next.bytes[..usize::from(self.len)])?;
        Ok(next)
    }

    /// HKDF-Expand-Label with an empty context (RFC 8446 §7.1). The hash is the one of the suite: SHA-384 goes with
    /// AES-256 alone (RFC 8446 §B.4).
    fn expand(&self, algorithm: &'static Algorithm, label: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let hash = if algorithm == &AES_256_GCM { HKDF_SHA384 } else { HKDF_SHA256 };
        let prk = Prk::new_less_safe(hash, &self.bytes[..usize::from(self.len)]);
        let length = (out.len() as u16).to_be_bytes();
        let label_len = [(PREFIX.len() + label.len()) as u8];
        let info: [&[u8]; 5] = [&length, &label_len, PREFIX, label, &[0]];
        let filled = prk.expand(&info, Length(out.len())).and_then(|okm| okm.fill(out));
        filled.map_err(|_| Error::EncryptError)
    }
}

/// Before every label of TLS 1.3.
const PREFIX: &[u8] = b"tls13 ";

/// How many bytes are asked for.
struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use ring::aead::AES_128_GCM;

    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u32> = hex.chars().filter_map(|c| c.to_digit(16)).collect();
        digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
    }

    /// RFC 8448 §3, the client's application data.
    #[test]
    fn keys_are_those_of_the_published_trace() {
        let secret =
            "9e 40 64 6c e7 9a 7f 9d c0 5a f8 88 9b ce 65 52 87 5a fa 0b 06 df 00 87 f7 92 eb b7 c1 75 04 a5";
        let secret = Secret::new(&bytes(secret)).unwrap();
        let mut key = [0; 16];
        secret.expand(&AES_128_GCM, b"key", &mut key).unwrap();
        assert_eq!(key.to_vec(), bytes("17 42 2d da 59 6e d5 d9 ac d8 90 e3 c6 3f 50 51"));
        assert_eq!(
            secret.key(&AES_128_GCM).unwrap().1.to_vec(),
            bytes("5b 78 92 3d ee 08 57 90 33 e5 23 d9")
        );
    }

    #[test]
    fn a_secret_is_not_shown_and_none_is_longer_than_those_of_tls() {
        assert_eq!(format!("{:?}", Secret::new(&[7; 48])), "Some(Secret)");
        assert!(Secret::new(&[7; 49]).is_none());
    }
}
