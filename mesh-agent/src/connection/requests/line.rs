//! A way to a backend that can be cut, for who watches whether it may go on.
//!
//! Stands apart because hyper does not keep what it is given: it runs a connection of HTTP/2 in a task of its own, and after
//! an upgrade the stream is somebody else's. To drop what it gave in return ends neither.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::stream::Upstream;

/// The way to a backend, that breaks when it is cut, whoever has it by then.
#[derive(Debug)]
pub(super) struct Cuttable {
    way: Upstream,
    cut: Arc<Cut>,
    _gone: DropGuard,
}

/// The other end of that.
#[derive(Debug)]
pub(super) struct Line {
    cut: CutOnDrop,
    gone: CancellationToken,
}

/// Whether a way was cut, and who reads on it: it is asked at each read, so it is no more than that.
#[derive(Debug, Default)]
struct Cut {
    is: AtomicBool,
    reader: AtomicWaker,
}

#[derive(Debug)]
struct CutOnDrop(Arc<Cut>);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        self.0.is.store(true, Ordering::Release);
        self.0.reader.wake();
    }
}

impl Line {
    pub(super) fn over(way: Upstream) -> (Cuttable, Self) {
        let (cut, gone) = (Arc::<Cut>::default(), CancellationToken::new());
        let line = Self { cut: CutOnDrop(cut.clone()), gone: gone.clone() };
        (Cuttable { way, cut, _gone: gone.drop_guard() }, line)
    }

    /// Runs what speaks on it, and waits until nobody has it any more. Dropped before that, it cuts it.
    pub(super) async fn until_gone<T>(self, speaks: impl Future<Output = T>) -> T {
        let Self { cut: _cut, gone } = self;
        let spoken = speaks.await;
        gone.cancelled().await;
        spoken
    }
}

impl AsyncRead for Cuttable {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // First this, then the look: who cuts in between wakes who reads now.
        this.cut.reader.register(cx.waker());
        if this.cut.is.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut this.way).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Cuttable {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().way).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().way).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.way.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().way).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().way).poll_shutdown(cx)
    }
}
