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
fn a_workload_that_serves_what_it_asks_for_may_get_itself_and_stays_within_its_pod() {
    let strict = mesh_tests::manifests::Mode::Strict;
    let enrolled = mesh_tests::manifests::Enrolment::Enrolled;
    let world = World::shop()
        .namespace("shop", enrolled, strict)
        .service("shop/itself", "web", 80, 8080)
        .build()
        .unwrap();
    let web = world.workload("web");
    let _app = web.serve(8080, apps::namer("itself")).unwrap();
    let mut wire = world.capture().unwrap();
    for address in world.service("shop/itself").both() {
        assert_eq!(web.exchange((address, 80).into(), b"").unwrap(), b"itself");
    }
    assert!(wire.plaintext(b"itself").unwrap().is_empty());
    let line = world.agent("a").wait_log("it", |line| line["destination"]["service"] == "shop/itself");
    assert_eq!(
        (&line["outcome"], &line["destination"]["workload"]),
        (&"ok".into(), &"shop/web".into()),
        "{line}"
    );
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
fn a_service_says_which_of_its_endpoints_a_client_gets() {
    let world = pay().build().unwrap();
    let _apps = ["pay-1", "pay-2"].map(|name| world.workload(name).serve(8080, apps::namer(name)).unwrap());
    let says = |before: &str, now: &str| {
        world
            .yaml
            .replace("service-pay.yaml", &format!("spec:\n{before}"), &format!("spec:\n{now}"))
            .unwrap();
    };
    let only_beside_the_client = || {
        let answers = ask(&world, 20);
        holds(!answers.contains_key("pay-2"), || format!("{answers:?}"))
    };
    // From one word to the next by way of none, so that what is seen is not what was said before.
    let says_nothing = |before: &str| {
        says(before, "");
        until("both endpoints are asked", TIMEOUT, || {
            let answers = ask(&world, 20);
            holds(answers.len() == 2, || format!("{answers:?}"))
        });
    };
    let local = "  internalTrafficPolicy: Local\n";
    says("", local);
    until("only the endpoint of the client's node is asked", TIMEOUT, only_beside_the_client);
    says_nothing(local);

    let one = "  sessionAffinity: ClientIP\n";
    says("", one);
    let ask_one = |times| {
        let to = (world.service("shop/pay").v4, 80).into();
        let answers = (0..times).map(|_| world.workload("web").exchange(to, b"").unwrap());
        answers.collect::<std::collections::BTreeSet<_>>().len()
    };
    until("a client keeps its endpoint", TIMEOUT, || {
        let asked = ask_one(60);
        holds(asked == 1, || format!("{asked} endpoints"))
    });
    assert_eq!(ask_one(40), 1);
    says_nothing(one);

    let near = "  trafficDistribution: PreferSameNode\n";
    says("", near);
    until("the endpoint of the client's node is preferred", TIMEOUT, only_beside_the_client);
    world.yaml.replace("workload-pay-1.yaml", "spec:\n", "spec:\n  ready: false\n").unwrap();
    until("and another is asked where it has none", TIMEOUT, || {
        let answers = ask(&world, 20);
        holds(answers.keys().eq(["pay-2"]), || format!("{answers:?}"))
    });
    says(near, local);
    until("unless no other may be", TIMEOUT, || {
        let to = (world.service("shop/pay").v4, 80).into();
        let asked = world.workload("web").exchange(to, b"");
        holds(asked.is_err(), || format!("{asked:?}"))
    });
    world.agent("a").wait_log("no endpoint", |line| line["reason"] == "no_endpoint");
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
