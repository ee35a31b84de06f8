//! What the agent writes into the kernel programs' maps, and the counters it reads from them.

use std::{
    collections::{HashMap as StdMap, HashSet},
    net::IpAddr,
    os::fd::AsRawFd,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, SockHash, lpm_trie::Key},
};
use mesh_core::model::IpNet;
use mesh_ebpf::abi::{
    Address, Config, Direction, FLAG_CAPTURE_ALL, FLAG_STRICT, Guarded, KernelReason, ListenerKey,
    MAX_BLOCKS, MAX_DESTINATIONS, MAX_LISTENERS, MAX_PROBES, MAX_WORKLOADS, Mac, ProbeKey, SourceKey,
};

use crate::health::Fill;

/// More destinations than fit are captured all the same, with every other one, see [`Maps::set_destinations`].
const SPLIT_MESH: &str =
    "every connection, also to what is outside of the mesh, is captured beyond it; split the mesh";
const SPLIT_NODE: &str = "workloads are not enrolled beyond it; put some on other nodes";

/// The maps.
pub struct Maps {
    destinations: HashMap<MapData, Address, u32>,
    blocks: LpmTrie<MapData, Address, u32>,
    listeners: SockHash<MapData, ListenerKey>,
    guarded: HashMap<MapData, u32, Guarded>,
    sources: HashMap<MapData, SourceKey, u32>,
    probes: HashMap<MapData, ProbeKey, u32>,
    config: Array<MapData, Config>,
    refused: PerCpuArray<MapData, u64>,
    agent_cgroups: [u64; 2],
    /// What is in `destinations`.
    captured: HashSet<IpAddr>,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").field("captured", &self.captured.len()).finish_non_exhaustive()
    }
}

impl Maps {
    /// Takes the maps out of the loaded object and puts the agent's cgroup in force, beside that of a predecessor. For the
    /// node's owner: what is in them is remembered, and another agent that writes would not be seen.
    pub fn new(bpf: &mut Ebpf, agent_cgroup: u64) -> anyhow::Result<Self> {
        let mut take =
            |name: &str| bpf.take_map(name).ok_or_else(|| anyhow::anyhow!("the object has no map {name}"));
        let destinations: HashMap<MapData, Address, u32> = take("DESTINATIONS")?.try_into()?;
        let captured = destinations.keys().filter_map(Result::ok).map(ip_of).collect();
        let mut maps = Self {
            destinations,
            blocks: take("BLOCKS")?.try_into()?,
            listeners: take("LISTENERS")?.try_into()?,
            guarded: take("GUARDED")?.try_into()?,
            sources: take("SOURCES")?.try_into()?,
            probes: take("PROBES")?.try_into()?,
            config: take("CONFIG")?.try_into()?,
            refused: take("REFUSED")?.try_into()?,
            agent_cgroups: [agent_cgroup, 0],
            captured,
        };
        let before = maps.config.get(&0, 0)?;
        // The connections of a predecessor go on, in its own cgroup.
        let [last, older] = before.agent_cgroups;
        maps.agent_cgroups[1] = if last == agent_cgroup { older } else { last };
        // Until the first view is here, what an earlier agent had captured stays captured.
        maps.set_flags(before.flags)?;
        Ok(maps)
    }

    fn set_flags(&mut self, flags: u32) -> Result<(), MapError> {
        self.config.set(0, &Config { agent_cgroups: self.agent_cgroups, flags, reserved: 0 }, 0)
    }

    /// Makes these the captured destinations, and besides all that is in these blocks. If they are more than the maps
    /// hold, everything is captured, so that nothing leaves as plaintext for want of room; returns whether that is so.
    pub fn set_destinations(&mut self, wanted: &HashSet<IpAddr>, blocks: &[IpNet]) -> Result<bool, MapError> {
        let overflow = wanted.len() > MAX_DESTINATIONS as usize || blocks.len() > MAX_BLOCKS as usize;
        if overflow {
            self.set_flags(FLAG_CAPTURE_ALL)?;
        }
        // What comes first, what goes last: an address in one and in the other is captured at any time.
        let fit: &[IpNet] = if blocks.len() > MAX_BLOCKS as usize { &[] } else { blocks };
        let keys: HashSet<(u32, Address)> = fit.iter().map(block_key).collect();
        let old = self.blocks.keys().map(|key| key.map(|key| (key.prefix_len(), key.data())));
        let old: HashSet<(u32, Address)> = old.collect::<Result<_, _>>()?;
        if keys.len() + old.difference(&keys).count() > MAX_BLOCKS as usize {
            self.set_flags(FLAG_CAPTURE_ALL)?;
            self.remove_blocks(old.difference(&keys))?;
        }
        for (length, address) in keys.difference(&old) {
            self.blocks.insert(&Key::new(*length, *address), &1, 0)?;
        }
        self.set_addresses(wanted)?;
        let gone: Vec<(u32, Address)> = old.difference(&keys).copied().collect();
        self.remove_blocks(&gone)?;
        if !overflow {
            self.set_flags(0)?;
        }
        Ok(overflow)
    }

