//! The contract between controller and agents (`proto/nodemesh.proto`) and its conversion to and from the model.
//!
//! What comes off the wire is checked here: an agent puts a view in force only when every resource of it converts.

mod asks;
mod authentication;
mod connections;
pub mod health;
mod intake;
mod routes;
mod traffic;

use std::{net::IpAddr, sync::Arc};

pub use self::routes::route_bytes;
use crate::{
    identity::{IdentityError, TrustDomain},
    model, view,
};

/// The generated messages.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/nodemesh.v1.rs"));
}

/// What is said of a word that a newer controller sent: guessing at it could allow what it refuses.
const UNKNOWN: &str = "this version does not know it";

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
        asked: Vec::new(),
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
        view::Resource::Demand(demand) => {
            Body::Demand(proto::Demand { blocks: demand.blocks.iter().map(ToString::to_string).collect() })
        }
        view::Resource::Nobody(address) => Body::Nobody(proto::Nobody { address: address_to_proto(address) }),
        view::Resource::Workload(workload) => Body::Workload(workload_to_proto(workload)),
        view::Resource::Service(service) => Body::Service(service_to_proto(service)),
        view::Resource::Policy(policy) => Body::AuthorizationPolicy(policy_to_proto(policy)),
        view::Resource::Authentication(policy) => Body::AuthorizationPolicy(authentication::to_proto(policy)),
        view::Resource::Intake(intake) => Body::AuthorizationPolicy(intake::to_proto(intake)),
        view::Resource::Route(route) => Body::RequestRoute(routes::to_proto(route)),
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
        Some(Body::Demand(demand)) => view::Resource::Demand(Arc::new(demand_from_proto(key, demand)?)),
        Some(Body::Nobody(nobody)) => {
            view::Resource::Nobody(address_from_proto(key, "address", &nobody.address)?)
        }
        Some(Body::Workload(workload)) => {
            view::Resource::Workload(Arc::new(workload_from_proto(key, workload)?))
        }
        Some(Body::Service(service)) => view::Resource::Service(Arc::new(service_from_proto(key, service)?)),
        Some(Body::AuthorizationPolicy(policy)) => {
            match (authentication::from_proto(key, policy)?, &policy.intake) {
                (None, None) => view::Resource::Policy(Arc::new(policy_from_proto(key, policy)?)),
                (Some(of_users), None) => view::Resource::Authentication(Arc::new(of_users)),
                (None, Some(it)) => view::Resource::Intake(Arc::new(intake::from_proto(key, policy, it)?)),
                (Some(_), Some(_)) => return Err(error(key, "body", UNKNOWN)),
            }
        }
        Some(Body::RequestRoute(route)) => view::Resource::Route(Arc::new(routes::from_proto(key, route)?)),
    };
    if converted.key().to_string() != key {
        return Err(error(key, "key", format_args!("the body names {}", converted.key())));
    }
    Ok(converted)
}

fn demand_from_proto(key: &str, demand: &proto::Demand) -> Result<view::Demand, WireError> {
    if demand.blocks.len() > view::MAX_BLOCKS {
        let said = format_args!("{} blocks, at most {} can be", demand.blocks.len(), view::MAX_BLOCKS);
        return Err(error(key, "blocks", said));
    }
    let blocks = demand.blocks.iter().map(|text| text.parse().map_err(|e| error(key, "blocks", e)));
    Ok(view::Demand { blocks: blocks.collect::<Result<_, _>>()? })
}

/// Addresses as messages carry them.
pub fn addresses<'a>(of: impl IntoIterator<Item = &'a IpAddr>) -> Vec<Vec<u8>> {
    of.into_iter().map(address_to_proto).collect()
}

/// The addresses of a message; what is none is left out.
pub fn addresses_of(sent: &[Vec<u8>]) -> impl Iterator<Item = IpAddr> {
    sent.iter().filter_map(|bytes| address_from_proto("", "addresses", bytes).ok())
}

