//! Every kind of traffic that Kubernetes makes, through a mesh that is permissive, with whole views, and then through one
//! that is strict, whose nodes know what their pods use: on one cluster whose first node has routes for pods and
//! kube-proxy by iptables, the second a bridge and nftables, with both families of addresses. Applications are sockets of
//! this test in pods' network namespaces; what the kubelet needs is in the pods.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Stdio,
    time::Duration,
};

use mesh_core::model::Mode;
use mesh_tests::{
    apps::{self, Handler, Server},
    cluster::{
        Cluster,
        names::Machine,
        shop::{PODS, SOON, Shop},
    },
    http,
    metrics::Metrics,
    netns::NetNs,
    until, wait,
    workload::connect_in,
};
use serde_json::Value;

/// What servers begin their answers with; nobody may read it where it is carried by the mesh.
const SECRET: &str = "a-secret-of";
/// Where servers listen.
const PORT: u16 = 8080;
/// The port of nodes that leads to a pod's.
const HOST_PORT: u16 = 18_080;
/// Where a server on a node's own network listens.
const OF_NODE: u16 = 19_090;
/// Addresses of a Service that something outside of the cluster would lead to its nodes (RFC 5737).
const EXTERNAL: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
const BALANCED: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 20);
/// The reason by which a strict workload refuses who is not of the mesh.
const REFUSED: &str = "plaintext_to_strict";

/// How an exchange goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goes {
    /// Answered, and nobody between the nodes can read it.
    Hidden,
    /// Answered, and it can be read.
    Readable,
    /// Answered; it does not cross the wire, or it is of no interest whether it can be read.
    Answered,
    /// Not answered.
    Refused,
}

/// A pod, from outside and from inside.
struct Pod {
    name: &'static str,
    netns: NetNs,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Pod {
    fn both(&self, port: u16) -> [SocketAddr; 2] {
        [(self.v4, port).into(), (self.v6, port).into()]
    }

    /// A server inside, on both families.
    fn serve(&self, port: u16, handler: Handler) -> Server {
        let listen = || {
            let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), self.v6.into()];
            any.map(|any| TcpListener::bind((any, port)).unwrap())
        };
        Server::start(self.netns.enter(listen).unwrap().into(), handler).unwrap()
    }
}

/// The cluster, with everything that the phases speak to.
struct Bed<'a> {
    shop: Shop<'a>,
    nodes: Vec<String>,
    mode: Mode,
    /// In the mesh, on the first node: behind the Services.
    web: Pod,
    /// The same on the second node.
    db: Pod,
    /// In the mesh, one on each node.
    clients: [Pod; 2],
    /// Outside of it, one on each node.
    strangers: [Pod; 2],
    /// On their nodes' own network.
    hosts: [Pod; 2],
    /// A machine beside the cluster.
    beside: NetNs,
    _servers: Vec<Server>,
}

#[test]
fn all_traffic_of_kubernetes_goes_through_a_permissive_and_through_a_strict_mesh() {
    let cluster = Cluster::up(&["--cni", "mixed", "--proxy", "mixed", "--families", "dual"]).unwrap();
    cluster.install().unwrap();
    let mut bed = Bed::make(&cluster);
    for mode in [Mode::Permissive, Mode::Strict] {
        bed.enter(mode);
        if mode == Mode::Strict {
            bed.turn_to_views_by_demand();
        }
        pods_and_services(&bed);
        nodes_ports_and_external_addresses(&bed);
        the_nodes_own_network(&bed);
        names(&bed);
        probes(&bed);
        what_people_do_with_a_pod(&bed);
        a_stateful_set(&bed);
        a_rule_of_the_network_decides_on_meshed_traffic(&bed);
        services_that_choose_their_endpoints(&bed);
    }
}

