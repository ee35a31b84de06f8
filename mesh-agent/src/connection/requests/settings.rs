//! Whether a server of HTTP/2 takes WebSockets, which it says in its settings, and those are the first thing that it says (RFC
//! 9113, section 3.4; RFC 8441, section 3). hyper knows the settings, and not whether they have come.
//!
//! hyper reads a connection in a task of its own, until there is nothing more: who reads again, once all of the first frame was
//! read, has taken it in.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use hyper::{
    client::conn::http2,
    rt::{Read, Write, bounds::Http2ClientConnExec},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use super::body::Body;

/// A frame's length is in its first bytes, which are not counted by it (RFC 9113, section 4.1).
const LENGTH: usize = 3;
const HEAD: usize = 9;
/// How long a server may take for its settings before it is asked in another way.
const PATIENCE: Duration = Duration::from_secs(5);

/// A stream of bytes of which it is told when its reader has taken in the first frame.
#[derive(Debug)]
pub(in crate::connection) struct FirstFrame<S> {
    stream: S,
    length: [u8; LENGTH],
    read: usize,
    taken_in: CancellationToken,
}

impl<S> FirstFrame<S> {
    pub(in crate::connection) fn of(stream: S) -> (Self, CancellationToken) {
        let taken_in = CancellationToken::new();
        (Self { stream, length: [0; LENGTH], read: 0, taken_in: taken_in.clone() }, taken_in)
    }

    fn is_there(&self) -> bool {
        let [a, b, c] = self.length;
        self.read >= HEAD + u32::from_be_bytes([0, a, b, c]) as usize
    }

    fn look(&mut self, bytes: &[u8]) {
        for (at, byte) in self.length.iter_mut().skip(self.read).zip(bytes) {
            *at = *byte;
        }
        self.read = self.read.saturating_add(bytes.len());
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FirstFrame<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_there() {
            if !this.taken_in.is_cancelled() {
                this.taken_in.cancel();
            }
            return Pin::new(&mut this.stream).poll_read(cx, buffer);
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buffer);
        this.look(&buffer.filled()[before..]);
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FirstFrame<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Whether a server takes WebSockets, as far as is known.
#[derive(Debug, Clone)]
pub(in crate::connection) struct Takes(watch::Receiver<Option<bool>>);

impl Takes {
    /// Waits until it has said so; one that does not in time, or whose connection ends before, does not.
    pub(in crate::connection) async fn websockets(mut self) -> bool {
        let said = tokio::time::timeout(PATIENCE, self.0.wait_for(Option::is_some)).await;
        matches!(said, Ok(Ok(said)) if *said == Some(true))
    }
}

/// A connection that tells what its server takes, and is looked at each time that it has run.
pub(in crate::connection) fn told<T, E>(
    mut connection: http2::Connection<T, Body, E>,
    taken_in: CancellationToken,
    look: impl Fn(&http2::Connection<T, Body, E>),
) -> (impl Future<Output = hyper::Result<()>>, Takes)
where
    T: Read + Write + Unpin + 'static,
    E: Http2ClientConnExec<Body, T> + Unpin,
{
    let (tells, takes) = watch::channel(None);
    let mut taken_in = Box::pin(taken_in.cancelled_owned());
    let connection = std::future::poll_fn(move |cx| {
        let polled = Pin::new(&mut connection).poll(cx);
        look(&connection);
        if tells.borrow().is_none() && taken_in.as_mut().poll(cx).is_ready() {
            tells.send_replace(Some(connection.is_extended_connect_protocol_enabled()));
        }
        polled
    });
    (connection, Takes(takes))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_frame_is_taken_in_when_its_reader_goes_on_however_it_has_come() {
        for (bytes, length) in
            [(&b"\0\0\0\x04\0\0\0\0\0\0\0"[..], 9), (b"\0\0\x06\x04\0\0\0\0\0\0\x08\0\0\0\x01\0\0", 15)]
        {
            let (mut far, near) = tokio::io::duplex(64);
            let (mut stream, taken_in) = FirstFrame::of(near);
            for (index, byte) in bytes.iter().enumerate() {
                far.write_u8(*byte).await.unwrap();
                assert_eq!(stream.read_u8().await.unwrap(), *byte);
                assert_eq!(taken_in.is_cancelled(), index >= length, "after {index}");
            }
        }
        let (mut far, near) = tokio::io::duplex(64);
        let (mut stream, taken_in) = FirstFrame::of(near);
        far.write_all(b"HTTP/1.1 400 Bad Request").await.unwrap();
        for _ in 0..24 {
            stream.read_u8().await.unwrap();
        }
        assert!(!taken_in.is_cancelled(), "what is no frame is none");
    }
}
