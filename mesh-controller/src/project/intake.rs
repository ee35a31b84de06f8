//! How much each workload takes: what policies say of Services, at the ports of the workloads behind these.
//!
//! Whether a workload is ready makes no difference. One that is not is reached by its address still, and a limit that went
//! and came back with every probe would cut its connections each time.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::model::{
    Name,
    intake::{Intake, PortIntake},
};

use crate::{
    model::{Model, Port, Service, Workload},
    traffic::Resolved,
};

/// Of all workloads of which something is said, by name.
pub(super) fn all(model: &Model, traffic: &Resolved) -> Vec<Arc<Intake>> {
    let mut found: BTreeMap<Name, BTreeMap<u16, PortIntake>> = BTreeMap::new();
    if !traffic.speaks_of_takes() {
        return vec![];
    }
    for service in model.services.values() {
        for port in &service.ports {
            let taken = traffic.takes(&service.name, port.port).of_port();
            if taken.is_empty() {
                continue;
            }
            for (workload, port) in behind(model, service, port) {
                let of_port = found.entry(workload).or_default().entry(port).or_default();
                *of_port = std::mem::take(of_port).and(taken.clone());
            }
        }
    }
    let intake = |(workload, ports)| {
        let labels = model.workloads.get(&workload).map(|it| it.labels.clone()).unwrap_or_default();
        Arc::new(Intake { workload, labels, ports })
    };
    found.into_iter().map(intake).collect()
}

/// The workloads that serve a port of a Service, each with its own port: those that its selector names, and those of its
/// EndpointSlices, which alone know the numbers of ports with names.
fn behind(model: &Model, service: &Service, port: &Port) -> Vec<(Name, u16)> {
    let of_namespace = model
        .workloads
        .range(Name::new(&service.name.namespace, "")..)
        .take_while(|(name, _)| name.namespace == service.name.namespace);
    let selected = |(name, workload): (&Name, &Arc<Workload>)| {
        let target = port.target.filter(|_| service.selects(&workload.labels))?;
        Some((name.clone(), target))
    };
    let is_own = |slice: &&Arc<crate::model::EndpointSlice>| {
        slice.name.namespace == service.name.namespace && slice.service == service.name.name
    };
    let slices = model.slices.values().filter(is_own);
    let told = slices.flat_map(|slice| {
        let number = slice.ports.iter().find(|(name, _)| *name == port.name).map(|(_, number)| *number);
        slice.endpoints.iter().filter_map(move |it| Some((it.workload.clone()?, number?)))
    });
    let mut all: Vec<_> = of_namespace.filter_map(selected).chain(told).collect();
    // Whoever writes of endpoints elsewhere has no say in what these take.
    all.retain(|(name, _)| name.namespace == service.name.namespace && model.workloads.contains_key(name));
    all.sort();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::PathBuf};

    use mesh_core::{
        identity::TrustDomain,
        model::Mode,
        view::{Mesh, Snapshot},
    };

    use crate::{
        health::Heard,
        project::{Common, demand::Concern},
        source::ledger::{FileContent, Ledger},
    };

    use super::*;

    fn workload(name: &str, node: &str, spec: &str) -> String {
        let (namespace, name) = name.split_once('/').unwrap();
        let last = name.len() + namespace.len() * 10;
        format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: {namespace}, \
             labels: {{app: web}}}}\nspec: {{node: {node}, addresses: [10.0.0.{last}]{spec}}}\n"
        )
    }

    fn limits(name: &str, service: &str, says: &str) -> String {
        format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{targetRefs: [{{kind: Service, {service}}}], {says}}}\n"
        )
    }

    const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: other, port: 81, targetPort: 8081}]
