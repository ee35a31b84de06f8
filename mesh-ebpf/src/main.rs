//! The kernel programs: glue around the decisions of the library.
//!
//! | program | hook | what |
//! |---|---|---|
//! | `capture_outbound` | TCX egress of the pod's end | connections of applications turn off to `lo` |
//! | `deliver` | TCX ingress of the pod's `lo` | hands them to the agent's socket |
//! | `capture_inbound` | TCX ingress of the pod's end | hands incoming connections to the agent's listener |
//! | `find_listener` | socket lookup in the pod | the same for those that use a 4-tuple again that is in TIME_WAIT |
//! | `guard_from_pod` | TCX ingress of the node's end | refuses what is not the agent's |
//! | `guard_to_pod` | TCX egress of the node's end | recognises the node's own connections |
//! | `hold_new` | TCX ingress of the node's end | keeps what a pod sends before it is known |
//!
//! Maps are pinned: they and the programs outlive the agent. Each says its size, its eviction, and what happens when
//! it is full.
#![no_std]
#![no_main]

mod lookup;
mod skb;

use aya_ebpf::{
    bindings::{
        BPF_F_INGRESS, TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::bpf_redirect,
    macros::{classifier, map, sk_lookup},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SockHash, lpm_trie::Key},
    programs::{SkLookupContext, TcContext},
};
use aya_log_ebpf::warn;
use mesh_ebpf::{
    abi::{
        AGENT_MARK, Address, CAPTURED_MARK, Config, Direction, FLAG_CAPTURE_ALL, FourTuple, Guarded,
        KERNEL_REASONS, KernelReason, ListenerKey, MARK_MASK, MAX_BLOCKS, MAX_DESTINATIONS, MAX_LISTENERS,
        MAX_PROBES, MAX_REOPENED, MAX_WORKLOADS, ProbeKey, SourceKey,
    },
    capture::{self, Holder},
    guard,
    neighbour::Claim,
    packet::{Network, Tcp, Transport},
};
use skb::Packet;

/// Addresses whose connections are captured. Written by the agent, never evicted; when it is full the agent sets
/// `FLAG_CAPTURE_ALL`.
#[map]
static DESTINATIONS: HashMap<Address, u32> = HashMap::pinned(MAX_DESTINATIONS, 0);

/// Blocks of addresses whose connections are captured, known or not: where the agent knows a part of the mesh only, all
/// of it is in these. Written by the agent, which has no more of them than fit.
#[map]
static BLOCKS: LpmTrie<Address, u32> = LpmTrie::pinned(MAX_BLOCKS, 0);

/// The agent's listeners. Entries vanish with their sockets; when it is full the agent enrols no further workload.
#[map]
static LISTENERS: SockHash<ListenerKey> = SockHash::pinned(MAX_LISTENERS, 0);

/// Veths of enrolled workloads, by the index of the node's end. Written by the agent; when it is full no further
/// workload is enrolled.
#[map]
static GUARDED: HashMap<u32, Guarded> = HashMap::pinned(MAX_WORKLOADS, 0);

/// Addresses that a veth may send from. Written by the agent, at most four a workload.
#[map]
static SOURCES: HashMap<SourceKey, u32> = HashMap::pinned(MAX_WORKLOADS * 4, 0);

/// Connections that the node itself opened to workloads. Least recently used evicted; an evicted probe's connection is
/// recognised by the node's socket at its other end.
#[map]
static PROBES: LruHashMap<ProbeKey, u32> = LruHashMap::pinned(MAX_PROBES, 0);

/// 4-tuples that a connection uses again, from capture to `find_listener`, microseconds later on the same CPU. Least
/// recently used evicted: entries stay only of packets that the kernel took for old ones.
#[map]
static REOPENED: LruHashMap<FourTuple, u32> = LruHashMap::pinned(MAX_REOPENED, 0);

/// Veths of pods that are not known yet, by the index of the node's end, and until when they are held, in ns of the
/// monotonic clock. Written by the agent; when it is full, further ones are not held, and the agent says so.
#[map]
static HELD: HashMap<u32, u64> = HashMap::pinned(MAX_WORKLOADS, 0);

/// The agent's settings: one entry.
#[map]
static CONFIG: Array<Config> = Array::pinned(1, 0);

/// Refusals, by reason: fixed size, counts wrap after 2^64.
#[map]
static REFUSED: PerCpuArray<u64> = PerCpuArray::pinned(KERNEL_REASONS, 0);

/// When each reason was last logged, in ns of the monotonic clock, per CPU.
#[map]
static LOGGED: PerCpuArray<u64> = PerCpuArray::with_max_entries(KERNEL_REASONS, 0);

