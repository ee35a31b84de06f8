//! TrafficPolicies. What they mean is told in `docs/operate/traffic.md`; here each text becomes the thing that it names, or
//! a problem with its line.
//!
//! What a policy says, and what it says it of, has to fit: endpoints are a Service's, so a route has no say in which of them
//! is chosen.

mod health;

use std::time::Duration;

use mesh_core::model::{
    health::Probe,
    http::{RouteKind, TextMatch},
    traffic::{
        Algorithm, Balancing, Ejection, FailureShare, Fault, FaultEffect, HashBy, Hedge, Limits, Retries,
        RetryBudget, Traffic,
    },
};
use serde::Deserialize;

use self::health::RawHealthCheck;
use super::{
    Raw,
    check::Check,
    intake::{RawRateLimit, RawSizeLimits},
    route::{GATEWAY_GROUP, MAX_ATTEMPTS, RawTimeouts},
};
use crate::{
    model::{Object, TrafficPolicy, TrafficTarget},
    source::document::one_of,
};

/// Most targets, faults, and headers of a fault.
const MAX_LIST: usize = 16;
/// Most that may be under way, or wait.
pub(super) const MAX_UNDERWAY: u32 = 1_000_000;
/// Longest pause, time to be left alone, slow start or delay.
const MAX_TIME: Duration = Duration::from_secs(3600);
/// Shortest time to count failures in.
const LEAST_WINDOW: Duration = Duration::from_secs(1);
/// The highest status of gRPC.
const LAST_GRPC_STATUS: u16 = 16;
/// Longest value of a header.
const MAX_VALUE: usize = 1024;
/// Most calls that are hedged, and the longest name of one.
const MAX_CALLS: usize = 64;
const MAX_CALL: usize = 256;

/// How requests and connections are sent to Services.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawTrafficPolicy {
    /// What it is for: Services, HTTPRoutes and GRPCRoutes of its own namespace, or all Services of the namespace.
    #[cfg_attr(test, schemars(length(min = 1, max = 16)))]
    target_refs: Vec<RawTarget>,
    /// Which endpoint is chosen.
    balancing: Option<RawBalancing>,
    /// How long a request may take.
    timeouts: Option<RawTimeouts>,
    /// When a request is tried again.
    retries: Option<RawRetries>,
    /// How much may be under way at once, from each node.
    limits: Option<RawLimits>,
    /// Which endpoints are left alone for a while.
    ejection: Option<RawEjection>,
    /// What goes wrong on purpose; an empty list: nothing, whatever is said of the Service or its namespace.
    #[cfg_attr(test, schemars(length(max = 16)))]
    faults: Option<Vec<RawFault>>,
    /// When a request is sent to a second endpoint while the first one has not answered yet; left out: never.
    hedge: Option<RawHedge>,
    /// How the endpoints are checked, beside what they answer to clients.
    health_check: Option<RawHealthCheck>,
    /// How many requests each workload behind the Service takes; an empty list: as many as come, whatever is said of the
    /// Service.
    #[cfg_attr(test, schemars(length(max = 8)))]
    rate_limits: Option<Vec<RawRateLimit>>,
    /// How large a request may be that a workload behind the Service takes.
    size_limits: Option<RawSizeLimits>,
}

/// One thing that a policy is for.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawTarget {
    /// Its group: empty for Service and Namespace, gateway.networking.k8s.io for routes; left out, as its kind has it.
    #[cfg_attr(test, schemars(extend("enum" = ["", "gateway.networking.k8s.io"])))]
    group: Option<String>,
    /// Its kind.
    #[cfg_attr(test, schemars(extend("enum" = ["Namespace", "Service", "HTTPRoute", "GRPCRoute"])))]
    kind: String,
    /// Its name.
    #[cfg_attr(test, schemars(length(min = 1, max = 253)))]
    name: String,
    /// The name of a port of the Service, or of a rule of the route; left out: all of them.
    #[cfg_attr(test, schemars(length(min = 1, max = 253)))]
    section_name: Option<String>,
}

