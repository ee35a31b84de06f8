//! What becomes of routes: which Services accept them, and where what they refer to leads.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc};

use mesh_controller::{
    model::Model,
    routes::{self, Resolved, Unread},
    source::ledger::{FileContent, Ledger},
    traffic,
};
use mesh_core::model::{
    Name,
    http::{BackendTarget, RouteKind},
    tcp::ConnectionRoute,
};

/// Services of two namespaces: with two ports, with one, and without an address.
const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}, {name: grpc, port: 7070}, {name: dns, port: 53, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: v1, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: bank, namespace: bank}
spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}
---
";

fn model(documents: &str) -> Model {
    let content = Arc::new(FileContent::parse(&format!("{SERVICES}{documents}")));
    let ledger = Ledger::default().next(&[(PathBuf::from("a.yaml"), content)].into());
    assert_eq!(ledger.refused(), [], "{documents}");
    ledger.model()
}

/// What becomes of routes beside the policies that there are.
fn resolve(model: &Model) -> Resolved {
    routes::resolve(model, &traffic::resolve(model))
}

/// A route whose only rule has one backend, with the rest of its reference.
fn route(kind: &str, name: &str, parent: &str, backend: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: \
         {{parentRefs: [{{group: '', kind: Service, {parent}}}], rules: [{{backendRefs: [{{{backend}}}]}}]}}\n---\n"
    )
}

fn grant(namespace: &str, from: &str, to: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {{name: g, namespace: {namespace}}}\n\
         spec: {{from: [{from}], to: [{to}]}}\n---\n"
    )
}

/// What became of each route: `kind name: parents; references`.
fn outcomes(resolved: &Resolved) -> Vec<String> {
    let outcome = |((kind, name), outcome): (&(RouteKind, _), &mesh_controller::routes::Outcome)| {
        let parents: Vec<&str> = outcome
            .parents
            .iter()
            .map(|(_, error)| error.as_ref().map_or("Accepted", |error| error.reason()))
            .collect();
        let broken: Vec<&str> = outcome.broken.iter().map(|it| it.why.reason()).collect();
        format!("{} {name}: {}; {}", kind.as_str(), parents.join(" "), broken.join(" "))
    };
    resolved.outcomes.iter().map(outcome).collect()
}

#[track_caller]
fn check(documents: &str, expected: &[&str]) -> Resolved {
    let resolved = resolve(&model(documents));
    assert_eq!(outcomes(&resolved), expected, "{documents}");
    resolved
}

#[test]
fn a_service_accepts_a_route_for_the_ports_that_it_has() {
    for (parent, expected) in [
        ("name: web", "Accepted"),
        ("name: web, port: 80", "Accepted"),
        ("name: web, sectionName: http", "Accepted"),
        ("name: web, sectionName: grpc, port: 7070", "Accepted"),
        ("name: web, sectionName: grpc, port: 80", "NoMatchingParent"),
        ("name: web, port: 81", "NoMatchingParent"),
        ("name: web, port: 53", "NoMatchingParent"),
        ("name: web, sectionName: other", "NoMatchingParent"),
        ("name: none", "NoMatchingParent"),
        ("name: bank", "NoMatchingParent"),
        ("name: bank, namespace: bank", "Accepted"),
        ("name: headless", "UnsupportedValue"),
    ] {
        let documents = route("HTTPRoute", "shop/r", parent, "name: v1, port: 8080");
        let resolved = check(&documents, &[&format!("HTTPRoute shop/r: {expected}; ")]);
        assert_eq!(resolved.routes.len(), usize::from(expected == "Accepted"), "{parent}");
    }
}

#[test]
fn a_port_by_its_name_is_the_port() {
    let documents = route("HTTPRoute", "shop/r", "name: web, sectionName: grpc", "name: v1, port: 8080");
    assert_eq!(resolve(&model(&documents)).routes[0].parents[0].port, Some(7070));
}

