//! Loads the kernel programs and attaches them to interfaces, in the way that the kernel knows.

use std::{
    io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, SkLookup},
};

use super::{
    clsact::Filters,
    features::Features,
    hook::{Hook, Place},
    lookup::{self, Lookups},
    tcx::Links,
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
        "the kernel does not take the programs: {0:#}; Linux 6.1 or newer and CAP_BPF, CAP_NET_ADMIN are needed"
    )]
    Load(anyhow::Error),
    /// Features that capture cannot do without are not there.
    #[error("this kernel cannot capture: {0}; `mesh-agent doctor` shows all of what was looked at")]
    Lacks(String),
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
    /// Attaching to a namespace failed.
    #[error("cannot attach the lookup of listeners to the pod's namespace: {0:#}")]
    AttachLookup(anyhow::Error),
}

/// How programs are attached to interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// By pinned TCX links: Linux 6.6 and newer.
    Tcx,
    /// By classic filters of a clsact qdisc.
    Clsact,
}

/// The loaded programs.
#[derive(Debug)]
pub struct Kernel {
    bpf: Ebpf,
    pub(super) attached: Attached,
    lookups: Lookups,
}

/// What is attached, in one of the two ways.
#[derive(Debug)]
pub(super) enum Attached {
    Tcx(Links),
    Clsact(Filters),
}

impl Attached {
    /// A handle on the same place, which holds nothing yet.
    pub(super) fn another(&self) -> Self {
        match self {
            Self::Tcx(links) => Self::Tcx(links.another()),
            Self::Clsact(filters) => Self::Clsact(filters.clone()),
        }
    }

    pub(super) fn attach(&mut self, program: &mut SchedClassifier, place: Place<'_>) -> anyhow::Result<()> {
        match self {
            Self::Tcx(links) => links.attach(program, place),
            Self::Clsact(filters) => filters.attach(program, place),
        }
    }

    fn is_in_place(&self, program: u32, place: Place<'_>) -> bool {
        match self {
            Self::Tcx(links) => links.is_in_place(program, place),
            Self::Clsact(filters) => filters.is_in_place(program, place),
        }
    }

    pub(super) fn detach(&mut self, owner: &str) -> io::Result<()> {
        match self {
            Self::Tcx(links) => links.detach(owner),
            Self::Clsact(filters) => filters.detach(owner),
        }
    }

    pub(super) fn owners(&self) -> io::Result<Vec<String>> {
        match self {
            Self::Tcx(links) => links.owners(),
            Self::Clsact(filters) => filters.owners(),
        }
    }
}

impl Kernel {
    /// Loads the programs; maps come from, or go to, pins in `bpffs`. Tells in the log what the kernel lacks, and what
    /// follows; an error when it lacks something that capture cannot do without.
    pub fn load(bpffs: &Path) -> Result<Self, KernelError> {
        let features = Features::probe();
        features.tell();
        features.suffice().map_err(KernelError::Lacks)?;
        Self::load_attaching(bpffs, features.attachment())
    }

    /// Loads the programs, to be attached in this way.
    pub fn load_attaching(bpffs: &Path, attachment: Attachment) -> Result<Self, KernelError> {
        if OBJECT.is_empty() {
            return Err(KernelError::NoObject);
        }
        let no_directory = |error| KernelError::Directory { path: bpffs.to_owned(), error };
        let attached = match attachment {
            Attachment::Tcx => Attached::Tcx(Links::open(bpffs).map_err(no_directory)?),
            Attachment::Clsact => Attached::Clsact(Filters::open(bpffs).map_err(no_directory)?),
        };
        let mut bpf = EbpfLoader::new()
            .default_map_pin_directory(bpffs)
            .load(OBJECT)
            .map_err(|error| KernelError::Load(error.into()))?;
        for hook in Hook::ALL {
            let program = program(&mut bpf, hook).map_err(KernelError::Load)?;
            program.load().map_err(|error| KernelError::Load(error.into()))?;
        }
        let lookup = lookup_program(&mut bpf).map_err(KernelError::Load)?;
        lookup.load().map_err(|error| KernelError::Load(error.into()))?;
        let lookups = Lookups::open(bpffs).map_err(no_directory)?;
        Ok(Self { bpf, attached, lookups })
    }

    /// The loaded object, for its maps and its log.
    pub fn bpf_mut(&mut self) -> &mut Ebpf {
        &mut self.bpf
    }

    /// Attaches a program to an interface of a namespace, or replaces, in one step, the one that an earlier agent left
    /// there. `owner` names it among what is attached.
    pub fn attach(
        &mut self,
        owner: &str,
        hook: Hook,
        namespace: &Namespace,
        ifindex: u32,
    ) -> Result<(), KernelError> {
        let place = Place { owner, hook, namespace, ifindex };
        program(&mut self.bpf, hook)
            .and_then(|program| self.attached.attach(program, place))
            .map_err(|error| KernelError::Attach { hook, ifindex, error })
    }

    /// Whether this agent's program is attached to the interface, and is found there by the next agent.
    pub fn is_in_place(&self, owner: &str, hook: Hook, namespace: &Namespace, ifindex: u32) -> bool {
        let Some(Ok(program)) = self.bpf.program(hook.program()).map(<&SchedClassifier>::try_from) else {
            return false;
        };
        let Ok(ours) = program.info().map(|info| info.id()) else { return false };
        self.attached.is_in_place(ours, Place { owner, hook, namespace, ifindex })
    }

    /// Attaches the lookup of listeners to a workload's namespace, in the place of the one that an earlier agent left
    /// there.
    pub fn attach_lookup(&mut self, owner: &str, namespace: &Namespace) -> Result<(), KernelError> {
        lookup_program(&mut self.bpf)
            .and_then(|program| self.lookups.attach(program, owner, namespace))
            .map_err(KernelError::AttachLookup)
    }

    /// Whether this agent's lookup is attached to the namespace, and is found there by the next agent.
    pub fn lookup_is_in_place(&self, owner: &str, namespace: &Namespace) -> bool {
        let Some(Ok(program)) = self.bpf.program(lookup::PROGRAM).map(<&SkLookup>::try_from) else {
            return false;
        };
        program.info().is_ok_and(|info| self.lookups.is_in_place(info.id(), owner, namespace))
    }

    /// Detaches everything of an owner. What is not there is no error.
    pub fn detach(&mut self, owner: &str) -> io::Result<()> {
        self.attached.detach(owner)?;
        // After the guard: what capture passes to the lookup finds it.
        self.lookups.detach(owner)
    }

    /// Names of owners that have something attached, from this agent or an earlier one.
    pub fn owners(&self) -> io::Result<Vec<String>> {
        let mut owners = self.attached.owners()?;
        owners.extend(self.lookups.owners()?);
        owners.sort();
        owners.dedup();
        Ok(owners)
    }
}

fn program(bpf: &mut Ebpf, hook: Hook) -> anyhow::Result<&mut SchedClassifier> {
    let name = hook.program();
    let program = bpf.program_mut(name).ok_or_else(|| anyhow::anyhow!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

fn lookup_program(bpf: &mut Ebpf) -> anyhow::Result<&mut SkLookup> {
    let name = lookup::PROGRAM;
    let program = bpf.program_mut(name).ok_or_else(|| anyhow::anyhow!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}
