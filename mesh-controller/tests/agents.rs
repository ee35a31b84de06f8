//! The controller as agents see it: real TLS, real gRPC, on loopback.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

mod world;

use std::time::Duration;

use mesh_core::{
    view::{NodeView, Resource},
    wire::{
        self,
        proto::{
            Ack, CertifyRequest, Hello, JoinRequest, RenewRequest, Report, ViewUpdate, Wants, WorkloadReport,
            workload_report::Enrolment,
        },
    },
};
use tonic::Code;
use world::{World, workload};

#[tokio::test]
async fn a_token_makes_a_machine_a_node_once() {
    let world = World::start(&[]).await;
    let token = world.token("node-a", Duration::from_secs(60));
    let wrong = world.join_as("node-b", &token).await.unwrap_err();
    assert_eq!(wrong.code(), Code::Unauthenticated);
    assert!(wrong.message().contains("for node 'node-a'"), "{wrong}");

    let node = world.join_as("node-a", &token).await.unwrap();
    assert_eq!(node.identity(), "spiffe://td/node/node-a");

    let again = world.join_as("node-a", &token).await.unwrap_err();
    assert_eq!(again.code(), Code::Unauthenticated);
    assert!(again.message().contains("used before"), "{again}");
    world.stop().await;
}

#[tokio::test]
async fn of_two_joins_at_once_with_one_token_one_succeeds() {
    let world = World::start(&[]).await;
    let token = world.token("node-a", Duration::from_secs(60));
    let (one, other) = tokio::join!(world.join_as("node-a", &token), world.join_as("node-a", &token));
    assert_ne!(one.is_ok(), other.is_ok());
    world.stop().await;
}

#[tokio::test]
async fn an_expired_or_invented_token_is_refused() {
    let world = World::start(&[]).await;
    let expired = world.token("node-a", Duration::ZERO);
    let invented = format!("nm1.node-a.{}.{}", "00".repeat(32), "00".repeat(32));
    for (token, reason) in
        [(expired.as_str(), "expired"), (&invented, "not known"), ("x", "not a join token")]
    {
        let refused = world.join_as("node-a", token).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        assert!(refused.message().contains(reason), "{refused}");
    }
    let metrics = world.get("/metrics").await;
    assert!(metrics.contains("nodemesh_joins_total{result=\"refused\"} 3"), "{metrics}");
    world.stop().await;
}

