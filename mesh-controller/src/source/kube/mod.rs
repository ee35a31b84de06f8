//! Kubernetes as a source: Nodes, Namespaces, Pods, Services, EndpointSlices, objects of ours and of the Gateway API,
//! followed, each turned into the document that a directory would have. From there on everything is as with files: the same
//! checks, refusals and last good versions.
//!
//! | module | what |
//! |---|---|
//! | [`documents`] | one object of Kubernetes into the document that says the same. Pure |
//! | [`objects`] | the objects of the followed kinds as they are now, and the documents that they make. Pure |
//! | [`status`] | what is written into the status of objects of ours |
//! | [`lease`] | which of several controllers writes it |
//!
//! Nothing is in force before all kinds have been listed, so that a controller that starts takes no half of a cluster for
//! the whole. A watch that breaks goes on where it was; one that is too old (410 Gone) lists again, and what is in force
//! stays until the list is complete. While the API server is away nothing changes. Kinds of ours and of the Gateway API that
//! the cluster does not know are asked for again every few seconds, in each version that means the same.

mod documents;
mod lease;
mod objects;
#[cfg(test)]
mod outages;
mod status;

use std::{net::SocketAddr, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use futures_util::{
    Stream, StreamExt,
    stream::{self, select_all},
};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource,
    api::{ApiResource, DynamicObject, GroupVersionKind, TypeMeta},
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, watcher},
    },
};
use mesh_core::model::Name;
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use self::{
    objects::{Event, Follow, Followed, Objects, What},
    status::{Standing, Writer},
};
use super::{
    Presence,
    ledger::Ledger,
    published::{Published, PublishedError},
};
use crate::{
    conditions::{Conditions, Pods},
    jwks::{self, Keys},
    kubernetes::{KubernetesError, client_with, own_pod},
    model::Kind,
    store::Unsaved,
};

/// After an event, how long nothing more must happen before what is in force changes.
const QUIET: Duration = Duration::from_millis(15);
/// However busy the cluster is, the longest wait for quiet.
const LONGEST_QUIET: Duration = Duration::from_millis(100);
/// How long the API server lets a watch live, seconds. One that it has forgotten is given up a while later.
const WATCH_SECONDS: u32 = 60;
/// How long the API server may be silent: longer than a watch lives.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// The first pause after a watch has failed; each next one is twice as long.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause: how late what has changed is heard of once the API server is back.
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// Kubernetes cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    /// There is no cluster to speak to.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    /// What is in force cannot be published.
    #[error(transparent)]
    Published(#[from] PublishedError),
}

/// Events of one kind, or of all.
type Events = Pin<Box<dyn Stream<Item = Result<Event, watcher::Error>> + Send>>;

/// A cluster, followed.
pub struct Source {
    client: Client,
    events: Events,
    objects: Objects,
    published: Published,
    conditions: watch::Sender<Arc<Conditions>>,
    standings: watch::Sender<Arc<Vec<Standing>>>,
    presence: watch::Sender<Presence>,
    /// The Service of all controllers.
    controllers: Option<Name>,
    others: watch::Sender<Arc<Vec<SocketAddr>>>,
    /// What is known of keys that policies name by a URL.
    keys: watch::Receiver<Arc<Keys>>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("objects", &self.objects).finish_non_exhaustive()
    }
}

impl Source {
    /// Lists everything; waits for an API server that is away. The last good versions of what is refused are kept in
    /// `kept_file` over restarts.
    pub async fn open(kept_file: PathBuf) -> Result<Self, KubeError> {
        let client = client_with(|config| {
            config.read_timeout = Some(READ_TIMEOUT);
            config.reset_reader_on_write = true;
        })
        .await?;
        Self::following(client, kept_file).await
    }

    async fn following(client: Client, kept_file: PathBuf) -> Result<Self, KubeError> {
        let mut source = Self {
            events: everything(&client),
            client,
            objects: Objects::default(),
            published: Published::open(kept_file)?,
            conditions: watch::Sender::default(),
            standings: watch::Sender::default(),
            presence: watch::Sender::default(),
            controllers: None,
            others: watch::Sender::default(),
            keys: jwks::nothing(),
        };
        while !source.objects.all_listed() {
            source.take_next().await;
        }
        source.publish();
        Ok(source)
    }

