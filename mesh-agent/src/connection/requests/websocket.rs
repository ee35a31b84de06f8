//! WebSockets of clients that speak HTTP/2 (RFC 8441). From where such a request comes in, it is what it would be in HTTP/1.1, a
//! GET that asks for an upgrade, so that rules, policies and all else read it in one way. To a server it goes as what that
//! takes: as an extended CONNECT again, or as that upgrade.

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{
    HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION,
        TRANSFER_ENCODING, UPGRADE,
    },
    response,
};
use hyper::ext::Protocol;
use mesh_core::refusal::Reason;
use ring::digest;

use super::Declined;
use crate::refusal::Refusal;

const WEBSOCKET: &str = "websocket";
/// What is put behind a key before it is hashed (RFC 6455, section 1.3).
const ACCEPTED: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Of a request: it came as an extended CONNECT.
#[derive(Debug, Clone, Copy)]
struct Extended;

/// Of an answer: its server has gone over to WebSocket.
#[derive(Debug, Clone, Copy)]
struct GoneOver;

/// Takes in a request, as what it would be in HTTP/1.1. CONNECT has been checked.
pub(in crate::connection) fn take_in<B>(request: &mut Request<B>) -> Result<(), Declined> {
    let Some(protocol) = request.extensions_mut().remove::<Protocol>() else { return Ok(()) };
    if !protocol.as_str().eq_ignore_ascii_case(WEBSOCKET) {
        let other = Refusal::new(Reason::BadRequest, "an extended CONNECT for something else than websocket");
        return Err(Declined::new(StatusCode::NOT_IMPLEMENTED, other));
    }
    *request.method_mut() = Method::GET;
    request.extensions_mut().insert(Extended);
    asks(request);
    Ok(())
}

/// Whether it came as an extended CONNECT.
pub(in crate::connection) fn is_extended<B>(request: &Request<B>) -> bool {
    request.extensions().get::<Extended>().is_some()
}

fn asks<B>(request: &mut Request<B>) {
    let headers = request.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(WEBSOCKET));
}

/// How a server is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::connection) enum Way {
    /// By a stream of HTTP/2.
    Stream,
    /// By an upgrade of HTTP/1.1, which it has to answer with this.
    Upgrade(HeaderValue),
}

/// It goes by a stream of HTTP/2 (RFC 8441, section 5): what is of the upgrade has no meaning there.
pub(in crate::connection) fn as_stream<B>(request: &mut Request<B>) -> Way {
    *request.method_mut() = Method::CONNECT;
    for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_KEY] {
        request.headers_mut().remove(name);
    }
    request.extensions_mut().insert(Protocol::from_static(WEBSOCKET));
    Way::Stream
}

/// It goes by an upgrade of HTTP/1.1 (RFC 6455, section 4.1). `key`: sixteen bytes by chance.
pub(in crate::connection) fn as_upgrade<B>(request: &mut Request<B>, key: [u8; 16]) -> Way {
    *request.method_mut() = Method::GET;
    *request.version_mut() = Version::HTTP_11;
    request.extensions_mut().remove::<Protocol>();
    asks(request);
    let key = BASE64_STANDARD.encode(key);
    let accept = accepts(key.as_bytes());
    let uri = request.uri().clone();
    let headers = request.headers_mut();
    if let (false, Some(host)) = (headers.contains_key(HOST), uri.authority())
        && let Ok(host) = HeaderValue::try_from(host.as_str())
    {
        headers.insert(HOST, host);
    }
    headers.entry(SEC_WEBSOCKET_VERSION).or_insert(HeaderValue::from_static("13"));
    headers.insert(SEC_WEBSOCKET_KEY, text(&key));
    if let Some(path) = uri.path_and_query() {
        *request.uri_mut() = http::Uri::from(path.clone());
    }
    Way::Upgrade(accept)
}

/// What a server answers to a key.
fn accepts(key: &[u8]) -> HeaderValue {
    let mut hash = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(key);
    hash.update(ACCEPTED);
    text(&BASE64_STANDARD.encode(hash.finish()))
}

fn text(base64: &str) -> HeaderValue {
    HeaderValue::try_from(base64).expect("base64 is of letters, digits and signs that a header may have")
}

