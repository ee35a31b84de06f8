//! One document into one checked object. The same manifests stand in a directory and in Kubernetes, so what
//! Kubernetes writes into its own kinds (`status`, `metadata.uid`, …) is taken and passed over; any other field that
//! is not known is a mistake, and said.
//!
//! | module | what |
//! |---|---|
//! | [`workload`] | namespaces and workloads |
//! | [`service`] | services |
//! | [`slice`] | who serves them |
//! | [`policy`] | authorization policies |
//! | [`asks`] | what they say of requests |
//! | [`authentication`] | policies on end users, and what policies say of claims |
//! | [`route`] | routes of requests and of connections, and who may send some to whom |
//! | [`traffic`] | how requests and connections are sent |
//! | [`intake`] | how much of them workloads take |
//! | [`check`] | what is checked the same way in all of them |
//!
//! What Kubernetes has to know of our own kinds is generated from them, by a test (`crd.rs`).

mod asks;
mod authentication;
mod check;
#[cfg(test)]
mod crd;
mod intake;
mod policy;
mod route;
mod service;
mod slice;
mod traffic;
mod workload;

use std::collections::BTreeMap;

use mesh_core::model::Name;
use serde::{Deserialize, de::IgnoredAny};

use self::check::{Check, MAX_NAME};
pub(in crate::source) use self::{route::GATEWAY_GROUP, slice::SERVICE_NAME};
use super::{
    Problem,
    document::{Document, Node, one_of},
};
use crate::model::{Kind, Object, ObjectKey};

/// Label of a namespace or a workload: whether traffic is meant to be captured.
pub const ENROLL: &str = "nodemesh.io/enroll";
/// Label of a namespace or a workload: whether plaintext is taken.
pub const MODE: &str = "nodemesh.io/mode";
/// Longest part of a problem that is kept, characters.
const MAX_QUOTED: usize = 500;

/// What a document turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing but comments, or what others read: a route for Gateways alone.
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
        Err(problem) => return Outcome::Refused(None, vec![clipped(problem)]),
    };
    let kind = match kind(&tree) {
        Ok(kind) => kind,
        Err(problem) => return Outcome::Refused(None, vec![clipped(problem)]),
    };
    let key = key(kind, &tree);
    let mut check = Check { tree: &tree, problems: vec![] };
    if kind.is_route() && check.api_version(kind).is_ok() && route::is_anothers(&tree) {
        return Outcome::Empty;
    }
    let object = check.api_version(kind).and_then(|()| match kind {
        Kind::Namespace => document.typed(&tree).map(|raw| check.namespace(raw)),
        Kind::Workload => document.typed(&tree).map(|raw| check.workload(raw)),
        Kind::Service => document.typed(&tree).map(|raw| check.service(raw)),
        Kind::EndpointSlice => document.typed(&tree).map(|raw| check.slice(raw)),
        Kind::AuthorizationPolicy => document.typed(&tree).map(|raw| check.policy(raw)),
        Kind::TrafficPolicy => document.typed(&tree).map(|raw| check.traffic_policy(raw)),
        Kind::AuthenticationPolicy => document.typed(&tree).map(|raw| check.authentication(raw)),
        Kind::HttpRoute => document.typed(&tree).map(|raw| check.http_route(raw)),
        Kind::GrpcRoute => document.typed(&tree).map(|raw| check.grpc_route(raw)),
        Kind::TlsRoute => document.typed(&tree).map(|raw| check.tls_route(raw)),
        Kind::TcpRoute => document.typed(&tree).map(|raw| check.tcp_route(raw)),
        Kind::ReferenceGrant => document.typed(&tree).map(|raw| check.grant(raw)),
    });
    match object {
        Ok(object) if check.problems.is_empty() => Outcome::Accepted(object),
        Ok(_) => Outcome::Refused(key, check.problems.into_iter().map(clipped).collect()),
        Err(problem) => Outcome::Refused(key, vec![clipped(problem)]),
    }
}