#[test]
fn of_two_kinds_that_speak_of_one_port_the_calls_count() {
    let http = |name: &str, parent: &str| route("HTTPRoute", name, parent, "name: web, port: 80");
    let grpc = |name: &str, parent: &str| route("GRPCRoute", name, parent, "name: web, port: 80");
    for (documents, expected) in [
        (
            http("shop/a", "name: web, port: 80") + &grpc("shop/b", "name: web, port: 80"),
            ["GRPCRoute shop/b: Accepted; ", "HTTPRoute shop/a: Conflicted; "],
        ),
        // Some port is left.
        (
            http("shop/a", "name: web") + &grpc("shop/b", "name: web, port: 7070"),
            ["GRPCRoute shop/b: Accepted; ", "HTTPRoute shop/a: Accepted; "],
        ),
        (
            http("shop/a", "name: web, port: 80") + &grpc("shop/b", "name: web"),
            ["GRPCRoute shop/b: Accepted; ", "HTTPRoute shop/a: Conflicted; "],
        ),
        // One is about the requests of another namespace's workloads.
        (
            http("shop/a", "name: web")
                + &grpc("bank/b", "name: web, namespace: shop")
                    .replace("name: web, port: 80", "name: bank, port: 80"),
            ["GRPCRoute bank/b: Accepted; ", "HTTPRoute shop/a: Accepted; "],
        ),
    ] {
        check(&documents, &expected);
    }
}

#[test]
fn what_leads_nowhere_is_told_and_spoils_nothing_else() {
    for (backend, expected) in [
        ("name: v1, port: 8080", ""),
        ("name: headless, port: 80", ""),
        ("name: v1, port: 80", "BackendNotFound"),
        ("name: none, port: 80", "BackendNotFound"),
        ("name: none, port: 80, weight: 0", "BackendNotFound"),
        ("name: x, kind: Bucket, group: storage.example.com", "InvalidKind"),
        ("name: bank, namespace: bank, port: 80", "RefNotPermitted"),
        ("name: none, namespace: bank, port: 80", "RefNotPermitted"),
    ] {
        let documents = route("HTTPRoute", "shop/r", "name: web", backend);
        let resolved = check(&documents, &[&format!("HTTPRoute shop/r: Accepted; {expected}")]);
        let to = &resolved.routes[0].rules[0].backends[0].to;
        assert_eq!(matches!(to, BackendTarget::Nowhere), !expected.is_empty(), "{backend}");
    }
}

#[test]
fn a_grant_of_the_services_namespace_permits_what_it_says() {
    let documents = route("HTTPRoute", "shop/r", "name: web", "name: bank, namespace: bank, port: 80");
    let from = |kind: &str, namespace: &str| {
        format!("{{group: gateway.networking.k8s.io, kind: {kind}, namespace: {namespace}}}")
    };
    let service = "{group: '', kind: Service}";
    for (namespace, from, to, permitted) in [
        ("bank", from("HTTPRoute", "shop"), service, true),
        ("bank", from("HTTPRoute", "shop"), "{group: '', kind: Service, name: bank}", true),
        ("bank", from("HTTPRoute", "shop"), "{group: '', kind: Service, name: other}", false),
        ("bank", from("HTTPRoute", "shop"), "{group: '', kind: Secret}", false),
        ("bank", from("HTTPRoute", "other"), service, false),
        ("bank", from("GRPCRoute", "shop"), service, false),
        ("bank", "{group: other, kind: HTTPRoute, namespace: shop}".to_owned(), service, false),
        ("shop", from("HTTPRoute", "shop"), service, false),
    ] {
        let all = format!("{documents}{}", grant(namespace, &from, to));
        let refs = if permitted { "" } else { "RefNotPermitted" };
        check(&all, &[&format!("HTTPRoute shop/r: Accepted; {refs}")]);
    }
}

