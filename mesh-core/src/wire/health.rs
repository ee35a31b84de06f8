//! Checks of endpoints and what came of them, to the wire and back.

use std::time::Duration;

use super::{WireError, address_from_proto, address_to_proto, error, port_from_proto, proto};
use crate::{
    health::Health,
    model::health::{Check, CheckedEndpoint, MAX_CHECKS, Pace, Probe},
};

/// Nobody is asked more often, whatever is sent.
const LEAST_INTERVAL: Duration = Duration::from_secs(1);
/// The longest reason that is read, characters: it goes into the status of a pod.
const MAX_REASON: usize = 160;

pub(super) fn to_proto(check: &Check) -> proto::HealthCheck {
    use proto::health_check::Probe as Sent;
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let probe = match &check.probe {
        Probe::Tcp => Sent::Tcp(true),
        Probe::Grpc { service } => Sent::Grpc(proto::GrpcProbe { service: service.clone() }),
        Probe::Http { path, host, statuses } => Sent::Http(proto::HttpProbe {
            path: path.clone(),
            host: host.clone().unwrap_or_default(),
            statuses: statuses
                .iter()
                .map(|(first, last)| proto::StatusRange { first: (*first).into(), last: (*last).into() })
                .collect(),
        }),
    };
    proto::HealthCheck {
        service: check.of.service.to_string(),
        service_port: check.of.port.into(),
        address: address_to_proto(&check.of.address),
        port: check.port.into(),
        probe: Some(probe),
        interval_ms: millis(check.pace.interval),
        timeout_ms: millis(check.pace.timeout),
        unhealthy_after: check.pace.unhealthy_after,
        healthy_after: check.pace.healthy_after,
    }
}

/// What a newer controller wants asked in a way that is not known here is not asked: unchecked counts as healthy, and a view
/// is worth more than that.
pub(super) fn from_proto(key: &str, checks: &[proto::HealthCheck]) -> Result<Vec<Check>, WireError> {
    if checks.len() > MAX_CHECKS {
        let said = format_args!("{} of them, at most {MAX_CHECKS} can be", checks.len());
        return Err(error(key, "checks", said));
    }
    checks.iter().filter_map(|check| one_from_proto(key, check).transpose()).collect()
}

fn one_from_proto(key: &str, check: &proto::HealthCheck) -> Result<Option<Check>, WireError> {
    use proto::health_check::Probe as Sent;
    let probe = match &check.probe {
        None => return Ok(None),
        Some(Sent::Tcp(_)) => Probe::Tcp,
        Some(Sent::Grpc(it)) => Probe::Grpc { service: it.service.clone() },
        Some(Sent::Http(it)) => Probe::Http {
            path: it.path.clone(),
            host: Some(it.host.clone()).filter(|host| !host.is_empty()),
            statuses: it.statuses.iter().map(|it| statuses(key, it)).collect::<Result<_, _>>()?,
        },
    };
    Ok(Some(Check {
        of: CheckedEndpoint {
            service: check.service.parse().map_err(|e| error(key, "checks.service", e))?,
            port: port_from_proto(key, "checks.service_port", check.service_port)?,
            address: address_from_proto(key, "checks.address", &check.address)?,
        },
        port: port_from_proto(key, "checks.port", check.port)?,
        probe,
        pace: Pace {
            interval: Duration::from_millis(check.interval_ms).max(LEAST_INTERVAL),
            timeout: Duration::from_millis(check.timeout_ms.max(1)),
            unhealthy_after: check.unhealthy_after.max(1),
            healthy_after: check.healthy_after.max(1),
        },
    }))
}

fn statuses(key: &str, range: &proto::StatusRange) -> Result<(u16, u16), WireError> {
    match (u16::try_from(range.first), u16::try_from(range.last)) {
        (Ok(first), Ok(last)) => Ok((first, last)),
        _ => Err(error(key, "checks.http.statuses", "no statuses")),
    }
}

/// What an agent says of an endpoint.
pub fn word(of: &CheckedEndpoint, health: Health, reason: &str) -> proto::EndpointHealth {
    use proto::endpoint_health::Health as Sent;
    proto::EndpointHealth {
        service: of.service.to_string(),
        service_port: of.port.into(),
        address: address_to_proto(&of.address),
        health: match health {
            Health::Undecided => Sent::Undecided,
            Health::Healthy => Sent::Healthy,
            Health::Unhealthy => Sent::Unhealthy,
        }
        .into(),
        reason: reason.to_owned(),
    }
}

/// The endpoint that an agent speaks of, what it says of it, and why, on one line; none of what is none.
pub fn of_word(word: &proto::EndpointHealth) -> Option<(CheckedEndpoint, Health, String)> {
    use proto::endpoint_health::Health as Sent;
    let of = CheckedEndpoint {
        service: word.service.parse().ok()?,
        port: port_from_proto("", "service_port", word.service_port).ok()?,
        address: address_from_proto("", "address", &word.address).ok()?,
    };
    let health = match word.health() {
        Sent::Undecided => Health::Undecided,
        Sent::Healthy => Health::Healthy,
        Sent::Unhealthy => Health::Unhealthy,
    };
    let reason = word.reason.chars().map(|it| if it.is_control() { ' ' } else { it }).take(MAX_REASON);
    Some((of, health, reason.collect::<String>().trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Name;

    fn check(probe: Probe) -> Check {
        let address = "10.1.0.11".parse().unwrap();
        let second = Duration::from_secs(1);
        Check {
            of: CheckedEndpoint { service: Name::new("shop", "pay"), port: 80, address },
            port: 8080,
            probe,
            pace: Pace { interval: second * 5, timeout: second, unhealthy_after: 3, healthy_after: 2 },
        }
    }

    #[test]
    fn a_check_of_a_kind_that_is_not_known_is_left_out_and_the_others_stay() {
        let known = check(Probe::Tcp);
        let newer = proto::HealthCheck { probe: None, ..to_proto(&known) };
        assert_eq!(from_proto("k", &[newer, to_proto(&known)]).unwrap(), [known]);
    }

    #[test]
    fn what_would_ask_without_a_pause_is_bounded_and_too_many_are_refused() {
        let sent = proto::HealthCheck { interval_ms: 0, unhealthy_after: 0, ..to_proto(&check(Probe::Tcp)) };
        let read = from_proto("k", std::slice::from_ref(&sent)).unwrap().remove(0);
        assert_eq!((read.pace.interval, read.pace.unhealthy_after), (LEAST_INTERVAL, 1));
        assert_eq!(from_proto("k", &vec![sent; MAX_CHECKS + 1]).unwrap_err().field, "checks");
    }

    #[test]
    fn a_word_is_read_as_it_was_said_on_one_line() {
        let of = check(Probe::Tcp).of;
        for health in [Health::Undecided, Health::Healthy, Health::Unhealthy] {
            let read = of_word(&word(&of, health, "it answered\n503"));
            assert_eq!(read, Some((of.clone(), health, "it answered 503".to_owned())));
        }
        let long = of_word(&word(&of, Health::Unhealthy, &"ä".repeat(999))).unwrap().2;
        assert_eq!(long.chars().count(), MAX_REASON);
        assert_eq!(of_word(&proto::EndpointHealth::default()), None);
    }
}
