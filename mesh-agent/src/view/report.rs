//! What the agent says of the workloads of its node.
//!
//! Whoever enrols workloads sets their states; a stream to the controller sends what it has not sent yet, so after a
//! reconnect it sends everything. Bounded by the workloads of the node: what is gone from the view is forgotten.

use std::collections::BTreeMap;

use mesh_core::{model::Name, view::Snapshot, wire::proto};
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
            let Some((at, state)) = reports.workloads.get_mut(workload) else { return false };
            reports.revision += 1;
            *at = reports.revision;
            *state = WorkloadState { enrolment: Enrolment::Pending, reason: String::new() };
            true
        });
    }

    /// What is said of every workload now.
    pub fn all(&self) -> BTreeMap<Name, WorkloadState> {
        let reports = self.shared.borrow();
        reports.workloads.iter().map(|(name, (_, state))| (name.clone(), state.clone())).collect()
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
                .map(|(name, (_, state))| to_proto(name, reports.pods.get(name), state))
                .collect(),
        }
    }

    /// Forgets workloads that are gone, whose going was sent, and that this view does not name.
    pub(super) fn prune(&self, view: &Snapshot) {
        self.shared.send_if_modified(|reports| {
            reports.workloads.retain(|name, (at, state)| {
                state.enrolment != Enrolment::Gone || *at > self.sent || view.workload(name).is_some()
            });
            let Reports { workloads, pods, .. } = reports;
            pods.retain(|name, _| workloads.contains_key(name) || view.workload(name).is_some());
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
    }
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
