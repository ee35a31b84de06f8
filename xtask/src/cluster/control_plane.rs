//! The programs of the control plane, with their settings.

use mesh_tests::cluster::names::{Machine, Names};

use super::{
    Options, Parts,
    certificates::{file, kubeconfig},
    machine::Program,
};

/// Where the API server listens.
pub(super) const PORT: u16 = 6443;
const ETCD: &str = "http://127.0.0.1:2379";
const ETCD_PEERS: &str = "http://127.0.0.1:2380";

/// What it runs; each waits for those it needs.
pub(super) fn programs(names: Names, options: Options, parts: &Parts) -> Vec<Program> {
    let path = |name: &str| file(names, name).display().to_string();
    let home = names.machine_home(Machine::Control);
    let services = options.both(names.services(), names.services6());
    vec![
        Program::kubernetes(parts, "etcd")
            .flag("data-dir", home.join("etcd").display())
            // The data is thrown away with the cluster.
            .switch("unsafe-no-fsync")
            .flag("listen-client-urls", ETCD)
            .flag("advertise-client-urls", ETCD)
            .flag("listen-peer-urls", ETCD_PEERS)
            .flag("log-level", "warn"),
        Program::kubernetes(parts, "kube-apiserver")
            .flag("etcd-servers", ETCD)
            .flag("secure-port", PORT)
            .flag("advertise-address", names.of_machine(Machine::Control))
            .flag("tls-cert-file", path("api-server.crt"))
            .flag("tls-private-key-file", path("api-server.key"))
            .flag("client-ca-file", path("ca.crt"))
            .flag("service-account-key-file", path("tokens.pub"))
            .flag("service-account-signing-key-file", path("tokens.key"))
            .flag("service-account-issuer", "https://kubernetes.default.svc")
            .flag("service-cluster-ip-range", &services)
            .flag("authorization-mode", "Node,RBAC")
            // Agents are privileged pods.
            .flag("allow-privileged", true)
            .flag("kubelet-client-certificate", path("kubelet-client.crt"))
            .flag("kubelet-client-key", path("kubelet-client.key"))
            .flag("kubelet-preferred-address-types", "InternalIP"),
        Program::kubernetes(parts, "kube-controller-manager")
            .flag("kubeconfig", kubeconfig(names, "controller-manager").display())
            .flag("leader-elect", false)
            .switch("use-service-account-credentials")
            .flag("service-account-private-key-file", path("tokens.key"))
            .flag("root-ca-file", path("ca.crt"))
            .flag("cluster-cidr", options.both(names.pods(), names.pods6()))
            .flag("allocate-node-cidrs", false)
            .flag("service-cluster-ip-range", &services)
            .flag("cluster-signing-cert-file", path("ca.crt"))
            .flag("cluster-signing-key-file", path("ca.key")),
        Program::kubernetes(parts, "kube-scheduler")
            .flag("kubeconfig", kubeconfig(names, "scheduler").display())
            .flag("leader-elect", false),
    ]
}
