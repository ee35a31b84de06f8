//! The pages about operating on Kubernetes, followed: every command of every `sh` block of theirs is run, in order, as a
//! reader types it. After uninstalling, by meshctl and by helm, nothing is left: on nodes, in pods, in the cluster.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{collections::BTreeSet, fs, path::PathBuf};

use mesh_tests::{
    cluster::{
        Cluster,
        shop::{SOON, Shop},
    },
    page::{self, Block},
    until, wait,
};
use serde_json::Value;
use tempfile::TempDir;

/// The namespace of the pages' examples.
const DEMO: &str = "nodemesh-demo";

/// Pages that one reads on a cluster that has the mesh.
const PAGES: [&str; 6] = ["install", "enrol", "kubernetes", "troubleshoot", "rotate", "upgrade"];

/// A cluster that somebody operates by the book, with pods that were there before the mesh.
struct Reader<'a> {
    cluster: &'a Cluster,
    shop: Shop<'a>,
    tools: TempDir,
    /// What was in these pods and on their nodes before the mesh came.
    before: Vec<(String, BTreeSet<String>)>,
    /// The sections whose effects were looked at.
    seen: Vec<String>,
}

#[test]
fn the_pages_about_operating_do_what_they_say_and_uninstalling_leaves_nothing() {
    let cluster = Cluster::up(&[]).unwrap();
    cluster.load_images().unwrap();
    let shop = Shop::open(&cluster, "before");
    let mut reader =
        Reader { cluster: &cluster, shop, tools: tempfile::tempdir().unwrap(), before: vec![], seen: vec![] };
    reader.before = reader.traces();

    for page in PAGES {
        reader.follow(page);
    }
    reader.shop.label_namespace("nodemesh.io/mode=strict");
    reader.mesh_the_shop();
    for ((place, before), (_, now)) in reader.before.iter().zip(reader.traces()) {
        assert!(
            now.difference(before).count() > 0,
            "what looks for traces finds those of the mesh in {place}"
        );
    }
    reader.follow("uninstall");
    reader.follow("helm");
    assert_eq!(
        reader.seen,
        [
            "install/Install",
            "enrol/Put pods into the mesh",
            "enrol/Strict",
            "enrol/One pod out, one namespace out",
            "kubernetes/What became of an object",
            "troubleshoot/Is a pod captured, and why not?",
            "troubleshoot/What the agent of a node says",
            "troubleshoot/What the controller says",
            "rotate/The old root goes",
            "uninstall/Everything",
            "helm/Install",
            "helm/Change a setting",
            "helm/Dashboards and alerts",
            "helm/Uninstall",
        ],
        "sections whose effects are looked at, in the pages' order"
    );
}

