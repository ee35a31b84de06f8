//! The pages of docs/tasks, and docs/operate/migrate.md, followed: their YAML, taken out of the pages themselves, is checked, applied, seen to do what the
//! page says by real requests, and removed, after which all is as before.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_tests::{
    Server, WorkloadSpec, World,
    apps::Handler,
    manifests::{Enrolment, Mode},
    page, until,
    wait::holds,
    workload::TIMEOUT,
};
use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring};
use serde_json::Value;

/// The file of the applied documents.
const APPLIED: &str = "task.yaml";

/// The example application of the pages, and all requests that its parts have got: `NAME METHOD PATH VERSION` and the headers.
struct Shop {
    world: World,
    seen: Arc<Mutex<Vec<String>>>,
}

/// A name of a page, and what shows that it is in force and does what it says.
type Task = (&'static str, fn(&Shop));

/// All pages.
const TASKS: [Task; 19] = [
    ("canary", canary),
    ("blue-green", blue_green),
    ("route-by-path", route_by_path),
    ("a-b", a_b),
    ("time-out", time_out),
    ("retry", retry),
    ("hedge", hedge),
    ("break-circuits", break_circuits),
    ("check-health", check_health),
    ("limit-rates", limit_rates),
    ("inject-faults", inject_faults),
    ("mirror", mirror),
    ("authorize", authorize),
    ("authenticate-users", authenticate_users),
    ("sessions", sessions),
    ("consumer-route", consumer_route),
    ("migrate", migrate),
    ("canary-of-connections", canary_of_connections),
    ("by-server-name", by_server_name),
];

/// Version one of `shop/pay` is on the client's node, version two, and both endpoints of `shop/cart`, are on the other.
fn shop() -> World {
    World::shop()
        .namespace("shop", Enrolment::Enrolled, Mode::Strict)
        .namespace("office", Enrolment::Enrolled, Mode::Strict)
        .with(WorkloadSpec::new("office/desk", "a"))
        .with(WorkloadSpec::new("shop/pay-v1", "a"))
        .with(WorkloadSpec::new("shop/pay-v2", "b"))
        .with(WorkloadSpec::new("shop/cart-1", "b").app("cart"))
        .with(WorkloadSpec::new("shop/cart-2", "b").app("cart"))
        .service("shop/pay", "pay-v1", 80, 8080)
        .service("shop/pay-v1", "pay-v1", 80, 8080)
        .service("shop/pay-v2", "pay-v2", 80, 8080)
        .service("shop/cart", "cart", 80, 8080)
        .build()
        .unwrap()
}

/// An application that says who it is and what it was asked, and notes that. It answers every second request for `/flaky`, and,
/// if it is `cart-1`, each for `/broken` and `/healthz`, with an error, and none for `/hold`, nor, if it is `cart-1`, for `/stalls`.
/// Of its health it keeps no notes.
fn app(name: &'static str, seen: &Arc<Mutex<Vec<String>>>) -> Handler {
    let (seen, flaky) = (seen.clone(), AtomicU32::new(0));
    Arc::new(move |stream| {
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut asked = format!("{name} ");
        while lines.read_line(&mut asked)? > 2 {}
        let path = asked.split(' ').nth(2).unwrap_or_default().to_owned();
        let asked = asked.to_lowercase();
        if path != "/healthz" {
            seen.lock().unwrap().push(asked.clone());
        }
        if path == "/hold" || (path == "/stalls" && name == "cart-1") {
            return io::copy(&mut lines, &mut io::sink()).map(drop);
        }
        let status = match path.as_str() {
            "/flaky" if flaky.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) => "503 Not Now",
            "/broken" | "/healthz" if name == "cart-1" => "500 Broken",
            _ => "200 OK",
        };
        let body = format!("{name} saw {asked}");
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        (&stream).write_all((head + &body).as_bytes())
    })
}

