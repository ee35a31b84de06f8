//! A lease as a stream of bytes, for whoever speaks HTTP over it, at either end of its tunnel; and the application's own
//! connection as one.
//!
//! Invariant: a lease of ours that is dropped is ended in order, in the background, so that its tunnel can be leased again;
//! unless the tunnel broke. One of another agent's is given back ([`Arriving::into_lease`]).

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
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
        Event, Link, LinkError,
        buffers::{Buffer, READ},
        lease::Said,
        read_some_into,
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
                frames: Frames::new(lease, None),
                connector: connector.clone(),
            })),
            Way::Plaintext(stream) => Self::Plaintext(Socket::new(stream)),
        }
    }
}

/// A lease of ours, read and written.
#[derive(Debug)]
pub(super) struct Leased {
    frames: Frames<Lease>,
    connector: Connector,
}

impl Drop for Leased {
    fn drop(&mut self) {
        if let Some(lease) = self.frames.of.take() {
            self.connector.settle(lease, self.frames.said);
        }
    }
}

/// What a tunnel is part of.
pub(in crate::connection) trait HasLink {
    /// The tunnel.
    fn link(&mut self) -> &mut Link;
}

impl HasLink for Lease {
    fn link(&mut self) -> &mut Link {
        &mut self.link
    }
}

impl HasLink for Box<Link> {
    fn link(&mut self) -> &mut Link {
        self
    }
}

/// The frames of one lease, as a stream of bytes.
#[derive(Debug)]
struct Frames<L> {
    /// `None` once the tunnel broke.
    of: Option<L>,
    said: Said,
    /// The connection whose bytes these are, if its source is at the tunnel's other end.
    counted: Option<Arc<Live>>,
}

impl<L: HasLink> Frames<L> {
    fn new(of: L, counted: Option<Arc<Live>>) -> Self {
        Self { of: Some(of), said: Said { own_end: false, peer_end: false }, counted }
    }

