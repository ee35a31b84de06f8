//! The connections that live now, as an operator wants to see them.
//!
//! Stands apart from [`crate::record`], which tells of each once, when it ends: here they are while they run. The
//! invariant: a connection is here exactly as long as its record's entry lives, and whoever looks holds up a connection
//! for no longer than copying what is known of it takes.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use mesh_core::{identity::SpiffeId, model::Name, route::Transport};
use serde::Serialize;
use time::OffsetDateTime;

use crate::metrics::{Direction, Flow};

/// Parts of the list, so that cores do not wait for each other.
const SHARDS: usize = 16;
/// Connections of an answer, unless it was asked for fewer or more.
pub const ANSWER: usize = 1000;
/// Most connections of an answer: about 5 MiB of JSON.
pub const MOST: usize = 10_000;

/// One end of a connection, as far as it is known.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Party {
    /// Whose address it is.
    pub workload: Option<Name>,
    /// What was asked for, if that was a service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    /// What it proved, or has to prove.
    pub identity: Option<Arc<SpiffeId>>,
    /// Its own.
    pub address: Option<SocketAddr>,
}

/// What became known of a connection so far.
#[derive(Debug, Default)]
pub struct Told {
    /// Who opened it.
    pub source: Party,
    /// Who was asked for.
    pub destination: Party,
    /// How it is carried, once that is decided.
    pub transport: Option<Transport>,
    /// Bytes can flow.
    pub open: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Live {
    /// Which way it goes.
    pub direction: Direction,
    /// The workload of this node.
    pub workload: Name,
    /// When it was captured.
    pub time: SystemTime,
    /// Its bytes.
    pub flow: Flow,
    told: Mutex<Told>,
}

impl Live {
    /// What is known. Not to be held for longer than it takes to look or to write.
    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All connections of the node.
#[derive(Debug, Default)]
pub struct Connections {
    shards: [Mutex<HashMap<u64, Arc<Live>>>; SHARDS],
    next: AtomicU64,
}

/// A connection's place among them.
#[derive(Debug)]
pub struct Registered {
    live: Arc<Live>,
    id: u64,
    all: Arc<Connections>,
}

impl std::ops::Deref for Registered {
    type Target = Live;
    fn deref(&self) -> &Live {
        &self.live
    }
}

impl Registered {
    /// The connection, for whoever counts its bytes elsewhere.
    pub fn shared(&self) -> Arc<Live> {
        self.live.clone()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.all.shard(self.id).remove(&self.id);
    }
}

/// `/api/v1/connections`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// How many there are of those that were asked for; more than `connections` if the answer was cut.
    pub total: usize,
    /// The newest first.
    pub connections: Vec<Row>,
}

/// One connection of an answer.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Which way it goes, seen from this node's workload.
    pub direction: Direction,
    /// `opening` until bytes can flow, then `open`.
    pub state: &'static str,
    /// Who opened it.
    pub source: Party,
    /// Who was asked for.
    pub destination: Party,
    /// `tunnel`, `plaintext`, or empty while that is not decided.
    pub transport: &'static str,
    /// When it was captured.
    #[serde(serialize_with = "time::serde::rfc3339::serialize")]
    pub since: OffsetDateTime,
    /// What its source sent.
    pub bytes_sent: u64,
    /// What its source received.
    pub bytes_received: u64,
}

impl Connections {
    /// A connection of this workload has arrived.
    pub fn begin(self: &Arc<Self>, direction: Direction, workload: &Name, flow: Flow) -> Registered {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let workload = workload.clone();
        let live =
            Arc::new(Live { direction, workload, time: SystemTime::now(), flow, told: Mutex::default() });
        self.shard(id).insert(id, live.clone());
        Registered { live, id, all: self.clone() }
    }

    /// The newest of them, at most `limit`; only those from or to this workload, if one is named.
    pub fn list(&self, workload: Option<&Name>, limit: usize) -> Answer {
        let concerns = |live: &Live| {
            workload.is_none_or(|name| {
                let told = live.told();
                let ends = [told.source.workload.as_ref(), told.destination.workload.as_ref()];
                live.workload == *name || ends.contains(&Some(name))
            })
        };
        let mut found: Vec<(u64, Arc<Live>)> = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            found.extend(shard.iter().map(|(id, live)| (*id, live.clone())));
        }
        found.retain(|(_, live)| concerns(live));
        found.sort_unstable_by_key(|(id, _)| std::cmp::Reverse(*id));
        let total = found.len();
        found.truncate(limit);
        Answer { total, connections: found.iter().map(|(_, live)| Row::of(live)).collect() }
    }

    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<Live>>> {
        // Truncation is what is meant: any part of the number spreads them.
        self.shards[id as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Row {
    fn of(live: &Live) -> Self {
        let (bytes_sent, bytes_received) = live.flow.totals();
        let told = live.told();
        Self {
            direction: live.direction,
            state: if told.open { "open" } else { "opening" },
            source: told.source.clone(),
            destination: told.destination.clone(),
            transport: transport_label(told.transport),
            since: live.time.into(),
            bytes_sent,
            bytes_received,
        }
    }
}

/// A transport, as metrics, access log and answers name it; empty while none is decided.
pub fn transport_label(transport: Option<Transport>) -> &'static str {
    match transport {
        Some(Transport::Tunnel) => "tunnel",
        Some(Transport::Plaintext) => "plaintext",
        None => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn begin(all: &Arc<Connections>, workload: &str) -> Registered {
        let (metrics, _) = Metrics::new();
        let flow = Flow::new(metrics.bytes(Direction::Outbound).clone());
        all.begin(Direction::Outbound, &workload.parse().unwrap(), flow)
    }

    #[test]
    fn a_connection_is_listed_as_it_is_now_and_for_as_long_as_it_lives() {
        let all = Arc::new(Connections::default());
        let one = begin(&all, "shop/web");
        let row = || all.list(None, 10).connections.remove(0);
        assert_eq!((row().state, row().transport, row().bytes_sent), ("opening", "", 0));
        one.told().transport = Some(Transport::Tunnel);
        one.told().open = true;
        one.flow.sent(3);
        assert_eq!((row().state, row().transport, row().bytes_sent), ("open", "tunnel", 3));
        drop(one);
        assert_eq!(all.list(None, 10), Answer { total: 0, connections: vec![] });
    }

    #[test]
    fn an_answer_is_cut_and_says_so_and_a_workload_is_at_either_end() {
        let all = Arc::new(Connections::default());
        let held: Vec<_> = (0..40).map(|_| begin(&all, "shop/web")).collect();
        let newest = begin(&all, "shop/api");
        newest.told().destination.workload = Some("shop/db".parse().unwrap());
        newest.told().destination.address = Some("10.0.2.2:80".parse().unwrap());
        let answer = all.list(None, 3);
        assert_eq!((answer.total, answer.connections.len()), (41, 3));
        assert_eq!(answer.connections[0].destination, newest.told().destination, "the newest first");
        for (name, total) in [("shop/web", 40), ("shop/api", 1), ("shop/db", 1), ("shop/nobody", 0)] {
            assert_eq!(all.list(Some(&name.parse().unwrap()), 10).total, total, "{name}");
        }
        drop(held);
        assert_eq!(all.list(None, 3).total, 1);
    }
}
