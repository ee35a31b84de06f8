//! What agents said of their workloads. An enrolled workload's word makes sources speak TLS to it, so it must survive
//! a restart of the controller, and only the workload's own node may say it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_core::{
    model::Name,
    wire::proto::{WorkloadReport, workload_report::Enrolment},
};
use serde::{Deserialize, Serialize};

use crate::{
    conditions::{Conditions, Why},
    model::Model,
    store::{self, StoreError},
};

/// Longest reason that is kept, characters.
const MAX_REASON: usize = 1000;

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The state cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file is damaged.
    #[error(
        "{path} is damaged: {reason}; remove it and start again (workloads count as not captured until their agents \
         report again)"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// How far a workload's capture is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Under way.
    Pending,
    /// In place.
    Enrolled,
    /// Not possible; the reason says why.
    Failed,
}

/// The last word about one workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    /// The node whose agent said it.
    pub node: String,
    /// What it said.
    pub state: State,
    /// Why, for what is not enrolled.
    pub reason: String,
}

/// The last word about every workload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reports {
    by_workload: BTreeMap<Name, Reported>,
}

impl Reports {
    /// What pods say of themselves, which all controllers read; of those that the model has in the same place.
    pub fn of_pods(conditions: &Conditions, model: &Model) -> Self {
        let of = |workload: &Arc<crate::model::Workload>| {
            let pod = conditions.get(&workload.name)?;
            let says = pod.says.as_ref().filter(|_| pod.uid == workload.uid && pod.node == workload.node)?;
            let state = match says.reason {
                Why::Captured => State::Enrolled,
                Why::Pending => State::Pending,
                Why::Failed => State::Failed,
                Why::NotEnrolled | Why::Ended => return None,
            };
            let reason = if state == State::Enrolled { String::new() } else { says.message.clone() };
            Some((workload.name.clone(), Reported { node: pod.node.clone(), state, reason }))
        };
        Self { by_workload: model.workloads.values().filter_map(of).collect() }
    }

    /// Reads what was kept.
    pub fn load(path: &Path) -> Result<Self, ReportError> {
        let Some(bytes) = store::read(path)? else { return Ok(Self::default()) };
        let by_workload = serde_json::from_slice(&bytes)
            .map_err(|error| ReportError::Damaged { path: path.to_owned(), reason: error.to_string() })?;
        Ok(Self { by_workload })
    }

    /// Keeps it for the next start.
    pub fn save(&self, path: &Path) -> Result<(), ReportError> {
        let bytes = serde_json::to_vec(&self.by_workload).expect("names and words are always JSON");
        Ok(store::replace(path, &bytes)?)
    }

    /// Takes what a node says of its own workloads; `true` if that changed anything. What it says of others', or of
    /// unknown ones, is passed over: its view may be older than ours.
    pub fn take(&mut self, node: &str, words: &[WorkloadReport], model: &Model) -> bool {
        let before = self.by_workload.len();
        self.by_workload.retain(|name, _| model.workloads.contains_key(name));
        let mut changed = before != self.by_workload.len();
        for word in words {
            let Ok(name) = word.workload.parse::<Name>() else { continue };
            if model.workloads.get(&name).is_none_or(|workload| workload.node != node) {
                continue;
            }
            let state = match word.state() {
                Enrolment::Pending => State::Pending,
                Enrolment::Enrolled => State::Enrolled,
                Enrolment::Failed => State::Failed,
                Enrolment::Gone => {
                    changed |= self.by_workload.remove(&name).is_some();
                    continue;
                }
                Enrolment::Unspecified => continue,
            };
            let reason = word.reason.chars().take(MAX_REASON).collect();
            let reported = Reported { node: node.to_owned(), state, reason };
            changed |= self.by_workload.get(&name) != Some(&reported);
            self.by_workload.insert(name, reported);
        }
        changed
    }

    /// The last word about a workload, if it is of the node that has it now.
    pub fn of(&self, workload: &Name, node: &str) -> Option<&Reported> {
        self.by_workload.get(workload).filter(|reported| reported.node == node)
    }

    /// The workloads whose own agent says that their capture is in place.
    pub fn captured(&self, model: &Model) -> BTreeSet<Name> {
        let captured = |workload: &crate::model::Workload| {
            self.of(&workload.name, &workload.node).is_some_and(|reported| reported.state == State::Enrolled)
        };
        model.workloads.values().filter(|it| captured(it)).map(|it| it.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Object, Workload};

    fn model(workloads: &[(&str, &str)]) -> Model {
        let objects: Vec<Object> = workloads
            .iter()
            .map(|(name, node)| {
                Object::Workload(Arc::new(Workload {
                    name: name.parse().unwrap(),
                    uid: String::new(),
                    labels: BTreeMap::new(),
                    enroll: Some(true),
                    mode: None,
                    node: (*node).into(),
                    addresses: vec![],
                    service_account: "default".into(),
                    ready: true,
                }))
            })
            .collect();
        objects.iter().collect()
    }

    fn word(workload: &str, state: Enrolment) -> WorkloadReport {
        WorkloadReport { workload: workload.into(), state: state.into(), ..WorkloadReport::default() }
    }

    #[test]
    fn only_a_workloads_own_node_says_that_it_is_captured() {
        let model = model(&[("s/a", "n"), ("s/b", "m")]);
        let mut reports = Reports::default();
        let words =
            ["s/a", "s/b", "s/unknown", "nonsense"].map(|workload| word(workload, Enrolment::Enrolled));
        assert!(reports.take("n", &words, &model));
        assert!(!reports.take("n", &words, &model), "the same words change nothing");
        assert_eq!(reports.captured(&model), BTreeSet::from(["s/a".parse().unwrap()]));
    }

    #[test]
    fn a_workload_that_moved_is_not_captured_by_its_old_nodes_word() {
        let mut reports = Reports::default();
        reports.take("n", &[word("s/a", Enrolment::Enrolled)], &model(&[("s/a", "n")]));
        assert!(reports.captured(&model(&[("s/a", "m")])).is_empty());
    }

    #[test]
    fn later_words_replace_earlier_ones() {
        let model = model(&[("s/a", "n")]);
        for (state, captured) in
            [(Enrolment::Enrolled, 1), (Enrolment::Failed, 0), (Enrolment::Pending, 0), (Enrolment::Gone, 0)]
        {
            let mut reports = Reports::default();
            reports.take("n", &[word("s/a", Enrolment::Enrolled)], &model);
            reports.take("n", &[word("s/a", state)], &model);
            assert_eq!(reports.captured(&model).len(), captured, "{state:?}");
        }
    }

    #[test]
    fn words_survive_a_restart_and_damage_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reports.json");
        let mut reports = Reports::load(&path).unwrap();
        reports.take("n", &[word("s/a", Enrolment::Enrolled)], &model(&[("s/a", "n")]));
        reports.save(&path).unwrap();
        assert_eq!(Reports::load(&path).unwrap(), reports);
        std::fs::write(&path, "{").unwrap();
        assert!(Reports::load(&path).unwrap_err().to_string().contains("reports.json is damaged"));
    }
}
