//! What the first bytes of a connection say: another agent's ClientHello, or an application.
//!
//! Pure, and apart from the waiting for those bytes, so that it can be fed anything (`tests/fuzz`). Once bytes are not
//! a tunnel's, more of them cannot make them one: a peer gains nothing by sending them piece by piece.

use mesh_core::frame::ALPN;
use rustls::server::Acceptor;

/// First byte of a TLS record that carries a handshake (RFC 8446 §5.1).
const TLS_HANDSHAKE: u8 = 0x16;
/// More than any ClientHello of ours.
pub(super) const MAX_PEEK: usize = 4096;

/// Whether these first bytes are another agent's ClientHello. An application's own TLS is plaintext to us; a
/// ClientHello that is not complete yet is taken for a tunnel's, and shown otherwise by the handshake.
pub(super) fn is_tunnel(bytes: &[u8]) -> bool {
    if bytes.first() != Some(&TLS_HANDSHAKE) {
        return false;
    }
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    if acceptor.read_tls(&mut rest).is_err() {
        return false;
    }
    match acceptor.accept() {
        Ok(Some(hello)) => {
            hello.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == ALPN))
        }
        Ok(None) => true,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring, version::TLS13};

    use super::*;

    fn client_hello(alpn: &[u8]) -> Vec<u8> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        let mut session = ClientConnection::new(Arc::new(config), "example.org".try_into().unwrap()).unwrap();
        let mut bytes = vec![];
        session.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn only_our_own_client_hello_is_a_tunnel() {
        assert!(is_tunnel(&client_hello(ALPN)));
        assert!(is_tunnel(&client_hello(ALPN)[..20]), "not complete yet");
        assert!(!is_tunnel(&client_hello(b"h2")), "the application's own TLS");
        assert!(!is_tunnel(b"GET / HTTP/1.1\r\n"));
        assert!(!is_tunnel(b""));
    }
}
