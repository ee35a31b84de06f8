//! A cluster with what a test of identity needs: service accounts, their rights, pods with tokens, controllers with the
//! rights of an account.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use mesh_agent::{
    config::HostPort,
    identity::join::{JoinError, Proof, ProofFiles, join},
    surroundings::Surroundings,
};
use mesh_tests::{cluster::Cluster, process, process::Program, until, wait::holds};

/// How long pods may take until they are ready.
pub(crate) const PODS: &str = "--timeout=120s";
/// How long a controller may take to start, or to hear of what another one did.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// The audience of tokens for us.
pub(crate) const AUDIENCE: &str = "nodemesh";

/// A cluster with a namespace that is this test's own: service accounts of agents and controllers, and their rights.
pub(crate) struct Bed {
    pub(crate) cluster: Cluster,
    pub(crate) namespace: String,
    pub(crate) files: tempfile::TempDir,
    pub(crate) nodes: Vec<String>,
}

impl Bed {
    pub(crate) fn up() -> Self {
        let cluster = Cluster::at_hand().unwrap();
        static BEDS: AtomicU32 = AtomicU32::new(0);
        let number = BEDS.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("nodemesh-test-{}-{number}", std::process::id());
        let nodes = cluster.nodes().unwrap();
        let accounts: String = ["agent", "controller", "powerless", "other"]
            .map(|name| format!("---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n"))
            .concat();
        let rights = format!(
            r#"
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: {namespace}}}
rules:
  - {{apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}}
  - {{apiGroups: [""], resources: [nodes, namespaces, pods, services], verbs: [list, watch]}}
  - {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
  - {{apiGroups: [nodemesh.io], resources: [workloads, authorizationpolicies, authenticationpolicies, trafficpolicies], verbs: [list, watch]}}
  - {{apiGroups: [gateway.networking.k8s.io], resources: [httproutes, grpcroutes, tlsroutes, tcproutes, referencegrants], verbs: [list, watch]}}
  - {{apiGroups: [""], resources: [pods/status], verbs: [patch]}}
  - {{apiGroups: [events.k8s.io], resources: [events], verbs: [create, patch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: {namespace}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {namespace}}}
subjects: [{{kind: ServiceAccount, name: controller, namespace: {namespace}}}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: controller, namespace: {namespace}}}
rules:
  - {{apiGroups: [""], resources: [pods], verbs: [get]}}
  - {{apiGroups: [""], resources: [secrets, configmaps], verbs: [create]}}
  - {{apiGroups: [""], resources: [secrets], resourceNames: [nodemesh-ca], verbs: [get, patch]}}
  - {{apiGroups: [""], resources: [configmaps], resourceNames: [nodemesh-roots], verbs: [get, patch]}}
  - {{apiGroups: [coordination.k8s.io], resources: [leases], verbs: [create, get, update, patch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: controller, namespace: {namespace}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: controller}}
subjects: [{{kind: ServiceAccount, name: controller, namespace: {namespace}}}]
"#
        );
        let named = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n");
        cluster.apply(&format!("{named}{accounts}{rights}")).unwrap();
        Self { cluster, namespace, files: tempfile::tempdir().unwrap(), nodes }
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).unwrap()
    }

    pub(crate) fn try_kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.cluster.kubectl(&[&["--namespace", self.namespace.as_str()], arguments].concat())
    }

    /// A pod as the agent's is, on a node; ready when this returns.
    pub(crate) fn pod(&self, name: &str, node: &str, account: &str) {
        let (namespace, image) = (&self.namespace, Cluster::tools_image());
        self.cluster
            .apply(&format!(
                r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  nodeName: {node}
  serviceAccountName: {account}
  terminationGracePeriodSeconds: 0
  containers:
    - name: it
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sleep, "1000000"]
      volumeMounts: [{{name: tokens, mountPath: /tokens}}]
  volumes:
    - name: tokens
      projected:
        sources:
          - serviceAccountToken: {{path: mesh, audience: {AUDIENCE}}}
          - serviceAccountToken: {{path: api, audience: https://kubernetes.default.svc}}
"#
            ))
            .unwrap();
        self.kubectl(&["wait", "pod", name, "--for=condition=Ready", PODS]);
    }

    /// What the kubelet wrote for a pod.
    pub(crate) fn token(&self, pod: &str, which: &str) -> String {
        self.kubectl(&["exec", pod, "--", "cat", &format!("/tokens/{which}")])
    }

    /// A kubeconfig with the rights of a service account.
    pub(crate) fn kubeconfig(&self, account: &str, server: Option<&str>) -> PathBuf {
        let view = self.cluster.kubectl(&["config", "view", "--raw", "--minify", "-o", "json"]).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&view).unwrap();
        let token = self.kubectl(&["create", "token", account]);
        config["users"][0]["user"] = serde_json::json!({"token": token.trim()});
        if let Some(server) = server {
            config["clusters"][0]["cluster"]["server"] = server.into();
        }
        let path = self.files.path().join(format!("kubeconfig-{account}-{}", server.is_some()));
        fs::write(&path, config.to_string()).unwrap();
        path
    }

    /// `NAMESPACE/NAME` of something of ours.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    /// A controller that shares its authority, with the rights of an account.
    pub(crate) fn controller(&self, name: &str, kubeconfig: PathBuf, options: &[&str]) -> Controller {
        let controller = self.begin_controller(name, kubeconfig, options);
        controller.await_ready();
        controller
    }

    pub(crate) fn begin_controller(&self, name: &str, kubeconfig: PathBuf, options: &[&str]) -> Controller {
        let [source, state] = ["source", name].map(|it| self.files.path().join(it));
        fs::create_dir_all(&source).unwrap();
        self.begin_controller_of(name, &source, &state, kubeconfig, options)
    }

    /// One whose source is the cluster.
    pub(crate) fn begin_replica(&self, name: &str, kubeconfig: PathBuf) -> Controller {
        let (shared, state) = (self.shared(), self.files.path().join(name));
        let options: Vec<&str> = shared.iter().map(String::as_str).collect();
        self.begin_controller_of(name, Path::new("kube"), &state, kubeconfig, &options)
    }

    fn begin_controller_of(
        &self,
        name: &str,
        source: &Path,
        state: &Path,
        kubeconfig: PathBuf,
        options: &[&str],
    ) -> Controller {
        let mut command = Command::new(process::binaries().unwrap().join("mesh-controller"));
        command.arg("run").arg("--source").arg(source).arg("--state-dir").arg(state);
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        command.args(["--join-service-account", &self.name("agent")]).args(options);
        command.env("KUBECONFIG", kubeconfig).env("NO_COLOR", "1");
        let log = self.files.path().join(format!("{name}.log"));
        let program = Program::start("mesh-controller", &mut command, &log).unwrap();
        Controller { program: Some(program), log }
    }

    pub(crate) fn shared(&self) -> [String; 4] {
        let (secret, map) = (self.name("nodemesh-ca"), self.name("nodemesh-roots"));
        ["--ca-secret".into(), secret, "--roots-config-map".into(), map]
    }

    /// The roots as agents have them mounted, once there are this many.
    pub(crate) fn roots(&self, count: usize) -> PathBuf {
        let path = self.files.path().join("roots.pem");
        let published = ["get", "configmap", "nodemesh-roots", "-o", r"jsonpath={.data.roots\.pem}"];
        let text = until("the roots are published", SOON, || {
            let text = self.try_kubectl(&published).map_err(|error| format!("{error:#}"))?;
            holds(text.matches("BEGIN").count() == count, || text.clone()).map(|()| text)
        });
        fs::write(&path, text).unwrap();
        path
    }

    /// What an agent has mounted that comes with this token.
    pub(crate) fn proof(&self, token: &str, roots: PathBuf) -> Proof {
        let path = self.files.path().join("token");
        fs::write(&path, token).unwrap();
        ProofFiles::ServiceAccount { token: path, roots }.read().unwrap().unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for what in ["namespace", "clusterrole", "clusterrolebinding"] {
            // What is left of a cluster of ours goes with it.
            let _ = self.cluster.kubectl(&["delete", what, &self.namespace, "--wait=false"]);
        }
    }
}