    /// What is in force, now and as it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Ledger>> {
        self.published.subscribe()
    }

    /// The pods, with what they say of their capture, now and as it changes.
    pub fn pods(&self) -> Pods {
        Pods { client: self.client.clone(), conditions: self.conditions.subscribe() }
    }

    /// The same, which says there what it could not save.
    pub fn telling(self, unsaved: Unsaved) -> Self {
        Self { published: self.published.telling(unsaved), ..self }
    }

    /// Writes what became of objects of ours into their status, until cancelled, while this controller is the one that
    /// does.
    pub fn write(&self, cancel: CancellationToken) -> impl Future<Output = ()> + use<> {
        Writer::new(self.client.clone(), self.standings.subscribe(), self.presence.clone()).run(cancel)
    }

    /// Whether the API server answers, and whether we write status; by who writes.
    pub fn presence(&self) -> watch::Receiver<Presence> {
        self.presence.subscribe()
    }

    /// The same, of which the endpoints of this Service are the controllers.
    pub fn among(self, controllers: Name) -> Self {
        let mut source = Self { controllers: Some(controllers), ..self };
        source.publish();
        source
    }

    /// The same, which says of policies whether the keys that they name by a URL can be had.
    pub fn knowing(self, keys: watch::Receiver<Arc<Keys>>) -> Self {
        let mut source = Self { keys, ..self };
        source.publish();
        source
    }

    /// Where the admin interfaces of the other controllers are.
    pub fn others(&self) -> watch::Receiver<Arc<Vec<SocketAddr>>> {
        self.others.subscribe()
    }

    /// Follows the cluster until cancelled.
    pub async fn follow(mut self, cancel: CancellationToken) {
        let mut presence = self.presence.subscribe();
        let mut keys = self.keys.clone();
        let mut answered = true;
        loop {
            // Cancel-safe: an event that was taken has been applied.
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.take_next() => {}
                Ok(()) = keys.changed() => {
                    self.publish();
                    continue;
                }
                Ok(()) = presence.changed() => {
                    let before = std::mem::replace(&mut answered, presence.borrow_and_update().answered);
                    if !before && answered {
                        // Watches may hang on connections over which nothing comes any more, for minutes.
                        self.events = everything(&self.client);
                    }
                    continue;
                }
            }
            let latest = Instant::now() + LONGEST_QUIET;
            // A rollout is many events within a moment, and each change in force goes to all agents.
            while timeout_at(latest.min(Instant::now() + QUIET), self.take_next()).await.is_ok() {}
            self.publish();
        }
    }

    /// Waits for one event, and applies it.
    async fn take_next(&mut self) {
        match self.events.next().await {
            Some(Ok(event)) => self.objects.apply(event),
            Some(Err(error)) => tracing::warn!(%error, "watching Kubernetes failed; it is tried again"),
            // Watches go on for ever; if ours do not, there is nothing more to come.
            None => std::future::pending().await,
        }
    }

    fn publish(&mut self) {
        if let Some(conditions) = self.objects.conditions() {
            self.conditions.send_replace(Arc::new(conditions));
        }
        match self.objects.contents() {
            Some(contents) => self.published.publish(contents),
            None => self.published.save_again(),
        }
        if let Some(service) = &self.controllers {
            let others = self.objects.admin_addresses(service, &own_pod());
            tell(&self.others, others);
        }
        let standings = self.objects.standings(&self.published.subscribe().borrow(), &self.keys.borrow());
        tell(&self.standings, standings);
    }
}

/// Tells those who follow it, if it is not as before.
fn tell<T: PartialEq>(followers: &watch::Sender<Arc<T>>, now: T) {
    followers.send_if_modified(|before| {
        let changed = **before != now;
        if changed {
            *before = Arc::new(now);
        }
        changed
    });
}

