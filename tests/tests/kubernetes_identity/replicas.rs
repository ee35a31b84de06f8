//! Several controllers of one cluster: what agents report is on the pods, so that all of them, and those that start later,
//! know the same.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use mesh_agent::view::Enrolment;
use mesh_core::{health::Health, model::Name};
use mesh_tests::{cluster::Cluster, until, wait::holds};
use serde_json::Value;

use crate::{
    agent::Agent,
    bed::{Bed, Controller, PODS, SOON},
};

impl Bed {
    /// A workload in the mesh.
    fn web(&self, node: &str) -> Name {
        let (namespace, image) = (&self.namespace, Cluster::tools_image());
        self.cluster
            .apply(&format!(
                r#"
apiVersion: v1
kind: Pod
metadata: {{name: web, namespace: {namespace}, labels: {{nodemesh.io/enroll: "true"}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers: [{{name: it, image: {image}, imagePullPolicy: IfNotPresent, command: [sleep, "1000000"]}}]
"#
            ))
            .unwrap();
        self.kubectl(&["wait", "pod", "web", "--for=condition=Ready", PODS]);
        Name::new(namespace, "web")
    }

    /// The condition of our type on a pod; null where there is none.
    fn condition(&self, pod: &Name) -> Value {
        self.condition_of(pod, "nodemesh.io/captured")
    }

    fn condition_of(&self, pod: &Name, type_: &str) -> Value {
        let said = self.kubectl(&["get", "pod", &pod.name, "-o", "json"]);
        let pod: Value = serde_json::from_str(&said).unwrap();
        let conditions = pod["status"]["conditions"].as_array().unwrap();
        conditions.iter().find(|it| it["type"] == type_).cloned().unwrap_or_default()
    }

    #[track_caller]
    fn until_condition(&self, pod: &Name, status: &str, reason: &str) -> Value {
        until("the pod's condition", SOON, || {
            let condition = self.condition(pod);
            let is_it = condition["status"] == status && condition["reason"] == reason;
            holds(is_it, || condition.to_string()).map(|()| condition)
        })
    }

    /// The reasons of the events of a pod with this uid.
    fn events(&self, uid: &str) -> Vec<String> {
        let said = self.kubectl(&["get", "events.events.k8s.io", "-o", "json"]);
        let list: Value = serde_json::from_str(&said).unwrap();
        let of_it = |event: &&Value| {
            event["regarding"]["uid"] == uid && event["reportingController"] == "nodemesh-controller"
        };
        let events = list["items"].as_array().unwrap().iter().filter(of_it);
        events.map(|event| event["reason"].as_str().unwrap().to_owned()).collect()
    }
}

impl Controller {
    /// Its row of `meshctl get workloads`.
    fn workload(&self, name: &Name) -> Value {
        let answer = self.get("/api/v1/workloads");
        let rows: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        let rows = rows.as_array().unwrap();
        rows.iter().find(|row| row["name"] == name.to_string().as_str()).cloned().unwrap_or_default()
    }

    #[track_caller]
    fn until_enrolment(&self, name: &Name, enrolment: &str) {
        until("the controller says how it is", SOON, || {
            let row = self.workload(name);
            holds(row["enrolment"] == enrolment, || row.to_string())
        });
    }

    /// What it says that is unhealthy of a Service with one port.
    fn unhealthy(&self, service: &str) -> Value {
        let answer = self.get("/api/v1/services");
        let rows: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        let rows = rows.as_array().unwrap();
        let row = rows.iter().find(|row| row["name"] == service).cloned().unwrap_or_default();
        row["ports"][0]["unhealthy"].clone()
    }

    fn kill(&mut self) {
        self.program.take().unwrap().kill().unwrap();
    }
}

/// The way to the API server, which can be cut.
struct Way {
    address: SocketAddr,
    inner: Arc<Mutex<(bool, Vec<TcpStream>)>>,
}

impl Way {
    fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let inner = Arc::new(Mutex::new((false, Vec::new())));
        let shared = inner.clone();
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let mut inner = shared.lock().unwrap();
                let Ok(far) = TcpStream::connect(server) else { continue };
                if inner.0 {
                    continue;
                }
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    inner.1.push(from.try_clone().unwrap());
                    thread::spawn(move || carry(from, to));
                }
            }
        });
        Self { address, inner }
    }

    fn cut(&self) {
        let mut inner = self.inner.lock().unwrap();
        inner.0 = true;
        for stream in inner.1.drain(..) {
            // Fails for one that has ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn mend(&self) {
        self.inner.lock().unwrap().0 = false;
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn what_an_agent_reports_is_on_its_pod_and_every_controller_reads_it_there() {
    let bed = Bed::up();
    let node = bed.nodes[0].clone();
    bed.pod("agent-a", &node, "agent");
    let web = bed.web(&node);
    let kubeconfig = bed.kubeconfig("controller", None);
    let replicas = ["one", "two"].map(|name| bed.begin_replica(name, kubeconfig.clone()));
    let agent = Agent::start(&bed, &node, "agent-a", replicas[0].agents());
    agent.until_captured(&web, false);
    assert_eq!(bed.condition(&web), Value::Null, "nobody has said anything");

    agent.say(&web, Enrolment::Enrolled, "");
    let condition = bed.until_condition(&web, "True", "Captured");
    let since = condition["lastTransitionTime"].as_str().unwrap().to_owned();
    agent.until_captured(&web, true);
    for replica in &replicas {
        replica.until_enrolment(&web, "enrolled");
    }
    let uid = agent.view().unwrap().workload(&web).unwrap().uid.clone();
    until("an event tells", SOON, || {
        let events = bed.events(&uid);
        holds(events == ["Enrolled"], || format!("{events:?}"))
    });

    agent.say(&web, Enrolment::Failed, "its veth is gone: restart the pod");
    let condition = bed.until_condition(&web, "False", "Failed");
    assert_eq!(condition["message"], "its veth is gone: restart the pod");
    agent.until_captured(&web, false);
    for replica in &replicas {
        replica.until_enrolment(&web, "failed");
        assert_eq!(replica.workload(&web)["reason"], "its veth is gone: restart the pod");
    }
    until("a warning tells", SOON, || {
        let mut events = bed.events(&uid);
        events.sort();
        holds(events == ["Enrolled", "EnrolmentFailed"], || format!("{events:?}"))
    });
    agent.say(&web, Enrolment::Enrolled, "");
    let condition = bed.until_condition(&web, "True", "Captured");
    assert!(condition["lastTransitionTime"].as_str().unwrap() >= since.as_str());

    // Another pod under the name: what was said of the first is not said of it, nor by whom it is late with.
    bed.kubectl(&["delete", "pod", "web", PODS]);
    bed.web(&node);
    until("the view has the new pod", SOON, || {
        let view = agent.view().ok_or("no view")?;
        let now = view.workload(&web).map(|it| it.uid.clone());
        holds(now.as_ref().is_some_and(|now| *now != uid), || format!("{now:?}"))
    });
    agent.until_captured(&web, false);
    agent.say_of(&web, &uid, Enrolment::Failed, "late");
    agent.say_of(&web, &uid, Enrolment::Enrolled, "");
    // Said behind it on the same stream, and come through: so has what was said before.
    bed.pod("marker", &node, "other");
    bed.kubectl(&["label", "pod", "marker", "nodemesh.io/enroll=true"]);
    let marker = Name::new(&bed.namespace, "marker");
    agent.until_captured(&marker, false);
    agent.say(&marker, Enrolment::Enrolled, "");
    bed.until_condition(&marker, "True", "Captured");
    assert_eq!(bed.condition(&web), Value::Null, "of the pod that is gone");
    agent.say(&web, Enrolment::Enrolled, "");
    bed.until_condition(&web, "True", "Captured");

    // Nobody wants it any more.
    agent.say(&marker, Enrolment::Gone, "");
    bed.until_condition(&marker, "False", "NotEnrolled");
    for replica in &replicas {
        assert!(replica.has_metric("nodemesh_controller_state_unsaved{part=\"reports\"} 0").is_ok());
    }
}

#[test]
fn what_an_agent_finds_of_endpoints_is_on_their_pod_and_every_controller_knows_it() {
    let bed = Bed::up();
    let node = bed.nodes[0].clone();
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    bed.kubectl(&["apply", "-f", crds.to_str().unwrap()]);
    bed.kubectl(&["wait", "crd", "--all", "--for=condition=Established", "--timeout=30s"]);
    bed.pod("agent-a", &node, "agent");
    let web = bed.web(&node);
    bed.kubectl(&["label", "pod", "web", "app=pay"]);
    let namespace = &bed.namespace;
    bed.cluster
        .apply(&format!(
            r#"
apiVersion: v1
kind: Service
metadata: {{name: pay, namespace: {namespace}}}
spec: {{selector: {{app: pay}}, ports: [{{port: 80, targetPort: 8080}}]}}
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {{name: pay, namespace: {namespace}}}
spec: {{targetRefs: [{{kind: Service, name: pay}}], healthCheck: {{http: {{path: /healthz}}, port: 9000}}}}
"#
        ))
        .unwrap();
    let kubeconfig = bed.kubeconfig("controller", None);
    let replicas = ["one", "two"].map(|name| bed.begin_replica(name, kubeconfig.clone()));
    let agent = Agent::start(&bed, &node, "agent-a", replicas[0].agents());
    let check = until("the agent is told what to check", SOON, || {
        let view = agent.view().ok_or("no view")?;
        let checks = view.workload(&web).ok_or("no workload")?.checks.clone();
        holds(checks.len() == 1, || format!("{checks:?}")).map(|()| checks[0].clone())
    });
    assert_eq!((check.of.port, check.port, check.pace.unhealthy_after), (80, 9000, 3));

    agent.finds(&web, &check.of, Health::Undecided, "");
    agent.say(&web, Enrolment::Enrolled, "");
    let until_health = |status: &str, message: &str| {
        until("the pod says how it is", SOON, || {
            let condition = bed.condition_of(&web, "nodemesh.io/healthy");
            // An empty one is left out.
            let said = condition["message"].as_str().unwrap_or_default();
            let is_it = condition["status"] == status && said == message;
            holds(is_it, || condition.to_string())
        });
    };
    until_health("True", "");
    agent.finds(&web, &check.of, Health::Unhealthy, "it answered 503");
    until_health("False", &format!("{}: it answered 503", check.of));
    let service = format!("{namespace}/pay");
    for replica in &replicas {
        until("the controller says what is unhealthy", SOON, || {
            let row = replica.unhealthy(&service);
            holds(row[0]["reason"] == "it answered 503" && row[0]["asked"] == true, || row.to_string())
        });
    }
    agent.finds(&web, &check.of, Health::Healthy, "");
    until_health("True", "");

    // Nobody wants it checked any more.
    bed.kubectl(&["delete", "trafficpolicies.nodemesh.io", "pay"]);
    until("the agent is told", SOON, || {
        let checks = agent.view().unwrap().workload(&web).unwrap().checks.clone();
        holds(checks.is_empty(), || format!("{checks:?}"))
    });
    agent.checks_nothing_of(&web);
    until("the pod says nothing of it", SOON, || {
        let condition = bed.condition_of(&web, "nodemesh.io/healthy");
        holds(condition == Value::Null, || condition.to_string())
    });
    bed.until_condition(&web, "True", "Captured");
}

#[test]
fn an_agent_goes_from_one_controller_to_another_and_keeps_what_it_knows() {
    let bed = Bed::up();
    let node = bed.nodes[0].clone();
    bed.pod("agent-a", &node, "agent");
    let web = bed.web(&node);
    let view = bed
        .cluster
        .kubectl(&["config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"])
        .unwrap();
    let server: SocketAddr = view.trim().trim_start_matches("https://").parse().unwrap();
    let way = Way::to(server);
    let direct = bed.kubeconfig("controller", None);
    let by_way = bed.kubeconfig("controller", Some(&format!("https://{}", way.address)));
    let mut one = bed.begin_replica("one", direct.clone());
    let mut two = bed.begin_replica("two", by_way.clone());
    let agent = Agent::start(&bed, &node, "agent-a", one.agents());
    agent.until_captured(&web, false);
    agent.say(&web, Enrolment::Enrolled, "");
    agent.until_captured(&web, true);
    two.until_enrolment(&web, "enrolled");

    // From now on no view may say that it is not captured: peers would speak plaintext to it.
    let kept = |agent: &Agent| {
        let view = agent.view().expect("it had a view");
        assert!(view.workload(&web).is_some_and(|it| it.captured), "version {}", view.version());
        assert_eq!(agent.views_restored(), 0);
    };
    let until_new_version = |agent: &Agent, held: &str| {
        until("a view of the other controller", SOON, || {
            kept(agent);
            let version = agent.view().unwrap().version().to_owned();
            holds(version != held && agent.is_connected(), || version)
        });
    };
    let version = |agent: &Agent| agent.view().unwrap().version().to_owned();

    // One is killed.
    let held = version(&agent);
    agent.send_to(two.agents());
    one.kill();
    until_new_version(&agent, &held);

    // Both are: what is known stays. Then one that never heard of anything is there.
    let held = version(&agent);
    two.kill();
    until("the agent notices", SOON, || {
        kept(&agent);
        holds(!agent.is_connected(), || "connected".to_owned())
    });
    let one = bed.begin_replica("one-again", direct);
    agent.send_to(one.agents());
    until_new_version(&agent, &held);
    one.until_enrolment(&web, "enrolled");

    // The other is cut off from the API server, with the agent connected to it: what it knows stays in force.
    let two = bed.begin_replica("two-again", by_way);
    let held = version(&agent);
    let cut_off = two.agents();
    way.cut();
    agent.send_to(cut_off);
    drop(one);
    until_new_version(&agent, &held);
    agent.say(&web, Enrolment::Failed, "while nobody could write it");
    assert_eq!(bed.condition(&web)["status"], "True");
    // A third that can reach the API server knows nothing of it, until the way is mended.
    way.mend();
    bed.until_condition(&web, "False", "Failed");
    agent.until_captured(&web, false);
    two.until_enrolment(&web, "failed");
}
