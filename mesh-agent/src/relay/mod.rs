//! The bytes: from application to tunnel and back, or from socket to socket.
//!
//! What TCP can do is carried over: half close either way, reset either way (also while the other side is blocked),
//! connections without a byte. A direction waits for readiness without holding memory, then borrows a buffer for as
//! long as bytes are in hand.

pub(crate) mod plain;
pub(crate) mod tunnel;

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use mesh_core::refusal::Reason;
use tokio::{io::Interest, net::TcpStream};

use crate::{
    metrics::{Direction, Flow},
    net::socket,
    refusal::Refusal,
    stalled::{Reader, Readers, Waiting},
    tunnel::read_some,
};

/// Reads after which a direction lets others run: 1 MiB of bulk.
const TURN: u32 = 16;

/// Lets other connections of the same worker run from time to time.
#[derive(Debug, Default)]
struct Turns(u32);

impl Turns {
    async fn took(&mut self) {
        self.0 += 1;
        if self.0.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
    }
}

/// What the bytes of a relay count as, and how long and how much of them may wait.
#[derive(Debug)]
pub(crate) struct Carried<'a> {
    /// The connection's counters.
    pub(crate) flow: &'a Flow,
    /// Outbound: the application here is the source.
    pub(crate) direction: Direction,
    /// How long the bytes that a reset application had sent before may take to be passed on.
    pub(crate) wait: Duration,
    /// Who keeps bytes waiting.
    pub(crate) readers: Readers<'a>,
}

/// The node has no room for one more buffer that waits for this reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoRoom(Reader);

impl From<NoRoom> for Refusal {
    fn from(NoRoom(reader): NoRoom) -> Self {
        let who = match reader {
            Reader::Application => "the workload of this node does not read",
            Reader::Peer => "the other end does not read",
        };
        Self::new(Reason::LimitStalled, who)
    }
}

impl Carried<'_> {
    fn wait_for(&self, reader: Reader) -> Result<Waiting, NoRoom> {
        self.readers.wait_for(reader).ok_or(NoRoom(reader))
    }
}

/// A connection that is reset when it is dropped, unless it came to its proper end: whatever cuts a relay short, the
/// application must not take it for the end of the data.
#[derive(Debug)]
pub(crate) struct ResetOnDrop(TcpStream);

impl ResetOnDrop {
    pub(crate) fn new(stream: TcpStream) -> Self {
        // Fails only for a socket that is gone already; then there is nothing to reset.
        let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        Self(stream)
    }

    /// Both directions have ended.
    pub(crate) fn finished(self) {
        let _ = socket2::SockRef::from(&self.0).set_linger(None);
    }
}

impl std::ops::Deref for ResetOnDrop {
    type Target = TcpStream;
    fn deref(&self) -> &TcpStream {
        &self.0
    }
}

/// The connection was reset, or failed otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reset;

/// An application's connection, as both directions of a relay see it.
///
/// The kernel reports a reset once, to whichever direction asks first; the other one would take it for a proper end.
/// So it is noted here.
#[derive(Debug)]
struct Socket<'a> {
    stream: &'a TcpStream,
    reset: AtomicBool,
    /// It has ended its direction.
    ended: AtomicBool,
    /// Bytes that were written to it since it said something last.
    unanswered: AtomicUsize,
}

impl<'a> Socket<'a> {
    fn new(stream: &'a TcpStream) -> Self {
        Self {
            stream,
            reset: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            unanswered: AtomicUsize::new(0),
        }
    }

    fn died(&self) -> Reset {
        self.reset.store(true, Ordering::Relaxed);
        Reset
    }

    fn is_reset(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// Waits for bytes or the end; whether the end has come already, behind the bytes. Cancel-safe.
    async fn readable(&self) -> Result<bool, Reset> {
        let ready = self.stream.ready(Interest::READABLE).await.map_err(|_| self.died())?;
        Ok(ready.is_read_closed())
    }

    /// Waits for room. Cancel-safe.
    async fn writable(&self) -> Result<(), Reset> {
        self.stream.writable().await.map_err(|_| self.died())
    }

    /// Waits for a reset, also while nothing is read. Cancel-safe.
    async fn failed(&self) -> Reset {
        // An error of the wait itself means that the runtime stops: the same for the caller.
        let _ = self.stream.ready(Interest::ERROR).await;
        self.died()
    }

    /// Reads what is there; 0 is the end, `None` is nothing there.
    fn read(&self, buffer: &mut [u8]) -> Result<Option<usize>, Reset> {
        match read_some(self.stream, buffer) {
            Ok(0) if self.is_reset() => Err(Reset),
            Ok(0) => {
                self.ended.store(true, Ordering::Relaxed);
                Ok(Some(0))
            }
            Ok(n) => {
                self.unanswered.store(0, Ordering::Relaxed);
                Ok(Some(n))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(_) => Err(self.died()),
        }
    }

    /// Writes what there is room for; `None` is no room.
    fn write(&self, bytes: &[u8]) -> Result<Option<usize>, Reset> {
        match self.stream.try_write(bytes) {
            Ok(n) => {
                self.unanswered.fetch_add(n, Ordering::Relaxed);
                Ok(Some(n))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => {
                // What the kernel says of a reset that came after the end (`tcp_reset`).
                if error.kind() == io::ErrorKind::BrokenPipe && !self.is_reset() {
                    self.ended.store(true, Ordering::Relaxed);
                }
                Err(self.died())
            }
        }
    }

    /// Whether it certainly took nothing of what it has not answered: it had ended before that came, and it is reset.
    fn took_none(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
            && socket::known_untaken(self.stream, self.unanswered.load(Ordering::Relaxed)) == Some(true)
    }

    /// Waits until it is known, of one that has ended, whether it takes what it was sent or is reset.
    async fn settled(&self) -> Result<(), Reset> {
        let unanswered = self.unanswered.load(Ordering::Relaxed);
        let ended = self.ended.load(Ordering::Relaxed);
        if ended && unanswered > 0 && socket::took_none(self.stream, unanswered).await {
            return Err(self.died());
        }
        Ok(())
    }

    /// Half close.
    fn finish(&self) -> Result<(), Reset> {
        socket2::SockRef::from(self.stream).shutdown(std::net::Shutdown::Write).map_err(|_| self.died())
    }
}
