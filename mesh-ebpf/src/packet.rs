//! Headers read from bytes: IPv4 (RFC 791), IPv6 (RFC 8200), TCP (RFC 9293).
//!
//! The kernel programs copy headers to their stack and hand them in, so that nothing here touches packet memory and
//! everything runs in host tests.

use crate::abi::Address;

/// Bytes of an Ethernet header, also on `lo`.
pub const ETH_LEN: usize = 14;
/// Bytes of an IPv4 header without options.
pub const V4_LEN: usize = 20;
/// Bytes of an IPv6 header.
pub const V6_LEN: usize = 40;
/// Bytes of a TCP header without options.
pub const TCP_LEN: usize = 20;

const IPPROTO_HOP_BY_HOP: u8 = 0;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_IGMP: u8 = 2;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
/// ICMPv6 in the next-header field.
pub const IPPROTO_ICMPV6: u8 = 58;

/// What follows the network header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP, in one piece.
    Tcp,
    /// UDP, in one piece.
    Udp,
    /// ICMP or ICMPv6.
    Icmp,
    /// IPv6 hop-by-hop options: MLD reports carry them, and anything could hide behind them.
    HopByHop,
    /// A fragment of whatever it is, an IPv6 extension header, or whatever comes with IPv4 options.
    Hidden,
    /// Any other protocol.
    Other,
}

/// A network header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// What follows.
    pub transport: Transport,
    /// Offset of what follows, from the start of the network header, bytes.
    pub header_len: usize,
}

impl Network {
    /// Reads an IPv4 header; `None` if it is malformed.
    #[inline(always)]
    pub fn v4(b: &[u8; V4_LEN]) -> Option<Self> {
        let header_len = ((b[0] & 0x0f) as usize) * 4;
        if b[0] >> 4 != 4 || header_len < V4_LEN {
            return None;
        }
        // More-fragments flag or a fragment offset.
        let fragment = u16::from_be_bytes([b[6], b[7]]) & 0x3fff != 0;
        // Options may route the packet elsewhere (RFC 791: source routes); only IGMP needs one (router alert, RFC 2113).
        let options = header_len > V4_LEN && b[9] != IPPROTO_IGMP;
        let transport = match b[9] {
            _ if fragment || options => Transport::Hidden,
            IPPROTO_TCP => Transport::Tcp,
            IPPROTO_UDP => Transport::Udp,
            IPPROTO_ICMP => Transport::Icmp,
            _ => Transport::Other,
        };
        Some(Self {
            source: Address::v4([b[12], b[13], b[14], b[15]]),
            destination: Address::v4([b[16], b[17], b[18], b[19]]),
            transport,
            header_len,
        })
    }

    /// Reads an IPv6 header; `None` if it is malformed.
    #[inline(always)]
    pub fn v6(b: &[u8; V6_LEN]) -> Option<Self> {
        if b[0] >> 4 != 6 {
            return None;
        }
        let transport = match b[6] {
            IPPROTO_TCP => Transport::Tcp,
            IPPROTO_UDP => Transport::Udp,
            IPPROTO_ICMPV6 => Transport::Icmp,
            IPPROTO_HOP_BY_HOP => Transport::HopByHop,
            // Routing, fragment, ESP, AH, destination options, mobility, HIP, shim6.
            43 | 44 | 50 | 51 | 60 | 135 | 139 | 140 => Transport::Hidden,
            _ => Transport::Other,
        };
        let mut source = [0; 16];
        source.copy_from_slice(&b[8..24]);
        let mut destination = [0; 16];
        destination.copy_from_slice(&b[24..40]);
        Some(Self {
            source: Address::v6(source),
            destination: Address::v6(destination),
            transport,
            header_len: V6_LEN,
        })
    }
}

/// Whether IPv6 hop-by-hop options carry ICMPv6, by the first byte of the extension header (RFC 8200 §4.3).
#[inline(always)]
pub const fn hop_by_hop_carries_icmp(next_header: u8) -> bool {
    next_header == IPPROTO_ICMPV6
}

/// A TCP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcp {
    /// Source port, host byte order.
    pub source_port: u16,
    /// Destination port, host byte order.
    pub destination_port: u16,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// The flags byte.
    pub flags: u8,
    /// Offset of the data, bytes.
    pub header_len: usize,
}

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

