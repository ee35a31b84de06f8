//! AuthorizationPolicies. What they mean is told in `docs/operate/authorization.md`; here each text becomes the thing
//! that it names, or a problem with its line.
//!
//! A list that is there and empty is refused: left out it would match everything, and a list that a template failed to
//! fill must not.

use std::{collections::BTreeMap, fmt};

use mesh_core::{
    identity::TrustDomain,
    model::{
        Action, Asks, Enforcement, Expression, IdentityPattern, IpNet, Operator, Policy, PortRange, Rule,
        Selector, Source, Target, Traits,
    },
};
use serde::{
    Deserialize, Deserializer,
    de::{Error, Visitor},
};

#[cfg(test)]
use super::asks::shape;
use super::{
    super::document::one_of,
    Raw,
    asks::RawHeader,
    authentication::RawClaim,
    check::{Check, MAX_ENTRIES},
};
use crate::model::Object;

/// Most entries of all lists of a policy together: what a connection may have to be compared with.
const MAX_POLICY_ENTRIES: usize = 16 * 1024;
/// How an identity is written.
const IDENTITY_CURE: &str = "write spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT, spiffe://TRUST-DOMAIN/ns/NAMESPACE/* \
                             or spiffe://TRUST-DOMAIN/*";

/// Who may connect to workloads of a namespace.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawPolicy {
    /// Which workloads of the namespace it is about; left out, all of them.
    #[serde(default)]
    selector: RawSelector,
    /// What happens to a connection that a rule matches. With an Allow policy, what no rule of any matches is refused; a Deny
    /// wins over every Allow.
    #[cfg_attr(test, schemars(extend("enum" = ["Allow", "Deny"])))]
    action: String,
    /// Audit decides nothing, and counts and logs what it would refuse; left out, Enforce.
    #[cfg_attr(test, schemars(extend("enum" = ["Enforce", "Audit"])))]
    enforcement: Option<String>,
    /// It matches what one of them matches; without any, nothing.
    #[cfg_attr(test, schemars(length(max = 1024)))]
    #[serde(default)]
    rules: Vec<RawRule>,
}

/// Workloads by their labels: all that it says has to hold.
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawSelector {
    /// Labels that a workload has to have, with these values.
    #[cfg_attr(test, schemars(extend("maxProperties" = 256)))]
    #[serde(default)]
    match_labels: BTreeMap<String, String>,
    /// What else has to hold of its labels.
    #[cfg_attr(test, schemars(length(max = 1024)))]
    #[serde(default)]
    match_expressions: Vec<RawExpression>,
}

/// What has to hold of one label.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 : !has(self.values) || size(self.values) == 0",
    "message": "In and NotIn need values, Exists and DoesNotExist look at none",
}])))]
struct RawExpression {
    /// The label's key.
    #[cfg_attr(test, schemars(length(min = 1, max = 317)))]
    key: String,
    /// How its value is compared; Exists and DoesNotExist ask only whether it is there.
    #[cfg_attr(test, schemars(extend("enum" = ["In", "NotIn", "Exists", "DoesNotExist"])))]
    operator: String,
    /// What it is compared with.
    #[cfg_attr(test, schemars(length(max = 1024), inner(length(max = 63))))]
    #[serde(default)]
    values: Vec<String>,
}

/// It matches a connection, or a request, that one of `from` and one of `to` match; one that is left out matches all.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRule {
    /// Who connects.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    from: Option<Vec<RawSource>>,
    /// Where to.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    to: Option<Vec<RawTarget>>,
}

