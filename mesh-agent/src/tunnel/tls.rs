//! TLS over one TCP socket, for two directions that run in one task.
//!
//! One read takes up to 64 KiB into the buffer that the frames are cut from, and is opened there. Both directions'
//! state is behind a lock that is never held across an await; it is never contended, as one task polls both.
//!
//! Invariants: what is sealed is flushed before more is taken from the application, so one buffer holds all that
//! waits to be sent, and an idle tunnel holds none; the end of the stream without close_notify is an error
//! (truncation); a `Tls` that is dropped without [`Tls::close`] resets the TCP connection, which the peer sees even
//! while it is blocked.

use std::{
    io::{self, Read},
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use mesh_core::{frame::FrameError, refusal::Reason};
use rustls::AlertDescription;
use socket2::{SockRef, Socket};
use tokio::{
    io::{Interest, ReadBuf},
    net::TcpStream,
};

use super::{
    buffers::{Buffer, READ, SIZE},
    records::{self, MAX_PLAIN, Opened, RECORD_HEADER, Records},
};
use crate::{
    refusal::{Failure, Refusal, Stop},
    threads,
};

/// TCP keepalive of tunnels: a peer's node that is gone is noticed after two minutes, also by an idle connection.
const KEEPALIVE_TIME: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 6;

/// How a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// close_notify: the peer took nothing that it had not answered.
    #[error("the peer closed the tunnel")]
    Closed,
    /// The end of the stream without close_notify.
    #[error("the tunnel ended without close_notify")]
    Truncated,
    /// TCP.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// TLS: a bad record, certificate or alert.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// Not the frames that we speak.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// A frame that has no place here.
    #[error("the peer sent a frame out of turn")]
    OutOfTurn,
    /// Another version of the protocol, or none.
    #[error("the peer does not speak this version of the tunnel protocol")]
    Version,
}

impl LinkError {
    /// The reason to refuse a peer that broke the protocol; `None` where the tunnel only broke.
    pub(crate) fn breach(&self) -> Option<Reason> {
        match self {
            Self::Frame(_) | Self::Tls(_) | Self::Version => Some(Reason::BadFrame),
            Self::OutOfTurn => Some(Reason::FrameOutOfTurn),
            Self::Closed | Self::Truncated | Self::Io(_) => None,
        }
    }
}

/// How a connection ends whose tunnel did.
impl From<LinkError> for Stop {
    fn from(error: LinkError) -> Self {
        match error.breach() {
            Some(reason) => Refusal::new(reason, error.to_string()).into(),
            None => Failure::TunnelLost(error.to_string()).into(),
        }
    }
}

/// A TLS session on its socket.
#[derive(Debug)]
pub(crate) struct Tls {
    tcp: TcpStream,
    session: Mutex<Session>,
}

/// What one read brought.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Filled {
    /// Bytes of plaintext.
    pub(crate) bytes: usize,
    /// close_notify came after them.
    pub(crate) closed: bool,
}

#[derive(Debug)]
struct Session {
    records: Records,
    outgoing: Outgoing,
    /// The start of a record whose rest has not come yet.
    partial: Vec<u8>,
}

/// Sealed and not sent yet.
#[derive(Debug, Default)]
struct Outgoing {
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
}

/// Makes a socket fit for a tunnel. A handshake that fails has an alert to deliver: no reset yet.
pub(super) fn prepare(tcp: &TcpStream) -> io::Result<()> {
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE_TIME)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    let socket = SockRef::from(tcp);
    socket.set_linger(None)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive)
}

impl Tls {
    /// After the handshake. From now on a drop resets the connection.
    pub(super) fn new(tcp: TcpStream, records: Records, rest: Vec<u8>) -> io::Result<Self> {
        SockRef::from(&tcp).set_linger(Some(Duration::ZERO))?;
        let session = Session { records, outgoing: Outgoing::default(), partial: rest };
        Ok(Self { tcp, session: Mutex::new(session) })
    }

    /// The same, looked after by this thread.
    pub(super) fn here(self) -> io::Result<Self> {
        Ok(Self { tcp: threads::moved(self.tcp)?, ..self })
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to read. Cancel-safe.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.tcp.readable().await
    }

