//! What goes wrong with a request on purpose, so that people see what their applications make of it.

use std::{sync::Arc, time::Duration};

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use mesh_core::{
    http::{choose::Terms, fault},
    model::traffic::FaultEffect,
    refusal::Reason,
};

use super::{
    Asker,
    answers::{call_ended, said},
    body::Body,
    exchange::Exchange,
    heads::Form,
};
use crate::refusal::Refusal;

/// What has become of a request.
pub(super) enum Befallen {
    /// It goes on, after so long.
    Goes(Duration),
    /// It goes nowhere, and this is its answer.
    Ends(Response<Body>),
}

/// Lets happen what the terms say. A delay is no longer than the request may take, and ends with its client.
pub(super) async fn befall(
    asker: &Arc<Asker>,
    terms: &Terms<'_>,
    request: &Request<Incoming>,
    exchange: &mut Exchange,
) -> Befallen {
    let metrics = &asker.node.inner.connector.metrics;
    let mut delayed = Duration::ZERO;
    for effect in fault::of(terms.faults, request.headers(), rand::random).collect::<Vec<_>>() {
        match effect {
            FaultEffect::Delay(time) => {
                metrics.fault(&asker.service, "delay");
                let time = terms.timeouts.request.map_or(time, |limit| time.min(limit - delayed));
                delayed += time;
                tokio::time::sleep(time).await;
            }
            FaultEffect::Abort(status) => {
                metrics.fault(&asker.service, "abort");
                let status = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
                exchange.refused(Refusal::new(Reason::FaultInjected, status.to_string()));
                // To a call, too, with the status that the policy says.
                let form = if request.method() == Method::HEAD { Form::Head } else { Form::Plain };
                return Befallen::Ends(said(status, form));
            }
            FaultEffect::AbortCall(status) => {
                metrics.fault(&asker.service, "abort");
                exchange.refused(Refusal::new(Reason::FaultInjected, format!("grpc-status {status}")));
                return Befallen::Ends(call_ended(status));
            }
        }
    }
    Befallen::Goes(delayed)
}