    fn link(&mut self) -> io::Result<&mut Link> {
        self.of.as_mut().map(L::link).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// What became of the tunnel, if it broke.
    fn broke(&mut self, error: LinkError) -> io::Error {
        self.of = None;
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
            let (tls, incoming) = self.link()?.halves();
            let data = incoming.data();
            if !data.is_empty() {
                let n = data.len().min(buffer.remaining());
                buffer.put_slice(&data[..n]);
                incoming.consume(n);
                if let Some(live) = &self.counted {
                    live.flow.sent(n);
                }
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
        let (tls, _) = self.link()?.halves();
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
        let (tls, _) = self.link()?.halves();
        // What the socket does not take now is sent by the next flush, for which whoever writes asks.
        match tls.push(&buffer[..end]).and_then(|()| tls.flush_some()) {
            Ok(_) => {
                if let Some(live) = &self.counted {
                    live.flow.received(len);
                }
                Poll::Ready(Ok(len))
            }
            Err(error) => Poll::Ready(Err(self.broke(error.into()))),
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.said.own_end {
            ready!(self.poll_send(cx))?;
            let mut fin = BytesMut::with_capacity(HEADER_LEN);
            Control::Fin.encode(&mut fin);
            let (tls, _) = self.link()?.halves();
            if let Err(error) = tls.push(&fin) {
                return Poll::Ready(Err(self.broke(error.into())));
            }
            self.said.own_end = true;
        }
        self.poll_send(cx)
    }
}

/// Whether this is the other end's word that it took nothing which it has not answered (see [`LinkError::Closed`]).
pub(super) fn is_closed(error: &(dyn std::error::Error + 'static)) -> bool {
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    inner.and_then(|it| it.downcast_ref()).is_some_and(|it| matches!(it, LinkError::Closed))
}

/// What arrives at a workload: a lease of another agent's, or an application's own connection. Clones are the same stream;
/// one of them reads and writes.
#[derive(Debug, Clone)]
pub(in crate::connection) struct Arriving {
    way: ArrivingBy,
    /// What was looked at, and not read yet.
    ahead: Bytes,
}

#[derive(Debug, Clone)]
enum ArrivingBy {
    Tunnel(Arc<Mutex<Frames<Box<Link>>>>),
    Plaintext(Socket),
}

impl Arriving {
    /// By a tunnel that another agent leases. Its bytes count as the connection's.
    pub(in crate::connection) fn by_tunnel(link: Box<Link>, live: Arc<Live>) -> Self {
        let way = ArrivingBy::Tunnel(Arc::new(Mutex::new(Frames::new(link, Some(live)))));
        Self { way, ahead: Bytes::new() }
    }

    /// As it is.
    pub(in crate::connection) fn by_plaintext(socket: Socket) -> Self {
        Self { way: ArrivingBy::Plaintext(socket), ahead: Bytes::new() }
    }

    /// The first bytes, as far as they come in one piece; none if the source ends before, or says nothing for so long.
    pub(in crate::connection) async fn first(&mut self, wait: std::time::Duration) -> io::Result<&[u8]> {
        let mut buffer = BytesMut::with_capacity(LOOKED_AT);
        let read = tokio::time::timeout(wait, tokio::io::AsyncReadExt::read_buf(self, &mut buffer)).await;
        if let Ok(read) = read {
            read?;
        }
        self.ahead = buffer.freeze();
        Ok(&self.ahead)
    }

    /// The tunnel, and what both ends have said; `None` if it broke, or was none.
    pub(in crate::connection) fn into_lease(self) -> Option<(Box<Link>, Said)> {
        let ArrivingBy::Tunnel(frames) = &self.way else { return None };
        let mut frames = lock(frames);
        let said = frames.said;
        frames.of.take().map(|link| (link, said))
    }
}

/// Most bytes that are looked at before it is known what they are.
const LOOKED_AT: usize = 64;

fn lock(frames: &Mutex<Frames<Box<Link>>>) -> MutexGuard<'_, Frames<Box<Link>>> {
    frames.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AsyncRead for Arriving {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ahead.is_empty() {
            let n = this.ahead.len().min(buffer.remaining());
            buffer.put_slice(&this.ahead[..n]);
            this.ahead.advance(n);
            return Poll::Ready(Ok(()));
        }
        match &this.way {
            ArrivingBy::Tunnel(frames) => lock(frames).poll_fill(cx, buffer),
            ArrivingBy::Plaintext(socket) => socket.poll_fill(cx, buffer),
        }
    }
}

impl AsyncWrite for Arriving {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &self.way {
            ArrivingBy::Tunnel(frames) => lock(frames).poll_put(cx, slices),
            ArrivingBy::Plaintext(socket) => socket.poll_put(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.way {
            ArrivingBy::Tunnel(frames) => lock(frames).poll_send(cx),
            ArrivingBy::Plaintext(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.way {
            ArrivingBy::Tunnel(frames) => lock(frames).poll_finish(cx),
            ArrivingBy::Plaintext(socket) => Poll::Ready(socket.finish()),
        }
    }
}

/// A connection of an application's, read and written, that is reset unless both its ends were said.
#[derive(Debug, Clone)]
pub(in crate::connection) struct Socket {
    stream: Arc<ResetOnDrop>,
    /// The connection whose bytes these are.
    counted: Option<Arc<Live>>,
}

impl Socket {
    pub(in crate::connection) fn new(stream: TcpStream) -> Self {
        ResetOnDrop::new(stream).into()
    }

    /// The same, whose bytes count as those of a connection of this source.
    pub(in crate::connection) fn counting(self, live: Arc<Live>) -> Self {
        Self { counted: Some(live), ..self }
    }

    /// Came to its proper end: closed, not reset, when the last handle goes.
    pub(in crate::connection) fn ended(&self) {
        // Fails only for a socket that is gone already.
        let _ = socket2::SockRef::from(&**self.stream).set_linger(None);
    }

    fn poll_fill(&self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        loop {
            match read_some_into(&self.stream, buffer) {
                Ok(()) => {
                    if let Some(live) = &self.counted {
                        live.flow.sent(buffer.filled().len() - before);
                    }
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

impl From<ResetOnDrop> for Socket {
    fn from(stream: ResetOnDrop) -> Self {
        Self { stream: Arc::new(stream), counted: None }
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
            Self::Tunnel(leased) => leased.frames.poll_fill(cx, buffer),
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
            Self::Tunnel(leased) => leased.frames.poll_put(cx, slices),
            Self::Plaintext(socket) => socket.poll_put(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(leased) => leased.frames.poll_send(cx),
            Self::Plaintext(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(leased) => leased.frames.poll_finish(cx),
            Self::Plaintext(socket) => Poll::Ready(socket.finish()),
        }
    }
}
