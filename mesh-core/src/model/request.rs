//! What a policy says of requests: methods, hosts, paths, headers. What they mean for one is
//! [`crate::policy::request`]'s.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::ClaimPattern;

/// What is asked of a request: of each list that is given an entry must match; of the headers and claims, all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Asks {
    /// Methods, as they are sent: upper case, as a rule.
    pub methods: Vec<String>,
    /// Hosts, in lower case; one without a port is of every port.
    pub hosts: Vec<TextPattern>,
    /// Paths, with nothing percent-encoded, and without a query.
    pub paths: Vec<TextPattern>,
    /// Headers.
    pub headers: Vec<HeaderPattern>,
    /// Claims of a verified token.
    pub claims: Vec<ClaimPattern>,
}

impl Asks {
    /// Whether it says nothing: then requests need not be read for it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many things a request is compared with.
    pub fn len(&self) -> usize {
        let Self { methods, hosts, paths, headers, claims } = self;
        let of_headers = headers.iter().map(|header| 1 + header.values.len());
        let of_claims = claims.iter().map(|claim| 1 + claim.values.len());
        methods.len() + hosts.len() + paths.len() + of_headers.chain(of_claims).sum::<usize>()
    }

    pub(super) fn describe(&self) -> Vec<String> {
        let Self { methods, hosts, paths, headers, claims } = self;
        let headers = headers.iter().map(|header| Some(format!("header {header}")));
        let claims = claims.iter().map(|claim| Some(format!("claim {claim}")));
        let lists = [
            super::policy::list("method", methods),
            super::policy::list("host", hosts),
            super::policy::list("path", paths),
        ];
        lists.into_iter().chain(headers).chain(claims).flatten().collect()
    }
}

/// A header that has one of these values; without any, one that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderPattern {
    /// Its name, in lower case.
    pub name: String,
    /// Any of these.
    pub values: Vec<TextPattern>,
}

impl fmt::Display for HeaderPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_named(f, &self.name, &self.values)
    }
}

/// What has a name and one of some values.
pub(super) fn fmt_named(f: &mut fmt::Formatter<'_>, name: &str, values: &[TextPattern]) -> fmt::Result {
    f.write_str(name)?;
    for (index, value) in values.iter().enumerate() {
        write!(f, "{}{value}", if index == 0 { ": " } else { " or " })?;
    }
    Ok(())
}

/// A text, or what one begins or ends with: `/cart`, `/cart/*`, `*.pdf`, `*`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum TextPattern {
    /// This one.
    Exact(String),
    /// All that begin so; with nothing, all.
    Prefix(String),
    /// All that end so.
    Suffix(String),
}

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextPatternError {
    /// It would match nothing.
    #[error("it is empty")]
    Empty,
    /// The wildcard stands where none may.
    #[error("'{0}': one '*' may stand, at the beginning or at the end")]
    Wildcard(String),
}

impl TextPattern {
    /// Whether it matches this text.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == exact,
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
            Self::Suffix(suffix) => text.ends_with(suffix.as_str()),
        }
    }

    /// Whether it matches this text for whoever makes nothing of the case of letters.
    pub fn matches_any_case(&self, text: &str) -> bool {
        let lower = |text: &str| text.to_lowercase();
        match self {
            Self::Exact(exact) => lower(text) == lower(exact),
            Self::Prefix(prefix) => lower(text).starts_with(&lower(prefix)),
            Self::Suffix(suffix) => lower(text).ends_with(&lower(suffix)),
        }
    }

    /// Whether it matches all that the other one matches. Says so only when it is certain.
    pub fn covers(&self, narrow: &Self) -> bool {
        match (self, narrow) {
            (_, Self::Exact(text)) => self.matches(text),
            (Self::Prefix(wide), Self::Prefix(narrow)) => narrow.starts_with(wide.as_str()),
            (Self::Prefix(wide), Self::Suffix(_)) => wide.is_empty(),
            (Self::Suffix(wide), Self::Suffix(narrow)) => narrow.ends_with(wide.as_str()),
            (Self::Exact(_), _) | (Self::Suffix(_), Self::Prefix(_)) => false,
        }
    }
}

impl FromStr for TextPattern {
    type Err = TextPatternError;
    fn from_str(text: &str) -> Result<Self, TextPatternError> {
        let pattern = match (text.strip_prefix('*'), text.strip_suffix('*')) {
            _ if text.is_empty() => return Err(TextPatternError::Empty),
            (_, Some(prefix)) => Self::Prefix(prefix.to_owned()),
            (Some(suffix), None) => Self::Suffix(suffix.to_owned()),
            (None, None) => Self::Exact(text.to_owned()),
        };
        let (Self::Exact(rest) | Self::Prefix(rest) | Self::Suffix(rest)) = &pattern;
        if rest.contains('*') {
            return Err(TextPatternError::Wildcard(text.chars().take(300).collect()));
        }
        Ok(pattern)
    }
}

impl fmt::Display for TextPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(exact) => f.write_str(exact),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
        }
    }
}

impl From<TextPattern> for String {
    fn from(pattern: TextPattern) -> Self {
        pattern.to_string()
    }
}

impl TryFrom<String> for TextPattern {
    type Error = TextPatternError;
    fn try_from(text: String) -> Result<Self, TextPatternError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_at_one_end() {
        for (pattern, matching, other) in [
            ("/cart", "/cart", "/cart/"),
            ("/cart/*", "/cart/1", "/cart"),
            ("*.pdf", "/a.pdf", "/a.pdf.exe"),
            ("*", "", "-"),
        ] {
            let parsed: TextPattern = pattern.parse().unwrap();
            assert_eq!(parsed.to_string(), pattern);
            assert!(parsed.matches(matching), "{pattern} {matching}");
            assert!(pattern == "*" || !parsed.matches(other), "{pattern} {other}");
        }
        assert_eq!("".parse::<TextPattern>(), Err(TextPatternError::Empty));
        for wrong in ["a*b", "**", "*a*"] {
            assert_eq!(wrong.parse::<TextPattern>(), Err(TextPatternError::Wildcard(wrong.to_owned())));
        }
    }

    #[test]
    fn a_wider_pattern_covers_a_narrower_one() {
        let covers =
            |wide: &str, narrow: &str| wide.parse::<TextPattern>().unwrap().covers(&narrow.parse().unwrap());
        for (wide, narrow) in
            [("*", "/a"), ("*", "*a"), ("/a*", "/a/*"), ("/a*", "/ab"), ("*b", "*ab"), ("*b", "ab")]
        {
            assert!(covers(wide, narrow) && !covers(narrow, wide), "{wide} {narrow}");
        }
        assert!(!covers("/a*", "*a") && !covers("*a", "/a*"));
    }
}
