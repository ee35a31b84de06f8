//! The RST that answers a refused packet (RFC 9293 §3.10.7.1), as the bytes of a whole frame.
//!
//! Built here rather than by the kernel's stack because the refusal happens below it; the application sees
//! `ECONNREFUSED` at once instead of a timeout.

use crate::{
    abi::Address,
    packet::{ETH_LEN, Network, TCP_LEN, Tcp, V4_LEN, V6_LEN},
};

/// Bytes of the frame over IPv4.
pub const V4_FRAME: usize = ETH_LEN + V4_LEN + TCP_LEN;
/// Bytes of the frame over IPv6.
pub const V6_FRAME: usize = ETH_LEN + V6_LEN + TCP_LEN;

const IPPROTO_TCP: u8 = 6;
const HOPS: u8 = 64;
const RST: u8 = 0x04;
const RST_ACK: u8 = 0x14;

/// Writes the frame that answers a TCP segment over IPv4 with this Ethernet header.
#[inline(always)]
pub fn v4(eth: &[u8; ETH_LEN], network: &Network, tcp: &Tcp, data_len: usize, frame: &mut [u8; V4_FRAME]) {
    *frame = [0; V4_FRAME];
    swap_ethernet(eth, frame);
    let reply = &mut frame[ETH_LEN..];
    reply[0] = 0x45;
    reply[3] = (V4_LEN + TCP_LEN) as u8;
    reply[6] = 0x40; // don't fragment
    reply[8] = HOPS;
    reply[9] = IPPROTO_TCP;
    reply[12..16].copy_from_slice(&network.destination.0[3].to_ne_bytes());
    reply[16..20].copy_from_slice(&network.source.0[3].to_ne_bytes());
    let header = checksum(sum(0, &reply[..V4_LEN]));
    reply[10..12].copy_from_slice(&header.to_be_bytes());
    write_tcp(&mut reply[V4_LEN..V4_LEN + TCP_LEN], tcp, data_len);
    let pseudo = sum(IPPROTO_TCP as u32 + TCP_LEN as u32, &reply[12..20]);
    let segment = checksum(sum(pseudo, &reply[V4_LEN..V4_LEN + TCP_LEN]));
    reply[V4_LEN + 16..V4_LEN + 18].copy_from_slice(&segment.to_be_bytes());
}

/// Writes the frame that answers a TCP segment over IPv6 with this Ethernet header.
#[inline(always)]
pub fn v6(eth: &[u8; ETH_LEN], network: &Network, tcp: &Tcp, data_len: usize, frame: &mut [u8; V6_FRAME]) {
    *frame = [0; V6_FRAME];
    swap_ethernet(eth, frame);
    let reply = &mut frame[ETH_LEN..];
    reply[0] = 0x60;
    reply[5] = TCP_LEN as u8;
    reply[6] = IPPROTO_TCP;
    reply[7] = HOPS;
    write_v6(&mut reply[8..24], &network.destination);
    write_v6(&mut reply[24..40], &network.source);
    write_tcp(&mut reply[V6_LEN..V6_LEN + TCP_LEN], tcp, data_len);
    let pseudo = sum(IPPROTO_TCP as u32 + TCP_LEN as u32, &reply[8..40]);
    let segment = checksum(sum(pseudo, &reply[V6_LEN..V6_LEN + TCP_LEN]));
    reply[V6_LEN + 16..V6_LEN + 18].copy_from_slice(&segment.to_be_bytes());
}

#[inline(always)]
fn write_v6(out: &mut [u8], address: &Address) {
    let mut i = 0;
    while i < 4 {
        out[i * 4..i * 4 + 4].copy_from_slice(&address.0[i].to_ne_bytes());
        i += 1;
    }
}

/// Bytes of TCP data in a frame of `frame_len` bytes. By the frame's own length: the length fields of headers are 0 in
/// packets beyond 64 KiB (BIG TCP), and a length that a workload writes is not to be believed.
#[inline(always)]
pub const fn data_len(frame_len: usize, network: &Network, tcp: &Tcp) -> usize {
    frame_len.saturating_sub(ETH_LEN + network.header_len + tcp.header_len)
}

