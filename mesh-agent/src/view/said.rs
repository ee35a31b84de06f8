//! What the agent says of itself to the controller: what is wrong on its node, which certificates it holds, how full
//! what can become full is. For people, and for who retires a root.
//!
//! Bounded: a message at most every [`PAUSE`], however fast things change, and nothing is queued.

use std::time::Duration;

use mesh_core::wire::proto;
use tokio::{sync::watch, time::Instant};

use crate::health::{Certificates, Condition, Health};

/// The shortest time between two messages.
const PAUSE: Duration = Duration::from_secs(1);
/// Most problems of a message, and the longest of them, characters.
const MAX_PROBLEMS: usize = 20;
const MAX_LINE: usize = 500;

/// What one stream has said.
#[derive(Debug)]
pub(super) struct Said {
    condition: watch::Receiver<Condition>,
    certificates: watch::Receiver<Certificates>,
    /// When the next may be said.
    next: Instant,
}

impl Said {
    /// Nothing yet.
    pub(super) fn new(health: &Health, certificates: &watch::Receiver<Certificates>) -> Self {
        let mut new =
            Self { condition: health.subscribe(), certificates: certificates.clone(), next: Instant::now() };
        new.condition.mark_changed();
        new
    }

    /// Done when there is something to say, and it may be said. Cancel-safe.
    pub(super) async fn news(&mut self) {
        let quiet = |changed: Result<bool, _>| !changed.unwrap_or(false);
        while quiet(self.condition.has_changed()) && quiet(self.certificates.has_changed()) {
            // Both branches only wait.
            let heard = tokio::select! {
                changed = self.condition.changed() => {
                    changed.is_ok().then(|| self.condition.mark_changed())
                }
                changed = self.certificates.changed() => {
                    changed.is_ok().then(|| self.certificates.mark_changed())
                }
            };
            if heard.is_none() {
                // The agent stops: there will be nothing more to say.
                std::future::pending::<()>().await;
            }
        }
        tokio::time::sleep_until(self.next).await;
    }

    /// What is to be said now.
    pub(super) fn say(&mut self) -> proto::Condition {
        self.next = Instant::now() + PAUSE;
        let condition = self.condition.borrow_and_update();
        let certificates = self.certificates.borrow_and_update();
        let cut = |text: &str| text.chars().take(MAX_LINE).collect::<String>();
        proto::Condition {
            problems: condition.problems().iter().take(MAX_PROBLEMS).map(|line| cut(line)).collect(),
            certificates: certificates
                .iter()
                .map(|(id, status)| proto::HeldCertificate {
                    identity: id.to_string(),
                    expires_unix: status.expires.map_or(0, |at| at.unix_timestamp()),
                    root_sha256: status.root.map(|root| root.to_vec()).unwrap_or_default(),
                    error: status.error.as_deref().map(cut).unwrap_or_default(),
                })
                .collect(),
            fills: condition
                .fills
                .values()
                .map(|fill| proto::Fill {
                    what: fill.what.to_owned(),
                    entries: fill.entries,
                    limit: fill.limit,
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::health::Kept;

    #[tokio::test(start_paused = true)]
    async fn everything_is_said_at_first_then_what_changes_and_not_too_often() {
        let health = Health::default();
        let certificates = watch::Sender::new(Certificates::new());
        let mut said = Said::new(&health, &certificates.subscribe());
        said.news().await;
        assert_eq!(said.say(), proto::Condition::default());
        assert!(said.news().now_or_never().is_none(), "nothing has changed");
        health.written(Kept::View, &Err::<(), _>("no space"));
        let before = Instant::now();
        said.news().await;
        assert_eq!(before.elapsed(), PAUSE);
        assert!(said.say().problems[0].contains("no space"));
        let id = mesh_core::identity::SpiffeId::parse("spiffe://td/ns/a/sa/b").unwrap();
        certificates.send_modify(|all| drop(all.insert(id, Default::default())));
        said.news().await;
        assert_eq!(said.say().certificates[0].identity, "spiffe://td/ns/a/sa/b");
    }
}
