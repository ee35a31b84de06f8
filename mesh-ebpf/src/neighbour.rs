//! What a frame tells its neighbours of who is where: ARP (RFC 826) and neighbour discovery (RFC 4861).
//!
//! A workload that answers for another's address, or as a router, would get that one's packets on a shared link. It
//! could not read what the mesh carries, but it could keep it from arriving.

use crate::abi::Address;

/// Bytes of an ARP packet for IPv4 over Ethernet.
pub const ARP_LEN: usize = 28;
/// Bytes of a neighbour advertisement up to the end of its target.
pub const ADVERTISEMENT_LEN: usize = 24;

/// `ar$pro` of IPv4.
const ARP_IPV4: u16 = 0x0800;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// What is claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Nothing,
    /// To be at this address.
    Address,
    /// To be a router, or to know one.
    Router,
}

/// What a frame claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// What.
    pub kind: Kind,
    /// The address, for a claim of one; otherwise unspecified.
    pub address: Address,
}

impl Claim {
    /// No claim.
    pub const NOTHING: Self = Self { kind: Kind::Nothing, address: Address([0; 4]) };

    /// The sender of an ARP packet: receivers learn from requests and answers alike. A probe (RFC 5227) has none.
    #[inline(always)]
    pub fn of_arp(b: &[u8; ARP_LEN]) -> Self {
        let is_ipv4 = u16::from_be_bytes([b[2], b[3]]) == ARP_IPV4;
        let sender = [b[14], b[15], b[16], b[17]];
        if !is_ipv4 || sender == [0; 4] {
            return Self::NOTHING;
        }
        Self { kind: Kind::Address, address: Address::v4(sender) }
    }

    /// Whether an ICMPv6 message of this type has more to be read for its claim.
    #[inline(always)]
    pub const fn has_target(icmp_type: u8) -> bool {
        icmp_type == NEIGHBOUR_ADVERTISEMENT
    }

    /// The claim of an ICMPv6 message by its type alone.
    #[inline(always)]
    pub const fn of_icmp(icmp_type: u8) -> Self {
        match icmp_type {
            ROUTER_ADVERTISEMENT | REDIRECT => Self { kind: Kind::Router, ..Self::NOTHING },
            _ => Self::NOTHING,
        }
    }

    /// The target of a neighbour advertisement.
    #[inline(always)]
    pub fn of_advertisement(b: &[u8; ADVERTISEMENT_LEN]) -> Self {
        let mut target = [0; 16];
        target.copy_from_slice(&b[8..24]);
        Self { kind: Kind::Address, address: Address::v6(target) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arp_packet_claims_its_senders_address() {
        let mut arp = [0; ARP_LEN];
        arp[2] = 8;
        assert_eq!(Claim::of_arp(&arp), Claim::NOTHING, "a probe");
        arp[14..18].copy_from_slice(&[10, 1, 0, 11]);
        let claim = Claim::of_arp(&arp);
        assert_eq!((claim.kind, claim.address), (Kind::Address, Address::v4([10, 1, 0, 11])));
        arp[2] = 0x86;
        assert_eq!(Claim::of_arp(&arp), Claim::NOTHING, "of another protocol");
    }

    #[test]
    fn advertisements_claim_their_target_and_routers_a_role() {
        let mut message = [0; ADVERTISEMENT_LEN];
        message[8..24].copy_from_slice(&"fd00::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
        let claim = Claim::of_advertisement(&message);
        assert_eq!(
            (claim.kind, claim.address),
            (Kind::Address, Address::from_ip("fd00::1".parse().unwrap()))
        );
        assert!(Claim::has_target(136) && !Claim::has_target(135));
        for (icmp_type, kind) in
            [(133, Kind::Nothing), (134, Kind::Router), (135, Kind::Nothing), (137, Kind::Router)]
        {
            assert_eq!(Claim::of_icmp(icmp_type).kind, kind);
        }
    }
}
