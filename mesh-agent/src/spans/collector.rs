//! The way to the collector of spans: in plaintext or by TLS, opened when it is first needed and anew whenever it was lost.

use std::{path::PathBuf, sync::Arc};

use http::{Uri, uri::PathAndQuery};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::{
    Request, Status,
    client::Grpc,
    transport::{Channel, Endpoint},
};

use super::{
    Tracing,
    otlp::{self, EXPORT, ExportRequest, ExportResponse, attribute},
};
use crate::rpc::CONNECT_TIMEOUT;

/// Why there is no collector.
#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    /// The setting is no place.
    #[error(
        "--tracing-endpoint {0}: write http://HOST:PORT or https://HOST:PORT, as in http://127.0.0.1:4317"
    )]
    NoPlace(String),
    /// Its roots cannot be read.
    #[error("--tracing-roots {}: {error}; it has to be a file of certificates in PEM", path.display())]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why.
        error: String,
    },
    /// There are none.
    #[error(
        "--tracing-endpoint has https, and the system trusts no roots: give --tracing-roots, or set SSL_CERT_FILE"
    )]
    NoRoots,
    /// TLS cannot be set up.
    #[error("no TLS to the collector of spans: {0}")]
    Tls(#[from] rustls::Error),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Who takes spans, and what it is told of who sends them.
#[derive(Debug)]
pub(super) struct Collector {
    channel: Channel,
    resource: otlp::Resource,
}

impl Collector {
    pub(super) fn new(tracing: &Tracing, node: &str) -> Result<Self, CollectorError> {
        let no_place = || CollectorError::NoPlace(tracing.endpoint.clone());
        let uri: Uri = tracing.endpoint.parse().map_err(|_| no_place())?;
        let host = uri.host().ok_or_else(no_place)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().ok_or_else(no_place)?;
        let tls = match uri.scheme_str() {
            Some("http") => None,
            Some("https") => {
                let name = ServerName::try_from(host.clone()).map_err(|_| no_place())?;
                Some((TlsConnector::from(Arc::new(config(tracing)?)), name))
            }
            _ => return Err(no_place()),
        };
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(no_place());
        }
        // TLS is ours, so that tonic need not know of it; the collector is told what was asked for all the same.
        let endpoint = Endpoint::from_shared(format!("http://{}", uri.authority().ok_or_else(no_place)?));
        let endpoint = endpoint.map_err(|_| no_place())?.origin(uri).connect_timeout(CONNECT_TIMEOUT);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let (host, tls) = (host.clone(), tls.clone());
            async move {
                let stream = TcpStream::connect((host.as_str(), port)).await?;
                let stream: Box<dyn Stream> = match tls {
                    None => Box::new(stream),
                    Some((tls, name)) => Box::new(tls.connect(name, stream).await?),
                };
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        }));
        let resource = otlp::Resource {
            attributes: vec![
                attribute("service.name", "nodemesh-agent"),
                attribute("service.version", env!("CARGO_PKG_VERSION")),
                attribute("service.instance.id", node),
                attribute("host.name", node),
            ],
        };
        Ok(Self { channel, resource })
    }

    pub(super) fn request(&self, spans: Vec<otlp::Span>) -> ExportRequest {
        let scope =
            otlp::Scope { name: "nodemesh".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
        let schema_url = otlp::SCHEMA.to_owned();
        let scope_spans =
            vec![otlp::ScopeSpans { scope: Some(scope), spans, schema_url: schema_url.clone() }];
        let resource = Some(self.resource.clone());
        ExportRequest { resource_spans: vec![otlp::ResourceSpans { resource, scope_spans, schema_url }] }
    }

    pub(super) async fn export(&self, request: ExportRequest) -> Result<ExportResponse, Status> {
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let codec = tonic_prost::ProstCodec::default();
        let path = PathAndQuery::from_static(EXPORT);
        grpc.unary(Request::new(request), path, codec).await.map(tonic::Response::into_inner)
    }
}

fn config(tracing: &Tracing) -> Result<ClientConfig, CollectorError> {
    let mut roots = RootCertStore::empty();
    match &tracing.roots {
        Some(path) => {
            let wrong = |error: String| CollectorError::Roots { path: path.clone(), error };
            let found = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
            for root in found {
                let root = root.map_err(|error| wrong(error.to_string()))?;
                roots.add(root).map_err(|error| wrong(error.to_string()))?;
            }
            if roots.is_empty() {
                return Err(wrong("there is no certificate in it".to_owned()));
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(CollectorError::NoRoots);
            }
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let mut config =
        builder.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
