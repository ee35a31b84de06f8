//! The frames inside a tunnel: a header of a type (1 byte) and a length (3 bytes, big endian), then the payload.
//!
//! | frame | from | payload |
//! |---|---|---|
//! | SETTINGS | destination | the protocol's version (1 byte): its first bytes after the handshake |
//! | OPEN | source | address family (4 or 6), the application's address, its port, the destination port asked for |
//! | ACCEPT | destination | none: the application's socket is connected |
//! | REFUSE | destination | the label of a [`Reason`] |
//! | DATA | both | bytes of the application |
//! | FIN | both | none: half close |
//! | RESET | both | none: the application's connection was reset |
//! | READY | destination | none: both directions ended and everything was delivered; the tunnel takes the next OPEN |
//!
//! The decoder is strict: an unknown type, a wrong length or an oversized payload ends the tunnel.

use std::net::{IpAddr, SocketAddr};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::refusal::Reason;

/// The version that SETTINGS carries.
pub const VERSION: u8 = 1;
/// ALPN protocol of the tunnel (RFC 7301).
pub const ALPN: &[u8] = b"nodemesh/1";
/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 4;
/// Largest payload of a DATA frame; what one read of the application returns at most.
pub const MAX_DATA: usize = 256 * 1024 - HEADER_LEN;
/// Largest payload of any other frame: no reason's label and no OPEN is longer.
pub const MAX_CONTROL: usize = 64;

/// A frame's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First words of the destination.
    Settings = 0,
    /// Lease for one connection.
    Open = 1,
    /// The application is connected.
    Accept = 2,
    /// The connection is refused.
    Refuse = 3,
    /// Bytes.
    Data = 4,
    /// Half close.
    Fin = 5,
    /// Reset.
    Reset = 6,
    /// Ready for the next lease.
    Ready = 7,
}

/// How a peer broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The type byte is none of ours.
    #[error("frame type {0} is unknown")]
    Kind(u8),
    /// The payload is longer than this type may have.
    #[error("a {kind:?} frame of {len} bytes: at most {max} are allowed")]
    TooLong {
        /// The frame.
        kind: Kind,
        /// Its length, bytes.
        len: usize,
        /// The limit, bytes.
        max: usize,
    },
    /// The payload does not have this type's form.
    #[error("a {0:?} frame with a malformed payload")]
    Payload(Kind),
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The type.
    pub kind: Kind,
    /// Payload bytes that follow.
    pub len: usize,
}

impl Header {
    /// The header as it goes on the wire. `len` must be at most [`MAX_DATA`].
    pub fn encode(self) -> [u8; HEADER_LEN] {
        debug_assert!(self.len <= MAX_DATA, "a frame is never longer than MAX_DATA");
        let len = (self.len as u32).to_be_bytes();
        [self.kind as u8, len[1], len[2], len[3]]
    }

    /// Reads a header and checks its length against the type's limit.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let kind = match bytes[0] {
            0 => Kind::Settings,
            1 => Kind::Open,
            2 => Kind::Accept,
            3 => Kind::Refuse,
            4 => Kind::Data,
            5 => Kind::Fin,
            6 => Kind::Reset,
            7 => Kind::Ready,
            other => return Err(FrameError::Kind(other)),
        };
        let len = u32::from_be_bytes([0, bytes[1], bytes[2], bytes[3]]) as usize;
        let max = match kind {
            Kind::Data => MAX_DATA,
            Kind::Settings | Kind::Open | Kind::Refuse => MAX_CONTROL,
            Kind::Accept | Kind::Fin | Kind::Reset | Kind::Ready => 0,
        };
        if len > max {
            return Err(FrameError::TooLong { kind, len, max });
        }
        Ok(Self { kind, len })
    }
}

/// What OPEN asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// The application that asks, as its own network namespace knows it.
    pub source: SocketAddr,
    /// The port of the destination workload; the tunnel's own destination port.
    pub port: u16,
}

/// A control frame with its payload; DATA is handled by its header, its bytes are never gathered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// The peer's version.
    Settings(u8),
    /// A lease.
    Open(Open),
    /// Connected.
    Accept,
    /// Refused; the peer's reason, or `None` for a word that this version does not know.
    Refuse(Option<Reason>),
    /// Half close.
    Fin,
    /// Reset.
    Reset,
    /// Ready.
    Ready,
}

impl Control {
    /// Appends the frame.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Settings(version) => {
                out.put_slice(&Header { kind: Kind::Settings, len: 1 }.encode());
                out.put_u8(*version);
            }
            Self::Open(open) => open.encode(out),
            Self::Refuse(reason) => {
                let label = reason.map_or("", Reason::label).as_bytes();
                out.put_slice(&Header { kind: Kind::Refuse, len: label.len() }.encode());
                out.put_slice(label);
            }
            Self::Accept => out.put_slice(&Header { kind: Kind::Accept, len: 0 }.encode()),
            Self::Fin => out.put_slice(&Header { kind: Kind::Fin, len: 0 }.encode()),
            Self::Reset => out.put_slice(&Header { kind: Kind::Reset, len: 0 }.encode()),
            Self::Ready => out.put_slice(&Header { kind: Kind::Ready, len: 0 }.encode()),
        }
    }

    /// Reads the payload of a control frame. A DATA header is an error here: its bytes are not a payload to gather.
    pub fn decode(kind: Kind, mut payload: Bytes) -> Result<Self, FrameError> {
        let malformed = || FrameError::Payload(kind);
        let control = match kind {
            Kind::Settings => Self::Settings(payload.try_get_u8().map_err(|_| malformed())?),
            Kind::Open => Self::Open(Open::decode(&mut payload).ok_or_else(malformed)?),
            Kind::Accept => Self::Accept,
            Kind::Refuse => {
                let label = std::str::from_utf8(&payload).map_err(|_| malformed())?;
                let reason = Reason::parse(label);
                payload.clear();
                Self::Refuse(reason)
            }
            Kind::Data => return Err(malformed()),
            Kind::Fin => Self::Fin,
            Kind::Reset => Self::Reset,
            Kind::Ready => Self::Ready,
        };
        if payload.has_remaining() { Err(malformed()) } else { Ok(control) }
    }
}