#[tokio::test]
async fn without_a_certificate_a_node_is_told_nothing() {
    let world = World::start(&[]).await;
    let mut stranger = world.stranger().await;
    let renewed = stranger.renew(RenewRequest { csr_der: world::csr().0 }).await.unwrap_err();
    assert_eq!(renewed.code(), Code::Unauthenticated);
    let watched = stranger.watch(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(watched.code(), Code::Unauthenticated);
    world.stop().await;
}

#[tokio::test]
async fn a_certificate_of_another_mesh_does_not_get_in() {
    let (world, other) = (World::start(&[]).await, World::start(&[]).await);
    let node = other.join("node-a").await;
    let mut client = world.client_with(&node).await;
    assert!(client.renew(RenewRequest { csr_der: world::csr().0 }).await.is_err());
    world.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn a_node_gets_certificates_of_its_own_enrolled_workloads_only() {
    let manifests = [
        ("ns.yaml", world::namespace("shop")),
        ("a.yaml", workload("web", "node-a", "10.0.0.1")),
        ("b.yaml", workload("db", "node-b", "10.0.0.2")),
        (
            "c.yaml",
            workload("out", "node-a", "10.0.0.3")
                .replace("labels: {", "labels: {nodemesh.io/enroll: 'false', "),
        ),
    ];
    let world = World::start(&manifests).await;
    let node = world.join("node-a").await;
    let mut client = world.client_with(&node).await;
    let mut certify = async |identity: &str| {
        client.certify(CertifyRequest { identity: identity.into(), csr_der: world::csr().0 }).await
    };
    let own = certify("spiffe://td/ns/shop/sa/web").await.unwrap().into_inner();
    assert_eq!(world::identity_of(&own.chain_der[0]), "spiffe://td/ns/shop/sa/web");
    assert_eq!(own.roots_der.len(), 1);
    for (identity, code) in [
        ("spiffe://td/ns/shop/sa/db", Code::PermissionDenied),
        ("spiffe://td/ns/shop/sa/out", Code::PermissionDenied),
        ("spiffe://td/node/node-b", Code::PermissionDenied),
        ("spiffe://td/controller", Code::PermissionDenied),
        ("spiffe://other/ns/shop/sa/web", Code::PermissionDenied),
        ("nonsense", Code::InvalidArgument),
    ] {
        assert_eq!(certify(identity).await.unwrap_err().code(), code, "{identity}");
    }
    let renewed = client.renew(RenewRequest { csr_der: world::csr().0 }).await.unwrap().into_inner();
    assert_eq!(world::identity_of(&renewed.chain_der[0]), "spiffe://td/node/node-a");
    world.stop().await;
}

#[tokio::test]
async fn a_workloads_certificate_does_not_speak_for_its_node() {
    let world = World::start(&[
        ("ns.yaml", world::namespace("shop")),
        ("a.yaml", workload("web", "node-a", "10.0.0.1")),
    ])
    .await;
    let node = world.join("node-a").await;
    let mut client = world.client_with(&node).await;
    let (csr_der, key) = world::csr();
    let request = CertifyRequest { identity: "spiffe://td/ns/shop/sa/web".into(), csr_der };
    let certificate = client.certify(request).await.unwrap().into_inner();
    let mut as_workload = world.client_with(&world::Joined { certificate, key }).await;
    let refused = as_workload.renew(RenewRequest { csr_der: world::csr().0 }).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    world.stop().await;
}

/// What an agent has after these updates.
fn apply(view: &mut NodeView, update: &ViewUpdate) {
    if update.complete {
        *view = NodeView::default();
    }
    view.apply(wire::delta(update).unwrap());
}

/// The workloads that an update brings.
fn view_of(update: &ViewUpdate) -> Vec<String> {
    let mut view = NodeView::default();
    view.apply(wire::delta(update).unwrap());
    workloads(&view)
}

fn workloads(view: &NodeView) -> Vec<String> {
    let line = |resource: &Resource| match resource {
        Resource::Workload(it) => Some(format!("{} {} {}", it.name, it.addresses[0], it.captured)),
        _ => None,
    };
    view.resources().filter_map(line).collect()
}

#[tokio::test]
async fn a_watch_is_complete_then_changes_and_resumes_by_version() {
    let world = World::start(&[
        ("ns.yaml", world::namespace("shop")),
        ("a.yaml", workload("web", "node-a", "10.0.0.1")),
    ])
    .await;
    let node = world.join("node-a").await;
    let mut watch = world.watch(&node, "").await;
    let first = watch.update().await;
    assert!(first.complete);
    let mut view = NodeView::default();
    apply(&mut view, &first);
    assert_eq!(workloads(&view), ["shop/web 10.0.0.1 false"]);

    world.write("b.yaml", &workload("db", "node-b", "10.0.0.2"));
    let second = watch.update().await;
    assert!(!second.complete);
    assert_eq!(second.upserts.len(), 1, "only what is new comes");
    apply(&mut view, &second);
    let kept = view.clone();
    drop(watch);

    world.write("a.yaml", &workload("web", "node-a", "10.0.0.9"));
    world.until("/api/v1/workloads", |text| text.contains("10.0.0.9")).await;
    let mut resumed = world.watch(&node, &second.version).await;
    let missed = resumed.update().await;
    assert!(!missed.complete, "the version is still kept");
    assert_eq!(missed.upserts.len(), 1);
    let mut view = kept;
    apply(&mut view, &missed);
    assert_eq!(workloads(&view), ["shop/db 10.0.0.2 false", "shop/web 10.0.0.9 false"]);

    let mut unknown = world.watch(&node, "elsewhere-7").await;
    assert!(unknown.update().await.complete, "a version that nobody knows");
    assert_eq!(resumed.end().await.code(), Code::Aborted, "a newer connection took over");
    world.stop().await;
}

#[tokio::test]
async fn an_agent_that_does_not_say_that_it_can_ask_is_told_everything_and_one_that_does_what_it_asks_for() {
    let manifests = [
        ("ns.yaml", world::namespace("shop")),
        ("a.yaml", workload("web", "node-a", "10.0.0.1")),
        ("b.yaml", workload("db", "node-b", "10.0.0.2")),
        ("c.yaml", workload("api", "node-c", "10.0.0.3")),
    ];
    let world = World::start_with(&manifests, 0).await;
    let (a, b) = (world.join("node-a").await, world.join("node-b").await);
    let address = |last: u8| vec![10, 0, 0, last];
    let mut old = world.watch(&a, "").await;
    let update = old.update().await;
    assert_eq!(
        view_of(&update),
        ["shop/api 10.0.0.3 false", "shop/db 10.0.0.2 false", "shop/web 10.0.0.1 false"]
    );
    assert!(update.upserts.iter().all(|it| it.key != "demand"), "it would refuse that");
    // What it asks for nevertheless changes nothing.
    old.say(Wants { asked: vec![address(9)], given_up: vec![] }).await;

    let hello = Hello { by_demand: true, asked: vec![address(1)], ..Hello::default() };
    let mut new = world.watch_as(&b, hello).await;
    let update = new.update().await;
    assert_eq!(view_of(&update), ["shop/db 10.0.0.2 false", "shop/web 10.0.0.1 false"]);
    assert!(update.upserts.iter().any(|it| it.key == "demand"));
    let mut view = NodeView::default();
    apply(&mut view, &update);
    // What is no address is nobody's business.
    new.say(Wants { asked: vec![address(3), address(9), vec![1, 2, 3]], given_up: vec![address(1)] }).await;
    let update = new.update().await;
    assert!(!update.complete);
    assert_eq!(update.removes, ["workload/shop/web"]);
    apply(&mut view, &update);
    assert_eq!(workloads(&view), ["shop/api 10.0.0.3 false", "shop/db 10.0.0.2 false"]);
    assert!(update.upserts.iter().any(|it| it.key == "nobody/10.0.0.9"));

    // The same agent after a downgrade: what it said before counts no more.
    let mut downgraded = world.watch(&b, &update.version).await;
    let update = downgraded.update().await;
    assert_eq!(update.removes, ["demand", "nobody/10.0.0.9"]);
    apply(&mut view, &update);
    assert_eq!(workloads(&view).len(), 3);
    world.write("d.yaml", &workload("late", "node-c", "10.0.0.4"));
    assert_eq!(view_of(&old.update().await), ["shop/late 10.0.0.4 false"]);
    assert_eq!(view_of(&downgraded.update().await), ["shop/late 10.0.0.4 false"]);
    world.stop().await;
}

#[tokio::test]
async fn acks_and_errors_are_seen_in_the_status() {
    let world = World::start(&[("a.yaml", workload("web", "node-a", "10.0.0.1"))]).await;
    world.until("/api/v1/status", |text| text.contains("\"connected\":false")).await;
    let node = world.join("node-a").await;
    let mut watch = world.watch(&node, "").await;
    let version = watch.update().await.version;
    watch.say(Ack { version: version.clone(), error: String::new() }).await;
    world.until("/api/v1/status", |text| text.contains("\"in_sync\":true")).await;
    watch.say(Ack { version, error: "no room".into() }).await;
    world.until("/api/v1/status", |text| text.contains("\"error\":\"no room\"")).await;
    world.until("/metrics", |text| text.contains("nodemesh_agents_connected 1")).await;
    drop(watch);
    world.until("/metrics", |text| text.contains("nodemesh_agents_connected 0")).await;
    world.stop().await;
}

#[tokio::test]
async fn a_captured_workload_is_seen_by_all_and_stays_so_over_a_restart() {
    let world = World::start(&[
        ("ns.yaml", world::namespace("shop")),
        ("a.yaml", workload("web", "node-a", "10.0.0.1") + &workload("db", "node-b", "10.0.0.2")),
    ])
    .await;
    let (a, b) = (world.join("node-a").await, world.join("node-b").await);
    let mut at_a = world.watch(&a, "").await;
    let mut at_b = world.watch(&b, "").await;
    at_a.update().await;
    let mut view = NodeView::default();
    apply(&mut view, &at_b.update().await);
    let word = |workload: &str| WorkloadReport {
        workload: workload.into(),
        state: Enrolment::Enrolled.into(),
        ..WorkloadReport::default()
    };
    // What it says of another node's workload does not count.
    at_a.say(Report { workloads: vec![word("shop/db"), word("shop/web")] }).await;
    apply(&mut view, &at_b.update().await);
    assert_eq!(workloads(&view), ["shop/db 10.0.0.2 false", "shop/web 10.0.0.1 true"]);

    world.until_saved("reports.json", "shop/web").await;
    let world = world.restart().await;
    let mut after = world.watch(&b, "").await;
    let first = after.update().await;
    assert!(first.complete, "another process counts from its own epoch");
    let mut view = NodeView::default();
    apply(&mut view, &first);
    assert_eq!(workloads(&view), ["shop/db 10.0.0.2 false", "shop/web 10.0.0.1 true"]);
    world.stop().await;
}

#[tokio::test]
async fn a_bad_document_is_refused_alone_and_the_last_good_one_stays() {
    let good = workload("web", "node-a", "10.0.0.1") + &workload("db", "node-a", "10.0.0.2");
    let world = World::start(&[("a.yaml", good)]).await;
    let node = world.join("node-a").await;
    let mut watch = world.watch(&node, "").await;
    let mut view = NodeView::default();
    apply(&mut view, &watch.update().await);
    let bad = workload("web", "node-a", "10.0.0.1000") + &workload("db", "node-a", "10.0.0.3");
    world.write("a.yaml", &bad);
    apply(&mut view, &watch.update().await);
    assert_eq!(workloads(&view), ["shop/db 10.0.0.3 false", "shop/web 10.0.0.1 false"]);
    let status = world.get("/api/v1/status").await;
    for part in ["\"refused\":1", "spec.addresses[0]", "a.yaml\",\"line\":5", "\"last_good_in_force\":true"] {
        assert!(status.contains(part), "{part} is not in {status}");
    }
    let metrics = world.get("/metrics").await;
    assert!(metrics.contains("nodemesh_documents{state=\"refused\"} 1"), "{metrics}");
    world.stop().await;
}

#[tokio::test]
async fn a_changed_file_is_in_force_well_under_200_ms() {
    let world = World::start(&[]).await;
    let node = world.join("node-a").await;
    let mut watch = world.watch(&node, "").await;
    watch.update().await;
    let mut best = Duration::MAX;
    for last in 1..=10 {
        let start = std::time::Instant::now();
        world.write("a.yaml", &workload("web", "node-a", &format!("10.0.0.{last}")));
        watch.update().await;
        best = best.min(start.elapsed());
    }
    // The best of ten: what the machine does besides is not measured.
    assert!(best < Duration::from_millis(200), "{best:?}");
    world.stop().await;
}

#[tokio::test]
async fn a_rotated_root_reaches_agents_and_those_that_were_away_still_come_in() {
    let world = World::start(&[]).await;
    let node = world.join("node-a").await;
    let mut watch = world.watch(&node, "").await;
    watch.update().await;
    world.rotate_root();
    let update = watch.update().await;
    let delta = wire::delta(&update).unwrap();
    let [Resource::Mesh(mesh)] = delta.upserts.as_slice() else { panic!("{delta:?}") };
    assert_eq!(mesh.roots.len(), 2);
    // This agent knows the old root only, and shows a certificate below it.
    let mut client = world.client_with(&node).await;
    let renewed = client.renew(RenewRequest { csr_der: world::csr().0 }).await.unwrap().into_inner();
    assert_eq!(renewed.roots_der.len(), 2);
    // A machine that joins now is told the new root by its token.
    world.join("node-b").await;
    world.stop().await;
}

#[tokio::test]
async fn a_silent_connection_does_not_keep_others_out() {
    let world = World::start(&[]).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(tokio::net::TcpStream::connect(world.agents_address()).await.unwrap());
    }
    world.join("node-a").await;
    world.stop().await;
}

#[tokio::test]
async fn an_address_that_floods_keeps_itself_out_alone() {
    let world = World::start(&[]).await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.9.9:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(world.agents_address()).await.unwrap());
    }
    // All but 32 are dropped, though more would fit into all handshakes.
    world
        .until("/metrics", |text| text.contains("nodemesh_limit_hits_total{limit=\"handshakes\"} 268"))
        .await;
    world.join("node-a").await;
    world.stop().await;
}

