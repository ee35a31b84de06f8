//! Who asks, besides the workload that connects: the end user whose token (JWT) a request bears. The one decision that
//! agents enforce and `meshctl why` explains; `docs/operate/authentication.md` tells it to people.
//!
//! Invariants, each a test: a policy more never lets more requests through; a token that cannot be verified is refused also
//! where none is required; a request with two tokens is refused; claims are known of verified tokens alone; an audited policy
//! changes nothing of what is decided, and nothing of a request.
//!
//! | module | what |
//! |---|---|
//! | [`places`] | where tokens are in a request |
//! | [`token`] | one token, and whether it is verified |
//! | [`jwks`] | the keys that it is verified with |

pub mod jwks;
mod places;
mod token;

use std::{borrow::Cow, collections::HashSet};

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use serde_json::{Map, Value};

use self::token::Token;
pub use self::token::{LEEWAY, MAX_TOKEN};
use crate::{
    http::matches::Asked,
    model::{Authentication, ClaimPattern, Name, TokenIssuer, TokenPlace},
    policy::{Reads, WouldRefuse},
    refusal::Reason,
};

/// What a verified token says.
#[derive(Debug, Clone, PartialEq)]
pub struct Claims(Map<String, Value>);

impl Claims {
    /// Those of a token that is verified.
    pub(crate) fn new(claims: Map<String, Value>) -> Self {
        Self(claims)
    }

    fn get(&self, name: &str) -> Option<&Value> {
        let found = if name.starts_with('/') { self.pointer(name) } else { self.0.get(name) };
        found.filter(|value| !value.is_null())
    }

    /// RFC 6901, over a map that is no value of its own.
    fn pointer(&self, pointer: &str) -> Option<&Value> {
        let (first, rest) = match pointer[1..].split_once('/') {
            Some((first, _)) => (first, &pointer[1 + first.len()..]),
            None => (&pointer[1..], ""),
        };
        self.0.get(&first.replace("~1", "/").replace("~0", "~"))?.pointer(rest)
    }

    /// Whether a claim is as wanted. Of a list, and of the words of `scope` (RFC 8693, section 4.2), any may be it.
    pub(crate) fn is(&self, wanted: &ClaimPattern) -> bool {
        let Some(value) = self.get(&wanted.name) else { return false };
        let matches = |text: &str| wanted.values.iter().any(|pattern| pattern.matches(text));
        if wanted.values.is_empty() {
            return true;
        }
        match value {
            Value::String(words) if wanted.name == "scope" => words.split(' ').any(matches),
            Value::Array(all) => all.iter().filter_map(scalar).any(|text| matches(&text)),
            other => scalar(other).is_some_and(|text| matches(&text)),
        }
    }
}

/// A text, a number or a truth, as a text.
fn scalar(value: &Value) -> Option<Cow<'_, str>> {
    match value {
        Value::String(text) => Some(text.into()),
        Value::Number(number) => Some(number.to_string().into()),
        Value::Bool(is) => Some(is.to_string().into()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A request that may go on, as far as end users are concerned.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Authenticated {
    /// Of its token; `None` if it has none.
    pub claims: Option<Claims>,
    edits: Edits,
}

/// What becomes of a request's head before anybody else looks at it.
#[derive(Debug, Clone, Default, PartialEq)]
struct Edits {
    /// Where the token is taken away.
    strip: Option<TokenPlace>,
    /// Headers that nobody but us may set.
    ours: Vec<String>,
    /// What they are.
    set: Vec<(String, String)>,
}

impl Authenticated {
    /// Takes away what the application must not see, and tells it what it shall know.
    pub fn apply(&self, uri: &mut Uri, headers: &mut HeaderMap) {
        let Edits { strip, ours, .. } = &self.edits;
        if let Some(place) = strip {
            places::strip(place, uri, headers);
        }
        for name in ours {
            places::remove_like(name, headers);
        }
        self.tell(headers);
    }

    /// Tells the application what it shall know: once more, where something may have taken that away.
    pub fn tell(&self, headers: &mut HeaderMap) {
        let Edits { set, .. } = &self.edits;
        for (name, value) in set {
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
    }
}

/// Why a request is refused: 401.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unauthenticated {
    /// In a word.
    pub reason: Reason,
    /// The policy that says so; the first by name.
    pub policy: Name,
    /// Where its token was, for the log: never the token.
    pub place: Option<TokenPlace>,
}

impl std::fmt::Display for Unauthenticated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AuthenticationPolicy {}", self.policy)?;
        self.place.iter().try_for_each(|place| write!(f, ", {place}"))
    }
}

/// Whether one of these policies, which select a workload, says something of requests to this port: then all that comes to
/// it has to be read, and what cannot be is refused, [`Reason::TokenUnreadable`]. Audited ones refuse nothing.
pub fn covers<'p>(policies: impl IntoIterator<Item = &'p Authentication>, port: u16) -> Option<&'p Name> {
    let covers = |policy: &&Authentication| policy.is_enforced() && policy.has_port(port);
    policies.into_iter().find(covers).map(|policy| &policy.name)
}

