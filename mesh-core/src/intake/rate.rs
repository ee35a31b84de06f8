//! Whether a request is one too many: buckets of tokens, in whole numbers, so that nothing is lost or made by rounding.
//!
//! A bucket is full at first. Each request takes a token of every limit that counts it, or none of any: who is refused by one
//! limit is not charged by another. Of each limit there are as many buckets as there are those who have one of their own, up
//! to a most; one that is full again says no more than none at all, and is what makes room.
//!
//! Pure: the caller brings the time, and numbers for whoever has a bucket.

use std::{collections::HashMap, time::Duration};

use crate::model::intake::RateLimit;

/// Most buckets of a limit: half a megabyte. Whoever comes when all of them are in use shares one with all others who do.
pub const MOST_BUCKETS: usize = 8192;
/// Buckets that are looked at to make room for one, so that a request costs the same however many there are.
const LOOKED_AT: usize = 64;

/// What is in a bucket. Times are since an epoch that the caller chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bucket {
    /// In parts of a token: there are as many to a token as `per` has nanoseconds, and `requests` of them come in each.
    level: u128,
    filled: Duration,
}

impl Bucket {
    fn full(limit: &RateLimit, now: Duration) -> Self {
        Self { level: most(limit), filled: now }
    }

    fn level(&self, limit: &RateLimit, now: Duration) -> u128 {
        let since = now.saturating_sub(self.filled).as_nanos();
        most(limit).min(self.level.saturating_add(since.saturating_mul(limit.requests.into())))
    }

    fn is_full(&self, limit: &RateLimit, now: Duration) -> bool {
        self.level(limit, now) == most(limit)
    }

    /// How long until there is a token.
    fn wait(&self, limit: &RateLimit, now: Duration) -> Duration {
        let missing = token(limit).saturating_sub(self.level(limit, now));
        let nanos = missing.div_ceil(u128::from(limit.requests).max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, limit: &RateLimit, now: Duration) {
        self.level = self.level(limit, now).saturating_sub(token(limit));
        // A clock that goes back gives nothing twice.
        self.filled = self.filled.max(now);
    }
}

/// The parts of one token.
fn token(limit: &RateLimit) -> u128 {
    limit.per.as_nanos()
}

fn most(limit: &RateLimit) -> u128 {
    token(limit).saturating_mul(limit.burst.into())
}

/// The buckets of one limit.
#[derive(Debug)]
pub struct Buckets {
    most: usize,
    kept: Vec<(u64, Bucket)>,
    places: HashMap<u64, usize>,
    /// Where room is looked for next.
    hand: usize,
    /// That of all who found no room.
    shared: Option<Bucket>,
}

impl Default for Buckets {
    fn default() -> Self {
        Self::of(MOST_BUCKETS)
    }
}

/// Whose bucket it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Own(usize),
    Shared,
}

