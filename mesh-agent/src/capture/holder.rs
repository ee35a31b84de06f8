//! Holds what leaves pods, at the node's ends of their veths: a program at each, and in a map until when.
//!
//! Stands apart from [`Kernel`], with a handle of its own on the program: a hold has to be there before the pod speaks,
//! and waits for nobody else's attachment.
//!
//! Invariant: the end of a hold is in the map before the program is at the veth.

use std::{borrow::Cow, io, time::Duration};

use anyhow::Context;
use aya::{
    maps::{HashMap, MapData},
    programs::SchedClassifier,
};
use nix::time::{ClockId, clock_gettime};

use super::{
    hook::{Hook, Place},
    programs::{Attached, Kernel},
};
use crate::net::netns::Namespace;

/// What the names of our attachments begin with; a namespace of Kubernetes cannot have it before an underscore.
const OWNER: &str = "hold__";

/// What holds.
pub struct Holder {
    program: SchedClassifier,
    attached: Attached,
    /// Until when, in ns of the monotonic clock, by the index of the node's end.
    ends: HashMap<MapData, u32, u64>,
}

impl std::fmt::Debug for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Holder").field("attached", &self.attached).finish_non_exhaustive()
    }
}

impl Holder {
    /// The one of these programs; there can be no second.
    pub fn of(kernel: &mut Kernel) -> anyhow::Result<Self> {
        let attached = kernel.attached.another();
        let program: &SchedClassifier = kernel
            .bpf_mut()
            .program(Hook::HoldNew.program())
            .context("the object has no program that holds")?
            .try_into()?;
        let name = Cow::Borrowed(Hook::HoldNew.program());
        let program = SchedClassifier::from_program_info(program.info()?, name)?;
        let ends = kernel.bpf_mut().take_map("HELD").context("the object has no map HELD")?;
        Ok(Self { program, attached, ends: ends.try_into()? })
    }

    /// Holds what leaves the pod behind a veth, for so long; one that is held already, for so long from now on.
    pub fn hold(&mut self, ifindex: u32, limit: Duration) -> anyhow::Result<()> {
        self.put_off(ifindex, limit)?;
        let (owner, of_node) = (owner(ifindex), Namespace::of_agent()?);
        let place = Place { owner: &owner, hook: Hook::HoldNew, namespace: &of_node, ifindex };
        self.attached.attach(&mut self.program, place).with_context(|| format!("interface {ifindex}"))
    }

    /// Puts the end of a hold off, for so long from now on.
    pub fn put_off(&mut self, ifindex: u32, limit: Duration) -> anyhow::Result<()> {
        let until = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?) + limit;
        Ok(self.ends.insert(&ifindex, &u64::try_from(until.as_nanos())?, 0)?)
    }

    /// Lets it go. What is not held is no error.
    pub fn let_go(&mut self, ifindex: u32) -> io::Result<()> {
        self.attached.detach(&owner(ifindex))?;
        // A missing entry is what is wanted.
        let _ = self.ends.remove(&ifindex);
        Ok(())
    }

    /// The veths that are held, by this agent or an earlier one.
    pub fn held(&self) -> io::Result<Vec<u32>> {
        let owners = self.attached.owners()?;
        Ok(owners.iter().filter_map(|owner| owner.strip_prefix(OWNER)?.parse().ok()).collect())
    }
}

/// Whether this owner of attachments is a hold.
pub fn is_hold(owner: &str) -> bool {
    owner.starts_with(OWNER)
}

fn owner(ifindex: u32) -> String {
    format!("{OWNER}{ifindex}")
}
