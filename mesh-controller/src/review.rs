//! What is legal and suspicious: documents that are taken, and that most likely do not do what their author meant.
//!
//! Stands apart from the sources, which refuse only what has no meaning: nothing here changes what is in force. Pure.
//! Which workloads a policy selects is asked of `mesh-core`, so it cannot differ from what agents decide.

mod asks;
mod route;
mod shadow;
mod traffic;
mod users;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use mesh_core::{
    identity::{Subject, TrustDomain},
    model::{Action, Enforcement, IdentityPattern, Mode, Policy, PortRange, Target, Workload},
    view::Mesh,
};
use serde::{Deserialize, Serialize};

use crate::{
    health::Heard,
    model::{self, Kind, Model, ObjectKey},
    project::Common,
    source::{document::one_of, ledger::Ledger},
};

/// Names that a cure lists at most.
const MAX_NAMES: usize = 8;

/// A document that is in force and looks wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Warning {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1: the document's, as the ledger has no other; [`crate::source::files::lines`] has the field's.
    pub line: usize,
    /// The object.
    pub object: String,
    /// Path of the field; empty for the document as a whole.
    pub field: String,
    /// What is suspicious.
    pub reason: String,
    /// What to write if it is not meant.
    pub cure: String,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}: ", self.file.display(), self.line, self.object)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{}; {}", self.reason, self.cure)
    }
}

/// Looks through everything that is in force; by file, line and field. `default_mode` is the controller's.
pub fn review(ledger: &Ledger, default_mode: Mode) -> Vec<Warning> {
    let model = ledger.model();
    // Whose roots sign is no matter here.
    let trust_domain = TrustDomain::parse("cluster.local").expect("a name");
    let mesh = Arc::new(Mesh { trust_domain, roots: vec![] });
    let common = Common::new(&model, mesh, &Heard::default(), default_mode);
    let workloads = by_namespace(&common);
    let mut review = Review { ledger, workloads, common: &common, model: &model, found: vec![] };
    for policy in model.policies.values() {
        review.policy(policy);
    }
    for policy in model.authentications.values() {
        review.users(policy);
    }
    for service in model.services.values() {
        review.service(service);
    }
    let traffic = crate::traffic::resolve(&model);
    let routes = crate::routes::resolve(&model, &traffic);
    review.routes(&routes);
    review.traffic(&traffic, &routes);
    review.namespaces();
    review.addresses();
    review.found.sort();
    review.found
}

/// The workloads as agents see them.
fn by_namespace(common: &Common) -> BTreeMap<String, Vec<Arc<Workload>>> {
    let mut workloads: BTreeMap<String, Vec<Arc<Workload>>> = BTreeMap::new();
    for workload in common.workloads() {
        workloads.entry(workload.name.namespace.clone()).or_default().push(workload.clone());
    }
    workloads
}

struct Review<'a> {
    ledger: &'a Ledger,
    model: &'a Model,
    common: &'a Common,
    workloads: BTreeMap<String, Vec<Arc<Workload>>>,
    found: Vec<Warning>,
}

