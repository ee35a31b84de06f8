//! What Kubernetes says, as the documents that a directory would have: a pod is a Workload, a Service a Service with
//! the fields that mean something here. Pure. What cannot be said in a document is left as it stands, so that the
//! document is refused and tells why.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1::{Namespace, ObjectReference, Pod, Service, ServicePort},
        discovery::v1::{Endpoint, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::api::DynamicObject;
use mesh_core::model::ZONE;
use serde_json::{Value, json};

use crate::{conditions::has_ended, model::Kind, source::manifest::SERVICE_NAME};

/// What begins the labels of ours, which are the ones that a document's labels may mean something by.
const OURS: &str = "nodemesh.io/";
/// What `spec.trafficDistribution` may be as far as we know. A later one is a preference too, and passed over.
const KNOWN_DISTRIBUTIONS: [&str; 3] = ["PreferClose", "PreferSameZone", "PreferSameNode"];

/// The document of a namespace.
pub(super) fn of_namespace(namespace: &Namespace) -> Value {
    let name = namespace.metadata.name.as_deref().unwrap_or_default();
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": ours(&namespace.metadata)},
    })
}

/// The document of a pod; nothing for one that is not, not yet or no more a workload: without a node, ended, or in its
/// node's own network, which is not captured. One without an address yet is: its agent holds what it sends until it knows
/// whether it is captured.
pub(super) fn of_pod(pod: &Pod) -> Option<Value> {
    let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
    let node = spec.node_name.as_deref()?;
    let addresses: Vec<&str> = status.pod_ips.iter().flatten().map(|it| it.ip.as_str()).collect();
    if has_ended(pod) || spec.host_network == Some(true) {
        return None;
    }
    Some(json!({
        "apiVersion": "nodemesh.io/v1alpha1",
        "kind": "Workload",
        "metadata": metadata(&pod.metadata),
        "spec": {
            "uid": pod.metadata.uid.as_deref().unwrap_or_default(),
            "node": node,
            "addresses": addresses,
            "serviceAccount": spec.service_account_name.as_deref().unwrap_or("default"),
            "ready": is_ready(pod),
        },
    }))
}

/// The document of a pod with the zone of its node, unless the pod says one itself.
pub(super) fn in_zone(pod: &str, zone_of: impl Fn(&str) -> Option<String>) -> Option<String> {
    let mut document: Value = serde_json::from_str(pod).ok()?;
    let zone = zone_of(document["spec"]["node"].as_str()?)?;
    let labels = document["metadata"]["labels"].as_object_mut()?;
    labels.entry(ZONE).or_insert(json!(zone));
    Some(document.to_string())
}

/// As EndpointSlices have it: its Ready condition holds, and it is not on its way out.
fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|it| it.type_ == "Ready" && it.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

/// The document of a Service, without what means nothing here. Nothing for an ExternalName, which is a name of something
/// else and is left alone.
pub(super) fn of_service(service: &Service) -> Option<Value> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let port = |port: &ServicePort| {
        json!({
            "name": port.name.as_deref().unwrap_or_default(),
            "port": port.port,
            "targetPort": port.target_port.as_ref().map_or_else(|| json!(port.port), target),
            "protocol": port.protocol.as_deref().unwrap_or("TCP"),
        })
    };
    let mut document = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service.metadata.name,
            "namespace": service.metadata.namespace,
            "labels": ours(&service.metadata),
        },
        "spec": {
            "clusterIPs": spec.cluster_ips.as_deref().unwrap_or_default(),
            "selector": spec.selector.clone().unwrap_or_default(),
            "sessionAffinity": spec.session_affinity.as_deref().unwrap_or("None"),
            "internalTrafficPolicy": spec.internal_traffic_policy.as_deref().unwrap_or("Cluster"),
            "trafficDistribution": spec.traffic_distribution.as_deref().filter(|it| KNOWN_DISTRIBUTIONS.contains(it)),
            "ports": spec.ports.iter().flatten().map(port).collect::<Vec<_>>(),
        },
    });
    let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    if let Some(seconds) = client_ip.and_then(|it| it.timeout_seconds) {
        document["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
    }
    if let Some(address) = &spec.cluster_ip {
        document["spec"]["clusterIP"] = json!(address);
    }
    Some(document)
}

