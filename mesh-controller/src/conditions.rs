//! What a pod's status says of its capture: the condition `nodemesh.io/captured`, as every controller reads it and the one
//! that the pod's agent is connected to writes it. Pure.
//!
//! Stands apart from [`report`](crate::report), which is what an agent said: this is what is kept of it, by the one store
//! that all controllers share. A condition is of its pod alone: another under the same name has a status of its own.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::Client;
use mesh_core::model::{Name, health::MAX_CHECKS};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::health::Unhealthy;

/// The condition.
pub const TYPE: &str = "nodemesh.io/captured";
/// The one of its endpoints' health, of pods that are checked. Nothing else of Kubernetes looks at it.
pub const HEALTHY: &str = "nodemesh.io/healthy";
/// Longest message that is written, bytes; the API server takes 32 KiB.
const MAX_MESSAGE: usize = 1000;

/// The pods that could have a condition, by name.
pub type Conditions = BTreeMap<Name, PodCondition>;

/// The pods that the workloads are.
#[derive(Clone)]
pub struct Pods {
    /// Where they are.
    pub client: Client,
    /// What they say.
    pub conditions: watch::Receiver<Arc<Conditions>>,
}

impl fmt::Debug for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pods").finish_non_exhaustive()
    }
}

/// One pod's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCondition {
    /// Which pod of this name.
    pub uid: String,
    /// Where it runs.
    pub node: String,
    /// It has run to its end.
    pub ended: bool,
    /// What its status says; nothing of one that never was in the mesh.
    pub says: Option<Says>,
    /// Which of its endpoints are unhealthy, if it is checked.
    pub unhealthy: Option<Unhealthy>,
}

/// What a condition says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Says {
    /// Its status: capture is in place.
    pub captured: bool,
    /// In one word.
    pub reason: Why,
    /// Cause and cure.
    pub message: String,
}

/// The reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Capture is in place.
    Captured,
    /// It is under way.
    Pending,
    /// It cannot be put in place.
    Failed,
    /// Nobody wants it any more.
    NotEnrolled,
    /// There is nothing to capture any more.
    Ended,
}

impl Why {
    const ALL: [Self; 5] = [Self::Captured, Self::Pending, Self::Failed, Self::NotEnrolled, Self::Ended];

    /// `reason` of the condition.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Captured => "Captured",
            Self::Pending => "Pending",
            Self::Failed => "Failed",
            Self::NotEnrolled => "NotEnrolled",
            Self::Ended => "Ended",
        }
    }
}

impl Says {
    /// What is said for a reason.
    pub fn new(reason: Why, message: &str) -> Self {
        let message = match (reason, message) {
            (Why::Captured, "") => "its connections are carried by the mesh",
            (Why::NotEnrolled, "") => {
                "it is not enrolled: label it, or its namespace, nodemesh.io/enroll=true"
            }
            (Why::Ended, _) => "it has run to its end",
            (_, message) => message,
        };
        let end = message.floor_char_boundary(MAX_MESSAGE);
        Self { captured: reason == Why::Captured, reason, message: message[..end].to_owned() }
    }

    /// The patch of a pod's status (strategic merge) that makes it say this; refused by the API server for a pod with
    /// another uid. The time of the last change is written when there is one. `health`: what it says besides ([`health`]).
    pub fn patch(&self, uid: &str, before: Option<&Self>, health: Option<Value>, now: Timestamp) -> Value {
        let mut condition = json!({
            "type": TYPE,
            "status": if self.captured { "True" } else { "False" },
            "reason": self.reason.as_str(),
            "message": self.message,
        });
        if before.is_none_or(|before| before.captured != self.captured) {
            condition["lastTransitionTime"] = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
        }
        let conditions: Vec<Value> = [condition].into_iter().chain(health).collect();
        json!({"metadata": {"uid": uid}, "status": {"conditions": conditions}})
    }
}

/// The patch of a pod's status (strategic merge) after which it says nothing; refused as in [`Says::patch`].
pub fn removal(uid: &str) -> Value {
    let gone = |type_: &str| json!({"type": type_, "$patch": "delete"});
    json!({"metadata": {"uid": uid}, "status": {"conditions": [gone(TYPE), gone(HEALTHY)]}})
}

/// The entry of a patch that makes a pod's status say this of its endpoints; none where it says so.
pub fn health(wanted: Option<&Unhealthy>, before: Option<&Unhealthy>, now: Timestamp) -> Option<Value> {
    if wanted == before {
        return None;
    }
    let Some(unhealthy) = wanted else { return Some(json!({"type": HEALTHY, "$patch": "delete"})) };
    let (status, reason) = if unhealthy.is_empty() { ("True", "Healthy") } else { ("False", "Unhealthy") };
    let lines: Vec<String> = unhealthy.iter().map(|(endpoint, why)| format!("{endpoint}: {why}")).collect();
    let mut condition =
        json!({"type": HEALTHY, "status": status, "reason": reason, "message": lines.join("\n")});
    if before.is_none_or(|before| before.is_empty() != unhealthy.is_empty()) {
        condition["lastTransitionTime"] = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
    }
    Some(condition)
}

/// What such a condition says: a line that is none of ours makes nothing unhealthy.
fn unhealthy(message: &str) -> Unhealthy {
    let line = |line: &str| {
        let (at, why) = line.split_once(" at ")?;
        // An address of IPv6 has colons too, but no space behind them.
        let (address, why) = why.split_once(": ")?;
        Some((format!("{at} at {address}").parse().ok()?, why.to_owned()))
    };
    message.lines().take(MAX_CHECKS).filter_map(line).collect()
}

