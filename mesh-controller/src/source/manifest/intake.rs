//! What TrafficPolicies say of how much workloads take: rate limits and size limits. What they mean is told in
//! `docs/operate/traffic.md`.
//!
//! The agent of whoever takes a request keeps them. It knows which workload and port were asked, and neither the route that
//! led there nor whether all ports of a namespace speak HTTP: so they are said of Services alone.

use std::time::Duration;

use mesh_core::model::{
    Asks, Name,
    intake::{RateBy, RateLimit, Sizes},
};
use serde::Deserialize;

#[cfg(test)]
use super::asks::shape;
use super::{asks::RawHeader, check::Check, traffic::MAX_UNDERWAY};
use crate::{
    model::{Takes, TrafficTarget},
    source::document::one_of,
};

/// Most rate limits of a policy: each is looked at for each request.
const MAX_RATES: usize = 8;
/// Shortest time that tokens are counted in: clients are told of whole seconds.
const LEAST_PER: Duration = Duration::from_secs(1);
/// The longest head that an agent reads at all.
const MOST_HEAD: u32 = 128 * 1024;
/// A head that every request has.
const LEAST_HEAD: u32 = 256;
/// Largest limit of a body: one that is larger means nothing.
const MOST_BODY: u64 = 1 << 50;

/// How many requests a workload takes.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.by) == false || (self.by == 'Header') == has(self.header)",
    "message": "header is for by: Header, which needs it",
}])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawRateLimit {
    /// So many.
    #[cfg_attr(test, schemars(range(min = 1, max = 1_000_000)))]
    requests: u32,
    /// In this time: 1s, if it is not said; whole seconds, at most 1h.
    #[cfg_attr(test, schemars(length(max = 32)))]
    per: Option<String>,
    /// So many at once, after a time in which fewer came: as many as requests, if it is not said.
    #[cfg_attr(test, schemars(range(min = 1, max = 1_000_000)))]
    burst: Option<u32>,
    /// Who has as many of his own: All is all together; Identity, each identity that was proved; Header, requests with the
    /// same value of a header. If it is not said, Header where one is named, else All.
    #[cfg_attr(test, schemars(extend("enum" = ["All", "Identity", "Header"])))]
    by: Option<String>,
    /// Of by: Header: the header's name.
    #[cfg_attr(test, schemars(length(min = 1, max = 128)))]
    header: Option<String>,
    /// The requests that it counts; left out: all.
    r#match: Option<RawCounted>,
}

/// The requests that a limit counts: of each list that is there an entry has to match, and of the headers all.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawCounted {
    /// Methods: GET.
    #[cfg_attr(test, schemars(length(min = 1, max = 64), transform = shape::methods))]
    methods: Option<Vec<String>>,
    /// Hosts: shop.example, *.shop.example or shop.*; of every port, unless one is named.
    #[cfg_attr(test, schemars(length(min = 1, max = 64), transform = shape::hosts))]
    hosts: Option<Vec<String>>,
    /// Paths without query, with nothing percent-encoded: /cart, /cart/* or *.pdf.
    #[cfg_attr(test, schemars(length(min = 1, max = 64), transform = shape::paths))]
    paths: Option<Vec<String>>,
    /// Headers, all of which have to be so.
    #[cfg_attr(test, schemars(length(min = 1, max = 16)))]
    headers: Option<Vec<RawHeader>>,
}

/// How large a request may be that a workload takes.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawSizeLimits {
    /// Its head: its first line and all headers, bytes; a longer one is answered with 431.
    #[cfg_attr(test, schemars(range(min = 256, max = 131_072)))]
    header_bytes: Option<u32>,
    /// Its body, bytes; a longer one is answered with 413. 0: none at all.
    #[cfg_attr(test, schemars(range(max = 1_125_899_906_842_624_u64)))]
    body_bytes: Option<u64>,
}

