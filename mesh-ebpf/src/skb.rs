//! Contact with the packet and with sockets: every helper call of the programs that takes a pointer.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        __sk_buff, BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_tuple,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6,
    },
    helpers::{
        bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_redirect, bpf_sk_assign, bpf_sk_release,
        bpf_skb_cgroup_id, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes, bpf_skc_lookup_tcp,
    },
    macros::map,
    maps::{PerCpuArray, SockHash},
    programs::TcContext,
};
use mesh_ebpf::{
    abi::{Address, FourTuple, ListenerKey, Mac, ProbeKey},
    capture::Holder,
    guard::Frame,
    neighbour::{ADVERTISEMENT_LEN, ARP_LEN, Claim},
    packet::{
        ETH_LEN, IPPROTO_ICMPV6, Network, TCP_LEN, Tcp, Transport, V4_LEN, V6_LEN, hop_by_hop_carries_icmp,
    },
    reset,
};

const ETH_P_IP: u32 = 0x0800;
const ETH_P_ARP: u32 = 0x0806;
const ETH_P_IPV6: u32 = 0x86dd;
const PACKET_HOST: u32 = 0;
const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;
const DNS_PORT: u16 = 53;

/// The headers of an IP packet.
pub(crate) struct Packet {
    pub(crate) v6: bool,
    pub(crate) network: Network,
    /// All zero for everything but whole TCP packets. Not an `Option`: the compiler would copy the undefined bytes of
    /// a `None` out of whatever register is at hand, and the verifier refuses a program that spills part of a pointer.
    segment: Tcp,
    is_tcp: bool,
}

/// A 4-tuple for socket lookup: source and destination as in a packet that the socket would receive.
pub(crate) struct Tuple {
    v6: bool,
    source: Address,
    destination: Address,
    source_port: u16,
    destination_port: u16,
}

impl Packet {
    /// Reads the headers; `None` for what is not IP or too short for its own headers.
    ///
    /// Not inlined: its buffers would add to the stack of the program, of which there are 512 bytes with all callees.
    #[inline(never)]
    pub(crate) fn read(ctx: &TcContext) -> Option<Self> {
        let protocol = ethertype(ctx);
        let (v6, network) = if protocol == ETH_P_IP {
            (false, Network::v4(&load::<V4_LEN>(ctx, ETH_LEN)?)?)
        } else if protocol == ETH_P_IPV6 {
            (true, Network::v6(&load::<V6_LEN>(ctx, ETH_LEN)?)?)
        } else {
            return None;
        };
        let is_tcp = network.transport as u32 == Transport::Tcp as u32;
        let segment =
            if is_tcp { Tcp::parse(&load::<TCP_LEN>(ctx, ETH_LEN + network.header_len)?) } else { Tcp::NONE };
        Some(Self { v6, network, segment, is_tcp })
    }

    /// The TCP header of a whole TCP packet.
    #[inline(always)]
    pub(crate) fn tcp(&self) -> Option<&Tcp> {
        if self.is_tcp { Some(&self.segment) } else { None }
    }

    /// Source and destination port; 0 for all but TCP.
    #[inline(always)]
    pub(crate) fn ports(&self) -> (u16, u16) {
        (self.segment.source_port, self.segment.destination_port)
    }

    /// The socket that would receive this packet.
    #[inline(always)]
    pub(crate) fn tuple(&self) -> Tuple {
        let (source_port, destination_port) = self.ports();
        Tuple {
            v6: self.v6,
            source: self.network.source,
            destination: self.network.destination,
            source_port,
            destination_port,
        }
    }

    /// The socket that would have sent this packet.
    #[inline(always)]
    pub(crate) fn reverse_tuple(&self) -> Tuple {
        let (source_port, destination_port) = self.ports();
        Tuple {
            v6: self.v6,
            source: self.network.destination,
            destination: self.network.source,
            source_port: destination_port,
            destination_port: source_port,
        }
    }

