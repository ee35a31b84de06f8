//! Every field of every kind, made wrong in every way: each mistake is refused, and the refusal names the file, the
//! line, the object, the field, the reason and the cure.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc};

use mesh_controller::source::{
    Refused,
    ledger::{FileContent, Ledger},
};
use serde_json::{Value, json};

/// A document of each kind with all of its fields that mean something.
fn documents() -> [Value; 10] {
    let metadata = |labels: Value| json!({"name": "x", "namespace": "shop", "labels": labels});
    [
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "x", "labels": {"nodemesh.io/enroll": "true", "nodemesh.io/mode": "strict"}}}),
        json!({"apiVersion": "nodemesh.io/v1alpha1", "kind": "Workload",
            "metadata": metadata(json!({"app": "web", "nodemesh.io/enroll": "true"})),
            "spec": {"node": "a", "uid": "0a7e5bfa", "addresses": ["10.0.0.1"], "serviceAccount": "web", "ready": true}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata(json!({"app": "web"})),
            "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "selector": {"app": "web"},
                "type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}, "trafficDistribution": "PreferClose",
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}}),
        json!({"apiVersion": "nodemesh.io/v1alpha1", "kind": "AuthorizationPolicy", "metadata": metadata(json!({})),
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "action": "Allow", "rules": [
                {"from": [{"identities": ["spiffe://td/ns/shop/sa/web"], "namespaces": ["shop"],
                    "addressBlocks": ["10.0.0.0/8"]}], "to": [{"ports": [8080]}]}]}}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": metadata(json!({"kubernetes.io/service-name": "web"})), "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "w", "namespace": "shop"},
                "nodeName": "a", "zone": "east",
                "conditions": {"ready": false, "serving": true, "terminating": true}}],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]}),
        http_route(),
        grpc_route(),
        json!({"apiVersion": "gateway.networking.k8s.io/v1beta1", "kind": "ReferenceGrant", "metadata": metadata(json!({})),
            "spec": {"from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "bank"}],
                "to": [{"group": "", "kind": "Service", "name": "web"}]}}),
        json!({"apiVersion": "nodemesh.io/v1alpha1", "kind": "AuthenticationPolicy", "metadata": metadata(json!({})),
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "ports": [8080], "required": true, "issuers": [
                {"issuer": "https://id.example", "audiences": ["shop"],
                    "jwks": {"url": "https://id.example/keys", "caBundle": ROOT},
                    "from": [{"header": "Authorization", "prefix": "Bearer"}], "forward": "Strip",
                    "claimsToHeaders": [{"claim": "sub", "header": "x-user"}]}]}}),
        json!({"apiVersion": "nodemesh.io/v1alpha1", "kind": "TrafficPolicy", "metadata": metadata(json!({})),
            "spec": {
                "targetRefs": [{"group": "", "kind": "Service", "name": "web", "sectionName": "http"}],
                "balancing": {"algorithm": "Hash", "hashBy": {"type": "Header", "name": "x-user"}, "slowStart": "30s"},
                "timeouts": {"request": "10s", "backendRequest": "1s"},
                "retries": {"attempts": 2, "codes": [503], "grpcCodes": [14], "methods": "Every", "backoff": "10ms",
                    "budget": {"percent": 10, "perSecond": 5}},
                "limits": {"connections": 100, "requests": 50, "pending": 10},
                "ejection": {"failures": 3, "time": "1s", "maxTime": "1m", "maxPercent": 30, "panicPercent": 10,
                    "failurePercent": 50, "minimumRequests": 10, "window": "10s", "retryAfter": "30s"},
                "faults": [{"percent": 0.5, "headers": [{"name": "x-tester", "value": "me"}], "delay": "2s"}],
                "hedge": {"after": "100ms", "calls": ["shop.v1.Cart/Get"], "budget": {"percent": 5, "perSecond": 1}},
                "healthCheck": {"http": {"path": "/healthz", "host": "pay.example", "statuses": [200, 204]}, "port": 8081,
                    "interval": "5s", "timeout": "1s", "unhealthyAfter": 3, "healthyAfter": 2, "panicPercent": 10},
                "rateLimits": [{"requests": 5, "per": "1m", "burst": 9, "by": "Header", "header": "x-a", "match": {
                    "methods": ["POST"], "hosts": ["web"], "paths": ["/a"], "headers": [{"name": "x-b", "values": ["c"]}]}}],
                "sizeLimits": {"headerBytes": 8192, "bodyBytes": 1}}}),
    ]
}

