//! How much a workload takes of requests, as data: how many in which time, and of which size. What TrafficPolicies say of
//! Services, after the controller has looked up which workloads serve these, and at which ports.
//!
//! It stands apart from [`super::traffic`], which is for those who send: this is for the destination's agent alone. What it
//! means for one request is [`crate::intake`]'s.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Asks, Name};

/// How much one workload takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intake {
    /// Whose it is.
    pub workload: Name,
    /// The workload's labels: by them an agent that knows nothing of this refuses what comes to the ports.
    pub labels: BTreeMap<String, String>,
    /// By its ports; none is there that has no limit.
    pub ports: BTreeMap<u16, PortIntake>,
}

/// How much comes in by one port.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PortIntake {
    /// How large a request may be.
    pub sizes: Sizes,
    /// How many may come; all of these count.
    pub rates: Vec<RateLimit>,
}

impl PortIntake {
    /// What counts where both do, as of two Services that the same port serves.
    pub fn and(mut self, other: Self) -> Self {
        self.sizes = self.sizes.and(other.sizes);
        for rate in other.rates {
            if !self.rates.contains(&rate) {
                self.rates.push(rate);
            }
        }
        self
    }

    /// Whether it limits nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How large a request may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sizes {
    /// Its head, bytes, as HTTP/1.1 writes it. Never 0.
    pub head: Option<u32>,
    /// Its body, bytes, without what frames it.
    pub body: Option<u64>,
}

impl Sizes {
    /// The smaller ones.
    pub fn and(self, other: Self) -> Self {
        let smaller = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        Self { head: self.head.into_iter().chain(other.head).min(), body: smaller(self.body, other.body) }
    }
}

/// How many requests may come: a bucket of tokens for each of those who are told apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// The policy that says it.
    pub policy: Name,
    /// Its place in `spec.rateLimits`, from 0.
    pub index: u32,
    /// Who has a bucket of his own.
    pub by: RateBy,
    /// So many tokens come, evenly, in each `per`. Never 0.
    pub requests: u32,
    /// A time of at least a millisecond.
    pub per: Duration,
    /// So many tokens a bucket has at most, and at first. Never 0.
    pub burst: u32,
    /// The requests that it counts: those that could be read so. What says nothing: all.
    pub only: Asks,
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} requests in {:?}", self.requests, self.per)?;
        if self.burst != self.requests {
            write!(f, ", {} at once", self.burst)?;
        }
        match &self.by {
            RateBy::All => f.write_str(" from all together")?,
            RateBy::Identity => f.write_str(" from each identity")?,
            RateBy::Header(name) => write!(f, " for each value of header {name}")?,
        }
        let only = self.only.describe();
        if only.is_empty() { Ok(()) } else { write!(f, ", with {}", only.join(", ")) }
    }
}

/// Who has a bucket of his own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RateBy {
    /// Nobody: there is one.
    All,
    /// Each identity that was proved. All plaintext shares one.
    Identity,
    /// Requests with the same values of this header, in lower case. Those without it share one.
    Header(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(index: u32) -> RateLimit {
        RateLimit {
            policy: Name::new("shop", "p"),
            index,
            by: RateBy::Identity,
            requests: 5,
            per: Duration::from_secs(1),
            burst: 9,
            only: Asks { methods: vec!["POST".into()], ..Asks::default() },
        }
    }

    #[test]
    fn of_two_services_at_one_port_all_limits_count_and_each_once() {
        let of = |head, body, rates: &[u32]| PortIntake {
            sizes: Sizes { head, body },
            rates: rates.iter().map(|index| rate(*index)).collect(),
        };
        let both = of(Some(9), None, &[0, 1]).and(of(Some(5), Some(7), &[1, 2]));
        assert_eq!(both, of(Some(5), Some(7), &[0, 1, 2]));
        assert_eq!(PortIntake::default().and(both.clone()), both);
        assert!(PortIntake::default().is_empty() && !both.is_empty());
    }

    #[test]
    fn a_limit_tells_what_it_counts() {
        assert_eq!(rate(0).to_string(), "5 requests in 1s, 9 at once from each identity, with method POST");
        let plain = RateLimit { by: RateBy::All, burst: 5, only: Asks::default(), ..rate(0) };
        assert_eq!(plain.to_string(), "5 requests in 1s from all together");
    }
}
