//! A whole world: nodes, workloads, a controller, agents; taken down on drop.
//!
//! Invariant: everything that a world makes has its number in its name ([`Slot`]), so a crash leaves nothing that the
//! next world would not find and remove.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};

use crate::{
    agent::{Agent, Settings},
    apps,
    controller::{CommandOutput, Controller},
    log,
    manifests::{self, Enrolment, Manifests, Mode, WorkloadManifest},
    netns::NetNs,
    process::{self, Program},
    slot::{self, Slot},
    topology::{self, Pair, Plan, Shape},
    wait,
    wire::Capture,
    workload::Workload,
};

/// Workloads that fit on a node's address range.
pub const WORKLOADS_PER_NODE: usize = 250;
/// How long a new world may take until every workload that should be enrolled is.
const SETTLED: Duration = Duration::from_secs(30);

/// Where [`World::await_tunnel`] connects: a port that no test uses (RFC 862).
pub const PROBE_PORT: u16 = 7;

/// A workload to be.
#[derive(Debug, Clone)]
pub struct WorkloadSpec {
    namespace: String,
    name: String,
    node: String,
    labels: Vec<(String, String)>,
    enrolment: Option<Enrolment>,
    uid: Option<String>,
    address: Option<Pair>,
    untold: bool,
}

impl WorkloadSpec {
    /// `namespace/name` on a node, with the label `app: NAME`, enrolled as its namespace says.
    pub fn new(full_name: &str, node: &str) -> Self {
        let (namespace, name) = full_name.split_once('/').unwrap_or(("default", full_name));
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node: node.to_owned(),
            labels: vec![("app".to_owned(), name.to_owned())],
            enrolment: None,
            uid: None,
            address: None,
            untold: false,
        }
    }

    /// Runs before anybody is told: its manifest is written by [`World::write_workload`].
    pub fn untold(mut self) -> Self {
        self.untold = true;
        self
    }

    /// Makes it a pod: a first process in a control group that is named by this uid.
    pub fn pod(mut self, uid: &str) -> Self {
        self.uid = Some(uid.to_owned());
        self
    }

    /// Gives it an address that another one had, which must be gone.
    pub fn address(mut self, address: Pair) -> Self {
        self.address = Some(address);
        self
    }

    /// Sets the label that services select by.
    pub fn app(mut self, app: &str) -> Self {
        self.labels = vec![("app".to_owned(), app.to_owned())];
        self
    }

    /// Leaves it outside of the mesh, whatever its namespace says.
    pub fn outside(mut self) -> Self {
        self.enrolment = Some(Enrolment::Outside);
        self
    }
}

#[derive(Debug, Clone)]
struct ServiceSpec {
    namespace: String,
    name: String,
    app: String,
    port: u16,
    target: u16,
}

/// Says what a world shall be.
#[derive(Debug)]
#[must_use]
pub struct Builder {
    shape: Shape,
    rp_filter: bool,
    nodes: Vec<String>,
    namespaces: BTreeMap<String, (Enrolment, Mode)>,
    workloads: Vec<WorkloadSpec>,
    services: Vec<ServiceSpec>,
    mesh: bool,
    settled_within: Duration,
    certificate_ttl: Option<Duration>,
    /// More words of the controller's command line.
    controller_options: Vec<String>,
    /// And of the agents'.
    agent_options: Vec<String>,
    addresses_per_workload: Option<usize>,
    default_mode: Option<Mode>,
    hold_new: Duration,
}

/// One machine of a world.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its own namespace.
    pub netns: NetNs,
    /// Its addresses on the wire.
    pub address: Pair,
    place: u8,
    agent: Option<Agent>,
    next_workload: Mutex<u8>,
}

/// A world.
#[derive(Debug)]
pub struct World {
    /// The manifests that the controller reads.
    pub yaml: Manifests,
    wire: NetNs,
    nodes: Vec<Node>,
    workloads: Mutex<BTreeMap<String, Workload>>,
    services: BTreeMap<String, Pair>,
    controller: Option<Controller>,
    /// Processes of pods, each with the name of its namespace.
    pods: Mutex<Vec<(String, Program)>>,
    shape: Shape,
    rp_filter: bool,
    plan: Plan,
    directory: PathBuf,
    // Last, so that the number is held until everything that has it is gone.
    slot: Slot,
}

