//! rustls over one TCP socket, for two directions that run in one task.
//!
//! Stands apart from tokio-rustls because that reads the socket 4 KiB at a time and holds its buffers while idle.
//! Here one read takes up to 64 KiB into a borrowed buffer and is fed to rustls in slices. The session is behind a
//! lock that is never held across an await; it is never contended, as both directions are polled by one task.
//!
//! Invariants: what is encrypted is flushed before more is taken from the application, so rustls holds at most one
//! read's ciphertext; the end of the stream without close_notify is an error (truncation); after the
//! handshake a `Tls` that is dropped without [`Tls::close`] resets the TCP connection, which the peer sees even while it is blocked.

use std::{
    io::{self, BufRead, Read, Write},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_core::{
    frame::{ALPN, FrameError},
    refusal::Reason,
};
use rustls::{Connection, HandshakeKind};
use rustls_pki_types::CertificateDer;
use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream};

use super::buffers::{Buffer, READ};
use crate::refusal::{Failure, Refusal, Stop};

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
    session: Mutex<Connection>,
}

/// What one read brought.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Filled {
    /// Bytes of plaintext.
    pub(crate) bytes: usize,
    /// close_notify came after them.
    pub(crate) closed: bool,
}

impl Tls {
    pub(crate) fn new(tcp: TcpStream, mut session: Connection) -> io::Result<Self> {
        session.set_buffer_limit(None);
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(KEEPALIVE_TIME)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_RETRIES);
        let socket = SockRef::from(&tcp);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_nodelay(true)?;
        Ok(Self { tcp, session: Mutex::new(session) })
    }

    fn session(&self) -> MutexGuard<'_, Connection> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on a drop resets the connection. Not before: a handshake that fails has an alert to deliver.
    pub(crate) fn reset_on_drop(&self) -> io::Result<()> {
        SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO))
    }

    /// Whether the handshake goes on.
    pub(crate) fn is_handshaking(&self) -> bool {
        self.session().is_handshaking()
    }

    /// Whether the peer agreed to speak our protocol, in a full handshake: tickets are off, and a resumed session
    /// would not show the peer's certificate of now.
    pub(crate) fn agreed(&self) -> bool {
        let session = self.session();
        session.alpn_protocol() == Some(ALPN) && session.handshake_kind() != Some(HandshakeKind::Resumed)
    }

    /// The peer's certificates, leaf first.
    pub(crate) fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        self.session().peer_certificates().map(|chain| chain.iter().map(|c| c.clone().into_owned()).collect())
    }

    /// Waits until there is something to read. Cancel-safe.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.tcp.readable().await
    }

    /// Waits until the TCP connection is reset, also while nothing is read. Cancel-safe.
    pub(crate) async fn failed(&self) {
        // An error of the wait itself means that the runtime stops: the same for the caller.
        let _ = self.tcp.ready(Interest::ERROR).await;
    }

    /// Reads once and decrypts into `plain`, which must have [`super::buffers::SIZE`] bytes. `None`: nothing there.
    pub(crate) fn fill(&self, plain: &mut [u8]) -> Result<Option<Filled>, LinkError> {
        let mut cipher = Buffer::take();
        let n = match read_some(&self.tcp, &mut cipher[..READ]) {
            Ok(0) => return Err(LinkError::Truncated),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut session = self.session();
        let decrypted = decrypt(&mut session, &cipher[..n], plain);
        // Answers of rustls itself: an alert that says why, a key update. What the socket does not take now goes
        // out with the next flush.
        let flushed = flush_some(&mut session, &self.tcp);
        let filled = decrypted?;
        match flushed {
            Ok(_) => Ok(Some(filled)),
            // What was read counts: it may be the peer's reason for closing. The next read or write fails again.
            Err(_) if filled.bytes > 0 || filled.closed => Ok(Some(filled)),
            Err(error) => Err(error.into()),
        }
    }

    /// Encrypts; sent by the next [`Tls::flush`].
    pub(crate) fn push(&self, plain: &[u8]) {
        self.session()
            .writer()
            .write_all(plain)
            .expect("rustls' buffer has no limit, so it takes everything");
    }

    /// Sends all that is encrypted. Cancel-safe: what was not sent stays for the next flush.
    pub(crate) async fn flush(&self) -> io::Result<()> {
        while !self.flush_some()? {
            self.tcp.writable().await?;
        }
        Ok(())
    }

    /// Sends what the socket takes at once; whether that was all.
    pub(crate) fn flush_some(&self) -> io::Result<bool> {
        flush_some(&mut self.session(), &self.tcp)
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
        self.session().send_close_notify();
        self.flush_some()?;
        let socket = SockRef::from(&self.tcp);
        socket.set_linger(None)?;
        socket.shutdown(std::net::Shutdown::Write)
    }
}

fn decrypt(session: &mut Connection, mut cipher: &[u8], plain: &mut [u8]) -> Result<Filled, LinkError> {
    let mut filled = Filled::default();
    while !cipher.is_empty() {
        let taken = session.read_tls(&mut cipher)?;
        let state = session.process_new_packets()?;
        filled.bytes += drain(session, &mut plain[filled.bytes..])?;
        if state.peer_has_closed() {
            filled.closed = true;
            break;
        }
        if taken == 0 {
            return Err(io::Error::other("the TLS session takes no more bytes").into());
        }
    }
    Ok(filled)
}

fn drain(session: &mut Connection, plain: &mut [u8]) -> Result<usize, LinkError> {
    let mut reader = session.reader();
    let mut filled = 0;
    loop {
        let n = match reader.fill_buf() {
            Ok([]) => return Ok(filled),
            Ok(chunk) => {
                let room = plain.get_mut(filled..filled + chunk.len()).ok_or_else(|| {
                    io::Error::other("a read of ciphertext became more plaintext than it can hold")
                })?;
                room.copy_from_slice(chunk);
                chunk.len()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(filled),
            Err(error) => return Err(error.into()),
        };
        reader.consume(n);
        filled += n;
    }
}

fn flush_some(session: &mut Connection, tcp: &TcpStream) -> io::Result<bool> {
    while session.wants_write() {
        match session.write_tls(&mut TryWrite(tcp)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

struct TryWrite<'a>(&'a TcpStream);

impl Write for TryWrite<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what is there, up to the length of `buffer`; 0 is the end of the stream.
///
/// After a short read the socket is empty: saying so to the runtime saves the read that would only find that out.
pub(crate) fn read_some(tcp: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut short = None;
    let read = tcp.try_io(Interest::READABLE, || {
        let socket = SockRef::from(tcp);
        let n = loop {
            match (&*socket).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if n > 0 && n < buffer.len() {
            short = Some(n);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(n)
    });
    short.map_or(read, Ok)
}
