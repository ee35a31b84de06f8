//! Workloads come into the mesh, leave it, move and are repaired, while everything keeps running.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::time::{Duration, Instant};

use mesh_tests::{
    Server, Workload, WorkloadSpec, World, apps, attached, log,
    manifests::{self, Enrolment, Mode},
    until,
    wait::{holds, scaled},
    workload::TIMEOUT,
};

/// What the issue gives the agent to repair or to notice.
const REPAIR: Duration = Duration::from_secs(5);

/// Asserts that the workload's namespace and its node's end are as if there had never been a mesh.
#[track_caller]
fn assert_untouched(world: &World, workload: &Workload) {
    let look = |line: &str| workload.shell(line).unwrap();
    let node = &world.node(&workload.node).netns;
    for (netns, device) in
        [(&workload.netns, "eth0"), (&workload.netns, "lo"), (node, workload.device.as_str())]
    {
        // The kernel lets go of a link a grace period after its last pin.
        until("no programs are attached", TIMEOUT, || {
            let programs = attached::programs(netns, device).map_err(|e| format!("{e:#}"))?;
            holds(programs.is_empty(), || format!("on {device} of {}: {programs:?}", workload.name))
        });
    }
    for family in ["-4", "-6"] {
        let rules = look(&format!("ip {family} rule"));
        assert!(!rules.contains("fwmark"), "rules in {}:\n{rules}", workload.name);
        let routes = look(&format!("ip {family} route show table all type local"));
        assert!(!routes.contains("default") && !routes.contains("0.0.0.0/0"), "{routes}");
    }
    // The agent's listeners are bound to loopback, the tests' own to the wildcard.
    let listening = look("ss -Hltn | grep -cE '127.0.0.1:|\\[::1\\]:' || true");
    assert_eq!(listening.trim(), "0", "listeners in {}: {}", workload.name, look("ss -Hltnp"));
}

/// Asserts that connections between the two go through a tunnel, both ways.
#[track_caller]
fn assert_meshed(world: &World, one: &Workload, other: &Workload) {
    world.await_tunnel(one, other).unwrap();
    world.await_tunnel(other, one).unwrap();
}

fn echoing(workload: &Workload) -> Server {
    workload.serve(8080, apps::echo()).unwrap()
}

#[test]
fn a_workload_outside_of_the_mesh_is_reached_in_the_clear() {
    let world = World::shop().with(WorkloadSpec::new("shop/old", "b").outside()).build().unwrap();
    let (web, old) = (world.workload("web"), world.workload("old"));
    let app = echoing(&old);
    let mut wire = world.capture().unwrap();
    for to in old.both(8080) {
        assert_eq!(web.exchange(to, b"in the clear").unwrap(), b"in the clear");
    }
    assert!(!wire.plaintext(b"in the clear").unwrap().is_empty());
    assert_eq!(app.peers().iter().map(|p| p.ip()).collect::<Vec<_>>(), web.address.both());
    let line = world.agent("a").wait_log("the connection", log::is(log::OUTBOUND, &web, &old));
    assert_eq!((line["transport"].as_str(), line["outcome"].as_str()), (Some("plaintext"), Some("ok")));
    assert_untouched(&world, &old);
}

#[test]
fn a_running_workload_is_enrolled_and_unenrolled_by_its_label_alone() {
    let world = World::shop().with(WorkloadSpec::new("shop/old", "b").outside()).build().unwrap();
    let (web, old) = (world.workload("web"), world.workload("old"));
    let app = echoing(&old);
    world.write_workload(&WorkloadSpec::new("shop/old", "b")).unwrap();
    assert_meshed(&world, &web, &old);
    assert_eq!(web.exchange(old.v4(8080), b"x").unwrap(), b"x");
    world.write_workload(&WorkloadSpec::new("shop/old", "b").outside()).unwrap();
    drop(app);
    world.agent("b").await_enrolled(1, TIMEOUT).unwrap();
    assert_untouched(&world, &old);
    let _old_app = echoing(&old);
    until("web reaches old in the clear", TIMEOUT, || {
        web.exchange(old.v4(8080), b"x").map(drop).map_err(|e| e.to_string())
    });
    let _web_app = echoing(&web);
    assert_eq!(old.exchange(web.v4(8080), b"x").unwrap(), b"x");
}