/// A name that is printed and read as itself: what an update adds by it, another can remove by it.
fn name_from_proto(key: &str, namespace: &str, name: &str) -> Result<model::Name, WireError> {
    format!("{namespace}/{name}").parse().map_err(|e| error(key, "name", e))
}

fn workload_to_proto(workload: &model::Workload) -> proto::Workload {
    proto::Workload {
        namespace: workload.name.namespace.clone(),
        name: workload.name.name.clone(),
        uid: workload.uid.clone(),
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
        checks: workload.checks.iter().map(health::to_proto).collect(),
    }
}

fn workload_from_proto(key: &str, workload: &proto::Workload) -> Result<model::Workload, WireError> {
    Ok(model::Workload {
        name: name_from_proto(key, &workload.namespace, &workload.name)?,
        uid: workload.uid.clone(),
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
        checks: health::from_proto(key, &workload.checks)?,
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
                workload: endpoint.workload.as_ref().map(ToString::to_string).unwrap_or_default(),
                address: address_to_proto(&endpoint.address),
                port: endpoint.port.into(),
            })
            .collect(),
        traffic: traffic::to_proto(&port.traffic),
        routes: port.routes.iter().map(|route| connections::to_proto(route)).collect(),
    };
    proto::Service {
        namespace: service.name.namespace.clone(),
        name: service.name.name.clone(),
        addresses: service.addresses.iter().map(address_to_proto).collect(),
        ports: service.ports.iter().map(port).collect(),
        affinity_seconds: service.choice.affinity.unwrap_or(0),
        distribution: match service.choice.distribution {
            model::Distribution::Any => proto::Distribution::Any,
            model::Distribution::SameZone => proto::Distribution::SameZone,
            model::Distribution::SameNode => proto::Distribution::SameNode,
            model::Distribution::OnlySameNode => proto::Distribution::OnlySameNode,
        }
        .into(),
        places: service
            .choice
            .places
            .iter()
            .map(|(address, place)| proto::Place {
                address: address_to_proto(address),
                node: place.node.clone(),
                zone: place.zone.clone(),
            })
            .collect(),
    }
}

fn service_from_proto(key: &str, service: &proto::Service) -> Result<model::Service, WireError> {
    let endpoint = |endpoint: &proto::Endpoint| {
        let workload = (!endpoint.workload.is_empty()).then(|| endpoint.workload.parse()).transpose();
        Ok(model::Endpoint {
            workload: workload.map_err(|e| error(key, "ports.endpoints.workload", e))?,
            address: address_from_proto(key, "ports.endpoints.address", &endpoint.address)?,
            port: port_from_proto(key, "ports.endpoints.port", endpoint.port)?,
        })
    };
    let place = |place: &proto::Place| {
        let address = address_from_proto(key, "places.address", &place.address)?;
        Ok((address, model::Place { node: place.node.clone(), zone: place.zone.clone() }))
    };
    let port = |port: &proto::ServicePort| {
        Ok(model::ServicePort {
            name: port.name.clone(),
            port: port_from_proto(key, "ports.port", port.port)?,
            endpoints: port.endpoints.iter().map(endpoint).collect::<Result<_, _>>()?,
            traffic: traffic::from_proto(key, port.traffic.as_ref())?,
            routes: port
                .routes
                .iter()
                .map(|it| connections::from_proto(key, it))
                .collect::<Result<_, _>>()?,
        })
    };
    Ok(model::Service {
        name: name_from_proto(key, &service.namespace, &service.name)?,
        addresses: addresses_from_proto(key, "addresses", &service.addresses)?,
        ports: service.ports.iter().map(port).collect::<Result<_, _>>()?,
        choice: model::Choice {
            distribution: match proto::Distribution::try_from(service.distribution) {
                Ok(proto::Distribution::Any) => model::Distribution::Any,
                Ok(proto::Distribution::SameZone) => model::Distribution::SameZone,
                Ok(proto::Distribution::SameNode) => model::Distribution::SameNode,
                Ok(proto::Distribution::OnlySameNode) => model::Distribution::OnlySameNode,
                Err(_) => return Err(error(key, "distribution", UNKNOWN)),
            },
            affinity: Some(service.affinity_seconds).filter(|seconds| *seconds > 0),
            places: service.places.iter().map(place).collect::<Result<_, _>>()?,
        },
    })
}

