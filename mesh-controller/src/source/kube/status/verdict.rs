//! One condition that a status has to say, and whether it does.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use serde_json::Value;

use crate::source::Refused;

/// That what an object says is in force, or why not.
pub(super) const ACCEPTED: &str = "Accepted";
/// Longest message, characters; Kubernetes takes 32768 bytes.
const MAX_MESSAGE: usize = 4096;

/// What is said by one condition.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Verdict {
    pub(super) of: &'static str,
    pub(super) holds: bool,
    pub(super) reason: &'static str,
    message: String,
}

impl Verdict {
    pub(super) fn new(of: &'static str, holds: bool, reason: &'static str, message: &str) -> Self {
        Self { of, holds, reason, message: message.chars().take(MAX_MESSAGE).collect() }
    }

    /// Of a document that has no meaning. `problems`: all that was said of it.
    pub(super) fn refused(reason: &'static str, problems: &[&Refused]) -> Self {
        let of = |it: &&Refused| {
            let field = if it.field.is_empty() { String::new() } else { format!("{}: ", it.field) };
            format!("{field}{}. Cure: {}.", it.reason, it.cure)
        };
        let mut lines: Vec<String> = problems.iter().map(of).collect();
        lines.push(match problems.iter().any(|it| it.last_good_in_force) {
            true => "The last good version stays in force.".to_owned(),
            false => "Nothing of it is in force.".to_owned(),
        });
        Self::new(ACCEPTED, false, reason, &lines.join(" "))
    }

    fn status(&self) -> &'static str {
        if self.holds { "True" } else { "False" }
    }

    /// Whether some conditions say it, of this generation.
    pub(super) fn is_told(&self, said: &[Condition], generation: i64) -> bool {
        said.iter().find(|it| it.type_ == self.of).is_some_and(|it| {
            (it.status.as_str(), it.reason.as_str(), &it.message)
                == (self.status(), self.reason, &self.message)
                && it.observed_generation == Some(generation)
        })
    }

    /// The condition; since when it has been so is kept.
    pub(super) fn condition(&self, said: &[Condition], generation: i64, now: Timestamp) -> Condition {
        let before = said.iter().find(|it| it.type_ == self.of && it.status == self.status());
        Condition {
            type_: self.of.to_owned(),
            status: self.status().to_owned(),
            reason: self.reason.to_owned(),
            message: self.message.clone(),
            observed_generation: Some(generation),
            last_transition_time: before.map_or(Time(now), |it| it.last_transition_time.clone()),
        }
    }
}

/// The conditions of a status, or of a part of one.
pub(super) fn conditions(of: &Value) -> Vec<Condition> {
    let all = of["conditions"].as_array().into_iter().flatten();
    all.filter_map(|it| serde_json::from_value(it.clone()).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn refused(last_good_in_force: bool) -> Refused {
        Refused {
            file: PathBuf::from("kubernetes/authorizationpolicies/shop/p"),
            line: 1,
            object: Some("AuthorizationPolicy shop/p".into()),
            field: "spec.rules[0].to[0].ports[0]".into(),
            reason: "'x' is not a port".into(),
            cure: "write a number".into(),
            last_good_in_force,
        }
    }

    #[test]
    fn the_message_names_field_reason_and_cure_and_says_what_is_in_force() {
        let message = |last_good| Verdict::refused("Invalid", &[&refused(last_good)]).message;
        assert_eq!(
            message(true),
            "spec.rules[0].to[0].ports[0]: 'x' is not a port. Cure: write a number. The last good version stays in \
             force."
        );
        assert!(message(false).ends_with("Nothing of it is in force."));
    }

    #[test]
    fn what_is_said_is_not_said_again_until_the_object_or_the_verdict_changes() {
        let (then, now) = (Timestamp::UNIX_EPOCH, Timestamp::now());
        let good = Verdict::new(ACCEPTED, true, "Accepted", "It is in force.");
        assert!(!good.is_told(&[], 1));
        let said = [good.condition(&[], 1, then)];
        assert_eq!((said[0].status.as_str(), said[0].observed_generation), ("True", Some(1)));
        assert!(good.is_told(&said, 1) && !good.is_told(&said, 2));
        let newer = good.condition(&said, 2, now);
        assert_eq!(newer.last_transition_time, Time(then), "it was accepted before, too");
        let bad = Verdict::refused("Invalid", &[&refused(true)]);
        assert!(!bad.is_told(&said, 1));
        let bad = bad.condition(&said, 2, now);
        assert_eq!((bad.status.as_str(), bad.reason.as_str()), ("False", "Invalid"));
        assert_eq!(bad.last_transition_time, Time(now));
    }
}
