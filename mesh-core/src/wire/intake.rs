//! How much workloads take, to the wire and back.
//!
//! It travels as an AuthorizationPolicy with more to it, as policies on end users do. An agent that knows nothing of it takes
//! it for one that denies all that comes to the ports that have a limit: it refuses more, never less.

use std::time::Duration;

use super::{WireError, asks, error, name_from_proto, port_from_proto, proto};
use crate::{
    model::intake::{Intake, PortIntake, RateBy, RateLimit, Sizes},
    view::OF_INTAKE,
};

pub(super) fn to_proto(intake: &Intake) -> proto::AuthorizationPolicy {
    let range = |port: &u16| proto::PortRange { first: u32::from(*port), last: u32::from(*port) };
    let ports = intake.ports.keys().map(range).collect();
    let target = proto::Target { ports, ..Default::default() };
    proto::AuthorizationPolicy {
        namespace: intake.workload.namespace.clone(),
        name: format!("{OF_INTAKE}{}", intake.workload.name),
        labels: intake.labels.clone(),
        expressions: vec![],
        action: proto::Action::Deny.into(),
        enforcement: proto::Enforcement::Enforce.into(),
        rules: vec![proto::Rule { from: vec![], to: vec![target] }],
        authentication: None,
        audited_authentication: None,
        intake: Some(proto::Intake { ports: intake.ports.iter().map(port_to_proto).collect() }),
    }
}

fn port_to_proto((port, intake): (&u16, &PortIntake)) -> proto::PortIntake {
    let by = |by: &RateBy| match by {
        RateBy::All => (proto::RateBy::All, String::new()),
        RateBy::Identity => (proto::RateBy::Identity, String::new()),
        RateBy::Header(name) => (proto::RateBy::Header, name.clone()),
    };
    let rate = |rate: &RateLimit| {
        let (by, header) = by(&rate.by);
        proto::RateLimit {
            policy: rate.policy.to_string(),
            index: rate.index,
            by: by.into(),
            header,
            requests: rate.requests,
            per_ms: u64::try_from(rate.per.as_millis()).unwrap_or(u64::MAX),
            burst: rate.burst,
            only: asks::to_proto(&rate.only),
        }
    };
    proto::PortIntake {
        port: u32::from(*port),
        head_bytes: intake.sizes.head.unwrap_or(0),
        body_limited: intake.sizes.body.is_some(),
        body_bytes: intake.sizes.body.unwrap_or(0),
        rates: intake.rates.iter().map(rate).collect(),
    }
}

pub(super) fn from_proto(
    key: &str,
    policy: &proto::AuthorizationPolicy,
    intake: &proto::Intake,
) -> Result<Intake, WireError> {
    let name = policy.name.strip_prefix(OF_INTAKE);
    let name = name.ok_or_else(|| error(key, "name", "it is not of how much a workload takes"))?;
    Ok(Intake {
        workload: name_from_proto(key, &policy.namespace, name)?,
        labels: policy.labels.clone(),
        ports: intake.ports.iter().map(|it| port_from(key, it)).collect::<Result<_, _>>()?,
    })
}

fn port_from(key: &str, sent: &proto::PortIntake) -> Result<(u16, PortIntake), WireError> {
    let port = port_from_proto(key, "intake.ports.port", sent.port)?;
    let sizes = Sizes {
        head: Some(sent.head_bytes).filter(|bytes| *bytes > 0),
        body: sent.body_limited.then_some(sent.body_bytes),
    };
    let rates = sent.rates.iter().map(|it| rate_from_proto(key, it)).collect::<Result<_, _>>()?;
    Ok((port, PortIntake { sizes, rates }))
}

