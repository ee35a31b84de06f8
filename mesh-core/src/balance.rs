//! Which endpoint takes the next connection: power of two choices on a peak-sensitive moving average of connect time,
//! weighted by the connections in flight; endpoints that refuse are ejected for a while.
//!
//! Of the two, the cheaper one is not always taken but in proportion: with two endpoints in all, the strict choice would
//! leave the slower one, say that of the other node, without any connection at all.
//!
//! Pure: the caller brings the time and the random numbers, and keeps one [`Load`] per endpoint.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// How fast the average forgets: after this long without a sample, about a third of the old value is left.
const DECAY: Duration = Duration::from_secs(10);
/// What an endpoint without any sample is assumed to take, so that new ones are tried soon but not all at once.
const UNMEASURED: Duration = Duration::from_millis(1);
/// First time of ejection; doubled at each further failure in a row.
pub const EJECTION_BASE: Duration = Duration::from_secs(1);
/// Longest ejection.
pub const EJECTION_MAX: Duration = Duration::from_secs(30);

/// What is known of one endpoint. Times are since an epoch that the caller chooses.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Connections in flight.
    pub active: u32,
    connect_time: Option<(f64, Duration)>,
    failures: u32,
    ejected_until: Option<Duration>,
}

impl Load {
    /// A connection was made within `took`, seen at `now`.
    pub fn connected(&mut self, took: Duration, now: Duration) {
        let sample = took.as_secs_f64();
        let average = match self.connect_time {
            // A peak counts at once; only recovery is slow.
            Some((old, _)) if sample > old => sample,
            Some((old, at)) => {
                let weight = (-(now.saturating_sub(at).as_secs_f64().max(0.001)) / DECAY.as_secs_f64()).exp();
                old * weight + sample * (1.0 - weight)
            }
            None => sample,
        };
        self.connect_time = Some((average, now));
        self.failures = 0;
        self.ejected_until = None;
    }

    /// A connection attempt failed at `now`: ejects the endpoint, longer each time.
    pub fn failed(&mut self, now: Duration) {
        let factor = 1u32 << self.failures.min(5);
        self.failures = self.failures.saturating_add(1);
        self.ejected_until = Some(now + (EJECTION_BASE * factor).min(EJECTION_MAX));
    }

    /// Whether it is passed over at `now`.
    pub fn ejected(&self, now: Duration) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }

    fn cost(&self) -> f64 {
        let time = self.connect_time.map_or(UNMEASURED.as_secs_f64(), |(average, _)| average);
        time * f64::from(self.active + 1)
    }
}

/// Requests that are asked for by which one may be made again, at most: a fifth of them.
const REQUESTS_PER_RETRY: f64 = 5.0;
/// That may be made again in a second, however few are asked for.
const RETRIES_PER_SECOND: f64 = 10.0;
/// That may be saved up: those of ten seconds.
const RETRIES_SAVED: f64 = 100.0;

/// How many requests may be made again: some in a second, and a share of all. So a service that fails altogether is asked
/// little more than before. Times are since an epoch that the caller chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    saved: f64,
    filled: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        Self { saved: RETRIES_SAVED, filled: Duration::ZERO }
    }
}

impl Budget {
    /// A request is asked for.
    pub fn asked(&mut self, now: Duration) {
        self.fill(now);
        self.saved = (self.saved + 1.0 / REQUESTS_PER_RETRY).min(RETRIES_SAVED);
    }

    /// Whether one may be made again, which is taken out.
    pub fn take(&mut self, now: Duration) -> bool {
        self.fill(now);
        let may = self.saved >= 1.0;
        if may {
            self.saved -= 1.0;
        }
        may
    }

    fn fill(&mut self, now: Duration) {
        let since = now.saturating_sub(self.filled).as_secs_f64();
        self.saved = (self.saved + since * RETRIES_PER_SECOND).min(RETRIES_SAVED);
        self.filled = self.filled.max(now);
    }
}

/// Picks an index of `loads`, or `None` if it is empty. `random` gives three independent numbers.
///
/// Ejected endpoints are chosen only if all are ejected: refusing everything would be worse than trying.
pub fn pick(loads: &[Load], now: Duration, random: (u32, u32, u32)) -> Option<usize> {
    let candidates = serving(loads, now);
    let count = candidates.len();
    if count <= 1 {
        return candidates.first().copied();
    }
    let first = random.0 as usize % count;
    let second = (first + 1 + random.1 as usize % (count - 1)) % count;
    let (a, b) = (candidates[first], candidates[second]);
    let (cost_a, cost_b) = (loads[a].cost(), loads[b].cost());
    let share_of_a = cost_b / (cost_a + cost_b);
    Some(if f64::from(random.2) / f64::from(u32::MAX) <= share_of_a { a } else { b })
}

