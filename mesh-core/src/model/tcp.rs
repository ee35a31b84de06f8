//! Routes of connections as data: for which names of servers they are, and where they lead.
//!
//! A TCPRoute or TLSRoute of the Gateway API whose parents are services, after the controller has looked up what it refers
//! to. It stands in the port of the service that it speaks of, where an agent that does not know of it passes it over. What
//! it means for one connection is [`crate::tcp`]'s.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    Name,
    http::{BackendTarget, RouteKind},
};

/// Longest name of a server, characters (RFC 1035, section 2.3.4).
const MAX_HOSTNAME: usize = 253;
/// Longest part of one between dots (the same).
const MAX_LABEL: usize = 63;

/// Where connections to a port of a service lead, as one object says it. Where it is of another namespace than the service,
/// it speaks of the connections of that namespace's workloads alone (a consumer route, GEP-1426).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionRoute {
    /// `TLSRoute` or `TCPRoute`.
    pub kind: RouteKind,
    /// Its name.
    pub name: Name,
    /// `metadata.creationTimestamp`, seconds since 1970; of two that are for the same the older one counts. 0 where nobody
    /// says it.
    pub created: i64,
    /// The servers that it is for, by the names that clients ask for in TLS; of a TCPRoute none.
    pub hostnames: Vec<Hostname>,
    /// Where its connections go.
    pub backends: Vec<Share>,
}

impl ConnectionRoute {
    /// The namespace whose workloads it is for; `None`: for those of all that have none of their own.
    pub fn clients(&self, service: &Name) -> Option<&str> {
        (self.name.namespace != service.namespace).then_some(self.name.namespace.as_str())
    }
}

/// A share of a route's connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Where they go.
    pub to: BackendTarget,
    /// How many: this of the sum of all.
    pub weight: u32,
}

/// A name of a server, or of all below a domain; in lower case. No address, as clients do not ask for one (RFC 6066,
/// section 3).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Hostname {
    /// This.
    Exact(String),
    /// `*.DOMAIN`: every name that ends with the domain and has more before it.
    Under(String),
}

/// A text is no name of a server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a name of a server: write one in lower case, such as db.example.com or *.example.com")]
pub struct HostnameError(pub String);

impl FromStr for Hostname {
    type Err = HostnameError;
    fn from_str(text: &str) -> Result<Self, HostnameError> {
        let (domain, make): (&str, fn(String) -> Self) = match text.strip_prefix("*.") {
            Some(domain) => (domain, Self::Under),
            None => (text, Self::Exact),
        };
        let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let is_label = |label: &str| {
            let bytes = label.as_bytes();
            let ends = bytes.first().into_iter().chain(bytes.last());
            (1..=MAX_LABEL).contains(&label.len())
                && bytes.iter().all(|byte| is_letter(*byte) || *byte == b'-')
                && ends.into_iter().all(|byte| is_letter(*byte))
        };
        let is_name = text.len() <= MAX_HOSTNAME && domain.split('.').all(is_label);
        match is_name && domain.parse::<IpAddr>().is_err() {
            true => Ok(make(domain.to_owned())),
            false => Err(HostnameError(text.chars().take(300).collect())),
        }
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Under(domain) => write!(f, "*.{domain}"),
        }
    }
}

impl From<Hostname> for String {
    fn from(name: Hostname) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for Hostname {
    type Error = HostnameError;
    fn try_from(text: String) -> Result<Self, HostnameError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_name_of_a_server_is_refused() {
        for text in ["a", "db.example.com", "*.example.com", "1.2.3.4.example", "x-1.y"] {
            assert_eq!(text.parse::<Hostname>().map(|it| it.to_string()).as_deref(), Ok(text));
        }
        let long = format!("{}.example", "a".repeat(64));
        for text in [
            "",
            "*",
            "*.",
            ".a",
            "a.",
            "a..b",
            "A.b",
            "a_b",
            "-a",
            "a-",
            "10.0.0.1",
            "*.10.0.0.1",
            "a.*.b",
            &long,
        ] {
            assert!(text.parse::<Hostname>().is_err(), "{text}");
        }
        let longest = ["a".repeat(63).as_str(); 4].join(".");
        assert!(longest.parse::<Hostname>().is_err(), "{} characters", longest.len());
    }
}
