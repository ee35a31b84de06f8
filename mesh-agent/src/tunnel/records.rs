//! TLS 1.3 records (RFC 8446 §5) after a handshake that rustls has done: sealed and opened in place, in the buffers
//! that the bytes are in anyway.
//!
//! Stands apart from rustls' own record layer because that copies every byte two times more and keeps a buffer in
//! every idle connection (docs/adr/0011-record-layer.md has the figures). Handshake and certificates stay rustls', the
//! AEADs are ring's; here are sequence numbers, types and lengths, and in [`crate::secrets`] the keys.
//!
//! Invariants: a nonce is used once, as sequence numbers only grow and a key is replaced long before its limit;
//! nothing is handed on before its tag was verified; every error is final, told to the peer by an alert.

use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce,
};
use rustls::{AlertDescription, ConnectionTrafficSecrets, Error, ExtractedSecrets, InvalidMessage, Side};

use crate::secrets::{Secret, TrafficSecrets};

/// Content type, version, length.
pub(super) const RECORD_HEADER: usize = 5;
/// Bytes of plaintext that a record carries at most (RFC 8446 §5.1).
pub(super) const MAX_PLAIN: usize = 16 * 1024;
/// The inner content type and the tag, of all three AEADs.
const SEALED_MORE: usize = 1 + 16;
/// What sealing adds to a record's plaintext.
pub(super) const OVERHEAD: usize = RECORD_HEADER + SEALED_MORE;
/// A record's sealed content at most (RFC 8446 §5.2).
const MAX_SEALED: usize = MAX_PLAIN + 256;
/// Records under one key: RFC 8446 §5.5 allows 2^24.5 of full size to AES-GCM.
const KEY_LIMIT: u64 = 1 << 24;

/// Content types.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
/// KeyUpdate (RFC 8446 §4.6.3): type, length 1, and whether the other side shall do the same.
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];
/// RFC 8446 §4.6.1.
const NEW_SESSION_TICKET: u8 = 4;
/// Alert levels.
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// Both directions of a session.
#[derive(Debug)]
pub(super) struct Records {
    seal: Half,
    open: Half,
    side: Side,
    /// The peer asked for a KeyUpdate: it goes out before the next record, however often it asked.
    owes_update: bool,
}

/// What a record was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opened {
    /// Application data: so many bytes, after the record's header.
    Data(usize),
    /// Something of TLS' own, dealt with.
    Nothing,
    /// close_notify.
    Closed,
}

impl Records {
    /// Of a session whose handshake has ended: its cipher suite and sequence numbers, and what its keys come from.
    pub(super) fn new(agreed: &ExtractedSecrets, side: Side, secrets: TrafficSecrets) -> Result<Self, Error> {
        let TrafficSecrets { client, server } = secrets;
        let (seal, open) = match side {
            Side::Client => (client, server),
            Side::Server => (server, client),
        };
        let half = |(sequence, suite): &(u64, ConnectionTrafficSecrets), secret: Option<Secret>| {
            let secret =
                secret.ok_or_else(|| Error::General("the handshake told no traffic secret".into()))?;
            Half::new(algorithm(suite)?, secret, *sequence)
        };
        Ok(Self { seal: half(&agreed.tx, seal)?, open: half(&agreed.rx, open)?, side, owes_update: false })
    }

    /// How many bytes the record at the start of these has, header included; `None` if that cannot be said yet.
    pub(super) fn record_len(bytes: &[u8]) -> Result<Option<usize>, Error> {
        let &[_, _, _, high, low, ..] = bytes else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes([high, low]));
        if len > MAX_SEALED {
            return Err(Error::PeerSentOversizedRecord);
        }
        Ok(Some(RECORD_HEADER + len))
    }

    /// Opens one whole record in place; data is at [`RECORD_HEADER`] then.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<Opened, Error> {
        let (kind, len) = self.open.open(record)?;
        let content = &record[RECORD_HEADER..RECORD_HEADER + len];
        match (kind, content) {
            (APPLICATION_DATA, _) => Ok(Opened::Data(len)),
            (ALERT, [_, 0]) => Ok(Opened::Closed),
            (ALERT, &[_, description]) => Err(Error::AlertReceived(AlertDescription::from(description))),
            (ALERT, _) => Err(InvalidMessage::MissingData("AlertMessagePayload").into()),
            (HANDSHAKE, &[a, b, c, d, asks @ 0..=1]) if [a, b, c, d] == KEY_UPDATE => {
                self.open.update()?;
                self.owes_update |= asks == 1;
                Ok(Opened::Nothing)
            }
            // We resume nothing, so a server's tickets are of no use.
            (HANDSHAKE, [NEW_SESSION_TICKET, ..]) if self.side == Side::Client => Ok(Opened::Nothing),
            _ => Err(InvalidMessage::UnexpectedMessage("after the handshake").into()),
        }
    }

    /// Seals application data, of at most [`MAX_PLAIN`] bytes, into `out`; returns how many bytes it became. `out` must
    /// have room for [`Records::room`].
    pub(super) fn seal(&mut self, plain: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        let mut at = 0;
        if self.owes_update || self.seal.sequence >= KEY_LIMIT {
            let [a, b, c, d] = KEY_UPDATE;
            at = self.seal.seal(HANDSHAKE, &[a, b, c, d, 0], out)?;
            self.seal.update()?;
            self.owes_update = false;
        }
        Ok(at + self.seal.seal(APPLICATION_DATA, plain, &mut out[at..])?)
    }

    /// Seals an alert; close_notify is a warning.
    pub(super) fn seal_alert(&mut self, alert: AlertDescription, out: &mut [u8]) -> Result<usize, Error> {
        let level = if alert == AlertDescription::CloseNotify { WARNING } else { FATAL };
        self.seal.seal(ALERT, &[level, alert.into()], out)
    }

    /// What sealing so many bytes in full records may take.
    pub(super) fn room(len: usize) -> usize {
        const UPDATE: usize = OVERHEAD + KEY_UPDATE.len() + 1;
        len + len.div_ceil(MAX_PLAIN).max(1) * OVERHEAD + UPDATE
    }
}

