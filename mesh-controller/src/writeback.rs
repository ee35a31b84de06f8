//! What agents report, onto their pods: a condition of the status, and an event for what changed.
//!
//! Level-triggered: what each connected agent said last is compared with what its pods say, whenever either changes, and
//! what differs is patched. So a patch that was lost, or that another controller overwrote, is made again; one that is
//! there already is not. Only the controller that a node's agent is connected to writes for that node's pods: an agent
//! that goes to another controller says everything again there, and here it is forgotten.
//!
//! Bounded: one wish a workload, [`BATCH`] patches in each [`PACE`], for one pod one in [`PACE`], and after failures with
//! pauses that grow to [`LONGEST_PAUSE`].

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use k8s_openapi::{
    api::core::v1::{ObjectReference, Pod},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use mesh_core::{
    model::Name,
    wire::proto::{EndpointHealth, WorkloadReport, workload_report::Enrolment},
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    conditions::{self, Conditions, PodCondition, Says, Why},
    distribute::Hub,
    health::{self, Unhealthy},
    kubernetes::in_time,
    metrics::Metrics,
    model::Model,
};

/// Who writes, as the API server notes it.
const MANAGER: &str = "nodemesh-controller";
/// Patches in one go, and how many of them at once.
const BATCH: usize = 50;
const AT_ONCE: usize = 8;
/// Between two goes: a hundred patches a second at most, and a pod's own condition has come back by then.
const PACE: Duration = Duration::from_millis(500);
/// After failures, the longest pause for one pod.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often it is looked who is connected, when nothing else happens.
const LOOK: Duration = Duration::from_secs(1);

/// What pods shall say.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    wishes: Mutex<BTreeMap<Name, Wish>>,
    changed: Notify,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Wish {
    uid: String,
    node: String,
    says: Says,
    /// What its agent says of the endpoints that it checks.
    health: Vec<EndpointHealth>,
    /// Failures in a row, and when it may be tried.
    failures: u32,
    not_before: Option<Instant>,
}

impl Wish {
    /// What the pod shall say of its endpoints: while it is not captured, and not gone, what it says already.
    fn unhealthy(&self, before: Option<&Unhealthy>) -> Option<Unhealthy> {
        match self.says.reason {
            Why::Captured if self.health.is_empty() => None,
            Why::Captured => Some(health::after(&self.health, before.unwrap_or(&Unhealthy::new()))),
            Why::Pending | Why::Failed => before.cloned(),
            Why::NotEnrolled | Why::Ended => None,
        }
    }
}

impl Wishes {
    /// Takes what a node says of its own pods; what it says of others' is passed over.
    pub fn tell(&self, node: &str, words: &[WorkloadReport], model: &Model) {
        let mut wishes = self.wishes();
        for word in words {
            let Ok(name) = word.workload.parse::<Name>() else { continue };
            let known = model.workloads.get(&name).filter(|it| it.node == node && !it.uid.is_empty());
            let Some(uid) = known.map(|it| &it.uid).filter(|uid| word.uid.is_empty() || word.uid == **uid)
            else {
                continue;
            };
            let why = match word.state() {
                Enrolment::Pending => Why::Pending,
                Enrolment::Enrolled => Why::Captured,
                Enrolment::Failed => Why::Failed,
                Enrolment::Gone => Why::NotEnrolled,
                Enrolment::Unspecified => continue,
            };
            let says = Says::new(why, &word.reason);
            let same = |wish: &Wish| wish.uid == *uid && wish.says == says && wish.health == word.health;
            if wishes.get(&name).is_some_and(same) {
                continue;
            }
            let (uid, node, health) = (uid.clone(), node.to_owned(), word.health.clone());
            let wish = Wish { uid, node, says, health, failures: 0, not_before: None };
            wishes.insert(name, wish);
        }
        self.shared.changed.notify_one();
    }

    /// What differs from what pods say, of the nodes that are connected; the others' wishes are forgotten, and those for
    /// pods that are gone.
    fn due(
        &self,
        is_connected: impl Fn(&str) -> bool,
        conditions: &Conditions,
        now: Instant,
    ) -> Vec<(Name, Wish)> {
        let mut wishes = self.wishes();
        // No agent has anything to say of a pod that has ended.
        for (name, pod) in conditions.iter().filter(|(_, pod)| pod.ended && is_connected(&pod.node)) {
            let says = Says::new(Why::Ended, "");
            let is_so = pod.says.as_ref().is_none_or(|it| matches!(it.reason, Why::Ended | Why::NotEnrolled));
            if !is_so && wishes.get(name).is_none_or(|wish| wish.uid != pod.uid || wish.says != says) {
                let (uid, node) = (pod.uid.clone(), pod.node.clone());
                wishes.insert(
                    name.clone(),
                    Wish { uid, node, says, health: vec![], failures: 0, not_before: None },
                );
            }
        }
        wishes.retain(|name, wish| {
            is_connected(&wish.node) && conditions.get(name).is_some_and(|pod| pod.uid == wish.uid)
        });
        let differs = |(name, wish): &(&Name, &mut Wish)| {
            let pod = conditions.get(*name);
            let (says, unhealthy) =
                pod.map_or((None, None), |pod| (pod.says.as_ref(), pod.unhealthy.as_ref()));
            // A pod that has no condition was never in the mesh; that it is not says enough.
            let is_so = says == Some(&wish.says) || says.is_none() && wish.says.reason == Why::NotEnrolled;
            let is_so = is_so && wish.unhealthy(unhealthy).as_ref() == unhealthy;
            !is_so && wish.not_before.is_none_or(|at| at <= now)
        };
        let due = wishes.iter_mut().filter(differs).take(BATCH);
        due.map(|(name, wish)| {
            wish.not_before = Some(now + PACE);
            (name.clone(), wish.clone())
        })
        .collect()
    }

    /// It was tried: after a failure the next attempt waits.
    fn tried(&self, name: &Name, tried: &Wish, failed: bool, now: Instant) {
        let mut wishes = self.wishes();
        let is_same =
            |wish: &Wish| wish.uid == tried.uid && wish.says == tried.says && wish.health == tried.health;
        let same = wishes.get_mut(name).filter(|wish| is_same(wish));
        if let Some(wish) = same {
            wish.failures = if failed { wish.failures.saturating_add(1) } else { 0 };
            let pause = PACE.saturating_mul(1 << wish.failures.min(6)).min(LONGEST_PAUSE);
            wish.not_before = Some(now + pause);
        }
    }

    fn wishes(&self) -> MutexGuard<'_, BTreeMap<Name, Wish>> {
        self.shared.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes.
pub struct Writer {
    client: Client,
    wishes: Wishes,
    conditions: watch::Receiver<Arc<Conditions>>,
    recorder: Recorder,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("wishes", &self.wishes).finish_non_exhaustive()
    }
}

impl Writer {
    /// For the pods that these conditions are of.
    pub fn new(
        client: Client,
        wishes: Wishes,
        conditions: watch::Receiver<Arc<Conditions>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let reporter = Reporter { controller: MANAGER.to_owned(), instance: None };
        Self { recorder: Recorder::new(client.clone(), reporter), client, wishes, conditions, metrics }
    }

    /// Writes until cancelled.
    pub async fn run(mut self, hub: Arc<Hub>, cancel: CancellationToken) {
        loop {
            // Cancel-safe: none of them holds anything.
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.wishes.shared.changed.notified() => {}
                changed = self.conditions.changed() => if changed.is_err() { return },
                () = sleep(LOOK) => {}
            }
            let conditions = self.conditions.borrow_and_update().clone();
            let connected = hub.connected_nodes();
            let due = self.wishes.due(|node| connected.contains(node), &conditions, Instant::now());
            if due.is_empty() {
                continue;
            }
            let (writer, conditions) = (&self, &conditions);
            stream::iter(due)
                .for_each_concurrent(AT_ONCE, |(name, wish)| async move {
                    writer.write(&name, &wish, conditions.get(&name)).await;
                })
                .await;
            // Cancel-safe: as above.
            tokio::select! {
                () = cancel.cancelled() => return,
                () = sleep(PACE) => {}
            }
        }
    }

    async fn write(&self, name: &Name, wish: &Wish, pod: Option<&PodCondition>) {
        let (before, unhealthy) = pod.map_or((None, None), |pod| (pod.says.as_ref(), pod.unhealthy.as_ref()));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &name.namespace);
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let now = Timestamp::now();
        let health = conditions::health(wish.unhealthy(unhealthy).as_ref(), unhealthy, now);
        let patch = Patch::Strategic(wish.says.patch(&wish.uid, before, health, now));
        let patched = in_time(pods.patch_status(&name.name, &params, &patch)).await;
        self.wishes.tried(name, wish, patched.is_err(), Instant::now());
        self.metrics.conditions_written(patched.is_ok());
        match patched {
            Ok(_) => self.tell(name, wish, before).await,
            Err(error) => {
                tracing::warn!(workload = %name, %error, "its condition was not written; it is tried again")
            }
        }
    }

    /// An event of what changed; one that is lost is not said again.
    async fn tell(&self, name: &Name, wish: &Wish, before: Option<&Says>) {
        let (reason, type_) = match (wish.says.reason, before.map(|it| it.reason)) {
            (now, Some(before)) if now == before => return,
            (Why::Pending, _) => return,
            (Why::Captured, _) => ("Enrolled", EventType::Normal),
            (Why::NotEnrolled | Why::Ended, _) => ("Left", EventType::Normal),
            (Why::Failed, _) => ("EnrolmentFailed", EventType::Warning),
        };
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(wish.says.message.clone()),
            action: "Capture".to_owned(),
            secondary: None,
        };
        let pod = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(name.name.clone()),
            namespace: Some(name.namespace.clone()),
            uid: Some(wish.uid.clone()),
            ..ObjectReference::default()
        };
        if let Err(error) = in_time(self.recorder.publish(&event, &pod)).await {
            tracing::debug!(workload = %name, %error, "an event was not written");
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        health::Health, model::health::CheckedEndpoint, wire::proto::workload_report::Enrolment,
    };

    use super::*;
    use crate::model::{Object, Workload};

    fn name() -> Name {
        Name::new("shop", "web")
    }

    fn model(uid: &str, node: &str) -> Model {
        let object = Object::Workload(Arc::new(Workload {
            name: name(),
            uid: uid.into(),
            labels: BTreeMap::new(),
            enroll: Some(true),
            mode: None,
            node: node.into(),
            addresses: vec![],
            service_account: "default".into(),
            ready: true,
        }));
        [&object].into_iter().collect()
    }

    fn word(uid: &str, state: Enrolment) -> WorkloadReport {
        WorkloadReport {
            workload: name().to_string(),
            state: state.into(),
            uid: uid.into(),
            ..Default::default()
        }
    }

    fn pod(uid: &str, says: Option<Says>) -> Conditions {
        [(name(), PodCondition { uid: uid.into(), node: "n".into(), ended: false, says, unhealthy: None })]
            .into()
    }

    fn due(wishes: &Wishes, conditions: &Conditions, now: Instant) -> Option<Why> {
        wishes.due(|node| node == "n", conditions, now).first().map(|(_, wish)| wish.says.reason)
    }

    #[tokio::test]
    async fn what_a_pods_own_agent_says_is_wished_until_the_pod_says_it() {
        let (wishes, now) = (Wishes::default(), Instant::now());
        wishes.tell("n", &[word("u", Enrolment::Enrolled)], &model("u", "n"));
        assert_eq!(due(&wishes, &pod("u", None), now), Some(Why::Captured));
        assert_eq!(due(&wishes, &pod("u", None), now), None, "it is on its way");
        let captured = pod("u", Some(Says::new(Why::Captured, "")));
        assert_eq!(due(&wishes, &captured, now + PACE), None);
        // Somebody wrote over it, or the patch was lost.
        assert_eq!(
            due(&wishes, &pod("u", Some(Says::new(Why::Failed, "x"))), now + PACE),
            Some(Why::Captured)
        );
        wishes.tell("n", &[word("u", Enrolment::Failed)], &model("u", "n"));
        assert_eq!(due(&wishes, &captured, now), Some(Why::Failed), "a new word waits for nothing");
    }

    #[tokio::test]
    async fn what_is_said_of_endpoints_is_wished_until_the_pod_says_it() {
        let (wishes, now) = (Wishes::default(), Instant::now());
        let endpoint =
            CheckedEndpoint { service: Name::new("shop", "pay"), port: 80, address: [10, 0, 0, 1].into() };
        let say = |state, health| {
            let health = vec![mesh_core::wire::health::word(&endpoint, health, "503")];
            wishes.tell("n", &[WorkloadReport { health, ..word("u", state) }], &model("u", "n"));
        };
        let captured = |unhealthy: Option<&Unhealthy>| {
            let mut pods = pod("u", Some(Says::new(Why::Captured, "")));
            pods.get_mut(&name()).unwrap().unhealthy = unhealthy.cloned();
            pods
        };
        let (well, bad) = (Unhealthy::new(), Unhealthy::from([(endpoint.clone(), "503".to_owned())]));
        say(Enrolment::Enrolled, Health::Unhealthy);
        assert!(due(&wishes, &captured(None), now).is_some());
        assert_eq!(due(&wishes, &captured(Some(&bad)), now + PACE), None);
        say(Enrolment::Enrolled, Health::Undecided);
        assert_eq!(due(&wishes, &captured(Some(&bad)), now), None, "an agent has started anew");
        say(Enrolment::Enrolled, Health::Healthy);
        assert!(due(&wishes, &captured(Some(&bad)), now).is_some());
        assert_eq!(due(&wishes, &captured(Some(&well)), now + PACE), None);
        wishes.tell("n", &[word("u", Enrolment::Enrolled)], &model("u", "n"));
        assert!(due(&wishes, &captured(Some(&well)), now).is_some(), "it is not checked any more");
    }

    #[tokio::test]
    async fn nobody_speaks_for_another_pod() {
        let now = Instant::now();
        for (node, said_of, model, conditions) in [
            ("m", "u", model("u", "n"), pod("u", None)),
            ("n", "old", model("u", "n"), pod("u", None)),
            ("n", "u", model("u", "n"), pod("next", None)),
            ("n", "u", model("u", "n"), Conditions::new()),
            ("n", "", model("", "n"), pod("u", None)),
        ] {
            let wishes = Wishes::default();
            wishes.tell(node, &[word(said_of, Enrolment::Enrolled)], &model);
            assert_eq!(due(&wishes, &conditions, now), None, "{node} {said_of}");
        }
    }

    #[tokio::test]
    async fn who_has_gone_to_another_controller_is_forgotten() {
        let (wishes, now) = (Wishes::default(), Instant::now());
        wishes.tell("n", &[word("u", Enrolment::Failed)], &model("u", "n"));
        assert!(wishes.due(|_| false, &pod("u", None), now).is_empty());
        assert_eq!(due(&wishes, &pod("u", None), now + LONGEST_PAUSE), None, "it says it again where it is");
    }

    #[tokio::test]
    async fn a_failure_is_tried_again_with_pauses_that_grow_to_a_bound() {
        let (wishes, mut now) = (Wishes::default(), Instant::now());
        wishes.tell("n", &[word("u", Enrolment::Enrolled)], &model("u", "n"));
        let mut pauses = vec![];
        for _ in 0..10 {
            let (_, wish) = wishes.due(|_| true, &pod("u", None), now).remove(0);
            wishes.tried(&name(), &wish, true, now);
            let began = now;
            while wishes.due(|_| true, &pod("u", None), now).is_empty() {
                now += Duration::from_millis(100);
            }
            pauses.push(now - began);
            // It was taken by looking.
            now += PACE;
        }
        assert!(pauses.is_sorted() && pauses[0] >= PACE, "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= LONGEST_PAUSE + PACE), "{pauses:?}");
    }

    #[tokio::test]
    async fn a_pod_that_has_ended_is_not_captured_any_more_though_its_agent_says_nothing() {
        let (wishes, now) = (Wishes::default(), Instant::now());
        wishes.tell("n", &[word("u", Enrolment::Enrolled)], &model("u", "n"));
        let ended = |says| {
            let mut pods = pod("u", says);
            pods.values_mut().for_each(|pod| pod.ended = true);
            pods
        };
        assert_eq!(due(&wishes, &ended(Some(Says::new(Why::Captured, ""))), now), Some(Why::Ended));
        assert_eq!(due(&wishes, &ended(Some(Says::new(Why::Ended, ""))), now + PACE), None);
        assert_eq!(due(&Wishes::default(), &ended(None), now), None, "it never was in the mesh");
        let left = ended(Some(Says::new(Why::NotEnrolled, "")));
        assert_eq!(due(&Wishes::default(), &left, now), None, "it had left before");
    }

    #[tokio::test]
    async fn a_pod_that_never_was_in_the_mesh_is_not_told_that_it_is_not() {
        let (wishes, now) = (Wishes::default(), Instant::now());
        wishes.tell("n", &[word("u", Enrolment::Gone)], &model("u", "n"));
        assert_eq!(due(&wishes, &pod("u", None), now), None);
        assert_eq!(due(&wishes, &pod("u", Some(Says::new(Why::Captured, ""))), now), Some(Why::NotEnrolled));
    }
}
