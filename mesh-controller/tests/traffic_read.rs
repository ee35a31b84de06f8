//! Every field of a TrafficPolicy, what is read from it, and what is refused because it means nothing.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc, time::Duration};

use mesh_controller::{
    model::{Takes, TrafficPolicy, TrafficTarget},
    source::{
        Refused,
        ledger::{FileContent, Ledger},
    },
};
use mesh_core::model::{
    Asks, Name,
    health::{HealthCheck, Pace, Probe},
    http::{RouteKind, TextMatch, Timeouts},
    intake::{RateBy, RateLimit, Sizes},
    traffic::{
        Algorithm, Balancing, Ejection, FailureShare, Fault, FaultEffect, HashBy, Hedge, Limits, Retries,
        RetryBudget, Traffic,
    },
};

const WEB: &str = "{kind: Service, name: web}";

fn ledger(target: &str, says: &str) -> Ledger {
    let text = format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: p, namespace: shop}}\n\
         spec: {{targetRefs: [{target}], {says}}}\n"
    );
    Ledger::default().next(&[(PathBuf::from("a.yaml"), Arc::new(FileContent::parse(&text)))].into())
}

fn policy(target: &str, says: &str) -> TrafficPolicy {
    let ledger = ledger(target, says);
    assert_eq!(ledger.refused(), [], "{says}");
    ledger.model().traffic.into_values().next().unwrap().as_ref().clone()
}

fn read(says: &str) -> Traffic {
    policy(WEB, says).traffic
}

fn refused(target: &str, says: &str) -> Vec<Refused> {
    ledger(target, says).refused().to_vec()
}

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn what_it_is_for_is_of_its_namespace() {
    let route = |kind, rule: Option<&str>| TrafficTarget::Route {
        kind,
        name: "r".into(),
        rule: rule.map(str::to_owned),
    };
    let service =
        |port: Option<&str>| TrafficTarget::Service { name: "web".into(), port: port.map(str::to_owned) };
    for (text, expected) in [
        (WEB, service(None)),
        ("{group: '', kind: Service, name: web, sectionName: http}", service(Some("http"))),
        ("{kind: HTTPRoute, name: r}", route(RouteKind::Http, None)),
        (
            "{group: gateway.networking.k8s.io, kind: GRPCRoute, name: r, sectionName: a}",
            route(RouteKind::Grpc, Some("a")),
        ),
        ("{kind: Namespace, name: shop}", TrafficTarget::Namespace),
    ] {
        assert_eq!(policy(text, "timeouts: {}").targets, [expected], "{text}");
    }
    for (text, field, reason) in [
        ("", "spec.targetRefs", "for nothing"),
        ("{kind: Namespace, name: bank}", "spec.targetRefs[0].name", "of namespace shop"),
        ("{kind: Namespace, name: shop, sectionName: a}", "spec.targetRefs[0].sectionName", "no sections"),
        ("{kind: Pod, name: web}", "spec.targetRefs[0].kind", "nothing that is sent to"),
        ("{group: apps, kind: Service, name: web}", "spec.targetRefs[0].group", "not of this group"),
        ("{kind: Service, name: Web}", "spec.targetRefs[0].name", "not a name"),
    ] {
        let said = refused(text, "timeouts: {}");
        assert_eq!(said.len(), 1, "{text}: {said:?}");
        assert!(said[0].field == field && said[0].reason.contains(reason), "{text}: {}", said[0]);
    }
}

