//! Peers that lie, break the protocol or hold on to what they were given: each is refused under its own reason, costs
//! only itself, and leaves nothing behind. Real TCP and TLS over loopback; needs root, as the data path does.

#[path = "data_path/rogue.rs"]
mod rogue;
#[allow(dead_code)]
#[path = "data_path/world.rs"]
mod world;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use mesh_agent::connection::{Direction, Limits};
use mesh_core::{
    frame::{ALPN, Control, Open},
    model::Mode,
};
use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, date_time_ymd};
use rogue::*;
use rustls::version::{TLS12, TLS13};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use world::*;

/// A destination under attack, with a good connection that has to live through it.
struct Siege {
    world: World,
    web: SocketAddr,
    good: tokio::net::TcpStream,
    tasks: usize,
}

impl Siege {
    async fn lay(plan: &Plan, limits: Limits) -> Self {
        let world = World::with(plan, Limits::default(), limits);
        let (web, app) = world.web().await;
        answer(app);
        let mut good = connect(world.outbound(web)).await;
        exchange(&mut good).await;
        let tasks = world.destination.drain.tasks();
        Self { world, web, good, tasks }
    }

    /// The good connection goes on, others are taken, and nothing of the attackers is left: no task (which is what
    /// holds sockets and memory), no tunnel but the good one's, nothing that counts as carried.
    async fn lift(mut self) {
        exchange(&mut self.good).await;
        let mut another = connect(self.world.outbound(self.web)).await;
        exchange(&mut another).await;
        drop(another);
        let destination = &self.world.destination;
        eventually(async || (destination.metrics.active(Direction::Inbound).get() == 1).then_some(())).await;
        let busy = || destination.metrics.tunnels("busy").get();
        eventually(async || (busy() == 1).then_some(())).await;
        // A task ends a moment after what it counted; one that never ends stays in the way.
        eventually(async || {
            let idle = destination.metrics.tunnels("idle").get() as usize;
            (destination.drain.tasks() <= self.tasks + idle).then_some(())
        })
        .await;
    }

    /// How often the destination has refused for each reason.
    async fn refusals(&self, at_least: usize) -> BTreeMap<String, usize> {
        let lines = eventually(async || {
            let lines = self.world.destination.log().await;
            let refused: Vec<_> = lines.into_iter().filter(|line| line["outcome"] == "refused").collect();
            (refused.len() >= at_least).then_some(refused)
        })
        .await;
        let mut counted = BTreeMap::new();
        for line in lines {
            *counted.entry(line["reason"].as_str().expect("a reason").to_owned()).or_default() += 1;
        }
        counted
    }
}

