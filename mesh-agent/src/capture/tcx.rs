//! Attaches programs by TCX links (Linux 6.6 and newer).
//!
//! A link is pinned, so it outlives the agent; the program behind it is replaced in one step, without a packet in
//! between that meets none. Removing the pin removes the link.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttach,
    links::{FdLink, PinnedLink},
    tc::SchedClassifierLink,
};

use super::{
    gone_or,
    hook::{Hook, Place},
};
use crate::net::netns::Namespace;

/// Between owner and program in a pin's name; bpffs allows no dots, Kubernetes names have no colons.
const SEPARATOR: &str = ":";

/// The links, by their pins.
#[derive(Debug)]
pub(super) struct Links {
    pins: PathBuf,
    /// The links behind the pins: without these, whoever removes a pin would detach the program at once.
    held: HashMap<PathBuf, FdLink>,
}

impl Links {
    pub(super) fn open(bpffs: &Path) -> io::Result<Self> {
        let pins = bpffs.join("links");
        fs::create_dir_all(&pins)?;
        Ok(Self { pins, held: HashMap::new() })
    }

    /// A handle on the same pins, which holds no links yet.
    pub(super) fn another(&self) -> Self {
        Self { pins: self.pins.clone(), held: HashMap::new() }
    }

    pub(super) fn attach(&mut self, program: &mut SchedClassifier, place: Place<'_>) -> anyhow::Result<()> {
        let Place { owner, hook, namespace, ifindex } = place;
        fs::create_dir_all(&self.pins)?;
        let pin = self.pin(owner, hook);
        let held = self.held.remove(&pin);
        let old = PinnedLink::from_pin(&pin).ok().map(FdLink::from).or(held);
        let in_place = match &old {
            Some(link) => attached(namespace, ifindex, hook)?.contains(&link.info()?.program_id()),
            None => false,
        };
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
                    fs::remove_file(&pin)?;
                }
                (link, false)
            }
        };
        let link = if pinned { link } else { link.pin(&pin)?.into() };
        self.held.insert(pin, link);
        Ok(())
    }

    /// Whether this program is attached, and its link pinned.
    pub(super) fn is_in_place(&self, program: u32, place: Place<'_>) -> bool {
        let Place { owner, hook, namespace, ifindex } = place;
        self.pin(owner, hook).exists()
            && attached(namespace, ifindex, hook).is_ok_and(|ids| ids.contains(&program))
    }

    pub(super) fn detach(&mut self, owner: &str) -> io::Result<()> {
        // The guard first for going, capture last: nothing is refused that could still reach the agent.
        for hook in Hook::ALL.into_iter().rev() {
            let pin = self.pin(owner, hook);
            self.held.remove(&pin);
            gone_or(fs::remove_file(pin))?;
        }
        Ok(())
    }

    pub(super) fn owners(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.pins)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| Some(name.rsplit_once(SEPARATOR)?.0.to_owned())).collect())
    }

    fn pin(&self, owner: &str, hook: Hook) -> PathBuf {
        self.pins.join(format!("{owner}{SEPARATOR}{}", hook.program()))
    }
}

/// Ids of the programs at a hook of an interface.
fn attached(namespace: &Namespace, ifindex: u32, hook: Hook) -> anyhow::Result<Vec<u32>> {
    let (_, programs) = namespace.enter(|| SchedClassifier::query_tcx(ifindex, hook.attach_type()))??;
    Ok(programs.iter().map(|info| info.id()).collect())
}

/// Whether this kernel has TCX at all.
pub(super) fn is_known() -> bool {
    // A kernel without it does not know the kind of attachment that is asked for, whatever the interface.
    match SchedClassifier::query_tcx(super::routing::LO, Hook::Deliver.attach_type()) {
        Ok(_) => true,
        Err(aya::programs::ProgramError::SyscallError(error)) => {
            error.io_error.raw_os_error() != Some(nix::libc::EINVAL)
        }
        Err(_) => false,
    }
}