/// The events of all that is followed, from complete lists on.
fn everything(client: &Client) -> Events {
    Box::pin(select_all([
        follow::<Node>(client, Followed::Nodes),
        follow::<Namespace>(client, Followed::Namespaces),
        follow::<Pod>(client, Followed::Pods),
        follow::<Service>(client, Followed::Services),
        follow::<EndpointSlice>(client, Followed::Slices),
        follow_defined(client, Followed::Workloads, Kind::Workload),
        follow_defined(client, Followed::Policies, Kind::AuthorizationPolicy),
        follow_defined(client, Followed::Traffic, Kind::TrafficPolicy),
        follow_defined(client, Followed::Authentications, Kind::AuthenticationPolicy),
        follow_defined(client, Followed::HttpRoutes, Kind::HttpRoute),
        follow_defined(client, Followed::GrpcRoutes, Kind::GrpcRoute),
        follow_defined(client, Followed::TlsRoutes, Kind::TlsRoute),
        follow_defined(client, Followed::TcpRoutes, Kind::TcpRoute),
        follow_defined(client, Followed::Grants, Kind::ReferenceGrant),
    ]))
}

/// A kind that somebody defined, as the API server knows it in one of its versions.
pub(crate) fn resource(kind: Kind, api_version: &str, plural: &str) -> ApiResource {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind.as_str()), plural)
}

/// The events of a kind, in all namespaces, with pauses that grow while the API server is away.
fn follow<K>(client: &Client, of: Followed) -> Events
where
    K: Follow + Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let watched = watcher(Api::<K>::all(client.clone()), watched()).backoff(Pauses::default());
    Box::pin(watched.map(move |event| event.map(|event| Event::new(of, event))))
}

/// The events of a kind that somebody defined. A cluster that does not know the kind has none of it.
fn follow_defined(client: &Client, of: Followed, kind: Kind) -> Events {
    let objects = stream::unfold(Versions::new(client.clone(), of, kind), Versions::next);
    let mut known = true;
    let watched = objects.backoff(Pauses::default()).map(move |event| {
        let before = known;
        match &event {
            Err(error) if is_unknown(error) => known = false,
            // Said before anything was asked.
            Ok(watcher::Event::Init) | Err(_) => {}
            Ok(_) => known = true,
        }
        match (before, known) {
            (true, false) if is_ours(kind) => tracing::warn!(
                "the cluster does not know the kind {kind}: none is in force; apply the custom resource definitions \
                 of this version, and it is followed from then on"
            ),
            // Who has no routes needs no Gateway API, and older versions of it do not have all kinds of them.
            (true, false) => tracing::info!(
                "the cluster does not know the kind {kind}: none is in force; apply the definitions of the Gateway \
                 API if there shall be some, and it is followed from then on"
            ),
            (false, true) => tracing::info!("the cluster knows the kind {kind} now"),
            _ => {}
        }
        match event {
            Ok(event) => Ok(Event::new(of, event)),
            Err(error) if is_unknown(&error) => Ok(Event { of, what: What::Unknown }),
            Err(error) => Err(error),
        }
    });
    Box::pin(watched)
}

fn is_ours(kind: Kind) -> bool {
    kind.api_version().starts_with("nodemesh.io/")
}

/// Objects of a kind that somebody defined, in the first of its versions that the cluster serves: older definitions of the
/// Gateway API have older ones alone.
struct Versions {
    client: Client,
    of: Followed,
    kind: Kind,
    versions: Vec<&'static str>,
    /// The one that is asked for.
    at: usize,
    /// How many of them, one after the other, the cluster has said not to know.
    unknown: usize,
    watched: Pin<Box<dyn Stream<Item = Defined> + Send>>,
}

/// What happened to an object that says its version, or why that is not known.
type Defined = Result<watcher::Event<DynamicObject>, watcher::Error>;

impl Versions {
    fn new(client: Client, of: Followed, kind: Kind) -> Self {
        let versions: Vec<&str> = kind.api_versions().collect();
        let watched = Box::pin(stream::empty());
        let mut all = Self { client, of, kind, versions, at: 0, unknown: 0, watched };
        all.ask(0);
        all
    }

