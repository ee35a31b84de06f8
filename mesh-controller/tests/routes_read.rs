//! Every field of an HTTPRoute, a GRPCRoute, a TLSRoute, a TCPRoute and a ReferenceGrant, and what is read from it.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc, time::Duration};

use mesh_controller::{
    model::{Model, ParentRef, Route},
    source::{
        Refused,
        ledger::{FileContent, Ledger},
    },
};
use mesh_core::model::{
    Name,
    http::{
        Backend, BackendTarget, Cors, Filters, HeaderEdits, Mirror, PathEdit, PathMatch, PersistBy,
        Persistence, Redirect, RequestMatch, Retry, Rewrite, RouteKind, RouteRule, TextMatch, Timeouts,
        ValueMatch,
    },
};

fn ledger(text: &str) -> Ledger {
    Ledger::default().next(&[(PathBuf::from("a.yaml"), Arc::new(FileContent::parse(text)))].into())
}

fn model(text: &str) -> Model {
    let ledger = ledger(text);
    assert_eq!(ledger.refused(), [], "{text}");
    ledger.model()
}

fn only(text: &str) -> Arc<Route> {
    model(text).routes.into_values().next().unwrap()
}

fn refused(text: &str) -> Vec<Refused> {
    ledger(text).refused().to_vec()
}

/// An HTTPRoute whose only rule says this.
fn rule(text: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\n\
         spec: {{parentRefs: [{{group: '', kind: Service, name: web}}], rules: [{{{text}}}]}}\n"
    )
}

fn exact(name: &str, value: &str) -> ValueMatch {
    ValueMatch { name: name.into(), value: TextMatch::Exact(value.into()) }
}

fn pattern(name: &str, value: &str) -> ValueMatch {
    ValueMatch { name: name.into(), value: TextMatch::Pattern(value.parse().unwrap()) }
}

fn service(name: &str, port: u16) -> BackendTarget {
    BackendTarget::Service { service: name.parse().unwrap(), port }
}

fn pair(name: &str, value: &str) -> (String, String) {
    (name.into(), value.into())
}

#[test]
fn a_route_says_its_parents_and_its_age() {
    let route = only(
        "apiVersion: gateway.networking.k8s.io/v1beta1
kind: HTTPRoute
metadata: {name: r, namespace: shop, creationTimestamp: 1970-01-02T00:00:01Z}
spec:
  hostnames: [a.example.org]
  parentRefs:
  - {name: a-gateway}
  - {group: '', kind: Service, name: web}
  - {group: '', kind: Service, name: bank, namespace: bank, port: 80, sectionName: http}
",
    );
    assert_eq!((route.kind, route.created), (RouteKind::Http, 86_401));
    let parent = |index, service: &str, port, section: Option<&str>| ParentRef {
        index,
        service: service.parse().unwrap(),
        port,
        section: section.map(str::to_owned),
    };
    assert_eq!(
        route.parents,
        [parent(1, "shop/web", None, None), parent(2, "bank/bank", Some(80), Some("http"))]
    );
    assert_eq!(
        route.rules,
        [RouteRule::default()],
        "without rules everything matches one that leads nowhere"
    );
}

#[test]
fn what_a_rule_matches() {
    let text = rule(
        "name: all, matches: [
          {path: {type: Exact, value: /a/}, method: PUT},
          {path: {value: /a/b/}},
          {path: {type: RegularExpression, value: '/x|/y'}},
          {headers: [{name: Version, value: one}, {name: VERSION, value: two}, {type: RegularExpression, name: b, value: '.+'}]},
          {queryParams: [{name: Animal, value: whale}, {name: Animal, value: dog}, {type: RegularExpression, name: animal, value: 'd.*'}]},
          {}]",
    );
    let every = RequestMatch::default();
    assert_eq!(only(&text).rules[0].name, "all");
    assert_eq!(
        only(&text).rules[0].matches,
        [
            RequestMatch {
                path: PathMatch::Exact("/a/".into()),
                method: Some("PUT".into()),
                ..every.clone()
            },
            RequestMatch { path: PathMatch::Prefix("/a/b".into()), ..every.clone() },
            RequestMatch { path: PathMatch::Pattern("/x|/y".parse().unwrap()), ..every.clone() },
            RequestMatch { headers: vec![exact("version", "one"), pattern("b", ".+")], ..every.clone() },
            RequestMatch { query: vec![exact("Animal", "whale"), pattern("animal", "d.*")], ..every.clone() },
            every,
        ]
    );
}

