//! Which checks the agents do, and what their word makes of the endpoints of services.
//!
//! What is unhealthy is left out of what nodes are told, as what is not ready is: whoever sends to a service needs to know
//! nothing of checks, and an agent of before does as it should.

use std::collections::BTreeMap;

use mesh_core::{
    health::leave_out,
    model::{
        Endpoint, Name,
        health::{Check, CheckedEndpoint, HealthCheck, MAX_CHECKS},
    },
};

use crate::health::Unhealthy;

/// What is unhealthy of a port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Why.
    pub reason: String,
    /// It is asked all the same, as too few are healthy.
    pub asked: bool,
}

/// All services' checks.
#[derive(Debug)]
pub(super) struct Checked<'a> {
    unhealthy: &'a BTreeMap<Name, Unhealthy>,
    /// What is checked of each workload.
    pub(super) of_workloads: BTreeMap<Name, Vec<Check>>,
    /// What is unhealthy, by service and port.
    pub(super) failing: BTreeMap<(Name, u16), Vec<Failing>>,
    /// What would be checked, if a workload could have more checks.
    pub(super) too_many: usize,
}

impl<'a> Checked<'a> {
    pub(super) fn new(unhealthy: &'a BTreeMap<Name, Unhealthy>) -> Self {
        let (of_workloads, failing, too_many) = Default::default();
        Self { unhealthy, of_workloads, failing, too_many }
    }

    /// Takes out of a port's endpoints those that are unhealthy, each address family for itself, as a client has one.
    pub(super) fn port(
        &mut self,
        service: &Name,
        port: u16,
        check: &HealthCheck,
        endpoints: &mut Vec<Endpoint>,
    ) {
        for endpoint in endpoints.iter() {
            self.check(service, port, check, endpoint);
        }
        let reason = |endpoint: &Endpoint| {
            // Only its own agent says anything of a workload, and only of what it is told to check.
            let said = self.unhealthy.get(endpoint.workload.as_ref()?)?;
            said.get(&checked(service, port, endpoint))
        };
        let mut failing = vec![];
        let (mut v4, mut v6): (Vec<_>, Vec<_>) = endpoints.drain(..).partition(|it| it.address.is_ipv4());
        for family in [&mut v4, &mut v6] {
            let all = family.clone();
            let left_out = leave_out(family, |it| reason(it).is_some(), check.panic_percent);
            failing.extend(all.into_iter().filter_map(|endpoint| {
                let reason = reason(&endpoint)?.clone();
                Some(Failing { endpoint, reason, asked: !left_out })
            }));
        }
        endpoints.extend(v4.into_iter().chain(v6));
        endpoints.sort();
        if !failing.is_empty() {
            self.failing.insert((service.clone(), port), failing);
        }
    }

    fn check(&mut self, service: &Name, port: u16, check: &HealthCheck, endpoint: &Endpoint) {
        // An EndpointSlice may lead to another namespace's workload: whoever writes there has no say in what that is asked, from
        // within, where no policy decides.
        let own = endpoint.workload.as_ref().filter(|it| it.namespace == service.namespace);
        let Some(workload) = own else { return };
        let of = checked(service, port, endpoint);
        let checks = self.of_workloads.entry(workload.clone()).or_default();
        if checks.iter().any(|it| it.of == of) {
            return;
        }
        if checks.len() >= MAX_CHECKS {
            self.too_many += 1;
            return;
        }
        checks.push(Check {
            of,
            port: check.port.unwrap_or(endpoint.port),
            probe: check.probe.clone(),
            pace: check.pace,
        });
    }
}

