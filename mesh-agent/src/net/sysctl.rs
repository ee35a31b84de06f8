//! Settings of the kernel in a container: they are mounted read-only there, and the agent has to change those of
//! workloads' namespaces.
//!
//! Stands apart, as it has to run before anything enters another namespace. It changes the mount that the container
//! has for itself, and nothing of the node.

use std::path::Path;

use nix::{
    mount::{MsFlags, mount},
    sys::statvfs::{FsFlags, statvfs},
};

const SETTINGS: &str = "/proc/sys";

/// Settings cannot be written.
#[derive(Debug, thiserror::Error)]
#[error(
    "{SETTINGS} is mounted read-only and cannot be mounted otherwise ({0}): give the agent's container CAP_SYS_ADMIN, and \
     no AppArmor profile that forbids mounts"
)]
pub struct ReadOnly(nix::Error);

/// Makes settings writable where they are not.
pub fn make_writable() -> Result<(), ReadOnly> {
    let path = Path::new(SETTINGS);
    if !statvfs(path).map_err(ReadOnly)?.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let kept = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let none: Option<&str> = None;
    mount(none, path, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | kept, none).map_err(ReadOnly)
}