fn target(target: &IntOrString) -> Value {
    match target {
        IntOrString::Int(number) => json!(number),
        IntOrString::String(name) => json!(name),
    }
}

/// The document of an EndpointSlice. An endpoint that is a pod, but no workload, becomes an address like any other.
pub(super) fn of_slice(slice: &EndpointSlice, is_workload: impl Fn(&str, &str) -> bool) -> Value {
    let own = slice.metadata.namespace.as_deref().unwrap_or_default();
    let endpoint = |endpoint: &Endpoint| {
        let conditions = endpoint.conditions.as_ref();
        let mut document = json!({
            "addresses": endpoint.addresses,
            "conditions": {
                "ready": conditions.and_then(|it| it.ready).unwrap_or(true),
                "serving": conditions.and_then(|it| it.serving.or(it.ready)).unwrap_or(true),
                "terminating": conditions.and_then(|it| it.terminating).unwrap_or(false),
            },
        });
        let named = |it: &ObjectReference| {
            let (namespace, name) = (it.namespace.as_deref().unwrap_or(own), it.name.as_deref()?);
            let kind = it.kind.as_deref().unwrap_or("Pod");
            is_workload(namespace, name).then(|| json!({"kind": kind, "namespace": namespace, "name": name}))
        };
        for (field, value) in [("nodeName", &endpoint.node_name), ("zone", &endpoint.zone)] {
            if let Some(value) = value {
                document[field] = json!(value);
            }
        }
        if let Some(target) = endpoint.target_ref.as_ref().and_then(named) {
            document["targetRef"] = target;
        }
        document
    };
    let port = |port: &EndpointPort| {
        let mut document = json!({
            "name": port.name.as_deref().unwrap_or_default(),
            "protocol": port.protocol.as_deref().unwrap_or("TCP"),
        });
        if let Some(number) = port.port {
            document["port"] = json!(number);
        }
        document
    };
    let labels = slice.metadata.labels.iter().flatten();
    let labels: BTreeMap<_, _> =
        labels.filter(|(key, _)| *key == SERVICE_NAME || key.starts_with(OURS)).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": slice.metadata.name, "namespace": slice.metadata.namespace, "labels": labels},
        "addressType": slice.address_type,
        "endpoints": slice.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": slice.ports.iter().flatten().map(port).collect::<Vec<_>>(),
    })
}

/// The document of an object of a kind that somebody defined, as it is. A pod's uid is the pod's own to say.
pub(super) fn of_defined(kind: Kind, object: &DynamicObject) -> Value {
    let mut document = json!({
        "apiVersion": kind.api_version(),
        "kind": kind.as_str(),
        "metadata": metadata(&object.metadata),
    });
    let fields = object.data.as_object().into_iter().flatten().filter(|(field, _)| *field != "status");
    for (field, value) in fields {
        document[field] = value.clone();
    }
    if kind.is_route() || kind == Kind::TrafficPolicy {
        document["metadata"]["creationTimestamp"] = json!(object.metadata.creation_timestamp);
    }
    if kind == Kind::Workload
        && let Some(spec) = document["spec"].as_object_mut()
    {
        spec.remove("uid");
    }
    document
}

fn metadata(metadata: &ObjectMeta) -> Value {
    json!({"name": metadata.name, "namespace": metadata.namespace, "labels": metadata.labels.clone().unwrap_or_default()})
}

