//! The custom resource definitions of `deploy/crds`, from the types that documents are read into: what the API server lets
//! in is what the controller understands. `cargo xtask generate` writes them.
//!
//! Rules in CEL say what a schema cannot. They cost, and the API server counts their worst case: within lists of lists there
//! are none, and what they would say is said by a pattern, or by the controller in the object's status.

use std::path::{Path, PathBuf};

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Value, json};

use super::{
    authentication::RawAuthentication, policy::RawPolicy, traffic::RawTrafficPolicy, workload::RawWorkload,
};
use crate::model::Kind;

/// A column that `kubectl get` prints: name, type, where it is; only with `-o wide` if it is of the second rank.
type Column = (&'static str, &'static str, &'static str, u8);

const ACCEPTED: Column = ("Accepted", "string", ".status.conditions[?(@.type==\"Accepted\")].status", 0);
const MESSAGE: Column = ("Message", "string", ".status.conditions[?(@.type==\"Accepted\")].message", 1);
const AGE: Column = ("Age", "date", ".metadata.creationTimestamp", 0);

/// The definition of each kind of ours, with the name of its file.
fn definitions() -> [(&'static str, Value); 4] {
    [
        definition::<RawAuthentication>(
            Kind::AuthenticationPolicy,
            ("authenticationpolicies", "authenticationpolicy", "meshauthn"),
            &[
                ("Required", "boolean", ".spec.required", 0),
                ("Enforcement", "string", ".spec.enforcement", 0),
                ("Issuer", "string", ".spec.issuers[0].issuer", 0),
                ACCEPTED,
                AGE,
                MESSAGE,
            ],
        ),
        definition::<RawPolicy>(
            Kind::AuthorizationPolicy,
            ("authorizationpolicies", "authorizationpolicy", "meshpolicy"),
            &[
                ("Action", "string", ".spec.action", 0),
                ("Enforcement", "string", ".spec.enforcement", 0),
                ACCEPTED,
                AGE,
                MESSAGE,
            ],
        ),
        definition::<RawTrafficPolicy>(
            Kind::TrafficPolicy,
            ("trafficpolicies", "trafficpolicy", "meshtraffic"),
            &[("Target", "string", ".spec.targetRefs[0].name", 0), ACCEPTED, AGE, MESSAGE],
        ),
        definition::<RawWorkload>(
            Kind::Workload,
            ("workloads", "workload", "meshwl"),
            &[
                ("Node", "string", ".spec.node", 0),
                ("Address", "string", ".spec.addresses[0]", 0),
                ("Account", "string", ".spec.serviceAccount", 0),
                ACCEPTED,
                AGE,
                MESSAGE,
            ],
        ),
    ]
}

fn definition<Spec: JsonSchema>(
    kind: Kind,
    (plural, singular, short): (&'static str, &str, &str),
    columns: &[Column],
) -> (&'static str, Value) {
    let (group, version) = kind.api_version().split_once('/').expect("kinds of ours have a group");
    let columns: Vec<Value> = columns
        .iter()
        .map(|(name, of, path, priority)| {
            json!({"name": name, "type": of, "jsonPath": path, "priority": priority})
        })
        .collect();
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{group}")},
        "spec": {
            "group": group,
            "names": {
                "kind": kind.as_str(),
                "listKind": format!("{kind}List"),
                "plural": plural,
                "singular": singular,
                "shortNames": [short],
                "categories": ["nodemesh"],
            },
            "scope": "Namespaced",
            "versions": [{
                "name": version,
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": columns,
                "schema": {"openAPIV3Schema": {
                    "type": "object",
                    "required": ["spec"],
                    "properties": {
                        "apiVersion": {"type": "string"},
                        "kind": {"type": "string"},
                        "metadata": {"type": "object"},
                        "spec": schema::<Spec>(),
                        "status": status(),
                    },
                }},
            }],
        },
    });
    (plural, definition)
}

/// A structural schema: Kubernetes prunes fields that it does not have, and knows nothing of most words of JSON Schema.
fn schema<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::openapi3();
    settings.inline_subschemas = true;
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    structural(&mut schema);
    schema
}

fn structural(schema: &mut Value) {
    let Some(fields) = schema.as_object_mut() else { return };
    for unknown in ["$schema", "components", "title", "nullable", "default"] {
        fields.remove(unknown);
    }
    if fields.get("additionalProperties") == Some(&Value::Bool(false)) {
        fields.remove("additionalProperties");
    }
    for below in ["items", "additionalProperties"] {
        fields.get_mut(below).into_iter().for_each(structural);
    }
    let properties = fields.get_mut("properties").and_then(Value::as_object_mut);
    properties.into_iter().flat_map(|it| it.values_mut()).for_each(structural);
}

/// What the leader writes: conditions as Kubernetes has them (metav1.Condition).
fn status() -> Value {
    let text = |longest: u32| json!({"type": "string", "maxLength": longest});
    json!({
        "type": "object",
        "description": "What became of it; written by the controller.",
        "properties": {"conditions": {
            "type": "array",
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
            "items": {
                "type": "object",
                "required": ["type", "status", "reason", "message", "lastTransitionTime"],
                "properties": {
                    "type": text(316),
                    "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                    "reason": text(1024),
                    "message": text(32768),
                    "lastTransitionTime": {"type": "string", "format": "date-time"},
                    "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
                },
            },
        }},
    })
}

#[test]
fn each_custom_resource_definition_is_generated() {
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    for (plural, definition) in definitions() {
        let text = serde_saphyr::to_string(&definition).expect("values can be written");
        let file: PathBuf = crds.join(format!("{plural}.yaml"));
        let head = "# Written by `cargo xtask generate` from mesh-controller/src/source/manifest.\n";
        let checked = mesh_settings::reference::check(&file, &format!("{head}{text}"));
        checked.unwrap_or_else(|complaint| panic!("{complaint}"));
    }
}
