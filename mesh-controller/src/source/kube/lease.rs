//! Which of several controllers writes: the one that holds the Lease. What the others do with it is waited for by their own
//! clocks alone, so clocks that differ do no harm; whoever writes it does so against the version that was read.
//!
//! The invariant: whoever could not renew ends to write while all others still wait.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{Api, Client, ResourceExt, api::PostParams};
use tokio::time::{Instant, timeout};

use crate::{kubernetes::is_conflict, source::Presence};

/// Its name, in the namespace of the controller.
pub(super) const NAME: &str = "nodemesh-controller";
/// How long the others wait after they saw it renewed.
const DURATION: Duration = Duration::from_secs(15);
/// For how long a renewal is good: shorter, so that a write which is on its way then still arrives before others write.
const GOOD_FOR: Duration = Duration::from_secs(10);
/// How often it is renewed, or looked at.
const EVERY: Duration = Duration::from_secs(2);
/// How long a request may take.
const REQUEST: Duration = Duration::from_secs(3);

/// What is to be done about the Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// There is none.
    Create,
    /// It is ours.
    Renew,
    /// It is nobody's, or has been silent for too long.
    Take,
    /// It is another's.
    Wait,
}

/// `silent`: for how long the Lease has been seen as it is.
fn decide(found: Option<&Lease>, silent: Duration, me: &str) -> Step {
    let Some(lease) = found else { return Step::Create };
    let spec = lease.spec.clone().unwrap_or_default();
    let holder = spec.holder_identity.unwrap_or_default();
    let patience = spec.lease_duration_seconds.and_then(|it| u64::try_from(it).ok());
    let patience = patience.map_or(DURATION, Duration::from_secs);
    match holder.as_str() {
        "" => Step::Take,
        holder if holder == me => Step::Renew,
        _ if silent >= patience => Step::Take,
        _ => Step::Wait,
    }
}

/// What is written. Whoever takes it counts the change of hands.
fn next(found: Option<&Lease>, step: Step, me: &str, now: Timestamp) -> Lease {
    let mut lease = found.cloned().unwrap_or_default();
    let before = lease.spec.take().unwrap_or_default();
    let taken = step != Step::Renew;
    let transitions = before.lease_transitions.unwrap_or(0);
    lease.metadata.name = Some(NAME.to_owned());
    lease.metadata.managed_fields = None;
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        acquire_time: if taken { Some(MicroTime(now)) } else { before.acquire_time },
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(if step == Step::Take { transitions + 1 } else { transitions }),
        ..LeaseSpec::default()
    });
    lease
}

/// One controller's part in it.
#[derive(Debug)]
pub(super) struct Term {
    leases: Api<Lease>,
    me: String,
    /// The version that was seen last, and since when.
    seen: Option<(String, Instant)>,
    held_until: Option<Instant>,
    due: Instant,
    /// When the API server last answered, whatever it said.
    answered: Instant,
}

impl Term {
    pub(super) fn new(client: Client, me: String) -> Self {
        Self {
            leases: Api::default_namespaced(client),
            me,
            seen: None,
            held_until: None,
            due: Instant::now(),
            answered: Instant::now(),
        }
    }

    /// When [`Term::keep`] is to be called next.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Whether it is held for as long as this.
    pub(super) fn holds_for(&self, while_: Duration) -> bool {
        self.held_until.is_some_and(|until| Instant::now() + while_ < until)
    }

    /// How this controller stands.
    pub(super) fn standing(&self) -> Presence {
        Presence { answered: self.answered.elapsed() < DURATION, leads: self.holds_for(Duration::ZERO) }
    }

