//! One document into one checked object. The same manifests stand in a directory and in Kubernetes, so what
//! Kubernetes writes into its own kinds (`status`, `metadata.uid`, …) is taken and passed over; any other field that
//! is not known is a mistake, and said.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use mesh_core::{
    identity::SpiffeId,
    model::{Action, Mode, Name, Policy, Rule, Source},
};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    Problem,
    document::{Document, Node, one_of},
};
use crate::model::{Kind, Namespace, Object, ObjectKey, Port, Service, Workload};

/// Label of a namespace or a workload: whether traffic is meant to be captured.
pub const ENROLL: &str = "nodemesh.io/enroll";
/// Label of a namespace: whether its workloads take plaintext.
pub const MODE: &str = "nodemesh.io/mode";
/// Labels with this prefix are ours: one that is not known is a mistake.
const OUR_PREFIX: &str = "nodemesh.io/";
/// Most addresses of a workload or a service; what a pod or a dual-stack service has is two.
const MAX_ADDRESSES: usize = 16;
/// Most entries of any list in a policy or of a service's ports, so that one object cannot fill every node.
const MAX_ENTRIES: usize = 1024;

/// What a document turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing but comments.
    Empty,
    /// A checked object.
    Accepted(Object),
    /// Not taken; the object it is about, where it says so.
    Refused(Option<ObjectKey>, Vec<Problem>),
}

/// Reads and checks one document.
pub fn parse(document: &Document<'_>) -> Outcome {
    let tree = match document.tree() {
        Ok(tree) if tree.is_null() => return Outcome::Empty,
        Ok(tree) => tree,
        Err(problem) => return Outcome::Refused(None, vec![problem]),
    };
    let kind = match kind(document, &tree) {
        Ok(kind) => kind,
        Err(problem) => return Outcome::Refused(None, vec![problem]),
    };
    let key = key(kind, &tree);
    let mut check = Check { tree: &tree, problems: vec![] };
    let object = check.api_version(kind).and_then(|()| match kind {
        Kind::Namespace => document.typed(&tree).map(|raw| check.namespace(raw)),
        Kind::Workload => document.typed(&tree).map(|raw| check.workload(raw)),
        Kind::Service => document.typed(&tree).map(|raw| check.service(raw)),
        Kind::AuthorizationPolicy => document.typed(&tree).map(|raw| check.policy(raw)),
    });
    match object {
        Ok(object) if check.problems.is_empty() => Outcome::Accepted(object),
        Ok(_) => Outcome::Refused(key, check.problems),
        Err(problem) => Outcome::Refused(key, vec![problem]),
    }
}

fn kind(document: &Document<'_>, tree: &Node) -> Result<Kind, Problem> {
    let names = Kind::ALL.map(Kind::as_str);
    let problem = |line, reason: String, cure| Problem { line, field: "kind".into(), reason, cure };
    match tree.text(&["kind"]) {
        None => Err(problem(
            document.line(),
            "the document does not say what it is".into(),
            format!("write 'kind:' with one of: {}", names.join(", ")),
        )),
        Some(text) => Kind::parse(text).ok_or_else(|| {
            problem(tree.line_of("kind"), format!("kind '{text}' is not known here"), one_of(text, &names))
        }),
    }
}

/// What the document is about, as far as it can be told before it is checked.
fn key(kind: Kind, tree: &Node) -> Option<ObjectKey> {
    let name = tree.text(&["metadata", "name"])?;
    let namespace = match kind {
        Kind::Namespace => name,
        _ => tree.text(&["metadata", "namespace"]).unwrap_or("default"),
    };
    Some(ObjectKey { kind, name: Name::new(namespace, name) })
}

