//! A connection to a workload of this node, from its capture to its last byte; and the tunnels of other agents, that
//! carry one such connection after another. Where a policy says something of requests, [`reading`] goes on.

mod authentication;
mod intake;
mod reading;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    frame::{Control, Open},
    identity::SpiffeId,
    policy::{Content, Reads},
    refusal::Reason,
    route::Transport,
    view::Snapshot,
};

use super::{
    Accepted, Asked, Node,
    identify::{self, Arrival},
    requests::stream::{Arriving, Socket},
    turn::Turn,
};
use crate::{
    authorize::{self, Allowed},
    connect,
    local::{Admission, Local},
    metrics::Direction,
    record::Entry,
    refusal::{Failure, Refusal, Stop},
    relay::{self, ResetOnDrop, tunnel::Stopped},
    trust::Led,
    tunnel::{Event, Link, LinkError, lease},
    wake::seldom,
    wants::Held,
};
use reading::{Left, Visit};

/// The story of what arrives at a workload's address: plaintext, which is one connection, or a tunnel, whose leases
/// are one connection each.
pub(super) async fn serve(accepted: Accepted, node: &Node) {
    let mut entry = begin(&At::of(&accepted), node);
    entry.told().source.address = Some(accepted.peer);
    let arrived = tokio::select! {
        arrived = Box::pin(arrive(&accepted, node, &mut entry)) => arrived,
        refusal = seldom(node.cut(&accepted.workload)) => Err(refusal),
    };
    match arrived {
        Ok(Arrived { how: Arrival::Tunnel, view, turn }) => {
            match Box::pin(handshake(accepted, view, turn, node)).await {
                Ok((link, at)) => {
                    let _place = entry.place.take();
                    entry.withdraw();
                    leases(link, at, node).await;
                }
                Err(refusal) => entry.finish(Err(refusal.into())),
            }
        }
        Ok(Arrived { how: Arrival::Plaintext, view, turn }) => {
            drop(turn);
            let result = tokio::select! {
                result = plaintext(&accepted, view, node, &mut entry) => result,
                refusal = seldom(node.cut(&accepted.workload)) => Err(refusal.into()),
            };
            match result {
                Ok(Next::Requests(visit)) => {
                    Box::pin(requests_in_plaintext(accepted, *visit, node, entry)).await;
                }
                Ok(Next::Ended) => super::end(accepted.stream, *entry, Ok(())),
                Err(stop) => super::end(accepted.stream, *entry, Err(stop)),
            }
        }
        Err(refusal) => super::end(accepted.stream, *entry, Err(refusal.into())),
    }
}

/// Where something arrived: what stays the same for all leases of a tunnel.
#[derive(Debug, Clone)]
struct At {
    from: SocketAddr,
    original: SocketAddr,
    workload: Arc<Local>,
}

impl At {
    fn of(accepted: &Accepted) -> Self {
        Self { from: accepted.peer, original: accepted.original, workload: accepted.workload.clone() }
    }
}

fn begin(at: &At, node: &Node) -> Box<Entry> {
    let entry = node.inner.recorder.begin(Direction::Inbound, &at.workload.name);
    entry.told().destination.workload = Some(at.workload.name.clone());
    entry.told().destination.address = Some(at.original);
    entry
}

/// What is known of a connection once its source has spoken, or need not.
#[derive(Debug)]
struct Arrived {
    how: Arrival,
    view: Arc<Snapshot>,
    /// Until it has shown who it is.
    turn: Box<Turn>,
}

/// Does the source speak TLS?
async fn arrive(accepted: &Accepted, node: &Node, entry: &mut Entry) -> Result<Arrived, Refusal> {
    identify::not_a_loop(accepted)?;
    entry.place = Some(node.place(&accepted.workload)?);
    let mut view = node.view()?;
    entry.view = Some(view.shared_version());
    let workload = &accepted.workload;
    entry.told().destination.identity = view.identity(&workload.name).cloned();
    let turn = node.inner.turns.wait(workload.id(), accepted.peer.ip()).await?;
    let mut spoken = None;
    if !view.knows(accepted.peer.ip()) {
        // Whichever is first tells: what the source says, or what the controller says of it. Both only wait.
        tokio::select! {
            word = identify::first_word(accepted) => spoken = Some(word?),
            asked = Box::pin(node.ask(workload, Direction::Inbound, accepted.peer.ip())) => view = asked?.view,
        }
    }
    entry.view = Some(view.shared_version());
    let destination = authorize::destination(&view, &workload.name)?;
    let how = match spoken {
        Some(how) => how,
        None => identify::arrival(accepted, &view, &destination, node.limits()).await?,
    };
    entry.told().transport = Some(match how {
        Arrival::Tunnel => Transport::Tunnel,
        Arrival::Plaintext => Transport::Plaintext,
    });
    Ok(Arrived { how, view, turn })
}