impl Tcp {
    /// What stands in for a header where there is none.
    pub const NONE: Self = Self {
        source_port: 0,
        destination_port: 0,
        sequence: 0,
        acknowledgement: 0,
        flags: 0,
        header_len: 0,
    };

    /// Reads a TCP header.
    #[inline(always)]
    pub fn parse(b: &[u8; TCP_LEN]) -> Self {
        Self {
            source_port: u16::from_be_bytes([b[0], b[1]]),
            destination_port: u16::from_be_bytes([b[2], b[3]]),
            sequence: u32::from_be_bytes([b[4], b[5], b[6], b[7]]),
            acknowledgement: u32::from_be_bytes([b[8], b[9], b[10], b[11]]),
            flags: b[13],
            header_len: ((b[12] >> 4) as usize) * 4,
        }
    }

    /// Opens a connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN
    }

    /// Answers an opening.
    #[inline(always)]
    pub const fn answers(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN | ACK
    }

    /// Resets a connection.
    #[inline(always)]
    pub const fn resets(&self) -> bool {
        self.flags & RST != 0
    }

    /// Acknowledges.
    #[inline(always)]
    pub const fn acknowledges(&self) -> bool {
        self.flags & ACK != 0
    }

    /// Sequence space that the segment takes: data, SYN and FIN (RFC 9293 §3.4).
    #[inline(always)]
    pub const fn sequence_len(&self, data_len: usize) -> u32 {
        let control = (self.flags & SYN != 0) as u32 + (self.flags & FIN != 0) as u32;
        data_len as u32 + control
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(protocol: u8, fragment: u16, ihl: u8) -> [u8; V4_LEN] {
        let mut b = [0; V4_LEN];
        b[0] = 0x40 | ihl;
        b[6..8].copy_from_slice(&fragment.to_be_bytes());
        b[9] = protocol;
        b[12..16].copy_from_slice(&[10, 1, 0, 11]);
        b[16..20].copy_from_slice(&[10, 2, 0, 11]);
        b
    }

    #[track_caller]
    fn check_v4(bytes: [u8; V4_LEN], expected: Option<Transport>) {
        assert_eq!(Network::v4(&bytes).map(|n| n.transport), expected);
    }

    #[test]
    fn ipv4_headers() {
        check_v4(v4(6, 0, 5), Some(Transport::Tcp));
        check_v4(v4(6, 0x4000, 5), Some(Transport::Tcp)); // don't fragment
        check_v4(v4(6, 0x2000, 5), Some(Transport::Hidden)); // more fragments
        check_v4(v4(6, 0x0001, 5), Some(Transport::Hidden)); // a later fragment
        check_v4(v4(17, 0, 5), Some(Transport::Udp));
        check_v4(v4(47, 0, 5), Some(Transport::Other));
        check_v4(v4(6, 0, 4), None);
        check_v4(v4(6, 0, 7), Some(Transport::Hidden)); // options
        check_v4(v4(2, 0, 6), Some(Transport::Other)); // IGMP's router alert
    }

    #[test]
    fn ipv6_headers_that_hide_something_are_told_apart() {
        let with = |next: u8| {
            let mut b = [0; V6_LEN];
            b[0] = 0x60;
            b[6] = next;
            Network::v6(&b).unwrap().transport
        };
        assert_eq!(with(6), Transport::Tcp);
        assert_eq!(with(0), Transport::HopByHop);
        for hiding in [43, 44, 50, 51, 60, 135, 139, 140] {
            assert_eq!(with(hiding), Transport::Hidden);
        }
        assert_eq!(with(58), Transport::Icmp);
        assert_eq!(with(132), Transport::Other);
    }

    #[test]
    fn tcp_flags() {
        let with = |flags: u8| {
            let mut b = [0; TCP_LEN];
            b[12] = 0x50;
            b[13] = flags;
            Tcp::parse(&b)
        };
        assert!(with(SYN).opens() && with(SYN | 0xc0).opens(), "ECN bits do not matter");
        assert!(!with(SYN | ACK).opens() && with(SYN | ACK).answers());
        assert!(!with(SYN | RST).opens());
        assert_eq!(with(SYN | FIN).sequence_len(3), 5);
    }
}
