//! The certificates of the workloads of this node: asked for as the view names them, renewed, kept over restarts.
//!
//! One task owns them all. An identity that fails to get a new certificate keeps the one that it has for as long as
//! that is valid; an identity that no workload here has any more is forgotten, on tmpfs too.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use mesh_core::{identity::SpiffeId, view::Snapshot};
use sha2::{Digest, Sha256};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{
    CertificateStatus, Certificates, Roots,
    credential::{Credential, CredentialError},
    hex,
    issue::{IssueError, Issued, certify},
    node::WRITE_RETRY,
    roots_of,
    schedule::Renewal,
    store::Identities,
};
use crate::{
    health::{Health, Kept},
    rpc::Connection,
    run_dir::{RunDir, RunDirError},
    surroundings::Surroundings,
};

/// Where their files are, in the run directory.
const FOLDER: &str = "workloads";
/// Requests under way at a time: 250 identities at a start are asked for within seconds and the controller is not
/// flooded.
const MAX_REQUESTS: usize = 16;
/// How long an identity outlives the last workload here that had it: what that has open, and what reaches it before
/// everybody knows, ends in order; and a pod that takes its place at once waits for no certificate.
const KEPT_AFTER: Duration = Duration::from_secs(5);

/// The identities that the enrolled workloads of this node have.
pub fn wanted(snapshot: &Snapshot) -> BTreeSet<SpiffeId> {
    snapshot
        .local()
        .filter_map(|workload| snapshot.identity(&workload.name))
        .map(|id| SpiffeId::clone(id))
        .collect()
}

/// The certificates of the workloads of this node.
#[derive(Debug)]
pub struct Workloads {
    identities: Arc<Identities>,
    run_dir: RunDir,
    roots: Roots,
    slots: BTreeMap<SpiffeId, Slot>,
    requests: JoinSet<(SpiffeId, Result<Issued, IssueError>)>,
    certificates: watch::Sender<Certificates>,
    surroundings: Surroundings,
    health: Health,
    /// When to write again what could not be written, and whose.
    unsaved: Option<(Instant, BTreeSet<SpiffeId>)>,
}

/// One identity.
#[derive(Debug)]
struct Slot {
    credential: Option<Credential>,
    renewal: Renewal,
    asking: bool,
    /// When it is forgotten, since no workload here has it any more.
    forgotten: Option<Instant>,
}

impl Workloads {
    /// Puts what an earlier run of the agent left in force, where it is still valid under these roots.
    pub fn new(
        identities: Arc<Identities>,
        run_dir: RunDir,
        roots: Roots,
        certificates: watch::Sender<Certificates>,
        surroundings: Surroundings,
        health: Health,
    ) -> Self {
        let (slots, requests, unsaved) = (BTreeMap::new(), JoinSet::new(), None);
        let mut workloads =
            Self { identities, run_dir, roots, slots, requests, certificates, surroundings, health, unsaved };
        workloads.load();
        workloads
    }

    /// Takes the identities and the roots of a view.
    pub fn adopt(&mut self, snapshot: &Snapshot) {
        let now = self.surroundings.clock.now();
        let wanted = wanted(snapshot);
        for (id, slot) in &mut self.slots {
            if wanted.contains(id) {
                slot.forgotten = None;
            } else {
                slot.forgotten.get_or_insert_with(|| Instant::now() + KEPT_AFTER);
            }
        }
        let roots = roots_of(snapshot);
        if roots != self.roots {
            self.roots = roots;
            self.rotate();
        }
        for id in wanted {
            self.slots.entry(id).or_insert_with(|| Slot {
                credential: None,
                renewal: Renewal::at(now),
                asking: false,
                forgotten: None,
            });
        }
    }

