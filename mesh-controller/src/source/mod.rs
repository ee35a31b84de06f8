//! Where the desired state comes from. A source reads, checks, and yields a whole [`Model`](crate::model::Model);
//! what it refuses it says, and never lets a mistake in one object touch another.
//!
//! | module | what |
//! |---|---|
//! | [`document`] | YAML text into documents, with the line of every value |
//! | [`manifest`] | one document into one checked object |
//! | [`ledger`] | which of all documents are in force: duplicates, refusals, the last good ones. Pure |
//! | [`files`] | a directory, watched |

pub mod document;
pub mod files;
pub mod ledger;
pub mod manifest;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One thing that is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line within the file, from 1.
    pub line: usize,
    /// Path of the field, `spec.rules[0].from[0].addressBlocks[1]`; empty for the document as a whole.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What to write instead.
    pub cure: String,
}

/// A document, or a whole file, that was not taken; what `meshctl check` and `meshctl status` print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The file.
    pub file: PathBuf,
    /// Line of what is wrong, from 1.
    pub line: usize,
    /// The object that the document is about, where it says so.
    pub object: Option<String>,
    /// Path of the field; empty for the document as a whole.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What to write instead.
    pub cure: String,
    /// An earlier version of the object is still in force.
    pub last_good_in_force: bool,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: ", self.file.display(), self.line)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{}; {}", self.reason, self.cure)
    }
}
