//! Lines of access logs, told apart.

use serde_json::Value;

use crate::workload::Workload;

/// `direction` at the source's agent.
pub const OUTBOUND: &str = "outbound";
/// `direction` at the destination's agent.
pub const INBOUND: &str = "inbound";

/// Tells the lines of connections from one workload to another, in one direction.
pub fn is(direction: &str, from: &Workload, to: &Workload) -> impl Fn(&Value) -> bool {
    let (direction, from, to) = (direction.to_owned(), from.full_name(), to.full_name());
    move |line| {
        line["direction"] == direction.as_str()
            && line["source"]["workload"] == from.as_str()
            && line["destination"]["workload"] == to.as_str()
    }
}

/// Tells the lines of connections that were refused for this reason.
pub fn refused(direction: &str, reason: mesh_core::refusal::Reason) -> impl Fn(&Value) -> bool {
    let direction = direction.to_owned();
    move |line| {
        line["direction"] == direction.as_str()
            && line["outcome"] == "refused"
            && line["reason"] == reason.label()
    }
}
