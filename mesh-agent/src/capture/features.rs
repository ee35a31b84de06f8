//! What capture needs of the kernel, looked for when the agent starts: what is missing is told, with what follows.
//!
//! Looked for by trying, never by the kernel's version: distributions leave things out and bring things in. Either all
//! that a feature is for works without it, in the way told here, or the agent refuses to start.

use std::{fmt, fs, io, thread};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage, rule::RuleMessage};

use super::{clsact, programs::Attachment, tcx};
use crate::net::{cgroup, netlink::Netlink};

/// Map types of the programs and of their log.
const MAPS: [(MapType, &str); 6] = [
    (MapType::Hash, "hash"),
    (MapType::LruHash, "LRU hash"),
    (MapType::Array, "array"),
    (MapType::PerCpuArray, "per-CPU array"),
    (MapType::SockHash, "sockhash"),
    (MapType::RingBuf, "ring buffer"),
];

/// Helpers of the programs.
const HELPERS: [(BpfHelper, &str); 11] = [
    (BpfHelper::BPF_FUNC_sk_assign, "bpf_sk_assign"),
    (BpfHelper::BPF_FUNC_skc_lookup_tcp, "bpf_skc_lookup_tcp"),
    (BpfHelper::BPF_FUNC_sk_release, "bpf_sk_release"),
    (BpfHelper::BPF_FUNC_skb_cgroup_id, "bpf_skb_cgroup_id"),
    (BpfHelper::BPF_FUNC_skb_change_tail, "bpf_skb_change_tail"),
    (BpfHelper::BPF_FUNC_skb_change_type, "bpf_skb_change_type"),
    (BpfHelper::BPF_FUNC_skb_load_bytes, "bpf_skb_load_bytes"),
    (BpfHelper::BPF_FUNC_skb_store_bytes, "bpf_skb_store_bytes"),
    (BpfHelper::BPF_FUNC_redirect, "bpf_redirect"),
    (BpfHelper::BPF_FUNC_ktime_get_ns, "bpf_ktime_get_ns"),
    (BpfHelper::BPF_FUNC_ringbuf_output, "bpf_ringbuf_output"),
];

/// What is so of a kernel that lacks a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    /// The agent refuses to start; what to do.
    Refused(&'static str),
    /// Everything works; in which other way.
    Works(&'static str),
}

/// One feature.
#[derive(Debug)]
struct Feature {
    name: &'static str,
    since: &'static str,
    without: Without,
    /// Why it is missing.
    missing: Option<String>,
}

/// All features that were looked for.
#[derive(Debug)]
pub struct Features {
    all: Vec<Feature>,
    tcx: bool,
}

const BUILD: &str =
    "use a kernel with CONFIG_BPF_SYSCALL, and run the agent as root or with CAP_BPF and CAP_NET_ADMIN";
const NEWER: &str = "use Linux 6.1 or newer";

impl Features {
    /// Looks. Changes nothing that stays.
    pub fn probe() -> Self {
        use Without::{Refused, Works};
        let tcx = tcx::is_known();
        let classic = in_throwaway_namespace(clsact::is_known);
        let rules = in_throwaway_namespace(policy_routing);
        let mut all = vec![
            feature(
                "BPF programs of type sched_cls",
                "4.1",
                Refused(BUILD),
                known(ProgramType::SchedClassifier),
            ),
            feature("BPF programs of type sk_lookup", "5.9", Refused(BUILD), known(ProgramType::SkLookup)),
            feature("BPF map types", "5.8", Refused(NEWER), maps()),
            feature("BPF helpers", "5.8", Refused(NEWER), helpers()),
            feature("a cgroup2 mount", "4.10", Refused("mount -t cgroup2 none /sys/fs/cgroup"), cgroup2()),
            feature(
                "policy routing",
                "2.2",
                Refused("use a kernel with CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES"),
                rules.err().map(|error| error.to_string()),
            ),
        ];
        let unknown = "the kernel does not know this kind of attachment".to_owned();
        all.push(feature(
            "TCX links",
            "6.6",
            Works("programs are attached as classic filters of priority 1 in clsact qdiscs"),
            (!tcx).then_some(unknown),
        ));
        if !tcx {
            let cure = "use Linux 6.6 or newer, or a kernel with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF \
                        (modprobe sch_ingress cls_bpf)";
            let missing = classic.err().map(|error| error.to_string());
            all.push(feature("clsact qdiscs with BPF filters", "4.5", Refused(cure), missing));
        }
        all.push(feature(
            "the BPF just-in-time compiler",
            "3.16",
            Works("programs are interpreted, which costs every packet more time"),
            interpreted(),
        ));
        all.push(feature(
            "expedited RCU grace periods",
            "4.10",
            Works("enrolling many workloads at once takes longer: about 60 ms each"),
            fs::OpenOptions::new().write(true).open("/sys/kernel/rcu_expedited").err().map(|e| e.to_string()),
        ));
        Self { all, tcx }
    }

    /// One line in the log for each feature that is missing.
    pub fn tell(&self) {
        for Feature { name, since, without, missing } in &self.all {
            if let (Some(why), Without::Works(instead)) = (missing, without) {
                tracing::warn!(feature = name, since, why, instead, "this kernel lacks a feature");
            }
        }
    }

    /// Whether capture can work; if not, what is missing, since when kernels have it, and what to do.
    pub fn suffice(&self) -> Result<(), String> {
        let lacking: Vec<String> = self.all.iter().filter_map(Feature::refusal).collect();
        if lacking.is_empty() { Ok(()) } else { Err(lacking.join("; ")) }
    }

    /// How programs are attached here.
    pub fn attachment(&self) -> Attachment {
        if self.tcx { Attachment::Tcx } else { Attachment::Clsact }
    }
}

impl Feature {
    fn refusal(&self) -> Option<String> {
        let (Some(why), Without::Refused(cure)) = (&self.missing, self.without) else { return None };
        Some(format!("it lacks {} (Linux {}): {why}; {cure}", self.name, self.since))
    }
}

/// A table for people: feature, since which kernel, whether it is here, what follows.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<32} {:<6} {:<8} WITHOUT IT", "FEATURE", "SINCE", "HERE")?;
        for Feature { name, since, without, missing } in &self.all {
            let (here, follows) = match (missing, without) {
                (None, Without::Works(_)) => ("yes", String::new()),
                (None, Without::Refused(_)) => ("yes", String::new()),
                (Some(why), Without::Works(instead)) => ("no", format!("{instead} ({why})")),
                (Some(why), Without::Refused(cure)) => {
                    ("NO", format!("the agent does not start: {cure} ({why})"))
                }
            };
            writeln!(f, "{:<32} {:<6} {:<8} {}", name, since, here, follows)?;
        }
        Ok(())
    }
}

