//! Which backend gets a request, whether a copy of it goes somewhere else too, and when it is tried again. The caller
//! brings the chance.

use std::time::Duration;

use crate::model::http::{Backend, Mirror, Retry};

/// The longest pause between two attempts, without what chance adds.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// The backend for a request, by the weights; `None` if no backend has any. `chance`: any number, evenly spread.
pub fn backend(backends: &[Backend], chance: u64) -> Option<&Backend> {
    let sum: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut at = chance.checked_rem(sum)?;
    backends.iter().find(|backend| {
        let within = at < u64::from(backend.weight);
        at = at.saturating_sub(u64::from(backend.weight));
        within
    })
}

/// Whether a copy of a request goes to a mirror.
pub fn is_mirrored(mirror: &Mirror, chance: u64) -> bool {
    chance % u64::from(mirror.of.max(1)) < u64::from(mirror.copies)
}

/// The pause before the attempt with this number, from 1: what is said for certain, and up to a half more by chance, so
/// that those who failed together do not come back together.
pub fn pause(retry: &Retry, attempt: u32, chance: u32) -> Duration {
    let whole = retry.backoff.saturating_mul(1u32 << attempt.saturating_sub(1).min(16)).min(MAX_PAUSE);
    whole + (whole / 2).mul_f64(f64::from(chance) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::http::{BackendTarget, Filters};

    #[test]
    fn shares_are_as_the_weights() {
        let backend_of = |weight| Backend { to: BackendTarget::Nowhere, weight, filters: Filters::default() };
        let backends = [1, 0, 3].map(backend_of);
        let mut counts = [0; 3];
        for chance in 0..4000u64 {
            let chosen = backend(&backends, chance).unwrap();
            counts[backends.iter().position(|it| std::ptr::eq(it, chosen)).unwrap()] += 1;
        }
        assert_eq!(counts, [1000, 0, 3000]);
        assert!(backend(&[backend_of(0)], 7).is_none());
        assert!(backend(&[], 7).is_none());
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let retry = Retry { codes: vec![], attempts: 9, backoff: Duration::from_millis(100) };
        assert_eq!(pause(&retry, 1, 0), Duration::from_millis(100));
        assert_eq!(pause(&retry, 1, u32::MAX), Duration::from_millis(150));
        assert_eq!(pause(&retry, 3, u32::MAX), Duration::from_millis(600));
        assert_eq!(pause(&retry, 40, 0), MAX_PAUSE);
    }
}
