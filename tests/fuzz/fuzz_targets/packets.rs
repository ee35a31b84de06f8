//! Frames that a workload's root, or a host on its network, may send: what the kernel programs decide on them.
//!
//! The first byte is what the maps would say of the packet (one bit each), the second the workload's flags; the frame
//! follows. Reading is as in `mesh-ebpf/src/skb.rs`, around the same functions. Claims, for whatever bytes: a strict
//! workload's data goes to the mesh by the agent only; nobody else opens a connection; a spoofed source never passes;
//! an opening reaches an application only through the agent, the node or a connection that is there; a RST answers TCP
//! only, never another RST, and is well-formed; what cannot be read does not pass as IP.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_ebpf::{
    abi::{Address, FLAG_STRICT, Guarded},
    capture::{self, Holder},
    guard,
    packet::{ETH_LEN, Network, TCP_LEN, Tcp, Transport, V4_LEN, V6_LEN, hop_by_hop_carries_icmp},
    reset,
};

/// What is known beyond the packet: a bit each.
#[derive(Clone, Copy)]
struct Known<'a> {
    bits: u8,
    packet: &'a Packet<'a>,
}

impl Known<'_> {
    fn bit(&self, number: u8) -> bool {
        self.bits & (1 << number) != 0
    }
    fn owned(&self) -> bool {
        self.bit(0)
    }
    fn agents(&self) -> bool {
        self.bit(1)
    }
    fn mesh(&self) -> bool {
        self.bit(2)
    }
    fn nodes(&self) -> bool {
        self.bit(3)
    }
    fn listener(&self) -> bool {
        self.bit(4)
    }
    fn held_by(&self) -> Holder {
        match (self.bit(5), self.bit(6)) {
            (true, _) => Holder::Connection,
            (false, true) => Holder::TimeWait,
            (false, false) => Holder::Nobody,
        }
    }
}

impl guard::Facts for Known<'_> {
    fn source_owned(&self) -> bool {
        self.owned()
    }
    fn is_agents(&self) -> bool {
        self.agents()
    }
    fn peer_captured(&self) -> bool {
        self.mesh()
    }
    fn probe(&self) -> bool {
        self.nodes()
    }
    fn dns(&self) -> bool {
        self.packet.is_dns()
    }
    fn hop_by_hop_icmp(&self) -> bool {
        self.packet.bytes.get(ETH_LEN + V6_LEN).is_some_and(|next| hop_by_hop_carries_icmp(*next))
    }
}

impl capture::Facts for Known<'_> {
    fn destination_captured(&self) -> bool {
        self.mesh()
    }
    fn listener_ready(&self) -> bool {
        self.listener()
    }
    fn holder(&self) -> Holder {
        self.held_by()
    }
    fn probe(&self) -> bool {
        self.nodes()
    }
}

/// A frame, read as the kernel programs read it.
struct Packet<'a> {
    bytes: &'a [u8],
    v6: bool,
    network: Network,
    tcp: Option<Tcp>,
}

impl<'a> Packet<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let (v6, network) = match bytes.get(12..ETH_LEN)? {
            [0x08, 0x00] => (false, Network::v4(load::<V4_LEN>(bytes, ETH_LEN)?)?),
            [0x86, 0xdd] => (true, Network::v6(load::<V6_LEN>(bytes, ETH_LEN)?)?),
            _ => return None,
        };
        let tcp = match network.transport {
            Transport::Tcp => Some(Tcp::parse(load::<TCP_LEN>(bytes, ETH_LEN + network.header_len)?)),
            _ => None,
        };
        Some(Self { bytes, v6, network, tcp })
    }

    fn data_len(&self) -> usize {
        self.tcp.as_ref().map_or(0, |tcp| reset::data_len(self.bytes.len(), &self.network, tcp))
    }

    fn is_dns(&self) -> bool {
        let ports = load::<4>(self.bytes, ETH_LEN + self.network.header_len);
        self.network.transport == Transport::Udp
            && ports.is_some_and(|ports| ports[..2] == [0, 53] || ports[2..] == [0, 53])
    }
}

fn load<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..)?.first_chunk()
}

fuzz_target!(|input: &[u8]| {
    let [bits, flags, frame @ ..] = input else { return };
    let workload = Guarded { flags: u32::from(*flags), mac: [0; 6], reserved: [0; 2] };
    let Some(packet) = Packet::read(frame) else { return unread(workload, frame) };
    let known = Known { bits: *bits, packet: &packet };
    leaves(workload, &packet, known);
    arrives(workload, &packet, known);
});

fn unread(workload: Guarded, frame: &[u8]) {
    let what = match frame.get(12..ETH_LEN) {
        Some([0x08, 0x06]) => guard::Frame::Arp,
        Some([0x08, 0x00] | [0x86, 0xdd]) => guard::Frame::BrokenIp,
        _ => guard::Frame::Foreign,
    };
    let passes = guard::not_ip(workload, what) == guard::Verdict::Pass;
    let strict = workload.flags & FLAG_STRICT != 0;
    assert!(!passes || what == guard::Frame::Arp || (what == guard::Frame::Foreign && !strict));
}