/// Least time between two log lines of one reason on one CPU, ns.
const LOG_INTERVAL_NS: u64 = 100_000_000;
/// The index of `lo`, the same in every namespace (`LOOPBACK_IFINDEX` in the kernel).
const LO: u32 = 1;

#[classifier]
fn capture_outbound(ctx: TcContext) -> i32 {
    if skb::mark(&ctx) & MARK_MASK == AGENT_MARK {
        return TC_ACT_UNSPEC;
    }
    let Some(packet) = Packet::read(&ctx) else { return TC_ACT_UNSPEC };
    let facts = PodFacts { ctx: &ctx, packet: &packet, direction: Direction::Outbound };
    match capture::outbound(packet.tcp(), &facts) {
        capture::Outbound::Pass => TC_ACT_UNSPEC,
        capture::Outbound::ToAgent => {
            ctx.set_mark(CAPTURED_MARK);
            // SAFETY: a helper without pointers.
            unsafe { bpf_redirect(LO, BPF_F_INGRESS as u64) as i32 }
        }
    }
}

#[classifier]
fn deliver(ctx: TcContext) -> i32 {
    if skb::mark(&ctx) & MARK_MASK != CAPTURED_MARK {
        return TC_ACT_UNSPEC;
    }
    let Some(packet) = Packet::read(&ctx) else { return TC_ACT_SHOT };
    let Some(tcp) = packet.tcp() else { return TC_ACT_SHOT };
    if skb::accept_frame(&ctx).is_err() {
        return TC_ACT_SHOT;
    }
    let tuple = packet.tuple();
    let holder = if tcp.opens() { skb::holder(&ctx, &tuple) } else { Holder::Connection };
    let delivered = match holder {
        Holder::Connection => skb::assign_connected(&ctx, &tuple),
        Holder::TimeWait => reopen(&packet, Direction::Outbound),
        Holder::Nobody => {
            let key = ListenerKey { address: packet.network.source, direction: Direction::Outbound as u32 };
            skb::assign_listener(&ctx, &LISTENERS, &key)
        }
    };
    if delivered { TC_ACT_OK } else { TC_ACT_SHOT }
}

#[classifier]
fn capture_inbound(ctx: TcContext) -> i32 {
    let Some(packet) = Packet::read(&ctx) else { return TC_ACT_UNSPEC };
    let facts = PodFacts { ctx: &ctx, packet: &packet, direction: Direction::Inbound };
    match capture::inbound(&packet.network, packet.tcp(), &facts) {
        capture::Inbound::Pass => TC_ACT_UNSPEC,
        capture::Inbound::ToAgent => {
            let key = facts.listener_key();
            if skb::assign_listener(&ctx, &LISTENERS, &key) { TC_ACT_OK } else { TC_ACT_SHOT }
        }
        capture::Inbound::ToAgentAgain => {
            if reopen(&packet, Direction::Inbound) {
                TC_ACT_OK
            } else {
                TC_ACT_SHOT
            }
        }
        capture::Inbound::Reset(reason) => reset(&ctx, &packet, reason),
        capture::Inbound::Drop(reason) => drop(&ctx, &packet, reason),
    }
}

/// Leaves a packet that opens a connection to the socket in TIME_WAIT that has its 4-tuple: the kernel decides whether
/// it is new, ends that socket then, and looks for a listener (`tcp_v4_rcv`, TCP_TW_SYN). A listener that was assigned
/// to it would find its 4-tuple taken, and the packet would be lost in silence (`inet_ehash_insert`).
#[inline(always)]
fn reopen(packet: &Packet, direction: Direction) -> bool {
    REOPENED.insert(&packet.four_tuple(), &(direction as u32), 0).is_ok()
}

/// Finds the agent's listener for what [`reopen`] let pass, and has no opinion on anything else.
#[sk_lookup]
fn find_listener(ctx: SkLookupContext) -> u32 {
    let Some(tuple) = lookup::four_tuple(&ctx) else { return SK_PASS };
    // SAFETY: only this program reads it, before it is removed; the value is copied.
    let Some(direction) = (unsafe { REOPENED.get(&tuple) }).copied() else { return SK_PASS };
    // An entry that is gone already is what removal wants.
    let _ = REOPENED.remove(&tuple);
    let outbound = direction == Direction::Outbound as u32;
    let address = if outbound { tuple.source } else { tuple.destination };
    if skb::assign_listener(&ctx, &LISTENERS, &ListenerKey { address, direction }) {
        SK_PASS
    } else {
        SK_DROP
    }
}

