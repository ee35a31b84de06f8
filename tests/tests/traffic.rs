//! TrafficPolicies, from the manifest to what a client sees, on real kernels and through real agents.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use mesh_tests::{
    WorkloadSpec, World,
    apps::{self, Handler},
    manifests::{Enrolment, Mode},
    until,
    wait::holds,
    workload::TIMEOUT,
};
use serde_json::Value;

/// `shop/pay` has an endpoint on each node; `shop/web`, on the first of them, asks.
fn shop() -> World {
    World::shop()
        .namespace("shop", Enrolment::Enrolled, Mode::Strict)
        .with(WorkloadSpec::new("shop/pay-1", "a").app("pay"))
        .with(WorkloadSpec::new("shop/pay-2", "b").app("pay"))
        .service("shop/pay", "pay", 80, 8080)
        .build()
        .unwrap()
}

fn policy(name: &str, says: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{namespace: shop, name: {name}}}\n\
         spec: {{targetRefs: [{{kind: Service, name: pay}}], {says}}}\n"
    )
}

/// What `shop/web` is answered by the service.
fn get(world: &World, path: &str, header: &str) -> Result<String, String> {
    let to = (world.service("shop/pay").v4, 80).into();
    let mut stream = world.workload("web").connect(to).map_err(|e| e.to_string())?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: pay\r\nConnection: close\r\n{header}\r\n");
    stream.write_all(request.as_bytes()).map_err(|e| e.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
    Ok(answer)
}

/// Whether the client's agent has read a request.
fn has_read(world: &World) -> bool {
    world.agent("a").access_log().unwrap().iter().any(|line| line["kind"] == "request")
}

#[test]
fn what_a_policy_says_is_what_a_client_sees_until_the_policy_goes() {
    let world = shop();
    let _apps = ["pay-1", "pay-2"].map(|name| world.workload(name).serve(8080, apps::http(name)).unwrap());
    until("the service answers", TIMEOUT, || {
        let answer = get(&world, "/", "")?;
        holds(answer.contains(" saw "), || answer.clone())
    });
    assert!(!has_read(&world), "without a policy nothing is read");

    let fault = "faults: [{headers: [{name: x-tester, value: me}], abort: {status: 418}}]";
    let text = policy("pay", &format!("balancing: {{algorithm: RoundRobin}}, {fault}"));
    world.yaml.write("policy.yaml", &text).unwrap();
    until("the policy is in force", TIMEOUT, || {
        let answer = get(&world, "/mine", "X-Tester: me\r\n")?;
        holds(answer.starts_with("HTTP/1.1 418 "), || answer.clone())
    });
    let answers: Vec<String> = (0..10).map(|_| get(&world, "/", "").unwrap()).collect();
    let by_first = answers.iter().filter(|answer| answer.contains("pay-1 saw ")).count();
    assert_eq!(by_first, 5, "one after the other: {answers:?}");
    let line = world.agent("a").wait_log("the fault", |line: &Value| line["path"] == "/mine");
    assert_eq!((&line["reason"], &line["status"]), (&"fault_injected".into(), &418.into()), "{line}");
    let metrics = world.agent("a").metrics().unwrap();
    assert!(metrics.sum("nodemesh_faults_total", &[("service", "shop/pay"), ("fault", "abort")]) >= 1.0);

    // What counts is told, and so is what does not.
    world.yaml.write("other.yaml", &policy("pay-newer", "faults: [], timeouts: {request: 5s}")).unwrap();
    until("the second policy is read", TIMEOUT, || {
        let told = world.meshctl(&["get", "traffic"]).map_err(|e| format!("{e:#}"))?.stdout;
        holds(told.contains("Conflicted, faults is said by shop/pay already"), || told.clone())
    });
    let why = world.meshctl(&["why", "shop/web", "shop/pay:80"]).unwrap().stdout;
    for says in ["one after the other", "5s for a request", "100 percent of requests with x-tester=me"] {
        assert!(why.contains(says), "{says}\n{why}");
    }

    for file in ["policy.yaml", "other.yaml"] {
        world.yaml.remove(file).unwrap();
    }
    until("the policies are gone", TIMEOUT, || {
        let answer = get(&world, "/mine", "X-Tester: me\r\n")?;
        holds(answer.contains(" saw "), || answer.clone())
    });
}

/// An application that says its name, and on `/healthz` whether it is well.
fn checked(name: &'static str, is_well: &Arc<AtomicBool>) -> Handler {
    let (is_well, says) = (is_well.clone(), apps::http(name));
    Arc::new(move |stream| {
        let mut begin = [0; 12];
        // Peeked at, so that what says the name reads it whole.
        let read = stream.peek(&mut begin)?;
        if begin[..read] != *b"GET /healthz" || is_well.load(Ordering::Relaxed) {
            return says(stream);
        }
        (&stream).write_all(b"HTTP/1.1 503 Not Well\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    })
}

/// Waits until of so many requests in a row some are answered by each of these, and none by another.
fn served_by(world: &World, names: &[&str]) {
    until(&format!("{names:?} serve"), TIMEOUT, || {
        let answers = (0..20).map(|_| get(world, "/", "")).collect::<Result<Vec<_>, _>>()?;
        let by = |name: &str| answers.iter().filter(|it| it.contains(&format!("{name} saw "))).count();
        let all: usize = names.iter().map(|name| by(name)).sum();
        holds(all == 20 && names.iter().all(|name| by(name) > 0), || format!("{answers:?}"))
    });
}

#[test]
fn an_endpoint_that_fails_its_checks_gets_nothing_until_it_is_well_whoever_starts_anew_meanwhile() {
    let world = shop();
    let well = ["pay-1", "pay-2"].map(|_| Arc::new(AtomicBool::new(true)));
    let serve = |at: usize, name| world.workload(name).serve(8080, checked(name, &well[at])).unwrap();
    let _apps = [serve(0, "pay-1"), serve(1, "pay-2")];
    let check = "healthCheck: {http: {path: /healthz}, interval: 1s, unhealthyAfter: 2, healthyAfter: 1}";
    world.yaml.write("policy.yaml", &policy("pay", check)).unwrap();
    let of_pay = &[("service", "shop/pay")][..];
    let on_b =
        |name: &str| world.agent("b").metrics().map(|it| it.sum(name, of_pay)).map_err(|e| e.to_string());
    let until_on_b = |unhealthy: f64| {
        until(&format!("{unhealthy} are unhealthy on b"), 2 * TIMEOUT, || {
            let count = on_b("nodemesh_unhealthy_endpoints")?;
            holds(count == unhealthy, || count.to_string())
        });
    };
    until("both nodes check their own", TIMEOUT, || {
        for node in ["a", "b"] {
            let metrics = world.agent(node).metrics().map_err(|e| e.to_string())?;
            let passed = metrics.sum("nodemesh_health_checks_total", &[of_pay[0], ("result", "passed")]);
            holds(passed >= 2.0, || format!("{passed} on {node}"))?;
        }
        Ok(())
    });
    served_by(&world, &["pay-1", "pay-2"]);
    assert!(!has_read(&world), "checks need nothing to be read");

    well[1].store(false, Ordering::Relaxed);
    served_by(&world, &["pay-1"]);
    // Of each family one.
    until_on_b(2.0);
    until("the controller leaves them out", TIMEOUT, || {
        let metrics = world.controller().metrics().map_err(|e| e.to_string())?;
        let left_out = metrics.sum("nodemesh_controller_unhealthy_endpoints", &[("state", "left_out")]);
        holds(left_out == 2.0, || left_out.to_string())
    });
    let told = world.meshctl(&["get", "services"]).unwrap().stdout;
    assert!(told.contains("unhealthy, left out: shop/pay-2 "), "{told}");
    let why = world.meshctl(&["why", "shop/web", "shop/pay:80"]).unwrap().stdout;
    assert!(why.contains("is unhealthy and gets nothing: it answered 503"), "{why}");

    // Neither who keeps the word forgets it, nor who said it says anything else before it knows.
    let other = || get(&world, "/", "").is_ok_and(|answer| answer.contains("pay-2 saw "));
    world.controller().kill().unwrap();
    world.controller().start().unwrap();
    until("the agents are back", 3 * TIMEOUT, || {
        assert!(!other(), "the controller has forgotten it");
        let metrics = world.controller().metrics().map_err(|e| e.to_string())?;
        let connected = metrics.sum("nodemesh_agents_connected", &[]);
        holds(connected == 2.0, || connected.to_string())
    });
    world.agent("b").kill().unwrap();
    world.agent("b").start().unwrap();
    until("it is found unhealthy anew", 3 * TIMEOUT, || {
        assert!(!other(), "an agent that has just started knows nothing, and said something");
        let count = on_b("nodemesh_unhealthy_endpoints")?;
        holds(count == 2.0, || count.to_string())
    });
    served_by(&world, &["pay-1"]);

    // If none is healthy all are asked: a check that is wrong takes nothing away.
    well[0].store(false, Ordering::Relaxed);
    served_by(&world, &["pay-1", "pay-2"]);
    let told = world.meshctl(&["get", "services"]).unwrap().stdout;
    assert!(told.contains("unhealthy, asked all the same: shop/pay-1 "), "{told}");
    well[1].store(true, Ordering::Relaxed);
    served_by(&world, &["pay-2"]);

    // Without the policy nobody is checked, and everybody serves.
    world.yaml.remove("policy.yaml").unwrap();
    served_by(&world, &["pay-1", "pay-2"]);
    until_on_b(0.0);
}

#[test]
fn each_workload_takes_so_much_from_each_identity_and_its_sender_is_told() {
    let world = shop();
    let _apps = ["pay-1", "pay-2"].map(|name| world.workload(name).serve(8080, apps::http(name)).unwrap());
    let says = "balancing: {algorithm: RoundRobin}, sizeLimits: {headerBytes: 1000}, \
                rateLimits: [{by: Identity, requests: 3, per: 1h}]";
    world.yaml.write("policy.yaml", &policy("few", says)).unwrap();
    until("the limit is in force", TIMEOUT, || {
        let answer = get(&world, "/", &format!("x-pad: {}\r\n", "a".repeat(1000)))?;
        holds(answer.starts_with("HTTP/1.1 431 "), || answer.clone())
    });
    // The other one may have heard of it later.
    until("both have given all", TIMEOUT, || {
        for _ in 0..2 {
            let answer = get(&world, "/", "")?;
            holds(answer.starts_with("HTTP/1.1 429 "), || answer.clone())?;
        }
        Ok(())
    });
    let answer = get(&world, "/last", "").unwrap();
    assert!(answer.to_lowercase().contains("\nretry-after: "), "{answer}");
    for (agent, workload) in [("a", "shop/pay-1"), ("b", "shop/pay-2")] {
        let is = |line: &Value| line["reason"] == "limit_rate" && line["destination"]["workload"] == workload;
        let line = world.agent(agent).wait_log("one too many", is);
        assert_eq!((&line["status"], &line["rule"]), (&429.into(), &"shop/few[0]".into()), "{line}");
        let labels = [("workload", workload), ("reason", "limit_rate"), ("status", "429")];
        assert!(world.agent(agent).metrics().unwrap().sum("nodemesh_requests_total", &labels) >= 1.0);
    }
    let ejected = world.agent("a").metrics().unwrap().sum("nodemesh_ejections_total", &[]);
    assert!(ejected.abs() < f64::EPSILON, "a refusal is no failure of an endpoint");
    let why = world.meshctl(&["why", "shop/web", "shop/pay:80", "--request", "GET /last"]).unwrap().stdout;
    assert!(why.contains("at most 3 requests in 3600s from each identity, at each workload"), "{why}");
    let traffic = world.meshctl(&["get", "traffic"]).unwrap().stdout;
    assert!(traffic.contains("heads of requests of at most 1000 bytes"), "{traffic}");

    world.yaml.remove("policy.yaml").unwrap();
    until("there is no limit any more", TIMEOUT, || {
        for _ in 0..2 {
            let answer = get(&world, "/", "")?;
            holds(answer.contains(" saw "), || answer.clone())?;
        }
        Ok(())
    });
}

#[test]
fn who_reads_does_not_notice_that_backends_die_and_come_back() {
    let world = shop();
    let text = policy("pay", "retries: {}");
    world.yaml.write("policy.yaml", &text).unwrap();
    let serve = |name: &str| world.workload(name).serve(8080, apps::http(name)).unwrap();
    let mut apps = ["pay-1", "pay-2"].map(serve).map(Some);
    until("requests are read", TIMEOUT, || {
        let answer = get(&world, "/", "")?;
        holds(answer.contains(" saw ") && has_read(&world), || answer.clone())
    });
    let asked = AtomicU32::new(0);
    let (stop, stopped) = mpsc::channel::<()>();
    let (world, asked) = (&world, &asked);
    std::thread::scope(|scope| {
        let client = scope.spawn(move || {
            let mut failed = vec![];
            // Fifty a second.
            while stopped.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
                match get(world, "/", "") {
                    Ok(answer) if answer.starts_with("HTTP/1.1 200 ") => {}
                    other => failed.push(other),
                }
                asked.fetch_add(1, Ordering::Relaxed);
            }
            failed
        });
        // Each in turn goes, with all that it has open, and comes back.
        for round in 0..4 {
            let at = round % 2;
            let before = asked.load(Ordering::Relaxed);
            drop(apps[at].take());
            until("some have been asked without it", TIMEOUT, || {
                holds(asked.load(Ordering::Relaxed) >= before + 20, || "not yet".to_owned())
            });
            apps[at] = Some(serve(["pay-1", "pay-2"][at]));
            let before = asked.load(Ordering::Relaxed);
            until("some have been asked with it", TIMEOUT, || {
                holds(asked.load(Ordering::Relaxed) >= before + 60, || "not yet".to_owned())
            });
        }
        drop(stop);
        assert_eq!(client.join().unwrap(), [], "of {} requests", asked.load(Ordering::Relaxed));
    });
}
