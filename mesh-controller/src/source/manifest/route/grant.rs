//! ReferenceGrants: which routes of other namespaces may send requests to Services of this one.

use mesh_core::model::http::RouteKind;
use serde::Deserialize;

use super::{
    super::{Raw, check::Check},
    GATEWAY_GROUP, MAX_ENTRIES,
};
use crate::model::{Object, ReferenceGrant};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::source::manifest) struct RawGrant {
    from: Vec<RawFrom>,
    to: Vec<RawTo>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFrom {
    group: String,
    kind: String,
    namespace: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTo {
    group: String,
    kind: String,
    name: Option<String>,
}

impl Check<'_> {
    pub(in crate::source::manifest) fn grant(&mut self, raw: Raw<RawGrant>) -> Object {
        let name = self.namespaced(&raw.metadata);
        self.our_labels(&raw.metadata.labels, &[]);
        self.some("spec.from", raw.spec.from.len());
        self.some("spec.to", raw.spec.to.len());
        let mut from = Vec::new();
        for (index, raw) in raw.spec.from.into_iter().take(MAX_ENTRIES).enumerate() {
            self.name(&format!("spec.from[{index}].namespace"), &raw.namespace);
            let kind = RouteKind::ALL.into_iter().find(|kind| kind.as_str() == raw.kind);
            from.extend(kind.filter(|_| raw.group == GATEWAY_GROUP).map(|kind| (kind, raw.namespace)));
        }
        let mut to = Vec::new();
        for (index, raw) in raw.spec.to.into_iter().take(MAX_ENTRIES).enumerate() {
            if let Some(name) = &raw.name {
                self.name(&format!("spec.to[{index}].name"), name);
            }
            to.extend((raw.group.is_empty() && raw.kind == "Service").then_some(raw.name));
        }
        Object::ReferenceGrant(ReferenceGrant { name, from, to })
    }

    fn some(&mut self, field: &str, entries: usize) {
        self.limit(field, entries, MAX_ENTRIES);
        if entries == 0 {
            self.problem(field, "this list is empty, and so nothing is granted", "write an entry");
        }
    }
}