fn leaves(workload: Guarded, packet: &Packet<'_>, known: Known<'_>) {
    let strict = workload.flags & FLAG_STRICT != 0;
    let (tcp, data_len) = (packet.tcp.as_ref(), packet.data_len());
    let verdict = guard::from_pod(workload, &packet.network, tcp, data_len, &known);
    let passes = verdict == guard::Verdict::Pass;
    let discovery = packet.network.source.is_local_scope()
        && matches!(packet.network.transport, Transport::Icmp | Transport::HopByHop);
    assert!(!passes || known.owned() || discovery, "a spoofed source");
    if known.mesh() && !known.agents() {
        assert!(!passes || !tcp.is_some_and(Tcp::opens), "a connection to the mesh around the agent");
        let provable = match packet.network.transport {
            Transport::Tcp => data_len == 0 || known.nodes(),
            Transport::Udp => packet.is_dns(),
            Transport::Icmp | Transport::HopByHop => true,
            Transport::Hidden | Transport::Other => false,
        };
        assert!(
            !passes || !strict || provable,
            "data of a strict workload that did not come through the agent"
        );
    }
    if let guard::Verdict::Reset(_) = verdict {
        let tcp = tcp.expect("only TCP is answered with a RST");
        assert!(!tcp.resets(), "a RST is never answered with another");
        well_formed(packet, tcp);
    }
    if capture::outbound(tcp, &known) == capture::Outbound::ToAgent {
        let tcp = tcp.expect("only TCP is captured");
        assert!(if tcp.opens() {
            known.mesh() && known.listener()
        } else {
            known.held_by() != Holder::Nobody
        });
    }
}

fn arrives(workload: Guarded, packet: &Packet<'_>, known: Known<'_>) {
    let tcp = packet.tcp.as_ref();
    let at_node = guard::to_pod(workload, &packet.network, &known);
    let at_pod = capture::inbound(&packet.network, tcp, &known);
    if packet.network.transport == Transport::Hidden {
        assert_ne!(at_node, guard::Verdict::Pass, "a fragment may hide an opening");
        assert!(matches!(at_pod, capture::Inbound::Drop(_)));
    }
    if tcp.is_some_and(Tcp::opens) && !known.nodes() && known.held_by() != Holder::Connection {
        assert_ne!(at_pod, capture::Inbound::Pass, "an opening that goes around the agent");
    }
    if let capture::Inbound::Reset(_) = at_pod {
        let tcp = tcp.expect("only TCP is answered with a RST");
        assert!(!tcp.resets());
        well_formed(packet, tcp);
    }
}

/// The answer goes back where the packet came from, and a receiver takes it.
fn well_formed(packet: &Packet<'_>, refused: &Tcp) {
    let eth = load::<ETH_LEN>(packet.bytes, 0).expect("was read before");
    let mut frame = [0; reset::V6_FRAME];
    let len = if packet.v6 {
        reset::v6(eth, &packet.network, refused, packet.data_len(), &mut frame);
        reset::V6_FRAME
    } else {
        let short = frame.first_chunk_mut().expect("the shorter frame is a prefix");
        reset::v4(eth, &packet.network, refused, packet.data_len(), short);
        reset::V4_FRAME
    };
    let answer = Packet::read(&frame[..len]).expect("a whole packet");
    let tcp = answer.tcp.as_ref().expect("of TCP");
    assert_eq!((&frame[..6], &frame[6..12]), (&eth[6..12], &eth[..6]));
    assert_eq!(answer.network.source, packet.network.destination);
    assert_eq!(answer.network.destination, packet.network.source);
    assert_eq!((tcp.source_port, tcp.destination_port), (refused.destination_port, refused.source_port));
    assert!(tcp.resets() && answer.data_len() == 0);
    assert_eq!(tcp.acknowledges(), !refused.acknowledges(), "RFC 9293 §3.10.7.1");
    let segment = &frame[ETH_LEN + answer.network.header_len..len];
    let pseudo = words(answer.network.source) + words(answer.network.destination) + 6 + TCP_LEN as u64;
    assert_eq!(folded(pseudo + sum(segment)), 0xffff, "the segment's checksum");
    if !packet.v6 {
        assert_eq!(folded(sum(&frame[ETH_LEN..ETH_LEN + V4_LEN])), 0xffff, "the header's checksum");
    }
}

/// An address as 16-bit words, as the pseudo header has it: the mapped prefix of an IPv4 address is not part of it.
fn words(address: Address) -> u64 {
    let mapped = address.0[..3] == [0, 0, 0xffff_u32.to_be()];
    let own = if mapped { &address.0[3..] } else { &address.0[..] };
    own.iter().map(|word| sum(&word.to_ne_bytes())).sum()
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn folded(mut total: u64) -> u64 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total
}