impl<'a> Bed<'a> {
    /// From now on a node knows what its pods use, as in a mesh of thousands.
    fn turn_to_views_by_demand(&self) {
        let (whole, by_demand) = ("--whole-views-up-to=1000", "--whole-views-up-to=0");
        let change = |manifests: String| {
            assert!(manifests.contains(whole));
            manifests.replace(whole, by_demand)
        };
        self.shop.cluster.configure(change).unwrap();
        for node in &self.nodes {
            until("the views are by demand", SOON, || {
                let state = self.shop.cluster.ask_agent(node, "/api/v1/state");
                let state: Value = serde_json::from_str(&state.map_err(|error| format!("{error:#}"))?.body)
                    .map_err(|error| error.to_string())?;
                wait::holds(state["by_demand"] == true, || state.to_string())
            });
        }
    }

    fn make(cluster: &'a Cluster) -> Self {
        let shop = Shop { cluster, namespace: "shop" };
        let outside = Shop { cluster, namespace: "outside" };
        let nodes = cluster.nodes().unwrap();
        let mut manifest = String::new();
        for shop in [&shop, &outside] {
            cluster.kubectl(&["create", "namespace", shop.namespace]).unwrap();
            // No pod can be made before.
            shop.kubectl(&["wait", "serviceaccount/default", "--for=create", PODS]);
        }
        let host_port = format!("ports: [{{containerPort: {PORT}, hostPort: {HOST_PORT}}}]");
        let own_network = "hostNetwork: true";
        let (first, second) = (nodes[0].as_str(), nodes[1].as_str());
        for (namespace, name, node, spec, container) in [
            ("shop", "web", first, "", host_port.as_str()),
            ("shop", "db", second, "", ""),
            ("shop", "client-a", first, "", ""),
            ("shop", "client-b", second, "", ""),
            ("shop", "dns", first, "", ""),
            ("outside", "stranger-a", first, "", ""),
            ("outside", "stranger-b", second, "", ""),
            ("outside", "host-a", first, own_network, ""),
            ("outside", "host-b", second, own_network, ""),
        ] {
            manifest += &sleeper(namespace, name, node, spec, container);
        }
        for node in &nodes {
            manifest += &probed(cluster, node);
        }
        manifest += &stateful_set();
        for (name, selector, lines) in [
            ("web", "app: web", "ipFamilyPolicy: RequireDualStack"),
            ("db", "app: db", "ipFamilyPolicy: RequireDualStack"),
            ("by-node", "app: web", "type: NodePort"),
            ("balanced", "app: web", "type: LoadBalancer\n  externalIPs: [198.51.100.10]"),
            ("sticky", "role: server", "sessionAffinity: ClientIP"),
            ("local", "role: server", "internalTrafficPolicy: Local"),
        ] {
            manifest += &service(name, selector, lines, &format!("{{port: 80, targetPort: {PORT}}}"));
        }
        manifest += &service(
            "dns",
            "app: dns",
            "",
            "{name: udp, port: 53, protocol: UDP}, {name: tcp, port: 53, protocol: TCP}",
        );
        cluster.apply(&manifest).unwrap();
        for shop in [&shop, &outside] {
            shop.await_ready();
        }
        shop.kubectl(&["rollout", "status", "statefulset/ordered", PODS]);
        let status = format!(r#"{{"status":{{"loadBalancer":{{"ingress":[{{"ip":"{BALANCED}"}}]}}}}}}"#);
        shop.kubectl(&[
            "patch",
            "service",
            "balanced",
            "--subresource=status",
            "--type=merge",
            "-p",
            &status,
        ]);

        let names = cluster.names().unwrap();
        let beside = NetNs::open(&names.machine(Machine::Control)).unwrap();
        beside
            .ip(&format!("route add 198.51.100.0/24 via {}\n", names.of_machine(Machine::Node(0))))
            .unwrap();
        let pod = |shop: &Shop<'_>, name| Pod {
            name,
            netns: cluster.pod_netns(shop.namespace, name).unwrap(),
            v4: shop.field(&format!("pod/{name}"), ".status.podIPs[0].ip").parse().unwrap(),
            v6: shop.field(&format!("pod/{name}"), ".status.podIPs[1].ip").parse().unwrap(),
        };
        let (web, db, dns) = (pod(&shop, "web"), pod(&shop, "db"), pod(&shop, "dns"));
        let hosts = ["host-a", "host-b"].map(|name| pod(&outside, name));
        let servers = vec![
            web.serve(PORT, apps::http(&format!("{SECRET} web"))),
            db.serve(PORT, apps::http(&format!("{SECRET} db"))),
            hosts[0].serve(OF_NODE, apps::http(&format!("{SECRET} host-a"))),
            dns.serve(53, apps::dns()),
        ];
        let socket = dns.netns.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53))).unwrap().unwrap();
        apps::dns_over_udp(socket).unwrap();
        Self {
            clients: ["client-a", "client-b"].map(|name| pod(&shop, name)),
            strangers: ["stranger-a", "stranger-b"].map(|name| pod(&outside, name)),
            shop,
            nodes,
            mode: Mode::Permissive,
            web,
            db,
            hosts,
            beside,
            _servers: servers,
        }
    }

    /// Puts the mode in force.
    fn enter(&mut self, mode: Mode) {
        self.mode = mode;
        self.shop.label_namespace(&format!("nodemesh.io/mode={}", mode.as_str()));
        self.shop.label_namespace("nodemesh.io/enroll=true");
        let all = ["wait", "pod", "--all", "--for=condition=nodemesh.io/captured", PODS];
        if let Err(error) = self.shop.try_kubectl(&all) {
            panic!("{error}\n{}", self.shop.state());
        }
    }

    /// What who is not of the mesh gets of who is.
    fn of_strangers(&self) -> Goes {
        match self.mode {
            Mode::Permissive => Goes::Readable,
            Mode::Strict => Goes::Refused,
        }
    }

    fn service(&self, name: &str) -> Vec<IpAddr> {
        let said = self.shop.field(&format!("service/{name}"), ".spec.clusterIPs[*]");
        said.split_whitespace().map(|address| address.parse().unwrap()).collect()
    }

    fn node_address(&self, index: u8) -> Ipv4Addr {
        self.shop.cluster.names().unwrap().of_machine(Machine::Node(index))
    }

    /// Asks an HTTP server, and looks how that goes, until it goes as it must. Returns the answer.
    #[track_caller]
    fn ask(&self, what: &str, from: &NetNs, to: SocketAddr, goes: Goes) -> String {
        until(&format!("{:?}: {what} ({to}) must be {goes:?}", self.mode), SOON, || {
            let mut wire = self.shop.cluster.capture().map_err(|e| format!("{e:#}"))?;
            let answer = http::get(from, to, "/");
            if goes == Goes::Refused {
                return match answer {
                    Ok(answer) => Err(format!("it was answered {:?}", answer.body)),
                    Err(_) => Ok(String::new()),
                };
            }
            let answer = answer.map_err(|error| format!("{error:#}"))?.body;
            wait::holds(answer.starts_with(SECRET), || format!("it answered {answer:?}"))?;
            let readable = wire.plaintext(SECRET.as_bytes()).map_err(|e| format!("{e:#}"))?;
            match goes {
                Goes::Hidden => {
                    wait::holds(readable.is_empty(), || format!("it can be read: {readable:?}"))?;
                    let packets = wire.packets().map_err(|e| format!("{e:#}"))?;
                    // Others speak TLS too, the API server above all, but not with this port.
                    let mut carried =
                        packets.iter().filter(|it| [it.source.port(), it.destination.port()].contains(&PORT));
                    wait::holds(carried.any(|packet| packet.is_tls()), || {
                        format!("there is no TLS on the wire: {packets:?}")
                    })?;
                }
                Goes::Readable => wait::holds(!readable.is_empty(), || "it cannot be read".to_owned())?,
                Goes::Answered | Goes::Refused => {}
            }
            Ok(answer)
        })
    }

    /// A connection to a workload that its agent ended for this reason, from somewhere.
    #[track_caller]
    fn await_refusal(&self, workload: &str, reason: &str) {
        self.shop.await_line(&format!("{workload} refused: {reason}"), |line: &Value| {
            line["reason"] == reason && line["destination"]["workload"] == workload
        });
    }
}