fn rate_from_proto(key: &str, sent: &proto::RateLimit) -> Result<RateLimit, WireError> {
    let field = "intake.ports.rates";
    if sent.requests == 0 || sent.per_ms == 0 || sent.burst == 0 {
        return Err(error(key, field, "a limit by which nothing could ever come"));
    }
    let by = match sent.by() {
        proto::RateBy::All => RateBy::All,
        proto::RateBy::Identity => RateBy::Identity,
        proto::RateBy::Header if !sent.header.is_empty() => RateBy::Header(sent.header.clone()),
        proto::RateBy::Header => return Err(error(key, field, "a header without a name")),
        proto::RateBy::Unspecified => return Err(error(key, field, super::UNKNOWN)),
    };
    Ok(RateLimit {
        policy: sent.policy.parse().map_err(|e| error(key, field, e))?,
        index: sent.index,
        by,
        requests: sent.requests,
        per: Duration::from_millis(sent.per_ms),
        burst: sent.burst,
        only: asks::from_proto(key, sent.only.as_ref())?,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{Action, Asks, Name},
        view::{Delta, Key, Resource},
        wire::{delta, update},
    };

    fn an_intake() -> Intake {
        let rate = |index, by| RateLimit {
            policy: Name::new("shop", "p"),
            index,
            by,
            requests: 5,
            per: Duration::from_secs(60),
            burst: 7,
            only: Asks { paths: vec!["/login".parse().unwrap()], ..Asks::default() },
        };
        let rates =
            vec![rate(0, RateBy::All), rate(1, RateBy::Identity), rate(2, RateBy::Header("x-a".into()))];
        let of_8080 = PortIntake { sizes: Sizes { head: Some(9), body: Some(0) }, rates };
        Intake {
            workload: Name::new("shop", "web"),
            labels: [("app".into(), "web".into())].into(),
            ports: [(8080, of_8080), (9090, PortIntake::default())].into(),
        }
    }

    #[test]
    fn who_knows_nothing_of_limits_denies_all_of_their_ports() {
        let intake = an_intake();
        let resource = Resource::Intake(Arc::new(intake.clone()));
        let (upserts, removes) = (vec![resource.clone()], vec![resource.key()]);
        let sent = update("1".into(), true, &Delta { upserts, removes });
        let Delta { upserts, removes } = delta(&sent).unwrap();
        assert_eq!((upserts, removes), (vec![resource.clone()], vec![Key::Intake(intake.workload.clone())]));

        let older = proto::AuthorizationPolicy { intake: None, ..to_proto(&intake) };
        let body = Some(proto::resource::Body::AuthorizationPolicy(older));
        let older = proto::Resource { key: resource.key().to_string(), body };
        let Resource::Policy(older) = super::super::resource_from_proto(&older).unwrap() else { panic!() };
        assert_eq!((older.action, &older.selector.labels), (Action::Deny, &intake.labels));
        assert!(older.rules[0].from.is_empty());
        assert_eq!(
            [8079, 8080, 8081, 9090].map(|port| older.rules[0].to[0].has_port(port)),
            [false, true, false, true]
        );
    }

    #[test]
    fn what_is_not_understood_of_a_limit_is_not_guessed_at() {
        let check = |damage: &dyn Fn(&mut proto::PortIntake), field: &str| {
            let mut sent = to_proto(&an_intake());
            damage(&mut sent.intake.as_mut().unwrap().ports[0]);
            let intake = sent.intake.clone().unwrap();
            assert_eq!(from_proto("k", &sent, &intake).unwrap_err().field, field);
        };
        check(&|it| it.port = 0, "intake.ports.port");
        check(&|it| it.rates[0].by = 99, "intake.ports.rates");
        check(&|it| it.rates[0].requests = 0, "intake.ports.rates");
        check(&|it| it.rates[0].per_ms = 0, "intake.ports.rates");
        check(&|it| it.rates[0].burst = 0, "intake.ports.rates");
        check(&|it| it.rates[0].policy = "p".into(), "intake.ports.rates");
        check(&|it| it.rates[2].header.clear(), "intake.ports.rates");
    }
}