/// A pod on a node.
pub fn of_pod(pod: &Pod) -> Option<(Name, PodCondition)> {
    let (metadata, spec) = (&pod.metadata, pod.spec.as_ref()?);
    let name = Name::new(metadata.namespace.as_deref()?, metadata.name.as_deref()?);
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ours = conditions.clone().find(|it| it.type_ == TYPE);
    let health = conditions.clone().find(|it| it.type_ == HEALTHY);
    let unhealthy = health.map(|it| unhealthy(it.message.as_deref().unwrap_or_default()));
    let says = ours.map(|it| {
        let captured = it.status == "True";
        let known = Why::ALL.into_iter().find(|why| it.reason.as_deref() == Some(why.as_str()));
        // Of another version: its status counts.
        let reason = known.filter(|why| (*why == Why::Captured) == captured);
        let reason = reason.unwrap_or(if captured { Why::Captured } else { Why::Failed });
        Says { captured, reason, message: it.message.clone().unwrap_or_default() }
    });
    let (uid, node) = (metadata.uid.clone()?, spec.node_name.clone()?);
    Some((name, PodCondition { uid, node, ended: has_ended(pod), says, unhealthy }))
}

/// Whether it has run to its end.
pub(crate) fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use mesh_core::model::health::CheckedEndpoint;

    use super::*;

    fn pod(condition: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u-1"},
            "spec": {"nodeName": "node-a", "containers": []},
            "status": {"conditions": [{"type": "Ready", "status": "False"}, condition]},
        }))
        .unwrap()
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        for why in Why::ALL {
            let says = Says::new(why, "because");
            let patch = says.patch("u-1", None, None, Timestamp::UNIX_EPOCH);
            assert_eq!(patch["metadata"]["uid"], "u-1");
            let (name, read) = of_pod(&pod(patch["status"]["conditions"][0].clone())).unwrap();
            assert_eq!((name.to_string().as_str(), read.node.as_str()), ("shop/web", "node-a"));
            assert_eq!(read.says, Some(says));
        }
        let (_, never) = of_pod(&pod(json!({"type": "x", "status": "True"}))).unwrap();
        assert_eq!((never.uid.as_str(), never.says), ("u-1", None));
    }

    #[test]
    fn what_is_said_of_endpoints_is_what_is_read_and_goes_when_nothing_is_checked() {
        let endpoint = |address: &str| CheckedEndpoint {
            service: Name::new("shop", "pay"),
            port: 80,
            address: address.parse().unwrap(),
        };
        let why = "not an answer: x at y: z";
        let unhealthy: Unhealthy =
            [endpoint("10.0.0.1"), endpoint("fd00::1")].map(|it| (it, why.to_owned())).into();
        let at = Timestamp::UNIX_EPOCH;
        for wanted in [Unhealthy::new(), unhealthy.clone()] {
            let condition = health(Some(&wanted), None, at).unwrap();
            assert_eq!(condition["status"], if wanted.is_empty() { "True" } else { "False" });
            assert_eq!(condition["lastTransitionTime"], "1970-01-01T00:00:00Z");
            assert_eq!(of_pod(&pod(condition)).unwrap().1.unhealthy.as_ref(), Some(&wanted));
            assert_eq!(health(Some(&wanted), Some(&wanted), at), None);
        }
        let gone = health(None, Some(&unhealthy), at).unwrap();
        assert_eq!(gone, json!({"type": HEALTHY, "$patch": "delete"}));
        let condition = json!({"type": HEALTHY, "status": "False", "message": "somebody's own words\n: at "});
        assert_eq!(of_pod(&pod(condition)).unwrap().1.unhealthy, Some(Unhealthy::new()));
    }

    #[test]
    fn the_time_of_the_last_change_is_that_of_the_status() {
        let (yes, no) = (Says::new(Why::Captured, ""), Says::new(Why::Failed, "no veth"));
        let at = |says: &Says, before: Option<&Says>| {
            says.patch("u", before, None, Timestamp::UNIX_EPOCH)["status"]["conditions"][0]["lastTransitionTime"]
                .clone()
        };
        assert_eq!(at(&yes, None), "1970-01-01T00:00:00Z");
        assert_eq!(at(&yes, Some(&no)), "1970-01-01T00:00:00Z");
        assert_eq!(
            at(&no, Some(&Says::new(Why::Pending, ""))),
            Value::Null,
            "it was not captured before either"
        );
    }

    #[test]
    fn a_word_of_another_version_counts_by_its_status_and_messages_are_bounded() {
        let read = |status: &str, reason: &str| {
            let condition = json!({"type": TYPE, "status": status, "reason": reason});
            of_pod(&pod(condition)).unwrap().1.says.unwrap().reason
        };
        assert_eq!(read("True", "Elsewhere"), Why::Captured);
        assert_eq!(read("True", "Failed"), Why::Captured);
        assert_eq!(read("False", "Captured"), Why::Failed);
        assert_eq!(read("Unknown", ""), Why::Failed);
        assert_eq!(Says::new(Why::Failed, &"ä".repeat(MAX_MESSAGE)).message.len(), MAX_MESSAGE);
    }
}
