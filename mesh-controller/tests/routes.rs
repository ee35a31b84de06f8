//! What becomes of routes: which Services accept them, and where what they refer to leads.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc};

use mesh_controller::{
    model::Model,
    routes::{Resolved, resolve},
    source::ledger::{FileContent, Ledger},
};
use mesh_core::model::http::{BackendTarget, RouteKind};

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