    /// Follows this one of the versions.
    fn ask(&mut self, at: usize) {
        let (kind, version) = (self.kind, self.versions[at]);
        let resource = resource(kind, version, self.of.plural());
        let objects = Api::<DynamicObject>::all_with(self.client.clone(), &resource);
        // In a list the API server does not say it of each.
        let types = TypeMeta { api_version: version.to_owned(), kind: kind.as_str().to_owned() };
        let said = move |object: &mut DynamicObject| object.types = Some(types.clone());
        self.at = at;
        self.watched = Box::pin(watcher(objects, watched()).modify(said));
    }

    /// What happens next. That the cluster does not know the kind is said once all of its versions were asked for.
    async fn next(mut self) -> Option<(Defined, Self)> {
        loop {
            let event = self.watched.next().await?;
            match &event {
                Err(error) if is_unknown(error) => {
                    self.ask((self.at + 1) % self.versions.len());
                    self.unknown += 1;
                    if self.unknown < self.versions.len() {
                        continue;
                    }
                    self.unknown = 0;
                }
                // Said before anything was asked.
                Ok(watcher::Event::Init) | Err(_) => {}
                Ok(_) => {
                    if self.unknown > 0 && self.at > 0 {
                        let (kind, version) = (self.kind, self.versions[self.at]);
                        tracing::info!(
                            "the cluster serves no newer {kind} than of {version}: these are followed"
                        );
                    }
                    self.unknown = 0;
                }
            }
            return Some((event, self));
        }
    }
}

/// The cluster does not know a kind in the version that it was asked for, or not any more.
fn is_unknown(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) = error else {
        return false;
    };
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

fn watched() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS)
}

/// The pauses between attempts, each twice as long as the one before, until nothing has failed for a while.
#[derive(Debug)]
struct Pauses {
    next: Duration,
    failed: Option<Instant>,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { next: SHORTEST_PAUSE, failed: None }
    }
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = Instant::now();
        if self.failed.replace(now).is_some_and(|before| now - before > 2 * LONGEST_PAUSE) {
            self.next = SHORTEST_PAUSE;
        }
        let pause = self.next;
        self.next = (2 * pause).min(LONGEST_PAUSE);
        Some(pause)
    }
}

impl Backoff for Pauses {
    /// A watch says that it begins before it has asked, so no word ends the pauses; time without failure does.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, sync::Mutex};

    use http_body_util::Full;
    use hyper::{Request, Response, body::Bytes};
    use kube::client::Body;
    use serde_json::json;
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_may_not_list_asks_with_pauses_that_grow_to_a_bound() {
        let asked = Arc::new(Mutex::new(vec![]));
        let log = asked.clone();
        let service = tower::service_fn(move |_: Request<Body>| {
            log.lock().expect("whole").push(Instant::now());
            let forbidden = json!({"kind": "Status", "status": "Failure", "code": 403}).to_string();
            let answer = Response::builder().status(403).body(Full::new(Bytes::from(forbidden)));
            async move { Ok::<_, Infallible>(answer.expect("an answer")) }
        });
        let mut events = follow::<Pod>(&Client::new(service, "default"), Followed::Pods);
        let until = Instant::now() + Duration::from_secs(60);
        while timeout_at(until, events.next()).await.is_ok() {}
        let asked = asked.lock().expect("whole");
        let gaps: Vec<_> = asked.windows(2).map(|pair| (pair[1] - pair[0]).as_millis()).collect();
        assert_eq!(gaps[..7], [100, 200, 400, 800, 1600, 3000, 3000], "{gaps:?}");
        assert!(gaps[7..].iter().all(|gap| *gap == LONGEST_PAUSE.as_millis()), "{gaps:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_while_without_failure_the_first_pause_is_short_again() {
        let mut pauses = Pauses::default();
        assert_eq!(pauses.by_ref().nth(9), Some(LONGEST_PAUSE));
        advance(3 * LONGEST_PAUSE).await;
        pauses.reset();
        assert_eq!(pauses.next(), Some(SHORTEST_PAUSE));
    }
}
