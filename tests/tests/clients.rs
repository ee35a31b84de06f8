//! Clients and servers that everybody has, a browser among them, unchanged, through agents that read requests at both ends: what
//! they were answered and what arrived; and that a server which goes away, as in every roll-out, is not seen.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use mesh_tests::{
    Workload, WorkloadSpec, World, apps,
    manifests::{Enrolment, Mode},
    netns::run,
    process::{Program, tail},
    until,
    wait::{holds, scaled},
    workload::TIMEOUT,
};
use serde_json::Value;

/// `shop/site` leads to the servers, which are no endpoints of it.
const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: site}
spec:
  parentRefs: [{group: '', kind: Service, name: site, port: 80}]
  rules:
    # One server has all of a page.
    - matches: [{path: {type: PathPrefix, value: /browser}}]
      sessionPersistence: {sessionName: page, type: Cookie}
      backendRefs: [{name: servers, port: 80}]
    - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-by, value: mesh}]}}]
      backendRefs: [{name: servers, port: 80}]
";

/// `shop/shared` leads to them too, and lets the pages of `shop/site` ask for names.
const SHARED: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: shared}
spec:
  parentRefs: [{group: '', kind: Service, name: shared, port: 80}]
  rules:
    - matches: [{path: {type: Exact, value: /name}}]
      filters:
        - type: CORS
          cors: {allowOrigins: ['http://SITE'], allowMethods: [PUT], allowHeaders: [x-mine], exposeHeaders: [x-by]}
        - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-by, value: mesh}]}}
      backendRefs: [{name: servers, port: 80}]
    - backendRefs: [{name: servers, port: 80}]
";

