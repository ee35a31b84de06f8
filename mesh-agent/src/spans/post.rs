//! OTLP over HTTP: spans in the body of a request, one request after the other on one connection.
//!
//! Nothing is followed that the collector answers: where it sends elsewhere, it has not taken them.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use prost::Message as _;

use super::{
    collector::{NotTaken, Server},
    otlp::{ExportRequest, ExportResponse},
};

/// Where collectors take spans.
const PATH: &str = "/v1/traces";
const CONTENT: &str = "application/x-protobuf";
/// Of an answer it is read how many spans were not wanted, and why.
const MAX_ANSWER: usize = 64 * 1024;

pub(super) struct Post {
    server: Server,
    authority: String,
    path: String,
    /// Of the last request, if the collector has not ended it.
    idle: Option<SendRequest<Full<Bytes>>>,
}

impl Post {
    pub(super) fn new(uri: &Uri, server: Server) -> Option<Self> {
        let authority = uri.authority()?.as_str();
        if authority.contains('@') {
            return None;
        }
        let path = if uri.path() == "/" { PATH } else { uri.path() };
        Some(Self { server, authority: authority.to_owned(), path: path.to_owned(), idle: None })
    }

    pub(super) async fn export(&mut self, request: &ExportRequest) -> Result<ExportResponse, NotTaken> {
        let body = Bytes::from(request.encode_to_vec());
        // Taken out, so that one that is given up is never used again.
        let mut request = self.request(body)?;
        if let Some(mut sender) = self.idle.take()
            && sender.ready().await.is_ok()
        {
            match sender.try_send_request(request).await {
                Ok(response) => return self.answered(response, sender).await,
                Err(mut error) => match error.take_message() {
                    // The collector has ended an idle connection.
                    Some(unsent) => request = unsent,
                    None => return Err(NotTaken::again(error.into_error())),
                },
            }
        }
        let mut sender = self.open().await?;
        let response = sender.send_request(request).await.map_err(NotTaken::again)?;
        self.answered(response, sender).await
    }

    fn request(&self, body: Bytes) -> Result<Request<Full<Bytes>>, NotTaken> {
        let request = Request::post(self.path.as_str())
            .header(header::HOST, self.authority.as_str())
            .header(header::CONTENT_TYPE, CONTENT)
            .header(header::USER_AGENT, concat!("nodemesh-agent/", env!("CARGO_PKG_VERSION")));
        request.body(Full::new(body)).map_err(NotTaken::never)
    }

    async fn open(&self) -> Result<SendRequest<Full<Bytes>>, NotTaken> {
        let stream = self.server.open().await.map_err(NotTaken::again)?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(NotTaken::again)?;
        // Ends with its sender.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the collector of spans ended");
            }
        });
        Ok(sender)
    }

    async fn answered(
        &mut self,
        response: Response<Incoming>,
        sender: SendRequest<Full<Bytes>>,
    ) -> Result<ExportResponse, NotTaken> {
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await;
        if body.is_ok() {
            self.idle = Some(sender);
        }
        if !head.status.is_success() {
            return Err(not_taken(head.status, &head.headers));
        }
        // What it has taken it has taken, whatever else it says.
        let said = body.ok().and_then(|body| ExportResponse::decode(body.to_bytes()).ok());
        Ok(said.unwrap_or_default())
    }
}

/// Which answers say that spans may be sent again is OTLP's ("OTLP/HTTP Response", failures).
fn not_taken(status: StatusCode, headers: &HeaderMap) -> NotTaken {
    let why = format!("it answers {status}");
    match status {
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => {
            let seconds = headers.get(header::RETRY_AFTER).and_then(|it| it.to_str().ok()?.parse().ok());
            NotTaken::again(why).after(seconds.map(Duration::from_secs))
        }
        _ => NotTaken::never(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected: not before so many seconds, if they are wanted again.
    #[track_caller]
    fn check(status: u16, retry_after: Option<&str>, expected: Option<Option<u64>>) {
        let mut headers = HeaderMap::new();
        headers.extend(retry_after.map(|it| (header::RETRY_AFTER, it.parse().unwrap())));
        let not_taken = not_taken(StatusCode::from_u16(status).unwrap(), &headers);
        let found = not_taken.again.then_some(not_taken.after.map(|it| it.as_secs()));
        assert_eq!(found, expected, "{status} {retry_after:?}");
    }

    #[test]
    fn a_collector_says_whether_and_when_it_wants_spans_again() {
        for status in [429, 502, 503, 504] {
            check(status, None, Some(None));
            check(status, Some("7"), Some(Some(7)));
            check(status, Some("soon"), Some(None));
        }
        for status in [302, 307, 400, 401, 404, 413, 500, 501] {
            check(status, Some("7"), None);
        }
    }
}