/// A pod that does nothing, with lines in its spec and in its container.
fn sleeper(namespace: &str, name: &str, node: &str, spec: &str, container: &str) -> String {
    let image = Cluster::tools_image();
    let role = if ["web", "db"].contains(&name) { "server" } else { "other" };
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{namespace: {namespace}, name: {name}, labels: {{app: {name}, role: {role}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  {spec}
  containers:
    - name: it
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sleep, "1000000"]
      {container}
---
"#
    )
}

/// A pod with every kind of probe, each of which ends its container at the first failure. etcd answers probes by gRPC.
fn probed(cluster: &Cluster, node: &str) -> String {
    let image = Cluster::tools_image();
    let kubernetes = fs::canonicalize(cluster.names().unwrap().kubectl()).unwrap();
    let name = probed_name(node);
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{namespace: shop, name: {name}, labels: {{app: probed}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  volumes: [{{name: etcd, hostPath: {{path: "{kubernetes}", type: File}}}}]
  containers:
    - name: http
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /www && echo {SECRET} {name} > /www/index.html && echo serving && exec httpd -f -p {PORT} -h /www"]
      startupProbe: {{httpGet: {{port: {PORT}, path: /}}, periodSeconds: 1, failureThreshold: 60}}
      livenessProbe: {{httpGet: {{port: {PORT}, path: /}}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}}
      readinessProbe: {{tcpSocket: {{port: {PORT}}}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}}
    - name: grpc
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [/kubernetes, etcd, --data-dir=/tmp/etcd, --unsafe-no-fsync, --listen-client-urls=http://0.0.0.0:2379, --advertise-client-urls=http://127.0.0.1:2379]
      volumeMounts: [{{name: etcd, mountPath: /kubernetes, readOnly: true}}]
      startupProbe: {{grpc: {{port: 2379}}, periodSeconds: 1, failureThreshold: 60}}
      livenessProbe: {{grpc: {{port: 2379}}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}}
      readinessProbe: {{exec: {{command: ["/bin/true"]}}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 10}}
---
"#,
        kubernetes = kubernetes.display(),
    )
}

fn probed_name(node: &str) -> String {
    format!("probed-{node}")
}

/// Two pods with names of their own behind a headless Service.
fn stateful_set() -> String {
    let image = Cluster::tools_image();
    format!(
        r#"
apiVersion: v1
kind: Service
metadata: {{namespace: shop, name: ordered}}
spec:
  clusterIP: None
  selector: {{app: ordered}}
  ports: [{{port: {PORT}}}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {{namespace: shop, name: ordered}}
spec:
  serviceName: ordered
  replicas: 2
  podManagementPolicy: Parallel
  selector: {{matchLabels: {{app: ordered}}}}
  template:
    metadata: {{labels: {{app: ordered}}}}
    spec:
      terminationGracePeriodSeconds: 0
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: DoNotSchedule
          labelSelector: {{matchLabels: {{app: ordered}}}}
      containers:
        - name: it
          image: {image}
          imagePullPolicy: IfNotPresent
          command: [sh, -c, "mkdir /www && echo {SECRET} $(hostname) > /www/index.html && exec httpd -f -p {PORT} -h /www"]
          readinessProbe: {{tcpSocket: {{port: {PORT}}}, periodSeconds: 1}}
---
"#
    )
}

fn service(name: &str, selector: &str, lines: &str, ports: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: {name}}}\nspec:\n  {lines}\n  \
         selector: {{{selector}}}\n  ports: [{ports}]\n---\n"
    )
}

/// Across nodes and on one, to pods and by a Service's addresses, by both families, to nodes of both shapes.
fn pods_and_services(bed: &Bed<'_>) {
    let [client_a, client_b] = &bed.clients;
    let [stranger_a, stranger_b] = &bed.strangers;
    for (server, near, far, stranger) in
        [(&bed.web, client_a, client_b, stranger_b), (&bed.db, client_b, client_a, stranger_a)]
    {
        let services = bed.service(server.name);
        assert_eq!(services.len(), 2, "a Service of both families: {services:?}");
        let addresses = server.both(PORT).into_iter();
        for to in addresses.chain(services.into_iter().map(|address| (address, 80).into())) {
            let answer = bed.ask("a client on the other node", &far.netns, to, Goes::Hidden);
            let own: IpAddr = if to.is_ipv4() { far.v4.into() } else { far.v6.into() };
            assert_eq!(answer.trim(), format!("{SECRET} {} saw {own}", server.name), "the source's address");
            bed.ask("a client on the same node", &near.netns, to, Goes::Answered);
            bed.ask("a pod outside of the mesh", &stranger.netns, to, bed.of_strangers());
        }
        if bed.mode == Mode::Strict {
            bed.await_refusal(&format!("shop/{}", server.name), REFUSED);
        }
    }
    let [_, v6] = stranger_a.both(OF_NODE);
    let server = stranger_a.serve(OF_NODE, apps::http(&format!("{SECRET} stranger-a")));
    bed.ask("a client asks who is not of the mesh", &client_b.netns, v6, Goes::Readable);
    drop(server);
}

/// Ports of nodes and addresses from outside: whoever comes by them is not of the mesh, as kube-proxy and the node's rules
/// lead them there.
fn nodes_ports_and_external_addresses(bed: &Bed<'_>) {
    let port: u16 = bed.shop.field("service/by-node", ".spec.ports[0].nodePort").parse().unwrap();
    let ways: [(&str, SocketAddr); 5] = [
        ("the NodePort at the pod's node", (bed.node_address(0), port).into()),
        ("the NodePort at the other node", (bed.node_address(1), port).into()),
        ("the hostPort", (bed.node_address(0), HOST_PORT).into()),
        ("an external address", (EXTERNAL, 80).into()),
        ("the address of a load balancer", (BALANCED, 80).into()),
    ];
    for (what, to) in ways {
        bed.ask(what, &bed.beside, to, bed.of_strangers());
        let inside = if bed.mode == Mode::Strict { Goes::Refused } else { Goes::Answered };
        bed.ask(&format!("a client of the mesh, by {what}"), &bed.clients[1].netns, to, inside);
    }
    let [by_node, ..] = bed.service("by-node")[..] else { panic!("a Service has an address") };
    let to = (by_node, 80).into();
    bed.ask("the same Service by its own address", &bed.clients[1].netns, to, Goes::Hidden);
}

/// Pods on their nodes' own network are not of the mesh; a node reaches its own pods always, as its kubelet must.
fn the_nodes_own_network(bed: &Bed<'_>) {
    let [host_a, host_b] = &bed.hosts;
    for to in bed.web.both(PORT) {
        bed.ask("a pod on the other node's own network", &host_b.netns, to, bed.of_strangers());
        bed.ask("a pod on the node's own network", &host_a.netns, to, Goes::Answered);
    }
    let to = (bed.node_address(0), OF_NODE).into();
    bed.ask("a server on a node's own network", &bed.clients[1].netns, to, Goes::Readable);
}

/// DNS: over UDP it is not carried, but let through; over TCP it is a connection like any other.
fn names(bed: &Bed<'_>) {
    let [dns, ..] = bed.service("dns")[..] else { panic!("a Service has an address") };
    let to = SocketAddr::from((dns, 53));
    let (client, name) = (&bed.clients[1].netns, "a-secret-name.shop");
    let question = apps::dns_question(name);
    until("a name is resolved over UDP", SOON, || {
        let any = (Ipv4Addr::UNSPECIFIED, 0);
        let socket = client.enter(|| UdpSocket::bind(any)).unwrap().map_err(|e| e.to_string())?;
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket.send_to(&question, to).map_err(|error| error.to_string())?;
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer).map_err(|error| error.to_string())?;
        wait::holds(answer[..length].ends_with(&apps::DNS_ADDRESS), || format!("{:?}", &answer[..length]))
    });
    until("a name is resolved over TCP, and nobody can read which", SOON, || {
        let mut wire = bed.shop.cluster.capture().map_err(|e| format!("{e:#}"))?;
        let mut stream = connect_in(client, to, Duration::from_secs(5)).map_err(|e| e.to_string())?;
        let length = (question.len() as u16).to_be_bytes();
        stream.write_all(&[&length[..], &question].concat()).map_err(|e| e.to_string())?;
        let mut answer = vec![];
        stream.read_to_end(&mut answer).map_err(|e| e.to_string())?;
        wait::holds(answer.ends_with(&apps::DNS_ADDRESS), || format!("{answer:?}"))?;
        let seen = wire.plaintext(b"a-secret-name").map_err(|e| format!("{e:#}"))?;
        wait::holds(seen.is_empty(), || format!("it can be read: {seen:?}"))
    });
}