#[tokio::test]
async fn whoever_asks_too_often_is_told_so_and_nobody_else() {
    let world = World::start(&[
        ("ns.yaml", world::namespace("shop")),
        ("a.yaml", workload("web", "node-a", "10.0.0.1") + &workload("db", "node-b", "10.0.0.2")),
    ])
    .await;
    let (a, b) = (world.join("node-a").await, world.join("node-b").await);
    let (mut greedy, mut other) = (world.client_with(&a).await, world.client_with(&b).await);
    // Asking for what it may not have counts as well, and costs no signature.
    let request = |identity: &str| CertifyRequest { identity: identity.into(), csr_der: vec![] };
    let mut codes = vec![];
    while codes.last() != Some(&Code::ResourceExhausted) {
        codes.push(greedy.certify(request("spiffe://td/ns/shop/sa/db")).await.unwrap_err().code());
        assert!(codes.len() < 100_000, "there is no limit");
    }
    assert!(codes.len() > 2048 && codes[..2048].iter().all(|code| *code == Code::PermissionDenied));
    other.renew(RenewRequest { csr_der: world::csr().0 }).await.unwrap();
    // Over one connection: a handshake for each would take longer than the limit needs to recover.
    let mut stranger = world.enrolment().await;
    let join = JoinRequest { node: "node-a".into(), token: "x".into(), ..JoinRequest::default() };
    let mut joins = 0;
    while stranger.join(join.clone()).await.unwrap_err().code() != Code::ResourceExhausted {
        joins += 1;
        assert!(joins < 10_000, "there is no limit");
    }
    assert!(joins >= 98, "two of the hundred were used by those who joined: {joins}");
    for limit in ["requests", "joins"] {
        world
            .until("/metrics", |text| text.contains(&format!("limit_hits_total{{limit=\"{limit}\"}}")))
            .await;
    }
    world.stop().await;
}

