//! The data path of two agents, from application to application: what arrives, who was seen, what is recorded.
//! Needs root: the agent's sockets carry a mark and a foreign source address.

#[path = "data_path/world.rs"]
mod world;

use std::{io::ErrorKind, net::SocketAddr, time::Duration};

use mesh_agent::{
    connection::{Accepted, Direction, Limits, serve_inbound, serve_outbound},
    metrics::AuditLabels,
};
use mesh_core::model::{Action, Distribution, Enforcement, Mode, Place, Policy, Rule, Source, Traits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::*;

#[tokio::test(flavor = "multi_thread")]
async fn bytes_arrive_unchanged_around_every_edge_with_half_close() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    echo(app);
    let to = world.outbound(web);
    for base in [0usize, 16 * 1024, 64 * 1024] {
        for len in [base.saturating_sub(1), base, base + 1] {
            let sent = pattern(len, len as u32);
            assert!(ask(to, &sent).await.unwrap() == sent, "{len} bytes");
        }
    }
    let lines = world.source.log_of(9).await;
    assert!(lines.iter().all(|line| line["outcome"] == "ok"), "{lines:?}");
    assert!(lines.iter().any(|line| line["bytes_sent"] == 65537 && line["bytes_received"] == 65537));
}

#[tokio::test(flavor = "multi_thread")]
async fn forty_megabytes_each_way_at_once_arrive_unchanged() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let to = world.outbound(web);
    const LEN: usize = 40 << 20;
    let exchange = async |stream: tokio::net::TcpStream, own: u32, other: u32| {
        let (mut read, mut write) = stream.into_split();
        let send = async {
            write.write_all(&pattern(LEN, own)).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let mut got = Vec::with_capacity(LEN);
        let (_, received) = tokio::join!(send, read.read_to_end(&mut got));
        received.unwrap();
        assert!(got == pattern(LEN, other));
    };
    let client = connect(to).await;
    let (server, _) = accept(&app).await;
    tokio::time::timeout(Duration::from_secs(60), async {
        tokio::join!(exchange(client, 1, 2), exchange(server, 2, 1));
    })
    .await
    .expect("does not hang");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_may_speak_first_and_sees_the_clients_address() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let mut client = connect(world.outbound(web)).await;
    let (mut server, peer) = accept(&app).await;
    assert_eq!(peer.ip(), ip(CLIENT));
    server.write_all(b"220 ready\r\n").await.unwrap();
    let mut greeting = [0; 11];
    in_time(client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready\r\n");
    // The server ends first, the client still speaks.
    server.shutdown().await.unwrap();
    assert_eq!(in_time(client.read(&mut greeting)).await.unwrap(), 0);
    client.write_all(b"last words").await.unwrap();
    drop(client);
    let mut rest = vec![];
    in_time(server.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"last words");
    let line = &world.destination.log_of(1).await[0];
    assert_eq!(line["source"]["identity"], "spiffe://td/ns/shop/sa/client");
    assert_eq!(line["source"]["workload"], "shop/client");
    assert_eq!(line["destination"]["identity"], "spiffe://td/ns/shop/sa/web");
    assert_eq!((&line["outcome"], &line["transport"]), (&"ok".into(), &"tunnel".into()));
    assert_eq!((&line["bytes_sent"], &line["bytes_received"]), (&10.into(), &11.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_passes_in_both_directions_while_idle() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let to = world.outbound(web);

    let client = connect(to).await;
    let (mut server, _) = accept(&app).await;
    reset(client);
    let error = in_time(server.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let mut client = connect(to).await;
    let (mut server, _) = accept(&app).await;
    client.write_all(b"x").await.unwrap();
    in_time(server.read_u8()).await.unwrap();
    reset(server);
    let error = in_time(client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let lines = world.source.log_of(2).await;
    assert_eq!(lines[0]["reason"], "source_reset");
    assert_eq!(lines[1]["reason"], "destination_reset");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_passes_in_both_directions_while_the_pipe_is_full() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let to = world.outbound(web);

    let client = connect(to).await;
    let (server, _) = accept(&app).await;
    fill(&client).await;
    reset(client);
    is_reset(&server).await;

    let client = connect(to).await;
    let (server, _) = accept(&app).await;
    fill(&client).await;
    reset(server);
    is_reset(&client).await;

    let client = connect(to).await;
    let (server, _) = accept(&app).await;
    fill(&server).await;
    reset(client);
    is_reset(&server).await;

    let client = connect(to).await;
    let (server, _) = accept(&app).await;
    fill(&server).await;
    reset(server);
    is_reset(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_after_half_close_passes() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let to = world.outbound(web);

    let mut client = connect(to).await;
    let (mut server, _) = accept(&app).await;
    client.shutdown().await.unwrap();
    assert_eq!(in_time(server.read(&mut [0; 1])).await.unwrap(), 0);
    reset(client);
    is_reset(&server).await;

    let mut client = connect(to).await;
    let (mut server, _) = accept(&app).await;
    server.shutdown().await.unwrap();
    assert_eq!(in_time(client.read(&mut [0; 1])).await.unwrap(), 0);
    reset(server);
    is_reset(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_before_a_reset_is_still_delivered() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let to = world.outbound(web);
    let mut client = connect(to).await;
    let (mut server, _) = accept(&app).await;
    client.write_all(&pattern(100_000, 1)).await.unwrap();
    in_time(server.read_u8()).await.unwrap();
    server.write_all(b"413 too large").await.unwrap();
    drop(server); // unread bytes make this a RST
    let mut answer = [0; 13];
    in_time(client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"413 too large");
    assert_eq!(in_time(client.read_u8()).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusing_application_resets_the_client_and_says_why() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    drop(app);
    assert_eq!(ask(world.outbound(web), b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    for agent in [&world.source, &world.destination] {
        let line = &agent.log_of(1).await[0];
        assert_eq!(line["outcome"], "refused");
        assert_eq!((&line["reason"], &line["step"]), (&"dial_refused".into(), &"connect".into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_connections_in_a_row_share_a_few_handshakes() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    echo(app);
    let to = world.outbound(web);
    for i in 0..100u32 {
        let sent = pattern(100, i);
        assert_eq!(ask(to, &sent).await.unwrap(), sent);
    }
    let handshakes = world.source.metrics.handshakes("ok");
    assert!(handshakes <= 1 + Limits::default().spares as u64 + 1, "{handshakes} handshakes");
    eventually(async || {
        (world.connections(&world.destination, Direction::Inbound, "ok") == 100
            && world.connections(&world.source, Direction::Outbound, "ok") == 100)
            .then_some(())
    })
    .await;
}

/// Connections are given to the thread that carries the fewest: two at once are on two threads, where there are two.
#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_of_one_thread_carries_connections_of_another() {
    let limits = Limits { spares: 0, ..Limits::default() };
    let world = World::with(&Plan::default(), limits, Limits::default());
    let (web, app) = world.web().await;
    echo(app);
    let to = world.outbound(web);
    let idle = || world.source.metrics.tunnels("idle").get();
    let mut held = connect(to).await;
    for round in 0..20u32 {
        // Alternately the only one of its thread, so that the tunnel goes back and forth.
        let other = if round % 2 == 0 { None } else { Some(connect(to).await) };
        let sent = pattern(100_000, round);
        assert!(ask(to, &sent).await.unwrap() == sent, "round {round}");
        drop(other);
        eventually(async || (idle() > 0).then_some(())).await;
    }
    held.shutdown().await.unwrap();
    in_time(held.read_to_end(&mut Vec::new())).await.unwrap();
    let handshakes = world.source.metrics.handshakes("ok");
    // Three connections are there at once at most; a tunnel that has just ended one may not be ready for the next.
    assert!(handshakes < 10, "{handshakes} handshakes for 31 connections");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_the_destination_closed_costs_no_connection() {
    let at_destination = Limits { idle_at_destination: Duration::from_millis(1), ..Limits::default() };
    let world = World::with(&Plan::default(), Limits::default(), at_destination);
    let (web, app) = world.web().await;
    echo(app);
    let to = world.outbound(web);
    let idle = || world.destination.metrics.tunnels("idle").get();
    for i in 0..200u32 {
        let sent = pattern(10, i);
        let answer = ask(to, &sent).await;
        assert!(
            answer.as_ref().is_ok_and(|got| *got == sent),
            "{answer:?}: {:?}",
            world.source.log().await.last()
        );
        // Now and then every tunnel is certainly closed, else OPEN and close_notify cross as chance has it.
        if i % 20 == 0 {
            eventually(async || (idle() == 0).then_some(())).await;
        }
    }
    assert!(world.source.metrics.handshakes("ok") > 10, "tunnels did go stale");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_workloads_certificate_at_the_destination_is_refused_before_a_byte() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    world.ca.install(&world.destination.identities, &identity("web"), &identity("api"));
    assert_eq!(ask(world.outbound(web), b"secret").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.source.log_of(1).await[0]["reason"], "peer_identity_mismatch");
    drop(app);
    assert!(world.destination.log().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_workloads_certificate_at_the_source_is_refused() {
    let world = World::new(&Plan::default());
    let (web, _app) = world.web().await;
    world.ca.install(&world.source.identities, &identity("client"), &identity("api"));
    assert_eq!(ask(world.outbound(web), b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.destination.log_of(1).await[0]["reason"], "identity_mismatch");
    let line = &world.source.log_of(1).await[0];
    assert_eq!((&line["reason"], &line["detail"]), (&"peer_refused".into(), &"identity_mismatch".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_root_is_refused() {
    let world = World::new(&Plan::default());
    let (web, _app) = world.web().await;
    Ca::new().install(&world.source.identities, &identity("client"), &identity("client"));
    assert_eq!(ask(world.outbound(web), b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.source.log_of(1).await[0]["reason"], "peer_certificate_untrusted");
}

#[tokio::test(flavor = "multi_thread")]
async fn open_for_a_source_that_the_certificate_does_not_cover_is_refused() {
    let mut plan = Plan::default();
    // The tunnel comes from the client's other address; the application's own belongs to somebody else.
    plan.workload("client").addresses = vec![ip("127.0.0.1")];
    plan.workloads.push(workload("other", &[CLIENT]));
    let world = World::new(&plan);
    let (web, _app) = world.web().await;
    assert_eq!(ask(world.outbound(web), b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.destination.log_of(1).await[0]["reason"], "source_not_covered");
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_refuses_plaintext_and_permissive_passes_it() {
    let mut plan = Plan::default();
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    echo(app);
    assert_eq!(ask_from(STRANGER, web, b"hello").await.unwrap(), b"hello");
    // It has ended at the agent too: a live one would end with the change.
    world.destination.log_of(1).await;

    plan.workload("web").mode = Mode::Strict;
    world.publish(&plan, "2");
    assert_eq!(ask_from(STRANGER, web, b"hello").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let lines = world.destination.log_of(2).await;
    assert_eq!((&lines[0]["outcome"], &lines[0]["transport"]), (&"ok".into(), &"plaintext".into()));
    assert_eq!((&lines[1]["reason"], &lines[1]["view"]), (&"plaintext_to_strict".into(), &"2".into()));
    // Tunnels pass.
    assert_eq!(ask(world.outbound(web), b"x").await.unwrap(), b"x");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enrolled_source_that_is_not_captured_yet_passes_in_plaintext() {
    let mut plan = Plan::default();
    plan.workload("client").captured = false;
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    // It speaks first.
    let mut client = connect(web).await;
    client.write_all(b"GET").await.unwrap();
    let (mut server, _) = accept(&app).await;
    in_time(server.read_exact(&mut [0; 3])).await.unwrap();
    // The server speaks first: after a short wait.
    let mut client = connect(web).await;
    let (mut server, _) = accept(&app).await;
    server.write_all(b"220").await.unwrap();
    in_time(client.read_exact(&mut [0; 3])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_passes_through_plaintext_too() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let client = connect_from(STRANGER, web).await.unwrap();
    let (server, _) = accept(&app).await;
    fill(&client).await;
    reset(server);
    is_reset(&client).await;
    let client = connect_from(STRANGER, web).await.unwrap();
    let (mut server, _) = accept(&app).await;
    reset(client);
    assert_eq!(in_time(server.read_u8()).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let lines = world.destination.log_of(2).await;
    assert_eq!(
        (&lines[0]["reason"], &lines[1]["reason"]),
        (&"destination_reset".into(), &"source_reset".into())
    );
}

fn deny(account: &str) -> Policy {
    let any_of = Traits { identities: vec![identity(account).into()], ..Traits::default() };
    let rule = Rule { from: vec![Source { any_of, ..Source::default() }], to: vec![] };
    Policy::new(name("no-client"), Action::Deny, vec![rule])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deny_refuses_and_the_log_names_the_rule() {
    let plan = Plan { policies: vec![deny("client")], ..Plan::default() };
    let world = World::new(&plan);
    let (web, _app) = world.web().await;
    let to = world.outbound(web);
    for _ in 0..2 {
        assert_eq!(ask(to, b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    for line in &world.destination.log_of(2).await {
        assert_eq!((&line["reason"], &line["rule"]), (&"policy_deny".into(), &"shop/no-client[0]".into()));
    }
    for line in &world.source.log_of(2).await {
        assert_eq!((&line["reason"], &line["detail"]), (&"peer_refused".into(), &"policy_deny".into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_deny_ends_live_connections() {
    let mut plan = Plan::default();
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    let client = connect(world.outbound(web)).await;
    let (server, _) = accept(&app).await;
    plan.workload("api").mode = Mode::Strict; // a change that does not concern it
    world.publish(&plan, "2");
    plan.policies = vec![deny("client")];
    world.publish(&plan, "3");
    is_reset(&client).await;
    is_reset(&server).await;
    assert_eq!(world.destination.log_of(1).await[0]["reason"], "policy_deny");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audited_policy_refuses_nothing_and_is_counted_once_a_connection() {
    let audited = Policy { enforcement: Enforcement::Audit, ..deny("client") };
    let mut plan = Plan { policies: vec![audited.clone()], ..Plan::default() };
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    let to = world.outbound(web);
    let refusals = || {
        let (policy, workload) = ("shop/no-client".into(), "shop/web".into());
        world.destination.metrics.audit_refusals(&AuditLabels { policy, workload, reason: "policy_deny" })
    };
    let mut early = connect(to).await;
    let (mut server, _) = accept(&app).await;
    assert_eq!(refusals(), 1);
    // Every view decides live connections anew: they count once.
    plan.policies = vec![];
    world.publish(&plan, "2");
    let mut late = connect(to).await;
    let (mut other_server, _) = accept(&app).await;
    assert_eq!(refusals(), 1);
    plan.policies = vec![audited];
    world.publish(&plan, "3");
    eventually(async || (refusals() == 2).then_some(())).await;
    for (client, server) in [(&mut early, &mut server), (&mut late, &mut other_server)] {
        client.write_all(b"still").await.unwrap();
        in_time(server.read_exact(&mut [0; 5])).await.unwrap();
    }
    drop((early, server, late, other_server));
    for line in world.destination.log_of(2).await {
        assert_eq!((&line["outcome"], &line["rule"]), (&"ok".into(), &serde_json::Value::Null), "{line}");
        let expected = serde_json::json!({"policy": "shop/no-client", "rule": 0, "reason": "policy_deny"});
        assert_eq!(line["would_refuse"], expected);
    }
    assert_eq!(refusals(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_ends_at_both_nodes_when_the_destination_becomes_strict() {
    let mut plan = Plan::default();
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    let stranger = connect_from(STRANGER, web).await.unwrap();
    let (_stranger_server, _) = accept(&app).await;
    let (mut client, mut server) = {
        let direct = world.outbound(app.local_addr().unwrap());
        plan.workloads.push(workload("app", &[WEB_APP]));
        plan.workload("app").enrolled = false;
        plan.workload("app").captured = false;
        world.publish(&plan, "2");
        (connect(direct).await, accept(&app).await.0)
    };
    // To be enrolled is no reason: a permissive workload takes plaintext.
    plan.workload("app").enrolled = true;
    world.publish(&plan, "3");
    client.write_all(b"go on").await.unwrap();
    in_time(server.read_exact(&mut [0; 5])).await.unwrap();
    plan.workload("app").mode = Mode::Strict;
    plan.workload("web").mode = Mode::Strict;
    world.publish(&plan, "4");
    for stream in [&stranger, &client, &server] {
        is_reset(stream).await;
    }
    assert_eq!(world.destination.log_of(1).await[0]["reason"], "plaintext_to_strict");
    let line = &world.source.log_of(1).await[0];
    assert_eq!((&line["outcome"], &line["step"]), (&"refused".into(), &"relay".into()));
    assert_eq!((&line["reason"], &line["detail"]), (&"destination_became_strict".into(), &"shop/app".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_does_not_live_as_long_as_the_connections_that_it_decided() {
    let plan = Plan::default();
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    let mut tunnel = connect(world.outbound(web)).await;
    let (mut tunnel_server, _) = accept(&app).await;
    let mut plain = connect_from(STRANGER, web).await.unwrap();
    let (mut plain_server, _) = accept(&app).await;
    for (client, server) in [(&mut tunnel, &mut tunnel_server), (&mut plain, &mut plain_server)] {
        server.write_all(b"hello").await.unwrap();
        in_time(client.read_exact(&mut [0; 5])).await.unwrap();
    }
    let first = world.view();
    world.publish(&plan, "2");
    eventually(async || first.upgrade().is_none().then_some(())).await;
    for client in [&mut tunnel, &mut plain] {
        client.write_all(b"still").await.unwrap();
    }
    for server in [&mut tunnel_server, &mut plain_server] {
        in_time(server.read_exact(&mut [0; 5])).await.unwrap();
    }
    drop((tunnel, tunnel_server, plain, plain_server));
    assert!(world.source.log_of(1).await.iter().all(|line| line["view"] == "1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_ends_when_either_end_is_somebody_else_in_the_view() {
    for (changed, at_source) in [("client", "identity_mismatch"), ("web", "peer_identity_mismatch")] {
        let mut plan = Plan::default();
        let world = World::new(&plan);
        let (web, app) = world.web().await;
        let mut client = connect(world.outbound(web)).await;
        let (mut server, _) = accept(&app).await;
        // Both agents carry it from here on.
        server.write_all(b"hello").await.unwrap();
        in_time(client.read_exact(&mut [0; 5])).await.unwrap();
        plan.workload("api").service_account = "other".into(); // a change that does not concern it
        world.publish(&plan, "2");
        plan.workload(changed).service_account = "new".into();
        world.publish(&plan, "3");
        is_reset(&client).await;
        is_reset(&server).await;
        // The other agent's reset may be there before the own view, at one of them.
        let source = world.source.log_of(1).await[0]["reason"].clone();
        let destination = world.destination.log_of(1).await[0]["reason"].clone();
        let saw = (source == at_source, destination == "identity_mismatch");
        assert!(saw.0 || source == "tunnel_lost", "{source}");
        assert!(saw.1 || destination == "tunnel_lost", "{destination}");
        assert_ne!(saw, (false, false), "who cut it says why");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_with_a_refusing_endpoint_serves_every_connection() {
    let mut plan = Plan::default();
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    let (api, refusing) = world.api().await;
    echo(app);
    drop(refusing);
    plan.service(&[("web", web), ("api", api)]);
    world.publish(&plan, "2");
    let to = world.outbound(VIP.parse().unwrap());
    for i in 0..40u32 {
        let sent = pattern(20_000, i);
        assert!(ask(to, &sent).await.unwrap() == sent);
    }
    let lines = world.source.log_of(40).await;
    assert!(lines.iter().all(|line| line["destination"]["workload"] == "shop/web"), "{lines:?}");
    assert!(lines.iter().all(|line| line["destination"]["service"] == "shop/service"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_keeps_its_endpoint_until_it_refuses() {
    let mut plan = Plan::default();
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    let (api, other) = world.api().await;
    plan.service(&[("web", web), ("api", api)]);
    plan.services[0].choice.affinity = Some(3600);
    world.publish(&plan, "2");
    let to = world.outbound(VIP.parse().unwrap());
    let (app, other) = (echo(app), echo(other));
    for i in 0..20u32 {
        let sent = pattern(2000, i);
        assert!(ask(to, &sent).await.unwrap() == sent);
    }
    let serves = async |from: usize, n: usize| {
        let lines = world.source.log_of(from + n).await;
        let all: std::collections::BTreeSet<_> =
            lines[from..].iter().map(|line| line["destination"]["workload"].to_string()).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        all.into_iter().next().unwrap()
    };
    let first = serves(0, 20).await;
    let gone = if first.contains("web") { app } else { other };
    gone.abort();
    assert!(gone.await.unwrap_err().is_cancelled());
    for i in 0..20u32 {
        let sent = pattern(2000, i);
        assert!(ask(to, &sent).await.unwrap() == sent);
    }
    assert_ne!(serves(20, 20).await, first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_of_its_node_alone_leads_to_endpoints_of_the_clients_node_or_nowhere() {
    let mut plan = Plan::default();
    let world = World::new(&plan);
    let (web, app) = world.web().await;
    let (api, other) = world.api().await;
    echo(app);
    echo(other);
    plan.service(&[("web", web), ("api", api)]);
    let place = |node: &str| Place { node: node.into(), zone: String::new() };
    plan.services[0].choice.distribution = Distribution::OnlySameNode;
    plan.services[0].choice.places = [(web.ip(), place("elsewhere")), (api.ip(), place("node"))].into();
    world.publish(&plan, "2");
    let to = world.outbound(VIP.parse().unwrap());
    for i in 0..20u32 {
        let sent = pattern(2000, i);
        assert!(ask(to, &sent).await.unwrap() == sent);
    }
    let lines = world.source.log_of(20).await;
    assert!(lines.iter().all(|line| line["destination"]["workload"] == "shop/api"), "{lines:?}");
    plan.services[0].choice.places.remove(&api.ip());
    world.publish(&plan, "3");
    assert_eq!(ask(to, b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.source.log_of(21).await[20]["reason"], "no_endpoint");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_outside_of_the_mesh_is_reached_in_plaintext() {
    let world = World::new(&Plan::default());
    let outside = listen(&SocketAddr::new(ip("127.0.7.7"), 0));
    let at = outside.local_addr().unwrap();
    echo(outside);
    assert_eq!(ask(world.outbound(at), b"hello").await.unwrap(), b"hello");
    let line = &world.source.log_of(1).await[0];
    assert_eq!((&line["outcome"], &line["transport"]), (&"ok".into(), &"plaintext".into()));
    let closed = listen(&SocketAddr::new(ip("127.0.7.7"), 0)).local_addr().unwrap();
    assert_eq!(ask(world.outbound(closed), b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.source.log_of(2).await[1]["reason"], "dial_refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_own_listener_is_no_destination() {
    let world = World::new(&Plan::default());
    let to = world.outbound("127.0.0.1:15001".parse().unwrap());
    assert_eq!(ask(to, b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.source.log_of(1).await[0]["reason"], "loop_to_listener");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_has_no_more_connections_than_it_may() {
    let limits = Limits { max_connections_per_workload: 1, ..Limits::default() };
    let world = World::with(&Plan::default(), limits, Limits::default());
    let (web, app) = world.web().await;
    let to = world.outbound(web);
    let _client = connect(to).await;
    let _server = accept(&app).await;
    assert_eq!(ask(to, b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.source.log_of(1).await[0]["reason"], "limit_connections");
}

/// Who does not read.
#[derive(Clone, Copy, PartialEq)]
enum Idler {
    Client,
    Server,
}

/// There is room for eight buffers, of which one reader has four: a fifth connection that it does not read is ended, with
/// the reason, and others are served.
async fn a_reader_that_does_not_read_costs_only_itself(idler: Idler, client_address: &str) {
    let little_room = Limits { stalled_memory: 8 * 84 * 1024, ..Limits::default() };
    let world = World::with(&Plan::default(), Limits::default(), little_room);
    let (web, app) = world.web().await;
    let way = |to| if client_address == CLIENT { world.outbound(to) } else { to };
    let to = way(web);
    let waiting = || world.destination.node.stalled().waiting();
    let open = async || {
        let client = connect_from(client_address, to).await.expect("captured");
        let (server, _) = accept(&app).await;
        if idler == Idler::Client { (server, client) } else { (client, server) }
    };
    let mut held = vec![];
    for n in 1..=4 {
        let (writer, reader) = open().await;
        while waiting() < n {
            fill(&writer).await;
        }
        held.push((writer, reader));
    }
    let (writer, reader) = open().await;
    let error = loop {
        if let Err(error) = try_fill(&writer).await {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    is_reset(&reader).await;
    let line = world.destination.log_of(1).await.remove(0);
    assert_eq!((&line["reason"], &line["step"]), (&"limit_stalled".into(), &"relay".into()), "{line}");
    assert_eq!(waiting(), 4);

    let (api, echoes) = world.api().await;
    echo(echoes);
    let request = pattern(4 << 20, 1);
    assert!(ask_from(client_address, way(api), &request).await.expect("served") == request);
    drop(held);
    eventually(async || (waiting() == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_does_not_read_costs_only_itself() {
    a_reader_that_does_not_read_costs_only_itself(Idler::Server, CLIENT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_read_costs_only_itself() {
    a_reader_that_does_not_read_costs_only_itself(Idler::Client, CLIENT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_plaintext_that_do_not_read_cost_only_themselves() {
    a_reader_that_does_not_read_costs_only_itself(Idler::Server, STRANGER).await;
    a_reader_that_does_not_read_costs_only_itself(Idler::Client, STRANGER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_idle_connections_live_side_by_side() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let to = world.outbound(web);
    let mut pairs = vec![];
    for _ in 0..20 {
        let mut batch = vec![];
        for _ in 0..50 {
            batch.push(connect(to).await);
        }
        for mut client in batch {
            client.write_all(b"x").await.unwrap();
            let (server, _) = accept(&app).await;
            pairs.push((client, server));
        }
    }
    for (_, server) in &mut pairs {
        in_time(server.read_exact(&mut [0; 1])).await.unwrap();
        server.write_all(b"y").await.unwrap();
    }
    for (client, _) in &mut pairs {
        in_time(client.read_exact(&mut [0; 1])).await.unwrap();
    }
    assert_eq!(world.source.metrics.active(Direction::Outbound).get(), 1000);
    drop(pairs);
    let ended = || world.connections(&world.source, Direction::Outbound, "ok");
    eventually(async || (ended() == 1000).then_some(())).await;
    eventually(async || (world.source.metrics.tunnels("busy").get() == 0).then_some(())).await;
    assert!(world.source.metrics.tunnels("idle").get() <= Limits::default().idle_per_key as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_lets_connections_finish_and_cuts_at_the_deadline() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let client = connect(world.outbound(web)).await;
    let (server, _) = accept(&app).await;
    assert!(world.source.drain.drain(Duration::from_millis(100)).await >= 1);
    is_reset(&client).await;
    is_reset(&server).await;
    assert_eq!(world.source.log_of(1).await[0]["reason"], "agent_stopping");
    assert_eq!(world.destination.drain.drain(PATIENCE).await, 0, "nothing is left to cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_costs_no_more_memory_than_this() {
    let world = World::new(&Plan::default());
    let (_web, app) = world.web().await;
    let at = app.local_addr().unwrap();
    let stream = connect(at).await;
    let peer = stream.local_addr().unwrap();
    let workload = local("client", CLIENT);
    let accepted = Accepted { stream, peer, original: at, direction: Direction::Outbound, workload };
    let outbound = size_of_val(&serve_outbound(accepted, world.source.node.clone()));
    assert!(outbound <= 2650, "the future of a connection that is opened has {outbound} bytes");
    let (stream, workload) = (connect(at).await, local("client", CLIENT));
    let accepted = Accepted { stream, peer, original: at, direction: Direction::Inbound, workload };
    let inbound = size_of_val(&serve_inbound(accepted, world.source.node.clone()));
    assert!(inbound <= 3400, "the future of a tunnel with its connection has {inbound} bytes");
}

/// A plan by demand in which nothing is known of these.
fn without(accounts: &[&str]) -> Plan {
    let mut plan = Plan { by_demand: true, ..Plan::default() };
    plan.workloads.retain(|workload| !accounts.iter().any(|account| workload.name == name(account)));
    plan
}

/// Waits until an agent asks for an address.
async fn asked(agent: &Agent, address: &str) {
    let wanted = mesh_core::wire::addresses([&ip(address)]).remove(0);
    eventually(async || agent.wants.all().contains(&wanted).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_connection_waits_for_the_answer_and_is_encrypted() {
    let world = World::new(&Plan::default());
    world.publish_at_source(&without(&["web"]), "2");
    let (web, app) = world.web().await;
    echo(app);
    let to = world.outbound(web);
    let exchange = tokio::spawn(async move { ask(to, b"hello").await });
    asked(&world.source, WEB).await;
    world.publish_at_source(&Plan { by_demand: true, ..Plan::default() }, "3");
    assert_eq!(in_time(exchange).await.unwrap().unwrap(), b"hello");
    let line = &world.source.log_of(1).await[0];
    assert_eq!((&line["transport"], &line["view"]), (&"tunnel".into(), &"3".into()), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_answer_a_strict_source_is_refused_and_a_permissive_one_goes_on_in_plaintext() {
    let soon = Limits { answer_wait: Duration::from_millis(50), ..Limits::default() };
    let mut plan = without(&["web"]);
    let world = World::with(&Plan::default(), soon, Limits::default());
    let (web, app) = world.web().await;
    echo(app);
    let to = world.outbound(web);
    world.publish_at_source(&plan, "2");
    assert_eq!(ask(to, b"hello").await.unwrap(), b"hello");
    let line = &world.source.log_of(1).await[0];
    assert_eq!((&line["transport"], &line["unanswered"]), (&"plaintext".into(), &true.into()), "{line}");
    assert_eq!(world.source.metrics.plaintext_unanswered().get(), 1);
    plan.workload("client").mode = Mode::Strict;
    world.publish_at_source(&plan, "3");
    ask(to, b"hello").await.unwrap_err();
    let line = &world.source.log_of(2).await[1];
    assert_eq!(line["reason"], "destination_unanswered", "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_asked_for_and_refused_without_an_answer() {
    let soon = Limits { answer_wait: Duration::from_secs(1), ..Limits::default() };
    let world = World::with(&Plan::default(), Limits::default(), soon);
    world.publish_at_destination(&without(&["client"]), "2");
    let (web, app) = world.web().await;
    echo(app);
    let to = world.outbound(web);
    ask(to, b"hello").await.unwrap_err();
    let line = &world.destination.log_of(1).await[0];
    assert_eq!(line["reason"], "source_unanswered", "{line}");
    let exchange = tokio::spawn(async move { ask(to, b"hello").await });
    asked(&world.destination, "127.0.0.1").await;
    world.publish_at_destination(&Plan { by_demand: true, ..Plan::default() }, "3");
    assert_eq!(in_time(exchange).await.unwrap().unwrap(), b"hello");
    let line = &world.destination.log_of(2).await[1];
    assert_eq!((&line["outcome"], &line["transport"]), (&"ok".into(), &"tunnel".into()), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_from_whom_nobody_knows_does_not_wait_for_an_answer_once_it_speaks() {
    let slow = Limits { answer_wait: PATIENCE * 2, ..Limits::default() };
    let world = World::with(&Plan::default(), Limits::default(), slow);
    world.publish_at_destination(&without(&["client"]), "2");
    let (web, app) = world.web().await;
    echo(app);
    assert_eq!(ask_from(STRANGER, web, b"hello").await.unwrap(), b"hello");
    assert_eq!(world.destination.log_of(1).await[0]["transport"], "plaintext");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_goes_on_while_the_view_has_nothing_to_say_of_its_ends() {
    let world = World::new(&Plan::default());
    let (web, app) = world.web().await;
    let mut client = connect(world.outbound(web)).await;
    let (mut server, _) = accept(&app).await;
    world.publish_at_source(&without(&["web"]), "2");
    world.publish_at_destination(&without(&["client"]), "2");
    // What would end it is looked at again once both agents have seen another view.
    let mut plan = without(&["client"]);
    client.write_all(b"ping").await.unwrap();
    let mut got = [0; 4];
    in_time(server.read_exact(&mut got)).await.unwrap();
    plan.policies = vec![Policy::new(name("closed"), Action::Allow, vec![])];
    world.publish_at_destination(&plan, "3");
    is_reset(&client).await;
    assert_eq!(world.destination.log_of(1).await[0]["reason"], "policy_not_allowed");
}