/// Kubernetes' own fields that mean nothing here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawMetadata {
    name: String,
    namespace: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(rename = "annotations")]
    _annotations: Option<IgnoredAny>,
    #[serde(rename = "creationTimestamp")]
    _creation_timestamp: Option<IgnoredAny>,
    #[serde(rename = "finalizers")]
    _finalizers: Option<IgnoredAny>,
    #[serde(rename = "generation")]
    _generation: Option<IgnoredAny>,
    #[serde(rename = "managedFields")]
    _managed_fields: Option<IgnoredAny>,
    #[serde(rename = "ownerReferences")]
    _owner_references: Option<IgnoredAny>,
    #[serde(rename = "resourceVersion")]
    _resource_version: Option<IgnoredAny>,
    #[serde(rename = "uid")]
    _uid: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Raw<Spec> {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: RawMetadata,
    spec: Spec,
    #[serde(rename = "status")]
    _status: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawNamespace {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: RawMetadata,
    #[serde(rename = "spec")]
    _spec: Option<IgnoredAny>,
    #[serde(rename = "status")]
    _status: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawWorkload {
    node: String,
    addresses: Vec<String>,
    service_account: Option<String>,
    ready: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawService {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(default, rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    #[serde(default)]
    selector: BTreeMap<String, String>,
    #[serde(default)]
    ports: Vec<RawPort>,
    #[serde(rename = "type")]
    service_type: Option<String>,
    session_affinity: Option<String>,
    #[serde(rename = "ipFamilies")]
    _ip_families: Option<IgnoredAny>,
    #[serde(rename = "ipFamilyPolicy")]
    _ip_family_policy: Option<IgnoredAny>,
    #[serde(rename = "internalTrafficPolicy")]
    _internal_traffic_policy: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPort {
    name: Option<String>,
    port: u16,
    target_port: Option<u16>,
    protocol: Option<String>,
    #[serde(rename = "appProtocol")]
    _app_protocol: Option<IgnoredAny>,
    #[serde(rename = "nodePort")]
    _node_port: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPolicy {
    #[serde(default)]
    selector: RawSelector,
    action: String,
    #[serde(default)]
    rules: Vec<RawRule>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSelector {
    #[serde(default)]
    match_labels: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRule {
    #[serde(default)]
    from: Vec<RawSource>,
    #[serde(default)]
    to: Vec<RawTarget>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSource {
    #[serde(default)]
    identities: Vec<String>,
    #[serde(default)]
    namespaces: Vec<String>,
    #[serde(default)]
    address_blocks: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawTarget {
    #[serde(default)]
    ports: Vec<u16>,
}

/// Gathers everything that is wrong with one document, so that it is corrected in one go.
struct Check<'a> {
    tree: &'a Node,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn problem(&mut self, field: &str, reason: impl Into<String>, cure: impl Into<String>) {
        let line = self.tree.line_of(field);
        self.problems.push(Problem {
            line,
            field: field.to_owned(),
            reason: reason.into(),
            cure: cure.into(),
        });
    }

    fn api_version(&self, kind: Kind) -> Result<(), Problem> {
        let expected = kind.api_version();
        let found = self.tree.text(&["apiVersion"]);
        if found == Some(expected) {
            return Ok(());
        }
        Err(Problem {
            line: self.tree.line_of("apiVersion"),
            field: "apiVersion".into(),
            reason: found.map_or("this field is missing".into(), |it| format!("a {kind} is not of '{it}'")),
            cure: format!("write apiVersion: {expected}"),
        })
    }

    fn namespace(&mut self, raw: RawNamespace) -> Object {
        if raw.metadata.namespace.is_some() {
            self.problem("metadata.namespace", "a Namespace is not within another", "remove it");
        }
        self.name("metadata.name", &raw.metadata.name);
        self.our_labels(&raw.metadata.labels, &[ENROLL, MODE], "");
        let enroll = self.enroll(&raw.metadata.labels).unwrap_or(false);
        let mode = match raw.metadata.labels.get(MODE).map(String::as_str) {
            None | Some("permissive") => Mode::Permissive,
            Some("strict") => Mode::Strict,
            Some(other) => {
                let field = format!("metadata.labels.{MODE}");
                self.problem(
                    &field,
                    format!("'{other}' is not a mode"),
                    one_of(other, &["permissive", "strict"]),
                );
                Mode::Strict
            }
        };
        Object::Namespace(Namespace { name: raw.metadata.name, enroll, mode })
    }

    fn workload(&mut self, raw: Raw<RawWorkload>) -> Object {
        let name = self.namespaced(&raw.metadata);
        let cure = "; the mode is the namespace's: put it on the Namespace";
        self.our_labels(&raw.metadata.labels, &[ENROLL], cure);
        let enroll = self.enroll(&raw.metadata.labels);
        self.name("spec.node", &raw.spec.node);
        let service_account = raw.spec.service_account.unwrap_or_else(|| "default".to_owned());
        self.name("spec.serviceAccount", &service_account);
        if raw.spec.addresses.is_empty() {
            self.problem(
                "spec.addresses",
                "a workload without an address can be neither captured nor reached",
                "write its addresses: [10.1.0.11]",
            );
        }
        let addresses = self.addresses("spec.addresses", &raw.spec.addresses);
        Object::Workload(Workload {
            name,
            labels: raw.metadata.labels,
            enroll,
            node: raw.spec.node,
            addresses,
            service_account,
            ready: raw.spec.ready.unwrap_or(true),
        })
    }

    fn service(&mut self, raw: Raw<RawService>) -> Object {
        let name = self.namespaced(&raw.metadata);
        self.our_labels(&raw.metadata.labels, &[], "");
        let spec = raw.spec;
        if spec.service_type.as_deref() == Some("ExternalName") {
            self.problem(
                "spec.type",
                "a Service that is another name for something outside is not supported",
                "remove the document, or give the Service a selector and a clusterIP",
            );
        }
        if let Some(affinity) = spec.session_affinity.filter(|affinity| affinity != "None") {
            self.problem(
                "spec.sessionAffinity",
                format!("'{affinity}' is not supported, and passing over it would break what relies on it"),
                "write None, or remove it",
            );
        }
        let mut addresses = match spec.cluster_ip.as_deref() {
            None | Some("None" | "") => vec![],
            Some(address) => self.address("spec.clusterIP", address).into_iter().collect(),
        };
        let headless = spec.cluster_ips.iter().any(|address| address == "None");
        let more = if headless { vec![] } else { self.addresses("spec.clusterIPs", &spec.cluster_ips) };
        addresses.extend(more);
        let mut seen = BTreeSet::new();
        addresses.retain(|address| seen.insert(*address));
        self.limit("spec.ports", spec.ports.len(), MAX_ENTRIES);
        Object::Service(Service { name, addresses, selector: spec.selector, ports: self.ports(spec.ports) })
    }

    fn ports(&mut self, raw: Vec<RawPort>) -> Vec<Port> {
        let mut ports: Vec<Port> = Vec::new();
        for (index, raw) in raw.into_iter().enumerate() {
            let field = format!("spec.ports[{index}]");
            match raw.protocol.as_deref() {
                None | Some("TCP") => {}
                Some("UDP" | "SCTP") => continue,
                Some(other) => {
                    let cure = one_of(other, &["TCP", "UDP", "SCTP"]);
                    self.problem(&format!("{field}.protocol"), format!("'{other}' is not a protocol"), cure);
                }
            }
            let target = raw.target_port.unwrap_or(raw.port);
            self.port(&format!("{field}.port"), raw.port);
            self.port(&format!("{field}.targetPort"), target);
            if ports.iter().any(|port| port.port == raw.port) {
                self.problem(
                    &format!("{field}.port"),
                    format!("port {} stands here twice", raw.port),
                    "remove one of them",
                );
            }
            ports.push(Port { name: raw.name.unwrap_or_default(), port: raw.port, target });
        }
        ports
    }

    fn policy(&mut self, raw: Raw<RawPolicy>) -> Object {
        let name = self.namespaced(&raw.metadata);
        self.our_labels(&raw.metadata.labels, &[], "");
        let action = match raw.spec.action.as_str() {
            "Allow" => Action::Allow,
            "Deny" => Action::Deny,
            other => {
                let cure = one_of(other, &["Allow", "Deny"]);
                self.problem("spec.action", format!("'{other}' is not an action"), cure);
                Action::Deny
            }
        };
        self.limit("spec.rules", raw.spec.rules.len(), MAX_ENTRIES);
        let rules =
            raw.spec.rules.into_iter().enumerate().map(|(index, rule)| self.rule(index, rule)).collect();
        Object::AuthorizationPolicy(Policy { name, selector: raw.spec.selector.match_labels, action, rules })
    }

    fn rule(&mut self, index: usize, raw: RawRule) -> Rule {
        let at = format!("spec.rules[{index}]");
        self.limit(&format!("{at}.from"), raw.from.len(), MAX_ENTRIES);
        self.limit(&format!("{at}.to"), raw.to.len(), MAX_ENTRIES);
        let from = raw
            .from
            .into_iter()
            .enumerate()
            .map(|(index, source)| self.source(&format!("{at}.from[{index}]"), source))
            .collect();
        for (to, target) in raw.to.iter().enumerate() {
            for (index, port) in target.ports.iter().enumerate() {
                self.port(&format!("{at}.to[{to}].ports[{index}]"), *port);
            }
        }
        // One entry without ports means any port, whatever its neighbours say.
        let any = raw.to.iter().any(|target| target.ports.is_empty());
        let ports = if any { vec![] } else { raw.to.into_iter().flat_map(|target| target.ports).collect() };
        Rule { from, ports }
    }

    fn source(&mut self, at: &str, raw: RawSource) -> Source {
        for (list, len) in [
            ("identities", raw.identities.len()),
            ("namespaces", raw.namespaces.len()),
            ("addressBlocks", raw.address_blocks.len()),
        ] {
            self.limit(&format!("{at}.{list}"), len, MAX_ENTRIES);
        }
        let mut source = Source { namespaces: raw.namespaces, ..Source::default() };
        for (index, namespace) in source.namespaces.iter().enumerate() {
            self.name(&format!("{at}.namespaces[{index}]"), namespace);
        }
        for (index, text) in raw.identities.iter().enumerate() {
            let field = format!("{at}.identities[{index}]");
            match SpiffeId::parse(text) {
                Ok(id) if id.namespace().is_some() => source.identities.push(id),
                Ok(id) => self.problem(
                    &field,
                    format!("{id} is not a workload's identity, so it never opens a connection"),
                    "write spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT",
                ),
                Err(error) => self.problem(
                    &field,
                    error.to_string(),
                    "write spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT",
                ),
            }
        }
        for (index, text) in raw.address_blocks.iter().enumerate() {
            match text.parse() {
                Ok(block) => source.address_blocks.push(block),
                Err(_) => self.problem(
                    &format!("{at}.addressBlocks[{index}]"),
                    format!("'{text}' is not an address block"),
                    "write an address and a prefix length, such as 10.1.0.0/16 or fd00::/8",
                ),
            }
        }
        source
    }

    fn namespaced(&mut self, metadata: &RawMetadata) -> Name {
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        self.name("metadata.namespace", namespace);
        self.name("metadata.name", &metadata.name);
        Name::new(namespace, &metadata.name)
    }

    /// What Kubernetes calls a DNS subdomain (RFC 1123): also what an identity's path may hold.
    fn name(&mut self, field: &str, text: &str) {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        let ends = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let valid = text.len() <= 253
            && text.chars().all(inner)
            && text.chars().next().is_some_and(ends)
            && text.chars().next_back().is_some_and(ends);
        if !valid {
            let shown: String = text.chars().take(100).collect();
            self.problem(
                field,
                format!("'{shown}' is not a name"),
                "use 1 to 253 of a-z, 0-9, '-' and '.', with a letter or digit at both ends",
            );
        }
    }

    /// Labels of ours that the kind does not have.
    fn our_labels(&mut self, labels: &BTreeMap<String, String>, known: &[&str], hint: &str) {
        for label in labels.keys().filter(|label| label.starts_with(OUR_PREFIX)) {
            if !known.contains(&label.as_str()) {
                let hint = if label == MODE { hint } else { "" };
                self.problem(
                    &format!("metadata.labels.{label}"),
                    format!("the label '{label}' means nothing here{hint}"),
                    one_of(label, known),
                );
            }
        }
    }

    fn enroll(&mut self, labels: &BTreeMap<String, String>) -> Option<bool> {
        match labels.get(ENROLL)?.as_str() {
            "true" => Some(true),
            "false" => Some(false),
            other => {
                self.problem(
                    &format!("metadata.labels.{ENROLL}"),
                    format!("'{other}' is neither \"true\" nor \"false\""),
                    "write \"true\" or \"false\", with the quotes",
                );
                None
            }
        }
    }

    fn addresses(&mut self, field: &str, texts: &[String]) -> Vec<IpAddr> {
        self.limit(field, texts.len(), MAX_ADDRESSES);
        let mut addresses = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            let field = format!("{field}[{index}]");
            let Some(address) = self.address(&field, text) else { continue };
            if addresses.contains(&address) {
                self.problem(&field, format!("{address} stands here twice"), "remove one of them");
            }
            addresses.push(address);
        }
        addresses
    }

    fn address(&mut self, field: &str, text: &str) -> Option<IpAddr> {
        let Ok(address) = text.parse::<IpAddr>() else {
            let shown: String = text.chars().take(100).collect();
            let cure =
                "write an IPv4 or IPv6 address, such as 10.1.0.11 or fd01::11, without a prefix length";
            self.problem(field, format!("'{shown}' is not an address"), cure);
            return None;
        };
        let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        if mapped || address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            self.problem(
                field,
                format!("{address} is not an address that others can connect to"),
                "write the unicast address that it has on its node",
            );
            return None;
        }
        Some(address)
    }

    fn port(&mut self, field: &str, port: u16) {
        if port == 0 {
            self.problem(field, "0 is not a port", "write a number from 1 to 65535");
        }
    }

    fn limit(&mut self, field: &str, len: usize, max: usize) {
        if len > max {
            let cure = format!("split it: at most {max} are taken");
            self.problem(field, format!("{len} entries are too many"), cure);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::document::split;

    fn outcome(text: &str) -> Outcome {
        let documents = split(text);
        assert_eq!(documents.len(), 1);
        parse(&documents[0])
    }

    #[track_caller]
    fn accepted(text: &str) -> Object {
        match outcome(text) {
            Outcome::Accepted(object) => object,
            other => panic!("{other:?}"),
        }
    }

    /// Expected: `LINE FIELD: part of the reason; part of the cure`.
    #[track_caller]
    fn check_refused(text: &str, expected: &[(usize, &str, &str, &str)]) {
        let Outcome::Refused(_, problems) = outcome(text) else { panic!("was not refused: {text}") };
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for (problem, (line, field, reason, cure)) in problems.iter().zip(expected) {
            assert_eq!((problem.line, problem.field.as_str()), (*line, *field), "{problem:?}");
            assert!(problem.reason.contains(reason), "{problem:?}");
            assert!(problem.cure.contains(cure), "{problem:?}");
        }
    }

    const WORKLOAD: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: Workload
metadata:
  name: web-1
  namespace: shop
  labels:
    app: web
    nodemesh.io/enroll: \"true\"
spec:
  node: node-a
  addresses: [10.1.0.11, 'fd01::11']
  serviceAccount: web
";

    const POLICY: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: Allow
  rules:
  - from:
    - identities: [spiffe://td/ns/shop/sa/web]
      addressBlocks:
      - 10.0.0.0/8
    to:
    - ports: [8080]
    - ports: [9090]
";

    #[test]
    fn a_workload_is_read() {
        let Object::Workload(workload) = accepted(WORKLOAD) else { panic!() };
        assert_eq!(workload.name.to_string(), "shop/web-1");
        assert_eq!((workload.enroll, workload.ready, workload.node.as_str()), (Some(true), true, "node-a"));
        assert_eq!(workload.addresses.len(), 2);
    }

    #[test]
    fn a_policy_is_read_and_its_ports_are_one_set() {
        let Object::AuthorizationPolicy(policy) = accepted(POLICY) else { panic!() };
        assert_eq!(policy.action, Action::Allow);
        assert_eq!(policy.rules[0].ports, [8080, 9090]);
        assert_eq!(policy.rules[0].from[0].identities[0].to_string(), "spiffe://td/ns/shop/sa/web");
    }

    #[test]
    fn a_namespace_and_a_service_as_kubernetes_prints_them_are_read() {
        let Object::Namespace(namespace) = accepted(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  uid: 1f\n  creationTimestamp: \
             \"2026-01-01T00:00:00Z\"\n  labels: {nodemesh.io/enroll: \"true\", nodemesh.io/mode: strict}\n\
             spec: {finalizers: [kubernetes]}\nstatus: {phase: Active}\n",
        ) else {
            panic!()
        };
        assert_eq!((namespace.enroll, namespace.mode), (true, Mode::Strict));
        let Object::Service(service) = accepted(
            "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  type: ClusterIP\n  clusterIP: \
             10.96.0.1\n  clusterIPs: [10.96.0.1, 'fd96::1']\n  selector: {app: web}\n  ports:\n  - {name: \
             http, port: 80, targetPort: 8080, protocol: TCP}\n  - {name: dns, port: 53, protocol: UDP}\n",
        ) else {
            panic!()
        };
        assert_eq!(service.name.to_string(), "default/web");
        assert_eq!(service.addresses.len(), 2);
        assert_eq!(service.ports, [Port { name: "http".into(), port: 80, target: 8080 }]);
    }

    #[test]
    fn mistakes_are_named_with_line_field_reason_and_cure() {
        let with = |from: &str, to: &str| WORKLOAD.replace(from, to);
        check_refused(
            &with("addresses", "adresses"),
            &[(11, "spec.adresses", "no field 'adresses'", "did you mean 'addresses'")],
        );
        check_refused(
            &with("10.1.0.11", "10.1.0.0/24"),
            &[(11, "spec.addresses[0]", "not an address", "IPv4")],
        );
        check_refused(&with("node: node-a", "node: Node_A"), &[(10, "spec.node", "not a name", "a-z")]);
        check_refused(&with("  node: node-a\n", ""), &[(10, "spec.node", "missing", "node:")]);
        check_refused(
            &with("\"true\"", "\"yes\""),
            &[(8, "metadata.labels.nodemesh.io/enroll", "neither", "quotes")],
        );
        check_refused(
            &with("nodemesh.io/enroll", "nodemesh.io/enrol"),
            &[(8, "metadata.labels.nodemesh.io/enrol", "means nothing", "did you mean 'nodemesh.io/enroll'")],
        );
        check_refused(&with("kind: Workload", "kind: Worklod"), &[(2, "kind", "not known", "'Workload'")]);
        check_refused(
            &with("nodemesh.io/v1alpha1", "v1"),
            &[(1, "apiVersion", "not of 'v1'", "nodemesh.io/v1alpha1")],
        );
        check_refused("a: 1\n", &[(1, "kind", "does not say what it is", "Workload")]);
        let two = WORKLOAD.replace("10.1.0.11", "x").replace("serviceAccount: web", "serviceAccount: W");
        check_refused(
            &two,
            &[(12, "spec.serviceAccount", "not a name", ""), (11, "spec.addresses[0]", "not an address", "")],
        );
    }

    #[test]
    fn mistakes_deep_in_a_policy_are_found_at_their_line() {
        let with = |from: &str, to: &str| POLICY.replace(from, to);
        check_refused(
            &with("10.0.0.0/8", "10.0.0.0/8\n      - 10.300.0.0/8"),
            &[(12, "spec.rules[0].from[0].addressBlocks[1]", "not an address block", "10.1.0.0/16")],
        );
        check_refused(&with("Allow", "allow"), &[(6, "spec.action", "not an action", "'Allow'")]);
        check_refused(
            &with("spiffe://td/ns/shop/sa/web", "spiffe://td/node/a"),
            &[(9, "spec.rules[0].from[0].identities[0]", "not a workload", "sa/ACCOUNT")],
        );
        check_refused(&with("[8080]", "[0]"), &[(13, "spec.rules[0].to[0].ports[0]", "0 is not", "65535")]);
        let Outcome::Refused(_, problems) = outcome(&with("[8080]", "[http]")) else { panic!() };
        assert_eq!((problems[0].line, problems[0].field.as_str()), (13, "spec.rules[0].to[0].ports[0]"));
    }

    #[test]
    fn a_refused_document_still_says_which_object_it_is_about() {
        let Outcome::Refused(key, _) = outcome(&WORKLOAD.replace("10.1.0.11", "x")) else { panic!() };
        assert_eq!(key.unwrap().to_string(), "Workload shop/web-1");
    }

    #[test]
    fn a_label_without_quotes_that_is_not_a_text_is_refused_as_kubernetes_does() {
        let Outcome::Refused(_, problems) = outcome(&WORKLOAD.replace("\"true\"", "true")) else { panic!() };
        assert_eq!(problems[0].line, 8);
        assert_eq!(problems[0].field, "metadata.labels.nodemesh.io/enroll");
    }
}
