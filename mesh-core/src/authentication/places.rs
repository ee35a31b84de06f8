//! Where tokens are in a request: looked for as loosely as any server might, so that what one finds is not passed over, and
//! taken away the same way.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, Uri, header::COOKIE, uri::PathAndQuery};

use crate::{http::matches::Asked, model::TokenPlace, refusal::Reason};

/// The token in a place, if one is there; several of a name are no token but a question which one counts.
pub(super) fn find<'a>(place: &TokenPlace, asked: &Asked<'a>) -> Result<Option<Cow<'a, str>>, Reason> {
    match place {
        TokenPlace::Header { name, prefix } => in_header(name, prefix, asked.headers),
        TokenPlace::Query(name) => in_query(name, asked.uri.query().unwrap_or_default()),
        TokenPlace::Cookie(name) => in_cookies(name, asked.headers),
    }
}

/// Takes the token of a place away, with all that may be taken for it.
pub(super) fn strip(place: &TokenPlace, uri: &mut Uri, headers: &mut HeaderMap) {
    match place {
        TokenPlace::Header { name, .. } => remove_like(name, headers),
        TokenPlace::Query(name) => {
            if let Some(without) = without_parameter(name, uri) {
                *uri = without;
            }
        }
        TokenPlace::Cookie(name) => strip_cookie(name, headers),
    }
}

/// Whether a server may take a header for one of this name: some make `_` of `-`, and tell them apart no more.
fn is_like(header: &HeaderName, name: &str) -> bool {
    let plain = |byte: u8| if byte == b'_' { b'-' } else { byte };
    header.as_str().bytes().map(plain).eq(name.bytes().map(plain))
}

/// Takes away every header that may be taken for one of this name.
pub(super) fn remove_like(name: &str, headers: &mut HeaderMap) {
    let alike: Vec<HeaderName> = headers.keys().filter(|header| is_like(header, name)).cloned().collect();
    for header in alike {
        headers.remove(header);
    }
}

fn text(value: &HeaderValue) -> Result<&str, Reason> {
    value.to_str().map_err(|_| Reason::TokenMalformed)
}

fn one<T>(mut found: Vec<T>) -> Result<Option<T>, Reason> {
    if found.len() > 1 { Err(Reason::TokenAmbiguous) } else { Ok(found.pop()) }
}

/// Of a header that is there twice nobody can say which one a server takes, whatever their prefixes are.
fn in_header<'a>(name: &str, prefix: &str, headers: &'a HeaderMap) -> Result<Option<Cow<'a, str>>, Reason> {
    let values = headers.iter().filter(|(header, _)| is_like(header, name)).map(|(_, value)| value);
    let Some(value) = one(values.collect())? else { return Ok(None) };
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    if prefix.is_empty() {
        let value = text(value)?.trim();
        return Ok((!value.is_empty()).then_some(value.into()));
    }
    // The prefix alone says whether there is a token (RFC 9110, section 11.4: of any case).
    let bytes = value.as_bytes().trim_ascii();
    let is_prefixed = bytes.get(..prefix.len()).is_some_and(|it| it.eq_ignore_ascii_case(prefix.as_bytes()));
    if !is_prefixed || !bytes.get(prefix.len()).is_some_and(blank) {
        return Ok(None);
    }
    let token = text(value)?.trim().get(prefix.len()..).unwrap_or_default().trim();
    Ok((!token.is_empty()).then_some(token.into()))
}

/// Between `&`, and also between `;`, which some servers split at: where that makes a difference, nobody can say.
fn in_query<'a>(name: &str, query: &'a str) -> Result<Option<Cow<'a, str>>, Reason> {
    let of = |at: &[char]| -> Vec<Cow<'a, str>> {
        let pairs = query.split(at).flat_map(|pair| form_urlencoded::parse(pair.as_bytes()));
        pairs.filter(|(key, _)| key == name).map(|(_, value)| value).collect()
    };
    let (strictly, loosely) = (of(&['&']), of(&['&', ';']));
    if strictly != loosely {
        return Err(Reason::TokenAmbiguous);
    }
    Ok(one(strictly)?.filter(|token| !token.is_empty()))
}

fn without_parameter(name: &str, uri: &Uri) -> Option<Uri> {
    let is_it = |pair: &str| form_urlencoded::parse(pair.as_bytes()).any(|(key, _)| key == name);
    let kept: Vec<&str> = uri.query()?.split('&').filter(|pair| !is_it(pair)).collect();
    let path = uri.path();
    let whole = if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(whole).ok()?);
    Uri::from_parts(parts).ok()
}

/// The pairs of all headers `Cookie` (RFC 6265, section 4.2; of HTTP/2 there may be several, RFC 9113, section 8.2.3).
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    headers.get_all(COOKIE).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b';'))
}

fn cookie_is(name: &str, pair: &[u8]) -> bool {
    pair.split(|byte| *byte == b'=').next().is_some_and(|key| key.trim_ascii() == name.as_bytes())
}

fn in_cookies<'a>(name: &str, headers: &'a HeaderMap) -> Result<Option<Cow<'a, str>>, Reason> {
    let found = one(cookies(headers).filter(|pair| cookie_is(name, pair)).collect())?;
    let Some(pair) = found else { return Ok(None) };
    let pair = std::str::from_utf8(pair).map_err(|_| Reason::TokenMalformed)?;
    let value = pair.split_once('=').map_or("", |(_, value)| value.trim());
    let value = value.strip_prefix('"').and_then(|it| it.strip_suffix('"')).unwrap_or(value);
    Ok((!value.is_empty()).then_some(value.into()))
}