#[classifier]
fn guard_from_pod(ctx: TcContext) -> i32 {
    let Some(workload) = guarded(&ctx) else { return TC_ACT_UNSPEC };
    let claim = skb::claim(&ctx);
    let owned = |claim: &Claim| may_send_from(&ctx, claim.address);
    if let guard::Verdict::Drop(reason) = guard::claim(*workload, &skb::source_mac(&ctx), claim, owned) {
        return drop_frame(&ctx, reason);
    }
    if let guard::Verdict::Drop(reason) = tagged(&ctx, workload) {
        return drop_frame(&ctx, reason);
    }
    let Some(packet) = Packet::read(&ctx) else { return unread(&ctx, workload) };
    let facts = NodeFacts { ctx: &ctx, packet: &packet, peer: packet.network.destination };
    let data_len = packet.data_len(&ctx);
    match guard::from_pod(*workload, &packet.network, packet.tcp(), data_len, &facts) {
        guard::Verdict::Pass => TC_ACT_UNSPEC,
        guard::Verdict::Reset(reason) => reset(&ctx, &packet, reason),
        guard::Verdict::Drop(reason) => drop(&ctx, &packet, reason),
    }
}

#[classifier]
fn guard_to_pod(ctx: TcContext) -> i32 {
    let Some(workload) = guarded(&ctx) else { return TC_ACT_UNSPEC };
    let Some(packet) = Packet::read(&ctx) else { return unread(&ctx, workload) };
    if packet.tcp().is_some_and(Tcp::opens) {
        recognise_probe(&ctx, &packet);
    }
    let facts = NodeFacts { ctx: &ctx, packet: &packet, peer: packet.network.source };
    match guard::to_pod(*workload, &packet.network, &facts) {
        guard::Verdict::Pass => TC_ACT_UNSPEC,
        guard::Verdict::Reset(reason) | guard::Verdict::Drop(reason) => drop(&ctx, &packet, reason),
    }
}

#[classifier]
fn hold_new(ctx: TcContext) -> i32 {
    // SAFETY: the agent replaces entries whole; the value is copied.
    let Some(until) = (unsafe { HELD.get(&skb::ifindex(&ctx)) }).copied() else { return TC_ACT_UNSPEC };
    if skb::now_ns() >= until {
        return TC_ACT_UNSPEC;
    }
    let passes = match Packet::read(&ctx) {
        Some(packet) => {
            let facts = NodeFacts { ctx: &ctx, packet: &packet, peer: packet.network.destination };
            guard::passes_a_hold(&packet.network, &facts)
        }
        None => matches!(skb::frame(&ctx), guard::Frame::Arp),
    };
    if passes { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

/// Remembers a connection that a socket of the node's own namespace opens, and forgets any other with its 4-tuple.
/// By the socket, not by an address: what another pod or host sends has no socket here.
fn recognise_probe(ctx: &TcContext, packet: &Packet) {
    let key = packet.probe_key_to_pod();
    // The results are of no interest: a full LRU map evicts, and a missing entry is what removal wants.
    if skb::holder(ctx, &packet.reverse_tuple()) != Holder::Nobody {
        let _ = PROBES.insert(&key, &1, 0);
    } else {
        let _ = PROBES.remove(&key);
    }
}

/// By reference: of a copied `Option` the verifier would see undefined bytes.
fn guarded(ctx: &TcContext) -> Option<&'static Guarded> {
    // SAFETY: the agent replaces entries whole; one that is replaced while it is read gives the old word or the new.
    unsafe { GUARDED.get(&skb::ifindex(ctx)) }
}

/// A VLAN tag that the kernel has taken off the frame; on a bridge it would be put on again behind us.
fn tagged(ctx: &TcContext, workload: &Guarded) -> guard::Verdict {
    if skb::has_vlan_tag(ctx) {
        guard::not_ip(*workload, guard::Frame::Foreign)
    } else {
        guard::Verdict::Pass
    }
}

/// Decides a frame whose IP headers could not be read.
fn unread(ctx: &TcContext, workload: &Guarded) -> i32 {
    match guard::not_ip(*workload, skb::frame(ctx)) {
        guard::Verdict::Drop(reason) => drop_frame(ctx, reason),
        guard::Verdict::Pass | guard::Verdict::Reset(_) => TC_ACT_UNSPEC,
    }
}

fn may_send_from(ctx: &TcContext, address: Address) -> bool {
    let key = SourceKey { ifindex: skb::ifindex(ctx), address };
    // SAFETY: only whether there is a value matters.
    unsafe { SOURCES.get(&key) }.is_some()
}

fn captured(address: &Address) -> bool {
    // SAFETY: only whether there is a value matters.
    unsafe { DESTINATIONS.get(address) }.is_some()
        || BLOCKS.get(&Key::new(128, *address)).is_some()
        || CONFIG.get(0).is_some_and(|config| config.flags & FLAG_CAPTURE_ALL != 0)
}

fn is_probe(key: &ProbeKey) -> bool {
    // SAFETY: only whether there is a value matters.
    unsafe { PROBES.get(key) }.is_some()
}

/// What the pod's end can know.
struct PodFacts<'a> {
    ctx: &'a TcContext,
    packet: &'a Packet,
    direction: Direction,
}

