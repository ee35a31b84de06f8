//! A cluster with the mesh, an application in two copies behind a Service, a client under load, and what phases do to it.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Seek},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant},
};

use mesh_core::refusal::Reason;
use mesh_tests::{
    cluster::{Cluster, mesh::NAMESPACE},
    http,
    metrics::Metrics,
    page::{self, Block},
    process::Program,
    until,
    wait::holds,
};
use serde_json::{Value, json};

use crate::{
    DRAIN, SECRET,
    load::{Load, Seen},
};

/// How long what follows a change may take.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// How long kubectl waits.
const PATIENCE: &str = "--timeout=180s";
/// How the agents' drain is said in what we ship.
const SHIPPED_DRAIN: (&str, &str) = ("--drain-deadline=30s", "terminationGracePeriodSeconds: 75");

/// There once a node's agent holds new pods.
const AFTER_AGENT: &str = "/run/nodemesh/new-pods-are-held";

pub(crate) struct Bed {
    // Before the cluster: it goes first.
    pub(crate) load: Load,
    pub(crate) cluster: Cluster,
    pub(crate) nodes: Vec<String>,
    /// The application's.
    address: Ipv4Addr,
    files: tempfile::TempDir,
    begun: RefCell<Instant>,
}

/// Who leads.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) holder: String,
    pub(crate) transitions: u64,
}

impl Lease {
    /// The pod that the holder is.
    pub(crate) fn holder_pod(&self) -> String {
        self.holder.rsplit_once('_').map_or("", |(pod, _)| pod).to_owned()
    }
}

impl Bed {
    /// Returns once all of it runs, under load.
    pub(crate) fn up() -> Self {
        let begun = Instant::now();
        let cluster = Cluster::up(&[]).unwrap();
        let image = cluster.load_program("test-app").unwrap();
        cluster
            .install_with(|manifests| {
                let (deadline, grace) = SHIPPED_DRAIN;
                assert!(manifests.contains(deadline) && manifests.contains(grace));
                let drain = DRAIN.as_secs();
                manifests
                    .replace(deadline, &format!("--drain-deadline={drain}s"))
                    .replace(grace, &format!("terminationGracePeriodSeconds: {}", 2 * drain + 15))
            })
            .unwrap();
        let nodes = cluster.nodes().unwrap();
        let address = cluster.names().unwrap().address(128, 80);
        cluster.apply(&application(&image, &nodes, address)).unwrap();
        for what in ["deployment/web", "deployment/walker"] {
            cluster.kubectl(&["--namespace", "shop", "rollout", "status", what, PATIENCE]).unwrap();
        }
        let all = ["--namespace", "shop", "wait", "pod", "--all"];
        cluster.kubectl(&[&all[..], &["--for=condition=Ready", PATIENCE]].concat()).unwrap();
        let captured = [&all[..], &["--for=condition=nodemesh.io/captured=True", PATIENCE]].concat();
        if let Err(error) = cluster.kubectl(&captured) {
            panic!("{error:#}\n{}", cluster.state_of_mesh());
        }
        let pod = cluster.pod_netns("shop", "client").unwrap();
        let load = Load::start(pod, (address, 80).into(), (address, 7000).into());
        load.await_running(SOON);
        eprintln!("ready after {:?}", begun.elapsed());
        let files = tempfile::tempdir().unwrap();
        Self { load, cluster, nodes, address, files, begun: RefCell::new(Instant::now()) }
    }

    pub(crate) fn begin(&self, phase: &str) {
        self.load.await_running(SOON);
        self.load.take();
        *self.begun.borrow_mut() = Instant::now();
        eprintln!("--- {phase}");
    }

    pub(crate) fn end(&self, phase: &str) {
        eprintln!("{phase}: {:?}", self.begun.borrow().elapsed());
    }

    /// What the load has seen since it was last asked.
    pub(crate) fn seen(&self) -> Seen {
        let seen = self.load.take();
        eprintln!("{seen}");
        if !seen.failed.is_empty() {
            self.print_refusals();
        }
        seen
    }

