//! Attaches programs as classic filters of a clsact qdisc, on kernels without TCX (before Linux 6.6).
//!
//! A filter stays in the kernel without anyone holding it, so it outlives the agent as a pinned link does; adding it
//! where it is already replaces the program in one step. What a pin's name tells of a link, a record tells of a filter:
//! an empty directory on bpffs, which lasts exactly as long as the kernel does.
//!
//! Invariant: there is a record before there is a filter, so that none is ever left without one.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use anyhow::Context;
use aya::programs::{SchedClassifier, TcAttachType};
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
};

use super::{
    gone_or,
    hook::{Hook, Place},
};
use crate::net::{netlink::Netlink, netns::Namespace};

/// Before all other filters.
const PRIORITY: u32 = 1;
/// Our filter among others of this priority: "nm". The kernel puts a new one before those that are there.
const HANDLE: u32 = 0x6e6d;
/// `ETH_P_ALL` (linux/if_ether.h): packets of every protocol.
const EVERY_PROTOCOL: u16 = 3;
/// Between the parts of a record's name; see `tcx`.
const SEPARATOR: char = ':';
/// The record of a qdisc that we added, in the place of program and owner.
const QDISC: &str = "qdisc";

/// The filters, by their records.
#[derive(Debug, Clone)]
pub struct Filters {
    records: PathBuf,
}

/// An interface: inode number of its namespace, and index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Interface {
    namespace: u64,
    index: u32,
}

/// What is recorded of one filter.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    interface: Interface,
    hook: Hook,
    owner: String,
}

impl Filters {
    /// Those of an agent that pins below `bpffs`.
    pub fn below(bpffs: &Path) -> Self {
        Self { records: bpffs.join("filters") }
    }

    pub(super) fn open(bpffs: &Path) -> io::Result<Self> {
        let filters = Self::below(bpffs);
        fs::create_dir_all(&filters.records)?;
        Ok(filters)
    }

    pub(super) fn attach(&self, program: &SchedClassifier, place: Place<'_>) -> anyhow::Result<()> {
        let Place { owner, hook, namespace, ifindex } = place;
        let interface = Interface { namespace: namespace.inode(), index: ifindex };
        let record = Record { interface, hook, owner: owner.to_owned() };
        fs::create_dir_all(&self.records)?;
        let recorded = self.all()?;
        self.make(&record.name())?;
        let netlink = Netlink::open(namespace)?;
        match netlink
            .change(RouteNetlinkMessage::NewQueueDiscipline(qdisc(ifindex)), NLM_F_CREATE | NLM_F_EXCL)
        {
            Ok(()) => self.make(&qdisc_record(interface))?,
            Err(error) if Errno::from_raw(error.raw_os_error().unwrap_or(0)) == Errno::EEXIST => {}
            Err(error) => return Err(error).context("cannot add a clsact qdisc"),
        }
        let descriptor = program.fd()?.as_fd().as_raw_fd();
        let filter = filter(ifindex, hook, Some(u32::try_from(descriptor)?));
        // Without NLM_F_EXCL: what is there under our handle is replaced (`cls_bpf_change` in the kernel).
        netlink.change(RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE).with_context(|| {
            format!("cannot add a filter; is there an ingress qdisc, or another kind of filter of priority {PRIORITY}?")
        })?;
        // The same place under another name is the same filter.
        for other in recorded.iter().filter(|other| other.is_at(interface, hook) && other.owner != owner) {
            self.forget(&other.name())?;
        }
        Ok(())
    }

    /// Whether this program is attached, and recorded.
    pub(super) fn is_in_place(&self, program: u32, place: Place<'_>) -> bool {
        let Place { owner, hook, namespace, ifindex } = place;
        let interface = Interface { namespace: namespace.inode(), index: ifindex };
        let record = Record { interface, hook, owner: owner.to_owned() };
        self.records.join(record.name()).exists()
            && attached(namespace, ifindex, hook).is_ok_and(|id| id == Some(program))
    }

