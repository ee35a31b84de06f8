//! Agents and controllers die and come back: no plaintext in between, and everything works afterwards.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use mesh_tests::{World, apps, until, wait::scaled, workload::TIMEOUT};

/// A refusal by the kernel, without an agent: no more than a round trip within the machine.
const AT_ONCE: Duration = Duration::from_millis(500);

#[test]
fn a_dead_agent_means_refusal_and_never_plaintext() {
    let world = World::shop().build().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let _apps = [&web, &api, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    assert_eq!(web.exchange(db.v4(8080), b"before").unwrap(), b"before");
    let mut held = web.connect(db.v4(8080)).unwrap();
    held.write_all(b"held").unwrap();
    held.read_exact(&mut [0; 4]).unwrap();

    let mut wire = world.capture().unwrap();
    world.agent("a").kill().unwrap();
    assert!(!matches!(held.read(&mut [0; 1]), Ok(1..)), "what the agent carried has ended");
    let both_ways = [(&web, &db), (&web, &api), (&db, &web)];
    for (from, to) in both_ways {
        for address in to.both(8080) {
            let started = Instant::now();
            from.assert_refused(address);
            let took = started.elapsed();
            assert!(took < scaled(AT_ONCE), "{} to {address} was refused only after {took:?}", from.name);
        }
    }
    assert!(wire.plaintext(b"may I?").unwrap().is_empty());
    let leaked: Vec<_> =
        wire.packets().unwrap().iter().filter(|p| p.opens && p.source.ip() == web.v4(0).ip()).collect();
    assert!(leaked.is_empty(), "a SYN of web left its node: {leaked:?}");

    world.agent("a").start().unwrap();
    world.agent("a").await_ready().unwrap();
    world.agent("a").await_enrolled(2, TIMEOUT).unwrap();
    for (from, to) in both_ways {
        for address in to.both(8080) {
            until("it works again", TIMEOUT, || {
                let answer = from
                    .exchange(address, b"after")
                    .map_err(|e| format!("{} to {address}: {e}", from.name))?;
                mesh_tests::wait::holds(answer == b"after", || format!("{answer:?}"))
            });
        }
    }
    let metrics = world.agent("a").metrics().unwrap();
    assert!(metrics.sum("nodemesh_kernel_refused_total", &[]) > 0.0, "{metrics:#?}");
}

#[test]
fn a_stopped_agent_drains_and_its_successor_takes_over() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    world.agent("a").stop().unwrap();
    web.assert_refused(db.v4(8080));
    world.agent("a").start().unwrap();
    world.agent("a").await_ready().unwrap();
    world.agent("a").await_enrolled(2, TIMEOUT).unwrap();
    assert_eq!(web.exchange(db.v6(8080), b"x").unwrap(), b"x");
}

#[test]
fn the_mesh_carries_on_without_its_controller() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    world.controller().kill().unwrap();
    for _ in 0..50 {
        assert_eq!(web.exchange(db.v4(8080), b"x").unwrap(), b"x");
    }
    // A change made meanwhile is in force once the controller is back.
    let text = "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: closed\nspec:\n  action: Allow\n  rules: []\n";
    world.yaml.write("policy.yaml", text).unwrap();
    world.controller().start().unwrap();
    until("the agents have reconnected and refuse", 3 * TIMEOUT, || {
        mesh_tests::wait::holds(web.exchange(db.v4(8080), b"x").is_err(), || "it is allowed".into())
    });
}

#[test]
fn a_new_root_is_taken_up_while_traffic_flows() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let issued = || world.controller().metrics().unwrap().sum("nodemesh_certificates_issued_total", &[]);
    let before = issued();
    world.controller().rotate_root().unwrap();
    until("new certificates are issued", 3 * TIMEOUT, || {
        let answer = web.exchange(db.v4(8080), b"x").unwrap_or_else(|e| panic!("during the rotation: {e}"));
        assert_eq!(answer, b"x");
        mesh_tests::wait::holds(issued() >= before + 3.0, || format!("{} issued", issued() - before))
    });
    assert_eq!(web.exchange(db.v4(8080), b"x").unwrap(), b"x");
}