#[test]
fn a_route_of_a_services_consumers_may_lead_to_where_their_requests_go_anyway() {
    let to_parent =
        route("HTTPRoute", "bank/r", "name: web, namespace: shop", "name: v1, namespace: shop, port: 8080");
    check(&to_parent, &["HTTPRoute bank/r: Accepted; "]);
    // A parent that is not there is none.
    let to_none =
        route("HTTPRoute", "bank/r", "name: none, namespace: shop", "name: v1, namespace: shop, port: 8080");
    check(&to_none, &["HTTPRoute bank/r: NoMatchingParent; RefNotPermitted"]);
}

#[test]
fn a_mirror_is_looked_up_as_a_backend_is() {
    let mirror = "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: none, port: 80}}}], ";
    let documents = route("HTTPRoute", "shop/r", "name: web", "name: v1, port: 8080");
    let of_rule = documents.replace("backendRefs", &format!("{mirror}backendRefs"));
    let resolved = check(&of_rule, &["HTTPRoute shop/r: Accepted; BackendNotFound"]);
    assert_eq!(resolved.routes[0].rules[0].filters.mirrors[0].to, BackendTarget::Nowhere);
    let of_backend = documents.replace("name: v1, port: 8080", &format!("{mirror}name: v1, port: 8080"));
    let resolved = check(&of_backend, &["HTTPRoute shop/r: Accepted; BackendNotFound"]);
    assert_eq!(resolved.routes[0].rules[0].backends[0].filters.mirrors[0].to, BackendTarget::Nowhere);
    assert_ne!(resolved.routes[0].rules[0].backends[0].to, BackendTarget::Nowhere);
}

#[test]
fn a_route_for_gateways_alone_is_nobodys_here() {
    let gateways = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\nspec: \
                    {parentRefs: [{name: g}], rules: [{filters: [{type: OfAnother}], ofALaterVersion: 1}]}\n";
    assert_eq!(resolve(&model(gateways)), Resolved::default());
}

/// A route of connections, as old as that, with its port and one backend.
fn of_connections(kind: &str, name: &str, created: u32, port: &str, more: &str) -> String {
    let to = if name.starts_with("bank") { "bank, port: 80" } else { "v1, port: 8080" };
    route(kind, name, &format!("name: web, namespace: shop{port}"), &format!("name: {to}"))
        .replace("metadata: {", &format!("metadata: {{creationTimestamp: '1970-01-01T00:00:0{created}Z', "))
        .replace("spec: {", &format!("spec: {{{more}"))
}

/// The routes of connections that are in force: `PORT: NAMES`, in their order.
fn connections(resolved: &Resolved) -> Vec<String> {
    let of = |((service, port), routes): (&(Name, u16), &Vec<Arc<ConnectionRoute>>)| {
        let names: Vec<String> = routes.iter().map(|route| route.name.to_string()).collect();
        format!("{}:{port} {}", service.name, names.join(" "))
    };
    resolved.connections.iter().map(of).collect()
}

const HOSTS: &str = "hostnames: [db.example, '*.example'], ";

