//! What the pod's end of the veth does with a packet, and `lo` with a captured one.
//!
//! Out: new connections to the mesh go to the agent's outbound listener, later packets to the socket that took them.
//! In: new connections go to the agent's inbound listener, except those that the node itself opens (probes).

use crate::{
    abi::KernelReason,
    packet::{Network, Tcp, Transport},
};

/// What is known beyond the packet; asked only when the decision needs it, since each answer costs a map lookup.
pub trait Facts {
    /// The destination is a workload or a service of the mesh, or everything is captured.
    fn destination_captured(&self) -> bool;
    /// A listener of the agent stands ready for this workload and direction.
    fn listener_ready(&self) -> bool;
    /// Who has this 4-tuple in this namespace, with the packet's destination as its own address.
    fn holder(&self) -> Holder;
    /// The node itself opened this connection.
    fn probe(&self) -> bool;
}

/// Who has a 4-tuple in a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// No connection.
    Nobody,
    /// A connection.
    Connection,
    /// What is left of one that its own side ended first (TIME_WAIT, RFC 9293 §3.6.1).
    TimeWait,
}

/// What happens to a packet that leaves the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outbound {
    /// On its way; the guard has its own opinion.
    Pass,
    /// To the agent, by way of `lo`.
    ToAgent,
}

/// Decides a packet of an application that leaves by the pod's end of the veth. `tcp` is `None` for all but TCP.
#[inline(always)]
pub fn outbound(tcp: Option<&Tcp>, facts: &impl Facts) -> Outbound {
    let Some(tcp) = tcp else { return Outbound::Pass };
    let to_agent = if tcp.opens() {
        // Without a listener the packet goes on to the guard, which answers with a RST and counts it.
        facts.destination_captured() && facts.listener_ready()
    } else {
        facts.holder() != Holder::Nobody
    };
    if to_agent { Outbound::ToAgent } else { Outbound::Pass }
}

/// What happens to a packet that reaches the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inbound {
    /// To whatever socket the kernel finds.
    Pass,
    /// To the agent's inbound listener.
    ToAgent,
    /// To the agent's inbound listener, by way of the socket in TIME_WAIT whose 4-tuple it uses again.
    ToAgentAgain,
    /// Answered with a RST.
    Reset(KernelReason),
    /// Dropped.
    Drop(KernelReason),
}

/// Decides a packet that reaches the pod's end of the veth from outside. `tcp` is `None` for all but TCP.
#[inline(always)]
pub fn inbound(network: &Network, tcp: Option<&Tcp>, facts: &impl Facts) -> Inbound {
    if network.transport as u32 == Transport::Hidden as u32 {
        // TCP has no business here (it discovers the path's MTU); a SYN in fragments would reach the application.
        return Inbound::Drop(KernelReason::Unparsable);
    }
    let Some(tcp) = tcp else { return Inbound::Pass };
    if !tcp.opens() || facts.probe() {
        // Not an opening: the kernel finds the socket that took the connection, the agent's as a rule.
        return Inbound::Pass;
    }
    match facts.holder() {
        Holder::Connection => Inbound::Pass,
        _ if !facts.listener_ready() => Inbound::Reset(KernelReason::NoListener),
        Holder::TimeWait => Inbound::ToAgentAgain,
        Holder::Nobody => Inbound::ToAgent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Address;

    #[derive(Clone, Copy)]
    struct Known {
        captured: bool,
        listener: bool,
        holder: Holder,
        probe: bool,
    }

    impl Default for Known {
        fn default() -> Self {
            Self { captured: false, listener: false, holder: Holder::Nobody, probe: false }
        }
    }

    impl Facts for Known {
        fn destination_captured(&self) -> bool {
            self.captured
        }
        fn listener_ready(&self) -> bool {
            self.listener
        }
        fn holder(&self) -> Holder {
            self.holder
        }
        fn probe(&self) -> bool {
            self.probe
        }
    }

    fn tcp(flags: u8) -> Tcp {
        Tcp { source_port: 1, destination_port: 2, sequence: 0, acknowledgement: 0, flags, header_len: 20 }
    }

    fn network(transport: Transport) -> Network {
        let address = Address::v4([10, 0, 0, 1]);
        Network { source: address, destination: address, transport, header_len: 20 }
    }

    const SYN: u8 = 2;
    const ACK: u8 = 16;

    #[test]
    fn openings_to_the_mesh_go_to_the_agent() {
        let ready = Known { captured: true, listener: true, ..Known::default() };
        assert_eq!(outbound(Some(&tcp(SYN)), &ready), Outbound::ToAgent);
        assert_eq!(outbound(Some(&tcp(SYN)), &Known { captured: false, ..ready }), Outbound::Pass);
        assert_eq!(outbound(Some(&tcp(SYN)), &Known { listener: false, ..ready }), Outbound::Pass);
        assert_eq!(outbound(None, &ready), Outbound::Pass);
    }

    #[test]
    fn later_packets_follow_the_socket_that_took_the_connection() {
        for holder in [Holder::Connection, Holder::TimeWait] {
            let known = Known { holder, ..Known::default() };
            assert_eq!(outbound(Some(&tcp(ACK)), &known), Outbound::ToAgent);
        }
        assert_eq!(outbound(Some(&tcp(ACK)), &Known { captured: true, ..Known::default() }), Outbound::Pass);
    }

    #[test]
    fn incoming_openings_go_to_the_agent_or_are_reset() {
        let net = network(Transport::Tcp);
        let ready = Known { listener: true, ..Known::default() };
        assert_eq!(inbound(&net, Some(&tcp(SYN)), &ready), Inbound::ToAgent);
        assert_eq!(
            inbound(&net, Some(&tcp(SYN)), &Known::default()),
            Inbound::Reset(KernelReason::NoListener)
        );
        assert_eq!(inbound(&net, Some(&tcp(SYN)), &Known { probe: true, ..Known::default() }), Inbound::Pass);
        assert_eq!(inbound(&net, Some(&tcp(ACK)), &Known::default()), Inbound::Pass);
        let taken = Known { holder: Holder::Connection, ..ready };
        assert_eq!(inbound(&net, Some(&tcp(SYN)), &taken), Inbound::Pass);
    }

    #[test]
    fn what_is_left_of_a_connection_never_leads_past_the_agent() {
        let net = network(Transport::Tcp);
        let waiting = Known { holder: Holder::TimeWait, ..Known::default() };
        let ready = Known { listener: true, ..waiting };
        assert_eq!(inbound(&net, Some(&tcp(SYN)), &ready), Inbound::ToAgentAgain);
        assert_eq!(inbound(&net, Some(&tcp(SYN)), &waiting), Inbound::Reset(KernelReason::NoListener));
    }

    #[test]
    fn a_fragment_never_reaches_the_application() {
        let ready = Known { listener: true, ..Known::default() };
        let hidden = network(Transport::Hidden);
        assert_eq!(inbound(&hidden, None, &ready), Inbound::Drop(KernelReason::Unparsable));
    }
}