    /// The same for whoever is polled. Of several waiters the last is woken.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp.poll_read_ready(cx)
    }

    /// Waits until the TCP connection is reset, also while nothing is read. Cancel-safe.
    pub(crate) async fn failed(&self) {
        // An error of the wait itself means that the runtime stops: the same for the caller.
        let _ = self.tcp.ready(Interest::ERROR).await;
    }

    /// Reads once and opens what came, in `buffer`: the plaintext is at its start then. `None`: nothing there.
    pub(crate) fn fill(&self, buffer: &mut Buffer) -> Result<Option<Filled>, LinkError> {
        let mut session = self.session();
        let begun = session.partial.len();
        let n = match read_some(&self.tcp, &mut buffer[begun..begun + READ]) {
            Ok(0) => return Err(LinkError::Truncated),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        buffer[..begun].copy_from_slice(&session.partial);
        match session.open(&mut buffer[..begun + n]) {
            Ok(filled) => Ok(Some(filled)),
            Err(error) => {
                if let Some(alert) = records::alert_for(&error) {
                    // The peer may be gone; the error is what counts.
                    let _ = session.seal_alert(alert).and_then(|()| session.outgoing.send(&self.tcp));
                }
                Err(error.into())
            }
        }
    }

    /// Opens what came with the handshake's last message.
    pub(crate) fn fill_rest(&self, buffer: &mut Buffer) -> Result<Option<Filled>, LinkError> {
        let mut session = self.session();
        let rest = session.partial.len();
        if !Records::record_len(&session.partial)?.is_some_and(|len| len <= rest) {
            return Ok(None);
        }
        buffer[..rest].copy_from_slice(&session.partial);
        Ok(Some(session.open(&mut buffer[..rest])?))
    }

    /// Seals; sent by the next [`Tls::flush`]. What is pushed between two flushes must fit a buffer.
    pub(crate) fn push(&self, plain: &[u8]) -> io::Result<()> {
        self.session().seal(plain)
    }

    /// Sends all that is sealed. Cancel-safe: what was not sent stays for the next flush.
    pub(crate) async fn flush(&self) -> io::Result<()> {
        while !self.flush_some()? {
            self.tcp.writable().await?;
        }
        Ok(())
    }

    /// The same for whoever is polled. Of several waiters the last is woken.
    pub(crate) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.flush_some()? {
            ready!(self.tcp.poll_write_ready(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what the socket takes at once; whether that was all.
    pub(crate) fn flush_some(&self) -> io::Result<bool> {
        self.session().outgoing.send(&self.tcp)
    }

    /// Ends with close_notify, without waiting for the peer.
    pub(crate) fn retire(self) {
        let _ = self.say_goodbye();
    }

    /// Ends with close_notify and keeps reading until the peer has ended too, for `wait` at most: bytes that arrive
    /// at a closed socket would turn into a RST that overtakes the close_notify.
    pub(crate) async fn close(self, wait: Duration) {
        if self.say_goodbye().is_err() {
            return;
        }
        let drained = async {
            let mut sink = Buffer::take();
            loop {
                let _ = self.tcp.readable().await;
                match read_some(&self.tcp, &mut sink[..READ]) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => break,
                }
            }
        };
        // Late is not an error: the peer was told.
        let _ = tokio::time::timeout(wait, drained).await;
    }

    fn say_goodbye(&self) -> io::Result<()> {
        let mut session = self.session();
        session.seal_alert(AlertDescription::CloseNotify)?;
        session.outgoing.send(&self.tcp)?;
        let socket = SockRef::from(&self.tcp);
        socket.set_linger(None)?;
        socket.shutdown(std::net::Shutdown::Write)
    }
}

impl Session {
    /// Opens the whole records in `bytes`, which begin with one, and moves their plaintext together at the start. What
    /// is left is kept for the next read.
    fn open(&mut self, bytes: &mut [u8]) -> Result<Filled, rustls::Error> {
        let mut filled = Filled::default();
        let mut at = 0;
        while let Some(len) = Records::record_len(&bytes[at..])?.filter(|len| *len <= bytes.len() - at) {
            match self.records.open(&mut bytes[at..at + len])? {
                Opened::Data(n) => {
                    bytes.copy_within(at + RECORD_HEADER..at + RECORD_HEADER + n, filled.bytes);
                    filled.bytes += n;
                }
                Opened::Nothing => {}
                Opened::Closed => {
                    filled.closed = true;
                    at = bytes.len();
                    break;
                }
            }
            at += len;
        }
        // Not kept for an idle tunnel.
        self.partial = bytes[at..].to_vec();
        Ok(filled)
    }

    fn seal(&mut self, plain: &[u8]) -> io::Result<()> {
        let out = self.outgoing.room(Records::room(plain.len()))?;
        let mut n = 0;
        for piece in plain.chunks(MAX_PLAIN) {
            n += self.records.seal(piece, &mut out[n..]).map_err(io::Error::other)?;
        }
        self.outgoing.end += n;
        Ok(())
    }

    fn seal_alert(&mut self, alert: AlertDescription) -> io::Result<()> {
        let out = self.outgoing.room(Records::room(2))?;
        let n = self.records.seal_alert(alert, out).map_err(io::Error::other)?;
        self.outgoing.end += n;
        Ok(())
    }
}

impl Outgoing {
    /// Room for so many bytes behind what waits already.
    fn room(&mut self, len: usize) -> io::Result<&mut [u8]> {
        let buffer = self.buffer.get_or_insert_with(Buffer::take);
        if self.end + len > SIZE {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        buffer
            .get_mut(self.end..self.end + len)
            .ok_or_else(|| io::Error::other("more waits to be sent than is allowed"))
    }

    /// Sends what the socket takes at once; whether that was all. The buffer is given back then.
    fn send(&mut self, tcp: &TcpStream) -> io::Result<bool> {
        let Some(buffer) = &self.buffer else { return Ok(true) };
        while self.start < self.end {
            match tcp.try_write(&buffer[self.start..self.end]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.start += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        *self = Self::default();
        Ok(true)
    }
}

/// Reads what is there, up to the length of `buffer`; 0 is the end of the stream.
pub(crate) fn read_some(tcp: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let room = buffer.len();
    read_up_to(tcp, room, |mut socket| socket.read(buffer))
}

/// The same, into memory that need not have been written before. The end of the stream leaves it as it was.
pub(crate) fn read_some_into(tcp: &TcpStream, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
    // SAFETY: nothing that was written there is made to be unwritten.
    let unfilled = unsafe { buffer.unfilled_mut() };
    let n = read_up_to(tcp, unfilled.len(), |socket| socket.recv(unfilled))?;
    // SAFETY: the kernel has written so many bytes at its start.
    unsafe { buffer.assume_init(n) };
    buffer.advance(n);
    Ok(())
}

/// After a read of less than there was room for the socket is empty: saying so to the runtime saves the read that would only
/// find that out.
fn read_up_to(
    tcp: &TcpStream,
    room: usize,
    mut read: impl FnMut(&Socket) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut short = None;
    let result = tcp.try_io(Interest::READABLE, || {
        let socket = SockRef::from(tcp);
        let n = loop {
            match read(&socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if n > 0 && n < room {
            short = Some(n);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(n)
    });
    short.map_or(result, Ok)
}
