//! Routes of requests on the wire.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode, uri::PathAndQuery};
use prost::Message;

use super::{UNKNOWN, WireError, error, name_from_proto, port_from_proto, proto, traffic};
use crate::model::{
    Name,
    http::{
        Backend, BackendTarget, Cors, Filters, HeaderEdits, Mirror, Parent, PathEdit, PathMatch, PersistBy,
        Persistence, Redirect, RequestMatch, RequestRoute, Retry, Rewrite, RouteKind, RouteRule, TextMatch,
        Timeouts, ValueMatch,
    },
};

/// How many bytes a route of requests takes of the update of a view.
pub fn route_bytes(route: &RequestRoute) -> usize {
    to_proto(route).encoded_len()
}

pub(super) fn to_proto(route: &RequestRoute) -> proto::RequestRoute {
    let parent = |parent: &Parent| proto::RouteParent {
        service: parent.service.to_string(),
        port: parent.port.unwrap_or(0).into(),
    };
    proto::RequestRoute {
        namespace: route.name.namespace.clone(),
        name: route.name.name.clone(),
        kind: match route.kind {
            RouteKind::Http => proto::RouteKind::Http,
            RouteKind::Grpc => proto::RouteKind::Grpc,
            RouteKind::Tls => proto::RouteKind::Tls,
            RouteKind::Tcp => proto::RouteKind::Tcp,
        }
        .into(),
        created_unix: route.created,
        parents: route.parents.iter().map(parent).collect(),
        rules: route.rules.iter().map(rule_to_proto).collect(),
    }
}

fn rule_to_proto(rule: &RouteRule) -> proto::RouteRule {
    let backend = |backend: &Backend| {
        let (service, port) = target_to_proto(&backend.to);
        let filters = Some(filters_to_proto(&backend.filters));
        proto::Backend { service, port, weight: backend.weight, filters }
    };
    proto::RouteRule {
        name: rule.name.clone(),
        matches: rule.matches.iter().map(match_to_proto).collect(),
        filters: Some(filters_to_proto(&rule.filters)),
        backends: rule.backends.iter().map(backend).collect(),
        request_timeout_ms: millis(rule.timeouts.request),
        backend_timeout_ms: millis(rule.timeouts.backend),
        retry: rule.retry.as_ref().map(|retry| proto::Retry {
            codes: retry.codes.iter().map(|code| u32::from(*code)).collect(),
            attempts: retry.attempts,
            backoff_ms: millis(Some(retry.backoff)),
        }),
        persistence: rule.persistence.as_ref().map(|it| proto::Persistence {
            name: it.name.clone(),
            by: match it.by {
                PersistBy::Cookie => proto::PersistBy::Cookie,
                PersistBy::Header => proto::PersistBy::Header,
            }
            .into(),
            lifetime: it.lifetime.unwrap_or(0),
        }),
        traffic: traffic::to_proto(&rule.traffic),
    }
}

pub(super) fn millis(duration: Option<Duration>) -> u64 {
    duration.map_or(0, |it| u64::try_from(it.as_millis()).unwrap_or(u64::MAX))
}

pub(super) fn target_to_proto(to: &BackendTarget) -> (String, u32) {
    match to {
        BackendTarget::Service { service, port } => (service.to_string(), (*port).into()),
        BackendTarget::Nowhere => (String::new(), 0),
    }
}

fn match_to_proto(it: &RequestMatch) -> proto::RequestMatch {
    use proto::request_match::Path;
    let value =
        |it: &ValueMatch| proto::ValueMatch { name: it.name.clone(), value: Some(text_to_proto(&it.value)) };
    proto::RequestMatch {
        path: Some(match &it.path {
            PathMatch::Exact(path) => Path::Exact(path.clone()),
            PathMatch::Prefix(prefix) => Path::Prefix(prefix.clone()),
            PathMatch::Pattern(pattern) => Path::Pattern(pattern.as_str().to_owned()),
            PathMatch::Call { service, method } => Path::Call(proto::CallMatch {
                service: service.as_ref().map(text_to_proto),
                method: method.as_ref().map(text_to_proto),
            }),
        }),
        headers: it.headers.iter().map(value).collect(),
        query: it.query.iter().map(value).collect(),
        method: it.method.clone().unwrap_or_default(),
    }
}

