//! What policies say of requests, where servers do not all read a request the same way.
//!
//! A path with `%2e%2e`, a second slash or letters of another case is one thing to one server and another to the next, and
//! an agent does not know what its application makes of it. So a request has *readings*, and a pattern matches it
//! certainly, which is in every reading, or possibly, which is in one. Allow rules go by what is certain and deny rules by
//! what is possible: of two readings the one counts in which more is refused.

use std::borrow::Cow;

use crate::{
    authentication::Claims,
    http::matches::Asked,
    model::{Action, Asks, HeaderPattern, TextPattern},
};

/// Headers by which some servers let a request have another method than the one that it has.
const OVERRIDES: [&str; 3] = ["x-http-method-override", "x-http-method", "x-method-override"];

/// A request, as its server may read it.
#[derive(Debug, Clone)]
pub struct Reading<'a> {
    asked: Asked<'a>,
    methods: Vec<Cow<'a, str>>,
    /// With and without ports; `None` where nobody can say which host is meant.
    hosts: Option<Vec<String>>,
    /// `None` where servers read something that patterns cannot say.
    paths: Option<Vec<String>>,
    /// `None` where no token was verified.
    claims: Option<&'a Claims>,
}

/// How sure it is that something is so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Likely {
    certainly: bool,
    possibly: bool,
}

/// Of what cannot be read everything is possible.
const UNKNOWN: Likely = Likely { certainly: false, possibly: true };

impl<'a> Reading<'a> {
    /// All ways to read it.
    pub fn of(asked: &Asked<'a>) -> Self {
        let (methods, hosts, paths) = (methods(asked), hosts(asked), paths(asked.path()));
        Self { asked: *asked, methods, hosts, paths, claims: None }
    }

    /// The same, of an end user whose token was verified. Without one nobody can say what its claims are, nor what they are
    /// not.
    pub fn of_user(self, claims: Option<&'a Claims>) -> Self {
        Self { claims, ..self }
    }

    /// Whether it is as all of `any_of` say and as nothing of `none_of`, as far as this action goes by it.
    pub(super) fn matches(&self, any_of: &Asks, none_of: &Asks, action: Action) -> bool {
        self.is_so(any_of).into_iter().all(|it| it.of_wanted(action))
            && self.is_so(none_of).into_iter().all(|it| it.of_unwanted(action))
    }

    /// Whether it could be read as all of this says; what says nothing is every request.
    pub fn could_be(&self, asks: &Asks) -> bool {
        self.matches(asks, &Asks::default(), Action::Deny)
    }

    /// Of each list that is given, and of each header, how likely it is.
    fn is_so(&self, asks: &Asks) -> Vec<Likely> {
        let Asks { methods, hosts, paths, headers, claims } = asks;
        let mut all = vec![];
        if !methods.is_empty() {
            let Likely { certainly, .. } =
                every(&self.methods, |it| methods.iter().any(|method| method == it));
            let Likely { possibly, .. } =
                every(&self.methods, |it| methods.iter().any(|method| method.eq_ignore_ascii_case(it)));
            all.push(Likely { certainly, possibly });
        }
        if !hosts.is_empty() {
            all.push(self.hosts.as_ref().map_or(UNKNOWN, |of| host_is(of, hosts)));
        }
        if !paths.is_empty() {
            all.push(self.paths.as_ref().map_or(UNKNOWN, |of| path_is(of, paths)));
        }
        all.extend(headers.iter().map(|header| self.header_is(header)));
        all.extend(claims.iter().map(|wanted| match self.claims.map(|claims| claims.is(wanted)) {
            Some(is) => Likely { certainly: is, possibly: is },
            None => UNKNOWN,
        }));
        all
    }

    fn header_is(&self, wanted: &HeaderPattern) -> Likely {
        let values: Vec<_> = self.asked.headers.get_all(wanted.name.as_str()).iter().collect();
        let there = !values.is_empty();
        if !there || wanted.values.is_empty() {
            return Likely { certainly: there, possibly: there };
        }
        let texts: Vec<Cow<'_, str>> =
            values.iter().map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
        let is_text = values.iter().all(|value| value.to_str().is_ok());
        let is = |text: &str| wanted.values.iter().any(|pattern| pattern.matches(text));
        let Likely { certainly, possibly } = every(&texts, |text| is(text));
        // Several headers of a name are one with commas to some (RFC 9110, section 5.3), and any of them to others.
        Likely { certainly: is_text && certainly, possibly: !is_text || possibly || is(&texts.join(",")) }
    }
}

