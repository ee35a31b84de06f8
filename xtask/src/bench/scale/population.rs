//! Fake nodes and pods against the real API server: KWOK plays their kubelets, everything else is Kubernetes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::Write as _,
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    cluster::Cluster,
    process::{self, Program},
    wait,
};

use super::{Arguments, mortal};
use crate::{run::step, setup};

/// The one that plays kubelet: its version, and what it is built from.
const KWOK: (&str, &str) = ("v0.7.0", "sigs.k8s.io/kwok/cmd/kwok");
/// Namespaces that pods and services are spread over.
pub(super) const NAMESPACES: usize = 20;
/// Requests that kubectl makes at a time; it limits itself.
const WRITERS: usize = 6;
/// How long all pods may take until they are ready.
const READY: Duration = Duration::from_secs(600);
/// Nodes between one pod of a service and the next.
const SPREAD: usize = 37;
/// Documents in one call of kubectl.
const CHUNK: usize = 250;

/// Nodes and pods that nobody runs.
#[derive(Debug)]
pub(super) struct Population {
    _kubelets: Program,
    /// The virtual addresses of the services, by number.
    services: Vec<String>,
}

/// The name of a node.
pub(super) fn node(number: usize) -> String {
    format!("fake-{number:03}")
}

/// The name of a namespace.
pub(super) fn namespace(number: usize) -> String {
    format!("shop-{:02}", number % NAMESPACES)
}

impl Population {
    /// Makes it, and waits until every pod has its address and is ready.
    pub(super) fn settle(cluster: &Cluster, arguments: &Arguments, log: PathBuf) -> Result<Self> {
        let (version, package) = KWOK;
        let kwok = step("Build KWOK", || setup::built_by_go("kwok", version, package))?;
        let mut command = mortal(&kwok);
        command.arg("--kubeconfig").arg(cluster.kubeconfig()).args([
            "--cidr=10.200.0.1/16",
            "--node-ip=10.255.0.1",
            "--manage-all-nodes=false",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--node-lease-duration-seconds=40",
        ]);
        let kubelets = Program::start("kwok", &mut command, &log)?;
        let &Arguments { nodes, pods, services, .. } = arguments;
        step(&format!("{nodes} nodes, {pods} pods, {services} services"), || {
            create(cluster, (0..NAMESPACES).map(|n| namespace_of(&namespace(n))).collect())?;
            create(cluster, (0..nodes).map(node_of).collect())?;
            // Pods are made by hand, not by ReplicaSets: their controller would take minutes.
            accounts(cluster)?;
            create(cluster, (0..services).map(service_of).collect())?;
            create(cluster, (0..pods).map(|n| pod_of(n, nodes, services)).collect())?;
            let ready = wait::try_until(READY, || {
                let listed = cluster
                    .kubectl(&["get", "pods", "-A", "-l", "fake=true", "-o", READINESS])
                    .map_err(|error| format!("{error:#}"))?;
                let ready = listed.lines().filter(|line| *line == "True").count();
                wait::holds(ready == pods, || format!("{ready} of {pods} pods are ready"))
            });
            ready.map_err(|complaint| anyhow::anyhow!("{complaint}\n{}", process::tail(&log)))
        })?;
        Ok(Self { _kubelets: kubelets, services: addresses(cluster, services)? })
    }

    /// Of each node, the addresses of the services that its pods call: of the same namespace, where there are so many.
    pub(super) fn uses(&self, arguments: &Arguments) -> Vec<Vec<String>> {
        let &Arguments { nodes, pods, services, uses, .. } = arguments;
        let mut used = vec![BTreeSet::new(); nodes];
        for (app, node) in (0..pods).map(|pod| place_of(pod, nodes, services)) {
            used[node].extend((1..=uses).map(|next| &self.services[(app + next * NAMESPACES) % services]));
        }
        used.into_iter().map(|it| it.into_iter().cloned().collect()).collect()
    }
}

const READINESS: &str =
    "jsonpath={range .items[*]}{.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}{end}";

/// The virtual addresses of the services, by number.
fn addresses(cluster: &Cluster, services: usize) -> Result<Vec<String>> {
    let listed = cluster.kubectl(&["get", "services", "-A", "-o", ADDRESSES])?;
    let all: BTreeMap<&str, &str> = listed.lines().filter_map(|line| line.split_once(' ')).collect();
    let of = |number| all.get(format!("service-{number}").as_str()).map(|it| (*it).to_owned());
    (0..services).map(|number| of(number).context("every service has an address")).collect()
}

const ADDRESSES: &str = "jsonpath={range .items[*]}{.metadata.name} {.spec.clusterIP}{\"\\n\"}{end}";

/// Pods wait for the account that Kubernetes makes in every namespace.
fn accounts(cluster: &Cluster) -> Result<()> {
    for n in 0..NAMESPACES {
        cluster.kubectl(&[
            "wait",
            "serviceaccount/default",
            "--for=create",
            "--timeout=60s",
            "-n",
            &namespace(n),
        ])?;
    }
    Ok(())
}

fn namespace_of(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{nodemesh.io/enroll: \"true\"}}}}\n"
    )
}

fn node_of(number: usize) -> String {
    let (name, many) = (node(number), "{cpu: 64, memory: 256Gi, pods: 1000}");
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, annotations: {{kwok.x-k8s.io/node: fake}}}}\n\
         spec: {{taints: [{{key: fake, effect: NoSchedule}}]}}\nstatus: {{allocatable: {many}, capacity: {many}}}\n"
    )
}

fn service_of(number: usize) -> String {
    let namespace = namespace(number);
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: service-{number}, namespace: {namespace}}}\n\
         spec: {{selector: {{app: app-{number}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
    )
}

/// The service that a pod is of, and its node: the pods of a service are on different nodes.
pub(super) fn place_of(number: usize, nodes: usize, services: usize) -> (usize, usize) {
    (number % services, (number + number / services * SPREAD) % nodes)
}

fn pod_of(number: usize, nodes: usize, services: usize) -> String {
    let (app, node) = place_of(number, nodes, services);
    let node = self::node(node);
    let namespace = namespace(app);
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: pod-{number}, namespace: {namespace}, labels: {{fake: \"true\", app: app-{app}}}}}\n\
         spec: {{nodeName: {node}, containers: [{{name: app, image: fake, ports: [{{containerPort: 8080}}]}}]}}\n"
    )
}

/// Creates objects, some writers at a time.
fn create(cluster: &Cluster, documents: Vec<String>) -> Result<()> {
    for batch in documents.chunks(CHUNK * WRITERS) {
        let mut writers = vec![];
        for chunk in batch.chunks(CHUNK) {
            let mut writer = cluster.command(&["create", "-f", "-"]);
            let mut child = writer.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
            let mut text = String::new();
            for document in chunk {
                writeln!(text, "---\n{document}")?;
            }
            child.stdin.take().context("its input is ours")?.write_all(text.as_bytes())?;
            writers.push(child);
        }
        for mut writer in writers {
            ensure!(writer.wait()?.success(), "kubectl create failed");
        }
    }
    Ok(())
}
