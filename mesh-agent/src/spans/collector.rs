//! The way to the collector of spans: in plaintext or by TLS, opened when it is first needed and anew whenever it was lost.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

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
    Code, Request, Status,
    client::Grpc,
    transport::{Channel, Endpoint},
};

use super::{
    Tracing, Whose,
    otlp::{self, EXPORT, ExportRequest, ExportResponse},
    post::Post,
};
use crate::{config::TracingProtocol, rpc::CONNECT_TIMEOUT};

/// Why there is no collector.
#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    /// The setting is no place.
    #[error("--tracing-endpoint {0}: write http://HOST:PORT or https://HOST:PORT, as in {1}")]
    NoPlace(String, &'static str),
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

/// Why spans were not taken.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub(super) struct NotTaken {
    /// They may be, the next time.
    pub(super) again: bool,
    /// Not before that time has passed.
    pub(super) after: Option<Duration>,
    why: String,
}

impl NotTaken {
    pub(super) fn again(why: impl ToString) -> Self {
        Self { again: true, after: None, why: why.to_string() }
    }

    pub(super) fn after(self, after: Option<Duration>) -> Self {
        Self { after, ..self }
    }

    pub(super) fn never(why: impl ToString) -> Self {
        Self { again: false, after: None, why: why.to_string() }
    }
}

impl From<Status> for NotTaken {
    /// What OTLP says may be tried again ("OTLP/gRPC Response", failures), and what tonic makes of a lost connection.
    fn from(status: Status) -> Self {
        let again = matches!(
            status.code(),
            Code::Cancelled
                | Code::DeadlineExceeded
                | Code::Aborted
                | Code::OutOfRange
                | Code::Unavailable
                | Code::DataLoss
                | Code::ResourceExhausted
                | Code::Unknown
        );
        Self { again, after: None, why: status.to_string() }
    }
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Where the collector is.
#[derive(Clone)]
pub(super) struct Server {
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl Server {
    pub(super) async fn open(&self) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        Ok(match &self.tls {
            None => Box::new(stream),
            Some((tls, name)) => Box::new(tls.connect(name.clone(), stream).await?),
        })
    }
}

/// Who takes spans, and whose node they are of.
pub(super) struct Collector {
    way: Way,
    node: String,
}

enum Way {
    Grpc(Channel),
    Http(Post),
}

impl Collector {
    pub(super) fn new(tracing: &Tracing, node: &str) -> Result<Self, CollectorError> {
        let no_place = || CollectorError::NoPlace(tracing.endpoint.clone(), example(tracing.protocol));
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
        if uri.query().is_some() {
            return Err(no_place());
        }
        let server = Server { host, port, tls };
        let way = match tracing.protocol {
            TracingProtocol::Grpc if !matches!(uri.path(), "" | "/") => return Err(no_place()),
            TracingProtocol::Grpc => Way::Grpc(channel(uri, server).ok_or_else(no_place)?),
            TracingProtocol::Http => Way::Http(Post::new(&uri, server).ok_or_else(no_place)?),
        };
        Ok(Self { way, node: node.to_owned() })
    }

    /// Spans by their workloads: so many of these at most as there are spans.
    pub(super) fn request(&self, spans: Vec<(Whose, otlp::Span)>) -> ExportRequest {
        let mut groups: Vec<Group> = vec![];
        for (whose, span) in spans {
            match groups.iter_mut().find(|group| group.whose.is(&whose)) {
                Some(group) => group.spans.push(span),
                None => {
                    let resource = whose.resource(&self.node);
                    // Another version of it, of which nothing else is said.
                    match groups.iter_mut().find(|group| group.resource == resource) {
                        Some(group) => group.spans.push(span),
                        None => groups.push(Group { whose, resource, spans: vec![span] }),
                    }
                }
            }
        }
        ExportRequest { resource_spans: groups.into_iter().map(Group::told).collect() }
    }

