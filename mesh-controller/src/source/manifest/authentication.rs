//! AuthenticationPolicies. What they mean is told in `docs/operate/authentication.md`; here each text becomes the thing that it
//! names, or a problem with its line.
//!
//! What would take tokens that are meant for others (no audience, an issuer twice, a secret as a key) is refused.

use mesh_core::{
    authentication::jwks,
    model::{Authentication, ClaimHeader, ClaimPattern, TextPattern, TokenIssuer, TokenPlace, VerifyingKey},
};
use serde::Deserialize;

use super::{
    super::document::one_of,
    Raw,
    check::Check,
    policy::{RawPorts, RawSelector},
};
use crate::model::{AuthenticationPolicy, KeysAt, Object};

/// Most issuers of a policy: the keys of each are in the view of every agent that the policy concerns.
const MAX_ISSUERS: usize = 8;
/// Most audiences of an issuer.
const MAX_AUDIENCES: usize = 64;
/// Most places that a token is looked for in: each is looked at for every request.
const MAX_PLACES: usize = 8;
/// Most headers that claims are told in.
const MAX_HEADERS: usize = 16;
/// Longest issuer, audience, claim or URL, bytes.
const MAX_TEXT: usize = 1024;
/// Longest name of a header, a parameter or a cookie.
const MAX_NAME: usize = 128;
/// Longest bundle of roots, bytes: some fifty certificates.
const MAX_BUNDLE: usize = 64 * 1024;
/// Headers that frame or route a request, or that the mesh itself sets: no token is in them, and no claim.
const NOT_OURS: [&str; 9] = [
    "connection",
    "content-length",
    "cookie",
    "host",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-forwarded-client-cert",
];

/// Whose tokens requests to workloads of a namespace have to bear. What comes to its ports has to be HTTP.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawAuthentication {
    /// Which workloads of the namespace it is about; left out, all of them.
    #[serde(default)]
    selector: RawSelector,
    /// The workload's ports, not the Service's: 8080, or a range such as 9000-9100; left out, all of them.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    ports: Option<Vec<RawPorts>>,
    /// Whether a request without a token is refused; left out, true. One with a token that cannot be verified always is.
    required: Option<bool>,
    /// Audit refuses nothing and changes nothing of a request, and counts and logs what it would refuse; left out, Enforce.
    #[cfg_attr(test, schemars(extend("enum" = ["Enforce", "Audit"])))]
    enforcement: Option<String>,
    /// Whose tokens are taken: those of any of these.
    #[cfg_attr(test, schemars(length(min = 1, max = 8)))]
    issuers: Vec<RawIssuer>,
}

/// Who issues tokens.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawIssuer {
    /// The claim iss of its tokens, to the letter.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    issuer: String,
    /// What tokens have to be for: one of these has to be in the claim aud.
    #[cfg_attr(test, schemars(length(min = 1, max = 64), inner(length(min = 1, max = 1024))))]
    audiences: Vec<String>,
    /// Its public keys.
    jwks: RawKeys,
    /// Where a token is; left out, in the header Authorization, after Bearer.
    #[cfg_attr(test, schemars(length(min = 1, max = 8)))]
    from: Option<Vec<RawPlace>>,
    /// Whether the application sees the token: Keep, unless said, or Strip.
    #[cfg_attr(test, schemars(extend("enum" = ["Keep", "Strip"])))]
    forward: Option<String>,
    /// Claims that the application is told in headers. What a client sends under these names is taken away.
    #[cfg_attr(test, schemars(length(min = 1, max = 16)))]
    claims_to_headers: Option<Vec<RawClaimHeader>>,
}

/// Public keys, as a JSON Web Key Set (RFC 7517).
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.inline) != has(self.url)", "message": "either inline or url has to be there"},
    {"rule": "!has(self.caBundle) || has(self.url)", "message": "caBundle is for url alone"},
])))]
struct RawKeys {
    /// The set itself.
    #[cfg_attr(test, schemars(length(min = 1, max = 65536)))]
    inline: Option<String>,
    /// Where the controller fetches it, and again before it is old. By https alone, and without being redirected.
    #[cfg_attr(test, schemars(length(max = 1024), regex(pattern = r"^https://[^/?#@]+(/[^#]*)?$")))]
    url: Option<String>,
    /// Roots that the certificate of url has to lead to, PEM; left out, those that the controller's system trusts.
    #[cfg_attr(test, schemars(length(min = 1, max = 65536)))]
    ca_bundle: Option<String>,
}