#[test]
fn of_kinds_that_speak_of_one_port_the_one_that_says_more_is_in_force() {
    let tcp = |port: &str| of_connections("TCPRoute", "shop/t", 0, port, "");
    let tls = |port: &str| of_connections("TLSRoute", "shop/s", 0, port, HOSTS);
    let http = |port: &str| of_connections("HTTPRoute", "shop/h", 0, port, "");
    for (documents, expected, in_force) in [
        (tcp(""), &["TCPRoute shop/t: Accepted; "][..], &["web:80 shop/t", "web:7070 shop/t"][..]),
        (tcp(", port: 80"), &["TCPRoute shop/t: Accepted; "], &["web:80 shop/t"]),
        (
            tcp(", port: 80") + &tls(", port: 80"),
            &["TLSRoute shop/s: Accepted; ", "TCPRoute shop/t: Conflicted; "],
            &["web:80 shop/s"],
        ),
        // Some port is left.
        (
            tcp("") + &tls(", port: 80"),
            &["TLSRoute shop/s: Accepted; ", "TCPRoute shop/t: Accepted; "],
            &["web:80 shop/s", "web:7070 shop/t"],
        ),
        (
            tcp("") + &tls(", port: 80") + &http(", sectionName: grpc"),
            &["HTTPRoute shop/h: Accepted; ", "TLSRoute shop/s: Accepted; ", "TCPRoute shop/t: Conflicted; "],
            &["web:80 shop/s"],
        ),
        (http("") + &tls(""), &["HTTPRoute shop/h: Accepted; ", "TLSRoute shop/s: Conflicted; "], &[]),
        // One is for the clients of another namespace.
        (
            http("") + &of_connections("TCPRoute", "bank/t", 0, ", port: 80", ""),
            &["HTTPRoute shop/h: Accepted; ", "TCPRoute bank/t: Accepted; "],
            &["web:80 bank/t"],
        ),
    ] {
        let resolved = check(&documents, expected);
        assert_eq!(connections(&resolved), in_force, "{documents}");
        assert!(resolved.routes.iter().all(|route| route.kind.is_of_requests()));
    }
    let resolved = resolve(&model(&(http("") + &tls(""))));
    let (_, error) = &resolved.outcomes[&(RouteKind::Tls, Name::new("shop", "s"))].parents[0];
    assert!(error.as_ref().unwrap().to_string().contains("HTTPRoutes speak of the same ports"), "{error:?}");
}

#[test]
fn of_two_routes_that_are_for_the_same_the_newer_one_is_told_that_nothing_comes_to_it() {
    let behind = |documents: &str| -> Vec<String> {
        let of = |((_, name), outcome): (&(RouteKind, Name), &mesh_controller::routes::Outcome)| {
            assert!(outcome.parents.iter().all(|(_, error)| error.is_none()), "both are accepted");
            outcome.behind.iter().map(|(at, by)| format!("{name} {at} {by}")).collect::<Vec<_>>()
        };
        resolve(&model(documents)).outcomes.iter().flat_map(of).collect()
    };
    let tcp = |name: &str, created, port: &str| of_connections("TCPRoute", name, created, port, "");
    let tls = |name: &str, created, hosts: &str| {
        of_connections("TLSRoute", name, created, ", port: 80", &format!("hostnames: [{hosts}], "))
    };
    assert_eq!(behind(&(tcp("shop/a", 2, ", port: 80") + &tcp("shop/b", 1, ""))), ["shop/a 0 shop/b"]);
    assert_eq!(behind(&(tcp("shop/a", 2, "") + &tcp("shop/b", 1, ", port: 80"))), [""; 0]);
    assert_eq!(behind(&(tcp("shop/a", 1, "") + &tcp("shop/b", 1, ""))), ["shop/b 0 shop/a"]);
    assert_eq!(behind(&(tcp("bank/a", 2, "") + &tcp("shop/b", 1, ""))), [""; 0]);
    assert_eq!(behind(&(tls("shop/a", 2, "x.y, z.y") + &tls("shop/b", 1, "z.y, x.y"))), ["shop/a 0 shop/b"]);
    assert_eq!(behind(&(tls("shop/a", 2, "x.y, '*.y'") + &tls("shop/b", 1, "x.y"))), [""; 0]);
}

#[test]
fn a_service_has_no_more_routes_of_connections_than_agents_can_be_told() {
    let hosts: Vec<String> = (0..1000).map(|at| format!("{at}.{}.example", "a".repeat(60))).collect();
    let hosts = format!("hostnames: [{}], ", hosts.join(", "));
    let route = |at: u32| of_connections("TLSRoute", &format!("shop/r{at}"), 9 - at, ", port: 80", &hosts);
    let documents: String = (0..9).map(route).collect();
    let resolved = resolve(&model(&documents));
    // About 74 KB each: seven are less than 512 KiB, and those are the older ones.
    assert_eq!(too_many(&resolved), ["TLSRoute shop/r0", "TLSRoute shop/r1"]);
    assert_eq!(resolved.connections[&(Name::new("shop", "web"), 80)].len(), 7);
    // For each port once.
    let twice = resolve(&model(&documents.replace(", port: 80}]", "}]")));
    assert_eq!(twice.connections[&(Name::new("shop", "web"), 80)].len(), 3);
}