#[test]
fn every_task_does_what_its_page_says_until_it_is_undone() {
    let pages = pages();
    let known: Vec<&str> = TASKS.iter().map(|(name, _)| *name).collect();
    for name in pages.keys() {
        assert!(known.contains(&name.as_str()), "docs/tasks/{name}.md has no test here");
    }
    let shop = Shop { world: shop(), seen: Arc::default() };
    let world = &shop.world;
    let names = ["pay-v1", "pay-v2", "cart-1", "cart-2"];
    let _apps: Vec<Server> =
        names.map(|name| world.workload(name).serve(8080, app(name, &shop.seen)).unwrap()).into();
    for (name, shows) in TASKS {
        let documents = &pages[name];
        assert!(!documents.is_empty(), "docs/tasks/{name}.md has YAML");
        as_before(&shop, name);
        for text in documents {
            world.yaml.write(APPLIED, text).unwrap();
            let said = world.meshctl(&["check", world.yaml.directory().to_str().unwrap()]).unwrap();
            assert!(said.success, "{name}: {}{}\n{text}", said.stdout, said.stderr);
        }
        let started = Instant::now();
        shows(&shop);
        eprintln!("{name}: {:?}", started.elapsed());
        world.yaml.remove(APPLIED).unwrap();
    }
    as_before(&shop, "the last");
}

/// Without a task everybody gets version one, whatever is asked, and at once, and `shop/cart` starts no session.
fn as_before(shop: &Shop, what: &str) {
    until(&format!("all is as it was before {what}"), TIMEOUT, || {
        for (from, request) in [("web", "GET /v2/x"), ("web", "POST /"), ("desk", "GET /")] {
            let before = shop.seen.lock().unwrap().len();
            let answer = ask(shop, from, request, "x-tester: me\r\nx-group: b\r\n")?;
            holds(by_version_one(&answer), || format!("{from} {request}: {answer}"))?;
            let path = request.split(' ').nth(1).unwrap_or_default();
            holds(answer.contains(&format!(" {path} http/1.1")), || format!("another path: {answer}"))?;
            holds(shop.seen.lock().unwrap().len() == before + 1, || "a copy was sent".to_owned())?;
        }
        let answer = ask_at(shop, "shop/cart", "web", "GET /", "")?;
        holds(!answer.contains("set-cookie"), || answer.clone())
    });
}

fn canary(shop: &Shop) {
    until("a tester gets version two", TIMEOUT, || by_version_two(shop, "web", "GET /", "x-tester: me\r\n"));
    // 500 answers with 10 percent: 50 are expected, with a standard deviation of 6.7. Outside of these bounds with 1e-10.
    let by_two = (0..500).filter(|_| get(shop, "").contains("pay-v2 saw ")).count();
    assert!((10..=105).contains(&by_two), "{by_two} of 500 by version two");
    for _ in 0..50 {
        by_version_two(shop, "web", "GET /", "x-tester: me\r\n").unwrap();
    }
}

fn blue_green(shop: &Shop) {
    until("version two has all", TIMEOUT, || by_version_two(shop, "web", "GET /", ""));
    for _ in 0..100 {
        by_version_two(shop, "web", "GET /", "").unwrap();
    }
}

fn route_by_path(shop: &Shop) {
    until("the path leads to version two", TIMEOUT, || by_version_two(shop, "web", "GET /v2/x", ""));
    let rewritten = ask(shop, "web", "GET /v2/x", "").unwrap();
    assert!(rewritten.contains("pay-v2 saw pay-v2 get /x http/1.1"), "{rewritten}");
    assert!(by_version_one(&ask(shop, "web", "GET /v20", "").unwrap()), "a prefix is of whole segments");
    let moved = ask(shop, "web", "GET /old/x", "").unwrap();
    assert!(moved.starts_with("http/1.1 301 "), "{moved}");
    assert!(moved.lines().any(|line| line.starts_with("location: ") && line.ends_with("/new/x")), "{moved}");
}

fn a_b(shop: &Shop) {
    for header in ["X-Group: b\r\n", "Cookie: group=b\r\n", "Cookie: a=1; group=b; c=2\r\n"] {
        until("group b gets version two", TIMEOUT, || by_version_two(shop, "web", "GET /", header));
    }
    for header in
        ["", "X-Group: a\r\n", "Cookie: group=a\r\n", "Cookie: agroup=b\r\n", "Cookie: group=bc\r\n"]
    {
        assert!(by_version_one(&get(shop, header)), "{header}");
    }
}