/// The kubelet's probes of all kinds go on; one that failed once would have ended its container.
fn probes(bed: &Bed<'_>) {
    // How often each of the four has succeeded, and how often any has failed, as the kubelet counts.
    let counts = |node: &str| {
        let said = bed.shop.cluster.kubectl(&[
            "get",
            "--raw",
            &format!("/api/v1/nodes/{node}/proxy/metrics/probes"),
        ]);
        let metrics = Metrics::parse(&said.unwrap());
        let pod = probed_name(node);
        let count = |container: &str, kind: &str, result: &str| {
            let labels =
                [("pod", pod.as_str()), ("container", container), ("probe_type", kind), ("result", result)];
            metrics.sum("prober_probe_total", &labels)
        };
        [("http", "Liveness"), ("http", "Readiness"), ("grpc", "Liveness"), ("grpc", "Readiness")]
            .map(|(container, kind)| (count(container, kind, "successful"), count(container, kind, "failed")))
    };
    for node in &bed.nodes {
        let before = counts(node);
        until("probes by HTTP, TCP, gRPC and exec succeed", SOON, || {
            let now = counts(node);
            let went_on = now.iter().zip(&before).all(|(now, before)| now.0 >= before.0 + 2.0);
            wait::holds(went_on, || format!("{before:?}, then {now:?}"))
        });
        let failed = |counts: [(f64, f64); 4]| counts.map(|(_, failed)| failed);
        assert_eq!(failed(counts(node)), failed(before), "probes of {node}: HTTP, TCP, gRPC, exec");
        let pod = format!("pod/{}", probed_name(node));
        let restarts = bed.shop.field(&pod, ".status.containerStatuses[*].restartCount");
        assert_eq!(restarts, "0 0", "{pod}: a container was ended by a probe");
    }
}

