//! The controller's source `kube` against a real API server: what becomes of objects in it, what stays while it is away,
//! which objects it lets in, and who of two controllers writes their status.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod controller;
mod routes;
mod traffic;
mod users;

use std::{fs, path::Path, time::Duration};

use mesh_tests::{
    cluster::{
        Cluster,
        names::{Machine, Names},
    },
    netns, process, until, wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use controller::Controller;

/// How long a change may take until it is in force.
const SOON: Duration = Duration::from_secs(15);
/// How long pods may take until they are ready or gone.
const PODS: Duration = Duration::from_secs(120);
/// How long the API server may take to be back: it is started again, and the controller has to hear of it.
const AGAIN: Duration = Duration::from_secs(60);
/// After how long another controller writes when the one that did has died: what a Lease says, and a look at it.
const LEASE: Duration = Duration::from_secs(25);

/// Tries what a manifest says; what the API server said.
fn try_apply(cluster: &Cluster, manifest: &str) -> Result<String, String> {
    let mut command = cluster.command(&["apply", "--server-side", "--dry-run=server", "-f", "-"]);
    netns::run(&mut command, Some(manifest)).map_err(|error| format!("{error:#}"))
}

fn install_definitions(cluster: &Cluster) {
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    cluster.kubectl(&["apply", "-f", &crds.display().to_string()]).unwrap();
    cluster.kubectl(&["wait", "crd", "--all", "--for=condition=Established", "--timeout=30s"]).unwrap();
}

fn policy(name: &str, more: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop{more}}}\n\
         spec: {{action: Allow, rules: [{{to: [{{ports: [8080]}}]}}]}}\n"
    )
}

/// A namespace with a server whose port has a name, and a Service that asks by it.
fn shop(node: &str) -> String {
    let image = Cluster::tools_image();
    format!(
        r#"
apiVersion: v1
kind: Namespace
metadata: {{name: shop}}
---
apiVersion: v1
kind: Pod
metadata: {{namespace: shop, name: web, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
    - name: web
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /www && touch /www/ready && exec httpd -f -p 8080 -h /www"]
      ports: [{{name: http, containerPort: 8080}}]
      readinessProbe: {{httpGet: {{port: http, path: /ready}}, periodSeconds: 1, failureThreshold: 1}}
---
apiVersion: v1
kind: Pod
metadata: {{namespace: shop, name: of-its-node, labels: {{app: web}}}}
spec:
  nodeName: {node}
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers:
    - name: web
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sleep, "1000000"]
      ports: [{{name: http, containerPort: 18080}}]
---
apiVersion: v1
kind: Service
metadata: {{namespace: shop, name: web}}
spec:
  selector: {{app: web}}
  ports: [{{name: web, port: 80, targetPort: http}}]
---
apiVersion: v1
kind: Service
metadata: {{namespace: shop, name: elsewhere}}
spec: {{type: ExternalName, externalName: example.org}}
"#
    )
}

/// The process of the API server.
fn api_server(names: Names) -> Option<Pid> {
    let inhabitants = netns::inhabitants(&[names.machine(Machine::Control)]).unwrap();
    let is_it = |pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"kube-apiserver")
    };
    inhabitants.into_iter().find(is_it).map(Pid::from_raw)
}

