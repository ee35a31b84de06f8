//! What a cluster's source has in force while parts of an API server are away, have forgotten where it was, or are of other
//! versions.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Mutex, MutexGuard},
};

use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, Uri,
    body::{Bytes, Frame},
};
use kube::client::Body;
use mesh_core::model::Name;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::model::Model;

/// How long something may take; the clock of these tests runs ahead while nothing happens.
const PATIENCE: Duration = Duration::from_secs(60);

/// An API server whose kinds fail one by one.
#[derive(Debug, Clone, Default)]
struct ApiServer(Arc<Mutex<BTreeMap<&'static str, Kept>>>);

/// What it has of one kind.
#[derive(Debug, Default)]
struct Kept {
    items: Vec<Value>,
    /// Requests are answered with this instead.
    refuses: Option<u16>,
    /// Only this version is served; of others nothing is known.
    serves: Option<&'static str>,
    /// Lists wait for this.
    held: Option<Arc<tokio::sync::Semaphore>>,
    watches: Vec<mpsc::UnboundedSender<Value>>,
}

impl ApiServer {
    fn client(&self) -> Client {
        let server = self.clone();
        Client::new(
            tower::service_fn(move |request: Request<Body>| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(server.answer(request.into_parts().0.uri).await) }
            }),
            "default",
        )
    }

    async fn answer(&self, asked: Uri) -> Response<BoxBody<Bytes, Infallible>> {
        let path = asked.path();
        let plural = Followed::ALL.map(Followed::plural).into_iter().find(|it| path.ends_with(it));
        let plural = plural.expect("only what is followed is asked for");
        let is_watch = asked.query().is_some_and(|query| query.contains("watch=true"));
        let held = self.kinds().entry(plural).or_default().held.clone().filter(|_| !is_watch);
        if let Some(held) = held {
            held.acquire().await.expect("it is open").forget();
        }
        let mut kinds = self.kinds();
        let kept = kinds.entry(plural).or_default();
        let other = kept.serves.is_some_and(|version| !path.contains(&format!("/{version}/")));
        let (code, body) = match kept.refuses.or(other.then_some(404)) {
            Some(code) => (code, whole(&json!({"kind": "Status", "status": "Failure", "code": code}))),
            None if is_watch => {
                let (sender, receiver) = mpsc::unbounded_channel::<Value>();
                kept.watches.push(sender);
                let lines = stream::unfold(receiver, async |mut receiver| {
                    let line = receiver.recv().await?;
                    Some((Ok::<_, Infallible>(Frame::data(Bytes::from(format!("{line}\n")))), receiver))
                });
                (200, BodyExt::boxed(StreamBody::new(lines)))
            }
            None => (200, whole(&json!({"metadata": {"resourceVersion": "1"}, "items": kept.items}))),
        };
        Response::builder().status(code).body(body).expect("an answer")
    }

    fn kinds(&self) -> MutexGuard<'_, BTreeMap<&'static str, Kept>> {
        self.0.lock().expect("whole")
    }

    fn change<T>(&self, of: Followed, change: impl FnOnce(&mut Kept) -> T) -> T {
        change(self.kinds().entry(of.plural()).or_default())
    }

    /// Waits until somebody watches.
    async fn watched(&self, of: Followed) {
        while self.change(of, |kept| kept.watches.is_empty()) {
            tokio::time::sleep(SHORTEST_PAUSE).await;
        }
    }

    /// Tells those who watch.
    fn tell(&self, of: Followed, event: &Value) {
        self.change(of, |kept| kept.watches.retain(|watch| watch.send(event.clone()).is_ok()));
    }

    /// Ends all watches of a kind, and serves this version of it alone from then on.
    fn serve(&self, of: Followed, version: &'static str) {
        self.change(of, |kept| {
            kept.serves = Some(version);
            kept.watches.clear();
        });
    }

    /// Ends all watches of a kind, and refuses what is asked from then on.
    fn refuse(&self, of: Followed, code: u16) {
        self.change(of, |kept| {
            kept.refuses = Some(code);
            kept.watches.clear();
        });
    }
}