pub(super) fn text_to_proto(text: &TextMatch) -> proto::TextMatch {
    use proto::text_match::As;
    proto::TextMatch {
        r#as: Some(match text {
            TextMatch::Exact(text) => As::Exact(text.clone()),
            TextMatch::Pattern(pattern) => As::Pattern(pattern.as_str().to_owned()),
        }),
    }
}

fn filters_to_proto(filters: &Filters) -> proto::Filters {
    proto::Filters {
        request_headers: Some(edits_to_proto(&filters.request_headers)),
        response_headers: Some(edits_to_proto(&filters.response_headers)),
        redirect: filters.redirect.as_ref().map(|it| proto::Redirect {
            scheme: it.scheme.clone().unwrap_or_default(),
            hostname: it.hostname.clone().unwrap_or_default(),
            path: it.path.as_ref().map(path_to_proto),
            port: it.port.unwrap_or(0).into(),
            status: it.status.into(),
        }),
        rewrite: filters.rewrite.as_ref().map(|it| proto::Rewrite {
            hostname: it.hostname.clone().unwrap_or_default(),
            path: it.path.as_ref().map(path_to_proto),
        }),
        mirrors: filters.mirrors.iter().map(mirror_to_proto).collect(),
        cors: filters.cors.as_ref().map(|it| proto::Cors {
            origins: it.origins.clone(),
            methods: it.methods.clone(),
            headers: it.headers.clone(),
            expose: it.expose.clone(),
            credentials: it.credentials,
            max_age: it.max_age,
        }),
    }
}

fn edits_to_proto(edits: &HeaderEdits) -> proto::HeaderEdits {
    let headers = |list: &[(String, String)]| {
        let header =
            |(name, value): &(String, String)| proto::Header { name: name.clone(), value: value.clone() };
        list.iter().map(header).collect()
    };
    proto::HeaderEdits { set: headers(&edits.set), add: headers(&edits.add), remove: edits.remove.clone() }
}

fn path_to_proto(edit: &PathEdit) -> proto::PathEdit {
    use proto::path_edit::Edit;
    proto::PathEdit {
        edit: Some(match edit {
            PathEdit::Full(path) => Edit::Full(path.clone()),
            PathEdit::Prefix(path) => Edit::Prefix(path.clone()),
        }),
    }
}

fn mirror_to_proto(mirror: &Mirror) -> proto::Mirror {
    let (service, port) = target_to_proto(&mirror.to);
    proto::Mirror { service, port, copies: mirror.copies, of: mirror.of }
}

pub(super) fn from_proto(key: &str, route: &proto::RequestRoute) -> Result<RequestRoute, WireError> {
    let parent = |parent: &proto::RouteParent| {
        let port =
            (parent.port != 0).then(|| port_from_proto(key, "parents.port", parent.port)).transpose()?;
        Ok(Parent { service: service_from_proto(key, "parents.service", &parent.service)?, port })
    };
    Ok(RequestRoute {
        kind: match route.kind() {
            proto::RouteKind::Http => RouteKind::Http,
            proto::RouteKind::Grpc => RouteKind::Grpc,
            proto::RouteKind::Tls | proto::RouteKind::Tcp | proto::RouteKind::Unspecified => {
                return Err(error(key, "kind", UNKNOWN));
            }
        },
        name: name_from_proto(key, &route.namespace, &route.name)?,
        created: route.created_unix,
        parents: route.parents.iter().map(parent).collect::<Result<_, _>>()?,
        rules: route.rules.iter().map(|rule| rule_from_proto(key, rule)).collect::<Result<_, _>>()?,
    })
}