/// `kubectl exec`, `logs` and `port-forward`, on both nodes.
fn what_people_do_with_a_pod(bed: &Bed<'_>) {
    for node in &bed.nodes {
        let pod = probed_name(node);
        assert_eq!(bed.shop.kubectl(&["exec", &pod, "-c", "http", "--", "hostname"]).trim(), pod);
        assert_eq!(bed.shop.kubectl(&["logs", &pod, "-c", "http"]).trim(), "serving");
        let forward =
            ["--namespace", bed.shop.namespace, "port-forward", &format!("pod/{pod}"), &format!(":{PORT}")];
        let mut forward = bed.shop.cluster.command(&forward).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        // Held open, as kubectl ends when it cannot write.
        let mut out = BufReader::new(forward.stdout.take().unwrap());
        out.read_line(&mut said).unwrap();
        // Forwarding from 127.0.0.1:PORT -> 8080
        let local = said.split([':', ' ']).find_map(|word| word.parse::<u16>().ok());
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, local.expect("a port"))).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        forward.kill().unwrap();
        forward.wait().unwrap();
        assert!(answer.ends_with(&format!("{SECRET} {pod}\n")), "{:?}: {answer}", bed.mode);
    }
}

/// Pods with names of their own are asked one by one; one that is made again under its name is in the mesh again.
fn a_stateful_set(bed: &Bed<'_>) {
    let ask_all = || {
        for pod in ["ordered-0", "ordered-1"] {
            let field = |path: &str| bed.shop.field(&format!("pod/{pod}"), path);
            let node = field(".spec.nodeName");
            let far = if node == bed.nodes[0] { &bed.clients[1] } else { &bed.clients[0] };
            let to = SocketAddr::new(field(".status.podIP").parse().unwrap(), PORT);
            let answer = bed.ask(pod, &far.netns, to, Goes::Hidden);
            assert_eq!(answer.trim(), format!("{SECRET} {pod}"));
            let stranger = if node == bed.nodes[0] { &bed.strangers[1] } else { &bed.strangers[0] };
            bed.ask(&format!("{pod} by a stranger"), &stranger.netns, to, bed.of_strangers());
        }
    };
    ask_all();
    let before = bed.shop.field("pod/ordered-0", ".metadata.uid");
    bed.shop.kubectl(&["delete", "pod", "ordered-0"]);
    bed.shop.kubectl(&["rollout", "status", "statefulset/ordered", PODS]);
    bed.shop.await_captured("ordered-0");
    assert_ne!(bed.shop.field("pod/ordered-0", ".metadata.uid"), before);
    ask_all();
}