impl Builder {
    /// How workloads hang on their nodes; routed unless said.
    pub fn shape(mut self, shape: Shape) -> Self {
        self.shape = shape;
        self
    }

    /// How long certificates live; the controller's default unless said.
    pub fn certificate_ttl(mut self, ttl: Duration) -> Self {
        self.certificate_ttl = Some(ttl);
        self
    }

    /// What the controller's `--default-mode` says; the namespaces of a world say their own mode.
    pub fn default_mode(mut self, mode: Mode) -> Self {
        self.default_mode = Some(mode);
        self
    }

    /// What the controller's `--whole-views-up-to` says; its default unless said.
    pub fn whole_views_up_to(mut self, count: usize) -> Self {
        self.controller_options.extend(["--whole-views-up-to".to_owned(), count.to_string()]);
        self
    }

    /// What the agents' `--addresses-per-workload` says; its default unless said.
    pub fn addresses_per_workload(mut self, count: usize) -> Self {
        self.addresses_per_workload = Some(count);
        self
    }

    /// The collector that agents hand spans to, and of how many of the requests.
    pub fn traced_by(mut self, endpoint: &str, sample: &str) -> Self {
        self.agent_options
            .extend(["--tracing-endpoint", endpoint, "--tracing-sample", sample].map(str::to_owned));
        self
    }

    /// How long agents hold what new pods send; not at all unless said.
    pub fn hold_new(mut self, limit: Duration) -> Self {
        self.hold_new = limit;
        self
    }

    /// Turns the strict reverse path filter on, in nodes and workloads.
    pub fn rp_filter(mut self) -> Self {
        self.rp_filter = true;
        self
    }

    /// Adds a node.
    pub fn node(mut self, name: &str) -> Self {
        self.nodes.push(name.to_owned());
        self
    }

    /// Says what a namespace is; one that is only used is enrolled and permissive.
    pub fn namespace(mut self, name: &str, enrolment: Enrolment, mode: Mode) -> Self {
        self.namespaces.insert(name.to_owned(), (enrolment, mode));
        self
    }

    /// Adds a workload `namespace/name` on a node.
    pub fn workload(self, full_name: &str, node: &str) -> Self {
        self.with(WorkloadSpec::new(full_name, node))
    }

    /// Adds a workload.
    pub fn with(mut self, workload: WorkloadSpec) -> Self {
        self.workloads.push(workload);
        self
    }

    /// Adds a service `namespace/name` over the workloads with `app: APP`.
    pub fn service(mut self, full_name: &str, app: &str, port: u16, target: u16) -> Self {
        let (namespace, name) = full_name.split_once('/').unwrap_or(("default", full_name));
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.services.push(ServiceSpec { namespace, name, app: app.to_owned(), port, target });
        self
    }

    /// Namespaces and links only: no controller, no agents.
    pub fn without_mesh(mut self) -> Self {
        self.mesh = false;
        self
    }

    /// How long everything may take to be enrolled, once the agents run.
    pub fn settled_within(mut self, deadline: Duration) -> Self {
        self.settled_within = deadline;
        self
    }

    /// Makes it all, and waits until every workload that should be enrolled is.
    pub fn build(self) -> Result<World> {
        let slot = Slot::take()?;
        let plan = Plan { world: slot.number() };
        let directory = slot.directory();
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let wire = NetNs::create(&format!("{}-wire", slot.prefix()), self.rp_filter)?;
        topology::lay_wire(&wire, plan)?;
        let mut world = World {
            yaml: Manifests::create(directory.join("yaml"))?,
            wire,
            nodes: vec![],
            workloads: Mutex::default(),
            services: BTreeMap::new(),
            controller: None,
            pods: Mutex::default(),
            shape: self.shape,
            rp_filter: self.rp_filter,
            plan,
            directory,
            slot,
        };
        world.lay_nodes(&self.nodes)?;
        world.write_namespaces(&self.namespaces, &self.workloads)?;
        for workload in &self.workloads {
            world.add_workload(workload)?;
        }
        world.write_services(&self.services)?;
        if self.mesh {
            world.start_controller(self.certificate_ttl, self.default_mode, self.controller_options)?;
            world.start_agents(self.hold_new, self.addresses_per_workload, &self.agent_options)?;
            let inside = |w: &&WorkloadSpec| {
                let by_namespace = self.namespaces.get(&w.namespace).map_or(Enrolment::Enrolled, |n| n.0);
                w.enrolment.unwrap_or(by_namespace) == Enrolment::Enrolled
            };
            let inside: Vec<&WorkloadSpec> = self.workloads.iter().filter(inside).collect();
            let started = Instant::now();
            for node in &world.nodes {
                let expected = inside.iter().filter(|w| w.node == node.name).count();
                let left = self.settled_within.saturating_sub(started.elapsed());
                node.agent()?.await_enrolled(expected, left)?;
            }
            world.await_tunnels(&inside)?;
        }
        Ok(world)
    }
}

