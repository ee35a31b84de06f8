//! Decrypted bytes cut into frames, as they come: a DATA frame's bytes are handed on in pieces, never gathered.
//!
//! Holds a buffer only while it has bytes in hand. All state is in the value, so waiting for the next frame can be
//! cancelled at any await.

use std::task::{Context, Poll, ready};

use mesh_core::frame::Cutter;
pub(crate) use mesh_core::frame::Event;

use super::{
    buffers::Buffer,
    tls::{Filled, LinkError, Tls},
};

/// The receiving half of a tunnel.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    plain: Option<Plain>,
    closed: bool,
    cutter: Cutter,
}

#[derive(Debug)]
struct Plain {
    buffer: Buffer,
    start: usize,
    end: usize,
}

impl Incoming {
    /// The next frame, or the next piece of a DATA frame once the last was consumed. Cancel-safe.
    pub(crate) async fn next(&mut self, tls: &Tls) -> Result<Event, LinkError> {
        loop {
            if let Some(event) = self.parse()? {
                return Ok(event);
            }
            self.read(tls).await?;
        }
    }

    /// The same for whoever is polled.
    pub(crate) fn poll_next(&mut self, tls: &Tls, cx: &mut Context<'_>) -> Poll<Result<Event, LinkError>> {
        loop {
            if let Some(event) = self.parse()? {
                return Poll::Ready(Ok(event));
            }
            while !self.read_now(tls)? {
                ready!(tls.poll_readable(cx))?;
            }
        }
    }

    /// Of a tunnel whose handshake has ended; frames may have come with its last message.
    pub(super) fn after_handshake(tls: &Tls) -> Result<Self, LinkError> {
        let mut new = Self::default();
        let mut buffer = Buffer::take();
        if let Some(filled) = tls.fill_rest(&mut buffer)? {
            new.take_in(buffer, filled);
        }
        Ok(new)
    }

    async fn read(&mut self, tls: &Tls) -> Result<(), LinkError> {
        while !self.read_now(tls)? {
            tls.readable().await?;
        }
        Ok(())
    }

    /// Reads what is there; whether anything was. Everything before must have been taken.
    fn read_now(&mut self, tls: &Tls) -> Result<bool, LinkError> {
        if self.closed {
            return Err(LinkError::Closed);
        }
        let mut buffer = Buffer::take();
        let Some(filled) = tls.fill(&mut buffer)? else { return Ok(false) };
        self.take_in(buffer, filled);
        Ok(true)
    }

    fn take_in(&mut self, buffer: Buffer, filled: Filled) {
        self.closed = filled.closed;
        self.plain = (filled.bytes > 0).then_some(Plain { buffer, start: 0, end: filled.bytes });
    }

    /// Whether the peer has said nothing since the last frame, and is still there.
    pub(crate) fn is_quiet(&mut self, tls: &Tls) -> bool {
        self.plain.is_none() && !self.is_mid_frame() && matches!(self.read_now(tls), Ok(false))
    }

    /// Whether a frame has begun and not ended.
    pub(crate) fn is_mid_frame(&self) -> bool {
        self.cutter.is_mid_frame()
    }

    /// The piece that [`Event::Data`] announced.
    pub(crate) fn data(&self) -> &[u8] {
        let Some(plain) = &self.plain else { return &[] };
        let len = (plain.end - plain.start).min(self.cutter.data_left());
        &plain.buffer[plain.start..plain.start + len]
    }

    /// `n` bytes of [`Incoming::data`] are done with.
    pub(crate) fn consume(&mut self, n: usize) {
        debug_assert!(n <= self.data().len(), "only what is there can be consumed");
        self.cutter.consume(n);
        self.advance(n);
    }

    /// Throws the announced piece away.
    pub(crate) fn discard(&mut self) {
        self.consume(self.data().len());
    }

    fn parse(&mut self) -> Result<Option<Event>, LinkError> {
        let unread = self.plain.as_ref().map_or(&[][..], |plain| &plain.buffer[plain.start..plain.end]);
        let (used, event) = self.cutter.cut(unread)?;
        self.advance(used);
        Ok(event)
    }

    fn advance(&mut self, n: usize) {
        if let Some(plain) = &mut self.plain {
            plain.start += n;
            if plain.start == plain.end {
                self.plain = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};
    use mesh_core::{
        frame::{Control, Header, Kind, Open},
        refusal::Reason,
    };

    use super::*;

    /// Feeds `bytes` in pieces of `step` and tells what was understood.
    fn events(bytes: &[u8], step: usize) -> Result<(Vec<Control>, Vec<u8>), LinkError> {
        let mut incoming = Incoming::default();
        let (mut controls, mut data) = (vec![], vec![]);
        for piece in bytes.chunks(step) {
            let mut buffer = Buffer::take();
            buffer[..piece.len()].copy_from_slice(piece);
            incoming.plain = Some(Plain { buffer, start: 0, end: piece.len() });
            while let Some(event) = incoming.parse()? {
                match event {
                    Event::Control(control) => controls.push(control),
                    Event::Data => {
                        data.extend_from_slice(incoming.data());
                        incoming.discard();
                    }
                }
            }
            assert!(incoming.plain.is_none(), "everything is taken, and the buffer given back");
        }
        assert!(!incoming.is_mid_frame());
        Ok((controls, data))
    }

    #[test]
    fn frames_are_the_same_wherever_reads_cut_them() {
        let open = Control::Open(Open { source: "[fd01::1]:4000".parse().unwrap(), port: 80 });
        let said = vec![open, Control::Refuse(Some(Reason::DialRefused)), Control::Fin, Control::Ready];
        let mut bytes = BytesMut::new();
        for control in &said {
            control.encode(&mut bytes);
            bytes.put_slice(&Header { kind: Kind::Data, len: 3 }.encode());
            bytes.put_slice(b"abc");
            bytes.put_slice(&Header { kind: Kind::Data, len: 0 }.encode());
        }
        for step in 1..bytes.len() {
            let (controls, data) = events(&bytes, step).unwrap();
            assert_eq!(controls, said, "in pieces of {step}");
            assert_eq!(data, b"abc".repeat(4), "in pieces of {step}");
        }
    }

    #[test]
    fn what_is_not_a_frame_is_an_error() {
        assert!(events(&[99, 0, 0, 0], 4).is_err());
        assert!(events(&[5, 0, 0, 9], 4).is_err());
    }
}