/// Of nobody.
const ROOT: &str = include_str!("root.pem");

fn http_route() -> Value {
    let edits = json!({"set": [{"name": "X-A", "value": "1"}], "add": [{"name": "X-B", "value": "2"}], "remove": ["X-C"]});
    let backend = json!({"group": "", "kind": "Service", "namespace": "shop", "name": "web", "port": 80});
    let mut weighted = backend.clone();
    weighted["weight"] = json!(3);
    weighted["filters"] = json!([{"type": "ResponseHeaderModifier", "responseHeaderModifier": edits}]);
    let redirect = json!({"scheme": "https", "hostname": "example.org", "port": 8443, "statusCode": 301,
        "path": {"type": "ReplaceFullPath", "replaceFullPath": "/new"}});
    let rewrite =
        json!({"hostname": "example.org", "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}});
    let cors = json!({"allowOrigins": ["https://*.example.org:8443"], "allowMethods": ["GET"], "allowHeaders": ["X-A"],
        "exposeHeaders": ["X-B"], "allowCredentials": true, "maxAge": 60});
    let mirror = json!({"backendRef": backend, "fraction": {"numerator": 1, "denominator": 1000}});
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
    "metadata": {"name": "x", "namespace": "shop", "labels": {}, "creationTimestamp": "2026-01-31T12:00:00Z"},
    "spec": {
        "parentRefs": [{"group": "", "kind": "Service", "namespace": "shop", "name": "web", "sectionName": "http", "port": 80}],
        "hostnames": ["example.org"],
        "useDefaultGateways": "None",
        "rules": [
            {"filters": [{"type": "RequestRedirect", "requestRedirect": redirect}]},
            {
                "name": "all",
                "matches": [{"method": "GET", "path": {"type": "PathPrefix", "value": "/a"},
                    "headers": [{"type": "Exact", "name": "X-A", "value": "1"}],
                    "queryParams": [{"type": "RegularExpression", "name": "q", "value": "a+"}]}],
                "filters": [
                    {"type": "RequestHeaderModifier", "requestHeaderModifier": edits},
                    {"type": "RequestMirror", "requestMirror": mirror},
                    {"type": "URLRewrite", "urlRewrite": rewrite},
                    {"type": "CORS", "cors": cors},
                ],
                "backendRefs": [weighted],
                "timeouts": {"request": "10s", "backendRequest": "1s"},
                "retry": {"codes": [503], "attempts": 2, "backoff": "100ms"},
                "sessionPersistence": {"sessionName": "s", "type": "Cookie", "cookieConfig": {"lifetimeType": "Session"}},
            },
        ],
    }})
}

fn grpc_route() -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute",
    "metadata": {"name": "x", "namespace": "shop", "labels": {}},
    "spec": {
        "parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
        "rules": [{
            "name": "all",
            "matches": [{"method": {"type": "Exact", "service": "shop.v1.Cart", "method": "Add"},
                "headers": [{"type": "Exact", "name": "x-a", "value": "1"}]}],
            "filters": [{"type": "RequestMirror",
                "requestMirror": {"backendRef": {"name": "web", "port": 80}, "percent": 10}}],
            "backendRefs": [{"name": "web", "port": 80, "weight": 0}],
            "sessionPersistence": {"sessionName": "s", "type": "Header"},
        }],
    }})
}

