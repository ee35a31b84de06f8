//! Which name of a server a client asks for, by its ClientHello.
//!
//! Pure, and apart from the waiting for those bytes, so that it can be fed anything (`tests/fuzz`, with the preface's). However
//! they are cut, the same is heard, and no more of them is kept than may be.

use rustls::server::Acceptor;

/// Why what a client says is no ClientHello.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotHello {
    #[error("it is no ClientHello: {0}")]
    Tls(String),
    #[error("its ClientHello has more than {0} bytes")]
    TooLong(usize),
    #[error("the client ended it after {0} bytes")]
    Ended(usize),
}

/// A hello that is not complete yet.
#[derive(Default)]
pub(super) struct Listening {
    bytes: Vec<u8>,
    acceptor: Acceptor,
    most: usize,
}

impl Listening {
    /// To one of so many bytes at most.
    pub(super) fn to(most: usize) -> Self {
        Self { most, ..Self::default() }
    }

    /// How much more may come; never 0 while more is listened to.
    pub(super) fn room(&self) -> usize {
        self.most - self.bytes.len()
    }

    /// The client says nothing more.
    pub(super) fn end(&self) -> NotHello {
        NotHello::Ended(self.bytes.len())
    }

    /// All that was heard.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Takes more bytes, no more than there is room for. Once the hello is complete: the name that is asked for, if one is
    /// (RFC 6066, section 3), in lower case.
    pub(super) fn hear(&mut self, mut more: &[u8]) -> Result<Option<Option<String>>, NotHello> {
        self.bytes.extend_from_slice(more);
        while !more.is_empty() {
            self.acceptor.read_tls(&mut more).map_err(|error| NotHello::Tls(error.to_string()))?;
            match self.acceptor.accept() {
                Ok(None) => {}
                Ok(Some(hello)) => {
                    let name = hello.client_hello().server_name().map(str::to_ascii_lowercase);
                    return Ok(Some(name));
                }
                Err((error, _)) => return Err(NotHello::Tls(error.to_string())),
            }
        }
        if self.room() == 0 { Err(NotHello::TooLong(self.most)) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring};

    use super::*;
    use crate::connect::MAX_FIRST;

    const CHUNK: usize = 4096;

    /// What a client says that asks for a server, and offers so many bytes of names of protocols.
    fn client_hello(server: &str, offered: usize) -> Vec<u8> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = vec![vec![b'x'; 199]; offered / 200];
        let server = server.to_owned().try_into().unwrap();
        let mut session = ClientConnection::new(Arc::new(config), server).unwrap();
        let mut bytes = vec![];
        while session.wants_write() {
            session.write_tls(&mut bytes).unwrap();
        }
        bytes
    }

    /// What is heard in pieces of this length, and how many bytes it took.
    fn heard(bytes: &[u8], piece: usize) -> (Result<Option<Option<String>>, NotHello>, usize) {
        let mut listening = Listening::to(MAX_FIRST);
        for piece in bytes.chunks(piece) {
            let piece = &piece[..piece.len().min(listening.room())];
            match listening.hear(piece) {
                Ok(None) => {}
                end => return (end, listening.bytes.len()),
            }
        }
        (Ok(None), listening.bytes.len())
    }

    #[test]
    fn the_name_is_heard_however_the_hello_is_cut() {
        let hello = client_hello("DB.example.com", 0);
        for piece in [1, 2, 5, 100, CHUNK] {
            assert_eq!(heard(&hello, piece), (Ok(Some(Some("db.example.com".into()))), hello.len()));
        }
        assert_eq!(heard(&hello[..hello.len() - 1], 7).0, Ok(None), "it is not complete");
        assert_eq!(heard(&client_hello("10.0.0.1", 0), 9).0, Ok(Some(None)), "an address is no name");
        let more = [hello.as_slice(), b"more"].concat();
        assert_eq!(heard(&more, CHUNK), (Ok(Some(Some("db.example.com".into()))), more.len()), "all is kept");
    }

    #[test]
    fn what_is_no_hello_is_told_at_once_and_a_long_one_at_its_limit() {
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"SSH-2.0-x\r\n", b"\0\0\0\x08\x04\xd2\x16\x2f"] {
            assert!(matches!(heard(bytes, CHUNK).0, Err(NotHello::Tls(_))), "{bytes:?}");
        }
        let long = client_hello("a.b", 15_000);
        assert!((14_000..MAX_FIRST).contains(&long.len()));
        assert_eq!(heard(&long, CHUNK).0, Ok(Some(Some("a.b".into()))));
        let longer = client_hello("a.b", 20_000);
        assert_eq!(heard(&longer, CHUNK), (Err(NotHello::TooLong(MAX_FIRST)), MAX_FIRST));
    }

    #[test]
    fn no_change_of_a_byte_makes_it_panic_or_keep_more_than_it_may() {
        let hello = client_hello("db.example.com", 400);
        for place in 0..hello.len() {
            for changed in [0, 0xff, hello[place] ^ 1, hello[place] ^ 0x80] {
                let mut hello = hello.clone();
                hello[place] = changed;
                assert!(heard(&hello, 1 + place % 97).1 <= hello.len());
                // The rest is something else.
                hello[place..].fill(changed);
                assert!(heard(&hello, CHUNK).1 <= hello.len());
            }
        }
    }
}