    /// What the agents have refused or cut of late, as their access logs say.
    fn print_refusals(&self) {
        for agent in self.pods(NAMESPACE, "app.kubernetes.io/component=agent", |_| true) {
            let log = self.kubectl(&["--namespace", NAMESPACE, "logs", "--since=1m", &agent]);
            let mut refusals: Vec<_> = log.lines().filter(|line| line.contains(r#""reason":"#)).collect();
            eprintln!("{agent}: {}", refusals.split_off(refusals.len().saturating_sub(20)).join("\n"));
        }
    }

    #[track_caller]
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        self.cluster.kubectl(arguments).unwrap_or_else(|error| {
            let shop = ["describe", "--namespace", "shop", "jobs,pods"];
            let shop = self.cluster.kubectl(&shop).unwrap_or_else(|error| format!("{error:#}"));
            panic!("{error:#}\n{}\n{shop}", self.cluster.state_of_mesh())
        })
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.kubectl(&[arguments, &["-o", "json"]].concat())).unwrap()
    }

    /// Restarts something as people do, and waits for it, and until what was there before is gone.
    #[track_caller]
    pub(crate) fn roll_out(&self, namespace: &str, what: &str) {
        self.kubectl(&["--namespace", namespace, "rollout", "restart", what]);
        self.await_rolled_out(namespace, what);
        until("what was there before is gone", SOON, || {
            let list = self.json(&["--namespace", namespace, "get", "pods"]);
            let pods = list["items"].as_array().unwrap().iter().map(|pod| &pod["metadata"]);
            let ending: Vec<_> =
                pods.filter(|it| !it["deletionTimestamp"].is_null()).map(|it| &it["name"]).collect();
            holds(ending.is_empty(), || format!("{ending:?}"))
        });
    }

    #[track_caller]
    pub(crate) fn await_rolled_out(&self, namespace: &str, what: &str) {
        self.kubectl(&["--namespace", namespace, "rollout", "status", what, PATIENCE]);
    }

    /// The pods of one of our applications that do not end.
    pub(crate) fn pods_of(&self, app: &str) -> Vec<String> {
        self.pods("shop", &format!("app={app}"), |_| true)
    }

    pub(crate) fn pods_on(&self, app: &str, node: &str) -> Vec<String> {
        self.pods("shop", &format!("app={app}"), |pod| pod["spec"]["nodeName"] == node)
    }

    pub(crate) fn controllers(&self) -> BTreeSet<String> {
        self.pods(NAMESPACE, "app.kubernetes.io/component=controller", |_| true).into_iter().collect()
    }

