//! When a certificate is renewed. Pure: time and randomness come in as values.

use std::time::Duration as StdDuration;

use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};
use tokio::time::Instant;

use crate::rpc::backoff;

/// The part of the second half of its life over which renewals are spread: two fifths, so that three tenths of the
/// life remain for retries.
const SPREAD: f64 = 0.4;
/// Over how long the renewals after a rotation of the root are spread, at most.
const ROTATION_SPREAD: Duration = Duration::seconds(10);

/// The longest pause between two attempts at a certificate.
const RETRY_CAP: StdDuration = StdDuration::from_secs(30);
/// The longest sleep before the wall clock is looked at again: it may be set while we sleep.
const MAX_PAUSE: StdDuration = StdDuration::from_secs(60);

/// The life of a certificate as this node sees it. It begins when the certificate arrived, not at its `notBefore`,
/// which the issuer dates back for the sake of slow clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// When the certificate arrived.
    pub obtained: OffsetDateTime,
    /// Its `notAfter`.
    pub expires: OffsetDateTime,
}

/// When to ask for the next certificate: between half and seven tenths of the life.
///
/// `fraction` is a random number in 0..1; it spreads out the certificates of a node that all came at once.
pub fn renew_at(life: Life, fraction: f64) -> OffsetDateTime {
    let whole = (life.expires - life.obtained).max(Duration::ZERO);
    life.obtained + whole * (0.5 + 0.5 * SPREAD * fraction.clamp(0.0, 1.0))
}

/// When to ask for a certificate under the newest root, if the one in force was issued before a root came into the
/// mesh; `None` when it was not. The issuer's old root may be about to leave.
///
/// `bundle`: the roots that came with the certificate; `roots`: those of the mesh now.
pub fn rotate_at(
    bundle: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
    life: Life,
    now: OffsetDateTime,
    fraction: f64,
) -> Option<OffsetDateTime> {
    let all_known = roots.iter().all(|root| bundle.contains(root));
    let remaining = (life.expires - now).max(Duration::ZERO);
    let spread = ROTATION_SPREAD.min(remaining / 4);
    (!all_known).then(|| now + spread * fraction.clamp(0.0, 1.0))
}

/// When one identity's next certificate is asked for: due by the wall clock, as certificates are, and after a failure
/// not before a pause is over, by the clock that is never set.
#[derive(Debug, Clone)]
pub struct Renewal {
    due: OffsetDateTime,
    failures: u32,
    retry: Option<Instant>,
}

impl Renewal {
    /// Due at a time.
    pub fn at(due: OffsetDateTime) -> Self {
        Self { due, failures: 0, retry: None }
    }

    /// Due earlier, unless it is earlier already.
    pub fn hasten(&mut self, due: OffsetDateTime) {
        self.due = self.due.min(due);
    }

    /// Due when the other is, unless it is due earlier already.
    pub fn hasten_to(&mut self, other: &Self) {
        self.hasten(other.due);
    }

    /// An attempt failed: the next one comes after a pause that grows to 30 s.
    pub fn failed(&mut self, now: Instant, fraction: f64) {
        self.failures = self.failures.saturating_add(1);
        self.retry = Some(now + backoff(self.failures, fraction, RETRY_CAP));
    }

    /// Attempts can succeed again: forget the pause.
    pub fn revive(&mut self) {
        self.failures = 0;
        self.retry = None;
    }

    /// How long until it is due, zero when it is, at most a minute: then look again.
    pub fn pause(&self, wall: OffsetDateTime, now: Instant) -> StdDuration {
        let until_due = StdDuration::try_from(self.due - wall).unwrap_or(StdDuration::ZERO);
        let until_retry = self.retry.map_or(StdDuration::ZERO, |retry| retry.saturating_duration_since(now));
        until_due.max(until_retry).min(MAX_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: OffsetDateTime = OffsetDateTime::UNIX_EPOCH.saturating_add(Duration::days(20_000));

    fn life(hours: i64) -> Life {
        Life { obtained: START, expires: START + Duration::hours(hours) }
    }

    #[test]
    fn renewal_is_due_from_half_life_and_spread() {
        let check = |hours, fraction, expected| {
            assert_eq!(renew_at(life(hours), fraction) - START, expected, "{hours} h, {fraction}");
        };
        check(24, 0.0, Duration::hours(12));
        check(24, 0.5, Duration::minutes(14 * 60 + 24));
        check(24, 1.0, Duration::minutes(16 * 60 + 48));
        check(24, 7.0, Duration::minutes(16 * 60 + 48));
        check(0, 0.5, Duration::ZERO);
        // The clock was set back since the certificate came: ask at once.
        check(-3, 0.5, Duration::ZERO);
    }

    #[test]
    fn a_new_root_makes_renewal_due_soon_and_a_leaving_one_does_not() {
        let root = |byte: u8| CertificateDer::from(vec![byte]);
        let now = START + Duration::hours(1);
        let check = |bundle: &[CertificateDer], roots: &[CertificateDer], fraction, expected| {
            assert_eq!(rotate_at(bundle, roots, life(24), now, fraction).map(|at| at - now), expected);
        };
        check(&[root(1)], &[root(1)], 0.5, None);
        check(&[root(1)], &[root(1), root(2)], 0.0, Some(Duration::ZERO));
        check(&[root(1)], &[root(1), root(2)], 0.5, Some(Duration::seconds(5)));
        check(&[root(1), root(2)], &[root(2)], 0.5, None);
        check(&[root(1)], &[root(2)], 1.0, Some(Duration::seconds(10)));
    }

    #[test]
    fn a_short_life_is_not_spent_waiting() {
        let short = Life { obtained: START, expires: START + Duration::seconds(8) };
        let at = rotate_at(&[], &[CertificateDer::from(vec![1])], short, START, 1.0);
        assert_eq!(at, Some(START + Duration::seconds(2)));
    }

    #[test]
    fn a_failed_attempt_waits_and_the_controllers_return_ends_the_wait() {
        let now = Instant::now();
        let mut renewal = Renewal::at(START);
        assert_eq!(renewal.pause(START, now), StdDuration::ZERO);
        renewal.failed(now, 1.0);
        assert_eq!(renewal.pause(START, now), StdDuration::from_millis(200));
        renewal.failed(now, 1.0);
        assert_eq!(renewal.pause(START, now), StdDuration::from_millis(400));
        for _ in 0..50 {
            renewal.failed(now, 1.0);
        }
        assert_eq!(renewal.pause(START, now), RETRY_CAP);
        renewal.revive();
        assert_eq!(renewal.pause(START, now), StdDuration::ZERO);
    }

    #[test]
    fn a_renewal_far_away_is_looked_at_again_and_can_be_hastened_only() {
        let now = Instant::now();
        let mut renewal = Renewal::at(START + Duration::hours(12));
        assert_eq!(renewal.pause(START, now), MAX_PAUSE);
        renewal.hasten(START + Duration::SECOND);
        renewal.hasten(START + Duration::HOUR);
        assert_eq!(renewal.pause(START, now), StdDuration::from_secs(1));
        assert_eq!(renewal.pause(START + Duration::MINUTE, now), StdDuration::ZERO);
    }
}
