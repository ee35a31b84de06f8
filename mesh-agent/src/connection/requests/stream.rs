//! A lease as a stream of bytes, for whoever speaks HTTP over it, at either end of its tunnel; and the application's own
//! connection as one.
//!
//! Invariant: a lease of ours that is dropped is ended in order, in the background, so that its tunnel can be leased again;
//! unless the tunnel broke. One of another agent's is given back ([`Arriving::into_lease`]).

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
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
    net::socket,
    relay::ResetOnDrop,
    tunnel::{
        Event, Link, LinkError,
        buffers::{Buffer, READ},
        lease::Said,
        read_some_into,
    },
};

/// The way to a backend.
///
/// Whose server closes it when it has been idle may do so just when a request is on its way there. If an answer is
/// [owed](Owed), nothing of it has come, and the request certainly was not taken, the end of this stream is an error
/// ([`is_closed`]).
pub(in crate::connection) struct Upstream {
    way: UpstreamBy,
    owed: Owed,
    /// After the end: whether what was asked was not taken.
    untaken: Option<Untaken>,
}

type Untaken = Pin<Box<dyn Future<Output = bool> + Send>>;

#[derive(Debug)]
enum UpstreamBy {
    /// Through a tunnel.
    Tunnel(Box<Leased>),
    /// As it is, with what was written since something was read last, bytes.
    Plaintext(Socket, usize),
}

/// Whether an answer is owed of which nothing has come: said by whoever asks, where one request is answered after the other.
#[derive(Debug, Clone, Default)]
pub(in crate::connection) struct Owed(Arc<AtomicBool>);

impl Owed {
    /// Something is asked now.
    pub(in crate::connection) fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn end(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Upstream {
    pub(super) fn new(way: Way, connector: &Connector) -> Self {
        Self::by(match way {
            Way::Tunnel(lease) => UpstreamBy::Tunnel(Box::new(Leased {
                frames: Frames::new(lease, None),
                connector: connector.clone(),
            })),
            Way::Plaintext(stream) => UpstreamBy::Plaintext(Socket::new(stream), 0),
        })
    }

    /// To an application of this node.
    pub(in crate::connection) fn to_application(app: ResetOnDrop) -> Self {
        Self::by(UpstreamBy::Plaintext(app.into(), 0))
    }

    fn by(way: UpstreamBy) -> Self {
        Self { way, owed: Owed::default(), untaken: None }
    }

    /// For whoever asks.
    pub(in crate::connection) fn owed(&self) -> Owed {
        self.owed.clone()
    }
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream").field("way", &self.way).field("owed", &self.owed).finish_non_exhaustive()
    }
}

impl UpstreamBy {
    /// Now that the other end has ended: whether it took nothing of what was asked. `None` if nothing was sent, or it cannot be
    /// told.
    fn is_untaken(&mut self) -> Option<Untaken> {
        match self {
            Self::Tunnel(leased) => {
                let (lease, said) = (leased.frames.of.take()?, leased.frames.said);
                let connector = leased.connector.clone();
                Some(Box::pin(async move { connector.took_none(lease, said).await }))
            }
            Self::Plaintext(_, 0) => None,
            Self::Plaintext(socket, sent) => {
                let (stream, sent) = (socket.stream.clone(), *sent);
                Some(Box::pin(async move { socket::took_none(&stream, sent).await }))
            }
        }
    }
}

/// A lease of ours, read and written.
#[derive(Debug)]
struct Leased {
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
        let Self { way, owed, untaken } = self.get_mut();
        if untaken.is_none() {
            let before = buffer.filled().len();
            ready!(match way {
                UpstreamBy::Tunnel(leased) => leased.frames.poll_fill(cx, buffer),
                UpstreamBy::Plaintext(socket, _) => socket.poll_fill(cx, buffer),
            })?;
            if buffer.filled().len() > before {
                owed.end();
                if let UpstreamBy::Plaintext(_, sent) = way {
                    *sent = 0;
                }
            } else if owed.is() {
                *untaken = way.is_untaken();
            }
        }
        let Some(asked) = untaken else { return Poll::Ready(Ok(())) };
        let took_none = ready!(asked.as_mut().poll(cx));
        *untaken = None;
        owed.end();
        if took_none {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, LinkError::Closed)));
        }
        Poll::Ready(Ok(()))
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
        let Self { way, untaken, .. } = self.get_mut();
        if untaken.is_some() {
            // Whoever reads is woken by what becomes of it, and writes no more.
            return Poll::Pending;
        }
        match way {
            UpstreamBy::Tunnel(leased) => leased.frames.poll_put(cx, slices),
            UpstreamBy::Plaintext(socket, sent) => {
                let n = ready!(socket.poll_put(cx, slices))?;
                *sent += n;
                Poll::Ready(Ok(n))
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self { untaken: Some(_), .. } => Poll::Ready(Ok(())),
            Self { way: UpstreamBy::Tunnel(leased), .. } => leased.frames.poll_send(cx),
            Self { way: UpstreamBy::Plaintext(..), .. } => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self { untaken: Some(_), .. } => Poll::Ready(Ok(())),
            Self { way: UpstreamBy::Tunnel(leased), .. } => leased.frames.poll_finish(cx),
            Self { way: UpstreamBy::Plaintext(socket, _), .. } => Poll::Ready(socket.finish()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::net::socket::tests::pair;

    async fn to_application() -> (Upstream, TcpStream) {
        let (client, server) = pair().await;
        (Upstream::to_application(ResetOnDrop::new(client)), server)
    }

    #[tokio::test]
    async fn a_request_that_a_closed_server_did_not_take_is_told_from_one_that_it_may_have() {
        // Asked, and the server has closed before; asked, and it closes when it has read; not asked.
        for (asked, reads, untaken) in [(true, false, true), (true, true, false), (false, false, false)] {
            let (mut upstream, mut server) = to_application().await;
            if asked {
                upstream.owed().ask();
            }
            if !reads {
                drop(server);
                upstream.write_all(b"request").await.unwrap();
            } else {
                upstream.write_all(b"request").await.unwrap();
                assert_eq!(server.read(&mut [0; 16]).await.unwrap(), 7);
                drop(server);
            }
            let read = upstream.read(&mut [0; 16]).await;
            assert_eq!(
                read.as_ref().is_err_and(|error| is_closed(error)),
                untaken,
                "{asked} {reads}: {read:?}"
            );
            assert!(untaken || read.unwrap() == 0);
        }
    }

    #[tokio::test]
    async fn what_was_answered_in_part_may_have_been_taken() {
        let (mut upstream, mut server) = to_application().await;
        upstream.owed().ask();
        upstream.write_all(b"request").await.unwrap();
        server.read_exact(&mut [0; 7]).await.unwrap();
        server.write_all(b"HTTP").await.unwrap();
        drop(server);
        assert_eq!(upstream.read(&mut [0; 16]).await.unwrap(), 4);
        upstream.write_all(b"more").await.unwrap();
        assert_eq!(upstream.read(&mut [0; 16]).await.unwrap(), 0);
    }
}