/// An HTTPRoute or GRPCRoute of about 129 KB.
fn long_route(kind: &str, name: &str, created: u32, port: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    let value = "x".repeat(4000);
    let headers: Vec<String> = (0..2).map(|at| format!("{{name: h{at}, value: {value}}}")).collect();
    let rule = format!(
        "{{matches: [{{headers: [{}]}}], backendRefs: [{{name: v1, port: 8080}}]}}",
        headers.join(", ")
    );
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}, \
         creationTimestamp: '2026-01-01T00:00:{created:02}Z'}}\nspec: {{parentRefs: [{{group: '', kind: Service, name: \
         web{port}}}], rules: [{}]}}\n---\n",
        vec![rule; 16].join(", ")
    )
}

fn too_many(resolved: &Resolved) -> Vec<String> {
    let is = |(_, outcome): &(_, &routes::Outcome)| {
        outcome.parents[0].1.as_ref().is_some_and(|it| it.reason() == "TooManyRoutes")
    };
    resolved.outcomes.iter().filter(is).map(|((kind, name), _)| format!("{} {name}", kind.as_str())).collect()
}

#[test]
fn a_service_has_no_more_routes_of_requests_than_agents_can_be_told() {
    let of = |kind: &str, from: u32, count: u32, port: &str| -> String {
        (from..from + count).map(|at| long_route(kind, &format!("shop/r{at:02}"), 50 - at, port)).collect()
    };
    // About 129 KB each: sixteen are less than 2 MiB, and those are the older ones.
    let documents = of("HTTPRoute", 10, 18, ", port: 80");
    let resolved = resolve(&model(&documents));
    assert_eq!(too_many(&resolved), ["HTTPRoute shop/r10", "HTTPRoute shop/r11"]);
    assert_eq!(resolved.routes.len(), 16);
    let (_, error) = &resolved.outcomes[&(RouteKind::Http, Name::new("shop", "r10"))].parents[0];
    let error = error.as_ref().unwrap();
    let says = error.to_string();
    for part in ["HTTPRoutes of Service shop/web", "2048 KiB", "for each port", "with its spec.rules"] {
        assert!(says.contains(part), "{says}");
    }
    assert!(error.cure().unwrap().contains("parentRefs"));

    // What was accepted stays so, whatever comes: more of its kind, a kind that comes before it, a smaller one.
    let before = resolved.routes;
    let small = long_route("HTTPRoute", "shop/small", 59, ", port: 80").replace(&"x".repeat(4000), "x");
    let more = of("HTTPRoute", 1, 9, ", port: 80") + &of("GRPCRoute", 1, 16, ", port: 7070") + &small;
    let after = resolve(&model(&(documents.clone() + &more)));
    assert!(before.iter().all(|route| after.routes.contains(route)));
    assert_eq!(after.routes.iter().filter(|route| route.kind == RouteKind::Grpc).count(), 16);
    assert!(after.routes.iter().any(|route| route.name.name == "small"), "there is room for a small one");

    // Each port counts, and one that two parents name counts once.
    let twice = resolve(&model(&documents.replace(", port: 80}]", "}]")));
    assert_eq!(twice.routes.len(), 8);
    let also = "}, {group: '', kind: Service, name: web, port: 80}, {group: '', kind: Service, name: web, port: 7070}]";
    let thrice = resolve(&model(&documents.replace(", port: 80}]", also)));
    assert_eq!(thrice.routes.len(), 8);
    assert!(thrice.routes.iter().all(|route| route.parents.len() == 3));
}

