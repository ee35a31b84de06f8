//! What is done with requests and answers: headers, paths, redirects, and what is told to browsers.
//!
//! What cannot be written as a header or a path is left as it was: the controller refuses such routes, and no request
//! is lost for one that got through.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Uri,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
        ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
        ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
    },
    uri::PathAndQuery,
};

use super::matches::{Asked, below};
use crate::model::http::{Cors, HeaderEdits, PathEdit, PathMatch, Redirect};

/// Changes headers.
pub fn headers(edits: &HeaderEdits, headers: &mut HeaderMap) {
    let parsed = |(name, value): &(String, String)| {
        Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?))
    };
    for (name, value) in edits.set.iter().filter_map(parsed) {
        headers.insert(name, value);
    }
    for (name, value) in edits.add.iter().filter_map(parsed) {
        headers.append(name, value);
    }
    for name in &edits.remove {
        headers.remove(name.as_str());
    }
}

/// What a path becomes that was as `matched` says.
pub fn path(edit: &PathEdit, matched: &PathMatch, path: &str) -> String {
    let new = match edit {
        PathEdit::Full(new) => new.clone(),
        PathEdit::Prefix(new) => {
            let prefix = match matched {
                PathMatch::Prefix(prefix) => prefix.as_str(),
                // The specification asks for a prefix; of another match all of the path stays.
                _ => "",
            };
            format!("{}{}", new.trim_end_matches('/'), below(path, prefix).unwrap_or(path))
        }
    };
    if new.starts_with('/') { new } else { format!("/{new}") }
}

/// Puts a new path into a target; what comes behind it stays.
pub fn with_path(uri: &Uri, path: &str) -> Option<Uri> {
    let whole = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(whole).ok()?);
    Uri::from_parts(parts).ok()
}

/// Where a redirect leads: the value of `Location`. `port`: the one that was asked for.
pub fn location(redirect: &Redirect, matched: &PathMatch, asked: &Asked<'_>, port: u16) -> String {
    let scheme = redirect.scheme.as_deref().unwrap_or("http");
    let host = redirect.hostname.as_deref().unwrap_or_else(|| without_port(asked.host()));
    let usual = |scheme: &str| if scheme == "https" { 443 } else { 80 };
    let port = match (redirect.port, &redirect.scheme) {
        (Some(port), _) => port,
        (None, Some(scheme)) => usual(scheme),
        (None, None) => port,
    };
    let old = asked.path();
    let path = redirect.path.as_ref().map_or_else(|| old.to_owned(), |edit| path(edit, matched, old));
    let port = if port == usual(scheme) { String::new() } else { format!(":{port}") };
    let query = asked.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    format!("{scheme}://{host}{port}{path}{query}")
}

/// A host's name or address without the port.
pub fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

/// What a browser's request asks for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Browser {
    /// Whether a request may be made: it is answered here, and sent nowhere.
    Preflight,
    /// A request.
    Request,
}

/// Whether a request asks only whether another may be made (Fetch, "CORS-preflight request").
pub fn browser(asked: &Asked<'_>) -> Browser {
    let preflight = asked.method == Method::OPTIONS
        && asked.headers.contains_key(ORIGIN)
        && asked.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    if preflight { Browser::Preflight } else { Browser::Request }
}

/// The headers of the answer to a preflight; without any if its origin may not.
pub fn preflight(cors: &Cors, asked: &Asked<'_>) -> HeaderMap {
    let mut answer = HeaderMap::new();
    let Some(origin) = allowed_origin(cors, asked.headers.get(ORIGIN)) else { return answer };
    let list = |of: &[String], wanted: &HeaderName| -> Option<HeaderValue> {
        // The star is itself to a request with credentials: what was asked for is said instead.
        if of.iter().any(|it| it == "*") {
            let star = HeaderValue::from_static("*");
            return if cors.credentials { asked.headers.get(wanted).cloned() } else { Some(star) };
        }
        if of.is_empty() { None } else { HeaderValue::try_from(of.join(", ")).ok() }
    };
    answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    if let Some(methods) = list(&cors.methods, &ACCESS_CONTROL_REQUEST_METHOD) {
        answer.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
    }
    if let Some(headers) = list(&cors.headers, &ACCESS_CONTROL_REQUEST_HEADERS) {
        answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, headers);
    }
    if cors.credentials {
        answer.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    answer.insert(ACCESS_CONTROL_MAX_AGE, cors.max_age.into());
    answer.insert(VARY, HeaderValue::from_static("Origin"));
    answer
}

