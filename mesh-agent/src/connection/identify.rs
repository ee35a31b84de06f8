//! Who is asking: whose address it is in the view, and whether a certificate says the same.

use std::{net::IpAddr, sync::Arc};

use mesh_core::{
    frame::{ALPN, Open},
    identity::SpiffeId,
    model::{Mode, Workload},
    refusal::Reason,
    view::Snapshot,
};
use rustls::server::Acceptor;

use super::Accepted;
use crate::{limits::Limits, record::Party, refusal::Refusal, tunnel::buffers::Buffer};

/// First byte of a TLS record that carries a handshake (RFC 8446 §5.1).
const TLS_HANDSHAKE: u8 = 0x16;
/// More than any ClientHello of ours.
const MAX_PEEK: usize = 4096;

/// The workload of this node that opens a connection.
pub(super) fn source(
    accepted: &Accepted,
    view: &Snapshot,
    party: &mut Party,
) -> Result<Arc<SpiffeId>, Refusal> {
    not_a_loop(accepted)?;
    let name = &accepted.workload.name;
    party.workload = Some(name.clone());
    let unknown = || Refusal::new(Reason::ViewMissing, format!("the view has no workload {name}"));
    let identity = view.identity(name).cloned().ok_or_else(unknown)?;
    party.identity = Some(identity.clone());
    Ok(identity)
}

/// A captured connection is never to the listener's own address: that would be the application asking the agent for
/// the agent, for ever.
pub(super) fn not_a_loop(accepted: &Accepted) -> Result<(), Refusal> {
    let own = match accepted.original.ip() {
        IpAddr::V4(ip) => ip == std::net::Ipv4Addr::LOCALHOST,
        IpAddr::V6(ip) => ip == std::net::Ipv6Addr::LOCALHOST,
    };
    if own {
        return Err(Refusal::new(Reason::LoopToListener, accepted.original.to_string()));
    }
    Ok(())
}

/// How a source speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Another agent, with TLS.
    Tunnel,
    /// The application itself.
    Plaintext,
}

/// How the source of an inbound connection speaks. A source that is not enrolled is not waited for: it can only
/// speak plaintext. An enrolled one normally opens a tunnel, but not before its agent has captured it and knows that
/// we are captured, so its first bytes are looked at.
pub(super) async fn arrival(
    accepted: &Accepted,
    view: &Snapshot,
    destination: &Workload,
    limits: &Limits,
) -> Result<Arrival, Refusal> {
    let source = view.workload_at(accepted.peer.ip()).filter(|source| source.enrolled);
    let Some(source) = source else { return Ok(Arrival::Plaintext) };
    // Silence of a captured source is a tunnel whose agent is busy, not an application that waits to be spoken to.
    let may_be_silent = destination.mode == Mode::Permissive && !source.captured;
    let wait = if may_be_silent { limits.sniff } else { limits.handshake_timeout };
    let mut buffer = Buffer::take();
    match tokio::time::timeout(wait, accepted.stream.peek(&mut buffer[..MAX_PEEK])).await {
        Ok(Ok(n)) if is_tunnel(&buffer[..n]) => Ok(Arrival::Tunnel),
        Ok(Ok(_)) => Ok(Arrival::Plaintext),
        Ok(Err(error)) => Err(Refusal::new(Reason::HandshakeFailed, error.to_string())),
        Err(_) if may_be_silent => Ok(Arrival::Plaintext),
        Err(_) => Err(Reason::HandshakeTimeout.into()),
    }
}

/// Whether these first bytes are another agent's ClientHello. An application's own TLS is plaintext to us; a
/// ClientHello that is not complete yet is taken for a tunnel's, and shown otherwise by the handshake.
fn is_tunnel(bytes: &[u8]) -> bool {
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

/// The source of a lease: its certificate must be the one that the view gives to the tunnel's address, and the
/// application's address must be one of the same identity.
pub(super) fn tunnel_source(
    view: &Snapshot,
    tunnel_from: IpAddr,
    proved: &SpiffeId,
    open: &Open,
) -> Result<(), Refusal> {
    let identity_at = |address| view.identity(&view.workload_at(address)?.name);
    match identity_at(tunnel_from) {
        Some(expected) if **expected == *proved => {}
        Some(expected) => {
            let detail = format!("{tunnel_from} is {expected}, it proved {proved}");
            return Err(Refusal::new(Reason::IdentityMismatch, detail));
        }
        None => {
            let detail = format!("{tunnel_from} is no workload's address, it proved {proved}");
            return Err(Refusal::new(Reason::IdentityMismatch, detail));
        }
    }
    match identity_at(open.source.ip()) {
        Some(covered) if **covered == *proved => Ok(()),
        _ => {
            let detail = format!("{} is not an address of {proved}", open.source.ip());
            Err(Refusal::new(Reason::SourceNotCovered, detail))
        }
    }
}

#[cfg(test)]
mod tests {
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