/// What becomes of a plaintext connection.
enum Next {
    /// It has ended well.
    Ended,
    /// Its requests are read.
    Requests(Box<Visit>),
}

/// One plaintext connection.
async fn plaintext(
    accepted: &Accepted,
    view: Arc<Snapshot>,
    node: &Node,
    entry: &mut Entry,
) -> Result<Next, Stop> {
    let (at, client) = (At::of(accepted), accepted.peer.ip());
    // May they? The address names the source for the log alone: nothing proves it.
    entry.told().source.workload = view.workload_at(client).map(|workload| workload.name.clone());
    let reads = reads(&view, &at)?;
    let Allowed { rule, would_refuse } = may(&view, &at, None, Stage::Asked, Content::Requests)?;
    drop(view); // the connection may outlive many
    entry.allowed(rule, would_refuse);
    let place = at.workload.admit(node.limits().max_connections_per_workload)?;

    // The application, and the bytes, for as long as they may.
    let limits = node.limits();
    let app =
        Box::pin(connect::application(&at.workload.namespace, client, at.original, limits.dial_timeout));
    let app = ResetOnDrop::new(app.await?);
    entry.opened();
    if reads != Reads::No {
        return Ok(Next::Requests(Box::new(Visit { at, proved: None, reads, app, _place: place })));
    }
    let carried = node.carried(entry, &at.workload, client);
    tokio::select! {
        ended = relay::plain::run(&accepted.stream, app, &carried) => ended.map(|()| Next::Ended),
        refusal = seldom(revoked(node, &at, None, entry, Content::Bytes)) => Err(refusal.into()),
    }
}

/// The requests of a plaintext connection.
async fn requests_in_plaintext(accepted: Accepted, visit: Visit, node: &Node, entry: Box<Entry>) {
    let socket = Socket::new(accepted.stream).counting(entry.shared());
    let result = tokio::select! {
        result = reading::serve(Arriving::by_plaintext(socket.clone()), visit, node, &entry) => result,
        refusal = seldom(node.cut(&accepted.workload)) => Err(refusal.into()),
    };
    if result.is_ok() {
        socket.ended();
    }
    entry.finish(result.map_err(Left::stop));
}

/// The tunnel of another agent. Who it is must be what the view says, lease by lease.
async fn handshake(
    accepted: Accepted,
    view: Arc<Snapshot>,
    _turn: Box<Turn>,
    node: &Node,
) -> Result<(Box<Link>, At), Refusal> {
    let at = At::of(&accepted);
    let connector = &node.inner.connector;
    let own = view.identity(&at.workload.name).ok_or(Reason::DestinationUnknown)?;
    let link = connect::take(
        accepted.stream,
        own.clone(),
        &connector.identities,
        &connector.limits,
        &connector.metrics,
    )
    .await?;
    Ok((link, at))
}

/// One lease after another, until the tunnel is idle for too long, broken, or the agent stops.
async fn leases(mut link: Box<Link>, at: At, node: &Node) {
    let limits = node.limits();
    let metrics = &node.inner.connector.metrics;
    loop {
        let from = (at.workload.id(), at.from.ip());
        let Some(idle) = node.inner.idle.take(from, limits.idle_per_source) else {
            metrics.limit_hit("idle_tunnels");
            return Box::pin(link.close(limits.ready_wait)).await;
        };
        link.count_as("idle", metrics);
        // Waiting for OPEN is cancel-safe: what was read of it stays in the link. One that has come already when draining
        // has begun is not taken: its source goes to the successor, and nothing of it would outlive the drain's deadline.
        let asked = tokio::select! {
            biased;
            () = node.drain().draining() => return Box::pin(link.close(limits.ready_wait)).await,
            () = at.workload.leaving() => return Box::pin(link.close(limits.ready_wait)).await,
            asked = tokio::time::timeout(limits.idle_at_destination, link.next()) => asked,
        };
        let open = match asked {
            Ok(Ok(Event::Control(Control::Open(open)))) => open,
            Ok(Ok(_)) => return unasked(&at, node, Reason::FrameOutOfTurn, "not an OPEN"),
            Ok(Err(LinkError::Closed)) => return link.retire(),
            Ok(Err(error @ (LinkError::Frame(_) | LinkError::Tls(_)))) => {
                return unasked(&at, node, Reason::BadFrame, error.to_string());
            }
            Ok(Err(error)) if link.is_mid_frame() => {
                return unasked(&at, node, Reason::BadFrame, format!("{error}, within a frame"));
            }
            // The peer went away with nothing under way: nobody's connection.
            Ok(Err(_)) => return,
            Err(_) if link.is_mid_frame() => return unasked(&at, node, Reason::OpenTimeout, "half an OPEN"),
            Err(_) => return Box::pin(link.close(limits.ready_wait)).await,
        };
        drop(idle);
        if link.has_expired() {
            // Nothing was taken: the source opens another, for which it needs a certificate that is valid.
            return Box::pin(link.close(limits.ready_wait)).await;
        }
        link.count_as("busy", metrics);
        match lease(link, open, &at, node).await {
            Some(ready) => link = ready,
            None => return,
        }
    }
}

