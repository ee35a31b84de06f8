//! Routes of connections on the wire, each within the port of the service that it speaks of.

use std::sync::Arc;

use super::{
    UNKNOWN, WireError, error, name_from_proto, proto,
    routes::{target_from_proto, target_to_proto},
};
use crate::model::{
    http::RouteKind,
    tcp::{ConnectionRoute, Share},
};

pub(super) fn to_proto(route: &ConnectionRoute) -> proto::ConnectionRoute {
    let share = |share: &Share| {
        let (service, port) = target_to_proto(&share.to);
        proto::Share { service, port, weight: share.weight }
    };
    proto::ConnectionRoute {
        namespace: route.name.namespace.clone(),
        name: route.name.name.clone(),
        kind: match route.kind {
            RouteKind::Tls => proto::RouteKind::Tls,
            RouteKind::Tcp => proto::RouteKind::Tcp,
            // Such a one is none of connections.
            RouteKind::Http | RouteKind::Grpc => proto::RouteKind::Unspecified,
        }
        .into(),
        created_unix: route.created,
        hostnames: route.hostnames.iter().map(ToString::to_string).collect(),
        backends: route.backends.iter().map(share).collect(),
    }
}

pub(super) fn from_proto(
    key: &str,
    route: &proto::ConnectionRoute,
) -> Result<Arc<ConnectionRoute>, WireError> {
    let share = |share: &proto::Share| {
        let to = target_from_proto(key, "ports.routes.backends", &share.service, share.port)?;
        Ok(Share { to, weight: share.weight })
    };
    let hostname = |text: &String| text.parse().map_err(|e| error(key, "ports.routes.hostnames", e));
    Ok(Arc::new(ConnectionRoute {
        kind: match route.kind() {
            proto::RouteKind::Tls => RouteKind::Tls,
            proto::RouteKind::Tcp => RouteKind::Tcp,
            proto::RouteKind::Http | proto::RouteKind::Grpc | proto::RouteKind::Unspecified => {
                return Err(error(key, "ports.routes.kind", UNKNOWN));
            }
        },
        name: name_from_proto(key, &route.namespace, &route.name)?,
        created: route.created_unix,
        hostnames: route.hostnames.iter().map(hostname).collect::<Result<_, _>>()?,
        backends: route.backends.iter().map(share).collect::<Result<_, _>>()?,
    }))
}