/// What an action makes of likelihood. Of several things that are wanted each has to be so; of things that are not wanted
/// none may be.
impl Likely {
    fn of_wanted(self, action: Action) -> bool {
        match action {
            Action::Allow => self.certainly,
            Action::Deny => self.possibly,
        }
    }

    fn of_unwanted(self, action: Action) -> bool {
        match action {
            Action::Allow => !self.possibly,
            Action::Deny => !self.certainly,
        }
    }
}

/// What is so in every reading, and what is so in one.
fn every<T>(readings: &[T], is: impl Fn(&T) -> bool) -> Likely {
    let so = readings.iter().filter(|reading| is(reading)).count();
    Likely { certainly: so == readings.len() && so > 0, possibly: so > 0 }
}

fn methods<'a>(asked: &Asked<'a>) -> Vec<Cow<'a, str>> {
    let named = OVERRIDES.iter().flat_map(|name| asked.headers.get_all(*name));
    let others =
        named.filter_map(|value| value.to_str().ok()).map(|value| value.trim().to_ascii_uppercase().into());
    std::iter::once(asked.method.as_str().into()).chain(others).collect()
}

/// The target's, and the header's: servers take either (RFC 9112, section 3.2.2; RFC 9113, section 8.3.1).
fn hosts(asked: &Asked<'_>) -> Option<Vec<String>> {
    let of_target = asked.uri.authority().map(|authority| Some(authority.as_str()));
    let of_header = asked.headers.get_all(http::header::HOST).iter().map(|value| value.to_str().ok());
    let plain = |host: Option<&str>| {
        let host = host?.rsplit('@').next()?.to_ascii_lowercase();
        (!host.is_empty()).then_some(host)
    };
    let mut all = of_target.into_iter().chain(of_header).map(plain).collect::<Option<Vec<_>>>()?;
    all.sort();
    all.dedup();
    (!all.is_empty()).then_some(all)
}

fn host_is(readings: &[String], patterns: &[TextPattern]) -> Likely {
    every(readings, |host| {
        let bare = without_port(host).trim_end_matches('.');
        patterns.iter().any(|pattern| pattern.matches(host) || pattern.matches(bare))
    })
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((bare, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !bare.ends_with(':') => bare,
        _ => host,
    }
}

/// A path as it stands with nothing encoded, and with dots and double slashes resolved (RFC 3986, sections 6.2.2 and 5.2.4).
/// `None` for what has no one reading: a slash, a backslash, a semicolon or a percent that is encoded, or that servers make
/// something of; what is no UTF-8; dots that lead out of the root.
fn paths(path: &str) -> Option<Vec<String>> {
    if path == "*" {
        return Some(vec![path.to_owned()]);
    }
    let decoded = decoded(path)?;
    let resolved = resolved(&decoded)?;
    Some(if resolved == decoded { vec![decoded] } else { vec![decoded, resolved] })
}

fn decoded(path: &str) -> Option<String> {
    let mut bytes = path.bytes();
    let mut all = Vec::with_capacity(path.len());
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'\\' | b';' => return None,
            b'%' => {
                let digit = |byte: Option<u8>| (byte? as char).to_digit(16);
                let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
                match u8::try_from(high * 16 + low).ok()? {
                    b'/' | b'\\' | b';' | b'%' | b'?' | b'#' => return None,
                    other => other,
                }
            }
            plain => plain,
        };
        if byte.is_ascii_control() {
            return None;
        }
        all.push(byte);
    }
    String::from_utf8(all).ok().filter(|path| path.starts_with('/'))
}

fn resolved(path: &str) -> Option<String> {
    let mut kept: Vec<&str> = vec![];
    let mut ends_open = false;
    for segment in path.split('/') {
        ends_open = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." => {
                kept.pop()?;
            }
            name => kept.push(name),
        }
    }
    let mut whole = String::with_capacity(path.len());
    for name in &kept {
        whole.push('/');
        whole.push_str(name);
    }
    if ends_open {
        whole.push('/');
    }
    Some(whole)
}

