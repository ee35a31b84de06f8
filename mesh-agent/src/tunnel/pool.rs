//! Idle tunnels, by (source workload's enrolment, destination address): last in, first out, so that a burst's extra
//! tunnels grow old and go.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mesh_core::identity::SpiffeId;

use super::Link;
use crate::{limits::Limits, metrics::Metrics};

/// How often idle tunnels are looked at.
const REAP_EVERY: Duration = Duration::from_millis(500);

/// Whose tunnel to where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// [`crate::local::Local::id`] of the source workload.
    pub(crate) local: u64,
    /// The destination workload's address and port.
    pub(crate) destination: SocketAddr,
}

/// The idle tunnels of a node.
#[derive(Debug)]
pub(crate) struct Pool {
    buckets: Mutex<Buckets>,
    limits: Limits,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Buckets {
    by_key: HashMap<Key, Bucket>,
    idle: usize,
    stopped: bool,
}

#[derive(Debug)]
struct Bucket {
    idle: Vec<Idle>,
    used: Instant,
    spare_on_its_way: bool,
}

#[derive(Debug)]
struct Idle {
    link: Box<Link>,
    since: Instant,
}

impl Pool {
    pub(crate) fn new(limits: Limits, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { buckets: Mutex::default(), limits, metrics })
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle tunnel between these two that is still alive, and whose peer led to one of these roots.
    pub(crate) fn checkout(
        &self,
        key: Key,
        own: &SpiffeId,
        peer: &SpiffeId,
        roots: &[Vec<u8>],
    ) -> Option<Box<Link>> {
        loop {
            // Outside of the lock: looking at a tunnel can take a system call, dropping one does.
            let mut link = self.pop(key)?;
            let may = link.is_between(own, peer) && !link.has_expired() && link.led().holds(roots);
            if may && !link.is_older_than(self.limits.tunnel_age) && link.is_quiet() {
                // One whose socket is lost so was of no use.
                let Ok(mut link) = link.here() else { continue };
                link.count_as("busy", &self.metrics);
                return Some(link);
            }
            link.retire();
        }
    }

    fn pop(&self, key: Key) -> Option<Box<Link>> {
        let mut buckets = self.buckets();
        let idle = buckets.by_key.get_mut(&key)?.idle.pop()?;
        buckets.idle -= 1;
        Some(idle.link)
    }

    /// Gives a tunnel back after READY, or puts a spare in.
    pub(crate) fn put(&self, key: Key, mut link: Box<Link>) {
        if link.is_older_than(self.limits.tunnel_age) {
            return link.retire();
        }
        let mut buckets = self.buckets();
        let room = !buckets.stopped && buckets.idle < self.limits.idle_total;
        let bucket = buckets.by_key.entry(key).or_insert_with(Bucket::new);
        if !room || bucket.idle.len() >= self.limits.idle_per_key {
            drop(buckets);
            return link.retire();
        }
        link.count_as("idle", &self.metrics);
        bucket.idle.push(Idle { link, since: Instant::now() });
        buckets.idle += 1;
    }

    /// Notes a use of this key; the result asks for one more tunnel, to be dialled in the background. Only a key
    /// that was used before gets spares: a single connection should not cost two handshakes.
    pub(crate) fn wants_spare(self: &Arc<Self>, key: Key) -> Option<Spare> {
        let mut buckets = self.buckets();
        if buckets.stopped {
            return None;
        }
        let full = buckets.idle >= self.limits.idle_total;
        let Some(bucket) = buckets.by_key.get_mut(&key) else {
            buckets.by_key.insert(key, Bucket::new());
            return None;
        };
        bucket.used = Instant::now();
        if full || bucket.spare_on_its_way || bucket.idle.len() >= self.limits.spares {
            return None;
        }
        bucket.spare_on_its_way = true;
        Some(Spare { pool: self.clone(), key })
    }

    /// Lets go of all idle tunnels of an enrolment that ended.
    pub(crate) fn forget(&self, local: u64) {
        for idle in self.take(|key, bucket| if key.local == local { bucket.take_all() } else { vec![] }) {
            idle.link.retire();
        }
    }

    /// Lets go of all idle tunnels to a destination where nobody listens any more.
    pub(crate) fn abandon(&self, gone: &Key) {
        for idle in self.take(|key, bucket| if key == gone { bucket.take_all() } else { vec![] }) {
            idle.link.retire();
        }
    }

    /// Lets go of everything; nothing is kept from now on.
    pub(crate) fn stop(&self) {
        self.buckets().stopped = true;
        for idle in self.take(|_, bucket| bucket.take_all()) {
            idle.link.retire();
        }
    }

    /// Drops what is dead or too old, twice a second, for as long as it is polled.
    pub(crate) async fn reap(&self) {
        let mut ticks = tokio::time::interval(REAP_EVERY);
        loop {
            ticks.tick().await;
            for idle in self.take(|_, bucket| bucket.take_dead(self.limits.idle_at_source)) {
                idle.link.retire();
            }
        }
    }

    /// Takes tunnels out, bucket by bucket, and forgets the buckets that nobody uses.
    fn take(&self, mut choose: impl FnMut(&Key, &mut Bucket) -> Vec<Idle>) -> Vec<Idle> {
        let mut buckets = self.buckets();
        let mut taken = vec![];
        let keep = self.limits.idle_at_source;
        buckets.by_key.retain(|key, bucket| {
            taken.extend(choose(key, bucket));
            !bucket.idle.is_empty() || bucket.spare_on_its_way || bucket.used.elapsed() < keep
        });
        buckets.idle -= taken.len();
        taken
    }
}

impl Bucket {
    fn new() -> Self {
        Self { idle: vec![], used: Instant::now(), spare_on_its_way: false }
    }

    fn take_all(&mut self) -> Vec<Idle> {
        std::mem::take(&mut self.idle)
    }

    fn take_dead(&mut self, keep: Duration) -> Vec<Idle> {
        self.idle
            .extract_if(.., |idle| {
                idle.since.elapsed() > keep || idle.link.has_expired() || !idle.link.is_quiet()
            })
            .collect()
    }
}

/// The right to dial one spare for a key.
#[derive(Debug)]
pub(crate) struct Spare {
    pool: Arc<Pool>,
    key: Key,
}

impl Drop for Spare {
    fn drop(&mut self) {
        if let Some(bucket) = self.pool.buckets().by_key.get_mut(&self.key) {
            bucket.spare_on_its_way = false;
        }
    }
}
