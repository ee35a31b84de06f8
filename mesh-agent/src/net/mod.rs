//! Sockets inside other network namespaces: the agent's only contact with `setns` and with socket options that need
//! privileges.

pub mod cgroup;
pub mod netlink;
pub mod netns;
mod ports;
pub mod socket;
pub mod sysctl;
