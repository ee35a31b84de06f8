//! Policies as data: whom they select, what their rules match, what they do.
//!
//! What they mean for a connection is [`crate::policy`]'s; this says only which single thing each entry matches. Every
//! value of these types means something: texts are parsed at the edges.

use std::{collections::BTreeMap, fmt, str::FromStr};

/// A block of addresses of one family.
pub use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Asks, Name, Workload};
use crate::identity::{IdentityError, SpiffeId, TrustDomain};

/// What a policy does with the connections that its rules match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// They may; and once any allow policy selects a workload, what no allow rule matches may not.
    Allow,
    /// They may not, whatever any allow policy says.
    Deny,
}

/// Whether a policy is in force, or only tells what it would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Enforcement {
    /// It decides.
    #[default]
    Enforce,
    /// It refuses nothing and allows nothing; what it would refuse is counted and logged.
    Audit,
}

/// Who may connect to the workloads that it selects (`AuthorizationPolicy`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Its name; it selects workloads of its own namespace only.
    pub name: Name,
    /// Which of them.
    #[serde(default)]
    pub selector: Selector,
    /// What it does.
    pub action: Action,
    /// Whether it does it.
    #[serde(default)]
    pub enforcement: Enforcement,
    /// Any of these; none: matches nothing.
    pub rules: Vec<Rule>,
}

impl Policy {
    /// An enforced policy for every workload of its namespace.
    pub fn new(name: Name, action: Action, rules: Vec<Rule>) -> Self {
        Self { name, selector: Selector::default(), action, enforcement: Enforcement::Enforce, rules }
    }

    /// Whether it speaks about connections to this workload.
    pub fn selects(&self, workload: &Workload) -> bool {
        self.name.namespace == workload.name.namespace && self.selector.matches(&workload.labels)
    }
}

/// Workloads by their labels; what is empty selects every workload of the namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Selector {
    /// All of these labels (`matchLabels`).
    pub labels: BTreeMap<String, String>,
    /// And all of these (`matchExpressions`).
    #[serde(default)]
    pub expressions: Vec<Expression>,
}

impl Selector {
    /// Whether a workload with these labels is selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|expression| expression.matches(labels))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.labels.is_empty() && self.expressions.is_empty() {
            return f.write_str("all of the namespace");
        }
        let labels = self.labels.iter().map(|(key, value)| format!("{key}={value}"));
        let all: Vec<String> = labels.chain(self.expressions.iter().map(ToString::to_string)).collect();
        f.write_str(&all.join(", "))
    }
}

/// What one label must be (Kubernetes' `LabelSelectorRequirement`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expression {
    /// The label.
    pub key: String,
    /// How it is looked at.
    pub operator: Operator,
    /// For [`Operator::In`] and [`Operator::NotIn`].
    pub values: Vec<String>,
}

/// How an [`Expression`] looks at its label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operator {
    /// It is there with one of the values.
    In,
    /// It has none of the values, or is not there.
    NotIn,
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

impl Expression {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (key, values) = (&self.key, self.values.join(", "));
        match self.operator {
            Operator::In => write!(f, "{key} in ({values})"),
            Operator::NotIn => write!(f, "{key} not in ({values})"),
            Operator::Exists => write!(f, "{key} is set"),
            Operator::DoesNotExist => write!(f, "{key} is not set"),
        }
    }
}

/// A set of connections: from any of these sources to any of these targets.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rule {
    /// Any of these; none: any source.
    pub from: Vec<Source>,
    /// Any of these; none: any port.
    pub to: Vec<Target>,
}

/// A set of sources: every list that is given in `any_of` must match, and no entry of `none_of` may.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Source {
    /// `identities`, `namespaces`, `trustDomains`, `addressBlocks`: within a list, any entry.
    pub any_of: Traits,
    /// `notIdentities`, `notNamespaces`, `notTrustDomains`, `notAddressBlocks`.
    pub none_of: Traits,
}

/// What is known of a source.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traits {
    /// Identities, one by one or by what they begin with.
    pub identities: Vec<IdentityPattern>,
    /// Namespaces of identities.
    pub namespaces: Vec<String>,
    /// Trust domains of identities.
    pub trust_domains: Vec<TrustDomain>,
    /// Blocks of addresses.
    pub address_blocks: Vec<IpNet>,
}

/// A set of ports of the destination workload, and of requests to them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Target {
    /// Any of these; none: any port.
    pub ports: Vec<PortRange>,
    /// None of these.
    pub not_ports: Vec<PortRange>,
    /// Requests that are so.
    #[serde(default)]
    pub any_of: Asks,
    /// And not so.
    #[serde(default)]
    pub none_of: Asks,
}

impl Target {
    /// Whether a port is of it.
    pub fn has_port(&self, port: u16) -> bool {
        let within = |ranges: &[PortRange]| ranges.iter().any(|range| range.contains(port));
        (self.ports.is_empty() || within(&self.ports)) && !within(&self.not_ports)
    }