#[inline(always)]
fn swap_ethernet(eth: &[u8; ETH_LEN], frame: &mut [u8]) {
    frame[0..6].copy_from_slice(&eth[6..12]);
    frame[6..12].copy_from_slice(&eth[0..6]);
    frame[12..14].copy_from_slice(&eth[12..14]);
}

#[inline(always)]
fn write_tcp(out: &mut [u8], tcp: &Tcp, data_len: usize) {
    out[0..2].copy_from_slice(&tcp.destination_port.to_be_bytes());
    out[2..4].copy_from_slice(&tcp.source_port.to_be_bytes());
    out[12] = (TCP_LEN as u8 / 4) << 4;
    if tcp.acknowledges() {
        out[4..8].copy_from_slice(&tcp.acknowledgement.to_be_bytes());
        out[13] = RST;
    } else {
        let seen = tcp.sequence.wrapping_add(tcp.sequence_len(data_len));
        out[8..12].copy_from_slice(&seen.to_be_bytes());
        out[13] = RST_ACK;
    }
}

/// One's complement sum of 16-bit words (RFC 1071), of an even number of bytes.
#[inline(always)]
fn sum(start: u32, bytes: &[u8]) -> u32 {
    let mut total = start;
    let mut i = 0;
    while i + 1 < bytes.len() {
        total += u16::from_be_bytes([bytes[i], bytes[i + 1]]) as u32;
        i += 2;
    }
    total
}

#[inline(always)]
fn checksum(total: u32) -> u16 {
    let once = (total & 0xffff) + (total >> 16);
    !(((once & 0xffff) + (once >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn syn() -> Tcp {
        Tcp {
            source_port: 40_000,
            destination_port: 8080,
            sequence: u32::MAX,
            acknowledgement: 0,
            flags: 2,
            header_len: 40,
        }
    }

    fn network(source: &str, destination: &str) -> Network {
        Network {
            source: Address::from_ip(source.parse().unwrap()),
            destination: Address::from_ip(destination.parse().unwrap()),
            transport: crate::packet::Transport::Tcp,
            header_len: 20,
        }
    }

    /// A receiver's check: the sum over header or pseudo header and segment is all ones.
    fn verifies(total: u32) -> bool {
        checksum(total) == 0
    }

    #[test]
    fn a_syn_is_refused_with_an_acknowledged_reset_that_verifies() {
        let network = network("10.1.0.11", "10.2.0.11");
        let eth = [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 8, 0];
        let mut frame = [0; V4_FRAME];
        v4(&eth, &network, &syn(), 0, &mut frame);
        assert_eq!(&frame[0..12], &[2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]);
        let reply = &frame[ETH_LEN..];
        assert!(verifies(sum(0, &reply[..20])));
        assert!(verifies(sum(sum(26, &reply[12..20]), &reply[20..])));
        assert_eq!(&reply[12..20], &[10, 2, 0, 11, 10, 1, 0, 11]);
        let tcp = Tcp::parse(reply[20..40].try_into().unwrap());
        assert!(tcp.resets() && tcp.acknowledges());
        assert_eq!((tcp.source_port, tcp.destination_port, tcp.acknowledgement), (8080, 40_000, 0));
    }

    #[test]
    fn a_segment_with_acknowledgement_is_refused_at_its_sequence() {
        let data = Tcp { flags: 16, acknowledgement: 77, ..syn() };
        let mut frame = [0; V6_FRAME];
        v6(&[0; ETH_LEN], &network("fd01::11", "fd02::11"), &data, 5, &mut frame);
        let reply = &frame[ETH_LEN..];
        assert!(verifies(sum(sum(26, &reply[8..40]), &reply[40..])));
        let tcp = Tcp::parse(reply[40..60].try_into().unwrap());
        assert!(tcp.resets() && !tcp.acknowledges());
        assert_eq!(tcp.sequence, 77);
    }
}