fn time_out(shop: &Shop) {
    until("what takes too long is ended", TIMEOUT, || {
        let started = Instant::now();
        let answer = ask(shop, "web", "GET /", "x-tester: me\r\n")?;
        holds(answer.starts_with("http/1.1 504 "), || answer.clone())?;
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(450), "not before its time: {took:?}");
        assert!(took < Duration::from_secs(5), "before the fault's delay is over: {took:?}");
        Ok(())
    });
    assert!(by_version_one(&get(shop, "")));
}

fn retry(shop: &Shop) {
    // Without retries two in a row cannot both succeed.
    until("a failure is tried again", TIMEOUT, || {
        for _ in 0..2 {
            let answer = ask(shop, "web", "GET /flaky", "")?;
            holds(answer.starts_with("http/1.1 200 "), || answer.clone())?;
        }
        Ok(())
    });
    let answers = [(); 2].map(|()| ask(shop, "web", "POST /flaky", "content-length: 0\r\n").unwrap());
    assert_eq!(answers.iter().filter(|answer| answer.starts_with("http/1.1 503 ")).count(), 1, "{answers:?}");
    let twice = |line: &Value| line["path"] == "/flaky" && line["attempts"] == 2;
    let line = shop.world.agent("a").wait_log("what was tried again", twice);
    assert_eq!((&line["method"], &line["status"]), (&"GET".into(), &200.into()), "{line}");
}

fn hedge(shop: &Shop) {
    let won = || {
        let metrics = shop.world.agent("a").metrics().unwrap();
        metrics.sum("nodemesh_hedges_total", &[("service", "shop/cart"), ("outcome", "won")])
    };
    // Before, a request of an endpoint that stalls would have no end.
    until("requests are read", TIMEOUT, || {
        ask_at(shop, "shop/cart", "web", "GET /read", "")?;
        let log = shop.world.agent("a").access_log().map_err(|e| format!("{e:#}"))?;
        holds(log.iter().any(|line| line["path"] == "/read"), || "not yet".to_owned())
    });
    until("the other endpoint answers for the one that stalls", TIMEOUT, || {
        let answer = ask_at(shop, "shop/cart", "web", "GET /stalls", "")?;
        assert!(answer.contains("cart-2 saw "), "{answer}");
        holds(won() >= 1.0, || "nothing was hedged".to_owned())
    });
    let twice = |line: &Value| line["path"] == "/stalls" && line["attempts"] == 2;
    let line = shop.world.agent("a").wait_log("a request that was hedged", twice);
    assert_eq!(line["destination"]["workload"], "shop/cart-2", "{line}");
}

fn break_circuits(shop: &Shop) {
    let to = (shop.world.service("shop/cart").v4, 80).into();
    let mut held = vec![];
    // Those before the policy was in force do not count.
    until("there are too many", TIMEOUT, || {
        let mut stream = shop.world.workload("web").connect(to).map_err(|e| e.to_string())?;
        stream.write_all(b"GET /hold HTTP/1.1\r\nHost: cart\r\n\r\n").map_err(|e| e.to_string())?;
        held.push(stream);
        let metrics = shop.world.agent("a").metrics().map_err(|e| format!("{e:#}"))?;
        let hits =
            metrics.sum("nodemesh_requests_total", &[("service", "shop/cart"), ("reason", "limit_requests")]);
        holds(hits >= 1.0, || format!("{} under way", held.len()))
    });
    assert!(held.len() > 15, "{} under way", held.len());
    let answer = ask_at(shop, "shop/cart", "web", "GET /", "").unwrap();
    assert!(answer.starts_with("http/1.1 503 "), "{answer}");
    drop(held);
    until("there is room again", TIMEOUT, || {
        let answer = ask_at(shop, "shop/cart", "web", "GET /", "")?;
        holds(answer.starts_with("http/1.1 200 "), || answer.clone())
    });
    let ejected = || shop.world.agent("a").metrics().unwrap().sum("nodemesh_ejections_total", &[]);
    until("an endpoint fails too often", TIMEOUT, || {
        ask_at(shop, "shop/cart", "web", "GET /broken", "")?;
        holds(ejected() >= 1.0, || "not yet".to_owned())
    });
    for _ in 0..50 {
        let answer = ask_at(shop, "shop/cart", "web", "GET /broken", "").unwrap();
        assert!(answer.contains("cart-2 saw "), "{answer}");
    }
}

