//! Routes in words: what their rules match, where these lead, and what became of the routes.

use mesh_core::model::{
    Name,
    http::{
        Backend, BackendTarget, Filters, PathMatch, RequestMatch, RouteKind, RouteRule, TextMatch, ValueMatch,
    },
};

use super::answer::{RouteParentRow, RouteRow};
use crate::{
    model::{Model, ParentRef, Route},
    routes::{Outcome, resolve},
    traffic,
};

/// All routes of Services, by kind and name.
pub(super) fn rows(model: &Model) -> Vec<RouteRow> {
    let row = |((kind, name), Outcome { parents, broken, behind }): ((RouteKind, Name), Outcome)| RouteRow {
        kind: kind.as_str().to_owned(),
        parents: parents
            .into_iter()
            .map(|(parent, error)| RouteParentRow {
                service: service(&parent),
                accepted: error.is_none(),
                reason: error.as_ref().map_or("Accepted", |error| error.reason()).to_owned(),
                says: match (error, behind.iter().find(|(at, _)| *at == parent.index)) {
                    (Some(error), _) => error.to_string(),
                    (None, Some((_, name))) => format!("{name} is older and for the same"),
                    (None, None) => String::new(),
                },
            })
            .collect(),
        broken: broken.iter().map(|it| format!("{}: {}", it.field, it.why)).collect(),
        rules: model.routes.get(&(kind, name.clone())).map_or_else(Vec::new, |route| rules(route)),
        name: name.to_string(),
    };
    resolve(model, &traffic::resolve(model)).outcomes.into_iter().map(row).collect()
}

/// The Service, and the port that is meant.
fn service(parent: &ParentRef) -> String {
    let port = parent.port.map(|port| port.to_string()).or_else(|| parent.section.clone());
    port.map_or_else(|| parent.service.to_string(), |port| format!("{}:{port}", parent.service))
}

/// The rules of a route, a line each; of one of connections for whom it is, and where it leads.
fn rules(route: &Route) -> Vec<String> {
    let hostnames: Vec<String> = route.hostnames.iter().map(ToString::to_string).collect();
    match route.kind {
        RouteKind::Grpc | RouteKind::Http => route.rules.iter().map(rule).collect(),
        RouteKind::Tls => {
            let leads = |rule| format!("{} -> {}", hostnames.join(", "), leads(rule));
            route.rules.iter().map(leads).collect()
        }
        RouteKind::Tcp => {
            route.rules.iter().map(|rule| format!("every connection -> {}", leads(rule))).collect()
        }
    }
}

/// A rule on one line.
pub(super) fn rule(rule: &RouteRule) -> String {
    let matches: Vec<String> = rule.matches.iter().map(matched).collect();
    let matches = if matches.is_empty() { "everything".to_owned() } else { matches.join(", or ") };
    let name = if rule.name.is_empty() { String::new() } else { format!("{}: ", rule.name) };
    format!("{name}{matches} -> {}", leads(rule))
}

/// Where a rule leads.
pub(super) fn leads(rule: &RouteRule) -> String {
    let done = filters(&rule.filters);
    let done = if done.is_empty() { String::new() } else { format!(" ({})", done.join(", ")) };
    let shares = rule.backends.len() > 1;
    let to: Vec<String> = rule.backends.iter().map(|it| backend(it, shares)).collect();
    match (&rule.filters.redirect, to.is_empty()) {
        (Some(redirect), _) => format!("redirect {}{done}", redirect.status),
        (None, true) => format!("nowhere{done}"),
        (None, false) => format!("{}{done}", to.join(", ")),
    }
}

fn backend(backend: &Backend, shares: bool) -> String {
    let to = target(&backend.to);
    if shares { format!("{to} weight {}", backend.weight) } else { to }
}

/// What a reference leads to.
pub(super) fn target(to: &BackendTarget) -> String {
    match to {
        BackendTarget::Service { service, port } => format!("{service}:{port}"),
        BackendTarget::Nowhere => "nowhere".to_owned(),
    }
}

fn matched(it: &RequestMatch) -> String {
    let path = match &it.path {
        PathMatch::Exact(path) => path.clone(),
        PathMatch::Prefix(prefix) => format!("{prefix}/*"),
        PathMatch::Pattern(pattern) => format!("~{}", pattern.as_str()),
        PathMatch::Call { service, method } => {
            let part = |part: &Option<TextMatch>| part.as_ref().map_or_else(|| "*".to_owned(), text);
            format!("/{}/{}", part(service), part(method))
        }
    };
    let named = |what: &str, it: &ValueMatch| format!(" {what} {}={}", it.name, text(&it.value));
    let headers = it.headers.iter().map(|it| named("header", it));
    let all: String = headers.chain(it.query.iter().map(|it| named("parameter", it))).collect();
    let method = it.method.as_ref().map(|method| format!("{method} ")).unwrap_or_default();
    format!("{method}{path}{all}")
}

/// A pattern with a tilde before it.
fn text(text: &TextMatch) -> String {
    match text {
        TextMatch::Exact(text) => text.clone(),
        TextMatch::Pattern(pattern) => format!("~{}", pattern.as_str()),
    }
}

fn filters(filters: &Filters) -> Vec<&'static str> {
    [
        ("request headers changed", !filters.request_headers.is_empty()),
        ("response headers changed", !filters.response_headers.is_empty()),
        ("rewritten", filters.rewrite.is_some()),
        ("mirrored", !filters.mirrors.is_empty()),
        ("CORS", filters.cors.is_some()),
    ]
    .into_iter()
    .filter_map(|(says, is_done)| is_done.then_some(says))
    .collect()
}