#[test]
fn where_a_rule_leads() {
    let edit = "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [X-A]}}]";
    let text = rule(&format!(
        "backendRefs: [{{name: v1, port: 80}}, {{name: v2, namespace: other, port: 81, weight: 0, {edit}}}, \
         {{name: x, kind: ServiceImport, group: multicluster.x-k8s.io}}]"
    ));
    let filters = Filters {
        request_headers: HeaderEdits { remove: vec!["x-a".into()], ..HeaderEdits::default() },
        ..Filters::default()
    };
    let backend = |to, weight| Backend { to, weight, filters: Filters::default() };
    assert_eq!(
        only(&text).rules[0].backends,
        [
            backend(service("shop/v1", 80), 1),
            Backend { filters, ..backend(service("other/v2", 81), 0) },
            backend(BackendTarget::Nowhere, 1),
        ]
    );
}

#[test]
fn what_is_done_with_requests() {
    let text = rule(
        "filters: [
          {type: RequestHeaderModifier, requestHeaderModifier: {
            set: [{name: X-A, value: a b}, {name: x-a, value: c}], add: [{name: X-A, value: d}], remove: [X-B]}},
          {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: X-C, value: c}]}},
          {type: URLRewrite, urlRewrite: {hostname: example.org, path: {type: ReplaceFullPath, replaceFullPath: /new}}},
          {type: RequestMirror, requestMirror: {backendRef: {name: v1, port: 80}}},
          {type: RequestMirror, requestMirror: {backendRef: {name: v2, port: 80}, percent: 5}},
          {type: RequestMirror, requestMirror: {backendRef: {name: v3, port: 80}, fraction: {numerator: 1}}},
          {type: RequestMirror, requestMirror: {backendRef: {name: v4, port: 80}, fraction: {numerator: 1, denominator: 1000}}},
          {type: CORS, cors: {allowOrigins: ['https://*.example.org'], allowMethods: ['*'], allowHeaders: [X-A],
            exposeHeaders: [X-B], allowCredentials: true, maxAge: 60}}]",
    );
    let mirror = |name: &str, copies, of| Mirror { to: service(name, 80), copies, of };
    let texts = |list: &[&str]| list.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        only(&text).rules[0].filters,
        Filters {
            request_headers: HeaderEdits {
                set: vec![pair("x-a", "a b")],
                add: vec![pair("x-a", "d")],
                remove: texts(&["x-b"]),
            },
            response_headers: HeaderEdits { set: vec![pair("x-c", "c")], ..HeaderEdits::default() },
            redirect: None,
            rewrite: Some(Rewrite {
                hostname: Some("example.org".into()),
                path: Some(PathEdit::Full("/new".into()))
            }),
            mirrors: vec![
                mirror("shop/v1", 1, 1),
                mirror("shop/v2", 5, 100),
                mirror("shop/v3", 1, 100),
                mirror("shop/v4", 1, 1000)
            ],
            cors: Some(Cors {
                origins: texts(&["https://*.example.org"]),
                methods: texts(&["*"]),
                headers: texts(&["X-A"]),
                expose: texts(&["X-B"]),
                credentials: true,
                max_age: 60,
            }),
        }
    );
}