/// Who connects: of each list that is there one entry has to match, and of the lists with `not` none.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSource {
    /// Identities: spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT, spiffe://TRUST-DOMAIN/ns/NAMESPACE/* or
    /// spiffe://TRUST-DOMAIN/*.
    #[cfg_attr(
        test,
        schemars(
            length(min = 1, max = 1024),
            inner(length(max = 2048), regex(pattern = r"^spiffe://[^/]+/(\*|ns/[^/]+/(\*|sa/[^/]+))$"))
        )
    )]
    identities: Option<Vec<String>>,
    /// Namespaces of identities.
    #[cfg_attr(
        test,
        schemars(
            length(min = 1, max = 1024),
            inner(length(max = 253), regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"))
        )
    )]
    namespaces: Option<Vec<String>>,
    /// Trust domains of identities.
    #[cfg_attr(
        test,
        schemars(length(min = 1, max = 1024), inner(length(max = 255), regex(pattern = r"^[a-z0-9._-]+$")))
    )]
    trust_domains: Option<Vec<String>>,
    /// Blocks of source addresses, such as 10.1.0.0/16 or fd00::/8.
    #[cfg_attr(
        test,
        schemars(
            length(min = 1, max = 1024),
            inner(length(max = 64), regex(pattern = r"^[0-9a-fA-F:.]{2,45}/[0-9]{1,3}$"))
        )
    )]
    address_blocks: Option<Vec<String>>,
    /// Not these identities.
    #[cfg_attr(
        test,
        schemars(
            length(min = 1, max = 1024),
            inner(length(max = 2048), regex(pattern = r"^spiffe://[^/]+/(\*|ns/[^/]+/(\*|sa/[^/]+))$"))
        )
    )]
    not_identities: Option<Vec<String>>,
    /// Not of these namespaces.
    #[cfg_attr(
        test,
        schemars(
            length(min = 1, max = 1024),
            inner(length(max = 253), regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"))
        )
    )]
    not_namespaces: Option<Vec<String>>,
    /// Not of these trust domains.
    #[cfg_attr(
        test,
        schemars(length(min = 1, max = 1024), inner(length(max = 255), regex(pattern = r"^[a-z0-9._-]+$")))
    )]
    not_trust_domains: Option<Vec<String>>,
    /// Not from these blocks.
    #[cfg_attr(
        test,
        schemars(
            length(min = 1, max = 1024),
            inner(length(max = 64), regex(pattern = r"^[0-9a-fA-F:.]{2,45}/[0-9]{1,3}$"))
        )
    )]
    not_address_blocks: Option<Vec<String>>,
}

/// Where to.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawTarget {
    /// The workload's ports, not the Service's: 8080, or a range such as 9000-9100.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    ports: Option<Vec<RawPorts>>,
    /// Not these ports.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    not_ports: Option<Vec<RawPorts>>,
    /// Methods of requests: GET. With this or anything below, what comes to the ports has to be HTTP.
    #[cfg_attr(test, schemars(length(min = 1, max = 64), transform = shape::methods))]
    methods: Option<Vec<String>>,
    /// Not these methods.
    #[cfg_attr(test, schemars(length(min = 1, max = 64), transform = shape::methods))]
    not_methods: Option<Vec<String>>,
    /// Hosts that requests ask for: shop.example, *.shop.example or shop.*; of every port, unless one is named.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024), transform = shape::hosts))]
    hosts: Option<Vec<String>>,
    /// Not these hosts.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024), transform = shape::hosts))]
    not_hosts: Option<Vec<String>>,
    /// Paths without query, with nothing percent-encoded: /cart, /cart/* or *.pdf.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024), transform = shape::paths))]
    paths: Option<Vec<String>>,
    /// Not these paths.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024), transform = shape::paths))]
    not_paths: Option<Vec<String>>,
    /// Headers, all of which have to be so.
    #[cfg_attr(test, schemars(length(min = 1, max = 64)))]
    headers: Option<Vec<RawHeader>>,
    /// Headers, none of which may be so.
    #[cfg_attr(test, schemars(length(min = 1, max = 64)))]
    not_headers: Option<Vec<RawHeader>>,
    /// Claims of a token that an AuthenticationPolicy has verified, all of which have to be so. Without such a token an Allow
    /// rule with this or notClaims matches nothing, and a Deny rule everything.
    #[cfg_attr(test, schemars(length(min = 1, max = 64)))]
    claims: Option<Vec<RawClaim>>,
    /// Claims, none of which may be so.
    #[cfg_attr(test, schemars(length(min = 1, max = 64)))]
    not_claims: Option<Vec<RawClaim>>,
}

/// A port or a range of them: a number, or a text such as `9000-9100`.
#[derive(Debug)]
pub(super) struct RawPorts(String);

#[cfg(test)]
impl schemars::JsonSchema for RawPorts {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Ports".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "x-kubernetes-int-or-string": true,
            "minimum": 1,
            "maximum": 65535,
            "maxLength": 11,
            "pattern": "^[0-9]{1,5}(-[0-9]{1,5})?$",
        })
    }
}

