//! The heads of requests and answers on their way from one hop to the next: what is of one connection alone is taken away,
//! what could be read in two ways is refused.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, PROXY_AUTHENTICATE, TE, TRANSFER_ENCODING,
        UPGRADE,
    },
    uri::Authority,
};
use mesh_core::{http::edit, model::http::Rewrite, refusal::Reason};

use super::websocket;
use crate::refusal::Refusal;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Refuses what two servers could take for two different requests (RFC 9112, section 6.3 and 3.2), and what only a proxy
/// that one knows of is asked for.
pub(in crate::connection) fn check<B>(request: &Request<B>) -> Result<(), Refusal> {
    let headers = request.headers();
    let bad = |what: &'static str| Err(Refusal::new(Reason::BadRequest, what));
    if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) {
        return bad("a request with both Transfer-Encoding and Content-Length");
    }
    // Of what was coded besides, nobody behind us would know (RFC 9112, section 7): that header is of one hop.
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    if codings.next().is_some_and(|it| !it.as_bytes().eq_ignore_ascii_case(b"chunked"))
        || codings.next().is_some()
    {
        return bad("a Transfer-Encoding that is more than chunked");
    }
    if headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
        return bad("a request with more than one Content-Length");
    }
    if headers.get_all(HOST).iter().count() > 1 {
        return bad("a request with more than one Host");
    }
    if request.version() == Version::HTTP_11 && !headers.contains_key(HOST) {
        return bad("a request without Host");
    }
    if request.method() == Method::CONNECT && request.extensions().get::<hyper::ext::Protocol>().is_none() {
        return bad("CONNECT: a mesh is no proxy that one asks for a way");
    }
    Ok(())
}

/// Whether a request wants to go on in another protocol: by HTTP/1.1, or by an extended CONNECT that was taken in as such.
pub(in crate::connection) fn wants_upgrade<B>(request: &Request<B>) -> bool {
    (request.version() == Version::HTTP_11 || websocket::is_extended(request))
        && request.headers().contains_key(UPGRADE)
        && names_in(request.headers()).any(|name| name == UPGRADE)
}

/// Takes away what is of one connection alone (RFC 9110, section 7.6.1). `upgrade`: this protocol is asked for, or gone
/// over to, at the next hop too.
pub(in crate::connection) fn take_hop(headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
    let named: Vec<HeaderName> = names_in(headers).collect();
    let trailers = headers.get(TE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in named.into_iter().chain([
        CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        PROXY_AUTHENTICATE,
        TE,
        TRANSFER_ENCODING,
        UPGRADE,
    ]) {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
}

/// The names that `Connection` has. What frames a message is not a header that one may have taken away.
fn names_in(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> + use<'_> {
    let texts = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let names = texts.flat_map(|text| text.split(',')).filter_map(|name| name.trim().parse().ok());
    names.filter(|name| *name != CONTENT_LENGTH && *name != HOST)
}

/// Gives a request another host, or another path than the one that was as `matched` says.
pub(super) fn rewrite<B>(
    rewrite: &Rewrite,
    matched: &mesh_core::model::http::PathMatch,
    request: &mut Request<B>,
) {
    if let Some(change) = &rewrite.path {
        let new = edit::path(change, matched, request.uri().path());
        if let Some(uri) = edit::with_path(request.uri(), &new) {
            *request.uri_mut() = uri;
        }
    }
    if let Some(host) = &rewrite.hostname {
        if let (Ok(authority), Some(_)) = (Authority::try_from(host.as_str()), request.uri().authority()) {
            let mut parts = request.uri().clone().into_parts();
            parts.authority = Some(authority);
            if let Ok(uri) = http::Uri::from_parts(parts) {
                *request.uri_mut() = uri;
            }
        }
        if let (Ok(value), true) = (HeaderValue::try_from(host), request.headers().contains_key(HOST)) {
            request.headers_mut().insert(HOST, value);
        }
    }
}

/// The first cookie of this name (RFC 6265, section 4.2).
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let texts = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = texts.flat_map(|text| text.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(of, _)| *of == name).map(|(_, value)| value)
}

/// In which form an answer of ours is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::connection) enum Form {
    /// A status and its name.
    Plain,
    /// The same without its body (RFC 9110, section 9.3.2), which hyper leaves to us in HTTP/2.
    Head,
    /// That of gRPC.
    Call,
}

/// That of the answer to a request. A call is answered in gRPC's way.
pub(in crate::connection) fn form<B>(request: &Request<B>) -> Form {
    if is_grpc(request.headers()) {
        Form::Call
    } else if request.method() == Method::HEAD {
        Form::Head
    } else {
        Form::Plain
    }
}

/// Whether it is a call of gRPC, or the answer to one (gRPC over HTTP/2, "Requests" and "Responses").
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(headers: &[(&'static str, &'static str)]) -> Request<()> {
        let mut request = Request::builder().uri("/").version(Version::HTTP_11);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn what_two_servers_could_read_in_two_ways_is_refused() {
        assert!(check(&request(&[("host", "a"), ("content-length", "1")])).is_ok());
        for headers in [
            &[("host", "a"), ("content-length", "1"), ("transfer-encoding", "chunked")][..],
            &[("host", "a"), ("content-length", "1"), ("content-length", "1")],
            &[("host", "a"), ("host", "b")],
            &[],
        ] {
            assert_eq!(check(&request(headers)).unwrap_err().reason, Reason::BadRequest, "{headers:?}");
        }
    }

    #[test]
    fn what_is_of_one_connection_does_not_go_on() {
        let mut headers = request(&[
            ("host", "a"),
            ("connection", "x-mine, close, content-length"),
            ("x-mine", "1"),
            ("x-theirs", "2"),
            ("te", "trailers"),
            ("keep-alive", "timeout=5"),
            ("content-length", "3"),
        ])
        .headers()
        .clone();
        take_hop(&mut headers, None);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "te", "x-theirs"]);
    }

    #[test]
    fn an_upgrade_is_asked_for_at_the_next_hop_too() {
        let asked =
            request(&[("host", "a"), ("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert!(wants_upgrade(&asked));
        let mut headers = asked.headers().clone();
        let protocol = headers.get(UPGRADE).cloned();
        take_hop(&mut headers, protocol);
        assert_eq!(
            (&headers[CONNECTION], &headers[UPGRADE]),
            (&"upgrade".parse().unwrap(), &"websocket".parse().unwrap())
        );
        assert!(!wants_upgrade(&request(&[("host", "a"), ("upgrade", "websocket")])));
    }
}
