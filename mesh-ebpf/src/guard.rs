//! What the node's end of the veth does with a packet: the last word, out of the workload's reach.
//!
//! Out of the pod: only the agent's own sockets may speak to the mesh. A workload can forge marks, remove programs
//! and rules and open raw sockets; it cannot enter the agent's cgroup.

use crate::{
    abi::{FLAG_STRICT, Guarded, KernelReason, Mac},
    neighbour::Claim,
    packet::{Network, Tcp, Transport},
};

/// What is known beyond the packet; asked only when the decision needs it.
pub trait Facts {
    /// The source address is one of the workload behind this veth.
    fn source_owned(&self) -> bool;
    /// The packet's socket belongs to the agent's cgroup.
    fn is_agents(&self) -> bool;
    /// The other side's address is a workload or a service of the mesh, or everything is captured.
    fn peer_captured(&self) -> bool;
    /// The node itself opened this connection, or has a socket at the other end of it.
    fn probe(&self) -> bool;
    /// A UDP packet from or to port 53.
    fn dns(&self) -> bool;
    /// Hop-by-hop options that carry ICMPv6.
    fn hop_by_hop_icmp(&self) -> bool;
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// On its way.
    Pass,
    /// Answered with a RST.
    Reset(KernelReason),
    /// Dropped.
    Drop(KernelReason),
}

/// What a frame is that is no IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// ARP.
    Arp,
    /// IP, with headers that are cut short or contradict themselves.
    BrokenIp,
    /// Anything else.
    Foreign,
}

/// Decides a frame without an IP header, of either direction. What an ARP frame claims is decided by [`claim`].
#[inline(always)]
pub fn not_ip(workload: Guarded, frame: Frame) -> Verdict {
    match frame {
        Frame::Arp => Verdict::Pass,
        Frame::BrokenIp => Verdict::Drop(KernelReason::Unparsable),
        Frame::Foreign if workload.flags & FLAG_STRICT != 0 => Verdict::Drop(KernelReason::NotIp),
        Frame::Foreign => Verdict::Pass,
    }
}

/// Decides what a frame out of the pod says of neighbours; whether the address is one of the workload is asked only
/// for a claim of one. The source's hardware address counts for every frame: a bridge learns by it.
#[inline(always)]
pub fn claim(workload: Guarded, source: &Mac, claim: Claim, owned: impl FnOnce(&Claim) -> bool) -> Verdict {
    if workload.mac != [0; 6] && workload.mac != *source {
        return Verdict::Drop(KernelReason::SpoofedMac);
    }
    let spoofed = match claim.kind {
        crate::neighbour::Kind::Nothing => false,
        crate::neighbour::Kind::Address => !claim.address.is_local_scope() && !owned(&claim),
        crate::neighbour::Kind::Router => true,
    };
    if spoofed { Verdict::Drop(KernelReason::SpoofedNeighbour) } else { Verdict::Pass }
}

/// Decides a packet that comes out of the pod. `data_len`: bytes of TCP data.
#[inline(always)]
pub fn from_pod(
    workload: Guarded,
    network: &Network,
    tcp: Option<&Tcp>,
    data_len: usize,
    facts: &impl Facts,
) -> Verdict {
    if !facts.source_owned() {
        let discovery = matches!(network.transport, Transport::Icmp | Transport::HopByHop);
        if !(discovery && network.source.is_local_scope()) {
            return Verdict::Drop(KernelReason::SpoofedSource);
        }
    }
    let strict = workload.flags & FLAG_STRICT != 0;
    let Some(tcp) = tcp else { return not_tcp(strict, network, facts) };
    if tcp.opens() {
        if facts.is_agents() || !facts.peer_captured() {
            return Verdict::Pass;
        }
        return Verdict::Reset(KernelReason::NotCaptured);
    }
    if !strict || (tcp.resets() && data_len == 0) {
        return Verdict::Pass;
    }
    if tcp.answers() {
        if facts.is_agents() || facts.probe() {
            return Verdict::Pass;
        }
        return Verdict::Drop(KernelReason::AnswerOfStrict);
    }
    if data_len == 0 || facts.is_agents() || !facts.peer_captured() || facts.probe() {
        return Verdict::Pass;
    }
    if tcp.resets() {
        // No kernel puts data into a RST; a raw socket can, and a RST is never answered with another.
        return Verdict::Drop(KernelReason::PlaintextOfStrict);
    }
    Verdict::Reset(KernelReason::PlaintextOfStrict)
}

/// Decides a packet that goes into the pod, TCP apart: the pod's end and the agent decide that.
#[inline(always)]
pub fn to_pod(workload: Guarded, network: &Network, facts: &impl Facts) -> Verdict {
    match network.transport {
        Transport::Tcp => Verdict::Pass,
        _ => not_tcp(workload.flags & FLAG_STRICT != 0, network, facts),
    }
}