/// Fields without which a document is refused.
const REQUIRED: &[&str] = &[
    "apiVersion",
    "kind",
    "metadata",
    "metadata.name",
    "spec",
    "spec.node",
    "spec.addresses",
    "spec.action",
    "spec.ports[0].port",
    "addressType",
    "endpoints[0].addresses",
    "spec.from",
    "spec.from[0].group",
    "spec.from[0].kind",
    "spec.from[0].namespace",
    "spec.to",
    "spec.to[0].group",
    "spec.to[0].kind",
    "spec.targetRefs",
    "spec.targetRefs[0].kind",
    "spec.targetRefs[0].name",
    "spec.balancing.algorithm",
    "spec.balancing.hashBy",
    "spec.balancing.hashBy.type",
    "spec.balancing.hashBy.name",
    "spec.limits.requests",
    "spec.ejection.failurePercent",
    "spec.hedge.after",
    "spec.faults[0].delay",
    "spec.healthCheck.http",
    "spec.healthCheck.http.path",
    "spec.rateLimits[0].requests",
    "spec.rateLimits[0].header",
    "spec.rateLimits[0].match.headers[0].name",
    "spec.faults[0].headers[0].name",
    "spec.faults[0].headers[0].value",
    "spec.issuers",
    "spec.issuers[0].issuer",
    "spec.issuers[0].audiences",
    "spec.issuers[0].jwks",
    "spec.issuers[0].jwks.url",
    "spec.issuers[0].from[0].header",
    "spec.issuers[0].claimsToHeaders[0].claim",
    "spec.issuers[0].claimsToHeaders[0].header",
    "spec.parentRefs[0].group",
    "spec.parentRefs[0].name",
    "spec.rules[0].backendRefs[0].name",
    "spec.rules[0].backendRefs[0].port",
    "spec.rules[0].filters[0].type",
    "spec.rules[0].filters[0].requestMirror",
    "spec.rules[0].filters[0].requestMirror.backendRef",
    "spec.rules[0].filters[0].requestMirror.backendRef.name",
    "spec.rules[0].filters[0].requestMirror.backendRef.port",
    "spec.rules[0].filters[0].requestRedirect",
    "spec.rules[0].filters[0].requestRedirect.path.type",
    "spec.rules[0].filters[0].requestRedirect.path.replaceFullPath",
    "spec.rules[0].matches[0].headers[0].name",
    "spec.rules[0].matches[0].headers[0].value",
    "spec.rules[1].matches[0].headers[0].name",
    "spec.rules[1].matches[0].headers[0].value",
    "spec.rules[1].matches[0].queryParams[0].name",
    "spec.rules[1].matches[0].queryParams[0].value",
    "spec.rules[1].filters[0].type",
    "spec.rules[1].filters[0].requestHeaderModifier",
    "spec.rules[1].filters[0].requestHeaderModifier.set[0].name",
    "spec.rules[1].filters[0].requestHeaderModifier.set[0].value",
    "spec.rules[1].filters[0].requestHeaderModifier.add[0].name",
    "spec.rules[1].filters[0].requestHeaderModifier.add[0].value",
    "spec.rules[1].filters[1].type",
    "spec.rules[1].filters[1].requestMirror",
    "spec.rules[1].filters[1].requestMirror.backendRef",
    "spec.rules[1].filters[1].requestMirror.backendRef.name",
    "spec.rules[1].filters[1].requestMirror.backendRef.port",
    "spec.rules[1].filters[1].requestMirror.fraction.numerator",
    "spec.rules[1].filters[2].type",
    "spec.rules[1].filters[2].urlRewrite",
    "spec.rules[1].filters[2].urlRewrite.path.type",
    "spec.rules[1].filters[2].urlRewrite.path.replacePrefixMatch",
    "spec.rules[1].filters[3].type",
    "spec.rules[1].filters[3].cors",
    "spec.rules[1].backendRefs[0].name",
    "spec.rules[1].backendRefs[0].port",
    "spec.rules[1].backendRefs[0].filters[0].type",
    "spec.rules[1].backendRefs[0].filters[0].responseHeaderModifier",
    "spec.rules[1].backendRefs[0].filters[0].responseHeaderModifier.set[0].name",
    "spec.rules[1].backendRefs[0].filters[0].responseHeaderModifier.set[0].value",
    "spec.rules[1].backendRefs[0].filters[0].responseHeaderModifier.add[0].name",
    "spec.rules[1].backendRefs[0].filters[0].responseHeaderModifier.add[0].value",
];
/// Maps whose keys are the author's.
const OPEN: [&str; 3] = ["metadata.labels", "spec.selector", "spec.selector.matchLabels"];