impl Review<'_> {
    fn warn(&mut self, key: &ObjectKey, field: &str, reason: impl Into<String>, cure: impl Into<String>) {
        let Some(entry) = self.ledger.in_force(key) else { return };
        self.found.push(Warning {
            file: entry.file.clone(),
            line: entry.line,
            object: key.to_string(),
            field: field.to_owned(),
            reason: reason.into(),
            cure: cure.into(),
        });
    }

    fn workloads_of(&self, namespace: &str) -> &[Arc<Workload>] {
        self.workloads.get(namespace).map_or(&[], Vec::as_slice)
    }

    fn policy(&mut self, policy: &Policy) {
        let key = ObjectKey { kind: Kind::AuthorizationPolicy, name: policy.name.clone() };
        let all = self.workloads_of(&policy.name.namespace);
        let selected: Vec<Arc<Workload>> = all.iter().filter(|it| policy.selects(it)).cloned().collect();
        if selected.is_empty() {
            let cure = selector_cure(&policy.selector.labels, all);
            self.warn(&key, "spec.selector", "it selects no workload of its namespace", cure);
        } else if !selected.iter().any(|workload| workload.enrolled) {
            self.warn(
                &key,
                "spec.selector",
                "no workload that it selects is enrolled, so nobody enforces it",
                "put nodemesh.io/enroll: \"true\" on the namespace or the workloads",
            );
        }
        if policy.action == Action::Deny && policy.rules.is_empty() {
            let cure = "give it a rule; 'rules: [{}]' matches every connection";
            self.warn(&key, "spec.rules", "a Deny without rules matches nothing, so it does nothing", cure);
        }
        self.denies_of_nobody(&key, policy, &selected);
        self.shadowed_rules(&key, policy);
        self.unknown_sources(&key, policy);
        self.ports_of_rules(&key, policy, &selected);
        self.requests_of_every_port(&key, policy);
        self.claims_of_nobody(&key, policy, &selected);
    }

    /// Deny rules by identity, of workloads that take plaintext, which has none.
    fn denies_of_nobody(&mut self, key: &ObjectKey, policy: &Policy, selected: &[Arc<Workload>]) {
        let permissive = |it: &&Arc<Workload>| it.enrolled && it.mode == Mode::Permissive;
        let names: Vec<String> = selected.iter().filter(permissive).map(|it| it.name.to_string()).collect();
        if policy.action != Action::Deny || names.is_empty() {
            return;
        }
        let by_identity = |source: &mesh_core::model::Source| {
            let traits = &source.any_of;
            !(traits.identities.is_empty() && traits.namespaces.is_empty() && traits.trust_domains.is_empty())
        };
        for (rule, place) in policy.rules.iter().zip(0..) {
            if rule.from.is_empty() || !rule.from.iter().all(by_identity) {
                continue;
            }
            self.warn(
                key,
                &format!("spec.rules[{place}].from"),
                format!(
                    "it does not stop plaintext, which has no identity and which is taken by {}",
                    names[..names.len().min(MAX_NAMES)].join(", ")
                ),
                "make them strict (label nodemesh.io/mode: strict), or deny notIdentities: \
                 [\"spiffe://TRUST-DOMAIN/*\"] too",
            );
        }
    }

    fn shadowed_rules(&mut self, key: &ObjectKey, policy: &Policy) {
        for (place, by) in shadow::within(policy) {
            self.warn(
                key,
                &format!("spec.rules[{place}]"),
                format!("it never decides: spec.rules[{by}] matches all that it matches"),
                format!("remove it, or narrow spec.rules[{by}]"),
            );
        }
        let denies = self.model.policies.values().filter(|it| it.name.namespace == policy.name.namespace);
        let denied: Vec<_> = denies.flat_map(|deny| shadow::denied(policy, deny)).collect();
        for (place, deny) in denied {
            self.warn(
                key,
                &format!("spec.rules[{place}]"),
                format!("it never allows: the deny rule {deny} matches all that it matches, and deny wins"),
                format!("remove it, or narrow {deny}"),
            );
        }
    }

    /// Identities and namespaces that nobody has.
    fn unknown_sources(&mut self, key: &ObjectKey, policy: &Policy) {
        let mut unknown = vec![];
        for (rule, place) in policy.rules.iter().zip(0..) {
            for (source, from) in rule.from.iter().zip(0..) {
                let at = format!("spec.rules[{place}].from[{from}]");
                for (traits, identities, namespaces) in [
                    (&source.any_of, "identities", "namespaces"),
                    (&source.none_of, "notIdentities", "notNamespaces"),
                ] {
                    for (pattern, index) in traits.identities.iter().zip(0..) {
                        if let Some((reason, cure)) = self.unknown_identity(pattern) {
                            unknown.push((format!("{at}.{identities}[{index}]"), reason, cure));
                        }
                    }
                    for (namespace, index) in traits.namespaces.iter().zip(0..) {
                        if let Some((reason, cure)) = self.unknown_namespace(namespace) {
                            unknown.push((format!("{at}.{namespaces}[{index}]"), reason, cure));
                        }
                    }
                }
            }
        }
        for (field, reason, cure) in unknown {
            self.warn(key, &field, reason, cure);
        }
    }

    fn unknown_identity(&self, pattern: &IdentityPattern) -> Option<(String, String)> {
        match pattern {
            IdentityPattern::Exact(id) => {
                let Subject::Workload { namespace, service_account } = id.subject() else { return None };
                let known = self.workloads_of(namespace);
                let accounts = || known.iter().map(|it| it.service_account.as_str());
                let cure = || near(service_account, accounts(), "add the workload, or remove it");
                let found = accounts().any(|it| it == *service_account);
                (!found).then(|| (format!("no workload has the identity {id}"), cure()))
            }
            IdentityPattern::Namespace(_, namespace) => self.unknown_namespace(namespace),
            // Of another trust domain nothing is known here.
            IdentityPattern::TrustDomain(_) => None,
        }
    }

    fn unknown_namespace(&self, namespace: &str) -> Option<(String, String)> {
        let names = || self.workloads.keys().map(String::as_str);
        let cure = || near(namespace, names(), "add its workloads, or remove it");
        let found = self.workloads.contains_key(namespace);
        (!found).then(|| (format!("no workload is in the namespace '{namespace}'"), cure()))
    }

    /// Ports at which no service of the selected workloads has them serve. Workloads that no service selects may
    /// serve at any port: nothing is known of them.
    fn ports_of_rules(&mut self, key: &ObjectKey, policy: &Policy, selected: &[Arc<Workload>]) {
        let serves = |service: &&model::Service| {
            service.name.namespace == policy.name.namespace
                && selected.iter().any(|workload| service.selects(&workload.labels))
        };
        let services: Vec<&model::Service> = self.model.services.values().filter(serves).collect();
        let in_a_service = |workload: &Arc<Workload>| services.iter().any(|it| it.selects(&workload.labels));
        if services.is_empty() || !selected.iter().all(in_a_service) {
            return;
        }
        let ports = services.iter().flat_map(|service| &service.ports);
        // A port that the workloads have a name for may be any.
        let Some(ports) =
            ports.map(|port| Some((port.port, port.target?))).collect::<Option<Vec<(u16, u16)>>>()
        else {
            return;
        };
        let mut found = vec![];
        for (rule, place) in policy.rules.iter().zip(0..) {
            let never = |asked: &&PortRange| !ports.iter().any(|(_, target)| asked.contains(*target));
            for asked in rule.to.iter().flat_map(|target| &target.ports).filter(never) {
                let cure = match ports.iter().find(|(port, _)| asked.contains(*port)) {
                    Some((_, target)) => {
                        format!("a rule names the workload's port: write the Service's targetPort {target}")
                    }
                    None => "write a targetPort of the workloads' Services, or add a Service".to_owned(),
                };
                found.push((place, format!("port {asked} is never served: no Service leads to it"), cure));
            }
        }
        for (place, reason, cure) in found {
            self.warn(key, &format!("spec.rules[{place}].to"), reason, cure);
        }
    }

    fn service(&mut self, service: &model::Service) {
        let key = ObjectKey { kind: Kind::Service, name: service.name.clone() };
        let all = self.workloads_of(&service.name.namespace);
        let selected: Vec<Arc<Workload>> =
            all.iter().filter(|workload| service.selects(&workload.labels)).cloned().collect();
        let ready =
            |workload: &&Arc<Workload>| self.model.workloads.get(&workload.name).is_some_and(|it| it.ready);
        let of_service = |it: &&Arc<model::EndpointSlice>| {
            (&it.name.namespace, &it.service) == (&key.name.namespace, &key.name.name)
        };
        if self.model.slices.values().any(|it| of_service(&it)) {
            // They say who serves it, whatever its selector does.
        } else if service.selector.is_empty() {
            let cure = "give it the labels of its workloads, or write an EndpointSlice";
            self.warn(&key, "spec", "without a selector it has no endpoints", cure);
        } else if selected.is_empty() {
            let cure = selector_cure(&service.selector, all);
            self.warn(&key, "spec.selector", "it has no endpoints: it selects no workload", cure);
        } else if !selected.iter().any(|workload| ready(&workload)) {
            let reason = format!("it has no endpoints: none of its {} workloads is ready", selected.len());
            self.warn(&key, "spec.selector", reason, "remove 'ready: false' from those that serve");
        }
        if service.ports.is_empty() {
            let reason = "it has no TCP port, so nothing can be connected to through it";
            self.warn(&key, "spec.ports", reason, "add the port that clients ask for");
        }
        self.ports_of_service(&key, service, &selected);
    }

    /// Ports at which the allow policies of every endpoint let nobody in.
    fn ports_of_service(&mut self, key: &ObjectKey, service: &model::Service, selected: &[Arc<Workload>]) {
        let closed = |workload: &Workload, port: u16| {
            let of_workload = |it: &&Arc<Policy>| {
                let allows = it.action == Action::Allow && it.enforcement == Enforcement::Enforce;
                allows && it.selects(workload)
            };
            let mut allows = self.model.policies.values().filter(of_workload).peekable();
            allows.peek().is_some()
                && allows.all(|it| {
                    let none = |to: &[Target]| !to.is_empty() && !to.iter().any(|to| to.has_port(port));
                    it.rules.iter().all(|rule| none(&rule.to))
                })
        };
        let never = |(_, target): &(u16, u16)| {
            !selected.is_empty() && selected.iter().all(|workload| closed(workload, *target))
        };
        let numbers = service.ports.iter().filter_map(|port| Some((port.port, port.target?)));
        for (port, target) in numbers.filter(never).collect::<Vec<_>>() {
            self.warn(
                key,
                "spec.ports",
                format!("port {port} is never served: no allow policy of its workloads names {target}"),
                format!("add a rule for port {target} to the workloads' AuthorizationPolicy"),
            );
        }
    }

    /// Workloads that their namespaces say nothing of, or something else than they do.
    fn namespaces(&mut self) {
        let mut found = vec![];
        for (namespace, workloads) in &self.workloads {
            let key = |it: &Workload| ObjectKey { kind: Kind::Workload, name: it.name.clone() };
            let [first, others @ ..] = workloads.as_slice() else { continue };
            if !self.model.namespaces.contains_key(namespace) {
                let more = if others.is_empty() {
                    String::new()
                } else {
                    format!(" and of {} others", others.len())
                };
                let names = self.model.namespaces.keys().map(String::as_str);
                let cure = near(namespace, names, "add a Namespace, which says whether they are enrolled");
                let reason = format!("no Namespace document for '{namespace}', the namespace of it{more}");
                found.push((key(first), "metadata.namespace", reason, cure));
            }
            for workload in workloads.iter().filter(|it| it.mode == Mode::Strict && !it.enrolled) {
                let of_namespace = self.model.namespaces.get(namespace).and_then(|it| it.mode);
                let reason = if of_namespace == Some(Mode::Strict) {
                    format!("it is not enrolled, in the strict namespace '{namespace}': nobody protects it")
                } else {
                    "it is strict and not enrolled: nobody protects it".to_owned()
                };
                let cure =
                    format!("put {}: \"true\" on it or on its namespace", crate::source::manifest::ENROLL);
                found.push((key(workload), "metadata", reason, cure));
            }
        }
        for (key, field, reason, cure) in found {
            self.warn(&key, field, reason, cure);
        }
    }

    /// An address belongs to one object, or to none.
    fn addresses(&mut self) {
        let mut claims: BTreeMap<IpAddr, Vec<ObjectKey>> = BTreeMap::new();
        let workloads = self.model.workloads.values().map(|it| (Kind::Workload, &it.name, &it.addresses));
        let services = self.model.services.values().map(|it| (Kind::Service, &it.name, &it.addresses));
        for (kind, name, addresses) in workloads.chain(services) {
            for address in addresses.iter().collect::<BTreeSet<_>>() {
                claims.entry(*address).or_default().push(ObjectKey { kind, name: name.clone() });
            }
        }
        for (address, keys) in claims {
            let [first, others @ ..] = keys.as_slice() else { continue };
            for other in others {
                let field = if other.kind == Kind::Workload { "spec.addresses" } else { "spec.clusterIP" };
                let reason = format!("{first} has the address {address} too: it leads to neither of them");
                self.warn(other, field, reason, "give one of them another address");
            }
        }
    }
}