/// Tells a browser what its script, of this origin, may see of an answer. What the backend says of that itself does not count.
pub fn share(cors: &Cors, origin: Option<&HeaderValue>, answer: &mut HeaderMap) {
    for name in [ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_EXPOSE_HEADERS]
    {
        answer.remove(name);
    }
    let Some(origin) = allowed_origin(cors, origin) else { return };
    answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    if cors.credentials {
        answer.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    if let Ok(expose) = HeaderValue::try_from(cors.expose.join(", "))
        && !cors.expose.is_empty()
    {
        answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose);
    }
    answer.append(VARY, HeaderValue::from_static("Origin"));
}

fn allowed_origin(cors: &Cors, origin: Option<&HeaderValue>) -> Option<HeaderValue> {
    let origin = origin?;
    let text = origin.to_str().ok()?;
    if cors.origins.iter().any(|it| it == "*") {
        return Some(if cors.credentials { origin.clone() } else { HeaderValue::from_static("*") });
    }
    cors.origins.iter().any(|wanted| is_origin(wanted, text)).then(|| origin.clone())
}

/// Whether an origin is as one that may have a star for some of the labels of its host.
fn is_origin(wanted: &str, origin: &str) -> bool {
    match wanted.split_once('*') {
        None => wanted.eq_ignore_ascii_case(origin),
        Some((before, after)) => {
            let middle = origin.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
            middle.is_some_and(|labels| !labels.is_empty() && !labels.contains(['/', ':', '@']))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_replaced_as_the_specification_lists() {
        // Gateway API, `HTTPPathModifier.replacePrefixMatch`.
        for (asked, prefix, new, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo", "", "/xyz", "/xyz/foo"),
        ] {
            let edit = PathEdit::Prefix(new.into());
            assert_eq!(
                path(&edit, &PathMatch::Prefix(prefix.into()), asked),
                expected,
                "{asked} {prefix} {new}"
            );
        }
        assert_eq!(path(&PathEdit::Full("/new".into()), &PathMatch::default(), "/a/b"), "/new");
    }

    #[test]
    fn a_redirect_says_only_what_is_not_usual() {
        let uri: Uri = "/a/b?c=d".parse().unwrap();
        let headers: HeaderMap =
            [(http::header::HOST, HeaderValue::from_static("shop:8080"))].into_iter().collect();
        let asked = Asked { method: &Method::GET, uri: &uri, headers: &headers };
        let none = Redirect { scheme: None, hostname: None, path: None, port: None, status: 302 };
        let some = |scheme: Option<&str>, hostname: Option<&str>, port| Redirect {
            scheme: scheme.map(Into::into),
            hostname: hostname.map(Into::into),
            port,
            ..none.clone()
        };
        for (redirect, port, expected) in [
            (some(None, Some("other"), None), 80, "http://other/a/b?c=d"),
            (some(None, None, None), 8080, "http://shop:8080/a/b?c=d"),
            (some(Some("https"), None, None), 8080, "https://shop/a/b?c=d"),
            (some(Some("https"), None, Some(8443)), 80, "https://shop:8443/a/b?c=d"),
            (some(None, None, Some(80)), 8080, "http://shop/a/b?c=d"),
        ] {
            assert_eq!(location(&redirect, &PathMatch::default(), &asked, port), expected);
        }
    }

    #[test]
    fn origins_may_have_a_star_for_labels() {
        for (wanted, origin, expected) in [
            ("https://a.example", "https://a.example", true),
            ("https://*.example", "https://a.b.example", true),
            ("https://*.example", "https://.example", false),
            ("https://*.example", "https://evil.com/.example", false),
            ("https://*.example", "http://a.example", false),
        ] {
            assert_eq!(is_origin(wanted, origin), expected, "{wanted} {origin}");
        }
    }

    #[test]
    fn ports_are_taken_off_names_and_addresses() {
        for (host, expected) in
            [("a:80", "a"), ("a", "a"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("1.2.3.4:5", "1.2.3.4")]
        {
            assert_eq!(without_port(host), expected);
        }
    }
}