fn rule_from_proto(key: &str, rule: &proto::RouteRule) -> Result<RouteRule, WireError> {
    let backend = |backend: &proto::Backend| {
        Ok(Backend {
            to: target_from_proto(key, "rules.backends", &backend.service, backend.port)?,
            weight: backend.weight,
            filters: filters_from_proto(key, backend.filters.as_ref())?,
        })
    };
    let time = |ms: u64| (ms > 0).then(|| Duration::from_millis(ms));
    let retry = |retry: &proto::Retry| {
        let status = |code: &u32| status_from_proto(key, "rules.retry.codes", *code);
        Ok(Retry {
            codes: retry.codes.iter().map(status).collect::<Result<_, _>>()?,
            attempts: retry.attempts,
            backoff: Duration::from_millis(retry.backoff_ms),
        })
    };
    let persistence = |it: &proto::Persistence| {
        Ok(Persistence {
            name: header_name(key, "rules.persistence.name", &it.name)?,
            by: match it.by() {
                proto::PersistBy::Cookie => PersistBy::Cookie,
                proto::PersistBy::Header => PersistBy::Header,
                proto::PersistBy::Unspecified => return Err(error(key, "rules.persistence.by", UNKNOWN)),
            },
            lifetime: Some(it.lifetime).filter(|seconds| *seconds > 0),
        })
    };
    Ok(RouteRule {
        name: rule.name.clone(),
        matches: rule.matches.iter().map(|it| match_from_proto(key, it)).collect::<Result<_, _>>()?,
        filters: filters_from_proto(key, rule.filters.as_ref())?,
        backends: rule.backends.iter().map(backend).collect::<Result<_, _>>()?,
        timeouts: Timeouts { request: time(rule.request_timeout_ms), backend: time(rule.backend_timeout_ms) },
        retry: rule.retry.as_ref().map(retry).transpose()?,
        persistence: rule.persistence.as_ref().map(persistence).transpose()?,
        traffic: traffic::from_proto(key, rule.traffic.as_ref())?,
    })
}

fn service_from_proto(key: &str, field: &'static str, text: &str) -> Result<Name, WireError> {
    text.parse().map_err(|e| error(key, field, e))
}

pub(super) fn target_from_proto(
    key: &str,
    field: &'static str,
    service: &str,
    port: u32,
) -> Result<BackendTarget, WireError> {
    if service.is_empty() {
        return Ok(BackendTarget::Nowhere);
    }
    let service = service_from_proto(key, field, service)?;
    Ok(BackendTarget::Service { service, port: port_from_proto(key, field, port)? })
}

fn match_from_proto(key: &str, it: &proto::RequestMatch) -> Result<RequestMatch, WireError> {
    use proto::request_match::Path;
    let values = |field, list: &[proto::ValueMatch]| -> Result<Vec<ValueMatch>, WireError> {
        let value = |it: &proto::ValueMatch| {
            let value = it.value.as_ref().ok_or_else(|| error(key, field, "a match without a value"))?;
            Ok(ValueMatch { name: it.name.clone(), value: text_from_proto(key, field, value)? })
        };
        list.iter().map(value).collect()
    };
    let text = |it: &Option<proto::TextMatch>| {
        it.as_ref().map(|it| text_from_proto(key, "rules.matches.call", it)).transpose()
    };
    let headers = values("rules.matches.headers", &it.headers)?;
    for header in &headers {
        header_name(key, "rules.matches.headers", &header.name)?;
    }
    Ok(RequestMatch {
        path: match it.path.as_ref().ok_or_else(|| error(key, "rules.matches.path", UNKNOWN))? {
            Path::Exact(path) => PathMatch::Exact(path.clone()),
            Path::Prefix(prefix) => PathMatch::Prefix(prefix.trim_end_matches('/').to_owned()),
            Path::Pattern(text) => {
                PathMatch::Pattern(text.parse().map_err(|e| error(key, "rules.matches.path", e))?)
            }
            Path::Call(call) => {
                PathMatch::Call { service: text(&call.service)?, method: text(&call.method)? }
            }
        },
        headers,
        query: values("rules.matches.query", &it.query)?,
        method: match it.method.as_str() {
            "" => None,
            method => {
                Method::from_bytes(method.as_bytes()).map_err(|e| error(key, "rules.matches.method", e))?;
                Some(method.to_owned())
            }
        },
    })
}

pub(super) fn text_from_proto(
    key: &str,
    field: &'static str,
    text: &proto::TextMatch,
) -> Result<TextMatch, WireError> {
    use proto::text_match::As;
    match text.r#as.as_ref().ok_or_else(|| error(key, field, UNKNOWN))? {
        As::Exact(text) => Ok(TextMatch::Exact(text.clone())),
        As::Pattern(text) => Ok(TextMatch::Pattern(text.parse().map_err(|e| error(key, field, e))?)),
    }
}