#[test]
fn a_namespace_leaves_the_mesh_by_its_label_and_nothing_stays_behind() {
    let world = World::shop().build().unwrap();
    let text = manifests::namespace("shop", Enrolment::Outside, Mode::Permissive);
    world.yaml.write("namespace-shop.yaml", &text).unwrap();
    for node in ["a", "b"] {
        world.agent(node).await_enrolled(0, TIMEOUT).unwrap();
    }
    for name in ["web", "api", "db"] {
        assert_untouched(&world, &world.workload(name));
    }
    let _app = echoing(&world.workload("db"));
    assert_eq!(world.workload("web").exchange(world.workload("db").v6(8080), b"x").unwrap(), b"x");
}

#[test]
fn uninstall_leaves_nothing_behind() {
    let world = World::shop().build().unwrap();
    world.agent("a").stop().unwrap();
    world.agent("a").uninstall().unwrap();
    for name in ["web", "api"] {
        assert_untouched(&world, &world.workload(name));
    }
    assert!(!world.agent("a").bpffs().exists());
}

/// Breaks one thing behind the agent's back, and asserts that it is whole again within 5 s and counted.
#[track_caller]
fn repairs(world: &World, what: &str, broken: impl Fn() -> bool, damage: impl FnOnce()) {
    let (web, db) = (world.workload("web"), world.workload("db"));
    let agent = world.agent("a");
    let repairs = || agent.metrics().unwrap().sum("nodemesh_repairs_total", &[]);
    let before = repairs();
    damage();
    let started = Instant::now();
    until(&format!("{what} is repaired"), REPAIR, || {
        let mended = !broken() && repairs() > before;
        holds(mended, || format!("broken: {}, repairs: {}", broken(), repairs()))
    });
    assert!(started.elapsed() <= scaled(REPAIR));
    agent.await_enrolled(2, REPAIR).unwrap();
    assert_meshed(world, &web, &db);
}

#[test]
fn a_removed_rule_is_repaired() {
    let world = World::shop().build().unwrap();
    let web = world.workload("web");
    for family in ["-4", "-6"] {
        let rules = || web.shell(&format!("ip {family} rule")).unwrap();
        repairs(
            &world,
            "the rule",
            || !rules().contains("fwmark"),
            || {
                let listed = rules();
                let ours = listed.lines().find(|line| line.contains("fwmark")).expect("a rule of the mesh");
                let priority = ours.split(':').next().unwrap().trim();
                web.shell(&format!("ip {family} rule del priority {priority}")).unwrap();
            },
        );
    }
}

#[test]
fn a_detached_program_is_repaired() {
    let world = World::shop().build().unwrap();
    let web = world.workload("web");
    let node = &world.node("a").netns;
    let places = [
        (web.netns.clone(), "eth0".to_owned()),
        (web.netns.clone(), "lo".to_owned()),
        (node.clone(), web.device.clone()),
    ];
    for (netns, device) in places {
        let programs = || attached::programs(&netns, &device).unwrap();
        let whole = programs().len();
        assert!(whole > 0, "nothing is attached to {device}");
        repairs(&world, &device, || programs().len() < whole, || programs()[0].detach().unwrap());
    }
}

#[test]
fn a_killed_listener_is_repaired() {
    let world = World::shop().build().unwrap();
    let web = world.workload("web");
    let listeners = || web.shell("ss -Hltn | wc -l").unwrap().trim().parse::<usize>().unwrap();
    let whole = listeners();
    assert!(whole > 0, "the agent listens in the workload's namespace");
    let agent = world.agent("a");
    let before = agent.metrics().unwrap().sum("nodemesh_repairs_total", &[]);
    // sock_diag's destroy works on listeners; the agent may be back before the next look, so its count is the proof.
    web.shell("ss -K state listening").unwrap();
    until("the listeners are repaired", REPAIR, || {
        let repairs = agent.metrics().map_err(|e| e.to_string())?.sum("nodemesh_repairs_total", &[]);
        holds(repairs > before && listeners() == whole, || format!("{} listeners", listeners()))
    });
    assert_meshed(&world, &web, &world.workload("db"));
}