fn policy_to_proto(policy: &model::Policy) -> proto::AuthorizationPolicy {
    let rule = |rule: &model::Rule| proto::Rule {
        from: rule
            .from
            .iter()
            .map(|source| proto::Source {
                any_of: Some(traits_to_proto(&source.any_of)),
                none_of: Some(traits_to_proto(&source.none_of)),
            })
            .collect(),
        to: rule.to.iter().map(|target| asks::target_to_proto(target, policy.action)).collect(),
    };
    let (labels, expressions) = selector_to_proto(&policy.selector);
    proto::AuthorizationPolicy {
        namespace: policy.name.namespace.clone(),
        name: policy.name.name.clone(),
        labels,
        expressions,
        action: match policy.action {
            model::Action::Allow => proto::Action::Allow,
            model::Action::Deny => proto::Action::Deny,
        }
        .into(),
        enforcement: match policy.enforcement {
            model::Enforcement::Enforce => proto::Enforcement::Enforce,
            model::Enforcement::Audit => proto::Enforcement::Audit,
        }
        .into(),
        rules: policy.rules.iter().map(rule).collect(),
        authentication: None,
        audited_authentication: None,
        intake: None,
    }
}

fn selector_to_proto(
    selector: &model::Selector,
) -> (std::collections::BTreeMap<String, String>, Vec<proto::Expression>) {
    let expression = |expression: &model::Expression| proto::Expression {
        key: expression.key.clone(),
        operator: match expression.operator {
            model::Operator::In => proto::Operator::In,
            model::Operator::NotIn => proto::Operator::NotIn,
            model::Operator::Exists => proto::Operator::Exists,
            model::Operator::DoesNotExist => proto::Operator::DoesNotExist,
        }
        .into(),
        values: expression.values.clone(),
    };
    (selector.labels.clone(), selector.expressions.iter().map(expression).collect())
}

fn selector_from_proto(key: &str, policy: &proto::AuthorizationPolicy) -> Result<model::Selector, WireError> {
    let expression = |expression: &proto::Expression| {
        Ok(model::Expression {
            key: expression.key.clone(),
            operator: match expression.operator() {
                proto::Operator::In => model::Operator::In,
                proto::Operator::NotIn => model::Operator::NotIn,
                proto::Operator::Exists => model::Operator::Exists,
                proto::Operator::DoesNotExist => model::Operator::DoesNotExist,
                proto::Operator::Unspecified => return Err(error(key, "expressions.operator", UNKNOWN)),
            },
            values: expression.values.clone(),
        })
    };
    Ok(model::Selector {
        labels: policy.labels.clone(),
        expressions: policy.expressions.iter().map(expression).collect::<Result<_, _>>()?,
    })
}

fn policy_from_proto(key: &str, policy: &proto::AuthorizationPolicy) -> Result<model::Policy, WireError> {
    let source = |source: &proto::Source| {
        let traits = |traits: &Option<proto::Traits>| {
            traits.as_ref().map_or_else(|| Ok(model::Traits::default()), |it| traits_from_proto(key, it))
        };
        Ok(model::Source { any_of: traits(&source.any_of)?, none_of: traits(&source.none_of)? })
    };
    let target = |target: &proto::Target| asks::target_from_proto(key, target);
    let rule = |rule: &proto::Rule| {
        Ok(model::Rule {
            from: rule.from.iter().map(source).collect::<Result<_, _>>()?,
            to: rule.to.iter().map(target).collect::<Result<_, _>>()?,
        })
    };
    Ok(model::Policy {
        name: name_from_proto(key, &policy.namespace, &policy.name)?,
        selector: selector_from_proto(key, policy)?,
        action: match policy.action() {
            proto::Action::Allow => model::Action::Allow,
            proto::Action::Deny => model::Action::Deny,
            proto::Action::Unspecified => return Err(error(key, "action", UNKNOWN)),
        },
        enforcement: match policy.enforcement() {
            proto::Enforcement::Enforce => model::Enforcement::Enforce,
            proto::Enforcement::Audit => model::Enforcement::Audit,
            proto::Enforcement::Unspecified => return Err(error(key, "enforcement", UNKNOWN)),
        },
        rules: policy.rules.iter().map(rule).collect::<Result<_, _>>()?,
    })
}