/// Whether a packet may leave a pod that is not known yet: what finds neighbours and names, and what answers the node.
/// Everything else is dropped, and sent again by whoever means it.
#[inline(always)]
pub fn passes_a_hold(network: &Network, facts: &impl Facts) -> bool {
    match network.transport {
        Transport::Icmp => true,
        Transport::HopByHop => facts.hop_by_hop_icmp(),
        Transport::Udp => facts.dns(),
        Transport::Tcp => facts.probe(),
        Transport::Hidden | Transport::Other => false,
    }
}

#[inline(always)]
fn not_tcp(strict: bool, network: &Network, facts: &impl Facts) -> Verdict {
    match network.transport {
        Transport::Icmp => Verdict::Pass,
        Transport::HopByHop if facts.hop_by_hop_icmp() => Verdict::Pass,
        Transport::HopByHop | Transport::Hidden => Verdict::Drop(KernelReason::Unparsable),
        Transport::Tcp | Transport::Udp | Transport::Other => {
            if strict && !facts.dns() && facts.peer_captured() {
                Verdict::Drop(KernelReason::NotTcp)
            } else {
                Verdict::Pass
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Address;

    #[derive(Clone, Copy)]
    struct Known {
        owned: bool,
        agent: bool,
        captured: bool,
        probe: bool,
        dns: bool,
    }

    const APP: Known = Known { owned: true, agent: false, captured: true, probe: false, dns: false };
    const AGENT: Known = Known { agent: true, ..APP };
    const MAC: Mac = [2, 0, 0, 0, 0, 1];
    const STRICT: Guarded = Guarded { flags: FLAG_STRICT, mac: MAC, reserved: [0; 2] };
    const PERMISSIVE: Guarded = Guarded { flags: 0, ..STRICT };

    impl Facts for Known {
        fn source_owned(&self) -> bool {
            self.owned
        }
        fn is_agents(&self) -> bool {
            self.agent
        }
        fn peer_captured(&self) -> bool {
            self.captured
        }
        fn probe(&self) -> bool {
            self.probe
        }
        fn dns(&self) -> bool {
            self.dns
        }
        fn hop_by_hop_icmp(&self) -> bool {
            false
        }
    }

    fn network(transport: Transport) -> Network {
        let address = Address::v4([10, 0, 0, 1]);
        Network { source: address, destination: address, transport, header_len: 20 }
    }

    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;

    #[track_caller]
    fn check(workload: Guarded, flags: u8, data_len: usize, known: Known, expected: Verdict) {
        let tcp = Tcp {
            source_port: 1,
            destination_port: 2,
            sequence: 0,
            acknowledgement: 0,
            flags,
            header_len: 20,
        };
        assert_eq!(from_pod(workload, &network(Transport::Tcp), Some(&tcp), data_len, &known), expected);
    }

    #[test]
    fn only_the_agent_opens_connections_to_the_mesh() {
        for workload in [STRICT, PERMISSIVE] {
            check(workload, SYN, 0, AGENT, Verdict::Pass);
            check(workload, SYN, 0, APP, Verdict::Reset(KernelReason::NotCaptured));
            check(workload, SYN, 0, Known { captured: false, ..APP }, Verdict::Pass);
        }
    }

    #[test]
    fn data_of_a_strict_workload_is_the_agents_or_the_nodes() {
        check(STRICT, ACK, 5, APP, Verdict::Reset(KernelReason::PlaintextOfStrict));
        check(STRICT, ACK, 5, AGENT, Verdict::Pass);
        check(STRICT, ACK, 5, Known { probe: true, ..APP }, Verdict::Pass);
        check(STRICT, ACK, 5, Known { captured: false, ..APP }, Verdict::Pass);
        check(STRICT, ACK, 0, APP, Verdict::Pass);
        check(STRICT, RST, 0, APP, Verdict::Pass);
        // No kernel sends it, a workload's root can; and a RST is never answered with another.
        check(STRICT, RST, 5, APP, Verdict::Drop(KernelReason::PlaintextOfStrict));
        check(STRICT, RST | SYN | ACK, 5, APP, Verdict::Drop(KernelReason::PlaintextOfStrict));
        check(STRICT, RST, 5, AGENT, Verdict::Pass);
        check(PERMISSIVE, ACK, 5, APP, Verdict::Pass);
    }

    #[test]
    fn a_strict_application_cannot_answer_what_the_agent_did_not_take() {
        check(STRICT, SYN | ACK, 0, APP, Verdict::Drop(KernelReason::AnswerOfStrict));
        check(
            STRICT,
            SYN | ACK,
            0,
            Known { captured: false, ..APP },
            Verdict::Drop(KernelReason::AnswerOfStrict),
        );
        check(STRICT, SYN | ACK, 0, AGENT, Verdict::Pass);
        check(STRICT, SYN | ACK, 0, Known { probe: true, ..APP }, Verdict::Pass);
        check(PERMISSIVE, SYN | ACK, 0, APP, Verdict::Pass);
    }

    #[test]
    fn a_spoofed_source_is_dropped_even_from_the_agent() {
        check(
            PERMISSIVE,
            ACK,
            0,
            Known { owned: false, ..AGENT },
            Verdict::Drop(KernelReason::SpoofedSource),
        );
    }

    #[track_caller]
    fn check_other(workload: Guarded, transport: Transport, known: Known, expected: Verdict) {
        assert_eq!(from_pod(workload, &network(transport), None, 0, &known), expected);
        assert_eq!(to_pod(workload, &network(transport), &known), expected);
    }

    #[test]
    fn what_is_not_tcp() {
        check_other(STRICT, Transport::Udp, APP, Verdict::Drop(KernelReason::NotTcp));
        check_other(STRICT, Transport::Udp, Known { dns: true, ..APP }, Verdict::Pass);
        check_other(STRICT, Transport::Udp, Known { captured: false, ..APP }, Verdict::Pass);
        check_other(PERMISSIVE, Transport::Udp, APP, Verdict::Pass);
        check_other(STRICT, Transport::Other, APP, Verdict::Drop(KernelReason::NotTcp));
        check_other(PERMISSIVE, Transport::Hidden, APP, Verdict::Drop(KernelReason::Unparsable));
        check_other(STRICT, Transport::Icmp, APP, Verdict::Pass);
        check_other(STRICT, Transport::HopByHop, APP, Verdict::Drop(KernelReason::Unparsable));
    }

    #[test]
    fn a_pod_that_is_not_known_yet_asks_for_names_and_answers_the_node_and_nothing_else() {
        let check = |transport, known, expected| {
            assert_eq!(passes_a_hold(&network(transport), &known), expected);
        };
        check(Transport::Tcp, APP, false);
        check(Transport::Tcp, Known { captured: false, ..APP }, false);
        check(Transport::Tcp, Known { probe: true, ..APP }, true);
        check(Transport::Udp, APP, false);
        check(Transport::Udp, Known { dns: true, ..APP }, true);
        check(Transport::Icmp, APP, true);
        for other in [Transport::HopByHop, Transport::Hidden, Transport::Other] {
            check(other, APP, false);
        }
    }

    #[test]
    fn what_is_not_ip() {
        for workload in [STRICT, PERMISSIVE] {
            assert_eq!(not_ip(workload, Frame::Arp), Verdict::Pass);
            assert_eq!(not_ip(workload, Frame::BrokenIp), Verdict::Drop(KernelReason::Unparsable));
        }
        assert_eq!(not_ip(STRICT, Frame::Foreign), Verdict::Drop(KernelReason::NotIp));
        assert_eq!(not_ip(PERMISSIVE, Frame::Foreign), Verdict::Pass);
    }

    #[test]
    fn a_workload_claims_its_own_addresses_only() {
        use crate::neighbour::Kind;
        let of = |kind, address: &str| Claim { kind, address: Address::from_ip(address.parse().unwrap()) };
        let mine = |claim: &Claim| claim.address == Address::v4([10, 0, 0, 1]);
        let spoofed = Verdict::Drop(KernelReason::SpoofedNeighbour);
        assert_eq!(claim(STRICT, &MAC, of(Kind::Address, "10.0.0.1"), mine), Verdict::Pass);
        assert_eq!(claim(STRICT, &MAC, of(Kind::Address, "10.0.0.2"), mine), spoofed);
        assert_eq!(claim(STRICT, &MAC, of(Kind::Address, "fe80::1"), mine), Verdict::Pass);
        assert_eq!(claim(STRICT, &MAC, of(Kind::Router, "fe80::1"), mine), spoofed);
        assert_eq!(claim(STRICT, &MAC, of(Kind::Nothing, "10.0.0.2"), mine), Verdict::Pass);
    }

    #[test]
    fn a_foreign_hardware_address_is_dropped_where_it_is_known() {
        let other = [2, 0, 0, 0, 0, 2];
        let nothing = Claim::NOTHING;
        let dropped = Verdict::Drop(KernelReason::SpoofedMac);
        assert_eq!(claim(PERMISSIVE, &other, nothing, |_| true), dropped);
        let unknown = Guarded { mac: [0; 6], ..STRICT };
        assert_eq!(claim(unknown, &other, nothing, |_| true), Verdict::Pass);
    }
}
