//! What crossed the wire between the nodes: a packet socket in the wire's namespace.
//!
//! The kernel puts every frame into the socket's queue as it passes, so once an exchange has ended at its ends, all of
//! it is in the queue: `packets` has nothing to wait for, and "nothing was seen" means that nothing was there.

use std::{
    ffi::CString,
    fmt,
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

use anyhow::{Context, Result, ensure};
use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::NetNs;

/// Bytes that the kernel may queue for us, counted with its own overhead; more is an error of the test.
const QUEUE_BYTES: usize = 256 << 20;
/// Largest frame: the kernel hands over aggregated segments (GRO), with IPv6 jumbo not in use.
const FRAME_MAX: usize = 128 << 10;
/// `PACKET_IGNORE_OUTGOING` (linux/if_packet.h): a frame that crosses the bridge is seen once, on its way in.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
    seen: Vec<Packet>,
}

/// One TCP segment that was on the wire.
#[derive(Clone)]
pub struct Packet {
    /// Where it came from.
    pub source: SocketAddr,
    /// Where it went.
    pub destination: SocketAddr,
    /// SYN, and not SYN-ACK.
    pub opens: bool,
    /// RST.
    pub resets: bool,
    /// What it carried.
    pub payload: Vec<u8>,
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {}", self.source, self.destination)?;
        if self.opens {
            f.write_str(" SYN")?;
        }
        if self.resets {
            f.write_str(" RST")?;
        }
        if self.is_client_hello() {
            f.write_str(" TLS ClientHello")?;
        } else if self.is_tls() {
            f.write_str(" TLS record")?;
        }
        write!(f, " {} bytes", self.payload.len())
    }
}

impl Packet {
    /// It carries the start of a TLS ClientHello (RFC 8446 §4, §5.1: handshake record, message 1).
    pub fn is_client_hello(&self) -> bool {
        matches!(self.payload.as_slice(), [22, 3, _, _, _, 1, ..])
    }

    /// It begins with a TLS record header.
    pub fn is_tls(&self) -> bool {
        matches!(self.payload.as_slice(), [20..=23, 3, 0..=4, ..])
    }

    /// It has this piece of text in it.
    pub fn contains(&self, pattern: &[u8]) -> bool {
        self.payload.windows(pattern.len()).any(|window| window == pattern)
    }

    /// It belongs to a connection between the two, in whichever direction, with `port` at one end.
    pub fn is_between(&self, one: IpAddr, other: IpAddr, port: u16) -> bool {
        let ends = (self.source.ip(), self.destination.ip());
        (ends == (one, other) || ends == (other, one))
            && (self.source.port() == port || self.destination.port() == port)
    }
}

