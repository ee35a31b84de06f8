//! How long requests may take, when they are tried again, and which of them stay together.

use std::time::Duration;

use mesh_core::model::{
    Name,
    http::{PersistBy, Persistence, Retry, Timeouts},
};
use serde::Deserialize;

use super::{
    super::{super::document::one_of, check::Check},
    MAX_MATCHES,
    matches::is_token,
};
use crate::digest::{digest, hex};

/// How often a request is tried again if nobody says it, and at most: with more an outage would feed itself.
const DEFAULT_ATTEMPTS: u32 = 1;
pub(in crate::source::manifest) const MAX_ATTEMPTS: u32 = 32;
/// The pause before the first of them if nobody says it.
const DEFAULT_BACKOFF: Duration = Duration::from_millis(25);
/// Longest name of a session (Gateway API).
const MAX_SESSION: usize = 128;

/// How long a request may take.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::source::manifest) struct RawTimeouts {
    /// From its arrival to the head of its answer, over all attempts, such as 10s; 0s is as long as it likes.
    #[cfg_attr(test, schemars(length(max = 32)))]
    request: Option<String>,
    /// Each attempt.
    #[cfg_attr(test, schemars(length(max = 32)))]
    backend_request: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRetry {
    #[serde(default)]
    codes: Vec<u16>,
    attempts: Option<u32>,
    backoff: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawSession {
    session_name: Option<String>,
    r#type: Option<String>,
    absolute_timeout: Option<String>,
    idle_timeout: Option<String>,
    cookie_config: Option<RawCookie>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawCookie {
    lifetime_type: Option<String>,
}

impl Check<'_> {
    pub(in crate::source::manifest) fn timeouts(&mut self, at: &str, raw: Option<RawTimeouts>) -> Timeouts {
        let Some(raw) = raw else { return Timeouts::default() };
        let mut time = |name: &str, text: Option<String>| {
            let time = text.and_then(|text| self.duration(&format!("{at}.{name}"), &text));
            // Zero is none.
            time.filter(|time| !time.is_zero())
        };
        let (request, backend) = (time("request", raw.request), time("backendRequest", raw.backend_request));
        if request.zip(backend).is_some_and(|(request, backend)| backend > request) {
            let reason = "an attempt cannot take longer than the request that it is for";
            self.problem(&format!("{at}.backendRequest"), reason, "write at most what 'request' says");
        }
        Timeouts { request, backend }
    }

    pub(super) fn retry(&mut self, at: &str, raw: RawRetry) -> Retry {
        self.failures(&format!("{at}.codes"), &raw.codes);
        let attempts = raw.attempts.unwrap_or(DEFAULT_ATTEMPTS);
        if attempts > MAX_ATTEMPTS {
            let cure = format!("write at most {MAX_ATTEMPTS}");
            self.problem(&format!("{at}.attempts"), format!("{attempts} attempts are too many"), cure);
        }
        let backoff = raw.backoff.and_then(|text| self.duration(&format!("{at}.backoff"), &text));
        Retry { codes: raw.codes, attempts, backoff: backoff.unwrap_or(DEFAULT_BACKOFF) }
    }

    /// Statuses after which a request is tried again.
    pub(in crate::source::manifest) fn failures(&mut self, field: &str, codes: &[u16]) {
        self.limit(field, codes.len(), MAX_MATCHES);
        for (index, code) in codes.iter().take(MAX_MATCHES).enumerate() {
            if !(400..600).contains(code) {
                let cure = "write codes from 400 to 599";
                self.problem(&format!("{field}[{index}]"), format!("{code} is no failure"), cure);
            }
        }
    }

    pub(super) fn session(&mut self, at: &str, route: &Name, raw: Option<RawSession>) -> Option<Persistence> {
        let raw = raw?;
        let name = raw.session_name.unwrap_or_else(|| name_of_session(route, at));
        if !is_token(&name) || name.len() > MAX_SESSION {
            let shown: String = name.chars().take(100).collect();
            let cure = format!("use up to {MAX_SESSION} letters, digits and any of !#$%&'*+-.^_`|~");
            self.problem(&format!("{at}.sessionName"), format!("'{shown}' is not a name"), cure);
        }
        let by = match raw.r#type.as_deref().unwrap_or("Cookie") {
            "Cookie" => PersistBy::Cookie,
            "Header" => PersistBy::Header,
            other => {
                let cure = one_of(other, &["Cookie", "Header"]);
                self.problem(&format!("{at}.type"), format!("'{other}' carries no session"), cure);
                PersistBy::Cookie
            }
        };
        if raw.idle_timeout.is_some() {
            let reason = "that a session ends after a while without requests is not supported";
            self.problem(&format!("{at}.idleTimeout"), reason, "remove it");
        }
        let field = format!("{at}.cookieConfig");
        if raw.cookie_config.is_some() && by == PersistBy::Header {
            self.problem(&field, "a header is no cookie", "remove it, or write type: Cookie");
        }
        let kept = raw.cookie_config.and_then(|config| config.lifetime_type);
        let permanent = match kept.as_deref().unwrap_or("Session") {
            "Session" => false,
            "Permanent" => true,
            other => {
                let cure = one_of(other, &["Session", "Permanent"]);
                let reason = format!("'{other}' is not a lifetime of cookies");
                self.problem(&format!("{field}.lifetimeType"), reason, cure);
                false
            }
        };
        let lifetime = self.lifetime(&format!("{at}.absoluteTimeout"), raw.absolute_timeout, permanent);
        Some(Persistence { name, by, lifetime })
    }

    /// For how long a cookie lasts, seconds: what is permanent needs an end, and nothing else can have one.
    fn lifetime(&mut self, field: &str, text: Option<String>, permanent: bool) -> Option<u32> {
        let Some(text) = text else {
            if permanent {
                let cure = "write for how long it lasts, such as 24h";
                self.problem(field, "a cookie that is permanent needs an end", cure);
            }
            return None;
        };
        let time = self.duration(field, &text)?;
        if !permanent {
            let reason = "that a session ends after a time is supported of permanent cookies only";
            self.problem(field, reason, "remove it, or write cookieConfig: {lifetimeType: Permanent}");
            return None;
        }
        let seconds = u32::try_from(time.as_secs()).ok().filter(|seconds| *seconds > 0);
        if seconds.is_none() {
            let reason = format!("{text} is not a time that a cookie can last for");
            self.problem(field, reason, "write at least 1s");
        }
        seconds
    }

    pub(in crate::source::manifest) fn duration(&mut self, field: &str, text: &str) -> Option<Duration> {
        let parsed = parse_duration(text);
        if parsed.is_none() {
            let shown: String = text.chars().take(100).collect();
            let cure = "write up to four numbers of up to five digits, each with h, m, s or ms: 1h30m, 100ms";
            self.problem(field, format!("'{shown}' is not a duration"), cure);
        }
        parsed
    }
}