fn feature(name: &'static str, since: &'static str, without: Without, missing: Option<String>) -> Feature {
    Feature { name, since, without, missing }
}

fn known(kind: ProgramType) -> Option<String> {
    match is_program_supported(kind) {
        Ok(true) => None,
        Ok(false) => Some("the kernel does not know them".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// The names of those that are missing.
fn maps() -> Option<String> {
    let missing = MAPS.iter().filter(|(kind, _)| !is_map_supported(*kind).unwrap_or(false));
    list(missing.map(|(_, name)| *name))
}

fn helpers() -> Option<String> {
    let known = |helper| is_helper_supported(ProgramType::SchedClassifier, helper).unwrap_or(false);
    list(HELPERS.iter().filter(|(helper, _)| !known(*helper)).map(|(_, name)| *name))
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> Option<String> {
    let names: Vec<&str> = names.collect();
    (!names.is_empty()).then(|| format!("missing: {}", names.join(", ")))
}

fn cgroup2() -> Option<String> {
    cgroup::mount().err().map(|error| error.to_string())
}

fn interpreted() -> Option<String> {
    match fs::read_to_string("/proc/sys/net/core/bpf_jit_enable") {
        Ok(text) if text.trim() == "0" => Some("net.core.bpf_jit_enable is 0".to_owned()),
        Ok(_) => None,
        Err(error) => Some(format!("net.core.bpf_jit_enable: {error}")),
    }
}

fn policy_routing() -> io::Result<()> {
    let netlink = Netlink::here()?;
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut query = RuleMessage::default();
        query.header.family = family;
        netlink.dump(RouteNetlinkMessage::GetRule(query))?;
    }
    Ok(())
}

/// Runs `look` on a thread of its own, in a network namespace that ends with it.
fn in_throwaway_namespace(look: fn() -> io::Result<()>) -> io::Result<()> {
    let inside = move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        look()
    };
    let thread = thread::Builder::new().name("probe".to_owned()).spawn(inside)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the probe panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(missing: &[(&'static str, Without)]) -> Features {
        let all =
            missing.iter().map(|(name, without)| feature(name, "6.6", *without, Some("gone".to_owned())));
        Features { all: all.collect(), tcx: false }
    }

    #[test]
    fn what_is_indispensable_is_refused_with_its_name_its_kernel_and_the_cure() {
        let lacking =
            features(&[("maps", Without::Refused("use Linux 6.1")), ("tcx", Without::Works("by filters"))]);
        assert_eq!(lacking.suffice(), Err("it lacks maps (Linux 6.6): gone; use Linux 6.1".to_owned()));
    }

    #[test]
    fn what_has_another_way_is_no_reason_to_refuse() {
        let lacking = features(&[("tcx", Without::Works("by filters"))]);
        assert_eq!(lacking.suffice(), Ok(()));
        assert_eq!(lacking.attachment(), Attachment::Clsact);
        assert!(lacking.to_string().contains("by filters (gone)"));
    }
}
