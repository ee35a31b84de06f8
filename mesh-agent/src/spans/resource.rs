//! Whose a span is. To who looks at traces a service is a workload's application, not the agent that tells of it: spans are
//! handed over by workload, under what OpenTelemetry's conventions for resources say of one ("Service", "Kubernetes").
//!
//! Stands apart, as it is where Kubernetes' ways to name pods are read. A pod's application has the name of what made the pod, the
//! topmost that is known ("Specify resource attributes using Kubernetes annotations", `service.name`). What made it is told by
//! labels that Kubernetes' own controllers set, and by the name that they made of theirs; what these do not say is not said.

use std::sync::Arc;

use mesh_core::model::{Name, Workload};

use super::otlp::{KeyValue, Resource, attribute};

/// Of a Deployment's pods, with the hash that is in their names too.
const TEMPLATE_HASH: &str = "pod-template-hash";
/// Of a StatefulSet's, with the pod's name.
const STATEFUL_POD: &str = "statefulset.kubernetes.io/pod-name";
/// Of a DaemonSet's.
const TEMPLATE_GENERATION: &str = "pod-template-generation";
/// Of a Job's, with the Job's name; the latter before Kubernetes 1.27.
const JOB: [&str; 2] = ["batch.kubernetes.io/job-name", "job-name"];
/// What an application is called by those who label things.
const APPLICATION: &str = "app.kubernetes.io/name";
/// A name that Kubernetes makes of another is cut to this many bytes.
const LONGEST_MADE: usize = 63;
/// How many letters and digits by chance end it.
const BY_CHANCE: usize = 5;
/// A CronJob ends the names of its Jobs by the minutes since 1970: these in 2019. No date of eight digits is more, for long.
const CRON_MINUTES: u32 = 26_000_000;

/// The workload that a span is of: who asks, or who is asked.
#[derive(Debug, Clone)]
pub(crate) struct Whose {
    pub(super) name: Name,
    /// As it was when the request came, if the node knew of it then.
    pub(super) workload: Option<Arc<Workload>>,
}

impl Whose {
    /// Whether it is certainly the same one; what is not may have the same resource still.
    pub(super) fn is(&self, other: &Self) -> bool {
        match (&self.workload, &other.workload) {
            (Some(one), Some(another)) => Arc::ptr_eq(one, another),
            (None, None) => self.name == other.name,
            _ => false,
        }
    }

    /// What is said of it, by the agent of this node.
    pub(super) fn resource(&self, node: &str) -> Resource {
        let (namespace, name) = (self.name.namespace.as_str(), self.name.name.as_str());
        let mut attributes = match self.workload.as_deref() {
            Some(pod) if !pod.uid.is_empty() => of_pod(pod, node),
            workload => of_machine(name, workload, node),
        };
        attributes.extend([
            attribute("service.namespace", namespace),
            attribute("service.instance.id", format!("{namespace}.{name}")),
            attribute("telemetry.sdk.name", "nodemesh-agent"),
            attribute("telemetry.sdk.language", "rust"),
            attribute("telemetry.sdk.version", env!("CARGO_PKG_VERSION")),
        ]);
        Resource { attributes }
    }
}

fn of_pod(pod: &Workload, node: &str) -> Vec<KeyValue> {
    let made_by = made_by(pod);
    let application = made_by.first().map_or(pod.name.name.as_str(), |(_, name)| *name);
    let mut attributes = vec![attribute("service.name", application)];
    attributes.extend(made_by.iter().map(|(key, name)| attribute(key, *name)));
    attributes.extend([
        attribute("k8s.namespace.name", pod.name.namespace.as_str()),
        attribute("k8s.pod.name", pod.name.name.as_str()),
        attribute("k8s.pod.uid", pod.uid.as_str()),
        attribute("k8s.node.name", node),
    ]);
    attributes
}

/// No pod: its labels are there for nobody but the mesh, so that one with the application's name means it.
fn of_machine(name: &str, workload: Option<&Workload>, node: &str) -> Vec<KeyValue> {
    let label = workload.and_then(|it| it.labels.get(APPLICATION)).filter(|label| !label.is_empty());
    let application = label.map_or(name, String::as_str);
    vec![attribute("service.name", application), attribute("host.name", node)]
}

/// What made a pod, and what made that: the topmost first.
fn made_by(pod: &Workload) -> Vec<(&'static str, &str)> {
    let name = pod.name.name.as_str();
    let label = |key: &str| pod.labels.get(key).map(String::as_str).filter(|label| !label.is_empty());
    if let (Some(hash), Some(set)) = (label(TEMPLATE_HASH), made_of(name))
        && let Some(deployment) = set.strip_suffix(hash).and_then(|it| it.strip_suffix('-'))
    {
        return vec![("k8s.deployment.name", deployment), ("k8s.replicaset.name", set)];
    }
    if label(STATEFUL_POD) == Some(name)
        && let Some((set, _)) = name.rsplit_once('-')
    {
        return vec![("k8s.statefulset.name", set)];
    }
    if let (Some(_), Some(set)) = (label(TEMPLATE_GENERATION), made_of(name)) {
        return vec![("k8s.daemonset.name", set)];
    }
    let Some(job) = JOB.into_iter().find_map(label) else { return vec![] };
    let by_cron = job.rsplit_once('-').filter(|(_, minutes)| {
        minutes.len() == 8 && minutes.parse().is_ok_and(|minutes: u32| minutes >= CRON_MINUTES)
    });
    let by_cron = by_cron.map(|(cron, _)| ("k8s.cronjob.name", cron));
    by_cron.into_iter().chain([("k8s.job.name", job)]).collect()
}

