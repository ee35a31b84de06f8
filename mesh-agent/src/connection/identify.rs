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