    pub(super) async fn export(&mut self, request: ExportRequest) -> Result<ExportResponse, NotTaken> {
        match &mut self.way {
            Way::Grpc(channel) => {
                let mut grpc = Grpc::new(channel.clone());
                grpc.ready().await.map_err(NotTaken::again)?;
                let codec = tonic_prost::ProstCodec::default();
                let path = PathAndQuery::from_static(EXPORT);
                Ok(grpc.unary(Request::new(request), path, codec).await?.into_inner())
            }
            Way::Http(post) => post.export(&request).await,
        }
    }
}

/// Spans of one workload.
struct Group {
    whose: Whose,
    resource: otlp::Resource,
    spans: Vec<otlp::Span>,
}

impl Group {
    fn told(self) -> otlp::ResourceSpans {
        let scope =
            otlp::Scope { name: "nodemesh".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
        let schema_url = otlp::SCHEMA.to_owned();
        let scope_spans =
            otlp::ScopeSpans { scope: Some(scope), spans: self.spans, schema_url: schema_url.clone() };
        otlp::ResourceSpans { resource: Some(self.resource), scope_spans: vec![scope_spans], schema_url }
    }
}

/// TLS is ours, so that tonic need not know of it; the collector is told what was asked for all the same.
fn channel(uri: Uri, server: Server) -> Option<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", uri.authority()?)).ok()?;
    let endpoint = endpoint.origin(uri).connect_timeout(CONNECT_TIMEOUT);
    Some(endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let server = server.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(server.open().await?)) }
    })))
}

const fn example(protocol: TracingProtocol) -> &'static str {
    match protocol {
        TracingProtocol::Grpc => "http://127.0.0.1:4317, without a path",
        TracingProtocol::Http => "http://127.0.0.1:4318, or with the path at which it takes spans",
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
    config.alpn_protocols = match tracing.protocol {
        TracingProtocol::Grpc => vec![b"h2".to_vec()],
        TracingProtocol::Http => vec![b"http/1.1".to_vec()],
    };
    Ok(config)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mesh_core::model::{Mode, Name, Workload};

    use super::*;

    fn workload(name: &str, uid: &str) -> Arc<Workload> {
        Arc::new(Workload {
            name: Name::new("shop", name),
            uid: uid.to_owned(),
            node: "node-a".to_owned(),
            service_account: "web".to_owned(),
            addresses: vec![],
            labels: BTreeMap::new(),
            enrolled: true,
            captured: true,
            mode: Mode::Permissive,
            checks: vec![],
        })
    }

    #[tokio::test]
    async fn a_batch_has_each_workload_once() {
        let (endpoint, share) = ("http://127.0.0.1:4317".to_owned(), "1%".parse().unwrap());
        let tracing = Tracing { endpoint, protocol: TracingProtocol::Grpc, roots: None, share };
        let collector = Collector::new(&tracing, "node-a").unwrap();
        // The last but one is the first as a newer view has it, and the last a pod that has its name.
        let known = [workload("web", "1"), workload("db", "2"), workload("web", "1"), workload("web", "3")];
        let gone = Name::new("shop", "gone");
        let each = known.iter().map(|it| Whose { name: it.name.clone(), workload: Some(it.clone()) });
        let each: Vec<_> = each.chain([Whose { name: gone, workload: None }]).collect();
        let spans = each.iter().chain(&each).enumerate().map(|(index, whose)| {
            let name = index.to_string();
            (whose.clone(), otlp::Span { name, ..otlp::Span::default() })
        });
        let request = collector.request(spans.collect());
        let told: Vec<Vec<_>> = request
            .resource_spans
            .iter()
            .map(|it| it.scope_spans[0].spans.iter().map(|span| span.name.as_str()).collect())
            .collect();
        assert_eq!(told, [vec!["0", "2", "5", "7"], vec!["1", "6"], vec!["3", "8"], vec!["4", "9"]]);
    }
}