/// Rules as a CNI plugin makes them of a NetworkPolicy: the first client may, all others may not.
fn a_rule_of_the_network_decides_on_meshed_traffic(bed: &Bed<'_>) {
    let node = bed.shop.cluster.node_netns(&bed.nodes[0]).unwrap();
    let (allowed, web) = (bed.clients[1].v4, bed.web.v4);
    let rules = |what: &str| {
        format!(
            "iptables -w {what} FORWARD -d {web} -p tcp --dport {PORT} -j DROP && \
             iptables -w {what} FORWARD -s {allowed} -d {web} -p tcp --dport {PORT} -j ACCEPT"
        )
    };
    node.shell(&rules("-I")).unwrap();
    let to = (bed.web.v4, PORT).into();
    bed.ask("a client that may", &bed.clients[1].netns, to, Goes::Hidden);
    // On the same node the other client is forwarded, too: there is no bridge.
    bed.ask("a client that may not", &bed.clients[0].netns, to, Goes::Refused);
    bed.ask("a stranger that may not", &bed.strangers[1].netns, to, Goes::Refused);
    let counted = node.shell("iptables -w -nvxL FORWARD").unwrap();
    let packets = |target: &str| {
        let rule = counted.lines().find(|line| line.contains(target) && line.contains(&web.to_string()));
        let count = rule.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        count.unwrap_or_else(|| panic!("{target}: {counted}"))
    };
    assert!(packets("ACCEPT") > 0 && packets("DROP") > 0, "the rules saw the mesh's packets: {counted}");
    node.shell(&rules("-D")).unwrap();
    bed.shop.await_line("a client that may not, told by its agent", |line: &Value| {
        line["source"]["workload"] == "shop/client-a"
            && line["destination"]["workload"] == "shop/web"
            && line["outcome"] != "ok"
    });
    bed.ask("everybody may again", &bed.clients[1].netns, to, Goes::Hidden);
}

/// A Service with session affinity gives a client the same endpoint again, one with endpoints of the own node alone those;
/// in the strict mode nothing but the mesh's own connections would be answered.
fn services_that_choose_their_endpoints(bed: &Bed<'_>) {
    let [sticky, ..] = bed.service("sticky")[..] else { panic!("a Service has an address") };
    let [local, ..] = bed.service("local")[..] else { panic!("a Service has an address") };
    for (client, near) in bed.clients.iter().zip([&bed.web, &bed.db]) {
        let ask = |what, address| bed.ask(what, &client.netns, (address, 80).into(), Goes::Answered);
        let first = ask("a Service with session affinity", sticky);
        for _ in 0..5 {
            assert_eq!(ask("the same again", sticky), first, "{}: the same endpoint", client.name);
            let answer = ask("a Service of the own node", local);
            assert!(answer.starts_with(&format!("{SECRET} {}", near.name)), "{}: {answer}", client.name);
        }
    }
}