/// A name that no session of another rule has.
fn name_of_session(route: &Name, at: &str) -> String {
    let digest = digest(format!("{route} {at}").as_bytes());
    format!("nodemesh-session-{}", hex(&digest[..6]))
}

/// `([0-9]{1,5}(h|m|s|ms)){1,4}` (GEP-2257).
fn parse_duration(text: &str) -> Option<Duration> {
    let (mut rest, mut sum, mut parts) = (text, Duration::ZERO, 0);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        parts += 1;
        if digits > 5 || parts > 4 {
            return None;
        }
        let (number, unit) = rest.split_at(digits);
        let number: u64 = number.parse().ok()?;
        let (length, millis) = match unit.as_bytes() {
            [b'm', b's', ..] => (2, 1),
            [b's', ..] => (1, 1000),
            [b'm', ..] => (1, 60_000),
            [b'h', ..] => (1, 3_600_000),
            _ => return None,
        };
        sum += Duration::from_millis(number * millis);
        rest = &unit[length..];
    }
    (parts > 0).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_numbers_with_units() {
        for (text, millis) in [
            ("10s", Some(10_000)),
            ("1h30m", Some(5_400_000)),
            ("100ms", Some(100)),
            ("0s", Some(0)),
            ("1m5ms", Some(60_005)),
            ("1s1s1s1s", Some(4000)),
            ("99999h", Some(359_996_400_000)),
            ("", None),
            ("10", None),
            ("s", None),
            ("-1s", None),
            ("1.5s", None),
            ("100000s", None),
            ("1s1s1s1s1s", None),
            ("1d", None),
            ("1s ", None),
        ] {
            assert_eq!(parse_duration(text), millis.map(Duration::from_millis), "{text}");
        }
    }
}