    /// The 4-tuple of the connection that this packet opens.
    #[inline(always)]
    pub(crate) fn four_tuple(&self) -> FourTuple {
        let (source_port, destination_port) = self.ports();
        let Network { source, destination, .. } = self.network;
        FourTuple { source, destination, source_port, destination_port }
    }

    /// The probe that this packet, on its way to the pod, would belong to.
    #[inline(always)]
    pub(crate) fn probe_key_to_pod(&self) -> ProbeKey {
        let (node_port, pod_port) = self.ports();
        ProbeKey { node: self.network.source, pod: self.network.destination, node_port, pod_port }
    }

    /// The probe that this packet, coming from the pod, would belong to.
    #[inline(always)]
    pub(crate) fn probe_key_from_pod(&self) -> ProbeKey {
        let (pod_port, node_port) = self.ports();
        ProbeKey { node: self.network.destination, pod: self.network.source, node_port, pod_port }
    }

    /// Bytes of TCP data.
    #[inline(always)]
    pub(crate) fn data_len(&self, ctx: &TcContext) -> usize {
        match self.tcp() {
            Some(tcp) => reset::data_len(ctx.len() as usize, &self.network, tcp),
            None => 0,
        }
    }
}

/// The type of the frame, behind a VLAN tag.
#[inline(always)]
fn ethertype(ctx: &TcContext) -> u32 {
    u32::from(u16::from_be(skb_field(ctx, |skb| skb.protocol) as u16))
}

/// What a frame is whose IP headers could not be read.
#[inline(always)]
pub(crate) fn frame(ctx: &TcContext) -> Frame {
    match ethertype(ctx) {
        ETH_P_ARP => Frame::Arp,
        ETH_P_IP | ETH_P_IPV6 => Frame::BrokenIp,
        _ => Frame::Foreign,
    }
}

/// Whether the kernel has taken a VLAN tag off the frame.
#[inline(always)]
pub(crate) fn has_vlan_tag(ctx: &TcContext) -> bool {
    skb_field(ctx, |skb| skb.vlan_present) != 0
}

/// The hardware address of the sender, as the frame says it.
#[inline(always)]
pub(crate) fn source_mac(ctx: &TcContext) -> Mac {
    load::<6>(ctx, 6).unwrap_or([0; 6])
}

/// What the frame tells of who is where. Not inlined, for its buffers: see [`Packet::read`].
#[inline(never)]
pub(crate) fn claim(ctx: &TcContext) -> Claim {
    let protocol = ethertype(ctx);
    if protocol == ETH_P_ARP {
        return match load::<ARP_LEN>(ctx, ETH_LEN) {
            Some(arp) => Claim::of_arp(&arp),
            None => Claim::NOTHING,
        };
    }
    let next_header = load::<1>(ctx, ETH_LEN + 6).unwrap_or([0]);
    if protocol != ETH_P_IPV6 || next_header[0] != IPPROTO_ICMPV6 {
        return Claim::NOTHING;
    }
    let icmp_type = load::<1>(ctx, ETH_LEN + V6_LEN).unwrap_or([0]);
    if !Claim::has_target(icmp_type[0]) {
        return Claim::of_icmp(icmp_type[0]);
    }
    match load::<ADVERTISEMENT_LEN>(ctx, ETH_LEN + V6_LEN) {
        Some(message) => Claim::of_advertisement(&message),
        None => Claim::NOTHING,
    }
}

/// Who has this 4-tuple in the current namespace. A listener does not: a lookup of a foreign destination finds every
/// wildcard listener.
#[inline(always)]
pub(crate) fn holder(ctx: &TcContext, tuple: &Tuple) -> Holder {
    let Some(socket) = lookup(ctx, tuple) else { return Holder::Nobody };
    // SAFETY: the reference that the lookup took is held until the release.
    let state = unsafe { (*socket).state };
    release(socket);
    match state {
        TCP_LISTEN => Holder::Nobody,
        TCP_TIME_WAIT => Holder::TimeWait,
        _ => Holder::Connection,
    }
}

