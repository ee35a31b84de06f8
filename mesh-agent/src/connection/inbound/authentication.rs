//! Whose request it is: the end user's token is verified before anything else is asked of a request, and what its policy wants
//! taken away or told is done before anybody else looks at the head.
//!
//! The token itself is in no log and no metric, and its bearer is told nothing but that it was not taken.

use http::{Request, StatusCode};
use mesh_core::{
    authentication::Authenticated, http::matches::Asked, policy::WouldRefuse, refusal::Reason, view::Snapshot,
};

use super::{super::requests::Declined, At};
use crate::authorize;

/// What is asked of whoever bears no token, and of whoever bears one that is not taken (RFC 6750, section 3).
const CHALLENGE: &str = "Bearer";
const INVALID: &str = "Bearer error=\"invalid_token\"";

/// What its token says, if it has to have one or has one, and what audited policies would say. The head is as the application
/// shall see it then.
pub(super) fn user<B>(
    view: &Snapshot,
    at: &At,
    request: &mut Request<B>,
) -> Result<(Authenticated, Option<WouldRefuse>), Declined> {
    let declined = |refusal| Declined::new(StatusCode::FORBIDDEN, refusal);
    let destination = authorize::destination(view, &at.workload.name).map_err(declined)?;
    let asked = Asked { method: request.method(), uri: request.uri(), headers: request.headers() };
    let (authenticated, would_refuse) = authorize::user(view, &destination, at.original.port(), &asked)
        .map_err(|refusal| {
            let challenge = if refusal.reason == Reason::TokenMissing { CHALLENGE } else { INVALID };
            Declined::unauthorized(challenge, refusal)
        })?;
    let mut uri = request.uri().clone();
    authenticated.apply(&mut uri, request.headers_mut());
    *request.uri_mut() = uri;
    Ok((authenticated, would_refuse))
}
