//! Views by demand: a node knows what its workloads use, and nothing of the rest of the mesh; while the controller is away
//! what it knows goes on, and what it does not is refused where plaintext would be.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use mesh_tests::{
    Server, World,
    agent::Agent,
    apps,
    manifests::{self, Enrolment, Mode, WorkloadManifest},
    until,
    wait::holds,
    workload::TIMEOUT,
    world::WorkloadSpec,
};

/// So long that ciphertext does not have it by chance.
const NEW: &[u8] = b"said on a new connection";

/// Nobody may connect to anybody in the namespace.
const CLOSED: &str = "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: closed\nspec:\n  action: Allow\n  rules: []\n";

/// The workloads and services that an agent knows.
fn known(agent: &Agent) -> BTreeSet<String> {
    let view: serde_json::Value = serde_json::from_str(&agent.get("/api/v1/view").unwrap().body).unwrap();
    let names = |kind: &str| -> Vec<String> {
        view[kind]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| format!("{kind} {}", it["name"].as_str().unwrap()))
            .collect()
    };
    names("workloads").into_iter().chain(names("services")).collect()
}

#[test]
fn a_node_knows_what_its_workloads_use_and_goes_on_with_it_while_the_controller_is_away() {
    let world = World::shop()
        .namespace("shop", Enrolment::Enrolled, Mode::Strict)
        .service("shop/pay", "pay", 80, 8080)
        .service("shop/other", "cart", 80, 8080)
        .whole_views_up_to(0)
        .build()
        .unwrap();
    let (web, agent) = (world.workload("web"), world.agent("a"));
    let [pay, cart] = ["pay", "cart"].map(|name| {
        let spec = WorkloadSpec::new(&format!("shop/{name}"), "b");
        world.add_workload(&spec).unwrap()
    });
    world.agent("b").await_enrolled(3, TIMEOUT).unwrap();
    let _apps = [&pay, &cart].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    let service: SocketAddr = (world.service("shop/pay").v4, 80).into();
    assert!(
        !known(agent).iter().any(|name| name.contains("shop/pay") || name.contains("shop/cart")),
        "{:?}",
        known(agent)
    );

    // The first connections: to a service, and to a workload's own address of the other family.
    let mut wire = world.capture().unwrap();
    for to in [service, pay.v6(8080)] {
        assert_eq!(web.exchange(to, NEW).unwrap(), NEW, "{to}");
    }
    let readable = wire.plaintext(NEW).unwrap();
    assert!(readable.is_empty(), "{readable:?}");
    let now = known(agent);
    assert!(now.contains("services shop/pay") && now.contains("workloads shop/pay"), "{now:?}");
    assert!(!now.contains("services shop/other") && !now.contains("workloads shop/cart"), "{now:?}");
    assert!(known(world.agent("b")).contains("workloads shop/web"), "the destination knows its source");

    // What is asked for is told of as it changes.
    world.yaml.write("policy.yaml", CLOSED).unwrap();
    until("a policy reaches the destination", TIMEOUT, || {
        holds(web.exchange(service, b"x").is_err(), || "it is allowed".into())
    });
    world.yaml.remove("policy.yaml").unwrap();
    until("and its end", TIMEOUT, || web.exchange(service, b"x").map(drop).map_err(|e| e.to_string()));

    // Outside of the mesh nothing is asked for.
    let listener = world.wire().enter(|| TcpListener::bind("0.0.0.0:9999")).unwrap().unwrap();
    let outside = SocketAddr::new(world.outside().v4.into(), 9999);
    let _outside = Server::start(vec![listener], apps::echo()).unwrap();
    assert_eq!(web.exchange(outside, b"hello").unwrap(), b"hello");

    world.controller().kill().unwrap();
    until("the agent knows, and has written down what it had", TIMEOUT, || {
        let state = agent.state().map_err(|e| format!("{e:#}"))?;
        holds(state["controller_connected"] == false, || "it is connected".into())
    });
    agent.kill().unwrap();
    agent.start().unwrap();
    agent.await_ready().unwrap();
    agent.await_enrolled(2, TIMEOUT).unwrap();
    assert_eq!(known(agent), now, "from its disk");
    let mut wire = world.capture().unwrap();
    for to in [service, pay.v6(8080)] {
        assert_eq!(web.exchange(to, NEW).unwrap(), NEW, "{to}");
    }
    assert_eq!(web.exchange(outside, b"hello").unwrap(), b"hello");
    web.exchange(cart.v4(8080), NEW).unwrap_err();
    agent.wait_log("the reason", |line| line["reason"] == "destination_unanswered");
    let refused =
        agent.metrics().unwrap().sum("nodemesh_connections_total", &[("reason", "destination_unanswered")]);
    assert!(refused >= 1.0, "{refused}");
    assert!(wire.plaintext(NEW).unwrap().is_empty());

    world.controller().start().unwrap();
    until("what is new is known again", Duration::from_secs(60), || {
        let answer = web.exchange(cart.v4(8080), NEW).map_err(|e| e.to_string())?;
        holds(answer == NEW, || format!("{answer:?}"))
    });
}

