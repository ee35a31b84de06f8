//! Which endpoint of a service takes the next connection or request. Unless a policy says something else: power of two
//! choices on a peak-sensitive moving average of the time until it answers, weighted by what is under way there; endpoints
//! that take no connections are passed over for a while.
//!
//! Of the two, the cheaper one is not always taken but in proportion: with two endpoints in all, the strict choice would
//! leave the slower one, say that of the other node, without any connection at all.
//!
//! Pure: the caller brings the time and the random numbers, and keeps one [`Load`] per endpoint.
//!
//! | module | what |
//! |---|---|
//! | [`load`] | what is known of an endpoint, and whether it is passed over |
//! | [`budget`] | how many requests may be tried again |
//! | [`window`] | how many of those that an endpoint took of late have failed |

pub mod budget;
pub mod load;
pub mod window;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
    time::Duration,
};

pub use self::{
    budget::Budget,
    load::{Cause, Load},
};
use crate::model::traffic::{Algorithm, Balancing, Ejection};

/// The part of its share that an endpoint gets when it has just come, with a slow start.
const LEAST_SHARE: f64 = 0.1;

/// An endpoint that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Where it is.
    pub address: SocketAddr,
    /// What is known of it.
    pub load: Load,
}

/// How one is chosen.
#[derive(Debug, Clone, Copy, Default)]
pub struct How<'a> {
    /// As a policy says it; none: the least latency.
    pub balancing: Option<&'a Balancing>,
    /// Which of them are passed over, besides those that take no connections.
    pub ejection: Option<&'a Ejection>,
    /// How many were chosen before.
    pub turn: u64,
    /// The value whose endpoint is the same each time, if there is one.
    pub value: Option<&'a [u8]>,
}

/// Picks an index of the candidates, or `None` if there are none. `random`: independent numbers, evenly spread.
///
/// Those that are passed over are chosen only if all are: refusing everything would be worse than trying.
pub fn pick(candidates: &[Candidate], how: &How<'_>, now: Duration, random: [u32; 3]) -> Option<usize> {
    let serving = serving(candidates, how.ejection, now);
    if serving.len() <= 1 {
        return serving.first().copied();
    }
    let slow_start = how.balancing.and_then(|it| it.slow_start);
    let share = |at: usize| candidates[at].load.age(now).map_or(1.0, |age| share_at(age, slow_start));
    let cost_of = |cost: fn(&Load) -> f64| move |at: usize| cost(&candidates[at].load) / share(at);
    let algorithm = how.balancing.map_or(&Algorithm::LeastLatency, |it| &it.algorithm);
    Some(match (algorithm, how.value) {
        (Algorithm::Hash(_), Some(value)) => {
            let addresses: Vec<_> = serving.iter().map(|at| candidates[*at].address).collect();
            serving[settled(value, &addresses)?]
        }
        (Algorithm::LeastLatency | Algorithm::Hash(_), _) => of_two(&serving, random, cost_of(Load::cost)),
        (Algorithm::LeastRequests, _) => {
            of_two(&serving, random, cost_of(|load| f64::from(load.active) + 1.0))
        }
        (Algorithm::Random, _) => of_two(&serving, random, cost_of(|_| 1.0)),
        (Algorithm::RoundRobin, _) => {
            let count = serving.len();
            let first = (how.turn % count as u64) as usize;
            let passes = part(random[2]) > share(serving[first]);
            serving[if passes { (first + 1) % count } else { first }]
        }
    })
}

/// Of two that are drawn the one or the other, in inverse proportion to what they cost.
fn of_two(serving: &[usize], random: [u32; 3], cost: impl Fn(usize) -> f64) -> usize {
    let count = serving.len();
    let first = random[0] as usize % count;
    let second = (first + 1 + random[1] as usize % (count - 1)) % count;
    let (a, b) = (serving[first], serving[second]);
    let (cost_a, cost_b) = (cost(a), cost(b));
    if part(random[2]) <= cost_b / (cost_a + cost_b) { a } else { b }
}

/// Of a whole, from 0 to 1.
fn part(random: u32) -> f64 {
    f64::from(random) / f64::from(u32::MAX)
}

/// How much of its share an endpoint of this age gets.
fn share_at(age: Duration, slow_start: Option<Duration>) -> f64 {
    match slow_start {
        Some(whole) if age < whole => LEAST_SHARE + (1.0 - LEAST_SHARE) * age.div_duration_f64(whole),
        _ => 1.0,
    }
}

