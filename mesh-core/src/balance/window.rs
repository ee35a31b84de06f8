//! How many of the requests that an endpoint took of late have failed: a sliding window, counted in slices of time, so that
//! it takes the same little memory however many there are.

use std::time::Duration;

use crate::model::traffic::FailureShare;

/// Slices of a window. The youngest one is not over yet: what counts is no older than the window, and all of its last five
/// sixths.
const SLICES: u64 = 6;

/// What is counted of one endpoint. With a window of another length it starts over.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Window {
    length: Duration,
    youngest: u64,
    /// The slice of each number at the remainder that the number has.
    slices: [Slice; SLICES as usize],
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Slice {
    all: u32,
    failed: u32,
}

impl Window {
    /// A request has ended at `now`. Whether too many have failed, this one among them.
    pub fn ended(&mut self, failed: bool, share: &FailureShare, now: Duration) -> bool {
        if self.length != share.window {
            *self = Self { length: share.window, ..Self::default() };
        }
        // A clock that goes back counts as one that stands.
        let number = slice_at(share.window, now).max(self.youngest);
        for passed in (self.youngest + 1..=number).rev().take(SLICES as usize) {
            self.slices[(passed % SLICES) as usize] = Slice::default();
        }
        self.youngest = number;
        let slice = &mut self.slices[(number % SLICES) as usize];
        slice.all = slice.all.saturating_add(1);
        slice.failed = slice.failed.saturating_add(failed.into());
        let sum = |of: fn(&Slice) -> u32| self.slices.iter().map(|it| u64::from(of(it))).sum::<u64>();
        let (all, failed) = (sum(|it| it.all), sum(|it| it.failed));
        all >= share.minimum.into() && failed * 100 >= all * u64::from(share.percent)
    }
}

/// The number of the slice that a time is in.
fn slice_at(window: Duration, time: Duration) -> u64 {
    let length = (window.as_nanos() / u128::from(SLICES)).max(1);
    u64::try_from(time.as_nanos() / length).unwrap_or(u64::MAX - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SHARE: FailureShare = FailureShare { percent: 50, minimum: 4, window: Duration::from_millis(600) };

    #[test]
    fn a_share_is_of_enough_requests_and_of_those_of_late() {
        let mut window = Window::default();
        let mut ended = |failed, at| window.ended(failed, &SHARE, MS * at);
        assert!(!ended(true, 0) && !ended(true, 1) && !ended(true, 2), "of three it means little");
        assert!(ended(false, 3), "three of four");
        assert!(!ended(false, 600) && !ended(false, 601) && !ended(false, 602));
        assert!(!ended(true, 700) && !ended(false, 701), "what was at first is forgotten");
        assert!(!ended(true, 710) && !ended(true, 711), "three of seven");
        assert!(ended(true, 712), "four of eight");
    }

    #[test]
    fn the_end_of_time_is_no_end_of_it() {
        let mut window = Window::default();
        let share = FailureShare { percent: 1, minimum: 2, window: Duration::from_nanos(1) };
        assert!(!window.ended(true, &share, Duration::MAX));
        assert!(window.ended(true, &share, Duration::MAX));
    }

    proptest! {
        #[test]
        fn it_counts_what_a_list_of_all_that_has_ended_counts(
            events in prop::collection::vec((0u32..400, any::<bool>()), 1..200),
            percent in 1u32..=100, minimum in 1u32..20,
        ) {
            let share = FailureShare { percent, minimum, ..SHARE };
            let (mut window, mut now, mut list) = (Window::default(), Duration::ZERO, vec![]);
            for (passed, failed) in events {
                now += MS * passed;
                list.push((now, failed));
                let slice = |time: Duration| time.as_millis() / 100;
                let counts: Vec<_> = list.iter().filter(|it| slice(it.0) + 6 > slice(now)).collect();
                prop_assert!(counts.iter().all(|it| now - it.0 < share.window));
                let failures = counts.iter().filter(|it| it.1).count();
                let too_many = counts.len() >= minimum as usize
                    && failures * 100 >= counts.len() * percent as usize;
                prop_assert_eq!(window.ended(failed, &share, now), too_many);
            }
        }
    }
}