/// The name that a pod's was made of (`metadata.generateName`), unless it was too long for all of it to be there still.
fn made_of(name: &str) -> Option<&str> {
    let (of, chance) = name.rsplit_once('-')?;
    (chance.len() == BY_CHANCE && name.len() < LONGEST_MADE).then_some(of)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mesh_core::model::Mode;

    use super::*;

    fn workload(name: &str, uid: &str, labels: &[(&str, &str)]) -> Workload {
        Workload {
            name: Name::new("shop", name),
            uid: uid.to_owned(),
            node: "node-a".to_owned(),
            service_account: "web".to_owned(),
            addresses: vec![],
            labels: labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
            enrolled: true,
            captured: true,
            mode: Mode::Permissive,
            checks: vec![],
        }
    }

    fn said(workload: Option<Workload>, name: &str) -> BTreeMap<String, String> {
        let whose = Whose { name: Name::new("shop", name), workload: workload.map(Arc::new) };
        whose.resource("node-a").attributes.iter().map(KeyValue::to_text).collect()
    }

    /// Expected: `service.name`, and then the attributes of what made the pod.
    #[track_caller]
    fn check_pod(name: &str, labels: &[(&str, &str)], application: &str, made_by: &[(&str, &str)]) {
        let said = said(Some(workload(name, "1-2-3", labels)), name);
        assert_eq!(said["service.name"], application);
        let kinds = ["deployment", "replicaset", "statefulset", "daemonset", "cronjob", "job"];
        let found: BTreeMap<_, _> = kinds
            .iter()
            .filter_map(|kind| said.get_key_value(&format!("k8s.{kind}.name")))
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        assert_eq!(found, made_by.iter().copied().collect());
        let expected = [("k8s.namespace.name", "shop"), ("k8s.pod.name", name), ("k8s.pod.uid", "1-2-3")];
        for (key, value) in expected.into_iter().chain([("k8s.node.name", "node-a")]) {
            assert_eq!(said[key], value);
        }
        assert!(!said.contains_key("host.name"), "the pod's own is another");
    }

    #[test]
    fn a_pods_application_has_the_name_of_the_topmost_that_made_it() {
        check_pod(
            "web-ui-7d4b9c5f6-x2x4z",
            &[("pod-template-hash", "7d4b9c5f6"), ("app.kubernetes.io/name", "else")],
            "web-ui",
            &[("k8s.deployment.name", "web-ui"), ("k8s.replicaset.name", "web-ui-7d4b9c5f6")],
        );
        let stateful = [("statefulset.kubernetes.io/pod-name", "db-main-0")];
        check_pod("db-main-0", &stateful, "db-main", &[("k8s.statefulset.name", "db-main")]);
        let daemon = [("pod-template-generation", "3"), ("controller-revision-hash", "6b7f")];
        check_pod("log-agent-8x9kq", &daemon, "log-agent", &[("k8s.daemonset.name", "log-agent")]);
        let job = [("batch.kubernetes.io/job-name", "load")];
        check_pod("load-q7d2m", &job, "load", &[("k8s.job.name", "load")]);
        check_pod("load-q7d2m", &[("job-name", "load")], "load", &[("k8s.job.name", "load")]);
        check_pod(
            "backup-29100480-q7d2m",
            &[("batch.kubernetes.io/job-name", "backup-29100480")],
            "backup",
            &[("k8s.cronjob.name", "backup"), ("k8s.job.name", "backup-29100480")],
        );
    }

    #[test]
    fn what_is_not_known_to_have_made_a_pod_is_not_said() {
        check_pod("alone", &[], "alone", &[]);
        check_pod("web-0", &[("app", "web")], "web-0", &[]);
        // Labels of another, as somebody copied them.
        check_pod("web-debug", &[("pod-template-hash", "7d4b9c5f6")], "web-debug", &[]);
        check_pod("db-copy", &[("statefulset.kubernetes.io/pod-name", "db-0")], "db-copy", &[]);
        check_pod("-7d4b9c5f6-x2x4z", &[("pod-template-hash", "")], "-7d4b9c5f6-x2x4z", &[]);
        // A name that was cut.
        let cut = format!("{}-{}", "l".repeat(57), "x2x4z");
        check_pod(&cut, &[("pod-template-generation", "1")], &cut, &[]);
        // A date.
        let dated = [("job-name", "import-20261130")];
        check_pod("import-20261130-q7d2m", &dated, "import-20261130", &[("k8s.job.name", "import-20261130")]);
    }

    #[test]
    fn what_is_no_pod_is_on_a_host_and_has_nothing_of_kubernetes() {
        let labelled = workload("web-1", "", &[("app.kubernetes.io/name", "web"), ("app", "else")]);
        for (workload, application) in
            [(Some(labelled), "web"), (Some(workload("web-1", "", &[])), "web-1"), (None, "web-1")]
        {
            let said = said(workload, "web-1");
            assert_eq!((said["service.name"].as_str(), said["host.name"].as_str()), (application, "node-a"));
            assert_eq!(
                (said["service.namespace"].as_str(), said["service.instance.id"].as_str()),
                ("shop", "shop.web-1")
            );
            assert_eq!(said["telemetry.sdk.name"], "nodemesh-agent");
            assert!(!said.keys().any(|key| key.starts_with("k8s.")), "{said:?}");
        }
    }
}
