//! The agent's control side against a controller of the test's own, over real TLS and gRPC.

// Clippy's leave to unwrap in tests covers test functions, not the helpers beside them.
#![allow(clippy::unwrap_used)]

mod fake;

use std::{
    collections::BTreeMap, future::Future, os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc,
    time::Duration,
};

use fake::{Event, Fake};
use mesh_agent::{
    config::{Config, Invocation},
    control::Control,
    identity::{node::NodeError, store::Identities},
    rpc::Connection,
    surroundings::Surroundings,
    view::{Enrolment, Role},
};
use mesh_core::{
    identity::SpiffeId,
    model::{Mode, Name, Workload},
    refusal::Reason,
    view::{Delta, Mesh, Resource, Snapshot},
    wire::{self, proto},
};
use rustls::{ClientConnection, ServerConnection};
use tokio_util::sync::CancellationToken;

/// A node's worth of files, and the agent's control side on them.
struct Node {
    scratch: tempfile::TempDir,
    identities: Arc<Identities>,
}

impl Node {
    fn new() -> Self {
        Self { scratch: tempfile::tempdir_in("/dev/shm").unwrap(), identities: Arc::default() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join("run").join(name)
    }

    fn config(&self, fake: &Fake) -> Config {
        let run_dir = self.scratch.path().join("run").display().to_string();
        let controller = fake.address.to_string();
        let words = ["mesh-agent", "--node", "n1", "--controller", &controller, "--run-dir", &run_dir];
        match Invocation::parse(words).unwrap() {
            Invocation::Run(config) => *config,
            other => panic!("{other:?}"),
        }
    }

    async fn start_with(&self, fake: &Fake, token: Option<String>) -> Result<Control, NodeError> {
        let mut config = self.config(fake);
        if let Some(token) = token {
            let file = self.scratch.path().join("token");
            std::fs::write(&file, token).unwrap();
            config.join_token_file = Some(file);
        }
        let (identities, surroundings) = (self.identities.clone(), Surroundings::default());
        Control::start(&config, identities, Role::Owner, surroundings, CancellationToken::new()).await
    }

    async fn start(&self, fake: &Fake) -> Control {
        self.start_with(fake, Some(fake.token("n1"))).await.unwrap()
    }
}

/// Fails a test that waits for what does not come.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it did not happen")
}

async fn snapshot(control: &mut Control, version: &str) -> Arc<Snapshot> {
    let is_it = |view: &Option<Arc<Snapshot>>| view.as_ref().is_some_and(|view| view.version() == version);
    control.snapshots.wait_for(is_it).await.unwrap().clone().unwrap()
}

fn mesh(roots: Vec<Vec<u8>>) -> Resource {
    Resource::Mesh(Arc::new(Mesh { trust_domain: "td".parse().unwrap(), roots }))
}

fn workload(name: &str, node: &str) -> Resource {
    Resource::Workload(Arc::new(Workload {
        name: Name::new("shop", name),
        uid: String::new(),
        node: node.into(),
        service_account: name.into(),
        addresses: vec![],
        labels: BTreeMap::new(),
        enrolled: true,
        captured: false,
        mode: Mode::Permissive,
        checks: vec![],
    }))
}

fn identity(name: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://td/ns/shop/sa/{name}")).unwrap()
}

fn complete(version: &str, resources: Vec<Resource>) -> proto::ViewUpdate {
    wire::update(version.into(), true, &Delta { upserts: resources, removes: vec![] })
}

fn delta(version: &str, upserts: Vec<Resource>, removes: &[&str]) -> proto::ViewUpdate {
    let removes = removes.iter().map(|key| key.parse().unwrap()).collect();
    wire::update(version.into(), false, &Delta { upserts, removes })
}

fn accepted(version: &str) -> (String, String) {
    (version.into(), String::new())
}

#[tokio::test]
async fn a_controller_with_another_root_is_not_joined() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let token = fake.token_for_root("n1", &[7; 32]);
    let error = soon(node.start_with(&fake, Some(token))).await.unwrap_err();
    assert!(error.to_string().contains("root that the join token names"), "{error}");
    assert!(fake.drain().is_empty(), "the token must not reach somebody else");
    assert!(!node.file("node.json").exists());
}

#[tokio::test]
async fn somebody_of_the_mesh_in_the_controllers_place_is_not_joined() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    fake.serve_as("spiffe://td/node/n2");
    soon(node.start_with(&fake, Some(fake.token("n1")))).await.unwrap_err();
    assert!(fake.drain().is_empty());
}