/// Why these labels select nothing, as far as it can be told.
fn selector_cure(selector: &BTreeMap<String, String>, workloads: &[Arc<Workload>]) -> String {
    if workloads.is_empty() {
        return "the namespace has no workload: check metadata.namespace".to_owned();
    }
    for (key, value) in selector {
        let values: Vec<&str> =
            workloads.iter().filter_map(|workload| workload.labels.get(key)).map(String::as_str).collect();
        if values.is_empty() {
            let keys = workloads.iter().flat_map(|workload| workload.labels.keys()).map(String::as_str);
            let cure = near(key, keys, "label the workloads");
            return format!("no workload has a label '{key}': {cure}");
        }
        if !values.contains(&value.as_str()) {
            return format!(
                "no workload has {key}={value}: {}",
                near(value, values.into_iter(), "label them so")
            );
        }
    }
    "no workload has all of these at once".to_owned()
}

/// The name that was meant, or some that there are, or else something to do.
fn near<'n>(wrong: &str, names: impl Iterator<Item = &'n str>, otherwise: &str) -> String {
    let names: Vec<&str> = names.collect::<BTreeSet<_>>().into_iter().collect();
    let cure = one_of(wrong, &names);
    if cure.starts_with("did you mean") {
        cure
    } else if names.is_empty() || names.len() > MAX_NAMES {
        otherwise.to_owned()
    } else {
        format!("there are: {}; {otherwise}", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::ledger::FileContent;

    const NAMESPACE: &str = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: \
                             {nodemesh.io/enroll: 'true', nodemesh.io/mode: strict}}\n";

    fn workload(name: &str, address: &str) -> String {
        format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop, \
             labels: {{app: {name}}}}}\nspec: {{node: n, addresses: [{address}], serviceAccount: {name}}}\n"
        )
    }

    fn policy(name: &str, spec: &str) -> String {
        format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: \
             shop}}\nspec: {{{spec}}}\n"
        )
    }

    fn service(name: &str, spec: &str) -> String {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"
        )
    }

    fn warnings(documents: &[String]) -> Vec<Warning> {
        let text = documents.concat();
        let files = [(PathBuf::from("a.yaml"), Arc::new(FileContent::parse(&text)))].into();
        let ledger = Ledger::default().next(&files);
        assert!(ledger.refused().is_empty(), "{:?}", ledger.refused());
        review(&ledger, Mode::default())
    }

    /// The shop's two workloads and more documents; expected: object, field, part of the reason, part of the cure.
    #[track_caller]
    fn check(documents: &[String], expected: &[(&str, &str, &str, &str)]) {
        let shop = [NAMESPACE.to_owned(), workload("web", "10.0.0.1"), workload("db", "10.0.0.2")];
        let found = warnings(&[&shop, documents].concat());
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (warning, (object, field, reason, cure)) in found.iter().zip(expected) {
            assert_eq!((warning.object.as_str(), warning.field.as_str()), (*object, *field), "{warning:?}");
            assert!(warning.reason.contains(reason), "{warning:?}");
            assert!(warning.cure.contains(cure), "{warning:?}");
        }
    }

    const P: &str = "AuthorizationPolicy shop/p";

    #[test]
    fn policies_on_end_users_that_let_nobody_in_or_verify_nothing_are_named() {
        let users = |name: &str, ports: &str, issuer: &str| {
            let keys = "jwks: {url: 'https://id.example'}";
            policy(name, &format!("{ports}issuers: [{{issuer: {issuer}, audiences: [a], {keys}}}]"))
                .replace("AuthorizationPolicy", "AuthenticationPolicy")
        };
        const U: &str = "AuthenticationPolicy shop/u";
        check(&[users("u", "ports: [80], ", "a")], &[]);
        check(&[users("u", "", "a")], &[(U, "spec", "names no port", "ports: [8080]")]);
        let two = |ports: &str, issuer: &str| {
            [users("u", "ports: [80-90], ", "a"), users("v", &format!("ports: [{ports}], "), issuer)]
        };
        check(&two("85", "b"), &[(U, "spec.issuers", "no token is of an issuer", "in one policy")]);
        check(&two("85", "a"), &[]);
        check(&two("91", "b"), &[]);
        let elsewhere = "ports: [80], selector: {matchLabels: {app: wev}}, ";
        check(&[users("u", elsewhere, "a")], &[(U, "spec.selector", "selects no workload", "app")]);
        let claims = policy("p", "action: Deny, rules: [{to: [{ports: [80], claims: [{name: a}]}]}]");
        check(
            std::slice::from_ref(&claims),
            &[(P, "spec.rules[0].to[0]", "no AuthenticationPolicy verifies", "write one")],
        );
        check(&[claims, users("u", "ports: [80], ", "a")], &[]);
    }

    #[test]
    fn a_policy_on_requests_to_a_port_whose_connections_are_routed_is_told_so_at_its_target() {
        let db = service(
            "db",
            "clusterIP: 10.96.0.1, selector: {app: db}, ports: [{name: a, port: 80}, {name: b, port: 81}]",
        );
        let route = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: TCPRoute\nmetadata: {name: t, namespace: shop}\nspec: \
                     {parentRefs: [{group: '', kind: Service, name: db, port: 81}], rules: [{backendRefs: [{name: db, port: 81}]}]}\n";
        let policy = |targets: &str| {
            policy("p", &format!("targetRefs: [{targets}], retries: {{}}"))
                .replace("AuthorizationPolicy", "TrafficPolicy")
        };
        let with = |targets: &str| [db.clone(), route.to_owned(), policy(targets)];
        const T: &str = "TrafficPolicy shop/p";
        let of = |port: &str| format!("{{kind: Service, name: db{port}}}");
        let says = "Service shop/db, port 81: retries is not in force, as TCPRoute shop/t";
        check(&with(&of("")), &[(T, "spec.targetRefs[0]", says, "by an HTTPRoute")]);
        let both = format!("{}, {}", of(", sectionName: a"), of(", sectionName: b"));
        check(&with(&both), &[(T, "spec.targetRefs[1]", says, "name the other ports by sectionName")]);
        check(&with(&of(", sectionName: a")), &[]);
        check(&with("{kind: Namespace, name: shop}"), &[]);
    }

    #[test]
    fn a_policy_that_selects_nothing_says_which_label_is_mistyped() {
        check(
            &[policy("p", "action: Allow, selector: {matchLabels: {ap: web}}")],
            &[(P, "spec.selector", "selects no workload", "did you mean 'app'?")],
        );
        check(
            &[policy("p", "action: Allow, selector: {matchLabels: {app: wev}}")],
            &[(P, "spec.selector", "selects no workload", "did you mean 'web'?")],
        );
        check(
            &[policy("p", "action: Allow").replace("namespace: shop", "namespace: elsewhere")],
            &[(
                "AuthorizationPolicy elsewhere/p",
                "spec.selector",
                "selects no workload",
                "metadata.namespace",
            )],
        );
        check(&[policy("p", "action: Allow")], &[]);
    }

    #[test]
    fn a_deny_by_identity_is_told_not_to_stop_plaintext_by_the_mode_in_force() {
        let namespace = NAMESPACE.replace(", nodemesh.io/mode: strict", "");
        let deny = |from: &str| policy("p", &format!("action: Deny, rules: [{{from: [{from}]}}]"));
        let told = |from: &str, namespace: &str, mode| {
            let documents = [namespace.to_owned(), workload("db", "10.0.0.2"), deny(from)].concat();
            let files = [(PathBuf::from("a.yaml"), Arc::new(FileContent::parse(&documents)))].into();
            let ledger = Ledger::default().next(&files);
            assert!(ledger.refused().is_empty(), "{:?}", ledger.refused());
            let warnings = review(&ledger, mode);
            warnings.iter().filter(|it| it.reason.contains("does not stop plaintext")).count()
        };
        let by_identity = "{namespaces: [shop]}";
        assert_eq!(told(by_identity, &namespace, Mode::Permissive), 1);
        assert_eq!(told(by_identity, &namespace, Mode::Strict), 0);
        assert_eq!(told(by_identity, NAMESPACE, Mode::Permissive), 0, "what manifests say wins");
        for stops in ["{addressBlocks: [10.0.0.0/8]}", "{notNamespaces: [shop]}"] {
            assert_eq!(told(stops, &namespace, Mode::Permissive), 0, "{stops}");
        }
    }

    #[test]
    fn a_service_without_endpoints_or_ports_is_told() {
        let s = "Service shop/s";
        check(
            &[service("s", "selector: {app: dc}, ports: [{port: 80}]")],
            &[(s, "spec.selector", "no endpoints", "did you mean 'db'?")],
        );
        check(&[service("s", "ports: [{port: 80}]")], &[(s, "spec", "without a selector", "labels")]);
        check(
            &[service("s", "selector: {app: db}, ports: [{port: 53, protocol: UDP}]")],
            &[(s, "spec.ports", "no TCP port", "add the port")],
        );
        let down = workload("down", "10.0.0.3").replace("node: n", "node: n, ready: false");
        check(
            &[down, service("s", "selector: {app: down}, ports: [{port: 80}]")],
            &[(s, "spec.selector", "none of its 1 workloads is ready", "ready: false")],
        );
    }

    #[test]
    fn a_port_that_is_never_served_is_told_at_either_end() {
        let web = service("web", "selector: {app: web}, ports: [{port: 80, targetPort: 8080}]");
        let allow = |port: &str| {
            policy(
                "p",
                &format!(
                    "action: Allow, selector: {{matchLabels: {{app: web}}}}, rules: [{{to: [{{ports: [{port}]}}]}}]"
                ),
            )
        };
        check(
            &[web.clone(), allow("80")],
            &[
                ("Service shop/web", "spec.ports", "port 80 is never served", "port 8080"),
                (P, "spec.rules[0].to", "port 80 is never served", "targetPort 8080"),
            ],
        );
        check(&[web, allow("8080")], &[]);
        check(&[allow("80")], &[]);
    }

    #[test]
    fn rules_that_never_decide_are_told() {
        check(
            &[policy("p", "action: Allow, rules: [{}, {to: [{ports: [80]}]}]")],
            &[(P, "spec.rules[1]", "spec.rules[0] matches all", "narrow")],
        );
        let deny = policy("no", "action: Deny, rules: [{from: [{namespaces: [shop]}]}]");
        let allow =
            policy("p", "action: Allow, rules: [{from: [{identities: [spiffe://td/ns/shop/sa/web]}]}]");
        check(
            &[deny, allow],
            &[(P, "spec.rules[0]", "never allows: the deny rule shop/no[0]", "narrow shop/no[0]")],
        );
        check(&[policy("p", "action: Deny")], &[(P, "spec.rules", "does nothing", "rules: [{}]")]);
    }

    #[test]
    fn a_rule_on_requests_of_every_port_is_told() {
        let rule = |to: &str| policy("p", &format!("action: Deny, rules: [{{to: [{to}]}}]"));
        let expected = [(P, "spec.rules[0].to[0]", "no HTTP is refused at every port", "ports: [8080]")];
        check(&[rule("{paths: [/admin]}")], &expected);
        check(&[rule("{notPorts: [1], notMethods: [GET]}")], &expected);
        check(&[rule("{ports: [8080], paths: [/admin]}")], &[]);
    }

    #[test]
    fn sources_that_nobody_is_are_told() {
        check(
            &[policy(
                "p",
                "action: Allow, rules: [{from: [{identities: [spiffe://td/ns/shop/sa/wob]}, {namespaces: [shob]}]}]",
            )],
            &[
                (P, "spec.rules[0].from[0].identities[0]", "no workload has", "did you mean 'web'?"),
                (P, "spec.rules[0].from[1].namespaces[0]", "no workload is in", "did you mean 'shop'?"),
            ],
        );
    }

    #[test]
    fn workloads_that_are_outside_or_claim_one_address_are_told() {
        let out = workload("out", "10.0.0.3").replace("{app: out}", "{nodemesh.io/enroll: 'false'}");
        check(
            &[out],
            &[("Workload shop/out", "metadata", "not enrolled, in the strict namespace", "enroll")],
        );
        let lost = workload("lost", "10.0.0.3").replace("namespace: shop", "namespace: shopp");
        check(
            &[lost],
            &[("Workload shopp/lost", "metadata.namespace", "no Namespace", "did you mean 'shop'?")],
        );
        check(
            &[workload("twin", "10.0.0.1")],
            &[(
                "Workload shop/web",
                "spec.addresses",
                "Workload shop/twin has the address 10.0.0.1",
                "another",
            )],
        );
        let only = [
            NAMESPACE.replace("'true'", "'false'"),
            workload("web", "10.0.0.1"),
            policy("p", "action: Allow"),
        ];
        let reasons: Vec<String> = warnings(&only).into_iter().map(|it| it.reason).collect();
        assert!(reasons.iter().any(|it| it.contains("nobody enforces it")), "{reasons:?}");
    }
}
