//! Routes of requests as data: what their rules match, where they lead, and what is changed on the way.
//!
//! An HTTPRoute or GRPCRoute of the Gateway API whose parents are services, after the controller has looked up what it
//! refers to. What it means for one request is [`crate::http`]'s; every value of these types means something.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Name, traffic::Traffic};

/// Most bytes that a compiled pattern may take: a route cannot fill an agent.
const MAX_PATTERN: usize = 256 * 1024;

/// The kind of a route. Of the kinds that speak of one port of a service only the most specific counts, in this order
/// (GEP-1426, "Route types").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RouteKind {
    /// `GRPCRoute`.
    Grpc,
    /// `HTTPRoute`.
    Http,
    /// `TLSRoute`; of connections.
    Tls,
    /// `TCPRoute`; of connections.
    Tcp,
}

impl RouteKind {
    /// All.
    pub const ALL: [Self; 4] = [Self::Grpc, Self::Http, Self::Tls, Self::Tcp];
    /// Those of requests.
    pub const OF_REQUESTS: [Self; 2] = [Self::Grpc, Self::Http];

    /// Whether routes of it are of requests, and not of connections.
    pub const fn is_of_requests(self) -> bool {
        matches!(self, Self::Grpc | Self::Http)
    }

    /// `kind:` in a manifest.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "GRPCRoute",
            Self::Http => "HTTPRoute",
            Self::Tls => "TLSRoute",
            Self::Tcp => "TCPRoute",
        }
    }
}

/// How requests to services are routed, as one object says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRoute {
    /// Its kind, one of requests.
    pub kind: RouteKind,
    /// Its name.
    pub name: Name,
    /// `metadata.creationTimestamp`, seconds since 1970; of two that match alike the older one counts. 0 where nobody
    /// says it.
    pub created: i64,
    /// The services that it is accepted for; never empty.
    pub parents: Vec<Parent>,
    /// In their order.
    pub rules: Vec<RouteRule>,
}

/// A service whose requests a route speaks of. Where the route is of another namespace than the service, it speaks of
/// the requests of that namespace's workloads alone (a consumer route, GEP-1426).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Parent {
    /// The service.
    pub service: Name,
    /// One of its ports; none: all of them.
    pub port: Option<u16>,
}

/// Where requests that match lead.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RouteRule {
    /// `name`; empty if it has none.
    pub name: String,
    /// Any of these; none: every request.
    pub matches: Vec<RequestMatch>,
    /// What is done with all of its requests.
    pub filters: Filters,
    /// Where they go, each with a share by its weight.
    pub backends: Vec<Backend>,
    /// How long they may take.
    pub timeouts: Timeouts,
    /// When they are tried again.
    pub retry: Option<Retry>,
    /// Whether later requests of a session go where the first one went.
    pub persistence: Option<Persistence>,
    /// What policies say of its requests. What the rule itself says comes before it.
    #[serde(default)]
    pub traffic: Traffic,
}

/// What a request has to be: all of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RequestMatch {
    /// Its path, or its call.
    pub path: PathMatch,
    /// Each of these headers, by its name in lower case.
    pub headers: Vec<ValueMatch>,
    /// Each of these parameters of its query.
    pub query: Vec<ValueMatch>,
    /// Its method; none: any.
    pub method: Option<String>,
}

/// What a path has to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathMatch {
    /// This.
    Exact(String),
    /// This, or below it, by whole segments; without a slash at its end, so that the root is empty.
    Prefix(String),
    /// All of it as the pattern says.
    Pattern(Pattern),
    /// A call of gRPC, `/SERVICE/METHOD`, each part as it says.
    Call {
        /// The service; none: any.
        service: Option<TextMatch>,
        /// The method; none: any.
        method: Option<TextMatch>,
    },
}

impl Default for PathMatch {
    fn default() -> Self {
        Self::Prefix(String::new())
    }
}

/// What one named value has to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValueMatch {
    /// Its name.
    pub name: String,
    /// Itself.
    pub value: TextMatch,
}

/// What a text has to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TextMatch {
    /// This.
    Exact(String),
    /// All of it as the pattern says.
    Pattern(Pattern),
}

impl TextMatch {
    /// Whether a text is so.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(wanted) => wanted == text,
            Self::Pattern(pattern) => pattern.matches(text),
        }
    }

    /// What it is written as.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Exact(text) => text,
            Self::Pattern(pattern) => pattern.as_str(),
        }
    }
}

/// A regular expression that a text has to match as a whole. In linear time, whatever the text; compiled once.
#[derive(Clone, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Pattern {
    written: String,
    compiled: regex::Regex,
}

/// A text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PatternError(pub String);

impl Pattern {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.written
    }

    /// Whether all of a text is as it says.
    pub fn matches(&self, text: &str) -> bool {
        self.compiled.is_match(text)
    }
}

