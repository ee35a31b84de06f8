//! Whether a request is as a match says.

use http::{HeaderMap, Method, Uri, request::Parts};

use crate::model::http::{PathMatch, RequestMatch, TextMatch, ValueMatch};

/// What is looked at of a request.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Its method.
    pub method: &'a Method,
    /// Its target.
    pub uri: &'a Uri,
    /// Its headers.
    pub headers: &'a HeaderMap,
}

impl<'a> From<&'a Parts> for Asked<'a> {
    fn from(parts: &'a Parts) -> Self {
        Self { method: &parts.method, uri: &parts.uri, headers: &parts.headers }
    }
}

impl<'a> Asked<'a> {
    /// The host that it asks for, with its port if it says one: HTTP/2 has it in the target, HTTP/1.1 in a header.
    pub fn host(&self) -> &'a str {
        let of_header = || self.headers.get(http::header::HOST).and_then(|value| value.to_str().ok());
        self.uri.authority().map(http::uri::Authority::as_str).or_else(of_header).unwrap_or_default()
    }

    /// The path, as it came. An asterisk, or a CONNECT's nothing, is no path.
    pub fn path(&self) -> &'a str {
        self.uri.path()
    }
}

impl RequestMatch {
    /// Whether all of it is so.
    pub fn matches(&self, asked: &Asked<'_>) -> bool {
        self.path.matches(asked.path()) && self.rest_matches(asked)
    }

    /// The same for a path that is known to.
    pub(super) fn rest_matches(&self, asked: &Asked<'_>) -> bool {
        self.method.as_ref().is_none_or(|method| asked.method == method.as_str())
            && self.headers.iter().all(|header| header_matches(header, asked))
            && self.query.iter().all(|parameter| parameter_matches(parameter, asked.uri))
    }
}

impl PathMatch {
    /// Whether a path is so.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(wanted) => path == wanted,
            Self::Prefix(prefix) => below(path, prefix).is_some(),
            Self::Pattern(pattern) => pattern.matches(path),
            Self::Call { service, method } => {
                let Some((of_service, of_method)) = call(path) else { return false };
                let is =
                    |wanted: &Option<TextMatch>, it| wanted.as_ref().is_none_or(|wanted| wanted.matches(it));
                is(service, of_service) && is(method, of_method)
            }
        }
    }
}

/// What of a path comes after a prefix by whole segments: nothing, or what begins with a slash.
pub(super) fn below<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Service and method of a path that is a call (gRPC over HTTP/2, "Requests").
fn call(path: &str) -> Option<(&str, &str)> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    (!service.is_empty() && !method.is_empty() && !method.contains('/')).then_some((service, method))
}

/// Of several headers of a name the values count as one, with commas between (RFC 9110, section 5.3).
fn header_matches(wanted: &ValueMatch, asked: &Asked<'_>) -> bool {
    if wanted.name == "host" {
        let host = asked.host();
        return !host.is_empty() && wanted.value.matches(host);
    }
    let mut values = asked.headers.get_all(wanted.name.as_str()).iter();
    let text = |value: &'_ http::HeaderValue| value.to_str().map(str::to_owned).ok();
    let Some(first) = values.next() else { return false };
    let Some(mut all) = text(first) else { return false };
    for more in values {
        let Some(more) = text(more) else { return false };
        all.push(',');
        all.push_str(&more);
    }
    wanted.value.matches(&all)
}

/// Of several parameters of a name the first counts (Gateway API, `HTTPQueryParamMatch`).
fn parameter_matches(wanted: &ValueMatch, uri: &Uri) -> bool {
    let mut all = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
    all.find(|(name, _)| *name == wanted.name).is_some_and(|(_, value)| wanted.value.matches(&value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_of_whole_segments() {
        for (path, prefix, expected) in [
            ("/abc", "/abc", true),
            ("/abc/", "/abc", true),
            ("/abc/def", "/abc", true),
            ("/abcd", "/abc", false),
            ("/ab", "/abc", false),
            ("/", "", true),
            ("/x", "", true),
            ("*", "", false),
        ] {
            assert_eq!(PathMatch::Prefix(prefix.into()).matches(path), expected, "{path} {prefix}");
        }
    }

    #[test]
    fn a_call_has_two_parts() {
        let exact = |text: &str| Some(TextMatch::Exact(text.into()));
        let check = |service, method, path, expected| {
            assert_eq!(PathMatch::Call { service, method }.matches(path), expected, "{path}");
        };
        check(exact("a.B"), exact("C"), "/a.B/C", true);
        check(exact("a.B"), None, "/a.B/D", true);
        check(None, exact("C"), "/x/C", true);
        check(exact("a.B"), exact("C"), "/a.B/D", false);
        check(None, None, "/a", false);
        check(None, None, "/a/b/c", false);
    }
}
