//! Which rule a request falls under: the table against the specification, read slowly.

use std::{cmp::Ordering, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use mesh_core::{
    http::{Chosen, Table, matches::Asked},
    model::http::{PathMatch, RequestMatch, RequestRoute, RouteKind, TextMatch, ValueMatch},
};
use proptest::{collection::vec, prelude::*, sample::select};

use super::arbitrary;

/// A request: its parts, of which [`Asked`] borrows.
#[derive(Debug, Clone)]
struct Request {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Request {
    fn asked(&self) -> Asked<'_> {
        Asked { method: &self.method, uri: &self.uri, headers: &self.headers }
    }
}

fn request() -> impl Strategy<Value = Request> {
    let word = || select(vec!["a", "b", "c"]);
    let method = select(vec![Method::GET, Method::POST]);
    let query = vec((word(), word()), 0..3);
    (arbitrary::path(), query, vec((word(), word()), 0..3), method).prop_map(
        |(path, query, headers, method)| {
            let query: Vec<String> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let uri = format!("{path}?{}", query.join("&")).parse().expect("a target");
            let mut all = HeaderMap::new();
            for (name, value) in headers {
                all.append(HeaderName::from_static(name), HeaderValue::from_static(value));
            }
            Request { method, uri, headers: all }
        },
    )
}

/// Gateway API, `HTTPRouteMatch` and `GRPCRouteMatch`, sentence by sentence.
fn is_as_said(said: &RequestMatch, request: &Request) -> bool {
    let text = |wanted: &TextMatch, it: &str| match wanted {
        TextMatch::Exact(wanted) => wanted == it,
        TextMatch::Pattern(pattern) => pattern.matches(it),
    };
    let path = request.uri.path();
    let path = match &said.path {
        PathMatch::Exact(wanted) => wanted == path,
        PathMatch::Prefix(prefix) => {
            let parts = |text: &str| {
                text.split('/').filter(|it| !it.is_empty()).map(str::to_owned).collect::<Vec<_>>()
            };
            parts(path).starts_with(&parts(prefix))
        }
        PathMatch::Pattern(pattern) => pattern.matches(path),
        PathMatch::Call { service, method } => {
            let parts: Vec<&str> = path.split('/').collect();
            parts.len() == 3
                && !parts[1].is_empty()
                && !parts[2].is_empty()
                && service.as_ref().is_none_or(|wanted| text(wanted, parts[1]))
                && method.as_ref().is_none_or(|wanted| text(wanted, parts[2]))
        }
    };
    let header = |wanted: &ValueMatch| {
        let values: Vec<&str> =
            request.headers.get_all(&wanted.name).iter().map(|value| value.to_str().expect("text")).collect();
        !values.is_empty() && text(&wanted.value, &values.join(","))
    };
    let parameter = |wanted: &ValueMatch| {
        let all = request.uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        let first = all.filter(|(name, _)| *name == wanted.name).map(|(_, value)| value).next();
        first.is_some_and(|value| text(&wanted.value, value))
    };
    path && said.method.as_ref().is_none_or(|method| *method == request.method.as_str())
        && said.headers.iter().all(header)
        && said.query.iter().all(parameter)
}

/// Whether one match comes before another by its route's kind (`HTTPRouteRule.matches`, `GRPCRouteRule.matches`).
fn before(kind: RouteKind, a: &RequestMatch, b: &RequestMatch) -> Ordering {
    let more = |of: &dyn Fn(&RequestMatch) -> usize| of(b).cmp(&of(a));
    let len = |text: &Option<TextMatch>| text.as_ref().map_or(0, |it| it.as_str().len());
    match kind {
        RouteKind::Http => {
            let class = |it: &RequestMatch| match it.path {
                PathMatch::Exact(_) => 2,
                PathMatch::Pattern(_) => 1,
                _ => 0,
            };
            let length = |it: &RequestMatch| match &it.path {
                PathMatch::Prefix(prefix) => prefix.len(),
                // Ours to say: the longer pattern first.
                PathMatch::Pattern(pattern) => pattern.as_str().len(),
                _ => 0,
            };
            more(&class)
                .then_with(|| more(&length))
                .then_with(|| more(&|it| usize::from(it.method.is_some())))
                .then_with(|| more(&|it| it.headers.len()))
                .then_with(|| more(&|it| it.query.len()))
        }
        _ => {
            let parts = |it: &RequestMatch| match &it.path {
                PathMatch::Call { service, method } => (len(service), len(method)),
                _ => (0, 0),
            };
            more(&|it| parts(it).0)
                .then_with(|| more(&|it| parts(it).1))
                .then_with(|| more(&|it| usize::from(it.method.is_some())))
                .then_with(|| more(&|it| it.headers.len()))
                .then_with(|| more(&|it| it.query.len()))
        }
    }
}

/// Looks at every match of every rule, and keeps the one that comes first.
fn slowly(routes: &[Arc<RequestRoute>], request: &Request) -> Option<(String, usize)> {
    let grpc = routes.iter().any(|route| route.kind == RouteKind::Grpc);
    let kind = if grpc { RouteKind::Grpc } else { RouteKind::Http };
    let path = match kind {
        RouteKind::Http => PathMatch::default(),
        _ => PathMatch::Call { service: None, method: None },
    };
    let every = RequestMatch { path, ..RequestMatch::default() };
    let mut best: Option<(&RequestMatch, &RequestRoute, usize)> = None;
    for route in routes.iter().filter(|route| route.kind == kind) {
        for (index, rule) in route.rules.iter().enumerate() {
            let all: Vec<&RequestMatch> =
                if rule.matches.is_empty() { vec![&every] } else { rule.matches.iter().collect() };
            for said in all.into_iter().filter(|said| is_as_said(said, request)) {
                let comes_first = best.as_ref().is_none_or(|(other, its_route, its_index)| {
                    before(kind, said, other)
                        .then_with(|| route.created.cmp(&its_route.created))
                        .then_with(|| route.name.cmp(&its_route.name))
                        .then_with(|| index.cmp(its_index))
                        .is_lt()
                });
                if comes_first {
                    best = Some((said, route, index));
                }
            }
        }
    }
    best.map(|(_, route, index)| (route.name.to_string(), index))
}

fn named(chosen: Option<Chosen<'_>>) -> Option<(String, usize)> {
    chosen.map(|it| (it.route.name.to_string(), it.index))
}

/// Routes of different names: as objects of one kind have.
fn routes() -> impl Strategy<Value = Vec<Arc<RequestRoute>>> {
    vec(arbitrary::route(), 0..4).prop_map(|mut routes| {
        routes.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
        routes.dedup_by(|a, b| (a.kind, &a.name) == (b.kind, &b.name));
        routes.into_iter().map(Arc::new).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_table_chooses_as_the_specification_does(routes in routes(), request in request()) {
        let table = Table::new(&routes);
        prop_assert_eq!(named(table.choose(&request.asked())), slowly(&routes, &request));
    }

    #[test]
    fn the_order_of_routes_never_shows(mut routes in routes(), request in request()) {
        let forward = named(Table::new(&routes).choose(&request.asked()));
        routes.reverse();
        prop_assert_eq!(named(Table::new(&routes).choose(&request.asked())), forward);
    }
}
