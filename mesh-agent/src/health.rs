//! What is wrong with the control side that no connection shows: told as metrics, in the admin state and by the log.
//!
//! Nothing is decided here. Whoever finds something wrong says so, and says when it is right again.

use std::collections::BTreeMap;

use mesh_core::identity::SpiffeId;
use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::watch;

/// From here on, clocks that differ are told of: far below what certificates bear.
pub const MAX_SKEW_SECONDS: f64 = 30.0;

/// A file of the run directory, as metrics name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kept {
    /// The node's key and certificate.
    Node,
    /// The last view.
    View,
    /// The key and certificate of an identity of a workload.
    Workload,
}

impl Kept {
    /// All of them, as metrics begin with.
    pub const ALL: [Self; 3] = [Self::Node, Self::View, Self::Workload];

    fn says(self) -> &'static str {
        match self {
            Self::Node => "node's certificate",
            Self::View => "view",
            Self::Workload => "certificate of a workload",
        }
    }

    /// The metric's label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::View => "view",
            Self::Workload => "workload",
        }
    }
}

/// From this part of a limit on, it is a problem.
pub const NEAR_PERCENT: u64 = 80;

/// Something that can become full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fill {
    /// What it is, as metrics name it.
    pub what: &'static str,
    /// How much is in it.
    pub entries: u64,
    /// How much fits.
    pub limit: u64,
    /// What happens when it is full, and what to do before.
    #[serde(skip)]
    pub cure: &'static str,
}

impl Fill {
    /// How full it is.
    pub fn percent(&self) -> u64 {
        u64::try_from(u128::from(self.entries) * 100 / u128::from(self.limit.max(1))).unwrap_or(u64::MAX)
    }

    /// Whether both say about the same: the percentage, and the number but for an eighth.
    fn is_much_as(&self, other: &Self) -> bool {
        let near = self.entries.abs_diff(other.entries) <= self.entries / 8;
        near && self.percent() == other.percent() && self.limit == other.limit
    }

    /// Whether somebody has to do something. What makes room by itself is without a cure, and may be full.
    pub fn is_near(&self) -> bool {
        !self.cure.is_empty() && self.percent() >= NEAR_PERCENT
    }
}

/// The certificates of this node's identities, its own among them; what is published for metrics and state.
pub type Certificates = BTreeMap<SpiffeId, CertificateStatus>;

/// How it stands with the certificate of one identity.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CertificateStatus {
    /// Until when the certificate in force is valid; `None` while there is none.
    #[serde(serialize_with = "time::serde::rfc3339::option::serialize")]
    pub expires: Option<OffsetDateTime>,
    /// The root that it leads to, SHA-256; `None` while there is none.
    #[serde(skip)]
    pub root: Option<[u8; 32]>,
    /// Why the last attempt at a newer one failed; `None` when it did not.
    pub error: Option<String>,
}

/// What is wrong now, and what was since the start.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Condition {
    /// Views taken from a controller whose state was restored from an older one.
    pub views_restored: u64,
    /// What could not be written, with the error: it is in force and would not survive a restart of the agent.
    pub unsaved: BTreeMap<Kept, String>,
    /// What an earlier run left and could not be used, how often and why.
    pub damaged: BTreeMap<Kept, (u64, String)>,
    /// How full is what can become full, by its name; the same while little changes.
    pub fills: BTreeMap<&'static str, Fill>,
    /// How far this node's clock is ahead of the controller's, seconds; `None` before the first answer.
    pub clock_skew_seconds: Option<f64>,
}

impl Condition {
    /// Each thing that is wrong, as a line with its cure.
    pub fn problems(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (file, error) in &self.unsaved {
            lines.push(format!("the {} is in force and not saved: {error}", file.says()));
        }
        for (file, (count, reason)) in &self.damaged {
            lines.push(format!(
                "{count} of what an earlier run left, {}, was not used: {reason}",
                file.says()
            ));
        }
        if self.views_restored > 0 {
            lines.push(
                "the controller's state was restored from an older one: compare its manifests with what should be"
                    .to_owned(),
            );
        }
        for fill in self.fills.values().filter(|fill| fill.is_near()) {
            let Fill { what, limit, cure, .. } = fill;
            lines.push(format!("{what} are at {} % of their limit, {limit}: {cure}", fill.percent()));
        }
        if let Some(skew) = self.clock_skew_seconds.filter(|skew| skew.abs() > MAX_SKEW_SECONDS) {
            lines.push(format!("this clock is {skew:+.0} s from the controller's: set it (NTP)"));
        }
        lines
    }
}

