//! What the agent says of the workloads of its node.
//!
//! Whoever enrols workloads sets their states; a stream to the controller sends what it has not sent yet, so after a
//! reconnect it sends everything. Bounded by the workloads of the node: what is gone from the view is forgotten.

use std::collections::BTreeMap;

use mesh_core::{
    health::Health,
    model::{Name, health::CheckedEndpoint},
    view::Snapshot,
    wire::{self, proto},
};
use serde::Serialize;
use tokio::sync::watch;

/// Reports in one message; at some 300 bytes each, well below what gRPC takes by default.
const BATCH: usize = 1000;
/// The longest reason that is sent, in characters.
const MAX_REASON: usize = 1000;

/// How far a workload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Enrolment {
    /// Its capture is being put in place.
    Pending,
    /// Its capture is in place and was proven.
    Enrolled,
    /// Its capture could not be put in place.
    Failed,
    /// It is no longer on this node.
    Gone,
}

/// How a workload is, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkloadState {
    /// How far it is.
    pub enrolment: Enrolment,
    /// For [`Enrolment::Failed`]: what is missing and how to cure it.
    pub reason: String,
}

/// Where states are set. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct ReportHandle {
    shared: watch::Sender<Reports>,
}

#[derive(Debug, Default)]
struct Reports {
    revision: u64,
    workloads: BTreeMap<Name, (u64, WorkloadState)>,
    /// The pods that are spoken of, by their uids.
    pods: BTreeMap<Name, String>,
    /// What is checked of each workload, and what came of it.
    health: BTreeMap<Name, BTreeMap<CheckedEndpoint, HealthWord>>,
}

/// What is said of an endpoint that is checked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HealthWord {
    /// How it is.
    pub health: Health,
    /// Why it is unhealthy.
    pub reason: String,
}

impl Reports {
    /// There is news of a workload; what nobody has said anything of yet is not spoken of.
    fn touch(&mut self, workload: &Name) -> bool {
        let Some((at, _)) = self.workloads.get_mut(workload) else { return false };
        self.revision += 1;
        *at = self.revision;
        true
    }
}

impl ReportHandle {
    /// Says how a workload is; replaces what was said of it before. Returns whether that is news.
    pub fn set(&self, workload: &Name, enrolment: Enrolment, reason: &str) -> bool {
        let reason = reason.chars().take(MAX_REASON).collect();
        let state = WorkloadState { enrolment, reason };
        self.shared.send_if_modified(|reports| {
            if reports.workloads.get(workload).is_some_and(|(_, said)| *said == state) {
                return false;
            }
            reports.revision += 1;
            reports.workloads.insert(workload.clone(), (reports.revision, state));
            true
        })
    }

    /// From now on what is said of this workload is of this pod; what was said of another of its name is not.
    pub fn is_pod(&self, workload: &Name, uid: &str) {
        self.shared.send_if_modified(|reports| {
            if reports.pods.get(workload).map_or("", String::as_str) == uid {
                return false;
            }
            reports.pods.insert(workload.clone(), uid.to_owned());
            reports.health.remove(workload);
            let Some((at, state)) = reports.workloads.get_mut(workload) else { return false };
            reports.revision += 1;
            *at = reports.revision;
            *state = WorkloadState { enrolment: Enrolment::Pending, reason: String::new() };
            true
        });
    }

    /// Exactly these endpoints of a workload are checked from now on; what is known of one stays known.
    pub fn checked(&self, workload: &Name, endpoints: impl Iterator<Item = CheckedEndpoint>) {
        self.shared.send_if_modified(|reports| {
            let mut before = reports.health.remove(workload).unwrap_or_default();
            let known = before.len();
            let next: BTreeMap<_, _> = endpoints
                .map(|endpoint| before.remove_entry(&endpoint).unwrap_or((endpoint, HealthWord::default())))
                .collect();
            let same = before.is_empty() && next.len() == known;
            if !next.is_empty() {
                reports.health.insert(workload.clone(), next);
            }
            !same && reports.touch(workload)
        });
    }

    /// What came of the checks of an endpoint. Passed over if it is not checked any more.
    pub fn health(&self, workload: &Name, endpoint: &CheckedEndpoint, word: HealthWord) {
        self.shared.send_if_modified(|reports| {
            let said = reports.health.get_mut(workload).and_then(|it| it.get_mut(endpoint));
            match said.filter(|said| **said != word) {
                Some(said) => *said = word,
                None => return false,
            }
            reports.touch(workload)
        });
    }