impl Check<'_> {
    pub(super) fn takes(
        &mut self,
        policy: &Name,
        rates: Option<Vec<RawRateLimit>>,
        sizes: Option<RawSizeLimits>,
    ) -> Takes {
        let rates = rates.map(|rates| {
            self.limit("spec.rateLimits", rates.len(), MAX_RATES);
            let rates = (0u32..).zip(rates).take(MAX_RATES);
            rates.map(|(index, raw)| self.rate_limit(policy, index, raw)).collect()
        });
        Takes { rates, sizes: sizes.map(|raw| self.size_limits(&raw)) }
    }

    /// Of what such limits cannot be said.
    pub(super) fn takers(&mut self, takes: &Takes, targets: &[TrafficTarget]) {
        let is_route = |it: &TrafficTarget| matches!(it, TrafficTarget::Route { .. });
        let is_namespace = |it: &TrafficTarget| matches!(it, TrafficTarget::Namespace);
        let parts = [("rateLimits", takes.rates.is_some()), ("sizeLimits", takes.sizes.is_some())];
        for (part, _) in parts.iter().filter(|(_, says)| *says) {
            let field = format!("spec.{part}");
            if targets.iter().any(is_route) {
                let reason = "the agent of whoever takes a request knows no routes: this is said of Services";
                let cure = "write it in a policy for the Service that the route leads to; rateLimits[].match \
                            names paths, methods, hosts and headers";
                self.problem(&field, reason, cure);
            }
            if targets.iter().any(is_namespace) {
                let reason = "what takes such a limit has to speak HTTP, which a namespace does not say of all its \
                              ports";
                let cure = "name the Services in targetRefs, and with sectionName their ports";
                self.problem(&field, reason, cure);
            }
        }
    }

    fn rate_limit(&mut self, policy: &Name, index: u32, raw: RawRateLimit) -> RateLimit {
        let at = format!("spec.rateLimits[{index}]");
        let RawRateLimit { requests, per, burst, by, header, r#match: counted } = raw;
        for (field, number) in [("requests", Some(requests)), ("burst", burst)] {
            let (field, Some(number)) = (format!("{at}.{field}"), number) else { continue };
            if number == 0 {
                let cure = "write at least 1; to let nothing through, write an AuthorizationPolicy";
                self.problem(&field, "with 0 nothing could come at all", cure);
            }
            self.at_most(&field, number, MAX_UNDERWAY);
        }
        let field = format!("{at}.per");
        let per = per.and_then(|text| self.time(&field, &text)).unwrap_or(LEAST_PER);
        if per < LEAST_PER || per.subsec_nanos() != 0 {
            let cure = "write whole seconds, such as 1s or 1m, and so many more or fewer requests";
            self.problem(&field, format!("{per:?} is not of whole seconds, as clients are told it"), cure);
        }
        RateLimit {
            policy: policy.clone(),
            index,
            by: self.rate_by(&at, by.as_deref(), header),
            requests,
            per,
            burst: burst.unwrap_or(requests),
            only: counted.map(|raw| self.counted(&format!("{at}.match"), raw)).unwrap_or_default(),
        }
    }

    fn rate_by(&mut self, at: &str, by: Option<&str>, header: Option<String>) -> RateBy {
        let field = format!("{at}.header");
        match (by.unwrap_or(if header.is_some() { "Header" } else { "All" }), header) {
            ("All", None) => RateBy::All,
            ("Identity", None) => RateBy::Identity,
            ("Header", Some(name)) => {
                self.field_name(&field, &name);
                RateBy::Header(name.to_ascii_lowercase())
            }
            ("Header", None) => {
                self.problem(&field, "this field is missing", "write whose values are told apart: x-tenant");
                RateBy::All
            }
            ("All" | "Identity", Some(_)) => {
                let cure = "write by: Header, or remove it";
                self.problem(&field, "a header is for by: Header alone", cure);
                RateBy::All
            }
            (other, _) => {
                let cure = one_of(other, &["All", "Identity", "Header"]);
                self.problem(&format!("{at}.by"), format!("'{other}' tells nobody apart"), cure);
                RateBy::All
            }
        }
    }

    fn counted(&mut self, at: &str, raw: RawCounted) -> Asks {
        let only = Asks {
            methods: self.list(&format!("{at}.methods"), raw.methods, Self::method),
            hosts: self.list(&format!("{at}.hosts"), raw.hosts, Self::host),
            paths: self.list(&format!("{at}.paths"), raw.paths, Self::path),
            headers: self.list(&format!("{at}.headers"), raw.headers, Self::header),
            claims: vec![],
        };
        if only.is_empty() {
            self.problem(
                at,
                "it says nothing of requests",
                "write methods, hosts, paths or headers, or remove it",
            );
        }
        only
    }

    fn size_limits(&mut self, raw: &RawSizeLimits) -> Sizes {
        let at = "spec.sizeLimits";
        if let Some(head) = raw.header_bytes
            && !(LEAST_HEAD..=MOST_HEAD).contains(&head)
        {
            let cure = format!("write {LEAST_HEAD} to {MOST_HEAD}: longer heads are never taken");
            self.problem(&format!("{at}.headerBytes"), format!("{head} bytes are no such limit"), cure);
        }
        if let Some(body) = raw.body_bytes.filter(|bytes| *bytes > MOST_BODY) {
            let cure = "leave it out, if bodies may be of any length";
            self.problem(&format!("{at}.bodyBytes"), format!("{body} is too much"), cure);
        }
        if raw.header_bytes.is_none() && raw.body_bytes.is_none() {
            self.problem(at, "it limits nothing", "write headerBytes or bodyBytes");
        }
        Sizes { head: raw.header_bytes, body: raw.body_bytes }
    }
}