/// A path may be another one's with a slash at its end, or in letters of another case; no server has to think so.
fn path_is(readings: &[String], patterns: &[TextPattern]) -> Likely {
    let Likely { certainly, possibly } =
        every(readings, |path| patterns.iter().any(|pattern| pattern.matches(path)));
    let loosely = |path: &String| {
        let bare = path.strip_suffix('/').unwrap_or(path);
        patterns.iter().any(|it| {
            it.matches_any_case(path) || it.matches_any_case(bare) || it.matches_any_case(&format!("{bare}/"))
        })
    };
    Likely { certainly, possibly: possibly || readings.iter().any(loosely) }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

    use super::*;

    fn patterns(texts: &[&str]) -> Vec<TextPattern> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn with_paths(texts: &[&str]) -> Asks {
        Asks { paths: patterns(texts), ..Asks::default() }
    }

    /// Whether an allow rule for these requests, and a deny rule, matches this one.
    fn by(asks: &Asks, method: &str, uri: &str, headers: &[(&str, &[u8])]) -> [bool; 2] {
        let method: Method = method.parse().unwrap();
        let uri: Uri = uri.parse().unwrap();
        let mut all = HeaderMap::new();
        for (name, value) in headers {
            let name: HeaderName = name.parse().unwrap();
            all.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        let reading = Reading::of(&Asked { method: &method, uri: &uri, headers: &all });
        [Action::Allow, Action::Deny].map(|action| reading.matches(asks, &Asks::default(), action))
    }

    const BOTH: [bool; 2] = [true, true];
    const NEITHER: [bool; 2] = [false, false];
    /// Not allowed by it, and denied by it.
    const REFUSED: [bool; 2] = [false, true];

    #[test]
    fn what_a_server_may_read_in_another_way_is_never_allowed_and_always_denied() {
        let admin = with_paths(&["/admin", "/admin/*"]);
        for (path, expected) in [
            ("/admin", BOTH),
            ("/admin?x=/shop", BOTH),
            ("/admin/users", BOTH),
            ("/%61dmin", BOTH),
            ("/shop", NEITHER),
            ("/shop/admin", NEITHER),
            ("/administrator", NEITHER),
            ("/100%20", NEITHER),
            ("/caf%C3%A9", NEITHER),
            // Letters, slashes and dots.
            ("/ADMIN", REFUSED),
            ("/Admin/users", REFUSED),
            ("//admin", REFUSED),
            ("/./admin", REFUSED),
            ("/%2e/admin", REFUSED),
            ("/shop/../admin", REFUSED),
            ("/shop/%2E%2e/admin", REFUSED),
            ("/admin/../shop", REFUSED),
            ("/admin//users", BOTH),
            // What has no one reading.
            ("/shop%2fadmin", REFUSED),
            ("/shop%5Cadmin", REFUSED),
            ("/shop/..;/admin", REFUSED),
            ("/shop;x=1", REFUSED),
            ("/shop%3bx", REFUSED),
            ("/%2561dmin", REFUSED),
            ("/%c0%af", REFUSED),
            ("/%zz", REFUSED),
            ("/%6", REFUSED),
            ("/shop%00", REFUSED),
            ("/../admin", REFUSED),
            ("/shop%3f", REFUSED),
        ] {
            assert_eq!(by(&admin, "GET", path, &[]), expected, "{path}");
        }
        assert_eq!(by(&with_paths(&["/admin"]), "GET", "/admin/", &[]), REFUSED);
        assert_eq!(by(&with_paths(&["/admin/"]), "GET", "/admin", &[]), REFUSED);
        assert_eq!(by(&with_paths(&["/café"]), "GET", "/caf%C3%A9", &[]), BOTH);
        assert_eq!(by(&with_paths(&["*"]), "OPTIONS", "*", &[]), BOTH);
    }

    #[test]
    fn what_is_left_out_is_left_out_in_every_reading() {
        let (all, admin) = (with_paths(&["*"]), with_paths(&["/admin*"]));
        let matches = |path: &str, action| {
            let uri: Uri = path.parse().unwrap();
            let (method, headers) = (Method::GET, HeaderMap::new());
            let asked = Asked { method: &method, uri: &uri, headers: &headers };
            Reading::of(&asked).matches(&all, &admin, action)
        };
        // Whichever path it is, all but /admin: allowed only if it certainly is not, denied unless it certainly is.
        for (path, allowed, denied) in [
            ("/shop", true, true),
            ("/admin", false, false),
            ("/ADMIN", false, true),
            ("/shop/../admin", false, true),
            ("/shop%2f", false, true),
        ] {
            assert_eq!(
                (matches(path, Action::Allow), matches(path, Action::Deny)),
                (allowed, denied),
                "{path}"
            );
        }
    }

    #[test]
    fn a_method_may_be_another_by_a_header() {
        let get = Asks { methods: vec!["GET".into()], ..Asks::default() };
        let delete = Asks { methods: vec!["DELETE".into(), "PUT".into()], ..Asks::default() };
        assert_eq!(by(&get, "GET", "/", &[]), BOTH);
        assert_eq!(by(&get, "get", "/", &[]), REFUSED);
        assert_eq!(by(&delete, "GET", "/", &[]), NEITHER);
        let other: &[(&str, &[u8])] = &[("x-http-method-override", b"delete ")];
        assert_eq!(by(&get, "GET", "/", other), REFUSED);
        assert_eq!(by(&delete, "GET", "/", other), REFUSED);
    }

    #[test]
    fn a_host_is_the_targets_and_the_headers() {
        let shop = Asks { hosts: patterns(&["shop.example", "*.shop.example"]), ..Asks::default() };
        let host = |host: &'static [u8]| [("host", host)];
        for (value, expected) in [
            (&b"shop.example"[..], BOTH),
            (b"SHOP.example:8080", BOTH),
            (b"shop.example.", BOTH),
            (b"a.shop.example", BOTH),
            (b"me@shop.example", BOTH),
            (b"shop.example.org", NEITHER),
            (b"[::1]:80", NEITHER),
            (b"shop\xff", REFUSED),
            (b"", REFUSED),
        ] {
            assert_eq!(by(&shop, "GET", "/", &host(value)), expected, "{}", String::from_utf8_lossy(value));
        }
        assert_eq!(by(&shop, "GET", "/", &[]), REFUSED, "nobody says which");
        assert_eq!(by(&shop, "GET", "http://shop.example/", &[]), BOTH);
        assert_eq!(by(&shop, "GET", "http://shop.example/", &host(b"other.example")), REFUSED);
        let with_port = Asks { hosts: patterns(&["shop.example:8080"]), ..Asks::default() };
        assert_eq!(by(&with_port, "GET", "/", &host(b"shop.example:8080")), BOTH);
        assert_eq!(by(&with_port, "GET", "/", &host(b"shop.example:80")), NEITHER);
    }

    #[test]
    fn all_headers_of_a_name_count() {
        let header = |name: &str, values: &[&str]| Asks {
            headers: vec![HeaderPattern { name: name.into(), values: patterns(values) }],
            ..Asks::default()
        };
        let one = header("x-tenant", &["one", "on*"]);
        assert_eq!(by(&one, "GET", "/", &[("x-tenant", b"one")]), BOTH);
        assert_eq!(by(&one, "GET", "/", &[("X-Tenant", b"only"), ("x-tenant", b"one")]), BOTH);
        assert_eq!(by(&one, "GET", "/", &[("x-tenant", b"one"), ("x-tenant", b"two")]), REFUSED);
        assert_eq!(by(&one, "GET", "/", &[("x-tenant", b"two")]), NEITHER);
        assert_eq!(by(&one, "GET", "/", &[("x-tenant", b"tw\xff")]), REFUSED);
        assert_eq!(by(&one, "GET", "/", &[]), NEITHER);
        let there = header("x-debug", &[]);
        assert_eq!(by(&there, "GET", "/", &[("x-debug", b"")]), BOTH);
        assert_eq!(by(&there, "GET", "/", &[]), NEITHER);
        let joined = header("x-list", &["a,b"]);
        assert_eq!(by(&joined, "GET", "/", &[("x-list", b"a"), ("x-list", b"b")]), REFUSED);
    }

    #[test]
    fn every_list_that_is_given_must_match() {
        let asks = Asks { methods: vec!["GET".into()], ..with_paths(&["/a"]) };
        assert_eq!(by(&asks, "GET", "/a", &[]), BOTH);
        assert_eq!(by(&asks, "GET", "/b", &[]), NEITHER);
        assert_eq!(by(&asks, "PUT", "/a", &[]), NEITHER);
    }
}
