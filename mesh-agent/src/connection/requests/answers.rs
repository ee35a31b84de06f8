//! What a request is answered with: what its backend said, or a word of our own, which tells nobody outside why.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header, response};
use hyper_util::rt::TokioIo;
use mesh_core::refusal::Reason;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    body::{Body, Coming},
    exchange::Exchange,
    heads::{self, Form},
    upstream,
};
use crate::refusal::Refusal;

/// gRPC's status for what is more than somebody takes.
const RESOURCE_EXHAUSTED: u16 = 8;
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// Why a request is answered by ourselves.
#[derive(Debug)]
pub(in crate::connection) struct Declined {
    status: StatusCode,
    /// What the client is told besides, if anything.
    more: Option<Box<More>>,
    refusal: Refusal,
}

/// What a client is told besides a status.
#[derive(Debug)]
struct More {
    /// But for one of gRPC.
    headers: HeaderMap,
    /// The status of a call, if it is none that follows from the other.
    call: Option<Call>,
}

impl Declined {
    pub(in crate::connection) fn new(status: StatusCode, refusal: impl Into<Refusal>) -> Self {
        Self { status, more: None, refusal: refusal.into() }
    }

    /// Its client has not shown who it is.
    pub(in crate::connection) fn unauthorized(challenge: &'static str, refusal: Refusal) -> Self {
        // What has to be shown instead (RFC 9110, section 11.6.1).
        let mut headers = HeaderMap::new();
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        let more = Some(Box::new(More { headers, call: None }));
        Self { more, ..Self::new(StatusCode::UNAUTHORIZED, refusal) }
    }

    /// It is more than its destination takes. `wait`: for how long it is.
    pub(in crate::connection) fn exhausted(
        status: StatusCode,
        headers: HeaderMap,
        wait: Option<Duration>,
        refusal: Refusal,
    ) -> Self {
        let call = Some(Call { status: RESOURCE_EXHAUSTED, wait });
        Self { more: Some(Box::new(More { headers, call })), ..Self::new(status, refusal) }
    }
}

/// How a call ends that is not answered by its server.
#[derive(Debug)]
struct Call {
    status: u16,
    /// It may be tried again after this (gRPC A6, "Pushback").
    wait: Option<Duration>,
}

impl Call {
    fn ended(&self) -> Response<Body> {
        let mut response = call_ended(self.status);
        if let Some(wait) = self.wait {
            // Not a moment too early.
            let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).saturating_add(1);
            response.headers_mut().insert(PUSHBACK, millis.into());
        }
        response
    }
}

/// Who answers a request.
pub(in crate::connection) enum Answered {
    /// We do.
    Here(Response<Body>),
    /// The backend did; the connection that it came by, if others may use it.
    Backend(response::Parts, Coming, Option<upstream::Used>),
}

/// The answer to a request, which is recorded once that has ended.
pub(in crate::connection) fn respond(
    told: Result<Answered, Declined>,
    form: Form,
    mut exchange: Exchange,
) -> Response<Body> {
    match told {
        Ok(Answered::Here(response)) => {
            exchange.answered(response.status(), response.headers());
            exchange.complete();
            response
        }
        Ok(Answered::Backend(parts, coming, used)) => {
            exchange.answered(parts.status, &parts.headers);
            Response::from_parts(parts, Body::answer(coming, used, exchange))
        }
        Err(Declined { status, more, refusal }) => {
            let response = match (form, more.map(|more| *more)) {
                (Form::Call, Some(More { call: Some(call), .. })) => call.ended(),
                (Form::Call, _) | (_, None) => said(status, form),
                (_, Some(More { headers, .. })) => {
                    let mut response = said(status, form);
                    response.headers_mut().extend(headers);
                    response
                }
            };
            exchange.answered(response.status(), response.headers());
            exchange.refused(refusal);
            exchange.complete();
            response
        }
    }
}

/// Both sides go on in another protocol: their bytes are carried until both have ended, or until the connection has. For so
/// long this is held.
pub(in crate::connection) fn switched(
    (upgraded, ended): (&TaskTracker, &CancellationToken),
    mut parts: response::Parts,
    from_client: Option<hyper::upgrade::OnUpgrade>,
    held: impl Send + 'static,
) -> Result<Answered, Declined> {
    let Some(from_client) = from_client else {
        let unasked =
            Refusal::new(Reason::BackendReset, "the backend switched to a protocol that nobody asked for");
        return Err(Declined::new(StatusCode::BAD_GATEWAY, unasked));
    };
    let protocol = parts.headers.get(header::UPGRADE).cloned();
    let from_backend = hyper::upgrade::on(Response::from_parts(parts.clone(), ()));
    heads::take_hop(&mut parts.headers, protocol);
    let ended = ended.clone();
    upgraded.spawn(async move {
        let _held = held;
        let carried = async {
            let (client, backend) = tokio::try_join!(from_client, from_backend)?;
            let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
            // Whichever side broke, the other sees its end.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut backend).await;
            Ok::<_, hyper::Error>(())
        };
        tokio::select! {
            carried = carried => if let Err(error) = carried {
                tracing::debug!(%error, "an upgrade did not come about");
            },
            () = ended.cancelled() => {}
        }
    });
    Ok(Answered::Here(Response::from_parts(parts, Body::empty())))
}

pub(super) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// An answer of ours that is no backend's.
pub(super) fn said(status: StatusCode, form: Form) -> Response<Body> {
    if form == Form::Call {
        // gRPC, "HTTP to gRPC Status Code Mapping", and DEADLINE_EXCEEDED for a time that is over.
        let code = match status {
            StatusCode::BAD_REQUEST => 13,
            StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => 12,
            StatusCode::GATEWAY_TIMEOUT => 4,
            StatusCode::FORBIDDEN => 7,
            StatusCode::UNAUTHORIZED => 16,
            _ => 14,
        };
        return call_ended(code);
    }
    let text = status.canonical_reason().unwrap_or_default();
    let whole = (form != Form::Head).then(|| Bytes::from_static(text.as_bytes()));
    let mut response = Response::new(Body::Whole(whole));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_LENGTH, text.len().into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

/// The answer to a call that has ended with a status (gRPC over HTTP/2, "Trailers-Only").
pub(super) fn call_ended(status: u16) -> Response<Body> {
    let mut response = empty(StatusCode::OK);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", status.into());
    response
}