fn strip_cookie(name: &str, headers: &mut HeaderMap) {
    let kept: Vec<HeaderValue> = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| {
            let pairs = value.as_bytes().split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
            let kept: Vec<&[u8]> = pairs.filter(|pair| !pair.is_empty() && !cookie_is(name, pair)).collect();
            (!kept.is_empty()).then(|| HeaderValue::from_bytes(&kept.join(&b"; "[..])).ok())?
        })
        .collect();
    headers.remove(COOKIE);
    for value in kept {
        headers.append(COOKIE, value);
    }
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        all.iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap()))
            .collect()
    }

    #[track_caller]
    fn check(
        place: &TokenPlace,
        uri: &str,
        all: &[(&'static str, &str)],
        expected: Result<Option<&str>, Reason>,
    ) {
        let (method, uri, headers) = (Method::GET, uri.parse().unwrap(), headers(all));
        let found = find(place, &Asked { method: &method, uri: &uri, headers: &headers });
        assert_eq!(found.as_ref().map(Option::as_deref), expected.as_ref().map(|it| *it), "{uri} {all:?}");
    }

    #[test]
    fn a_token_is_found_where_a_server_would() {
        let bearer = TokenPlace::Header { name: "authorization".into(), prefix: "Bearer".into() };
        for (value, expected) in [
            ("Bearer a.b.c", Some("a.b.c")),
            ("bearer  a.b.c ", Some("a.b.c")),
            ("BEARER\ta.b.c", Some("a.b.c")),
            ("Basic a.b.c", None),
            ("Bearer", None),
            ("Bearera.b.c", None),
            ("", None),
        ] {
            check(&bearer, "/", &[("authorization", value)], Ok(expected));
        }
        let two = [("authorization", "Basic x"), ("authorization", "Bearer a")];
        check(&bearer, "/", &two, Err(Reason::TokenAmbiguous));
        check(
            &TokenPlace::Header { name: "x-jwt".into(), prefix: String::new() },
            "/",
            &[("x-jwt", " a ")],
            Ok(Some("a")),
        );
        let own = TokenPlace::Header { name: "x-jwt".into(), prefix: String::new() };
        check(&own, "/", &[("x_jwt", "a")], Ok(Some("a")));
        check(&own, "/", &[("x_jwt", "a"), ("x-jwt", "a")], Err(Reason::TokenAmbiguous));
        let query = TokenPlace::Query("t".into());
        for (uri, expected) in [
            ("/?a=1&t=a.b.c", Ok(Some("a.b.c"))),
            ("/?%74=a%2Eb", Ok(Some("a.b"))),
            ("/?t=", Ok(None)),
            ("/?T=a", Ok(None)),
            ("/", Ok(None)),
            ("/?t=a&t=a", Err(Reason::TokenAmbiguous)),
            ("/?a=1;t=a", Err(Reason::TokenAmbiguous)),
            ("/?t=a;b", Err(Reason::TokenAmbiguous)),
        ] {
            check(&query, uri, &[], expected);
        }
        let cookie = TokenPlace::Cookie("t".into());
        check(&cookie, "/", &[("cookie", "a=1; t=a.b=; b=2")], Ok(Some("a.b=")));
        check(&cookie, "/", &[("cookie", "a=1"), ("cookie", "t=\"x\"")], Ok(Some("x")));
        check(&cookie, "/", &[("cookie", "t=a; t=b")], Err(Reason::TokenAmbiguous));
        check(&cookie, "/", &[("cookie", "tt=a; xt=b")], Ok(None));
    }

    #[test]
    fn what_is_taken_away_leaves_the_rest_as_it_was() {
        let stripped = |place: &TokenPlace, uri: &str, all: &[(&'static str, &str)]| {
            let (mut uri, mut headers) = (uri.parse().unwrap(), headers(all));
            strip(place, &mut uri, &mut headers);
            let kept = headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()));
            (uri.to_string(), kept.collect::<Vec<_>>().join("\n"))
        };
        let (query, cookie) = (TokenPlace::Query("t".into()), TokenPlace::Cookie("t".into()));
        for (uri, expected) in [
            ("/a?t=1", "/a"),
            ("/a?x=%20&t=1&y=+", "/a?x=%20&y=+"),
            ("http://h:1/a?t=1&y", "http://h:1/a?y"),
            ("/a?%74=1&b=2", "/a?b=2"),
            ("/a", "/a"),
        ] {
            assert_eq!(stripped(&query, uri, &[]).0, expected);
        }
        assert_eq!(stripped(&cookie, "/", &[("cookie", "a=1; t=2; b=3")]).1, "cookie: a=1; b=3");
        assert_eq!(
            stripped(&cookie, "/", &[("cookie", "t=2"), ("cookie", "b=3"), ("x", "y")]).1,
            "x: y\ncookie: b=3"
        );
        let header = TokenPlace::Header { name: "authorization".into(), prefix: "Bearer".into() };
        assert_eq!(stripped(&header, "/", &[("authorization", "Bearer a")]).1, "");
    }
}
