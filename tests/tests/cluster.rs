//! The Kubernetes that tests run on: it works, it is made anew after a crash, and nothing of it stays.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{collections::BTreeSet, fs, path::Path, process::Command, time::Duration};

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

/// How long pods may take until they are ready, or have ended.
const PODS: &str = "--timeout=120s";
/// How long a program may take until it is started again.
const AGAIN: Duration = Duration::from_secs(30);
/// What the kubelet would set for the whole machine.
const SYSCTLS: [&str; 3] = ["kernel/panic", "kernel/panic_on_oops", "vm/overcommit_memory"];

/// A server on the first node, a client on the second, and a service between them.
fn shop(nodes: &[String], namespace: &str) -> String {
    let image = Cluster::tools_image();
    let (server, client) = (&nodes[0], &nodes[1]);
    format!(
        r#"
apiVersion: v1
kind: Namespace
metadata: {{name: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{namespace: {namespace}, name: web, labels: {{app: web}}}}
spec:
  nodeName: {server}
  terminationGracePeriodSeconds: 0
  containers:
    - name: web
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /www && echo from web on $NODE > /www/index.html && exec httpd -f -p 8080 -h /www"]
      env: [{{name: NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}]
      readinessProbe: {{httpGet: {{port: 8080, path: /}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Pod
metadata: {{namespace: {namespace}, name: client}}
spec:
  nodeName: {client}
  terminationGracePeriodSeconds: 0
  containers:
    - name: client
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sleep, "1000000"]
---
apiVersion: v1
kind: Service
metadata: {{namespace: {namespace}, name: web}}
spec:
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: 8080}}]
"#
    )
}

/// Makes the shop, asks the service from the other node, and removes it.
fn a_service_answers_across_nodes(cluster: &Cluster) {
    let namespace = format!("nodemesh-test-{}", std::process::id());
    let nodes = cluster.nodes().unwrap();
    cluster.apply(&shop(&nodes, &namespace)).unwrap();
    let inside = ["--namespace", &namespace];
    let ready = ["wait", "pod", "--all", "--for=condition=Ready", PODS];
    cluster.kubectl(&[&ready[..], &inside].concat()).unwrap();
    let address = ["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"];
    let address = cluster.kubectl(&[&address[..], &inside].concat()).unwrap();
    let url = format!("http://{address}/");
    let ask = ["exec", "client", "--", "timeout", "5", "wget", "-q", "-O", "-", &url];
    // kube-proxy learns of the endpoint a moment after the pod is ready.
    let answer = until("the service answers", AGAIN, || {
        cluster.kubectl(&[&inside[..], &ask].concat()).map_err(|e| format!("{e:#}"))
    });
    assert_eq!(answer, format!("from web on {}\n", nodes[0]));
    cluster.kubectl(&["delete", "namespace", &namespace, PODS]).unwrap();
}

/// Runs the programs of our images on both nodes; returns what they said.
fn run_our_images(cluster: &Cluster) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut said = String::new();
    for (node, image, program) in [
        ("node-a", "agent", "/usr/bin/mesh-agent"),
        ("node-b", "agent", "/usr/bin/mesh-agent"),
        ("node-a", "controller", "/usr/bin/mesh-controller"),
        ("node-b", "controller", "/usr/bin/meshctl"),
    ] {
        let name = format!("{}-{node}", program.rsplit('/').next().unwrap());
        cluster
            .apply(&format!(
                r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: {node}
  restartPolicy: Never
  containers:
    - name: it
      image: nodemesh.local/{image}:{version}
      imagePullPolicy: Never
      command: [{program}, --version]
"#
            ))
            .unwrap();
        let ended = "--for=jsonpath={.status.phase}=Succeeded";
        cluster.kubectl(&["wait", &format!("pod/{name}"), ended, PODS]).unwrap();
        said += &cluster.kubectl(&["logs", &name]).unwrap();
    }
    said
}

/// What of a cluster is on this machine, each thing named. Found by looking everywhere, not by what `down` knows.
fn on_this_machine(names: Names) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mark = names.prefix();
    let home = names.home().display().to_string();
    let addresses = format!("10.{}.", names.address(0, 0).octets()[1]);
    let is_its = |text: &str| {
        [&format!("{mark}-"), &home, &addresses].into_iter().any(|sign| text.contains(sign.as_str()))
            || text.split(|c: char| !c.is_alphanumeric()).any(|word| word == mark)
    };
    for (what, program) in [
        ("namespace", &["ip", "netns", "list"][..]),
        ("link", &["ip", "-o", "link"]),
        ("address", &["ip", "-o", "address"]),
        ("route", &["ip", "route", "show", "table", "all"]),
        ("rule of iptables", &["iptables-save"]),
        ("rule of nftables", &["nft", "list", "ruleset"]),
    ] {
        let said = netns::run(Command::new(program[0]).args(&program[1..]), None).unwrap();
        found.extend(said.lines().filter(|line| is_its(line)).map(|line| format!("{what}: {line}")));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(mounts.lines().filter(|line| is_its(line)).map(|line| format!("mount: {line}")));
    for entry in fs::read_dir("/proc").unwrap() {
        let process = entry.unwrap().path();
        let told =
            ["cmdline", "cgroup", "mountinfo"].map(|file| fs::read(process.join(file)).unwrap_or_default());
        let its = told.iter().any(|text| is_its(&String::from_utf8_lossy(text).replace('\0', " ")));
        let itself = process.ends_with(std::process::id().to_string());
        let is_process = process.file_name().unwrap().to_string_lossy().parse::<u32>().is_ok();
        if its && is_process && !itself {
            found.insert(format!("process: {}: {}", process.display(), String::from_utf8_lossy(&told[0])));
        }
    }
    cgroups(Path::new("/sys/fs/cgroup"), &mark, &mut found);
    if names.home().exists() {
        found.insert(format!("directory: {home}"));
    }
    found
}

