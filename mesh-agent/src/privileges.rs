//! What the agent may do to the machine: the capabilities that it needs, and none else from its start on.
//!
//! Stands apart, as it has to run before there is a second thread: capabilities are a thread's own, and are inherited.
//! The list and its reasons are told in docs/SECURITY.md; a test compares both, and another shows that a running agent
//! has these and works.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;

/// Each with what it is needed for.
pub const NEEDED: [(Capability, &str); 3] = [
    (
        Capability::CAP_NET_ADMIN,
        "attaching programs to veths, routes and rules within workloads' namespaces, sockets that listen for any address",
    ),
    (
        Capability::CAP_SYS_ADMIN,
        "entering workloads' network namespaces (setns), loading programs and their maps (bpf)",
    ),
    (
        Capability::CAP_SYS_PTRACE,
        "finding the network namespaces of processes that other users own (/proc/PID/ns)",
    ),
];

/// The agent cannot have what it needs, or cannot drop what it does not.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// It was started without.
    #[error("the agent lacks {0}, which it needs for {1}; start it as root, or with this capability")]
    Lacks(Capability, &'static str),
    /// The kernel refused.
    #[error("cannot drop the capabilities that are not needed ({0}: {1}); start the agent as root")]
    Drop(&'static str, String),
}

/// Drops every capability but [`NEEDED`] from this thread and those that it starts, for good: also what it executes
/// can have no more.
pub fn keep_needed() -> Result<(), PrivilegeError> {
    let failed = |set: &'static str| {
        move |error: caps::errors::CapsError| PrivilegeError::Drop(set, error.to_string())
    };
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed("permitted"))?;
    if let Some((capability, reason)) = NEEDED.iter().find(|(capability, _)| !permitted.contains(capability))
    {
        return Err(PrivilegeError::Lacks(*capability, reason));
    }
    prctl::set_no_new_privs().map_err(|error| PrivilegeError::Drop("no_new_privs", error.to_string()))?;
    let needed: CapsHashSet = NEEDED.iter().map(|(capability, _)| *capability).collect();
    let bounding = caps::read(None, CapSet::Bounding).map_err(failed("bounding"))?;
    for capability in bounding.difference(&needed) {
        caps::drop(None, CapSet::Bounding, *capability).map_err(failed("bounding"))?;
    }
    caps::clear(None, CapSet::Ambient).map_err(failed("ambient"))?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new()).map_err(failed("inheritable"))?;
    caps::set(None, CapSet::Effective, &needed).map_err(failed("effective"))?;
    caps::set(None, CapSet::Permitted, &needed).map_err(failed("permitted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_is_told_with_its_reason() {
        let told = include_str!("../../docs/SECURITY.md");
        for (capability, reason) in NEEDED {
            let line = format!("| `{capability}` | {reason} |");
            assert!(told.contains(&line), "docs/SECURITY.md lacks the line\n{line}");
        }
        assert_eq!(
            told.matches("| `CAP_").count(),
            NEEDED.len(),
            "docs/SECURITY.md tells of more than is kept"
        );
    }
}