fn check_health(shop: &Shop) {
    let by_both = || {
        let answers: Vec<_> =
            (0..20).map(|_| ask_at(shop, "shop/cart", "web", "GET /", "").unwrap()).collect();
        ["cart-1", "cart-2"].map(|name| answers.iter().any(|it| it.contains(&format!("{name} saw "))))
    };
    until("it is told which endpoint is not well", 2 * TIMEOUT, || {
        let told = shop.world.meshctl(&["get", "services"]).map_err(|error| error.to_string())?.stdout;
        holds(told.contains("unhealthy, left out: shop/cart-1 "), || told.clone())
    });
    until("it gets nothing", TIMEOUT, || holds(by_both() == [false, true], || "it does".to_owned()));
    let metrics = shop.world.agent("b").metrics().unwrap();
    assert!(metrics.sum("nodemesh_unhealthy_endpoints", &[("service", "shop/cart")]) >= 1.0);
}

fn limit_rates(shop: &Shop) {
    let order = |tenant: &str| ask(shop, "web", "POST /orders", &format!("x-tenant: {tenant}\r\n"));
    // Those before the policy was in force do not count.
    let mut taken = 0;
    until("a tenant has had all", TIMEOUT, || {
        let answer = order("a")?;
        taken += usize::from(answer.starts_with("http/1.1 200 "));
        holds(answer.starts_with("http/1.1 429 "), || answer.clone())
    });
    assert!(taken >= 5, "{taken}");
    let answer = order("a").unwrap();
    for says in ["\nretry-after: ", "\nratelimit-policy: \"1\";q=5;w=3600\r", "\nratelimit: \"1\";r=0;t="] {
        assert!(answer.contains(says), "{says}: {answer}");
    }
    assert!(by_version_one(&order("b").unwrap()), "another tenant has his own");
    assert!(by_version_one(&get(shop, "x-tenant: a\r\n")), "another request is not counted");
    let long = ask(shop, "web", "POST /", "content-length: 65537\r\n").unwrap();
    assert!(long.starts_with("http/1.1 413 "), "{long}");
    assert!(get(shop, &format!("x-pad: {}\r\n", "a".repeat(8192))).starts_with("http/1.1 431 "));
    let agent = shop.world.agent("a");
    for reason in ["limit_rate", "limit_body", "limit_headers"] {
        let labels = [("direction", "inbound"), ("workload", "shop/pay-v1"), ("reason", reason)];
        let counted =
            || agent.metrics().map(|it| it.sum("nodemesh_requests_total", &labels)).unwrap_or_default();
        until(reason, TIMEOUT, || holds(counted() >= 1.0, || "not counted".to_owned()));
    }
    let why = ["why", "shop/web", "shop/pay:80", "--request", "POST /orders", "-H", "content-length: 65537"];
    let why = shop.world.meshctl(&why).unwrap().stdout;
    for says in ["shop/pay-limits spec.rateLimits[1] counts it", "limit_body"] {
        assert!(why.contains(says), "{says}: {why}");
    }
}

fn inject_faults(shop: &Shop) {
    until("a tester gets the fault", TIMEOUT, || {
        let answer = ask(shop, "web", "GET /", "x-tester: me\r\n")?;
        holds(answer.starts_with("http/1.1 503 "), || answer.clone())
    });
    assert!(by_version_one(&get(shop, "")), "nobody else does");
    let metrics = shop.world.agent("a").metrics().unwrap();
    assert!(metrics.sum("nodemesh_faults_total", &[("service", "shop/pay"), ("fault", "abort")]) >= 1.0);
}

