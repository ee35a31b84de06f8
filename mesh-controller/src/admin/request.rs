//! A request over a connection, routed by the very function that the agents run, and told.

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use mesh_core::{
    http::{Chosen, Table, matches::Asked},
    model::{
        Service,
        http::{Backend, BackendTarget},
        traffic::Traffic,
    },
    policy::request::Reading,
    refusal::{Reason, Step},
    route,
    view::Owner,
};

use super::{
    answer::End,
    route::leads,
    why::{Story, WhyError, refused},
};

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct Request {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Request {
    /// `line`: a method and a path, such as `GET /cart?id=1`. `headers`: `NAME:VALUE`, a line each.
    pub fn parse(line: &str, headers: &str) -> Result<Self, WhyError> {
        let malformed = |text: &str| WhyError::Request(text.chars().take(300).collect());
        let (method, path) = line.trim().split_once(' ').ok_or_else(|| malformed(line))?;
        let mut request = Self {
            method: method.parse().map_err(|_| malformed(line))?,
            uri: path.trim().parse().map_err(|_| malformed(line))?,
            headers: HeaderMap::new(),
        };
        for header in headers.lines() {
            let (name, value) = header.split_once(':').ok_or_else(|| malformed(header))?;
            let name = HeaderName::try_from(name.trim()).map_err(|_| malformed(header))?;
            let value = HeaderValue::try_from(value.trim()).map_err(|_| malformed(header))?;
            request.headers.append(name, value);
        }
        Ok(request)
    }

    /// As its destination's policies look at it.
    pub(super) fn reading(&self) -> Reading<'_> {
        Reading::of(&self.asked())
    }

    /// As its destination's policies on end users leave it.
    pub(super) fn apply(&mut self, authenticated: &mesh_core::authentication::Authenticated) {
        authenticated.apply(&mut self.uri, &mut self.headers);
    }

    pub(super) fn asked(&self) -> Asked<'_> {
        Asked { method: &self.method, uri: &self.uri, headers: &self.headers }
    }
}

impl Story<'_> {
    /// The rules for what the source asks of the destination, if it is a port of a service that has some.
    pub(super) fn routed(&self) -> Option<(Arc<Service>, Arc<Table>)> {
        let Owner::Service(service) = self.snapshot.owner(self.asked.ip())? else { return None };
        let namespace = &self.source.name.namespace;
        let table = self.snapshot.table(&service.name, self.asked.port(), namespace)?;
        Some((service.clone(), table.clone()))
    }

    /// How a request ends that falls under these rules.
    pub(super) fn requests(&mut self, service: &Service, table: &Table) -> Vec<End> {
        let says =
            format!("{} is service {}, whose requests at this port are routed", self.asked, service.name);
        self.step(Step::Route, says);
        let to = service.name.to_string();
        let Some(request) = self.request else {
            let says = "each request is routed for itself: name one with --request 'GET /path'";
            return vec![answered(to, "routed", says)];
        };
        let Some(chosen) = table.choose(&request.asked()) else {
            self.step(Step::Route, format!("no rule matches {} {}", request.method, request.uri));
            return vec![refused(to, "", Reason::NoRule)];
        };
        self.step(Step::Route, chosen_rule(&chosen));
        let of_service = service.port(self.asked.port()).map(|it| it.traffic.clone()).unwrap_or_default();
        let Traffic { timeouts, retries, faults, hedge, .. } = chosen.rule.traffic.or(&of_service);
        self.sent(&Traffic { timeouts, retries, faults, hedge, ..Traffic::default() });
        if let Some(redirect) = &chosen.rule.filters.redirect {
            return vec![answered(to, "answered", &format!("redirected with {}", redirect.status))];
        }
        let with_weight: Vec<&Backend> = chosen.rule.backends.iter().filter(|it| it.weight > 0).collect();
        if with_weight.is_empty() {
            return vec![refused(to, "", Reason::NoBackend)];
        }
        with_weight.into_iter().flat_map(|backend| self.backend(&to, backend)).collect()
    }

    /// How requests end that go to one backend.
    fn backend(&mut self, to: &str, backend: &Backend) -> Vec<End> {
        let no_backend = || vec![refused(to.to_owned(), "", Reason::NoBackend)];
        let BackendTarget::Service { service: name, port } = &backend.to else { return no_backend() };
        let Some(service) = self.snapshot.service(name) else { return no_backend() };
        match route::endpoints(service, *port, self.asked.is_ipv4(), self.source) {
            Ok(endpoints) => {
                let says = format!("{name}:{port} has {} ready endpoint(s)", endpoints.len());
                self.step(Step::Balance, says);
                let traffic = service.port(*port).map(|it| it.traffic.clone()).unwrap_or_default();
                let Traffic { balancing, limits, ejection, .. } = traffic;
                self.sent(&Traffic { balancing, limits, ejection, ..Traffic::default() });
                self.unhealthy(name, *port);
                self.endpoints(&endpoints)
            }
            Err(reason) => vec![refused(name.to_string(), "", reason)],
        }
    }
}

fn chosen_rule(chosen: &Chosen<'_>) -> String {
    let Chosen { route, index, rule, .. } = chosen;
    let name = if rule.name.is_empty() { String::new() } else { format!(" '{}'", rule.name) };
    format!("{} {} spec.rules[{index}]{name}: {}", route.kind.as_str(), route.name, leads(rule))
}

pub(super) fn answered(to: String, verdict: &str, says: &str) -> End {
    End {
        to,
        verdict: verdict.to_owned(),
        transport: String::new(),
        rule: None,
        mode: None,
        would_refuse: None,
        reason: None,
        says: says.to_owned(),
        cure: String::new(),
    }
}