/// Workloads of a node that is not there.
fn far(count: u8) -> String {
    let one = |number: u8| {
        manifests::workload(&WorkloadManifest {
            namespace: "shop",
            name: &format!("far{number}"),
            uid: None,
            node: "far",
            addresses: &[format!("192.0.2.{number}")],
            labels: &[("app".to_owned(), "far".to_owned())],
            enrolment: Some(Enrolment::Outside),
        })
    };
    (1..=count).map(one).collect::<Vec<_>>().join("---\n")
}

fn say(on: &mut TcpStream) {
    on.write_all(NEW).unwrap();
    let mut answer = [0; NEW.len()];
    on.read_exact(&mut answer).unwrap();
    assert_eq!(answer, NEW);
}

#[test]
fn connections_go_on_while_the_mesh_grows_past_the_limit_and_shrinks_again() {
    const MOST: usize = 5;
    let world = World::shop()
        .namespace("shop", Enrolment::Enrolled, Mode::Strict)
        .service("shop/db", "db", 80, 8080)
        .whole_views_up_to(MOST)
        .build()
        .unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let service: SocketAddr = (world.service("shop/db").v4, 80).into();
    let becomes = |by_demand: bool| {
        for node in ["a", "b"] {
            until(&format!("views by demand at {node}: {by_demand}"), TIMEOUT, || {
                let state = world.agent(node).state().map_err(|e| format!("{e:#}"))?;
                holds(state["by_demand"] == by_demand, || state.to_string())
            });
        }
        let status = world.meshctl(&["status"]).unwrap().stdout;
        assert_eq!(status.matches(", asks for ").count(), if by_demand { 2 } else { 0 }, "{status}");
    };
    becomes(false);
    let mut wire = world.capture().unwrap();
    let mut open = [service, db.v4(8080), db.v6(8080)].map(|to| web.connect(to).unwrap());
    open.iter_mut().for_each(say);
    until("what is asked for is counted in whole views too", TIMEOUT, || {
        let metrics = world.agent("a").metrics().map_err(|e| format!("{e:#}"))?;
        let asked = metrics.sum("nodemesh_addresses_asked", &[]);
        holds(asked >= 3.0, || format!("{asked}"))
    });
    for round in 0..2 {
        world.yaml.write("far.yaml", &far(9)).unwrap();
        becomes(true);
        let now = known(world.agent("a"));
        assert!(now.contains("services shop/db") && now.contains("workloads shop/db"), "{now:?}");
        assert!(!now.iter().any(|name| name.contains("far")), "{now:?}");
        open.iter_mut().for_each(say);
        assert_eq!(web.exchange(service, NEW).unwrap(), NEW, "{round}");

        world.yaml.remove("far.yaml").unwrap();
        becomes(false);
        assert!(known(world.agent("b")).contains("workloads shop/api"));
        open.iter_mut().for_each(say);
        assert_eq!(web.exchange(db.v6(8080), NEW).unwrap(), NEW, "{round}");
    }
    let readable = wire.plaintext(NEW).unwrap();
    assert!(readable.is_empty(), "{readable:?}");
    let lines = world.agent("a").access_log().unwrap();
    let harmed: Vec<_> = lines.iter().filter(|line| line["reason"] == "destination_unanswered").collect();
    assert!(harmed.is_empty(), "{harmed:#?}");
}

#[test]
fn a_workload_that_scans_addresses_costs_only_itself() {
    const MOST: usize = 16;
    let world = World::shop().whole_views_up_to(0).addresses_per_workload(MOST).build().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let agent = world.agent("a");
    assert_eq!(api.exchange(db.v4(8080), b"x").unwrap(), b"x");
    // Nobody has the last addresses of the range that `db` is in; what becomes of the connections is nobody's concern.
    let [a, b, c, _] = db.address.v4.octets();
    let nobody = |last| SocketAddr::new(Ipv4Addr::new(a, b, c, last).into(), 8080);
    until("the scanner meets its limit", TIMEOUT, || {
        let _scanned: Vec<_> = (200..250).map(|last| web.connect(nobody(last))).collect();
        let metrics = agent.metrics().map_err(|e| format!("{e:#}"))?;
        let hits = metrics.sum("nodemesh_limit_hits_total", &[("limit", "addresses")]);
        holds(hits > 0.0, || "it has not".into())
    });
    until("what it may ask for is known, and no more", TIMEOUT, || {
        let view = agent.get("/api/v1/view").map_err(|e| format!("{e:#}"))?.body;
        let view: serde_json::Value = serde_json::from_str(&view).map_err(|e| e.to_string())?;
        let nobody = view["nobody"].as_array().map_or(0, Vec::len);
        holds((1..=MOST).contains(&nobody), || format!("{nobody} addresses of nobody are known"))
    });
    let asked = agent.state().unwrap()["addresses_asked"].as_u64().unwrap();
    assert!(asked <= 2 * MOST as u64 + 4, "{asked} addresses are asked for");
    world.controller().kill().unwrap();
    let mut wire = world.capture().unwrap();
    assert_eq!(api.exchange(db.v4(8080), NEW).unwrap(), NEW, "another workload's are not given up for it");
    assert!(wire.plaintext(NEW).unwrap().is_empty());
}
