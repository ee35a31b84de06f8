//! The addresses that this node's connections use: what the controller is asked for, and goes on telling of.
//!
//! Stands apart because connections write it and the stream of views reads it. An address is wanted while a connection
//! holds it and for [`IDLE`] after. Invariants: whoever uses many addresses is bounded by itself: a workload, each way, has
//! its own number of addresses and its own pace, and gives up its own least recently used ones. And nobody looks through
//! all addresses while connections wait for the lock.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_core::{
    view::{MAX_ASKED, Owner, Snapshot},
    wire::{self, proto},
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::metrics::Direction;

/// How long an address is wanted after its last connection: a client that comes every few minutes finds it known.
pub const IDLE: Duration = Duration::from_secs(600);
/// New addresses of a workload, each way: as many at once as a large client has destinations, then so many a second.
const BURST: f64 = 1000.0;
const PER_SECOND: f64 = 200.0;
/// The part of its addresses that a workload gives up when it has as many as it may: the controller makes the view anew
/// for what is given up, so not for one at a time.
const GIVEN_UP: usize = 8;
/// Addresses in one message, well below what the controller takes.
const BATCH: usize = 8192;
/// Idle addresses that are given up at a time, before connections have their turn again.
const SWEPT: usize = 256;

/// What is known of the mesh, and where more of it is asked for.
#[derive(Debug)]
pub struct Known {
    /// What connections are decided on; `None` until the first view came.
    pub view: watch::Receiver<Option<Arc<Snapshot>>>,
    /// Which addresses they use.
    pub wants: Arc<Wants>,
}

/// Who uses an address: a workload of this node ([`crate::local::Local::id`]), and which way its connections go.
pub type Asker = (u64, Direction);

/// The asker of what an earlier run of the agent had asked for.
const EARLIER: Asker = (u64::MAX, Direction::Outbound);

/// Why an address cannot be asked for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The asker is too fast: may be asked for after this long.
    Later(Duration),
    /// Connections use all that it may ask for, or all that the node may.
    Full,
}

/// The addresses of a node.
#[derive(Debug)]
pub struct Wants {
    per_asker: usize,
    inner: Mutex<Inner>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// How many askers want each address.
    addresses: HashMap<IpAddr, usize>,
    askers: HashMap<Asker, Share>,
    /// Whether there is a controller to tell; without one nothing is kept to be said.
    open: bool,
    /// Since when there is none.
    away: Option<Instant>,
    /// What is still to be said: asked for, or given up.
    unsaid: HashMap<IpAddr, bool>,
}

/// What one asker has.
#[derive(Debug)]
struct Share {
    uses: HashMap<IpAddr, Use>,
    /// Those that no connection holds, by when the last one ended.
    idle: BTreeSet<(Instant, IpAddr)>,
    left: f64,
    at: Instant,
}

#[derive(Debug)]
struct Use {
    held: usize,
    /// When the last connection that held it ended; counts while none does.
    last: Instant,
}

impl Share {
    fn new(now: Instant) -> Self {
        Self { uses: HashMap::new(), idle: BTreeSet::new(), left: BURST, at: now }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * PER_SECOND).min(BURST);
        self.at = now;
    }

    /// One more connection holds an address; whether the asker wants it already.
    fn hold(&mut self, address: IpAddr) -> bool {
        let Some(using) = self.uses.get_mut(&address) else { return false };
        if using.held == 0 {
            self.idle.remove(&(using.last, address));
        }
        using.held += 1;
        true
    }

    /// A connection that held an address has ended.
    fn release(&mut self, address: IpAddr, now: Instant) {
        let Some(using) = self.uses.get_mut(&address) else { return };
        using.held -= 1;
        if using.held == 0 {
            using.last = now;
            self.idle.insert((now, address));
        }
    }

    /// Wants an address that no connection holds yet.
    fn add(&mut self, address: IpAddr, now: Instant) -> bool {
        let is_new = self.uses.insert(address, Use { held: 0, last: now }).is_none();
        is_new && self.idle.insert((now, address))
    }
}

/// A connection's word that it uses an address.
#[derive(Debug)]
pub struct Held {
    wants: Arc<Wants>,
    asker: Asker,
    address: IpAddr,
}

impl Drop for Held {
    fn drop(&mut self) {
        let now = Instant::now();
        if let Some(share) = self.wants.inner().askers.get_mut(&self.asker) {
            share.release(self.address, now);
        }
    }
}

