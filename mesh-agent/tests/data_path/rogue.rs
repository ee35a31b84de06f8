//! A peer that speaks TLS and frames by hand, as badly as a test wants, with certificates that it makes itself.

use std::{io, sync::Arc};

use bytes::BytesMut;
use mesh_core::frame::{ALPN, Control, HEADER_LEN, Header, Kind, Open};
use rcgen::CertificateParams;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::ring,
    version::{TLS12, TLS13},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::world::*;

/// A certificate and its key.
pub(crate) type Papers = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// A certificate with these URI names, changed as wanted before it is signed.
pub(crate) fn papers(ca: &Ca, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Papers {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names.iter().map(|name| uri(name)).collect();
    change(&mut params);
    ca.sign(params)
}

/// The certificate that the client's agent has.
pub(crate) fn clients(ca: &Ca) -> Papers {
    papers(ca, &[&identity("client").to_string()], |_| {})
}

/// How a rogue begins.
pub(crate) struct Hello {
    pub(crate) papers: Option<Papers>,
    pub(crate) alpn: &'static [u8],
    pub(crate) version: &'static SupportedProtocolVersion,
}

impl Hello {
    /// As an agent does, with this certificate.
    pub(crate) fn with(papers: Papers) -> Self {
        Self { papers: Some(papers), alpn: ALPN, version: &TLS13 }
    }

    /// A session that has not said a word.
    pub(crate) fn session(self) -> ClientConnection {
        let name = ServerName::IpAddress(ip(WEB).into());
        ClientConnection::new(Arc::new(self.config()), name).expect("a session")
    }

    fn config(self) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[self.version])
            .expect("the provider has it")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone));
        let mut config = match self.papers {
            None => builder.with_no_client_auth(),
            Some((leaf, key)) => {
                builder.with_client_auth_cert(vec![leaf], key).expect("they belong together")
            }
        };
        config.alpn_protocols = if self.alpn.is_empty() { vec![] } else { vec![self.alpn.to_vec()] };
        config
    }
}

/// A tunnel with a rogue at our end of it.
pub(crate) struct Rogue {
    pub(crate) stream: TlsStream<TcpStream>,
}

impl Rogue {
    /// Opens a tunnel from this address. TLS 1.3 lets a client believe that it is through before its certificate was
    /// looked at, so success says nothing.
    pub(crate) async fn dial(from: &str, to: std::net::SocketAddr, hello: Hello) -> io::Result<Self> {
        let tcp = connect_from(from, to).await?;
        let name = ServerName::IpAddress(to.ip().into());
        let stream = in_time(TlsConnector::from(Arc::new(hello.config())).connect(name, tcp)).await?;
        Ok(Self { stream: stream.into() })
    }

    /// A tunnel of the client's agent that has heard SETTINGS.
    pub(crate) async fn client(world: &World, to: std::net::SocketAddr) -> Self {
        let mut rogue = Self::dial(CLIENT, to, Hello::with(clients(&world.ca))).await.expect("shakes hands");
        assert_eq!(rogue.hear().await.expect("SETTINGS"), Control::Settings(1));
        rogue
    }

    /// Takes a tunnel, as the destination with this certificate.
    pub(crate) async fn take(tcp: TcpStream, (leaf, key): Papers) -> io::Result<Self> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13, &TLS12])
            .expect("the provider has them")
            .with_no_client_auth()
            .with_single_cert(vec![leaf], key)
            .expect("they belong together");
        config.alpn_protocols = vec![ALPN.to_vec()];
        let stream = in_time(TlsAcceptor::from(Arc::new(config)).accept(tcp)).await?;
        Ok(Self { stream: stream.into() })
    }

    /// Changes its keys with the next bytes, and asks for the same of the agent (RFC 8446 §4.6.3).
    pub(crate) fn change_keys(&mut self) {
        let TlsStream::Client(stream) = &mut self.stream else { panic!("a rogue that dialled") };
        stream.get_mut().1.refresh_traffic_keys().expect("TLS 1.3 can");
    }

    /// Sends bytes inside of the tunnel.
    pub(crate) async fn say(&mut self, bytes: &[u8]) {
        // An agent that has had enough may be gone before the last byte.
        let _ = in_time(async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        })
        .await;
    }

    /// The next frame; DATA is stepped over.
    pub(crate) async fn hear(&mut self) -> io::Result<Control> {
        in_time(async {
            loop {
                let mut head = [0; HEADER_LEN];
                self.stream.read_exact(&mut head).await?;
                let header = Header::decode(head).expect("an agent's frames are good");
                let mut payload = vec![0; header.len];
                self.stream.read_exact(&mut payload).await?;
                if header.kind != Kind::Data {
                    return Ok(
                        Control::decode(header.kind, payload.into()).expect("an agent's frames are good")
                    );
                }
            }
        })
        .await
    }

    /// The agent ends the tunnel, whatever it still says.
    pub(crate) async fn ends(mut self) {
        while self.hear().await.is_ok() {}
    }
}

/// OPEN from the client's own address.
pub(crate) fn open(port: u16) -> Vec<u8> {
    open_from(CLIENT, port)
}

pub(crate) fn open_from(source: &str, port: u16) -> Vec<u8> {
    frame(&Control::Open(Open { source: (ip(source), 4000).into(), port }))
}

pub(crate) fn frame(control: &Control) -> Vec<u8> {
    let mut out = BytesMut::new();
    control.encode(&mut out);
    out.to_vec()
}

pub(crate) fn data(bytes: &[u8]) -> Vec<u8> {
    [&Header { kind: Kind::Data, len: bytes.len() }.encode()[..], bytes].concat()
}

/// Takes any server for what it says.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