/// The alert that tells an error of [`Records::open`] to the peer, unless it was the peer's own.
pub(super) fn alert_for(error: &Error) -> Option<AlertDescription> {
    match error {
        Error::AlertReceived(_) => None,
        Error::DecryptError => Some(AlertDescription::BadRecordMac),
        Error::PeerSentOversizedRecord => Some(AlertDescription::RecordOverflow),
        Error::InvalidMessage(InvalidMessage::MissingData(_)) => Some(AlertDescription::DecodeError),
        Error::InvalidMessage(_) => Some(AlertDescription::UnexpectedMessage),
        _ => Some(AlertDescription::InternalError),
    }
}

/// The AEAD of the suite that was agreed on.
fn algorithm(suite: &ConnectionTrafficSecrets) -> Result<&'static Algorithm, Error> {
    match suite {
        ConnectionTrafficSecrets::Aes128Gcm { .. } => Ok(&AES_128_GCM),
        ConnectionTrafficSecrets::Aes256Gcm { .. } => Ok(&AES_256_GCM),
        ConnectionTrafficSecrets::Chacha20Poly1305 { .. } => Ok(&CHACHA20_POLY1305),
        _ => Err(Error::General("a cipher suite that records are not made for".into())),
    }
}

/// One direction under one key.
#[derive(Debug)]
struct Half {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
    secret: Secret,
}

