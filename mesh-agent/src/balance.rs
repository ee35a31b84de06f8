//! Which endpoint of a service takes a connection: the agent's memory for the decision in [`mesh_core::balance`].

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use mesh_core::{
    balance::{self, Load},
    model::Endpoint,
};

/// Endpoints whose load is remembered; at the limit the ones without a connection are forgotten, and start over as
/// unmeasured.
const MAX_ENDPOINTS: usize = 65_536;

/// The loads of all endpoints that this node's workloads connect to.
#[derive(Debug)]
pub struct Balancer {
    epoch: Instant,
    loads: Mutex<HashMap<SocketAddr, Load>>,
}

impl Balancer {
    /// Nothing is known of any endpoint.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { epoch: Instant::now(), loads: Mutex::default() })
    }

    /// Picks one of these endpoints for one attempt; `None` if there is none.
    pub fn pick(self: &Arc<Self>, endpoints: &[&Endpoint]) -> Option<(usize, Attempt)> {
        let address = |endpoint: &Endpoint| SocketAddr::new(endpoint.address, endpoint.port);
        let mut loads = self.loads.lock().unwrap_or_else(PoisonError::into_inner);
        if loads.len() >= MAX_ENDPOINTS {
            loads.retain(|_, load| load.active > 0);
        }
        let known: Vec<Load> =
            endpoints.iter().map(|e| loads.get(&address(e)).copied().unwrap_or_default()).collect();
        let index = balance::pick(&known, self.epoch.elapsed(), rand::random())?;
        let address = address(endpoints[index]);
        loads.entry(address).or_default().active += 1;
        drop(loads);
        Some((index, Attempt { balancer: self.clone(), address, began: Instant::now() }))
    }

    fn with(&self, address: SocketAddr, change: impl FnOnce(&mut Load, Duration)) {
        let now = self.epoch.elapsed();
        let mut loads = self.loads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(load) = loads.get_mut(&address) {
            change(load, now);
        }
    }
}

/// A connection of an endpoint, from its first attempt to its end.
#[derive(Debug)]
pub struct Attempt {
    balancer: Arc<Balancer>,
    address: SocketAddr,
    began: Instant,
}

impl Attempt {
    /// It took the connection.
    pub fn connected(&self) {
        let took = self.began.elapsed();
        self.balancer.with(self.address, |load, now| load.connected(took, now));
    }

    /// It did not: it is passed over for a while.
    pub fn failed(&self) {
        self.balancer.with(self.address, Load::failed);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.balancer.with(self.address, |load, _| load.active = load.active.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::model::Name;

    use super::*;

    #[test]
    fn an_endpoint_that_failed_is_passed_over() {
        let endpoint = |port| Endpoint {
            workload: Name::new("shop", "web"),
            address: "10.0.0.1".parse().unwrap(),
            port,
        };
        let (a, b) = (endpoint(1), endpoint(2));
        let balancer = Balancer::new();
        let (index, attempt) = balancer.pick(&[&a, &b]).unwrap();
        attempt.failed();
        drop(attempt);
        for _ in 0..20 {
            assert_ne!(balancer.pick(&[&a, &b]).unwrap().0, index);
        }
        assert!(balancer.pick(&[]).is_none());
    }
}
