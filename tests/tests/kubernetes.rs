//! Nodemesh on a real Kubernetes, as its users have it: installed from the manifests, steered by labels, looked at by
//! kubectl, on the wire and in what the agents say.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use mesh_tests::{
    cluster::{
        Cluster,
        shop::{PODS, SECRET, SOON, Shop},
    },
    until, wait,
};

#[test]
fn a_label_puts_running_pods_into_the_mesh_and_takes_them_out() {
    let cluster = Cluster::up(&[]).unwrap();
    let shop = Shop::open(&cluster, "shop");
    until("the service answers", SOON, || shop.ask("client"));
    assert!(shop.is_readable().unwrap(), "without a mesh everybody reads along");
    cluster.install().unwrap();
    assert!(shop.is_readable().unwrap(), "installing changes nothing for pods without a label");

    // Running pods, without a restart.
    let born = |pod: &str| {
        let what = ".metadata.uid}{.status.containerStatuses[*].restartCount";
        shop.field(&format!("pod/{pod}"), what)
    };
    let before = [born("web"), born("client")];
    shop.label_namespace("nodemesh.io/enroll=true");
    shop.await_captured("web");
    shop.await_captured("client");
    shop.await_meshed();
    assert_eq!([born("web"), born("client")], before);
    let (web, client) = (shop.identity("web"), shop.identity("client"));
    let line = shop.await_line("the connection, at its destination", |line| {
        line["direction"] == "inbound" && line["source"]["workload"] == "shop/client"
    });
    assert!(line.to_string().contains(&web) && line.to_string().contains(&client), "{line}");

    // A pod's own word wins over its namespace's.
    shop.label(&["pod", "client"], "nodemesh.io/enroll=false");
    shop.await_plain();
    shop.label(&["pod", "client"], "nodemesh.io/enroll-");
    shop.await_captured("client");
    shop.await_meshed();

    // A strict namespace takes nothing in the clear, but the kubelet's probes.
    shop.label_namespace("nodemesh.io/mode=strict");
    shop.await_meshed();
    shop.await_ready();
    everything_works_on(&shop);

    shop.label_namespace("nodemesh.io/enroll-");
    shop.await_plain();
    for node in cluster.nodes().unwrap() {
        until("nothing is captured", SOON, || {
            let metrics = cluster.agent_metrics(&node).map_err(|e| format!("{e:#}"))?;
            let enrolled = metrics.sum("nodemesh_enrolled_workloads", &[]);
            wait::holds(enrolled == 0.0, || format!("{enrolled} on {node}"))
        });
    }
}

/// What people and the kubelet do with a pod: exec, logs, port-forward, probes.
fn everything_works_on(shop: &Shop<'_>) {
    let nodes = shop.cluster.nodes().unwrap();
    let probes = [
        ("tcp", "      livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 1}"),
        ("exec", "      livenessProbe: {exec: {command: [\"true\"]}, periodSeconds: 1, failureThreshold: 1}"),
        (
            "http",
            "      livenessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1, failureThreshold: 1}",
        ),
    ];
    for (name, probe) in probes {
        shop.cluster.apply(&shop.server(name, &nodes[0], probe)).unwrap();
    }
    shop.await_ready();
    for (name, _) in probes {
        shop.await_captured(name);
    }
    assert_eq!(shop.kubectl(&["exec", "web", "--", "echo", "hello"]), "hello\n");
    shop.kubectl(&["logs", "web"]);
    shop.await_ready();
    for (name, _) in probes {
        let restarts = shop.field(&format!("pod/{name}"), ".status.containerStatuses[*].restartCount");
        assert_eq!(restarts, "0", "{name}: a probe failed");
        shop.kubectl(&["delete", "pod", name, "--wait=false"]);
    }
}

/// A namespace that is enrolled before its pods are made, whose first act, in an init container, is a connection.
#[test]
fn the_first_connection_of_a_new_pod_is_meshed_and_not_lost() {
    let cluster = Cluster::up(&[]).unwrap();
    cluster.install().unwrap();
    let shop = Shop::open(&cluster, "early");
    shop.label_namespace("nodemesh.io/enroll=true");
    shop.await_captured("web");
    shop.await_meshed();
    let (image, node) = (Cluster::tools_image(), &cluster.nodes().unwrap()[1]);
    let url = format!("http://{}/", shop.field("service/web", ".spec.clusterIP"));
    let ask = format!("timeout 30 wget -q -O - {url}");
    let mut wire = cluster.capture().unwrap();
    for number in 0..3 {
        let name = format!("early-{number}");
        cluster
            .apply(&format!(
                r#"
apiVersion: v1
kind: Pod
metadata: {{namespace: early, name: {name}}}
spec:
  nodeName: {node}
  serviceAccountName: client
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  initContainers:
    - {{name: first, image: "{image}", imagePullPolicy: IfNotPresent, command: [sh, -c, "{ask}"]}}
  containers:
    - {{name: then, image: "{image}", imagePullPolicy: IfNotPresent, command: [sh, -c, "{ask}"]}}
"#
            ))
            .unwrap();
        let done = "--for=jsonpath={.status.phase}=Succeeded";
        if let Err(error) = shop.try_kubectl(&["wait", &format!("pod/{name}"), done, PODS]) {
            panic!("{error}\n{}\n{}", shop.kubectl(&["describe", "pod", &name]), cluster.state_of_mesh());
        }
        for container in ["first", "then"] {
            assert_eq!(shop.kubectl(&["logs", &name, "-c", container]).trim(), SECRET);
        }
    }
    let readable = wire.plaintext(SECRET.as_bytes()).unwrap();
    assert!(readable.is_empty(), "{readable:?}");
    let held = cluster.agent_metrics(node).unwrap().sum("nodemesh_holds_total", &[("outcome", "captured")]);
    assert!(held >= 3.0, "{held} holds ended by capture");
}
