//! What policies say of ports and of requests to them, to the wire and back.

use super::{WireError, authentication, error, proto, range_to_proto, ranges_from_proto};
use crate::model;

/// A target of a rule that does this. What an agent reads in it that knows nothing of requests refuses more, never less.
pub(super) fn target_to_proto(target: &model::Target, action: model::Action) -> proto::Target {
    let ranges = |ranges: &[model::PortRange]| ranges.iter().map(range_to_proto).collect::<Vec<_>>();
    let (ports, not_ports) = (ranges(&target.ports), ranges(&target.not_ports));
    if !target.is_of_requests() {
        return proto::Target { ports, not_ports, ..Default::default() };
    }
    let any_of = to_proto(&target.any_of);
    let none_of = to_proto(&target.none_of);
    let every = proto::PortRange { first: 1, last: u32::from(u16::MAX) };
    let (for_older, not_for_older) = match action {
        model::Action::Allow => (vec![], vec![every]),
        model::Action::Deny => (ports.clone(), not_ports.clone()),
    };
    let all = Some(proto::RequestTarget { ports, not_ports, any_of, none_of });
    // An agent that knows of requests and not of their users must not pass over what is said of these.
    let of_users = [&target.any_of, &target.none_of].iter().any(|it| !it.claims.is_empty());
    let (requests, users) = if of_users { (None, all) } else { (all, None) };
    proto::Target { ports: for_older, not_ports: not_for_older, requests, users }
}

pub(super) fn target_from_proto(key: &str, target: &proto::Target) -> Result<model::Target, WireError> {
    let (ports, not_ports, any_of, none_of) = match target.users.as_ref().or(target.requests.as_ref()) {
        None => (&target.ports, &target.not_ports, None, None),
        Some(it) => (&it.ports, &it.not_ports, it.any_of.as_ref(), it.none_of.as_ref()),
    };
    Ok(model::Target {
        ports: ranges_from_proto(key, "rules.to.ports", ports)?,
        not_ports: ranges_from_proto(key, "rules.to.not_ports", not_ports)?,
        any_of: from_proto(key, any_of)?,
        none_of: from_proto(key, none_of)?,
    })
}

/// Nothing for what says nothing: most targets are of connections.
pub(super) fn to_proto(asks: &model::Asks) -> Option<proto::Asks> {
    let texts = |patterns: &[model::TextPattern]| patterns.iter().map(ToString::to_string).collect();
    let header = |header: &model::HeaderPattern| proto::HeaderPattern {
        name: header.name.clone(),
        values: texts(&header.values),
    };
    (!asks.is_empty()).then(|| proto::Asks {
        methods: asks.methods.clone(),
        hosts: texts(&asks.hosts),
        paths: texts(&asks.paths),
        headers: asks.headers.iter().map(header).collect(),
        claims: asks.claims.iter().map(authentication::claim_to_proto).collect(),
    })
}

pub(super) fn from_proto(key: &str, asks: Option<&proto::Asks>) -> Result<model::Asks, WireError> {
    let Some(asks) = asks else { return Ok(model::Asks::default()) };
    let texts = |field: &'static str, texts: &[String]| {
        let parsed = texts.iter().map(|text| text.parse::<model::TextPattern>());
        parsed.collect::<Result<Vec<_>, _>>().map_err(|it| error(key, field, it.to_string()))
    };
    let header = |header: &proto::HeaderPattern| {
        if header.name.is_empty() {
            return Err(error(key, "rules.to.headers.name", "it is empty"));
        }
        let values = texts("rules.to.headers.values", &header.values)?;
        Ok(model::HeaderPattern { name: header.name.clone(), values })
    };
    Ok(model::Asks {
        methods: asks.methods.clone(),
        hosts: texts("rules.to.hosts", &asks.hosts)?,
        paths: texts("rules.to.paths", &asks.paths)?,
        headers: asks.headers.iter().map(header).collect::<Result<_, _>>()?,
        claims: asks
            .claims
            .iter()
            .map(|it| authentication::claim_from_proto(key, it))
            .collect::<Result<_, _>>()?,
    })
}
