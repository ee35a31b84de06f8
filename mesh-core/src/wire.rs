//! The contract between controller and agents (`proto/nodemesh.proto`) and its conversion to and from the model.
//!
//! What comes off the wire is checked here: an agent puts a view in force only when every resource of it converts.

use std::{net::IpAddr, sync::Arc};

use crate::{
    identity::{IdentityError, SpiffeId, TrustDomain},
    model, view,
};

/// The generated messages.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/nodemesh.v1.rs"));
}

/// Why a message is not a resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("resource '{key}', field {field}: {reason}")]
pub struct WireError {
    /// The resource's key, as sent.
    pub key: String,
    /// The field of the message.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

/// A difference of views as the messages that carry it.
pub fn update(version: String, complete: bool, delta: &view::Delta) -> proto::ViewUpdate {
    proto::ViewUpdate {
        version,
        complete,
        upserts: delta.upserts.iter().map(resource_to_proto).collect(),
        removes: delta.removes.iter().map(ToString::to_string).collect(),
        now_unix_ms: 0,
    }
}

/// The difference that an update carries. One bad resource makes the whole update unusable: views are all or nothing.
pub fn delta(update: &proto::ViewUpdate) -> Result<view::Delta, WireError> {
    let removes = update
        .removes
        .iter()
        .map(|key| key.parse().map_err(|e: model::NameError| error(key, "removes", e)))
        .collect::<Result<_, _>>()?;
    let upserts = update.upserts.iter().map(resource_from_proto).collect::<Result<_, _>>()?;
    Ok(view::Delta { upserts, removes })
}

fn error(key: &str, field: &'static str, reason: impl ToString) -> WireError {
    WireError { key: key.to_owned(), field, reason: reason.to_string() }
}

fn resource_to_proto(resource: &view::Resource) -> proto::Resource {
    use proto::resource::Body;
    let body = match resource {
        view::Resource::Mesh(mesh) => Body::Mesh(proto::Mesh {
            trust_domain: mesh.trust_domain.to_string(),
            roots_der: mesh.roots.clone(),
        }),
        view::Resource::Workload(workload) => Body::Workload(workload_to_proto(workload)),
        view::Resource::Service(service) => Body::Service(service_to_proto(service)),
        view::Resource::Policy(policy) => Body::Policy(policy_to_proto(policy)),
    };
    proto::Resource { key: resource.key().to_string(), body: Some(body) }
}

fn resource_from_proto(resource: &proto::Resource) -> Result<view::Resource, WireError> {
    use proto::resource::Body;
    let key = resource.key.as_str();
    let converted = match &resource.body {
        None => return Err(error(key, "body", "missing, or of a kind that this version does not know")),
        Some(Body::Mesh(mesh)) => view::Resource::Mesh(Arc::new(view::Mesh {
            trust_domain: TrustDomain::parse(&mesh.trust_domain)
                .map_err(|e| error(key, "trust_domain", e))?,
            roots: mesh.roots_der.clone(),
        })),
        Some(Body::Workload(workload)) => {
            view::Resource::Workload(Arc::new(workload_from_proto(key, workload)?))
        }
        Some(Body::Service(service)) => view::Resource::Service(Arc::new(service_from_proto(key, service)?)),
        Some(Body::Policy(policy)) => view::Resource::Policy(Arc::new(policy_from_proto(key, policy)?)),
    };
    if converted.key().to_string() != key {
        return Err(error(key, "key", format_args!("the body names {}", converted.key())));
    }
    Ok(converted)
}

/// A name that is printed and read as itself: what an update adds by it, another can remove by it.
fn name_from_proto(key: &str, namespace: &str, name: &str) -> Result<model::Name, WireError> {
    format!("{namespace}/{name}").parse().map_err(|e| error(key, "name", e))
}

fn workload_to_proto(workload: &model::Workload) -> proto::Workload {
    proto::Workload {
        namespace: workload.name.namespace.clone(),
        name: workload.name.name.clone(),
        node: workload.node.clone(),
        service_account: workload.service_account.clone(),
        addresses: workload.addresses.iter().map(address_to_proto).collect(),
        labels: workload.labels.clone(),
        enrolled: workload.enrolled,
        captured: workload.captured,
        mode: match workload.mode {
            model::Mode::Permissive => proto::Mode::Permissive,
            model::Mode::Strict => proto::Mode::Strict,
        }
        .into(),
    }
}

fn workload_from_proto(key: &str, workload: &proto::Workload) -> Result<model::Workload, WireError> {
    Ok(model::Workload {
        name: name_from_proto(key, &workload.namespace, &workload.name)?,
        node: workload.node.clone(),
        service_account: workload.service_account.clone(),
        addresses: addresses_from_proto(key, "addresses", &workload.addresses)?,
        labels: workload.labels.clone(),
        enrolled: workload.enrolled,
        captured: workload.captured,
        mode: match workload.mode() {
            proto::Mode::Permissive => model::Mode::Permissive,
            // An unknown mode is the safer one.
            proto::Mode::Strict | proto::Mode::Unspecified => model::Mode::Strict,
        },
    })
}

fn service_to_proto(service: &model::Service) -> proto::Service {
    let port = |port: &model::ServicePort| proto::ServicePort {
        name: port.name.clone(),
        port: port.port.into(),
        endpoints: port
            .endpoints
            .iter()
            .map(|endpoint| proto::Endpoint {
                workload: endpoint.workload.to_string(),
                address: address_to_proto(&endpoint.address),
                port: endpoint.port.into(),
            })
            .collect(),
    };
    proto::Service {
        namespace: service.name.namespace.clone(),
        name: service.name.name.clone(),
        addresses: service.addresses.iter().map(address_to_proto).collect(),
        ports: service.ports.iter().map(port).collect(),
    }
}

fn service_from_proto(key: &str, service: &proto::Service) -> Result<model::Service, WireError> {
    let endpoint = |endpoint: &proto::Endpoint| {
        Ok(model::Endpoint {
            workload: endpoint.workload.parse().map_err(|e| error(key, "ports.endpoints.workload", e))?,
            address: address_from_proto(key, "ports.endpoints.address", &endpoint.address)?,
            port: port_from_proto(key, "ports.endpoints.port", endpoint.port)?,
        })
    };
    let port = |port: &proto::ServicePort| {
        Ok(model::ServicePort {
            name: port.name.clone(),
            port: port_from_proto(key, "ports.port", port.port)?,
            endpoints: port.endpoints.iter().map(endpoint).collect::<Result<_, _>>()?,
        })
    };
    Ok(model::Service {
        name: name_from_proto(key, &service.namespace, &service.name)?,
        addresses: addresses_from_proto(key, "addresses", &service.addresses)?,
        ports: service.ports.iter().map(port).collect::<Result<_, _>>()?,
    })
}

fn policy_to_proto(policy: &model::Policy) -> proto::Policy {
    let source = |source: &model::Source| proto::Source {
        identities: source.identities.iter().map(ToString::to_string).collect(),
        namespaces: source.namespaces.clone(),
        address_blocks: source.address_blocks.iter().map(ToString::to_string).collect(),
    };
    let rule = |rule: &model::Rule| proto::Rule {
        from: rule.from.iter().map(source).collect(),
        ports: rule.ports.iter().map(|port| u32::from(*port)).collect(),
    };
    proto::Policy {
        namespace: policy.name.namespace.clone(),
        name: policy.name.name.clone(),
        selector: policy.selector.clone(),
        action: match policy.action {
            model::Action::Allow => proto::Action::Allow,
            model::Action::Deny => proto::Action::Deny,
        }
        .into(),
        rules: policy.rules.iter().map(rule).collect(),
    }
}

fn policy_from_proto(key: &str, policy: &proto::Policy) -> Result<model::Policy, WireError> {
    let source = |source: &proto::Source| {
        let identities = source.identities.iter().map(|id| SpiffeId::parse(id));
        let blocks = source.address_blocks.iter().map(|block| block.parse());
        Ok(model::Source {
            identities: identities
                .collect::<Result<_, IdentityError>>()
                .map_err(|e| error(key, "rules.from.identities", e))?,
            namespaces: source.namespaces.clone(),
            address_blocks: blocks
                .collect::<Result<_, ipnet::AddrParseError>>()
                .map_err(|e| error(key, "rules.from.address_blocks", e))?,
        })
    };
    let rule = |rule: &proto::Rule| {
        Ok(model::Rule {
            from: rule.from.iter().map(source).collect::<Result<_, _>>()?,
            ports: rule
                .ports
                .iter()
                .map(|port| port_from_proto(key, "rules.ports", *port))
                .collect::<Result<_, _>>()?,
        })
    };
    Ok(model::Policy {
        name: name_from_proto(key, &policy.namespace, &policy.name)?,
        selector: policy.selector.clone(),
        action: match policy.action() {
            proto::Action::Allow => model::Action::Allow,
            proto::Action::Deny => model::Action::Deny,
            proto::Action::Unspecified => return Err(error(key, "action", "this version does not know it")),
        },
        rules: policy.rules.iter().map(rule).collect::<Result<_, _>>()?,
    })
}

fn address_to_proto(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address_from_proto(key: &str, field: &'static str, bytes: &[u8]) -> Result<IpAddr, WireError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    let v6 = <[u8; 16]>::try_from(bytes)
        .map_err(|_| error(key, field, format_args!("an address of {} bytes, not 4 or 16", bytes.len())))?;
    Ok(v6.into())
}

fn addresses_from_proto(key: &str, field: &'static str, list: &[Vec<u8>]) -> Result<Vec<IpAddr>, WireError> {
    list.iter().map(|bytes| address_from_proto(key, field, bytes)).collect()
}

fn port_from_proto(key: &str, field: &'static str, port: u32) -> Result<u16, WireError> {
    u16::try_from(port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| error(key, field, format_args!("{port} is not a port")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Action, Endpoint, Mode, Name, Policy, Rule, Service, ServicePort, Source, Workload};

    fn resources() -> Vec<view::Resource> {
        let name = Name::new("shop", "web");
        vec![
            view::Resource::Mesh(Arc::new(view::Mesh {
                trust_domain: TrustDomain::parse("td").unwrap(),
                roots: vec![vec![1, 2], vec![3]],
            })),
            view::Resource::Workload(Arc::new(Workload {
                name: name.clone(),
                node: "node-a".into(),
                service_account: "web".into(),
                addresses: vec!["10.1.0.11".parse().unwrap(), "fd01::11".parse().unwrap()],
                labels: [("app".to_owned(), "web".to_owned())].into(),
                enrolled: true,
                captured: true,
                mode: Mode::Strict,
            })),
            view::Resource::Service(Arc::new(Service {
                name: name.clone(),
                addresses: vec!["10.96.0.1".parse().unwrap()],
                ports: vec![ServicePort {
                    name: "http".into(),
                    port: 80,
                    endpoints: vec![Endpoint {
                        workload: name.clone(),
                        address: "10.1.0.11".parse().unwrap(),
                        port: 8080,
                    }],
                }],
            })),
            view::Resource::Policy(Arc::new(Policy {
                name,
                selector: Default::default(),
                action: Action::Deny,
                rules: vec![Rule {
                    from: vec![Source {
                        identities: vec![SpiffeId::parse("spiffe://td/ns/a/sa/b").unwrap()],
                        namespaces: vec!["a".into()],
                        address_blocks: vec!["10.0.0.0/8".parse().unwrap()],
                    }],
                    ports: vec![80],
                }],
            })),
        ]
    }

    #[test]
    fn every_kind_crosses_the_wire_unchanged() {
        let sent =
            view::Delta { upserts: resources(), removes: vec![view::Key::Service(Name::new("a", "b"))] };
        assert_eq!(delta(&update("7".into(), false, &sent)).unwrap(), sent);
    }

    #[test]
    fn a_name_that_would_not_read_back_is_refused() {
        for (namespace, name, key) in [("a/b", "c", "workload/a/b/c"), ("", "c", "workload//c")] {
            let workload =
                proto::Workload { namespace: namespace.into(), name: name.into(), ..Default::default() };
            let body = Some(proto::resource::Body::Workload(workload));
            let upserts = vec![proto::Resource { key: key.into(), body }];
            let error = delta(&proto::ViewUpdate { upserts, ..Default::default() }).unwrap_err();
            assert_eq!((error.key.as_str(), error.field), (key, "name"));
        }
    }

    #[test]
    fn a_bad_resource_names_itself_and_its_field() {
        let mut bad = update("7".into(), true, &view::Delta { upserts: resources(), removes: vec![] });
        if let Some(proto::resource::Body::Workload(workload)) = &mut bad.upserts[1].body {
            workload.addresses[0] = vec![1, 2, 3];
        }
        let error = delta(&bad).unwrap_err();
        assert_eq!((error.key.as_str(), error.field), ("workload/shop/web", "addresses"));
    }
}