    /// Whether requests have to be read to know what is of it.
    pub fn is_of_requests(&self) -> bool {
        !self.any_of.is_empty() || !self.none_of.is_empty()
    }
}

/// What a rule matches, in one line for a person.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let any = |parts: Vec<String>, nothing: &str| {
            if parts.is_empty() { nothing.to_owned() } else { parts.join(", or ") }
        };
        let from = self.from.iter().map(Source::describe).collect();
        let to = self.to.iter().map(Target::describe).collect();
        write!(f, "from {} to {}", any(from, "any source"), any(to, "any port"))
    }
}

impl Source {
    fn describe(&self) -> String {
        let none_of = self.none_of.describe().into_iter().map(|part| format!("not {part}"));
        let all: Vec<String> = self.any_of.describe().into_iter().chain(none_of).collect();
        if all.is_empty() { "any source".to_owned() } else { all.join(" and ") }
    }
}

impl Traits {
    fn describe(&self) -> Vec<String> {
        let lists = [
            list("identity", &self.identities),
            list("namespace", &self.namespaces),
            list("trust domain", &self.trust_domains),
            list("address in", &self.address_blocks),
        ];
        lists.into_iter().flatten().collect()
    }
}

impl Target {
    fn describe(&self) -> String {
        let none_of = list("port", &self.not_ports).into_iter().chain(self.none_of.describe());
        let none_of = none_of.map(|part| format!("not {part}"));
        let any_of = list("port", &self.ports).into_iter().chain(self.any_of.describe());
        let all: Vec<String> = any_of.chain(none_of).collect();
        if all.is_empty() { "any port".to_owned() } else { all.join(" and ") }
    }
}

pub(super) fn list(what: &str, entries: &[impl ToString]) -> Option<String> {
    let entries: Vec<String> = entries.iter().map(ToString::to_string).collect();
    (!entries.is_empty()).then(|| format!("{what} {}", entries.join(" or ")))
}

/// Identities that one entry of a policy names.
///
/// Wildcards stand for whole parts of an identity, so that `…/ns/shop/*` never covers the namespace `shop-2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum IdentityPattern {
    /// This one.
    Exact(SpiffeId),
    /// Every service account of a namespace: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/*`.
    Namespace(TrustDomain, String),
    /// Every workload of a trust domain: `spiffe://TRUST-DOMAIN/*`.
    TrustDomain(TrustDomain),
}

/// Why a text names no identities.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// It has no wildcard and is no identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No connection ever has such an identity.
    #[error("'{0}' is not a workload's identity, so it never opens a connection")]
    NotOfWorkload(String),
    /// The wildcard stands where none may.
    #[error("'{0}': a '*' may only stand for all of a trust domain or all of a namespace")]
    Wildcard(String),
}

impl IdentityPattern {
    /// Reads an identity, or one with `*` for what follows the trust domain or the namespace.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let shown = || text.chars().take(300).collect();
        if !text.contains('*') {
            let id = SpiffeId::parse(text)?;
            let of_workload = id.namespace().is_some();
            return if of_workload { Ok(Self::Exact(id)) } else { Err(PatternError::NotOfWorkload(shown())) };
        }
        let wildcard = || PatternError::Wildcard(shown());
        let parts: Vec<&str> = text.strip_prefix("spiffe://").ok_or_else(wildcard)?.split('/').collect();
        match parts.as_slice() {
            [domain, "*"] | [domain, "ns", "*"] => Ok(Self::TrustDomain(TrustDomain::parse(domain)?)),
            [domain, "ns", namespace, "*"] | [domain, "ns", namespace, "sa", "*"] => {
                // Whatever may be a namespace, may be one in an identity.
                let id = SpiffeId::workload(&TrustDomain::parse(domain)?, namespace, "any")?;
                Ok(Self::Namespace(id.trust_domain().clone(), (*namespace).to_owned()))
            }
            _ => Err(wildcard()),
        }
    }

    /// Whether it names this identity.
    pub fn matches(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Exact(exact) => exact == id,
            Self::Namespace(domain, namespace) => {
                id.trust_domain() == domain && id.namespace() == Some(namespace)
            }
            Self::TrustDomain(domain) => id.trust_domain() == domain && id.namespace().is_some(),
        }
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(id) => id.fmt(f),
            Self::Namespace(domain, namespace) => write!(f, "spiffe://{domain}/ns/{namespace}/*"),
            Self::TrustDomain(domain) => write!(f, "spiffe://{domain}/*"),
        }
    }
}

impl From<SpiffeId> for IdentityPattern {
    fn from(id: SpiffeId) -> Self {
        Self::Exact(id)
    }
}

impl From<IdentityPattern> for String {
    fn from(pattern: IdentityPattern) -> Self {
        pattern.to_string()
    }
}

impl TryFrom<String> for IdentityPattern {
    type Error = PatternError;
    fn try_from(text: String) -> Result<Self, PatternError> {
        Self::parse(&text)
    }
}

