//! What happens when the kernel programs' maps are full: nothing is let through for want of room.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, TcpListener},
    path::PathBuf,
};

use mesh_agent::capture::{Kernel, Maps};
use mesh_core::model::IpNet;
use mesh_ebpf::abi::{Direction, MAX_BLOCKS, MAX_DESTINATIONS, MAX_WORKLOADS};

/// Programs and maps below a directory of their own, removed in the end.
struct Loaded {
    maps: Maps,
    _kernel: Kernel,
    bpffs: PathBuf,
}

impl Loaded {
    fn new(name: &str) -> Self {
        mesh_tests::world::mount_bpffs().unwrap();
        let bpffs = PathBuf::from(format!("/sys/fs/bpf/nodemesh-test-{name}-{}", std::process::id()));
        let mut kernel = Kernel::load(&bpffs).unwrap();
        let maps = Maps::new(kernel.bpf_mut(), 1).unwrap();
        Self { maps, _kernel: kernel, bpffs }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.bpffs);
    }
}

fn addresses(count: u32) -> HashSet<IpAddr> {
    (0..count).map(|n| Ipv4Addr::from(0x0a00_0000 + n).into()).collect()
}

#[test]
fn more_destinations_than_fit_mean_that_everything_is_captured() {
    let mut loaded = Loaded::new("destinations");
    assert!(!loaded.maps.captures_everything());
    assert!(!loaded.maps.set_destinations(&addresses(MAX_DESTINATIONS), &[]).unwrap(), "as many as fit");
    assert!(loaded.maps.set_destinations(&addresses(MAX_DESTINATIONS + 1), &[]).unwrap(), "one too many");
    assert!(loaded.maps.captures_everything());
    assert!(!loaded.maps.set_destinations(&addresses(3), &[]).unwrap(), "few again");
    assert!(!loaded.maps.captures_everything());
}

#[test]
fn blocks_change_all_at_once_and_more_than_fit_mean_that_everything_is_captured() {
    let mut loaded = Loaded::new("blocks");
    let block = |n: u32| IpNet::new(Ipv4Addr::from(0x0a00_0000 + (n << 8)).into(), 24).unwrap();
    let blocks = |from: u32, count: u32| -> Vec<IpNet> { (from..from + count).map(block).collect() };
    assert!(!loaded.maps.set_destinations(&addresses(3), &blocks(0, MAX_BLOCKS)).unwrap(), "as many as fit");
    assert!(!loaded.maps.captures_everything());
    assert!(loaded.maps.set_destinations(&addresses(3), &blocks(0, MAX_BLOCKS + 1)).unwrap(), "one too many");
    assert!(loaded.maps.captures_everything());
    for from in [0, MAX_BLOCKS, 7] {
        assert!(!loaded.maps.set_destinations(&addresses(3), &blocks(from, MAX_BLOCKS)).unwrap(), "{from}");
        assert!(!loaded.maps.captures_everything());
    }
    assert!(!loaded.maps.set_destinations(&addresses(3), &[]).unwrap());
}

#[test]
fn a_guard_that_does_not_fit_is_an_error_and_not_forgotten() {
    let mut loaded = Loaded::new("guarded");
    for ifindex in 1..=MAX_WORKLOADS {
        loaded.maps.guard(ifindex, &[], [0; 6], true).unwrap();
    }
    assert!(loaded.maps.guard(MAX_WORKLOADS + 1, &[], [0; 6], true).is_err());
    loaded.maps.unguard(1);
    loaded.maps.guard(MAX_WORKLOADS + 1, &[], [0; 6], true).unwrap();
    assert_eq!(loaded.maps.guarded().len(), MAX_WORKLOADS as usize);
}

#[test]
fn a_map_says_how_full_it_is_before_it_is_full() {
    let mut loaded = Loaded::new("fill");
    let near = |maps: &Maps| -> Vec<&str> {
        maps.fills().iter().filter(|fill| fill.is_near()).map(|fill| fill.what).collect()
    };
    loaded.maps.set_destinations(&addresses(MAX_DESTINATIONS / 5 * 4 - 100), &[]).unwrap();
    for ifindex in 1..MAX_WORKLOADS / 5 * 4 {
        loaded.maps.guard(ifindex, &[], [0; 6], true).unwrap();
    }
    assert_eq!(near(&loaded.maps), Vec::<&str>::new());
    loaded.maps.set_destinations(&addresses(MAX_DESTINATIONS / 5 * 4 + 100), &[]).unwrap();
    assert_eq!(near(&loaded.maps), ["kernel_map_destinations"]);
    for ifindex in MAX_WORKLOADS / 5 * 4..=MAX_WORKLOADS / 5 * 4 + 4 {
        loaded.maps.guard(ifindex, &["10.0.0.1".parse().unwrap()], [0; 6], true).unwrap();
    }
    assert_eq!(near(&loaded.maps), ["kernel_map_destinations", "kernel_map_guarded"]);
    let sources = loaded.maps.fills().into_iter().find(|fill| fill.what == "kernel_map_sources").unwrap();
    assert_eq!((sources.entries, sources.limit), (5, u64::from(MAX_WORKLOADS) * 4));
}

#[test]
fn a_listener_is_led_to_for_as_long_as_it_lives() {
    let mut loaded = Loaded::new("listeners");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = "10.0.0.1".parse().unwrap();
    loaded.maps.set_listener(address, Direction::Inbound, &listener).unwrap();
    assert_eq!(loaded.maps.listeners(), 1);
    drop(listener);
    assert_eq!(loaded.maps.listeners(), 0, "the entry went with the socket");
}

#[test]
fn what_an_agent_left_in_the_maps_is_there_for_the_next() {
    let mut loaded = Loaded::new("pinned");
    loaded.maps.set_destinations(&addresses(5), &[]).unwrap();
    loaded.maps.guard(7, &[], [0; 6], true).unwrap();
    let mut next = Kernel::load(&loaded.bpffs).unwrap();
    let mut maps = Maps::new(next.bpf_mut(), 1).unwrap();
    assert_eq!(maps.guarded(), [7]);
    // Only the difference is written: what was captured never stops to be.
    assert!(!maps.set_destinations(&addresses(5), &[]).unwrap());
}

/// As when an agent is late to stand down: what it removes is in no map any more when its successor removes it.
#[test]
fn an_agent_has_its_own_way_whatever_another_wrote_since_it_looked() {
    let mut old = Loaded::new("both");
    old.maps.set_destinations(&addresses(5), &[]).unwrap();
    let mut kernel = Kernel::load(&old.bpffs).unwrap();
    let mut new = Maps::new(kernel.bpf_mut(), 2).unwrap();
    old.maps.set_destinations(&addresses(3), &[]).unwrap();
    assert_eq!(new.agent_cgroups(), [1, 0], "what the old one wrote last");
    new.set_destinations(&addresses(3), &[]).unwrap();
    assert_eq!(new.agent_cgroups(), [2, 1]);
}

#[test]
fn the_guard_knows_the_agents_cgroup_and_its_predecessors() {
    let loaded = Loaded::new("cgroups");
    assert_eq!(loaded.maps.agent_cgroups(), [1, 0]);
    let next = |cgroup| {
        let mut kernel = Kernel::load(&loaded.bpffs).unwrap();
        Maps::new(kernel.bpf_mut(), cgroup).unwrap().agent_cgroups()
    };
    assert_eq!(next(2), [2, 1]);
    assert_eq!(next(2), [2, 1], "a restart is no other agent");
    assert_eq!(next(3), [3, 2]);
}
