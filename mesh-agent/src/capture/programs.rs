//! Loads the kernel programs and attaches them to interfaces through pinned TCX links.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, SchedClassifier, TcAttach, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::SchedClassifierLink,
    },
};

use crate::net::netns::Namespace;

/// The compiled programs; empty in a build that had none.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// What can go wrong with the kernel programs.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The agent was built without them.
    #[error(
        "this agent was built without kernel programs: run `cargo xtask build-ebpf`, then build it again"
    )]
    NoObject,
    /// The bpffs directory cannot be made.
    #[error(
        "cannot make {path}: {error}; is a bpf file system mounted there (mount -t bpf bpf /sys/fs/bpf)?"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Loading failed.
    #[error(
        "the kernel does not take the programs: {0:#}; Linux 6.6 or newer and CAP_BPF, CAP_NET_ADMIN are needed"
    )]
    Load(anyhow::Error),
    /// Attaching failed.
    #[error("cannot attach {hook:?} to interface {ifindex}: {error:#}")]
    Attach {
        /// What.
        hook: Hook,
        /// Where.
        ifindex: u32,
        /// Why.
        error: anyhow::Error,
    },
}

/// One program at one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// Pod's end, egress.
    CaptureOutbound,
    /// Pod's `lo`, ingress.
    Deliver,
    /// Pod's end, ingress.
    CaptureInbound,
    /// Node's end, ingress.
    GuardFromPod,
    /// Node's end, egress.
    GuardToPod,
}

impl Hook {
    /// All of them.
    pub const ALL: [Hook; 5] =
        [Hook::Deliver, Hook::CaptureOutbound, Hook::CaptureInbound, Hook::GuardFromPod, Hook::GuardToPod];

    /// The program's name in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Self::CaptureOutbound => "capture_outbound",
            Self::Deliver => "deliver",
            Self::CaptureInbound => "capture_inbound",
            Self::GuardFromPod => "guard_from_pod",
            Self::GuardToPod => "guard_to_pod",
        }
    }

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Deliver | Self::CaptureInbound | Self::GuardFromPod => TcAttachType::Ingress,
            Self::CaptureOutbound | Self::GuardToPod => TcAttachType::Egress,
        }
    }
}

/// The loaded programs.
#[derive(Debug)]
pub struct Kernel {
    bpf: Ebpf,
    links: PathBuf,
    /// The links behind the pins: without these, whoever removes a pin would detach the program at once.
    held: HashMap<PathBuf, FdLink>,
}

impl Kernel {
    /// Loads the programs; maps come from, or go to, pins in `bpffs`.
    pub fn load(bpffs: &Path) -> Result<Self, KernelError> {
        if OBJECT.is_empty() {
            return Err(KernelError::NoObject);
        }
        let links = bpffs.join("links");
        fs::create_dir_all(&links).map_err(|error| KernelError::Directory { path: links.clone(), error })?;
        let mut bpf = EbpfLoader::new()
            .default_map_pin_directory(bpffs)
            .load(OBJECT)
            .map_err(|error| KernelError::Load(error.into()))?;
        for hook in Hook::ALL {
            let program = program(&mut bpf, hook).map_err(KernelError::Load)?;
            program.load().map_err(|error| KernelError::Load(error.into()))?;
        }
        Ok(Self { bpf, links, held: HashMap::new() })
    }

    /// The loaded object, for its maps and its log.
    pub fn bpf_mut(&mut self) -> &mut Ebpf {
        &mut self.bpf
    }

    /// Attaches a program to an interface of a namespace, or replaces the one that an earlier agent left there.
    /// `owner` names the pin.
    pub fn attach(
        &mut self,
        owner: &str,
        hook: Hook,
        namespace: &Namespace,
        ifindex: u32,
    ) -> Result<(), KernelError> {
        let pin = self.pin(owner, hook);
        self.try_attach(&pin, hook, namespace, ifindex).map_err(|error| KernelError::Attach {
            hook,
            ifindex,
            error,
        })
    }

    fn try_attach(
        &mut self,
        pin: &Path,
        hook: Hook,
        namespace: &Namespace,
        ifindex: u32,
    ) -> anyhow::Result<()> {
        fs::create_dir_all(&self.links)?;
        let held = self.held.remove(pin);
        let old = PinnedLink::from_pin(pin).ok().map(FdLink::from).or(held);
        let in_place = match &old {
            Some(link) => attached(namespace, ifindex, hook)?.contains(&link.info()?.program_id()),
            None => false,
        };
        let program = program(&mut self.bpf, hook)?;
        let (link, pinned) = match old {
            // The pin keeps the link; the program behind it changes in one step.
            Some(link) if in_place => {
                let id = program.attach_to_link(SchedClassifierLink::try_from(link)?)?;
                (FdLink::try_from(program.take_link(id)?)?, pin.exists())
            }
            _elsewhere => {
                let tcx = TcAttach::Tcx { attach_type: hook.attach_type(), order: LinkOrder::first() };
                let id = namespace.enter(|| program.attach(ifindex, tcx))??;
                let link = FdLink::try_from(program.take_link(id)?)?;
                if pin.exists() {
                    fs::remove_file(pin)?;
                }
                (link, false)
            }
        };
        let link = if pinned { link } else { link.pin(pin)?.into() };
        self.held.insert(pin.to_owned(), link);
        Ok(())
    }

    /// Whether this agent's program is attached to the interface, and pinned.
    pub fn is_in_place(&self, owner: &str, hook: Hook, namespace: &Namespace, ifindex: u32) -> bool {
        let Some(Ok(program)) = self.bpf.program(hook.program()).map(<&SchedClassifier>::try_from) else {
            return false;
        };
        let ours = program.info().map(|info| info.id());
        let attached = |id| attached(namespace, ifindex, hook).is_ok_and(|ids| ids.contains(&id));
        self.pin(owner, hook).exists() && ours.is_ok_and(attached)
    }

    /// Detaches everything of an owner. What is not there is no error.
    pub fn detach(&mut self, owner: &str) -> io::Result<()> {
        // The guard first for going, capture last: nothing is refused that could still reach the agent.
        for hook in Hook::ALL.into_iter().rev() {
            let pin = self.pin(owner, hook);
            self.held.remove(&pin);
            match fs::remove_file(pin) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Names of owners that have pins, from this agent or an earlier one.
    pub fn owners(&self) -> io::Result<Vec<String>> {
        let mut owners: Vec<String> = fs::read_dir(&self.links)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| Some(name.rsplit_once(SEPARATOR)?.0.to_owned()))
            .collect();
        owners.sort();
        owners.dedup();
        Ok(owners)
    }

    fn pin(&self, owner: &str, hook: Hook) -> PathBuf {
        self.links.join(format!("{owner}{SEPARATOR}{}", hook.program()))
    }
}

/// Between owner and program in a pin's name; bpffs allows no dots, Kubernetes names have no colons.
const SEPARATOR: &str = ":";

fn program(bpf: &mut Ebpf, hook: Hook) -> anyhow::Result<&mut SchedClassifier> {
    let name = hook.program();
    let program = bpf.program_mut(name).ok_or_else(|| anyhow::anyhow!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

/// Ids of the programs at a hook of an interface.
fn attached(namespace: &Namespace, ifindex: u32, hook: Hook) -> anyhow::Result<Vec<u32>> {
    let (_, programs) = namespace.enter(|| SchedClassifier::query_tcx(ifindex, hook.attach_type()))??;
    Ok(programs.iter().map(|info| info.id()).collect())
}
