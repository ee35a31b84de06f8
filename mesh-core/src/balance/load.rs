//! What is known of one endpoint: how long it took to answer, what is under way there, and whether it is passed over.

use std::time::Duration;

use super::window::Window;
use crate::model::traffic::Ejection;

/// How fast the average forgets: after this long without a sample, about a third of the old value is left.
const DECAY: Duration = Duration::from_secs(10);
/// What an endpoint without any sample is assumed to take, so that new ones are tried soon but not all at once.
const UNMEASURED: Duration = Duration::from_millis(1);
/// For how long one that takes no connections is passed over the first time; doubled at each further failure in a row.
pub const REFUSING_BASE: Duration = Duration::from_secs(1);
/// And at most.
pub const REFUSING_MAX: Duration = Duration::from_secs(30);

/// Why an endpoint is ejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Too many failures in a row.
    Consecutive,
    /// Too many among all that it took of late.
    Percent,
    /// It has said that it wants nothing for a while.
    RetryAfter,
}

impl Cause {
    /// In one word.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Consecutive => "consecutive",
            Self::Percent => "percent",
            Self::RetryAfter => "retry_after",
        }
    }
}

/// What is known of one endpoint. Times are since an epoch that the caller chooses.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Connections or requests under way.
    pub active: u32,
    took: Option<(f64, Duration)>,
    refused: u32,
    refusing_until: Option<Duration>,
    /// Failures in a row since the last time that it was ejected for them.
    failures: u32,
    /// How often in a row it was.
    ejected: u32,
    failing_until: Option<Duration>,
    /// Until when it wants nothing, by its own word.
    resting_until: Option<Duration>,
    since: Option<Duration>,
    /// What it took of late, since it was last ejected, where a share of it counts.
    window: Window,
}

impl Load {
    /// It has come, seen at `now`.
    pub fn seen(&mut self, now: Duration) {
        self.since.get_or_insert(now);
    }

    /// For how long it has been there, where that is known.
    pub fn age(&self, now: Duration) -> Option<Duration> {
        self.since.map(|since| now.saturating_sub(since))
    }

    /// It took a connection, or answered a request, within `took`, seen at `now`.
    pub fn connected(&mut self, took: Duration, now: Duration) {
        let sample = took.as_secs_f64();
        let average = match self.took {
            // A peak counts at once; only recovery is slow.
            Some((old, _)) if sample > old => sample,
            Some((old, at)) => {
                let weight = (-(now.saturating_sub(at).as_secs_f64().max(0.001)) / DECAY.as_secs_f64()).exp();
                old * weight + sample * (1.0 - weight)
            }
            None => sample,
        };
        self.took = Some((average, now));
        self.refused = 0;
        self.refusing_until = None;
    }

    /// It has not answered within this time, seen at `now`, and nobody waits for it any more: it would have taken longer.
    pub fn outlasted(&mut self, waited: Duration, now: Duration) {
        let sample = waited.as_secs_f64();
        if self.took.is_none_or(|(average, _)| sample > average) {
            self.took = Some((sample, now));
        }
    }

    /// It did not take a connection at `now`: it is passed over, longer each time.
    pub fn failed(&mut self, now: Duration) {
        let factor = 1u32 << self.refused.min(5);
        self.refused = self.refused.saturating_add(1);
        self.refusing_until = Some(now + (REFUSING_BASE * factor).min(REFUSING_MAX));
    }

    /// What it took has ended well or not, seen at `now`, where a policy ejects those that fail. Why it is ejected
    /// now, if it is.
    pub fn answered(&mut self, failed: bool, ejection: &Ejection, now: Duration) -> Option<Cause> {
        let too_many = match &ejection.share {
            // What it took before it was ejected says nothing of it afterwards.
            Some(_) if self.failing_until.is_some_and(|until| now < until) => return None,
            Some(share) => self.window.ended(failed, share, now),
            None => false,
        };
        if !failed {
            self.failures = 0;
            if ejection.share.is_none() {
                (self.ejected, self.failing_until) = (0, None);
            }
            return None;
        }
        self.failures = self.failures.saturating_add(1);
        let cause = if self.failures >= ejection.failures {
            Cause::Consecutive
        } else if too_many {
            Cause::Percent
        } else {
            return None;
        };
        // Among successes one of them says nothing: only a whole window without being ejected does.
        let well_since = ejection.share.zip(self.failing_until);
        if well_since.is_some_and(|(share, until)| until.saturating_add(share.window) <= now) {
            self.ejected = 0;
        }
        self.window = Window::default();
        let factor = 1u32 << self.ejected.min(16);
        self.failures = 0;
        self.ejected = self.ejected.saturating_add(1);
        self.failing_until = Some(now + ejection.base.saturating_mul(factor).min(ejection.most));
        Some(cause)
    }

    /// It wants nothing for so long, said at `now`; of several such words the longest counts, whatever it answers meanwhile.
    /// Whether it has not said so before.
    pub fn rests(&mut self, long: Duration, now: Duration) -> bool {
        let is_new = !self.is_resting(now);
        self.resting_until = self.resting_until.max(Some(now.saturating_add(long)));
        is_new
    }