    /// What is said of every workload now.
    pub fn all(&self) -> BTreeMap<Name, WorkloadState> {
        let reports = self.shared.borrow();
        reports.workloads.iter().map(|(name, (_, state))| (name.clone(), state.clone())).collect()
    }

    /// What is said of the endpoints of a workload that are checked.
    pub fn health_of(&self, workload: &Name) -> BTreeMap<CheckedEndpoint, HealthWord> {
        self.shared.borrow().health.get(workload).cloned().unwrap_or_default()
    }

    /// Done when something else is said than when this was called.
    pub fn changed(&self) -> impl Future<Output = ()> + use<> {
        let (mut reports, shared) = (self.shared.subscribe(), self.shared.clone());
        async move {
            // Cannot fail: we hold a sender.
            let _ = reports.changed().await;
            drop(shared);
        }
    }

    /// For one stream: nothing was sent yet.
    pub(super) fn cursor(&self) -> Cursor {
        Cursor { reports: self.shared.subscribe(), shared: self.shared.clone(), sent: 0 }
    }
}

/// What one stream has sent of the reports.
#[derive(Debug)]
pub(super) struct Cursor {
    reports: watch::Receiver<Reports>,
    shared: watch::Sender<Reports>,
    sent: u64,
}

impl Cursor {
    /// Whether something is to be sent.
    pub(super) fn is_behind(&self) -> bool {
        self.reports.borrow().revision > self.sent
    }

    /// Waits until something may be. Can be dropped at any point.
    pub(super) async fn changed(&mut self) {
        // Cannot fail: the cursor holds a sender.
        let _ = self.reports.changed().await;
    }

    /// The next message, oldest words first.
    pub(super) fn next(&mut self) -> proto::Report {
        let reports = self.reports.borrow_and_update();
        let mut unsent: Vec<_> = reports.workloads.iter().filter(|(_, (at, _))| *at > self.sent).collect();
        unsent.sort_by_key(|(_, (at, _))| *at);
        let more = unsent.len() > BATCH;
        unsent.truncate(BATCH);
        self.sent = match unsent.last() {
            Some((_, (at, _))) if more => *at,
            _ => reports.revision,
        };
        proto::Report {
            workloads: unsent
                .into_iter()
                .map(|(name, (_, state))| proto::WorkloadReport {
                    health: reports.health.get(name).map(words).unwrap_or_default(),
                    ..to_proto(name, reports.pods.get(name), state)
                })
                .collect(),
        }
    }

    /// Forgets workloads that are gone, whose going was sent, and that this view does not name.
    pub(super) fn prune(&self, view: &Snapshot) {
        self.shared.send_if_modified(|reports| {
            reports.workloads.retain(|name, (at, state)| {
                state.enrolment != Enrolment::Gone || *at > self.sent || view.workload(name).is_some()
            });
            let Reports { workloads, pods, health, .. } = reports;
            pods.retain(|name, _| workloads.contains_key(name) || view.workload(name).is_some());
            health.retain(|name, _| workloads.contains_key(name) || view.workload(name).is_some());
            false
        });
    }
}

fn to_proto(name: &Name, uid: Option<&String>, state: &WorkloadState) -> proto::WorkloadReport {
    use proto::workload_report::Enrolment as Wire;
    let enrolment = match state.enrolment {
        Enrolment::Pending => Wire::Pending,
        Enrolment::Enrolled => Wire::Enrolled,
        Enrolment::Failed => Wire::Failed,
        Enrolment::Gone => Wire::Gone,
    };
    proto::WorkloadReport {
        workload: name.to_string(),
        state: enrolment.into(),
        reason: state.reason.clone(),
        uid: uid.cloned().unwrap_or_default(),
        health: Vec::new(),
    }
}