#[test]
fn where_a_redirect_leads() {
    let redirect = |text: &str| {
        let text = rule(&format!("filters: [{{type: RequestRedirect, requestRedirect: {{{text}}}}}]"));
        only(&text).rules[0].filters.redirect.clone().unwrap()
    };
    let usual = Redirect { scheme: None, hostname: None, path: None, port: None, status: 302 };
    assert_eq!(redirect(""), usual);
    for status in [301, 302, 303, 307, 308] {
        assert_eq!(redirect(&format!("statusCode: {status}")), Redirect { status, ..usual.clone() });
    }
    assert_eq!(
        redirect(
            "scheme: https, hostname: example.org, port: 8443, path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}"
        ),
        Redirect {
            scheme: Some("https".into()),
            hostname: Some("example.org".into()),
            path: Some(PathEdit::Prefix("/b".into())),
            port: Some(8443),
            ..usual
        }
    );
}

#[test]
fn what_is_answered_elsewhere_goes_nowhere() {
    let both =
        rule("filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: v1, port: 80}]");
    let said = refused(&both);
    assert_eq!(said[0].field, "spec.rules[0].backendRefs", "{said:?}");
    let rewritten =
        rule("filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]");
    assert_eq!(refused(&rewritten)[0].field, "spec.rules[0].filters");
}

#[test]
fn how_long_requests_take_and_when_they_are_tried_again() {
    let of = |text: &str| only(&rule(text)).rules[0].clone();
    let ms = Duration::from_millis;
    assert_eq!(
        of("timeouts: {request: 1h30m, backendRequest: 100ms}").timeouts,
        Timeouts { request: Some(ms(5_400_000)), backend: Some(ms(100)) }
    );
    assert_eq!(of("timeouts: {request: 0s, backendRequest: 10s}").timeouts.request, None, "zero is none");
    assert_eq!(
        of("retry: {codes: [500, 503], attempts: 3, backoff: 2s}").retry,
        Some(Retry { codes: vec![500, 503], attempts: 3, backoff: ms(2000) })
    );
    assert_eq!(of("retry: {}").retry, Some(Retry { codes: vec![], attempts: 1, backoff: ms(25) }));
}

#[test]
fn what_carries_a_session() {
    let of =
        |text: &str| only(&rule(&format!("sessionPersistence: {{{text}}}"))).rules[0].persistence.clone();
    let session = |name: &str, by, lifetime| Some(Persistence { name: name.into(), by, lifetime });
    assert_eq!(of("sessionName: s"), session("s", PersistBy::Cookie, None));
    assert_eq!(of("sessionName: X-S, type: Header"), session("X-S", PersistBy::Header, None));
    assert_eq!(
        of("sessionName: s, cookieConfig: {lifetimeType: Permanent}, absoluteTimeout: 1h"),
        session("s", PersistBy::Cookie, Some(3600))
    );
    let (own, again) = (of(""), of(""));
    assert!(own.as_ref().unwrap().name.starts_with("nodemesh-session-"), "{own:?}");
    assert_eq!(own, again, "a name that was made is the same after a restart");
    for (text, field) in [
        ("idleTimeout: 1h", "idleTimeout"),
        ("absoluteTimeout: 1h", "absoluteTimeout"),
        ("type: Header, absoluteTimeout: 1h", "absoluteTimeout"),
    ] {
        let said = refused(&rule(&format!("sessionPersistence: {{{text}}}")));
        assert_eq!(said[0].field, format!("spec.rules[0].sessionPersistence.{field}"), "{text}");
        assert!(said[0].reason.contains("support"), "{}", said[0]);
    }
}

#[test]
fn a_route_of_calls() {
    let route = only(
        "apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, port: 7070}]
  rules:
  - matches:
    - method: {service: shop.v1.Cart, method: Add}
    - method: {type: RegularExpression, service: 'shop\\..+'}
      headers: [{name: Version, value: one}]
    - {}
    filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x-a, value: a}]}}]
    backendRefs: [{name: v1, port: 7070, weight: 70}]
  - {}
",
    );
    let every =
        RequestMatch { path: PathMatch::Call { service: None, method: None }, ..RequestMatch::default() };
    let call = |service, method| PathMatch::Call { service, method };
    let text = |text: &str| Some(TextMatch::Exact(text.into()));
    assert_eq!(
        route.rules[0].matches,
        [
            RequestMatch { path: call(text("shop.v1.Cart"), text("Add")), ..every.clone() },
            RequestMatch {
                path: call(Some(TextMatch::Pattern("shop\\..+".parse().unwrap())), None),
                headers: vec![exact("version", "one")],
                ..every.clone()
            },
            every,
        ]
    );
    assert_eq!(route.rules[0].backends[0].weight, 70);
    assert_eq!(route.rules[0].filters.response_headers.add, [pair("x-a", "a")]);
    assert_eq!(route.rules[1], RouteRule::default());
}