    fn pods(&self, namespace: &str, label: &str, wanted: impl Fn(&Value) -> bool) -> Vec<String> {
        let list = self.json(&["--namespace", namespace, "get", "pods", "-l", label]);
        let pods = list["items"].as_array().unwrap().iter();
        let pods = pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null() && wanted(pod));
        pods.map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    }

    /// By the API, as whoever drains a node does it.
    pub(crate) fn evict(&self, pod: &str) -> anyhow::Result<()> {
        let eviction = json!({
            "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": "shop"},
        });
        let path = format!("/api/v1/namespaces/shop/pods/{pod}/eviction");
        let mut post = self.cluster.command(&["create", "--raw", &path, "-f", "-"]);
        mesh_tests::netns::run(&mut post, Some(&eviction.to_string())).map(drop)
    }

    /// Waits until every node's agent is connected to a controller, as they say themselves.
    #[track_caller]
    pub(crate) fn await_agents_connected(&self) {
        for node in &self.nodes {
            until("the agent has a controller", SOON, || {
                let metrics = self.cluster.agent_metrics(node).map_err(|e| format!("{e:#}"))?;
                let connected = metrics.sum("nodemesh_controller_connected", &[]);
                holds(connected == 1.0, || format!("{node}: {connected}"))
            });
        }
    }

    /// How many connections all agents that run now have refused for somebody's certificate.
    pub(crate) fn refused_for_certificates(&self) -> f64 {
        let reasons = Reason::ALL.iter().map(|reason| reason.label());
        let reasons: Vec<&str> = reasons.filter(|reason| reason.contains("certificate")).collect();
        let of_node = |node: &String| -> f64 {
            let metrics = self.cluster.agent_metrics(node).unwrap();
            let of = |reason: &&str| metrics.sum("nodemesh_connections_total", &[("reason", reason)]);
            reasons.iter().map(of).sum()
        };
        self.nodes.iter().map(of_node).sum()
    }

    /// What access logs have of them, for whoever reads a failed test.
    pub(crate) fn told_of_certificates(&self) -> String {
        let lines = match self.cluster.access_log() {
            Ok(lines) => lines,
            Err(error) => return format!("{error:#}"),
        };
        let is_one = |line: &&Value| line["reason"].as_str().is_some_and(|it| it.contains("certificate"));
        lines.iter().filter(is_one).map(Value::to_string).collect::<Vec<_>>().join("\n")
    }

    /// What the agents that run now write, for as long as they do and after.
    pub(crate) fn logs_of_agents(&self) -> Logs {
        let agents = self.pods(NAMESPACE, "app.kubernetes.io/component=agent", |_| true);
        Logs(agents.iter().flat_map(|agent| self.cluster.open_logs(NAMESPACE, agent).unwrap()).collect())
    }

    /// A pod that runs to its end on a node.
    #[track_caller]
    pub(crate) fn run_once(&self, name: &str, node: &str) {
        self.cluster.apply(&once(name, node)).unwrap();
        let pod = format!("pod/{name}");
        let done = "--for=jsonpath={.status.phase}=Succeeded";
        self.kubectl(&["--namespace", "shop", "wait", &pod, done, PATIENCE]);
        self.kubectl(&["--namespace", "shop", "delete", &pod, "--wait=false"]);
    }

    /// A Job that asks the service, to its end.
    #[track_caller]
    pub(crate) fn job(&self, name: &str) {
        let image = Cluster::tools_image();
        // What becomes of a pod's first connection is asked in tests/tests/kubernetes.rs and pods.rs; here it is how the pod
        // ends. What was said when it failed is in the pod's log.
        let ask = format!(
            "until test \"$(timeout 60 wget -O - http://{}/)\" = {SECRET}; do sleep 0.2; done",
            self.address
        );
        let job = json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": "shop"},
            "spec": {"backoffLimit": 0, "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"restartPolicy": "Never", "containers": [{
                    "name": "it", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", ask],
                }]},
            }},
        });
        self.cluster.apply(&job.to_string()).unwrap();
        let job = format!("job/{name}");
        self.kubectl(&["--namespace", "shop", "wait", &job, "--for=condition=Complete", PATIENCE]);
    }

    /// The condition of our type on a pod; null where there is none.
    pub(crate) fn condition(&self, pod: &str) -> Value {
        let pod = self.json(&["--namespace", "shop", "get", "pod", pod]);
        condition(&pod)
    }

    /// The reasons of our events of a pod.
    pub(crate) fn events(&self, pod: &str) -> BTreeSet<String> {
        let list = self.json(&["--namespace", "shop", "get", "events.events.k8s.io"]);
        let of_it = |event: &&Value| {
            event["regarding"]["name"] == pod && event["reportingController"] == "nodemesh-controller"
        };
        let events = list["items"].as_array().unwrap().iter().filter(of_it);
        events.map(|event| event["reason"].as_str().unwrap().to_owned()).collect()
    }

    /// What a controller answers, asked in its pod, where nothing filters.
    pub(crate) fn ask_controller(&self, pod: &str, path: &str) -> String {
        self.try_controller(pod, path).unwrap()
    }

    /// The same, or why it does not answer: it may have just started.
    fn try_controller(&self, pod: &str, path: &str) -> Result<String, String> {
        let netns = self.cluster.pod_netns(NAMESPACE, pod).map_err(|error| format!("{error:#}"))?;
        let answer = http::get(&netns, "127.0.0.1:15020".parse().unwrap(), path);
        answer.map(|it| it.body).map_err(|error| format!("{pod}: {error:#}"))
    }

    pub(crate) fn controller_metrics(&self, pod: &str) -> Metrics {
        Metrics::parse(&self.ask_controller(pod, "/metrics"))
    }

    fn controller_says(&self, pod: &str, path: &str) -> Value {
        serde_json::from_str(&self.ask_controller(pod, path)).unwrap()
    }

    /// The nodes whose agents are connected to one controller, as it says alone.
    pub(crate) fn agents_of(&self, controller: &str) -> Vec<String> {
        let status = self.controller_says(controller, "/api/v1/status?here=true");
        let agents = status["agents"].as_array().unwrap().iter().filter(|it| it["connected"] == true);
        agents.map(|it| it["node"].as_str().unwrap().to_owned()).collect()
    }

    /// What all agents hold, as one controller says.
    pub(crate) fn certificates(&self, controller: &str) -> Value {
        self.controller_says(controller, "/api/v1/certificates")
    }

    /// The roots that a controller trusts.
    pub(crate) fn roots_of(&self, controller: &str) -> Vec<String> {
        let answer = self.certificates(controller);
        let roots = answer["roots"].as_array().unwrap().iter();
        roots.map(|it| it["sha256"].as_str().unwrap().to_owned()).collect()
    }

    /// Runs the commands under a heading of docs/operate/rotate.md, as they are there.
    #[track_caller]
    pub(crate) fn follow_docs(&self, heading: &str) {
        let page = include_str!("../../../docs/operate/rotate.md");
        let block = page::blocks(page).into_iter().find(|block| block.section == heading);
        let Block { commands, .. } = block.expect("commands are below the heading");
        let output = self.cluster.typed(&commands, self.files.path()).unwrap().output().unwrap();
        let said =
            [output.stdout, output.stderr].map(|it| String::from_utf8_lossy(&it).into_owned()).concat();
        assert!(output.status.success(), "{heading}: {said}\n{}", self.cluster.state_of_mesh());
    }

    /// Waits until who holds the lease lives, and says so itself.
    #[track_caller]
    pub(crate) fn await_leader(&self) -> Lease {
        until("one controller leads", SOON, || {
            let mut leaders = vec![];
            for pod in self.controllers() {
                let metrics = Metrics::parse(&self.try_controller(&pod, "/metrics")?);
                if metrics.sum("nodemesh_controller_leader", &[]) == 1.0 {
                    leaders.push(pod);
                }
            }
            // Read last: one that has just started has the name of the pod that died with the lease.
            let lease = self.lease();
            let pod = lease.holder_pod();
            holds(leaders == [pod], || format!("{lease:?}, and {leaders:?} say that they lead"))
                .map(|()| lease)
        })
    }

    pub(crate) fn lease(&self) -> Lease {
        let lease = self.json(&["--namespace", NAMESPACE, "get", "lease", "nodemesh-controller"]);
        Lease {
            holder: lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned(),
            transitions: lease["spec"]["leaseTransitions"].as_u64().unwrap_or_default(),
        }
    }

    /// The application's pods on a node that run, each with the address and the containers that it has now.
    pub(crate) fn sandboxes_on(&self, node: &str) -> Result<BTreeMap<String, String>, String> {
        let get = ["--namespace", "shop", "get", "pods", "-l", "app in (web, walker)", "-o", "json"];
        let list = self.cluster.kubectl(&get).map_err(|error| format!("{error:#}"))?;
        let list: Value = serde_json::from_str(&list).map_err(|error| error.to_string())?;
        let pods = list["items"].as_array().ok_or("no list")?.iter();
        let here = pods
            .filter(|pod| pod["spec"]["nodeName"] == node && pod["metadata"]["deletionTimestamp"].is_null());
        here.map(|pod| {
            let name = pod["metadata"]["name"].as_str().ok_or("no name")?;
            let container = &pod["status"]["containerStatuses"][0];
            holds(!container["state"]["running"].is_null(), || format!("{name}: {container}"))?;
            Ok((name.to_owned(), format!("{} {}", pod["status"]["podIP"], container["containerID"])))
        })
        .collect()
    }

    /// Whether a pod is captured, as its node's agent says now.
    pub(crate) fn is_captured(&self, node: &str, pod: &str) -> Result<(), String> {
        let state = self.cluster.ask_agent(node, "/api/v1/state").map_err(|e| format!("{e:#}"))?;
        let state: Value = serde_json::from_str(&state.body).map_err(|e| e.to_string())?;
        let mut workloads = state["workloads"].as_array().ok_or("no workloads")?.iter();
        let ours = workloads.find(|it| it["name"] == format!("shop/{pod}"));
        let captured = ours.is_some_and(|it| it["enrolment"] == "enrolled");
        holds(captured, || format!("{pod}: {ours:?}"))
    }

    /// Asks the service from a pod of a Deployment.
    pub(crate) fn ask_from(&self, app: &str) -> Result<(), String> {
        let pod = self.pods_of(app).pop().ok_or("no pod")?;
        let url = format!("http://{}/", self.address);
        let exec =
            ["--namespace", "shop", "exec", &pod, "--", "timeout", "10", "wget", "-q", "-O", "-", &url];
        let answer = self.cluster.kubectl(&exec).map_err(|e| format!("{e:#}"))?;
        holds(answer.trim() == SECRET, || answer)
    }

    /// A policy whose versions are counted.
    pub(crate) fn watched_policy(&self, name: &'static str) -> Policy<'_> {
        let log = self.files.path().join(name);
        let all = "/apis/nodemesh.io/v1alpha1/namespaces/shop/authorizationpolicies";
        let list: Value = serde_json::from_str(&self.kubectl(&["get", "--raw", all])).unwrap();
        // All that is written from now on, however late the watch begins.
        let since = list["metadata"]["resourceVersion"].as_str().unwrap();
        let watch = format!("{all}?watch=1&resourceVersion={since}&fieldSelector=metadata.name%3D{name}");
        let mut watch = self.cluster.command(&["get", "--raw", &watch]);
        let watch = Program::start("kubectl", &mut watch, &log).unwrap();
        let policy = Policy { bed: self, name, log, _watch: watch };
        policy.change(8081);
        policy.await_accepted(1);
        policy
    }
}

