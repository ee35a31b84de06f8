//! How often, and how many at once: what one address or one node may ask of the controller.
//!
//! Stands apart because every service asks it the same way. Pure but for its locks: the time is handed in. Invariant:
//! whoever goes beyond its limit is told so, and nobody else notices.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// Joins from one address: a hundred machines behind one gateway at once, then five a second. Each costs a signature
/// before its token is looked at.
const JOINS: Rate = Rate { burst: 100.0, per_second: 5.0 };
/// Certificates and watches that one node asks for: every identity of a full node twice over, then fifty a second.
const REQUESTS: Rate = Rate { burst: 2048.0, per_second: 50.0 };
/// Addresses or nodes that are remembered; those that have not asked for a while are forgotten first.
const REMEMBERED: usize = 16_384;
/// Connections of one address at once, handshakes included: many nodes behind one gateway, and few enough that an
/// address cannot have all of [`CONNECTIONS`].
pub(super) const CONNECTIONS_OF_ADDRESS: usize = 512;
/// Handshakes of one address at once: an eighth of all, so that a silent address leaves the rest to others.
pub(super) const HANDSHAKES_OF_ADDRESS: usize = 32;
/// Connections at once: four for each of 2,000 nodes.
pub(super) const CONNECTIONS: usize = 8192;

/// What is asked for, and limited.
#[derive(Debug)]
pub struct Limits {
    joins: Rates<IpAddr>,
    requests: Rates<String>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { joins: Rates::new(JOINS), requests: Rates::new(REQUESTS) }
    }
}

impl Limits {
    /// Whether this address may try to join now.
    pub fn may_join(&self, from: IpAddr, now: Instant) -> bool {
        self.joins.take(network(from), now)
    }

    /// Whether this node may ask for something now.
    pub fn may_ask(&self, node: &str, now: Instant) -> bool {
        self.requests.take(node.to_owned(), now)
    }
}

/// Who an address belongs to: of IPv6 one party has a whole /64 (RFC 6177).
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
    }
}

#[derive(Debug, Clone, Copy)]
struct Rate {
    burst: f64,
    per_second: f64,
}

/// A bucket of tokens for each key.
#[derive(Debug)]
struct Rates<K> {
    rate: Rate,
    buckets: Mutex<HashMap<K, Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn refill(&mut self, rate: Rate, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * rate.per_second).min(rate.burst);
        self.at = now;
    }
}

impl<K: Eq + Hash> Rates<K> {
    fn new(rate: Rate) -> Self {
        Self { rate, buckets: Mutex::default() }
    }

    fn take(&self, key: K, now: Instant) -> bool {
        let rate = self.rate;
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= REMEMBERED && !buckets.contains_key(&key) {
            buckets.retain(|_, bucket| {
                bucket.refill(rate, now);
                bucket.left < rate.burst
            });
            if buckets.len() >= REMEMBERED {
                return false;
            }
        }
        let bucket = buckets.entry(key).or_insert(Bucket { left: rate.burst, at: now });
        bucket.refill(rate, now);
        let may = bucket.left >= 1.0;
        if may {
            bucket.left -= 1.0;
        }
        may
    }
}

/// How many each address has of something.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Places {
    /// One more for this address, if it has less than `most`.
    pub(super) fn take(&self, address: IpAddr, most: usize) -> Option<Place> {
        let address = network(address);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(address).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Place { places: self.clone(), address })
    }
}

/// One of an address's places; gives itself back.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_is_had_once_and_the_rest_at_its_rate() {
        let rates = Rates::new(Rate { burst: 3.0, per_second: 2.0 });
        let start = Instant::now();
        assert_eq!((0..10).filter(|_| rates.take('a', start)).count(), 3);
        assert!(rates.take('b', start), "another has its own");
        let later = start + Duration::from_secs(1);
        assert_eq!((0..10).filter(|_| rates.take('a', later)).count(), 2);
        assert_eq!((0..10).filter(|_| rates.take('a', later + Duration::from_secs(99))).count(), 3);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_quiet_are_forgotten() {
        let rates = Rates::new(Rate { burst: 1.0, per_second: 1.0 });
        let start = Instant::now();
        assert!((0..REMEMBERED).all(|key| rates.take(key, start)));
        assert!(!rates.take(REMEMBERED, start), "nobody can be forgotten yet");
        assert!(rates.take(REMEMBERED, start + Duration::from_secs(2)));
        assert_eq!(rates.buckets.lock().unwrap().len(), 1);
    }

    #[test]
    fn addresses_of_one_network_share() {
        let places = Places::default();
        let one = places.take("fd00::1".parse().unwrap(), 1).unwrap();
        assert!(places.take("fd00::2".parse().unwrap(), 1).is_none());
        assert!(places.take("fd00:0:0:1::1".parse().unwrap(), 1).is_some());
        drop(one);
        assert!(places.take("fd00::2".parse().unwrap(), 1).is_some());
        assert!(places.taken.lock().unwrap().is_empty());
    }
}
