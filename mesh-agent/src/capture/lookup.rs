//! Attaches the program that finds the agent's listeners for connections that use a 4-tuple again, by a link to each
//! workload's namespace.
//!
//! A link is pinned, so it outlives the agent. A namespace takes several: a new agent attaches its own before it lets
//! its predecessor's go, and the one that is asked first answers for both.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use aya::programs::{SkLookup, links::FdLink};

use super::gone_or;
use crate::net::netns::Namespace;

/// The program's name in the object.
pub(super) const PROGRAM: &str = "find_listener";
/// Most programs that a namespace takes (`netns_bpf_max_progs` in the kernel).
const MAX_PROGRAMS: usize = 64;

/// The links, by their owners.
#[derive(Debug)]
pub(super) struct Lookups {
    pins: PathBuf,
    /// The links behind the pins: without these, whoever removes a pin would detach the program at once.
    held: HashMap<String, FdLink>,
}

impl Lookups {
    pub(super) fn open(bpffs: &Path) -> io::Result<Self> {
        let pins = bpffs.join("lookups");
        fs::create_dir_all(&pins)?;
        Ok(Self { pins, held: HashMap::new() })
    }

    pub(super) fn attach(
        &mut self,
        program: &mut SkLookup,
        owner: &str,
        namespace: &Namespace,
    ) -> anyhow::Result<()> {
        fs::create_dir_all(&self.pins)?;
        let id = program.attach(namespace)?;
        let link = FdLink::from(program.take_link(id)?);
        let pin = self.pin(owner);
        gone_or(fs::remove_file(&pin))?;
        self.held.insert(owner.to_owned(), link.pin(&pin)?.into());
        Ok(())
    }

    /// Whether this program is attached, and its link pinned.
    pub(super) fn is_in_place(&self, program: u32, owner: &str, namespace: &Namespace) -> bool {
        self.pin(owner).exists() && attached(namespace).is_ok_and(|ids| ids.contains(&program))
    }

    pub(super) fn detach(&mut self, owner: &str) -> io::Result<()> {
        self.held.remove(owner);
        gone_or(fs::remove_file(self.pin(owner)))
    }

    pub(super) fn owners(&self) -> io::Result<Vec<String>> {
        Ok(fs::read_dir(&self.pins)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }

    fn pin(&self, owner: &str) -> PathBuf {
        self.pins.join(owner)
    }
}

/// The start of `union bpf_attr` for `BPF_PROG_QUERY` (linux/bpf.h).
#[repr(C)]
#[derive(Debug, Default)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    reserved: u32,
}

/// Ids of the programs of this kind in a namespace. aya does not ask for them.
fn attached(namespace: &Namespace) -> io::Result<Vec<u32>> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    const BPF_SK_LOOKUP: u32 = 36;
    let mut ids = [0_u32; MAX_PROGRAMS];
    let mut query = Query {
        target_fd: namespace.as_fd().as_raw_fd().cast_unsigned(),
        attach_type: BPF_SK_LOOKUP,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: MAX_PROGRAMS as u32,
        ..Query::default()
    };
    // SAFETY: the descriptor is open, pointer and size are those of `query`, which points at `prog_cnt` words.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(query.prog_cnt as usize).collect())
}
