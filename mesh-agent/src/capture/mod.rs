//! The kernel side of capture, seen from user space: programs on interfaces, entries in maps, rules in namespaces.
//!
//! Everything is pinned, or recorded, below one bpffs directory and outlives the agent: a new agent replaces programs in
//! place, and nothing is ever detached because an agent ends. Only [`crate::enrol`] decides what is attached where.

pub mod clsact;
pub mod doctor;
pub mod features;
mod holder;
mod hook;
pub mod log;
mod lookup;
pub mod maps;
pub mod pins;
pub mod programs;
pub mod routing;
pub mod settings;
mod tcx;

use std::io;

pub use holder::{Holder, is_hold};
pub use hook::Hook;
pub use maps::Maps;
pub use pins::Pins;
pub use programs::{Attachment, Kernel};

/// The result of a removal: what is gone already is no error.
fn gone_or(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