/// Whether an address has to be asked for: not that of a workload of this node, nor one that is outside of the mesh without
/// a question.
pub fn is_asked_for(view: &Snapshot, address: IpAddr) -> bool {
    match view.owner(address) {
        Some(Owner::Workload(workload)) => workload.node != view.node(),
        Some(Owner::Service(_)) => true,
        None => {
            view.demand().is_some_and(|demand| demand.blocks.iter().any(|block| block.contains(&address)))
        }
    }
}

impl Wants {
    /// Nothing is wanted. Each asker may want so many.
    pub fn new(per_asker: usize) -> Arc<Self> {
        Arc::new(Self { per_asker, inner: Mutex::default(), news: Notify::new() })
    }

    /// Wants an address for as long as the result lives, and a while longer.
    pub fn hold(self: &Arc<Self>, asker: Asker, address: IpAddr) -> Result<Held, Denied> {
        let now = Instant::now();
        let mut inner = self.inner();
        let is_new = !inner.addresses.contains_key(&address);
        let share = inner.askers.entry(asker).or_insert_with(|| Share::new(now));
        if !share.hold(address) {
            share.refill(now);
            if is_new && share.left < 1.0 {
                return Err(Denied::Later(Duration::from_secs_f64((1.0 - share.left) / PER_SECOND)));
            }
            inner.make_room(asker, is_new, self.per_asker)?;
            inner.add(asker, address, now);
            let share = inner.askers.entry(asker).or_insert_with(|| Share::new(now));
            share.hold(address);
            if is_new {
                share.left -= 1.0;
                inner.say(address, true);
                self.news.notify_one();
            }
        }
        Ok(Held { wants: self.clone(), asker, address })
    }

