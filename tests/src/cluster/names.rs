//! What a cluster is called: everything of cluster 3 is `nmk3-…`, in `10.243.0.0/16` and in one directory, so clusters
//! never meet each other or a world, and whatever has its name is its own to remove.

use std::{
    fmt,
    fs::{self, File},
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    str::FromStr,
};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

/// Directory of the clusters' files.
const HOME: &str = "/var/lib/nodemesh-cluster";
/// Directory of the clusters' locks.
const LOCKS: &str = "/run/lock";
/// How many clusters a machine may have at once.
pub const NUMBERS: u8 = 10;
/// The cluster of people; the others are those of tests.
pub const OF_PEOPLE: u8 = 0;

/// One cluster's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names(u8);

/// A machine of a cluster: namespaces that stand for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// etcd, API server, controller manager, scheduler; and the wire between the machines.
    Control,
    /// A node, from 0.
    Node(u8),
}

/// The nodes.
pub const NODES: [Machine; 2] = [Machine::Node(0), Machine::Node(1)];
/// All machines.
pub const MACHINES: [Machine; 3] = [Machine::Control, Machine::Node(0), Machine::Node(1)];

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("control"),
            Self::Node(index) => write!(f, "node-{}", char::from(b'a' + index)),
        }
    }
}

impl FromStr for Machine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = MACHINES.into_iter().find(|machine| machine.to_string() == text);
        known.ok_or_else(|| format!("no machine {text:?}: there are {MACHINES:?}"))
    }
}

impl Names {
    /// Those of a cluster; `None` when there is no such number.
    pub fn new(number: u8) -> Option<Self> {
        (number < NUMBERS).then_some(Self(number))
    }

    /// The cluster's number.
    pub fn number(self) -> u8 {
        self.0
    }

    /// What every name begins with: also the link to the machine that all this runs on.
    pub fn prefix(self) -> String {
        format!("nmk{}", self.0)
    }

    /// A machine's network namespace and cgroup.
    pub fn machine(self, machine: Machine) -> String {
        format!("{}-{machine}", self.prefix())
    }

    /// All files.
    pub fn home(self) -> PathBuf {
        PathBuf::from(HOME).join(self.0.to_string())
    }

    /// The files of a machine.
    pub fn machine_home(self, machine: Machine) -> PathBuf {
        self.home().join(machine.to_string())
    }

    /// What an administrator's clients need.
    pub fn kubeconfig(self) -> PathBuf {
        self.home().join("kubeconfig")
    }

    /// kubectl of the cluster's own version.
    pub fn kubectl(self) -> PathBuf {
        self.home().join("bin/kubectl")
    }

    /// All addresses: `10.24N.0.0/16`. Worlds have those below `10.200.0.0`.
    pub fn addresses(self) -> String {
        format!("{}/16", self.address(0, 0))
    }

    /// An address of the cluster.
    pub fn address(self, third: u8, fourth: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 240 + self.0, third, fourth)
    }

    /// A machine's address on the wire between them.
    pub fn of_machine(self, machine: Machine) -> Ipv4Addr {
        match machine {
            Machine::Control => self.address(0, 2),
            Machine::Node(index) => self.address(0, 11 + index),
        }
    }

    /// The address of the machine that all this runs on.
    pub fn of_host(self) -> Ipv4Addr {
        self.address(0, 1)
    }

    /// All pods' addresses.
    pub fn pods(self) -> String {
        format!("{}/17", self.address(0, 0))
    }

    /// The addresses of a node's pods.
    pub fn pods_of(self, node: u8) -> String {
        format!("{}/24", self.address(node + 1, 0))
    }

    /// The services' addresses.
    pub fn services(self) -> String {
        format!("{}/17", self.address(128, 0))
    }

    /// An address of the cluster's IPv6, where it has that: `fd00:24N:0:third::fourth`; services are in `fd00:24N:1::`.
    pub fn address6(self, third: u16, fourth: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x240 + u16::from(self.0), 0, third, 0, 0, 0, fourth)
    }

    /// As [`Self::of_machine`].
    pub fn of_machine6(self, machine: Machine) -> Ipv6Addr {
        match machine {
            Machine::Control => self.address6(0, 2),
            Machine::Node(index) => self.address6(0, 11 + u16::from(index)),
        }
    }

    /// As [`Self::of_host`].
    pub fn of_host6(self) -> Ipv6Addr {
        self.address6(0, 1)
    }

    /// As [`Self::pods`].
    pub fn pods6(self) -> String {
        format!("{}/48", self.address6(0, 0))
    }

    /// As [`Self::pods_of`].
    pub fn pods_of6(self, node: u8) -> String {
        format!("{}/64", self.address6(u16::from(node) + 1, 0))
    }

    /// As [`Self::services`].
    pub fn services6(self) -> String {
        format!("{}/112", Ipv6Addr::new(0xfd00, 0x240 + u16::from(self.0), 1, 0, 0, 0, 0, 0))
    }

    /// Takes one of the cluster's locks; `None` when somebody has it. `change` is held by a command that brings it up or
    /// takes it down, `tests` by a test that has the number for itself.
    pub fn try_lock(self, what: &str) -> Result<Option<Flock<File>>> {
        fs::create_dir_all(LOCKS).with_context(|| format!("making {LOCKS} (needs root)"))?;
        let path = PathBuf::from(LOCKS).join(format!("{}-{what}.lock", self.prefix()));
        let file = File::create(&path).with_context(|| format!("opening {} (needs root)", path.display()))?;
        Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_is_found_by_its_name() {
        for machine in MACHINES {
            assert_eq!(machine.to_string().parse(), Ok(machine));
        }
        assert!("node-z".parse::<Machine>().is_err());
    }

    #[test]
    fn clusters_share_no_name_and_no_address() {
        let (one, two) = (Names::new(1).expect("a number"), Names::new(2).expect("a number"));
        assert_eq!(one.machine(NODES[1]), "nmk1-node-b");
        assert_eq!(one.services(), "10.241.128.0/17");
        assert_ne!(one.addresses(), two.addresses());
        assert_ne!(one.home(), two.home());
        assert_eq!(Names::new(NUMBERS), None);
    }
}
