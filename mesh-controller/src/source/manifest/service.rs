//! Services: the addresses and ports that clients use.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, de::IgnoredAny};

use super::{
    super::document::one_of,
    Raw,
    check::{Check, MAX_ENTRIES, MAX_LABEL},
};
use crate::model::{Object, Port, Service};

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
    #[serde(rename = "ipFamilies")]
    _ip_families: Option<IgnoredAny>,
    #[serde(rename = "ipFamilyPolicy")]
    _ip_family_policy: Option<IgnoredAny>,
    #[serde(rename = "internalTrafficPolicy")]
    _internal_traffic_policy: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPort {
    name: Option<String>,
    port: u16,
    target_port: Option<u16>,
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
        if let Some(affinity) = spec.session_affinity.filter(|affinity| affinity != "None") {
            self.problem(
                "spec.sessionAffinity",
                format!("'{affinity}' is not supported, and passing over it would break what relies on it"),
                "write None, or remove it",
            );
        }
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
        Object::Service(Service { name, addresses, selector: spec.selector, ports: self.ports(spec.ports) })
    }

    fn ports(&mut self, raw: Vec<RawPort>) -> Vec<Port> {
        let mut ports: Vec<Port> = Vec::new();
        for (index, raw) in raw.into_iter().enumerate() {
            let field = format!("spec.ports[{index}]");
            match raw.protocol.as_deref() {
                None | Some("TCP") => {}
                Some("UDP" | "SCTP") => continue,
                Some(other) => {
                    let cure = one_of(other, &["TCP", "UDP", "SCTP"]);
                    self.problem(&format!("{field}.protocol"), format!("'{other}' is not a protocol"), cure);
                }
            }
            let target = raw.target_port.unwrap_or(raw.port);
            if raw.name.as_ref().is_some_and(|name| name.len() > MAX_LABEL) {
                let reason = format!("a port's name has at most {MAX_LABEL} characters");
                self.problem(&format!("{field}.name"), reason, "shorten it");
            }
            self.port(&format!("{field}.port"), raw.port);
            self.port(&format!("{field}.targetPort"), target);
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
}