impl Node {
    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().with_context(|| format!("node {} has no agent", self.name))
    }
}

impl World {
    /// An empty world, to be described.
    pub fn builder() -> Builder {
        Builder {
            shape: Shape::Routed,
            rp_filter: false,
            nodes: vec![],
            namespaces: BTreeMap::new(),
            workloads: vec![],
            services: vec![],
            mesh: true,
            settled_within: SETTLED,
            certificate_ttl: None,
            default_mode: None,
            controller_options: vec![],
            agent_options: vec![],
            addresses_per_workload: None,
            hold_new: Duration::ZERO,
        }
    }

    /// The world that most tests start from: `shop/web` and `shop/api` on node `a`, `shop/db` on node `b`.
    pub fn shop() -> Builder {
        Self::builder()
            .node("a")
            .node("b")
            .workload("shop/web", "a")
            .workload("shop/api", "a")
            .workload("shop/db", "b")
    }

    /// A workload by its name without namespace.
    #[track_caller]
    pub fn workload(&self, name: &str) -> Workload {
        self.workloads().get(name).cloned().expect("the world has this workload")
    }

    /// A node.
    #[track_caller]
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name == name).expect("the world has this node")
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The agent of a node.
    #[track_caller]
    pub fn agent(&self, node: &str) -> &Agent {
        self.node(node).agent().expect("the world has a mesh")
    }

    /// The controller.
    #[track_caller]
    pub fn controller(&self) -> &Controller {
        self.controller.as_ref().expect("the world has a mesh")
    }

    /// The virtual addresses of a service `namespace/name`.
    #[track_caller]
    pub fn service(&self, full_name: &str) -> Pair {
        *self.services.get(full_name).expect("the world has this service")
    }

    /// Runs `meshctl` beside the controller.
    pub fn meshctl(&self, arguments: &[&str]) -> Result<CommandOutput> {
        self.controller().meshctl(arguments)
    }

    /// Sees everything that crosses the wire from now on.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.wire)
    }

    /// The wire's namespace: also a host outside of all nodes.
    pub fn wire(&self) -> &NetNs {
        &self.wire
    }

    /// The addresses of that host.
    pub fn outside(&self) -> Pair {
        self.plan.outside()
    }

    /// Where its files are: `yaml/`, logs, state.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Waits until connections from one workload to another go through a tunnel: both ends captured, and the source's
    /// agent told so. Connects to [`PROBE_PORT`] of the destination, which must be allowed and otherwise unused.
    pub fn await_tunnel(&self, from: &Workload, to: &Workload) -> Result<()> {
        let _server = to.serve(PROBE_PORT, apps::namer("probe"))?;
        let agent = self.node(&from.node).agent()?;
        wait::try_until(SETTLED, || {
            let before = agent.access_log().map_err(|e| format!("{e:#}"))?.len();
            let answer = from.exchange(to.v4(PROBE_PORT), b"");
            let line = wait::try_until(Duration::from_secs(2), || {
                let lines = agent.access_log().map_err(|e| format!("{e:#}"))?;
                let ours = log::is(log::OUTBOUND, from, to);
                lines.into_iter().skip(before).find(ours).ok_or_else(|| format!("no line; answer {answer:?}"))
            })?;
            wait::holds(answer.is_ok() && line["transport"] == "tunnel", || line.to_string())
        })
        .map_err(|last| anyhow::anyhow!("no tunnel from {} to {}: {last}", from.name, to.name))
    }

    /// From one workload of every node to every workload.
    fn await_tunnels(&self, inside: &[&WorkloadSpec]) -> Result<()> {
        for node in &self.nodes {
            let Some(from) = inside.iter().find(|w| w.node == node.name) else { continue };
            for to in inside.iter().filter(|to| to.name != from.name) {
                self.await_tunnel(&self.workload(&from.name), &self.workload(&to.name))?;
            }
        }
        Ok(())
    }

    /// Starts a workload and writes its manifest, as an orchestrator would.
    pub fn add_workload(&self, spec: &WorkloadSpec) -> Result<Workload> {
        let node = self.nodes.iter().find(|node| node.name == spec.node);
        let node = node.with_context(|| format!("no node {}", spec.node))?;
        ensure!(!self.workloads().contains_key(&spec.name), "there is a workload {} already", spec.name);
        let place = {
            let mut next = node.next_workload.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(usize::from(*next) < WORKLOADS_PER_NODE, "node {} is full", node.name);
            *next += 1;
            *next - 1
        };
        let address = spec.address.unwrap_or_else(|| self.plan.workload(node.place, place));
        let netns = NetNs::create(&format!("{}-{}", self.slot.prefix(), spec.name), self.rp_filter)?;
        let device = topology::device(&spec.name, address);
        let gateway = topology::gateway(self.plan, node.place);
        topology::hang_workload(&node.netns, &netns, &device, self.shape, address, gateway)?;
        let workload = Workload {
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            node: spec.node.clone(),
            address,
            device,
            netns,
        };
        self.workloads().insert(spec.name.clone(), workload.clone());
        if let Some(uid) = &spec.uid {
            self.start_in_pod(uid, &workload.netns)?;
        }
        if !spec.untold {
            self.write_workload(spec)?;
        }
        Ok(workload)
    }

    /// Starts a process of a pod in this namespace. It ends with the world, or by [`World::end_workload`].
    pub fn start_in_pod(&self, uid: &str, netns: &NetNs) -> Result<()> {
        let root = slot::cgroup2_root()?.context("no cgroup2 is mounted")?;
        let cgroup = root.join(self.slot.node_name("kubepods")).join(format!("pod{uid}"));
        fs::create_dir_all(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        let log = self.directory.join("pods.log");
        let process = Program::start("sleep", netns.command("sleep").arg("infinity"), &log)?;
        fs::write(cgroup.join("cgroup.procs"), process.pid().to_string())
            .with_context(|| format!("moving a process to {}", cgroup.display()))?;
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).push((netns.name().to_owned(), process));
        Ok(())
    }

    /// Ends a workload as a node does before anybody was told: its manifest stays.
    pub fn end_workload(&self, name: &str) -> Result<()> {
        let workload = self.workloads().remove(name).with_context(|| format!("no workload {name}"))?;
        let node = self.node(&workload.node);
        self.pods
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(netns, _)| *netns != workload.netns.name());
        node.netns.ip(&format!("link delete dev {}\n", workload.device))?;
        workload.netns.delete()
    }

    /// Writes the manifest of a workload that runs; the file is `workload-NAME.yaml`.
    pub fn write_workload(&self, spec: &WorkloadSpec) -> Result<()> {
        self.yaml.write(&format!("workload-{}.yaml", spec.name), &self.manifest(spec))
    }

    /// The manifest of a workload that is there.
    pub fn manifest(&self, spec: &WorkloadSpec) -> String {
        let workload = self.workload(&spec.name);
        manifests::workload(&WorkloadManifest {
            namespace: &spec.namespace,
            name: &spec.name,
            uid: spec.uid.as_deref(),
            node: &spec.node,
            addresses: &workload.address.texts(),
            labels: &spec.labels,
            enrolment: spec.enrolment,
        })
    }

    /// Ends a workload: its namespace and everything in it, and its manifest.
    pub fn remove_workload(&self, name: &str) -> Result<()> {
        self.end_workload(name)?;
        self.yaml.remove(&format!("workload-{name}.yaml"))
    }

    fn lay_nodes(&mut self, names: &[String]) -> Result<()> {
        for (name, place) in names.iter().zip(1..) {
            let netns = NetNs::create(&format!("{}-node-{name}", self.slot.prefix()), self.rp_filter)?;
            let address = self.plan.node(place);
            topology::hang(&self.wire, &netns, name, address, self.plan)?;
            topology::lay_node(&netns, self.plan, place, self.shape)?;
            topology::route_to_node(&self.wire, self.plan, place)?;
            let next_workload = Mutex::new(0);
            self.nodes.push(Node { name: name.clone(), netns, address, place, agent: None, next_workload });
        }
        for node in &self.nodes {
            for other in self.nodes.iter().filter(|other| other.place != node.place) {
                topology::route_to_node(&node.netns, self.plan, other.place)?;
            }
        }
        Ok(())
    }

    fn write_namespaces(
        &self,
        said: &BTreeMap<String, (Enrolment, Mode)>,
        workloads: &[WorkloadSpec],
    ) -> Result<()> {
        let used = workloads.iter().map(|w| (w.namespace.clone(), (Enrolment::Enrolled, Mode::Permissive)));
        let mut all: BTreeMap<_, _> = used.collect();
        all.extend(said.iter().map(|(name, meaning)| (name.clone(), *meaning)));
        for (name, (enrolment, mode)) in all {
            let text = manifests::namespace(&name, enrolment, mode);
            self.yaml.write(&format!("namespace-{name}.yaml"), &text)?;
        }
        Ok(())
    }

    fn write_services(&mut self, services: &[ServiceSpec]) -> Result<()> {
        for (service, place) in services.iter().zip(0..) {
            let ServiceSpec { namespace, name, app, port, target } = service;
            let address = self.plan.service(place);
            let text = manifests::service(namespace, name, app, &address.texts(), *port, *target);
            self.yaml.write(&format!("service-{name}.yaml"), &text)?;
            self.services.insert(format!("{namespace}/{name}"), address);
        }
        Ok(())
    }

    fn start_controller(
        &mut self,
        certificate_ttl: Option<Duration>,
        default_mode: Option<Mode>,
        mut options: Vec<String>,
    ) -> Result<()> {
        let netns = NetNs::create(&format!("{}-controller", self.slot.prefix()), self.rp_filter)?;
        let address = self.plan.controller();
        topology::hang(&self.wire, &netns, "controller", address, self.plan)?;
        if let Some(ttl) = certificate_ttl {
            options.extend(["--certificate-ttl".to_owned(), format!("{}s", ttl.as_secs())]);
        }
        if let Some(mode) = default_mode {
            options.extend(["--default-mode".to_owned(), mode.label().to_owned()]);
        }
        let controller = Controller::new(netns, address, self.yaml.directory(), &self.directory, options);
        controller.start()?;
        self.controller = Some(controller);
        Ok(())
    }

    fn start_agents(
        &mut self,
        hold_new: Duration,
        addresses_per_workload: Option<usize>,
        options: &[String],
    ) -> Result<()> {
        mount_bpffs()?;
        let controller = self.controller.as_ref().context("the controller runs")?;
        for node in &mut self.nodes {
            let settings = Settings {
                node: node.name.clone(),
                netns: node.netns.clone(),
                controller: controller.endpoint().to_string(),
                run_dir: self.slot.run_dir(&node.name),
                bpffs: self.slot.bpffs(&node.name),
                cgroup: self.slot.node_name(&node.name),
                hold_new,
                addresses_per_workload,
                options: options.to_vec(),
                directory: self.directory.clone(),
            };
            let agent = Agent::new(settings, &controller.token(&node.name)?)?;
            agent.start()?;
            node.agent = Some(agent);
        }
        for node in &self.nodes {
            node.agent()?.await_ready()?;
        }
        Ok(())
    }

    fn workloads(&self) -> MutexGuard<'_, BTreeMap<String, Workload>> {
        self.workloads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ends of all logs, for whoever reads a failed test.
    pub fn logs(&self) -> String {
        let mut files: Vec<PathBuf> = self.controller.iter().map(|c| c.log().to_owned()).collect();
        for agent in self.nodes.iter().filter_map(|node| node.agent.as_ref()) {
            files.extend([agent.log(), agent.access_log_file()]);
        }
        let mut text = String::new();
        for file in files {
            let _ = writeln!(text, "──── {} ────\n{}", file.display(), process::tail(&file));
        }
        text
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for node in &mut self.nodes {
            node.agent = None;
        }
        self.controller = None;
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).clear();
        if let Err(error) = self.slot.sweep() {
            eprintln!("world {} was not removed: {error:#}", self.slot.prefix());
        }
    }
}

/// Mounts bpffs at its usual place if it is not there; pins live on it.
pub fn mount_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf")) {
        return Ok(());
    }
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), None::<&str>)
        .context("mounting bpffs at /sys/fs/bpf (needs root)")
}