    pub(super) fn detach(&self, owner: &str) -> io::Result<()> {
        let mut ours: Vec<Record> = self.all()?.into_iter().filter(|record| record.owner == owner).collect();
        // The guard first for going, capture last: nothing is refused that could still reach the agent.
        ours.sort_by_key(|record| std::cmp::Reverse(Hook::ALL.iter().position(|hook| *hook == record.hook)));
        ours.iter().try_for_each(|record| self.remove(record))
    }

    pub(super) fn owners(&self) -> io::Result<Vec<String>> {
        Ok(self.all()?.into_iter().map(|record| record.owner).collect())
    }

    /// Takes all filters away that are recorded. No records are no error.
    pub fn remove_all(&self) -> io::Result<()> {
        self.all()?.iter().try_for_each(|record| self.remove(record))
    }

    /// Takes a filter away, and the qdisc when it is ours and nobody uses it any more.
    fn remove(&self, record: &Record) -> io::Result<()> {
        let Record { interface, hook, .. } = record;
        // With the namespace, everything in it has gone.
        if let Some(namespace) = Namespace::find(interface.namespace)? {
            let netlink = Netlink::open(&namespace)?;
            let gone = filter(interface.index, *hook, None);
            or_gone(netlink.change(RouteNetlinkMessage::DelTrafficFilter(gone), 0))?;
            let made = self.records.join(qdisc_record(*interface)).exists();
            let is_empty = |hook| filters(&netlink, interface.index, hook).is_ok_and(|left| left.is_empty());
            if made && is_empty(Hook::GuardFromPod) && is_empty(Hook::GuardToPod) {
                let unused = qdisc(interface.index);
                or_gone(netlink.change(RouteNetlinkMessage::DelQueueDiscipline(unused), 0))?;
            }
        }
        self.forget(&record.name())?;
        if !self.all()?.iter().any(|other| other.interface == *interface) {
            self.forget(&qdisc_record(*interface))?;
        }
        Ok(())
    }

    /// None, if somebody removed the directory.
    fn all(&self) -> io::Result<Vec<Record>> {
        let entries = match fs::read_dir(&self.records) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(error),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| Record::parse(&name)).collect())
    }

    fn make(&self, record: &str) -> io::Result<()> {
        match fs::create_dir(self.records.join(record)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    }

    fn forget(&self, record: &str) -> io::Result<()> {
        gone_or(fs::remove_dir(self.records.join(record)))
    }
}

impl Record {
    fn name(&self) -> String {
        let Interface { namespace, index } = self.interface;
        let (program, owner) = (self.hook.program(), &self.owner);
        format!("{namespace}{SEPARATOR}{index}{SEPARATOR}{program}{SEPARATOR}{owner}")
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.splitn(4, SEPARATOR);
        let interface =
            Interface { namespace: parts.next()?.parse().ok()?, index: parts.next()?.parse().ok()? };
        let program = parts.next()?;
        let hook = Hook::ALL.into_iter().find(|hook| hook.program() == program)?;
        Some(Self { interface, hook, owner: parts.next()?.to_owned() })
    }

    fn is_at(&self, interface: Interface, hook: Hook) -> bool {
        self.interface == interface && self.hook == hook
    }
}

fn qdisc_record(Interface { namespace, index }: Interface) -> String {
    format!("{namespace}{SEPARATOR}{index}{SEPARATOR}{QDISC}")
}

/// The id of the program at our place of an interface, if it decides alone what becomes of a packet.
fn attached(namespace: &Namespace, ifindex: u32, hook: Hook) -> anyhow::Result<Option<u32>> {
    let filters = filters(&Netlink::open(namespace)?, ifindex, hook)?;
    let ours = filters.into_iter().find(|filter| {
        let place = (u32::from(filter.header.handle), filter.header.info >> 16);
        place == (handle(hook), PRIORITY) && direct(filter)
    });
    Ok(ours.and_then(|filter| options(&filter).iter().find_map(program_id)))
}

/// The filters in a hook's direction; entries that stand for a whole priority, which have no handle, apart.
fn filters(netlink: &Netlink, ifindex: u32, hook: Hook) -> io::Result<Vec<TcMessage>> {
    let mut query = at(ifindex);
    query.header.parent = parent(hook);
    let all = netlink.dump(RouteNetlinkMessage::GetTrafficFilter(query))?;
    let filter = |message| match message {
        RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
        _ => None,
    };
    Ok(all.into_iter().filter_map(filter).filter(|filter| u32::from(filter.header.handle) != 0).collect())
}