/// Ports from one to another, both included; printed as `8080` or `9000-9100`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// Why a text is no range of ports.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortRangeError {
    /// Not of the form.
    #[error("'{0}' is neither a port nor a range of ports")]
    Malformed(String),
    /// 0 or above 65535.
    #[error("{0} is not a port")]
    NotAPort(u64),
    /// The last comes before the first.
    #[error("the range {0} ends before it begins")]
    Backwards(String),
}

impl PortRange {
    /// From `first` to `last`; numbers as they stand in a document or on the wire.
    pub fn new(first: u64, last: u64) -> Result<Self, PortRangeError> {
        let port = |number: u64| match u16::try_from(number) {
            Ok(port) if port != 0 => Ok(port),
            _ => Err(PortRangeError::NotAPort(number)),
        };
        let (first, last) = (port(first)?, port(last)?);
        if last < first {
            return Err(PortRangeError::Backwards(format!("{first}-{last}")));
        }
        Ok(Self { first, last })
    }

    /// The first port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// The last port.
    pub fn last(self) -> u16 {
        self.last
    }

    /// Whether a port lies in it.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl FromStr for PortRange {
    type Err = PortRangeError;
    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let number = |part: &str| {
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            let parsed = digits.then(|| part.parse().ok()).flatten();
            parsed.ok_or_else(|| PortRangeError::Malformed(text.chars().take(100).collect()))
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Self::new(number(first)?, number(last)?)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return write!(f, "{}", self.first);
        }
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> Self {
        range.to_string()
    }
}

impl TryFrom<String> for PortRange {
    type Error = PortRangeError;
    fn try_from(text: String) -> Result<Self, PortRangeError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_pattern(pattern: &str, matching: &[&str], others: &[&str]) {
        let parsed = IdentityPattern::parse(pattern).unwrap();
        assert_eq!(IdentityPattern::parse(&parsed.to_string()).unwrap(), parsed);
        let matches = |id: &&&str| parsed.matches(&SpiffeId::parse(id).unwrap());
        assert_eq!(matching.iter().filter(matches).count(), matching.len(), "{pattern}");
        assert_eq!(others.iter().filter(matches).count(), 0, "{pattern}");
    }

    #[test]
    fn a_wildcard_stands_for_whole_parts_of_an_identity() {
        let (web, other) = ("spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop-2/sa/web");
        let (foreign, node) = ("spiffe://td2/ns/shop/sa/web", "spiffe://td/node/a");
        check_pattern(web, &[web], &[other, foreign, node, "spiffe://td/ns/shop/sa/web2"]);
        for shop in ["spiffe://td/ns/shop/*", "spiffe://td/ns/shop/sa/*"] {
            check_pattern(shop, &[web, "spiffe://td/ns/shop/sa/db"], &[other, foreign, node]);
        }
        for all in ["spiffe://td/*", "spiffe://td/ns/*"] {
            check_pattern(all, &[web, other], &[foreign, node]);
        }
        for wrong in [
            "*",
            "spiffe://*",
            "spiffe://td*",
            "spiffe://td/ns/shop*",
            "spiffe://td/ns/sh*p/sa/web",
            "spiffe://td/ns/*/sa/web",
            "spiffe://td/ns//*",
            "spiffe://td/node/*",
            "spiffe://td/ns/shop/sa/web/*",
            "spiffe://td/node/a",
            "web",
        ] {
            assert!(IdentityPattern::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_are_one_or_a_range() {
        for (text, inside, outside) in
            [("80", vec![80], vec![79, 81]), ("9000-9100", vec![9000, 9050, 9100], vec![8999, 9101])]
        {
            let range: PortRange = text.parse().unwrap();
            assert_eq!(range.to_string(), text);
            assert!(inside.iter().all(|port| range.contains(*port)), "{text}");
            assert!(!outside.iter().any(|port| range.contains(*port)), "{text}");
        }
        for wrong in ["", "-", "0", "http", "65536", "1-", "-1", "2-1", "0-1", "1-65536", "1-2-3", "+1", "1 "]
        {
            assert!(wrong.parse::<PortRange>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn expressions_look_at_labels_as_kubernetes_does() {
        let labels: BTreeMap<String, String> = [("app".to_owned(), "web".to_owned())].into();
        let matches = |key: &str, operator, values: &[&str]| {
            let values = values.iter().map(|value| (*value).to_owned()).collect();
            Selector {
                labels: BTreeMap::new(),
                expressions: vec![Expression { key: key.into(), operator, values }],
            }
            .matches(&labels)
        };
        assert!(matches("app", Operator::In, &["db", "web"]) && !matches("app", Operator::In, &["db"]));
        assert!(!matches("tier", Operator::In, &["db"]) && matches("tier", Operator::NotIn, &["db"]));
        assert!(!matches("app", Operator::NotIn, &["web"]) && matches("app", Operator::NotIn, &["db"]));
        assert!(matches("app", Operator::Exists, &[]) && !matches("tier", Operator::Exists, &[]));
        assert!(matches("tier", Operator::DoesNotExist, &[]) && !matches("app", Operator::DoesNotExist, &[]));
    }
}
