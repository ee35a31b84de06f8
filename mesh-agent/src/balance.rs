//! Which endpoint of a service takes a connection: the agent's memory for the decision in [`mesh_core::balance`].

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mesh_core::{
    balance::{self, Candidate, Cause, How, Load},
    model::{Endpoint, Name, traffic::Ejection},
};

/// Endpoints whose load is remembered; at the limit the ones without a connection are forgotten, and start over as
/// unmeasured.
const MAX_ENDPOINTS: usize = 65_536;
/// Clients whose endpoint is remembered; at the limit those whose time is over are forgotten, and then all: they come to
/// the same endpoint again unless others have come.
const MAX_STAYS: usize = 65_536;

/// The loads of all endpoints that this node's workloads connect to.
#[derive(Debug)]
pub struct Balancer {
    epoch: Instant,
    loads: Mutex<HashMap<SocketAddr, Load>>,
    stays: Mutex<HashMap<Client, Stay>>,
}

/// A client of a service that lets each stay with its endpoint: where it connects from, and to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Client {
    /// The workload.
    pub local: u64,
    /// Its address.
    pub address: IpAddr,
    /// The service.
    pub service: Name,
    /// Its port.
    pub port: u16,
}

/// The endpoint of a client, and until when.
#[derive(Debug, Clone, Copy)]
struct Stay {
    endpoint: SocketAddr,
    until: Duration,
}

impl Balancer {
    /// Nothing is known of any endpoint.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { epoch: Instant::now(), loads: Mutex::default(), stays: Mutex::default() })
    }

    /// Picks one of these endpoints for one attempt; `None` if there is none.
    pub fn pick(self: &Arc<Self>, endpoints: &[&Endpoint], how: &How<'_>) -> Option<(usize, Attempt)> {
        let now = self.epoch.elapsed();
        let slowly = how.balancing.is_some_and(|it| it.slow_start.is_some());
        let known = if slowly { self.seen(endpoints, now) } else { self.known(endpoints) };
        let index = balance::pick(&known, how, now, rand::random())?;
        Some((index, self.attempt(known[index].address, how.ejection)))
    }

    /// Whether one of these endpoints has not said that it wants nothing for a while.
    pub fn has_one_awake(&self, endpoints: &[Endpoint]) -> bool {
        let (now, loads) = (self.epoch.elapsed(), self.loads());
        endpoints.iter().any(|it| loads.get(&address_of(it)).is_none_or(|load| !load.is_resting(now)))
    }

    /// The same for a client that stays with its endpoint: the one that it has, or else the one that is settled.
    /// Endpoints that refused or failed lately are passed over, if there are others.
    pub fn pick_for(
        self: &Arc<Self>,
        client: &Client,
        endpoints: &[&Endpoint],
        ejection: Option<&Ejection>,
    ) -> Option<(usize, Attempt)> {
        let now = self.epoch.elapsed();
        let known = self.known(endpoints);
        let serving = balance::serving(&known, ejection, now);
        let addresses: Vec<_> = serving.iter().map(|index| known[*index].address).collect();
        let stay = self.stays.lock().unwrap_or_else(PoisonError::into_inner).get(client).copied();
        let kept = stay.filter(|stay| now < stay.until);
        let kept = kept.and_then(|stay| addresses.iter().position(|at| *at == stay.endpoint));
        let chosen = kept.or_else(|| balance::settled(client.address, &addresses))?;
        Some((serving[chosen], self.attempt(addresses[chosen], ejection)))
    }

    /// A client has connected: it stays where it is for so long.
    pub fn stays(&self, client: Client, attempt: &Attempt, long: Duration) {
        let now = self.epoch.elapsed();
        let mut stays = self.stays.lock().unwrap_or_else(PoisonError::into_inner);
        if stays.len() >= MAX_STAYS && !stays.contains_key(&client) {
            stays.retain(|_, stay| now < stay.until);
            if stays.len() >= MAX_STAYS {
                stays.clear();
            }
        }
        stays.insert(client, Stay { endpoint: attempt.address, until: now + long });
    }

    fn attempt(self: &Arc<Self>, address: SocketAddr, ejection: Option<&Ejection>) -> Attempt {
        let mut loads = self.loads();
        make_room(&mut loads, 1);
        loads.entry(address).or_default().active += 1;
        drop(loads);
        Attempt { balancer: self.clone(), address, began: Instant::now(), ejection: ejection.copied() }
    }

    fn with<T>(&self, address: SocketAddr, change: impl FnOnce(&mut Load, Duration) -> T) -> Option<T> {
        let now = self.epoch.elapsed();
        self.loads().get_mut(&address).map(|load| change(load, now))
    }

    fn known(&self, endpoints: &[&Endpoint]) -> Vec<Candidate> {
        let loads = self.loads();
        let known = |address| Candidate { address, load: loads.get(&address).copied().unwrap_or_default() };
        endpoints.iter().map(|it| known(address_of(it))).collect()
    }

    /// The same, and of those that were not known yet it is noted that they have come.
    fn seen(&self, endpoints: &[&Endpoint], now: Duration) -> Vec<Candidate> {
        let mut loads = self.loads();
        make_room(&mut loads, endpoints.len());
        let mut seen = |address| {
            let load = loads.entry(address).or_default();
            load.seen(now);
            Candidate { address, load: *load }
        };
        endpoints.iter().map(|it| seen(address_of(it))).collect()
    }

    fn loads(&self) -> MutexGuard<'_, HashMap<SocketAddr, Load>> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The value by which what comes from one address has the same endpoint.