/// A tunnel that ends for a reason without having asked for a connection.
fn unasked(at: &At, node: &Node, reason: Reason, detail: impl Into<std::borrow::Cow<'static, str>>) {
    let entry = begin(at, node);
    entry.told().source.address = Some(at.from);
    entry.told().transport = Some(Transport::Tunnel);
    entry.finish(Err(Refusal::new(reason, detail).into()));
}

/// One lease: one connection, decided on the newest view. The tunnel, if it takes another.
async fn lease(mut link: Box<Link>, open: Open, at: &At, node: &Node) -> Option<Box<Link>> {
    let wait = node.limits().ready_wait;
    let mut entry = begin(at, node);
    let proved = Proved { identity: link.peer().clone(), led: link.led().clone(), open };
    let asked = tokio::select! {
        asked = Box::pin(admit(&proved, at, node, &mut entry)) => asked,
        refusal = node.cut(&at.workload) => Err(refusal),
    };
    let Admitted { app, reads, place, _held } = match asked {
        Ok(admitted) => admitted,
        Err(refusal) if refusal.reason == Reason::CertificateUntrusted => {
            // Its root was withdrawn since the handshake. Nothing was taken: as with a certificate that has run out.
            entry.withdraw();
            Box::pin(link.close(wait)).await;
            return None;
        }
        Err(refusal) => {
            let reason = refusal.reason;
            entry.finish(Err(refusal.into()));
            return Box::pin(lease::refuse(link, reason, wait)).await;
        }
    };

    entry.opened();
    if reads != Reads::No {
        let visit = Visit { at: at.clone(), proved: Some(proved), reads, app, _place: place };
        return Box::pin(requests(link, visit, node, entry)).await;
    }

    // The bytes, for as long as they may.
    let _place = place;
    let carried = node.carried(&entry, &at.workload, at.from.ip());
    let (stopped, said) = tokio::select! {
        carried = relay::tunnel::run(&app, &mut link, &carried) => carried,
        refusal = revoked(node, at, Some(&proved), &entry, Content::Bytes) => return cut(*entry, refusal),
        refusal = seldom(node.cut(&at.workload)) => return cut(*entry, refusal),
    };
    let (result, usable) = match stopped {
        Stopped::ApplicationReset { untaken: true } => {
            // Its source reads requests, perhaps, and may send this one elsewhere.
            entry.finish(Err(Failure::DestinationReset.into()));
            Box::pin(link.close(wait)).await;
            return None;
        }
        Stopped::Finished => {
            app.finished();
            (Ok(()), true)
        }
        // A RESET after our FIN is not spoken: the tunnel itself is reset, by being dropped.
        Stopped::ApplicationReset { untaken: false } => {
            (Err(Failure::DestinationReset.into()), !said.own_end)
        }
        Stopped::PeerReset => (Err(Failure::SourceReset.into()), true),
        Stopped::Lost(error) => (Err(Stop::from(error)), false),
        Stopped::Stalled(no_room) => (Err(Refusal::from(no_room).into()), false),
    };
    entry.finish(result);
    if !usable {
        return None;
    }
    Box::pin(lease::make_ready(link, said, wait)).await
}

/// The requests of one lease. The tunnel, if it takes another.
async fn requests(link: Box<Link>, visit: Visit, node: &Node, entry: Box<Entry>) -> Option<Box<Link>> {
    let wait = node.limits().ready_wait;
    let accepted = link.push(&Control::Accept).map_err(LinkError::from);
    let accepted = match accepted {
        Ok(()) => link.flush().await,
        error => error,
    };
    if let Err(error) = accepted {
        entry.finish(Err(error.into()));
        return None;
    }
    let (arriving, workload) = (Arriving::by_tunnel(link, entry.shared()), visit.at.workload.clone());
    let result = tokio::select! {
        result = reading::serve(arriving.clone(), visit, node, &entry) => result,
        refusal = seldom(node.cut(&workload)) => Err(refusal.into()),
    };
    let untaken = matches!(result, Err(Left::Untaken));
    let cut = matches!(result, Err(Left::Stopped(Stop::Refused(_))));
    entry.finish(result.map_err(Left::stop));
    // Cut in its midst the tunnel is reset, by being dropped; what was answered before, 400 say, is to be read.
    let (link, said) = arriving.into_lease().filter(|(_, said)| said.own_end || !cut)?;
    if untaken {
        // That nothing was taken which is not answered is what the end of a tunnel means: the request may go elsewhere.
        Box::pin(link.close(wait)).await;
        return None;
    }
    Box::pin(lease::make_ready(link, said, wait)).await
}

