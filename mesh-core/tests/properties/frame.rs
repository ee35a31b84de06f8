//! Frames, cut anywhere and out of anything.

use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use mesh_core::{
    frame::{Control, FrameError, HEADER_LEN, Header, Kind, MAX_CONTROL, MAX_DATA, Open},
    refusal::Reason,
};
use proptest::{collection::vec, prelude::*, sample::Index};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Frame {
    Control(Control),
    Data(Vec<u8>),
}

impl Frame {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Control(control) => control.encode(out),
            Self::Data(bytes) => {
                out.extend_from_slice(&Header { kind: Kind::Data, len: bytes.len() }.encode());
                out.extend_from_slice(bytes);
            }
        }
    }
}

/// The frames at the start of `bytes`, and what is left: an unfinished frame, if anything.
fn decode(bytes: &[u8]) -> Result<(Vec<Frame>, &[u8]), FrameError> {
    let (mut frames, mut rest) = (vec![], bytes);
    while let Some((head, after)) = rest.split_first_chunk::<HEADER_LEN>() {
        let header = Header::decode(*head)?;
        let Some((payload, after)) = after.split_at_checked(header.len) else { break };
        frames.push(match header.kind {
            Kind::Data => Frame::Data(payload.to_vec()),
            kind => Frame::Control(Control::decode(kind, Bytes::copy_from_slice(payload))?),
        });
        rest = after;
    }
    Ok((frames, rest))
}

fn frame() -> impl Strategy<Value = Frame> {
    let open = (any::<SocketAddr>(), any::<u16>()).prop_map(|(source, port)| {
        // Neither flow label nor scope is sent.
        Control::Open(Open { source: SocketAddr::new(source.ip(), source.port()), port })
    });
    prop_oneof![
        any::<u8>().prop_map(|version| Frame::Control(Control::Settings(version))),
        open.prop_map(Frame::Control),
        prop::option::of(prop::sample::select(Reason::ALL))
            .prop_map(|it| Frame::Control(Control::Refuse(it))),
        prop::sample::select(vec![Control::Accept, Control::Fin, Control::Reset, Control::Ready])
            .prop_map(Frame::Control),
        vec(any::<u8>(), 0..100).prop_map(Frame::Data),
    ]
}

proptest! {
    #[test]
    fn frames_round_trip_wherever_they_are_cut(frames in vec(frame(), 0..8), cut: Index) {
        let mut bytes = BytesMut::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        let cut = cut.index(bytes.len() + 1);
        let (mut first, unfinished) = decode(&bytes[..cut]).expect("a prefix is no error");
        let (rest, left) = decode(&bytes[cut - unfinished.len()..]).expect("the rest continues it");
        prop_assert!(left.is_empty());
        first.extend(rest);
        prop_assert_eq!(first, frames);
    }

    #[test]
    fn random_bytes_never_panic_and_no_frame_is_longer_than_its_kind_may_be(bytes in vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes);
        if let Some(header) = bytes.first_chunk().and_then(|head| Header::decode(*head).ok()) {
            let max = if header.kind == Kind::Data { MAX_DATA } else { MAX_CONTROL };
            prop_assert!(header.len <= max);
            prop_assert_eq!(&header.encode()[..], &bytes[..HEADER_LEN]);
        }
    }

    #[test]
    fn a_byte_changed_is_another_frame_or_an_error(frame in frame(), at: Index, byte: u8) {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes);
        let at = at.index(bytes.len());
        let changed = bytes[at] != byte;
        bytes[at] = byte;
        if let Ok((frames, rest)) = decode(&bytes) {
            let unharmed = rest.is_empty() && frames == [frame.clone()];
            // A reason that is not known reads as none, as an empty one does.
            let forgiven = matches!(frame, Frame::Control(Control::Refuse(None)));
            prop_assert!(!(changed && unharmed) || forgiven);
        }
    }
}
