//! How much memory readers who do not read may hold: what was read for one of them and cannot be passed on is in a
//! buffer of the agent's, and TCP can wait for ever.
//!
//! Stands apart from the pool of buffers, which lends to everybody: what counts is who keeps. A direction takes a share
//! when a write finds no room and gives it back when the bytes are gone, so whoever reads never has one for long.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use crate::quota::{Quota, Share};

/// A buffer that waits, counted as long as this lives. Boxed, as few connections have one.
pub type Waiting = Box<Share<(u64, IpAddr)>>;

/// The buffers of the node that wait for their readers.
#[derive(Debug)]
pub struct Stalled {
    quota: Arc<Quota<(u64, IpAddr)>>,
    most: usize,
}

/// Who has to read before a direction goes on: it answers for what waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// The workload's own application.
    Application,
    /// The other end, or its agent.
    Peer,
}

/// What waits, as one connection sees it.
#[derive(Debug, Clone, Copy)]
pub struct Readers<'a> {
    stalled: &'a Stalled,
    workload: u64,
    peer: IpAddr,
}

impl Stalled {
    /// Room for so many buffers.
    pub fn new(most: usize) -> Self {
        Self { quota: Quota::new(), most }
    }

    /// The readers of a connection between a workload of the node and somebody elsewhere.
    pub fn readers(&self, workload: u64, peer: IpAddr) -> Readers<'_> {
        Readers { stalled: self, workload, peer }
    }

    /// Buffers that wait now.
    pub fn waiting(&self) -> usize {
        self.quota.all()
    }

    /// How many may.
    pub fn most(&self) -> usize {
        self.most
    }
}

impl Readers<'_> {
    /// One more buffer waits for this reader; `None` if it keeps as many waiting as there is room for others.
    pub fn wait_for(&self, reader: Reader) -> Option<Waiting> {
        let peer = match reader {
            Reader::Application => Ipv4Addr::UNSPECIFIED.into(),
            Reader::Peer => self.peer,
        };
        self.stalled.quota.take_fair((self.workload, peer), self.stalled.most).map(Box::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_read_leaves_room_for_the_peers_and_applications_that_do() {
        let stalled = Stalled::new(8);
        let peer = |n: u8| stalled.readers(1, IpAddr::from([10, 0, 0, n]));
        let greedy: Vec<_> = std::iter::from_fn(|| peer(1).wait_for(Reader::Peer)).collect();
        assert_eq!((greedy.len(), stalled.waiting()), (4, 4));
        assert!(peer(2).wait_for(Reader::Peer).is_some(), "another peer of the same workload");
        assert!(peer(1).wait_for(Reader::Application).is_some(), "the workload that it is connected to");
        drop(greedy);
        assert_eq!(stalled.waiting(), 0);
    }
}
