//! `healthCheck` of a TrafficPolicy. Stands apart from the other parts, which clients' agents follow: this one is for the
//! agents of the nodes where the endpoints are.

use std::time::Duration;

use mesh_core::model::health::{HealthCheck, Pace, Probe};
use serde::Deserialize;

use crate::source::manifest::check::Check;

/// Shortest time from one check to the next.
const LEAST_INTERVAL: Duration = Duration::from_secs(1);
/// Most answers in a row that are waited for.
const MAX_AFTER: u32 = 100;
/// Most statuses.
const MAX_STATUSES: usize = 64;
/// Longest path and name.
const MAX_PATH: usize = 1024;
const MAX_NAME: usize = 253;
/// The statuses of a healthy endpoint where nobody says which.
const USUAL_STATUSES: (u16, u16) = (200, 399);

/// How endpoints are checked, each by the agent of its own node; what is unhealthy takes nothing while others are well.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.http) ? 1 : 0) + (has(self.grpc) ? 1 : 0) + (has(self.tcp) ? 1 : 0) == 1",
    "message": "write one of http, grpc and tcp",
}])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawHealthCheck {
    /// A GET of HTTP/1.1 has to be answered.
    http: Option<RawHttpProbe>,
    /// grpc.health.v1.Health/Check has to say SERVING.
    grpc: Option<RawGrpcProbe>,
    /// A connection has to be taken.
    tcp: Option<RawTcpProbe>,
    /// The port that is asked: the one at which the endpoint serves, if it is not said.
    #[cfg_attr(test, schemars(range(min = 1)))]
    port: Option<u16>,
    /// From one check to the next: 5s, if it is not said; at least 1s.
    #[cfg_attr(test, schemars(length(max = 32)))]
    interval: Option<String>,
    /// What has not answered by then has failed: 1s, if it is not said; at most the interval.
    #[cfg_attr(test, schemars(length(max = 32)))]
    timeout: Option<String>,
    /// So many failures in a row make an endpoint unhealthy: 3, if it is not said.
    #[cfg_attr(test, schemars(range(min = 1, max = 100)))]
    unhealthy_after: Option<u32>,
    /// So many successes in a row make it healthy again: 2, if it is not said.
    #[cfg_attr(test, schemars(range(min = 1, max = 100)))]
    healthy_after: Option<u32>,
    /// If fewer than this are healthy, percent, all are asked: 0, if it is not said. If none is, all are in any case.
    #[cfg_attr(test, schemars(range(max = 100)))]
    panic_percent: Option<u32>,
}

/// A GET.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RawHttpProbe {
    /// Its path, such as /healthz.
    #[cfg_attr(test, schemars(length(min = 1, max = 1024)))]
    path: String,
    /// The header Host: the endpoint's address, if it is not said.
    #[cfg_attr(test, schemars(length(min = 1, max = 253)))]
    host: Option<String>,
    /// The statuses of a healthy endpoint: 200 to 399, if it is not said.
    #[cfg_attr(test, schemars(length(max = 64)))]
    #[serde(default)]
    statuses: Vec<u16>,
}

/// A call.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RawGrpcProbe {
    /// The service that is asked for: the server as a whole, if it is not said.
    #[cfg_attr(test, schemars(length(max = 253)))]
    service: Option<String>,
}

/// A connection.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RawTcpProbe {}