fn objects_become_a_view(cluster: &Cluster, controller: &Controller) {
    // The API server's own Service has no selector, and leads out of the mesh: enrolled pods need it too.
    until("the API server's service has its endpoint", SOON, || {
        let endpoints = controller.endpoints("default/kubernetes");
        let outside =
            matches!(&endpoints[..], [one] if one.starts_with("outside ") && one.ends_with(":6443"));
        wait::holds(outside, || format!("{endpoints:?}"))
    });
    let node = cluster.nodes().unwrap().remove(0);
    cluster.apply(&shop(&node)).unwrap();
    let web = until("the pod is ready, and an endpoint by the number that its port's name has", PODS, || {
        let endpoints = controller.endpoints("shop/web");
        let [outside, web] = &endpoints[..] else { return Err(format!("{endpoints:?}")) };
        let expected = outside.starts_with("outside ")
            && outside.ends_with(":18080")
            && web.starts_with("shop/web ")
            && web.ends_with(":8080");
        wait::holds(expected, || format!("{endpoints:?}")).and_then(|()| {
            controller.row("workloads", "shop/web").ok_or_else(|| "no such workload".to_owned())
        })
    });
    assert_eq!((web["node"].as_str(), web["ready"].as_bool()), (Some(node.as_str()), Some(true)), "{web}");
    assert_eq!(web["enrolment"], "outside", "{web}");
    assert!(controller.row("workloads", "shop/of-its-node").is_none());
    assert!(controller.row("services", "shop/elsewhere").is_none());

    cluster.kubectl(&["label", "namespace", "shop", "nodemesh.io/enroll=true"]).unwrap();
    until("the label enrols the pod that runs", SOON, || {
        let row = controller.row("workloads", "shop/web").unwrap();
        wait::holds(row["enrolment"] == "pending", || row.to_string())
    });
    cluster.kubectl(&["--namespace", "shop", "exec", "web", "--", "rm", "/www/ready"]).unwrap();
    until("a pod that is not ready is no endpoint, and a workload still", PODS, || {
        let endpoints = controller.endpoints("shop/web");
        let row = controller.row("workloads", "shop/web").ok_or("no such workload")?;
        wait::holds(endpoints.len() == 1 && row["ready"] == false, || format!("{endpoints:?} {row}"))
    });
    cluster.kubectl(&["--namespace", "shop", "exec", "web", "--", "touch", "/www/ready"]).unwrap();
    until("it is an endpoint again", PODS, || {
        let endpoints = controller.endpoints("shop/web");
        wait::holds(endpoints.len() == 2, || format!("{endpoints:?}"))
    });
}

fn kinds_of_ours_are_followed_once_they_come(cluster: &Cluster, controller: &Controller) {
    assert!(controller.says("the cluster does not know the kind AuthorizationPolicy"));
    install_definitions(cluster);
    cluster.apply(&policy("good", "")).unwrap();
    until("a policy is in force though its kind came later", SOON, || {
        controller.row("policies", "shop/good").map(drop).ok_or_else(|| process::tail(&controller.log))
    });
}