fn whole(value: &Value) -> BoxBody<Bytes, Infallible> {
    Full::new(Bytes::from(value.to_string())).boxed()
}

fn pod(name: &str, address: &str) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-of-{name}"), "resourceVersion": "2"},
        "spec": {"nodeName": "n", "containers": []},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn slice(address: &str) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": "web-x", "resourceVersion": "2",
            "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address]}],
        "ports": [{"port": 80}],
    })
}

/// A source of an API server that has the pods `a` and `b` and a slice, and what is in force.
async fn followed() -> (ApiServer, watch::Receiver<Arc<Ledger>>, tempfile::TempDir) {
    let server = ApiServer::default();
    server.change(Followed::Pods, |kept| kept.items = vec![pod("a", "10.1.0.1"), pod("b", "10.1.0.2")]);
    server.change(Followed::Slices, |kept| kept.items = vec![slice("10.1.0.1")]);
    let directory = tempfile::tempdir().expect("a directory");
    let source = Source::following(server.client(), directory.path().join("kept")).await.expect("a source");
    let in_force = source.subscribe();
    tokio::spawn(source.follow(CancellationToken::new()));
    server.watched(Followed::Pods).await;
    server.watched(Followed::Slices).await;
    (server, in_force, directory)
}

async fn until(in_force: &mut watch::Receiver<Arc<Ledger>>, is_so: impl Fn(&Model) -> bool) {
    let so = in_force.wait_for(|ledger| is_so(&ledger.model()));
    tokio::time::timeout(PATIENCE, so).await.expect("in time").expect("it goes on");
}

fn pods(model: &Model) -> Vec<&str> {
    model.workloads.keys().map(|name| name.name.as_str()).collect()
}

fn endpoint(model: &Model) -> String {
    model.slices[&Name::new("shop", "web-x")].endpoints[0].address.to_string()
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_too_old_lists_again_and_nothing_leaves_before_the_list_is_complete() {
    let (server, mut in_force, _directory) = followed().await;
    until(&mut in_force, |model| pods(model) == ["a", "b"]).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    server.change(Followed::Pods, |kept| {
        kept.items = vec![pod("b", "10.1.0.2"), pod("c", "10.1.0.3")];
        kept.held = Some(gate.clone());
    });
    let gone = json!({"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410,
        "message": "too old resource version", "metadata": {}});
    server.tell(Followed::Pods, &json!({"type": "ERROR", "object": gone}));
    // While pods are listed again, other kinds go on.
    server.tell(Followed::Slices, &json!({"type": "MODIFIED", "object": slice("10.1.0.2")}));
    until(&mut in_force, |model| endpoint(model) == "10.1.0.2").await;
    assert_eq!(pods(&in_force.borrow().model()), ["a", "b"]);
    gate.add_permits(1);
    until(&mut in_force, |model| pods(model) == ["b", "c"]).await;
}

#[tokio::test(start_paused = true)]
async fn while_one_kind_cannot_be_asked_for_it_stays_and_the_others_go_on() {
    for code in [500, 503, 429, 403] {
        let (server, mut in_force, _directory) = followed().await;
        server.refuse(Followed::Slices, code);
        server.tell(Followed::Pods, &json!({"type": "ADDED", "object": pod("c", "10.1.0.3")}));
        server.tell(Followed::Pods, &json!({"type": "DELETED", "object": pod("a", "10.1.0.1")}));
        until(&mut in_force, |model| pods(model) == ["b", "c"]).await;
        tokio::time::advance(10 * LONGEST_PAUSE).await;
        assert_eq!(endpoint(&in_force.borrow().model()), "10.1.0.1", "{code}");
        server.change(Followed::Slices, |kept| {
            kept.refuses = None;
            kept.items = vec![slice("10.1.0.3")];
        });
        // Whoever goes on with a watch, and does not list again, hears of it there.
        server.watched(Followed::Slices).await;
        server.tell(Followed::Slices, &json!({"type": "MODIFIED", "object": slice("10.1.0.3")}));
        until(&mut in_force, |model| endpoint(model) == "10.1.0.3").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_falls_silent_is_given_up_and_what_was_missed_is_heard() {
    let (server, mut in_force, _directory) = followed().await;
    until(&mut in_force, |model| pods(model) == ["a", "b"]).await;
    // Nothing comes any more, and nothing ends: the way to the API server forgot the connection.
    let silent = server.change(Followed::Pods, |kept| {
        kept.items = vec![pod("b", "10.1.0.2")];
        std::mem::take(&mut kept.watches)
    });
    assert!(!silent.is_empty());
    let again = async {
        server.watched(Followed::Pods).await;
        server.tell(Followed::Pods, &json!({"type": "DELETED", "object": pod("a", "10.1.0.1")}));
    };
    let longest = Duration::from_secs(WATCH_SECONDS.into()) + READ_TIMEOUT;
    tokio::time::timeout(longest, again).await.expect("it does not wait for ever");
    until(&mut in_force, |model| pods(model) == ["b"]).await;
    drop(silent);
}

fn tcp_route(name: &str) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-of-{name}"), "resourceVersion": "2"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "db"}],
            "rules": [{"backendRefs": [{"name": "db", "port": 5432}]}],
        },
    })
}

