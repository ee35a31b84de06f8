//! The frames of a tunnel, as a peer may send them: anything, cut anywhere.
//!
//! The first byte says how many bytes come at a time. Claims: where the bytes are cut changes nothing; every byte is
//! accounted for; a frame that was understood is written back the same; nothing grows with what was sent.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use mesh_core::frame::{Control, Cutter, Event, FrameError, HEADER_LEN, Header, Kind};

fuzz_target!(|input: &[u8]| {
    let Some((step, bytes)) = input.split_first() else { return };
    let whole = understand(bytes, bytes.len().max(1));
    let cut = understand(bytes, usize::from(*step) + 1);
    assert_eq!(whole, cut, "the same frames wherever reads cut them");
    let written: usize = whole.controls.iter().map(write_back).sum();
    assert!(whole.data.len() + written <= bytes.len(), "nothing is understood that was not sent");
    assert!(size_of::<Cutter>() < 100);
});

#[derive(Debug, Default, PartialEq, Eq)]
struct Understood {
    controls: Vec<Control>,
    data: Vec<u8>,
    /// How the tunnel ended, if it did; what comes after is not looked at.
    error: Option<FrameError>,
    mid_frame: bool,
}

fn understand(bytes: &[u8], step: usize) -> Understood {
    let mut cutter = Cutter::default();
    let mut understood = Understood::default();
    for mut piece in bytes.chunks(step) {
        loop {
            let (used, event) = match cutter.cut(piece) {
                Ok(cut) => cut,
                Err(error) => {
                    understood.error = Some(error);
                    return understood;
                }
            };
            piece = &piece[used..];
            match event {
                Some(Event::Control(control)) => understood.controls.push(control),
                Some(Event::Data) => {
                    let n = cutter.data_left().min(piece.len());
                    assert!(n > 0, "data that is announced is there");
                    understood.data.extend_from_slice(&piece[..n]);
                    cutter.consume(n);
                    piece = &piece[n..];
                }
                None => break,
            }
        }
        assert!(piece.is_empty(), "what is no event yet is kept by the cutter");
    }
    understood.mid_frame = cutter.is_mid_frame();
    understood
}

/// Writes a frame and reads it back; its length.
fn write_back(control: &Control) -> usize {
    let mut out = BytesMut::new();
    control.encode(&mut out);
    let header = Header::decode(out[..HEADER_LEN].try_into().expect("four bytes")).expect("our own header");
    assert_ne!(header.kind, Kind::Data);
    assert_eq!(out.len(), HEADER_LEN + header.len);
    let payload = out.split_off(HEADER_LEN).freeze();
    assert_eq!(Control::decode(header.kind, payload).as_ref(), Ok(control));
    HEADER_LEN + header.len
}
