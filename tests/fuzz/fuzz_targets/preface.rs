//! The first bytes of a connection to a workload: a tunnel's, or an application's.
//!
//! Claims: a tunnel's record type comes first; bytes that are not a tunnel's do not become one by more of them; every
//! beginning of our own ClientHello is a tunnel's, whatever the fuzzer cuts off. And of a client's that TLSRoutes go by: the
//! name that it asks for is the same however its bytes are cut, and no more of them is kept than may be.
#![no_main]

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use mesh_core::frame::ALPN;
use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring, version::TLS13};

// The agent's own file: what it decides is not for other crates to use, so the agent has no public name for it.
#[allow(dead_code)]
#[path = "../../../mesh-agent/src/connection/preface.rs"]
mod preface_file;
#[allow(dead_code)]
#[path = "../../../mesh-agent/src/connection/server_name.rs"]
mod server_name_file;

fuzz_target!(|bytes: &[u8]| {
    let told = preface_file::is_tunnel(bytes);
    if told {
        assert_eq!(bytes.first(), Some(&0x16));
    }
    // The sixteen beginnings that halve, then the ones near the end: where records and messages break.
    for len in (0..16).map(|i| bytes.len() >> i).chain(bytes.len().saturating_sub(8)..bytes.len()) {
        let beginning = &bytes[..len];
        assert!(
            !told || len == 0 || preface_file::is_tunnel(beginning),
            "{len} bytes are an application's, {} are a tunnel's",
            bytes.len()
        );
    }
    let told = heard(bytes, usize::MAX);
    for piece in [1, 7, 100] {
        assert_eq!(heard(bytes, piece), told, "in pieces of {piece}");
    }
    let hello = client_hello();
    let same = hello.iter().zip(bytes).take_while(|(a, b)| a == b).count();
    if same > 0 {
        assert!(preface_file::is_tunnel(&hello[..same]), "the first {same} bytes of our own");
    }
});

/// What is heard of bytes that come in pieces of this length.
fn heard(bytes: &[u8], piece: usize) -> Option<Option<Option<String>>> {
    const MOST: usize = 1000;
    let mut listening = server_name_file::Listening::to(MOST);
    let mut rest = bytes;
    while !rest.is_empty() {
        let (more, later) = rest.split_at(piece.min(rest.len()).min(listening.room()));
        rest = later;
        let heard = listening.hear(more);
        assert!(listening.room() <= MOST, "more is kept than may be");
        match heard {
            Ok(None) => {}
            end => return Some(end.ok().flatten()),
        }
    }
    None
}

/// A ClientHello as an agent sends it; the same for the life of the process.
fn client_hello() -> &'static [u8] {
    static HELLO: OnceLock<Vec<u8>> = OnceLock::new();
    HELLO.get_or_init(|| {
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has TLS 1.3")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        let name = "example.org".try_into().expect("a name");
        let mut session = ClientConnection::new(Arc::new(config), name).expect("a session");
        let mut bytes = vec![];
        session.write_tls(&mut bytes).expect("a Vec takes everything");
        bytes
    })
}
