//! Whether an endpoint is healthy, by what its checks have answered; and which endpoints are left when some are not.
//!
//! Pure. One check alone changes nothing: what is said of an endpoint changes after as many answers in a row as its policy
//! wants, so that what is well half of the time does not come and go with every check.

use crate::model::health::Pace;

/// What is said of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Health {
    /// Not enough is known yet: what was said of it before goes on to count, and else it counts as healthy.
    #[default]
    Undecided,
    /// It is well.
    Healthy,
    /// It is not, and takes nothing while others are well.
    Unhealthy,
}

/// The answers of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    health: Health,
    /// How many answers in a row were like the last one, and which that was.
    streak: u32,
    passed: bool,
}

impl Tally {
    /// What is said now.
    pub fn health(&self) -> Health {
        self.health
    }

    /// One more answer. What is said from now on, if that is something else than before.
    pub fn heard(&mut self, passed: bool, pace: &Pace) -> Option<Health> {
        self.streak = if passed == self.passed { self.streak.saturating_add(1) } else { 1 };
        self.passed = passed;
        let (next, needed) = match passed {
            true => (Health::Healthy, pace.healthy_after),
            false => (Health::Unhealthy, pace.unhealthy_after),
        };
        if self.streak < needed || self.health == next {
            return None;
        }
        self.health = next;
        Some(next)
    }
}

/// Takes those out that are unhealthy; unless fewer would be left than this share, percent, or none: a check that is wrong,
/// or that everybody fails, must not take a service away. Whether any were taken out.
pub fn leave_out<T>(all: &mut Vec<T>, is_unhealthy: impl Fn(&T) -> bool, panic_percent: u32) -> bool {
    let healthy = all.iter().filter(|it| !is_unhealthy(it)).count();
    if healthy == 0 || healthy == all.len() || healthy * 100 < all.len() * panic_percent as usize {
        return false;
    }
    all.retain(|it| !is_unhealthy(it));
    true
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn pace(unhealthy_after: u32, healthy_after: u32) -> Pace {
        let second = Duration::from_secs(1);
        Pace { interval: second, timeout: second, unhealthy_after, healthy_after }
    }

    #[test]
    fn nothing_is_said_before_enough_answers_in_a_row() {
        let (mut tally, pace) = (Tally::default(), pace(3, 2));
        let said = [false, false, true, false, false, false, true, false, true, true, true]
            .map(|passed| tally.heard(passed, &pace));
        let mut expected = [None; 11];
        (expected[5], expected[9]) = (Some(Health::Unhealthy), Some(Health::Healthy));
        assert_eq!(said, expected);
    }

    #[test]
    fn all_are_asked_when_too_few_are_well() {
        let left = |unhealthy: &[u32], panic_percent| {
            let mut all = vec![1, 2, 3, 4];
            leave_out(&mut all, |it| unhealthy.contains(it), panic_percent);
            all
        };
        assert_eq!(left(&[], 0), [1, 2, 3, 4]);
        assert_eq!(left(&[2, 3, 4], 0), [1]);
        assert_eq!(left(&[1, 2, 3, 4], 0), [1, 2, 3, 4], "none is well");
        assert_eq!(left(&[2, 3], 50), [1, 4]);
        assert_eq!(left(&[2, 3, 4], 50), [1, 2, 3, 4]);
        assert_eq!(left(&[4], 100), [1, 2, 3, 4]);
    }

    proptest! {
        #[test]
        fn what_is_said_is_what_the_last_answers_in_a_row_say(
            answers in prop::collection::vec(any::<bool>(), 0..40), unhealthy_after in 1u32..5, healthy_after in 1u32..5,
        ) {
            let pace = pace(unhealthy_after, healthy_after);
            let mut tally = Tally::default();
            for end in 1..=answers.len() {
                let before = tally.health();
                let changed = tally.heard(answers[end - 1], &pace);
                // The slow reading: the latest place at which enough in a row were the same.
                let said = (1..=end).rev().find_map(|end| {
                    let passed = answers[end - 1];
                    let row = answers[..end].iter().rev().take_while(|it| **it == passed).count();
                    let (health, needed) =
                        if passed { (Health::Healthy, healthy_after) } else { (Health::Unhealthy, unhealthy_after) };
                    (row >= needed as usize).then_some(health)
                });
                prop_assert_eq!(tally.health(), said.unwrap_or_default());
                prop_assert_eq!(changed, (tally.health() != before).then_some(tally.health()));
            }
        }

        #[test]
        fn some_are_always_left(unhealthy in prop::collection::vec(any::<bool>(), 1..20), panic_percent in 0u32..=100) {
            let mut left: Vec<usize> = (0..unhealthy.len()).collect();
            let out = leave_out(&mut left, |at| unhealthy[*at], panic_percent);
            prop_assert!(!left.is_empty());
            prop_assert_eq!(out, left.len() < unhealthy.len());
            prop_assert!(!out || left.iter().all(|at| !unhealthy[*at]));
            prop_assert!(!out || left.len() * 100 >= unhealthy.len() * panic_percent as usize);
        }
    }
}
