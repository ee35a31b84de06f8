//! The last view in the run directory, so that an agent that restarts while the controller is away knows its mesh.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_core::{view::Snapshot, wire::proto};
use prost::Message;

use super::state::ViewState;
use crate::run_dir::RunDir;

/// The file, a complete `ViewUpdate`.
const FILE: &str = "view.pb";
/// Views that follow each other faster are written once. A predecessor that drains learns of a change by this file,
/// and has a second to act on it.
const DELAY: Duration = Duration::from_millis(500);

/// When and where the view is written.
#[derive(Debug)]
pub struct Cache {
    run_dir: RunDir,
    due: Option<Instant>,
}

impl Cache {
    /// In this directory.
    pub fn new(run_dir: RunDir) -> Self {
        Self { run_dir, due: None }
    }

    /// Puts what an earlier run left in force. What cannot be read counts as nothing: the controller sends it again.
    pub fn load(&self, state: &mut ViewState) -> Option<Arc<Snapshot>> {
        let content = match self.run_dir.read(FILE) {
            Ok(content) => content?,
            Err(error) => {
                tracing::warn!(%error, "the last view cannot be read");
                return None;
            }
        };
        let update = match proto::ViewUpdate::decode(content.as_slice()) {
            Ok(update) => update,
            Err(error) => {
                tracing::warn!(%error, "the last view is damaged");
                return None;
            }
        };
        match state.apply(&update) {
            Ok(applied) => Some(applied.snapshot),
            Err(error) => {
                tracing::warn!(%error, "the last view is of no use any more");
                None
            }
        }
    }

    /// When the file was last written, by whichever agent.
    pub fn written(&self) -> Option<SystemTime> {
        self.run_dir.replaced(FILE)
    }

    /// The view has changed. New roots are written with the next chance: without them a restarted agent would not
    /// believe its controller.
    pub fn changed(&mut self, at_once: bool) {
        let now = Instant::now();
        let due = if at_once { now } else { now + DELAY };
        self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
    }

    /// When the view is to be written; `None` when it is.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Writes the view if it has changed.
    pub fn flush(&mut self, state: &ViewState) {
        if self.due.take().is_none() {
            return;
        }
        if let Err(error) = self.run_dir.write(FILE, &state.to_update().encode_to_vec()) {
            tracing::warn!(%error, "the view is in force but would not survive a restart");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::state::tests::{mesh, trust_domain, update},
        *,
    };

    fn root() -> Vec<u8> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        rcgen::CertificateParams::default().self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn a_view_survives_a_restart_and_a_damaged_one_counts_as_none() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::open(scratch.path()).unwrap();
        let mut cache = Cache::new(run_dir.clone());
        let mut state = ViewState::new("n1", trust_domain());
        assert!(cache.load(&mut state).is_none());
        state.apply(&update("7", true, vec![mesh(vec![root()])], &[])).unwrap();
        cache.changed(false);
        assert!(cache.due().is_some());
        cache.flush(&state);
        assert!(cache.due().is_none());

        let mut restarted = ViewState::new("n1", trust_domain());
        assert_eq!(cache.load(&mut restarted).unwrap().version(), "7");
        assert_eq!(restarted.version(), "7");

        run_dir.write(FILE, b"\xff\xff damaged").unwrap();
        assert!(cache.load(&mut ViewState::new("n1", trust_domain())).is_none());
    }
}
