//! Certificates are renewed and roots rotate while traffic flows.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use mesh_tests::{
    Workload, World, apps, until,
    wait::{holds, scaled},
    workload::TIMEOUT,
};
use serde_json::Value;

/// What the issue gives a live connection that is no longer allowed.
const CUT: Duration = Duration::from_secs(1);

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

/// What `meshctl get` answers.
fn answered(world: &World, what: &str) -> Value {
    let said = world.meshctl(&["--output", "json", "get", what]).unwrap();
    serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

#[test]
fn a_retired_root_takes_what_was_opened_under_it_along_and_nothing_else() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let ping = |held: &mut TcpStream| {
        held.write_all(b"ping").unwrap();
        held.read_exact(&mut [0; 4]).unwrap();
    };
    let mut under_old = web.connect(db.v4(8080)).unwrap();
    ping(&mut under_old);
    let old = answered(&world, "roots")[0]["sha256"].as_str().unwrap().to_owned();
    let state = world.controller().state().to_str().unwrap().to_owned();
    let retire = |more: &[&str]| {
        world.meshctl(&[&["retire", "root", &old[..16], "--state-dir", &state], more].concat()).unwrap()
    };
    let signs = retire(&[]);
    assert!(!signs.success && signs.stderr.contains("rotate-root"), "{signs:?}");

    world.controller().rotate_root().unwrap();
    until("the new root signs", TIMEOUT, || {
        let roots = answered(&world, "roots");
        holds(roots[0]["signs"] == true && roots[1]["sha256"] == old.as_str(), || roots.to_string())
    });
    let used = retire(&[]);
    assert!(!used.success && used.stderr.contains("certificates lead to this root"), "{used:?}");
    until("no certificate leads to the old root", 2 * TIMEOUT, || {
        let roots = answered(&world, "roots");
        holds(roots[1]["certificates"] == 0 && roots[0]["certificates"] == 5, || roots.to_string())
    });
    ping(&mut under_old);
    let certificates = world.meshctl(&["get", "certificates", "--node", "b"]).unwrap().stdout;
    assert!(
        certificates.contains(&db.identity()) && !certificates.contains(&web.identity()),
        "{certificates}"
    );

    let done = retire(&[]);
    let started = Instant::now();
    assert!(done.success, "{done:?}");
    let error = under_old.read(&mut [0; 1]).expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // The controller looks for a change every half second; what the agents get is the rest.
    assert!(started.elapsed() < scaled(CUT + Duration::from_millis(500)), "{:?}", started.elapsed());
    until("one end says why, the other that it was reset", TIMEOUT, || {
        let logs = ["a", "b"].map(|node| world.agent(node).access_log().unwrap());
        let says = |line: &Value| line["detail"].as_str().is_some_and(|it| it.contains(&old[..16]));
        let why = ["peer_certificate_untrusted", "certificate_untrusted"];
        let cut = logs.iter().flatten().any(|line| says(line) && why.iter().any(|it| line["reason"] == *it));
        holds(cut, || format!("{logs:?}"))
    });
    for to in db.both(8080) {
        assert_eq!(web.exchange(to, b"new").unwrap(), b"new");
    }
    assert_eq!(answered(&world, "roots").as_array().map(Vec::len), Some(1));
}
