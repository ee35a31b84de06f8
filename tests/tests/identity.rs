//! Certificates are renewed and roots rotate while traffic flows.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use mesh_tests::{Workload, World, apps, workload::TIMEOUT};

/// A held connection and a stream of new ones, neither of which may fail while `done` does not hold yet.
fn carries_until(world: &World, web: &Workload, db: &Workload, mut done: impl FnMut(&World) -> bool) {
    let mut held = web.connect(db.v4(8080)).unwrap();
    let ping = |held: &mut TcpStream| {
        held.write_all(b"ping").unwrap();
        let mut answer = [0; 4];
        held.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ping");
    };
    let deadline = Instant::now() + 6 * TIMEOUT;
    while !done(world) {
        assert!(Instant::now() < deadline, "nothing was renewed in time");
        ping(&mut held);
        for to in db.both(8080) {
            assert_eq!(web.exchange(to, b"new").unwrap(), b"new");
        }
    }
    ping(&mut held);
}

/// When the certificate of a workload of this node expires, Unix time.
fn expiry(world: &World, workload: &Workload) -> f64 {
    let metrics = world.agent(&workload.node).metrics().unwrap();
    metrics.sum("nodemesh_certificate_expiry_seconds", &[("identity", &workload.identity())])
}

#[test]
fn certificates_are_renewed_while_traffic_flows() {
    let world = World::shop().certificate_ttl(Duration::from_secs(10)).build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let first = [expiry(&world, &web), expiry(&world, &db)];
    // Past the life of the first certificates: only renewed ones can have carried that.
    carries_until(&world, &web, &db, |world| {
        expiry(world, &web) >= first[0] + 10.0 && expiry(world, &db) >= first[1] + 10.0
    });
}

#[test]
fn a_new_root_comes_into_force_while_traffic_flows() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let first = [expiry(&world, &web), expiry(&world, &db)];
    let handshakes =
        |world: &World| world.agent("a").metrics().unwrap().sum("nodemesh_handshakes_total", &[]);
    let before = handshakes(&world);
    world.controller().rotate_root().unwrap();
    carries_until(&world, &web, &db, |world| expiry(world, &web) > first[0] && expiry(world, &db) > first[1]);
    let status = world.meshctl(&["--output", "json", "status"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["roots"].as_array().map(Vec::len), Some(2), "{status}");
    // A node that comes now trusts both roots, and is trusted.
    world.agent("b").kill().unwrap();
    world.agent("b").start().unwrap();
    world.agent("b").await_ready().unwrap();
    world.agent("b").await_enrolled(1, TIMEOUT).unwrap();
    world.await_tunnel(&web, &db).unwrap();
    assert!(handshakes(&world) > before);
}
