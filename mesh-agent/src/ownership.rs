//! Which agent owns the node while there are two: an old one and its successor.
//!
//! The owner holds a lock on a file of the run directory; the kernel takes it back with the process, however that
//! ends. A file beside it names the owner, or the one that wants to be: a successor writes its name there, the owner
//! sees that, stands down and lets go of the lock. The newest agent always wins.
//!
//! Invariant: only the owner writes into the kernel's maps, attaches programs, repairs. What an agent serves while it
//! is not the owner, it serves with what is in place.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::run_dir::{RunDir, RunDirError};

/// Locked by the owner.
const LOCK: &str = "owner.lock";
/// Names the owner, or the one that is about to be.
const NAME: &str = "owner.json";
/// How often an owner looks whether it has a successor, and a successor whether the owner has let go. Polled: a watch
/// on the file would be one more thing that can fail at start.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long an owner may take to stand down: a turn of its enrolment, with hundreds of workloads. One that has not by
/// then hangs, and cannot fight either.
const STAND_DOWN_WAIT: Duration = Duration::from_secs(10);

/// Who an agent is, for the other one and for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    /// Told apart by this: process ids repeat, in containers above all.
    id: String,
    /// Its process, as it sees itself.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// It has taken over: new connections reach it.
    serving: bool,
}

/// An agent's part in who owns the node.
#[derive(Debug)]
pub struct Ownership {
    run_dir: RunDir,
    own: Name,
    lock: Option<Flock<File>>,
}

impl Ownership {
    /// Takes part. Owns nothing yet.
    pub fn new(run_dir: RunDir) -> Self {
        let id = format!("{:016x}", rand::random::<u64>());
        let own =
            Name { id, pid: std::process::id(), version: env!("CARGO_PKG_VERSION").into(), serving: false };
        Self { run_dir, own, lock: None }
    }

    /// Becomes the owner if nobody is; otherwise the other's name, if it has said it.
    pub fn try_take(&mut self) -> Result<Result<(), Option<Name>>, RunDirError> {
        if !self.try_lock()? {
            return Ok(Err(self.named()));
        }
        self.say()?;
        Ok(Ok(()))
    }

    /// Becomes the owner: asks the present one to stand down and waits for that. Cancel-safe; a claim that was dropped
    /// has been heard all the same.
    pub async fn take_over(&mut self) -> Result<(), RunDirError> {
        let begun = Instant::now();
        while !self.try_lock()? {
            // Again and again: an agent that became the owner meanwhile has written its own name.
            if self.named().as_ref() != Some(&self.own) {
                self.say()?;
            }
            if begun.elapsed() > STAND_DOWN_WAIT {
                tracing::error!("the old agent does not stand down, taking over all the same");
                break;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        self.say()
    }

    /// Says that new connections reach this agent: the old one may stop to accept.
    pub fn serves(&mut self) -> Result<(), RunDirError> {
        self.own.serving = true;
        // A newer one may have written its name already.
        if self.is_named() { self.say() } else { Ok(()) }
    }

    /// Done when another agent wants to own the node, with its name. Cancel-safe.
    pub async fn claimed(&self) -> Name {
        self.other(|_| true).await
    }

    /// Done when another agent serves, with its name. Cancel-safe.
    pub async fn superseded(&self) -> Name {
        self.other(|name| name.serving).await
    }

    /// Lets go, once this agent has stood down.
    pub fn release(&mut self) {
        self.lock = None;
    }

    async fn other(&self, wanted: impl Fn(&Name) -> bool) -> Name {
        loop {
            if let Some(name) = self.named().filter(|name| name.id != self.own.id && wanted(name)) {
                return name;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    fn try_lock(&mut self) -> Result<bool, RunDirError> {
        let path = self.run_dir.path(LOCK);
        let failed = |source| RunDirError::Io { what: "lock", path: path.clone(), source };
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        match Flock::lock(file.map_err(failed)?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => self.lock = Some(lock),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(false),
            Err((_, error)) => return Err(failed(io::Error::from(error))),
        }
        Ok(true)
    }

    fn is_named(&self) -> bool {
        self.named().is_some_and(|name| name.id == self.own.id)
    }

    /// Whose name is written; nothing when it cannot be read, which is the case of a first start.
    fn named(&self) -> Option<Name> {
        let content = self.run_dir.read(NAME).ok()??;
        serde_json::from_slice(&content).ok()
    }

    fn say(&self) -> Result<(), RunDirError> {
        let content = serde_json::to_vec(&self.own).expect("a name is texts and numbers");
        self.run_dir.write(NAME, &content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(scratch: &tempfile::TempDir) -> Ownership {
        Ownership::new(RunDir::open(scratch.path()).unwrap())
    }

    #[tokio::test]
    async fn the_newest_agent_owns_the_node_once_the_old_one_stood_down() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let (mut old, mut new) = (agent(&scratch), agent(&scratch));
        assert_eq!(old.try_take().unwrap(), Ok(()));
        assert_eq!(new.try_take().unwrap(), Err(Some(old.own.clone())), "and says who owns it");
        let stand_down = async {
            assert_eq!(old.claimed().await.id, new_id(&scratch));
            old.release();
            assert_eq!(old.superseded().await.id, new_id(&scratch));
        };
        let take_over = async {
            new.take_over().await.unwrap();
            new.serves().unwrap();
        };
        tokio::join!(stand_down, take_over);
    }

    fn new_id(scratch: &tempfile::TempDir) -> String {
        agent(scratch).named().unwrap().id
    }

    #[tokio::test]
    async fn an_agent_that_died_owns_nothing() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut dead = agent(&scratch);
        dead.try_take().unwrap().unwrap();
        drop(dead);
        assert_eq!(agent(&scratch).try_take().unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn a_claim_is_heard_although_another_agent_became_the_owner_meanwhile() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let (mut first, mut second) = (agent(&scratch), agent(&scratch));
        second.say().unwrap();
        // Its name overwrites the claim.
        first.try_take().unwrap().unwrap();
        let stand_down = async {
            first.claimed().await;
            first.release();
        };
        let (taken, ()) = tokio::join!(second.take_over(), stand_down);
        taken.unwrap();
        assert!(second.lock.is_some() && second.is_named());
    }

    #[test]
    fn an_agent_that_was_overtaken_does_not_say_that_it_serves() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let (mut overtaken, newer) = (agent(&scratch), agent(&scratch));
        overtaken.try_take().unwrap().unwrap();
        newer.say().unwrap();
        overtaken.serves().unwrap();
        assert!(newer.is_named());
    }
}