    /// How many addresses are wanted.
    pub fn len(&self) -> usize {
        self.inner().addresses.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Since when nobody could be asked; `None` while somebody can.
    pub fn away(&self) -> Option<Instant> {
        self.inner().away
    }

    /// Wants what an earlier run of the agent did, until it has been idle for as long as anything else.
    pub fn resume(&self, earlier: impl IntoIterator<Item = IpAddr>) {
        let now = Instant::now();
        let mut inner = self.inner();
        for address in earlier.into_iter().take(MAX_ASKED) {
            inner.add(EARLIER, address, now);
        }
    }

    /// All that is wanted.
    pub fn all(&self) -> Vec<Vec<u8>> {
        let all: Vec<IpAddr> = self.inner().addresses.keys().copied().collect();
        wire::addresses(&all)
    }

    /// A stream begins: it is told everything, and from now on what is new.
    pub(crate) fn begin(&self) -> Vec<Vec<u8>> {
        let all: Vec<IpAddr> = {
            let mut inner = self.inner();
            inner.unsaid.clear();
            inner.open = true;
            inner.addresses.keys().copied().collect()
        };
        wire::addresses(&all)
    }

    /// The stream is answered.
    pub(crate) fn answered(&self) {
        self.inner().away = None;
    }

    /// There is no stream any more.
    pub(crate) fn end(&self) {
        let mut inner = self.inner();
        inner.unsaid.clear();
        inner.open = false;
        inner.away.get_or_insert_with(Instant::now);
    }

    /// Done when there is something to say. Cancel-safe.
    pub(crate) async fn news(&self) {
        loop {
            let notified = self.news.notified();
            if !self.inner().unsaid.is_empty() {
                return;
            }
            notified.await;
        }
    }

    /// What is to be said now. What is given up goes first: the controller may have no room for what is asked before.
    pub(crate) fn say(&self) -> proto::Wants {
        let mut inner = self.inner();
        let of = |wanted: bool| {
            let unsaid = inner.unsaid.iter().filter(move |(_, asked)| **asked == wanted);
            unsaid.map(|(address, _)| *address)
        };
        let given_up: Vec<IpAddr> = of(false).take(BATCH).collect();
        let asked: Vec<IpAddr> = of(true).take(BATCH - given_up.len()).collect();
        for address in given_up.iter().chain(&asked) {
            inner.unsaid.remove(address);
        }
        drop(inner);
        proto::Wants { asked: wire::addresses(&asked), given_up: wire::addresses(&given_up) }
    }

    /// Gives up what has not been used for [`IDLE`].
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        while self.inner().give_up_idle(now, SWEPT) {}
        let mut inner = self.inner();
        inner.askers.retain(|_, share| {
            share.refill(now);
            !share.uses.is_empty() || share.left < BURST
        });
        if !inner.unsaid.is_empty() {
            self.news.notify_one();
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn say(&mut self, address: IpAddr, asked: bool) {
        if self.open {
            self.unsaid.insert(address, asked);
        }
    }

    fn add(&mut self, asker: Asker, address: IpAddr, now: Instant) {
        let share = self.askers.entry(asker).or_insert_with(|| Share::new(now));
        if share.add(address, now) {
            *self.addresses.entry(address).or_default() += 1;
        }
    }

    /// Makes room for one more address of this asker: it gives up its own, and where the node has no room, whoever has
    /// most that no connection uses gives way. What connections use stays.
    fn make_room(&mut self, asker: Asker, is_new: bool, per_asker: usize) -> Result<(), Denied> {
        let count = |inner: &Self| inner.askers.get(&asker).map_or(0, |share| share.uses.len());
        if count(self) >= per_asker {
            self.give_up_oldest(asker, per_asker.div_ceil(GIVEN_UP));
        }
        if count(self) >= per_asker {
            return Err(Denied::Full);
        }
        // One that gives up what others want too has made no room yet; each time round somebody has fewer idle ones.
        while is_new && self.addresses.len() >= MAX_ASKED {
            let (most, idle) = self
                .askers
                .iter()
                .map(|(asker, share)| (*asker, share.idle.len()))
                .max_by_key(|it| it.1)
                .ok_or(Denied::Full)?;
            if idle == 0 {
                return Err(Denied::Full);
            }
            self.give_up_oldest(most, idle.div_ceil(GIVEN_UP));
        }
        Ok(())
    }

    /// Gives up so many of those that this asker has not used for longest.
    fn give_up_oldest(&mut self, asker: Asker, count: usize) {
        for _ in 0..count {
            let oldest = self.askers.get_mut(&asker).and_then(|share| share.idle.pop_first());
            let Some((_, address)) = oldest else { return };
            self.give_up(asker, address);
        }
    }

    /// Gives up what has been idle for long enough, at most so many; whether there may be more.
    fn give_up_idle(&mut self, now: Instant, most: usize) -> bool {
        let mut over = Vec::new();
        for (asker, share) in &mut self.askers {
            let is_over = |oldest: &(Instant, IpAddr)| now.saturating_duration_since(oldest.0) >= IDLE;
            while over.len() < most && share.idle.first().is_some_and(is_over) {
                over.extend(share.idle.pop_first().map(|(_, address)| (*asker, address)));
            }
        }
        for (asker, address) in &over {
            self.give_up(*asker, *address);
        }
        over.len() == most
    }

    /// One asker, none of whose connections uses this address, does not want it any more.
    fn give_up(&mut self, asker: Asker, address: IpAddr) {
        if let Some(share) = self.askers.get_mut(&asker) {
            share.uses.remove(&address);
        }
        let Some(wanted) = self.addresses.get_mut(&address) else { return };
        *wanted -= 1;
        if *wanted == 0 {
            self.addresses.remove(&address);
            self.say(address, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const WEB: Asker = (1, Direction::Outbound);
    const SCANNER: Asker = (2, Direction::Outbound);

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    fn said(wants: &Wants) -> (Vec<IpAddr>, Vec<IpAddr>) {
        let said = wants.say();
        let sorted = |sent: &[Vec<u8>]| {
            let mut all: Vec<IpAddr> = wire::addresses_of(sent).collect();
            all.sort();
            all
        };
        (sorted(&said.asked), sorted(&said.given_up))
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_wanted_while_it_is_used_and_a_while_longer() {
        let wants = Wants::new(10);
        assert!(wants.begin().is_empty());
        let held = wants.hold(WEB, address(1)).unwrap();
        drop(wants.hold(SCANNER, address(1)).unwrap());
        wants.news().await;
        assert_eq!(said(&wants), (vec![address(1)], vec![]));
        assert!(wants.news().now_or_never().is_none(), "it has been said");
        tokio::time::advance(IDLE).await;
        wants.sweep();
        assert_eq!(wants.len(), 1, "a connection uses it still");
        drop(held);
        tokio::time::advance(IDLE / 2).await;
        wants.sweep();
        assert_eq!(wants.all().len(), 1);
        tokio::time::advance(IDLE / 2).await;
        wants.sweep();
        wants.news().await;
        assert_eq!(said(&wants), (vec![], vec![address(1)]));
        assert!(wants.is_empty() && wants.inner().askers.is_empty(), "nothing is remembered");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_told_everything_and_then_what_is_new_and_without_one_nothing_is_kept_to_be_said() {
        let wants = Wants::new(10);
        let _held = wants.hold(WEB, address(1)).unwrap();
        assert!(wants.inner().unsaid.is_empty());
        assert_eq!(wants.begin().len(), 1);
        let _other = wants.hold(WEB, address(2)).unwrap();
        wants.end();
        assert!(wants.away().is_some());
        assert_eq!(wants.begin().len(), 2);
        assert!(wants.inner().unsaid.is_empty(), "it is in what the stream began with");
        wants.answered();
        assert_eq!(wants.away(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_uses_many_gives_up_its_own_and_nobody_elses() {
        let wants = Wants::new(8);
        let _web = wants.hold(WEB, address(200)).unwrap();
        let _shared = wants.hold(WEB, address(1)).unwrap();
        wants.begin();
        for last in 1..=100 {
            drop(wants.hold(SCANNER, address(last)).unwrap());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!(wants.len() <= 2 + 8, "{}", wants.len());
        let (asked, given_up) = said(&wants);
        assert!(!given_up.contains(&address(200)) && !given_up.contains(&address(1)));
        assert_eq!(asked.last(), Some(&address(100)));
        let held: Vec<Held> = (1..=8).map(|last| wants.hold(SCANNER, address(last)).unwrap()).collect();
        assert_eq!(wants.hold(SCANNER, address(9)).unwrap_err(), Denied::Full, "all of its own are in use");
        assert!(wants.hold(WEB, address(9)).is_ok());
        drop(held);
        assert!(wants.hold(SCANNER, address(10)).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn new_addresses_come_at_a_pace_and_known_ones_at_any() {
        let wants = Wants::new(MAX_ASKED);
        let many = (0..BURST as u32).map(|number| IpAddr::from((0x0a01_0000 + number).to_be_bytes()));
        for address in many {
            drop(wants.hold(SCANNER, address).unwrap());
        }
        let Denied::Later(wait) = wants.hold(SCANNER, address(1)).unwrap_err() else { panic!("full") };
        assert!(wants.hold(WEB, address(2)).is_ok(), "others are not slowed down");
        assert!(wants.hold(SCANNER, address(2)).is_ok(), "nor is what is asked for already");
        tokio::time::advance(wait + Duration::from_millis(1)).await;
        assert!(wants.hold(SCANNER, address(1)).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_earlier_run_wanted_is_wanted_until_it_is_idle() {
        let wants = Wants::new(1);
        wants.resume([address(1), address(2)]);
        assert_eq!(wants.begin().len(), 2);
        let _held = wants.hold(WEB, address(1)).unwrap();
        assert!(wants.inner().unsaid.is_empty(), "the controller knows of it");
        tokio::time::advance(IDLE).await;
        wants.sweep();
        assert_eq!(said(&wants), (vec![], vec![address(2)]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_node_takes_room_from_whoever_has_most_that_nobody_uses() {
        let wants = Wants::new(MAX_ASKED);
        let of = |second: u8, number: u32| IpAddr::from([10, second, (number >> 8) as u8, number as u8]);
        let held = wants.hold(WEB, address(200)).unwrap();
        wants.resume((0..MAX_ASKED as u32 - 2).map(|number| of(9, number)));
        let _also = wants.hold(SCANNER, of(8, 0)).unwrap();
        assert_eq!(wants.len(), MAX_ASKED);
        wants.begin();
        let _last = wants.hold(WEB, address(201)).unwrap();
        let (asked, given_up) = said(&wants);
        assert_eq!(asked, [address(201)]);
        assert_eq!(given_up.len(), (MAX_ASKED - 2).div_ceil(GIVEN_UP), "of what nobody uses");
        assert!(given_up.iter().all(|it| !wants.inner().addresses.contains_key(it)));
        drop(held);
        assert!(wants.inner().askers[&WEB].uses.contains_key(&address(200)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_of_which_connections_use_everything_takes_nothing_more_and_what_is_given_up_is_said_first()
     {
        let wants = Wants::new(MAX_ASKED);
        let mut held = Vec::new();
        for number in 0..MAX_ASKED as u32 {
            let address = IpAddr::from((0x0a01_0000 + number).to_be_bytes());
            let asker = (u64::from(number % 64), Direction::Outbound);
            held.push(wants.hold(asker, address).unwrap());
        }
        assert_eq!(wants.hold(SCANNER, address(1)).unwrap_err(), Denied::Full);
        assert!(wants.hold(SCANNER, held[7].address).is_ok(), "what is asked for already costs nothing");
        wants.begin();
        drop(held);
        tokio::time::advance(IDLE).await;
        wants.sweep();
        let many: Vec<Held> = (1..=3).map(|last| wants.hold(SCANNER, address(last)).unwrap()).collect();
        assert_eq!(wants.len(), many.len());
        for _ in 0..MAX_ASKED / BATCH {
            let (asked, given_up) = said(&wants);
            assert_eq!((asked.len(), given_up.len()), (0, BATCH));
        }
        assert_eq!(said(&wants).0.len(), many.len());
    }
}