#[tokio::test]
async fn a_token_that_cannot_be_used_is_refused_with_its_cure() {
    let (fake, node) = (Fake::start().await, Node::new());
    let check = async |token: Option<String>, expected: &str| {
        let error = soon(node.start_with(&fake, token)).await.unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("mesh-controller token"), "{error}");
    };
    check(None, "no valid certificate").await;
    check(Some("nm1.n1".into()), "cut short").await;
    check(Some(fake.token("n2")), "for node n2").await;
    node.start(&fake).await.stop().await;
    std::fs::remove_file(node.file("node.json")).unwrap();
    check(Some(fake.token("n1")), "the token was used").await;
}

/// The files of a pod: its token, and the roots of the mesh.
fn pod(node: &Node, fake: &Fake, token: &str) -> Config {
    let [token_file, roots_file] = ["pod-token", "roots.pem"].map(|name| node.scratch.path().join(name));
    std::fs::write(&token_file, token).unwrap();
    std::fs::write(&roots_file, fake.roots_pem()).unwrap();
    let config = node.config(fake);
    Config { join_service_account_token: Some(token_file), roots: Some(roots_file), ..config }
}

async fn start_pod(node: &Node, config: &Config) -> Result<Control, NodeError> {
    let (identities, surroundings) = (node.identities.clone(), Surroundings::default());
    Control::start(config, identities, Role::Owner, surroundings, CancellationToken::new()).await
}

#[tokio::test]
async fn a_pods_token_joins_where_the_controller_leads_to_a_root_of_the_file() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let config = pod(&node, &fake, "good");
    soon(start_pod(&node, &config)).await.unwrap().stop().await;
    let joins = fake.drain().iter().filter(|event| matches!(event, Event::Join { .. })).count();
    assert_eq!(joins, 1);
    std::fs::remove_file(config.join_service_account_token.as_ref().unwrap()).unwrap();
    soon(start_pod(&node, &config)).await.unwrap().stop().await;
    assert!(!fake.drain().iter().any(|event| matches!(event, Event::Join { .. })), "it has a certificate");
}

#[tokio::test]
async fn a_pod_waits_for_what_comes_by_itself_and_not_for_what_somebody_has_to_put_right() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let mut config = pod(&node, &fake, "denied: another node");
    let error = soon(start_pod(&node, &config)).await.unwrap_err().to_string();
    assert!(error.contains("refused the join: denied: another node"), "{error}");

    // An expired token: the next one is in the same file. Roots that are not there yet: so are they.
    let (token, roots) = (config.join_service_account_token.clone().unwrap(), config.roots.clone().unwrap());
    std::fs::write(&token, "expired").unwrap();
    let start = tokio::spawn({
        let (identities, config) = (node.identities.clone(), config.clone());
        async move {
            let shutdown = CancellationToken::new();
            Control::start(&config, identities, Role::Owner, Surroundings::default(), shutdown).await
        }
    });
    let joined = |event: Event| matches!(event, Event::Join { .. }).then_some(());
    for _ in 0..3 {
        soon(fake.expect(joined)).await;
    }
    std::fs::write(&token, "good").unwrap();
    soon(start).await.unwrap().unwrap().stop().await;

    // A chain that leads to none of the roots is one of another controller, or the file is old.
    let other = Fake::start().await;
    std::fs::write(&roots, other.roots_pem()).unwrap();
    config.run_dir = node.scratch.path().join("run-2");
    fake.drain();
    let start = tokio::spawn({
        let (identities, config) = (node.identities.clone(), config.clone());
        async move {
            let shutdown = CancellationToken::new();
            Control::start(&config, identities, Role::Owner, Surroundings::default(), shutdown).await
        }
    });
    soon(fake.refused_handshake()).await;
    assert!(fake.drain().is_empty(), "the token must not reach somebody else");
    std::fs::write(&roots, [other.roots_pem(), fake.roots_pem()].concat()).unwrap();
    soon(start).await.unwrap().unwrap().stop().await;
}

#[tokio::test]
async fn an_expired_certificate_is_had_anew_with_the_pods_token() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    fake.set_leaf_life(time::Duration::seconds(2));
    let config = pod(&node, &fake, "good");
    let control = soon(start_pod(&node, &config)).await.unwrap();
    fake.refuse_renewals(true);
    fake.drain();
    let joined = |event: Event| matches!(event, Event::Join { .. }).then_some(());
    soon(fake.expect(joined)).await;
    fake.set_leaf_life(time::Duration::HOUR);
    let mut certificates = control.certificates.clone();
    let lasts = |all: &mesh_agent::identity::Certificates| {
        let in_a_while = time::OffsetDateTime::now_utc() + time::Duration::MINUTE;
        all.values().any(|it| it.expires.is_some_and(|expires| expires > in_a_while))
    };
    soon(certificates.wait_for(lasts)).await.unwrap();
    control.stop().await;
}

