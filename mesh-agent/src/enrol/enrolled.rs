//! One enrolled workload: how it comes to be captured, how that is proven, how it is let go.

use std::{
    collections::HashSet,
    net::{IpAddr, TcpListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use mesh_core::{
    model::{Mode, Name, Workload},
    view::Snapshot,
};
use mesh_ebpf::abi;
use tokio_util::sync::CancellationToken;

use super::{
    Enroller,
    discover::{Census, Place, PlaceError, lacks},
};
use crate::{
    capture::{
        Hook, Kernel, Maps,
        routing::Routing,
        settings::{forget_settings, save_settings, saved_settings},
    },
    connection::{Direction, Node},
    listen,
    local::Local,
    net::{
        netns::Namespace,
        socket::{self, Family},
    },
    threads::Threads,
};

/// How long connections of a workload that leaves the mesh may take to end, before capture is taken from under them.
const LEAVE_WAIT: Duration = Duration::from_secs(1);
/// The index of `lo`.
const LO: u32 = 1;

/// A listener with what leads to it.
#[derive(Debug)]
struct Listener {
    socket: TcpListener,
    direction: Direction,
    family: Family,
}

/// A captured workload.
#[derive(Debug)]
pub(super) struct Enrolled {
    local: Arc<Local>,
    uid: String,
    routing: Routing,
    listeners: Vec<Listener>,
    stop: CancellationToken,
    pod_ifindex: u32,
    /// The node's end of its veth.
    pub(super) node_ifindex: u32,
    /// The last proof found all of it in place.
    pub(super) whole: bool,
    mac: abi::Mac,
    /// What the guard was told.
    strict: bool,
}

/// Why a workload is not captured.
#[derive(Debug)]
pub(super) enum Incomplete {
    /// Something that will come is not there yet.
    Waiting(String),
    /// Something is wrong.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Incomplete {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// What a workload's pins are called: namespace and name of Kubernetes objects have no underscores, and bpffs takes
/// no dots.
pub(super) fn owner(name: &Name) -> String {
    format!("{}__{}", name.namespace, name.name).replace('.', "_d_")
}

impl Enrolled {
    /// Captures a workload. `elsewhere`: the addresses of all workloads of the node. A strict one is guarded before anything else, so that it never speaks plaintext while its
    /// certificate is on the way.
    pub(super) async fn new(
        workload: &Workload,
        census: &Census,
        elsewhere: &HashSet<IpAddr>,
        view: &Snapshot,
        context: &mut Enroller,
    ) -> Result<Self, Incomplete> {
        if workload.addresses.is_empty() {
            return Err(Incomplete::Waiting("it has no address yet".to_owned()));
        }
        // What the guard was told outlives agents, and workloads that hide: a veth that is guarded for another workload
        // of the view is that one's.
        let anothers = |ifindex| {
            let theirs = |address| elsewhere.contains(address) && !workload.addresses.contains(address);
            context.maps.sources(ifindex).iter().any(theirs)
        };
        let Place { namespace, pod_ifindex, node_ifindex, mac } = match census.place(workload, anothers).await
        {
            Ok(place) => place,
            Err(PlaceError::NoNamespace(address)) => {
                return Err(Incomplete::Waiting(format!(
                    "no network namespace of this node has {address} yet"
                )));
            }
            Err(error @ (PlaceError::NoSandbox(_) | PlaceError::NotInSandbox { .. })) => {
                return Err(Incomplete::Waiting(format!("{error}: it is not there yet, or gone")));
            }
            Err(error) => return Err(Incomplete::Failed(error.into())),
        };
        let strict = workload.mode == Mode::Strict;
        let local = Local::new(workload.name.clone(), workload.addresses.clone(), namespace);
        let uid = workload.uid.clone();
        let mut new = Self {
            routing: Routing::open(&local.namespace).context("cannot open netlink in the pod's namespace")?,
            local: Arc::new(local),
            uid,
            listeners: Vec::new(),
            stop: CancellationToken::new(),
            pod_ifindex,
            node_ifindex,
            whole: true,
            mac,
            strict,
        };
        if strict {
            new.guard(&mut context.kernel, &mut context.maps)?;
        }
        let identity = view.identity(&workload.name).context("the view has no identity for the workload")?;
        if context.identities.server(identity).is_err() {
            return Err(Incomplete::Waiting(format!("waits for the certificate of {identity}")));
        }
        save_settings(&context.run_dir, &new.local.namespace)?;
        new.routing
            .ensure(&new.local.namespace, &new.families())
            .await
            .context("cannot set rule, route and sysctls in the pod's namespace")?;
        for family in new.families() {
            for direction in [Direction::Outbound, Direction::Inbound] {
                let listener = new.listen(family, direction, &context.node, &context.threads)?;
                new.lead(&listener, &mut context.maps)?;
                new.listeners.push(listener);
            }
        }
        context
            .kernel
            .attach_lookup(&owner(new.name()), &new.local.namespace)
            .map_err(anyhow::Error::from)?;
        for hook in [Hook::Deliver, Hook::CaptureOutbound, Hook::CaptureInbound] {
            new.attach(hook, &mut context.kernel)?;
        }
        new.guard(&mut context.kernel, &mut context.maps)?;
        Ok(new)
    }

    pub(super) fn name(&self) -> &Name {
        &self.local.name
    }

    pub(super) fn local(&self) -> &Arc<Local> {
        &self.local
    }

    pub(super) fn is_strict(&self) -> bool {
        self.strict
    }

    pub(super) fn addresses(&self) -> &[IpAddr] {
        &self.local.addresses
    }

    /// Whether this is the workload that was captured: one that was given other addresses is another to everything that
    /// capture rests on, and a pod that has the name of one before it is another to everybody.
    pub(super) fn is(&self, workload: &Workload) -> bool {
        workload.uid == self.uid && workload.addresses == self.local.addresses
    }

    fn families(&self) -> Vec<Family> {
        let mut families: Vec<Family> = self.addresses().iter().copied().map(Family::of).collect();
        families.sort();
        families.dedup();
        families
    }

    fn listen(
        &self,
        family: Family,
        direction: Direction,
        node: &Node,
        threads: &Threads,
    ) -> anyhow::Result<Listener> {
        let socket =
            socket::listen(&self.local.namespace, family).context("cannot listen in the pod's namespace")?;
        listen::spawn(threads, &socket, direction, self.local.clone(), node.clone(), self.stop.clone())?;
        Ok(Listener { socket, direction, family })
    }

    fn lead(&self, listener: &Listener, maps: &mut Maps) -> anyhow::Result<()> {
        let direction = match listener.direction {
            Direction::Outbound => abi::Direction::Outbound,
            Direction::Inbound => abi::Direction::Inbound,
        };
        for address in self.addresses().iter().filter(|address| Family::of(**address) == listener.family) {
            maps.set_listener(*address, direction, &listener.socket)
                .context("cannot lead the kernel programs to a listener")?;
        }
        Ok(())
    }

    /// Where a hook of this workload is: a namespace, and an interface in it.
    fn place<'a>(&'a self, hook: Hook, of_node: &'a Namespace) -> (&'a Namespace, u32) {
        match hook {
            Hook::Deliver => (&self.local.namespace, LO),
            Hook::CaptureOutbound | Hook::CaptureInbound => (&self.local.namespace, self.pod_ifindex),
            Hook::GuardFromPod | Hook::GuardToPod | Hook::HoldNew => (of_node, self.node_ifindex),
        }
    }

    fn attach(&self, hook: Hook, kernel: &mut Kernel) -> anyhow::Result<()> {
        let of_node = Namespace::of_agent()?;
        let (namespace, ifindex) = self.place(hook, &of_node);
        Ok(kernel.attach(&owner(self.name()), hook, namespace, ifindex)?)
    }

    fn guard(&self, kernel: &mut Kernel, maps: &mut Maps) -> anyhow::Result<()> {
        self.tell_guard(maps, self.strict).context("cannot write the guard's maps")?;
        self.attach(Hook::GuardFromPod, kernel)?;
        self.attach(Hook::GuardToPod, kernel)
    }

    fn tell_guard(&self, maps: &mut Maps, strict: bool) -> Result<(), aya::maps::MapError> {
        maps.guard(self.node_ifindex, self.addresses(), self.mac, strict)
    }

    /// Changes the mode while it is enrolled.
    pub(super) fn set_strict(&mut self, maps: &mut Maps, strict: bool) -> Result<(), aya::maps::MapError> {
        self.tell_guard(maps, strict)?;
        self.strict = strict;
        Ok(())
    }

    /// Checks against the kernel that all is in place and repairs what is not; returns the names of what was missing.
    /// An error means that the workload's place itself is gone.
    pub(super) async fn prove(
        &mut self,
        kernel: &mut Kernel,
        maps: &mut Maps,
        node: &Node,
        threads: &Threads,
    ) -> anyhow::Result<Vec<&'static str>> {
        if let Some(address) = lacks(&self.local.namespace, self.addresses())? {
            anyhow::bail!("the namespace no longer has {address}");
        }
        let mut repaired = self.routing.ensure(&self.local.namespace, &self.families()).await?;
        let of_node = Namespace::of_agent()?;
        for hook in Hook::OF_WORKLOAD {
            let (namespace, ifindex) = self.place(hook, &of_node);
            if !kernel.is_in_place(&owner(self.name()), hook, namespace, ifindex) {
                self.attach(hook, kernel)?;
                repaired.push("program");
            }
        }
        if !kernel.lookup_is_in_place(&owner(self.name()), &self.local.namespace) {
            kernel.attach_lookup(&owner(self.name()), &self.local.namespace)?;
            repaired.push("program");
        }
        for index in 0..self.listeners.len() {
            if !is_listening(&self.listeners[index].socket) {
                let Listener { direction, family, .. } = self.listeners[index];
                let fresh = self.listen(family, direction, node, threads)?;
                self.lead(&fresh, maps)?;
                self.listeners[index] = fresh;
                repaired.push("listener");
            }
        }
        Ok(repaired)
    }

    /// Takes the listeners away. For a workload whose place is gone, or looks as if it were, that and the end of its
    /// connections is all: the guard stays, and everything else that is of no harm. It is not for a workload to say, by
    /// taking its own address away, that it is no longer guarded. Enrolment takes them over when it is found again.
    pub(super) fn stop_listening(&self, maps: &mut Maps) {
        for address in self.addresses() {
            maps.remove_listeners(*address);
        }
        self.stop.cancel();
    }

    /// Ends its connections, and waits for that a while.
    pub(super) async fn leave(&self, node: &Node) {
        self.local.leave(LEAVE_WAIT).await;
        node.forget(&self.local);
    }

    /// Lets a workload go that has left ([`Self::stop_listening`], [`Self::leave`]): takes away everything that enrolment brought.
    /// Before, data of its connections would leave as plaintext.
    pub(super) async fn remove(self, kernel: &mut Kernel, maps: &mut Maps, run_dir: &Path) {
        let name = self.name();
        if let Err(error) = kernel.detach(&owner(name)) {
            tracing::error!(workload = %name, %error, "cannot detach the programs");
        }
        maps.unguard(self.node_ifindex);
        // The namespace may be gone with its last process; then so is what we had there.
        if let Err(error) = self.routing.remove().await {
            tracing::debug!(workload = %name, error = format!("{error:#}"), "cannot remove rule and route");
        }
        let namespace = &self.local.namespace;
        let restored = saved_settings(run_dir, namespace).and_then(|settings| {
            if let Some(settings) = settings {
                settings.restore(namespace)?;
            }
            Ok(forget_settings(run_dir, namespace)?)
        });
        if let Err(error) = restored {
            tracing::debug!(workload = %name, error = format!("{error:#}"), "cannot restore the settings of lo");
        }
    }
}

impl Drop for Enrolled {
    /// Ends the accept loops, also of an enrolment that failed half-way.
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Whether a socket is in the listening state; one that was destroyed from outside (`ss -K`) is not.
fn is_listening(socket: &TcpListener) -> bool {
    socket2::SockRef::from(socket).is_listener().unwrap_or(false)
}
