//! The types in the maps and the marks on packets: what kernel programs and agent must agree on to the bit.

use core::ops::RangeInclusive;

/// `SO_MARK` of the agent's sockets. The pod's end passes them; the guard checks the cgroup instead.
pub const AGENT_MARK: u32 = 0x1d00_0000;
/// Mark of packets on their way to the agent inside the pod's namespace; the rule in the pod routes them locally.
pub const CAPTURED_MARK: u32 = 0x1e00_0000;
/// The bits of a mark that are ours.
pub const MARK_MASK: u32 = 0x1f00_0000;
/// Local ports of the agent's connections to applications: apart from those of tunnels, which the kernel takes from
/// `net.ipv4.ip_local_port_range` (32768–60999 unless changed; where it was, the agent keeps tunnels out of these), so
/// that the two never share a 4-tuple.
pub const INNER_PORTS: RangeInclusive<u16> = 10_000..=31_999;

/// Entries of the map of captured addresses. When the mesh has more, the agent sets [`FLAG_CAPTURE_ALL`], so that
/// what did not fit is captured too.
pub const MAX_DESTINATIONS: u32 = 65_536;
/// Entries of the map of blocks that are captured whole.
pub const MAX_BLOCKS: u32 = 128;
/// Enrolled workloads of one node; the agent refuses to enrol more and says so.
pub const MAX_WORKLOADS: u32 = 1_024;
/// Listeners: two directions, two families for each workload.
pub const MAX_LISTENERS: u32 = MAX_WORKLOADS * 4;
/// Connections from the node itself that are remembered; the least recently used goes when it is full, and the
/// kernel's next SYN of that probe enters it again.
pub const MAX_PROBES: u32 = 16_384;

/// 4-tuples on their way from capture to the lookup of a listener, a few microseconds each.
pub const MAX_REOPENED: u32 = 4_096;

/// [`Config::flags`]: every destination is captured, known or not.
pub const FLAG_CAPTURE_ALL: u32 = 1;
/// [`Guarded::flags`]: the workload is strict.
pub const FLAG_STRICT: u32 = 1;

/// An IPv6 address, or an IPv4-mapped one (RFC 4291 §2.5.5.2), as four words in network byte order.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// From the four bytes of an IPv4 address.
    #[inline(always)]
    pub const fn v4(bytes: [u8; 4]) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes(bytes)])
    }

    /// From the sixteen bytes of an IPv6 address.
    #[inline(always)]
    pub const fn v6(b: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ])
    }

    /// From either family.
    pub const fn from_ip(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(ip) => Self::v4(ip.octets()),
            core::net::IpAddr::V6(ip) => Self::v6(ip.octets()),
        }
    }

    /// Link-local (fe80::/10) or unspecified: what neighbour discovery uses before a pod has its address.
    #[inline(always)]
    pub const fn is_local_scope(&self) -> bool {
        u32::from_be(self.0[0]) & 0xffc0_0000 == 0xfe80_0000
            || (self.0[0] | self.0[1] | self.0[2] | self.0[3]) == 0
    }
}

/// Which listener of a workload.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Connections that the workload opens.
    Outbound = 0,
    /// Connections to the workload.
    Inbound = 1,
}

/// Key of the map of listeners: the workload's own address, so that one program serves all workloads.
/// A workload that spoofs another's address gets nowhere: the kernel assigns no socket of another namespace.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenerKey {
    /// The workload's address.
    pub address: Address,
    /// [`Direction`].
    pub direction: u32,
}

/// Key of the map of addresses that a veth may send from.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceKey {
    /// The node's end of the veth.
    pub ifindex: u32,
    /// An address of the workload behind it.
    pub address: Address,
}

/// What the guard knows of the workload behind a veth; keyed by the index of the node's end.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guarded {
    /// [`FLAG_STRICT`].
    pub flags: u32,
    /// The hardware address of the pod's end, from which alone it may send; all zero for any.
    pub mac: Mac,
    /// No implicit padding.
    pub reserved: [u8; 2],
}

/// A hardware address.
pub type Mac = [u8; 6];

