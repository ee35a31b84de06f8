//! The buckets of a workload's rate limits: what [`mesh_core::intake::rate`] decides on, kept for as long as the workload is
//! enrolled.
//!
//! A limit keeps its buckets for as long as it says the same, whatever else becomes of the view: who had nothing left has
//! nothing left after an update either. They are this agent's: one that takes over begins with full ones.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    mem,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use http::HeaderMap;
use mesh_core::{
    identity::SpiffeId,
    intake::rate::{Buckets, Counting, count},
    model::intake::{Intake, RateBy, RateLimit},
    policy::request::Reading,
};

/// All buckets of one workload.
#[derive(Debug)]
pub(crate) struct Rates {
    epoch: Instant,
    /// Seeded by chance, so that nobody can choose values that share a bucket.
    keys: RandomState,
    // Held for a few comparisons, never across an await.
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// What the buckets are for.
    of: Option<Arc<Intake>>,
    /// Those of each port, in the order of its limits.
    ports: HashMap<u16, Vec<Buckets>>,
}

/// A request that is one too many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TooMany {
    /// The limits that have no token left, each with its place among those of the port.
    pub(crate) limits: Vec<(usize, RateLimit)>,
    /// How long until all of them have one.
    pub(crate) wait: Duration,
}

/// What was counted.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) taken: Result<(), TooMany>,
    /// Of how many limits all buckets are in use, so that it shares one.
    pub(crate) shared: usize,
}

impl Default for Rates {
    fn default() -> Self {
        Self { epoch: Instant::now(), keys: RandomState::new(), kept: Mutex::default() }
    }
}