#[tokio::test]
async fn a_certificate_that_leads_to_no_root_of_the_file_counts_as_lost() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let config = pod(&node, &fake, "good");
    soon(start_pod(&node, &config)).await.unwrap().stop().await;
    // While it was away its root was replaced, and taken from the bundle.
    fake.add_root();
    fake.drop_first_root();
    std::fs::write(config.roots.as_ref().unwrap(), fake.roots_pem()).unwrap();
    fake.drain();
    let control = soon(start_pod(&node, &config)).await.unwrap();
    soon(fake.hello()).await;
    control.stop().await;
}

#[tokio::test]
async fn the_nodes_key_is_private_and_serves_after_a_restart_without_a_token() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    node.start(&fake).await.stop().await;
    assert!(fake.drain().iter().any(|event| matches!(event, Event::Join { node } if node == "n1")));
    let mode = std::fs::metadata(node.file("node.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let control = node.start_with(&fake, None).await.unwrap();
    soon(fake.hello()).await;
    control.stop().await;
    assert!(!fake.drain().iter().any(|event| matches!(event, Event::Join { .. })), "joined twice");
}

#[tokio::test]
async fn a_damaged_node_file_is_an_error_with_its_cure() {
    let (fake, node) = (Fake::start().await, Node::new());
    node.start(&fake).await.stop().await;
    std::fs::write(node.file("node.json"), "{}").unwrap();
    let error = node.start_with(&fake, None).await.unwrap_err();
    assert!(matches!(error, NodeError::Damaged { .. }));
    assert!(error.to_string().contains("remove it and start the agent with a fresh join token"), "{error}");
}

#[tokio::test]
async fn workloads_of_this_node_get_certificates_and_lose_them_when_they_go() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let mut control = node.start(&fake).await;
    soon(fake.hello()).await;
    let resources = vec![mesh(fake.roots()), workload("web", "n1"), workload("far", "n2")];
    fake.send(complete("1", resources)).await;
    soon(control.certificates.wait_for(|all| all.contains_key(&identity("web")))).await.unwrap();
    assert!(node.identities.client(&identity("web")).is_ok());
    assert_eq!(node.identities.client(&identity("far")).unwrap_err(), Reason::NoCertificate);
    let asked_for_far = |event: &Event| matches!(event, Event::Certify { identity } if *identity == "spiffe://td/ns/shop/sa/far");
    assert!(!fake.drain().iter().any(asked_for_far), "an identity of another node was asked for");
    let keys = || std::fs::read_dir(node.file("workloads")).unwrap().count();
    assert_eq!(keys(), 1);

    fake.send(delta("2", vec![], &["workload/shop/web"])).await;
    soon(snapshot(&mut control, "2")).await;
    assert!(node.identities.server(&identity("web")).is_ok(), "what it has open ends in order");
    soon(control.certificates.wait_for(|all| !all.contains_key(&identity("web")))).await.unwrap();
    assert_eq!(node.identities.client(&identity("web")).unwrap_err(), Reason::NoCertificate);
    assert_eq!(keys(), 0, "the key must go with the identity");
    control.stop().await;
}

#[tokio::test]
async fn a_workload_whose_place_is_taken_at_once_leaves_its_certificate_to_its_successor() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let mut control = node.start(&fake).await;
    soon(fake.hello()).await;
    fake.send(complete("1", vec![mesh(fake.roots()), workload("web", "n1")])).await;
    soon(control.certificates.wait_for(|all| all.contains_key(&identity("web")))).await.unwrap();
    fake.send(delta("2", vec![], &["workload/shop/web"])).await;
    soon(snapshot(&mut control, "2")).await;
    // One that never leaves is certified after the successor came: by then the first would have been asked for again.
    fake.send(delta("3", vec![workload("web", "n1"), workload("last", "n1")], &[])).await;
    soon(control.certificates.wait_for(|all| all.contains_key(&identity("last")))).await.unwrap();
    assert!(node.identities.server(&identity("web")).is_ok());
    let asked = |event: &Event| matches!(event, Event::Certify { identity } if identity.ends_with("/web"));
    assert_eq!(fake.drain().into_iter().filter(asked).count(), 1);
    control.stop().await;
}

