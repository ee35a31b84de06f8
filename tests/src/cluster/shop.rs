//! A namespace of a test: a server on the first node, a client on the second, and what is asked of them.
#![allow(clippy::unwrap_used, reason = "for tests alone, which fail by panicking")]

use std::time::Duration;

use serde_json::Value;

use super::Cluster;
use crate::{until, wait};

/// How long what follows a change of a label may take.
pub const SOON: Duration = Duration::from_secs(60);
/// How long pods may take until they are ready.
pub const PODS: &str = "--timeout=120s";
/// What the server says; nobody may read it between the nodes.
pub const SECRET: &str = "a-secret-of-the-shop";

/// A namespace of a test with a server on the first node and a client on the second.
#[derive(Debug)]
pub struct Shop<'a> {
    /// Where it is.
    pub cluster: &'a Cluster,
    /// Its name.
    pub namespace: &'static str,
}

impl<'a> Shop<'a> {
    /// Makes the namespace, with `web` on the first node and `client` on the second, and the service `web`; waits for both.
    pub fn open(cluster: &'a Cluster, namespace: &'static str) -> Self {
        let shop = Self { cluster, namespace };
        let nodes = cluster.nodes().unwrap();
        cluster.kubectl(&["create", "namespace", namespace]).unwrap();
        shop.account("web");
        shop.account("client");
        cluster.apply(&shop.server("web", &nodes[0], "")).unwrap();
        cluster.apply(&shop.client("client", &nodes[1])).unwrap();
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{namespace: {namespace}, name: web}}\n\
             spec:\n  selector: {{app: web}}\n  ports: [{{port: 80, targetPort: 8080}}]\n"
        );
        cluster.apply(&service).unwrap();
        shop.await_ready();
        shop
    }

    /// Makes a service account.
    pub fn account(&self, name: &str) {
        self.kubectl(&["create", "serviceaccount", name]);
    }

    /// A server that says [`SECRET`], with these lines in its container.
    pub fn server(&self, name: &str, node: &str, lines: &str) -> String {
        let image = Cluster::tools_image();
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{namespace: {}, name: {name}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: web
  terminationGracePeriodSeconds: 0
  containers:
    - name: it
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /www && echo {SECRET} > /www/index.html && exec httpd -f -p 8080 -h /www"]
      readinessProbe: {{httpGet: {{port: 8080, path: /}}, periodSeconds: 1}}
{lines}
"#,
            self.namespace
        )
    }

    /// A pod that commands are run in.
    pub fn client(&self, name: &str, node: &str) -> String {
        let image = Cluster::tools_image();
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{namespace: {}, name: {name}}}
spec:
  nodeName: {node}
  serviceAccountName: client
  terminationGracePeriodSeconds: 0
  containers:
    - name: it
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sleep, "1000000"]
"#,
            self.namespace
        )
    }

    /// kubectl, in this namespace.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).unwrap()
    }

    /// The same, where an error is an answer.
    pub fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        let inside = ["--namespace", self.namespace];
        self.cluster.kubectl(&[&inside[..], arguments].concat()).map_err(|e| format!("{e:#}"))
    }

    /// Waits until every pod is ready.
    #[track_caller]
    pub fn await_ready(&self) {
        self.kubectl(&["wait", "pod", "--all", "--for=condition=Ready", PODS]);
    }

    /// A field of an object of this namespace, by its JSONPath.
    pub fn field(&self, object: &str, path: &str) -> String {
        self.kubectl(&["get", object, "-o", &format!("jsonpath={{{path}}}")])
    }

    /// Asks the service from a pod.
    pub fn ask(&self, pod: &str) -> Result<String, String> {
        let url = format!("http://{}/", self.field("service/web", ".spec.clusterIP"));
        self.try_kubectl(&["exec", pod, "--", "timeout", "10", "wget", "-q", "-O", "-", &url])
    }

    /// Whether an answer to the client crosses the wire so that it can be read.
    pub fn is_readable(&self) -> Result<bool, String> {
        let mut wire = self.cluster.capture().map_err(|e| format!("{e:#}"))?;
        let answer = self.ask("client")?;
        if answer.trim() != SECRET {
            return Err(format!("it answered {answer:?}"));
        }
        Ok(!wire.plaintext(SECRET.as_bytes()).map_err(|e| format!("{e:#}"))?.is_empty())
    }

    /// Waits until nobody can read along.
    #[track_caller]
    pub fn await_meshed(&self) {
        self.until("the service is asked by mutual TLS", || {
            wait::holds(!self.is_readable()?, || "it can be read".to_owned())
        });
    }

    /// Waits until everybody can.
    #[track_caller]
    pub fn await_plain(&self) {
        self.until("the service is asked in the clear", || {
            wait::holds(self.is_readable()?, || "it cannot be read".to_owned())
        });
    }

    /// Looks until it is so; if it does not come, says besides what the mesh says of it.
    #[track_caller]
    fn until(&self, what: &str, look: impl FnMut() -> Result<(), String>) {
        if let Err(complaint) = wait::try_until(SOON, look) {
            panic!("{what}: not within {SOON:?}; last seen: {complaint}\n{}", self.state());
        }
    }

    /// The condition of all pods, what was refused last, and the state of the mesh.
    pub fn state(&self) -> String {
        let refusals = self.cluster.refusals();
        [self.captured(), refusals, self.cluster.state_of_mesh()].join("\n")
    }

    /// The condition of all pods.
    pub fn captured(&self) -> String {
        let columns = "custom-columns=NAME:.metadata.name,CAPTURED:.status.conditions[?(@.type=='nodemesh.io/captured')]";
        self.try_kubectl(&["get", "pods", "-o", columns]).unwrap_or_else(|error| error)
    }

    /// Waits until a pod says that it is captured.
    #[track_caller]
    pub fn await_captured(&self, pod: &str) {
        let says = "--for=condition=nodemesh.io/captured=True";
        if let Err(error) = self.try_kubectl(&["wait", &format!("pod/{pod}"), says, PODS]) {
            panic!("{error}\n{}", self.state());
        }
    }

    /// Labels an object.
    pub fn label(&self, object: &[&str], label: &str) {
        let arguments = [&["label", "--overwrite"][..], object, &[label]].concat();
        self.kubectl(&arguments);
    }

    /// Labels the namespace.
    pub fn label_namespace(&self, label: &str) {
        self.label(&["namespace", self.namespace], label);
    }

    /// The identity that a workload of this namespace has by its service account.
    pub fn identity(&self, account: &str) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{account}", self.namespace)
    }

    /// Waits for a line of the access log.
    #[track_caller]
    pub fn await_line(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        until(what, SOON, || {
            let lines = self.cluster.access_log().map_err(|e| format!("{e:#}"))?;
            let last = || lines.iter().rev().take(10).map(Value::to_string).collect::<Vec<_>>().join("\n");
            lines.iter().find(|line| wanted(line)).cloned().ok_or_else(last)
        })
    }
}