fn traits_to_proto(traits: &model::Traits) -> proto::Traits {
    proto::Traits {
        identities: traits.identities.iter().map(ToString::to_string).collect(),
        namespaces: traits.namespaces.clone(),
        trust_domains: traits.trust_domains.iter().map(ToString::to_string).collect(),
        address_blocks: traits.address_blocks.iter().map(ToString::to_string).collect(),
    }
}

fn traits_from_proto(key: &str, traits: &proto::Traits) -> Result<model::Traits, WireError> {
    let identities = traits.identities.iter().map(|text| model::IdentityPattern::parse(text));
    let domains = traits.trust_domains.iter().map(|text| TrustDomain::parse(text));
    let blocks = traits.address_blocks.iter().map(|text| text.parse());
    Ok(model::Traits {
        identities: identities
            .collect::<Result<_, model::PatternError>>()
            .map_err(|e| error(key, "rules.from.identities", e))?,
        namespaces: traits.namespaces.clone(),
        trust_domains: domains
            .collect::<Result<_, IdentityError>>()
            .map_err(|e| error(key, "rules.from.trust_domains", e))?,
        address_blocks: blocks
            .collect::<Result<_, ipnet::AddrParseError>>()
            .map_err(|e| error(key, "rules.from.address_blocks", e))?,
    })
}

fn range_to_proto(range: &model::PortRange) -> proto::PortRange {
    proto::PortRange { first: range.first().into(), last: range.last().into() }
}

