//! Whether a workload takes a request, after it may come at all: is it too large, or one too many? The agent of the
//! workload's node asks, and `meshctl why` with the same functions.
//!
//! | module | what |
//! |---|---|
//! | [`rate`] | buckets of tokens |

pub mod rate;

use http::header::{CONTENT_LENGTH, HOST};

use crate::{
    http::matches::Asked,
    model::intake::{PortIntake, Sizes},
    refusal::Reason,
};

/// What is not taken, for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TooLarge {
    /// Which limit it is.
    pub reason: Reason,
    /// How large it is, and may be.
    pub detail: String,
}

/// Whether its head, or the body that it announces, is larger than it may be. A body of which nobody says the length is
/// measured as it comes.
pub fn too_large(sizes: &Sizes, asked: &Asked<'_>) -> Option<TooLarge> {
    let is = |reason, bytes: u64, most: u64| TooLarge {
        reason,
        detail: format!("{bytes} bytes, of at most {most}"),
    };
    if let Some(most) = sizes.head.map(u64::from) {
        let bytes = head_bytes(asked);
        if bytes > most {
            return Some(is(Reason::LimitHeaders, bytes, most));
        }
    }
    let announced = asked.headers.get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()?;
    let most = sizes.body.filter(|most| announced > *most)?;
    Some(is(Reason::LimitBody, announced, most))
}

/// The bytes of a head as HTTP/1.1 writes it (RFC 9112, section 2.1), whichever version it came in.
pub fn head_bytes(asked: &Asked<'_>) -> u64 {
    let target = asked.uri.path_and_query().map_or(1, |it| it.as_str().len());
    let line = asked.method.as_str().len() + target + " ".len() + " HTTP/1.1\r\n".len();
    let field = |name: &str, value: usize| name.len() + ": ".len() + value + "\r\n".len();
    let fields: usize = asked.headers.iter().map(|(name, value)| field(name.as_str(), value.len())).sum();
    let authority = asked.uri.authority().filter(|_| !asked.headers.contains_key(HOST));
    let host = authority.map_or(0, |it| field(HOST.as_str(), it.as_str().len()));
    (line + fields + host + "\r\n".len()) as u64
}

/// Why what comes to a port cannot be carried unread: somebody limits its requests.
pub fn is_read(intake: Option<&PortIntake>) -> bool {
    intake.is_some_and(|it| !it.is_empty())
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, Method, Uri};

    use super::*;

    #[test]
    fn a_head_is_as_long_as_http_1_writes_it() {
        let check = |uri: &'static str, headers: &[(&'static str, &'static str)], written: &str| {
            let mut all = HeaderMap::new();
            for (name, value) in headers {
                all.append(*name, HeaderValue::from_static(value));
            }
            let uri = Uri::from_static(uri);
            let asked = Asked { method: &Method::GET, uri: &uri, headers: &all };
            assert_eq!(head_bytes(&asked), written.len() as u64, "{written}");
        };
        check("/a?b=c", &[("host", "web"), ("x", "")], "GET /a?b=c HTTP/1.1\r\nhost: web\r\nx: \r\n\r\n");
        check(
            "http://web/a",
            &[("x", "1"), ("x", "2")],
            "GET /a HTTP/1.1\r\nhost: web\r\nx: 1\r\nx: 2\r\n\r\n",
        );
    }

    #[test]
    fn what_is_as_large_as_it_may_be_is_taken_and_a_byte_more_is_not() {
        let uri = Uri::from_static("/");
        let too_large = |sizes, length: Option<&'static str>| {
            let headers =
                length.map(|it| (CONTENT_LENGTH, HeaderValue::from_static(it))).into_iter().collect();
            let asked = Asked { method: &Method::POST, uri: &uri, headers: &headers };
            too_large(&sizes, &asked).map(|it| it.reason)
        };
        let of = |head, body| Sizes { head, body };
        assert_eq!(too_large(of(None, Some(10)), Some("10")), None);
        assert_eq!(too_large(of(None, Some(10)), Some("11")), Some(Reason::LimitBody));
        assert_eq!(too_large(of(None, Some(0)), Some("0")), None);
        assert_eq!(too_large(of(None, Some(0)), None), None, "it is measured as it comes");
        let head = "POST / HTTP/1.1\r\n\r\n".len() as u32;
        assert_eq!(too_large(of(Some(head), None), None), None);
        assert_eq!(too_large(of(Some(head - 1), Some(0)), Some("1")), Some(Reason::LimitHeaders));
    }
}
