//! What a view's version says: which start of which controller counted it, and how far it had counted.
//!
//! `<generation>.<epoch>-<number>`: the generation is the controller's count of its own starts, kept with its state; the
//! epoch is drawn at each start; the number counts that start's views. Stands apart because both ends read it: within
//! an epoch numbers only grow, and a generation that is lower than one seen before tells of a controller that was
//! restored from an older state.

use std::{fmt, str::FromStr};

/// Longest epoch, characters.
const MAX_EPOCH: usize = 64;

/// A version of a node's view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// How many times the controller's state has seen a start.
    pub generation: u64,
    /// Drawn at that start: lower-case letters and digits.
    pub epoch: String,
    /// Counts the views of that epoch, from 1.
    pub number: u64,
}

/// How a version stands to one that was held before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Succession {
    /// The same epoch's same or later view, or another start of the controller.
    Onward,
    /// An earlier view of the same epoch: no controller that is in order sends that.
    Backward,
    /// A start of an older state: the controller was restored from a backup.
    Restored,
}

impl Version {
    /// How this version stands to `held`.
    pub fn after(&self, held: &Self) -> Succession {
        if self.epoch == held.epoch && self.generation == held.generation {
            if self.number < held.number { Succession::Backward } else { Succession::Onward }
        } else if self.generation < held.generation {
            Succession::Restored
        } else {
            Succession::Onward
        }
    }
}

/// A text is not a version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a view's version")]
pub struct VersionError;

impl FromStr for Version {
    type Err = VersionError;
    fn from_str(text: &str) -> Result<Self, VersionError> {
        let (generation, rest) = text.split_once('.').ok_or(VersionError)?;
        let (epoch, number) = rest.split_once('-').ok_or(VersionError)?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if epoch.is_empty() || epoch.len() > MAX_EPOCH || !epoch.chars().all(plain) {
            return Err(VersionError);
        }
        // `parse` takes a sign; versions have none.
        let count = |digits: &str| {
            digits
                .bytes()
                .all(|b| b.is_ascii_digit())
                .then(|| digits.parse().ok())
                .flatten()
                .ok_or(VersionError)
        };
        Ok(Self { generation: count(generation)?, epoch: epoch.to_owned(), number: count(number)? })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}-{}", self.generation, self.epoch, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        text.parse().unwrap()
    }

    #[test]
    fn a_version_reads_back_and_other_texts_are_none() {
        assert_eq!(version("7.3f9a-12").to_string(), "7.3f9a-12");
        let long = format!("1.{}-1", "a".repeat(MAX_EPOCH + 1));
        for text in
            ["", "7", "7.a", "7.-1", "a.b-1", "+7.a-1", "7.a-+1", "7.A-1", "7.a-99999999999999999999", &long]
        {
            assert_eq!(text.parse::<Version>(), Err(VersionError), "{text}");
        }
    }

    #[test]
    fn a_lower_number_of_an_epoch_is_backward_and_a_lower_generation_a_restored_state() {
        for (held, next, expected) in [
            ("2.a-5", "2.a-6", Succession::Onward),
            ("2.a-5", "2.a-5", Succession::Onward),
            ("2.a-5", "2.a-4", Succession::Backward),
            ("2.a-5", "3.b-1", Succession::Onward),
            ("2.a-5", "2.b-1", Succession::Onward),
            ("2.a-5", "1.b-9", Succession::Restored),
        ] {
            assert_eq!(version(next).after(&version(held)), expected, "{held} then {next}");
        }
    }
}
