//! HTTPRoutes, GRPCRoutes, TLSRoutes and TCPRoutes whose parents are Services (Gateway API, GEP-1426). What a route asks for
//! and nobody here does is refused: a request is not to go its way without it.
//!
//! | module | what |
//! |---|---|
//! | [`connections`] | TLSRoutes and TCPRoutes |
//! | [`matches`] | what a request has to be |
//! | [`filters`] | what is done with it |
//! | [`backends`] | where it goes |
//! | [`times`] | how long it may take, when it is tried again, what stays together |
//! | [`grant`] | who may send requests to Services of another namespace |

mod backends;
mod connections;
mod filters;
mod grant;
mod matches;
mod times;

use std::{collections::BTreeSet, sync::Arc};

use k8s_openapi::jiff::Timestamp;
use mesh_core::model::{
    Name,
    http::{PathEdit, PathMatch, Pattern, RouteKind, RouteRule, TextMatch, ValueMatch},
    traffic::Traffic,
};
use serde::Deserialize;

pub(super) use self::times::{MAX_ATTEMPTS, RawTimeouts};
use self::{
    backends::RawBackend,
    filters::RawFilter,
    matches::{RawCall, RawMatch},
    times::{RawRetry, RawSession},
};
use super::{Raw, RawMetadata, check::Check};
use crate::{
    model::{Object, ParentRef, Route},
    source::document::Node,
};