#[test]
fn what_policies_say_of_the_rules_of_a_route_counts_with_them() {
    let calls: Vec<String> = (0..64).map(|at| format!("{}.S/{at:02}", "c".repeat(200))).collect();
    let policy = |name: &str, routes: std::ops::Range<u32>| {
        let targets: Vec<String> = routes.map(|at| format!("{{kind: HTTPRoute, name: r{at:02}}}")).collect();
        format!(
            "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
             {{targetRefs: [{}], hedge: {{after: 1s, calls: [{}]}}}}\n---\n",
            targets.join(", "),
            calls.join(", ")
        )
    };
    let documents: String =
        (10..26).map(|at| long_route("HTTPRoute", &format!("shop/r{at}"), 50 - at, ", port: 80")).collect();
    assert_eq!(resolve(&model(&documents)).routes.len(), 16);
    // 13 KB of calls more for each of the 16 rules.
    let with = resolve(&model(&(documents + &policy("hedged", 10..26))));
    assert_eq!((with.routes.len(), too_many(&with).len()), (6, 10));
    assert!(with.routes.iter().all(|route| route.rules.iter().all(|rule| rule.traffic.hedge.is_some())));
}

#[test]
fn backends_of_connections_are_looked_up_as_those_of_requests_are() {
    for kind in ["TCPRoute", "TLSRoute"] {
        let hosts = if kind == "TLSRoute" { HOSTS } else { "" };
        let to = |backend: &str| {
            route(kind, "shop/r", "name: web", backend).replace("spec: {", &format!("spec: {{{hosts}"))
        };
        for (backend, expected) in [
            ("name: v1, port: 8080, weight: 3", ""),
            ("name: none, port: 80", "BackendNotFound"),
            ("name: x, kind: Bucket, group: storage.example.com", "InvalidKind"),
            ("name: bank, namespace: bank, port: 80", "RefNotPermitted"),
        ] {
            let resolved = check(&to(backend), &[&format!("{kind} shop/r: Accepted; {expected}")]);
            let share = &resolved.connections[&(Name::new("shop", "web"), 80)][0].backends[0];
            assert_eq!(matches!(share.to, BackendTarget::Nowhere), !expected.is_empty(), "{backend}");
        }
        let from = format!("{{group: gateway.networking.k8s.io, kind: {kind}, namespace: shop}}");
        let documents =
            to("name: bank, namespace: bank, port: 80") + &grant("bank", &from, "{group: '', kind: Service}");
        check(&documents, &[&format!("{kind} shop/r: Accepted; ")]);
    }
}

/// A TrafficPolicy of the shop.
fn policy(name: &str, created: u32, target: &str, says: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop, creationTimestamp: \
         '1970-01-01T00:00:0{created}Z'}}\nspec: {{targetRefs: [{target}], {says}}}\n---\n"
    )
}

const NAMESPACE: &str = "{kind: Namespace, name: shop}";
const WEB: &str = "{kind: Service, name: web}";
const WEB_HTTP: &str = "{kind: Service, name: web, sectionName: http}";
const RETRIES: &str = "retries: {attempts: 1}";

/// What of policies is not in force as connections are routed: `POLICY: what, of the namespace?`.
#[track_caller]
fn check_unread(documents: &str, expected: &[&str]) {
    let unread = resolve(&model(documents)).unread;
    let of = |(name, all): (&Name, &Vec<Unread>)| -> Vec<String> {
        let whose = |it: &Unread| if it.of_namespace { ", of the namespace" } else { "" };
        all.iter().map(|it| format!("{name}: {it}{}", whose(it))).collect()
    };
    assert_eq!(unread.iter().flat_map(of).collect::<Vec<_>>(), expected, "{documents}");
}

