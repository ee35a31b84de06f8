//! What this node knows of the mesh: the stream of views from the controller, put in force whole or not at all.
//!
//! | module | what |
//! |---|---|
//! | [`state`] | the view held, and what an update makes of it: pure |
//! | [`report`] | what the agent says of its workloads, sent as it changes and again after every reconnect |
//! | [`said`] | what the agent says of itself, as it changes |
//! | [`cache`] | the last view on tmpfs, for an agent that restarts while the controller is away |
//!
//! Invariant: a snapshot that was published stays in force until a good one replaces it, whatever the controller sends
//! and however long it is away.

pub mod cache;
pub mod report;
mod said;
pub mod state;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use mesh_core::{
    identity::TrustDomain,
    view::Snapshot,
    wire::proto::{self, watch_request::Body},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

pub use self::report::{Enrolment, ReportHandle, WorkloadState};
use self::{cache::Cache, report::Cursor, said::Said, state::ViewState};
use crate::{
    health::{Certificates, Health},
    rpc::{CALL_TIMEOUT, Connection, NodeClient, backoff, skew},
    surroundings::Surroundings,
    wants::Wants,
};

/// The longest pause between two attempts at a stream.
const RETRY_CAP: Duration = Duration::from_secs(5);
/// The largest update that is taken: a whole view of some hundred thousand workloads.
const MAX_UPDATE_BYTES: usize = 64 << 20;
/// Messages to the controller that wait for the connection; more wait in us, see [`MAX_ACKS`].
const OUTGOING: usize = 16;
/// Answers that wait for a controller that sends and does not read; the oldest are dropped, the newest count.
const MAX_ACKS: usize = 64;
/// How long the last words on a stream may take to get out.
const FAREWELL: Duration = Duration::from_secs(1);
/// The shortest time between two messages that ask for addresses: those of many connections go in one, and the answers
/// come as one view. The first goes at once.
const ASK_PAUSE: Duration = Duration::from_millis(20);
/// How often addresses that nobody uses any more are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);
/// How often a predecessor looks for a view of its successor.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// An agent's part while there are two on the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is about to take over: follows the controller, writes nothing down.
    Successor,
    /// It is the node's agent.
    Owner,
    /// It drains: follows what its successor writes down, for the controller speaks to one agent of a node.
    Predecessor,
}

/// The stream of views, and what is published of it.
#[derive(Debug)]
pub struct View {
    state: ViewState,
    cache: Cache,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    connection: watch::Sender<Connection>,
    reports: ReportHandle,
    role: watch::Receiver<Role>,
    surroundings: Surroundings,
    health: Health,
    certificates: watch::Receiver<Certificates>,
    wants: Arc<Wants>,
}

/// How a stream ended.
#[derive(Debug)]
enum Ended {
    /// We were told to stop.
    Shutdown,
    /// The connection or the controller ended it.
    Lost(Status),
    /// An update could not be put in force: what follows would build on it, so we ask anew from what we have.
    Refused(String),
}

impl View {
    /// A view for this node, with what an earlier run of the agent left.
    pub fn new(
        node: &str,
        trust_domain: TrustDomain,
        cache: Cache,
        role: watch::Receiver<Role>,
        surroundings: Surroundings,
        health: Health,
        certificates: watch::Receiver<Certificates>,
    ) -> Self {
        let mut state = ViewState::new(node, trust_domain);
        let wants = cache.wants().clone();
        let kept = cache.load(&mut state);
        Self {
            state,
            cache,
            snapshots: watch::Sender::new(kept),
            connection: watch::Sender::new(Connection::Away("not tried yet".into())),
            reports: ReportHandle::default(),
            role,
            surroundings,
            health,
            certificates,
            wants,
        }
    }

    /// What connections are decided on; `None` until the first view came.
    pub fn snapshots(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.snapshots.subscribe()
    }

    /// Whether the controller can be reached.
    pub fn connection(&self) -> watch::Receiver<Connection> {
        self.connection.subscribe()
    }

    /// Where the agent says how its workloads are.
    pub fn reports(&self) -> ReportHandle {
        self.reports.clone()
    }