impl PodFacts<'_> {
    #[inline(always)]
    fn listener_key(&self) -> ListenerKey {
        let address = match self.direction {
            Direction::Outbound => self.packet.network.source,
            Direction::Inbound => self.packet.network.destination,
        };
        ListenerKey { address, direction: self.direction as u32 }
    }
}

impl capture::Facts for PodFacts<'_> {
    #[inline(always)]
    fn destination_captured(&self) -> bool {
        captured(&self.packet.network.destination)
    }
    #[inline(always)]
    fn listener_ready(&self) -> bool {
        skb::has_listener(&LISTENERS, &self.listener_key())
    }
    #[inline(always)]
    fn holder(&self) -> Holder {
        skb::holder(self.ctx, &self.packet.tuple())
    }
    #[inline(always)]
    fn probe(&self) -> bool {
        is_probe(&self.packet.probe_key_to_pod())
    }
}

/// What the node's end can know.
struct NodeFacts<'a> {
    ctx: &'a TcContext,
    packet: &'a Packet,
    /// The address that is not the workload's.
    peer: Address,
}

impl guard::Facts for NodeFacts<'_> {
    #[inline(always)]
    fn source_owned(&self) -> bool {
        may_send_from(self.ctx, self.packet.network.source)
    }
    #[inline(always)]
    fn is_agents(&self) -> bool {
        let cgroup = skb::cgroup_id(self.ctx);
        cgroup != 0
            && CONFIG
                .get(0)
                .is_some_and(|config| config.agent_cgroups[0] == cgroup || config.agent_cgroups[1] == cgroup)
    }
    #[inline(always)]
    fn peer_captured(&self) -> bool {
        captured(&self.peer)
    }
    #[inline(always)]
    fn probe(&self) -> bool {
        // An entry may have been evicted by thousands of others; the node's socket is still there.
        is_probe(&self.packet.probe_key_from_pod())
            || skb::holder(self.ctx, &self.packet.tuple()) != Holder::Nobody
    }
    #[inline(always)]
    fn dns(&self) -> bool {
        self.packet.network.transport as u32 == Transport::Udp as u32
            && skb::udp_port_is_dns(self.ctx, self.packet)
    }
    #[inline(always)]
    fn hop_by_hop_icmp(&self) -> bool {
        skb::hop_by_hop_is_icmp(self.ctx)
    }
}

fn reset(ctx: &TcContext, packet: &Packet, reason: KernelReason) -> i32 {
    record(ctx, packet, reason);
    match skb::send_reset(ctx, packet) {
        Ok(action) => action,
        Err(()) => TC_ACT_SHOT,
    }
}

fn drop(ctx: &TcContext, packet: &Packet, reason: KernelReason) -> i32 {
    record(ctx, packet, reason);
    TC_ACT_SHOT
}

/// Drops a frame that is no IP packet, or is refused before that is looked at.
#[inline(never)]
fn drop_frame(ctx: &TcContext, reason: KernelReason) -> i32 {
    if count(reason) {
        warn!(ctx, "kernel refused: reason {} ifindex {}", reason as u32, skb::ifindex(ctx));
    }
    TC_ACT_SHOT
}

/// Counts a refusal; whether it is to be logged: not when this reason was just logged on this CPU.
#[inline(always)]
fn count(reason: KernelReason) -> bool {
    let index = reason as u32;
    if let Some(count) = REFUSED.get_ptr_mut(index) {
        // SAFETY: a per-CPU value; nothing else writes it while this program runs on this CPU.
        unsafe { *count += 1 };
    }
    let Some(last) = LOGGED.get_ptr_mut(index) else { return false };
    let now = skb::now_ns();
    // SAFETY: as above.
    let due = unsafe { now - *last } >= LOG_INTERVAL_NS;
    if due {
        // SAFETY: as above.
        unsafe { *last = now };
    }
    due
}

/// Counts and logs the refusal of a packet.
#[inline(never)]
fn record(ctx: &TcContext, packet: &Packet, reason: KernelReason) -> i32 {
    let index = reason as u32;
    if !count(reason) {
        return 0;
    }
    let (source_port, destination_port) = packet.ports();
    let network: &Network = &packet.network;
    warn!(
        ctx,
        "kernel refused: reason {} ifindex {} {:i}:{} -> {:i}:{}",
        index,
        skb::ifindex(ctx),
        skb::octets(&network.source),
        source_port,
        skb::octets(&network.destination),
        destination_port
    );
    0
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The licence under which the kernel lets programs call its GPL-only helpers. The source is Apache-2.0 as well.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
