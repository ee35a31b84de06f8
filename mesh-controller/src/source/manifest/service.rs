//! Services: the addresses and ports that clients use.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use mesh_core::model::Distribution;
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, Unexpected, Visitor},
};

use super::{
    super::document::one_of,
    Raw,
    check::{Check, MAX_ENTRIES, MAX_LABEL},
};
use crate::model::{Object, Port, Service};

/// For how long a client keeps its endpoint if nobody says it, and at most, seconds (Kubernetes, `ClientIPConfig`).
const DEFAULT_AFFINITY: u32 = 10_800;
const MAX_AFFINITY: u32 = 86_400;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawService {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(default, rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    #[serde(default)]
    selector: BTreeMap<String, String>,
    #[serde(default)]
    ports: Vec<RawPort>,
    #[serde(rename = "type")]
    service_type: Option<String>,
    session_affinity: Option<String>,
    session_affinity_config: Option<RawAffinityConfig>,
    #[serde(rename = "ipFamilies")]
    _ip_families: Option<IgnoredAny>,
    #[serde(rename = "ipFamilyPolicy")]
    _ip_family_policy: Option<IgnoredAny>,
    internal_traffic_policy: Option<String>,
    traffic_distribution: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAffinityConfig {
    #[serde(rename = "clientIP")]
    client_ip: Option<RawClientIp>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawClientIp {
    timeout_seconds: Option<u32>,
}

/// What the workloads listen on: a number, or the name that they have for one.
#[derive(Debug)]
enum RawTarget {
    Number(u16),
    Name(String),
}

impl<'de> Deserialize<'de> for RawTarget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Scalar;
        impl Visitor<'_> for Scalar {
            type Value = RawTarget;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port such as 8080, or the name that the workloads have for it")
            }
            fn visit_u64<E: Error>(self, number: u64) -> Result<RawTarget, E> {
                let port = u16::try_from(number);
                port.map(RawTarget::Number).map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &self))
            }
            fn visit_i64<E: Error>(self, number: i64) -> Result<RawTarget, E> {
                let port = u16::try_from(number);
                port.map(RawTarget::Number).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<RawTarget, E> {
                Ok(RawTarget::Name(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Scalar)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPort {
    name: Option<String>,
    port: u16,
    target_port: Option<RawTarget>,
    protocol: Option<String>,
    #[serde(rename = "appProtocol")]
    _app_protocol: Option<IgnoredAny>,
    #[serde(rename = "nodePort")]
    _node_port: Option<IgnoredAny>,
}

impl Check<'_> {
    pub(super) fn service(&mut self, raw: Raw<RawService>) -> Object {
        let name = self.namespaced(&raw.metadata);
        self.our_labels(&raw.metadata.labels, &[]);
        let spec = raw.spec;
        if spec.service_type.as_deref() == Some("ExternalName") {
            self.problem(
                "spec.type",
                "a Service that is another name for something outside is not supported",
                "remove the document, or give the Service a selector and a clusterIP",
            );
        }
        let config = spec.session_affinity_config.and_then(|config| config.client_ip);
        let affinity =
            self.affinity(spec.session_affinity.as_deref(), config.and_then(|it| it.timeout_seconds));
        let distribution =
            self.distribution(spec.internal_traffic_policy.as_deref(), spec.traffic_distribution.as_deref());
        let mut addresses = match spec.cluster_ip.as_deref() {
            None | Some("None" | "") => vec![],
            Some(address) => self.address("spec.clusterIP", address).into_iter().collect(),
        };
        let headless = spec.cluster_ips.iter().any(|address| address == "None");
        let more = if headless { vec![] } else { self.addresses("spec.clusterIPs", &spec.cluster_ips) };
        addresses.extend(more);
        let mut seen = BTreeSet::new();
        addresses.retain(|address| seen.insert(*address));
        self.labels("spec.selector", &spec.selector);
        self.limit("spec.ports", spec.ports.len(), MAX_ENTRIES);
        let (selector, ports) = (spec.selector, self.ports(spec.ports));
        Object::Service(Service { name, addresses, selector, ports, distribution, affinity })
    }

    /// For how long a client keeps its endpoint.
    fn affinity(&mut self, kind: Option<&str>, seconds: Option<u32>) -> Option<u32> {
        let seconds = seconds.unwrap_or(DEFAULT_AFFINITY);
        if !(1..=MAX_AFFINITY).contains(&seconds) {
            self.problem(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                format!("{seconds} s is no time that a client can keep its endpoint for"),
                format!("write 1 to {MAX_AFFINITY} (a day)"),
            );
        }
        match kind {
            None | Some("None") => None,
            Some("ClientIP") => Some(seconds),
            Some(other) => {
                let cure = one_of(other, &["ClientIP", "None"]);
                self.problem("spec.sessionAffinity", format!("'{other}' is not an affinity"), cure);
                None
            }
        }
    }

    /// How near endpoints have to be: what is wanted within a node comes before what is preferred.
    fn distribution(&mut self, internal: Option<&str>, preferred: Option<&str>) -> Distribution {
        let only = match internal {
            None | Some("Cluster") => false,
            Some("Local") => true,
            Some(other) => {
                let cure = one_of(other, &["Cluster", "Local"]);
                self.problem("spec.internalTrafficPolicy", format!("'{other}' is not a policy"), cure);
                false
            }
        };
        let preferred = match preferred {
            None => Distribution::Any,
            Some("PreferSameZone" | "PreferClose") => Distribution::SameZone,
            Some("PreferSameNode") => Distribution::SameNode,
            Some(other) => {
                let cure = one_of(other, &["PreferSameZone", "PreferSameNode", "PreferClose"]);
                self.problem("spec.trafficDistribution", format!("'{other}' is not a distribution"), cure);
                Distribution::Any
            }
        };
        if only { Distribution::OnlySameNode } else { preferred }
    }

    fn ports(&mut self, raw: Vec<RawPort>) -> Vec<Port> {
        let mut ports: Vec<Port> = Vec::new();
        for (index, raw) in raw.into_iter().enumerate() {
            let field = format!("spec.ports[{index}]");
            if !self.is_tcp(&field, raw.protocol.as_deref()) {
                continue;
            }
            let target = self.target_port(&format!("{field}.targetPort"), raw.target_port, raw.port);
            if raw.name.as_ref().is_some_and(|name| name.len() > MAX_LABEL) {
                let reason = format!("a port's name has at most {MAX_LABEL} characters");
                self.problem(&format!("{field}.name"), reason, "shorten it");
            }
            self.port(&format!("{field}.port"), raw.port);
            if ports.iter().any(|port| port.port == raw.port) {
                self.problem(
                    &format!("{field}.port"),
                    format!("port {} stands here twice", raw.port),
                    "remove one of them",
                );
            }
            ports.push(Port { name: raw.name.unwrap_or_default(), port: raw.port, target });
        }
        ports
    }

    fn target_port(&mut self, field: &str, raw: Option<RawTarget>, port: u16) -> Option<u16> {
        match raw {
            None => Some(port),
            Some(RawTarget::Number(number)) => {
                self.port(field, number);
                Some(number)
            }
            Some(RawTarget::Name(name)) => {
                if !is_port_name(&name) {
                    let shown: String = name.chars().take(100).collect();
                    let cure =
                        "write a number, or a name of up to 15 of a-z, 0-9 and '-' with a letter in it";
                    self.problem(field, format!("'{shown}' is not a port"), cure);
                }
                None
            }
        }
    }

    /// Whether a port is one of TCP; of others nothing is carried.
    pub(super) fn is_tcp(&mut self, field: &str, protocol: Option<&str>) -> bool {
        match protocol {
            None | Some("TCP") => true,
            Some("UDP" | "SCTP") => false,
            Some(other) => {
                let cure = one_of(other, &["TCP", "UDP", "SCTP"]);
                self.problem(&format!("{field}.protocol"), format!("'{other}' is not a protocol"), cure);
                true
            }
        }
    }
}

/// What containers' ports may be called (RFC 6335, section 5.1, in lower case).
fn is_port_name(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=15).contains(&text.len())
        && text.chars().all(inner)
        && text.chars().any(|c| c.is_ascii_lowercase())
        && !text.starts_with('-')
        && !text.ends_with('-')
        && !text.contains("--")
}
