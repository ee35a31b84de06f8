//! The types in the maps and the marks on packets: what kernel programs and agent must agree on to the bit.

use core::ops::RangeInclusive;

/// `SO_MARK` of the agent's sockets. The pod's end passes them; the guard checks the cgroup instead.
pub const AGENT_MARK: u32 = 0x1d00_0000;
/// Mark of packets on their way to the agent inside the pod's namespace; the rule in the pod routes them locally.
pub const CAPTURED_MARK: u32 = 0x1e00_0000;
/// The bits of a mark that are ours.
pub const MARK_MASK: u32 = 0x1f00_0000;
/// Local ports of the agent's connections to applications: apart from those of tunnels, which the kernel takes from
/// `net.ipv4.ip_local_port_range`, so that the two never share a 4-tuple.
pub const INNER_PORTS: RangeInclusive<u16> = 10_000..=31_999;
