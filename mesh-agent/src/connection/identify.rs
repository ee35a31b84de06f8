//! Who is asking: whose address it is in the view, and whether a certificate says the same.

use std::{net::IpAddr, sync::Arc};

use super::{
    Accepted,
    preface::{MAX_PEEK, is_tunnel},
};
use crate::{limits::Limits, live::Party, refusal::Refusal, tunnel::buffers::Buffer};
use mesh_core::{
    frame::Open,
    identity::SpiffeId,
    model::{Mode, Workload},
    refusal::Reason,
    view::Snapshot,
};

/// The workload of this node that opens a connection.
pub(super) fn source(
    accepted: &Accepted,
    view: &Snapshot,
    party: &mut Party,
) -> Result<(Arc<Workload>, Arc<SpiffeId>), Refusal> {
    not_a_loop(accepted)?;
    let name = &accepted.workload.name;
    party.workload = Some(name.clone());
    let unknown = || Refusal::new(Reason::ViewMissing, format!("the view has no workload {name}"));
    let (workload, identity) =
        view.workload(name).cloned().zip(view.identity(name).cloned()).ok_or_else(unknown)?;
    party.identity = Some(identity.clone());
    Ok((workload, identity))
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
/// we are captured, so its first bytes are looked at. So are those of one that nobody has said anything of.
pub(super) async fn arrival(
    accepted: &Accepted,
    view: &Snapshot,
    destination: &Workload,
    limits: &Limits,
) -> Result<Arrival, Refusal> {
    let address = accepted.peer.ip();
    let source = view.workload_at(address).filter(|source| source.enrolled);
    if source.is_none() && view.knows(address) {
        return Ok(Arrival::Plaintext);
    }
    // Silence of a captured source is a tunnel whose agent is busy, not an application that waits to be spoken to.
    let captured = source.is_some_and(|source| source.captured);
    let may_be_silent = destination.mode == Mode::Permissive && !captured;
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

/// How a source speaks of which the view knows nothing, if it speaks before the view is asked. Cancel-safe: what is looked
/// at stays.
pub(super) async fn first_word(accepted: &Accepted) -> Result<Arrival, Refusal> {
    let mut buffer = Buffer::take();
    match accepted.stream.peek(&mut buffer[..MAX_PEEK]).await {
        Ok(n) if is_tunnel(&buffer[..n]) => Ok(Arrival::Tunnel),
        Ok(_) => Ok(Arrival::Plaintext),
        Err(error) => Err(Refusal::new(Reason::HandshakeFailed, error.to_string())),
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
    let unanswered = |address| {
        let detail = format!("{address}, which proved {proved}");
        Err(Refusal::new(Reason::SourceUnanswered, detail))
    };
    // What is known comes first: that one address is not known must not hide that the other is somebody else's.
    match identity_at(tunnel_from) {
        Some(expected) if **expected == *proved => {}
        Some(expected) => {
            let detail = format!("{tunnel_from} is {expected}, it proved {proved}");
            return Err(Refusal::new(Reason::IdentityMismatch, detail));
        }
        None if !view.knows(tunnel_from) => {}
        None => {
            let detail = format!("{tunnel_from} is no workload's address, it proved {proved}");
            return Err(Refusal::new(Reason::IdentityMismatch, detail));
        }
    }
    let source = open.source.ip();
    match identity_at(source) {
        Some(covered) if **covered == *proved => {}
        None if !view.knows(source) => return unanswered(source),
        _ => {
            let detail = format!("{source} is not an address of {proved}");
            return Err(Refusal::new(Reason::SourceNotCovered, detail));
        }
    }
    if view.knows(tunnel_from) { Ok(()) } else { unanswered(tunnel_from) }
}
