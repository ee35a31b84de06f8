//! Sessions: a cookie or a header that the answer to a session's first request sets, and that later ones bring, names the
//! endpoint (Gateway API, `SessionPersistence`).
//!
//! What a client brings is only ever looked for among the endpoints that the rule leads to.

use std::net::SocketAddr;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderName, HeaderValue, header::SET_COOKIE};
use mesh_core::model::http::{PersistBy, Persistence};

use super::heads;

/// The endpoint of the session that a request is of.
pub(super) fn of(persistence: &Persistence, headers: &HeaderMap) -> Option<SocketAddr> {
    let value = match persistence.by {
        PersistBy::Header => headers.get(persistence.name.as_str())?.to_str().ok()?,
        PersistBy::Cookie => heads::cookie(headers, &persistence.name)?,
    };
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(value).ok()?;
    std::str::from_utf8(&bytes).ok()?.parse().ok()
}

/// Says in an answer where its session's requests go.
pub(super) fn begin(persistence: &Persistence, endpoint: SocketAddr, headers: &mut HeaderMap) {
    let value = BASE64_URL_SAFE_NO_PAD.encode(endpoint.to_string());
    let (name, value) = match persistence.by {
        PersistBy::Header => (HeaderName::try_from(&persistence.name).ok(), value),
        PersistBy::Cookie => {
            let age = persistence.lifetime.map(|seconds| format!("; Max-Age={seconds}")).unwrap_or_default();
            (Some(SET_COOKIE), format!("{}={value}; Path=/; HttpOnly{age}", persistence.name))
        }
    };
    if let (Some(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
        headers.append(name, value);
    }
}

#[cfg(test)]
mod tests {
    use http::header::COOKIE;

    use super::*;

    #[test]
    fn what_an_answer_says_is_what_the_next_request_is_known_by() {
        let endpoint = "10.0.0.1:8080".parse().unwrap();
        for by in [PersistBy::Cookie, PersistBy::Header] {
            let persistence = Persistence { name: "session".into(), by, lifetime: Some(60) };
            let mut answer = HeaderMap::new();
            begin(&persistence, endpoint, &mut answer);
            let mut request = HeaderMap::new();
            match by {
                PersistBy::Header => drop(request.insert("session", answer["session"].clone())),
                PersistBy::Cookie => {
                    let said = answer[SET_COOKIE].to_str().unwrap();
                    assert!(said.ends_with("; Path=/; HttpOnly; Max-Age=60"), "{said}");
                    let cookie = format!("other=1; {}", said.split(';').next().unwrap());
                    request.insert(COOKIE, cookie.parse().unwrap());
                }
            }
            assert_eq!(of(&persistence, &request), Some(endpoint));
        }
    }

    #[test]
    fn what_is_no_session_is_none() {
        let persistence = Persistence { name: "session".into(), by: PersistBy::Header, lifetime: None };
        for value in ["", "x", "AAAA", "MTAuMC4wLjE"] {
            let headers =
                [(HeaderName::from_static("session"), value.parse().unwrap())].into_iter().collect();
            assert_eq!(of(&persistence, &headers), None, "{value}");
        }
    }
}
