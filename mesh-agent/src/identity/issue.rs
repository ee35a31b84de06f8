//! Asks the controller for certificates, over the channel that the node's own certificate opens.

use mesh_core::{identity::SpiffeId, wire::proto};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tonic::{Response, Status, transport::Channel};

use super::credential::{Credential, CredentialError, KeyRequest};
use crate::rpc::{CALL_TIMEOUT, NodeClient};

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

/// A new certificate for the node itself; it has to lead to one of `roots`.
pub async fn renew(
    channel: Channel,
    id: &SpiffeId,
    roots: &[CertificateDer<'static>],
) -> Result<Credential, IssueError> {
    let request = KeyRequest::new(id)?;
    let message = proto::RenewRequest { csr_der: request.csr_der() };
    let answer = in_time(NodeClient::new(channel).renew(message)).await?;
    Ok(request.complete(answer, roots, OffsetDateTime::now_utc())?)
}

/// A certificate for an identity of a workload of this node; it has to lead to one of `roots`.
pub async fn certify(
    channel: Channel,
    id: &SpiffeId,
    roots: &[CertificateDer<'static>],
) -> Result<Credential, IssueError> {
    let request = KeyRequest::new(id)?;
    let message = proto::CertifyRequest { identity: id.to_string(), csr_der: request.csr_der() };
    let answer = in_time(NodeClient::new(channel).certify(message)).await?;
    Ok(request.complete(answer, roots, OffsetDateTime::now_utc())?)
}

async fn in_time(
    call: impl Future<Output = Result<Response<proto::Certificate>, Status>>,
) -> Result<proto::Certificate, IssueError> {
    let answer = tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| IssueError::Timeout)?;
    Ok(answer.map_err(Box::new)?.into_inner())
}
