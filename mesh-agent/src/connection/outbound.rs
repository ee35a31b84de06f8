//! A connection that a workload of this node opens, from its capture to its last byte.

use mesh_core::route;

use super::{Accepted, Node, identify};
use crate::{
    connect::{Ask, Opened, Way},
    record::Entry,
    refusal::{Failure, Stop},
    relay::{
        self, ResetOnDrop,
        tunnel::{Carried, Stopped},
    },
};

/// The story. Each `?` ends it with a reason; the caller resets the application then, and records either way.
pub(super) async fn serve(accepted: &Accepted, node: &Node, entry: &mut Entry) -> Result<(), Stop> {
    let view = node.view()?; // one version for the whole connection
    entry.view = Some(view.clone());
    let connector = &node.inner.connector;
    let wait = node.limits().ready_wait;

    // Who is asking, and may it have one more?
    entry.place = Some(node.place(&accepted.workload)?);
    let _place = accepted.workload.admit(node.limits().max_connections_per_workload)?;
    let identity = identify::source(accepted, &view, &mut entry.source)?;

    // What do they ask for, and which way leads there? Whether they may is for the destination to say.
    let route = route::outbound(&view, accepted.original)?;
    let (local, app, address) = (&accepted.workload, &accepted.stream, accepted.peer);
    let ask = Ask { local, identity: &identity, app, address, view: &view };
    let opened = Box::pin(connector.open(&ask, route, entry)).await?;

    // The bytes. The attempt counts as a load of its endpoint until they have ended.
    let Opened { way, attempt: _attempt } = opened;
    let mut lease = match way {
        Way::Plaintext(to) => {
            return Ok(relay::plain::run(app, ResetOnDrop::new(to), &entry.flow, wait).await?);
        }
        Way::Tunnel(lease) => lease,
    };
    let carried = Carried { flow: &entry.flow, direction: accepted.direction, wait };
    let (stopped, said) = relay::tunnel::run(app, &mut lease.link, carried).await;
    let result = match stopped {
        Stopped::Finished => Ok(()),
        // A RESET after our FIN is not spoken: the tunnel itself is reset, by being dropped.
        Stopped::ApplicationReset if said.own_end => return Err(Failure::SourceReset.into()),
        Stopped::ApplicationReset => Err(Failure::SourceReset),
        Stopped::PeerReset => Err(Failure::DestinationReset),
        Stopped::Lost(error) => return Err(error.into()),
    };
    connector.settle(lease, said);
    Ok(result?)
}