fn mirror(shop: &Shop) {
    until("version two gets a copy", TIMEOUT, || {
        let answer = ask(shop, "web", "GET /copied", "")?;
        assert!(by_version_one(&answer), "{answer}");
        let seen = shop.seen.lock().unwrap();
        holds(seen.iter().any(|it| it.starts_with("pay-v2 get /copied ")), || "not yet".to_owned())
    });
}

fn authorize(shop: &Shop) {
    until("what is not allowed is refused", TIMEOUT, || {
        let answer = ask(shop, "web", "POST /v2/x", "")?;
        holds(answer.starts_with("http/1.1 403 "), || answer.clone())
    });
    assert!(by_version_one(&ask(shop, "web", "GET /v2/x", "").unwrap()));
    assert!(get(shop, "").starts_with("http/1.1 403 "), "another path");
    // Nothing at all is allowed to it, so that its connection may be refused before a request is read.
    let other = ask(shop, "desk", "GET /v2/x", "");
    assert!(!other.as_ref().is_ok_and(|answer| by_version_one(answer)), "another client: {other:?}");
}

fn authenticate_users(shop: &Shop) {
    let token = include_str!("../../mesh-core/src/authentication/vectors/tokens.txt").lines().next().unwrap();
    assert!(
        include_str!("../../docs/tasks/authenticate-users.md").contains(token),
        "the page has this token"
    );
    until("a token is wanted", TIMEOUT, || {
        let answer = ask(shop, "web", "GET /", "")?;
        holds(answer.starts_with("http/1.1 401 "), || answer.clone())
    });
    let answer = get(shop, &format!("X-User: somebody\r\nAuthorization: Bearer {token}\r\n"));
    assert!(by_version_one(&answer) && answer.contains("x-user: ann\r\n"), "{answer}");
    assert!(!answer.contains("somebody"), "{answer}");
    assert!(get(shop, &format!("Authorization: Bearer {token}x\r\n")).starts_with("http/1.1 401 "));
}

fn sessions(shop: &Shop) {
    let mut cookie = String::new();
    until("a session begins", TIMEOUT, || {
        let answer = raw(shop, "shop/cart", "web", "GET /", "")?;
        let set = answer.lines().find(|line| line.to_lowercase().starts_with("set-cookie: cart="));
        cookie = set.ok_or_else(|| answer.clone())?[12..].split(';').next().unwrap_or_default().to_owned();
        Ok(())
    });
    let again = || ask_at(shop, "shop/cart", "web", "GET /", &format!("Cookie: {cookie}\r\n")).unwrap();
    let by = |answer: &str| answer.contains("cart-1 saw ");
    let first = again();
    assert!(first.starts_with("http/1.1 200 "), "{first}");
    // By chance of two: 2^-50.
    for _ in 0..50 {
        assert_eq!(by(&again()), by(&first), "of one session");
    }
}

fn consumer_route(shop: &Shop) {
    until("the office gets version two", TIMEOUT, || by_version_two(shop, "desk", "GET /", ""));
    assert!(by_version_one(&get(shop, "")), "the shop does not");
}

fn canary_of_connections(shop: &Shop) {
    until("version two gets some", TIMEOUT, || by_version_two(shop, "web", "GET /", ""));
    // As with the canary of requests: each of these has a connection of its own.
    let by_two = (0..500).filter(|_| get(shop, "").contains("pay-v2 saw ")).count();
    assert!((10..=105).contains(&by_two), "{by_two} of 500 by version two");
    let of_route = |line: &Value| line["route"] == "TCPRoute/shop/pay" && line["backend"] == "shop/pay-v2";
    let line = shop.world.agent("a").wait_log("a connection", of_route);
    assert_eq!(line["outcome"], "ok", "{line}");
}

