//! The TLS 1.3 handshake of a tunnel, by rustls; what it agreed on is given to [`Records`].
//!
//! Invariant: rustls sees no record after its handshake's last, so none is lost in a buffer of it: records are fed
//! one at a time, and what was read beyond stays with the caller.

use std::{io, sync::Arc};

use mesh_core::frame::ALPN;
use rustls::{
    ClientConfig, CommonState, Error, ExtractedSecrets, HandshakeKind, ServerConfig, Side,
    client::{ClientConnectionData, UnbufferedClientConnection},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;

use super::{
    records::Records,
    tls::{LinkError, read_some},
};
use crate::secrets::TrafficSecrets;

/// What a handshake may take at most: our own are 2 KB, and rustls takes messages of 64 KB.
const MAX_HANDSHAKE: usize = 80 * 1024;
/// What is read at once.
const READ: usize = 4096;

/// A handshake that came to its end.
#[derive(Debug)]
pub(super) struct Shaken {
    pub(super) records: Records,
    /// The peer's certificates, leaf first.
    pub(super) certificates: Vec<CertificateDer<'static>>,
    /// What the peer sent behind its last message of the handshake, still sealed.
    pub(super) rest: Vec<u8>,
}

/// The source's side.
pub(super) async fn connect(
    tcp: &TcpStream,
    config: Arc<ClientConfig>,
    to: ServerName<'static>,
) -> Result<Shaken, LinkError> {
    Handshake::new(UnbufferedClientConnection::new(config, to)?, Side::Client).run(tcp).await
}

/// The destination's side.
pub(super) async fn accept(tcp: &TcpStream, config: Arc<ServerConfig>) -> Result<Shaken, LinkError> {
    Handshake::new(UnbufferedServerConnection::new(config)?, Side::Server).run(tcp).await
}

/// What both sides of rustls have, by other types.
trait Session {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    /// The suite and the sequence numbers that the records begin with.
    fn agreed(self) -> Result<ExtractedSecrets, Error>;
}

impl Session for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn common(&self) -> &CommonState {
        self
    }
    fn agreed(self) -> Result<ExtractedSecrets, Error> {
        self.dangerous_into_kernel_connection().map(|(agreed, _)| agreed)
    }
}

impl Session for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn common(&self) -> &CommonState {
        self
    }
    fn agreed(self) -> Result<ExtractedSecrets, Error> {
        self.dangerous_into_kernel_connection().map(|(agreed, _)| agreed)
    }
}

struct Handshake<S> {
    session: S,
    side: Side,
    secrets: TrafficSecrets,
    incoming: Vec<u8>,
    /// How many bytes of `incoming` rustls may see: whole records.
    shown: usize,
    outgoing: Vec<u8>,
}

/// What the handshake needs next.
enum Need {
    /// Another turn.
    Nothing,
    /// A record more.
    Record,
    /// It is done.
    End,
}

impl<S: Session> Handshake<S> {
    fn new(session: S, side: Side) -> Self {
        let secrets = TrafficSecrets::default();
        Self { session, side, secrets, incoming: vec![], shown: 0, outgoing: vec![] }
    }

    async fn run(mut self, tcp: &TcpStream) -> Result<Shaken, LinkError> {
        loop {
            match self.turn() {
                Ok(Need::Nothing) => {}
                Ok(Need::Record) => {
                    if !self.show_record()? {
                        self.send(tcp).await?;
                        self.read(tcp).await?;
                    }
                }
                Ok(Need::End) => break,
                Err(error) => {
                    // rustls has an alert that says why. The peer may be gone; the error is what counts.
                    if self.encode_alert().is_ok() {
                        let _ = self.send(tcp).await;
                    }
                    return Err(error);
                }
            }
        }
        self.send(tcp).await?;
        let common = self.session.common();
        // Tickets are off, and a resumed session would not show the peer's certificate of now.
        if common.alpn_protocol() != Some(ALPN) || common.handshake_kind() == Some(HandshakeKind::Resumed) {
            return Err(LinkError::Version);
        }
        let chain = common.peer_certificates().unwrap_or_default();
        let certificates = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let records = Records::new(&self.session.agreed()?, self.side, self.secrets)?;
        Ok(Shaken { records, certificates, rest: self.incoming })
    }

    fn turn(&mut self) -> Result<Need, LinkError> {
        let Self { session, incoming, shown, .. } = self;
        let UnbufferedStatus { discard, state } =
            self.secrets.hear(|| session.process(&mut incoming[..*shown]));
        let need = match state? {
            ConnectionState::EncodeTlsData(data) => {
                encode(data, &mut self.outgoing)?;
                Need::Nothing
            }
            ConnectionState::TransmitTlsData(sent) => {
                sent.done();
                Need::Nothing
            }
            ConnectionState::BlockedHandshake => Need::Record,
            ConnectionState::WriteTraffic(_) => Need::End,
            ConnectionState::PeerClosed | ConnectionState::Closed => return Err(LinkError::Closed),
            _ => return Err(LinkError::OutOfTurn),
        };
        self.incoming.drain(..discard);
        self.shown -= discard;
        Ok(match need {
            // A server may send before the client's Finished has come; the handshake is not over.
            Need::End if self.session.common().is_handshaking() => Need::Record,
            need => need,
        })
    }

    /// Shows rustls the next record, if it is there as a whole.
    fn show_record(&mut self) -> Result<bool, LinkError> {
        let rest = &self.incoming[self.shown..];
        let whole = Records::record_len(rest)?.filter(|len| *len <= rest.len());
        self.shown += whole.unwrap_or(0);
        Ok(whole.is_some())
    }

    async fn read(&mut self, tcp: &TcpStream) -> Result<(), LinkError> {
        let end = self.incoming.len();
        if end > MAX_HANDSHAKE {
            return Err(Error::PeerSentOversizedRecord.into());
        }
        self.incoming.resize(end + READ, 0);
        let n = loop {
            tcp.readable().await?;
            match read_some(tcp, &mut self.incoming[end..]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => break other?,
            }
        };
        self.incoming.truncate(end + n);
        if n == 0 { Err(LinkError::Truncated) } else { Ok(()) }
    }

    async fn send(&mut self, tcp: &TcpStream) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.outgoing.len() {
            match tcp.try_write(&self.outgoing[sent..]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => tcp.writable().await?,
                Err(error) => return Err(error),
            }
        }
        self.outgoing.clear();
        Ok(())
    }

    fn encode_alert(&mut self) -> Result<(), LinkError> {
        match self.session.process(&mut []).state? {
            ConnectionState::EncodeTlsData(data) => encode(data, &mut self.outgoing),
            _ => Ok(()),
        }
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), LinkError> {
    let at = outgoing.len();
    loop {
        match data.encode(&mut outgoing[at..]) {
            Ok(_) => return Ok(()),
            Err(EncodeError::InsufficientSize(needs)) => outgoing.resize(at + needs.required_size, 0),
            Err(error) => return Err(io::Error::other(error.to_string()).into()),
        }
    }
}
