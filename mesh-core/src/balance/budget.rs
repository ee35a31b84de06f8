//! How many requests may be tried again: some in a second, and a share of all. So a service that fails altogether is asked
//! little more than before.

use std::time::Duration;

use crate::model::traffic::RetryBudget;

/// What may be saved up: what comes in so many seconds.
const SECONDS_SAVED: u32 = 10;

/// What is left to a service of its budget. Times are since an epoch that the caller chooses.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Budget {
    /// `None` before the first request.
    saved: Option<f64>,
    filled: Duration,
}

impl Budget {
    /// A request is asked for.
    pub fn asked(&mut self, of: &RetryBudget, now: Duration) {
        let saved = self.fill(of, now);
        *saved = (*saved + f64::from(of.percent) / 100.0).min(most(of));
    }

    /// Whether one may be tried again, which is taken out.
    pub fn take(&mut self, of: &RetryBudget, now: Duration) -> bool {
        let saved = self.fill(of, now);
        let may = *saved >= 1.0;
        if may {
            *saved -= 1.0;
        }
        may
    }

    fn fill(&mut self, of: &RetryBudget, now: Duration) -> &mut f64 {
        let since = now.saturating_sub(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        let saved = self.saved.get_or_insert(most(of));
        *saved = (*saved + since * f64::from(of.per_second)).min(most(of));
        saved
    }
}

fn most(of: &RetryBudget) -> f64 {
    f64::from(of.per_second.saturating_mul(SECONDS_SAVED).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Of a thousand requests a second for ten seconds, all of which fail, how many are tried again.
    fn again(of: &RetryBudget) -> (Budget, u32) {
        let mut budget = Budget::default();
        let again = (0..10_000u32).map(|ms| {
            budget.asked(of, MS * ms);
            u32::from(budget.take(of, MS * ms))
        });
        let again = again.sum();
        (budget, again)
    }

    #[test]
    fn a_service_that_fails_altogether_is_asked_little_more_than_before() {
        // A fifth of them, ten in a second, and what was saved.
        let (mut budget, count) = again(&RetryBudget::default());
        assert!((2190..=2310).contains(&count), "{count}");
        // One request in a minute may always be.
        assert!(budget.take(&RetryBudget::default(), MS * 70_000));
        let (_, few) = again(&RetryBudget { percent: 1, per_second: 0 });
        assert!((99..=102).contains(&few), "{few}");
        assert_eq!(again(&RetryBudget { percent: 0, per_second: 0 }).1, 1);
    }
}
