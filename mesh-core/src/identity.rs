//! Trust domains and SPIFFE IDs: who a workload, a node or the controller is, independent of any address.
//!
//! Stands apart because identities are parsed at every edge (certificates, manifests, the wire, the command line) and
//! must mean the same everywhere. A value of these types is always well formed.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest SPIFFE ID that we accept, in bytes (SPIFFE-ID §2.3).
const MAX_ID_LEN: usize = 2048;
/// Longest trust domain name, in bytes (SPIFFE-ID §2.1).
const MAX_TRUST_DOMAIN_LEN: usize = 255;

/// Why a text is not an identity that this mesh uses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The text does not start with `spiffe://`.
    #[error("'{0}' is not a SPIFFE ID: it must start with spiffe://")]
    Scheme(String),
    /// The trust domain is empty, too long or has a character that SPIFFE-ID §2.1 does not allow.
    #[error("'{0}' is not a trust domain: use 1 to 255 of a-z, 0-9, '.', '-', '_'")]
    TrustDomain(String),
    /// The path is none of `/ns/NS/sa/SA`, `/node/NAME`, `/controller`.
    #[error("'{0}' is not an identity of this mesh: use spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT")]
    Path(String),
}

/// Workloads under one root of trust (SPIFFE-ID §2.1).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// Reads a trust domain's name, without `spiffe://`.
    pub fn parse(name: &str) -> Result<Self, IdentityError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
        if name.is_empty() || name.len() > MAX_TRUST_DOMAIN_LEN || !name.chars().all(allowed) {
            return Err(IdentityError::TrustDomain(name.to_owned()));
        }
        Ok(Self(name.to_owned()))
    }

    /// The name, as in a certificate.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        Self::parse(text)
    }
}

/// Whom a SPIFFE ID of this mesh names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// All workloads that run under one service account.
    Workload {
        /// Kubernetes namespace, or the `metadata.namespace` of a `Workload`.
        namespace: String,
        /// Service account.
        service_account: String,
    },
    /// The agent of one node.
    Node(String),
    /// The controller.
    Controller,
}

/// A SPIFFE ID that this mesh issues.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    subject: Subject,
}

impl SpiffeId {
    /// The identity of the workloads of a service account.
    pub fn workload(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        Self::parse(&format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"))
    }

    /// The identity of a node's agent.
    pub fn node(trust_domain: &TrustDomain, name: &str) -> Result<Self, IdentityError> {
        Self::parse(&format!("spiffe://{trust_domain}/node/{name}"))
    }

    /// The controller's identity.
    pub fn controller(trust_domain: &TrustDomain) -> Self {
        Self { trust_domain: trust_domain.clone(), subject: Subject::Controller }
    }

    /// Reads an ID as it stands in a certificate's URI SAN or in a policy.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let scheme = || IdentityError::Scheme(text.chars().take(100).collect());
        let path_error = || IdentityError::Path(text.chars().take(300).collect());
        if text.len() > MAX_ID_LEN {
            return Err(path_error());
        }
        let rest = text.strip_prefix("spiffe://").ok_or_else(scheme)?;
        let (domain, path) = rest.split_once('/').ok_or_else(path_error)?;
        let trust_domain = TrustDomain::parse(domain)?;
        let segments: Vec<&str> = path.split('/').collect();
        let subject = match segments.as_slice() {
            ["ns", namespace, "sa", account] if is_name(namespace) && is_name(account) => Subject::Workload {
                namespace: (*namespace).to_owned(),
                service_account: (*account).to_owned(),
            },
            ["node", name] if is_name(name) => Subject::Node((*name).to_owned()),
            ["controller"] => Subject::Controller,
            _ => return Err(path_error()),
        };
        Ok(Self { trust_domain, subject })
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Whom the ID names.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The namespace of a workload identity; `None` for nodes and the controller.
    pub fn namespace(&self) -> Option<&str> {
        match &self.subject {
            Subject::Workload { namespace, .. } => Some(namespace),
            Subject::Node(_) | Subject::Controller => None,
        }
    }
}

/// A path segment as SPIFFE-ID §2.2 allows it, without the relative ones.
fn is_name(segment: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !segment.is_empty()
        && segment.len() <= 253
        && segment != "."
        && segment != ".."
        && segment.chars().all(allowed)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let domain = &self.trust_domain;
        match &self.subject {
            Subject::Workload { namespace, service_account } => {
                write!(f, "spiffe://{domain}/ns/{namespace}/sa/{service_account}")
            }
            Subject::Node(name) => write!(f, "spiffe://{domain}/node/{name}"),
            Subject::Controller => write!(f, "spiffe://{domain}/controller"),
        }
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        Self::parse(text)
    }
}

impl Serialize for TrustDomain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for TrustDomain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SpiffeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Result<(), ()>) {
        let parsed = SpiffeId::parse(text);
        assert_eq!(parsed.as_ref().map(|_| ()).map_err(|_| ()), expected, "{text}: {parsed:?}");
        if let Ok(id) = parsed {
            assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn identities_of_the_mesh_parse_and_print_the_same() {
        check("spiffe://cluster.local/ns/shop/sa/web", Ok(()));
        check("spiffe://td/node/node-a", Ok(()));
        check("spiffe://td/controller", Ok(()));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe:///ns/a/sa/b",
            "https://td/ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a%2f/sa/b",
            "spiffe://td:443/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/node/a/b",
        ] {
            check(text, Err(()));
        }
    }
}
