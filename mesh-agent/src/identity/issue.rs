//! Asks the controller for certificates, over the channel that the node's own certificate opens.

use mesh_core::{identity::SpiffeId, wire::proto};
use rustls_pki_types::CertificateDer;
use time::Duration;
use tonic::{Response, Status, transport::Channel};

use super::credential::{Credential, CredentialError, KeyRequest};
use crate::{
    rpc::{CALL_TIMEOUT, NodeClient, skew},
    surroundings::Clock,
};

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The controller said no, or could not be asked.
    #[error("the controller did not issue it: {} ({:?})", .0.message(), .0.code())]
    Refused(#[from] Box<Status>),
    /// Nothing came in time.
    #[error("the controller did not answer within {CALL_TIMEOUT:?}")]
    Timeout,
    /// What came cannot be used.
    #[error("what the controller issued cannot be used: {0}")]
    Answer(#[from] CredentialError),
}

/// A certificate, and what its answer told of clocks.
#[derive(Debug)]
pub struct Issued {
    /// The key and its certificates.
    pub credential: Credential,
    /// How far our clock is ahead of the controller's; `None` when it did not say its time.
    pub skew: Option<Duration>,
}

/// Takes the controller's answer to a request.
pub(super) fn complete(
    request: KeyRequest,
    answer: proto::Certificate,
    roots: &[CertificateDer<'static>],
    clock: &Clock,
) -> Result<Issued, CredentialError> {
    let now = clock.now();
    let skew = skew(now, answer.now_unix_ms);
    Ok(Issued { credential: request.complete(answer, roots, now)?, skew })
}

/// A new certificate for the node itself; it has to lead to one of `roots`.
pub async fn renew(
    channel: Channel,
    id: &SpiffeId,
    roots: &[CertificateDer<'static>],
    clock: &Clock,
) -> Result<Issued, IssueError> {
    let request = KeyRequest::new(id)?;
    let message = proto::RenewRequest { csr_der: request.csr_der() };
    let answer = in_time(NodeClient::new(channel).renew(message)).await?;
    Ok(complete(request, answer, roots, clock)?)
}

/// A certificate for an identity of a workload of this node; it has to lead to one of `roots`.
pub async fn certify(
    channel: Channel,
    id: &SpiffeId,
    roots: &[CertificateDer<'static>],
    clock: &Clock,
) -> Result<Issued, IssueError> {
    let request = KeyRequest::new(id)?;
    let message = proto::CertifyRequest { identity: id.to_string(), csr_der: request.csr_der() };
    let answer = in_time(NodeClient::new(channel).certify(message)).await?;
    Ok(complete(request, answer, roots, clock)?)
}

async fn in_time(
    call: impl Future<Output = Result<Response<proto::Certificate>, Status>>,
) -> Result<proto::Certificate, IssueError> {
    let answer = tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| IssueError::Timeout)?;
    Ok(answer.map_err(Box::new)?.into_inner())
}