#[test]
fn each_part_is_read_with_what_is_meant_where_nothing_is_said() {
    let by = |algorithm, slow_start| Some(Balancing { algorithm, slow_start });
    assert_eq!(read("balancing: {}").balancing, by(Algorithm::LeastLatency, None));
    for (text, algorithm) in [
        ("LeastLatency", Algorithm::LeastLatency),
        ("LeastRequests", Algorithm::LeastRequests),
        ("RoundRobin", Algorithm::RoundRobin),
        ("Random", Algorithm::Random),
        ("Hash, hashBy: {type: Source}", Algorithm::Hash(HashBy::Source)),
        ("Hash, hashBy: {type: Header, name: X-User}", Algorithm::Hash(HashBy::Header("x-user".into()))),
        ("Hash, hashBy: {type: Cookie, name: User}", Algorithm::Hash(HashBy::Cookie("User".into()))),
    ] {
        let read = read(&format!("balancing: {{algorithm: {text}, slowStart: 30s}}"));
        assert_eq!(read.balancing, by(algorithm, Some(secs(30))), "{text}");
    }
    assert_eq!(
        read("timeouts: {request: 10s, backendRequest: 0s}").timeouts,
        Some(Timeouts { request: Some(secs(10)), backend: None })
    );
    let usual = Retries {
        attempts: 2,
        codes: vec![],
        grpc_codes: vec![],
        every_method: false,
        backoff: Duration::from_millis(25),
        budget: RetryBudget { percent: 20, per_second: 10 },
    };
    assert_eq!(read("retries: {}").retries, Some(usual));
    assert_eq!(
        read("retries: {attempts: 0, codes: [503], grpcCodes: [14], methods: Every, backoff: 1s, budget: {percent: 0, perSecond: 1}}")
            .retries,
        Some(Retries {
            attempts: 0,
            codes: vec![503],
            grpc_codes: vec![14],
            every_method: true,
            backoff: secs(1),
            budget: RetryBudget { percent: 0, per_second: 1 },
        })
    );
    assert_eq!(
        read("limits: {connections: 1, requests: 2, pending: 3}").limits,
        Some(Limits { connections: Some(1), requests: Some(2), pending: 3 })
    );
    let usual = Ejection {
        failures: 5,
        base: secs(10),
        most: secs(300),
        most_percent: 50,
        panic_percent: 0,
        share: None,
        retry_after: None,
    };
    assert_eq!(read("ejection: {}").ejection, Some(usual));
    assert_eq!(
        read("ejection: {failures: 1, time: 10m, maxPercent: 100, panicPercent: 5}").ejection,
        Some(Ejection {
            failures: 1,
            base: secs(600),
            most: secs(600),
            most_percent: 100,
            panic_percent: 5,
            share: None,
            retry_after: None,
        })
    );
    let share = |percent, minimum, window| {
        Some(Ejection { share: Some(FailureShare { percent, minimum, window }), ..usual })
    };
    assert_eq!(read("ejection: {failurePercent: 50}").ejection, share(50, 20, secs(30)));
    assert_eq!(
        read("ejection: {failurePercent: 1, minimumRequests: 1, window: 1s}").ejection,
        share(1, 1, secs(1))
    );
    assert_eq!(
        read("ejection: {retryAfter: 30s}").ejection,
        Some(Ejection { retry_after: Some(secs(30)), ..usual })
    );
    let hedge = |calls: &[&str], budget| {
        let calls = calls.iter().map(|call| (*call).to_owned()).collect();
        Some(Hedge { after: Duration::from_millis(100), calls, budget })
    };
    assert_eq!(read("hedge: {after: 100ms}").hedge, hedge(&[], RetryBudget::default()));
    assert_eq!(
        read("hedge: {after: 100ms, calls: [shop.v1.Cart/Get], budget: {percent: 5, perSecond: 0}}").hedge,
        hedge(&["shop.v1.Cart/Get"], RetryBudget { percent: 5, per_second: 0 })
    );
    let fault = |of_ten_thousand, effect| Fault { of_ten_thousand, headers: vec![], effect };
    let with_header = Fault {
        headers: vec![("x-tester".into(), TextMatch::Exact("me".into()))],
        ..fault(1, FaultEffect::AbortCall(14))
    };
    assert_eq!(
        read(
            "faults: [{delay: 1s}, {percent: 12.5, abort: {status: 503}}, \
              {percent: 0.01, headers: [{name: X-Tester, value: me}], abort: {grpcStatus: 14}}]"
        )
        .faults,
        Some(vec![
            fault(10_000, FaultEffect::Delay(secs(1))),
            fault(1_250, FaultEffect::Abort(503)),
            with_header
        ])
    );
    assert_eq!(read("faults: []").faults, Some(vec![]), "no faults, whoever else says so");
}