impl Rates {
    /// Takes a token of each limit that counts a request, or of none.
    pub(crate) fn ask(
        &self,
        intake: &Arc<Intake>,
        port: u16,
        (source, headers, reading): (Option<&SpiffeId>, &HeaderMap, &Reading<'_>),
    ) -> Asked {
        let limits = intake.ports.get(&port).map_or(&[][..], |it| &it.rates);
        if limits.is_empty() {
            return Asked { taken: Ok(()), shared: 0 };
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.follow(intake);
        let now = self.epoch.elapsed();
        let buckets = kept.ports.entry(port).or_default();
        let (places, mut counting): (Vec<usize>, Vec<Counting<'_>>) = limits
            .iter()
            .zip(buckets)
            .enumerate()
            .filter(|(_, (limit, _))| reading.could_be(&limit.only))
            .map(|(place, (limit, buckets))| {
                (place, Counting { limit, buckets, key: self.key(&limit.by, source, headers) })
            })
            .unzip();
        let counted = count(&mut counting, now);
        let wait = counted.exceeded.iter().map(|(_, wait)| *wait).max();
        let exceeded = counted.exceeded.iter().map(|(at, _)| places[*at]);
        let limits = exceeded.map(|place| (place, limits[place].clone())).collect();
        Asked { taken: wait.map_or(Ok(()), |wait| Err(TooMany { limits, wait })), shared: counted.shared }
    }

    /// A number for whoever has a bucket. What is told apart may be long, and is not kept.
    fn key(&self, by: &RateBy, source: Option<&SpiffeId>, headers: &HeaderMap) -> u64 {
        match by {
            RateBy::All => 0,
            RateBy::Identity => self.keys.hash_one(source.map(SpiffeId::to_string)),
            RateBy::Header(name) => {
                let values: Vec<&[u8]> =
                    headers.get_all(name.as_str()).iter().map(|it| it.as_bytes()).collect();
                self.keys.hash_one(values)
            }
        }
    }
}

impl Kept {
    /// Has the buckets of these limits: new ones for those that are new.
    fn follow(&mut self, intake: &Arc<Intake>) {
        if self.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, intake)) {
            return;
        }
        let (before, mut had) = (self.of.replace(intake.clone()), mem::take(&mut self.ports));
        for (port, of_port) in &intake.ports {
            let old = before.as_ref().and_then(|it| it.ports.get(port)).map_or(&[][..], |it| &it.rates);
            let mut had: Vec<_> = old.iter().zip(had.remove(port).unwrap_or_default()).map(Some).collect();
            let same = |limit: &RateLimit| {
                let of_limit =
                    |it: &&mut Option<(&RateLimit, Buckets)>| it.as_ref().is_some_and(|(of, _)| *of == limit);
                had.iter_mut().find(of_limit).and_then(Option::take).map(|(_, buckets)| buckets)
            };
            let buckets = of_port.rates.iter().map(same).map(Option::unwrap_or_default).collect();
            self.ports.insert(*port, buckets);
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue, Method, Uri};
    use mesh_core::model::{Asks, Name, intake::PortIntake};

    use super::*;

    fn limit(index: u32, by: RateBy) -> RateLimit {
        let (policy, per) = (Name::new("shop", "p"), Duration::from_secs(3600));
        RateLimit { policy, index, by, requests: 1, per, burst: 1, only: Asks::default() }
    }

    fn intake(rates: Vec<RateLimit>) -> Arc<Intake> {
        let of_port = PortIntake { rates, ..PortIntake::default() };
        let (workload, labels) = (Name::new("shop", "web"), Default::default());
        Arc::new(Intake { workload, labels, ports: [(80, of_port)].into() })
    }

    /// The limits that it is too many for.
    fn ask(rates: &Rates, intake: &Arc<Intake>, who: &str, headers: &[(&str, &[u8])]) -> Vec<u32> {
        let mut all = HeaderMap::new();
        for (name, value) in headers {
            all.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_bytes(value).unwrap());
        }
        let source = SpiffeId::parse(&format!("spiffe://td/ns/shop/sa/{who}")).ok();
        let uri = Uri::from_static("/");
        let asked = mesh_core::http::matches::Asked { method: &Method::GET, uri: &uri, headers: &all };
        let reading = Reading::of(&asked);
        let asked = rates.ask(intake, 80, (source.as_ref(), &all, &reading));
        asked.taken.map_or_else(|it| it.limits.iter().map(|(_, limit)| limit.index).collect(), |()| vec![])
    }

    #[test]
    fn a_limit_keeps_its_buckets_while_it_says_the_same() {
        let rates = Rates::default();
        let (a, b) = (limit(0, RateBy::All), limit(1, RateBy::All));
        let first = intake(vec![a.clone()]);
        assert_eq!([ask(&rates, &first, "web", &[]), ask(&rates, &first, "web", &[])], [vec![], vec![0]]);
        let again = intake(vec![a.clone()]);
        assert_eq!(ask(&rates, &again, "web", &[]), [0], "another view with the same");
        let more = intake(vec![b.clone(), a.clone()]);
        assert_eq!(ask(&rates, &more, "web", &[]), [0], "in another place, beside a new one");
        let other = intake(vec![RateLimit { burst: 2, ..a }]);
        assert_eq!(ask(&rates, &other, "web", &[]), [0; 0], "it says something else");
        assert_eq!(ask(&rates, &intake(vec![b]), "web", &[]), [0; 0]);
    }

    #[test]
    fn each_identity_and_each_value_has_a_bucket_of_its_own() {
        let rates = Rates::default();
        let by_identity = intake(vec![limit(0, RateBy::Identity)]);
        for who in ["web", "db", "no body: in plaintext"] {
            assert_eq!(ask(&rates, &by_identity, who, &[]), [0; 0], "{who}");
            assert_eq!(ask(&rates, &by_identity, who, &[]), [0], "{who}");
        }
        let by_header = intake(vec![limit(0, RateBy::Header("x-a".into()))]);
        let values: [&[(&str, &[u8])]; 5] =
            [&[], &[("x-a", b"")], &[("x-a", b"b")], &[("x-a", b"b"), ("x-a", b"c")], &[("x-a", b"bc")]];
        for headers in values {
            assert_eq!(ask(&rates, &by_header, "web", headers), [0; 0], "{headers:?}");
            assert_eq!(ask(&rates, &by_header, "db", headers), [0], "{headers:?}");
        }
    }
}