/// What agents write, who may be gone.
pub(crate) struct Logs(Vec<File>);

impl Logs {
    /// Whose connections they have cut to end.
    pub(crate) fn cut_to_end(&self) -> BTreeSet<SocketAddr> {
        let texts = self.0.iter().map(|mut log| {
            log.rewind().unwrap();
            io::read_to_string(log).unwrap()
        });
        let texts: Vec<String> = texts.collect();
        let lines = texts.iter().flat_map(|text| text.lines());
        // Time, stream and whether it is whole come first.
        let lines = lines.filter_map(|it| serde_json::from_str(it.splitn(4, ' ').nth(3)?).ok());
        let cut = lines.filter(|line: &Value| line["reason"] == "agent_stopping");
        cut.filter_map(|line| line["source"]["address"].as_str()?.parse().ok()).collect()
    }
}

/// An object of ours, and all that was written to it.
pub(crate) struct Policy<'a> {
    bed: &'a Bed,
    name: &'static str,
    log: PathBuf,
    _watch: Program,
}

impl Policy<'_> {
    /// Says something else in it that concerns nobody.
    pub(crate) fn change(&self, port: u16) {
        let policy = json!({
            "apiVersion": "nodemesh.io/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": self.name, "namespace": "shop"},
            "spec": {
                "action": "Deny",
                "selector": {"matchLabels": {"app": "nobody"}},
                "rules": [{"to": [{"ports": [port]}]}],
            },
        });
        self.bed.cluster.apply(&policy.to_string()).unwrap();
    }

    /// Waits until its status is about this generation.
    #[track_caller]
    pub(crate) fn await_accepted(&self, generation: u64) {
        until("its status says that it is in force", SOON, || {
            let policy = self.object();
            let accepted = &policy["status"]["conditions"][0];
            let is_it = accepted["status"] == "True" && accepted["observedGeneration"] == generation;
            holds(is_it, || policy.to_string())
        });
    }

    /// Waits until it was written so many times, and asserts that it was not written more often.
    #[track_caller]
    pub(crate) fn assert_written(&self, times: usize) {
        until("all that was written to it is seen", SOON, || {
            let written = fs::read_to_string(&self.log).unwrap_or_default();
            let count = written.lines().count();
            assert!(count <= times, "written {count} times, not {times}: {written}");
            holds(count == times, || written)
        });
    }

    /// Who wrote its status.
    pub(crate) fn writers(&self) -> Vec<String> {
        let object = self.object();
        let managers = object["metadata"]["managedFields"].as_array().unwrap().iter();
        let of_status = managers.filter(|it| it["subresource"] == "status");
        of_status.map(|it| it["manager"].as_str().unwrap().to_owned()).collect()
    }

    fn object(&self) -> Value {
        let get = ["--namespace", "shop", "get", "authorizationpolicy", self.name, "--show-managed-fields"];
        self.bed.json(&get)
    }
}

