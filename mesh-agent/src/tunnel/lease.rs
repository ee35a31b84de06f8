//! A tunnel's lease to one connection: how it begins (OPEN, ACCEPT or REFUSE) and how it ends (READY).
//!
//! The one rule that keeps requests from running twice: a lease may be tried again on another tunnel only when the
//! peer took nothing. That is so when its close_notify came before any answer (after close_notify it processes
//! nothing), when it refused, and when no byte of the application had been sent.

use std::{io, time::Duration};

use mesh_core::{
    frame::{Control, Open},
    refusal::Reason,
};

use super::{Event, Link, LinkError};

/// Why a tunnel did not take a connection.
#[derive(Debug)]
pub(crate) enum NotOpened {
    /// The peer took nothing: another tunnel may be tried.
    NotTaken(LinkError),
    /// The application's first bytes may have been delivered: nothing may be tried again.
    MaybeTaken(LinkError),
    /// The peer says no. The tunnel lives and owes READY; `None` for a word that this version does not know.
    Refused(Option<Reason>),
}

/// Asks for a connection, with its first bytes, and waits for the answer. Not cancel-safe: a link whose OPEN was
/// abandoned has to be [`settle`]d or dropped.
pub(crate) async fn open(link: &mut Link, open: Open, first: &[u8]) -> Result<(), NotOpened> {
    let lost = |error| match error {
        LinkError::Closed => NotOpened::NotTaken(error),
        _ if first.is_empty() => NotOpened::NotTaken(error),
        _ => NotOpened::MaybeTaken(error),
    };
    // A failed write is not the last word: the peer's close_notify may be queued.
    let written = match link.push_with_data(&Control::Open(open), first) {
        Ok(()) => link.flush().await,
        Err(error) => Err(error.into()),
    };
    match link.next().await {
        Ok(Event::Control(Control::Accept)) => written.map_err(lost),
        Ok(Event::Control(Control::Refuse(reason))) => Err(NotOpened::Refused(reason)),
        Ok(_) => Err(NotOpened::MaybeTaken(LinkError::OutOfTurn)),
        Err(error) => Err(lost(error)),
    }
}

/// What the two ends have said when a relay stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Said {
    /// We have sent FIN.
    pub(crate) own_end: bool,
    /// The peer has sent FIN or RESET.
    pub(crate) peer_end: bool,
}

/// The source's end of a lease: whatever the destination still sends is thrown away until it is READY.
///
/// An error if the tunnel cannot be leased again: [`LinkError::Closed`] if nothing was taken that was not answered.
pub(crate) async fn settle(mut link: Box<Link>, said: Said, wait: Duration) -> Result<Box<Link>, LinkError> {
    let ready = async {
        if !said.own_end {
            link.push(&Control::Reset)?;
        }
        link.flush().await?;
        loop {
            match link.next().await? {
                Event::Control(Control::Ready) => return Ok::<(), LinkError>(()),
                Event::Control(Control::Open(_) | Control::Settings(_)) => return Err(LinkError::OutOfTurn),
                Event::Control(_) => {}
                Event::Data => link.discard(),
            }
        }
    };
    tokio::time::timeout(wait, ready)
        .await
        .unwrap_or(Err(io::Error::from(io::ErrorKind::TimedOut).into()))?;
    Ok(link)
}

/// The destination's end of a lease: reads to the source's end, then says READY. `None` if the tunnel is given up.
///
/// The caller has delivered everything, or has reset the application's connection.
pub(crate) async fn make_ready(mut link: Box<Link>, said: Said, wait: Duration) -> Option<Box<Link>> {
    let ready = async {
        if !said.own_end {
            link.push(&Control::Reset)?;
        }
        if !said.peer_end {
            link.flush().await?;
            read_to_end(&mut link).await?;
        }
        link.push(&Control::Ready)?;
        link.flush().await
    };
    matches!(tokio::time::timeout(wait, ready).await, Ok(Ok(()))).then_some(link)
}

/// The destination's no: REFUSE stands for its end; the source answers with its own.
pub(crate) async fn refuse(mut link: Box<Link>, reason: Reason, wait: Duration) -> Option<Box<Link>> {
    let refused = async {
        link.push(&Control::Refuse(Some(reason)))?;
        link.flush().await?;
        read_to_end(&mut link).await?;
        link.push(&Control::Ready)?;
        link.flush().await
    };
    matches!(tokio::time::timeout(wait, refused).await, Ok(Ok(()))).then_some(link)
}

async fn read_to_end(link: &mut Link) -> Result<(), LinkError> {
    loop {
        match link.next().await? {
            Event::Control(Control::Reset | Control::Fin) => return Ok(()),
            Event::Control(_) => return Err(LinkError::OutOfTurn),
            Event::Data => link.discard(),
        }
    }
}