impl Capture {
    /// Sees every frame of the namespace from now on.
    pub fn start(wire: &NetNs) -> Result<Self> {
        // ETH_P_ALL in network order, as packet(7) wants it.
        let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket = wire.enter(|| Socket::new(Domain::PACKET, Type::RAW, Some(all)))??;
        set(&socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1).context("PACKET_IGNORE_OUTGOING")?;
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, QUEUE_BYTES as libc::c_int)
            .context("SO_RCVBUFFORCE")?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, seen: vec![] })
    }

    /// Sees what arrives at one interface of a namespace from now on: at a workload's end of its veth, what its node
    /// let through to it.
    pub fn start_at(netns: &NetNs, device: &str) -> Result<Self> {
        let capture = Self::start(netns)?;
        bind_to(netns, &capture.socket, device)?;
        Ok(capture)
    }

    /// All TCP segments since the start. An error if the kernel had to drop any.
    pub fn packets(&mut self) -> Result<&[Packet]> {
        let mut seen = std::mem::take(&mut self.seen);
        let read = self.each(|frame| seen.extend(parse(frame)));
        self.seen = seen;
        read.map(|()| self.seen.as_slice())
    }

    /// The frames since the last look that are wanted, whatever they carry; the others are forgotten, so that a capture
    /// can be long. An error if the kernel had to drop any.
    pub fn sift(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Vec<u8>>> {
        let mut found = vec![];
        self.each(|frame| found.extend(wanted(frame).then(|| frame.to_vec())))?;
        Ok(found)
    }

    /// The frames since the last look with this text in them.
    pub fn frames_with(&mut self, text: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.sift(|frame| frame.windows(text.len()).any(|window| window == text))
    }

    fn each(&mut self, mut take: impl FnMut(&[u8])) -> Result<()> {
        let mut frame = vec![0; FRAME_MAX];
        loop {
            match self.socket.read(&mut frame) {
                Ok(length) => take(&frame[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("reading the packet socket"),
            }
        }
        let dropped = dropped(&self.socket)?;
        ensure!(dropped == 0, "the capture's queue was full: {dropped} packets are missing");
        Ok(())
    }

    /// Segments of connections between the two with `port` at one end.
    pub fn tcp_between(&mut self, one: IpAddr, other: IpAddr, port: u16) -> Result<Vec<Packet>> {
        let packets = self.packets()?;
        Ok(packets.iter().filter(|packet| packet.is_between(one, other, port)).cloned().collect())
    }

    /// Segments in which this text is readable.
    pub fn plaintext(&mut self, pattern: &[u8]) -> Result<Vec<Packet>> {
        Ok(self.packets()?.iter().filter(|packet| packet.contains(pattern)).cloned().collect())
    }
}

/// The TCP segment in a frame; nothing for any other frame.
pub fn parse(frame: &[u8]) -> Option<Packet> {
    let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let (source, destination): (IpAddr, IpAddr) = match sliced.net.as_ref()? {
        LaxNetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        LaxNetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        LaxNetSlice::Arp(_) => return None,
    };
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { return None };
    Some(Packet {
        source: SocketAddr::new(source, tcp.source_port()),
        destination: SocketAddr::new(destination, tcp.destination_port()),
        opens: tcp.syn() && !tcp.ack(),
        resets: tcp.rst(),
        payload: tcp.payload().to_vec(),
    })
}

/// Binds a packet socket to an interface of its namespace.
pub fn bind_to(netns: &NetNs, socket: &Socket, device: &str) -> Result<()> {
    let name = CString::new(device)?;
    // SAFETY: a C string, read by the call alone.
    let ifindex = netns.enter(|| unsafe { libc::if_nametoindex(name.as_ptr()) })?;
    ensure!(ifindex != 0, "there is no {device}");
    // SAFETY: all-zero is a valid value of this plain struct.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = ifindex as i32;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the descriptor is open for the call, and pointer and length describe `address`.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    ensure!(result == 0, "binding to {device}: {}", io::Error::last_os_error());
    Ok(())
}

/// Sets a socket option that is a number.
pub fn set(socket: &Socket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the call, and pointer and length describe `value`.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Packets that did not fit since the last call (`PACKET_STATISTICS`: two u32, seen and dropped).
fn dropped(socket: &Socket) -> Result<u32> {
    let mut statistics = [0_u32; 2];
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: the descriptor is open for the call, and pointer and length describe `statistics`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    ensure!(result == 0, "PACKET_STATISTICS: {}", io::Error::last_os_error());
    Ok(statistics[1])
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![];
        PacketBuilder::ethernet2([1; 6], [2; 6])
            .ipv4([10, 0, 1, 11], [10, 0, 2, 11], 64)
            .tcp(40_000, 8080, 1, 1000)
            .syn()
            .write(&mut bytes, payload)
            .unwrap();
        bytes
    }

    #[test]
    fn a_segment_is_told_by_its_ends_and_its_payload() {
        let packet = parse(&frame(&[22, 3, 1, 0, 5, 1, 0])).unwrap();
        assert!(packet.opens && packet.is_client_hello());
        let [one, other] = ["10.0.2.11", "10.0.1.11"].map(|text| text.parse().unwrap());
        assert!(packet.is_between(one, other, 8080) && !packet.is_between(one, other, 9090));
        assert!(parse(&frame(b"GET /secret")).unwrap().contains(b"secret"));
        assert!(parse(&[0; 9]).is_none());
    }
}
