//! Frames made by hand and sent by a packet socket, as a workload with root in its namespace can: below the kernel's
//! stack, with whatever addresses and headers.
//!
//! Checksums of TCP and UDP are left at zero, unless a receiver is to take them: nothing on the way checks them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{netns::NetNs, wire};

/// A hardware address.
pub type Mac = [u8; 6];

/// Ethernet types.
pub const IPV4: u16 = 0x0800;
/// IPv6.
pub const IPV6: u16 = 0x86dd;
/// ARP.
pub const ARP: u16 = 0x0806;
/// A VLAN tag.
pub const VLAN: u16 = 0x8100;

/// The hardware address of an interface.
pub fn mac(netns: &NetNs, device: &str) -> Result<Mac> {
    let line = netns.shell(&format!("ip -o link show dev {device}"))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "link/ether").skip(1);
    let text = words.next().with_context(|| format!("no hardware address in {line}"))?;
    let mut bytes = [0; 6];
    for (byte, text) in bytes.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(text, 16)?;
    }
    Ok(bytes)
}

/// `PACKET_QDISC_BYPASS` (linux/if_packet.h): past the interface's qdiscs, and past the programs at its egress.
const PACKET_QDISC_BYPASS: libc::c_int = 20;

/// Sends frames out of an interface, past whatever is attached to its egress.
pub fn send(netns: &NetNs, device: &str, frames: &[Vec<u8>]) -> Result<()> {
    // No protocol: it only sends.
    let socket = netns.enter(|| Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))))??;
    wire::bind_to(netns, &socket, device)?;
    wire::set(&socket, libc::SOL_PACKET, PACKET_QDISC_BYPASS, 1).context("PACKET_QDISC_BYPASS")?;
    for frame in frames {
        socket.send(frame).context("sending a frame")?;
    }
    Ok(())
}

/// A frame.
pub fn ethernet(to: Mac, from: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A packet of either family. `options`: IPv4 options, a multiple of four bytes; `fragment`: flags and offset. Neither
/// has a meaning for IPv6.
pub fn ip(from: IpAddr, to: IpAddr, protocol: u8, fragment: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => v4(from, to, protocol, fragment, options, payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => v6(from, to, protocol, payload),
        _ => panic!("{from} and {to} are of two families"),
    }
}

fn v4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, fragment: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header_len = 20 + options.len();
    let mut packet = vec![0x40 | (header_len / 4) as u8, 0];
    packet.extend(((header_len + payload.len()) as u16).to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(options);
    let checksum = internet_checksum(&packet);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn v6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// A TCP segment; `flags` as in RFC 9293.
pub fn tcp(from: u16, to: u16, flags: u8, data: &[u8]) -> Vec<u8> {
    let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    segment
}

/// A UDP datagram.
pub fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let mut datagram = [from.to_be_bytes(), to.to_be_bytes()].concat();
    datagram.extend(((8 + data.len()) as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(data);
    datagram
}

/// An ARP answer that says: this address is at this hardware address.
pub fn arp(who: Ipv4Addr, at: Mac, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 2];
    packet.extend(at);
    packet.extend(who.octets());
    packet.extend([0; 6]);
    packet.extend(to.octets());
    packet
}

/// An ICMP echo request.
pub fn echo(data: &[u8]) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0, 1, 0, 1];
    message.extend(data);
    let checksum = internet_checksum(&message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// Puts the checksum into a TCP segment over IPv4.
pub fn check_tcp(from: IpAddr, to: IpAddr, segment: &mut [u8]) {
    let octets = |ip| match ip {
        IpAddr::V4(ip) => Ipv4Addr::octets(&ip).to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let length = (segment.len() as u16).to_be_bytes();
    let pseudo = [&octets(from)[..], &octets(to), &[0, 6], &length, segment].concat();
    let checksum = internet_checksum(&pseudo);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
}

/// The checksum of RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let words = bytes.chunks(2).map(word);
    let sum: u32 = words.sum();
    let once = (sum & 0xffff) + (sum >> 16);
    !((once & 0xffff) + (once >> 16)) as u16
}