    /// Whether it wants nothing at `now`, by its own word.
    pub fn is_resting(&self, now: Duration) -> bool {
        self.resting_until.is_some_and(|until| now < until)
    }

    /// Whether it takes no connections, as far as is known at `now`.
    pub fn is_refusing(&self, now: Duration) -> bool {
        self.refusing_until.is_some_and(|until| now < until)
    }

    /// Whether it is ejected at `now` for its answers, or by its own word.
    pub fn is_failing(&self, now: Duration) -> bool {
        self.failing_until().is_some_and(|until| now < until)
    }

    pub(super) fn failing_until(&self) -> Option<Duration> {
        self.failing_until.max(self.resting_until)
    }

    pub(super) fn cost(&self) -> f64 {
        let time = self.took.map_or(UNMEASURED.as_secs_f64(), |(average, _)| average);
        time * f64::from(self.active + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::traffic::FailureShare;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_time_that_one_is_passed_over_grows_and_is_bounded() {
        let mut load = Load::default();
        for _ in 0..100 {
            load.failed(Duration::ZERO);
        }
        assert!(load.is_refusing(REFUSING_MAX - MS) && !load.is_refusing(REFUSING_MAX));
    }

    #[test]
    fn who_was_not_waited_for_counts_as_slow_as_that_at_least() {
        let mut load = Load::default();
        load.outlasted(MS * 50, MS);
        assert_eq!(load.cost(), 0.05);
        load.outlasted(MS * 5, MS);
        assert_eq!(load.cost(), 0.05, "it may have been as slow as before");
        load.failed(MS);
        load.outlasted(MS * 90, MS);
        assert!(load.is_refusing(MS), "it has taken nothing yet");
        assert_eq!(load.cost(), 0.09);
    }

    #[test]
    fn who_fails_often_enough_in_a_row_is_ejected_for_longer_each_time_until_a_success() {
        let ejection = Ejection {
            failures: 3,
            base: MS * 10,
            most: MS * 35,
            most_percent: 100,
            panic_percent: 0,
            share: None,
            retry_after: None,
        };
        let mut load = Load::default();
        let fail = |load: &mut Load, now| (0..3).map(|_| load.answered(true, &ejection, now)).last();
        load.answered(true, &ejection, MS);
        load.answered(true, &ejection, MS);
        load.answered(false, &ejection, MS);
        load.answered(true, &ejection, MS);
        assert!(!load.is_failing(MS), "never three in a row");
        load.answered(false, &ejection, MS);
        for (now, long) in [(0, 10), (100, 20), (200, 35), (300, 35)] {
            assert_eq!(fail(&mut load, MS * now), Some(Some(Cause::Consecutive)));
            assert!(load.is_failing(MS * (now + long - 1)) && !load.is_failing(MS * (now + long)));
        }
        load.answered(false, &ejection, MS * 400);
        fail(&mut load, MS * 500);
        assert!(!load.is_failing(MS * 510), "it is as at first");
    }

    #[test]
    fn who_wants_nothing_for_a_while_rests_for_the_longest_time_that_it_said_whatever_it_answers() {
        let ejection = Ejection {
            failures: 2,
            base: MS,
            most: MS,
            most_percent: 100,
            panic_percent: 0,
            share: None,
            retry_after: Some(MS * 100),
        };
        let mut load = Load::default();
        assert!(load.rests(MS * 50, MS));
        assert!(!load.rests(MS * 20, MS * 2), "it is known already");
        assert_eq!(load.answered(false, &ejection, MS * 3), None);
        assert!(load.is_failing(MS * 50) && load.is_resting(MS * 50));
        assert!(!load.is_failing(MS * 51) && !load.is_resting(MS * 51));
        assert!(load.rests(MS * 5, MS * 60), "it is said anew");
        assert_eq!([true; 2].map(|it| load.answered(it, &ejection, MS * 70))[1], Some(Cause::Consecutive));
        assert!(load.is_failing(MS * 70) && !load.is_resting(MS * 70));
    }

    #[test]
    fn who_fails_too_often_among_successes_is_ejected_for_longer_until_a_window_without_that() {
        let share = Some(FailureShare { percent: 50, minimum: 4, window: MS * 600 });
        let ejection = Ejection {
            failures: 9,
            base: MS * 10,
            most: MS * 35,
            most_percent: 100,
            panic_percent: 0,
            share,
            retry_after: None,
        };
        let mut load = Load::default();
        let mut every_other = |now| {
            let ended = [false, true, false, true].map(|failed| load.answered(failed, &ejection, MS * now));
            assert_eq!(ended, [None, None, None, Some(Cause::Percent)], "at {now}");
            assert_eq!(load.answered(false, &ejection, MS * now), None, "it was sent before");
            load
        };
        for (now, long) in [(0, 10), (100, 20), (200, 35), (300, 35), (934, 35), (1569, 10)] {
            let load = every_other(now);
            assert!(load.is_failing(MS * (now + long - 1)) && !load.is_failing(MS * (now + long)), "{now}");
        }
        let in_a_row = (0..9).map(|at| load.answered(true, &ejection, MS * (2000 + at * 200))).last();
        assert_eq!(in_a_row, Some(Some(Cause::Consecutive)), "failures in a row count beside it");
    }
}