impl Reader<'_> {
    /// Runs the blocks of a page, and looks at what they did.
    fn follow(&mut self, page: &str) {
        let blocks = page::blocks(&fs::read_to_string(path(page)).unwrap());
        assert!(!blocks.is_empty(), "{page}.md has commands");
        for Block { section, commands } in blocks {
            let output = self.cluster.typed(&commands, self.tools.path()).unwrap().output().unwrap();
            let [said, complained] = [&output.stdout, &output.stderr].map(|it| String::from_utf8_lossy(it));
            assert!(
                output.status.success(),
                "{page}.md, {section}: {}\n{complained}\n{said}\n{}",
                output.status,
                self.cluster.state_of_mesh()
            );
            let section = format!("{page}/{section}");
            if self.has_effect(&section, &said) && self.seen.last() != Some(&section) {
                self.seen.push(section);
            }
        }
    }

    /// Looks at what the commands of a section did; false where they look themselves.
    fn has_effect(&self, section: &str, said: &str) -> bool {
        match section {
            "install/Install" => {
                assert!(self.shop.is_readable().unwrap(), "nothing happens to pods yet");
            }
            "enrol/Put pods into the mesh" => {
                self.wire_has_the_answer(false);
                assert!(self.shop.is_readable().unwrap(), "other namespaces stay out of the mesh");
            }
            "enrol/Strict" => {
                assert!(said.contains("root:"), "the client's answer: {said}");
                self.outsider_is_refused();
            }
            "enrol/One pod out, one namespace out" => self.wire_has_the_answer(true),
            "kubernetes/What became of an object" => {
                assert!(said.contains("web-clients   Allow"), "the table of the page: {said}");
            }
            "troubleshoot/Is a pod captured, and why not?" => {
                assert!(
                    said.contains("NotEnrolled") && said.contains("Enrolled"),
                    "condition and events: {said}"
                );
            }
            "troubleshoot/What the agent of a node says" => {
                assert!(said.contains("6.1") || said.contains("kernel"), "the doctor's findings: {said}");
            }
            "troubleshoot/What the controller says" => {
                assert!(said.contains("nodemesh-demo/web"), "workloads, and why: {said}");
            }
            "rotate/The old root goes" => {
                let exec = ["--namespace", "nodemesh-system", "exec", "deployment/nodemesh-controller", "--"];
                until("one root is left", SOON, || {
                    let roots = self.cluster.kubectl(&[&exec[..], &["meshctl", "get", "roots"]].concat());
                    let roots = roots.map_err(|e| format!("{e:#}"))?;
                    let one = roots.contains(" signs ") && !roots.contains(" trusted ");
                    wait::holds(one, || roots)
                });
            }
            "uninstall/Everything" => self.nothing_is_left(),
            "helm/Install" => {
                self.cluster.await_installed().unwrap();
                self.mesh_the_shop();
            }
            "helm/Change a setting" => {
                let deployment = ["--namespace", "nodemesh-system", "get", "deployment/nodemesh-controller"];
                let arguments = "jsonpath={.spec.template.spec.containers[0].args}";
                let said = self.cluster.kubectl(&[&deployment[..], &["-o", arguments]].concat()).unwrap();
                assert!(said.contains("--default-mode=strict"), "{said}");
            }
            "helm/Dashboards and alerts" => {
                let system = ["--namespace", "nodemesh-system", "get", "configmaps", "-o", "name"];
                let all = self.cluster.kubectl(&system).unwrap();
                assert!(all.contains("configmap/nodemesh-rules"), "{all}");
                let found =
                    self.cluster.kubectl(&[&system[..], &["-l", "grafana_dashboard=1"]].concat()).unwrap();
                assert_eq!(found.lines().count(), 6, "{found}");
            }
            "helm/Uninstall" => self.nothing_is_left(),
            _ => return false,
        }
        true
    }

    /// Puts the pods that were there before into the mesh.
    fn mesh_the_shop(&self) {
        self.shop.label_namespace("nodemesh.io/enroll=true");
        self.shop.await_captured("web");
        self.shop.await_captured("client");
        self.shop.await_meshed();
    }

    /// Whether an answer of the demo's server can be read between the nodes once its client has asked. Both are on
    /// whichever node they were put; on one node nothing crosses the wire at all.
    #[track_caller]
    fn wire_has_the_answer(&self, readable: bool) {
        let demo = Shop { cluster: self.cluster, namespace: DEMO };
        let nodes = ["pod/web", "pod/client"].map(|pod| demo.field(pod, ".spec.nodeName"));
        let url = format!("http://{}:8080/passwd", demo.field("pod/web", ".status.podIP"));
        until("the demo's client is answered", SOON, || {
            let mut wire = self.cluster.capture().map_err(|e| format!("{e:#}"))?;
            let answer =
                demo.try_kubectl(&["exec", "client", "--", "timeout", "10", "wget", "-q", "-O", "-", &url])?;
            wait::holds(answer.contains("root:"), || answer.clone())?;
            let seen = !wire.plaintext(b"root:").map_err(|e| format!("{e:#}"))?.is_empty();
            let expected = readable && nodes[0] != nodes[1];
            wait::holds(seen == expected, || {
                format!("readable between the nodes: {seen}\n{}", demo.captured())
            })
        });
    }

    /// A pod outside of the mesh gets nothing of a strict one, and the strict one's agent says why.
    fn outsider_is_refused(&self) {
        let demo = Shop { cluster: self.cluster, namespace: DEMO };
        let url = format!("http://{}:8080/passwd", demo.field("pod/web", ".status.podIP"));
        let answer =
            self.shop.try_kubectl(&["exec", "client", "--", "timeout", "5", "wget", "-q", "-O", "-", &url]);
        assert!(answer.is_err(), "a strict pod answers in the clear: {answer:?}");
        self.shop.await_line("the refusal at the strict pod's agent", |line: &Value| {
            line["reason"] == "plaintext_to_strict" && line["destination"]["workload"] == "nodemesh-demo/web"
        });
    }

    fn traces(&self) -> Vec<(String, BTreeSet<String>)> {
        let pods = ["web", "client"]
            .map(|pod| (format!("pod {pod}"), self.cluster.traces_in_pod(self.shop.namespace, pod).unwrap()));
        let nodes = self.cluster.nodes().unwrap().into_iter();
        let nodes = nodes.map(|node| (format!("node {node}"), self.cluster.traces_on_node(&node).unwrap()));
        pods.into_iter().chain(nodes).collect()
    }

    fn nothing_is_left(&self) {
        for ((place, before), (_, now)) in self.before.iter().zip(self.traces()) {
            let came: Vec<_> = now.difference(before).collect();
            let went: Vec<_> = before.difference(&now).collect();
            assert!(came.is_empty() && went.is_empty(), "{place}: left are {came:#?}, lost are {went:#?}");
        }
        self.pods_of_the_demo_are_as_any();
        let kinds = self.cluster.kubectl(&["api-resources", "--verbs=list", "-o", "name"]).unwrap();
        let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
        let all = self.cluster.kubectl(&["get", &kinds.join(","), "-A", "-o", "name"]).unwrap();
        let left: Vec<&str> =
            all.lines().filter(|name| name.contains("nodemesh") && !name.ends_with(DEMO)).collect();
        assert!(left.is_empty(), "in the cluster is {left:?}");
        let pods = self.cluster.kubectl(&["get", "pods", "-A", "-o", "yaml"]).unwrap();
        assert!(!pods.contains("nodemesh.io/captured"), "pods say still that they were captured");
        assert!(self.shop.is_readable().unwrap(), "pods speak as if there had been no mesh");
        self.shop.label_namespace("nodemesh.io/enroll-");
        self.shop.label_namespace("nodemesh.io/mode-");
    }

    /// Pods that were made while there was a mesh have rules, settings and disciplines as those from before have.
    fn pods_of_the_demo_are_as_any(&self) {
        let demo = Shop { cluster: self.cluster, namespace: DEMO };
        if self.cluster.kubectl(&["get", "namespace", DEMO]).is_err() {
            return;
        }
        let comparable = |lines: &BTreeSet<String>| -> BTreeSet<String> {
            let kinds = ["rule", "discipline", "setting", "program"];
            lines.iter().filter(|line| kinds.iter().any(|kind| line.starts_with(kind))).cloned().collect()
        };
        let (_, any) = &self.before[0];
        for pod in ["web", "client"] {
            let traces = self.cluster.traces_in_pod(demo.namespace, pod).unwrap();
            let [any, its] = [any, &traces].map(comparable);
            let differs: Vec<_> = its.symmetric_difference(&any).collect();
            assert!(differs.is_empty(), "pod {DEMO}/{pod} is not as others are: {differs:#?}");
        }
    }
}

fn path(page: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../docs/operate/{page}.md"))
}
