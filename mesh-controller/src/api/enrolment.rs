//! How a machine becomes a node: a join token, or its pod's service-account token, for a certificate.

use mesh_core::{
    identity::SpiffeId,
    wire::proto::{Certificate, JoinRequest},
};
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

use super::{Api, services::enrolment_server::Enrolment, tls::Peer};
use crate::{
    attest::AttestError,
    metrics::{CertificateKind, JoinLabels, JoinResult, Limit},
    token::TokenError,
};

#[tonic::async_trait]
impl Enrolment for Api {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<Certificate>, Status> {
        let from = request.extensions().get::<Peer>().map(|peer| peer.address);
        let request = request.into_inner();
        let node = request.node.clone();
        let joined = match from {
            // Before anything is signed or looked up.
            Some(from) if !self.limits.may_join(from.ip(), Instant::now().into_std()) => {
                self.metrics.limit_hit(Limit::joins);
                Err(Status::resource_exhausted("too many joins from this address; try again in a second"))
            }
            _ => admit(self, request).await,
        };
        let result = match &joined {
            Ok(_) => {
                tracing::info!(%node, ?from, "node joined");
                JoinResult::ok
            }
            Err(status) => {
                let shown: String = node.chars().take(100).collect();
                tracing::warn!(node = shown, ?from, reason = status.message(), "join refused");
                if status.code() == Code::Internal { JoinResult::failed } else { JoinResult::refused }
            }
        };
        self.metrics.joins.get_or_create(&JoinLabels { result }).inc();
        joined.map(Response::new)
    }
}

async fn admit(api: &Api, request: JoinRequest) -> Result<Certificate, Status> {
    let id = SpiffeId::node(&api.trust_domain, &request.node)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    // Signed before the token is used up: a request that cannot be signed leaves the token good.
    let certificate = api.sign(&request.csr_der, &id)?;
    match request.service_account_token.as_str() {
        "" => redeem(api, request).await?,
        token => attest(api, token, &request.node).await.map_err(unattested)?,
    }
    api.count_certificate(CertificateKind::node);
    Ok(certificate)
}

async fn redeem(api: &Api, request: JoinRequest) -> Result<(), Status> {
    // Until then an agent may come that knows of uses of this token that this state has forgotten.
    api.hub.settled().await;
    let (tokens, now) = (api.tokens.clone(), api.clock.now());
    let redeemed = tokio::task::spawn_blocking(move || tokens.redeem(&request.token, &request.node, now));
    redeemed.await.map_err(|error| Status::internal(error.to_string()))?.map_err(refusal)
}

async fn attest(api: &Api, token: &str, node: &str) -> Result<(), AttestError> {
    api.attestor.as_ref().ok_or(AttestError::Off)?.check(token, node, api.clock.now()).await
}

/// Unauthenticated: another token may do. Permission denied: something has to be put right first.
fn unattested(error: AttestError) -> Status {
    let text = error.to_string();
    match error {
        AttestError::Expired(_) | AttestError::Refused(_) | AttestError::PodGone { .. } => {
            Status::unauthenticated(text)
        }
        AttestError::Off
        | AttestError::Malformed
        | AttestError::Audience { .. }
        | AttestError::Account { .. }
        | AttestError::Unbound
        | AttestError::OtherNode { .. } => Status::permission_denied(text),
        AttestError::Forbidden(_) => {
            tracing::error!(error = text, "service-account tokens cannot be reviewed");
            Status::internal(text)
        }
        AttestError::Unreachable(_) => Status::unavailable(text),
    }
}

fn refusal(error: TokenError) -> Status {
    match error {
        TokenError::Malformed
        | TokenError::OtherNode(_)
        | TokenError::Unknown
        | TokenError::Expired
        | TokenError::NodeName { .. } => Status::unauthenticated(error.to_string()),
        TokenError::Store(_) | TokenError::Damaged { .. } => {
            tracing::error!(%error, "join tokens cannot be used");
            Status::internal("the controller cannot read its join tokens; see its log")
        }
    }
}