/// Which endpoint is chosen.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.algorithm) && self.algorithm == 'Hash') == has(self.hashBy)",
    "message": "hashBy is for algorithm: Hash, which needs it",
}])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawBalancing {
    /// By what: LeastLatency, if it is not said.
    #[cfg_attr(
        test,
        schemars(extend("enum" = ["LeastLatency", "LeastRequests", "RoundRobin", "Random", "Hash"]))
    )]
    algorithm: Option<String>,
    /// Of algorithm Hash: what has the same endpoint each time.
    hash_by: Option<RawHashBy>,
    /// For so long after it has come an endpoint gets less than its share, such as 30s.
    #[cfg_attr(test, schemars(length(max = 32)))]
    slow_start: Option<String>,
}

/// What has the same endpoint each time.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawHashBy {
    /// Requests with the same value of a header or of a cookie, or what comes from the same address.
    #[cfg_attr(test, schemars(extend("enum" = ["Header", "Cookie", "Source"])))]
    r#type: String,
    /// The header's or the cookie's name.
    #[cfg_attr(test, schemars(length(min = 1, max = 128)))]
    name: Option<String>,
}

/// When a request is tried again.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRetries {
    /// How often, besides the first time: 2, if it is not said; 0 is never.
    #[cfg_attr(test, schemars(range(max = 32)))]
    attempts: Option<u32>,
    /// After answers with these statuses, from 400 to 599.
    #[cfg_attr(test, schemars(length(max = 64)))]
    #[serde(default)]
    codes: Vec<u16>,
    /// After calls that are answered with nothing but these statuses of gRPC, by number: 14 is UNAVAILABLE.
    #[cfg_attr(test, schemars(length(max = 16)))]
    #[serde(default)]
    grpc_codes: Vec<u16>,
    /// Of which methods: Safe (GET, HEAD, OPTIONS, TRACE), if it is not said, or Every, POST among them.
    #[cfg_attr(test, schemars(extend("enum" = ["Safe", "Every"])))]
    methods: Option<String>,
    /// The pause before the first: 25ms, if it is not said. Each next one is twice as long, and all vary by chance.
    #[cfg_attr(test, schemars(length(max = 32)))]
    backoff: Option<String>,
    /// How many requests to the Service may be tried again.
    budget: Option<RawBudget>,
}

/// How many requests to a Service may be tried again, or hedged, from each node.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawBudget {
    /// Of all requests, percent: 20, if it is not said.
    #[cfg_attr(test, schemars(range(max = 100)))]
    percent: Option<u32>,
    /// In a second, however few there are: 10, if it is not said.
    #[cfg_attr(test, schemars(range(max = 1_000_000)))]
    per_second: Option<u32>,
}

/// When a request is sent to a second endpoint, too.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawHedge {
    /// After so long without the head of an answer, such as 100ms: what few requests take.
    #[cfg_attr(test, schemars(length(min = 1, max = 32)))]
    after: String,
    /// Calls that do no harm when they are made twice, such as shop.v1.Cart/Get; besides them requests of safe methods are
    /// hedged (GET, HEAD, OPTIONS, TRACE).
    #[cfg_attr(test, schemars(length(max = 64), inner(length(min = 3, max = 256))))]
    #[serde(default)]
    calls: Vec<String>,
    /// How many requests to the Service may be hedged.
    budget: Option<RawBudget>,
}

/// How much may be under way at once, from each node.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.requests) || !has(self.pending)",
    "message": "pending requests wait for others: say how many with requests",
}])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawLimits {
    /// Connections to the Service.
    #[cfg_attr(test, schemars(range(min = 1, max = 1_000_000)))]
    connections: Option<u32>,
    /// Requests that are at its endpoints.
    #[cfg_attr(test, schemars(range(min = 1, max = 1_000_000)))]
    requests: Option<u32>,
    /// Requests that wait until one of those is answered; left out: none.
    #[cfg_attr(test, schemars(range(max = 1_000_000)))]
    pending: Option<u32>,
}

