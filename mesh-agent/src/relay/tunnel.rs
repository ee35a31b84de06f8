//! Application to tunnel and back, for both ends of a tunnel.

use std::time::Duration;

use bytes::BytesMut;
use mesh_core::frame::{Control, HEADER_LEN, Header, Kind};
use tokio::net::TcpStream;

use super::{Carried, NoRoom, Reset, Socket, Turns};
use crate::{
    metrics::Direction,
    stalled::Reader,
    tunnel::{
        Event, Incoming, Link, LinkError, Tls,
        buffers::{Buffer, READ},
        lease::Said,
    },
};

/// How long a destination's ACCEPT may wait for the application's first bytes, to go in one write with them.
const ACCEPT_WAIT: Duration = Duration::from_millis(1);

/// How a relay stopped.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// Both directions ended, and everything was delivered.
    Finished,
    /// The application on this node reset its connection.
    ApplicationReset {
        /// Of a destination: it certainly took nothing that it has not answered.
        untaken: bool,
    },
    /// The peer's end was reset.
    PeerReset,
    /// The tunnel broke.
    Lost(LinkError),
    /// Too much waits for somebody who does not read.
    Stalled(NoRoom),
}

impl Carried<'_> {
    fn up(&self, n: usize) {
        match self.direction {
            Direction::Outbound => self.flow.sent(n),
            Direction::Inbound => self.flow.received(n),
        }
    }

    fn down(&self, n: usize) {
        match self.direction {
            Direction::Outbound => self.flow.received(n),
            Direction::Inbound => self.flow.sent(n),
        }
    }
}

/// Carries bytes until both directions have ended or one is broken. What was said decides how the lease ends
/// ([`crate::tunnel::lease`]); unless it finished, the caller resets the application's connection.
pub(crate) async fn run(app: &TcpStream, link: &mut Link, carried: &Carried<'_>) -> (Stopped, Said) {
    let (tls, incoming) = link.halves();
    let app = &Socket::new(app);
    let stopped = |broken| match broken {
        Broken::Application => {
            Stopped::ApplicationReset { untaken: carried.direction == Direction::Inbound && app.took_none() }
        }
        Broken::Link(error) => Stopped::Lost(error),
        Broken::NoRoom(no_room) => Stopped::Stalled(no_room),
    };
    let mut up = std::pin::pin!(up(app, tls, carried));
    // First both directions run. A branch that loses keeps its future, except when the connection is given up.
    {
        let mut down = std::pin::pin!(down(app, tls, incoming, carried));
        tokio::select! {
            ended = &mut up => {
                if let Err(broken) = ended {
                    return (stopped(broken), Said { own_end: false, peer_end: false });
                }
                // The application has ended: nothing reads it any more, but its reset has to be seen.
                let ended = tokio::select! {
                    ended = &mut down => ended,
                    reset = app.failed() => Err(reset.into()),
                };
                return match ended {
                    Ok(End::Fin) => (Stopped::Finished, Said { own_end: true, peer_end: true }),
                    Ok(End::Reset) => (Stopped::PeerReset, Said { own_end: true, peer_end: true }),
                    Err(broken) => (stopped(broken), Said { own_end: true, peer_end: false }),
                };
            }
            ended = &mut down => match ended {
                Ok(End::Fin) => {}
                Ok(End::Reset) => return (Stopped::PeerReset, Said { own_end: false, peer_end: true }),
                Err(broken) => {
                    if matches!(broken, Broken::Application) {
                        // What it had sent before it died (an answer, before it closed without reading the request)
                        // is the peer's to read; a dead socket gives it without waiting.
                        let _ = tokio::time::timeout(carried.wait, up).await;
                    }
                    return (stopped(broken), Said { own_end: false, peer_end: false });
                }
            },
        }
    }
    // The peer has ended: nothing more may come, but its going away has to be seen.
    tokio::select! {
        ended = &mut up => match ended {
            Ok(()) => (Stopped::Finished, Said { own_end: true, peer_end: true }),
            Err(broken) => (stopped(broken), Said { own_end: false, peer_end: true }),
        },
        word = incoming.next(tls) => {
            let error = word.map_or_else(|error| error, |_| LinkError::OutOfTurn);
            (Stopped::Lost(error), Said { own_end: false, peer_end: true })
        }
    }
}

/// The peer's last word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Fin,
    Reset,
}