#[tokio::test(start_paused = true)]
async fn a_kind_is_followed_in_the_version_that_is_served_from_the_first_moment_on_and_in_the_next_one() {
    let routes =
        |model: &Model| -> Vec<String> { model.routes.keys().map(|(_, it)| it.name.clone()).collect() };
    let server = ApiServer::default();
    server.serve(Followed::TcpRoutes, "v1alpha2");
    server.change(Followed::TcpRoutes, |kept| kept.items = vec![tcp_route("a")]);
    let directory = tempfile::tempdir().expect("a directory");
    let source = Source::following(server.client(), directory.path().join("kept")).await.expect("a source");
    let mut in_force = source.subscribe();
    assert_eq!(routes(&in_force.borrow().model()), ["a"], "what starts has no half of the cluster");
    let served: Vec<String> = source.standings.borrow().iter().map(|it| it.served().to_owned()).collect();
    assert_eq!(served, ["gateway.networking.k8s.io/v1alpha2"], "its status is written in this version");
    tokio::spawn(source.follow(CancellationToken::new()));
    server.watched(Followed::TcpRoutes).await;
    server.tell(Followed::TcpRoutes, &json!({"type": "ADDED", "object": tcp_route("b")}));
    until(&mut in_force, |model| routes(model) == ["a", "b"]).await;

    // Newer definitions are applied, that do not serve it any more.
    server.serve(Followed::TcpRoutes, "v1");
    server.change(Followed::TcpRoutes, |kept| kept.items = ["a", "b", "c"].map(tcp_route).to_vec());
    until(&mut in_force, |model| routes(model) == ["a", "b", "c"]).await;

    // A kind that is not served at all keeps what it had, until it is served again.
    server.refuse(Followed::TcpRoutes, 404);
    server.watched(Followed::Pods).await;
    server.tell(Followed::Pods, &json!({"type": "ADDED", "object": pod("p", "10.1.0.3")}));
    until(&mut in_force, |model| pods(model) == ["p"]).await;
    tokio::time::advance(10 * LONGEST_PAUSE).await;
    assert_eq!(routes(&in_force.borrow().model()), ["a", "b", "c"]);
    server.change(Followed::TcpRoutes, |kept| (kept.refuses, kept.items) = (None, vec![tcp_route("d")]));
    until(&mut in_force, |model| routes(model) == ["d"]).await;
}
