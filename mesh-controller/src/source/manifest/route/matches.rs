//! What a request, or a call, has to be.

use std::collections::BTreeSet;

use mesh_core::model::http::{PathMatch, RequestMatch, TextMatch, ValueMatch};
use serde::Deserialize;

use super::{
    super::{super::document::one_of, check::Check},
    MAX_ENTRIES, MAX_MATCHES,
};

/// Longest path, and longest value of a parameter, characters (Gateway API).
const MAX_PATH: usize = 1024;
/// Longest value of a header, characters (Gateway API).
pub(super) const MAX_VALUE: usize = 4096;
/// Longest name of a header or a parameter, characters (Gateway API).
const MAX_FIELD_NAME: usize = 256;
/// The methods that a route can match.
pub(super) const METHODS: [&str; 9] =
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
/// How a text may be compared.
const TEXT_TYPES: [&str; 2] = ["Exact", "RegularExpression"];
/// What no path may have within.
const NOT_IN_PATHS: [&str; 6] = ["//", "/./", "/../", "%2f", "%2F", "#"];

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawMatch {
    path: Option<RawPath>,
    #[serde(default)]
    headers: Vec<RawValue>,
    #[serde(default)]
    query_params: Vec<RawValue>,
    method: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPath {
    r#type: Option<String>,
    value: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawValue {
    r#type: Option<String>,
    name: String,
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCall {
    method: Option<RawMethod>,
    #[serde(default)]
    headers: Vec<RawValue>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMethod {
    r#type: Option<String>,
    service: Option<String>,
    method: Option<String>,
}

impl Check<'_> {
    pub(super) fn http_matches(&mut self, at: &str, raw: Vec<RawMatch>) -> Vec<RequestMatch> {
        self.limit(at, raw.len(), MAX_MATCHES);
        let raw = raw.into_iter().take(MAX_MATCHES).enumerate();
        raw.map(|(index, raw)| self.http_match(&format!("{at}[{index}]"), raw)).collect()
    }

    fn http_match(&mut self, at: &str, raw: RawMatch) -> RequestMatch {
        if let Some(method) = raw.method.as_deref().filter(|method| !METHODS.contains(method)) {
            let reason = format!("'{method}' is not a method that a route can match");
            self.problem(&format!("{at}.method"), reason, one_of(method, &METHODS));
        }
        RequestMatch {
            path: raw.path.map_or_else(PathMatch::default, |raw| self.path_match(&format!("{at}.path"), raw)),
            headers: self.header_matches(&format!("{at}.headers"), raw.headers),
            query: self.query_matches(&format!("{at}.queryParams"), raw.query_params),
            method: raw.method,
        }
    }

    fn path_match(&mut self, at: &str, raw: RawPath) -> PathMatch {
        let field = format!("{at}.value");
        let value = raw.value.unwrap_or_else(|| "/".to_owned());
        self.no_longer(&field, &value, MAX_PATH);
        match raw.r#type.as_deref().unwrap_or("PathPrefix") {
            "RegularExpression" => {
                return match value.parse() {
                    Ok(pattern) => PathMatch::Pattern(pattern),
                    Err(error) => {
                        self.no_pattern(&field, &value, &error);
                        PathMatch::default()
                    }
                };
            }
            "Exact" | "PathPrefix" => {}
            other => {
                let cure = one_of(other, &["Exact", "PathPrefix", "RegularExpression"]);
                self.problem(&format!("{at}.type"), format!("'{other}' is not a type of match"), cure);
            }
        }
        if !value.starts_with('/') {
            self.problem(&field, format!("'{value}' does not begin with '/'"), "write the whole path");
        } else if let Some(part) = NOT_IN_PATHS.into_iter().find(|part| value.contains(part)) {
            let reason = format!("no request that matches has '{part}' in its path");
            self.problem(&field, reason, "write the path as clients ask for it");
        } else if value.ends_with("/..") || value.ends_with("/.") {
            self.problem(&field, "no path ends with dots", "write the path that they lead to");
        } else {
            self.path_characters(&field, &value);
        }
        match raw.r#type.as_deref() {
            Some("Exact") => PathMatch::Exact(value),
            _ => PathMatch::Prefix(value.trim_end_matches('/').to_owned()),
        }
    }

    /// What paths consist of (RFC 3986, section 3.3).
    pub(super) fn path_characters(&mut self, field: &str, path: &str) {
        let plain = |c: char| c.is_ascii_alphanumeric() || "/-._~!$&'()*+,;=:@".contains(c);
        let mut pieces = path.split('%');
        let first = pieces.next().is_none_or(|piece| piece.chars().all(plain));
        let escaped = |piece: &str| {
            let (code, rest) = piece.split_at_checked(2).unwrap_or(("", piece));
            code.len() == 2 && code.chars().all(|c| c.is_ascii_hexdigit()) && rest.chars().all(plain)
        };
        if !first || !pieces.all(escaped) {
            let cure = "write other characters as '%' and two hexadecimal digits for each byte";
            self.problem(field, format!("'{path}' has a character that no path has"), cure);
        }
    }

    /// Of several of one name the first counts, whatever the case of its letters.
    fn header_matches(&mut self, at: &str, raw: Vec<RawValue>) -> Vec<ValueMatch> {
        self.limit(at, raw.len(), MAX_ENTRIES);
        let mut names = BTreeSet::new();
        let mut headers = Vec::new();
        for (index, mut raw) in raw.into_iter().take(MAX_ENTRIES).enumerate() {
            let at = format!("{at}[{index}]");
            self.field_name(&format!("{at}.name"), &raw.name);
            raw.name.make_ascii_lowercase();
            let found = self.value_match(&at, raw, MAX_VALUE);
            headers.extend(names.insert(found.name.clone()).then_some(found));
        }
        headers
    }

    /// Of several of one name the first counts.
    fn query_matches(&mut self, at: &str, raw: Vec<RawValue>) -> Vec<ValueMatch> {
        self.limit(at, raw.len(), MAX_ENTRIES);
        let mut names = BTreeSet::new();
        let mut parameters = Vec::new();
        for (index, raw) in raw.into_iter().take(MAX_ENTRIES).enumerate() {
            let at = format!("{at}[{index}]");
            self.field_name(&format!("{at}.name"), &raw.name);
            let found = self.value_match(&at, raw, MAX_PATH);
            parameters.extend(names.insert(found.name.clone()).then_some(found));
        }
        parameters
    }

    fn value_match(&mut self, at: &str, raw: RawValue, longest: usize) -> ValueMatch {
        let field = format!("{at}.value");
        self.no_longer(&field, &raw.value, longest);
        if raw.value.is_empty() {
            self.problem(&field, "an empty value matches nothing", "write the value");
        }
        let value = self.text_match(&format!("{at}.type"), raw.r#type.as_deref(), &field, raw.value);
        ValueMatch { name: raw.name, value }
    }

    /// A text that is compared as its type says.
    fn text_match(&mut self, at: &str, of: Option<&str>, field: &str, text: String) -> TextMatch {
        match of.unwrap_or("Exact") {
            "Exact" => TextMatch::Exact(text),
            "RegularExpression" => match text.parse() {
                Ok(pattern) => TextMatch::Pattern(pattern),
                Err(error) => {
                    self.no_pattern(field, &text, &error);
                    TextMatch::Exact(text)
                }
            },
            other => {
                let cure = one_of(other, &TEXT_TYPES);
                self.problem(at, format!("'{other}' is not a type of match"), cure);
                TextMatch::Exact(text)
            }
        }
    }

    fn no_pattern(&mut self, field: &str, text: &str, error: &mesh_core::model::http::PatternError) {
        let shown: String = text.chars().take(100).collect();
        let cure = "write it in the syntax of RE2, without looking around and without references back";
        self.problem(field, format!("'{shown}' is not a regular expression: {error}"), cure);
    }

    pub(super) fn calls(&mut self, at: &str, raw: Vec<RawCall>) -> Vec<RequestMatch> {
        self.limit(at, raw.len(), MAX_MATCHES);
        let raw = raw.into_iter().take(MAX_MATCHES).enumerate();
        raw.map(|(index, raw)| {
            let at = format!("{at}[{index}]");
            let path = match raw.method {
                Some(method) => self.call(&format!("{at}.method"), method),
                None => PathMatch::Call { service: None, method: None },
            };
            let headers = self.header_matches(&format!("{at}.headers"), raw.headers);
            RequestMatch { path, headers, ..RequestMatch::default() }
        })
        .collect()
    }

    fn call(&mut self, at: &str, raw: RawMethod) -> PathMatch {
        let of = raw.r#type.as_deref();
        let exact = of.is_none_or(|of| of == "Exact");
        let mut part = |name: &str, text: Option<String>, valid: fn(&str) -> bool| {
            let text = text.filter(|text| !text.is_empty())?;
            let field = format!("{at}.{name}");
            self.no_longer(&field, &text, MAX_PATH);
            if exact && !valid(&text) {
                let shown: String = text.chars().take(100).collect();
                let cure = "write it as its definition has it, such as shop.v1.Cart or AddItem";
                self.problem(&field, format!("'{shown}' is not the {name} of a call"), cure);
            }
            Some(self.text_match(&format!("{at}.type"), of, &field, text))
        };
        let service = part("service", raw.service, is_service);
        let method = part("method", raw.method, is_word);
        if service.is_none() && method.is_none() {
            let cure = "write 'service:', 'method:' or both, or remove this";
            self.problem(at, "a call has a service and a method", cure);
        }
        PathMatch::Call { service, method }
    }

    /// The name of a header or a parameter: a token (RFC 9110, section 5.6.2).
    pub(in crate::source::manifest) fn field_name(&mut self, field: &str, name: &str) {
        if !is_token(name) || name.len() > MAX_FIELD_NAME {
            let shown: String = name.chars().take(100).collect();
            let cure = format!("use up to {MAX_FIELD_NAME} letters, digits and any of !#$%&'*+-.^_`|~");
            self.problem(field, format!("'{shown}' is not a name"), cure);
        }
    }

    pub(in crate::source::manifest) fn no_longer(&mut self, field: &str, text: &str, longest: usize) {
        let length = text.chars().count();
        if length > longest {
            let cure = format!("shorten it: at most {longest} are taken");
            self.problem(field, format!("{length} characters are too many"), cure);
        }
    }
}

/// A token of HTTP (RFC 9110, section 5.6.2).
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c))
}

fn is_word(text: &str) -> bool {
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    begins && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn is_service(text: &str) -> bool {
    text.strip_prefix('.').unwrap_or(text).split('.').all(is_word)
}