/// Which side of a direction is gone.
#[derive(Debug)]
enum Broken {
    Application,
    Link(LinkError),
    /// Neither is; but one of them does not read.
    NoRoom(NoRoom),
}

impl From<Reset> for Broken {
    fn from(_: Reset) -> Self {
        Self::Application
    }
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self::Link(error.into())
    }
}

impl From<LinkError> for Broken {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl From<NoRoom> for Broken {
    fn from(no_room: NoRoom) -> Self {
        Self::NoRoom(no_room)
    }
}

/// Application to tunnel, up to FIN.
async fn up(app: &Socket<'_>, tls: &Tls, carried: &Carried<'_>) -> Result<(), Broken> {
    let mut turns = Turns::default();
    if carried.direction == Direction::Inbound {
        // Boxed, so that its timer is not a part of every connection for as long as that lasts.
        Box::pin(say_accept(app, tls)).await?;
    }
    loop {
        let closed = app.readable().await?;
        let mut buffer = Buffer::take();
        let Some(mut n) = app.read(&mut buffer[HEADER_LEN..READ])? else { continue };
        let mut ended = n == 0;
        if closed && !ended && HEADER_LEN + n < READ {
            // The end is known to be behind these bytes: FIN goes with them.
            match app.read(&mut buffer[HEADER_LEN + n..READ]) {
                Ok(Some(0)) => ended = true,
                Ok(more) => n += more.unwrap_or(0),
                // These bytes came before the reset, which the next read tells again.
                Err(Reset) => {}
            }
        }
        let mut len = 0;
        if n > 0 {
            buffer[..HEADER_LEN].copy_from_slice(&Header { kind: Kind::Data, len: n }.encode());
            len = HEADER_LEN + n;
        }
        if ended {
            let mut fin = BytesMut::with_capacity(HEADER_LEN);
            Control::Fin.encode(&mut fin);
            buffer[len..len + fin.len()].copy_from_slice(&fin);
            len += fin.len();
        }
        tls.push(&buffer[..len])?;
        drop(buffer);
        if !tls.flush_some()? {
            let _waiting = carried.wait_for(Reader::Peer)?;
            // Both waits are cancel-safe.
            tokio::select! {
                biased;
                flushed = tls.flush() => flushed?,
                reset = app.failed() => return Err(reset.into()),
            }
        }
        carried.up(n);
        if ended {
            return Ok(());
        }
        turns.took().await;
    }
}

/// ACCEPT, which goes with the application's first bytes if those come soon.
async fn say_accept(app: &Socket<'_>, tls: &Tls) -> Result<(), Broken> {
    let mut accept = BytesMut::with_capacity(HEADER_LEN);
    Control::Accept.encode(&mut accept);
    tls.push(&accept)?;
    match tokio::time::timeout(ACCEPT_WAIT, app.readable()).await {
        Ok(ready) => drop(ready?),
        Err(_) => tls.flush().await?,
    }
    Ok(())
}

/// Tunnel to application, up to the peer's last word.
async fn down(
    app: &Socket<'_>,
    tls: &Tls,
    incoming: &mut Incoming,
    carried: &Carried<'_>,
) -> Result<End, Broken> {
    let mut turns = Turns::default();
    loop {
        match incoming.next(tls).await? {
            Event::Data => deliver(app, tls, incoming, carried).await?,
            Event::Control(Control::Fin) => {
                if carried.direction == Direction::Inbound {
                    app.settled().await?;
                }
                app.finish()?;
                return Ok(End::Fin);
            }
            Event::Control(Control::Reset) => return Ok(End::Reset),
            Event::Control(_) => return Err(LinkError::OutOfTurn.into()),
        }
        turns.took().await;
    }
}

async fn deliver(
    app: &Socket<'_>,
    tls: &Tls,
    incoming: &mut Incoming,
    carried: &Carried<'_>,
) -> Result<(), Broken> {
    let mut waiting = None;
    while !incoming.data().is_empty() {
        match app.write(incoming.data())? {
            Some(n) => {
                incoming.consume(n);
                carried.down(n);
            }
            None => {
                if waiting.is_none() {
                    waiting = Some(carried.wait_for(Reader::Application)?);
                }
                // Both waits are cancel-safe.
                tokio::select! {
                    ready = app.writable() => ready?,
                    () = tls.failed() => return Err(LinkError::Truncated.into()),
                }
            }
        }
    }
    Ok(())
}
