//! A new agent takes over from an old one while connections come and go: nobody notices.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr},
    time::{Duration, Instant},
};

use mesh_tests::{
    Workload, World,
    agent::{STOP, drain_deadline},
    apps,
    load::{Load, same, short},
    process::Program,
    until,
    wait::{self, scaled},
    workload::TIMEOUT,
};

/// How many upgrades in a row.
const UPGRADES: usize = 20;
/// A connection that lives this long is shorter than the drain deadline, and longer than an upgrade.
const LIFE: Duration = Duration::from_millis(2500);

/// A connection that speaks all its life.
fn long(from: &Workload, to: SocketAddr) -> io::Result<()> {
    let mut stream = from.connect(to)?;
    let begun = Instant::now();
    let sent = apps::noise(1000);
    let mut answer = vec![0; sent.len()];
    while begun.elapsed() < scaled(LIFE) {
        stream.write_all(&sent)?;
        stream.read_exact(&mut answer)?;
        same(&sent, &answer)?;
    }
    stream.shutdown(Shutdown::Write)?;
    same(b"", &{
        let mut rest = vec![];
        stream.read_to_end(&mut rest)?;
        rest
    })
}

/// A successor is started, and only then is the old agent told to end.
fn surge(world: &World) -> Program {
    let agent = world.agent("a");
    let old = agent.set_aside().unwrap();
    agent.start().unwrap();
    agent.await_serving().unwrap();
    old.terminate().unwrap();
    old
}

/// The old agent is told to end, and only then is its successor started.
fn replace(world: &World) -> Program {
    let agent = world.agent("a");
    let old = agent.set_aside().unwrap();
    old.terminate().unwrap();
    agent.start().unwrap();
    agent.await_serving().unwrap();
    old
}

#[test]
fn twenty_upgrades_under_load_lose_nothing() {
    let world = World::shop().build().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let _apps = [&web, &api, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    let mut load = Load::new();
    // The upgraded agent as source, as destination, and as both; over both families.
    let ways = [(&web, db.v4(8080)), (&db, web.v6(8080)), (&web, api.v4(8080))];
    for (from, to) in ways {
        load.run("short", from, to, short);
        load.run("long", from, to, long);
    }
    load.await_more(20);
    let mut old = vec![];
    for round in 1..=UPGRADES {
        old.push(if round % 2 == 0 { surge(&world) } else { replace(&world) });
        world.agent("a").await_enrolled(2, STOP).unwrap();
        load.await_more(5);
        load.assert_unharmed(format!("upgrade {round}"));
    }
    for program in old {
        assert!(program.await_end(STOP).unwrap().success());
    }
    eprintln!("{} connections over {UPGRADES} upgrades", load.finish());
    let lines = world.agent("a").access_log().unwrap();
    let harmed: Vec<_> = lines.iter().filter(|line| line["outcome"] != "ok").collect();
    assert!(harmed.is_empty(), "{harmed:#?}");
    let repairs = world.agent("a").metrics().unwrap().sum("nodemesh_repairs_total", &[]);
    assert_eq!(repairs, 0.0, "the agents fought");
}

#[test]
fn what_outlives_the_drain_deadline_is_cut_and_says_so() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let mut held = web.connect(db.v4(8080)).unwrap();
    held.write_all(b"held").unwrap();
    held.read_exact(&mut [0; 4]).unwrap();
    let begun = Instant::now();
    let old = surge(&world);
    assert!(old.await_end(STOP).unwrap().success());
    assert!(begun.elapsed() >= drain_deadline(), "it had its time");
    let error = held.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "a reset, never a silent end");
    world.agent("a").wait_log("the cut", |line| line["reason"] == "agent_stopping");
    assert_eq!(web.exchange(db.v4(8080), b"new").unwrap(), b"new");
}

#[test]
fn an_agent_that_was_told_to_end_serves_until_its_deadline_if_nobody_takes_over() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let begun = Instant::now();
    let old = world.agent("a").set_aside().unwrap();
    old.terminate().unwrap();
    while begun.elapsed() < drain_deadline() / 2 {
        assert_eq!(web.exchange(db.v4(8080), b"still").unwrap(), b"still");
    }
    assert!(old.await_end(STOP).unwrap().success());
    web.assert_refused(db.v4(8080));
}

#[test]
fn a_second_agent_takes_over_and_the_first_stands_down_until_it_is_told_to_end() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let agent = world.agent("a");
    let mut held = web.connect(db.v4(8080)).unwrap();
    let first = agent.set_aside().unwrap();
    agent.start().unwrap();
    agent.await_serving().unwrap();
    let log = std::fs::read_to_string(agent.log()).unwrap();
    for line in ["another agent owns this node", "a newer agent takes over"] {
        assert!(log.contains(line), "the log does not say '{line}'");
    }
    // Longer than a drain would take: nobody told the first to end, so it carries on what it has.
    let begun = Instant::now();
    while begun.elapsed() < drain_deadline() + Duration::from_secs(1) {
        held.write_all(b"held").unwrap();
        held.read_exact(&mut [0; 4]).unwrap();
        assert_eq!(web.exchange(db.v4(8080), b"new").unwrap(), b"new");
    }
    let metrics = agent.metrics().unwrap();
    assert_eq!(metrics.sum("nodemesh_repairs_total", &[]), 0.0, "the agents fight");
    drop(held);
    assert!(first.stop(STOP).unwrap().success());
}

/// As successors do that fail at their start, again and again, each in a container of its own.
#[test]
fn agents_that_never_take_over_leave_the_node_to_its_owner() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let owner = world.agent("a");
    for name in ["first", "second"] {
        let successor = owner.beside(|settings| {
            // The node's certificate says otherwise.
            settings.node = "another".to_owned();
            settings.cgroup = format!("{}-{name}", settings.cgroup);
            settings.directory = world.directory().join(name);
        });
        let successor = successor.unwrap();
        successor.start().unwrap();
        until("it has ended", TIMEOUT, || wait::holds(!successor.is_running(), || "it runs".to_owned()));
        let log = std::fs::read_to_string(successor.log()).unwrap();
        assert!(log.contains("this is node another"), "{log}");
    }
    assert_eq!(web.exchange(db.v4(8080), b"as before").unwrap(), b"as before");
}

/// The old agent hears of policies through the view that its successor writes down.
#[test]
fn an_agent_that_stood_down_still_ends_what_a_new_policy_forbids() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let mut held = web.connect(db.v4(8080)).unwrap();
    held.write_all(b"held").unwrap();
    held.read_exact(&mut [0; 4]).unwrap();
    let agent = world.agent("b");
    let first = agent.set_aside().unwrap();
    agent.start().unwrap();
    agent.await_serving().unwrap();
    held.write_all(b"held").unwrap();
    held.read_exact(&mut [0; 4]).unwrap();
    let text = "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: closed\nspec:\n  action: Allow\n  rules: []\n";
    let begun = Instant::now();
    world.yaml.write("policy.yaml", text).unwrap();
    let error = held.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let took = begun.elapsed();
    assert!(took < scaled(Duration::from_secs(2)), "cut after {took:?}");
    agent.wait_log("the cut", |line| line["reason"] == "policy_not_allowed");
    assert!(first.stop(STOP).unwrap().success());
}
