//! What is done with requests and their answers.

use std::collections::BTreeSet;

use mesh_core::model::{
    Name,
    http::{Cors, Filters, HeaderEdits, Mirror, PathEdit, Redirect, Rewrite, RouteKind},
};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    super::{super::document::one_of, check::Check},
    MAX_ENTRIES,
    backends::RawTarget,
    matches::{MAX_VALUE, METHODS, is_token},
};

/// Longest path that is put in the place of another, characters (Gateway API).
const MAX_PATH: usize = 1024;
/// Most origins or headers that browsers are told of (Gateway API).
const MAX_CORS: usize = 64;
/// For how long browsers need not ask again if nobody says it, seconds (Gateway API).
const DEFAULT_MAX_AGE: u32 = 5;
/// The types that a route of either kind may have, and those that only requests may.
const TYPES: [&str; 6] = [
    "RequestHeaderModifier",
    "ResponseHeaderModifier",
    "RequestMirror",
    "RequestRedirect",
    "URLRewrite",
    "CORS",
];
const TYPES_OF_CALLS: [&str; 3] = ["RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror"];
/// The types that the Gateway API has besides.
const UNSUPPORTED: [&str; 2] = ["ExtensionRef", "ExternalAuth"];

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawFilter {
    r#type: String,
    request_header_modifier: Option<RawEdits>,
    response_header_modifier: Option<RawEdits>,
    request_mirror: Option<RawMirror>,
    request_redirect: Option<RawRedirect>,
    #[serde(rename = "urlRewrite")]
    url_rewrite: Option<RawRewrite>,
    cors: Option<RawCors>,
    extension_ref: Option<IgnoredAny>,
    external_auth: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEdits {
    #[serde(default)]
    set: Vec<RawHeader>,
    #[serde(default)]
    add: Vec<RawHeader>,
    #[serde(default)]
    remove: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    name: String,
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawMirror {
    backend_ref: RawTarget,
    percent: Option<u32>,
    fraction: Option<RawFraction>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFraction {
    numerator: u32,
    denominator: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRedirect {
    scheme: Option<String>,
    hostname: Option<String>,
    path: Option<RawPathEdit>,
    port: Option<u16>,
    status_code: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRewrite {
    hostname: Option<String>,
    path: Option<RawPathEdit>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPathEdit {
    r#type: String,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawCors {
    #[serde(default)]
    allow_origins: Vec<String>,
    #[serde(default)]
    allow_methods: Vec<String>,
    #[serde(default)]
    allow_headers: Vec<String>,
    #[serde(default)]
    expose_headers: Vec<String>,
    allow_credentials: Option<bool>,
    max_age: Option<u32>,
}

impl RawFilter {
    /// The field of each type, and whether it is there.
    fn fields(&self) -> [(&'static str, &'static str, bool); 8] {
        [
            ("RequestHeaderModifier", "requestHeaderModifier", self.request_header_modifier.is_some()),
            ("ResponseHeaderModifier", "responseHeaderModifier", self.response_header_modifier.is_some()),
            ("RequestMirror", "requestMirror", self.request_mirror.is_some()),
            ("RequestRedirect", "requestRedirect", self.request_redirect.is_some()),
            ("URLRewrite", "urlRewrite", self.url_rewrite.is_some()),
            ("CORS", "cors", self.cors.is_some()),
            ("ExtensionRef", "extensionRef", self.extension_ref.is_some()),
            ("ExternalAuth", "externalAuth", self.external_auth.is_some()),
        ]
    }
}

impl Check<'_> {
    pub(super) fn filters(
        &mut self,
        at: &str,
        kind: RouteKind,
        route: &Name,
        raw: Vec<RawFilter>,
    ) -> Filters {
        self.limit(at, raw.len(), MAX_ENTRIES);
        let mut filters = Filters::default();
        let mut types = BTreeSet::new();
        for (index, raw) in raw.into_iter().take(MAX_ENTRIES).enumerate() {
            let at = format!("{at}[{index}]");
            if !self.is_filter(&at, kind, &raw) {
                continue;
            }
            if raw.r#type != "RequestMirror" && !types.insert(raw.r#type.clone()) {
                let reason = format!("a second filter of type {}", raw.r#type);
                self.problem(&format!("{at}.type"), reason, "write both into one");
            }
            self.filter(&at, route, raw, &mut filters);
        }
        if filters.redirect.is_some() && filters.rewrite.is_some() {
            let reason = "a request that is redirected is not sent on, and so not rewritten";
            self.problem(at, reason, "remove RequestRedirect or URLRewrite");
        }
        filters
    }

    /// Whether a filter is of a type that there is, with that type's field and no other's.
    fn is_filter(&mut self, at: &str, kind: RouteKind, raw: &RawFilter) -> bool {
        let known: &[&str] = match kind {
            RouteKind::Http => &TYPES,
            RouteKind::Grpc => &TYPES_OF_CALLS,
            RouteKind::Tls | RouteKind::Tcp => &[],
        };
        let of = raw.r#type.as_str();
        if !known.contains(&of) {
            let reason = match UNSUPPORTED.contains(&of) || TYPES.contains(&of) {
                true => format!("a filter of type {of} is not supported in {}s", kind.as_str()),
                false => format!("'{of}' is not a type of filter"),
            };
            self.problem(&format!("{at}.type"), reason, one_of(of, known));
            return false;
        }
        let mut good = true;
        for (of_type, field, there) in raw.fields() {
            let field = format!("{at}.{field}");
            if of_type == of && !there {
                let name = field.rsplit('.').next().unwrap_or_default();
                let cure = format!("write '{name}:' with its value");
                self.problem(&field, "this field is missing", cure);
                good = false;
            } else if of_type != of && there {
                let reason = format!("a filter of type {of} has no such field");
                self.problem(&field, reason, "remove it, or make a filter of its own of it");
                good = false;
            }
        }
        good
    }

    fn filter(&mut self, at: &str, route: &Name, raw: RawFilter, filters: &mut Filters) {
        if let Some(edits) = raw.request_header_modifier {
            filters.request_headers = self.header_edits(&format!("{at}.requestHeaderModifier"), edits);
        }
        if let Some(edits) = raw.response_header_modifier {
            filters.response_headers = self.header_edits(&format!("{at}.responseHeaderModifier"), edits);
        }
        if let Some(mirror) = raw.request_mirror {
            filters.mirrors.push(self.mirror(&format!("{at}.requestMirror"), route, mirror));
        }
        if let Some(redirect) = raw.request_redirect {
            filters.redirect = Some(self.redirect(&format!("{at}.requestRedirect"), redirect));
        }
        if let Some(rewrite) = raw.url_rewrite {
            let at = format!("{at}.urlRewrite");
            let path = rewrite.path.and_then(|path| self.path_edit(&format!("{at}.path"), path));
            filters.rewrite = Some(Rewrite { hostname: self.hostname(&at, rewrite.hostname), path });
        }
        if let Some(cors) = raw.cors {
            filters.cors = Some(self.cors(&format!("{at}.cors"), cors));
        }
    }

    fn header_edits(&mut self, at: &str, raw: RawEdits) -> HeaderEdits {
        let set = self.headers(&format!("{at}.set"), raw.set);
        let add = self.headers(&format!("{at}.add"), raw.add);
        let at = format!("{at}.remove");
        self.limit(&at, raw.remove.len(), MAX_ENTRIES);
        for (index, name) in raw.remove.iter().take(MAX_ENTRIES).enumerate() {
            self.field_name(&format!("{at}[{index}]"), name);
        }
        HeaderEdits { set, add, remove: raw.remove.iter().map(|name| name.to_ascii_lowercase()).collect() }
    }

    /// Headers to write. Of several of one name the first counts, whatever the case of its letters.
    fn headers(&mut self, at: &str, raw: Vec<RawHeader>) -> Vec<(String, String)> {
        self.limit(at, raw.len(), MAX_ENTRIES);
        let mut names = BTreeSet::new();
        let mut headers = Vec::new();
        for (index, RawHeader { name, value }) in raw.into_iter().take(MAX_ENTRIES).enumerate() {
            self.field_name(&format!("{at}[{index}].name"), &name);
            let field = format!("{at}[{index}].value");
            self.no_longer(&field, &value, MAX_VALUE);
            if !is_field_value(&value) {
                let shown: String = value.chars().take(100).collect();
                let cure = "use visible characters of ASCII, with single blanks between them";
                self.problem(&field, format!("'{shown}' is not a header's value"), cure);
            }
            let name = name.to_ascii_lowercase();
            if names.insert(name.clone()) {
                headers.push((name, value));
            }
        }
        headers
    }

    fn mirror(&mut self, at: &str, route: &Name, raw: RawMirror) -> Mirror {
        let to = self.reference(&format!("{at}.backendRef"), route, raw.backend_ref);
        let (copies, of) = match (raw.percent, raw.fraction) {
            (None, None) => (1, 1),
            (Some(percent), None) => (percent, 100),
            (None, Some(fraction)) => (fraction.numerator, fraction.denominator.unwrap_or(100)),
            (Some(_), Some(_)) => {
                let cure = "remove one of the two";
                self.problem(&format!("{at}.percent"), "there is a fraction already", cure);
                (1, 1)
            }
        };
        if of == 0 {
            let field = format!("{at}.fraction.denominator");
            self.problem(&field, "0 is not a denominator", "write a number from 1 on");
        } else if copies > of {
            let field = if raw.percent.is_some() { "percent" } else { "fraction.numerator" };
            let reason = format!("{copies} of {of} is more than all");
            self.problem(&format!("{at}.{field}"), reason, format!("write at most {of}"));
        }
        Mirror { to, copies, of: of.max(1) }
    }

    fn redirect(&mut self, at: &str, raw: RawRedirect) -> Redirect {
        if let Some(scheme) = raw.scheme.as_deref().filter(|it| !["http", "https"].contains(it)) {
            let cure = one_of(scheme, &["http", "https"]);
            self.problem(&format!("{at}.scheme"), format!("'{scheme}' is not a scheme to lead to"), cure);
        }
        if let Some(port) = raw.port {
            self.port(&format!("{at}.port"), port);
        }
        let status = raw.status_code.unwrap_or(302);
        if ![301, 302, 303, 307, 308].contains(&status) {
            let cure = "write 301, 302, 303, 307 or 308";
            self.problem(&format!("{at}.statusCode"), format!("{status} leads nowhere"), cure);
        }
        let path = raw.path.and_then(|path| self.path_edit(&format!("{at}.path"), path));
        let hostname = self.hostname(at, raw.hostname);
        Redirect { scheme: raw.scheme, hostname, path, port: raw.port, status }
    }

    fn hostname(&mut self, at: &str, name: Option<String>) -> Option<String> {
        if let Some(name) = &name {
            self.name(&format!("{at}.hostname"), name);
        }
        name
    }

    fn path_edit(&mut self, at: &str, raw: RawPathEdit) -> Option<PathEdit> {
        let full = (format!("{at}.replaceFullPath"), raw.replace_full_path);
        let prefix = (format!("{at}.replacePrefixMatch"), raw.replace_prefix_match);
        let (of, other, edit): (_, _, fn(String) -> PathEdit) = match raw.r#type.as_str() {
            "ReplaceFullPath" => (full, prefix, PathEdit::Full),
            "ReplacePrefixMatch" => (prefix, full, PathEdit::Prefix),
            unknown => {
                let cure = one_of(unknown, &["ReplaceFullPath", "ReplacePrefixMatch"]);
                self.problem(&format!("{at}.type"), format!("'{unknown}' is not a type of edit"), cure);
                return None;
            }
        };
        if let (field, Some(_)) = &other {
            self.problem(field, format!("it means nothing with type {}", raw.r#type), "remove it");
        }
        let (field, Some(path)) = of else {
            self.problem(&of.0, "this field is missing", format!("write the new path of {}", raw.r#type));
            return None;
        };
        self.no_longer(&field, &path, MAX_PATH);
        self.path_characters(&field, &path);
        Some(edit(path))
    }

    fn cors(&mut self, at: &str, raw: RawCors) -> Cors {
        let methods = |method: &str| METHODS.contains(&method);
        self.allowed(&format!("{at}.allowOrigins"), &raw.allow_origins, "an origin", is_origin);
        self.allowed(&format!("{at}.allowMethods"), &raw.allow_methods, "a method", methods);
        self.allowed(&format!("{at}.allowHeaders"), &raw.allow_headers, "a header's name", is_token);
        self.allowed(&format!("{at}.exposeHeaders"), &raw.expose_headers, "a header's name", is_token);
        let max_age = raw.max_age.unwrap_or(DEFAULT_MAX_AGE);
        if max_age == 0 {
            self.problem(&format!("{at}.maxAge"), "0 is no time to keep an answer for", "write seconds");
        }
        Cors {
            origins: raw.allow_origins,
            methods: raw.allow_methods,
            headers: raw.allow_headers,
            expose: raw.expose_headers,
            credentials: raw.allow_credentials.unwrap_or(false),
            max_age,
        }
    }

    /// A list of what browsers' scripts may; a star is everything, and stands alone.
    fn allowed(&mut self, at: &str, list: &[String], what: &str, valid: impl Fn(&str) -> bool) {
        self.limit(at, list.len(), MAX_CORS);
        for (index, text) in list.iter().take(MAX_CORS).enumerate() {
            let field = format!("{at}[{index}]");
            let shown: String = text.chars().take(100).collect();
            if text == "*" && list.len() > 1 {
                self.problem(&field, "'*' is everything already", "remove the others, or this");
            } else if text != "*" && !valid(text) {
                let cure = match what {
                    "an origin" => {
                        "write http://HOST or https://HOST, with a port where it is not the usual one"
                    }
                    _ => "write its name, or '*' alone for all",
                };
                self.problem(&field, format!("'{shown}' is not {what}"), cure);
            }
        }
    }
}

/// A value as the Gateway API has it: visible characters, and single blanks between them.
fn is_field_value(text: &str) -> bool {
    let blank = |c: char| c == ' ' || c == '\t';
    text.split(blank).all(|piece| !piece.is_empty() && piece.chars().all(|c| c.is_ascii_graphic()))
}

/// `http://*.example.com:8080`: a scheme, labels of a host of which a star may be the first, and a port.
fn is_origin(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")) else {
        return false;
    };
    let (host, port) = rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port)));
    let port = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|_| port.chars().all(|c| c != '+')));
    let label =
        |label: &str| !label.is_empty() && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    let named = host.strip_prefix("*.").unwrap_or(host);
    port && text.len() <= 253 && (host == "*" || named.split('.').all(label))
}
