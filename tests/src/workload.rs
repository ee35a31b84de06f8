//! One workload of a world: its addresses, and sockets and programs inside its namespace.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{
    apps::{Handler, Server},
    netns::NetNs,
    topology::Pair,
    wait::scaled,
};

/// How long a connect or a silent peer may take before a test fails: above every deadline of the agent.
pub const TIMEOUT: Duration = Duration::from_secs(20);
/// The longest that a refusal may take.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Pending connections of test servers.
const BACKLOG: i32 = 4096;

/// A workload; clones are the same workload.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Its Kubernetes-like namespace.
    pub namespace: String,
    /// Its name, unique in the world.
    pub name: String,
    /// The node that it is on.
    pub node: String,
    /// Its addresses.
    pub address: Pair,
    /// The node's end of its veth.
    pub device: String,
    /// Where it lives.
    pub netns: NetNs,
}

impl Workload {
    /// `namespace/name`, as access log and metrics write it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its identity in the default trust domain.
    pub fn identity(&self) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{}", self.namespace, self.name)
    }

    /// Its IPv4 address with a port.
    pub fn v4(&self, port: u16) -> SocketAddr {
        (self.address.v4, port).into()
    }

    /// Its IPv6 address with a port.
    pub fn v6(&self, port: u16) -> SocketAddr {
        (self.address.v6, port).into()
    }

    /// Its IPv4 and its IPv6 address with a port.
    pub fn both(&self, port: u16) -> [SocketAddr; 2] {
        [self.v4(port), self.v6(port)]
    }

    /// A listener inside, of one family, on all its addresses.
    pub fn listen(&self, family: IpAddr, port: u16) -> Result<TcpListener> {
        let any: IpAddr = match family {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let address = SocketAddr::new(any, port);
        let listen = || -> io::Result<TcpListener> {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            if address.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.bind(&SockAddr::from(address))?;
            socket.listen(BACKLOG)?;
            Ok(socket.into())
        };
        self.netns.enter(listen)?.with_context(|| format!("listening on {address} in {}", self.name))
    }

    /// A server inside, on both families, a thread per connection.
    pub fn serve(&self, port: u16, handler: Handler) -> Result<Server> {
        let listeners =
            vec![self.listen(self.address.v4.into(), port)?, self.listen(self.address.v6.into(), port)?];
        Server::start(listeners, handler)
    }

    /// Connects from inside, as an application would; reads and writes of the stream give up after [`TIMEOUT`].
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        connect_in(&self.netns, to, scaled(TIMEOUT))
    }

    /// Connects from this port, which may have been used before.
    pub fn connect_from(&self, port: u16, to: SocketAddr) -> io::Result<TcpStream> {
        connect_from_in(&self.netns, Some(port), to, scaled(TIMEOUT))
    }

    /// Connects, sends, ends the sending half, and reads until the other side ends.
    pub fn exchange(&self, to: SocketAddr, request: &[u8]) -> io::Result<Vec<u8>> {
        let mut stream = self.connect(to)?;
        stream.write_all(request)?;
        let half_closed = stream.shutdown(Shutdown::Write);
        let mut answer = vec![];
        // First: of a connection that was reset since the write, shutdown(2) knows only that there is none.
        stream.read_to_end(&mut answer)?;
        half_closed?;
        Ok(answer)
    }

    /// Connects, and asserts that the connection is ended by a refusal: at connect, or at the first bytes, at once.
    #[track_caller]
    pub fn assert_refused(&self, to: SocketAddr) -> io::Error {
        let started = Instant::now();
        let error = match self.exchange(to, b"may I?") {
            Ok(answer) => panic!("{} reached {to}: {:?}", self.name, String::from_utf8_lossy(&answer)),
            Err(error) => error,
        };
        let kinds = [ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
        assert!(kinds.contains(&error.kind()), "{} to {to} was not refused: {error}", self.name);
        assert!(
            started.elapsed() < scaled(AT_ONCE),
            "{} to {to}: refused after {:?}",
            self.name,
            started.elapsed()
        );
        error
    }

    /// A program that will run inside.
    pub fn command(&self, program: &str) -> Command {
        self.netns.command(program)
    }

    /// Runs a shell line inside to its end and returns what it printed.
    pub fn shell(&self, line: &str) -> Result<String> {
        self.netns.shell(line)
    }
}

/// Connects from inside a namespace.
pub fn connect_in(from: &NetNs, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    connect_from_in(from, None, to, timeout)
}

fn connect_from_in(
    from: &NetNs,
    port: Option<u16>,
    to: SocketAddr,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let make = || Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP));
    let socket = from.enter(make).map_err(io::Error::other)??;
    if let Some(port) = port {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        socket.set_reuse_address(true)?;
        socket.bind(&SockAddr::from(SocketAddr::new(any, port)))?;
    }
    socket.connect_timeout(&SockAddr::from(to), timeout)?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(scaled(TIMEOUT)))?;
    stream.set_write_timeout(Some(scaled(TIMEOUT)))?;
    Ok(stream)
}
