//! Socket to socket, for what does not go through a tunnel.

use std::time::Duration;

use tokio::net::TcpStream;

use super::{Reset, ResetOnDrop, Socket, Turns};
use crate::{
    metrics::Flow,
    refusal::Failure,
    tunnel::buffers::{Buffer, READ},
};

/// Carries bytes until both sides have ended. `wait`: how long the bytes that a reset side had sent before may take to
/// be passed on. After an error, or if it is cut short, `destination` is reset; `source` is the caller's to reset.
pub(crate) async fn run(
    source: &TcpStream,
    destination: ResetOnDrop,
    flow: &Flow,
    wait: Duration,
) -> Result<(), Failure> {
    carry(&Socket::new(source), &Socket::new(&destination), flow, wait).await?;
    destination.finished();
    Ok(())
}

async fn carry(
    source: &Socket<'_>,
    destination: &Socket<'_>,
    flow: &Flow,
    wait: Duration,
) -> Result<(), Failure> {
    let mut there = std::pin::pin!(copy(source, destination, |n| flow.sent(n)));
    let mut back = std::pin::pin!(copy(destination, source, |n| flow.received(n)));
    let (mut there_ended, mut back_ended) = (false, false);
    // A branch that loses keeps its future.
    while !(there_ended && back_ended) {
        let ended = tokio::select! {
            ended = &mut there, if !there_ended => { there_ended = true; ended }
            ended = &mut back, if !back_ended => { back_ended = true; ended }
        };
        if ended.is_ok() {
            continue;
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
        let _ = tokio::time::timeout(wait, rest).await;
        return Err(if source_died { Failure::SourceReset } else { Failure::DestinationReset });
    }
    Ok(())
}

async fn copy(from: &Socket<'_>, to: &Socket<'_>, count: impl Fn(usize)) -> Result<(), Reset> {
    let mut turns = Turns::default();
    loop {
        // Both waits are cancel-safe.
        tokio::select! {
            ready = from.readable() => { ready?; }
            reset = to.failed() => return Err(reset),
        }
        let mut buffer = Buffer::take();
        match from.read(&mut buffer[..READ])? {
            Some(0) => return to.finish(),
            Some(n) => {
                write_all(from, to, &buffer[..n]).await?;
                count(n);
            }
            None => {}
        }
        drop(buffer);
        turns.took().await;
    }
}

async fn write_all(from: &Socket<'_>, to: &Socket<'_>, mut bytes: &[u8]) -> Result<(), Reset> {
    while !bytes.is_empty() {
        match to.write(bytes)? {
            Some(n) => bytes = &bytes[n..],
            None => tokio::select! {
                ready = to.writable() => ready?,
                reset = from.failed() => return Err(reset),
            },
        }
    }
    Ok(())
}