#[test]
fn a_workload_moves_to_another_node_while_traffic_flows() {
    let world = World::shop().build().unwrap();
    let web = world.workload("web");
    let _app = echoing(&world.workload("db"));
    world.remove_workload("api").unwrap();
    world.agent("a").await_enrolled(1, TIMEOUT).unwrap();
    let api = world.add_workload(&WorkloadSpec::new("shop/api", "b")).unwrap();
    world.agent("b").await_enrolled(2, TIMEOUT).unwrap();
    assert_meshed(&world, &web, &api);
    assert_eq!(web.exchange(world.workload("db").v4(8080), b"x").unwrap(), b"x");
}

#[test]
fn a_workload_that_gets_another_address_is_captured_at_it() {
    let world = World::shop().build().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let app = echoing(&api);
    let old = api.v4(0).ip().to_string();
    let (range, _) = old.rsplit_once('.').unwrap();
    let new = format!("{range}.77");
    api.shell(&format!("ip addr add {new}/32 dev eth0")).unwrap();
    world.node("a").netns.shell(&format!("ip route add {new}/32 dev {}", api.device)).unwrap();
    world.yaml.replace("workload-api.yaml", &format!("\"{old}\""), &format!("\"{new}\"")).unwrap();
    let to = format!("{new}:8080").parse().unwrap();
    until("the new address is captured", TIMEOUT, || {
        let answer = db.exchange(to, b"x").map_err(|e| e.to_string())?;
        assert_eq!(answer, b"x");
        let reached = |line: &serde_json::Value| {
            line["destination"]["address"] == to.to_string() && line["transport"] == "tunnel"
        };
        let lines = world.agent("a").access_log().map_err(|e| format!("{e:#}"))?;
        holds(lines.iter().any(reached), || "not by a tunnel yet".to_owned())
    });
    assert!(app.peers().iter().any(|peer| peer.ip() == db.v4(0).ip()));
    assert_eq!(web.exchange(to, b"same node").unwrap(), b"same node");
}

/// As when a container crashes and the runtime makes a new sandbox under the same name, before anyone told the mesh.
#[test]
fn a_workload_whose_namespace_is_recreated_is_enrolled_anew() {
    let world = World::shop().build().unwrap();
    for _ in 0..3 {
        world.remove_workload("api").unwrap();
        let api = world.add_workload(&WorkloadSpec::new("shop/api", "a")).unwrap();
        world.agent("a").await_enrolled(2, TIMEOUT).unwrap();
        assert_meshed(&world, &world.workload("web"), &api);
    }
}

#[test]
fn two_hundred_and_fifty_workloads_are_enrolled_within_ten_seconds() {
    let world = World::builder().node("a").workload("shop/first", "a").build().unwrap();
    let text = manifests::namespace("crowd", Enrolment::Outside, Mode::Permissive);
    world.yaml.write("namespace-crowd.yaml", &text).unwrap();
    for n in 1..mesh_tests::world::WORKLOADS_PER_NODE {
        world.add_workload(&WorkloadSpec::new(&format!("crowd/w{n}"), "a")).unwrap();
    }
    let started = Instant::now();
    let text = manifests::namespace("crowd", Enrolment::Enrolled, Mode::Permissive);
    world.yaml.write("namespace-crowd.yaml", &text).unwrap();
    let all = mesh_tests::world::WORKLOADS_PER_NODE;
    world.agent("a").await_enrolled(all, Duration::from_secs(10)).unwrap();
    eprintln!("{all} workloads enrolled in {:?}", started.elapsed());
    assert_meshed(&world, &world.workload("w1"), &world.workload(&format!("w{}", all - 1)));
}