    /// Gets and renews certificates until it is told to stop.
    ///
    /// `connection` says whether the controller can be reached; when it is back nobody waits out a pause.
    pub async fn run(
        mut self,
        channel: Channel,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        mut connection: watch::Receiver<Connection>,
        shutdown: CancellationToken,
    ) {
        loop {
            self.forget_gone();
            self.save_again();
            self.ask(&channel);
            let pause = self.pause();
            // All branches can be dropped at any point: each only waits, and requests go on in their own tasks.
            tokio::select! {
                () = shutdown.cancelled() => return,
                Ok(()) = snapshots.changed() => {
                    let snapshot = snapshots.borrow_and_update().clone();
                    if let Some(snapshot) = snapshot {
                        self.adopt(&snapshot);
                    }
                }
                Ok(()) = connection.changed() => {
                    if *connection.borrow_and_update() == Connection::Open {
                        self.slots.values_mut().for_each(|slot| slot.renewal.revive());
                    }
                }
                Some(answer) = self.requests.join_next() => {
                    let (id, issued) = answer.expect("requests are not cancelled and do not panic");
                    self.take(&id, issued);
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Sends the requests that are due, as many as may be under way.
    fn ask(&mut self, channel: &Channel) {
        let (wall, now) = (self.surroundings.clock.now(), Instant::now());
        for (id, slot) in &mut self.slots {
            if self.requests.len() >= MAX_REQUESTS {
                return;
            }
            if slot.asking || slot.forgotten.is_some() || !slot.renewal.pause(wall, now).is_zero() {
                continue;
            }
            slot.asking = true;
            let (id, channel, roots) = (id.clone(), channel.clone(), self.roots.clone());
            let clock = self.surroundings.clock.clone();
            self.requests.spawn(async move {
                let issued = certify(channel, &id, &roots, &clock).await;
                (id, issued)
            });
        }
    }

    /// How long nothing is due; what waits for a free request is looked at when one ends.
    fn pause(&self) -> Duration {
        let (wall, now) = (self.surroundings.clock.now(), Instant::now());
        let idle = self.slots.values().filter(|slot| !slot.asking && slot.forgotten.is_none());
        let next = idle.map(|slot| slot.renewal.pause(wall, now)).min().unwrap_or(Duration::MAX);
        let next = if self.requests.len() >= MAX_REQUESTS { Duration::MAX } else { next };
        let save = self.unsaved.as_ref().map(|(again, _)| *again);
        let others = self.slots.values().filter_map(|slot| slot.forgotten).chain(save);
        others.map(|at| at.saturating_duration_since(now)).fold(next, Duration::min)
    }

    fn take(&mut self, id: &SpiffeId, issued: Result<Issued, IssueError>) {
        // The identity may have gone while we asked.
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.asking = false;
        let problem = match issued {
            Ok(Issued { credential, skew }) => {
                self.health.skew(skew);
                match self.identities.install(id.clone(), credential.certified(), &self.roots) {
                    Ok(()) => return self.put_in_force(id, credential),
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        let now = self.surroundings.clock.now();
        let expires = slot.credential.as_ref().map(|credential| credential.life().expires);
        let root = slot.credential.as_ref().and_then(|credential| credential.root(&self.roots, now));
        tracing::warn!(%id, %problem, ?expires, "no new certificate");
        slot.renewal.failed(Instant::now(), self.surroundings.chance.draw());
        self.publish(id, CertificateStatus { expires, root, error: Some(problem) });
    }

    fn put_in_force(&mut self, id: &SpiffeId, credential: Credential) {
        self.save(id, &credential);
        tracing::debug!(%id, expires = %credential.life().expires, "certificate in force");
        self.insert(credential);
    }

    fn save(&mut self, id: &SpiffeId, credential: &Credential) {
        let written = self.run_dir.write(&file_of(id), &credential.to_file());
        let all = match &written {
            Ok(()) => self.unsaved.as_mut().is_none_or(|(_, ids)| ids.remove(id) && ids.is_empty()),
            Err(_) => {
                let again = Instant::now() + WRITE_RETRY;
                self.unsaved.get_or_insert_with(|| (again, BTreeSet::new())).1.insert(id.clone());
                true
            }
        };
        if all {
            self.health.written(Kept::Workload, &written);
        }
        if let Err(error) = written {
            tracing::error!(%error, %id, "a certificate is in force but would not survive a restart");
        } else if all {
            self.unsaved = None;
        }
    }

    /// Writes once more what could not be written, when it is time.
    fn save_again(&mut self) {
        let Some((again, ids)) = &self.unsaved else { return };
        if *again > Instant::now() {
            return;
        }
        let ids = ids.clone();
        self.unsaved = None;
        for id in &ids {
            let Some(credential) = self.slots.get_mut(id).and_then(|slot| slot.credential.take()) else {
                continue;
            };
            self.save(id, &credential);
            if let Some(slot) = self.slots.get_mut(id) {
                slot.credential = Some(credential);
            }
        }
    }

    fn insert(&mut self, credential: Credential) {
        let id = credential.id().clone();
        let expires = Some(credential.life().expires);
        let root = credential.root(&self.roots, self.surroundings.clock.now());
        // The roots may have changed between the request and now, or while the agent was not running.
        let renewal =
            credential.renewal(&self.roots, self.surroundings.clock.now(), self.surroundings.chance.draw());
        let forgotten = self.slots.get(&id).and_then(|slot| slot.forgotten);
        self.slots
            .insert(id.clone(), Slot { credential: Some(credential), renewal, asking: false, forgotten });
        self.publish(&id, CertificateStatus { expires, root, error: None });
    }

    /// Has every certificate checked against the new roots from now on, and asks for new ones where that is needed.
    fn rotate(&mut self) {
        let now = self.surroundings.clock.now();
        for (id, slot) in &mut self.slots {
            let Some(credential) = &slot.credential else { continue };
            if let Err(error) = self.identities.install(id.clone(), credential.certified(), &self.roots) {
                tracing::error!(%error, %id, "the view's roots cannot be used, the last ones stay");
            }
            let fraction = self.surroundings.chance.draw();
            slot.renewal.hasten_to(&credential.renewal(&self.roots, now, fraction));
        }
    }

    /// What an earlier run left. A file that is damaged or of no use is removed: its identity gets another.
    fn load(&mut self) {
        let names = self.run_dir.list(FOLDER, "json").unwrap_or_else(|error| {
            tracing::error!(%error, "certificates of an earlier run cannot be read");
            Vec::new()
        });
        for name in names {
            match self.load_one(&name) {
                Ok(credential) => self.insert(credential),
                Err(error) => {
                    tracing::warn!(%error, %name, "a certificate of an earlier run is of no use");
                    self.health.damaged(Kept::Workload, &error);
                    if let Err(error) = self.run_dir.remove(&name) {
                        tracing::error!(%error, "it was not removed either");
                    }
                }
            }
        }
    }

    fn load_one(&self, name: &str) -> Result<Credential, LoadError> {
        let content = self.run_dir.read(name)?.unwrap_or_default();
        let credential = Credential::from_file(&content)?;
        credential.check(&self.roots, self.surroundings.clock.now())?;
        self.identities.install(credential.id().clone(), credential.certified(), &self.roots)?;
        Ok(credential)
    }

    fn forget_gone(&mut self) {
        let now = Instant::now();
        let gone = self.slots.iter().filter(|(_, slot)| slot.forgotten.is_some_and(|at| at <= now));
        for id in gone.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            self.forget(&id);
        }
    }

    fn forget(&mut self, id: &SpiffeId) {
        self.slots.remove(id);
        self.identities.remove(id);
        self.certificates.send_modify(|all| drop(all.remove(id)));
        if let Err(error) = self.run_dir.remove(&file_of(id)) {
            tracing::error!(%error, %id, "the key of an identity that is gone was not removed");
        }
    }

    fn publish(&self, id: &SpiffeId, status: CertificateStatus) {
        self.certificates.send_modify(|all| drop(all.insert(id.clone(), status)));
    }
}

/// Why a file of an earlier run is of no use.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    #[error(transparent)]
    Credential(#[from] CredentialError),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// The identity's file: a digest, because names can be longer than a file's.
fn file_of(id: &SpiffeId) -> String {
    format!("{FOLDER}/{}.json", hex::encode(&Sha256::digest(id.to_string())))
}