fn a_bad_object_is_refused_alone_and_says_why(cluster: &Cluster, controller: &Controller) {
    cluster.apply(&policy("bad", ", labels: {nodemesh.io/enrol: \"true\"}")).unwrap();
    let condition = |name: &str, field: &str| {
        let path = format!("jsonpath={{.status.conditions[?(@.type==\"Accepted\")].{field}}}");
        let asked = ["--namespace", "shop", "get", "meshpolicy", name, "-o", &path];
        cluster.kubectl(&asked).map_err(|error| format!("{error:#}"))
    };
    until("the status of both says what became of them", LEASE, || {
        let said = (condition("good", "status")?, condition("bad", "status")?);
        wait::holds(said == ("True".into(), "False".into()), || format!("{said:?}"))
    });
    let described = cluster.kubectl(&["--namespace", "shop", "describe", "meshpolicy", "bad"]).unwrap();
    for part in
        ["metadata.labels.nodemesh.io/enrol", "means nothing here", "Cure:", "Nothing of it is in force"]
    {
        assert!(described.contains(part), "{described}");
    }
    assert!(
        controller.row("policies", "shop/bad").is_none() && controller.row("policies", "shop/good").is_some()
    );
    let listed = cluster.kubectl(&["--namespace", "shop", "get", "meshpolicy"]).unwrap();
    for column in ["ACTION", "ACCEPTED", "AGE", "Allow", "True", "False"] {
        assert!(listed.contains(column), "{listed}");
    }

    // The verdict follows the object, and names the generation that it is about.
    let change = ["--namespace", "shop", "patch", "meshpolicy", "good", "--type=merge", "-p"];
    cluster.kubectl(&[&change[..], &[r#"{"spec":{"action":"Deny"}}"#]].concat()).unwrap();
    until("the status is about the newest generation", SOON, || {
        let observed = condition("good", "observedGeneration")?;
        wait::holds(observed == "2", || observed.clone())
    });
    cluster.kubectl(&["--namespace", "shop", "label", "meshpolicy", "bad", "nodemesh.io/enrol-"]).unwrap();
    until("what was corrected is in force, and says so", SOON, || {
        let said = condition("bad", "status")?;
        let in_force = controller.row("policies", "shop/bad").is_some();
        wait::holds(said == "True" && in_force, || format!("{said} {in_force}"))
    });
}

fn the_api_server_refuses_what_is_wrong(cluster: &Cluster) {
    let policy = |spec: &str| {
        format!(
            "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: \
             {{{spec}}}\n"
        )
    };
    let workload = |spec: &str| {
        format!(
            "apiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata: {{name: w, namespace: shop}}\nspec: {{{spec}}}\n"
        )
    };
    let traffic = |spec: &str| {
        format!(
            "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: t, namespace: shop}}\nspec: \
             {{targetRefs: [{{kind: Service, name: web}}], {spec}}}\n"
        )
    };
    for (manifest, part) in [
        (traffic("balancing: {algorithm: Hash}"), "hashBy is for algorithm: Hash"),
        (traffic("limits: {connections: 1, pending: 1}"), "say how many with requests"),
        (traffic("faults: [{percent: 1}]"), "one of delay and abort"),
        (traffic("faults: [{abort: {}}]"), "one of status and grpcStatus"),
        (traffic("retries: {attempts: 33}"), "spec.retries.attempts"),
        (policy("rules: []"), "spec.action"),
        (policy("action: Audit"), "supported values"),
        (policy("action: Allow, actoin: Deny"), "actoin"),
        (policy("action: Allow, rules: [{from: []}]"), "spec.rules[0].from"),
        (policy("action: Allow, rules: [{from: [{identities: [shop/web]}]}]"), "identities[0]"),
        (policy("action: Allow, rules: [{from: [{addressBlocks: [10.0.0.1]}]}]"), "addressBlocks[0]"),
        (policy("action: Allow, rules: [{from: [{namespaces: [Shop]}]}]"), "namespaces[0]"),
        (policy("action: Allow, rules: [{to: [{ports: [70000]}]}]"), "ports[0]"),
        (policy("action: Allow, rules: [{to: [{ports: [http]}]}]"), "ports[0]"),
        (
            policy("action: Allow, selector: {matchExpressions: [{key: a, operator: In}]}"),
            "In and NotIn need values",
        ),
        (
            policy("action: Allow, selector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}"),
            "Exists and DoesNotExist",
        ),
        (workload("addresses: [10.1.0.1]"), "spec.node"),
        (workload("node: node-a, addresses: []"), "spec.addresses"),
        (workload("node: node-a, addresses: [10.1.0.1/24]"), "has to be an IPv4 or IPv6 address"),
        (workload("node: node-a, addresses: [127.0.0.1]"), "has to be an IPv4 or IPv6 address"),
        (workload("node: node-a, addresses: [10.1.0.1, 10.1.0.1]"), "uplicate"),
        (workload("node: node-a, addresses: [10.1.0.1], uid: somebodys"), "uid"),
    ] {
        let said = try_apply(cluster, &manifest).expect_err(&manifest);
        assert!(said.contains(part), "{manifest}\n{said}");
    }
    for manifest in [
        policy(
            "action: Deny, rules: [{from: [{notAddressBlocks: [\"fd00::/8\"]}], to: [{ports: [1, \"2-3\"]}]}]",
        ),
        workload("node: node-a, addresses: [10.1.0.1, \"fd01::1\"], serviceAccount: web, ready: false"),
    ] {
        try_apply(cluster, &manifest).unwrap();
    }
}

/// Every document of ours and of the Gateway API in the documentation.
fn every_example_is_let_in(cluster: &Cluster) {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operate");
    let mut found = 0;
    for page in fs::read_dir(docs).unwrap() {
        let page = page.unwrap().path();
        let text = fs::read_to_string(&page).unwrap();
        for block in text.split("```yaml\n").skip(1) {
            let block = block.split("```").next().unwrap();
            let is_followed = |it: &&str| {
                let groups = ["nodemesh.io", "gateway.networking.k8s.io"];
                groups.iter().any(|group| it.contains(&format!("apiVersion: {group}/")))
            };
            for document in block.split("\n---\n").filter(is_followed) {
                found += 1;
                try_apply(cluster, document).unwrap_or_else(|said| panic!("{}: {said}", page.display()));
            }
        }
    }
    assert!(found > 0, "the documentation has examples");
}

fn what_is_in_force_stays_while_the_api_server_is_away(cluster: &Cluster, controller: &Controller) {
    let Some(names) = cluster.names() else { return };
    let before = (controller.rows("workloads"), controller.rows("services"), controller.rows("policies"));
    let first = api_server(names).expect("the API server runs");
    kill(first, Signal::SIGKILL).unwrap();
    until("the controller notices", AGAIN, || {
        wait::holds(controller.says("watching Kubernetes failed"), || process::tail(&controller.log))
    });
    let now = || (controller.rows("workloads"), controller.rows("services"), controller.rows("policies"));
    assert_eq!(now(), before);
    until("another API server answers", AGAIN, || {
        let ready = cluster.kubectl(&["get", "--raw", "/readyz"]).map_err(|error| format!("{error:#}"))?;
        let pid = api_server(names);
        wait::holds(ready == "ok" && pid.is_some_and(|pid| pid != first), || format!("{ready} {pid:?}"))
    });
    cluster.kubectl(&["label", "namespace", "shop", "nodemesh.io/enroll-"]).unwrap();
    until("what changes then is followed", AGAIN, || {
        let row = controller.row("workloads", "shop/web").ok_or("no such workload")?;
        wait::holds(row["enrolment"] == "outside", || row.to_string())
    });
    assert_eq!(controller.rows("policies"), before.2);
    let gone = ["--namespace", "shop", "delete", "pod", "web", "--wait=false"];
    cluster.kubectl(&gone).unwrap();
    until("a pod that goes is no workload any more", PODS, || {
        let row = controller.row("workloads", "shop/web");
        wait::holds(row.is_none(), || format!("{row:?}"))
    });
}

#[test]
fn a_cluster_is_followed_and_stays_in_force_while_its_api_server_is_away() {
    let cluster = Cluster::at_hand().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let controller = Controller::start(&cluster, directory.path(), "one");
    objects_become_a_view(&cluster, &controller);
    kinds_of_ours_are_followed_once_they_come(&cluster, &controller);
    the_api_server_refuses_what_is_wrong(&cluster);
    routes::are_followed_once_their_kinds_come_and_say_what_became_of_them(&cluster, &controller);
    traffic::policies_are_looked_up_and_say_what_became_of_them(&cluster, &controller);
    users::policies_on_them_say_what_became_of_them(&cluster, &controller);
    every_example_is_let_in(&cluster);
    a_bad_object_is_refused_alone_and_says_why(&cluster, &controller);
    what_is_in_force_stays_while_the_api_server_is_away(&cluster, &controller);
}

#[test]
fn of_two_controllers_one_writes_status_and_the_other_does_once_it_is_dead() {
    const BEGINS: &str = "this controller writes status from now on";
    let cluster = Cluster::at_hand().unwrap();
    let directory = tempfile::tempdir().unwrap();
    install_definitions(&cluster);
    cluster.kubectl(&["create", "namespace", "shop"]).unwrap();
    let mut first = Controller::start(&cluster, directory.path(), "first");
    until("the first one writes", LEASE, || wait::holds(first.says(BEGINS), || process::tail(&first.log)));
    let second = Controller::start(&cluster, directory.path(), "second");
    let accepted = |name: &str| {
        let path = "jsonpath={.status.conditions[?(@.type==\"Accepted\")].status}";
        let said = cluster.kubectl(&["--namespace", "shop", "get", "meshpolicy", name, "-o", path]);
        let said = said.map_err(|error| format!("{error:#}"))?;
        wait::holds(said == "True", || format!("{said:?}"))
    };
    let wrote = |controller: &Controller, name: &str| {
        let log = fs::read_to_string(&controller.log).unwrap();
        log.lines()
            .filter(|line| line.contains("status written") && line.contains(&format!("shop/{name}")))
            .count()
    };
    let holder = || {
        let lease = ["get", "lease", "nodemesh-controller", "-o", "jsonpath={.spec.holderIdentity}"];
        cluster.kubectl(&lease).unwrap()
    };

    cluster.apply(&policy("one", "")).unwrap();
    until("its status is written", SOON, || accepted("one"));
    assert_eq!((wrote(&first, "one"), wrote(&second, "one")), (1, 0));
    assert!(!second.says(BEGINS));
    let held = holder();

    first.kill();
    cluster.apply(&policy("two", "")).unwrap();
    until("the other one writes within the lease", LEASE, || accepted("two"));
    assert_ne!(holder(), held);
    assert_eq!((wrote(&first, "two"), wrote(&second, "one"), wrote(&second, "two")), (0, 0, 1));

    // One that ends in order leaves the lease, and nobody waits.
    let third = Controller::start(&cluster, directory.path(), "third");
    let Controller { program, log, .. } = second;
    program.unwrap().stop(SOON).unwrap();
    until("the third one has it at once", Duration::from_secs(8), || {
        wait::holds(third.says(BEGINS), || format!("{}\n{}", process::tail(&log), process::tail(&third.log)))
    });
    cluster.apply(&policy("three", "")).unwrap();
    until("its status is written", SOON, || accepted("three"));
    assert_eq!(wrote(&third, "three"), 1);
}
