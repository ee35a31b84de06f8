//! Routes in a cluster: followed once it knows the Gateway API, and told of in their status beside what others say there.

use mesh_tests::{cluster::Cluster, process, until, wait};
use serde_json::{Value, json};

use crate::{AGAIN, LEASE, SOON, controller::Controller};

/// Services of two namespaces, and routes for them: one that is good, and one of which nothing is.
const MANIFESTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: bank}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: accounts, namespace: bank}
spec: {ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split, namespace: shop}
spec:
  parentRefs:
  - {name: some-gateway}
  - {group: "", kind: Service, name: front, sectionName: http}
  rules:
  - matches: [{path: {type: PathPrefix, value: /a}}]
    backendRefs: [{name: front, port: 80, weight: 3}, {name: accounts, namespace: bank, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: calls, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: front, port: 80}, {group: "", kind: Service, name: none}]
  rules: [{filters: [{type: ExtensionRef, extensionRef: {group: a.example.com, kind: Some, name: x}}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: connections, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: front, port: 80}]
  rules: [{backendRefs: [{name: front, port: 80, weight: 3}, {name: none, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: named, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: accounts, namespace: bank}]
  hostnames: ["*.bank.example"]
  rules: [{backendRefs: [{name: accounts, namespace: bank, port: 80}]}]
"#;

const OLDER: &str = r#"
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: {name: older, namespace: bank}
spec:
  parentRefs: [{group: "", kind: Service, name: accounts}]
  rules: [{backendRefs: [{name: accounts, port: 80}]}]
"#;

const GRANT: &str = r#"
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: from-shop, namespace: bank}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]
  to: [{group: "", kind: Service}]
"#;

/// What another controller says in the same list.
fn say_as_another(cluster: &Cluster) {
    let parent = json!({"name": "some-gateway", "group": "gateway.networking.k8s.io", "kind": "Gateway"});
    let condition = json!({"type": "Accepted", "status": "True", "reason": "Accepted", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let entry =
        json!({"parentRef": parent, "controllerName": "example.net/gateways", "conditions": [condition]});
    let status = json!({"status": {"parents": [entry]}}).to_string();
    let patch =
        ["--namespace", "shop", "patch", "httproute", "split", "--subresource=status", "--type=merge", "-p"];
    cluster.kubectl(&[&patch[..], &[&status]].concat()).unwrap();
}

/// `CONTROLLER PARENT: CONDITION=STATUS REASON, ...` of each entry. The name is one in `shop`, or has its namespace.
fn said(cluster: &Cluster, kind: &str, name: &str) -> Result<Vec<String>, String> {
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    let asked = ["--namespace", namespace, "get", kind, name, "-o", "json"];
    let object = cluster.kubectl(&asked).map_err(|error| format!("{error:#}"))?;
    let object: Value = serde_json::from_str(&object).map_err(|error| error.to_string())?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let condition =
        |it: &Value| format!("{}={} {}", text(&it["type"]), text(&it["status"]), text(&it["reason"]));
    let entry = |it: &Value| {
        let conditions: Vec<String> = it["conditions"].as_array().unwrap().iter().map(condition).collect();
        format!(
            "{} {}: {}",
            text(&it["controllerName"]),
            text(&it["parentRef"]["name"]),
            conditions.join(", ")
        )
    };
    Ok(object["status"]["parents"].as_array().into_iter().flatten().map(entry).collect())
}

fn until_said(
    cluster: &Cluster,
    controller: &Controller,
    what: &str,
    (kind, name): (&str, &str),
    expected: &[&str],
) {
    until(what, LEASE, || {
        let said = said(cluster, kind, name)?;
        wait::holds(said == expected, || format!("{said:?}\n{}", process::tail(&controller.log)))
    });
}

pub(crate) fn are_followed_once_their_kinds_come_and_say_what_became_of_them(
    cluster: &Cluster,
    controller: &Controller,
) {
    assert!(controller.says("the cluster does not know the kind HTTPRoute"));
    cluster.bring_up(&["--gateway-api"]).unwrap();
    cluster.apply(MANIFESTS).unwrap();
    say_as_another(cluster);
    let theirs = "example.net/gateways some-gateway: Accepted=True Accepted";
    let accepted = "nodemesh.io/controller front: Accepted=True Accepted";
    let refused = |name: &str| format!("nodemesh.io/controller {name}: Accepted=False UnsupportedValue");
    let split = ("httproute", "split");
    let not_permitted = format!("{accepted}, ResolvedRefs=False RefNotPermitted");
    until_said(
        cluster,
        controller,
        "a route is accepted, with a reference that may not be",
        split,
        &[theirs, &not_permitted],
    );
    let (front, none) = (refused("front"), refused("none"));
    until_said(cluster, controller, "one that is refused says so", ("grpcroute", "calls"), &[&front, &none]);
    let conflicted =
        "nodemesh.io/controller front: Accepted=False Conflicted, ResolvedRefs=False BackendNotFound";
    let of_connections = ("tcproute", "connections");
    until_said(cluster, controller, "requests come before connections", of_connections, &[conflicted]);
    let named = "nodemesh.io/controller accounts: Accepted=True Accepted, ResolvedRefs=True ResolvedRefs";
    until_said(cluster, controller, "a consumer's route is accepted", ("tlsroute", "named"), &[named]);
    let row = controller.row("routes", "shop/split").unwrap();
    assert_eq!(row["parents"][0]["service"], "shop/front:http", "{row}");
    assert!(controller.row("routes", "shop/calls").is_none());

    cluster.apply(GRANT).unwrap();
    let resolved = format!("{accepted}, ResolvedRefs=True ResolvedRefs");
    until_said(cluster, controller, "the grant permits it", split, &[theirs, &resolved]);
    let patch = ["--namespace", "shop", "patch", "httproute", "split", "--type=json", "-p"];
    let without = r#"[{"op": "remove", "path": "/spec/parentRefs/1"}]"#;
    cluster.kubectl(&[&patch[..], &[without]].concat()).unwrap();
    until_said(cluster, controller, "what is no parent any more has no entry of ours", split, &[theirs]);
    let accepted = format!("{accepted}, ResolvedRefs=False BackendNotFound");
    until_said(cluster, controller, "nothing comes before connections now", of_connections, &[&accepted]);
    until("and it is in force nowhere", SOON, || {
        let row = controller.row("routes", "shop/split");
        wait::holds(row.is_none(), || format!("{row:?}"))
    });
    are_followed_in_the_version_that_is_served(cluster, controller);
}

/// With the experimental definitions of an older Gateway API, which have TCPRoutes of v1alpha2 alone.
fn are_followed_in_the_version_that_is_served(cluster: &Cluster, controller: &Controller) {
    let serve = |newest: bool| {
        let version = |place: u8, served: bool| json!({"op": "replace", "path": format!("/spec/versions/{place}/served"), "value": served});
        let patch = json!([version(0, newest), version(1, !newest)]).to_string();
        let definition = "tcproutes.gateway.networking.k8s.io";
        cluster.kubectl(&["patch", "crd", definition, "--type=json", "-p", &patch]).unwrap();
    };
    serve(false);
    until("the cluster takes a route of the older version", AGAIN, || {
        cluster.apply(OLDER).map(drop).map_err(|error| format!("{error:#}"))
    });
    let older = ("tcproutes.v1alpha2.gateway.networking.k8s.io", "bank/older");
    let accepted = "nodemesh.io/controller accounts: Accepted=True Accepted, ResolvedRefs=True ResolvedRefs";
    until_said(
        cluster,
        controller,
        "a route of the older version is in force and says so",
        older,
        &[accepted],
    );
    assert!(controller.row("routes", "bank/older").is_some());
    // And newer definitions are applied.
    serve(true);
    until("the cluster takes a route of the newer version again", AGAIN, || {
        let newer = OLDER.replace("v1alpha2", "v1").replace("name: older", "name: newer");
        cluster.apply(&newer).map(drop).map_err(|error| format!("{error:#}"))
    });
    let newer = ("tcproutes.v1.gateway.networking.k8s.io", "bank/newer");
    until_said(cluster, controller, "a route of the newer version is, too", newer, &[accepted]);
    assert!(controller.row("routes", "bank/older").is_some());
}