/// Hands the packet to the connection that it belongs to.
#[inline(always)]
pub(crate) fn assign_connected(ctx: &TcContext, tuple: &Tuple) -> bool {
    let Some(socket) = lookup(ctx, tuple) else { return false };
    // SAFETY: the reference that the lookup took is held until the release.
    let is_listener = unsafe { (*socket).state } == TCP_LISTEN;
    // SAFETY: context and socket are valid; the kernel takes a reference of its own.
    let assigned = !is_listener && unsafe { bpf_sk_assign(ctx.as_ptr(), socket.cast(), 0) } == 0;
    release(socket);
    assigned
}

/// Whether the agent has this listener.
#[inline(always)]
pub(crate) fn has_listener(listeners: &'static SockHash<ListenerKey>, key: &ListenerKey) -> bool {
    let Some(socket) = listener(listeners, key) else { return false };
    release(socket);
    true
}

/// Hands the packet, or the search for its listener, to a listener of the agent; fails when there is none, and for a
/// packet when it is of another namespace.
#[inline(always)]
pub(crate) fn assign_listener(
    ctx: &impl EbpfContext,
    listeners: &'static SockHash<ListenerKey>,
    key: &ListenerKey,
) -> bool {
    let Some(socket) = listener(listeners, key) else { return false };
    // SAFETY: context and socket are valid; the kernel takes a reference of its own.
    let assigned = unsafe { bpf_sk_assign(ctx.as_ptr(), socket.cast(), 0) } == 0;
    release(socket);
    assigned
}

/// The agent's listener, with a reference that has to be given back.
#[inline(always)]
fn listener(listeners: &'static SockHash<ListenerKey>, key: &ListenerKey) -> Option<*mut bpf_sock> {
    let map = core::ptr::from_ref(listeners).cast_mut().cast();
    // SAFETY: a map and a key of its key type; the kernel returns a referenced socket or null.
    let socket = unsafe { bpf_map_lookup_elem(map, core::ptr::from_ref(key).cast()) };
    (!socket.is_null()).then_some(socket.cast())
}

/// Gives a socket back.
#[inline(always)]
fn release(socket: *mut bpf_sock) {
    // SAFETY: gives back the one reference that a lookup took.
    unsafe { bpf_sk_release(socket.cast()) };
}

#[inline(always)]
fn lookup(ctx: &TcContext, tuple: &Tuple) -> Option<*mut bpf_sock> {
    // SAFETY: all-zero is a valid value of this plain union of structs.
    let mut raw: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let len = if tuple.v6 {
        raw.__bindgen_anon_1.ipv6 = Tuple6 {
            saddr: tuple.source.0,
            daddr: tuple.destination.0,
            sport: tuple.source_port.to_be(),
            dport: tuple.destination_port.to_be(),
        };
        size_of::<Tuple6>()
    } else {
        raw.__bindgen_anon_1.ipv4 = Tuple4 {
            saddr: tuple.source.0[3],
            daddr: tuple.destination.0[3],
            sport: tuple.source_port.to_be(),
            dport: tuple.destination_port.to_be(),
        };
        size_of::<Tuple4>()
    };
    // SAFETY: the tuple lives on the stack and is `len` bytes long; the result is a referenced socket or null.
    let socket = unsafe {
        bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut raw, len as u32, BPF_F_CURRENT_NETNS as i64 as u64, 0)
    };
    (!socket.is_null()).then_some(socket)
}

/// Where a RST is built: 512 bytes of stack are all that a program and its callees have. Per CPU, so no two packets
/// share it.
#[map]
static FRAME: PerCpuArray<[u8; reset::V6_FRAME]> = PerCpuArray::with_max_entries(1, 0);