/// Whether requests to this port have to be read for these policies, which select a workload.
pub fn reads<'p>(policies: impl IntoIterator<Item = &'p Authentication>, port: u16) -> Reads {
    let of = |policy: &Authentication| match (policy.has_port(port), policy.is_enforced()) {
        (false, _) => Reads::No,
        (true, false) => Reads::Audit,
        (true, true) => Reads::Enforce,
    };
    policies.into_iter().map(of).max().unwrap_or(Reads::No)
}

/// Whose request it is, by all enforced policies that select a workload. Each of them has to be content with the one token.
/// `now`: seconds since 1970.
pub fn authenticate<'p>(
    policies: impl IntoIterator<Item = &'p Authentication>,
    port: u16,
    asked: &Asked<'_>,
    now: i64,
) -> Result<Authenticated, Unauthenticated> {
    let decides = |policy: &&Authentication| policy.is_enforced() && policy.has_port(port);
    judge(&policies.into_iter().filter(decides).collect::<Vec<_>>(), asked, now)
}

/// What audited policies would refuse of a request that goes on, had they been enforced beside all others; `None` for the
/// request: of what cannot be read.
pub fn would_refuse<'p>(
    policies: impl IntoIterator<Item = &'p Authentication>,
    port: u16,
    asked: Option<&Asked<'_>>,
    now: i64,
) -> Option<WouldRefuse> {
    let of_port = policies.into_iter().filter(|policy| policy.has_port(port));
    let policies: Vec<&Authentication> = of_port.collect();
    let first = policies.iter().find(|policy| !policy.is_enforced())?;
    let (named, reason) = match asked {
        None => (first.name.clone(), Reason::TokenUnreadable),
        Some(asked) => judge(&policies, asked, now).err().map(|no| (no.policy, no.reason))?,
    };
    // Without the audited ones it goes on, so one of these it is, whichever noticed.
    let audited = policies.iter().any(|policy| !policy.is_enforced() && policy.name == named);
    Some(WouldRefuse { policy: if audited { named } else { first.name.clone() }, rule: None, reason })
}

/// By these policies, whatever comes of it.
fn judge(
    policies: &[&Authentication],
    asked: &Asked<'_>,
    now: i64,
) -> Result<Authenticated, Unauthenticated> {
    let Some(first) = policies.first() else { return Ok(Authenticated::default()) };
    let no = |policy: &Authentication, reason, place: Option<&TokenPlace>| Unauthenticated {
        reason,
        policy: policy.name.clone(),
        place: place.cloned(),
    };

    // The one token, wherever one of them looks for it.
    let mut looked: HashSet<&TokenPlace> = HashSet::new();
    let mut found: Option<(&TokenPlace, Cow<'_, str>)> = None;
    for policy in policies {
        for place in policy.issuers.iter().flat_map(|issuer| &issuer.places) {
            if !looked.insert(place) {
                continue;
            }
            match places::find(place, asked).map_err(|reason| no(policy, reason, Some(place)))? {
                Some(_) if found.is_some() => return Err(no(policy, Reason::TokenAmbiguous, Some(place))),
                Some(token) => found = Some((place, token)),
                None => {}
            }
        }
    }
    let told_by = policies.iter().flat_map(|policy| &policy.issuers).flat_map(|issuer| &issuer.headers);
    let ours: Vec<String> = told_by.map(|it| it.header.clone()).collect();
    let Some((place, text)) = found else {
        return match policies.iter().find(|policy| policy.required) {
            Some(policy) => Err(no(policy, Reason::TokenMissing, None)),
            None => Ok(Authenticated { claims: None, edits: Edits { ours, ..Edits::default() } }),
        };
    };

    // Each policy verifies it.
    let token = Token::parse(&text).map_err(|reason| no(first, reason, Some(place)))?;
    let mut authenticated = Authenticated { claims: None, edits: Edits { ours, ..Edits::default() } };
    for policy in policies {
        let issuer = policy.issuers.iter().find(|it| Some(it.issuer.as_str()) == token.issuer());
        let issuer = issuer.filter(|it| it.places.contains(place));
        let verified = issuer.ok_or(Reason::TokenIssuer).and_then(|it| Ok((it, token.verify(it, now)?)));
        let (issuer, claims) = verified.map_err(|reason| no(policy, reason, Some(place)))?;
        let edits = &mut authenticated.edits;
        if issuer.strip {
            edits.strip = Some(place.clone());
        }
        edits.set.extend(told(issuer, &claims));
        authenticated.claims = Some(claims);
    }
    Ok(authenticated)
}

/// What the application is told, by header: scalars as they are, all else as JSON.
fn told<'a>(issuer: &'a TokenIssuer, claims: &'a Claims) -> impl Iterator<Item = (String, String)> + 'a {
    issuer.headers.iter().filter_map(|it| {
        let value = claims.get(&it.claim)?;
        let text = scalar(value).map_or_else(|| value.to_string(), Cow::into_owned);
        Some((it.header.clone(), text))
    })
}

#[cfg(test)]
mod tests;