/// What the peer said, as [`Cutter`] understands it.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of the application: [`Cutter::data_left`] of them follow.
    Data,
    /// Any other frame.
    Control(Control),
}

/// Cuts a tunnel's bytes into frames, however they come: DATA is handed on in pieces and never gathered, any other
/// frame is gathered up to its limit. All that a peer can make it hold is in the value: under a hundred bytes.
#[derive(Debug)]
pub struct Cutter {
    head: [u8; HEADER_LEN + MAX_CONTROL],
    head_len: u8,
    data_left: u32,
}

impl Default for Cutter {
    fn default() -> Self {
        Self { head: [0; HEADER_LEN + MAX_CONTROL], head_len: 0, data_left: 0 }
    }
}

impl Cutter {
    /// The next event in `bytes`, and how many of them are done with: all, when there is none. After
    /// [`Event::Data`] the application's bytes follow, and are done with once [`Cutter::consume`] was told so.
    pub fn cut(&mut self, bytes: &[u8]) -> Result<(usize, Option<Event>), FrameError> {
        let mut used = 0;
        loop {
            let rest = &bytes[used..];
            if self.data_left > 0 {
                return Ok((used, (!rest.is_empty()).then_some(Event::Data)));
            }
            let (taken, whole) = self.gather(rest, HEADER_LEN);
            used += taken;
            if !whole {
                return Ok((used, None));
            }
            let [a, b, c, d, ..] = self.head;
            let header = Header::decode([a, b, c, d])?;
            if header.kind == Kind::Data {
                self.head_len = 0;
                self.data_left = header.len as u32;
                continue;
            }
            let len = HEADER_LEN + header.len;
            let (taken, whole) = self.gather(&bytes[used..], len);
            used += taken;
            if !whole {
                return Ok((used, None));
            }
            self.head_len = 0;
            let payload = Bytes::copy_from_slice(&self.head[HEADER_LEN..len]);
            return Ok((used, Some(Event::Control(Control::decode(header.kind, payload)?))));
        }
    }

    /// Bytes that are left of the DATA frame whose header was read.
    pub fn data_left(&self) -> usize {
        self.data_left as usize
    }

    /// `n` of the application's bytes are done with; at most [`Cutter::data_left`].
    pub fn consume(&mut self, n: usize) {
        debug_assert!(n <= self.data_left(), "only what was announced can be consumed");
        self.data_left -= n as u32;
    }

    /// Whether a frame has begun and not ended.
    pub fn is_mid_frame(&self) -> bool {
        self.head_len > 0 || self.data_left > 0
    }

    /// Moves bytes into `head` until that has `want`; how many it took, and whether it has.
    fn gather(&mut self, bytes: &[u8], want: usize) -> (usize, bool) {
        let have = usize::from(self.head_len);
        let n = want.saturating_sub(have).min(bytes.len());
        self.head[have..have + n].copy_from_slice(&bytes[..n]);
        self.head_len += n as u8;
        (n, have + n >= want)
    }
}

impl Open {
    fn encode(&self, out: &mut BytesMut) {
        let address_len = if self.source.is_ipv4() { 4 } else { 16 };
        out.put_slice(&Header { kind: Kind::Open, len: 1 + address_len + 2 + 2 }.encode());
        match self.source.ip() {
            IpAddr::V4(ip) => {
                out.put_u8(4);
                out.put_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                out.put_u8(6);
                out.put_slice(&ip.octets());
            }
        }
        out.put_u16(self.source.port());
        out.put_u16(self.port);
    }

    fn decode(payload: &mut Bytes) -> Option<Self> {
        let ip: IpAddr = match payload.try_get_u8().ok()? {
            4 => payload.try_get_u32().ok()?.to_be_bytes().into(),
            6 => payload.try_get_u128().ok()?.to_be_bytes().into(),
            _ => return None,
        };
        let source = SocketAddr::new(ip, payload.try_get_u16().ok()?);
        Some(Self { source, port: payload.try_get_u16().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode_one(mut bytes: &[u8]) -> Result<Control, FrameError> {
        let mut header = [0; HEADER_LEN];
        bytes.copy_to_slice(&mut header);
        let header = Header::decode(header)?;
        Control::decode(header.kind, Bytes::copy_from_slice(&bytes[..header.len.min(bytes.len())]))
    }

    #[test]
    fn limits_and_types_are_enforced() {
        assert_eq!(Header::decode([9, 0, 0, 0]), Err(FrameError::Kind(9)));
        assert!(matches!(Header::decode([4, 4, 0, 0]), Err(FrameError::TooLong { .. })));
        assert!(matches!(Header::decode([5, 0, 0, 1]), Err(FrameError::TooLong { .. })));
        assert!(Header::decode([4, 3, 0xff, 0xfc]).is_ok());
        assert!(decode_one(&[1, 0, 0, 2, 4, 1]).is_err());
    }
}