#[test]
fn a_health_check_is_read_and_is_no_part_of_what_clients_are_told() {
    let usual = Pace { interval: secs(5), timeout: secs(1), unhealthy_after: 3, healthy_after: 2 };
    let http = |path: &str, statuses: &[(u16, u16)]| Probe::Http {
        path: path.into(),
        host: None,
        statuses: statuses.to_vec(),
    };
    for (says, probe, port, pace, panic_percent) in [
        ("tcp: {}", Probe::Tcp, None, usual, 0),
        ("grpc: {}, port: 9000", Probe::Grpc { service: String::new() }, Some(9000), usual, 0),
        ("grpc: {service: shop.v1.Pay}", Probe::Grpc { service: "shop.v1.Pay".into() }, None, usual, 0),
        ("http: {path: '/a?b=c%20d'}", http("/a?b=c%20d", &[(200, 399)]), None, usual, 0),
        ("http: {path: /, statuses: [200, 418]}", http("/", &[(200, 200), (418, 418)]), None, usual, 0),
        (
            "tcp: {}, interval: 1m, timeout: 10s, unhealthyAfter: 1, healthyAfter: 100, panicPercent: 100",
            Probe::Tcp,
            None,
            Pace { interval: secs(60), timeout: secs(10), unhealthy_after: 1, healthy_after: 100 },
            100,
        ),
    ] {
        let policy = policy(WEB, &format!("healthCheck: {{{says}}}"));
        assert_eq!(policy.health_check, Some(HealthCheck { probe, port, pace, panic_percent }), "{says}");
        assert!(policy.traffic.is_empty(), "{says}");
    }
    let of_namespace = policy("{kind: Namespace, name: shop}", "healthCheck: {tcp: {}}");
    assert_eq!(of_namespace.health_check.unwrap().probe, Probe::Tcp);
    let said = refused("{kind: Namespace, name: shop}", "healthCheck: {http: {path: /}}");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].field == "spec.healthCheck" && said[0].reason.contains("not all ports"), "{}", said[0]);
    let said = refused("{kind: HTTPRoute, name: r}", "healthCheck: {tcp: {}}");
    assert!(said[0].field == "spec.healthCheck" && said[0].reason.contains("no endpoints"), "{said:?}");
}

