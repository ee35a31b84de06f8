//! The controller needs no privilege: what it was started with is dropped before there is any thread.

use caps::{CapSet, CapsHashSet};
use nix::sys::prctl;

/// A capability cannot be dropped.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot drop the privileges that the controller was started with: {0}; start it as a user without any"
)]
pub struct PrivilegeError(String);

/// Drops every capability of this thread and of those that it starts, for good.
pub fn drop_all() -> Result<(), PrivilegeError> {
    prctl::set_no_new_privs().map_err(|error| PrivilegeError(format!("no_new_privs: {error}")))?;
    let failed =
        |set: &'static str| move |error: caps::errors::CapsError| PrivilegeError(format!("{set}: {error}"));
    // Only who may change the bounding set can; for others no_new_privs has the same effect.
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).map_err(failed("effective"))? {
        caps::clear(None, CapSet::Bounding).map_err(failed("bounding"))?;
    }
    caps::clear(None, CapSet::Ambient).map_err(failed("ambient"))?;
    let none = CapsHashSet::new();
    caps::set(None, CapSet::Effective, &none).map_err(failed("effective"))?;
    caps::set(None, CapSet::Inheritable, &none).map_err(failed("inheritable"))?;
    caps::set(None, CapSet::Permitted, &none).map_err(failed("permitted"))
}