impl Half {
    fn new(algorithm: &'static Algorithm, secret: Secret, sequence: u64) -> Result<Self, Error> {
        let (key, iv) = secret.key(algorithm)?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence, secret })
    }

    /// The next key (RFC 8446 §7.2); records are counted anew.
    fn update(&mut self) -> Result<(), Error> {
        let algorithm = self.key.algorithm();
        *self = Self::new(algorithm, self.secret.next(algorithm)?, 0)?;
        Ok(())
    }

    /// RFC 8446 §5.3: the sequence number, left-padded, xor the IV. Fails instead of using one again.
    fn next_nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    fn seal(&mut self, kind: u8, plain: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        let sealed = plain.len() + SEALED_MORE;
        let record = out.get_mut(..RECORD_HEADER + sealed).ok_or(Error::EncryptError)?;
        let [high, low] = u16::try_from(sealed).map_err(|_| Error::EncryptError)?.to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, high, low];
        let (head, rest) = record.split_at_mut(RECORD_HEADER);
        head.copy_from_slice(&header);
        let (content, tag) = rest.split_at_mut(plain.len() + 1);
        content[..plain.len()].copy_from_slice(plain);
        content[plain.len()] = kind;
        let nonce = self.next_nonce()?;
        let made = self.key.seal_in_place_separate_tag(nonce, Aad::from(header), content);
        tag.copy_from_slice(made.map_err(|_| Error::EncryptError)?.as_ref());
        Ok(RECORD_HEADER + sealed)
    }

    /// Opens in place; the inner content type, and how many bytes of content there are after the header.
    fn open(&mut self, record: &mut [u8]) -> Result<(u8, usize), Error> {
        let Some((header, sealed)) = record.split_first_chunk_mut::<RECORD_HEADER>() else {
            return Err(InvalidMessage::MessageTooShort.into());
        };
        // A plain record has no place after the handshake, not even ChangeCipherSpec.
        if header[0] != APPLICATION_DATA {
            return Err(InvalidMessage::UnexpectedMessage("a record that is not sealed").into());
        }
        let nonce = self.next_nonce()?;
        let opened = self.key.open_in_place(nonce, Aad::from(*header), sealed);
        let content = opened.map_err(|_| Error::DecryptError)?;
        // The content type is the last byte that is not padding (RFC 8446 §5.4).
        let end = content.iter().rposition(|byte| *byte != 0);
        let end = end.ok_or(InvalidMessage::UnexpectedMessage("a record without a content type"))?;
        if end > MAX_PLAIN {
            return Err(Error::PeerSentOversizedRecord);
        }
        Ok((content[end], end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves() -> (Half, Half) {
        let half = || Half::new(&AES_128_GCM, Secret::new(&[7; 32]).unwrap(), 0).unwrap();
        (half(), half())
    }

    /// The two ends of a session.
    fn session(algorithm: &'static Algorithm) -> (Records, Records) {
        let end = |side, seal: u8, open: u8| {
            let half = |byte| Half::new(algorithm, Secret::new(&[byte; 48]).unwrap(), 0).unwrap();
            Records { seal: half(seal), open: half(open), side, owes_update: false }
        };
        (end(Side::Client, 1, 2), end(Side::Server, 2, 1))
    }

    /// Seals, and opens all that this became at the other end.
    fn carry(from: &mut Records, to: &mut Records, text: &[u8]) -> usize {
        let mut sealed = vec![0; Records::room(text.len())];
        let n = from.seal(text, &mut sealed).unwrap();
        let (mut at, mut records) = (0, 0);
        while at < n {
            let len = Records::record_len(&sealed[at..n]).unwrap().unwrap();
            if let Opened::Data(data) = to.open(&mut sealed[at..at + len]).unwrap() {
                assert_eq!(&sealed[at + RECORD_HEADER..][..data], text);
            }
            (at, records) = (at + len, records + 1);
        }
        records
    }

    #[test]
    fn a_key_is_replaced_before_its_limit_and_when_the_peer_asks() {
        for algorithm in [&AES_128_GCM, &AES_256_GCM, &CHACHA20_POLY1305] {
            let (mut client, mut server) = session(algorithm);
            assert_eq!(carry(&mut client, &mut server, b"under the first key"), 1);
            client.seal.sequence = KEY_LIMIT;
            server.open.sequence = KEY_LIMIT;
            assert_eq!(carry(&mut client, &mut server, b"a KeyUpdate goes before"), 2);
            assert_eq!((client.seal.sequence, server.open.sequence), (1, 1));
            assert_eq!(carry(&mut server, &mut client, b"the other way is as it was"), 1);
            // The peer asks for the same of us, however often: one goes out.
            for _ in 0..3 {
                let mut asks = [0; 64];
                let n = client.seal.seal(HANDSHAKE, &[KEY_UPDATE[0], 0, 0, 1, 1], &mut asks).unwrap();
                client.seal.update().unwrap();
                assert_eq!(server.open(&mut asks[..n]), Ok(Opened::Nothing));
            }
            assert_eq!(carry(&mut server, &mut client, b"as asked"), 2);
            assert_eq!(carry(&mut server, &mut client, b"once"), 1);
            assert_eq!(carry(&mut client, &mut server, b"under the fifth key"), 1);
        }
    }

    #[test]
    fn what_is_sealed_is_opened_and_in_order_only() {
        let (mut seal, mut open) = halves();
        let mut first = [0; 64];
        let mut second = [0; 64];
        let n = seal.seal(APPLICATION_DATA, b"one", &mut first).unwrap();
        assert_eq!(n, 3 + OVERHEAD);
        seal.seal(APPLICATION_DATA, b"two", &mut second).unwrap();
        let (mut again, mut early) = (first, second);
        assert_eq!(open.open(&mut first[..n]), Ok((APPLICATION_DATA, 3)));
        assert_eq!(&first[RECORD_HEADER..][..3], b"one");
        assert_eq!(open.open(&mut again[..n]), Err(Error::DecryptError), "a record comes once");
        let (_, mut open) = halves();
        assert_eq!(open.open(&mut early[..n]), Err(Error::DecryptError), "and in its turn");
    }

    #[test]
    fn a_changed_bit_anywhere_is_an_error() {
        for bit in 0..(3 + OVERHEAD) * 8 {
            let (mut seal, mut open) = halves();
            let mut record = [0; 3 + OVERHEAD];
            seal.seal(APPLICATION_DATA, b"one", &mut record).unwrap();
            record[bit / 8] ^= 1 << (bit % 8);
            assert!(open.open(&mut record).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_nonce_is_never_used_twice() {
        let (mut seal, _) = halves();
        seal.sequence = u64::MAX;
        assert_eq!(seal.seal(APPLICATION_DATA, b"", &mut [0; 64]), Err(Error::EncryptError));
    }

    #[test]
    fn lengths_are_bounded() {
        assert_eq!(Records::record_len(&[23, 3, 3, 0]), Ok(None));
        assert_eq!(Records::record_len(&[23, 3, 3, 1, 0]), Ok(Some(RECORD_HEADER + 256)));
        assert_eq!(Records::record_len(&[23, 3, 3, 0x41, 1]), Err(Error::PeerSentOversizedRecord));
        let (mut seal, mut open) = halves();
        let mut record = vec![0; MAX_PLAIN + 100];
        let n = seal.seal(APPLICATION_DATA, &vec![1; MAX_PLAIN + 1], &mut record).unwrap();
        assert_eq!(open.open(&mut record[..n]), Err(Error::PeerSentOversizedRecord));
        let (mut seal, mut open) = halves();
        let n = seal.seal(0, b"\0\0", &mut record).unwrap();
        assert!(open.open(&mut record[..n]).is_err(), "padding alone has no type");
        assert!(open.open(&mut []).is_err());
    }
}