#[test]
fn what_means_nothing_is_refused_by_its_field() {
    for (says, field, reason) in [
        ("healthCheck: {}", "spec.healthCheck.http", "in one way"),
        ("healthCheck: {tcp: {}, grpc: {}}", "spec.healthCheck.http", "in one way"),
        ("healthCheck: {tcp: {}, port: 0}", "spec.healthCheck.port", "not a port"),
        ("healthCheck: {tcp: {}, interval: 999ms}", "spec.healthCheck.interval", "too often"),
        ("healthCheck: {tcp: {}, interval: 2h}", "spec.healthCheck.interval", "too long"),
        ("healthCheck: {tcp: {}, timeout: 6s}", "spec.healthCheck.timeout", "before this one has ended"),
        ("healthCheck: {tcp: {}, timeout: 0s}", "spec.healthCheck.timeout", "within no time"),
        ("healthCheck: {tcp: {}, unhealthyAfter: 0}", "spec.healthCheck.unhealthyAfter", "nothing is known"),
        ("healthCheck: {tcp: {}, healthyAfter: 101}", "spec.healthCheck.healthyAfter", "too much"),
        ("healthCheck: {tcp: {}, panicPercent: 101}", "spec.healthCheck.panicPercent", "too much"),
        ("healthCheck: {http: {path: healthz}}", "spec.healthCheck.http.path", "not the path"),
        ("healthCheck: {http: {path: '/a b'}}", "spec.healthCheck.http.path", "not the path"),
        ("healthCheck: {http: {path: '/a#b'}}", "spec.healthCheck.http.path", "not the path"),
        ("healthCheck: {http: {path: /, host: 'a b'}}", "spec.healthCheck.http.host", "no host"),
        (
            "healthCheck: {http: {path: /, statuses: [101]}}",
            "spec.healthCheck.http.statuses[0]",
            "ends no request",
        ),
        ("healthCheck: {grpc: {service: 'a b'}}", "spec.healthCheck.grpc.service", "no service"),
        ("", "spec", "says nothing"),
        ("balancing: {algorithm: Best}", "spec.balancing.algorithm", "no algorithm"),
        ("balancing: {slowStart: 2h}", "spec.balancing.slowStart", "too long"),
        (
            "balancing: {algorithm: Hash, hashBy: {type: Source, name: x}}",
            "spec.balancing.hashBy.name",
            "no name",
        ),
        (
            "balancing: {algorithm: Hash, hashBy: {type: Path, name: x}}",
            "spec.balancing.hashBy.type",
            "no value",
        ),
        (
            "balancing: {algorithm: Hash, hashBy: {type: Header, name: 'a b'}}",
            "spec.balancing.hashBy.name",
            "not a name",
        ),
        ("timeouts: {request: 1s, backendRequest: 2s}", "spec.timeouts.backendRequest", "cannot take longer"),
        ("retries: {attempts: 33}", "spec.retries.attempts", "too much"),
        ("retries: {codes: [200]}", "spec.retries.codes[0]", "no failure"),
        ("retries: {grpcCodes: [0]}", "spec.retries.grpcCodes[0]", "no failure"),
        ("retries: {methods: Some}", "spec.retries.methods", "neither"),
        ("retries: {budget: {percent: 101}}", "spec.retries.budget.percent", "too much"),
        ("limits: {}", "spec.limits", "limits nothing"),
        ("limits: {connections: 0}", "spec.limits.connections", "nothing could be sent"),
        ("limits: {requests: 0}", "spec.limits.requests", "nothing could be sent"),
        ("ejection: {failures: 0}", "spec.ejection.failures", "has not failed"),
        ("ejection: {time: 2m, maxTime: 1m}", "spec.ejection.maxTime", "less than the first"),
        ("ejection: {maxPercent: 101}", "spec.ejection.maxPercent", "too much"),
        ("ejection: {failurePercent: 0}", "spec.ejection.failurePercent", "fails at nothing"),
        ("ejection: {failurePercent: 101}", "spec.ejection.failurePercent", "too much"),
        ("ejection: {minimumRequests: 5}", "spec.ejection.failurePercent", "in a row need none"),
        ("ejection: {window: 5s}", "spec.ejection.failurePercent", "in a row need none"),
        (
            "ejection: {failurePercent: 5, minimumRequests: 0}",
            "spec.ejection.minimumRequests",
            "there is no share",
        ),
        ("ejection: {retryAfter: 0s}", "spec.ejection.retryAfter", "for no time"),
        ("ejection: {retryAfter: 61m}", "spec.ejection.retryAfter", "too long"),
        ("ejection: {failurePercent: 5, window: 999ms}", "spec.ejection.window", "too short"),
        ("ejection: {failurePercent: 5, window: 2h}", "spec.ejection.window", "too long"),
        ("hedge: {after: 0s}", "spec.hedge.after", "made twice"),
        ("hedge: {after: 2h}", "spec.hedge.after", "too long"),
        ("hedge: {after: 1s, calls: [Cart]}", "spec.hedge.calls[0]", "not the name of a call"),
        ("hedge: {after: 1s, calls: ['/shop.Cart/Get']}", "spec.hedge.calls[0]", "not the name of a call"),
        ("hedge: {after: 1s, budget: {percent: 101}}", "spec.hedge.budget.percent", "too much"),
        ("faults: [{percent: 101, delay: 1s}]", "spec.faults[0].percent", "no share"),
        ("faults: [{delay: 1s, abort: {status: 503}}]", "spec.faults[0].delay", "one of"),
        ("faults: [{abort: {}}]", "spec.faults[0].abort", "one answer"),
        ("faults: [{abort: {status: 100}}]", "spec.faults[0].abort.status", "ends no request"),
        ("faults: [{abort: {grpcStatus: 17}}]", "spec.faults[0].abort.grpcStatus", "no status of gRPC"),
    ] {
        let said = refused(WEB, says);
        assert_eq!(said.len(), 1, "{says}: {said:?}");
        assert!(said[0].field == field && said[0].reason.contains(reason), "{says}: {}", said[0]);
    }
    let of_route = refused("{kind: HTTPRoute, name: r}", "balancing: {}, ejection: {}, retries: {}");
    let fields: Vec<&str> = of_route.iter().map(|it| it.field.as_str()).collect();
    assert_eq!(fields, ["spec.balancing", "spec.ejection"], "a route has no endpoints");
}

