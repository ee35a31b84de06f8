//! What a policy says of end users: whose tokens are taken, where they are in a request, and what becomes of them. What it
//! means for a request is [`crate::authentication`]'s.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Enforcement, Name, PortRange, Selector, TextPattern, Workload};

/// Whose tokens requests to workloads have to bear (`AuthenticationPolicy`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authentication {
    /// Its name; it selects workloads of its own namespace only.
    pub name: Name,
    /// Which of them.
    pub selector: Selector,
    /// Their ports that it is about; none: all.
    pub ports: Vec<PortRange>,
    /// A request without a token is refused.
    pub required: bool,
    /// Whether it decides, or only tells what it would refuse.
    #[serde(default)]
    pub enforcement: Enforcement,
    /// Any of these, by the token's `iss`.
    pub issuers: Vec<TokenIssuer>,
}

impl Authentication {
    /// Whether it speaks about requests to this workload.
    pub fn selects(&self, workload: &Workload) -> bool {
        self.name.namespace == workload.name.namespace && self.selector.matches(&workload.labels)
    }

    /// Whether it decides.
    pub fn is_enforced(&self) -> bool {
        self.enforcement == Enforcement::Enforce
    }

    /// Whether it speaks about this port.
    pub fn has_port(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.iter().any(|range| range.contains(port))
    }
}

/// Who issues tokens, and how they are known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenIssuer {
    /// What `iss` has to be, to the letter.
    pub issuer: String,
    /// One of these has to be in `aud`.
    pub audiences: Vec<String>,
    /// What its signatures are verified with. While there are none, no token of it is taken.
    pub keys: Vec<VerifyingKey>,
    /// Where its tokens are looked for.
    pub places: Vec<TokenPlace>,
    /// The token is taken away before the application sees the request.
    pub strip: bool,
    /// What of the claims the application is told in headers.
    pub headers: Vec<ClaimHeader>,
}

/// Where a token is in a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TokenPlace {
    /// In a header, after a prefix: `Bearer`.
    Header {
        /// In lower case.
        name: String,
        /// Of any case, and followed by a space; empty: the token is all of the value.
        prefix: String,
    },
    /// In a parameter of the query.
    Query(String),
    /// In a cookie.
    Cookie(String),
}

impl fmt::Display for TokenPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header { name, .. } => write!(f, "header {name}"),
            Self::Query(name) => write!(f, "query parameter {name}"),
            Self::Cookie(name) => write!(f, "cookie {name}"),
        }
    }
}

/// A header that says to the application what a claim is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimHeader {
    /// The header, in lower case.
    pub header: String,
    /// The claim, as [`ClaimPattern::name`].
    pub claim: String,
}

/// A claim that has one of these values; without any, one that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimPattern {
    /// Its name; with a slash at its beginning, the way to one within others (a JSON Pointer, RFC 6901).
    pub name: String,
    /// Any of these.
    pub values: Vec<TextPattern>,
}

impl fmt::Display for ClaimPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        super::request::fmt_named(f, &self.name, &self.values)
    }
}

/// A public key of an issuer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyingKey {
    /// Its name (`kid`); empty if it has none.
    pub id: String,
    /// The one algorithm that it is for, if it says one.
    pub algorithm: Option<Algorithm>,
    /// The key.
    pub material: KeyMaterial,
}

impl VerifyingKey {
    /// Whether signatures of this algorithm can be its own: the token alone does not say which algorithm it is.
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        use Algorithm::{EdDsa, Es256, Es384, Ps256, Ps384, Ps512, Rs256, Rs384, Rs512};
        let of_kind = match self.material {
            KeyMaterial::Rsa { .. } => matches!(algorithm, Rs256 | Rs384 | Rs512 | Ps256 | Ps384 | Ps512),
            KeyMaterial::P256(_) => algorithm == Es256,
            KeyMaterial::P384(_) => algorithm == Es384,
            KeyMaterial::Ed25519(_) => algorithm == EdDsa,
        };
        of_kind && self.algorithm.is_none_or(|own| own == algorithm)
    }
}

/// A public key, by its kind; big-endian numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyMaterial {
    /// RSA, of 2048 to 8192 bits.
    Rsa {
        /// The modulus, without zeros at its beginning.
        n: Vec<u8>,
        /// The exponent.
        e: Vec<u8>,
    },
    /// A point of P-256, uncompressed.
    P256(Vec<u8>),
    /// A point of P-384, uncompressed.
    P384(Vec<u8>),
    /// Ed25519.
    Ed25519(Vec<u8>),
}

macro_rules! algorithms {
    ($($variant:ident = $name:literal;)*) => {
        /// How tokens are signed (RFC 7518, section 3.1; RFC 8037): by private keys alone, so neither `none` nor `HS…`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum Algorithm { $(#[doc = $name] $variant,)* }

        impl Algorithm {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// `alg`.
            pub const fn as_str(self) -> &'static str { match self { $(Self::$variant => $name,)* } }
        }
    };
}

algorithms! {
    Rs256 = "RS256";
    Rs384 = "RS384";
    Rs512 = "RS512";
    Ps256 = "PS256";
    Ps384 = "PS384";
    Ps512 = "PS512";
    Es256 = "ES256";
    Es384 = "ES384";
    EdDsa = "EdDSA";
}

impl Algorithm {
    /// The algorithm of this name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|it| it.as_str() == text)
    }
}