pub(crate) fn value_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
    .octets()
}

/// Forgets endpoints that nothing is under way to, if so many more are too many.
fn make_room(loads: &mut HashMap<SocketAddr, Load>, more: usize) {
    if loads.len() + more > MAX_ENDPOINTS {
        loads.retain(|_, load| load.active > 0);
    }
}

fn address_of(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.address, endpoint.port)
}

/// A connection of an endpoint, or a request to it, from its first attempt to its end.
#[derive(Debug)]
pub struct Attempt {
    balancer: Arc<Balancer>,
    address: SocketAddr,
    began: Instant,
    ejection: Option<Ejection>,
}

impl Attempt {
    /// It took the connection.
    pub fn connected(&self) {
        let took = self.began.elapsed();
        self.balancer.with(self.address, |load, now| load.connected(took, now));
    }

    /// It is given up, though it might have answered: it would have taken longer than this.
    pub fn outlasted(&self) {
        let waited = self.began.elapsed();
        self.balancer.with(self.address, |load, now| load.outlasted(waited, now));
    }

    /// It did not: it is passed over for a while.
    pub fn failed(&self) {
        self.balancer.with(self.address, Load::failed);
    }

    /// It says that it wants nothing for so long. Why it is ejected for that, if it is.
    pub fn rests(&self, long: Duration) -> Option<Cause> {
        let long = long.min(self.ejection.as_ref()?.retry_after?);
        let is_new = self.balancer.with(self.address, |load, now| load.rests(long, now))?;
        (is_new && !long.is_zero()).then_some(Cause::RetryAfter)
    }

    /// What it took has ended well or not. Why it is ejected for that, if it is.
    pub fn answered(&self, failed: bool) -> Option<Cause> {
        let ejection = self.ejection.as_ref()?;
        self.balancer.with(self.address, |load, now| load.answered(failed, ejection, now))?
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.balancer.with(self.address, |load, _| load.active = load.active.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_that_failed_is_passed_over() {
        let endpoint = |port| Endpoint {
            workload: Some(Name::new("shop", "web")),
            address: "10.0.0.1".parse().unwrap(),
            port,
        };
        let (a, b) = (endpoint(1), endpoint(2));
        let balancer = Balancer::new();
        let (index, attempt) = balancer.pick(&[&a, &b], &How::default()).unwrap();
        attempt.failed();
        drop(attempt);
        for _ in 0..20 {
            assert_ne!(balancer.pick(&[&a, &b], &How::default()).unwrap().0, index);
        }
        assert!(balancer.pick(&[], &How::default()).is_none());
    }

    #[test]
    fn a_client_stays_while_its_endpoint_is_there_and_takes_connections() {
        let endpoint = |n: u8| Endpoint { workload: None, address: [10, 0, 0, n].into(), port: 80 };
        let all: Vec<Endpoint> = (1..=8).map(endpoint).collect();
        let balancer = Balancer::new();
        let address = [10, 1, 0, 1].into();
        let client = Client { local: 1, address, service: Name::new("shop", "web"), port: 80 };
        let pick = |endpoints: &[&Endpoint]| {
            let (index, attempt) = balancer.pick_for(&client, endpoints, None).unwrap();
            (endpoints[index].clone(), attempt)
        };
        // Where it comes to first depends on nothing that another agent would not know.
        let every: Vec<_> = all.iter().collect();
        let (first, _) = pick(&every);
        assert_eq!(
            Balancer::new().pick_for(&client, &every, None).unwrap().0,
            balancer.pick_for(&client, &every, None).unwrap().0
        );

        // It is remembered where it is, though others come that would have been its own.
        let others: Vec<_> = all.iter().filter(|it| **it != first).collect();
        let (second, attempt) = pick(&others);
        balancer.stays(client.clone(), &attempt, Duration::from_secs(60));
        assert_eq!(pick(&every).0, second);
        // One that refuses is left, and if it was remembered still it is asked again when all refuse.
        attempt.failed();
        assert_ne!(pick(&every).0, second);
        assert_eq!(pick(&[&second]).0, second);
        // When its time is over, it is as if it was new.
        attempt.connected();
        balancer.stays(client.clone(), &attempt, Duration::ZERO);
        assert_eq!(pick(&every).0, first);
        assert!(balancer.pick_for(&client, &[], None).is_none());
    }
}