/// What is said of a document, in a file after another document.
fn refused(text: &str) -> Vec<Refused> {
    let before = "apiVersion: v1\nkind: Namespace\nmetadata: {name: first}\n---\n";
    let content = Arc::new(FileContent::parse(&format!("{before}{text}\n")));
    let ledger = Ledger::default().next(&[(PathBuf::from("a.yaml"), content)].into());
    ledger.refused().to_vec()
}

/// Lines before the document in that file.
const OFFSET: usize = 4;

/// Every place in a document, as its path in words and as a JSON pointer.
fn places(value: &Value, path: &str, pointer: &str) -> Vec<(String, String)> {
    let child = |path: String, pointer: String, value: &Value| {
        let mut all = vec![(path.clone(), pointer.clone())];
        all.extend(places(value, &path, &pointer));
        all
    };
    match value {
        Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                child(path, format!("{pointer}/{}", key.replace('/', "~1")), value)
            })
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .flat_map(|(index, value)| child(format!("{path}[{index}]"), format!("{pointer}/{index}"), value))
            .collect(),
        _ => vec![],
    }
}

/// Pretty JSON is YAML with a line for every field.
fn text(document: &Value) -> String {
    serde_json::to_string_pretty(document).unwrap()
}

#[track_caller]
fn complete(said: &[Refused], text: &str) {
    assert!(!said.is_empty(), "was not refused:\n{text}");
    for one in said {
        assert!(one.line > OFFSET && one.line <= OFFSET + text.lines().count(), "{one}\n{text}");
        assert!(one.reason.len() > 5 && one.cure.len() > 5, "{one}\n{text}");
        assert!(one.to_string().len() < 2500, "{one}");
    }
}

#[test]
fn the_documents_themselves_are_good() {
    for document in documents() {
        assert_eq!(refused(&text(&document)), [], "{document:#}");
    }
}

#[test]
fn a_value_of_another_type_is_refused_at_its_line_by_its_path() {
    for document in documents() {
        for (path, pointer) in places(&document, "", "") {
            let mut wrong = document.clone();
            let place = wrong.pointer_mut(&pointer).unwrap();
            *place = if place.is_string() { json!(["@wrong"]) } else { json!("@wrong") };
            let text = text(&wrong);
            let said = refused(&text);
            complete(&said, &text);
            let line = OFFSET + text.lines().position(|line| line.contains("@wrong")).unwrap() + 1;
            assert!(
                said[0].line == line || said[0].line + 1 == line,
                "{} is not at {line}:\n{text}",
                said[0]
            );
            let (found, parent) = (&said[0].field, path.rsplit_once('.').map_or("", |(parent, _)| parent));
            assert!(found.starts_with(&path) || found == parent, "{path} is not {found}: {}", said[0]);
            if !["kind", "metadata", "metadata.name", "metadata.namespace"].contains(&path.as_str()) {
                assert!(said[0].object.as_ref().is_some_and(|object| object.contains('x')), "{}", said[0]);
            }
        }
    }
}

#[test]
fn a_field_that_is_missing_is_named_or_may_be_missing() {
    for document in documents() {
        for (path, pointer) in places(&document, "", "") {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let mut without = document.clone();
            match without.pointer_mut(parent).unwrap() {
                Value::Object(map) => drop(map.remove(&key.replace("~1", "/"))),
                _ => continue,
            }
            let text = text(&without);
            let said = refused(&text);
            if REQUIRED.contains(&path.as_str()) {
                complete(&said, &text);
                assert_eq!(said[0].field, path, "{}", said[0]);
            } else {
                assert_eq!(said, [], "{path} may be missing:\n{text}");
            }
        }
    }
}

