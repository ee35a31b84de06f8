//! A connection that a workload of this node opens, from its capture to its last byte.

use std::net::SocketAddr;

use mesh_core::{
    model::{Mode, Name, Workload},
    refusal::Reason,
    route::{self, Route, Transport},
    view::Snapshot,
};

use super::{
    Accepted, Asked, Node, identify,
    requests::Routed,
    routed::{Heard, Routes},
    wants,
};
use crate::{
    connect::{Ask, Opened, Way},
    local::Admission,
    metrics::Direction,
    record::Entry,
    refusal::{Failure, Refusal, Stop},
    relay::{self, ResetOnDrop, tunnel::Stopped},
    trust::Led,
    underway,
    wake::seldom,
};

/// How the story of a connection goes on.
#[derive(Debug)]
pub(super) enum Next {
    /// It has ended well.
    Ended,
    /// It is one of requests.
    Requests(Box<Routed>),
    /// Its client has to say first which name it asks for.
    Hello(Box<Waiting>),
}

/// What a connection has whose client is waited for: its place among the workload's, among those to the service, and the
/// word that the address is used.
pub(super) type Waiting = (Admission, Option<underway::Connection>, Option<wants::Held>);

/// The story. Each `?` ends it with a reason; the caller resets the application then, and records either way.
pub(super) async fn serve(
    accepted: &Accepted,
    node: &Node,
    entry: &mut Entry,
    heard: Heard,
) -> Result<Next, Stop> {
    let connector = &node.inner.connector;
    let (local, app, address) = (&accepted.workload, &accepted.stream, accepted.peer);

    // Who is asking, and may it have one more?
    entry.place = Some(node.place(local)?);
    let place = local.admit(node.limits().max_connections_per_workload)?;
    let original = accepted.original;
    let (opened, _held) = {
        // One version until the way is open; it says what the destination is, if anybody does.
        let Asked { view, held } = Box::pin(node.ask(local, Direction::Outbound, original.ip())).await?;
        entry.view = Some(view.shared_version());
        let (source, identity) = identify::source(accepted, &view, &mut entry.told().source)?;

        // Has the service room for one more?
        let room = connector.room(&view, original)?;

        // Where a route speaks of it, each request goes its own way.
        if matches!(heard, Heard::Nothing)
            && let Some(service) = Routed::service(&view, original, local)
        {
            entry.told().destination.service = Some(service.clone());
            return Ok(Next::Requests(Box::new(Routed::new(service, original.port(), (place, room), held))));
        }

        // What do they ask for, and which way leads there? Whether they may is for the destination to say.
        let routes = Routes::of(&view, original, &local.name.namespace);
        if let Some(routes) = &routes {
            entry.told().destination.service = Some(routes.service.name.clone());
            if routes.wait_for(&heard) {
                return Ok(Next::Hello(Box::new((place, room, held))));
            }
        }
        let (route, there) = match &routes {
            Some(routes) => {
                let route = routes.lead(&view, &source, original, &heard, entry)?;
                let there = connector.room_behind(&route, &routes.service.name, original.port())?;
                (route, there)
            }
            None => match route::outbound(&view, &source, original) {
                Err(Reason::DestinationUnanswered) => (unanswered(&source, original, entry)?, None),
                route => (route?, None),
            },
        };
        let ask = Ask { local, identity: &identity, app: Some(app), address, view: &view };
        let opened = Box::pin(connector.open(&ask, route, heard.first(), entry)).await?;
        // Behind a service is a workload of its own, of which every change is to be heard.
        let reached = entry.told().destination.address.filter(|reached| reached.ip() != original.ip());
        let reached = reached.and_then(|reached| node.hold(local, &view, reached.ip()));
        (opened, Box::new(([held, reached], [room, there])))
    };
    entry.opened();

    // The bytes. The attempt counts as a load of its endpoint until they have ended.
    let Opened { way, attempt: _attempt } = opened;
    let destination = entry.told().destination.address.unwrap_or(accepted.original).ip();
    let carried = node.carried(entry, local, destination);
    let mut lease = match way {
        Way::Plaintext(to) => {
            return tokio::select! {
                ended = relay::plain::run(app, ResetOnDrop::new(to), &carried) => ended.map(|()| Next::Ended),
                refusal = seldom(node.each_view(|view| goes_on(view, &local.name, entry))) => Err(refusal.into()),
            };
        }
        Way::Tunnel(lease) => lease,
    };
    let led = lease.link.led().clone();
    let (stopped, said) = tokio::select! {
        carried = relay::tunnel::run(app, &mut lease.link, &carried) => carried,
        // The tunnel itself is reset, by being dropped.
        refusal = seldom(node.each_view(|view| {
            stays_trusted(view, Some(&led))?;
            goes_on(view, &local.name, entry)
        })) => return Err(refusal.into()),
    };
    let result = match stopped {
        Stopped::Finished => Ok(Next::Ended),
        // A RESET after our FIN is not spoken: the tunnel itself is reset, by being dropped.
        Stopped::ApplicationReset { .. } if said.own_end => return Err(Failure::SourceReset.into()),
        Stopped::ApplicationReset { .. } => Err(Failure::SourceReset),
        Stopped::PeerReset => Err(Failure::DestinationReset),
        Stopped::Lost(error) => return Err(error.into()),
        Stopped::Stalled(no_room) => return Err(Refusal::from(no_room).into()),
    };
    connector.settle(lease, said);
    Ok(result?)
}