/// Which endpoints are left alone for a while.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.failurePercent) || !(has(self.minimumRequests) || has(self.window))",
    "message": "minimumRequests and window are of a share: say which one with failurePercent",
}])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawEjection {
    /// After so many failures in a row: 5, if it is not said.
    #[cfg_attr(test, schemars(range(min = 1, max = 1_000_000)))]
    failures: Option<u32>,
    /// For how long the first time: 10s, if it is not said. Twice as long each time that follows without a success.
    #[cfg_attr(test, schemars(length(max = 32)))]
    time: Option<String>,
    /// For how long at most: 5m, if it is not said.
    #[cfg_attr(test, schemars(length(max = 32)))]
    max_time: Option<String>,
    /// How many of the endpoints at most, percent: 50, if it is not said. One may always be.
    #[cfg_attr(test, schemars(range(max = 100)))]
    max_percent: Option<u32>,
    /// If fewer than this serve, percent, all are asked again: 0, if it is not said, is never.
    #[cfg_attr(test, schemars(range(max = 100)))]
    panic_percent: Option<u32>,
    /// Or when so many of its requests fail within the window, percent; left out: failures in a row alone count.
    #[cfg_attr(test, schemars(range(min = 1, max = 100)))]
    failure_percent: Option<u32>,
    /// Of at least so many requests within the window: 20, if it is not said.
    #[cfg_attr(test, schemars(range(min = 1, max = 1_000_000)))]
    minimum_requests: Option<u32>,
    /// The time within which they are counted: 30s, if it is not said; at least 1s.
    #[cfg_attr(test, schemars(length(max = 32)))]
    window: Option<String>,
    /// Or when it answers 429 or 503 with Retry-After: until then, for so long at most, such as 30s; left out: for nobody's
    /// word.
    #[cfg_attr(test, schemars(length(max = 32)))]
    retry_after: Option<String>,
}

/// What goes wrong on purpose.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.delay) != has(self.abort)",
    "message": "write one of delay and abort",
}])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawFault {
    /// Of the requests that it is for, percent, with up to two decimals: all, if it is not said.
    #[cfg_attr(test, schemars(range(min = 0.0, max = 100.0)))]
    percent: Option<f64>,
    /// The requests that have all of these headers; left out: all requests.
    #[cfg_attr(test, schemars(length(max = 16)))]
    #[serde(default)]
    headers: Vec<RawFaultHeader>,
    /// The request waits for so long before it goes on, such as 2s.
    #[cfg_attr(test, schemars(length(max = 32)))]
    delay: Option<String>,
    /// The request is answered with this, and goes nowhere.
    abort: Option<RawAbort>,
}

/// A header of a request.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RawFaultHeader {
    /// Its name.
    #[cfg_attr(test, schemars(length(min = 1, max = 256)))]
    name: String,
    /// Its value.
    #[cfg_attr(test, schemars(length(max = 1024)))]
    value: String,
}

/// What a request is answered with.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.status) != has(self.grpcStatus)",
    "message": "write one of status and grpcStatus",
}])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawAbort {
    /// A status, from 200 to 599.
    #[cfg_attr(test, schemars(range(min = 200, max = 599)))]
    status: Option<u16>,
    /// A status of gRPC, by number.
    #[cfg_attr(test, schemars(range(max = 16)))]
    grpc_status: Option<u16>,
}

