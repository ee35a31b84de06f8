//! A lease as a stream of bytes, for whoever speaks HTTP over it; and the application's own connection as one.
//!
//! Invariant: a lease that is dropped is ended in order, in the background, so that its tunnel can be leased again; unless
//! the tunnel broke.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;
use mesh_core::frame::{Control, HEADER_LEN, Header, Kind};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::{
    connect::{Connector, Lease, Way},
    live::Live,
    relay::ResetOnDrop,
    tunnel::{
        Event, LinkError,
        buffers::{Buffer, READ},
        lease::Said,
        read_some,
    },
};

/// The way to a backend.
#[derive(Debug)]
pub(super) enum Upstream {
    /// Through a tunnel.
    Tunnel(Box<Leased>),
    /// As it is.
    Plaintext(Socket),
}

impl Upstream {
    pub(super) fn new(way: Way, connector: &Connector) -> Self {
        match way {
            Way::Tunnel(lease) => Self::Tunnel(Box::new(Leased {
                lease: Some(lease),
                said: Said { own_end: false, peer_end: false },
                connector: connector.clone(),
            })),
            Way::Plaintext(stream) => Self::Plaintext(Socket::new(stream)),
        }
    }
}

/// A lease, read and written.
#[derive(Debug)]
pub(super) struct Leased {
    /// `None` once the tunnel broke.
    lease: Option<Lease>,
    said: Said,
    connector: Connector,
}

impl Leased {
    fn lease(&mut self) -> io::Result<&mut Lease> {
        self.lease.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// What became of the tunnel, if it broke.
    fn broke(&mut self, error: LinkError) -> io::Error {
        self.lease = None;
        match error {
            LinkError::Io(error) => error,
            other => io::Error::new(io::ErrorKind::ConnectionReset, other),
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.said.peer_end {
                return Poll::Ready(Ok(()));
            }
            let (tls, incoming) = self.lease()?.link.halves();
            let data = incoming.data();
            if !data.is_empty() {
                let n = data.len().min(buffer.remaining());
                buffer.put_slice(&data[..n]);
                incoming.consume(n);
                return Poll::Ready(Ok(()));
            }
            match ready!(incoming.poll_next(tls, cx)) {
                Ok(Event::Data) => {}
                Ok(Event::Control(Control::Fin)) => self.said.peer_end = true,
                Ok(Event::Control(Control::Reset)) => {
                    self.said.peer_end = true;
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                Ok(Event::Control(_)) => return Poll::Ready(Err(self.broke(LinkError::OutOfTurn))),
                Err(error) => return Poll::Ready(Err(self.broke(error))),
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (tls, _) = self.lease()?.link.halves();
        match ready!(tls.poll_flush(cx)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(self.broke(error.into()))),
        }
    }

    /// Seals as much as goes into one frame, once everything before is sent.
    fn poll_put(&mut self, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        ready!(self.poll_send(cx))?;
        let mut buffer = Buffer::take();
        let mut end = HEADER_LEN;
        for slice in slices {
            let n = slice.len().min(READ - end);
            buffer[end..end + n].copy_from_slice(&slice[..n]);
            end += n;
        }
        let len = end - HEADER_LEN;
        if len == 0 {
            return Poll::Ready(Ok(0));
        }
        buffer[..HEADER_LEN].copy_from_slice(&Header { kind: Kind::Data, len }.encode());
        let (tls, _) = self.lease()?.link.halves();
        // What the socket does not take now is sent by the next flush, for which whoever writes asks.
        match tls.push(&buffer[..end]).and_then(|()| tls.flush_some()) {
            Ok(_) => Poll::Ready(Ok(len)),
            Err(error) => Poll::Ready(Err(self.broke(error.into()))),
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.said.own_end {
            ready!(self.poll_send(cx))?;
            let mut fin = BytesMut::with_capacity(HEADER_LEN);
            Control::Fin.encode(&mut fin);
            let (tls, _) = self.lease()?.link.halves();
            if let Err(error) = tls.push(&fin) {
                return Poll::Ready(Err(self.broke(error.into())));
            }
            self.said.own_end = true;
        }
        self.poll_send(cx)
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            self.connector.settle(lease, self.said);
        }
    }
}

/// A connection of an application's, read and written, that is reset unless both its ends were said.
#[derive(Debug, Clone)]
pub(super) struct Socket {
    stream: Arc<ResetOnDrop>,
    /// The connection whose bytes these are.
    counted: Option<Arc<Live>>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream: Arc::new(ResetOnDrop::new(stream)), counted: None }
    }

    /// The same, whose bytes count as those of a connection of this source.
    pub(super) fn counting(self, live: Arc<Live>) -> Self {
        Self { counted: Some(live), ..self }
    }

    /// Came to its proper end: closed, not reset, when the last handle goes.
    pub(super) fn ended(&self) {
        // Fails only for a socket that is gone already.
        let _ = socket2::SockRef::from(&**self.stream).set_linger(None);
    }

    fn poll_fill(&self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match read_some(&self.stream, buffer.initialize_unfilled()) {
                Ok(n) => {
                    if let Some(live) = &self.counted {
                        live.flow.sent(n);
                    }
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.stream.poll_read_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_put(&self, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            match self.stream.try_write_vectored(slices) {
                Ok(n) => {
                    if let Some(live) = &self.counted {
                        live.flow.received(n);
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.stream.poll_write_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn finish(&self) -> io::Result<()> {
        self.ended();
        socket2::SockRef::from(&**self.stream).shutdown(std::net::Shutdown::Write)
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_fill(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_put(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_put(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}

impl AsyncRead for Upstream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(leased) => leased.poll_fill(cx, buffer),
            Self::Plaintext(socket) => socket.poll_fill(cx, buffer),
        }
    }
}

impl AsyncWrite for Upstream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tunnel(leased) => leased.poll_put(cx, slices),
            Self::Plaintext(socket) => socket.poll_put(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(leased) => leased.poll_send(cx),
            Self::Plaintext(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(leased) => leased.poll_finish(cx),
            Self::Plaintext(socket) => Poll::Ready(socket.finish()),
        }
    }
}