/// Where a connection leads of whose destination nobody has said anything.
fn unanswered(source: &Workload, destination: SocketAddr, entry: &mut Entry) -> Result<Route, Refusal> {
    let route = route::unanswered(source.mode, destination)
        .map_err(|reason| Refusal::new(reason, destination.to_string()))?;
    entry.unanswered();
    Ok(route)
}

/// Whether the root is still one of the mesh that the certificate of a tunnel's peer led to.
pub(super) fn stays_trusted(view: &Snapshot, led: Option<&Led>) -> Result<(), Refusal> {
    match led {
        Some(led) if !led.holds(&view.mesh().roots) => {
            Err(Refusal::new(Reason::PeerCertificateUntrusted, led.withdrawn()))
        }
        _ => Ok(()),
    }
}

/// Whether a live connection is still what it was opened as: between these two identities, or in plaintext to somebody
/// who takes plaintext. Whether it may be at all is for the destination, as it was; so is a destination that has left.
pub(super) fn goes_on(view: &Snapshot, own: &Name, entry: &Entry) -> Result<(), Refusal> {
    let told = entry.told();
    let destination = told.destination.address.and_then(|address| view.workload_at(address.ip()));
    match (told.transport, destination) {
        // What a workload asks of itself stays within its pod.
        (Some(Transport::Plaintext), Some(workload)) if workload.name != *own => {
            if workload.enrolled && workload.mode == Mode::Strict {
                return Err(Refusal::new(Reason::DestinationBecameStrict, workload.name.to_string()));
            }
        }
        (Some(Transport::Tunnel), destination) => {
            let now = |name| view.identity(name).map(|identity| (name, identity));
            if let (Some((name, now)), Some(then)) = (now(own), &told.source.identity)
                && now != then
            {
                let detail = format!("{name} is {now} now, it proved {then}");
                return Err(Refusal::new(Reason::IdentityMismatch, detail));
            }
            if let (Some((name, now)), Some(then)) =
                (destination.and_then(|workload| now(&workload.name)), &told.destination.identity)
                && now != then
            {
                let detail = format!("{name} is {now} now, it proved {then}");
                return Err(Refusal::new(Reason::PeerIdentityMismatch, detail));
            }
        }
        (Some(Transport::Plaintext) | None, _) => {}
    }
    Ok(())
}