/// A problem quotes the document, of which a value may be megabytes: what is printed and kept is bounded. Its end says
/// what is wrong with what was quoted, and stays.
fn clipped(problem: Problem) -> Problem {
    let clip = |text: String| {
        let long = text.chars().count();
        if long <= MAX_QUOTED {
            return text;
        }
        let (head, tail) = (text.chars().take(MAX_QUOTED / 2), text.chars().skip(long - MAX_QUOTED / 2));
        head.chain(['…']).chain(tail).collect()
    };
    Problem { field: clip(problem.field), reason: clip(problem.reason), cure: clip(problem.cure), ..problem }
}

fn kind(tree: &Node) -> Result<Kind, Problem> {
    let names = Kind::ALL.map(Kind::as_str);
    let problem = |line, reason: String, cure| Problem { line, field: "kind".into(), reason, cure };
    match tree.text(&["kind"]) {
        None => Err(problem(
            tree.line_of("kind"),
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
    let short = |text: &&str| text.len() <= MAX_NAME;
    let name = tree.text(&["metadata", "name"]).filter(short)?;
    let namespace = match kind {
        Kind::Namespace => name,
        _ => Some(tree.text(&["metadata", "namespace"]).unwrap_or("default")).filter(short)?,
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
    creation_timestamp: Option<String>,
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

#[cfg(test)]
mod tests {
    use mesh_core::model::{Action, Enforcement, Mode};

    use super::*;
    use crate::{model::Port, source::document::split};

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
    fn a_policy_is_read() {
        let Object::AuthorizationPolicy(policy) = accepted(POLICY) else { panic!() };
        assert_eq!((policy.action, policy.enforcement), (Action::Allow, Enforcement::Enforce));
        assert_eq!(
            policy.rules[0].to_string(),
            "from identity spiffe://td/ns/shop/sa/web and address in 10.0.0.0/8 to port 8080, or port 9090"
        );
        assert_eq!(policy.selector.to_string(), "app=web");
    }

    #[test]
    fn a_policy_with_every_field_is_read() {
        let text = POLICY
            .replace("action: Allow", "action: Deny\n  enforcement: Audit")
            .replace("matchLabels: {app: web}", "matchExpressions: [{key: app, operator: NotIn, values: [web, db]}, {key: x, operator: Exists}]")
            .replace(
                "      addressBlocks:",
                "      notIdentities: ['spiffe://td/ns/shop/*']\n      namespaces: [shop]\n      \
                 notNamespaces: [a, b]\n      trustDomains: [td]\n      notTrustDomains: [old]\n      \
                 notAddressBlocks: [10.9.0.0/16]\n      addressBlocks:",
            )
            .replace(
                "[8080]",
                "[8080, 9000-9100, '70']\n      notPorts: [9050]\n      methods: [GET, M-SEARCH]\n      \
                 notMethods: [PUT]\n      hosts: ['*.Shop.example']\n      notHosts: ['a:80']\n      paths: \
                 [/cart/*, '*.pdf']\n      notPaths: [/cart/x]\n      headers: [{name: X-Tenant, values: [a, \
                 'b*']}, {name: x-there}]\n      notHeaders: [{name: x-gone}]",
            );
        let Object::AuthorizationPolicy(policy) = accepted(&text) else { panic!() };
        assert_eq!((policy.action, policy.enforcement), (Action::Deny, Enforcement::Audit));
        assert_eq!(policy.selector.to_string(), "app not in (web, db), x is set");
        assert_eq!(
            policy.rules[0].to_string(),
            "from identity spiffe://td/ns/shop/sa/web and namespace shop and trust domain td and address in 10.0.0.0/8 and \
             not identity spiffe://td/ns/shop/* and not namespace a or b and not trust domain old and not address in \
             10.9.0.0/16 to port 8080 or 9000-9100 or 70 and method GET or M-SEARCH and host *.shop.example and path \
             /cart/* or *.pdf and header x-tenant: a or b* and header x-there and not port 9050 and not method PUT and \
             not host a:80 and not path /cart/x and not header x-gone, or port 9090"
        );
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
        assert_eq!((namespace.enroll, namespace.mode), (true, Some(Mode::Strict)));
        let Object::Service(service) = accepted(
            "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  type: ClusterIP\n  clusterIP: \
             10.96.0.1\n  clusterIPs: [10.96.0.1, 'fd96::1']\n  selector: {app: web}\n  ports:\n  - {name: \
             http, port: 80, targetPort: 8080, protocol: TCP}\n  - {name: dns, port: 53, protocol: UDP}\n",
        ) else {
            panic!()
        };
        assert_eq!(service.name.to_string(), "default/web");
        assert_eq!(service.addresses.len(), 2);
        assert_eq!(service.ports, [Port { name: "http".into(), port: 80, target: Some(8080) }]);
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
        check_refused(&with("Allow", "Audit"), &[(6, "spec.action", "not an action", "enforcement: Audit")]);
        check_refused(
            &with("Allow", "Allow\n  enforcement: audit"),
            &[(7, "spec.enforcement", "neither", "'Audit'")],
        );
        let identity = |text| with("spiffe://td/ns/shop/sa/web", text);
        let at = "spec.rules[0].from[0].identities[0]";
        check_refused(&identity("spiffe://td/node/a"), &[(9, at, "not a workload", "sa/ACCOUNT")]);
        check_refused(&identity("'spiffe://td/ns/shop*'"), &[(9, at, "a '*' may only", "NAMESPACE/*")]);
        check_refused(&identity("web"), &[(9, at, "must start with spiffe://", "sa/ACCOUNT")]);
        let in_source =
            |field: &str| with("      addressBlocks:", &format!("      {field}\n      addressBlocks:"));
        for (field, place, reason, cure) in [
            ("notIdentities: [x]", "notIdentities[0]", "spiffe://", "TRUST-DOMAIN"),
            ("namespaces: [Shop]", "namespaces[0]", "not a name", "a-z"),
            ("notNamespaces: [Shop]", "notNamespaces[0]", "not a name", "a-z"),
            ("trustDomains: ['spiffe://td']", "trustDomains[0]", "not a trust domain", "without spiffe://"),
            ("notTrustDomains: [a/b]", "notTrustDomains[0]", "not a trust domain", "without a path"),
            ("notAddressBlocks: [10.0.0.1]", "notAddressBlocks[0]", "not an address block", "10.1.0.0/16"),
            (
                "notAddressBlocks: ['::ffff:10.0.0.0/104']",
                "notAddressBlocks[0]",
                "written as IPv6",
                "10.1.0.0/16",
            ),
            ("namespaces: []", "namespaces", "is empty", "remove the field"),
            ("notIdentities: []", "notIdentities", "is empty", "remove the field"),
        ] {
            check_refused(
                &in_source(field),
                &[(10, &format!("spec.rules[0].from[0].{place}"), reason, cure)],
            );
        }
        let Outcome::Refused(_, problems) = outcome(&in_source("notidentities: [x]")) else { panic!() };
        assert!(problems[0].cure.contains("'notIdentities'"), "{problems:?}");
        for (ports, reason) in [
            ("[0]", "0 is not a port"),
            ("[65536]", "65536 is not a port"),
            ("[-1]", "neither a port nor a range"),
            ("[http]", "neither a port nor a range"),
            ("[9100-9000]", "ends before it begins"),
            ("[true]", "does not belong"),
        ] {
            let Outcome::Refused(_, problems) = outcome(&with("[8080]", ports)) else { panic!("{ports}") };
            let problem = &problems[0];
            assert_eq!(
                (problem.line, problem.field.as_str()),
                (13, "spec.rules[0].to[0].ports[0]"),
                "{problem:?}"
            );
            assert!(problem.reason.contains(reason), "{problem:?}");
        }
        check_refused(
            &with("ports: [8080]", "ports: []"),
            &[(13, "spec.rules[0].to[0].ports", "is empty", "remove")],
        );
        check_refused(
            &with("ports: [8080]", "notPorts: [x]"),
            &[(13, "spec.rules[0].to[0].notPorts[0]", "neither a port", "9000-9100")],
        );
        let of_request = |text: &str| with("ports: [8080]", text);
        for (text, field, reason, cure) in [
            ("methods: [get]", "methods[0]", "'get' is not a method", "upper case"),
            ("notMethods: ['G T']", "notMethods[0]", "not a method", "GET"),
            ("hosts: ['http://shop']", "hosts[0]", "not a host", "shop.example"),
            ("hosts: ['a*b']", "hosts[0]", "one '*' may stand", "*.shop"),
            ("notHosts: ['']", "notHosts[0]", "it is empty", "*.shop"),
            ("paths: [cart]", "paths[0]", "does not begin with a slash", "/cart"),
            ("paths: ['/a%20b']", "paths[0]", "has a character", "percent-encoded"),
            ("paths: ['/a?b']", "paths[0]", "has a character", "query"),
            ("notPaths: [/a/../b]", "notPaths[0]", "dots or slashes", "/cart"),
            ("paths: ['*/a/*']", "paths[0]", "one '*' may stand", "/cart/*"),
            ("headers: [{name: 'x y'}]", "headers[0].name", "not a header's name", "x-tenant"),
            ("headers: [{name: Host, values: [a]}]", "headers[0].name", "not compared", "hosts"),
            (
                "notHeaders: [{name: x, values: ['a*b']}]",
                "notHeaders[0].values[0]",
                "one '*' may stand",
                "b*",
            ),
            ("headers: [{name: x, values: []}]", "headers[0].values", "is empty", "remove"),
            ("paths: []", "paths", "is empty", "remove"),
        ] {
            check_refused(&of_request(text), &[(13, &format!("spec.rules[0].to[0].{field}"), reason, cure)]);
        }
        let selector = |text: &str| with("matchLabels: {app: web}", &format!("matchExpressions: [{text}]"));
        let at = "spec.selector.matchExpressions[0]";
        check_refused(
            &selector("{key: app, operator: in, values: [a]}"),
            &[(5, &format!("{at}.operator"), "not an operator", "'In'")],
        );
        check_refused(
            &selector("{key: app, operator: In}"),
            &[(5, &format!("{at}.values"), "needs values", "at least one")],
        );
        check_refused(
            &selector("{key: app, operator: Exists, values: [a]}"),
            &[(5, &format!("{at}.values"), "looks at no value", "remove")],
        );
    }

    #[test]
    fn a_policy_has_no_more_entries_than_it_may() {
        let many = |count: usize| vec!["'spiffe://td/*'"; count].join(", ");
        let list = POLICY.replace("[spiffe://td/ns/shop/sa/web]", &format!("[{}]", many(1025)));
        check_refused(&list, &[(9, "spec.rules[0].from[0].identities", "1025 entries are too many", "1024")]);
        let rule = format!("  - from: [{{identities: [{}]}}]\n", many(1024));
        let all = format!("{POLICY}{}", rule.repeat(16));
        check_refused(&all, &[(8, "spec.rules", "too many", "16384")]);
    }

    #[test]
    fn a_workload_has_its_own_mode() {
        let labelled = |mode: &str| WORKLOAD.replace("app: web", &format!("nodemesh.io/mode: {mode}"));
        let Object::Workload(workload) = accepted(&labelled("strict")) else { panic!() };
        assert_eq!(workload.mode, Some(Mode::Strict));
        let at = "metadata.labels.nodemesh.io/mode";
        check_refused(&labelled("strikt"), &[(7, at, "not a mode", "'strict'")]);
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