    /// Follows the controller, or as a predecessor its successor, until it is told to stop.
    pub async fn run(mut self, channel: Channel, shutdown: CancellationToken) {
        let role = self.role.clone();
        // Following can be dropped at any point: a view is put in force in one step.
        let superseded = tokio::select! {
            () = self.follow_controller(channel, &shutdown) => false,
            () = becomes(role, Role::Predecessor) => true,
        };
        self.wants.end();
        self.write_down();
        if superseded {
            self.connection.send_replace(Connection::Away("a newer agent took over".into()));
            self.follow_successor(&shutdown).await;
        }
    }

    /// Puts in force what the successor writes down, so that a change ends live connections of this agent too.
    async fn follow_successor(&mut self, shutdown: &CancellationToken) {
        let mut taken = self.cache.written();
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        loop {
            // Both branches only wait.
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = looks.tick() => {}
            }
            let written = self.cache.written();
            if written == taken {
                continue;
            }
            taken = written;
            if let Some(snapshot) = self.cache.load(&mut self.state) {
                self.snapshots.send_replace(Some(snapshot));
            }
        }
    }

    /// Writes the view down for the next start, unless that is another agent's to do.
    fn write_down(&mut self) {
        if *self.role.borrow() != Role::Successor {
            self.cache.flush(&self.state);
        }
    }

    async fn follow_controller(&mut self, channel: Channel, shutdown: &CancellationToken) {
        let client = NodeClient::new(channel).max_decoding_message_size(MAX_UPDATE_BYTES);
        let mut failures = 0;
        loop {
            let begun = Instant::now();
            let reason = match self.follow(client.clone(), shutdown).await {
                Ended::Shutdown => return,
                Ended::Lost(status) => describe(&status),
                Ended::Refused(reason) => reason,
            };
            // A stream that held shows that the controller is well: the next attempt comes soon.
            if begun.elapsed() > RETRY_CAP {
                failures = 0;
            }
            failures += 1;
            let pause = backoff(failures, self.surroundings.chance.draw(), RETRY_CAP);
            tracing::warn!(%reason, ?pause, "no stream of views, the last view stays in force");
            self.wants.end();
            self.write_down();
            // Last: whoever sees it may rely on the rest.
            self.connection.send_replace(Connection::Away(reason));
            // Both branches only wait.
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One stream, from the hello to its end.
    async fn follow(&mut self, client: NodeClient<Channel>, shutdown: &CancellationToken) -> Ended {
        let (outgoing, queue) = mpsc::channel(OUTGOING);
        let hello = proto::Hello {
            version: self.state.version().to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            by_demand: true,
            asked: self.wants.begin(),
        };
        outgoing.try_send(message(Body::Hello(hello))).expect("the queue is new and has room");
        // A call that is dropped is cancelled.
        let updates = tokio::select! {
            () = shutdown.cancelled() => return Ended::Shutdown,
            opened = open(client, queue) => match opened {
                Ok(updates) => updates,
                Err(status) => return Ended::Lost(status),
            },
        };
        tracing::info!(version = self.state.version(), "the stream of views is open");
        self.connection.send_replace(Connection::Open);
        self.exchange(updates, outgoing, shutdown).await
    }

    /// Updates in, answers and reports out.
    async fn exchange(
        &mut self,
        mut updates: Streaming<proto::ViewUpdate>,
        outgoing: mpsc::Sender<proto::WatchRequest>,
        shutdown: &CancellationToken,
    ) -> Ended {
        let mut acks: VecDeque<proto::Ack> = VecDeque::new();
        let mut reports = self.reports.cursor();
        let mut role = self.role.clone();
        let mut condition = Said::new(&self.health, &self.certificates);
        let wants = self.wants.clone();
        let mut ask_next = Instant::now();
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let reason = loop {
            let waiting = !acks.is_empty() || reports.is_behind();
            let owner = *role.borrow_and_update() == Role::Owner;
            let due = self.cache.due().filter(|_| owner);
            // All branches can be dropped at any point: `message` keeps what it has read of an update, and the others
            // only wait.
            tokio::select! {
                () = shutdown.cancelled() => return Ended::Shutdown,
                update = updates.message() => match update {
                    Err(status) => return Ended::Lost(status),
                    Ok(None) => return Ended::Lost(Status::unavailable("the controller ended the stream")),
                    Ok(Some(update)) => {
                        let ack = self.take(&update, &reports);
                        let refused = (!ack.error.is_empty()).then(|| ack.error.clone());
                        acks.push_back(ack);
                        if let Some(error) = refused {
                            break format!("update {} cannot be put in force: {error}", update.version);
                        }
                        if acks.len() > MAX_ACKS {
                            acks.pop_front();
                        }
                    }
                },
                () = asks(&wants, ask_next), if !waiting => {
                    if let Ok(permit) = outgoing.try_reserve() {
                        permit.send(message(Body::Wants(wants.say())));
                        ask_next = Instant::now() + ASK_PAUSE;
                        self.cache.changed(false);
                    }
                }
                _ = sweep.tick() => wants.sweep(),
                () = condition.news(), if !waiting => {
                    if let Ok(permit) = outgoing.try_reserve() {
                        permit.send(message(Body::Condition(condition.say())));
                    }
                }
                Ok(permit) = outgoing.reserve(), if waiting => {
                    if let Some(ack) = acks.pop_front() {
                        permit.send(message(Body::Ack(ack)));
                    } else {
                        permit.send(message(Body::Report(reports.next())));
                    }
                }
                () = reports.changed(), if !reports.is_behind() => {}
                () = wait_until(due) => self.write_down(),
                Ok(()) = role.changed() => {}
            }
        };
        say_farewell(updates, outgoing, acks).await;
        Ended::Refused(reason)
    }

    /// Puts an update in force, or not; the answer says which.
    fn take(&mut self, update: &proto::ViewUpdate, reports: &Cursor) -> proto::Ack {
        let version = update.version.clone();
        self.health.skew(skew(self.surroundings.clock.now(), update.now_unix_ms));
        match self.state.apply(update) {
            Ok(applied) => {
                self.cache.changed(applied.roots_changed);
                reports.prune(&applied.snapshot);
                if applied.restored {
                    self.health.view_restored();
                    tracing::error!(%version, "the controller's state was restored from an older one; its view is in \
                        force: compare its manifests with what should be");
                }
                tracing::debug!(%version, "view in force");
                self.wants.answered();
                self.snapshots.send_replace(Some(applied.snapshot));
                proto::Ack { version, error: String::new() }
            }
            Err(error) => {
                tracing::error!(%version, %error, "the controller's view cannot be put in force");
                proto::Ack { version, error: error.to_string() }
            }
        }
    }
}

async fn open(
    mut client: NodeClient<Channel>,
    queue: mpsc::Receiver<proto::WatchRequest>,
) -> Result<Streaming<proto::ViewUpdate>, Status> {
    let call = client.watch(ReceiverStream::new(queue));
    let answer = tokio::time::timeout(CALL_TIMEOUT, call)
        .await
        .map_err(|_| Status::deadline_exceeded(format!("no answer within {CALL_TIMEOUT:?}")))?;
    Ok(answer?.into_inner())
}

/// Lets what is to be said get out, and ends our half; the controller then ends its own.
async fn say_farewell(
    mut updates: Streaming<proto::ViewUpdate>,
    outgoing: mpsc::Sender<proto::WatchRequest>,
    acks: VecDeque<proto::Ack>,
) {
    let farewell = async {
        for ack in acks {
            if outgoing.send(message(Body::Ack(ack))).await.is_err() {
                return;
            }
        }
        drop(outgoing);
        while let Ok(Some(_)) = updates.message().await {}
    };
    if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
        tracing::debug!("the controller did not end its half of the stream");
    }
}

/// Done when the agent has this part. Cancel-safe.
async fn becomes(mut role: watch::Receiver<Role>, wanted: Role) {
    if role.wait_for(|role| *role == wanted).await.is_err() {
        // Nobody will change it any more.
        std::future::pending().await
    }
}

/// Done when there are addresses to be asked for, and it may be done. Cancel-safe.
async fn asks(wants: &Wants, next: Instant) {
    wants.news().await;
    tokio::time::sleep_until(next).await;
}

async fn wait_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

fn message(body: Body) -> proto::WatchRequest {
    proto::WatchRequest { body: Some(body) }
}

/// A status with the errors beneath it: "transport error" alone helps nobody.
fn describe(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let line = error.to_string();
        if !text.contains(&line) {
            text = format!("{text}: {line}");
        }
        cause = error.source();
    }
    text
}
