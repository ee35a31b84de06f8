//! Where the settings of a program come from: a flag, else the environment, else a file, else the default. One
//! definition (a clap `Args`) gives all four their names, the reference its text, and `--print-config` its content.
//!
//! Stands apart, as agent and controller share it and nothing else that reads files. A setting that is wrong ends the
//! start, with the place where it was written; nothing is passed over. Beside them is what shows and changes settings
//! at run time: the bounds of the admin interface, and the log's filter.
//!
//! | module | what |
//! |---|---|
//! | [`admin`] | how a program's admin interface is served, and what its clients may take |
//! | [`layers`] | the four places, and which of them wins |
//! | [`file`] | the file, with the line of every setting |
//! | [`log`] | the log's filter, which may change at run time |
//! | [`reference`] | Markdown of what can be set |

pub mod admin;
pub mod file;
pub mod layers;
pub mod log;
pub mod reference;

pub use layers::{InForce, Settings};
