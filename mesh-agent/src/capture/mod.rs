//! The kernel side of capture, seen from user space: programs on interfaces, entries in maps, rules in namespaces.
//!
//! Everything is pinned below one bpffs directory and outlives the agent: a new agent replaces programs in place, and
//! nothing is ever detached because an agent ends. Only [`crate::enrol`] decides what is attached where.

pub mod log;
pub mod maps;
pub mod pins;
pub mod programs;
pub mod routing;
pub mod settings;

pub use maps::Maps;
pub use pins::Pins;
pub use programs::{Hook, Kernel};
