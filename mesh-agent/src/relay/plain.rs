//! Socket to socket, for what does not go through a tunnel.

use tokio::net::TcpStream;

use super::{Carried, NoRoom, Reset, ResetOnDrop, Socket, Turns};
use crate::{
    metrics::Direction,
    refusal::{Failure, Refusal, Stop},
    stalled::Reader,
    tunnel::buffers::{Buffer, READ},
};

/// Why a direction stopped before its end.
#[derive(Debug)]
enum Broken {
    Reset,
    NoRoom(NoRoom),
}

impl From<Reset> for Broken {
    fn from(_: Reset) -> Self {
        Self::Reset
    }
}

impl From<NoRoom> for Broken {
    fn from(no_room: NoRoom) -> Self {
        Self::NoRoom(no_room)
    }
}

/// Carries bytes until both sides have ended. After an error, or if it is cut short, `destination` is reset; `source`
/// is the caller's to reset.
pub(crate) async fn run(
    source: &TcpStream,
    destination: ResetOnDrop,
    carried: &Carried<'_>,
) -> Result<(), Stop> {
    carry(&Socket::new(source), &Socket::new(&destination), carried).await?;
    destination.finished();
    Ok(())
}

async fn carry(source: &Socket<'_>, destination: &Socket<'_>, carried: &Carried<'_>) -> Result<(), Stop> {
    let (at_source, at_destination) = match carried.direction {
        Direction::Outbound => (Reader::Application, Reader::Peer),
        Direction::Inbound => (Reader::Peer, Reader::Application),
    };
    let flow = carried.flow;
    let mut there = std::pin::pin!(copy(source, destination, carried, at_destination, |n| flow.sent(n)));
    let mut back = std::pin::pin!(copy(destination, source, carried, at_source, |n| flow.received(n)));
    let (mut there_ended, mut back_ended) = (false, false);
    // A branch that loses keeps its future.
    while !(there_ended && back_ended) {
        let ended = tokio::select! {
            ended = &mut there, if !there_ended => { there_ended = true; ended }
            ended = &mut back, if !back_ended => { back_ended = true; ended }
        };
        match ended {
            Ok(()) => continue,
            Err(Broken::NoRoom(no_room)) => return Err(Refusal::from(no_room).into()),
            Err(Broken::Reset) => {}
        }
        // What the reset side had sent before it died (an answer, before it closed without reading the request) is
        // the other's to read; a dead socket gives it without waiting.
        let source_died = source.is_reset();
        let rest = async {
            match source_died {
                true if !there_ended => drop(there.await),
                false if !back_ended => drop(back.await),
                _ => {}
            }
        };
        let _ = tokio::time::timeout(carried.wait, rest).await;
        return Err(if source_died { Failure::SourceReset } else { Failure::DestinationReset }.into());
    }
    Ok(())
}

async fn copy(
    from: &Socket<'_>,
    to: &Socket<'_>,
    carried: &Carried<'_>,
    reader: Reader,
    count: impl Fn(usize),
) -> Result<(), Broken> {
    let mut turns = Turns::default();
    loop {
        // Both waits are cancel-safe.
        tokio::select! {
            ready = from.readable() => { ready?; }
            reset = to.failed() => return Err(reset.into()),
        }
        let mut buffer = Buffer::take();
        match from.read(&mut buffer[..READ])? {
            Some(0) => return Ok(to.finish()?),
            Some(n) => {
                write_all(from, to, &buffer[..n], carried, reader).await?;
                count(n);
            }
            None => {}
        }
        drop(buffer);
        turns.took().await;
    }
}

async fn write_all(
    from: &Socket<'_>,
    to: &Socket<'_>,
    mut bytes: &[u8],
    carried: &Carried<'_>,
    reader: Reader,
) -> Result<(), Broken> {
    let mut waiting = None;
    while !bytes.is_empty() {
        match to.write(bytes)? {
            Some(n) => bytes = &bytes[n..],
            None => {
                if waiting.is_none() {
                    waiting = Some(carried.wait_for(reader)?);
                }
                tokio::select! {
                    ready = to.writable() => ready?,
                    reset = from.failed() => return Err(reset.into()),
                }
            }
        }
    }
    Ok(())
}