#[test]
fn what_policies_say_of_requests_to_a_port_whose_connections_are_routed_is_told() {
    let tcp = of_connections("TCPRoute", "shop/t", 0, ", port: 80", "");
    let by_tcp = ", as TCPRoute shop/t routes its connections, of which nothing is read";
    let direct = format!("shop/p: Service shop/web, port 80: retries is not in force{by_tcp}");
    for target in [WEB, WEB_HTTP] {
        check_unread(&(tcp.clone() + &policy("p", 0, target, RETRIES)), &[&direct]);
    }
    // One for the namespace has its say there, too, and none at other Services' ports.
    let inherited = format!("{direct}, of the namespace");
    check_unread(&(tcp.clone() + &policy("p", 0, NAMESPACE, RETRIES)), &[&inherited]);
    // Another port, another Service, and what is of connections.
    let other = "{kind: Service, name: web, sectionName: grpc}";
    for (target, says) in [
        (other, RETRIES),
        ("{kind: Service, name: v1}", RETRIES),
        (WEB, "balancing: {algorithm: RoundRobin}, limits: {connections: 9}"),
        (WEB, "balancing: {algorithm: Hash, hashBy: {type: Source}}, healthCheck: {tcp: {}}"),
        (WEB, "rateLimits: [{requests: 1}], sizeLimits: {bodyBytes: 9}"),
    ] {
        check_unread(&(tcp.clone() + &policy("p", 0, target, says)), &[]);
    }
    let all = "timeouts: {request: 1s}, retries: {attempts: 1}, limits: {connections: 9, requests: 9}, ejection: {}, faults: \
               [{abort: {status: 503}}], hedge: {after: 1s}, balancing: {algorithm: Hash, hashBy: {type: Header, name: x}}";
    let parts =
        "balancing.hashBy and ejection and faults and hedge and limits.requests and retries and timeouts are";
    let expected = format!("shop/p: Service shop/web, port 80: {parts} not in force{by_tcp}");
    check_unread(&(tcp + &policy("p", 0, WEB, all)), &[&expected]);
}

#[test]
fn of_what_is_not_read_the_policy_is_told_that_would_count() {
    let tcp = of_connections("TCPRoute", "shop/t", 0, ", port: 80", "");
    let by_tcp = "as TCPRoute shop/t routes its connections, of which nothing is read";
    let nearer = policy("far", 0, NAMESPACE, &format!("{RETRIES}, timeouts: {{request: 1s}}"))
        + &policy("near", 0, WEB, RETRIES)
        + &policy("newer", 1, WEB, RETRIES);
    check_unread(
        &(tcp + &nearer),
        &[
            &format!(
                "shop/far: Service shop/web, port 80: timeouts is not in force, {by_tcp}, of the namespace"
            ),
            &format!("shop/near: Service shop/web, port 80: retries is not in force, {by_tcp}"),
        ],
    );
}

#[test]
fn whose_connections_are_routed_is_told_with_what_policies_say_of_their_requests() {
    let policy = policy("p", 0, WEB_HTTP, RETRIES);
    let tls = |name: &str, created| of_connections("TLSRoute", name, created, ", port: 80", HOSTS);
    let one = "shop/p: Service shop/web, port 80: retries is not in force";
    let consumer = format!(
        "{one} for the workloads of namespace bank, as TLSRoute bank/a routes its connections, of which nothing is read"
    );
    check_unread(&(policy.clone() + &tls("bank/a", 0)), &[&consumer]);
    let five: String = (1..6).map(|at| tls(&format!("shop/r{at}"), at)).collect();
    let many = format!(
        "{one}, as TLSRoute shop/r1 and TLSRoute shop/r2 and TLSRoute shop/r3 and 2 more route its connections, of which nothing is \
         read"
    );
    check_unread(&(policy.clone() + &five), &[&many]);
    // Requests come before connections, and so they are read.
    let http = of_connections("HTTPRoute", "shop/h", 9, ", port: 80", "");
    check_unread(&(policy.clone() + &five + &http), &[]);
    check_unread(&policy, &[]);
}