fn by_server_name(shop: &Shop) {
    let to = (shop.world.service("shop/pay").v4, 80).into();
    for (name, route, backend) in [
        ("new.pay.example", "TLSRoute/shop/pay-new", "shop/pay-v2"),
        ("old.pay.example", "TLSRoute/shop/pay", "shop/pay-v1"),
    ] {
        let led = |line: &Value| line["route"] == route && line["backend"] == backend;
        until(&format!("{name} leads to {backend}"), TIMEOUT, || {
            let mut stream = shop.world.workload("web").connect(to).map_err(|e| e.to_string())?;
            stream.write_all(&client_hello(name)).map_err(|e| e.to_string())?;
            let _ = stream.shutdown(Shutdown::Write);
            // The application speaks no TLS, and ends it.
            let _ = stream.read_to_end(&mut vec![]);
            let lines = shop.world.agent("a").access_log().map_err(|e| format!("{e:#}"))?;
            holds(lines.iter().any(led), || format!("{:?}", lines.last()))
        });
    }
    let plain = ask(shop, "web", "GET /", "");
    assert!(plain.is_err() || plain.as_deref() == Ok(""), "{plain:?}");
    shop.world.agent("a").wait_log("what is no TLS", |line: &Value| line["reason"] == "bad_hello");
}

/// What a client says first that asks for this server in TLS.
fn client_hello(server: &'static str) -> Vec<u8> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), server.try_into().unwrap()).unwrap();
    let mut bytes = vec![];
    client.write_tls(&mut bytes).unwrap();
    bytes
}

fn by_version_one(answer: &str) -> bool {
    answer.starts_with("http/1.1 200 ") && answer.contains("pay-v1 saw ")
}

fn by_version_two(shop: &Shop, from: &str, request: &str, header: &str) -> Result<(), String> {
    let answer = ask(shop, from, request, header)?;
    holds(answer.contains("pay-v2 saw "), || answer.clone())
}

/// What `shop/web` is answered by `shop/pay`.
fn get(shop: &Shop, header: &str) -> String {
    ask(shop, "web", "GET /", header).unwrap()
}

/// What a workload is answered by `shop/pay`, head and body, in small letters.
fn ask(shop: &Shop, from: &str, request: &str, header: &str) -> Result<String, String> {
    ask_at(shop, "shop/pay", from, request, header)
}

fn ask_at(shop: &Shop, service: &str, from: &str, request: &str, header: &str) -> Result<String, String> {
    raw(shop, service, from, request, header).map(|answer| answer.to_lowercase())
}

fn raw(shop: &Shop, service: &str, from: &str, request: &str, header: &str) -> Result<String, String> {
    let to = (shop.world.service(service).v4, 80).into();
    let mut stream = shop.world.workload(from).connect(to).map_err(|e| e.to_string())?;
    let text = format!("{request} HTTP/1.1\r\nHost: pay\r\nConnection: close\r\n{header}\r\n");
    stream.write_all(text.as_bytes()).map_err(|e| e.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
    Ok(answer)
}

/// What comes from Linkerd is in force, and then what comes from Istio.
fn migrate(shop: &Shop) {
    let refused = |from: &str, request: &str| {
        let answer = ask(shop, from, request, "");
        holds(!answer.as_ref().is_ok_and(|it| it.starts_with("http/1.1 200 ")), || format!("{answer:?}"))
    };
    until("nobody but web may ask", TIMEOUT, || refused("desk", "GET /"));
    until("what failed is made again", TIMEOUT, || {
        for _ in 0..4 {
            let answer = ask(shop, "web", "GET /flaky", "")?;
            holds(answer.starts_with("http/1.1 200 "), || answer.clone())?;
        }
        Ok(())
    });

    shop.world.yaml.write(APPLIED, &pages()["migrate"][0]).unwrap();
    until("a tester gets version two", TIMEOUT, || by_version_two(shop, "web", "GET /", "x-tester: me\r\n"));
    until("it may only read", TIMEOUT, || refused("web", "POST /"));
    refused("desk", "GET /").unwrap();
    assert!(by_version_one(&get(shop, "")), "who is no tester gets version one");
}

/// The YAML blocks of each page, by its name.
fn pages() -> BTreeMap<String, Vec<String>> {
    let docs: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let directory = docs.join("tasks");
    let elsewhere = fs::read_to_string(docs.join("operate/migrate.md")).unwrap();
    let mut pages: BTreeMap<_, _> = [("migrate".to_owned(), page::documents(&elsewhere))].into();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if name != "README" {
            pages.insert(name, page::documents(&fs::read_to_string(path).unwrap()));
        }
    }
    pages
}