/// The labels that mean something here; others of a namespace or a Service nobody selects by.
fn ours(metadata: &ObjectMeta) -> BTreeMap<&str, &str> {
    let labels = metadata.labels.iter().flatten().filter(|(key, _)| key.starts_with(OURS));
    labels.map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use mesh_core::model::Distribution;
    use serde::de::DeserializeOwned;

    use super::*;
    use crate::{
        model::Object,
        source::{document::split, manifest},
    };

    fn from<T: DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).expect("an object of Kubernetes")
    }

    /// The object that a document makes, or what is wrong with it.
    fn object(document: &Value) -> Result<Object, String> {
        let text = document.to_string();
        match manifest::parse(&split(&text)[0]) {
            manifest::Outcome::Accepted(object) => Ok(object),
            other => Err(format!("{other:?}")),
        }
    }

    fn pod(change: impl FnOnce(&mut Value)) -> Option<Value> {
        let mut pod = json!({
            "metadata": {"name": "web-1", "namespace": "shop", "uid": "u", "labels": {"app": "web", "nodemesh.io/enroll": "true"}},
            "spec": {"nodeName": "node-a", "serviceAccountName": "web", "containers": [{"name": "c"}]},
            "status": {
                "phase": "Running",
                "podIPs": [{"ip": "10.1.0.2"}, {"ip": "fd01::2"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        change(&mut pod);
        of_pod(&from(pod))
    }

    #[test]
    fn a_pod_is_a_workload_with_its_node_addresses_account_and_labels() {
        let Ok(Object::Workload(workload)) = object(&pod(|_| {}).expect("a workload")) else { panic!() };
        assert_eq!((workload.name.to_string().as_str(), workload.uid.as_str()), ("shop/web-1", "u"));
        assert_eq!((workload.node.as_str(), workload.service_account.as_str()), ("node-a", "web"));
        assert_eq!((workload.enroll, workload.ready, workload.addresses.len()), (Some(true), true, 2));
        assert_eq!(workload.labels["app"], "web");
    }

    #[test]
    fn a_pod_that_is_not_ready_or_is_ending_gets_no_new_connections() {
        for change in [
            |pod: &mut Value| pod["status"]["conditions"][0]["status"] = json!("False"),
            |pod: &mut Value| pod["status"]["conditions"] = json!([]),
            |pod: &mut Value| pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"),
        ] {
            let Ok(Object::Workload(workload)) = object(&pod(change).expect("a workload")) else { panic!() };
            assert!(!workload.ready);
        }
    }

    #[test]
    fn pods_without_a_network_of_their_own_or_that_have_ended_are_no_workloads() {
        for change in [
            |pod: &mut Value| pod["spec"]["hostNetwork"] = json!(true),
            |pod: &mut Value| pod["status"]["phase"] = json!("Succeeded"),
            |pod: &mut Value| pod["status"]["phase"] = json!("Failed"),
            |pod: &mut Value| pod["spec"]["nodeName"] = Value::Null,
        ] {
            assert_eq!(pod(change), None);
        }
    }

    fn service(change: impl FnOnce(&mut Value)) -> Option<Value> {
        let mut service = json!({
            "metadata": {"name": "web", "namespace": "shop", "labels": {"made.by/helm": "yes"}},
            "spec": {
                "type": "NodePort",
                "clusterIP": "10.96.0.7",
                "clusterIPs": ["10.96.0.7", "fd96::7"],
                "externalTrafficPolicy": "Cluster",
                "internalTrafficPolicy": "Cluster",
                "trafficDistribution": "PreferClose",
                "selector": {"app": "web"},
                "sessionAffinity": "None",
                "ports": [
                    {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP", "nodePort": 30080},
                    {"name": "metrics", "port": 81},
                    {"name": "dns", "port": 53, "targetPort": 53, "protocol": "UDP"},
                ],
            },
        });
        change(&mut service);
        of_service(&from(service))
    }

    #[test]
    fn a_service_has_its_addresses_and_tcp_ports() {
        let Ok(Object::Service(service)) = object(&service(|_| {}).expect("a service")) else { panic!() };
        assert_eq!(service.addresses.len(), 2);
        let ports: Vec<_> =
            service.ports.iter().map(|port| (port.name.as_str(), port.port, port.target)).collect();
        assert_eq!(ports, [("http", 80, None), ("metrics", 81, Some(81))]);
    }

    #[test]
    fn a_headless_service_has_no_address_and_an_external_name_is_left_alone() {
        let headless = service(|it| {
            it["spec"]["clusterIP"] = json!("None");
            it["spec"]["clusterIPs"] = json!(["None"]);
        });
        let Ok(Object::Service(headless)) = object(&headless.expect("a service")) else { panic!() };
        assert!(headless.addresses.is_empty());
        assert_eq!(service(|it| it["spec"]["type"] = json!("ExternalName")), None);
    }

    #[test]
    fn a_service_says_which_of_its_endpoints_a_client_gets() {
        let with = |fields: Value| {
            let document = service(|it| {
                let spec = it["spec"].as_object_mut().expect("a spec");
                spec.extend(fields.as_object().expect("fields").clone());
            });
            match object(&document.expect("a service")) {
                Ok(Object::Service(service)) => (service.distribution, service.affinity),
                other => panic!("{other:?}"),
            }
        };
        for (fields, expected) in [
            (json!({}), (Distribution::SameZone, None)),
            (json!({"trafficDistribution": "PreferSameNode"}), (Distribution::SameNode, None)),
            (json!({"trafficDistribution": "of a later version"}), (Distribution::Any, None)),
            (json!({"internalTrafficPolicy": "Local"}), (Distribution::OnlySameNode, None)),
            (json!({"sessionAffinity": "ClientIP"}), (Distribution::SameZone, Some(10_800))),
            (
                json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}),
                (Distribution::SameZone, Some(60)),
            ),
        ] {
            assert_eq!(with(fields.clone()), expected, "{fields}");
        }
    }

    #[test]
    fn a_slice_has_endpoints_that_are_ready_or_serve_until_they_end_with_their_pods() {
        let slice: EndpointSlice = from(json!({
            "metadata": {"name": "web-x", "namespace": "shop", "labels": {
                "kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": "it"}},
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["10.1.0.2"], "conditions": {"ready": true, "serving": true, "terminating": false},
                    "targetRef": {"kind": "Pod", "namespace": "shop", "name": "a", "uid": "u"}, "nodeName": "n"},
                {"addresses": ["10.1.0.3"], "conditions": {"ready": false, "serving": true, "terminating": true},
                    "targetRef": {"kind": "Pod", "namespace": "shop", "name": "b", "uid": "v"}},
                {"addresses": ["10.1.0.4"], "conditions": {"ready": false, "serving": false, "terminating": true}},
                {"addresses": ["10.1.0.5"], "conditions": {"ready": false}},
                {"addresses": ["192.0.2.1"],
                    "targetRef": {"kind": "Pod", "namespace": "shop", "name": "of-its-node"}},
            ],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "any"}, {"port": 1, "protocol": "UDP"}],
        }));
        let document = of_slice(&slice, |_, name| name != "of-its-node");
        let Ok(Object::EndpointSlice(slice)) = object(&document) else { panic!("{document}") };
        assert_eq!((slice.service.as_str(), &slice.ports[..]), ("web", &[("http".to_owned(), 8080)][..]));
        let endpoints: Vec<_> = slice
            .endpoints
            .iter()
            .map(|it| (it.address.to_string(), it.workload.as_ref().map(ToString::to_string), it.ending))
            .collect();
        let expected = [
            ("10.1.0.2".to_owned(), Some("shop/a".to_owned()), false),
            ("10.1.0.3".to_owned(), Some("shop/b".to_owned()), true),
            ("192.0.2.1".to_owned(), None, false),
        ];
        assert_eq!(endpoints, expected);
    }

    #[test]
    fn an_object_of_ours_is_its_own_document_without_its_status_and_cannot_claim_a_pod() {
        let workload: DynamicObject = from(json!({
            "metadata": {"name": "vm", "namespace": "shop", "uid": "u", "managedFields": []},
            "spec": {"node": "n", "addresses": ["10.1.0.9"], "uid": "somebodys"},
            "status": {"conditions": []},
        }));
        let document = of_defined(Kind::Workload, &workload);
        let Ok(Object::Workload(workload)) = object(&document) else { panic!("{document}") };
        assert_eq!((workload.uid.as_str(), workload.node.as_str()), ("", "n"));
        assert_eq!(document.get("status"), None);
    }

    #[test]
    fn a_namespace_keeps_the_labels_that_mean_something() {
        let namespace =
            json!({"metadata": {"name": "shop", "labels": {"nodemesh.io/enroll": "true", "x": "y"}}});
        let Ok(Object::Namespace(namespace)) = object(&of_namespace(&from(namespace))) else { panic!() };
        assert!(namespace.enroll);
    }
}
