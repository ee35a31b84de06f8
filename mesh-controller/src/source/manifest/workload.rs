//! Namespaces and workloads: who runs where, whether traffic is captured, whether plaintext is taken.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::model::Mode;
use serde::{Deserialize, de::IgnoredAny};

use super::{super::document::one_of, ENROLL, MODE, Raw, RawMetadata, check::Check};
use crate::model::{Namespace, Object, Workload};

/// Longest uid of a pod; Kubernetes makes them of 36 characters.
const MAX_UID: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawNamespace {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: RawMetadata,
    #[serde(rename = "spec")]
    _spec: Option<IgnoredAny>,
    #[serde(rename = "status")]
    _status: Option<IgnoredAny>,
}

/// Something that is no pod and takes part as one: a process of a machine, by its node and its addresses.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawWorkload {
    /// `metadata.uid` of the pod that it stands for: its own is the document's. In a cluster pods speak for themselves.
    #[cfg_attr(test, schemars(skip))]
    uid: Option<String>,
    /// The node whose agent captures its traffic.
    #[cfg_attr(test, schemars(length(max = 253), regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$")))]
    node: String,
    /// Its addresses on that node, such as 10.1.0.11 or fd01::11.
    #[cfg_attr(test, schemars(length(min = 1, max = 16), inner(length(max = 45)), extend(
        "x-kubernetes-list-type" = "set",
        "x-kubernetes-validations" = [{
            "rule": "self.all(it, isIP(it) && !ip(it).isLoopback() && !ip(it).isUnspecified())",
            "message": "every entry has to be an IPv4 or IPv6 address that others can connect to, without a prefix length",
        }]
    )))]
    addresses: Vec<String>,
    /// The service account that gives it its identity; left out, default.
    #[cfg_attr(test, schemars(length(max = 253), regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$")))]
    service_account: Option<String>,
    /// Whether Services send connections to it; left out, they do.
    ready: Option<bool>,
}

impl Check<'_> {
    pub(super) fn namespace(&mut self, raw: RawNamespace) -> Object {
        if raw.metadata.namespace.is_some() {
            self.problem("metadata.namespace", "a Namespace is not within another", "remove it");
        }
        self.name("metadata.name", &raw.metadata.name);
        self.our_labels(&raw.metadata.labels, &[ENROLL, MODE]);
        let enroll = self.enroll(&raw.metadata.labels).unwrap_or(false);
        let mode = self.mode(&raw.metadata.labels);
        Object::Namespace(Namespace { name: raw.metadata.name, enroll, mode })
    }

    pub(super) fn workload(&mut self, raw: Raw<RawWorkload>) -> Object {
        let name = self.namespaced(&raw.metadata);
        self.our_labels(&raw.metadata.labels, &[ENROLL, MODE]);
        let enroll = self.enroll(&raw.metadata.labels);
        let mode = self.mode(&raw.metadata.labels);
        self.name("spec.node", &raw.spec.node);
        let service_account = raw.spec.service_account.unwrap_or_else(|| "default".to_owned());
        self.name("spec.serviceAccount", &service_account);
        // A pod is told of before it has one.
        if raw.spec.addresses.is_empty() && raw.spec.uid.is_none() {
            self.problem(
                "spec.addresses",
                "a workload without an address can be neither captured nor reached",
                "write its addresses: [10.1.0.11]",
            );
        }
        let addresses = self.addresses("spec.addresses", &raw.spec.addresses);
        let uid = raw.spec.uid.unwrap_or_default();
        if uid.len() > MAX_UID || !uid.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            self.problem(
                "spec.uid",
                format!("'{uid}' is not a pod's uid"),
                "write the pod's metadata.uid, or remove the field for what is no pod",
            );
        }
        Object::Workload(Arc::new(Workload {
            name,
            uid,
            labels: raw.metadata.labels,
            enroll,
            mode,
            node: raw.spec.node,
            addresses,
            service_account,
            ready: raw.spec.ready.unwrap_or(true),
        }))
    }

    fn enroll(&mut self, labels: &BTreeMap<String, String>) -> Option<bool> {
        match labels.get(ENROLL)?.as_str() {
            "true" => Some(true),
            "false" => Some(false),
            other => {
                self.problem(
                    &format!("metadata.labels.{ENROLL}"),
                    format!("'{other}' is neither \"true\" nor \"false\""),
                    "write \"true\" or \"false\", with the quotes",
                );
                None
            }
        }
    }

    fn mode(&mut self, labels: &BTreeMap<String, String>) -> Option<Mode> {
        let text = labels.get(MODE)?;
        let mode = text.parse().ok();
        if mode.is_none() {
            let cure = one_of(text, &Mode::ALL.map(Mode::as_str));
            self.problem(&format!("metadata.labels.{MODE}"), format!("'{text}' is not a mode"), cure);
        }
        mode
    }
}