/// Answers a TCP packet with a RST, sent back out of the interface that it came by.
#[inline(always)]
pub(crate) fn send_reset(ctx: &TcContext, packet: &Packet) -> Result<i32, ()> {
    let Some(tcp) = packet.tcp() else { return Err(()) };
    let frame = FRAME.get_ptr_mut(0).ok_or(())?;
    let data_len = packet.data_len(ctx);
    let eth = load::<ETH_LEN>(ctx, 0).ok_or(())?;
    let len = if packet.v6 {
        // SAFETY: this CPU's own buffer, and nothing else holds a reference to it while the program runs.
        reset::v6(&eth, &packet.network, tcp, data_len, unsafe { &mut *frame });
        reset::V6_FRAME
    } else {
        // SAFETY: as above; the shorter frame is a prefix of the buffer.
        reset::v4(&eth, &packet.network, tcp, data_len, unsafe { &mut *frame.cast() });
        reset::V4_FRAME
    };
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: the context is valid, and the buffer holds `len` bytes.
    let result = unsafe {
        bpf_skb_change_tail(skb, len as u32, 0) | bpf_skb_store_bytes(skb, 0, frame.cast(), len as u32, 0)
    };
    if result != 0 {
        return Err(());
    }
    // SAFETY: a helper without pointers.
    Ok(unsafe { bpf_redirect(ifindex(ctx), 0) } as i32)
}

/// Makes a redirected frame one for this host: its MAC address is the next hop's, and `lo` would drop it.
#[inline(always)]
pub(crate) fn accept_frame(ctx: &TcContext) -> Result<(), ()> {
    ctx.change_type(PACKET_HOST).map_err(|_| ())
}

/// Whether one of the ports of a UDP packet is that of DNS.
#[inline(always)]
pub(crate) fn udp_port_is_dns(ctx: &TcContext, packet: &Packet) -> bool {
    let Some(ports) = load::<4>(ctx, ETH_LEN + packet.network.header_len) else { return false };
    u16::from_be_bytes([ports[0], ports[1]]) == DNS_PORT
        || u16::from_be_bytes([ports[2], ports[3]]) == DNS_PORT
}

/// Whether IPv6 hop-by-hop options are followed by ICMPv6.
#[inline(always)]
pub(crate) fn hop_by_hop_is_icmp(ctx: &TcContext) -> bool {
    load::<1>(ctx, ETH_LEN + V6_LEN).is_some_and(|next| hop_by_hop_carries_icmp(next[0]))
}

#[inline(always)]
fn load<const N: usize>(ctx: &TcContext, offset: usize) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: `bytes` is `N` bytes long; the kernel checks the offset against the packet.
    let result =
        unsafe { bpf_skb_load_bytes(ctx.as_ptr(), offset as u32, bytes.as_mut_ptr().cast(), N as u32) };
    (result == 0).then_some(bytes)
}

#[inline(always)]
fn skb_field<T>(ctx: &TcContext, field: impl FnOnce(&__sk_buff) -> T) -> T {
    // SAFETY: the context of a classifier is a `__sk_buff`, valid for the program's run.
    field(unsafe { &*ctx.as_ptr().cast::<__sk_buff>() })
}

/// `skb->mark`.
#[inline(always)]
pub(crate) fn mark(ctx: &TcContext) -> u32 {
    skb_field(ctx, |skb| skb.mark)
}

/// The index of the interface that the packet is at.
#[inline(always)]
pub(crate) fn ifindex(ctx: &TcContext) -> u32 {
    skb_field(ctx, |skb| skb.ifindex)
}

/// The cgroup2 directory of the packet's socket; 0 without one. A request socket counts as its listener.
#[inline(always)]
pub(crate) fn cgroup_id(ctx: &TcContext) -> u64 {
    // SAFETY: the context is valid.
    unsafe { bpf_skb_cgroup_id(ctx.as_ptr().cast()) }
}

/// The monotonic clock, ns.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// An address as the log prints it.
#[inline(always)]
pub(crate) fn octets(address: &Address) -> [u8; 16] {
    // SAFETY: four words are sixteen bytes, and every pattern of them is valid.
    unsafe { core::mem::transmute(address.0) }
}