/// The indices of those that are not ejected; all of them if all are.
pub fn serving(loads: &[Load], now: Duration) -> Vec<usize> {
    let serving: Vec<usize> = (0..loads.len()).filter(|&i| !loads[i].ejected(now)).collect();
    if serving.is_empty() { (0..loads.len()).collect() } else { serving }
}

/// The index of the endpoint that a client has whenever the endpoints are these, whoever asks: the one with the highest
/// number that client and endpoint give together (rendezvous hashing). `None` if there are none.
///
/// So a client whose endpoint is not remembered, by another agent or after a restart, still comes to the same one.
pub fn settled(client: IpAddr, endpoints: &[SocketAddr]) -> Option<usize> {
    let weight = |endpoint: &SocketAddr| {
        // Not for security: without keys it is the same everywhere.
        let mut hasher = DefaultHasher::new();
        (client, endpoint).hash(&mut hasher);
        hasher.finish()
    };
    (0..endpoints.len()).max_by_key(|index| weight(&endpoints[*index]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// How many of 1,000 picks, evenly spread over the random numbers, fall on the first endpoint.
    fn share_of_first(loads: &[Load]) -> usize {
        (0..1000u32).filter(|n| pick(loads, MS, (*n, *n, n * (u32::MAX / 1000))) == Some(0)).count()
    }

    #[test]
    fn a_service_that_fails_altogether_is_asked_little_more_than_before() {
        let mut budget = Budget::default();
        let (mut asked, mut again) = (0u32, 0u32);
        // A thousand requests a second, all of which fail, for ten seconds.
        for ms in 0..10_000 {
            let now = MS * ms;
            budget.asked(now);
            asked += 1;
            again += u32::from(budget.take(now));
        }
        assert_eq!(asked, 10_000);
        // A fifth of them, ten in a second, and what was saved.
        assert!((2190..=2310).contains(&again), "{again}");
        // One request in a minute may always be.
        assert!(budget.take(MS * 70_000));
    }

    #[test]
    fn the_slower_of_two_takes_less_in_proportion_and_never_nothing() {
        let mut loads = [Load::default(), Load::default()];
        assert!((450..550).contains(&share_of_first(&loads)));
        loads[0].connected(MS, MS);
        loads[1].connected(MS * 4, MS);
        assert!((770..830).contains(&share_of_first(&loads)));
        loads[0].active = 15;
        assert!((170..230).contains(&share_of_first(&loads)));
    }

    #[test]
    fn a_refusing_endpoint_is_ejected_and_comes_back() {
        let mut loads = [Load::default(), Load::default()];
        loads[0].failed(Duration::ZERO);
        assert!((0..10).all(|r| pick(&loads, MS, (r, r, r)) == Some(1)));
        assert!(!loads[0].ejected(EJECTION_BASE));
        loads[1].failed(Duration::ZERO);
        assert!(pick(&loads, MS, (0, 0, 0)).is_some(), "all ejected: still one is tried");
    }

    #[test]
    fn ejection_grows_and_is_bounded() {
        let mut load = Load::default();
        for _ in 0..100 {
            load.failed(Duration::ZERO);
        }
        assert!(load.ejected(EJECTION_MAX - MS) && !load.ejected(EJECTION_MAX));
    }

    #[test]
    fn a_client_moves_only_when_its_own_endpoint_goes_and_clients_are_spread() {
        let endpoints: Vec<SocketAddr> = (1..=4).map(|n| SocketAddr::from(([10, 0, 0, n], 80))).collect();
        let fewer = &endpoints[..3];
        let mut had = [0; 4];
        for n in 0..=255 {
            let client = IpAddr::from([10, 1, 0, n]);
            let index = settled(client, &endpoints).unwrap();
            had[index] += 1;
            assert!(index == 3 || settled(client, fewer) == Some(index));
        }
        assert!(had.iter().all(|clients| (32..96).contains(clients)), "{had:?}");
        assert_eq!(settled([10, 1, 0, 1].into(), &[]), None);
    }

    proptest! {
        #[test]
        fn a_pick_is_always_one_of_them(n in 0usize..10, a: u32, b: u32, c: u32) {
            let loads = vec![Load::default(); n];
            prop_assert_eq!(pick(&loads, MS, (a, b, c)).is_some_and(|i| i < n), n > 0);
        }
    }
}