fn cgroups(directory: &Path, mark: &str, found: &mut BTreeSet<String>) {
    // What other tests of this machine have may go while this looks.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            if entry.file_name().to_string_lossy().starts_with(&format!("{mark}-")) {
                found.insert(format!("cgroup: {}", path.display()));
            }
            cgroups(&path, mark, found);
        }
    }
}

fn sysctls() -> Vec<String> {
    SYSCTLS.map(|key| fs::read_to_string(Path::new("/proc/sys").join(key)).unwrap()).into()
}

/// The process of a node's kubelet.
fn kubelet(names: Names) -> Option<Pid> {
    let inhabitants = netns::inhabitants(&[names.machine(Machine::Node(0))]).unwrap();
    let is_kubelet = |pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"kubelet")
    };
    inhabitants.into_iter().find(is_kubelet).map(Pid::from_raw)
}

#[test]
fn pods_of_a_cluster_reach_a_service_on_the_other_node_and_nothing_stays_of_it() {
    let before = sysctls();
    let cluster = Cluster::at_hand().unwrap();
    a_service_answers_across_nodes(&cluster);
    let Some(names) = cluster.names() else { return };

    assert!(cluster.bring_up(&[]).unwrap().contains("the cluster is up"), "up twice is fine");
    cluster.load_images().unwrap();
    let said = run_our_images(&cluster);
    for program in ["mesh-agent", "mesh-controller", "meshctl"] {
        assert!(said.contains(&format!("{program} {}", env!("CARGO_PKG_VERSION"))), "{said}");
    }

    // As on any node, a kubelet that dies is started again.
    let first = kubelet(names).expect("the kubelet runs");
    kill(first, Signal::SIGKILL).unwrap();
    until("another kubelet runs", AGAIN, || {
        let now = kubelet(names);
        wait::holds(now.is_some_and(|pid| pid != first), || format!("there is {now:?}"))
    });

    assert!(
        !on_this_machine(names).is_empty(),
        "what looks for traces must find those of a cluster that is up"
    );
    cluster.down().unwrap();
    assert_eq!(on_this_machine(names), BTreeSet::new());
    assert_eq!(sysctls(), before, "the machine's settings are as they were");
}

#[test]
fn a_cluster_that_crashed_is_made_anew_also_with_bridges_and_nftables() {
    let options = ["--cni", "bridge", "--proxy", "nftables"];
    let cluster = Cluster::up(&options).unwrap();
    let names = cluster.names().expect("it is ours");
    cluster.kubectl(&["create", "namespace", "of-the-first"]).unwrap();
    // A node and the control plane, cut down without a chance to clean up; the other node goes on.
    let dead = [Machine::Control, Machine::Node(0)].map(|machine| names.machine(machine));
    netns::end_processes(&dead).unwrap();

    cluster.bring_up(&options).unwrap();
    let namespaces = cluster.kubectl(&["get", "namespaces", "-o", "name"]).unwrap();
    assert!(!namespaces.contains("of-the-first"), "it is another cluster: {namespaces}");
    a_service_answers_across_nodes(&cluster);

    netns::end_processes(&dead).unwrap();
    cluster.down().unwrap();
    assert_eq!(on_this_machine(names), BTreeSet::new());
}

#[test]
fn a_cluster_that_a_killed_test_left_is_not_the_next_ones() {
    let first = Cluster::up(&[]).unwrap();
    let number = first.names().expect("it is ours").number();
    first.kubectl(&["create", "namespace", "of-the-first"]).unwrap();
    first.abandon();

    let next = Cluster::up(&[]).unwrap();
    assert_eq!(next.names().expect("it is ours").number(), number, "the lowest number is free again");
    let namespaces = next.kubectl(&["get", "namespaces", "-o", "name"]).unwrap();
    assert!(!namespaces.contains("of-the-first"), "{namespaces}");
    next.down().unwrap();
}

#[test]
fn a_machine_that_cannot_run_a_cluster_is_told_what_it_lacks() {
    let xtask = process::binaries().unwrap().join("xtask");
    let mut attempt = Command::new("setpriv");
    attempt
        .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])
        .arg(xtask)
        .args(["cluster", "up"]);
    let output = attempt.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("it lacks") && said.contains("CAP_SYS_ADMIN"),
        "{said}"
    );
}
