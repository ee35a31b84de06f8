//! The sockets that the agent opens inside a workload's namespace, with the options that capture relies on.
//!
//! Every one carries [`AGENT_MARK`], so that the kernel programs pass it, and is made while the process is in its own
//! cgroup, which the guard checks (a workload can forge the mark, not the cgroup).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    os::fd::{AsRawFd, FromRawFd, IntoRawFd},
    time::Duration,
};

use mesh_ebpf::abi::{AGENT_MARK, INNER_PORTS};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::{netns::Namespace, ports};

/// Pending connections that a listener holds; `net.core.somaxconn` caps it.
const BACKLOG: i32 = 4096;
/// Random ports that are tried where the kernel is not to choose. With half of the range taken by connections to the
/// same destination, one in 2^32 connections finds none.
const PORT_ATTEMPTS: u32 = 32;
/// `ip(7)`: which part of the kernel's range of local ports this socket takes its port from; `last << 16 | first`, since
/// Linux 6.3 and for both families at this level.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

/// How long it may take to be known whether a closed socket took what came to it: longer than an acknowledgement is put off
/// (200 ms at most, TCP_DELACK_MAX in the kernel).
const TAKEN_WITHIN: Duration = Duration::from_millis(300);
/// How often that is looked at: the kernel tells nobody of an acknowledgement.
const LOOK: Duration = Duration::from_millis(1);

