//! Services: a virtual address that leads to one of the ready endpoints.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::BTreeMap;

use mesh_tests::{WorkloadSpec, World, apps, until, wait::holds, workload::TIMEOUT, world::Builder};

/// `shop/pay` over `pay-1` beside the client and `pay-2` on the other node.
fn pay() -> Builder {
    World::shop()
        .with(WorkloadSpec::new("shop/pay-1", "a").app("pay"))
        .with(WorkloadSpec::new("shop/pay-2", "b").app("pay"))
        .service("shop/pay", "pay", 80, 8080)
}

fn ask(world: &World, times: usize) -> BTreeMap<String, usize> {
    let (web, address) = (world.workload("web"), world.service("shop/pay"));
    let mut answers = BTreeMap::new();
    for round in 0..times {
        let to = (address.both()[round % 2], 80).into();
        let answer = web.exchange(to, b"").unwrap_or_else(|error| panic!("round {round}, {to}: {error}"));
        *answers.entry(String::from_utf8_lossy(&answer).into_owned()).or_default() += 1;
    }
    answers
}

#[test]
fn a_service_is_balanced_over_its_endpoints() {
    let world = pay().build().unwrap();
    let _apps = ["pay-1", "pay-2"].map(|name| world.workload(name).serve(8080, apps::namer(name)).unwrap());
    let answers = ask(&world, 200);
    assert_eq!(answers.values().sum::<usize>(), 200);
    for name in ["pay-1", "pay-2"] {
        assert!(answers.get(name).is_some_and(|n| *n >= 20), "{name} is starved: {answers:?}");
    }
    let line = world.agent("a").wait_log("the service", |line| line["destination"]["service"] == "shop/pay");
    assert_eq!(line["transport"], "tunnel", "{line}");
}

#[test]
fn an_endpoint_that_refuses_is_passed_over_without_the_client_noticing() {
    let world = pay().build().unwrap();
    let _one = world.workload("pay-1").serve(8080, apps::namer("pay-1")).unwrap();
    assert_eq!(ask(&world, 60), BTreeMap::from([("pay-1".to_owned(), 60)]));
    // It comes back, and after its ejection it is used again.
    let _two = world.workload("pay-2").serve(8080, apps::namer("pay-2")).unwrap();
    until("pay-2 is used again", 3 * TIMEOUT, || {
        let answers = ask(&world, 20);
        holds(answers.contains_key("pay-2"), || format!("{answers:?}"))
    });
}

#[test]
fn an_endpoint_that_is_not_ready_gets_nothing() {
    let world = pay().build().unwrap();
    let _apps = ["pay-1", "pay-2"].map(|name| world.workload(name).serve(8080, apps::namer(name)).unwrap());
    world.yaml.replace("workload-pay-2.yaml", "spec:\n", "spec:\n  ready: false\n").unwrap();
    until("pay-2 is left out", TIMEOUT, || {
        let answers = ask(&world, 20);
        holds(!answers.contains_key("pay-2"), || format!("{answers:?}"))
    });
    assert_eq!(ask(&world, 40), BTreeMap::from([("pay-1".to_owned(), 40)]));
}

#[test]
fn a_service_without_endpoints_or_port_refuses() {
    let world = pay().service("shop/empty", "nobody", 80, 8080).build().unwrap();
    let web = world.workload("web");
    for address in world.service("shop/empty").both() {
        web.assert_refused((address, 80).into());
    }
    world.agent("a").wait_log("no endpoint", |line| line["reason"] == "no_endpoint");
    web.assert_refused((world.service("shop/pay").v4, 81).into());
    world.agent("a").wait_log("no such port", |line| line["reason"] == "no_such_service_port");
}