impl<'de> Deserialize<'de> for RawPorts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Scalar;
        impl Visitor<'_> for Scalar {
            type Value = RawPorts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port such as 8080, or a range such as 9000-9100")
            }
            fn visit_u64<E: Error>(self, number: u64) -> Result<RawPorts, E> {
                Ok(RawPorts(number.to_string()))
            }
            fn visit_i64<E: Error>(self, number: i64) -> Result<RawPorts, E> {
                Ok(RawPorts(number.to_string()))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<RawPorts, E> {
                Ok(RawPorts(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Scalar)
    }
}

impl Check<'_> {
    pub(super) fn policy(&mut self, raw: Raw<RawPolicy>) -> Object {
        let name = self.namespaced(&raw.metadata);
        self.our_labels(&raw.metadata.labels, &[]);
        let selector = self.selector(raw.spec.selector);
        let action = self.action(&raw.spec.action);
        let enforcement = self.enforcement(raw.spec.enforcement.as_deref());
        self.limit("spec.rules", raw.spec.rules.len(), MAX_ENTRIES);
        let rules: Vec<Rule> =
            raw.spec.rules.into_iter().enumerate().map(|(index, rule)| self.rule(index, rule)).collect();
        self.limit("spec.rules", rules.iter().map(entries).sum(), MAX_POLICY_ENTRIES);
        Object::AuthorizationPolicy(Policy { name, selector, action, enforcement, rules })
    }

    fn action(&mut self, text: &str) -> Action {
        match text {
            "Allow" => Action::Allow,
            "Deny" => Action::Deny,
            "Audit" => {
                let cure = "write 'enforcement: Audit' beside it, and Allow or Deny here: what it would do";
                self.problem("spec.action", "'Audit' is not an action", cure);
                Action::Deny
            }
            other => {
                let cure = one_of(other, &["Allow", "Deny"]);
                self.problem("spec.action", format!("'{other}' is not an action"), cure);
                Action::Deny
            }
        }
    }

    pub(super) fn enforcement(&mut self, text: Option<&str>) -> Enforcement {
        match text {
            None | Some("Enforce") => Enforcement::Enforce,
            Some("Audit") => Enforcement::Audit,
            Some(other) => {
                let cure = one_of(other, &["Enforce", "Audit"]);
                self.problem("spec.enforcement", format!("'{other}' is neither Enforce nor Audit"), cure);
                Enforcement::Enforce
            }
        }
    }

    pub(super) fn selector(&mut self, raw: RawSelector) -> Selector {
        let field = "spec.selector.matchExpressions";
        self.labels("spec.selector.matchLabels", &raw.match_labels);
        self.limit(field, raw.match_expressions.len(), MAX_ENTRIES);
        let expressions = raw.match_expressions.into_iter().enumerate();
        let expressions =
            expressions.filter_map(|(index, it)| self.expression(&format!("{field}[{index}]"), it)).collect();
        Selector { labels: raw.match_labels, expressions }
    }

    fn expression(&mut self, at: &str, raw: RawExpression) -> Option<Expression> {
        let operator = match raw.operator.as_str() {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => {
                let cure = one_of(other, &["In", "NotIn", "Exists", "DoesNotExist"]);
                self.problem(&format!("{at}.operator"), format!("'{other}' is not an operator"), cure);
                return None;
            }
        };
        self.label_key(&format!("{at}.key"), &raw.key);
        let values = format!("{at}.values");
        self.limit(&values, raw.values.len(), MAX_ENTRIES);
        for (index, value) in raw.values.iter().take(MAX_ENTRIES).enumerate() {
            self.label_value(&format!("{values}[{index}]"), value);
        }
        match (operator, raw.values.is_empty()) {
            (Operator::In | Operator::NotIn, true) => {
                self.problem(&values, format!("{operator:?} needs values"), "write at least one");
            }
            (Operator::Exists | Operator::DoesNotExist, false) => {
                self.problem(
                    &values,
                    format!("{operator:?} looks at no value"),
                    "remove them, or use In or NotIn",
                );
            }
            _ => {}
        }
        Some(Expression { key: raw.key, operator, values: raw.values })
    }

    fn rule(&mut self, index: usize, raw: RawRule) -> Rule {
        let at = format!("spec.rules[{index}]");
        let from = self.list(&format!("{at}.from"), raw.from, Self::source);
        let to = self.list(&format!("{at}.to"), raw.to, Self::target);
        Rule { from, to }
    }

    fn source(&mut self, at: &str, raw: RawSource) -> Option<Source> {
        let any_of = Traits {
            identities: self.list(&format!("{at}.identities"), raw.identities, Self::identities),
            namespaces: self.list(&format!("{at}.namespaces"), raw.namespaces, Self::namespace_name),
            trust_domains: self.list(&format!("{at}.trustDomains"), raw.trust_domains, Self::trust_domain),
            address_blocks: self.list(&format!("{at}.addressBlocks"), raw.address_blocks, Self::block),
        };
        let none_of = Traits {
            identities: self.list(&format!("{at}.notIdentities"), raw.not_identities, Self::identities),
            namespaces: self.list(&format!("{at}.notNamespaces"), raw.not_namespaces, Self::namespace_name),
            trust_domains: self.list(
                &format!("{at}.notTrustDomains"),
                raw.not_trust_domains,
                Self::trust_domain,
            ),
            address_blocks: self.list(&format!("{at}.notAddressBlocks"), raw.not_address_blocks, Self::block),
        };
        Some(Source { any_of, none_of })
    }

    fn target(&mut self, at: &str, raw: RawTarget) -> Option<Target> {
        Some(Target {
            ports: self.list(&format!("{at}.ports"), raw.ports, Self::port_range),
            not_ports: self.list(&format!("{at}.notPorts"), raw.not_ports, Self::port_range),
            any_of: Asks {
                methods: self.list(&format!("{at}.methods"), raw.methods, Self::method),
                hosts: self.list(&format!("{at}.hosts"), raw.hosts, Self::host),
                paths: self.list(&format!("{at}.paths"), raw.paths, Self::path),
                headers: self.list(&format!("{at}.headers"), raw.headers, Self::header),
                claims: self.list(&format!("{at}.claims"), raw.claims, Self::claim),
            },
            none_of: Asks {
                methods: self.list(&format!("{at}.notMethods"), raw.not_methods, Self::method),
                hosts: self.list(&format!("{at}.notHosts"), raw.not_hosts, Self::host),
                paths: self.list(&format!("{at}.notPaths"), raw.not_paths, Self::path),
                headers: self.list(&format!("{at}.notHeaders"), raw.not_headers, Self::header),
                claims: self.list(&format!("{at}.notClaims"), raw.not_claims, Self::claim),
            },
        })
    }

    /// A list that, where it is given, has entries; what is wrong with one of them is said at its own place.
    pub(super) fn list<Raw, T>(
        &mut self,
        field: &str,
        raw: Option<Vec<Raw>>,
        mut entry: impl FnMut(&mut Self, &str, Raw) -> Option<T>,
    ) -> Vec<T> {
        let Some(raw) = raw else { return vec![] };
        if raw.is_empty() {
            let cure = "write what it shall match, or remove the field if that is everything";
            self.problem(field, "this list is empty, and so would match everything", cure);
        }
        self.limit(field, raw.len(), MAX_ENTRIES);
        let entries = raw.into_iter().take(MAX_ENTRIES).enumerate();
        entries.filter_map(|(index, raw)| entry(self, &format!("{field}[{index}]"), raw)).collect()
    }

    fn identities(&mut self, field: &str, text: String) -> Option<IdentityPattern> {
        let parsed = IdentityPattern::parse(&text);
        parsed.map_err(|error| self.problem(field, error.to_string(), IDENTITY_CURE)).ok()
    }

    fn namespace_name(&mut self, field: &str, text: String) -> Option<String> {
        self.name(field, &text);
        Some(text)
    }

    fn trust_domain(&mut self, field: &str, text: String) -> Option<TrustDomain> {
        let cure = "write it as in an identity, without spiffe:// and without a path";
        TrustDomain::parse(&text).map_err(|error| self.problem(field, error.to_string(), cure)).ok()
    }

    fn block(&mut self, field: &str, text: String) -> Option<IpNet> {
        let cure = "write an address and a prefix length, such as 10.1.0.0/16 or fd00::/8";
        match text.parse() {
            // An application's address is never of this form, so it would never match.
            Ok(IpNet::V6(block)) if block.addr().to_ipv4_mapped().is_some() => {
                self.problem(field, format!("'{text}' is an IPv4 block written as IPv6"), cure);
                None
            }
            Ok(block) => Some(block),
            Err(_) => {
                let shown: String = text.chars().take(100).collect();
                self.problem(field, format!("'{shown}' is not an address block"), cure);
                None
            }
        }
    }

    pub(super) fn port_range(&mut self, field: &str, raw: RawPorts) -> Option<PortRange> {
        let cure = "write a number from 1 to 65535, or a range such as 9000-9100";
        raw.0
            .parse()
            .map_err(|error: mesh_core::model::PortRangeError| self.problem(field, error.to_string(), cure))
            .ok()
    }
}

/// How many things one rule compares a connection with.
fn entries(rule: &Rule) -> usize {
    let traits = |it: &Traits| {
        it.identities.len() + it.namespaces.len() + it.trust_domains.len() + it.address_blocks.len()
    };
    let sources = rule.from.iter().map(|source| 1 + traits(&source.any_of) + traits(&source.none_of));
    let of_requests = |it: &Target| it.any_of.len() + it.none_of.len();
    let targets = rule.to.iter().map(|it| 1 + it.ports.len() + it.not_ports.len() + of_requests(it));
    1 + sources.sum::<usize>() + targets.sum::<usize>()
}