/// Opens a listener that only the kernel programs lead to: bound to loopback, transparent, so that the accepted
/// sockets' local address is the original destination. Non-blocking.
pub fn listen(namespace: &Namespace, family: Family) -> io::Result<std::net::TcpListener> {
    let socket = namespace.enter(|| transparent(family))??;
    // Accepted sockets inherit it. They are bound to the application's port, and without it an application that was
    // restarted could not bind while a tunnel to it is open (inet_csk_bind_conflict in the kernel).
    socket.set_reuse_address(true)?;
    // Inherited too, which saves two calls for each connection. Whatever ends an agent, the applications' connections
    // are reset then: the end of the stream would look like the end of the data.
    socket.set_tcp_nodelay(true)?;
    socket.set_linger(Some(Duration::ZERO))?;
    let loopback: IpAddr = match family {
        Family::V4 => std::net::Ipv4Addr::LOCALHOST.into(),
        Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    socket.bind(&SockAddr::from(SocketAddr::new(loopback, 0)))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Connects from inside a workload's namespace, from the workload's own address, and from none of [`INNER_PORTS`].
///
/// Errors are the kernel's (`ConnectionRefused`, …), or `TimedOut` after `timeout`.
pub async fn dial(namespace: &Namespace, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let family = Family::of(to.ip());
    let make = || Ok::<_, io::Error>((plain(family)?, ports::of_kernel()?));
    let (socket, range) = namespace.enter(make)??;
    let bound = match ports::source(&range) {
        ports::Source::Kernel => return connect(socket, to, timeout).await,
        ports::Source::Narrowed(ports) => match narrow(&socket, &ports) {
            Ok(()) => return connect(socket, to, timeout).await,
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => ports,
            Err(error) => return Err(error),
        },
        ports::Source::Bound(ports) => ports,
    };
    let unspecified: IpAddr = match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    connect_from(unspecified, bound, to, timeout, || namespace.enter(|| plain(family))?).await
}

/// Connects to an application inside its own namespace with the client's address as source, so that the application
/// sees whom it serves.
///
/// The port is one of [`INNER_PORTS`], bound explicitly: the kernel's own choice (and `IP_LOCAL_PORT_RANGE`, which can
/// only narrow `net.ipv4.ip_local_port_range`) would sooner or later be a port from which a tunnel of the same client
/// comes, and two connections of the namespace would have the same 4-tuple.
pub async fn dial_as(
    namespace: &Namespace,
    client: IpAddr,
    to: SocketAddr,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let make = || namespace.enter(|| transparent(Family::of(to.ip())))?;
    connect_from(client, INNER_PORTS, to, timeout, make).await
}

/// Connects from this address and a random port out of these.
async fn connect_from(
    own: IpAddr,
    ports: RangeInclusive<u16>,
    to: SocketAddr,
    timeout: Duration,
    make: impl Fn() -> io::Result<Socket>,
) -> io::Result<TcpStream> {
    let mut taken = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for _ in 0..PORT_ATTEMPTS {
        let socket = make()?;
        // Ports are shared by connections to different destinations; the 4-tuple has to be unique, the port not.
        socket.set_reuse_address(true)?;
        let port = rand::random_range(ports.clone());
        let bound = socket.bind(&SockAddr::from(SocketAddr::new(own, port)));
        let result = match bound {
            Ok(()) => connect(socket, to, timeout).await,
            Err(error) => Err(error),
        };
        match result {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) =>
            {
                taken = error;
            }
            other => return other,
        }
    }
    Err(taken)
}

async fn connect(socket: Socket, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    // SAFETY: the descriptor comes out of `socket`, which gives it up; nothing else owns it.
    let socket = unsafe { TcpSocket::from_raw_fd(socket.into_raw_fd()) };
    let stream = tokio::time::timeout(timeout, socket.connect(to))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Whether this process, or the machine, may open no more: a limit of ours, whoever was to be reached.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Makes the close of a stream a RST (RFC 9293 §3.10.4, `SO_LINGER` 0), whatever is still unsent.
pub fn reset(stream: TcpStream) {
    // Fails only for a socket that is gone already; then there is nothing to reset.
    let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}

/// Whether the other end, which has ended its own direction, certainly took nothing of the last `sent` bytes; ours must be open.
///
/// Its FIN acknowledges what its kernel had until then, as every segment does (RFC 9293 §3.10.7.4), so what came later found a
/// connection on which nothing can be answered any more. That nobody was there to read it either is said by a RST (§3.10.7.1, and
/// `tcp_rcv_state_process` in the kernel), after which nothing is acknowledged. Waits for it, or for an acknowledgement of any of
/// these bytes, for 300 ms at most.
pub async fn took_none(stream: &TcpStream, sent: usize) -> bool {
    let told = async {
        loop {
            if let Some(none) = known_untaken(stream, sent) {
                return none;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(TAKEN_WITHIN, told).await.unwrap_or(false)
}

/// The same, if it is known now.
pub fn known_untaken(stream: &TcpStream, sent: usize) -> Option<bool> {
    // In this order: nothing is acknowledged after a reset.
    let reset = is_reset(stream);
    match unacknowledged(stream) {
        Ok(waiting) if waiting >= sent => reset.then_some(true),
        _ => Some(false),
    }
}

/// Whether the connection is no more, though our direction was not ended (`TCP_INFO`, whose first byte is the state).
fn is_reset(stream: &TcpStream) -> bool {
    const TCP_CLOSE: u8 = 7;
    let (mut state, mut len) = (0u8, 1 as libc::socklen_t);
    // SAFETY: the descriptor is open for the call, and pointer and length describe `state`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_TCP,
            libc::TCP_INFO,
            (&raw mut state).cast(),
            &raw mut len,
        )
    };
    result == 0 && state == TCP_CLOSE
}

/// Bytes that the other end has not acknowledged (`SIOCOUTQ`, tcp(7)); those of a connection that was reset stay so.
fn unacknowledged(stream: &TcpStream) -> io::Result<usize> {
    nix::ioctl_read_bad!(outgoing, libc::TIOCOUTQ, libc::c_int);
    let mut bytes = 0;
    // SAFETY: the descriptor is open for the call, and `bytes` is what this call writes.
    unsafe { outgoing(stream.as_raw_fd(), &raw mut bytes) }?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Closes a stream that [`listen`] accepted, which would be reset otherwise, with all that is still unsent.
pub fn close(stream: TcpStream) {
    // Fails only for a socket that is gone already; then there is nothing to send.
    let _ = socket2::SockRef::from(&stream).set_linger(None);
}

fn plain(family: Family) -> io::Result<Socket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_mark(AGENT_MARK)?;
    if family == Family::V6 {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn transparent(family: Family) -> io::Result<Socket> {
    let socket = plain(family)?;
    match family {
        Family::V4 => set_option(&socket, libc::SOL_IP, libc::IP_TRANSPARENT, 1)?,
        Family::V6 => set_option(&socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)?,
    }
    Ok(socket)
}

/// Has the kernel take the port from these, which are part of its range.
fn narrow(socket: &Socket, ports: &RangeInclusive<u16>) -> io::Result<()> {
    let value = u32::from(*ports.end()) << 16 | u32::from(*ports.start());
    set_option(socket, libc::SOL_IP, IP_LOCAL_PORT_RANGE, value.cast_signed())
}

fn set_option(socket: &Socket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the call, and the pointer and length describe `value`.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// Both ends of a connection over loopback.
    pub(crate) async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (client, server) = tokio::join!(TcpStream::connect(at), listener.accept());
        (client.unwrap(), server.unwrap().0)
    }

    #[tokio::test]
    async fn what_comes_to_a_closed_socket_is_not_taken() {
        let (mut client, server) = pair().await;
        drop(server);
        client.write_all(b"request").await.unwrap();
        assert!(took_none(&client, 7).await);
        // Of more than was sent nobody knows.
        assert!(!took_none(&client, 8).await);
    }

    #[tokio::test]
    async fn what_was_there_before_the_end_may_be() {
        let (mut client, mut server) = pair().await;
        client.write_all(b"request").await.unwrap();
        assert_eq!(server.read(&mut [0; 16]).await.unwrap(), 7);
        drop(server);
        assert_eq!(client.read(&mut [0; 16]).await.unwrap(), 0);
        assert!(!took_none(&client, 7).await);
        // What is sent now is not, but it is all that was asked that counts.
        client.write_all(b"more").await.unwrap();
        assert!(!took_none(&client, 11).await);
        assert!(took_none(&client, 4).await);
    }

    #[tokio::test]
    async fn what_a_half_closed_socket_has_may_be_read() {
        let (mut client, mut server) = pair().await;
        server.shutdown().await.unwrap();
        client.write_all(b"request").await.unwrap();
        assert!(!took_none(&client, 7).await);
    }
}