#[tokio::test]
async fn a_node_full_of_workloads_is_certified_within_seconds() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let mut control = node.start(&fake).await;
    soon(fake.hello()).await;
    let begun = std::time::Instant::now();
    let names = (0..250).map(|number| format!("w{number}"));
    let resources = names.map(|name| workload(&name, "n1")).chain([mesh(fake.roots())]).collect();
    fake.send(complete("1", resources)).await;
    // The node's own is among them.
    soon(control.certificates.wait_for(|all| all.len() == 251)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    control.stop().await;
}

#[tokio::test]
async fn certificates_are_renewed_in_the_second_half_of_their_life_and_never_missing() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    fake.set_leaf_life(time::Duration::seconds(5));
    let mut control = node.start(&fake).await;
    soon(fake.hello()).await;
    fake.send(complete("1", vec![mesh(fake.roots()), workload("web", "n1")])).await;
    let ids = [identity("web"), SpiffeId::parse("spiffe://td/node/n1").unwrap()];
    let all_there = |all: &mesh_agent::identity::Certificates| ids.iter().all(|id| all.contains_key(id));
    let first = soon(control.certificates.wait_for(all_there)).await.unwrap().clone();
    let begun = std::time::Instant::now();
    for id in ids {
        let newer = |all: &mesh_agent::identity::Certificates| {
            assert!(node.identities.server(&identity("web")).is_ok());
            all[&id].expires > first[&id].expires
        };
        soon(control.certificates.wait_for(newer)).await.unwrap();
    }
    assert!(begun.elapsed() > Duration::from_secs(1), "renewed long before half-life");
    let renewed_itself = |event: &Event| matches!(event, Event::Renew { by } if by == "spiffe://td/node/n1");
    assert!(fake.drain().iter().any(renewed_itself));
    // The node's renewed certificate opens the next connection.
    fake.cut();
    assert_eq!(soon(fake.hello()).await, "1");
    control.stop().await;
}

#[tokio::test]
async fn views_are_put_in_force_whole_or_not_at_all() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let mut control = node.start(&fake).await;
    assert_eq!(soon(fake.hello()).await, "");
    fake.send(complete("1", vec![mesh(fake.roots()), workload("a", "n1")])).await;
    assert_eq!(soon(fake.ack()).await, accepted("1"));
    fake.send(delta("2", vec![workload("b", "n2")], &["workload/shop/a"])).await;
    assert_eq!(soon(fake.ack()).await, accepted("2"));
    let view = soon(snapshot(&mut control, "2")).await;
    assert_eq!(view.workloads().map(|w| w.name.to_string()).collect::<Vec<_>>(), ["shop/b"]);

    let mut bad = delta("3", vec![workload("c", "n2")], &["workload/shop/b"]);
    bad.upserts.push(proto::Resource { key: "workload/shop/d".into(), body: None });
    fake.send(bad).await;
    let (version, error) = soon(fake.ack()).await;
    assert_eq!(version, "3");
    assert!(error.contains("workload/shop/d"), "{error}");
    assert_eq!(control.snapshots.borrow().as_ref().unwrap().version(), "2");

    // It asks anew from what it has, and what comes then counts.
    assert_eq!(soon(fake.hello()).await, "2");
    fake.send(delta("4", vec![workload("e", "n2")], &[])).await;
    assert_eq!(soon(fake.ack()).await, accepted("4"));
    let view = soon(snapshot(&mut control, "4")).await;
    assert_eq!(view.workloads().count(), 2);
    control.stop().await;
}

#[tokio::test]
async fn a_lost_stream_resumes_with_its_version_and_says_all_reports_again() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let mut control = node.start(&fake).await;
    control.reports.set(&Name::new("shop", "a"), Enrolment::Enrolled, "");
    soon(fake.hello()).await;
    let (enrolled, failed) = (
        proto::workload_report::Enrolment::Enrolled as i32,
        proto::workload_report::Enrolment::Failed as i32,
    );
    assert_eq!(soon(fake.report()).await, [("shop/a".into(), enrolled, String::new())]);
    control.reports.set(&Name::new("shop", "b"), Enrolment::Failed, "no veth");
    assert_eq!(soon(fake.report()).await, [("shop/b".into(), failed, "no veth".into())]);
    fake.send(complete("1", vec![mesh(fake.roots())])).await;
    assert_eq!(soon(fake.ack()).await, accepted("1"));

    fake.cut();
    soon(control.connection.wait_for(|connection| matches!(connection, Connection::Away(_)))).await.unwrap();
    assert_eq!(soon(fake.hello()).await, "1");
    soon(control.connection.wait_for(|connection| *connection == Connection::Open)).await.unwrap();
    assert_eq!(soon(fake.report()).await.len(), 2);
    control.stop().await;
}

