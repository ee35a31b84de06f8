//! Pods are known by their uid: an address that moves, or a process that goes elsewhere, lends nobody an identity.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{Read, Write},
    thread,
    time::Duration,
};

use mesh_agent::enrol::hold;
use mesh_core::refusal::Reason;
use mesh_tests::{
    Workload, World,
    agent::STOP,
    apps, attached, log,
    manifests::{Enrolment, Mode},
    until, wait,
    workload::TIMEOUT,
    world::WorkloadSpec,
};

const WEB: &str = "11111111-1f6c-4b8e-9d53-0c1d6c1f0b11";
const LATE: &str = "22222222-1f6c-4b8e-9d53-0c1d6c1f0b11";

/// Lets nobody but `shop/web` open connections to `shop/db`.
const ONLY_WEB: &str = "
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  action: Allow
  rules:
    - from: [{identities: [\"spiffe://cluster.local/ns/shop/sa/web\"]}]
";

/// `shop/web`, a pod, on node a; `shop/db` on node b, which takes connections of web only.
fn shop() -> World {
    let world = World::builder()
        .node("a")
        .node("b")
        .with(WorkloadSpec::new("shop/web", "a").pod(WEB))
        .workload("shop/db", "b")
        .build()
        .unwrap();
    world.yaml.write("policy.yaml", ONLY_WEB).unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    until("the policy is in force", TIMEOUT, || {
        let view = world.agent("b").get("/api/v1/view").map_err(|e| format!("{e:#}"))?.body;
        wait::holds(view.contains("sa/web"), || view.clone())
    });
    ask(&web, &db).unwrap();
    world
}

/// Waits until what leaves a new workload of node a is held.
fn await_hold(world: &World, workload: &Workload) {
    let node = &world.node("a").netns;
    until("it is held", TIMEOUT, || {
        let programs = attached::programs(node, &workload.device).map_err(|e| format!("{e:#}"))?;
        wait::holds(!programs.is_empty(), || "nothing is attached".to_owned())
    });
}

fn holds(world: &World, outcome: &str) -> f64 {
    world.agent("a").metrics().unwrap().sum("nodemesh_holds_total", &[("outcome", outcome)])
}

/// Whether an application of one is served by one of the other.
fn ask(from: &Workload, to: &Workload) -> Result<(), String> {
    let _app = to.serve(8080, apps::namer("served")).map_err(|e| format!("{e:#}"))?;
    let answer = from.exchange(to.v4(8080), b"").map_err(|e| e.to_string())?;
    wait::holds(answer == b"served", || format!("it answered {answer:?}"))
}

/// What the agent of node a says of a workload.
fn said(world: &World, name: &str) -> (String, String) {
    let state = world.agent("a").state().unwrap();
    let all = state["workloads"].as_array().unwrap();
    let found = all.iter().find(|workload| workload["name"] == name);
    let text = |key: &str| found.and_then(|it| it[key].as_str()).unwrap_or_default().to_owned();
    (text("enrolment"), text("reason"))
}

#[test]
fn an_address_that_moves_to_another_pod_lends_it_no_identity() {
    let world = shop();
    let (address, db) = (world.workload("web").address, world.workload("db"));
    // All within a second, before the cluster's API says anything.
    world.end_workload("web").unwrap();
    let late = WorkloadSpec::new("shop/late", "a").pod(LATE).address(address).untold();
    let pod = world.add_workload(&late).unwrap();
    until("the agent says that the pod is gone", TIMEOUT, || {
        let (state, reason) = said(&world, "shop/web");
        wait::holds(reason.contains(WEB), || format!("{state}: {reason}"))
    });
    assert!(ask(&pod, &db).is_err(), "it has the address of web, and is not web");

    // Now it does: the same address is another's, with an identity that may not either.
    world.write_workload(&late).unwrap();
    world.yaml.remove("workload-web.yaml").unwrap();
    world.agent("a").await_enrolled(1, TIMEOUT).unwrap();
    assert!(ask(&pod, &db).is_err());
    let refused = log::refused(log::INBOUND, Reason::PolicyNotAllowed);
    let line = world.agent("b").wait_log("it is known for what it is", |line| {
        refused(line) && line["source"]["workload"] == "shop/late"
    });
    assert!(line["source"]["identity"].as_str().is_some_and(|id| id.ends_with("/sa/late")), "{line}");
}

#[test]
fn a_pod_of_the_same_name_is_another_and_the_connections_of_the_first_end() {
    let world = shop();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(9090, apps::echo()).unwrap();
    let mut stream = web.connect(db.v4(9090)).unwrap();
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();

    world.yaml.replace("workload-web.yaml", WEB, LATE).unwrap();
    let mut rest = vec![];
    let ended = stream.read_to_end(&mut rest);
    assert!(ended.is_err() || rest.is_empty(), "{ended:?}, {rest:?}");
    until("the agent says what it waits for", TIMEOUT, || {
        let (state, reason) = said(&world, "shop/web");
        wait::holds(state == "pending" && reason.contains(LATE), || format!("{state}: {reason}"))
    });

    world.yaml.replace("workload-web.yaml", LATE, WEB).unwrap();
    world.agent("a").await_enrolled(1, TIMEOUT).unwrap();
    until("web is served again", TIMEOUT, || ask(&web, &db));
}

#[test]
fn a_process_of_a_pod_that_goes_to_another_namespace_misleads_nobody() {
    let world = shop();
    let (web, db) = (world.workload("web"), world.workload("db"));
    // It is of web's pod, and where somebody else has web's address.
    let other = world.wire().name().replace("wire", "lair");
    let lair = mesh_tests::netns::NetNs::create(&other, false).unwrap();
    lair.ip(&format!(
        "link add name eth0 type veth peer name back\naddr add {}/32 dev eth0\nlink set eth0 up\n",
        web.address.v4
    ))
    .unwrap();
    world.start_in_pod(WEB, &lair).unwrap();

    // Enrolled anew, it is found where its first process is.
    world.yaml.replace("workload-web.yaml", WEB, LATE).unwrap();
    until("it is let go", TIMEOUT, || {
        let (state, reason) = said(&world, "shop/web");
        wait::holds(state == "pending", || format!("{state}: {reason}"))
    });
    world.yaml.replace("workload-web.yaml", LATE, WEB).unwrap();
    world.agent("a").await_enrolled(1, TIMEOUT).unwrap();
    until("web is served", TIMEOUT, || ask(&web, &db));
    let line = world.agent("b").wait_log("the connection", log::is(log::INBOUND, &web, &db));
    assert!(line.to_string().contains("sa/web"), "{line}");
}

#[test]
fn of_two_pods_whose_first_processes_are_in_one_namespace_neither_is_taken() {
    let world = shop();
    let web = world.workload("web");
    world.start_in_pod(LATE, &web.netns).unwrap();
    world.yaml.replace("workload-web.yaml", WEB, LATE).unwrap();
    until("the agent says why not", TIMEOUT, || {
        let (state, reason) = said(&world, "shop/web");
        let told = reason.contains(WEB) && reason.contains(LATE);
        wait::holds(state == "failed" && told, || format!("{state}: {reason}"))
    });
}

#[test]
fn a_pod_is_captured_when_it_has_all_addresses_that_are_told_of_it() {
    let world = shop();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let v6 = web.address.v6;
    web.netns.ip(&format!("addr del {v6}/128 dev eth0\n")).unwrap();
    until("the agent says what it waits for", TIMEOUT, || {
        let (state, reason) = said(&world, "shop/web");
        let told = state == "pending" && reason.contains(&v6.to_string());
        wait::holds(told, || format!("{state}: {reason}"))
    });
    web.netns.ip(&format!("addr add {v6}/128 dev eth0 nodad\n")).unwrap();
    world.agent("a").await_enrolled(1, TIMEOUT).unwrap();
    until("web is served again", TIMEOUT, || ask(&web, &db));
}

#[test]
fn the_first_connection_of_a_new_pod_waits_for_capture_and_is_not_lost() {
    let world = World::shop().hold_new(Duration::from_secs(60)).build().unwrap();
    let db = world.workload("db");
    let _app = db.serve(8080, apps::echo()).unwrap();
    let mut wire = world.capture().unwrap();
    let mark = world.agent("a").run_dir().join(hold::MARK);
    until("pods that wait for it may start", TIMEOUT, || {
        wait::holds(mark.exists(), || format!("no {}", mark.display()))
    });
    let late = WorkloadSpec::new("shop/late", "a").pod(LATE).untold();
    let pod = world.add_workload(&late).unwrap();
    await_hold(&world, &pod);
    let application = thread::spawn({
        let (pod, db) = (pod.clone(), db.clone());
        move || pod.exchange(db.v4(8080), b"from the first moment on")
    });
    until("the application waits", TIMEOUT, || {
        let opening = pod.shell("ss -Htn state syn-sent").map_err(|e| format!("{e:#}"))?;
        wait::holds(!opening.is_empty(), || "it has not begun".to_owned())
    });

    world.write_workload(&late).unwrap();
    assert_eq!(application.join().unwrap().unwrap(), b"from the first moment on");
    assert!(wire.plaintext(b"from the first moment on").unwrap().is_empty());
    let line = world.agent("b").wait_log("the connection", log::is(log::INBOUND, &pod, &db));
    assert!(line["transport"] == "tunnel" && line.to_string().contains("sa/late"), "{line}");
    assert_eq!(holds(&world, "captured"), 1.0);
    let left = attached::programs(&world.node("a").netns, &pod.device).unwrap();
    assert_eq!(left.len(), 2, "the guard of both directions, and no hold: {left:?}");
}

#[test]
fn a_new_pod_is_held_whatever_else_its_agent_is_at() {
    let world = World::shop().hold_new(Duration::from_secs(60)).build().unwrap();
    let still = world.agent("a").halt().unwrap();
    let pod = world.add_workload(&WorkloadSpec::new("shop/late", "a").pod(LATE).untold()).unwrap();
    await_hold(&world, &pod);
    drop(still);
}

#[test]
fn a_hold_goes_on_when_another_agent_takes_over() {
    let world = World::shop().hold_new(Duration::from_secs(60)).build().unwrap();
    let db = world.workload("db");
    let _app = db.serve(8080, apps::echo()).unwrap();
    let mut wire = world.capture().unwrap();
    let late = WorkloadSpec::new("shop/late", "a").pod(LATE).untold();
    let pod = world.add_workload(&late).unwrap();
    await_hold(&world, &pod);
    let agent = world.agent("a");
    let old = agent.set_aside().unwrap();
    agent.start().unwrap();
    agent.await_serving().unwrap();
    old.stop(STOP).unwrap();
    // What the new one does not want was taken away before it said that it serves.
    assert!(!attached::programs(&world.node("a").netns, &pod.device).unwrap().is_empty(), "it is not held");

    world.write_workload(&late).unwrap();
    assert_eq!(pod.exchange(db.v4(8080), b"first").unwrap(), b"first");
    assert!(wire.plaintext(b"first").unwrap().is_empty());
    assert_eq!(holds(&world, "captured"), 1.0);
}

#[test]
fn the_first_connection_of_a_strict_pod_waits_for_capture_beyond_the_limit_of_the_hold() {
    let shop = World::shop().namespace("shop", Enrolment::Enrolled, Mode::Strict);
    let world = shop.hold_new(Duration::from_secs(2)).build().unwrap();
    let db = world.workload("db");
    let _app = db.serve(8080, apps::echo()).unwrap();
    let mut wire = world.capture().unwrap();
    let late = WorkloadSpec::new("shop/late", "a").pod(LATE).untold();
    let pod = world.add_workload(&late).unwrap();
    await_hold(&world, &pod);
    // What is told of it first is an address that it does not have.
    let (own, other) = (pod.address.v4.to_string(), "10.255.255.254");
    let manifest = world.manifest(&late);
    world.yaml.write("workload-late.yaml", &manifest.replace(&own, other)).unwrap();
    until("the agent says what it waits for", TIMEOUT, || {
        let (state, reason) = said(&world, "shop/late");
        wait::holds(state == "pending" && reason.contains(other), || format!("{state}: {reason}"))
    });
    let application = thread::spawn({
        let (pod, db) = (pod.clone(), db.clone());
        move || pod.exchange(db.v4(8080), b"after all")
    });
    // A second lies between two SYNs, at least: the fourth is later than the limit.
    until("the application has asked four times", TIMEOUT, || {
        let opening = pod.shell("ss -Htnio state syn-sent").map_err(|e| format!("{e:#}"))?;
        let sent =
            opening.split_once("segs_out:").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u32>().ok());
        wait::holds(sent.is_some_and(|sent| sent >= 4), || opening.clone())
    });

    world.yaml.write("workload-late.yaml", &manifest).unwrap();
    assert_eq!(application.join().unwrap().unwrap(), b"after all");
    assert!(wire.plaintext(b"after all").unwrap().is_empty());
    assert_eq!(holds(&world, "captured"), 1.0);
}

#[test]
fn a_pod_outside_of_the_mesh_is_let_go_as_soon_as_that_is_known() {
    let world = World::shop().hold_new(Duration::from_secs(60)).build().unwrap();
    let db = world.workload("db");
    let _app = db.serve(8080, apps::echo()).unwrap();
    let old = WorkloadSpec::new("shop/old", "a").pod(LATE).outside().untold();
    let pod = world.add_workload(&old).unwrap();
    await_hold(&world, &pod);
    world.write_workload(&old).unwrap();
    assert_eq!(pod.exchange(db.v4(8080), b"in the clear").unwrap(), b"in the clear");
    assert_eq!(holds(&world, "outside"), 1.0);
}

#[test]
fn a_veth_that_nobody_tells_of_is_held_no_longer_than_the_limit() {
    let world = World::shop().hold_new(Duration::from_secs(2)).build().unwrap();
    let db = world.workload("db");
    let _app = db.serve(8080, apps::echo()).unwrap();
    let pod = world.add_workload(&WorkloadSpec::new("shop/unknown", "a").untold()).unwrap();
    await_hold(&world, &pod);
    assert_eq!(pod.exchange(db.v4(8080), b"in the clear").unwrap(), b"in the clear");
    until("it is counted", TIMEOUT, || {
        wait::holds(holds(&world, "limit") == 1.0, || holds(&world, "limit").to_string())
    });
}
