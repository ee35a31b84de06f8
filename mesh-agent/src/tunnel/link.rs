//! One tunnel.

use std::{
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::BytesMut;
use mesh_core::{
    frame::{Control, HEADER_LEN, Header, Kind, VERSION},
    identity::SpiffeId,
};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;

use super::{
    handshake::{self, Shaken},
    incoming::{Event, Incoming},
    tls::{self, LinkError, Tls},
};
use crate::{
    metrics::{Counted, Metrics},
    threads,
    trust::Led,
};

/// A tunnel after its handshake, while nobody has said yet whose certificate it must be.
#[derive(Debug)]
pub(crate) struct Unverified {
    tls: Tls,
    incoming: Incoming,
    certificates: Vec<CertificateDer<'static>>,
}

impl Unverified {
    /// The source's side: handshake, then SETTINGS of the peer, which says that it took our certificate.
    pub(crate) async fn connect(
        tcp: TcpStream,
        config: Arc<ClientConfig>,
        to: IpAddr,
    ) -> Result<Self, LinkError> {
        tls::prepare(&tcp)?;
        let shaken = handshake::connect(&tcp, config, ServerName::IpAddress(to.into())).await?;
        let mut new = Self::new(tcp, shaken)?;
        match new.incoming.next(&new.tls).await? {
            Event::Control(Control::Settings(VERSION)) => Ok(new),
            _ => Err(LinkError::Version),
        }
    }

    /// The destination's side: handshake, then our SETTINGS.
    pub(crate) async fn accept(tcp: TcpStream, config: Arc<ServerConfig>) -> Result<Self, LinkError> {
        tls::prepare(&tcp)?;
        let shaken = handshake::accept(&tcp, config).await?;
        let new = Self::new(tcp, shaken)?;
        push(&new.tls, &Control::Settings(VERSION))?;
        new.tls.flush().await?;
        Ok(new)
    }

    fn new(tcp: TcpStream, shaken: Shaken) -> Result<Self, LinkError> {
        let tls = Tls::new(tcp, shaken.records, shaken.rest)?;
        let incoming = Incoming::after_handshake(&tls)?;
        Ok(Self { tls, incoming, certificates: shaken.certificates })
    }

    /// The peer's certificates, leaf first.
    pub(crate) fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// The tunnel of these two, by their certificates.
    /// The tunnel is leased while the peer's certificate is valid, until `until`, and while its root is trusted.
    pub(crate) fn between(
        self,
        own: Arc<SpiffeId>,
        peer: SpiffeId,
        until: SystemTime,
        led: Led,
        metrics: &Metrics,
    ) -> Box<Link> {
        let Self { tls, incoming, .. } = self;
        let counted = Counted::new(metrics.tunnels("busy"));
        Box::new(Link {
            tls,
            incoming,
            own,
            peer,
            born: Instant::now(),
            until,
            led,
            counted,
            thread: threads::own(),
        })
    }
}

/// A tunnel to a peer whose identity is known. Dropping it resets it; [`Link::retire`] and [`Link::close`] end it
/// politely. Boxed where it is held: 1.6 KB, most of it expanded keys.
#[derive(Debug)]
pub(crate) struct Link {
    tls: Tls,
    incoming: Incoming,
    own: Arc<SpiffeId>,
    peer: SpiffeId,
    born: Instant,
    until: SystemTime,
    led: Led,
    counted: Counted,
    /// The thread that looks after its socket.
    thread: Option<usize>,
}

impl Link {
    /// The same, looked after by this thread. Nobody may wait for it.
    pub(super) fn here(self: Box<Self>) -> io::Result<Box<Self>> {
        let thread = threads::own();
        if self.thread == thread {
            return Ok(self);
        }
        let Self { tls, .. } = *self;
        Ok(Box::new(Self { tls: tls.here()?, thread, ..*self }))
    }

    /// Its two halves, for the two directions of a relay.
    pub(crate) fn halves(&mut self) -> (&Tls, &mut Incoming) {
        (&self.tls, &mut self.incoming)
    }

    /// The identity that the peer proved.
    pub(crate) fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Whether it is a tunnel of these two.
    pub(crate) fn is_between(&self, own: &SpiffeId, peer: &SpiffeId) -> bool {
        *self.own == *own && self.peer == *peer
    }

    /// Whether it was made longer ago than `age`.
    pub(crate) fn is_older_than(&self, age: Duration) -> bool {
        self.born.elapsed() > age
    }

    /// Whether the certificate with which the peer proved who it is has run out.
    pub(crate) fn has_expired(&self) -> bool {
        SystemTime::now() > self.until
    }

    /// The root that the peer's certificate led to.
    pub(crate) fn led(&self) -> &Led {
        &self.led
    }

    /// Whether it could be leased now: no word from the peer, and it is still there.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.incoming.is_quiet(&self.tls)
    }

    /// Whether the peer has begun a frame and not ended it.
    pub(crate) fn is_mid_frame(&self) -> bool {
        self.incoming.is_mid_frame()
    }

    /// Counts as leased, or as waiting for its next lease.
    pub(crate) fn count_as(&mut self, state: &'static str, metrics: &Metrics) {
        self.counted = Counted::new(metrics.tunnels(state));
    }

    /// The peer's next frame. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Event, LinkError> {
        self.incoming.next(&self.tls).await
    }

    /// Throws away the piece of DATA that the last event announced.
    pub(crate) fn discard(&mut self) {
        self.incoming.discard();
    }

    /// Seals a frame; sent by the next flush.
    pub(crate) fn push(&self, control: &Control) -> io::Result<()> {
        push(&self.tls, control)
    }

    /// Seals a frame followed by a DATA frame, in one record if they fit.
    pub(crate) fn push_with_data(&self, control: &Control, data: &[u8]) -> io::Result<()> {
        let mut frames = BytesMut::with_capacity(2 * HEADER_LEN + 32 + data.len());
        control.encode(&mut frames);
        if !data.is_empty() {
            frames.extend_from_slice(&Header { kind: Kind::Data, len: data.len() }.encode());
            frames.extend_from_slice(data);
        }
        self.tls.push(&frames)
    }

    /// Sends all that is sealed. Cancel-safe.
    pub(crate) async fn flush(&self) -> Result<(), LinkError> {
        Ok(self.tls.flush().await?)
    }

    /// Ends it with close_notify, without waiting.
    pub(crate) fn retire(self) {
        self.tls.retire();
    }

    /// Ends it with close_notify, after which nothing of the peer is taken any more.
    pub(crate) async fn close(self, wait: Duration) {
        self.tls.close(wait).await;
    }
}

/// Seals a frame; sent by the next flush.
fn push(tls: &Tls, control: &Control) -> io::Result<()> {
    let mut frame = BytesMut::with_capacity(64);
    control.encode(&mut frame);
    tls.push(&frame)
}