/// Answers each byte of each connection with one.
fn answer(listener: TcpListener) {
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                while let Ok(byte) = stream.read_u8().await {
                    if stream.write_u8(byte).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
}

async fn exchange(stream: &mut tokio::net::TcpStream) {
    stream.write_u8(7).await.expect("the good connection lives");
    assert_eq!(in_time(stream.read_u8()).await.expect("and is answered"), 7);
}

fn strict() -> Plan {
    let mut plan = Plan::default();
    plan.workload("web").mode = Mode::Strict;
    plan
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_the_sources_own_is_refused_by_what_is_wrong_with_it() {
    let siege = Siege::lay(&strict(), Limits::default()).await;
    let ca = &siege.world.ca;
    let own = identity("client").to_string();
    let own = own.as_str();
    let (td, usage) =
        ("spiffe://td/ns/shop/sa", |it: &mut rcgen::CertificateParams, usage| it.key_usages = usage);
    let attempts: Vec<(&str, &str, Papers)> = vec![
        (
            "another mesh's root, our trust domain",
            "certificate_untrusted",
            papers(&Ca::new(), &[own], |_| {}),
        ),
        (
            "expired",
            "certificate_expired",
            papers(ca, &[own], |it| {
                it.not_before = date_time_ymd(2020, 1, 1);
                it.not_after = date_time_ymd(2021, 1, 1);
            }),
        ),
        (
            "not yet valid",
            "certificate_not_yet_valid",
            papers(ca, &[own], |it| {
                it.not_before = date_time_ymd(3000, 1, 1);
            }),
        ),
        ("no SAN", "certificate_identity", papers(ca, &[], |_| {})),
        ("two SANs", "certificate_identity", papers(ca, &[own, &format!("{td}/web")], |_| {})),
        ("the same SAN twice", "certificate_identity", papers(ca, &[own, own], |_| {})),
        (
            "a DNS name",
            "certificate_identity",
            papers(ca, &[], |it| {
                it.subject_alt_names =
                    vec![rcgen::SanType::DnsName("client.shop".try_into().expect("ASCII"))];
            }),
        ),
        (
            "a URI that is no identity",
            "certificate_identity",
            papers(ca, &["https://td/ns/shop/sa/client"], |_| {}),
        ),
        (
            "another trust domain, our root",
            "certificate_identity",
            papers(ca, &["spiffe://other/ns/shop/sa/client"], |_| {}),
        ),
        (
            "for servers only",
            "certificate_purpose",
            papers(ca, &[own], |it| {
                it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }),
        ),
        (
            "to sign certificates",
            "certificate_purpose",
            papers(ca, &[own], |it| {
                usage(it, vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign]);
            }),
        ),
        (
            "not to sign",
            "certificate_purpose",
            papers(ca, &[own], |it| usage(it, vec![KeyUsagePurpose::KeyEncipherment])),
        ),
        (
            "of an authority",
            "certificate_untrusted",
            papers(ca, &[own], |it| {
                it.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            }),
        ),
        ("of a node", "identity_mismatch", papers(ca, &["spiffe://td/node/node-a"], |_| {})),
        (
            "of a workload that is not there",
            "identity_mismatch",
            papers(ca, &[&format!("{td}/ghost")], |_| {}),
        ),
        ("of another workload", "identity_mismatch", papers(ca, &[&format!("{td}/api")], |_| {})),
    ];
    let mut expected = BTreeMap::new();
    for (what, reason, papers) in attempts {
        *expected.entry(reason.to_owned()).or_default() += 1;
        let total: usize = expected.values().sum();
        if let Ok(mut rogue) = Rogue::dial(CLIENT, siege.web, Hello::with(papers)).await {
            let first = rogue.hear().await;
            if reason == "identity_mismatch" {
                assert!(matches!(first, Ok(Control::Settings(_))), "{what}: {first:?}");
                rogue.say(&open(siege.web.port())).await;
                let refused = rogue.hear().await.expect("an answer");
                assert!(matches!(refused, Control::Refuse(Some(_))), "{what}: {refused:?}");
            } else {
                assert!(first.is_err(), "{what}: {first:?}");
            }
        }
        assert_eq!(siege.refusals(total).await, expected, "{what}");
    }
    siege.lift().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_is_no_agents_is_refused() {
    let siege = Siege::lay(&strict(), Limits::default()).await;
    let ca = &siege.world.ca;
    for (reason, total, hello) in [
        ("certificate_missing", 1, Hello { papers: None, alpn: ALPN, version: &TLS13 }),
        ("handshake_failed", 2, Hello { version: &TLS12, ..Hello::with(clients(ca)) }),
        // An application's own TLS: plaintext to us, and web takes none.
        ("plaintext_to_strict", 3, Hello { alpn: b"", ..Hello::with(clients(ca)) }),
        ("plaintext_to_strict", 4, Hello { alpn: b"nodemesh/2", ..Hello::with(clients(ca)) }),
    ] {
        if let Ok(rogue) = Rogue::dial(CLIENT, siege.web, hello).await {
            rogue.ends().await;
        }
        assert!(siege.refusals(total).await.contains_key(reason), "{reason}");
    }
    let hello = client_hello(ca);
    let mut broken = 0;
    for bytes in [
        hello[..hello.len() / 2].to_vec(),                      // truncated
        [&hello[..], &hello[..]].concat(),                      // twice
        [&hello[..43], &pattern(hello.len() - 43, 3)].concat(), // random after its start
        b"\x16\x03\x01\x48\x01".repeat(40),                     // a record longer than any may be
        [&hello[..], b"\x17\x03\x03\x00\x05hello"].concat(),    // data before the handshake has ended
        b"\x16\x03\x01\x00\x04\x0e\x00\x00\x00".to_vec(),       // another handshake message
    ] {
        let mut stream = connect_from(CLIENT, siege.web).await.expect("connects");
        stream.write_all(&bytes).await.expect("writes");
        stream.shutdown().await.expect("half closes");
        let _ = in_time(stream.read_to_end(&mut vec![])).await;
        broken += 1;
        siege.refusals(4 + broken).await;
    }
    let counted = siege.refusals(4 + broken).await;
    // What cannot become a ClientHello is plaintext; what can, fails as a handshake.
    assert_eq!(counted.values().sum::<usize>(), 4 + broken, "{counted:?}");
    assert!(counted["handshake_failed"] >= 4, "{counted:?}");
    siege.lift().await;
}

/// The first flight of an agent.
fn client_hello(ca: &Ca) -> Vec<u8> {
    let mut session = Hello::with(clients(ca)).session();
    let mut bytes = vec![];
    session.write_tls(&mut bytes).expect("a Vec takes everything");
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_are_broken_or_out_of_turn_end_their_tunnel_alone() {
    let siege = Siege::lay(&Plan::default(), Limits::default()).await;
    let port = siege.web.port();
    let say = |parts: &[&[u8]]| parts.concat();
    let (settings, fin) = (frame(&Control::Settings(1)), frame(&Control::Fin));
    let (accept, ready) = (frame(&Control::Accept), frame(&Control::Ready));
    let mut expected = BTreeMap::<String, usize>::new();
    // Instead of OPEN: the reason is the tunnel's own.
    for (reason, bytes) in [
        ("bad_frame", vec![99, 0, 0, 0]),                          // an unknown type
        ("bad_frame", vec![1, 0, 1, 0]),                           // OPEN of 256 bytes
        ("bad_frame", vec![4, 0xff, 0xff, 0xff]),                  // DATA of 16 MiB
        ("bad_frame", vec![5, 0, 0, 1, 0]),                        // FIN with a payload
        ("bad_frame", say(&[&[1, 0, 0, 9, 5], &open(port)[5..]])), // OPEN of family 5
        ("bad_frame", say(&[&[1, 0, 0, 8], &open(port)[4..12]])),  // OPEN cut short
        ("bad_frame", pattern(5_000, 12)),                         // random
        ("frame_out_of_turn", data(b"x")),                         // DATA before OPEN
        ("frame_out_of_turn", fin.clone()),
        ("frame_out_of_turn", ready.clone()),
        ("frame_out_of_turn", accept.clone()), // ACCEPT from a client
        ("frame_out_of_turn", settings),
        ("frame_out_of_turn", frame(&Control::Refuse(None))),
        ("open_elsewhere", open(port.wrapping_add(1))), // another port than listened
        (
            "open_elsewhere",
            frame(&Control::Open(Open { source: "[::1]:4000".parse().expect("an address"), port })),
        ),
        ("source_not_covered", open_from(API, port)), // another workload's address
        ("source_not_covered", open_from(STRANGER, port)),
    ] {
        *expected.entry(reason.to_owned()).or_default() += 1;
        let mut rogue = Rogue::client(&siege.world, siege.web).await;
        rogue.say(&bytes).await;
        let end = rogue.hear().await;
        assert!(matches!(end, Err(_) | Ok(Control::Refuse(Some(_)))), "{reason}: {end:?}");
        drop(rogue);
        assert_eq!(siege.refusals(expected.values().sum()).await, expected, "{bytes:?}");
    }
    // After OPEN: a lease was given, and is taken away.
    for (reason, bytes) in [
        ("frame_out_of_turn", open(port)), // OPEN during a lease
        ("frame_out_of_turn", ready),
        ("frame_out_of_turn", accept),
        ("frame_out_of_turn", say(&[&data(b"x"), &fin, &fin])), // FIN twice
        ("bad_frame", vec![8, 0, 0, 0]),
    ] {
        *expected.entry(reason.to_owned()).or_default() += 1;
        let mut rogue = Rogue::client(&siege.world, siege.web).await;
        rogue.say(&open(port)).await;
        assert_eq!(rogue.hear().await.expect("an answer"), Control::Accept);
        rogue.say(&bytes).await;
        rogue.ends().await;
        assert_eq!(siege.refusals(expected.values().sum()).await, expected, "{bytes:?}");
    }
    siege.lift().await;
}

/// Not hostile, but TLS as another library speaks it.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_may_change_its_keys_and_have_ours_changed() {
    let siege = Siege::lay(&Plan::default(), Limits::default()).await;
    let mut rogue = Rogue::client(&siege.world, siege.web).await;
    rogue.say(&open(siege.web.port())).await;
    assert_eq!(rogue.hear().await.expect("an answer"), Control::Accept);
    for _ in 0..5 {
        rogue.change_keys();
        rogue.say(&data(b"x")).await;
        let mut answer = data(b"?");
        in_time(rogue.stream.read_exact(&mut answer)).await.expect("an answer under the next key");
        assert_eq!(answer, data(b"x"));
    }
    drop(rogue);
    siege.lift().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_breaks_within_a_frame_is_counted() {
    let siege = Siege::lay(&Plan::default(), Limits::default()).await;
    let mut rogue = Rogue::client(&siege.world, siege.web).await;
    rogue.say(&open(siege.web.port())[..7]).await;
    drop(rogue); // without close_notify
    assert_eq!(siege.refusals(1).await, BTreeMap::from([("bad_frame".to_owned(), 1)]));
    siege.lift().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_lies_gets_nothing_and_is_named() {
    // Without spares, which would be dialled and found wanting beside the connection that is looked at.
    let limits = Limits { spares: 0, ..Limits::default() };
    let world = World::with(&Plan::default(), limits, limits);
    let web = TcpListener::bind((ip(WEB), 0)).await.expect("listens");
    let to = world.outbound(web.local_addr().expect("bound"));
    let ca = &world.ca;
    let own = identity("web").to_string();
    let own = own.as_str();
    let mut lines = 0;
    for (reason, papers) in [
        ("peer_certificate_untrusted", papers(&Ca::new(), &[own], |_| {})),
        ("peer_certificate_expired", papers(ca, &[own], |it| it.not_after = date_time_ymd(2021, 1, 1))),
        (
            "peer_certificate_not_yet_valid",
            papers(ca, &[own], |it| it.not_before = date_time_ymd(3000, 1, 1)),
        ),
        ("peer_certificate_identity", papers(ca, &[own, own], |_| {})),
        ("peer_certificate_identity", papers(ca, &[], |_| {})),
        (
            "peer_certificate_purpose",
            papers(ca, &[own], |it| {
                it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            }),
        ),
        ("peer_identity_mismatch", papers(ca, &["spiffe://td/node/node-b"], |_| {})),
        ("peer_identity_mismatch", papers(ca, &["spiffe://td/ns/shop/sa/ghost"], |_| {})),
    ] {
        let mut client = connect(to).await;
        client.write_all(b"secret").await.expect("writes");
        let (tcp, _) = accept(&web).await;
        if let Ok(mut rogue) = Rogue::take(tcp, papers).await {
            rogue.say(&frame(&Control::Settings(1))).await;
            assert!(rogue.hear().await.is_err(), "{reason}: not even OPEN is said");
        }
        is_reset(&client).await;
        lines += 1;
        assert_eq!(world.source.log_of(lines).await[lines - 1]["reason"], reason);
    }
    // The right certificate, and wrong frames.
    let own = || papers(ca, &[own], |_| {});
    for (reason, bytes) in [
        ("peer_handshake_failed", frame(&Control::Settings(9))), // another version
        ("peer_handshake_failed", frame(&Control::Accept)),      // no SETTINGS
        ("frame_out_of_turn", [frame(&Control::Settings(1)), frame(&Control::Ready)].concat()),
        ("frame_out_of_turn", [frame(&Control::Settings(1)), data(b"x")].concat()), // DATA before ACCEPT
        ("bad_frame", [frame(&Control::Settings(1)), vec![9, 0, 0, 0]].concat()),
        (
            "frame_out_of_turn",
            [frame(&Control::Settings(1)), frame(&Control::Accept), frame(&Control::Accept)].concat(),
        ),
    ] {
        let mut client = connect(to).await;
        client.write_all(b"secret").await.expect("writes");
        let (tcp, _) = accept(&web).await;
        let mut rogue = Rogue::take(tcp, own()).await.expect("shakes hands");
        rogue.say(&bytes).await;
        rogue.ends().await;
        is_reset(&client).await;
        lines += 1;
        assert_eq!(world.source.log_of(lines).await[lines - 1]["reason"], reason, "{bytes:?}");
    }
    drop(web);
    eventually(async || (world.source.metrics.tunnels("busy").get() == 0).then_some(())).await;
    assert_eq!(
        world.source.metrics.tunnels("idle").get(),
        0,
        "nothing of it is kept for the next connection"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_never_shows_who_it_is_waits_for_itself_alone() {
    let limits = Limits {
        handshakes_per_source: 8,
        arrivals_per_source: 40,
        handshake_timeout: Duration::from_secs(2),
        ..Limits::default()
    };
    let siege = Siege::lay(&Plan::default(), limits).await;
    // Half of them silent, half with the beginning of a ClientHello, from another address than the good one's tunnels.
    let hello = client_hello(&siege.world.ca);
    let mut silent = vec![];
    for half in 0..60 {
        let Ok(mut stream) = connect_from(CLIENT, siege.web).await else { continue };
        if half % 2 == 0 {
            let _ = stream.write_all(&hello[..20]).await;
        }
        silent.push(stream);
    }
    // As many at work as may be, some waiting, the rest refused at once.
    let hits = || siege.world.destination.metrics.limit_hits("handshakes");
    eventually(async || (hits() >= 20).then_some(())).await;
    // Meanwhile everybody else's handshakes are made: each connection needs its own, as all are held at once.
    let mut others = vec![];
    for _ in 0..20 {
        let mut other = connect(siege.world.outbound(siege.web)).await;
        exchange(&mut other).await;
        others.push(other);
    }
    drop(others);
    // The rest runs into the time that a handshake may take, at work or waiting for it.
    let counted = siege.refusals(60).await;
    assert!(counted["handshake_timeout"] >= 8 && counted["limit_handshakes"] >= 20, "{counted:?}");
    assert_eq!(counted.values().sum::<usize>(), 60, "{counted:?}");
    drop(silent);
    siege.lift().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_an_open_is_ended_in_its_time_and_holds_up_nobody() {
    let limits = Limits { idle_at_destination: Duration::from_millis(700), ..Limits::default() };
    let siege = Siege::lay(&Plan::default(), limits).await;
    let mut rogues = vec![];
    for byte in 1..10 {
        let mut rogue = Rogue::client(&siege.world, siege.web).await;
        rogue.say(&open(siege.web.port())[..byte]).await;
        rogues.push(rogue);
    }
    assert_eq!(siege.refusals(9).await, BTreeMap::from([("open_timeout".to_owned(), 9)]));
    for rogue in rogues {
        rogue.ends().await;
    }
    siege.lift().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_keeps_no_more_idle_tunnels_than_it_may() {
    let limits = Limits { idle_per_source: 4, ..Limits::default() };
    let siege = Siege::lay(&Plan::default(), limits).await;
    let mut rogues = vec![];
    for _ in 0..12 {
        // From the rogue's own address: the good one's tunnels come from another of the same workload.
        rogues.push(
            Rogue::dial(CLIENT, siege.web, Hello::with(clients(&siege.world.ca)))
                .await
                .expect("shakes hands"),
        );
    }
    let hits = || siege.world.destination.metrics.limit_hits("idle_tunnels");
    eventually(async || (hits() == 8).then_some(())).await;
    // Those that were kept still take a connection.
    let mut kept = 0;
    for rogue in &mut rogues {
        if !matches!(rogue.hear().await, Ok(Control::Settings(_))) {
            continue;
        }
        rogue.say(&open(siege.web.port())).await;
        kept += usize::from(matches!(rogue.hear().await, Ok(Control::Accept)));
    }
    assert_eq!(kept, 4);
    drop(rogues);
    siege.lift().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_stall_hold_up_nobody_else() {
    let siege = Siege::lay(&Plan::default(), Limits::default()).await;
    let port = siege.web.port();
    let mut stalled = vec![];
    for _ in 0..30 {
        let mut rogue = Rogue::client(&siege.world, siege.web).await;
        rogue.say(&open(port)).await;
        assert_eq!(rogue.hear().await.expect("an answer"), Control::Accept);
        // The application answers each byte with one; nobody reads the answers, so at last nothing moves.
        let bytes = data(&pattern(64 * 1024, 1));
        let full = async {
            loop {
                rogue.stream.write_all(&bytes).await.expect("the tunnel lives");
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(50), full).await;
        stalled.push(rogue);
    }
    for _ in 0..20 {
        let mut other = connect(siege.world.outbound(siege.web)).await;
        exchange(&mut other).await;
    }
    let active = || siege.world.destination.metrics.active(Direction::Inbound).get() as usize;
    eventually(async || (active() == stalled.len() + 1).then_some(())).await;
    drop(stalled);
    siege.lift().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_leaves_as_many_places_as_it_takes() {
    let limits = Limits { connections_total: 60, ..Limits::default() };
    let world = World::with(&Plan::default(), Limits::default(), limits);
    let ((web, web_app), (api, api_app)) = (world.web().await, world.api().await);
    answer(web_app);
    answer(api_app);
    // A stranger speaks plaintext, and is connected at once.
    let mut flood = vec![];
    for _ in 0..200 {
        flood.extend(connect_from(STRANGER, web).await);
    }
    let hits = || world.destination.metrics.limit_hits("descriptors");
    eventually(async || (hits() == 170).then_some(())).await;
    let active = || world.destination.metrics.active(Direction::Inbound).get();
    eventually(async || (active() == 30).then_some(())).await; // half of what there is
    // The neighbour is served as if nothing were: its own half of what is left.
    let mut neighbours = vec![];
    for _ in 0..15 {
        let mut stream = connect_from(STRANGER, api).await.expect("connects");
        exchange(&mut stream).await;
        neighbours.push(stream);
    }
    drop(flood);
    eventually(async || (world.destination.metrics.active(Direction::Inbound).get() == 15).then_some(()))
        .await;
    let mut again = connect_from(STRANGER, web).await.expect("connects");
    exchange(&mut again).await;
}
