//! EndpointSlices: who serves a Service. Kubernetes writes them for Services with a selector, people for those without.

use std::sync::Arc;

use mesh_core::model::{Name, Place};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    super::document::one_of,
    RawMetadata,
    check::{Check, MAX_ENTRIES, MAX_LABEL, MAX_NAME},
};
use crate::model::{EndpointSlice, Object, SliceEndpoint};

/// Label of an EndpointSlice: the Service whose endpoints it has.
pub(in crate::source) const SERVICE_NAME: &str = "kubernetes.io/service-name";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawSlice {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: RawMetadata,
    address_type: String,
    endpoints: Option<Vec<RawEndpoint>>,
    ports: Option<Vec<RawPort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawEndpoint {
    addresses: Vec<String>,
    #[serde(default)]
    conditions: RawConditions,
    target_ref: Option<RawTargetRef>,
    #[serde(rename = "deprecatedTopology")]
    _deprecated_topology: Option<IgnoredAny>,
    #[serde(rename = "hints")]
    _hints: Option<IgnoredAny>,
    #[serde(rename = "hostname")]
    _hostname: Option<IgnoredAny>,
    node_name: Option<String>,
    zone: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawTargetRef {
    kind: Option<String>,
    name: Option<String>,
    namespace: Option<String>,
    #[serde(rename = "apiVersion")]
    _api_version: Option<IgnoredAny>,
    #[serde(rename = "fieldPath")]
    _field_path: Option<IgnoredAny>,
    #[serde(rename = "resourceVersion")]
    _resource_version: Option<IgnoredAny>,
    #[serde(rename = "uid")]
    _uid: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPort {
    name: Option<String>,
    port: Option<u16>,
    protocol: Option<String>,
    #[serde(rename = "appProtocol")]
    _app_protocol: Option<IgnoredAny>,
}

impl Check<'_> {
    pub(super) fn slice(&mut self, raw: RawSlice) -> Object {
        let name = self.namespaced(&raw.metadata);
        self.our_labels(&raw.metadata.labels, &[]);
        let service = raw.metadata.labels.get(SERVICE_NAME).cloned().unwrap_or_default();
        let endpoints = raw.endpoints.unwrap_or_default();
        self.limit("endpoints", endpoints.len(), MAX_ENTRIES);
        let endpoints = match raw.address_type.as_str() {
            "IPv4" | "IPv6" => self.endpoints(&name.namespace, endpoints),
            // Names of something outside: as with an ExternalName, there is nobody to connect to.
            "FQDN" => vec![],
            other => {
                let cure = one_of(other, &["IPv4", "IPv6", "FQDN"]);
                self.problem("addressType", format!("'{other}' is not a type of address"), cure);
                vec![]
            }
        };
        let ports = self.slice_ports(raw.ports.unwrap_or_default());
        Object::EndpointSlice(Arc::new(EndpointSlice { name, service, ports, endpoints }))
    }

    /// The endpoints that take connections, or would if there were no others.
    fn endpoints(&mut self, namespace: &str, raw: Vec<RawEndpoint>) -> Vec<SliceEndpoint> {
        let mut endpoints = Vec::new();
        for (index, raw) in raw.into_iter().take(MAX_ENTRIES).enumerate() {
            let field = format!("endpoints[{index}].addresses");
            // More than one are the same endpoint by other names, and nobody uses them (Kubernetes, EndpointSlice API).
            let Some(first) = raw.addresses.first() else {
                self.problem(
                    &field,
                    "an endpoint has to have an address",
                    "write one, or remove the endpoint",
                );
                continue;
            };
            let address = self.address(&format!("{field}[0]"), first);
            let workload = raw.target_ref.and_then(|it| {
                let is_workload = it.kind.is_none_or(|kind| kind == "Pod" || kind == "Workload");
                let namespace = it.namespace.as_deref().unwrap_or(namespace);
                it.name.filter(|_| is_workload).map(|name| Name::new(namespace, name))
            });
            let (node, zone) = (raw.node_name.unwrap_or_default(), raw.zone.unwrap_or_default());
            for (field, text) in [("nodeName", &node), ("zone", &zone)] {
                if text.len() > MAX_NAME {
                    let reason = format!("a name has at most {MAX_NAME} characters");
                    self.problem(&format!("endpoints[{index}].{field}"), reason, "shorten it");
                }
            }
            let RawConditions { ready, serving, terminating } = raw.conditions;
            let ready = ready.unwrap_or(true);
            let ending = !ready && terminating.unwrap_or(false) && serving.unwrap_or(ready);
            if let Some(address) = address
                && (ready || ending)
            {
                endpoints.push(SliceEndpoint { address, workload, place: Place { node, zone }, ending });
            }
        }
        endpoints
    }

    fn slice_ports(&mut self, raw: Vec<RawPort>) -> Vec<(String, u16)> {
        self.limit("ports", raw.len(), MAX_ENTRIES);
        let mut ports = Vec::new();
        for (index, raw) in raw.into_iter().take(MAX_ENTRIES).enumerate() {
            let field = format!("ports[{index}]");
            if !self.is_tcp(&field, raw.protocol.as_deref()) {
                continue;
            }
            let name = raw.name.unwrap_or_default();
            if name.len() > MAX_LABEL {
                let reason = format!("a port's name has at most {MAX_LABEL} characters");
                self.problem(&format!("{field}.name"), reason, "shorten it");
            }
            let Some(port) = raw.port else { continue };
            self.port(&format!("{field}.port"), port);
            ports.push((name, port));
        }
        ports
    }
}