fn ranges_from_proto(
    key: &str,
    field: &'static str,
    ranges: &[proto::PortRange],
) -> Result<Vec<model::PortRange>, WireError> {
    let range = |range: &proto::PortRange| model::PortRange::new(range.first.into(), range.last.into());
    ranges.iter().map(range).collect::<Result<_, _>>().map_err(|e| error(key, field, e))
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
    use crate::model::{Action, Mode, Name, Operator, Policy, Rule, Selector, Workload};

    /// An update of one workload and one policy, for tests to damage.
    fn update_of_two() -> proto::ViewUpdate {
        let name = Name::new("shop", "web");
        let workload = Workload {
            name: name.clone(),
            uid: "0a7e5bfa-1f6c-4b8e-9d53-0c1d6c1f0b11".into(),
            node: "node-a".into(),
            service_account: "web".into(),
            addresses: vec!["10.1.0.11".parse().unwrap()],
            labels: Default::default(),
            enrolled: true,
            captured: true,
            mode: Mode::Strict,
            checks: vec![],
        };
        let expressions =
            vec![model::Expression { key: "app".into(), operator: Operator::Exists, values: vec![] }];
        let policy = Policy {
            selector: Selector { expressions, ..Selector::default() },
            ..Policy::new(name, Action::Deny, vec![Rule::default()])
        };
        let upserts =
            vec![view::Resource::Workload(Arc::new(workload)), view::Resource::Policy(Arc::new(policy))];
        update("7".into(), true, &view::Delta { upserts, removes: vec![] })
    }

    #[track_caller]
    fn check_refused(
        damage: impl FnOnce(&mut proto::Workload, &mut proto::AuthorizationPolicy),
        field: &str,
    ) {
        use proto::resource::Body;
        let mut bad = update_of_two();
        let [workload, policy] = bad.upserts.as_mut_slice() else { panic!() };
        let (Some(Body::Workload(w)), Some(Body::AuthorizationPolicy(p))) =
            (&mut workload.body, &mut policy.body)
        else {
            panic!()
        };
        damage(w, p);
        let error = delta(&bad).unwrap_err();
        assert!(error.key.ends_with("/shop/web"), "{error}");
        assert_eq!(error.field, field);
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
        check_refused(|workload, _| workload.addresses[0] = vec![1, 2, 3], "addresses");
        check_refused(|workload, _| workload.name = "other".into(), "key");
        let rule = |traits, target| proto::Rule {
            from: vec![proto::Source { any_of: None, none_of: Some(traits) }],
            to: vec![target],
        };
        let (traits, target) = (proto::Traits::default(), proto::Target::default());
        let bad = proto::Traits { identities: vec!["spiffe://td/ns/a*".into()], ..traits.clone() };
        check_refused(|_, policy| policy.rules = vec![rule(bad, target.clone())], "rules.from.identities");
        let bad = proto::Traits { trust_domains: vec!["TD".into()], ..traits.clone() };
        check_refused(|_, policy| policy.rules = vec![rule(bad, target.clone())], "rules.from.trust_domains");
        let bad = proto::Traits { address_blocks: vec!["10.0.0.0/33".into()], ..traits.clone() };
        check_refused(
            |_, policy| policy.rules = vec![rule(bad, target.clone())],
            "rules.from.address_blocks",
        );
        let bad = proto::Target { not_ports: vec![proto::PortRange { first: 2, last: 1 }], ..target.clone() };
        check_refused(|_, policy| policy.rules = vec![rule(traits.clone(), bad)], "rules.to.not_ports");
        let bad = proto::Asks { paths: vec!["/a*b".into()], ..Default::default() };
        let bad = proto::RequestTarget { none_of: Some(bad), ..Default::default() };
        let bad = proto::Target { requests: Some(bad), ..target.clone() };
        check_refused(|_, policy| policy.rules = vec![rule(traits.clone(), bad)], "rules.to.paths");
        let bad = proto::Asks { headers: vec![proto::HeaderPattern::default()], ..Default::default() };
        let bad = proto::RequestTarget { any_of: Some(bad), ..Default::default() };
        let bad = proto::Target { requests: Some(bad), ..target };
        check_refused(|_, policy| policy.rules = vec![rule(traits, bad)], "rules.to.headers.name");
    }

    #[test]
    fn who_knows_nothing_of_requests_refuses_more_and_never_less() {
        let any_of = model::Asks { methods: vec!["GET".into()], ..Default::default() };
        let ports = vec!["80".parse().unwrap()];
        let target = model::Target { ports, any_of, ..Default::default() };
        for (action, of_port) in [(model::Action::Allow, false), (model::Action::Deny, true)] {
            let sent = asks::target_to_proto(&target, action);
            assert_eq!(asks::target_from_proto("k", &sent).unwrap(), target);
            let older = proto::Target { requests: None, ..sent };
            let older = asks::target_from_proto("k", &older).unwrap();
            assert_eq!([80, 81].map(|port| older.has_port(port)), [of_port, false], "{action:?}");
        }
    }

    #[test]
    fn a_word_of_a_newer_controller_is_not_guessed_at() {
        check_refused(|_, policy| policy.action = 99, "action");
        check_refused(|_, policy| policy.enforcement = 99, "enforcement");
        check_refused(|_, policy| policy.expressions[0].operator = 99, "expressions.operator");
        let mut bad = update_of_two();
        let too_many = proto::Demand { blocks: vec!["10.0.0.0/8".into(); view::MAX_BLOCKS + 1] };
        for (demand, field) in
            [(too_many, "blocks"), (proto::Demand { blocks: vec!["10.0.0.0/33".into()] }, "blocks")]
        {
            let body = Some(proto::resource::Body::Demand(demand));
            let upserts = vec![proto::Resource { key: "demand".into(), body }];
            let error = delta(&proto::ViewUpdate { upserts, ..Default::default() }).unwrap_err();
            assert_eq!((error.key.as_str(), error.field), ("demand", field));
        }
        bad.upserts[1].body = None; // a kind that is not known decodes to nothing
        assert_eq!(delta(&bad).unwrap_err().field, "body");
    }
}