#[test]
fn a_route_has_few_regular_expressions() {
    let matches = |count: usize| vec!["{path: {type: RegularExpression, value: /a+}}"; count].join(", ");
    let text = |count: usize| rule(&format!("matches: [{}], backendRefs: []", matches(count)));
    assert_eq!(only(&text(64)).rules[0].matches.len(), 64);
    let two = |count: usize| format!("matches: [{}]}}, {{matches: [{}]", matches(count), matches(1));
    let said = refused(&rule(&two(64)));
    assert!(said[0].reason.contains("65 regular expressions"), "{said:?}");
}

#[test]
fn a_service_of_the_gateway_apis_group_is_a_mistake_and_one_of_another_is_anothers() {
    let of = |group: &str| rule("").replace("group: ''", group);
    for group in ["group: gateway.networking.k8s.io", "namespace: shop"] {
        let said = refused(&of(group));
        assert_eq!(said[0].field, "spec.parentRefs[0].group", "{said:?}");
        assert!(said[0].cure.contains("group: \"\""), "{}", said[0]);
    }
    assert!(model(&of("group: serving.example.com")).routes.is_empty());
}

#[test]
fn a_grant() {
    for version in ["v1", "v1beta1"] {
        let model = model(&format!(
            "apiVersion: gateway.networking.k8s.io/{version}
kind: ReferenceGrant
metadata: {{name: g, namespace: bank}}
spec:
  from:
  - {{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}}
  - {{group: gateway.networking.k8s.io, kind: Gateway, namespace: shop}}
  to: [{{group: '', kind: Service, name: web}}, {{group: '', kind: Secret}}]
"
        ));
        let grant = model.grants.values().next().unwrap();
        assert_eq!(grant.from, [(RouteKind::Http, "shop".to_owned())]);
        assert_eq!(grant.to, [Some("web".to_owned())]);
        assert!(grant.permits(RouteKind::Http, "shop", &Name::new("bank", "web")));
        assert!(!grant.permits(RouteKind::Http, "shop", &Name::new("bank", "other")));
    }
}

#[track_caller]
fn check_refused(text: &str, field: &str, reason: &str, cure: &str) {
    let said = refused(text);
    assert_eq!(said[0].field, field, "{said:?}");
    assert!(said[0].reason.contains(reason) && said[0].cure.contains(cure), "{said:?}");
}

/// A TLSRoute or TCPRoute that says this of servers and of its rules.
fn of_connections(kind: &str, says: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: r, namespace: shop}}\n\
         spec: {{parentRefs: [{{group: '', kind: Service, name: web, port: 80}}], {says}}}\n"
    )
}

#[test]
fn a_route_of_connections_says_servers_and_backends() {
    let rules = "rules: [{name: all, backendRefs: [{name: v1, port: 5432, weight: 9}, {name: v2, namespace: b, port: 1}]}]";
    let share = |service: &str, port, weight| Backend {
        to: BackendTarget::Service { service: service.parse().unwrap(), port },
        weight,
        filters: Filters::default(),
    };
    let backends = vec![share("shop/v1", 5432, 9), share("b/v2", 1, 1)];
    let expected = [RouteRule { name: "all".into(), backends, ..RouteRule::default() }];
    let tcp = only(&of_connections("TCPRoute", rules));
    assert_eq!((tcp.kind, &tcp.hostnames[..], &tcp.rules[..]), (RouteKind::Tcp, &[][..], &expected[..]));
    let tls = only(&of_connections("TLSRoute", &format!("hostnames: [db.example, '*.example'], {rules}")));
    let hostnames: Vec<String> = tls.hostnames.iter().map(ToString::to_string).collect();
    assert_eq!((tls.kind, &tls.rules[..]), (RouteKind::Tls, &expected[..]));
    assert_eq!(hostnames, ["db.example", "*.example"]);
}

