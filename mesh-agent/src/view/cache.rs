//! The last view in the run directory, and the addresses that were asked for, so that an agent that restarts while the
//! controller is away knows its mesh.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::{
    view::Snapshot,
    wire::{self, proto},
};
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::state::{UpdateError, ViewState};
use crate::{
    health::{Health, Kept},
    run_dir::{RunDir, RunDirError},
    wants::Wants,
};

/// The file: [`MAGIC`], the SHA-256 of the rest, a complete `ViewUpdate`.
const FILE: &str = "view.pb";
/// What the file begins with; the last digit is the version of its form.
const MAGIC: &[u8; 8] = b"nmview\x00\x01";
/// Bytes of the digest: a bit that has turned over may still read as a view, of something else.
const DIGEST: usize = 32;
/// Views that follow each other faster are written once. A predecessor that drains learns of a change by this file,
/// and has a second to act on it.
const DELAY: Duration = Duration::from_millis(500);
/// After a write that failed, until the next.
const RETRY: Duration = Duration::from_secs(10);

/// Why what an earlier run left is of no use.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    #[error("{FILE} is not a view, or one of another version of the agent")]
    Form,
    #[error("{FILE} is damaged: its content is not what was written")]
    Digest,
    #[error("{FILE} cannot be read: {0}")]
    Message(#[from] prost::DecodeError),
    #[error("{FILE} is of no use any more: {0}")]
    View(#[from] UpdateError),
}

/// When and where the view is written.
#[derive(Debug)]
pub struct Cache {
    run_dir: RunDir,
    health: Health,
    wants: Arc<Wants>,
    due: Option<Instant>,
}

impl Cache {
    /// In this directory.
    pub fn new(run_dir: RunDir, health: Health, wants: Arc<Wants>) -> Self {
        Self { run_dir, health, wants, due: None }
    }

    /// What is kept with the view.
    pub fn wants(&self) -> &Arc<Wants> {
        &self.wants
    }

    /// Puts what an earlier run left in force. What cannot be read counts as nothing: the controller sends it again.
    pub fn load(&self, state: &mut ViewState) -> Option<Arc<Snapshot>> {
        match self.read(state) {
            Ok(snapshot) => snapshot,
            Err(error) => {
                tracing::error!(%error, "no view of an earlier run is in force until the controller sends one");
                self.health.damaged(Kept::View, &error);
                None
            }
        }
    }

    /// When the file was last written, by whichever agent.
    pub fn written(&self) -> Option<SystemTime> {
        self.run_dir.replaced(FILE)
    }

    fn read(&self, state: &mut ViewState) -> Result<Option<Arc<Snapshot>>, LoadError> {
        let Some(content) = self.run_dir.read(FILE)? else { return Ok(None) };
        let rest = content.strip_prefix(MAGIC).ok_or(LoadError::Form)?;
        let (digest, message) = rest.split_at_checked(DIGEST).ok_or(LoadError::Digest)?;
        if Sha256::digest(message).as_slice() != digest {
            return Err(LoadError::Digest);
        }
        let kept = proto::ViewUpdate::decode(message)?;
        let snapshot = state.apply(&kept)?.snapshot;
        self.wants.resume(wire::addresses_of(&kept.asked));
        Ok(Some(snapshot))
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
        let kept = proto::ViewUpdate { asked: self.wants.all(), ..state.to_update() };
        let message = kept.encode_to_vec();
        let content = [MAGIC.as_slice(), &Sha256::digest(&message), &message].concat();
        let written = self.run_dir.write(FILE, &content);
        self.health.written(Kept::View, &written);
        if let Err(error) = written {
            tracing::warn!(%error, again = ?RETRY, "the view is in force but would not survive a restart");
            self.due = Some(Instant::now() + RETRY);
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

    fn cache(run_dir: &RunDir) -> (Cache, Health) {
        let health = Health::default();
        (Cache::new(run_dir.clone(), health.clone(), Wants::new(10)), health)
    }

    fn kept(run_dir: &RunDir) -> ViewState {
        let mut state = ViewState::new("n1", trust_domain());
        state.apply(&update("7", true, vec![mesh(vec![root()])], &[])).unwrap();
        let (mut cache, _) = cache(run_dir);
        cache.changed(false);
        assert!(cache.due().is_some());
        cache.flush(&state);
        assert!(cache.due().is_none());
        state
    }

    #[test]
    fn a_view_survives_a_restart() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::open(scratch.path()).unwrap();
        let (empty, health) = cache(&run_dir);
        assert!(empty.load(&mut ViewState::new("n1", trust_domain())).is_none());
        assert!(health.subscribe().borrow().damaged.is_empty(), "nothing there is nothing wrong");
        let state = kept(&run_dir);
        let mut restarted = ViewState::new("n1", trust_domain());
        assert_eq!(cache(&run_dir).0.load(&mut restarted).unwrap().version(), "7");
        assert_eq!(restarted.to_update(), state.to_update());
    }

    #[tokio::test]
    async fn what_was_asked_for_is_kept_with_it() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::open(scratch.path()).unwrap();
        let state = kept(&run_dir);
        let (mut cache, _) = cache(&run_dir);
        drop(cache.wants.hold((1, crate::metrics::Direction::Outbound), [10, 0, 0, 1].into()).unwrap());
        cache.changed(false);
        cache.flush(&state);
        let wants = Wants::new(10);
        let next = Cache::new(run_dir, Health::default(), wants.clone());
        next.load(&mut ViewState::new("n1", trust_domain())).unwrap();
        assert_eq!(wants.all(), [vec![10, 0, 0, 1]]);
    }

    #[test]
    fn a_damaged_view_counts_as_none_and_is_told() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::open(scratch.path()).unwrap();
        kept(&run_dir);
        let good = run_dir.read(FILE).unwrap().unwrap();
        let flipped = (0..good.len()).map(|at| {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            bad
        });
        let cut =
            [0, 1, MAGIC.len(), MAGIC.len() + DIGEST, good.len() - 1].map(|length| good[..length].to_vec());
        let mut longer = good.clone();
        longer.push(0);
        for bad in flipped.chain(cut).chain([longer, b"\xff\xff damaged".to_vec()]) {
            run_dir.write(FILE, &bad).unwrap();
            let (cache, health) = cache(&run_dir);
            let mut state = ViewState::new("n1", trust_domain());
            assert!(cache.load(&mut state).is_none());
            assert_eq!(state.version(), "");
            let (count, reason) = health.subscribe().borrow().damaged[&Kept::View].clone();
            assert!(count == 1 && reason.contains(FILE), "{reason}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_view_that_could_not_be_written_is_tried_again_and_told_until_then() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::open(scratch.path()).unwrap();
        let mut state = ViewState::new("n1", trust_domain());
        state.apply(&update("7", true, vec![mesh(vec![root()])], &[])).unwrap();
        let (mut cache, health) = cache(&run_dir);
        // A folder in the file's place cannot be replaced by it.
        std::fs::create_dir_all(run_dir.path(FILE).join("in the way")).unwrap();
        cache.changed(false);
        cache.flush(&state);
        assert_eq!(cache.due(), Some(Instant::now() + RETRY));
        assert!(health.subscribe().borrow().unsaved[&Kept::View].contains(FILE));
        std::fs::remove_dir_all(run_dir.path(FILE)).unwrap();
        cache.flush(&state);
        assert_eq!(cache.due(), None);
        assert!(health.subscribe().borrow().unsaved.is_empty());
    }
}
