//! Requests to the kernel over netlink that are answered before the caller goes on.
//!
//! For what must not be torn apart by other work, such as attaching a program; everything else speaks through
//! `rtnetlink`'s handles. The kernel answers a request in the call that sends it, so nothing here waits on anyone.

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use tokio::io::unix::AsyncFd;

use super::netns::Namespace;

/// A connection to the routing part of a namespace's kernel.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
}

impl Netlink {
    /// Opens it.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        namespace.enter(Self::here)?
    }

    /// Opens it into the namespace that the calling thread is in.
    pub fn here() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    /// Asks for a change; an error is the kernel's.
    pub fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_ACK | flags).map(drop)
    }

    /// Asks for all entries of a table.
    pub fn dump(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(message, NLM_F_DUMP)
    }

    /// Asks for one entry.
    pub fn ask(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(message, NLM_F_ACK)
    }

    fn exchange(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = vec![];
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

/// What the kernel tells of changes of a namespace's links. What it says is not read: who wants to know asks for the links.
#[derive(Debug)]
pub struct LinkChanges {
    socket: AsyncFd<Socket>,
}

impl LinkChanges {
    /// Listens in the namespace that the calling thread is in. Must be called inside a runtime.
    pub fn here() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, libc::RTMGRP_LINK.cast_unsigned()))?;
        socket.set_non_blocking(true)?;
        // SAFETY: the socket owns its descriptor and neither closes nor replaces it while it lives in the AsyncFd.
        Ok(Self { socket: unsafe { AsyncFd::register(socket) }? })
    }

    /// Done when something changed since the last time. Cancel-safe.
    pub async fn next(&self) -> io::Result<()> {
        let mut ready = self.socket.readable().await?;
        // What does not fit is cut off.
        let mut told = Vec::with_capacity(64);
        loop {
            told.clear();
            match self.socket.get_ref().recv(&mut told, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // More changed than there was room for: it is known all the same that something did.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}
