//! What is attached to an interface: by TCX links, which the kernel itself is asked for, as Debian's bpftool does not
//! know them yet; by classic filters, which `tc` tells.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::Result;

use crate::netns::NetNs;

const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
/// More programs than any interface of a world has.
const MAX: usize = 16;

/// `bpf_attr.query` of the kernel's `linux/bpf.h`.
#[repr(C)]
#[derive(Default)]
struct Query {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    padding: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are as large as said, and what they point to outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A program at an interface.
#[derive(Debug, Clone)]
pub enum Attached {
    /// By a TCX link with this id.
    Link(u32),
    /// By a classic filter.
    Filter {
        /// Where.
        netns: NetNs,
        /// Where.
        device: String,
        /// `ingress` or `egress`.
        direction: &'static str,
        /// As `tc` names it: `pref 1 handle 0x6e6d`.
        name: String,
    },
}

impl Attached {
    /// Takes it away, as root on the machine can.
    pub fn detach(&self) -> Result<()> {
        match self {
            Self::Link(id) => Ok(detach(*id)?),
            Self::Filter { netns, device, direction, name } => netns
                .shell(&format!("tc filter del dev {device} {direction} {name} protocol all bpf"))
                .map(drop),
        }
    }
}

/// The programs at both directions of an interface of a namespace.
pub fn programs(netns: &NetNs, device: &str) -> Result<Vec<Attached>> {
    let mut all: Vec<Attached> = links(netns, device)?.into_iter().map(Attached::Link).collect();
    for direction in ["ingress", "egress"] {
        let listed = netns.shell(&format!("tc filter show dev {device} {direction}"))?;
        let names = listed.lines().filter(|line| line.contains(" handle ")).filter_map(filter_name);
        let filter =
            |name| Attached::Filter { netns: netns.clone(), device: device.to_owned(), direction, name };
        all.extend(names.map(filter));
    }
    Ok(all)
}

/// `filter protocol all pref 1 bpf chain 0 handle 0x6e6d …` → `pref 1 handle 0x6e6d`.
fn filter_name(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let mut after = |word| words.by_ref().skip_while(|w| *w != word).nth(1);
    Some(format!("pref {} handle {}", after("pref")?, after("handle")?))
}

/// Whether the kernel knows TCX.
pub fn has_tcx() -> bool {
    !matches!(query(1, BPF_TCX_INGRESS), Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}

/// Ids of the links at both directions of an interface of a namespace.
fn links(netns: &NetNs, device: &str) -> Result<Vec<u32>> {
    if !has_tcx() {
        return Ok(vec![]);
    }
    let name = CString::new(device)?;
    netns.enter(|| {
        // SAFETY: a C string, read by the call alone.
        let ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) };
        anyhow::ensure!(ifindex != 0, "there is no {device}");
        let mut all = query(ifindex, BPF_TCX_INGRESS)?;
        all.extend(query(ifindex, BPF_TCX_EGRESS)?);
        Ok(all)
    })?
}

fn query(ifindex: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let (mut programs, mut links) = ([0_u32; MAX], [0_u32; MAX]);
    let mut query = Query {
        ifindex,
        attach_type,
        prog_ids: programs.as_mut_ptr() as u64,
        count: MAX as u32,
        link_ids: links.as_mut_ptr() as u64,
        ..Query::default()
    };
    match bpf(BPF_PROG_QUERY, &mut query) {
        Ok(_) => Ok(links[..query.count as usize].to_vec()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error),
    }
}

fn detach(link: u32) -> io::Result<()> {
    let mut by_id = [link, 0, 0];
    let fd = bpf(BPF_LINK_GET_FD_BY_ID, &mut by_id)?;
    // SAFETY: the kernel has just given us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    let mut of_link = [fd.as_raw_fd() as u32];
    bpf(BPF_LINK_DETACH, &mut of_link).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_named_as_tc_lists_it() {
        let line = "filter protocol all pref 1 bpf chain 0 handle 0x6e6d nodemesh_deliver direct-action id 7";
        assert_eq!(filter_name(line).as_deref(), Some("pref 1 handle 0x6e6d"));
    }
}