fn condition(pod: &Value) -> Value {
    let conditions = pod["status"]["conditions"].as_array();
    let ours = conditions.into_iter().flatten().find(|it| it["type"] == "nodemesh.io/captured");
    ours.cloned().unwrap_or_default()
}

fn once(name: &str, node: &str) -> String {
    let image = Cluster::tools_image();
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{namespace: shop, name: {name}}}
spec:
  nodeName: {node}
  restartPolicy: Never
  containers: [{{name: it, image: {image}, imagePullPolicy: IfNotPresent, command: ["true"]}}]
"#
    )
}

/// Two copies of the application on two nodes, which end as applications should; who puts load on them; and a pod on the
/// second node that asks them all the time. None of them is started before the agent by a node that boots.
fn application(image: &str, nodes: &[String], address: Ipv4Addr) -> String {
    let tools = Cluster::tools_image();
    let (first, second) = (&nodes[0], &nodes[1]);
    format!(
        r#"
apiVersion: v1
kind: Namespace
metadata: {{name: shop, labels: {{nodemesh.io/enroll: "true", nodemesh.io/mode: strict}}}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{namespace: shop, name: web}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{namespace: shop, name: client}}
---
apiVersion: v1
kind: Service
metadata: {{namespace: shop, name: web}}
spec:
  clusterIP: {address}
  selector: {{app: web}}
  ports: [{{name: http, port: 80, targetPort: 8080}}, {{name: echo, port: 7000}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {{namespace: shop, name: web}}
spec:
  replicas: 2
  strategy: {{rollingUpdate: {{maxSurge: 1, maxUnavailable: 0}}}}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      serviceAccountName: web
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector: {{matchLabels: {{app: web}}}}
          matchLabelKeys: [pod-template-hash]
      containers:
        - name: it
          image: {image}
          imagePullPolicy: IfNotPresent
          args: [{SECRET}]
          readinessProbe: {{httpGet: {{port: 8080, path: /}}, periodSeconds: 1}}
          lifecycle: {{preStop: {{sleep: {{seconds: 3}}}}}}
          volumeMounts: [{{name: mesh, mountPath: /run/nodemesh, readOnly: true}}]
      volumes: [{{name: mesh, hostPath: {{path: {AFTER_AGENT}, type: File}}}}]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {{namespace: shop, name: web}}
spec:
  minAvailable: 1
  selector: {{matchLabels: {{app: web}}}}
---
apiVersion: v1
kind: Pod
metadata: {{namespace: shop, name: client}}
spec:
  nodeName: {first}
  serviceAccountName: client
  terminationGracePeriodSeconds: 0
  containers: [{{name: it, image: {tools}, imagePullPolicy: IfNotPresent, command: [sleep, "1000000"]}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {{namespace: shop, name: walker}}
spec:
  selector: {{matchLabels: {{app: walker}}}}
  template:
    metadata: {{labels: {{app: walker}}}}
    spec:
      nodeSelector: {{kubernetes.io/hostname: {second}}}
      serviceAccountName: client
      terminationGracePeriodSeconds: 0
      containers:
        - name: it
          image: {tools}
          imagePullPolicy: IfNotPresent
          command: [sh, -c, "while true; do timeout 5 wget -q -O - http://{address}/{SECRET}; sleep 0.2; done"]
          volumeMounts: [{{name: mesh, mountPath: /run/nodemesh, readOnly: true}}]
      volumes: [{{name: mesh, hostPath: {{path: {AFTER_AGENT}, type: File}}}}]
"#
    )
}