/// Where it is said. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Health {
    shared: watch::Sender<Condition>,
}

impl Health {
    /// For whoever tells it on.
    pub fn subscribe(&self) -> watch::Receiver<Condition> {
        self.shared.subscribe()
    }

    /// A view of a restored controller was put in force.
    pub fn view_restored(&self) {
        self.shared.send_modify(|condition| condition.views_restored += 1);
    }

    /// The controller has said what time it is there: our clock is so far ahead of it. The way of the answer is in it.
    pub fn skew(&self, skew: Option<time::Duration>) {
        let Some(skew) = skew else { return };
        let seconds = skew.as_seconds_f64();
        self.shared.send_if_modified(|condition| {
            let before = condition.clock_skew_seconds.replace(seconds);
            let was_off = before.is_some_and(|before| before.abs() > MAX_SKEW_SECONDS);
            if seconds.abs() > MAX_SKEW_SECONDS && !was_off {
                tracing::error!(
                    seconds,
                    "this node's clock and the controller's differ: certificates bear 5 minutes; set the clock (NTP)"
                );
            }
            // What the network's delay moves is no news.
            before.is_none_or(|before| (before - seconds).abs() > 0.1)
        });
    }

    /// How full these are.
    pub fn filled(&self, fills: &[Fill]) {
        self.shared.send_if_modified(|condition| {
            let mut news = false;
            for fill in fills {
                let before = condition.fills.get(fill.what);
                // What comes and goes all the time is no news.
                if before.is_some_and(|it| it.is_much_as(fill)) {
                    continue;
                }
                if fill.is_near() && !before.is_some_and(Fill::is_near) {
                    let Fill { what, entries, limit, cure } = fill;
                    tracing::warn!(what, entries, limit, cure, "a limit is near");
                }
                condition.fills.insert(fill.what, *fill);
                news = true;
            }
            news
        });
    }

    /// A file was written, or was not.
    pub fn written<E: std::fmt::Display>(&self, file: Kept, result: &Result<(), E>) {
        self.shared.send_if_modified(|condition| match result {
            Ok(()) => condition.unsaved.remove(&file).is_some(),
            Err(error) => condition.unsaved.insert(file, error.to_string()).is_none(),
        });
    }

    /// A file of an earlier run could not be used.
    pub fn damaged(&self, file: Kept, reason: &impl std::fmt::Display) {
        self.shared.send_modify(|condition| {
            let (count, last) = condition.damaged.entry(file).or_default();
            *count += 1;
            *last = reason.to_string();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_told_of_before_it_is_hit() {
        let health = Health::default();
        let told = health.subscribe();
        let fill = |what, entries, cure| Fill { what, entries, limit: 1000, cure };
        health.filled(&[fill("boxes", 799, "make more"), fill("rings", 1000, "")]);
        assert_eq!(told.borrow().problems(), Vec::<String>::new(), "a ring makes room by itself");
        health.filled(&[fill("boxes", 800, "make more")]);
        assert_eq!(told.borrow().problems(), ["boxes are at 80 % of their limit, 1000: make more"]);
        health.filled(&[fill("boxes", 10, "make more")]);
        assert!(told.borrow().problems().is_empty() && told.borrow().fills.len() == 2);
        assert!(!fill("boxes", 1_000_000, "").is_near());
        let endless = Fill { what: "open_files", entries: 1_000_000, limit: u64::MAX, cure: "x" };
        assert!(!endless.is_near());
    }

    #[test]
    fn what_is_wrong_is_told_until_it_is_right_again() {
        let health = Health::default();
        let mut told = health.subscribe();
        health.written(Kept::View, &Err::<(), _>("no space"));
        assert!(told.has_changed().unwrap());
        assert_eq!(told.borrow_and_update().unsaved[&Kept::View], "no space");
        health.written(Kept::View, &Err::<(), _>("no space"));
        assert!(!told.has_changed().unwrap(), "the same again is no news");
        health.written(Kept::Node, &Ok::<(), String>(()));
        assert!(!told.has_changed().unwrap());
        health.written(Kept::View, &Ok::<(), String>(()));
        assert!(told.borrow_and_update().unsaved.is_empty());
        health.damaged(Kept::Node, &"cut short");
        health.damaged(Kept::Node, &"empty");
        assert_eq!(told.borrow().damaged[&Kept::Node], (2, "empty".to_owned()));
    }
}