#[test]
fn a_field_that_is_not_known_is_refused_with_those_that_are() {
    for document in documents() {
        let mut maps = places(&document, "", "");
        maps.push((String::new(), String::new()));
        for (path, pointer) in maps {
            let mut more = document.clone();
            let Value::Object(map) = more.pointer_mut(&pointer).unwrap() else { continue };
            if OPEN.contains(&path.as_str()) {
                continue;
            }
            map.insert("zzz".into(), json!(1));
            let text = text(&more);
            let said = refused(&text);
            complete(&said, &text);
            let field = if path.is_empty() { "zzz".to_owned() } else { format!("{path}.zzz") };
            assert_eq!(said[0].field, field, "{}", said[0]);
            assert!(
                said[0].reason.contains("no field 'zzz'") && said[0].cure.contains("use one of"),
                "{}",
                said[0]
            );
        }
    }
}

#[test]
fn a_field_that_stands_there_twice_is_refused_at_the_second() {
    for document in documents() {
        let text = text(&document);
        let lines: Vec<&str> = text.lines().collect();
        for (place, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("\": \"")) {
            let twice = line.trim_end_matches(',').to_owned() + ",";
            let mut more = lines.clone();
            more.insert(place, &twice);
            let said = refused(&more.join("\n"));
            complete(&said, &text);
            let key = line.trim().split('"').nth(1).unwrap();
            assert!(said[0].reason.contains(key), "{key}: {}", said[0]);
            assert_eq!(said[0].line, OFFSET + place + 2, "{}", said[0]);
        }
    }
}

/// A key that only an issuer may have.
const SECRET: &str = "{\"keys\": [{\"kty\": \"oct\", \"k\": \"AAAA\"}]}";

