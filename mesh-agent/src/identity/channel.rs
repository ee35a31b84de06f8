//! The authenticated connection to the controller: mutual TLS, and the peer has to be the controller, not merely
//! somebody of the trust domain.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use mesh_core::identity::{SpiffeId, Subject};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::Channel;

use super::verify::{CertificateIdentityError, explain, peer_identity};
use crate::{
    config::HostPort,
    rpc::{self, CONNECT_TIMEOUT},
    surroundings::{Dial, Stream},
};

/// What gRPC is called in TLS (RFC 9113 §3.2).
pub const ALPN_H2: &[u8] = b"h2";

/// Why there is no connection to the controller.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// TCP.
    #[error("cannot connect to {controller}: {source}")]
    Dial {
        /// The controller's address.
        controller: HostPort,
        /// The kernel's or the resolver's error.
        source: io::Error,
    },
    /// TLS.
    #[error("the TLS handshake with {controller} failed: {}", reason(.source))]
    Handshake {
        /// The controller's address.
        controller: HostPort,
        /// The handshake's error; rustls' own is inside.
        source: io::Error,
    },
    /// Nothing came in time.
    #[error("{0} did not answer within {CONNECT_TIMEOUT:?}")]
    Timeout(HostPort),
    /// The certificate names nobody.
    #[error("{controller} does not say who it is: {error}")]
    Nobody {
        /// The controller's address.
        controller: HostPort,
        /// What is wrong with its certificate.
        error: CertificateIdentityError,
    },
    /// A node or a workload answers in the controller's place.
    #[error("{controller} is {found}, not the controller")]
    NotController {
        /// The controller's address.
        controller: HostPort,
        /// Who answered.
        found: SpiffeId,
    },
}

impl ConnectError {
    /// Whether another attempt may succeed without anything being put right.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Dial { .. } | Self::Timeout(_) => true,
            Self::Handshake { .. } => !self.is_untrusted(),
            Self::Nobody { .. } | Self::NotController { .. } => false,
        }
    }

    /// Whether the peer's certificate was not taken.
    pub fn is_untrusted(&self) -> bool {
        let Self::Handshake { source, .. } = self else { return false };
        matches!(of_tls(source), Some(rustls::Error::InvalidCertificate(_)))
    }
}

fn of_tls(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn reason(error: &io::Error) -> String {
    of_tls(error).map_or_else(|| error.to_string(), explain)
}

/// A channel to the controller. Each connection of it ends when the certificate that it was made with is replaced:
/// the controller does not serve a connection beyond the life of the certificate that opened it, and a connection that
/// is in use would otherwise never be made anew.
pub fn controller_channel(
    controller: HostPort,
    dial: Dial,
    tls: watch::Receiver<Arc<ClientConfig>>,
) -> Channel {
    rpc::channel(move || {
        let (controller, dial, mut tls) = (controller.clone(), dial.clone(), tls.clone());
        let config = tls.borrow_and_update().clone();
        async move {
            let (stream, _) = open(&controller, &dial, config).await?;
            let replaced = Box::pin(async move {
                // Without its sender the configuration is the last; the connection may live on.
                if tls.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            });
            Ok::<_, ConnectError>(UntilReplaced { stream, replaced })
        }
    })
}

/// A stream that reads as ended once its certificate was replaced. The reader is always waiting, as HTTP/2's is.
struct UntilReplaced {
    stream: TlsStream<Box<dyn Stream>>,
    replaced: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl AsyncRead for UntilReplaced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.replaced.as_mut().poll(context) {
            Poll::Ready(()) => {
                self.replaced = Box::pin(std::future::ready(()));
                Poll::Ready(Ok(()))
            }
            Poll::Pending => Pin::new(&mut self.stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for UntilReplaced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// One connection to the controller, and who it is: its identity is the controller's, in the trust domain that the
/// configuration's verifier let pass.
pub(super) async fn open(
    controller: &HostPort,
    dial: &Dial,
    tls: Arc<ClientConfig>,
) -> Result<(TlsStream<Box<dyn Stream>>, SpiffeId), ConnectError> {
    let connecting = async {
        let stream = dial
            .connect(&controller.host, controller.port)
            .await
            .map_err(|source| ConnectError::Dial { controller: controller.clone(), source })?;
        // No name is checked and none is sent: the certificate's SPIFFE ID is what counts.
        let name = ServerName::try_from("controller").expect("a valid DNS name");
        TlsConnector::from(tls)
            .connect(name, stream)
            .await
            .map_err(|source| ConnectError::Handshake { controller: controller.clone(), source })
    };
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| ConnectError::Timeout(controller.clone()))??;
    let found = peer_identity(stream.get_ref().1.peer_certificates())
        .map_err(|error| ConnectError::Nobody { controller: controller.clone(), error })?;
    match found.subject() {
        Subject::Controller => Ok((stream, found)),
        Subject::Node(_) | Subject::Workload { .. } => {
            Err(ConnectError::NotController { controller: controller.clone(), found })
        }
    }
}