fn filters_from_proto(key: &str, filters: Option<&proto::Filters>) -> Result<Filters, WireError> {
    let Some(filters) = filters else { return Ok(Filters::default()) };
    let some = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    let redirect = |it: &proto::Redirect| {
        let field = "rules.filters.redirect";
        Ok(Redirect {
            scheme: some(&it.scheme),
            hostname: some(&it.hostname),
            path: it.path.as_ref().map(|it| path_from_proto(key, field, it)).transpose()?,
            port: (it.port != 0).then(|| port_from_proto(key, field, it.port)).transpose()?,
            status: status_from_proto(key, field, it.status)?,
        })
    };
    let rewrite = |it: &proto::Rewrite| {
        let path = it.path.as_ref().map(|it| path_from_proto(key, "rules.filters.rewrite", it));
        Ok(Rewrite { hostname: some(&it.hostname), path: path.transpose()? })
    };
    let mirror = |it: &proto::Mirror| {
        let to = target_from_proto(key, "rules.filters.mirrors", &it.service, it.port)?;
        if it.of == 0 {
            return Err(error(key, "rules.filters.mirrors", "some of none"));
        }
        Ok(Mirror { to, copies: it.copies, of: it.of })
    };
    Ok(Filters {
        request_headers: edits_from_proto(key, filters.request_headers.as_ref())?,
        response_headers: edits_from_proto(key, filters.response_headers.as_ref())?,
        redirect: filters.redirect.as_ref().map(redirect).transpose()?,
        rewrite: filters.rewrite.as_ref().map(rewrite).transpose()?,
        mirrors: filters.mirrors.iter().map(mirror).collect::<Result<_, _>>()?,
        cors: filters.cors.as_ref().map(|it| Cors {
            origins: it.origins.clone(),
            methods: it.methods.clone(),
            headers: it.headers.clone(),
            expose: it.expose.clone(),
            credentials: it.credentials,
            max_age: it.max_age,
        }),
    })
}

fn edits_from_proto(key: &str, edits: Option<&proto::HeaderEdits>) -> Result<HeaderEdits, WireError> {
    let Some(edits) = edits else { return Ok(HeaderEdits::default()) };
    let field = "rules.filters.headers";
    let headers = |list: &[proto::Header]| {
        let header = |it: &proto::Header| {
            HeaderValue::try_from(&it.value).map_err(|e| error(key, field, e))?;
            Ok((header_name(key, field, &it.name)?, it.value.clone()))
        };
        list.iter().map(header).collect::<Result<Vec<_>, WireError>>()
    };
    let remove = edits.remove.iter().map(|name| header_name(key, field, name));
    Ok(HeaderEdits {
        set: headers(&edits.set)?,
        add: headers(&edits.add)?,
        remove: remove.collect::<Result<_, _>>()?,
    })
}

pub(super) fn header_name(key: &str, field: &'static str, name: &str) -> Result<String, WireError> {
    HeaderName::try_from(name).map_err(|e| error(key, field, e))?;
    Ok(name.to_owned())
}

fn path_from_proto(key: &str, field: &'static str, edit: &proto::PathEdit) -> Result<PathEdit, WireError> {
    use proto::path_edit::Edit;
    let checked = |path: &String| {
        // What is put into a target must be fit for one, whatever comes behind it.
        PathAndQuery::try_from(format!("/{path}")).map_err(|e| error(key, field, e))?;
        Ok(path.clone())
    };
    match edit.edit.as_ref().ok_or_else(|| error(key, field, UNKNOWN))? {
        Edit::Full(path) => checked(path).map(PathEdit::Full),
        Edit::Prefix(path) => checked(path).map(PathEdit::Prefix),
    }
}

pub(super) fn status_from_proto(key: &str, field: &'static str, status: u32) -> Result<u16, WireError> {
    let status = u16::try_from(status).ok().and_then(|it| StatusCode::from_u16(it).ok());
    status.map(|it| it.as_u16()).ok_or_else(|| error(key, field, "no status of HTTP"))
}