/// Where a token is: in a header, a parameter of the query, or a cookie.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [
    {"rule": "(has(self.header) ? 1 : 0) + (has(self.query) ? 1 : 0) + (has(self.cookie) ? 1 : 0) == 1",
     "message": "one of header, query and cookie has to be there"},
    {"rule": "!has(self.prefix) || has(self.header)", "message": "prefix is for header alone"},
])))]
struct RawPlace {
    /// The name of the header.
    #[cfg_attr(test, schemars(length(min = 1, max = 128)))]
    header: Option<String>,
    /// What stands before the token in the header, with a space between: Bearer. Left out, nothing.
    #[cfg_attr(test, schemars(length(min = 1, max = 128)))]
    prefix: Option<String>,
    /// The name of the parameter.
    #[cfg_attr(test, schemars(length(min = 1, max = 128)))]
    query: Option<String>,
    /// The name of the cookie.
    #[cfg_attr(test, schemars(length(min = 1, max = 128)))]
    cookie: Option<String>,
}

/// A claim that the application is told.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawClaimHeader {
    /// The claim: sub, or the way to one within others: /realm_access/roles.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    claim: String,
    /// The header.
    #[cfg_attr(test, schemars(length(min = 1, max = 128)))]
    header: String,
}

/// A claim, and what its value may be.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawClaim {
    /// Its name: groups, or the way to one within others: /realm_access/roles.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    name: String,
    /// One of these: admin, a* or *n; left out, any, if only the claim is there.
    #[cfg_attr(test, schemars(length(min = 1, max = 64), inner(length(max = 1024))))]
    values: Option<Vec<String>>,
}