fn options(filter: &TcMessage) -> Vec<TcFilterBpfOption> {
    let of_filter = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let option = |option: &TcOption| match option {
        TcOption::Bpf(option) => Some(option.clone()),
        _ => None,
    };
    of_filter.into_iter().flatten().filter_map(option).collect()
}

fn program_id(option: &TcFilterBpfOption) -> Option<u32> {
    match option {
        TcFilterBpfOption::ProgId(id) => Some(*id),
        _ => None,
    }
}

/// Whether the program's return value is the verdict.
fn direct(filter: &TcMessage) -> bool {
    options(filter)
        .iter()
        .any(|option| matches!(option, TcFilterBpfOption::Flags(flags) if flags.contains(TcBpfFlags::DirectAction)))
}

/// A hold and the guard that follows it are at the same place for a moment.
const fn handle(hook: Hook) -> u32 {
    match hook {
        Hook::HoldNew => HANDLE + 1,
        _ => HANDLE,
    }
}

/// The message that adds our filter, or, without a program, the one that removes it.
fn filter(ifindex: u32, hook: Hook, program: Option<u32>) -> TcMessage {
    let mut message = at(ifindex);
    message.header.handle = handle(hook).into();
    message.header.parent = parent(hook);
    // TC_H_MAKE(priority << 16, protocol in network order)
    message.header.info = PRIORITY << 16 | u32::from(EVERY_PROTOCOL.to_be());
    message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    if let Some(program) = program {
        let options = [
            TcFilterBpfOption::ProgFd(program),
            TcFilterBpfOption::ProgName(format!("nodemesh_{}", hook.program())),
            TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
        ];
        message.attributes.push(TcAttribute::Options(options.map(TcOption::Bpf).to_vec()));
    }
    message
}

fn qdisc(ifindex: u32) -> TcMessage {
    let mut message = at(ifindex);
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.header.parent = TcHandle::CLSACT;
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    message
}

fn at(ifindex: u32) -> TcMessage {
    TcMessage::with_index(ifindex.cast_signed())
}

fn parent(hook: Hook) -> TcHandle {
    let minor = match hook.attach_type() {
        TcAttachType::Egress => TcHandle::MIN_EGRESS,
        _ => TcHandle::MIN_INGRESS,
    };
    TcHandle { major: u16::MAX, minor }
}

/// What was to be removed may have gone before, with its qdisc or its interface.
fn or_gone(result: io::Result<()>) -> io::Result<()> {
    let gone = [Errno::ENOENT, Errno::ENODEV, Errno::EINVAL].map(|errno| errno as i32);
    match result {
        Err(error) if error.raw_os_error().is_some_and(|code| gone.contains(&code)) => Ok(()),
        other => other,
    }
}

/// Whether this kernel has the qdisc and the filter, found out on `lo` of the calling thread's namespace, which must be
/// a throwaway one.
pub(super) fn is_known() -> io::Result<()> {
    let netlink = Netlink::here()?;
    let lo = super::routing::LO;
    netlink.change(RouteNetlinkMessage::NewQueueDiscipline(qdisc(lo)), NLM_F_CREATE)?;
    // A filter without a program is refused as invalid by a kernel that knows the kind, as not there by any other.
    let empty = filter(lo, Hook::Deliver, None);
    match netlink.change(RouteNetlinkMessage::NewTrafficFilter(empty), NLM_F_CREATE) {
        Err(error) if error.raw_os_error() != Some(Errno::EINVAL as i32) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_tells_what_it_was_made_for() {
        let interface = Interface { namespace: 4_026_532_123, index: 7 };
        let record = Record { interface, hook: Hook::GuardToPod, owner: "shop__web_d_1".to_owned() };
        assert_eq!(Record::parse(&record.name()), Some(record));
        assert_eq!(Record::parse(&qdisc_record(interface)), None);
    }
}