impl Check<'_> {
    pub(super) fn traffic_policy(&mut self, raw: Raw<RawTrafficPolicy>) -> Object {
        let name = self.namespaced(&raw.metadata);
        let created = self.created(&raw.metadata);
        let spec = raw.spec;
        let field = "spec.targetRefs";
        self.limit(field, spec.target_refs.len(), MAX_LIST);
        if spec.target_refs.is_empty() {
            self.problem(field, "the policy is for nothing", "name a Service, a route or the namespace");
        }
        let targets = spec.target_refs.into_iter().take(MAX_LIST).enumerate();
        let targets: Vec<TrafficTarget> = targets
            .filter_map(|(index, raw)| self.target_ref(&format!("{field}[{index}]"), &name.namespace, raw))
            .collect();
        let traffic = Traffic {
            balancing: spec.balancing.map(|raw| self.balancing(raw)),
            timeouts: spec.timeouts.map(|raw| self.timeouts("spec.timeouts", Some(raw))),
            retries: spec.retries.map(|raw| self.retries(raw)),
            limits: spec.limits.map(|raw| self.limits(raw)),
            ejection: spec.ejection.map(|raw| self.ejection(raw)),
            faults: spec.faults.map(|raw| self.faults(raw)),
            hedge: spec.hedge.map(|raw| self.hedge(raw)),
            reads_requests: false,
        };
        let health_check = spec.health_check.map(|raw| self.health_check(raw));
        let takes = self.takes(&name, spec.rate_limits, spec.size_limits);
        self.takers(&takes, &targets);
        if traffic.is_empty() && health_check.is_none() && takes.is_empty() {
            let cure = "write balancing, timeouts, retries, limits, ejection, faults, hedge, healthCheck, rateLimits or sizeLimits";
            self.problem("spec", "the policy says nothing", cure);
        }
        if targets.iter().any(|it| matches!(it, TrafficTarget::Route { .. })) {
            let of_endpoints = [
                ("balancing", traffic.balancing.is_some()),
                ("limits", traffic.limits.is_some()),
                ("ejection", traffic.ejection.is_some()),
                ("healthCheck", health_check.is_some()),
            ];
            for (part, _) in of_endpoints.iter().filter(|(_, says)| *says) {
                let reason = "a route has no endpoints: this is said of Services";
                let cure = "write it in a policy for the Service that the route leads to";
                self.problem(&format!("spec.{part}"), reason, cure);
            }
        }
        let speaks = health_check.as_ref().is_some_and(|it| it.probe != Probe::Tcp);
        if speaks && targets.contains(&TrafficTarget::Namespace) {
            let reason = "not all ports of a namespace answer that";
            let cure = "name the Services that do, or write tcp: {}";
            self.problem("spec.healthCheck", reason, cure);
        }
        Object::TrafficPolicy(TrafficPolicy { name, created, targets, traffic, health_check, takes }.into())
    }

    fn target_ref(&mut self, at: &str, namespace: &str, raw: RawTarget) -> Option<TrafficTarget> {
        let RawTarget { group, kind, name, section_name: section } = raw;
        self.name(&format!("{at}.name"), &name);
        if let Some(section) = &section {
            self.name(&format!("{at}.sectionName"), section);
        }
        let (of_kind, target) = match kind.as_str() {
            "Service" => ("", TrafficTarget::Service { name, port: section }),
            "HTTPRoute" => {
                (GATEWAY_GROUP, TrafficTarget::Route { kind: RouteKind::Http, name, rule: section })
            }
            "GRPCRoute" => {
                (GATEWAY_GROUP, TrafficTarget::Route { kind: RouteKind::Grpc, name, rule: section })
            }
            "Namespace" => {
                if name != namespace {
                    let reason = format!("the policy is of namespace {namespace}, and speaks of that alone");
                    self.problem(&format!("{at}.name"), reason, format!("write name: {namespace}"));
                }
                if section.is_some() {
                    self.problem(&format!("{at}.sectionName"), "a namespace has no sections", "remove it");
                }
                ("", TrafficTarget::Namespace)
            }
            "TLSRoute" | "TCPRoute" => {
                let reason = format!("nothing can be said of a {kind}, whose connections are not read");
                let cure = "write kind: Service, and the name of the Service that it is for, or leads to";
                self.problem(&format!("{at}.kind"), reason, cure);
                return None;
            }
            other => {
                let cure = one_of(other, &["Service", "HTTPRoute", "GRPCRoute", "Namespace"]);
                self.problem(&format!("{at}.kind"), format!("'{other}' is nothing that is sent to"), cure);
                return None;
            }
        };
        if group.as_deref().is_some_and(|group| group != of_kind) {
            let cure = format!("write group: \"{of_kind}\", or leave it out");
            self.problem(&format!("{at}.group"), format!("a {kind} is not of this group"), cure);
        }
        Some(target)
    }

    fn balancing(&mut self, raw: RawBalancing) -> Balancing {
        let at = "spec.balancing";
        let algorithm = match raw.algorithm.as_deref().unwrap_or("LeastLatency") {
            "LeastLatency" => Algorithm::LeastLatency,
            "LeastRequests" => Algorithm::LeastRequests,
            "RoundRobin" => Algorithm::RoundRobin,
            "Random" => Algorithm::Random,
            "Hash" => match &raw.hash_by {
                Some(by) => self.hash_by(&format!("{at}.hashBy"), by),
                None => {
                    let cure = "write hashBy: {type: Header, name: x-user}, Cookie or Source";
                    self.problem(&format!("{at}.hashBy"), "Hash needs to know by what", cure);
                    Algorithm::default()
                }
            },
            other => {
                let cure = one_of(other, &["LeastLatency", "LeastRequests", "RoundRobin", "Random", "Hash"]);
                self.problem(&format!("{at}.algorithm"), format!("'{other}' is no algorithm"), cure);
                Algorithm::default()
            }
        };
        if raw.hash_by.is_some() && !matches!(algorithm, Algorithm::Hash(_)) {
            self.problem(&format!("{at}.algorithm"), "hashBy is for Hash alone", "write algorithm: Hash");
        }
        let slow_start = raw.slow_start.and_then(|text| self.time(&format!("{at}.slowStart"), &text));
        Balancing { algorithm, slow_start: slow_start.filter(|time| !time.is_zero()) }
    }

    fn hash_by(&mut self, at: &str, raw: &RawHashBy) -> Algorithm {
        let field = format!("{at}.name");
        let by = match (raw.r#type.as_str(), &raw.name) {
            ("Source", None) => HashBy::Source,
            ("Source", Some(_)) => {
                self.problem(&field, "an address has no name", "remove it");
                HashBy::Source
            }
            ("Header", Some(name)) => {
                self.field_name(&field, name);
                HashBy::Header(name.to_ascii_lowercase())
            }
            ("Cookie", Some(name)) => {
                self.field_name(&field, name);
                HashBy::Cookie(name.clone())
            }
            (kind @ ("Header" | "Cookie"), None) => {
                self.problem(&field, "this field is missing", format!("write which {}", kind.to_lowercase()));
                HashBy::Source
            }
            (other, _) => {
                let cure = one_of(other, &["Header", "Cookie", "Source"]);
                self.problem(&format!("{at}.type"), format!("'{other}' has no value"), cure);
                HashBy::Source
            }
        };
        Algorithm::Hash(by)
    }

    fn retries(&mut self, raw: RawRetries) -> Retries {
        let at = "spec.retries";
        self.failures(&format!("{at}.codes"), &raw.codes);
        self.limit(&format!("{at}.grpcCodes"), raw.grpc_codes.len(), MAX_LIST);
        for (index, code) in raw.grpc_codes.iter().take(MAX_LIST).enumerate() {
            if !(1..=LAST_GRPC_STATUS).contains(code) {
                let reason = format!("{code} is no failure of gRPC");
                self.problem(&format!("{at}.grpcCodes[{index}]"), reason, "write numbers from 1 to 16");
            }
        }
        let budget = self.budget(&format!("{at}.budget"), raw.budget);
        let attempts = raw.attempts.unwrap_or(2);
        self.at_most(&format!("{at}.attempts"), attempts, MAX_ATTEMPTS);
        let every_method = match raw.methods.as_deref().unwrap_or("Safe") {
            "Safe" => false,
            "Every" => true,
            other => {
                let cure = one_of(other, &["Safe", "Every"]);
                self.problem(&format!("{at}.methods"), format!("'{other}' is neither Safe nor Every"), cure);
                false
            }
        };
        let backoff = raw.backoff.and_then(|text| self.time(&format!("{at}.backoff"), &text));
        Retries {
            attempts,
            codes: raw.codes,
            grpc_codes: raw.grpc_codes,
            every_method,
            backoff: backoff.unwrap_or(Duration::from_millis(25)),
            budget,
        }
    }

    fn budget(&mut self, at: &str, raw: Option<RawBudget>) -> RetryBudget {
        let usual = RetryBudget::default();
        let Some(raw) = raw else { return usual };
        let percent = raw.percent.unwrap_or(usual.percent);
        self.at_most(&format!("{at}.percent"), percent, 100);
        let per_second = raw.per_second.unwrap_or(usual.per_second);
        self.at_most(&format!("{at}.perSecond"), per_second, MAX_UNDERWAY);
        RetryBudget { percent, per_second }
    }

    fn hedge(&mut self, raw: RawHedge) -> Hedge {
        let at = "spec.hedge";
        let field = format!("{at}.after");
        let after = self.time(&field, &raw.after);
        if after.is_some_and(|time| time.is_zero()) {
            let cure = "write what few requests take, such as 100ms";
            self.problem(&field, "every request would be made twice", cure);
        }
        self.limit(&format!("{at}.calls"), raw.calls.len(), MAX_CALLS);
        for (index, call) in raw.calls.iter().take(MAX_CALLS).enumerate() {
            let name = |text: &str| {
                !text.is_empty()
                    && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'))
            };
            let field = format!("{at}.calls[{index}]");
            if call.len() > MAX_CALL
                || !call.split_once('/').is_some_and(|(service, method)| name(service) && name(method))
            {
                let cure = "write package.Service/Method, such as shop.v1.Cart/Get";
                self.problem(&field, "this is not the name of a call", cure);
            }
        }
        let budget = self.budget(&format!("{at}.budget"), raw.budget);
        Hedge { after: after.unwrap_or(MAX_TIME), calls: raw.calls, budget }
    }

    fn limits(&mut self, raw: RawLimits) -> Limits {
        let at = "spec.limits";
        for (field, number) in [("connections", raw.connections), ("requests", raw.requests)] {
            let Some(number) = number else { continue };
            if number == 0 {
                let cure = "write at least 1; to let nothing through, write an AuthorizationPolicy";
                self.problem(&format!("{at}.{field}"), "with 0 nothing could be sent at all", cure);
            }
            self.at_most(&format!("{at}.{field}"), number, MAX_UNDERWAY);
        }
        let pending = raw.pending.unwrap_or(0);
        self.at_most(&format!("{at}.pending"), pending, MAX_UNDERWAY);
        if raw.pending.is_some() && raw.requests.is_none() {
            let cure = "write requests: after how many others wait";
            self.problem(&format!("{at}.requests"), "requests wait only where there is a limit", cure);
        }
        if raw.connections.is_none() && raw.requests.is_none() && raw.pending.is_none() {
            self.problem(at, "it limits nothing", "write connections or requests");
        }
        Limits { connections: raw.connections, requests: raw.requests, pending }
    }

    fn ejection(&mut self, raw: RawEjection) -> Ejection {
        let at = "spec.ejection";
        let failures = raw.failures.unwrap_or(5);
        if failures == 0 {
            let cure = "write at least 1, or remove ejection";
            self.problem(&format!("{at}.failures"), "who has not failed cannot be left alone", cure);
        }
        let share = self.failure_share(at, &raw);
        let base = raw.time.and_then(|text| self.time(&format!("{at}.time"), &text));
        let base = base.unwrap_or(Duration::from_secs(10));
        let most = raw.max_time.and_then(|text| self.time(&format!("{at}.maxTime"), &text));
        let most = most.unwrap_or(Duration::from_secs(300).max(base));
        if most < base {
            let cure = "write at least what 'time' says";
            self.problem(&format!("{at}.maxTime"), "it is less than the first time", cure);
        }
        let most_percent = raw.max_percent.unwrap_or(50);
        self.at_most(&format!("{at}.maxPercent"), most_percent, 100);
        let panic_percent = raw.panic_percent.unwrap_or(0);
        self.at_most(&format!("{at}.panicPercent"), panic_percent, 100);
        let field = format!("{at}.retryAfter");
        let retry_after = raw.retry_after.and_then(|text| self.time(&field, &text));
        if retry_after.is_some_and(|time| time.is_zero()) {
            let cure = "write how long at most, or remove it";
            self.problem(&field, "it would be left alone for no time", cure);
        }
        Ejection { failures, base, most, most_percent, panic_percent, share, retry_after }
    }

    fn failure_share(&mut self, at: &str, raw: &RawEjection) -> Option<FailureShare> {
        let Some(percent) = raw.failure_percent else {
            if raw.minimum_requests.is_some() || raw.window.is_some() {
                let reason = "minimumRequests and window are of a share: failures in a row need none";
                let cure = "write from which share on an endpoint is left alone, or remove them";
                self.problem(&format!("{at}.failurePercent"), reason, cure);
            }
            return None;
        };
        if percent == 0 {
            let cure = "write a number from 1 to 100, or remove it";
            self.problem(&format!("{at}.failurePercent"), "whoever fails at nothing has this share", cure);
        }
        self.at_most(&format!("{at}.failurePercent"), percent, 100);
        let minimum = raw.minimum_requests.unwrap_or(20);
        if minimum == 0 {
            let cure = "write at least 1";
            self.problem(&format!("{at}.minimumRequests"), "of no requests there is no share", cure);
        }
        self.at_most(&format!("{at}.minimumRequests"), minimum, MAX_UNDERWAY);
        let field = format!("{at}.window");
        let window = raw.window.as_ref().and_then(|text| self.time(&field, text));
        let window = window.unwrap_or(Duration::from_secs(30));
        if window < LEAST_WINDOW {
            self.problem(&field, format!("{window:?} is too short to count in"), "write at least 1s");
        }
        Some(FailureShare { percent, minimum, window })
    }

    fn faults(&mut self, raw: Vec<RawFault>) -> Vec<Fault> {
        self.limit("spec.faults", raw.len(), MAX_LIST);
        let raw = raw.into_iter().take(MAX_LIST).enumerate();
        raw.filter_map(|(index, raw)| self.fault(&format!("spec.faults[{index}]"), raw)).collect()
    }

    fn fault(&mut self, at: &str, raw: RawFault) -> Option<Fault> {
        let percent = raw.percent.unwrap_or(100.0);
        if !(0.0..=100.0).contains(&percent) {
            let reason = format!("{percent} is no share of a whole");
            self.problem(&format!("{at}.percent"), reason, "write a number from 0 to 100");
            return None;
        }
        let headers = self.fault_headers(&format!("{at}.headers"), raw.headers);
        let effect = match (raw.delay, raw.abort) {
            (Some(delay), None) => FaultEffect::Delay(self.time(&format!("{at}.delay"), &delay)?),
            (None, Some(RawAbort { status: Some(status), grpc_status: None })) => {
                if !(200..600).contains(&status) {
                    let reason = format!("{status} ends no request");
                    self.problem(&format!("{at}.abort.status"), reason, "write a status from 200 to 599");
                }
                FaultEffect::Abort(status)
            }
            (None, Some(RawAbort { status: None, grpc_status: Some(status) })) => {
                if status > LAST_GRPC_STATUS {
                    let reason = format!("{status} is no status of gRPC");
                    self.problem(&format!("{at}.abort.grpcStatus"), reason, "write a number from 0 to 16");
                }
                FaultEffect::AbortCall(status)
            }
            (None, Some(_)) => {
                let cure = "write either status: 503 or grpcStatus: 14";
                self.problem(&format!("{at}.abort"), "one answer is needed", cure);
                return None;
            }
            _ => {
                let cure = "write delay: 2s or abort: {status: 503}; for both, two faults";
                self.problem(&format!("{at}.delay"), "a fault is one of delay and abort", cure);
                return None;
            }
        };
        Some(Fault { of_ten_thousand: (percent * 100.0).round() as u32, headers, effect })
    }

    fn fault_headers(&mut self, at: &str, raw: Vec<RawFaultHeader>) -> Vec<(String, TextMatch)> {
        self.limit(at, raw.len(), MAX_LIST);
        let mut headers = vec![];
        for (index, RawFaultHeader { name, value }) in raw.into_iter().take(MAX_LIST).enumerate() {
            self.field_name(&format!("{at}[{index}].name"), &name);
            self.no_longer(&format!("{at}[{index}].value"), &value, MAX_VALUE);
            headers.push((name.to_ascii_lowercase(), TextMatch::Exact(value)));
        }
        headers
    }

    pub(super) fn at_most(&mut self, field: &str, number: u32, most: u32) {
        if number > most {
            self.problem(field, format!("{number} is too much"), format!("write at most {most}"));
        }
    }

    /// A duration that is not out of all proportion.
    pub(super) fn time(&mut self, field: &str, text: &str) -> Option<Duration> {
        let time = self.duration(field, text)?;
        if time > MAX_TIME {
            self.problem(field, format!("{text} is too long"), "write at most 1h");
        }
        Some(time)
    }
}
