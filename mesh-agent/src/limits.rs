//! The limits of the data path: how long anything may take, how much of anything may be held.
//!
//! One struct, handed to every step as data, so that a limit is named once and tests can set it.

use std::time::Duration;

/// What a connection may take. `Default` is what the agent runs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A TLS handshake, with SETTINGS on the source's side and with the wait for the first byte on the
    /// destination's: 10 s, for a loaded peer on a long path. As long for an application's hello, where TLSRoutes go by it.
    pub handshake_timeout: Duration,
    /// From OPEN to ACCEPT or REFUSE: 10 s; more than [`Limits::dial_timeout`], which the destination's agent spends
    /// in between.
    pub open_timeout: Duration,
    /// A TCP connect, to a peer or to an application: 5 s.
    pub dial_timeout: Duration,
    /// How long a source keeps an idle tunnel: 30 s; less than the destination's, so that the source, which can do it
    /// without a race, is the one that closes.
    pub idle_at_source: Duration,
    /// How long a destination keeps an idle tunnel, also one with half an OPEN: 60 s.
    pub idle_at_destination: Duration,
    /// Age at which a tunnel is not leased again, so that renewed certificates and new roots come into use: 1 h.
    pub tunnel_age: Duration,
    /// How long the end of a lease may wait for the peer's last words: 1 s. After it the tunnel is given up.
    pub ready_wait: Duration,
    /// How long a permissive destination waits for the first byte of a source that is enrolled but not captured yet,
    /// before it takes the connection for plaintext in which the server speaks first: 300 ms.
    pub sniff: Duration,
    /// Idle tunnels that are kept ready for a (source, destination) in use: 2.
    pub spares: usize,
    /// Most idle tunnels of one (source, destination): 64.
    pub idle_per_key: usize,
    /// Most idle tunnels in all: 4096, and no more than a sixteenth of what the agent may open.
    pub idle_total: usize,
    /// Most connections of one workload at a time, both directions together: 20,000.
    pub max_connections_per_workload: usize,
    /// Most connections of the node at a time, in whatever state, that is two descriptors each: what the agent may open
    /// decides at its start. A workload has at most as many as are left for all others.
    pub connections_total: usize,
    /// Handshakes of one source with one workload that go on at once: 64, about 15 ms of work for two cores. More wait
    /// for their turn.
    pub handshakes_per_source: usize,
    /// Connections of one source to one workload that have not shown who they are, waiting ones included: 4096.
    pub arrivals_per_source: usize,
    /// Handshakes with one workload that go on at once: 1024, sixteen sources' worth.
    pub handshakes_per_workload: usize,
    /// Handshakes of the node, as the destination, that go on at once: 4096, at 40 KB each.
    pub handshakes_total: usize,
    /// Idle tunnels that one source may keep to one workload: 512, eight ports' worth of [`Limits::idle_per_key`].
    pub idle_per_source: usize,
    /// Most memory for what waits for readers who do not read, see [`crate::stalled`]: 256 MiB, 3196 buffers.
    pub stalled_memory: usize,
    /// How long a connection waits to be told whose an address is that the view does not know: 2 s, of which a round trip
    /// to the controller is a hundredth. While the controller has been away for longer, it does not wait.
    pub answer_wait: Duration,
    /// Endpoints of a service that are tried for one connection: 3.
    pub endpoint_attempts: usize,
    /// How long a connection of HTTP/1.1 to a backend may have been idle to be taken for a request that must not be made twice:
    /// 1 s. Servers end idle ones after 2 s (gunicorn), 5 s (Node.js, Apache) or later, and what is sent just then is lost.
    pub unsafe_after_idle: Duration,
    /// How long a connection of HTTP/1.1 to a backend is idle before a thread that has none takes it from the one that used it last,
    /// though it is woken by that: 100 ms. A server that serves one connection at a time would not see another.
    pub lent_after_idle: Duration,
    /// How long the rest of a short answer is waited for after its head, if its request may be made again: 100 ms. As a rule
    /// both come at once.
    pub short_answer: Duration,
}

impl Limits {
    /// The default limits for a process that may have this many descriptors: three quarters are for connections, two
    /// each; the rest is for idle tunnels, listeners, the controller and files.
    pub fn with_descriptors(descriptors: u64) -> Self {
        let count = |part: u64| usize::try_from(part).unwrap_or(usize::MAX);
        let all = Self::default();
        Self {
            connections_total: count(descriptors / 4 * 3 / 2),
            idle_total: all.idle_total.min(count(descriptors / 16)),
            ..all
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            open_timeout: Duration::from_secs(10),
            dial_timeout: Duration::from_secs(5),
            idle_at_source: Duration::from_secs(30),
            idle_at_destination: Duration::from_secs(60),
            tunnel_age: Duration::from_secs(3600),
            ready_wait: Duration::from_secs(1),
            sniff: Duration::from_millis(300),
            spares: 2,
            idle_per_key: 64,
            idle_total: 4096,
            max_connections_per_workload: 20_000,
            connections_total: 100_000,
            handshakes_per_source: 64,
            arrivals_per_source: 4096,
            handshakes_per_workload: 1024,
            handshakes_total: 4096,
            idle_per_source: 512,
            stalled_memory: 256 << 20,
            answer_wait: Duration::from_secs(2),
            endpoint_attempts: 3,
            unsafe_after_idle: Duration::from_secs(1),
            lent_after_idle: Duration::from_millis(100),
            short_answer: Duration::from_millis(100),
        }
    }
}