impl Check<'_> {
    pub(super) fn health_check(&mut self, raw: RawHealthCheck) -> HealthCheck {
        let at = "spec.healthCheck";
        let pace = self.pace(at, &raw);
        let panic_percent = raw.panic_percent.unwrap_or(0);
        self.at_most(&format!("{at}.panicPercent"), panic_percent, 100);
        if raw.port == Some(0) {
            self.problem(&format!("{at}.port"), "0 is not a port", "write a number from 1 to 65535");
        }
        let probe = match (raw.http, raw.grpc, raw.tcp) {
            (Some(http), None, None) => self.http_probe(&format!("{at}.http"), http),
            (None, Some(RawGrpcProbe { service }), None) => {
                let service = service.unwrap_or_default();
                self.printable(&format!("{at}.grpc.service"), &service);
                Probe::Grpc { service }
            }
            (None, None, Some(RawTcpProbe {})) => Probe::Tcp,
            _ => {
                let cure = "write http: {path: /healthz}, grpc: {} or tcp: {}";
                self.problem(&format!("{at}.http"), "an endpoint is asked in one way", cure);
                Probe::Tcp
            }
        };
        HealthCheck { probe, port: raw.port, pace, panic_percent }
    }

    fn pace(&mut self, at: &str, raw: &RawHealthCheck) -> Pace {
        let field = format!("{at}.interval");
        let interval = raw.interval.as_ref().and_then(|text| self.time(&field, text));
        let interval = interval.unwrap_or(Duration::from_secs(5));
        if interval < LEAST_INTERVAL {
            self.problem(&field, format!("{interval:?} is too often"), "write at least 1s");
        }
        let field = format!("{at}.timeout");
        let timeout = raw.timeout.as_ref().and_then(|text| self.time(&field, text));
        let timeout = timeout.unwrap_or(LEAST_INTERVAL);
        if timeout.is_zero() {
            self.problem(&field, "nobody answers within no time", "write at least 1ms");
        } else if timeout > interval && interval >= LEAST_INTERVAL {
            let reason = "the next check would begin before this one has ended";
            self.problem(&field, reason, "write at most what 'interval' says");
        }
        let mut after = |name: &str, said: Option<u32>, usual| {
            let (field, number) = (format!("{at}.{name}"), said.unwrap_or(usual));
            if number == 0 {
                self.problem(&field, "after no answer nothing is known", "write at least 1");
            }
            self.at_most(&field, number, MAX_AFTER);
            number
        };
        let unhealthy_after = after("unhealthyAfter", raw.unhealthy_after, 3);
        let healthy_after = after("healthyAfter", raw.healthy_after, 2);
        Pace { interval, timeout, unhealthy_after, healthy_after }
    }

    fn http_probe(&mut self, at: &str, raw: RawHttpProbe) -> Probe {
        let RawHttpProbe { path, host, statuses } = raw;
        let field = format!("{at}.path");
        self.no_longer(&field, &path, MAX_PATH);
        // RFC 3986, section 3.3 and 3.4.
        let is_of_path = |it: char| it.is_ascii_alphanumeric() || "/-._~!$&'()*+,;=:@%?".contains(it);
        if !path.starts_with('/') || !path.chars().all(is_of_path) {
            let reason = format!("'{path}' is not the path of a request");
            self.problem(&field, reason, "write one such as /healthz, with other characters as %XX");
        }
        if let Some(host) = &host {
            let field = format!("{at}.host");
            self.no_longer(&field, host, MAX_NAME);
            let is_of_host = |it: char| it.is_ascii_alphanumeric() || "-._:[]".contains(it);
            if host.is_empty() || !host.chars().all(is_of_host) {
                self.problem(&field, format!("'{host}' is no host"), "write one such as pay.example.com");
            }
        }
        self.limit(&format!("{at}.statuses"), statuses.len(), MAX_STATUSES);
        for (index, status) in statuses.iter().take(MAX_STATUSES).enumerate() {
            if !(200..600).contains(status) {
                let reason = format!("{status} ends no request");
                self.problem(&format!("{at}.statuses[{index}]"), reason, "write statuses from 200 to 599");
            }
        }
        let statuses = match statuses.is_empty() {
            true => vec![USUAL_STATUSES],
            false => statuses.into_iter().map(|status| (status, status)).collect(),
        };
        Probe::Http { path, host, statuses }
    }

    fn printable(&mut self, field: &str, text: &str) {
        self.no_longer(field, text, MAX_NAME);
        if !text.chars().all(|it| it.is_ascii_graphic()) {
            self.problem(field, format!("'{text}' is no service of gRPC"), "write one such as shop.v1.Pay");
        }
    }
}