/// Has the servers' agents read requests, too.
const POLICY: &str = "
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: site}
spec:
  selector: {matchLabels: {app: server}}
  action: Allow
  rules: [{to: [{methods: [GET, HEAD, PUT, POST], paths: [/*]}]}]
";

/// Answers three requests on one connection, the second of which has no length, and one of urllib's.
const PYTHON: &str = "
import http.client, sys, urllib.request
host = sys.argv[1]
client = http.client.HTTPConnection(host, timeout=10)
sockets = set()
def said():
    answer = client.getresponse()
    print(answer.status, answer.getheader('x-by'), answer.read().decode())
    sockets.add(client.sock)
client.request('GET', '/name')
said()
client.request('POST', '/upload', body=iter([b'one', b'two' * 50000, b'three']))
said()
client.request('POST', '/name', body=b'last')
said()
print(len(sockets), None in sockets)
print(urllib.request.urlopen('http://' + host + '/name', data=b'by urllib', timeout=10).read().decode())
";

/// How much curl uploads: 100 MiB.
const UPLOADED: usize = 100 << 20;

fn shop() -> World {
    let world = World::shop()
        .namespace("shop", Enrolment::Enrolled, Mode::Strict)
        .with(WorkloadSpec::new("shop/near", "a").app("server"))
        .with(WorkloadSpec::new("shop/far", "b").app("server"))
        .service("shop/site", "nobody", 80, 8080)
        .service("shop/shared", "nobody", 80, 8080)
        .service("shop/servers", "server", 80, 8080)
        .build()
        .unwrap();
    world.yaml.write("route.yaml", ROUTE).unwrap();
    world
}

#[test]
fn clients_work_unchanged_where_requests_are_read() {
    let world = shop();
    world.yaml.write("policy.yaml", POLICY).unwrap();
    let servers = ["far", "near"].map(|name| WebServer::start(&world, name));
    until("both agents read requests", TIMEOUT, || {
        let answer = curl(&world, &["-i", "URL/name"])?;
        let lines = world.agent("b").access_log().map_err(|error| error.to_string())?;
        let read = lines.iter().any(|line| line["direction"] == "inbound" && line["rule"] == "shop/site[0]");
        holds(read && answer.contains("x-by: mesh"), || answer)
    });
    of_curl(&world);
    of_python(&world);
    of_go(&world);
    of_browser(&world, &servers);
    of_loads(&world);
}

fn of_curl(world: &World) {
    let wrote = ["-w", "\n%{http_code} %{http_version} %{num_connects}\n"];
    let curl = |arguments: &[&str]| curl(world, &[&wrote, arguments].concat()).unwrap();
    let said = curl(&["URL/file", "URL/file"]);
    let letters = "abcdefghijklmnopqrstuvwxyz";
    assert_eq!(said, format!("{letters}\n200 1.1 1\n{letters}\n200 1.1 0\n"), "one connection for both");
    // One: with HTTP/2 by prior knowledge curl 7.88 fails on its second, whoever it asks.
    let said = curl(&["--http2-prior-knowledge", "URL/file"]);
    assert_eq!(said, format!("{letters}\n200 2 1\n"));

    let said = curl(&["-r", "2-5", "URL/file"]);
    assert_eq!(said, "cdef\n206 1.1 1\n");
    for protocol in ["--http1.1", "--http2-prior-knowledge"] {
        let said = curl(&[protocol, "-I", "URL/file"]).to_lowercase();
        assert!(said.contains("content-length: 26\r\n") && said.contains("\n200 "), "{said}");
        assert!(!said.contains("abc"), "{said}");
    }

    let file = world.directory().join("upload");
    fs::write(&file, apps::noise(UPLOADED / 100).repeat(100)).unwrap();
    let sum = run(Command::new("sha256sum").arg(&file), None).unwrap();
    let sum = sum.split(' ').next().unwrap();
    let file = file.to_str().unwrap();
    let heads = world.directory().join("upload.heads");
    let dump = heads.to_str().unwrap();
    let said = curl(&["-D", dump, "-H", "Expect: 100-continue", "-T", file, "URL/upload"]);
    assert_eq!(said, format!("HTTP/1.1 [] {UPLOADED} {sum}\n200 1.1 1\n"));
    let said = fs::read_to_string(heads).unwrap();
    assert!(said.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"), "{said}");
    let said = curl(&["--http2-prior-knowledge", "-T", file, "URL/upload"]);
    assert_eq!(said, format!("HTTP/2.0 [] {UPLOADED} {sum}\n200 2 1\n"));
}

fn of_python(world: &World) {
    let host = world.service("shop/site").v4.to_string();
    let mut python = world.workload("web").command("python3");
    let said = run(without_proxy(python.args(["-c", PYTHON, &host])), None).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    let [get, chunked, post, sockets, urllib] = lines[..] else { panic!("{said}") };
    assert!(get.starts_with("200 mesh ") && get.ends_with(" GET HTTP/1.1 "), "{said}");
    assert!(chunked.starts_with("200 mesh HTTP/1.1 [chunked] 150008 "), "{said}");
    assert!(post.ends_with(" POST HTTP/1.1 last"), "{said}");
    assert_eq!(sockets, "1 False", "one connection for all three");
    assert!(urllib.ends_with(" POST HTTP/1.1 by urllib"), "{said}");
}

fn of_go(world: &World) {
    for protocol in ["http1", "http2"] {
        let (log, client) = ask(world, protocol, "GET,POST", 2000, 0);
        let ended = client.await_end(scaled(TIMEOUT)).unwrap();
        assert!(ended.success(), "{protocol}: {}", tail(&log));
        assert_eq!(tail(&log), "succeeded 2000 failed 0");
    }
}

/// What the page of `tests/peers/web` tries and says: requests, events, a WebSocket, and what another origin shares.
fn of_browser(world: &World, servers: &[WebServer]) {
    let [site, shared] = ["shop/site", "shop/shared"].map(|service| world.service(service).v4);
    world.yaml.write("shared.yaml", &SHARED.replace("SITE", &site.to_string())).unwrap();
    until("the other route is in force", TIMEOUT, || {
        let answer = curl(world, &["-i", &format!("http://{shared}/name")])?;
        holds(answer.contains("x-by: mesh"), || answer)
    });
    let mut browser = world.workload("web").command("chromium-headless-shell");
    browser.args(["--no-sandbox", "--no-proxy-server", "--dump-dom"]);
    browser.arg(format!("--timeout={}", scaled(TIMEOUT).as_millis()));
    browser.arg(format!("--user-data-dir={}", world.directory().join("browser").display()));
    let page = run(browser.arg(format!("http://{site}/browser/page?api=http://{shared}")), None).unwrap();
    let said = page.split_once("<pre id=\"said\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let (said, _) = said.unwrap_or_else(|| panic!("{page}"));
    let of: BTreeMap<String, String> = serde_json::from_str(said).unwrap_or_else(|_| panic!("{page}"));
    // By one of the servers or the other.
    let from_server = |step: &str, begin: &str, end: &str| {
        let rest = of[step].strip_prefix(begin).and_then(|rest| rest.strip_suffix(end));
        assert!(rest.is_some_and(|name| name == "near" || name == "far"), "{step}: {said}");
    };
    from_server("get", "200 mesh ", " GET HTTP/1.1 ");
    from_server("shared", "200 mesh ", " PUT HTTP/1.1 shared");
    let sum: String =
        apps::hash(&mut &b"x".repeat(1 << 20)[..]).unwrap().map(|byte| format!("{byte:02x}")).concat();
    assert_eq!(of["post"], format!("200 mesh HTTP/1.1 [] {} {sum}", 1 << 20));
    assert_eq!(of["events"], "1 after [],2 after [],3 after [2]");
    assert_eq!(of["socket"], "text,100000,1000,true");
    assert_eq!(of["unshared"], "TypeError", "what a browser says of another origin's that is not shared");
    let reports: Vec<String> = servers.iter().flat_map(|server| server.said("reported ")).collect();
    assert_eq!(reports, [said], "one server has all of the page");

    // Both agents read all of it but preflights: the client's answers for what is shared, and lets the others be refused.
    let metrics = ["a", "b"].map(|node| world.agent(node).metrics().unwrap());
    let counted = |direction, workload, status| {
        let labels = [("direction", direction), ("workload", workload), ("status", status)];
        metrics.iter().map(|it| it.sum("nodemesh_requests_total", &labels)).sum::<f64>()
    };
    let arrived = counted("inbound", "shop/near", "101") + counted("inbound", "shop/far", "101");
    assert_eq!((counted("outbound", "shop/web", "101"), arrived), (1.0, 1.0));
    let expected = [
        "inbound OPTIONS /file 403",
        "inbound PUT /name 200",
        "outbound OPTIONS /file 403",
        "outbound OPTIONS /name 200",
        "outbound PUT /name 200",
    ];
    until("what another origin shares is told", TIMEOUT, || {
        let lines = ["a", "b"].map(|node| world.agent(node).access_log());
        let lines = lines.into_iter().flat_map(Result::unwrap);
        let of_page = |line: &Value| {
            line["method"] == "OPTIONS" || line["method"] == "PUT" && line["path"] != "/upload"
        };
        let text = |line: Value| {
            let [direction, method, path] =
                ["direction", "method", "path"].map(|it| line[it].as_str().unwrap().to_owned());
            format!("{direction} {method} {path} {}", line["status"])
        };
        let mut told: Vec<String> = lines.filter(of_page).map(text).collect();
        told.sort();
        holds(told == expected, || format!("{told:?}"))
    });
}

fn of_loads(world: &World) {
    let url = format!("http://{}/name", world.service("shop/site").v4);
    let web = world.workload("web");
    let said = run(web.command("wrk").args(["-t", "2", "-c", "8", "-d", "2s", &url]), None).unwrap();
    assert!(said.contains(" requests in "), "{said}");
    assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
    let said = run(web.command("h2load").args(["-c", "8", "-m", "16", "-n", "4000", &url]), None).unwrap();
    assert!(said.contains("4000 done, 4000 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
    assert!(said.contains("status codes: 4000 2xx, "), "{said}");
}

/// How a server goes away.
#[derive(Debug, Clone, Copy)]
enum Goes {
    /// As in every roll-out: it ends what is under way.
    InOrder,
    /// By SIGKILL.
    AtOnce,
}

#[test]
fn a_server_that_goes_away_is_not_seen() {
    let world = shop();
    let mut servers = ["far", "near"].map(|name| WebServer::start(&world, name));
    until("the route is in force", TIMEOUT, || {
        let answer = curl(&world, &["-i", "URL/name"])?;
        holds(answer.contains("x-by: mesh"), || answer)
    });
    let all = |world: &World, servers: &mut [WebServer; 2]| {
        // What was under way at a server that is killed may have been done: only what is safe is made again.
        goes_away(world, servers, ("http1", "GET", 50), Goes::InOrder);
        goes_away(world, servers, ("http1", "GET", 50), Goes::AtOnce);
        goes_away(world, servers, ("http2", "GET,POST", 0), Goes::InOrder);
        goes_away(world, servers, ("http2", "GET", 0), Goes::AtOnce);
    };
    all(&world, &mut servers);
    world.yaml.write("policy.yaml", POLICY).unwrap();
    let read = |workload: &str| {
        let metrics = ["a", "b"].map(|node| world.agent(node).metrics().unwrap());
        let counted = [("direction", "inbound"), ("workload", workload)];
        metrics.iter().map(|it| it.sum("nodemesh_requests_total", &counted)).sum::<f64>()
    };
    for name in ["near", "far"] {
        until("the server's agent reads requests, too", TIMEOUT, || {
            curl(&world, &[&format!("http://{}/name", world.workload(name).v4(8080))])?;
            holds(read(&format!("shop/{name}")) > 0.0, || name.to_owned())
        });
    }
    // Connections that began before go on unread.
    for server in &mut servers {
        server.restart(Goes::InOrder);
    }
    all(&world, &mut servers);
    let read = ["shop/near", "shop/far"].map(read);
    assert!(read.iter().all(|count| *count > 500.0), "{read:?}");
}

/// Each in turn goes, and comes back, while requests are made.
fn goes_away(
    world: &World,
    servers: &mut [WebServer; 2],
    (protocol, methods, rate): (&str, &str, usize),
    how: Goes,
) {
    let (log, client) = ask(world, protocol, methods, usize::MAX >> 1, rate);
    let mut answered = 0;
    for _ in 0..2 {
        for server in servers.iter_mut() {
            await_load(world, rate);
            answered += server.restart(how);
        }
    }
    await_load(world, rate);
    client.terminate().unwrap();
    let ended = client.await_end(scaled(TIMEOUT)).unwrap();
    assert!(ended.success(), "{protocol} {methods} {rate} {how:?}: {}", tail(&log));
    let said = tail(&log);
    let succeeded: u64 = said.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(said.ends_with(" failed 0"), "{said}");
    if let Goes::InOrder = how {
        answered += servers.iter_mut().map(|server| server.restart(how)).sum::<u64>();
        assert!(answered >= succeeded, "{answered} were answered: {said}");
    }
}

/// Waits until more requests were answered: half a second's, as a rule.
fn await_load(world: &World, rate: usize) {
    // At any rate for longer than the pauses between attempts: a request is not there at three ends of servers.
    let enough = if rate == 0 { 2000.0 } else { rate as f64 / 2.0 };
    let answered = || {
        let metrics = world.agent("a").metrics().unwrap();
        metrics.sum("nodemesh_requests_total", &[("service", "shop/site"), ("status", "200")])
    };
    let before = answered();
    until("there are more answers", TIMEOUT, || {
        let more = answered() - before;
        holds(more >= enough, || format!("{more} more"))
    });
}

/// Go's server on a workload.
struct WebServer {
    workload: Workload,
    log: PathBuf,
    program: Option<Program>,
}

impl WebServer {
    /// Returns once it listens.
    fn start(world: &World, name: &str) -> Self {
        let log = world.directory().join(format!("server-{name}.log"));
        let mut server = Self { workload: world.workload(name), log, program: None };
        server.begin();
        server
    }

    fn begin(&mut self) {
        let before = self.said("ready").len();
        let mut start = self.workload.command(&web());
        let program = Program::start("web", start.args(["serve", &self.workload.name]), &self.log).unwrap();
        self.program = Some(program);
        until("it listens", TIMEOUT, || holds(self.said("ready").len() > before, || tail(&self.log)));
    }

    /// Has it go, and starts it anew. Returns how many requests the old one says that it has answered.
    fn restart(&mut self, how: Goes) -> u64 {
        let program = self.program.take().unwrap();
        let answered = match how {
            Goes::AtOnce => {
                program.kill().unwrap();
                0
            }
            Goes::InOrder => {
                program.terminate().unwrap();
                let ended = program.await_end(scaled(TIMEOUT)).unwrap();
                assert!(ended.success(), "{}", tail(&self.log));
                self.said("answered ").last().unwrap().parse().unwrap()
            }
        };
        self.begin();
        answered
    }

    /// What follows these words, in each line that begins with them.
    fn said(&self, words: &str) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().filter_map(|line| line.strip_prefix(words)).map(str::to_owned).collect()
    }
}

/// Go's client, and what it says.
fn ask(world: &World, protocol: &str, methods: &str, requests: usize, rate: usize) -> (PathBuf, Program) {
    let url = format!("http://{}/name", world.service("shop/site").v4);
    let mut client = world.workload("web").command(&web());
    client.args(["ask", &url, protocol, methods, "32", &requests.to_string(), &rate.to_string()]);
    let log = world.directory().join("ask.log");
    let _ = fs::remove_file(&log);
    let client = Program::start("ask", &mut client, &log).unwrap();
    (log, client)
}

/// What curl says, of addresses of the service.
fn curl(world: &World, arguments: &[&str]) -> Result<String, String> {
    let url = format!("http://{}", world.service("shop/site").v4);
    let mut curl = world.workload("web").command("curl");
    curl.args(["-sS", "--max-time", "20"]);
    curl.args(arguments.iter().map(|argument| argument.replace("URL", &url)));
    run(without_proxy(&mut curl), None).map_err(|error| format!("{error:#}"))
}

/// Asks the service itself, whatever whoever runs the tests has in their environment.
fn without_proxy(command: &mut Command) -> &mut Command {
    command.env("no_proxy", "*").env("NO_PROXY", "*")
}

/// A program that `cargo xtask peers` builds, which is part of `cargo xtask test`.
fn web() -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/web");
    assert!(path.is_file(), "{} is not there: cargo xtask peers", path.display());
    path.display().to_string()
}