impl Check<'_> {
    pub(super) fn authentication(&mut self, raw: Raw<RawAuthentication>) -> Object {
        let name = self.namespaced(&raw.metadata);
        self.our_labels(&raw.metadata.labels, &[]);
        let selector = self.selector(raw.spec.selector);
        let ports = self.list("spec.ports", raw.spec.ports, Self::port_range);
        let field = "spec.issuers";
        self.limit(field, raw.spec.issuers.len(), MAX_ISSUERS);
        if raw.spec.issuers.is_empty() {
            let cure = "name who issues the tokens";
            self.problem(field, "there is no issuer, so every token would be refused", cure);
        }
        let (mut issuers, mut elsewhere) = (Vec::<TokenIssuer>::new(), vec![]);
        for (place, raw) in raw.spec.issuers.into_iter().take(MAX_ISSUERS).enumerate() {
            let at = format!("{field}[{place}]");
            let (issuer, keys_at) = self.issuer(&at, raw);
            if issuers.iter().any(|it| it.issuer == issuer.issuer) {
                let reason = format!("'{}' is an issuer of this policy already", shown(&issuer.issuer));
                self.problem(&format!("{at}.issuer"), reason, "write all of it in one place");
            }
            elsewhere.extend(keys_at.map(|it| (place, it)));
            issuers.push(issuer);
        }
        let required = raw.spec.required.unwrap_or(true);
        let enforcement = self.enforcement(raw.spec.enforcement.as_deref());
        let said = Authentication { name, selector, ports, required, enforcement, issuers };
        Object::AuthenticationPolicy(AuthenticationPolicy { said, elsewhere })
    }

    fn issuer(&mut self, at: &str, raw: RawIssuer) -> (TokenIssuer, Option<KeysAt>) {
        let issuer = self.text(&format!("{at}.issuer"), raw.issuer, "the claim iss of the issuer's tokens");
        let field = format!("{at}.audiences");
        self.limit(&field, raw.audiences.len(), MAX_AUDIENCES);
        if raw.audiences.is_empty() {
            let reason = "without an audience, tokens that are meant for others would be taken";
            self.problem(
                &field,
                reason,
                "write what the issuer puts into the claim aud for this application",
            );
        }
        let audiences = raw.audiences.into_iter().take(MAX_AUDIENCES).enumerate();
        let audiences = audiences
            .map(|(place, it)| self.text(&format!("{field}[{place}]"), it, "one value of the claim aud"))
            .collect();
        let (keys, keys_at) = self.keys(&format!("{at}.jwks"), raw.jwks);
        let places = match raw.from {
            None => vec![TokenPlace::Header { name: "authorization".into(), prefix: "Bearer".into() }],
            from => self.list(&format!("{at}.from"), from, Self::token_place),
        };
        self.limit(&format!("{at}.from"), places.len(), MAX_PLACES);
        let headers = self.list(&format!("{at}.claimsToHeaders"), raw.claims_to_headers, Self::claim_header);
        self.limit(&format!("{at}.claimsToHeaders"), headers.len(), MAX_HEADERS);
        let strip = match raw.forward.as_deref() {
            None | Some("Keep") => false,
            Some("Strip") => true,
            Some(other) => {
                let reason = format!("'{}' is neither Keep nor Strip", shown(other));
                self.problem(&format!("{at}.forward"), reason, one_of(other, &["Keep", "Strip"]));
                true
            }
        };
        (TokenIssuer { issuer, audiences, keys, places, strip, headers }, keys_at)
    }

    fn keys(&mut self, at: &str, raw: RawKeys) -> (Vec<VerifyingKey>, Option<KeysAt>) {
        let (inline, url) = (format!("{at}.inline"), format!("{at}.url"));
        if raw.ca_bundle.is_some() && raw.inline.is_some() {
            let reason = "roots are for a URL, and the keys are here";
            self.problem(&format!("{at}.caBundle"), reason, "remove it");
        }
        match (raw.inline, raw.url) {
            (Some(_), Some(_)) => {
                self.problem(&url, "the keys are both here and elsewhere", "remove either inline or url");
                (vec![], None)
            }
            (None, None) => {
                let cure = "write url: https://…, where the issuer publishes them (jwks_uri), or inline: with the set itself";
                self.problem(&url, "it does not say where the keys are", cure);
                (vec![], None)
            }
            (Some(set), None) => match jwks::parse(set.as_bytes()) {
                Ok(keys) => (keys, None),
                Err(error) => {
                    let cure = "write the issuer's JSON Web Key Set as a text: '{\"keys\": [{\"kty\": \"RSA\", …}]}', with public keys alone";
                    self.problem(&inline, error.to_string(), cure);
                    (vec![], None)
                }
            },
            (None, Some(text)) => {
                let ca_bundle = raw.ca_bundle.map(|it| self.roots(&format!("{at}.caBundle"), it));
                let is_url = text.len() <= MAX_TEXT && crate::jwks::is_url(&text);
                if !is_url {
                    let cure = "write https://HOST/PATH, as the issuer's metadata has it in jwks_uri";
                    self.problem(
                        &url,
                        format!("'{}' is no URL that keys are fetched from", shown(&text)),
                        cure,
                    );
                }
                (vec![], Some(KeysAt { url: text, ca_bundle: ca_bundle.unwrap_or_default() }))
            }
        }
    }

    fn roots(&mut self, field: &str, text: String) -> String {
        let cure = "write certificates in PEM: -----BEGIN CERTIFICATE----- …";
        if text.len() > MAX_BUNDLE {
            self.problem(
                field,
                format!("{} bytes are too many, at most {MAX_BUNDLE} are read", text.len()),
                cure,
            );
        } else if let Err(reason) = crate::jwks::roots(&text) {
            self.problem(field, reason, cure);
        }
        text
    }

    fn token_place(&mut self, at: &str, raw: RawPlace) -> Option<TokenPlace> {
        let header = format!("{at}.header");
        if raw.prefix.is_some() && raw.header.is_none() {
            let reason = "a prefix is a header's, and none is named";
            self.problem(&header, reason, "write header: Authorization beside it, or remove the prefix");
            return None;
        }
        match (raw.header, raw.query, raw.cookie) {
            (Some(name), None, None) => {
                let name = self.own_header(&header, &name)?;
                let prefix = raw.prefix.unwrap_or_default();
                if !prefix.bytes().all(is_token) || prefix.len() > MAX_NAME {
                    let reason = format!("'{}' is not one word", shown(&prefix));
                    self.problem(
                        &format!("{at}.prefix"),
                        reason,
                        "write Bearer, without the space behind it",
                    );
                }
                Some(TokenPlace::Header { name, prefix })
            }
            (None, Some(name), None) => {
                let fits = |c: char| !c.is_control() && !c.is_whitespace();
                let fits = !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(fits);
                if !fits {
                    let reason = format!("'{}' is not a parameter's name", shown(&name));
                    self.problem(
                        &format!("{at}.query"),
                        reason,
                        "write it with nothing percent-encoded: access_token",
                    );
                }
                Some(TokenPlace::Query(name))
            }
            (None, None, Some(name)) => {
                if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_token) {
                    let reason = format!("'{}' is not a cookie's name", shown(&name));
                    self.problem(&format!("{at}.cookie"), reason, "write it as it is set: session");
                }
                Some(TokenPlace::Cookie(name))
            }
            (None, None, None) => {
                let cure = "write one of header, query and cookie";
                self.problem(&header, "it does not say where the token is", cure);
                None
            }
            _ => {
                let cure = "write an entry of the list for each";
                self.problem(at, "a token is in one place, and more than one is named", cure);
                None
            }
        }
    }

    fn claim_header(&mut self, at: &str, raw: RawClaimHeader) -> Option<ClaimHeader> {
        let claim = self.claim_name(&format!("{at}.claim"), raw.claim);
        let field = format!("{at}.header");
        let header = self.own_header(&field, &raw.header)?;
        if header.contains('_') || header == "authorization" {
            let reason = format!("'{header}' is not a header that a claim is told in");
            self.problem(&field, reason, "write another, with '-' between its words: x-user");
        }
        Some(ClaimHeader { header, claim })
    }

    /// A header that tokens or claims may be in, in lower case.
    fn own_header(&mut self, field: &str, text: &str) -> Option<String> {
        let name = text.to_ascii_lowercase();
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_token) {
            let cure = "write it as it is sent, without its colon: Authorization";
            self.problem(field, format!("'{}' is not a header's name", shown(text)), cure);
            return None;
        }
        if NOT_OURS.contains(&name.as_str()) {
            let cure =
                if name == "cookie" { "write cookie: with the cookie's name" } else { "write another" };
            self.problem(field, format!("'{name}' is for something else"), cure);
            return None;
        }
        Some(name)
    }

    pub(super) fn claim(&mut self, at: &str, raw: RawClaim) -> Option<ClaimPattern> {
        let name = self.claim_name(&format!("{at}.name"), raw.name);
        let values = self.list(&format!("{at}.values"), raw.values, Self::claim_value);
        Some(ClaimPattern { name, values })
    }

    fn claim_name(&mut self, field: &str, text: String) -> String {
        self.text(field, text, "groups, or the way to a claim within others: /realm_access/roles")
    }

    fn claim_value(&mut self, field: &str, text: String) -> Option<TextPattern> {
        let cure = "write a value, or what it begins or ends with: admin, a*, *n";
        if text.len() > MAX_TEXT {
            self.problem(field, format!("'{}' is too long", shown(&text)), cure);
            return None;
        }
        let parsed: Result<TextPattern, mesh_core::model::TextPatternError> = text.parse();
        parsed.map_err(|error| self.problem(field, error.to_string(), cure)).ok()
    }

    fn text(&mut self, field: &str, text: String, what: &str) -> String {
        if text.is_empty() || text.len() > MAX_TEXT || text.contains(char::is_control) {
            let reason = format!("'{}' is empty, too long, or of more than one line", shown(&text));
            self.problem(field, reason, format!("write {what}"));
        }
        text
    }
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn shown(text: &str) -> String {
    text.chars().take(100).collect()
}