    fn remove_blocks<'a>(
        &mut self,
        gone: impl IntoIterator<Item = &'a (u32, Address)>,
    ) -> Result<(), MapError> {
        gone.into_iter()
            .try_for_each(|(length, address)| entry_gone_or(self.blocks.remove(&Key::new(*length, *address))))
    }

    fn set_addresses(&mut self, wanted: &HashSet<IpAddr>) -> Result<(), MapError> {
        for gone in self.captured.difference(wanted).copied().collect::<Vec<_>>() {
            entry_gone_or(self.destinations.remove(&Address::from_ip(gone)))?;
            self.captured.remove(&gone);
        }
        let new: Vec<IpAddr> = wanted.difference(&self.captured).copied().collect();
        let room = MAX_DESTINATIONS as usize - self.captured.len();
        for address in new.into_iter().take(room) {
            self.destinations.insert(&Address::from_ip(address), &1, 0)?;
            self.captured.insert(address);
        }
        Ok(())
    }

    /// Whether every destination is captured, known or not.
    pub fn captures_everything(&self) -> bool {
        // A map that cannot be read is taken for the safer case.
        self.config.get(&0, 0).map_or(true, |config| config.flags & FLAG_CAPTURE_ALL != 0)
    }

    /// How many listeners the kernel programs can lead to.
    pub fn listeners(&self) -> usize {
        self.listeners.keys().filter_map(Result::ok).count()
    }

    /// Puts a listener in force for an address of a workload.
    pub fn set_listener(
        &mut self,
        address: IpAddr,
        direction: Direction,
        listener: &impl AsRawFd,
    ) -> Result<(), MapError> {
        let key = ListenerKey { address: Address::from_ip(address), direction: direction as u32 };
        self.listeners.insert(&key, listener.as_raw_fd(), 0)
    }

    /// Takes an address's listeners out of force.
    pub fn remove_listeners(&mut self, address: IpAddr) {
        for direction in [Direction::Outbound, Direction::Inbound] {
            let key = ListenerKey { address: Address::from_ip(address), direction: direction as u32 };
            // Gone already if the socket was closed; that is what is wanted.
            let _ = self.listeners.remove(&key);
        }
    }

    /// Puts the guard of a veth in force. `mac`: the only hardware address that may send; all zero for any.
    pub fn guard(
        &mut self,
        ifindex: u32,
        addresses: &[IpAddr],
        mac: Mac,
        strict: bool,
    ) -> Result<(), MapError> {
        for address in addresses {
            let key = SourceKey { ifindex, address: Address::from_ip(*address) };
            self.sources.insert(&key, &1, 0)?;
        }
        let flags = if strict { FLAG_STRICT } else { 0 };
        self.guarded.insert(&ifindex, &Guarded { flags, mac, reserved: [0; 2] }, 0)
    }

    /// The addresses that a veth may send from.
    pub fn sources(&self, ifindex: u32) -> Vec<IpAddr> {
        let all = self.sources.keys().filter_map(Result::ok);
        all.filter(|key| key.ifindex == ifindex).map(|key| ip_of(key.address)).collect()
    }

    /// The cgroups by which the guard knows the agent and its predecessor; 0 for none.
    pub fn agent_cgroups(&self) -> [u64; 2] {
        self.config.get(&0, 0).map_or([0; 2], |config| config.agent_cgroups)
    }

    /// Takes the guard of a veth out of force.
    pub fn unguard(&mut self, ifindex: u32) {
        // Missing entries are what is wanted.
        let _ = self.guarded.remove(&ifindex);
        let of_veth: Vec<SourceKey> =
            self.sources.keys().filter_map(Result::ok).filter(|key| key.ifindex == ifindex).collect();
        for key in of_veth {
            let _ = self.sources.remove(&key);
        }
    }

    /// Veths that have a guard in force.
    pub fn guarded(&self) -> Vec<u32> {
        self.guarded.keys().filter_map(Result::ok).collect()
    }

    /// How full the maps are.
    pub fn fills(&self) -> Vec<Fill> {
        let fill = |what, entries: usize, limit, cure| Fill {
            what,
            entries: entries as u64,
            limit: u64::from(limit),
            cure,
        };
        let probes = self.probes.keys().filter_map(Result::ok).count();
        let sources = self.sources.keys().filter_map(Result::ok).count();
        vec![
            fill("kernel_map_destinations", self.captured.len(), MAX_DESTINATIONS, SPLIT_MESH),
            fill("kernel_map_guarded", self.guarded().len(), MAX_WORKLOADS, SPLIT_NODE),
            fill("kernel_map_sources", sources, MAX_WORKLOADS * 4, SPLIT_NODE),
            fill("kernel_map_listeners", self.listeners(), MAX_LISTENERS, SPLIT_NODE),
            // The least recently used goes when it is full, and is entered again when it is needed: no cure is.
            fill("kernel_map_probes", probes, MAX_PROBES, ""),
        ]
    }

    /// Refusals by reason since the maps were made, over all CPUs.
    pub fn refused(&self) -> StdMap<KernelReason, u64> {
        let count = |reason: KernelReason| {
            let values = self.refused.get(&(reason as u32), 0);
            values.map_or(0, |values| values.iter().sum())
        };
        KernelReason::ALL.iter().map(|reason| (*reason, count(*reason))).collect()
    }
}

/// The result of a removal: an entry that is gone already, by another agent's doing, is what is wanted.
fn entry_gone_or(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// A block as a key: IPv4 as in [`Address`], behind 96 bits.
fn block_key(block: &IpNet) -> (u32, Address) {
    let length = u32::from(block.prefix_len()) + if block.addr().is_ipv4() { 96 } else { 0 };
    (length, Address::from_ip(block.network()))
}

fn ip_of(address: Address) -> IpAddr {
    let mut bytes = [0; 16];
    for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(address.0) {
        *chunk = word.to_ne_bytes();
    }
    let v6 = std::net::Ipv6Addr::from(bytes);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}