    /// Renews it, takes it, or looks who has it.
    pub(super) async fn keep(&mut self) {
        let started = Instant::now();
        self.due = started + EVERY;
        let held = self.holds_for(Duration::ZERO);
        let attempt = timeout(REQUEST, self.attempt(started)).await;
        if matches!(attempt, Ok(Ok(_) | Err(kube::Error::Api(_)))) {
            self.answered = Instant::now();
        }
        match attempt {
            Ok(Ok(true)) => self.held_until = Some(started + GOOD_FOR),
            // It is another's for certain.
            Ok(Ok(false)) => self.held_until = None,
            // What is held is held until it ends by itself.
            Ok(Err(error)) => tracing::debug!(%error, "the lease {NAME}"),
            Err(_) => tracing::debug!("the lease {NAME}: no answer"),
        }
        match (held, self.holds_for(Duration::ZERO)) {
            (false, true) => tracing::info!(holder = self.me, "this controller writes status from now on"),
            (true, false) => tracing::info!("this controller does not write status any more"),
            _ => {}
        }
    }

    async fn attempt(&mut self, now: Instant) -> kube::Result<bool> {
        let found = self.leases.get_opt(NAME).await?;
        let version = found.as_ref().and_then(ResourceExt::resource_version).unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => now,
        };
        self.seen = Some((version, since));
        let step = decide(found.as_ref(), now - since, &self.me);
        let lease = next(found.as_ref(), step, &self.me, Timestamp::now());
        let written = match step {
            Step::Wait => return Ok(false),
            Step::Create => self.leases.create(&PostParams::default(), &lease).await,
            Step::Renew | Step::Take => self.leases.replace(NAME, &PostParams::default(), &lease).await,
        };
        match written {
            Ok(_) => Ok(true),
            // Somebody else was first.
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Leaves it to whoever comes, rather than letting them wait.
    pub(super) async fn release(mut self) {
        if !self.holds_for(Duration::ZERO) {
            return;
        }
        self.held_until = None;
        let leave = async {
            let Some(mut lease) = self.leases.get_opt(NAME).await? else { return Ok(()) };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&self.me) {
                spec.holder_identity = None;
                self.leases.replace(NAME, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        if let Ok(Err(error)) = timeout(REQUEST, leave).await {
            tracing::debug!(%error, "leaving the lease {NAME}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: Option<&str>, seconds: Option<i32>) -> Lease {
        let spec = LeaseSpec {
            holder_identity: holder.map(str::to_owned),
            lease_duration_seconds: seconds,
            lease_transitions: Some(3),
            ..LeaseSpec::default()
        };
        Lease { spec: Some(spec), ..Lease::default() }
    }

    #[test]
    fn it_is_taken_only_when_it_is_nobodys_or_has_been_silent_for_as_long_as_it_says() {
        let seconds = Duration::from_secs;
        for (found, silent, expected) in [
            (None, 0, Step::Create),
            (Some(lease(None, None)), 0, Step::Take),
            (Some(lease(Some(""), Some(15))), 0, Step::Take),
            (Some(lease(Some("me"), Some(15))), 60, Step::Renew),
            (Some(lease(Some("other"), Some(15))), 0, Step::Wait),
            (Some(lease(Some("other"), Some(15))), 14, Step::Wait),
            (Some(lease(Some("other"), Some(15))), 15, Step::Take),
            (Some(lease(Some("other"), Some(60))), 15, Step::Wait),
            (Some(lease(Some("other"), None)), 15, Step::Take),
        ] {
            assert_eq!(decide(found.as_ref(), seconds(silent), "me"), expected, "{found:?} {silent}");
        }
    }

    #[test]
    fn a_renewal_keeps_when_it_was_acquired_and_a_change_of_hands_is_counted() {
        let (then, now) = (Timestamp::UNIX_EPOCH, Timestamp::now());
        let taken = next(Some(&lease(Some("other"), None)), Step::Take, "me", then).spec.expect("a spec");
        assert_eq!((taken.lease_transitions, taken.acquire_time.clone()), (Some(4), Some(MicroTime(then))));
        let held = Lease { spec: Some(taken), ..Lease::default() };
        let renewed = next(Some(&held), Step::Renew, "me", now).spec.expect("a spec");
        assert_eq!((renewed.lease_transitions, renewed.acquire_time), (Some(4), Some(MicroTime(then))));
        assert_eq!(renewed.renew_time, Some(MicroTime(now)));
    }

    #[test]
    fn whoever_cannot_renew_stops_before_others_may_take_it() {
        assert!(GOOD_FOR + REQUEST < DURATION);
    }
}