#[tokio::test]
async fn an_agent_restarts_while_the_controller_is_away() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let mut control = node.start(&fake).await;
    soon(fake.hello()).await;
    fake.send(complete("1", vec![mesh(fake.roots()), workload("web", "n1")])).await;
    soon(control.certificates.wait_for(|all| all.contains_key(&identity("web")))).await.unwrap();
    control.stop().await;
    fake.stop();

    let node = Node { identities: Arc::default(), ..node };
    let control = node.start_with(&fake, None).await.unwrap();
    assert_eq!(control.snapshots.borrow().as_ref().unwrap().version(), "1");
    assert!(node.identities.client(&identity("web")).is_ok());
    assert!(matches!(*control.connection.borrow(), Connection::Away(_)));
    control.stop().await;
}

#[tokio::test]
async fn a_node_in_the_controllers_place_is_not_followed() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    let mut control = node.start(&fake).await;
    soon(fake.hello()).await;
    fake.serve_as("spiffe://td/node/n2");
    fake.cut();
    let told = |connection: &Connection| matches!(connection, Connection::Away(reason) if reason.contains("spiffe://td/node/n2, not the controller"));
    soon(control.connection.wait_for(told)).await.unwrap();
    fake.serve_as("spiffe://td/controller");
    soon(fake.hello()).await;
    control.stop().await;
}

#[tokio::test]
async fn a_partition_is_noticed_within_some_ten_seconds() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    node.start(&fake).await.stop().await;
    let (wire, through) = fake::Wire::to(fake.address).await;
    let mut config = node.config(&fake);
    config.controller = through.into();
    let (identities, surroundings) = (node.identities.clone(), Surroundings::default());
    let mut control =
        Control::start(&config, identities, Role::Owner, surroundings, CancellationToken::new())
            .await
            .unwrap();
    soon(control.connection.wait_for(|connection| *connection == Connection::Open)).await.unwrap();
    let begun = std::time::Instant::now();
    wire.hold();
    soon(control.connection.wait_for(|connection| matches!(connection, Connection::Away(_)))).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    fake.drain();
    wire.release();
    soon(fake.hello()).await;
    control.stop().await;
}

#[tokio::test]
async fn a_root_is_rotated_without_a_gap() {
    let (mut fake, node) = (Fake::start().await, Node::new());
    // Short enough that the renewals after the rotation are not spread over long.
    fake.set_leaf_life(time::Duration::seconds(20));
    let mut control = node.start(&fake).await;
    soon(fake.hello()).await;
    fake.send(complete("1", vec![mesh(fake.roots()), workload("a", "n1"), workload("b", "n1")])).await;
    let (a, b) = (identity("a"), identity("b"));
    let both = |all: &mesh_agent::identity::Certificates| all.contains_key(&a) && all.contains_key(&b);
    let first = soon(control.certificates.wait_for(both)).await.unwrap().clone();
    handshake(&node.identities, &a, &b);

    fake.set_leaf_life(time::Duration::DAY);
    fake.add_root();
    fake.send(delta("2", vec![mesh(fake.roots())], &[])).await;
    // Both roots count at once, whichever a peer's certificate leads to.
    for id in first.keys() {
        let renewed = |all: &mesh_agent::identity::Certificates| {
            if node.identities.client(&a).is_ok() && node.identities.server(&b).is_ok() {
                handshake(&node.identities, &a, &b);
            }
            all[id].expires > first[id].expires
        };
        soon(control.certificates.wait_for(renewed)).await.unwrap();
    }

    // The node's own renewal ends the connection that its old certificate had opened.
    assert_eq!(soon(fake.hello()).await, "2");
    fake.drop_first_root();
    fake.send(delta("3", vec![mesh(fake.roots())], &[])).await;
    assert_eq!(soon(fake.expect_ack_of("3")).await, "");
    // The node's own certificate and the roots that it checks the controller with are the new ones too.
    fake.cut();
    assert_eq!(soon(fake.hello()).await, "3");
    handshake(&node.identities, &a, &b);
    control.stop().await;
}

/// A connection of one identity to another, in memory: each takes the other's certificate.
#[track_caller]
fn handshake(identities: &Identities, from: &SpiffeId, to: &SpiffeId) {
    let name = rustls_pki_types::ServerName::try_from("workload").unwrap();
    let mut client = ClientConnection::new(identities.client(from).unwrap(), name).unwrap();
    let mut server = ServerConnection::new(identities.server(to).unwrap()).unwrap();
    let mut wire = Vec::new();
    while client.is_handshaking() || server.is_handshaking() {
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets().unwrap();
        wire.clear();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets().unwrap();
        wire.clear();
    }
}
