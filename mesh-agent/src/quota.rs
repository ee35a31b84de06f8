//! Who holds how much of what is shared, so that nobody's part grows into everybody else's.
//!
//! Stands apart from [`crate::limits`], which are numbers. Invariant: a share counts for exactly as long as it lives.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What holders have taken of one thing.
#[derive(Debug)]
pub struct Quota<K: Eq + Hash + Copy> {
    held: Mutex<Held<K>>,
}

#[derive(Debug)]
struct Held<K> {
    by: HashMap<K, usize>,
    all: usize,
}

impl<K: Eq + Hash + Copy> Quota<K> {
    /// Nobody has anything.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { held: Mutex::new(Held { by: HashMap::new(), all: 0 }) })
    }

    /// One more for this holder, if it has less than `most`.
    pub fn take(self: &Arc<Self>, holder: K, most: usize) -> Option<Share<K>> {
        self.take_if(holder, |held, _| held < most)
    }

    /// One more for this holder of `all` that there are, if it has less than what is left: one greedy holder gets half,
    /// two get a third each, and there is always as much left for the next as any of them has.
    pub fn take_fair(self: &Arc<Self>, holder: K, all: usize) -> Option<Share<K>> {
        self.take_if(holder, |held, taken| held < all.saturating_sub(taken))
    }

    /// What all holders have together.
    pub fn all(&self) -> usize {
        self.held().all
    }

    fn take_if(self: &Arc<Self>, holder: K, may: impl FnOnce(usize, usize) -> bool) -> Option<Share<K>> {
        let mut held = self.held();
        if !may(held.by.get(&holder).copied().unwrap_or(0), held.all) {
            return None;
        }
        *held.by.entry(holder).or_default() += 1;
        held.all += 1;
        Some(Share { quota: self.clone(), holder })
    }

    fn held(&self) -> MutexGuard<'_, Held<K>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A share of one holder; gives itself back.
#[derive(Debug)]
pub struct Share<K: Eq + Hash + Copy> {
    quota: Arc<Quota<K>>,
    holder: K,
}

impl<K: Eq + Hash + Copy> Drop for Share<K> {
    fn drop(&mut self) {
        let mut held = self.quota.held();
        held.all -= 1;
        if let Some(count) = held.by.get_mut(&self.holder) {
            *count -= 1;
            if *count == 0 {
                held.by.remove(&self.holder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_has_no_more_than_it_may_and_is_forgotten_when_it_has_nothing() {
        let quota = Quota::new();
        let shares: Vec<_> = std::iter::from_fn(|| quota.take('a', 3)).collect();
        assert_eq!(shares.len(), 3);
        assert!(quota.take('b', 3).is_some());
        drop(shares);
        assert!(quota.take('a', 1).is_some());
        assert!(quota.held().by.is_empty() && quota.held().all == 0);
    }

    #[test]
    fn greedy_holders_leave_as_much_as_each_of_them_has() {
        let quota = Quota::new();
        let alone: Vec<_> = std::iter::from_fn(|| quota.take_fair('a', 120)).collect();
        assert_eq!(alone.len(), 60);
        drop(alone);
        let mut shares = vec![];
        for holder in ['a', 'b'].iter().cycle().take(1000) {
            shares.extend(quota.take_fair(*holder, 120));
        }
        assert_eq!(shares.len(), 80);
        assert!(quota.take_fair('c', 120).is_some());
        assert!(quota.take_fair('a', 120).is_none());
    }
}