/// The group of the Gateway API, and of every parent that does not say one.
pub(in crate::source) const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
/// Most parents, rules, matches of a rule, and of all rules of a route (Gateway API).
const MAX_PARENTS: usize = 32;
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 64;
const MAX_ALL_MATCHES: usize = 128;
/// Most entries of the lists below a rule (Gateway API).
const MAX_ENTRIES: usize = 16;
/// Most regular expressions of a route: each may take 256 KiB of every agent that has it.
const MAX_PATTERNS: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawRoute<Rule> {
    #[serde(default)]
    parent_refs: Vec<RawParent>,
    /// Of a Service's requests nothing follows from them (GEP-1426, "`hostnames` field").
    #[serde(rename = "hostnames")]
    _hostnames: Option<Vec<String>>,
    rules: Option<Vec<Rule>>,
    #[serde(rename = "useDefaultGateways")]
    _use_default_gateways: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawParent {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    section_name: Option<String>,
    port: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawHttpRule {
    name: Option<String>,
    #[serde(default)]
    matches: Vec<RawMatch>,
    #[serde(default)]
    filters: Vec<RawFilter>,
    #[serde(default)]
    backend_refs: Vec<RawBackend>,
    timeouts: Option<RawTimeouts>,
    retry: Option<RawRetry>,
    session_persistence: Option<RawSession>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawGrpcRule {
    name: Option<String>,
    #[serde(default)]
    matches: Vec<RawCall>,
    #[serde(default)]
    filters: Vec<RawFilter>,
    #[serde(default)]
    backend_refs: Vec<RawBackend>,
    session_persistence: Option<RawSession>,
}

/// Whether a route is for Gateways and the like alone, and so none of ours. Of a document that is not as a route has to be
/// it is not.
pub(super) fn is_anothers(tree: &Node) -> bool {
    let Some(spec) = tree.field("spec").filter(|spec| spec.is_map()) else { return false };
    let Some(parents) = spec.field("parentRefs") else { return true };
    let is_gateways = |parent: &Node| {
        let text = |key| match parent.field(key) {
            None => Some(""),
            Some(value) => value.text(&[]),
        };
        let (Some(group), Some(kind)) = (text("group"), text("kind")) else { return false };
        parent.is_map() && !(kind == "Service" && ["", GATEWAY_GROUP].contains(&group))
    };
    parents.items().is_some_and(|parents| parents.iter().all(is_gateways))
}

impl Check<'_> {
    pub(super) fn http_route(&mut self, raw: Raw<RawRoute<RawHttpRule>>) -> Object {
        let (name, created) = (self.namespaced(&raw.metadata), self.created(&raw.metadata));
        let parents = self.parents(&name, raw.spec.parent_refs);
        // What the API server writes into a route without rules: everything, which goes nowhere.
        let rules = match raw.spec.rules {
            Some(rules) => self.rules(rules, |check, at, raw| check.http_rule(at, &name, raw)),
            None => vec![RouteRule::default()],
        };
        Object::Route(Arc::new(Route {
            kind: RouteKind::Http,
            name,
            created,
            parents,
            hostnames: vec![],
            rules,
        }))
    }

    pub(super) fn grpc_route(&mut self, raw: Raw<RawRoute<RawGrpcRule>>) -> Object {
        let (name, created) = (self.namespaced(&raw.metadata), self.created(&raw.metadata));
        let parents = self.parents(&name, raw.spec.parent_refs);
        let rules =
            self.rules(raw.spec.rules.unwrap_or_default(), |check, at, raw| check.grpc_rule(at, &name, raw));
        Object::Route(Arc::new(Route {
            kind: RouteKind::Grpc,
            name,
            created,
            parents,
            hostnames: vec![],
            rules,
        }))
    }

    /// `metadata.creationTimestamp`, seconds since 1970.
    pub(super) fn created(&mut self, metadata: &RawMetadata) -> i64 {
        self.our_labels(&metadata.labels, &[]);
        let Some(text) = &metadata.creation_timestamp else { return 0 };
        match text.parse::<Timestamp>() {
            Ok(time) => time.as_second(),
            Err(_) => {
                let cure = "write it as 2026-01-31T12:00:00Z, or remove it";
                self.problem("metadata.creationTimestamp", format!("'{text}' is not a time"), cure);
                0
            }
        }
    }

    /// The parents that are Services.
    fn parents(&mut self, route: &Name, raw: Vec<RawParent>) -> Vec<ParentRef> {
        self.limit("spec.parentRefs", raw.len(), MAX_PARENTS);
        let mut parents: Vec<ParentRef> = Vec::new();
        for (index, raw) in raw.into_iter().take(MAX_PARENTS).enumerate() {
            let at = format!("spec.parentRefs[{index}]");
            match (raw.kind.as_deref(), raw.group.as_deref()) {
                (Some("Service"), Some("")) => {}
                (Some("Service"), None | Some(GATEWAY_GROUP)) => {
                    let reason = format!("{GATEWAY_GROUP} has no Services");
                    self.problem(&format!("{at}.group"), reason, "write group: \"\"");
                    continue;
                }
                _ => continue,
            }
            let namespace = raw.namespace.unwrap_or_else(|| route.namespace.clone());
            self.name(&format!("{at}.namespace"), &namespace);
            self.name(&format!("{at}.name"), &raw.name);
            if let Some(port) = raw.port {
                self.port(&format!("{at}.port"), port);
            }
            if let Some(section) = &raw.section_name {
                self.name(&format!("{at}.sectionName"), section);
            }
            let service = Name::new(namespace, raw.name);
            let (port, section) = (raw.port, raw.section_name);
            if parents.iter().any(|it| (&it.service, it.port, &it.section) == (&service, port, &section)) {
                self.problem(&at, format!("{service} stands here twice"), "remove one of them");
            }
            parents.push(ParentRef { index, service, port, section });
        }
        parents
    }

    fn rules<R>(
        &mut self,
        raw: Vec<R>,
        mut rule: impl FnMut(&mut Self, &str, R) -> RouteRule,
    ) -> Vec<RouteRule> {
        let field = "spec.rules";
        self.limit(field, raw.len(), MAX_RULES);
        let raw = raw.into_iter().take(MAX_RULES).enumerate();
        let rules: Vec<RouteRule> =
            raw.map(|(index, raw)| rule(self, &format!("{field}[{index}]"), raw)).collect();
        let matches: usize = rules.iter().map(|rule| rule.matches.len()).sum();
        if matches > MAX_ALL_MATCHES {
            let cure = format!("split the route: at most {MAX_ALL_MATCHES} are taken");
            self.problem(field, format!("{matches} matches of all rules are too many"), cure);
        }
        let patterns = rules.iter().flat_map(patterns).count();
        if patterns > MAX_PATTERNS {
            let cure = format!("split the route: at most {MAX_PATTERNS} are taken");
            self.problem(field, format!("{patterns} regular expressions are too many"), cure);
        }
        let mut names = BTreeSet::new();
        for (index, rule) in rules.iter().enumerate().filter(|(_, rule)| !rule.name.is_empty()) {
            if !names.insert(&rule.name) {
                let reason = format!("another rule is called '{}'", rule.name);
                self.problem(&format!("{field}[{index}].name"), reason, "give it another name");
            }
        }
        rules
    }

    fn http_rule(&mut self, at: &str, route: &Name, raw: RawHttpRule) -> RouteRule {
        let kind = RouteKind::Http;
        let rule = RouteRule {
            name: self.rule_name(at, raw.name),
            matches: self.http_matches(&format!("{at}.matches"), raw.matches),
            filters: self.filters(&format!("{at}.filters"), kind, route, raw.filters),
            backends: self.backends(&format!("{at}.backendRefs"), kind, route, raw.backend_refs),
            timeouts: self.timeouts(&format!("{at}.timeouts"), raw.timeouts),
            retry: raw.retry.map(|raw| self.retry(&format!("{at}.retry"), raw)),
            persistence: self.session(&format!("{at}.sessionPersistence"), route, raw.session_persistence),
            // Policies are looked up when all documents are there.
            traffic: Traffic::default(),
        };
        if rule.filters.redirect.is_some() && !rule.backends.is_empty() {
            self.problem(
                &format!("{at}.backendRefs"),
                "a request that is redirected goes to no backend",
                "remove them, or the filter of type RequestRedirect",
            );
        }
        self.prefix_edits(at, &rule);
        rule
    }

    fn grpc_rule(&mut self, at: &str, route: &Name, raw: RawGrpcRule) -> RouteRule {
        let kind = RouteKind::Grpc;
        RouteRule {
            name: self.rule_name(at, raw.name),
            matches: self.calls(&format!("{at}.matches"), raw.matches),
            filters: self.filters(&format!("{at}.filters"), kind, route, raw.filters),
            backends: self.backends(&format!("{at}.backendRefs"), kind, route, raw.backend_refs),
            persistence: self.session(&format!("{at}.sessionPersistence"), route, raw.session_persistence),
            ..RouteRule::default()
        }
    }

    fn rule_name(&mut self, at: &str, name: Option<String>) -> String {
        if let Some(name) = &name {
            self.name(&format!("{at}.name"), name);
        }
        name.unwrap_or_default()
    }

    /// What is in the place of a prefix needs one, and no other match beside it.
    fn prefix_edits(&mut self, at: &str, rule: &RouteRule) {
        let one_prefix = match &rule.matches[..] {
            [] => true,
            [only] => matches!(only.path, PathMatch::Prefix(_)),
            _ => false,
        };
        let of_backends = rule.backends.iter().map(|backend| &backend.filters);
        let edits = of_backends.chain([&rule.filters]).flat_map(|filters| {
            let redirect = filters.redirect.as_ref().and_then(|it| it.path.as_ref());
            redirect.into_iter().chain(filters.rewrite.as_ref().and_then(|it| it.path.as_ref()))
        });
        if !one_prefix && edits.into_iter().any(|edit| matches!(edit, PathEdit::Prefix(_))) {
            self.problem(
                &format!("{at}.matches"),
                "ReplacePrefixMatch needs exactly one match, whose path is of type PathPrefix",
                "make a rule of each match, or use ReplaceFullPath",
            );
        }
    }
}

/// The regular expressions of a rule.
fn patterns(rule: &RouteRule) -> impl Iterator<Item = &Pattern> {
    fn of_text(text: &TextMatch) -> Option<&Pattern> {
        match text {
            TextMatch::Pattern(pattern) => Some(pattern),
            TextMatch::Exact(_) => None,
        }
    }
    rule.matches.iter().flat_map(|it| {
        let (path, call) = match &it.path {
            PathMatch::Pattern(pattern) => (Some(pattern), [None, None]),
            PathMatch::Call { service, method } => (None, [service.as_ref(), method.as_ref()]),
            PathMatch::Exact(_) | PathMatch::Prefix(_) => (None, [None, None]),
        };
        let values = it.headers.iter().chain(&it.query).map(|ValueMatch { value, .. }| value);
        path.into_iter().chain(call.into_iter().flatten().chain(values).filter_map(of_text))
    })
}