---
apiVersion: v1
kind: Service
metadata: {name: also, namespace: shop}
spec: {clusterIP: 10.96.0.2, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";

    fn common(manifests: &str) -> Common {
        let files = [(PathBuf::from("f"), Arc::new(FileContent::parse(manifests)))].into();
        let ledger = Ledger::default().next(&files);
        assert!(ledger.refused().is_empty(), "{:?}", ledger.refused());
        let mesh = Mesh { trust_domain: TrustDomain::parse("td").unwrap(), roots: vec![] };
        Common::new(&ledger.model(), Arc::new(mesh), &Heard::default(), Mode::default())
    }

    fn shop(more: &[String]) -> Common {
        let workloads = workload("shop/a", "n", "")
            + &workload("shop/bb", "m", ", ready: false")
            + &workload("other/a", "n", "");
        common(&(SERVICES.to_owned() + &workloads + &more.concat()))
    }

    /// What each node's view limits: `WORKLOAD:PORT HEAD BODY RATES`.
    fn limited(common: &Common, node: &str) -> Vec<String> {
        let snapshot = Snapshot::new(node, "1", &common.view(node)).unwrap();
        let part = Snapshot::new(node, "1", common.demanded(node, &BTreeSet::new()).view()).unwrap();
        assert!(snapshot.intakes().eq(part.intakes()), "by demand, too");
        let of_port = |(workload, (port, it)): (&Name, (&u16, &PortIntake))| {
            let number = |it: Option<u64>| it.map_or("-".to_owned(), |it| it.to_string());
            let (head, body) = (number(it.sizes.head.map(u64::from)), number(it.sizes.body));
            format!("{workload}:{port} {head} {body} {}", it.rates.len())
        };
        let all = snapshot.intakes();
        all.flat_map(|it| it.ports.iter().map(|port| of_port((&it.workload, port)))).collect()
    }

    #[test]
    fn each_workload_behind_a_service_is_limited_on_its_own_node_and_at_its_own_port() {
        let common = shop(&[
            limits("web", "name: web", "rateLimits: [{requests: 1}], sizeLimits: {bodyBytes: 9}"),
            limits("other", "name: web, sectionName: other", "rateLimits: []"),
            limits(
                "also",
                "name: also",
                "rateLimits: [{requests: 1}], sizeLimits: {headerBytes: 300, bodyBytes: 5}",
            ),
        ]);
        assert_eq!(limited(&common, "n"), ["shop/a:8080 300 5 2", "shop/a:8081 - 9 0"]);
        let unready = ["shop/bb:8080 300 5 2", "shop/bb:8081 - 9 0"];
        assert_eq!(limited(&common, "m"), unready, "ready or not");
        assert!(limited(&common, "o").is_empty() && limited(&shop(&[]), "n").is_empty());
    }

    #[test]
    fn one_policy_for_two_services_at_one_port_counts_a_request_once() {
        let both = "name: web}, {kind: Service, name: also";
        let common = shop(&[limits("both", both, "rateLimits: [{requests: 1}, {requests: 2}]")]);
        assert_eq!(limited(&common, "n")[0], "shop/a:8080 - - 2");
    }

    #[test]
    fn a_limit_that_changes_is_told_to_the_nodes_of_its_workloads() {
        let (before, after) = (shop(&[]), shop(&[limits("web", "name: web", "sizeLimits: {bodyBytes: 9}")]));
        let changes = before.changes(&after);
        for (node, concern) in [("n", Concern::Policies), ("o", Concern::Nothing)] {
            let mut held = before.demanded(node, &BTreeSet::new());
            assert_eq!(after.concerns(&before, &changes, node, &held), concern, "{node}");
            held.change_policies(before.own(node).diff(&after.own(node)));
            assert_eq!(held.view(), after.demanded(node, &BTreeSet::new()).view());
        }
        assert!(changes.shared.is_empty(), "nobody else hears of it");
    }

    #[test]
    fn who_writes_of_endpoints_elsewhere_has_no_say_in_what_these_take() {
        let slice = "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 9090}]
endpoints:
- {addresses: [10.0.0.51], targetRef: {kind: Pod, name: a, namespace: other}}
- {addresses: [10.0.0.42], targetRef: {kind: Pod, name: bb, namespace: shop}}
";
        let limits = limits("web", "name: web, sectionName: http", "sizeLimits: {bodyBytes: 9}");
        let common = shop(&[slice.to_owned(), limits]);
        assert_eq!(limited(&common, "n"), ["shop/a:8080 - 9 0"], "other/a is not");
        assert_eq!(limited(&common, "m"), ["shop/bb:8080 - 9 0", "shop/bb:9090 - 9 0"]);
    }
}