#[tokio::test]
async fn a_message_beyond_its_limit_is_refused_and_the_connection_goes_on() {
    let world = World::start(&[]).await;
    let node = world.join("node-a").await;
    let mut client = world.client_with(&node).await;
    let huge = client.renew(RenewRequest { csr_der: vec![0; 2 << 20] }).await.unwrap_err();
    assert_eq!(huge.code(), Code::OutOfRange);
    client.renew(RenewRequest { csr_der: world::csr().0 }).await.unwrap();
    world.stop().await;
}

#[tokio::test]
async fn the_key_of_another_node_gets_no_certificate_by_its_name() {
    let world = World::start(&[]).await;
    let (a, b) = (world.join("node-a").await, world.join("node-b").await);
    // The certificate of one with the key of the other does not even shake hands.
    let mixed = world::Joined { certificate: a.certificate.clone(), key: b.key.clone() };
    assert!(world.try_client_with(&mixed).await.is_none());
    // A node is renewed as itself, whatever its request names: the connection says who asks.
    let csr_der = world::csr_naming("spiffe://td/node/node-a");
    let renewed = world.client_with(&b).await.renew(RenewRequest { csr_der }).await.unwrap().into_inner();
    assert_eq!(world::identity_of(&renewed.chain_der[0]), "spiffe://td/node/node-b");
    world.stop().await;
}
