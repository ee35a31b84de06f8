//! What is attached to an interface by TCX, asked of the kernel itself: Debian's bpftool does not know TCX yet.

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

/// Ids of the links at both directions of an interface of a namespace.
pub fn links(netns: &NetNs, device: &str) -> Result<Vec<u32>> {
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

/// Detaches a link, as root on the machine can.
pub fn detach(link: u32) -> io::Result<()> {
    let mut by_id = [link, 0, 0];
    let fd = bpf(BPF_LINK_GET_FD_BY_ID, &mut by_id)?;
    // SAFETY: the kernel has just given us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    let mut of_link = [fd.as_raw_fd() as u32];
    bpf(BPF_LINK_DETACH, &mut of_link).map(drop)
}