#[test]
fn what_workloads_take_is_read_with_what_is_meant_where_nothing_is_said() {
    let limit = |index, by, requests, per, burst| RateLimit {
        policy: Name::new("shop", "p"),
        index,
        by,
        requests,
        per: secs(per),
        burst,
        only: Asks::default(),
    };
    let read = |says: &str| policy(WEB, says).takes;
    let says = "rateLimits: [{requests: 5}, {by: Identity, requests: 5, per: 1m, burst: 9}, {by: Header, header: X-A, \
                requests: 1, match: {methods: [POST], paths: [/login*], headers: [{name: x-b}]}}]";
    let mut of_header = limit(2, RateBy::Header("x-a".into()), 1, 1, 1);
    of_header.only = Asks {
        methods: vec!["POST".into()],
        paths: vec!["/login*".parse().unwrap()],
        headers: vec![mesh_core::model::HeaderPattern { name: "x-b".into(), values: vec![] }],
        ..Asks::default()
    };
    let limits = vec![limit(0, RateBy::All, 5, 1, 5), limit(1, RateBy::Identity, 5, 60, 9), of_header];
    assert_eq!(read(says), Takes { rates: Some(limits), sizes: None });
    assert_eq!(read("rateLimits: []").rates, Some(vec![]), "which is that there is none");
    let sizes = |head, body| Some(Sizes { head, body });
    assert_eq!(read("sizeLimits: {headerBytes: 256}").sizes, sizes(Some(256), None));
    assert_eq!(read("sizeLimits: {bodyBytes: 0}").sizes, sizes(None, Some(0)));
    assert!(
        policy(WEB, "rateLimits: [{requests: 1}]").traffic.is_empty(),
        "it says nothing to those who send"
    );
}

#[test]
fn limits_that_mean_nothing_or_cannot_be_kept_are_refused_by_their_field() {
    let at = "spec.rateLimits[0]";
    for (says, field, reason) in [
        ("rateLimits: [{requests: 0}]", "requests", "nothing could come"),
        ("rateLimits: [{requests: 1000001}]", "requests", "too much"),
        ("rateLimits: [{requests: 1, burst: 0}]", "burst", "nothing could come"),
        ("rateLimits: [{requests: 1, per: 500ms}]", "per", "not of whole seconds"),
        ("rateLimits: [{requests: 1, per: 1500ms}]", "per", "not of whole seconds"),
        ("rateLimits: [{requests: 1, per: 2h}]", "per", "too long"),
        ("rateLimits: [{requests: 1, by: Path}]", "by", "tells nobody apart"),
        ("rateLimits: [{requests: 1, by: Header}]", "header", "missing"),
        ("rateLimits: [{requests: 1, by: Header, header: 'a b'}]", "header", "not a name"),
        ("rateLimits: [{requests: 1, by: Identity, header: x-a}]", "header", "for by: Header alone"),
        ("rateLimits: [{requests: 1, match: {}}]", "match", "says nothing"),
        ("rateLimits: [{requests: 1, match: {paths: []}}]", "match.paths", "is empty"),
        ("rateLimits: [{requests: 1, match: {paths: [/%61]}}]", "match.paths[0]", "no path has"),
        ("sizeLimits: {}", "spec.sizeLimits", "limits nothing"),
        ("sizeLimits: {headerBytes: 255}", "spec.sizeLimits.headerBytes", "no such limit"),
        ("sizeLimits: {headerBytes: 131073}", "spec.sizeLimits.headerBytes", "no such limit"),
        ("sizeLimits: {bodyBytes: 1125899906842625}", "spec.sizeLimits.bodyBytes", "too much"),
    ] {
        let said = refused(WEB, says);
        let field = if field.starts_with("spec") { field.to_owned() } else { format!("{at}.{field}") };
        assert!(!said.is_empty(), "{says}");
        assert!(said.iter().any(|it| it.field == field && it.reason.contains(reason)), "{says}: {said:?}");
    }
    let nine = ["{requests: 1}"; 9].join(", ");
    assert_eq!(refused(WEB, &format!("rateLimits: [{nine}]"))[0].field, "spec.rateLimits");
    for (target, reason) in [
        ("{kind: HTTPRoute, name: r}", "knows no routes"),
        ("{kind: Namespace, name: shop}", "has to speak HTTP"),
    ] {
        let said = refused(target, "rateLimits: [{requests: 1}], sizeLimits: {bodyBytes: 1}");
        let fields: Vec<&str> = said.iter().map(|it| it.field.as_str()).collect();
        assert_eq!(fields, ["spec.rateLimits", "spec.sizeLimits"], "{target}");
        assert!(said.iter().all(|it| it.reason.contains(reason)), "{said:?}");
    }
}