#[test]
fn what_is_too_long_or_too_many_is_refused_and_not_quoted_whole() {
    let long = "x".repeat(100_000);
    let many = |value: Value, count: usize| Value::Array(vec![value; count]);
    for (kind, pointer, value, part) in [
        (0, "/metadata/name", json!(long), "not a name"),
        (1, "/metadata/namespace", json!(long), "not a name"),
        (1, "/metadata/labels/app", json!(long), "not a label's value"),
        (1, "/metadata/labels", json!({ &long[..300]: "x" }), "not a label's key"),
        (1, "/metadata/labels/nodemesh.io~1enroll", json!(long), "not a label's value"),
        (1, "/spec/node", json!(long), "not a name"),
        (1, "/spec/uid", json!(long), "not a pod's uid"),
        (1, "/spec/uid", json!("../kubepods"), "not a pod's uid"),
        (1, "/spec/serviceAccount", json!(long), "not a name"),
        (1, "/spec/addresses", many(json!("10.0.0.1"), 17), "too many"),
        (1, "/spec/addresses/0", json!(long), "not an address"),
        (2, "/spec/clusterIP", json!(long), "not an address"),
        (2, "/spec/type", json!("ExternalName"), "not supported"),
        (2, "/spec/sessionAffinity", json!(long), "not an affinity"),
        (2, "/spec/sessionAffinityConfig/clientIP/timeoutSeconds", json!(86_401), "no time"),
        (2, "/spec/internalTrafficPolicy", json!("local"), "not a policy"),
        (2, "/spec/trafficDistribution", json!("PreferFar"), "not a distribution"),
        (2, "/spec/ports/0/name", json!(long), "at most 63"),
        (2, "/spec/ports/0/protocol", json!(long), "not a protocol"),
        (2, "/spec/ports/0/port", json!(70_000), ""),
        (2, "/spec/ports/0/port", json!(-1), ""),
        (2, "/spec/ports/0/targetPort", json!(0), "0 is not a port"),
        (2, "/spec/ports/0/targetPort", json!(long), "not a port"),
        (4, "/addressType", json!(long), "not a type of address"),
        (4, "/endpoints", many(json!({"addresses": ["10.0.0.1"]}), 1025), "too many"),
        (4, "/endpoints/0/addresses", json!([]), "has to have an address"),
        (4, "/endpoints/0/addresses/0", json!(long), "not an address"),
        (4, "/endpoints/0/zone", json!(long), "at most 253"),
        (4, "/ports", many(json!({"port": 1}), 1025), "too many"),
        (4, "/ports/0/name", json!(long), "at most 63"),
        (4, "/ports/0/port", json!(0), "0 is not a port"),
        (4, "/ports/0/protocol", json!(long), "not a protocol"),
        (2, "/spec/ports", many(json!({"port": 1}), 1025), "too many"),
        (3, "/spec/action", json!(long), "not an action"),
        (3, "/spec/rules", many(json!({}), 1025), "too many"),
        (3, "/spec/selector/matchLabels/app", json!(long), "not a label's value"),
        (3, "/spec/rules/0/from", many(json!({}), 1025), "too many"),
        (3, "/spec/rules/0/to", many(json!({}), 1025), "too many"),
        (3, "/spec/rules/0/from/0/identities/0", json!(long), ""),
        (3, "/spec/rules/0/from/0/namespaces/0", json!(long), "not a name"),
        (3, "/spec/rules/0/from/0/addressBlocks/0", json!(long), "not an address block"),
        (3, "/spec/rules/0/from/0/addressBlocks", many(json!("10.0.0.0/8"), 1025), "too many"),
        (3, "/spec/rules/0/to/0/ports/0", json!(65_536), ""),
        (5, "/metadata/creationTimestamp", json!("yesterday"), "not a time"),
        (5, "/spec/parentRefs/0/name", json!(long), "not a name"),
        (5, "/spec/parentRefs/0/port", json!(0), "0 is not a port"),
        (5, "/spec/parentRefs", many(http_route()["spec"]["parentRefs"][0].clone(), 2), "twice"),
        (5, "/spec/parentRefs", many(http_route()["spec"]["parentRefs"][0].clone(), 33), "too many"),
        (5, "/spec/rules", many(json!({}), 17), "too many"),
        (5, "/spec/rules", many(json!({"name": "a"}), 2), "another rule is called 'a'"),
        (5, "/spec/rules", many(json!({"matches": many(json!({}), 43)}), 3), "129 matches"),
        (5, "/spec/rules/1/name", json!(long), "not a name"),
        (5, "/spec/rules/1/matches", many(json!({}), 65), "too many"),
        (5, "/spec/rules/1/matches", many(json!({}), 2), "exactly one match"),
        (5, "/spec/rules/1/matches/0/path/type", json!("Exact"), "exactly one match"),
        (5, "/spec/rules/1/matches/0/path/type", json!("Prefix"), "not a type of match"),
        (5, "/spec/rules/1/matches/0/path/value", json!(format!("/{long}")), "too many"),
        (5, "/spec/rules/1/matches/0/path/value", json!("a"), "does not begin"),
        (5, "/spec/rules/1/matches/0/path/value", json!("/a//b"), "'//'"),
        (5, "/spec/rules/1/matches/0/path/value", json!("/a/.."), "ends with dots"),
        (5, "/spec/rules/1/matches/0/path/value", json!("/a b"), "no path has"),
        (5, "/spec/rules/1/matches/0/path/value", json!("/%2"), "no path has"),
        (5, "/spec/rules/1/matches/0/method", json!("get"), "not a method"),
        (5, "/spec/rules/1/matches/0/headers/0/name", json!("a b"), "not a name"),
        (5, "/spec/rules/1/matches/0/headers/0/value", json!(long), "too many"),
        (5, "/spec/rules/1/matches/0/headers", many(json!({"name": "a", "value": "b"}), 17), "too many"),
        (5, "/spec/rules/1/matches/0/queryParams/0/value", json!("(a"), "not a regular expression"),
        (5, "/spec/rules/1/matches/0/queryParams/0/value", json!(""), "matches nothing"),
        (5, "/spec/rules/1/filters", many(json!({"type": "CORS", "cors": {}}), 17), "too many"),
        (
            5,
            "/spec/rules/1/filters",
            many(json!({"type": "CORS", "cors": {}}), 2),
            "second filter of type CORS",
        ),
        (5, "/spec/rules/1/filters/0", json!({"type": "ExtensionRef", "extensionRef": {}}), "not supported"),
        (5, "/spec/rules/1/filters/0", json!({"type": "ExternalAuth", "externalAuth": {}}), "not supported"),
        (5, "/spec/rules/1/filters/0", json!({"type": "cors", "cors": {}}), "not a type of filter"),
        (5, "/spec/rules/1/filters/0/type", json!("CORS"), "this field is missing"),
        (
            5,
            "/spec/rules/1/filters/0",
            json!({"type": "CORS", "cors": {}, "extensionRef": {}}),
            "no such field",
        ),
        (5, "/spec/rules/0/filters/0/requestRedirect/statusCode", json!(300), "leads nowhere"),
        (5, "/spec/rules/0/filters/0/requestRedirect/scheme", json!("ftp"), "not a scheme"),
        (5, "/spec/rules/0/filters/0/requestRedirect/port", json!(0), "0 is not a port"),
        (5, "/spec/rules/0/filters/0/requestRedirect/hostname", json!("a:80"), "not a name"),
        (5, "/spec/rules/0/filters/0/requestRedirect/path/replaceFullPath", json!("/?a"), "no path has"),
        (
            5,
            "/spec/rules/1/filters/0/requestHeaderModifier/set/0/value",
            json!("a\nb"),
            "not a header's value",
        ),
        (5, "/spec/rules/1/filters/0/requestHeaderModifier/set/0/name", json!(":path"), "not a name"),
        (5, "/spec/rules/1/filters/0/requestHeaderModifier/remove/0", json!(""), "not a name"),
        (5, "/spec/rules/1/filters/1/requestMirror/fraction/denominator", json!(0), "0 is not a denominator"),
        (5, "/spec/rules/1/filters/1/requestMirror/fraction/numerator", json!(1001), "more than all"),
        (5, "/spec/rules/1/filters/3/cors/maxAge", json!(0), "no time"),
        (5, "/spec/rules/1/filters/3/cors/allowMethods", json!(["*", "GET"]), "everything already"),
        (5, "/spec/rules/1/filters/3/cors/allowOrigins/0", json!("example.org"), "not an origin"),
        (5, "/spec/rules/1/backendRefs", many(json!({"name": "a", "port": 1}), 17), "too many"),
        (5, "/spec/rules/1/backendRefs/0/weight", json!(1_000_001), "too heavy"),
        (5, "/spec/rules/1/backendRefs/0/port", json!(0), "0 is not a port"),
        (5, "/spec/rules/1/timeouts/request", json!(long), "not a duration"),
        (5, "/spec/rules/1/timeouts/backendRequest", json!("11s"), "longer than the request"),
        (5, "/spec/rules/1/retry/codes/0", json!(200), "no failure"),
        (5, "/spec/rules/1/retry/attempts", json!(33), "too many"),
        (5, "/spec/rules/1/sessionPersistence/sessionName", json!(long), "not a name"),
        (5, "/spec/rules/1/sessionPersistence/type", json!("Path"), "carries no session"),
        (5, "/spec/rules/1/sessionPersistence/type", json!("Header"), "no cookie"),
        (5, "/spec/rules/1/sessionPersistence/cookieConfig/lifetimeType", json!("Permanent"), "needs an end"),
        (6, "/spec/rules/0/matches/0/method/service", json!("shop/Cart"), "not the service of a call"),
        (6, "/spec/rules/0/matches/0/method", json!({}), "a service and a method"),
        (6, "/spec/rules/0/filters/0", json!({"type": "CORS", "cors": {}}), "not supported in GRPCRoutes"),
        (6, "/spec/rules/0/filters/0/requestMirror/percent", json!(101), "more than all"),
        (8, "/spec/ports/0", json!(65_536), ""),
        (8, "/spec/ports", json!([]), "is empty"),
        (8, "/spec/issuers", json!([]), "no issuer"),
        (8, "/spec/issuers", many(documents()[8]["spec"]["issuers"][0].clone(), 2), "already"),
        (8, "/spec/issuers", many(documents()[8]["spec"]["issuers"][0].clone(), 9), "too many"),
        (8, "/spec/issuers/0/issuer", json!(""), "is empty"),
        (8, "/spec/issuers/0/issuer", json!(long), "too long"),
        (8, "/spec/issuers/0/audiences", json!([]), "meant for others"),
        (8, "/spec/issuers/0/audiences", many(json!("a"), 65), "too many"),
        (8, "/spec/issuers/0/audiences/0", json!(""), "is empty"),
        (8, "/spec/issuers/0/jwks/url", json!("http://id.example/keys"), "no URL that keys are fetched from"),
        (8, "/spec/issuers/0/jwks/url", json!("https://me@id.example/keys"), "no URL"),
        (8, "/spec/issuers/0/jwks/url", json!("https:///keys"), "no URL"),
        (8, "/spec/issuers/0/jwks/url", json!(format!("https://id.example/{long}")), "no URL"),
        (8, "/spec/issuers/0/jwks/caBundle", json!("-----BEGIN"), "no certificate"),
        (8, "/spec/issuers/0/jwks/caBundle", json!(long), "too many"),
        (8, "/spec/issuers/0/jwks", json!({"inline": "{}", "url": "https://id.example"}), "both"),
        (8, "/spec/issuers/0/jwks", json!({"inline": "{}", "caBundle": ROOT}), "roots are for a URL"),
        (8, "/spec/issuers/0/jwks", json!({"inline": "{}"}), "no JSON object with a list 'keys'"),
        (8, "/spec/issuers/0/jwks", json!({"inline": "{\"keys\": []}"}), "none of its keys"),
        (8, "/spec/issuers/0/jwks", json!({"inline": SECRET}), "private part"),
        (8, "/spec/issuers/0/jwks", json!({"inline": long}), "too many"),
        (8, "/spec/issuers/0/from", json!([]), "is empty"),
        (8, "/spec/issuers/0/from", many(json!({"query": "a"}), 9), "too many"),
        (8, "/spec/issuers/0/from/0", json!({}), "does not say where the token is"),
        (8, "/spec/issuers/0/from/0", json!({"query": "a", "cookie": "b"}), "more than one"),
        (8, "/spec/issuers/0/from/0", json!({"query": "a", "prefix": "b"}), "a prefix is a header's"),
        (8, "/spec/issuers/0/from/0", json!({"query": "a b"}), "not a parameter's name"),
        (8, "/spec/issuers/0/from/0", json!({"cookie": "a;b"}), "not a cookie's name"),
        (8, "/spec/issuers/0/from/0/header", json!("a b"), "not a header's name"),
        (8, "/spec/issuers/0/from/0/header", json!("Cookie"), "for something else"),
        (8, "/spec/issuers/0/from/0/prefix", json!("Bearer "), "not one word"),
        (8, "/spec/issuers/0/forward", json!("strip"), "neither Keep nor Strip"),
        (8, "/spec/issuers/0/claimsToHeaders", json!([]), "is empty"),
        (8, "/spec/issuers/0/claimsToHeaders/0/claim", json!(""), "is empty"),
        (8, "/spec/issuers/0/claimsToHeaders/0/header", json!("host"), "for something else"),
        (8, "/spec/issuers/0/claimsToHeaders/0/header", json!("x_user"), "not a header that a claim"),
        (9, "/spec/ejection/failurePercent", json!(101), "too much"),
        (9, "/spec/ejection/minimumRequests", json!(0), "there is no share"),
        (9, "/spec/ejection/window", json!("2h"), "too long"),
        (9, "/spec/hedge/calls", many(json!("a.B/C"), 65), "too many"),
        (9, "/spec/hedge/calls/0", json!(long), "not the name of a call"),
        (3, "/spec/rules/0/to/0", json!({"claims": []}), "is empty"),
        (3, "/spec/rules/0/to/0", json!({"claims": [{"name": ""}]}), "is empty"),
        (
            3,
            "/spec/rules/0/to/0",
            json!({"notClaims": [{"name": "a", "values": ["a*b"]}]}),
            "one '*' may stand",
        ),
        (7, "/spec/from", json!([]), "nothing is granted"),
        (7, "/spec/to", many(json!({"group": "", "kind": "Service"}), 17), "too many"),
        (7, "/spec/from/0/namespace", json!(long), "not a name"),
    ] {
        let mut document = documents()[kind].clone();
        *document.pointer_mut(pointer).unwrap() = value;
        let text = text(&document);
        let said = refused(&text);
        complete(&said, &text);
        assert!(said[0].reason.contains(part), "{pointer}: {}", said[0]);
    }
}
