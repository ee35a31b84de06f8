//! Requests: which rule one falls under, and what is done with it. Pure, so that `meshctl why` gives the agent's own
//! answer.
//!
//! | module | what |
//! |---|---|
//! | [`table`] | the rules for one port of a service, in their order, and the one that a request falls under |
//! | [`matches`] | whether a request is as a match says |
//! | [`edit`] | headers, paths, redirects, what is told to browsers |
//! | [`choose`] | which backend gets it, and when it is tried again |
//! | [`later`] | what a server says of when it wants to be asked again |
//! | [`fault`] | what goes wrong with it on purpose |
//! | [`trace`] | which trace it is of |

pub mod choose;
pub mod edit;
pub mod fault;
pub mod later;
pub mod matches;
pub mod table;
pub mod trace;

pub use table::{Chosen, Table};
