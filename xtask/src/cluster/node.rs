//! A node: containerd, kubelet and kube-proxy, with their settings, and CNI plugins' network for pods.
//!
//! Inside of its mount namespace a node has the paths of any node (`/run/containerd`, `/var/lib/kubelet`,
//! `/var/log/pods`, `/sys/fs/bpf`), so that what is installed on it needs no knowledge of this harness.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use mesh_tests::cluster::names::{Machine, Names};
use serde_json::json;

use super::{
    Families, Options, Parts, Proxy, Shape,
    certificates::{file, kubeconfig},
    dns,
    machine::Program,
    parts::PAUSE_IMAGE,
};

/// containerd's socket, as seen on the node.
const SOCKET: &str = "/run/containerd/containerd.sock";
/// The cluster's name for itself.
pub(super) const DOMAIN: &str = "cluster.local";

/// containerd's socket, as seen from this machine.
pub(super) fn socket(names: Names, node: Machine) -> PathBuf {
    names.machine_home(node).join(SOCKET.trim_start_matches('/'))
}

/// Removes what a node has in memory only, and this machine reaches.
pub(super) fn forget(names: Names, node: Machine) -> Result<()> {
    let run = names.machine_home(node).join("run");
    fs::remove_dir_all(&run).with_context(|| format!("removing {}", run.display()))
}

fn setting(names: Names, node: Machine, name: &str) -> PathBuf {
    names.machine_home(node).join("etc").join(name)
}

/// What it runs.
pub(super) fn programs(names: Names, node: Machine, options: Options, parts: &Parts) -> Vec<Program> {
    let setting = |name: &str| setting(names, node, name);
    vec![
        Program::new("containerd", parts.tool("usr/bin/containerd"))
            .argument("--config")
            .argument(setting("containerd.toml").display())
            // The shim, runc and its libseccomp are beside containerd.
            .environment("PATH", parts.path())
            .environment("LD_LIBRARY_PATH", parts.tool("usr/lib/x86_64-linux-gnu").display()),
        Program::kubernetes(parts, "kubelet")
            .flag("config", setting("kubelet.json").display())
            .flag("kubeconfig", kubeconfig(names, &node.to_string()).display())
            .flag("hostname-override", node)
            .flag("node-ip", options.both(names.of_machine(node), names.of_machine6(node)))
            .after(SOCKET),
        Program::kubernetes(parts, "kube-proxy").flag("config", setting("kube-proxy.json").display()),
    ]
}

/// Writes settings and makes directories.
pub(super) fn write(names: Names, node: Machine, options: Options, parts: &Parts) -> Result<()> {
    let Machine::Node(index) = node else { unreachable!("only nodes have a node's settings") };
    let options = options.of_node(index);
    let put = |name: &str, content: String| {
        let path = setting(names, node, name);
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))
    };
    put("containerd.toml", containerd(&setting(names, node, "cni"), parts))?;
    put("cni/10-pods.conflist", pretty(&pods_network(names, index, options))?)?;
    put("kubelet.json", pretty(&kubelet(names, node))?)?;
    put("kube-proxy.json", pretty(&proxy(names, node, options))?)?;
    put("resolv.conf", format!("nameserver {}\n", names.of_machine(Machine::Control)))
}

fn pretty(value: &serde_json::Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)?)
}

fn containerd(cni: &Path, parts: &Parts) -> String {
    format!(
        r#"version = 2
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Lowering a score takes CAP_SYS_RESOURCE, which root of a container that runs these tests may lack.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{runc}"
      SystemdCgroup = false
"#,
        plugins = parts.tool("usr/lib/cni").display(),
        cni = cni.display(),
        runc = parts.tool("usr/sbin/runc").display(),
    )
}

/// CNI's configuration: pods have addresses of their node's range, which other nodes have a route to.
fn pods_network(names: Names, node: u8, options: Options) -> serde_json::Value {
    let mut addresses = json!({
        "type": "host-local",
        "ranges": [[{"subnet": names.pods_of(node)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    });
    if options.families == Families::Dual {
        addresses["ranges"] = json!([[{"subnet": names.pods_of(node)}], [{"subnet": names.pods_of6(node)}]]);
        addresses["routes"] = json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]);
    }
    let connects = match options.cni {
        Shape::Mixed => unreachable!("a node has one shape"),
        Shape::Ptp => json!({"type": "ptp", "ipMasq": false, "ipam": addresses}),
        Shape::Bridge => {
            json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": addresses})
        }
    };
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [connects, {"type": "portmap", "capabilities": {"portMappings": true}}],
    })
}

fn kubelet(names: Names, node: Machine) -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": file(names, "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", names.machine(node)),
        // Machines with cgroup v1 are refused otherwise.
        "failCgroupV1": false,
        "failSwapOn": false,
        // Tests read all that a pod has said: its log stays one file.
        "containerLogMaxSize": "1Gi",
        "clusterDNS": [dns::address(names).to_string()],
        "clusterDomain": DOMAIN,
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "resolvConf": setting(names, node, "resolv.conf"),
        // The disk is that of a machine which has other things to do: pods are not evicted for it, nor images.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "5s",
        "serializeImagePulls": false,
    })
}

fn proxy(names: Names, node: Machine, options: Options) -> serde_json::Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": match options.proxy {
            Proxy::Mixed => unreachable!("a node has one mode"),
            Proxy::Iptables => "iptables",
            Proxy::Nftables => "nftables",
        },
        "hostnameOverride": node.to_string(),
        "clientConnection": {"kubeconfig": kubeconfig(names, "proxy")},
        "clusterCIDR": options.both(names.pods(), names.pods6()),
        // These are of the whole machine, and cannot be set from a namespace.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    })
}