#[test]
fn a_route_of_connections_is_read_in_its_older_versions_too() {
    let rules = "rules: [{backendRefs: [{name: v1, port: 5432}]}]";
    let tls = format!("hostnames: [db.example], {rules}");
    let of = |kind: &str, version: &str, says: &str| {
        of_connections(kind, says)
            .replace("gateway.networking.k8s.io/v1\n", &format!("gateway.networking.k8s.io/{version}\n"))
    };
    for (kind, version, says) in
        [("TCPRoute", "v1alpha2", rules), ("TLSRoute", "v1alpha2", &tls), ("TLSRoute", "v1alpha3", &tls)]
    {
        assert_eq!(only(&of(kind, version, says)), only(&of_connections(kind, says)), "{kind} {version}");
    }
    let two =
        "hostnames: [a.b], rules: [{backendRefs: [{name: a, port: 1}]}, {backendRefs: [{name: b, port: 1}]}]";
    for (kind, version, says, field, reason, cure) in [
        // What these versions take, and v1 does not.
        ("TLSRoute", "v1alpha2", rules, "spec.hostnames", "no name", "make it a TCPRoute"),
        (
            "TLSRoute",
            "v1alpha2",
            two,
            "spec.rules",
            "has one rule, and this one has 2",
            "make a route of each",
        ),
        // There never was such a one.
        ("TCPRoute", "v1alpha3", rules, "apiVersion", "not of", "gateway.networking.k8s.io/v1"),
        ("HTTPRoute", "v1alpha2", rules, "apiVersion", "not of", "gateway.networking.k8s.io/v1"),
    ] {
        check_refused(&of(kind, version, says), field, reason, cure);
    }
}

#[test]
fn what_a_route_of_connections_cannot_say_is_told() {
    let good = "rules: [{backendRefs: [{name: v1, port: 80}]}]";
    let many: Vec<String> = (0..1025).map(|at| format!("a{at}.b")).collect();
    let many = format!("hostnames: [{}], {good}", many.join(", "));
    for (kind, says, field, reason, cure) in [
        ("TLSRoute", good, "spec.hostnames", "no name", "make it a TCPRoute"),
        (
            "TLSRoute",
            &format!("hostnames: ['*'], {good}"),
            "spec.hostnames[0]",
            "not a name",
            "*.example.com",
        ),
        (
            "TLSRoute",
            &format!("hostnames: [a.b, 10.0.0.1], {good}"),
            "spec.hostnames[1]",
            "not a name",
            "lower case",
        ),
        ("TLSRoute", &many, "spec.hostnames", "1025", "1024"),
        ("TCPRoute", &format!("hostnames: [a.b], {good}"), "spec.hostnames", "no field", "parentRefs"),
        ("TCPRoute", "rules: []", "spec.rules", "has one rule, and this one has 0", "write one"),
        (
            "TCPRoute",
            "rules: [{backendRefs: []}]",
            "spec.rules[0].backendRefs",
            "leads nowhere",
            "at least one",
        ),
        (
            "TCPRoute",
            "rules: [{backendRefs: [{name: v1}]}]",
            "spec.rules[0].backendRefs[0].port",
            "missing",
            "port:",
        ),
        (
            "TCPRoute",
            "rules: [{backendRefs: [{name: v1, port: 80, weight: 1000001}]}]",
            "spec.rules[0].backendRefs[0].weight",
            "too heavy",
            "1000000",
        ),
        ("TCPRoute", "rules: [{matches: []}]", "spec.rules[0].matches", "no field", "backendRefs"),
    ] {
        check_refused(&of_connections(kind, says), field, reason, cure);
    }
    let two = "rules: [{backendRefs: [{name: v1, port: 80}]}, {backendRefs: [{name: v2, port: 80}]}]";
    check_refused(&of_connections("TCPRoute", two), "spec.rules", "this one has 2", "a route of each");
}