/// An answer has come this way: if its server has gone over, it is one to an extended CONNECT from here on.
pub(in crate::connection) fn answered<B>(response: &mut Response<B>, way: &Way) {
    let headers = response.headers();
    let has_gone_over = match way {
        Way::Stream => response.status() == StatusCode::OK,
        Way::Upgrade(accept) => {
            let websocket = headers
                .get(UPGRADE)
                .is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes()));
            response.status() == StatusCode::SWITCHING_PROTOCOLS
                && websocket
                && headers.get(SEC_WEBSOCKET_ACCEPT) == Some(accept)
        }
    };
    if has_gone_over {
        *response.status_mut() = StatusCode::OK;
        for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_ACCEPT, CONTENT_LENGTH, TRANSFER_ENCODING] {
            response.headers_mut().remove(name);
        }
        response.extensions_mut().insert(GoneOver);
    }
}

/// Whether both sides go on in another protocol after this answer. To an extended CONNECT any success would mean so.
pub(in crate::connection) fn goes_over(parts: &response::Parts, extended: bool) -> Result<bool, Declined> {
    let switches = parts.status == StatusCode::SWITCHING_PROTOCOLS;
    if !extended || parts.extensions.get::<GoneOver>().is_some() {
        return Ok(extended || switches);
    }
    if switches || parts.status.is_success() {
        let reason = format!("the backend answered {} and has not gone over to WebSocket", parts.status);
        return Err(Declined::new(StatusCode::BAD_GATEWAY, Refusal::new(Reason::BackendReset, reason)));
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(protocol: &'static str) -> Request<()> {
        let request = Request::builder().method(Method::CONNECT).version(Version::HTTP_2);
        let mut request = request.uri("http://chat.example/room?a=1").body(()).unwrap();
        request.extensions_mut().insert(Protocol::from_static(protocol));
        request
    }

    fn answer(status: u16, headers: &[(&'static str, &str)]) -> Response<()> {
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        response.body(()).unwrap()
    }

    #[test]
    fn it_is_read_as_the_upgrade_that_it_would_be_and_goes_on_as_either() {
        let mut request = asked("websocket");
        take_in(&mut request).unwrap();
        assert_eq!(
            (request.method(), &request.headers()[UPGRADE]),
            (&Method::GET, &HeaderValue::from_static("websocket"))
        );
        assert!(is_extended(&request));

        assert_eq!(as_stream(&mut request), Way::Stream);
        assert_eq!((request.method(), request.headers().len()), (&Method::CONNECT, 0));
        assert_eq!(request.extensions().get::<Protocol>().unwrap().as_str(), "websocket");

        // The key and its answer of RFC 6455, section 1.3.
        let key = BASE64_STANDARD.decode("dGhlIHNhbXBsZSBub25jZQ==").unwrap();
        let way = as_upgrade(&mut request, key.try_into().unwrap());
        assert_eq!(way, Way::Upgrade(HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")));
        assert_eq!((request.method(), request.version()), (&Method::GET, Version::HTTP_11));
        assert_eq!(
            (request.uri().to_string().as_str(), &request.headers()[HOST]),
            ("/room?a=1", &HeaderValue::from_static("chat.example"))
        );
        assert!(request.extensions().get::<Protocol>().is_none());

        assert!(take_in(&mut asked("connect-udp")).is_err());
        let mut other = Request::new(());
        take_in(&mut other).unwrap();
        assert!(!is_extended(&other));
    }

    #[test]
    fn only_a_server_that_shows_that_it_has_gone_over_has() {
        let upgrade = Way::Upgrade(accepts(b"key"));
        let accept = accepts(b"key").to_str().unwrap().to_owned();
        let over = [("upgrade", "WebSocket"), ("connection", "upgrade"), ("sec-websocket-accept", &accept)];
        let of = |status, headers: &[(&'static str, &str)], way: &Way| {
            let mut response = answer(status, headers);
            answered(&mut response, way);
            let (parts, ()) = response.into_parts();
            (goes_over(&parts, true).map_err(drop), parts.status.as_u16(), parts.headers.len())
        };
        assert_eq!(of(101, &over, &upgrade), (Ok(true), 200, 0));
        assert_eq!(of(101, &over, &Way::Upgrade(accepts(b"other"))).0, Err(()));
        assert_eq!(of(101, &over[1..], &upgrade).0, Err(()));
        assert_eq!(of(200, &over, &upgrade).0, Err(()), "a page is no WebSocket");
        assert_eq!(of(403, &[], &upgrade), (Ok(false), 403, 0));
        assert_eq!(of(200, &[("sec-websocket-protocol", "chat")], &Way::Stream), (Ok(true), 200, 1));
        assert_eq!(of(204, &[], &Way::Stream).0, Err(()));
        let plain = |status| goes_over(&answer(status, &[]).into_parts().0, false).map_err(drop);
        assert_eq!((plain(101), plain(200)), (Ok(true), Ok(false)));
    }
}