/// The indices of those that are not passed over; all of them if all would be.
///
/// Who takes no connections is passed over in any case, who fails otherwise only as far as the policy lets so many be.
pub fn serving(candidates: &[Candidate], ejection: Option<&Ejection>, now: Duration) -> Vec<usize> {
    let all = || (0..candidates.len()).collect::<Vec<_>>();
    let mut failing: Vec<usize> = match ejection {
        Some(_) => all().into_iter().filter(|at| candidates[*at].load.is_failing(now)).collect(),
        None => vec![],
    };
    if let Some(ejection) = ejection {
        // One may always be, and of several those that have failed most.
        let most = (candidates.len() * ejection.most_percent as usize / 100).max(1);
        failing.sort_by_key(|at| std::cmp::Reverse(candidates[*at].load.failing_until()));
        failing.truncate(most);
    }
    let serves = |at: &usize| !candidates[*at].load.is_refusing(now) && !failing.contains(at);
    let serving: Vec<usize> = all().into_iter().filter(serves).collect();
    let panic = ejection.map_or(0, |it| it.panic_percent as usize);
    if serving.is_empty() || serving.len() * 100 < candidates.len() * panic { all() } else { serving }
}

/// The index of the endpoint that a value has whenever the endpoints are these, whoever asks: the one with the highest
/// number that value and endpoint give together (rendezvous hashing). `None` if there are none.
///
/// So a client whose endpoint is not remembered, by another agent or after a restart, still comes to the same one.
pub fn settled(value: impl Hash, endpoints: &[SocketAddr]) -> Option<usize> {
    let weight = |endpoint: &SocketAddr| {
        // Not for security: without keys it is the same everywhere.
        let mut hasher = DefaultHasher::new();
        (&value, endpoint).hash(&mut hasher);
        hasher.finish()
    };
    (0..endpoints.len()).max_by_key(|index| weight(&endpoints[*index]))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::model::traffic::HashBy;

    const MS: Duration = Duration::from_millis(1);
    const EJECTION: Ejection = Ejection {
        failures: 2,
        base: MS,
        most: Duration::from_millis(8),
        most_percent: 50,
        panic_percent: 0,
        share: None,
        retry_after: None,
    };

    fn candidates(loads: &[Load]) -> Vec<Candidate> {
        let address = |at: usize| SocketAddr::from(([10, 0, 0, u8::try_from(at).unwrap()], 80));
        loads.iter().enumerate().map(|(at, load)| Candidate { address: address(at), load: *load }).collect()
    }

    /// How many of 1,000 picks, evenly spread over the random numbers, fall on each endpoint.
    fn picks(loads: &[Load], balancing: &Balancing, now: Duration) -> Vec<usize> {
        let candidates = candidates(loads);
        let mut counts = vec![0; loads.len()];
        for n in 0..1000u32 {
            let how = How { balancing: Some(balancing), turn: n.into(), ..How::default() };
            let random = [n, n / 7, n.wrapping_mul(2_654_435_761)];
            counts[pick(&candidates, &how, now, random).unwrap()] += 1;
        }
        counts
    }

    fn by(algorithm: Algorithm) -> Balancing {
        Balancing { algorithm, slow_start: None }
    }

    #[test]
    fn the_slower_of_two_takes_less_in_proportion_and_never_nothing() {
        let share_of_first = |loads: &[Load]| picks(loads, &by(Algorithm::LeastLatency), MS)[0];
        let mut loads = [Load::default(), Load::default()];
        assert!((450..550).contains(&share_of_first(&loads)));
        loads[0].connected(MS, MS);
        loads[1].connected(MS * 4, MS);
        assert!((770..830).contains(&share_of_first(&loads)));
        loads[0].active = 15;
        assert!((170..230).contains(&share_of_first(&loads)));
    }

    #[test]
    fn each_algorithm_goes_by_its_own() {
        let mut loads = [Load::default(); 4];
        loads[0].connected(MS * 1000, MS);
        loads[1].active = 9;
        let even = |count: &usize| (220..280).contains(count);
        for algorithm in [Algorithm::RoundRobin, Algorithm::Random] {
            let counts = picks(&loads, &by(algorithm.clone()), MS);
            assert!(counts.iter().all(even), "{algorithm:?}: {counts:?}");
        }
        let busy = picks(&loads, &by(Algorithm::LeastRequests), MS);
        assert!(busy[1] < 80 && (280..340).contains(&busy[0]), "{busy:?}");
    }

    #[test]
    fn one_that_has_just_come_gets_a_tenth_of_its_share_at_first() {
        let mut loads = [Load::default(), Load::default()];
        loads[1].seen(MS * 1000);
        for algorithm in [Algorithm::LeastLatency, Algorithm::RoundRobin, Algorithm::Random] {
            let balancing = Balancing { algorithm, slow_start: Some(MS * 100) };
            let of_new = |now| picks(&loads, &balancing, now)[1];
            assert!((20..140).contains(&of_new(MS * 1000)), "{balancing:?}: {}", of_new(MS * 1000));
            assert!((250..450).contains(&of_new(MS * 1050)), "{balancing:?}: {}", of_new(MS * 1050));
            assert!((450..550).contains(&of_new(MS * 1100)), "{balancing:?}: {}", of_new(MS * 1100));
        }
    }

    #[test]
    fn a_value_has_its_endpoint_while_that_serves() {
        let hash = by(Algorithm::Hash(HashBy::Header("x-user".into())));
        let mut loads = [Load::default(); 4];
        let pick = |loads: &[Load], value| {
            let how = How { balancing: Some(&hash), value, ..How::default() };
            pick(&candidates(loads), &how, MS, rand_of(value)).unwrap()
        };
        let own = pick(&loads, Some(b"ann"));
        assert_eq!(pick(&loads, Some(b"ann")), own);
        loads[own].failed(Duration::ZERO);
        assert_ne!(pick(&loads, Some(b"ann")), own);
    }

    fn rand_of(value: Option<&[u8]>) -> [u32; 3] {
        [value.map_or(0, |it| it.len() as u32); 3]
    }

    #[test]
    fn a_refusing_endpoint_is_passed_over_and_comes_back() {
        let how = How::default();
        let mut loads = [Load::default(), Load::default()];
        loads[0].failed(Duration::ZERO);
        assert!((0..10).all(|r| pick(&candidates(&loads), &how, MS, [r; 3]) == Some(1)));
        assert!(!loads[0].is_refusing(load::REFUSING_BASE));
        loads[1].failed(Duration::ZERO);
        assert!(pick(&candidates(&loads), &how, MS, [0; 3]).is_some(), "all are: still one is tried");
    }

    #[test]
    fn no_more_are_ejected_than_may_be_and_in_panic_none() {
        let mut loads = [Load::default(); 4];
        for (at, load) in loads.iter_mut().enumerate().take(3) {
            let failures = 2 * (at + 1);
            (0..failures).for_each(|_| {
                load.answered(true, &EJECTION, MS);
            });
        }
        // Half of four, and those that are out for longest.
        let candidates = candidates(&loads);
        assert_eq!(serving(&candidates, Some(&EJECTION), MS), [0, 3]);
        assert_eq!(serving(&candidates, None, MS), [0, 1, 2, 3], "nobody wants any ejected");
        let panic = Ejection { most_percent: 100, panic_percent: 50, ..EJECTION };
        assert_eq!(serving(&candidates, Some(&panic), MS), [0, 1, 2, 3]);
        let none_left = Ejection { most_percent: 100, ..EJECTION };
        assert_eq!(serving(&candidates, Some(&none_left), MS), [3]);
        let least = Ejection { most_percent: 1, ..EJECTION };
        assert_eq!(serving(&candidates, Some(&least), MS), [0, 1, 3], "one may always be");

        // Who rests by its own word counts among them.
        let mut loads = [Load::default(); 4];
        (0..3).for_each(|at| assert!(loads[at].rests(MS * (at as u32 + 2), MS)));
        let candidates = super::tests::candidates(&loads);
        assert_eq!(serving(&candidates, Some(&EJECTION), MS), [0, 3]);
        assert_eq!(serving(&candidates, Some(&panic), MS), [0, 1, 2, 3]);
        assert_eq!(serving(&candidates, Some(&EJECTION), MS * 5), [0, 1, 2, 3]);
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
        assert_eq!(settled(IpAddr::from([10, 1, 0, 1]), &[]), None);
    }

    fn algorithm() -> impl Strategy<Value = Algorithm> {
        prop::sample::select(vec![
            Algorithm::LeastLatency,
            Algorithm::LeastRequests,
            Algorithm::RoundRobin,
            Algorithm::Random,
            Algorithm::Hash(HashBy::Source),
        ])
    }

    proptest! {
        #[test]
        fn a_pick_is_always_one_of_them(
            failures in prop::collection::vec(0u32..6, 0..10), random: [u32; 3], turn: u64, algorithm in algorithm(),
            has_value: bool, most_percent in 0u32..=100, panic_percent in 0u32..=100,
        ) {
            let mut loads = vec![Load::default(); failures.len()];
            for (load, failures) in loads.iter_mut().zip(&failures) {
                load.seen(MS);
                (0..*failures).for_each(|_| {
                load.answered(true, &EJECTION, MS);
            });
            }
            let balancing = Balancing { algorithm, slow_start: Some(MS) };
            let ejection = Ejection { most_percent, panic_percent, ..EJECTION };
            let value = has_value.then_some(b"a".as_slice());
            let how = How { balancing: Some(&balancing), ejection: Some(&ejection), turn, value };
            let picked = pick(&candidates(&loads), &how, MS, random);
            prop_assert_eq!(picked.is_some_and(|at| at < loads.len()), !loads.is_empty());
        }
    }
}
