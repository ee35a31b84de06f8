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
    health::{self, Heard, Unhealthy},
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
    /// Its endpoints that are unhealthy.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", with = "pairs")]
    pub unhealthy: Unhealthy,
}

/// Endpoints as a list of pairs, as keys of JSON are texts.
mod pairs {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Unhealthy;

    pub(super) fn serialize<S: Serializer>(of: &Unhealthy, to: S) -> Result<S::Ok, S::Error> {
        of.iter().collect::<Vec<_>>().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Unhealthy, D::Error> {
        Ok(Vec::deserialize(from)?.into_iter().collect())
    }
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
            let unhealthy = pod.unhealthy.clone().unwrap_or_default();
            Some((workload.name.clone(), Reported { node: pod.node.clone(), state, reason, unhealthy }))
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
            let before = self.of(&name, node).map(|it| &it.unhealthy);
            let unhealthy = match (state, before) {
                (State::Enrolled, before) => health::after(&word.health, before.unwrap_or(&Unhealthy::new())),
                // Nothing is checked while it is not captured: the last word stays.
                (_, before) => before.cloned().unwrap_or_default(),
            };
            let reported = Reported { node: node.to_owned(), state, reason, unhealthy };
            changed |= self.by_workload.get(&name) != Some(&reported);
            self.by_workload.insert(name, reported);
        }
        changed
    }

    /// The last word about a workload, if it is of the node that has it now.
    pub fn of(&self, workload: &Name, node: &str) -> Option<&Reported> {
        self.by_workload.get(workload).filter(|reported| reported.node == node)
    }

    /// All that counts for what nodes are told.
    pub fn heard(&self, model: &Model) -> Heard {
        let unhealthy = |workload: &Arc<crate::model::Workload>| {
            let reported = self.of(&workload.name, &workload.node)?;
            let counts = !reported.unhealthy.is_empty() && model.enrolled(workload);
            counts.then(|| (workload.name.clone(), reported.unhealthy.clone()))
        };
        let unhealthy = model.workloads.values().filter_map(unhealthy).collect();
        Heard { captured: self.captured(model), unhealthy }
    }

    /// The workloads whose own agent says that their capture is in place.
    fn captured(&self, model: &Model) -> BTreeSet<Name> {
        let captured = |workload: &crate::model::Workload| {
            self.of(&workload.name, &workload.node).is_some_and(|reported| reported.state == State::Enrolled)
        };
        model.workloads.values().filter(|it| captured(it)).map(|it| it.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{health::Health, model::health::CheckedEndpoint};

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
    fn what_is_unhealthy_is_said_by_its_own_node_alone_and_stays_until_it_says_otherwise() {
        let model = model(&[("s/a", "n")]);
        let of = CheckedEndpoint { service: Name::new("s", "pay"), port: 80, address: [10, 0, 0, 1].into() };
        let word = |state, health| WorkloadReport {
            health: vec![mesh_core::wire::health::word(&of, health, "it answered 503")],
            ..word("s/a", state)
        };
        let mut reports = Reports::default();
        let unhealthy = |reports: &Reports| reports.heard(&model).unhealthy.len();
        reports.take("n", &[word(Enrolment::Enrolled, Health::Unhealthy)], &model);
        assert_eq!(unhealthy(&reports), 1);
        assert!(!reports.take("m", &[word(Enrolment::Enrolled, Health::Healthy)], &model));
        let dir = tempfile::tempdir().unwrap();
        reports.save(&dir.path().join("reports")).unwrap();
        let mut reports = Reports::load(&dir.path().join("reports")).unwrap();
        for state in [Enrolment::Pending, Enrolment::Enrolled] {
            reports.take("n", &[word(state, Health::Undecided)], &model);
            assert_eq!(unhealthy(&reports), 1, "an agent that starts anew says {state:?}");
        }
        assert!(reports.take("n", &[word(Enrolment::Enrolled, Health::Healthy)], &model));
        assert_eq!(unhealthy(&reports), 0);
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
