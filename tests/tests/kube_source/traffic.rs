//! TrafficPolicies in a cluster: looked up for Services and routes, and told of in their status.

use mesh_tests::{cluster::Cluster, process, until, wait};

use crate::{LEASE, controller::Controller};

/// One policy that is in force for a Service and a route, one that says some of the same, and one for nobody.
const POLICIES: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: paid, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: front}]
  rules: [{backendRefs: [{name: front, port: 80}]}]
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: front, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: front, sectionName: http}, {kind: HTTPRoute, name: paid}]
  retries: {attempts: 3, codes: [503]}
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: nobody, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: nobody}]
  timeouts: {request: 1s}
"#;
/// A port whose connections are routed, and what is said of requests to it, by itself and by its namespace.
const ROUTED: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: back, namespace: shop}
spec: {ports: [{name: tcp, port: 90}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: back, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: back, port: 90}]
  rules: [{backendRefs: [{name: back, port: 90}]}]
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: of-port, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: back, sectionName: tcp}]
  timeouts: {request: 1s}
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: of-namespace, namespace: shop}
spec:
  targetRefs: [{kind: Namespace, name: shop}]
  faults: [{percent: 0, delay: 1s}]
"#;
/// Made after the first one.
const NEWER: &str = r#"
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: a-newer, namespace: shop}
spec:
  targetRefs: [{kind: HTTPRoute, name: paid}]
  retries: {attempts: 1}
"#;

pub(crate) fn policies_are_looked_up_and_say_what_became_of_them(cluster: &Cluster, controller: &Controller) {
    let until_said = |name: &str, expected: &str| {
        let what = format!("the policy {name} says {expected}");
        until(&what, LEASE, || {
            let path = r#"jsonpath={range .status.conditions[*]}{.status} {.reason}: {.message}{end}"#;
            let asked = ["--namespace", "shop", "get", "meshtraffic", name, "-o", path];
            let said = cluster.kubectl(&asked).map_err(|error| format!("{error:#}"))?;
            wait::holds(said.starts_with(expected), || {
                format!("{said:?}\n{}", process::tail(&controller.log))
            })
        });
    };
    cluster.apply(POLICIES).unwrap();
    until_said("front", "True Accepted");
    until_said("nobody", "False TargetNotFound: Service nobody: there is none");
    // `metadata.creationTimestamp` has seconds: within one the first name counts, which is this one's.
    let created = |name: &str| {
        let asked = [
            "--namespace",
            "shop",
            "get",
            "meshtraffic",
            name,
            "-o",
            "jsonpath={.metadata.creationTimestamp}",
        ];
        cluster.kubectl(&asked).unwrap()
    };
    cluster.apply(NEWER).unwrap();
    let (older, newer) =
        if created("front") == created("a-newer") { ("a-newer", "front") } else { ("front", "a-newer") };
    until_said(older, "True Accepted");
    until_said(newer, &format!("False Conflicted: HTTPRoute paid: retries is said by shop/{older}"));
    let row = controller.row("traffic", "shop/front").unwrap();
    assert_eq!(row["targets"][0]["target"], "Service front, 'http'", "{row}");
    cluster.kubectl(&["--namespace", "shop", "delete", "meshtraffic", older]).unwrap();
    until_said(newer, "True Accepted");

    // Of connections that are routed nothing is read: policies for the port, and for all of its namespace, say so.
    cluster.apply(ROUTED).unwrap();
    let not_read = "True Accepted: It is in force, but for what RequestsRead says.False ConnectionsRouted: Service shop/back, \
                    port 90: timeouts is not in force, as TCPRoute shop/back routes its connections";
    until_said("of-port", not_read);
    until_said("of-namespace", &not_read.replace("timeouts", "faults"));
    cluster.kubectl(&["--namespace", "shop", "delete", "tcproute", "back"]).unwrap();
    until_said("of-port", "True Accepted: It is in force.");
    until("nothing more is said of it", LEASE, || {
        let path = "jsonpath={.items[*].status.conditions[*].type}";
        let asked = ["--namespace", "shop", "get", "meshtraffic", "of-port", "of-namespace", "-o", path];
        let said = cluster.kubectl(&asked).map_err(|error| format!("{error:#}"))?;
        wait::holds(!said.contains("RequestsRead"), || said.clone())
    });
    // Others' policies of the namespace are to be alone again.
    cluster.kubectl(&["--namespace", "shop", "delete", "meshtraffic", "of-namespace"]).unwrap();
}