impl Buckets {
    /// At most so many.
    pub fn of(most: usize) -> Self {
        Self { most, kept: Vec::new(), places: HashMap::new(), hand: 0, shared: None }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether nobody has one.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    fn place(&mut self, limit: &RateLimit, key: u64, now: Duration) -> Place {
        if let Some(place) = self.places.get(&key) {
            return Place::Own(*place);
        }
        let full = Bucket::full(limit, now);
        if self.kept.len() < self.most {
            self.kept.push((key, full));
            self.places.insert(key, self.kept.len() - 1);
            return Place::Own(self.kept.len() - 1);
        }
        for _ in 0..LOOKED_AT.min(self.kept.len()) {
            let place = self.hand;
            self.hand = (place + 1) % self.kept.len();
            if self.kept[place].1.is_full(limit, now) {
                self.places.remove(&self.kept[place].0);
                self.kept[place] = (key, full);
                self.places.insert(key, place);
                return Place::Own(place);
            }
        }
        Place::Shared
    }

    fn at(&mut self, limit: &RateLimit, place: Place, now: Duration) -> &mut Bucket {
        match place {
            Place::Own(place) => &mut self.kept[place].1,
            Place::Shared => self.shared.get_or_insert(Bucket::full(limit, now)),
        }
    }
}

/// A limit that counts a request.
#[derive(Debug)]
pub struct Counting<'a> {
    /// What it says.
    pub limit: &'a RateLimit,
    /// Its buckets.
    pub buckets: &'a mut Buckets,
    /// Who asks, as far as it tells them apart: a number that nobody can choose.
    pub key: u64,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counted {
    /// It is one too many for these, by their index among those that counted it, each for so long. None: it goes on.
    pub exceeded: Vec<(usize, Duration)>,
    /// Of how many limits the bucket was the one that is shared.
    pub shared: usize,
}

/// Takes a token of each limit, or of none if one has none.
pub fn count(limits: &mut [Counting<'_>], now: Duration) -> Counted {
    let mut counted = Counted::default();
    let mut places = Vec::with_capacity(limits.len());
    for (index, Counting { limit, buckets, key }) in limits.iter_mut().enumerate() {
        let place = buckets.place(limit, *key, now);
        places.push(place);
        counted.shared += usize::from(place == Place::Shared);
        let wait = buckets.at(limit, place, now).wait(limit, now);
        if !wait.is_zero() {
            counted.exceeded.push((index, wait));
        }
    }
    if counted.exceeded.is_empty() {
        for (Counting { limit, buckets, .. }, place) in limits.iter_mut().zip(places) {
            buckets.at(limit, place, now).take(limit, now);
        }
    }
    counted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Asks, Name, intake::RateBy};

    const MS: Duration = Duration::from_millis(1);

    fn limit(requests: u32, per: Duration, burst: u32) -> RateLimit {
        let policy = Name::new("shop", "p");
        RateLimit { policy, index: 0, by: RateBy::All, requests, per, burst, only: Asks::default() }
    }

    /// How long one has to wait; zero: it went on.
    fn ask(limit: &RateLimit, buckets: &mut Buckets, key: u64, now: Duration) -> Duration {
        let counted = count(&mut [Counting { limit, buckets, key }], now);
        counted.exceeded.first().map_or(Duration::ZERO, |(_, wait)| *wait)
    }

    #[test]
    fn a_burst_goes_on_and_then_what_comes_in_time() {
        let (limit, mut buckets) = (limit(10, MS * 1000, 3), Buckets::default());
        let mut ask = |ms| ask(&limit, &mut buckets, 1, MS * ms);
        assert_eq!([ask(0), ask(0), ask(0)], [Duration::ZERO; 3]);
        assert_eq!(ask(0), MS * 100);
        assert_eq!(ask(60), MS * 40);
        assert_eq!(ask(100), Duration::ZERO);
        assert_eq!(ask(100), MS * 100);
        assert_eq!([ask(9000), ask(9000), ask(9000), ask(9000)], [0, 0, 0, 100].map(|ms| MS * ms));
    }

    #[test]
    fn nothing_is_lost_by_rounding() {
        // A token each third of a second, asked for at each nanosecond at which it is just there.
        let (limit, mut buckets) = (limit(3, MS * 1000, 2), Buckets::default());
        let mut ask = |now| ask(&limit, &mut buckets, 1, now).is_zero();
        assert!(ask(Duration::ZERO) && ask(Duration::ZERO));
        for n in 1..30_000u64 {
            let now = Duration::from_nanos((n * 1_000_000_000).div_ceil(3));
            assert!(ask(now), "{n}");
            assert!(n % 3 > 0 || !ask(now), "and no more than that");
        }
        let late = Duration::from_nanos(u64::MAX);
        assert!(ask(late) && ask(late));
        assert!(!ask(Duration::ZERO) && !ask(late), "a clock that goes back gives nothing");
    }

    #[test]
    fn who_is_refused_by_one_limit_is_not_charged_by_another() {
        let (many, few) = (limit(1, MS * 1000, 2), limit(1, MS * 1000, 1));
        let (mut of_many, mut of_few) = (Buckets::default(), Buckets::default());
        let mut both = |key| {
            let a = Counting { limit: &many, buckets: &mut of_many, key: 0 };
            let b = Counting { limit: &few, buckets: &mut of_few, key };
            count(&mut [a, b], Duration::ZERO).exceeded
        };
        assert_eq!(both(1), []);
        assert_eq!([both(1), both(1)], [(); 2].map(|()| vec![(1, MS * 1000)]));
        assert_eq!(both(2), [], "there was a token left");
        assert_eq!(both(2), [(0, MS * 1000), (1, MS * 1000)]);
    }

    #[test]
    fn whoever_finds_no_room_shares_a_bucket_until_there_is_some() {
        let (limit, mut buckets) = (limit(1, MS * 1000, 1), Buckets::of(2));
        let mut ask = |key, ms| {
            let counted = count(&mut [Counting { limit: &limit, buckets: &mut buckets, key }], MS * ms);
            (counted.exceeded.is_empty(), counted.shared)
        };
        assert_eq!(
            [ask(1, 0), ask(2, 0), ask(3, 0), ask(4, 0)],
            [(true, 0), (true, 0), (true, 1), (false, 1)]
        );
        assert_eq!(ask(2, 500), (false, 0), "those who have one keep it");
        assert_eq!(ask(4, 1000), (true, 0), "one was full again");
        assert_eq!([ask(4, 1000), ask(2, 1000)], [(false, 0), (true, 0)]);
        assert_eq!(buckets.len(), 2);
    }
}