impl FromStr for Pattern {
    type Err = PatternError;
    fn from_str(text: &str) -> Result<Self, PatternError> {
        let said = |error: regex::Error| {
            let text = error.to_string();
            PatternError(text.lines().last().unwrap_or_default().trim().to_owned())
        };
        // By itself first: what ends a group early would be whole inside of ours.
        regex::RegexBuilder::new(text).size_limit(MAX_PATTERN).build().map_err(said)?;
        let whole = format!("^(?:{text})$");
        let compiled = regex::RegexBuilder::new(&whole).size_limit(MAX_PATTERN).build().map_err(said)?;
        Ok(Self { written: text.to_owned(), compiled })
    }
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;
    fn try_from(text: String) -> Result<Self, PatternError> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.written
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.written == other.written
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.written)
    }
}

/// A share of a rule's requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Where they go.
    pub to: BackendTarget,
    /// The share: this of the sum of all.
    pub weight: u32,
    /// What is done with them besides.
    pub filters: Filters,
}

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendTarget {
    /// To an endpoint of a service.
    Service {
        /// Which.
        service: Name,
        /// Its port.
        port: u16,
    },
    /// Nowhere: what it refers to is not there, or it may not refer to it. Its share is answered with 500, or as connections
    /// refused.
    Nowhere,
}

/// What is done with requests and their answers; each at most once, but for mirrors.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Filters {
    /// `RequestHeaderModifier`.
    pub request_headers: HeaderEdits,
    /// `ResponseHeaderModifier`.
    pub response_headers: HeaderEdits,
    /// `RequestRedirect`: answered, and sent nowhere.
    pub redirect: Option<Redirect>,
    /// `URLRewrite`.
    pub rewrite: Option<Rewrite>,
    /// `RequestMirror`: a copy goes there too, whose answer is thrown away.
    pub mirrors: Vec<Mirror>,
    /// `CORS`.
    pub cors: Option<Cors>,
}

/// What is done with headers: first set, then add, then remove.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HeaderEdits {
    /// These replace what there is of the same name.
    pub set: Vec<(String, String)>,
    /// These come to what there is.
    pub add: Vec<(String, String)>,
    /// These are taken away.
    pub remove: Vec<String>,
}

impl HeaderEdits {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
}

/// An answer that leads elsewhere. What is not said stays as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// The name in the place of the request's.
    pub hostname: Option<String>,
    /// What becomes of the path.
    pub path: Option<PathEdit>,
    /// The port.
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// What a request is sent on with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rewrite {
    /// The name in the place of the request's.
    pub hostname: Option<String>,
    /// What becomes of the path.
    pub path: Option<PathEdit>,
}

/// What becomes of a path; of the query nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathEdit {
    /// This is in its place.
    Full(String),
    /// This is in the place of the prefix that matched.
    Prefix(String),
}

/// Where copies of requests go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// Where.
    pub to: BackendTarget,
    /// How many of `of` requests.
    pub copies: u32,
    /// Never 0.
    pub of: u32,
}

/// What browsers' scripts of other origins may (the Fetch standard, "CORS protocol").
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cors {
    /// These origins; `*` alone is every one, and a `*` within stands for labels of a host's name.
    pub origins: Vec<String>,
    /// These methods; `*` is every one.
    pub methods: Vec<String>,
    /// These headers of the request; `*` is every one.
    pub headers: Vec<String>,
    /// These headers of the answer may be read.
    pub expose: Vec<String>,
    /// With cookies and the like.
    pub credentials: bool,
    /// For how long a browser need not ask again, seconds.
    pub max_age: u32,
}

/// How long a request may take; none: as long as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Timeouts {
    /// From its arrival to the head of its answer, over all attempts.
    pub request: Option<Duration>,
    /// Each attempt.
    pub backend: Option<Duration>,
}

/// When a request is tried again: after a connection that broke, and after one of these answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Statuses of answers.
    pub codes: Vec<u16>,
    /// How often, besides the first time.
    pub attempts: u32,
    /// The pause before the first of them; each next one is twice as long, and all vary by chance.
    pub backoff: Duration,
}

/// By what requests are known to be of one session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Persistence {
    /// The cookie's or the header's name.
    pub name: String,
    /// What carries the session.
    pub by: PersistBy,
    /// For how long a cookie lasts, seconds; none: as long as the client runs.
    pub lifetime: Option<u32>,
}

/// What carries a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PersistBy {
    /// A cookie.
    Cookie,
    /// A header.
    Header,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_of_the_whole_text_and_cannot_close_what_it_did_not_open() {
        let pattern: Pattern = "/a|/b[0-9]+".parse().unwrap();
        for (text, expected) in [("/a", true), ("/b12", true), ("/ab", false), ("x/a", false), ("/b", false)]
        {
            assert_eq!(pattern.matches(text), expected, "{text}");
        }
        assert!("a)(b".parse::<Pattern>().is_err());
        assert!("(".parse::<Pattern>().is_err());
        assert!("(a{1000}){1000}".parse::<Pattern>().is_err(), "it would be as large as it likes");
    }
}