/// Key of the map of the node's own connections to workloads.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeKey {
    /// The node's address.
    pub node: Address,
    /// The workload's address.
    pub pod: Address,
    /// The node's port, host byte order.
    pub node_port: u16,
    /// The workload's port, host byte order.
    pub pod_port: u16,
}

/// Key of the map of 4-tuples that a new connection uses again while the old one is in TIME_WAIT; the value is the
/// [`Direction`]. Source and destination as in the packet that opens it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FourTuple {
    /// Who opens it.
    pub source: Address,
    /// Whom it is for.
    pub destination: Address,
    /// Host byte order.
    pub source_port: u16,
    /// Host byte order.
    pub destination_port: u16,
}

/// The one entry of the configuration map.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Inodes of the cgroup2 directories of the agent and of its predecessor, as `bpf_skb_cgroup_id` gives them; 0 for
    /// none.
    pub agent_cgroups: [u64; 2],
    /// [`FLAG_CAPTURE_ALL`].
    pub flags: u32,
    /// No implicit padding.
    pub reserved: u32,
}

macro_rules! refusals {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $label:literal;)*) => {
        /// Why a kernel program refused a packet; the index of its counter.
        #[repr(u32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum KernelReason { $($(#[$doc])* $variant = $number,)* }

        impl KernelReason {
            /// All of them, in the order of their counters.
            pub const ALL: &'static [KernelReason] = &[$(KernelReason::$variant,)*];

            /// The label of metric and log.
            pub const fn label(self) -> &'static str { match self { $(KernelReason::$variant => $label,)* } }
        }
    };
}

refusals! {
    /// A new connection to the mesh that did not come through the agent: it is away, or capture was tampered with.
    NotCaptured = 0, "not_captured";
    /// Data of a strict workload to the mesh that did not come through the agent.
    PlaintextOfStrict = 1, "plaintext_of_strict";
    /// A strict workload's application answered a connection that the agent did not take.
    AnswerOfStrict = 2, "answer_of_strict";
    /// The source address is not the workload's.
    SpoofedSource = 3, "spoofed_source";
    /// Not TCP, between a strict workload and the mesh.
    NotTcp = 4, "not_tcp";
    /// A fragment, an IPv6 extension header or an IPv4 option, which may hide TCP or lead it elsewhere; a header that is
    /// cut short.
    Unparsable = 5, "unparsable";
    /// An incoming connection that no listener of the agent takes.
    NoListener = 6, "no_listener";
    /// ARP or neighbour discovery that claims another's address, or the role of a router.
    SpoofedNeighbour = 7, "spoofed_neighbour";
    /// A hardware address that is not the workload's.
    SpoofedMac = 8, "spoofed_mac";
    /// Neither IP nor ARP, from or to a strict workload: nested VLAN tags, say.
    NotIp = 9, "not_ip";
}

/// Counters of refusals: entries of the per-CPU array.
pub const KERNEL_REASONS: u32 = KernelReason::ALL.len() as u32;

#[cfg(feature = "user")]
mod pod {
    use super::*;

    // SAFETY: `repr(C)` or transparent, only integers, no padding: checked by the asserts below.
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ListenerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SourceKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Guarded {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ProbeKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Config {}

    const _: () = {
        assert!(size_of::<Address>() == 16);
        assert!(size_of::<ListenerKey>() == 20);
        assert!(size_of::<SourceKey>() == 20);
        assert!(size_of::<Guarded>() == 12);
        assert!(size_of::<ProbeKey>() == 36);
        assert!(size_of::<Config>() == 24);
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_indexed_without_gaps() {
        for (index, reason) in KernelReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }

    #[test]
    fn addresses_have_the_bytes_of_the_packet() {
        let v6 = Address::from_ip("fe80::1".parse().unwrap());
        assert!(v6.is_local_scope());
        assert!(!Address::from_ip("fd00::1".parse().unwrap()).is_local_scope());
        let mapped = Address::from_ip("::ffff:10.1.0.11".parse().unwrap());
        assert_eq!(Address::from_ip("10.1.0.11".parse().unwrap()), mapped);
    }
}
