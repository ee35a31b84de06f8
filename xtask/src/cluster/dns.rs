//! Names of services and pods: CoreDNS, built from source, as a pod behind the service whose address kubelets tell
//! every pod. A cluster has it when asked for: most tests go by addresses, and are quicker without.

use std::{fs, net::Ipv4Addr, path::PathBuf};

use anyhow::{Context, Result};
use mesh_tests::{cluster::names::Names, netns};

use super::{READY_DEADLINE, kubectl, node::DOMAIN, parts};
use crate::{
    go::Module,
    image::oci::{Image, NOBODY},
    run::{read, step},
};

/// Links CoreDNS with what a test needs of it.
const MODULE: Module = Module("xtask/dns");
/// What it is about.
const COREDNS: &str = "github.com/coredns/coredns";
const IMAGE: &str = "nodemesh.local/coredns:test";
/// Where it listens: without root there are no ports below 1024.
const PORT: u16 = 5353;
const NAMESPACE: &str = "kube-system";

/// The service's address.
pub(super) fn address(names: Names) -> Ipv4Addr {
    names.address(128, 10)
}

/// Makes the image, unless it is there.
pub(crate) fn prepare() -> Result<PathBuf> {
    let directory = parts::home().join(format!("dns-{}", MODULE.build_name(COREDNS)?));
    let image = directory.join("coredns.tar");
    if !image.exists() {
        step("Set up: DNS of the test cluster", || {
            eprintln!("  building CoreDNS {}, once, for a minute or two", MODULE.version(COREDNS)?);
            MODULE.fetch()?;
            fs::create_dir_all(&directory)?;
            let program = directory.join("coredns");
            MODULE.build(".", "", &program)?;
            Image::new(IMAGE, &["/usr/bin/coredns"])
                .user(NOBODY)
                .file("usr/bin/coredns", 0o755, fs::read(&program)?)
                .write(&image)
        })?;
    }
    Ok(image)
}

/// Makes what its pods are made of; they need the image. Returns once it answers.
pub(super) fn start(names: Names) -> Result<()> {
    netns::run(kubectl(names).args(["apply", "-f", "-"]), Some(&manifest(names)))?;
    let timeout = format!("--timeout={READY_DEADLINE}");
    let rolled_out = ["--namespace", NAMESPACE, "rollout", "status", "deployment/coredns", &timeout];
    read(kubectl(names).args(rolled_out)).context("waiting for CoreDNS").map(drop)
}

fn manifest(names: Names) -> String {
    let address = address(names);
    format!(
        r#"
apiVersion: v1
kind: ServiceAccount
metadata: {{namespace: {NAMESPACE}, name: coredns}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: coredns}}
rules:
  - {{apiGroups: [""], resources: [namespaces, pods, services], verbs: [list, watch]}}
  - {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: coredns}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: coredns}}
subjects: [{{kind: ServiceAccount, namespace: {NAMESPACE}, name: coredns}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{namespace: {NAMESPACE}, name: coredns}}
data:
  Corefile: |
    .:{PORT} {{
      errors
      ready
      kubernetes {DOMAIN} in-addr.arpa ip6.arpa
    }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{namespace: {NAMESPACE}, name: coredns}}
spec:
  selector: {{matchLabels: {{k8s-app: kube-dns}}}}
  template:
    metadata: {{labels: {{k8s-app: kube-dns}}}}
    spec:
      serviceAccountName: coredns
      # It does not ask itself.
      dnsPolicy: Default
      containers:
        - name: coredns
          image: {IMAGE}
          imagePullPolicy: IfNotPresent
          args: [-conf, /etc/coredns/Corefile]
          readinessProbe: {{httpGet: {{port: 8181, path: /ready}}, periodSeconds: 1}}
          volumeMounts: [{{name: settings, mountPath: /etc/coredns}}]
      volumes: [{{name: settings, configMap: {{name: coredns}}}}]
---
apiVersion: v1
kind: Service
metadata: {{namespace: {NAMESPACE}, name: kube-dns}}
spec:
  clusterIP: {address}
  selector: {{k8s-app: kube-dns}}
  ports:
    - {{name: dns, protocol: UDP, port: 53, targetPort: {PORT}}}
    - {{name: dns-tcp, protocol: TCP, port: 53, targetPort: {PORT}}}
"#
    )
}