/// Ends a connection in its midst: application and tunnel are reset, by being dropped.
fn cut(entry: Entry, refusal: Refusal) -> Option<Box<Link>> {
    entry.finish(Err(refusal.into()));
    None
}

/// What a source has shown of itself: by its certificate, and by its OPEN.
#[derive(Debug)]
struct Proved {
    identity: SpiffeId,
    led: Led,
    open: Open,
}

/// May they? Then connects the application, as the client.
async fn admit(proved: &Proved, at: &At, node: &Node, entry: &mut Entry) -> Result<Admitted, Refusal> {
    let open = &proved.open;
    entry.told().transport = Some(Transport::Tunnel);
    entry.told().source.address = Some(open.source);
    entry.told().source.identity = Some(Arc::new(proved.identity.clone()));
    if open.port != at.original.port() || open.source.is_ipv4() != at.original.is_ipv4() {
        let detail =
            format!("OPEN from {} to port {} on a tunnel to {}", open.source, open.port, at.original);
        return Err(Refusal::new(Reason::OpenElsewhere, detail));
    }
    // The view has to say whose the source's addresses are; as a rule they are one, and known.
    let ask = async |address| Box::pin(node.ask(&at.workload, Direction::Inbound, address)).await;
    let Asked { mut view, held } = ask(at.from.ip()).await?;
    let mut holds = Box::new([held, None]);
    if open.source.ip() != at.from.ip() {
        let other = ask(open.source.ip()).await?;
        (view, holds[1]) = (other.view, other.held);
    }
    entry.view = Some(view.shared_version());
    entry.told().destination.identity = view.identity(&at.workload.name).cloned();
    entry.told().source.workload = view.workload_at(open.source.ip()).map(|workload| workload.name.clone());
    let reads = reads(&view, at)?;
    let Allowed { rule, would_refuse } = may(&view, at, Some(proved), Stage::Asked, Content::Requests)?;
    entry.allowed(rule, would_refuse);
    let limits = node.limits();
    let place = at.workload.admit(limits.max_connections_per_workload)?;
    let app =
        connect::application(&at.workload.namespace, open.source.ip(), at.original, limits.dial_timeout);
    Ok(Admitted { app: ResetOnDrop::new(app.await?), reads, place, _held: holds })
}

/// A connection that may be.
struct Admitted {
    app: ResetOnDrop,
    reads: Reads,
    place: Admission,
    _held: Holds,
}

/// Whether the requests that arrive here have to be read.
fn reads(view: &Snapshot, at: &At) -> Result<Reads, Refusal> {
    let destination = authorize::destination(view, &at.workload.name)?;
    Ok(authorize::reads(view, &destination, at.original.port()))
}

/// The word that a source's addresses are used: that of its tunnel and, where it differs, its own.
type Holds = Box<[Option<Held>; 2]>;

/// When a decision is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The connection is asked for: with [`Content::Requests`], which decides as [`Content::Bytes`] does where no policy says
    /// anything of requests.
    Asked,
    /// It goes on, and the view has changed. A view that has nothing to say of its source, for once, says nothing against
    /// it: who it is was proved when it was opened.
    GoesOn,
}

/// The decision, the same when a connection is opened, for each of its requests, and whenever the view changes: is the
/// source who it says, and may it?
fn may(
    view: &Snapshot,
    at: &At,
    proved: Option<&Proved>,
    stage: Stage,
    content: Content<'_>,
) -> Result<Allowed, Refusal> {
    let destination = authorize::destination(view, &at.workload.name)?;
    let (identity, address): (Option<&SpiffeId>, IpAddr) = match proved {
        Some(proved) => {
            if !proved.led.holds(&view.mesh().roots) {
                return Err(Refusal::new(Reason::CertificateUntrusted, proved.led.withdrawn()));
            }
            match identify::tunnel_source(view, at.from.ip(), &proved.identity, &proved.open) {
                Err(refusal) if refusal.reason == Reason::SourceUnanswered && stage == Stage::GoesOn => {}
                covered => covered?,
            }
            (Some(&proved.identity), proved.open.source.ip())
        }
        None => (None, at.from.ip()),
    };
    Ok(authorize::inbound(view, &destination, identity, address, at.original.port(), content)?)
}

/// Done when a change of the view takes a live connection's permission away. Cancel-safe.
async fn revoked(
    node: &Node,
    at: &At,
    proved: Option<&Proved>,
    entry: &Entry,
    content: Content<'_>,
) -> Refusal {
    node.each_view(|view| {
        let allowed = may(view, at, proved, Stage::GoesOn, content)?;
        entry.would_refuse(allowed.would_refuse);
        Ok(())
    })
    .await
}
