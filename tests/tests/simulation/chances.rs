//! Numbers out of a seed: always the same ones.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// SplitMix64 (Steele, Lea, Flood 2014). Clones draw from the same sequence.
#[derive(Debug, Clone)]
pub(crate) struct Chances(Arc<AtomicU64>);

impl Chances {
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbouring seeds would otherwise begin alike.
        Self(Arc::new(AtomicU64::new(seed.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ 0x5851_F42D_4C95_7F2D)))
    }

    /// Another sequence, that follows from this one.
    pub(crate) fn fork(&self) -> Self {
        Self(Arc::new(AtomicU64::new(self.next())))
    }

    fn next(&self) -> u64 {
        let step = 0x9E37_79B9_7F4A_7C15;
        let mut z = self.0.fetch_add(step, Ordering::Relaxed).wrapping_add(step);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In 0..1.
    pub(crate) fn fraction(&self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// From `low`, below `high`.
    pub(crate) fn between(&self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }

    /// Once in so many times.
    pub(crate) fn once_in(&self, times: u64) -> bool {
        self.between(0, times) == 0
    }

    pub(crate) fn one_of<'a, T>(&self, all: &'a [T]) -> &'a T {
        &all[self.between(0, all.len() as u64) as usize]
    }
}