pub(crate) struct Controller {
    pub(crate) program: Option<Program>,
    pub(crate) log: PathBuf,
}

impl Controller {
    pub(crate) fn await_ready(&self) {
        self.agents();
    }

    pub(crate) fn address(&self, which: &str) -> SocketAddr {
        until("the controller is ready", SOON, || {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let line = log.lines().rfind(|line| line.contains("controller is ready"));
            let (_, rest) =
                line.and_then(|line| line.split_once(&format!("{which}="))).ok_or_else(|| log.clone())?;
            rest.split_whitespace().next().unwrap_or_default().parse().map_err(|_| rest.to_owned())
        })
    }

    pub(crate) fn agents(&self) -> SocketAddr {
        self.address("agents")
    }

    pub(crate) fn get(&self, path: &str) -> String {
        let address = self.address("admin");
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub(crate) fn has_metric(&self, line: &str) -> Result<(), String> {
        let metrics = self.get("/metrics");
        holds(metrics.lines().any(|it| it == line), || metrics)
    }

    /// The fingerprints of its roots.
    pub(crate) fn roots(&self) -> BTreeSet<String> {
        let answer = self.get("/api/v1/certificates");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let parsed: serde_json::Value = serde_json::from_str(body).unwrap();
        let sha256 = |root: &serde_json::Value| root["sha256"].as_str().unwrap().to_owned();
        parsed["roots"].as_array().unwrap().iter().map(sha256).collect()
    }

    /// Joins as a node; the identity in the certificate.
    pub(crate) fn join(&self, node: &str, proof: &Proof) -> Result<String, JoinError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let at = HostPort::from(self.agents());
        let issued = runtime.block_on(join(&at, node, proof, &Surroundings::default()))?;
        Ok(issued.credential.id().to_string())
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        drop(self.program.take());
        if std::thread::panicking() {
            #[allow(clippy::print_stderr, reason = "for whoever reads the test's output")]
            {
                eprintln!("--- {}\n{}", self.log.display(), process::tail(&self.log));
            }
        }
    }
}