fn words(of: &BTreeMap<CheckedEndpoint, HealthWord>) -> Vec<proto::EndpointHealth> {
    of.iter().map(|(endpoint, word)| wire::health::word(endpoint, word.health, &word.reason)).collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::state::{
            ViewState,
            tests::{mesh, trust_domain, update},
        },
        *,
    };

    fn name(name: &str) -> Name {
        Name::new("shop", name)
    }

    fn said(report: &proto::Report) -> Vec<&str> {
        report.workloads.iter().map(|report| report.workload.as_str()).collect()
    }

    #[test]
    fn a_stream_sends_what_is_new_and_the_next_stream_everything() {
        let handle = ReportHandle::default();
        let mut cursor = handle.cursor();
        assert!(!cursor.is_behind());
        handle.set(&name("a"), Enrolment::Pending, "");
        handle.set(&name("b"), Enrolment::Failed, "no veth");
        assert_eq!(said(&cursor.next()), ["shop/a", "shop/b"]);
        handle.set(&name("b"), Enrolment::Failed, "no veth");
        assert!(!cursor.is_behind(), "the same words again are no news");
        handle.set(&name("a"), Enrolment::Enrolled, "");
        assert_eq!(said(&cursor.next()), ["shop/a"]);
        assert!(!cursor.is_behind());
        assert_eq!(said(&handle.cursor().next()), ["shop/b", "shop/a"]);
    }

    #[test]
    fn what_was_said_of_a_pod_is_not_said_of_the_next_one_of_its_name() {
        let handle = ReportHandle::default();
        let web = name("web");
        let said = |handle: &ReportHandle| {
            let word = handle.cursor().next().workloads.remove(0);
            (word.uid.clone(), word.state())
        };
        use proto::workload_report::Enrolment as Wire;
        handle.is_pod(&web, "u-1");
        assert!(handle.cursor().next().workloads.is_empty(), "nothing is known of it yet");
        handle.set(&web, Enrolment::Enrolled, "");
        handle.is_pod(&web, "u-1");
        assert_eq!(said(&handle), ("u-1".to_owned(), Wire::Enrolled));
        handle.is_pod(&web, "u-2");
        assert_eq!(said(&handle), ("u-2".to_owned(), Wire::Pending));
    }

    #[test]
    fn what_came_of_checks_is_said_of_those_that_are_done_and_anew_to_each_stream() {
        let (handle, web) = (ReportHandle::default(), name("web"));
        let endpoint = |port| CheckedEndpoint { service: name("pay"), port, address: [10, 0, 0, 1].into() };
        let unhealthy = HealthWord { health: Health::Unhealthy, reason: "it answered 503".into() };
        handle.checked(&web, [80, 81].map(endpoint).into_iter());
        let mut cursor = handle.cursor();
        assert!(!cursor.is_behind(), "nothing is known of the workload yet");
        handle.set(&web, Enrolment::Enrolled, "");
        let said = |cursor: &mut Cursor| -> Vec<_> {
            let words = cursor.next().workloads.remove(0).health;
            words.iter().map(|it| (it.service_port, it.health(), it.reason.clone())).collect()
        };
        use proto::endpoint_health::Health as Wire;
        let undecided = |port| (port, Wire::Undecided, String::new());
        assert_eq!(said(&mut cursor), [undecided(80), undecided(81)]);
        handle.health(&web, &endpoint(81), unhealthy.clone());
        let failing = (81, Wire::Unhealthy, unhealthy.reason.clone());
        assert_eq!(said(&mut cursor), [undecided(80), failing.clone()]);
        handle.health(&web, &endpoint(81), unhealthy.clone());
        handle.checked(&web, [80, 81].map(endpoint).into_iter());
        assert!(!cursor.is_behind(), "the same again is no news");
        handle.checked(&web, [endpoint(81)].into_iter());
        handle.health(&web, &endpoint(80), unhealthy);
        for cursor in [&mut cursor, &mut handle.cursor()] {
            let failing = [failing.clone()];
            assert_eq!(said(cursor), failing, "what is known stays, what is not checked goes");
        }
        handle.is_pod(&web, "u-2");
        assert_eq!(said(&mut handle.cursor()), []);
    }

    #[test]
    fn many_reports_go_in_batches() {
        let handle = ReportHandle::default();
        for number in 0..BATCH + 5 {
            handle.set(&name(&number.to_string()), Enrolment::Enrolled, "");
        }
        let mut cursor = handle.cursor();
        assert_eq!(cursor.next().workloads.len(), BATCH);
        assert!(cursor.is_behind());
        assert_eq!(cursor.next().workloads.len(), 5);
        assert!(!cursor.is_behind());
    }

    #[test]
    fn what_is_gone_is_forgotten_once_it_was_said() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let root = rcgen::CertificateParams::default().self_signed(&key).unwrap().der().to_vec();
        let mut state = ViewState::new("n1", trust_domain());
        let view = state.apply(&update("1", true, vec![mesh(vec![root])], &[])).unwrap().snapshot;

        let handle = ReportHandle::default();
        handle.set(&name("a"), Enrolment::Gone, "");
        let mut cursor = handle.cursor();
        cursor.prune(&view);
        assert_eq!(said(&cursor.next()), ["shop/a"]);
        cursor.prune(&view);
        assert!(handle.all().is_empty());
    }
}