fn checked(service: &Name, port: u16, endpoint: &Endpoint) -> CheckedEndpoint {
    CheckedEndpoint { service: service.clone(), port, address: endpoint.address }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use mesh_core::{
        identity::TrustDomain,
        model::{
            Distribution, Mode, Place, Service, Workload,
            health::{Pace, Probe},
            traffic::Traffic,
        },
        view::Mesh,
    };

    use super::*;
    use crate::{
        health::Heard,
        model::{self, Object, Port, TrafficPolicy, TrafficTarget},
        project::Common,
    };

    fn workload(name: &str, last: u8, enroll: bool) -> Object {
        Object::Workload(Arc::new(model::Workload {
            name: Name::new("shop", name),
            uid: String::new(),
            labels: [("app".to_owned(), "pay".to_owned())].into(),
            enroll: Some(enroll),
            mode: None,
            node: "n".into(),
            addresses: vec![[10, 0, 0, last].into(), [0xfd00, 0, 0, 0, 0, 0, 0, last.into()].into()],
            service_account: "default".into(),
            ready: true,
        }))
    }

    fn service(name: &str) -> Object {
        Object::Service(model::Service {
            name: Name::new("shop", name),
            addresses: vec![[10, 96, 0, 1].into()],
            selector: [("app".to_owned(), "pay".to_owned())].into(),
            ports: vec![Port { name: String::new(), port: 80, target: Some(8080) }],
            distribution: Distribution::Any,
            affinity: None,
        })
    }

    fn policy(services: &[&str], panic_percent: u32) -> Object {
        let second = Duration::from_secs(1);
        let pace = Pace { interval: second, timeout: second, unhealthy_after: 1, healthy_after: 1 };
        let health_check = Some(HealthCheck { probe: Probe::Tcp, port: Some(9000), pace, panic_percent });
        let target = |name: &&str| TrafficTarget::Service { name: (*name).to_owned(), port: None };
        let targets = services.iter().map(target).collect();
        let (name, traffic, takes) = (Name::new("shop", "checks"), Traffic::default(), Default::default());
        Object::TrafficPolicy(
            TrafficPolicy { name, created: 0, targets, traffic, health_check, takes }.into(),
        )
    }

    fn endpoint(service: &str, last: u8) -> CheckedEndpoint {
        CheckedEndpoint { service: Name::new("shop", service), port: 80, address: [10, 0, 0, last].into() }
    }

    fn common(objects: &[Object], unhealthy: &[(&str, CheckedEndpoint)]) -> Common {
        let mut heard = Heard::default();
        for (workload, endpoint) in unhealthy {
            let of = heard.unhealthy.entry(Name::new("shop", *workload)).or_default();
            of.insert(endpoint.clone(), "it answered 503".to_owned());
        }
        let mesh = Mesh { trust_domain: TrustDomain::parse("td").unwrap(), roots: vec![] };
        Common::new(&objects.iter().collect(), Arc::new(mesh), &heard, Mode::default())
    }

    fn addresses(service: &Service) -> Vec<String> {
        service.ports[0].endpoints.iter().map(|it| it.address.to_string()).collect()
    }

    #[test]
    fn what_is_unhealthy_is_left_out_of_the_service_whose_check_says_so_and_of_no_other() {
        let objects = [workload("a", 1, true), workload("b", 2, true), service("pay"), service("old")];
        let with_policy = [&objects[..], &[policy(&["pay"], 0)]].concat();
        let unhealthy = [("b", endpoint("pay", 2))];
        let common = common(&with_policy, &unhealthy);
        let [old, pay] = common.services() else { panic!() };
        assert_eq!(addresses(pay), ["10.0.0.1", "fd00::1", "fd00::2"], "its other family is well");
        assert_eq!(addresses(old).len(), 4);
        let failing = common.failing(&pay.name, 80);
        assert_eq!((failing.len(), failing[0].asked, &*failing[0].reason), (1, false, "it answered 503"));
        let without = super::tests::common(&objects, &unhealthy);
        assert_eq!(addresses(&without.services()[1]).len(), 4, "nobody wants it checked any more");
        assert_eq!(without.all_failing().count(), 0);
    }

    #[test]
    fn nobody_has_workloads_of_another_namespace_asked() {
        let slice = Object::EndpointSlice(Arc::new(model::EndpointSlice {
            name: Name::new("bank", "of-vault"),
            service: "vault".into(),
            ports: vec![(String::new(), 8080)],
            endpoints: vec![model::SliceEndpoint {
                address: [10, 0, 0, 1].into(),
                workload: Some(Name::new("shop", "a")),
                place: Place::default(),
                ending: false,
            }],
        }));
        let in_bank = |object| match object {
            Object::Service(it) => {
                Object::Service(model::Service { name: Name::new("bank", it.name.name.clone()), ..it })
            }
            Object::TrafficPolicy(it) => {
                let name = Name::new("bank", "checks");
                Object::TrafficPolicy(TrafficPolicy { name, ..(*it).clone() }.into())
            }
            other => other,
        };
        let objects =
            [workload("a", 1, true), slice, in_bank(service("vault")), in_bank(policy(&["vault"], 0))];
        let common = common(&objects, &[]);
        assert_eq!(addresses(&common.services()[0]), ["10.0.0.1"]);
        assert_eq!(common.workloads()[0].checks, []);
    }

    #[test]
    fn if_none_is_healthy_or_too_few_all_are_asked_and_that_is_told() {
        let objects = |panic| {
            vec![workload("a", 1, true), workload("b", 2, true), service("pay"), policy(&["pay"], panic)]
        };
        let all = [("a", endpoint("pay", 1)), ("b", endpoint("pay", 2))];
        for (unhealthy, panic) in [(&all[..], 0), (&all[..1], 51)] {
            let common = common(&objects(panic), unhealthy);
            assert_eq!(addresses(&common.services()[0]).len(), 4);
            assert!(common.all_failing().all(|it| it.asked) && common.all_failing().count() > 0);
        }
        assert_eq!(addresses(&common(&objects(50), &all[..1]).services()[0]).len(), 3);
    }

    #[test]
    fn each_enrolled_workload_has_the_checks_of_its_own_addresses_and_no_more_than_it_may() {
        let names: Vec<String> = (0..MAX_CHECKS).map(|at| format!("s{at:02}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut objects = vec![workload("a", 1, true), workload("b", 2, false), policy(&names, 0)];
        objects.extend(names.iter().map(|name| service(name)));
        let common = common(&objects, &[]);
        let [a, b]: &[Arc<Workload>] = common.workloads() else { panic!() };
        assert_eq!((a.checks.len(), b.checks.len()), (MAX_CHECKS, 0));
        assert!(a.checks.iter().all(|it| a.addresses.contains(&it.of.address) && it.port == 9000));
        assert_eq!(common.unchecked(), 2 * MAX_CHECKS, "of each as many again, of the other family");
    }
}
