//! What an AuthorizationPolicy says of requests: each text becomes what a request is compared with.
//!
//! What no request could ever have, such as a path that is percent-encoded, is refused: a rule that never matches looks as
//! if it protected something.

use mesh_core::model::{HeaderPattern, TextPattern};
use serde::Deserialize;

use super::check::Check;

/// Longest method, bytes.
const MAX_METHOD: usize = 32;
/// Longest host, with a port.
const MAX_HOST: usize = 260;
/// Longest path, and longest value of a header.
const MAX_TEXT: usize = 1024;
/// Longest name of a header.
const MAX_NAME: usize = 128;

/// A header, and what its value may be.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawHeader {
    /// Its name; of letters in any case.
    #[cfg_attr(test, schemars(length(min = 1, max = 128)))]
    name: String,
    /// One of these: blue, b* or *e; left out, any, if only the header is there.
    #[cfg_attr(test, schemars(length(min = 1, max = 64), inner(length(max = 1024))))]
    values: Option<Vec<String>>,
}

impl Check<'_> {
    pub(super) fn method(&mut self, field: &str, text: String) -> Option<String> {
        let upper =
            |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
        let begins = text.as_bytes().first().is_some_and(u8::is_ascii_uppercase);
        if begins && text.len() <= MAX_METHOD && text.bytes().all(upper) {
            return Some(text);
        }
        let cure = "write it in upper case, as it is sent: GET";
        self.problem(field, format!("'{}' is not a method", shown(&text)), cure);
        None
    }

    pub(super) fn host(&mut self, field: &str, text: String) -> Option<TextPattern> {
        let cure = "write shop.example, *.shop.example, shop.*, or shop.example:8080 for one port alone";
        let may = |byte: u8| byte.is_ascii_alphanumeric() || b".:_-*[]".contains(&byte);
        if text.len() > MAX_HOST || !text.bytes().all(may) {
            self.problem(field, format!("'{}' is not a host", shown(&text)), cure);
            return None;
        }
        self.text_pattern(field, &text.to_ascii_lowercase(), cure)
    }

    pub(super) fn path(&mut self, field: &str, text: String) -> Option<TextPattern> {
        let cure = "write /cart, /cart/* or *.pdf: without a query, and with nothing percent-encoded";
        let reason = match &text {
            _ if text.len() > MAX_TEXT => "is too long",
            _ if !text.starts_with(['/', '*']) => "does not begin with a slash",
            _ if text.contains(['%', '?', '#', ';', '\\']) || text.contains(char::is_control) => {
                "has a character that no path has as it is compared"
            }
            _ if text.split('/').any(|segment| matches!(segment, "." | "..")) || text.contains("//") => {
                "has dots or slashes that are resolved before it is compared"
            }
            _ => return self.text_pattern(field, &text, cure),
        };
        self.problem(field, format!("'{}' {reason}", shown(&text)), cure);
        None
    }

    pub(super) fn header(&mut self, at: &str, raw: RawHeader) -> Option<HeaderPattern> {
        let field = format!("{at}.name");
        let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        let name = raw.name.to_ascii_lowercase();
        let values = self.list(&format!("{at}.values"), raw.values, Self::header_value);
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(token) {
            let cure = "write it as it is sent, without its colon: x-tenant";
            self.problem(&field, format!("'{}' is not a header's name", shown(&raw.name)), cure);
            return None;
        }
        if name == "host" {
            self.problem(&field, "'host' is not compared as a header", "use hosts or notHosts");
            return None;
        }
        Some(HeaderPattern { name, values })
    }

    fn header_value(&mut self, field: &str, text: String) -> Option<TextPattern> {
        let cure = "write a value, or what it begins or ends with: blue, b*, *e";
        if text.len() > MAX_TEXT || text.contains(char::is_control) {
            self.problem(field, format!("'{}' is not a header's value", shown(&text)), cure);
            return None;
        }
        self.text_pattern(field, &text, cure)
    }

    fn text_pattern(&mut self, field: &str, text: &str, cure: &str) -> Option<TextPattern> {
        text.parse()
            .map_err(|error: mesh_core::model::TextPatternError| self.problem(field, error.to_string(), cure))
            .ok()
    }
}

fn shown(text: &str) -> String {
    text.chars().take(100).collect()
}

/// What Kubernetes has to know of the texts of lists that are read here, whichever kind has them.
#[cfg(test)]
pub(super) mod shape {
    use schemars::Schema;
    use serde_json::json;

    pub(in crate::source::manifest) fn methods(list: &mut Schema) {
        each(list, None, r"^[A-Z][A-Z0-9_-]{0,31}$");
    }

    pub(in crate::source::manifest) fn hosts(list: &mut Schema) {
        each(list, Some(super::MAX_HOST), r"^[A-Za-z0-9.:_*\[\]-]+$");
    }

    pub(in crate::source::manifest) fn paths(list: &mut Schema) {
        each(list, Some(super::MAX_TEXT), r"^[/*][^%?#;\\]*$");
    }

    fn each(list: &mut Schema, longest: Option<usize>, pattern: &str) {
        let items = list.get_mut("items").and_then(|it| it.as_object_mut()).expect("it is a list of texts");
        items.extend(longest.map(|longest| ("maxLength".to_owned(), json!(longest))));
        items.insert("pattern".to_owned(), json!(pattern));
    }
}
