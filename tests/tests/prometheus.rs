//! What fails is told: a real Prometheus asks real agents and a controller, and our rules fire while something is wrong, and
//! no longer.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use mesh_tests::{
    Server, World, apps,
    netns::{self, NetNs},
    page, process,
    prometheus::{Prometheus, Target},
    until,
    wait::holds,
    workload::{TIMEOUT, connect_in},
};
use serde_json::Value;

const RULES: &str = include_str!("../../deploy/alerts/nodemesh.yaml");
const OBSERVE: &str = include_str!("../../docs/operate/observe.md");
const DASHBOARDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/dashboards");
/// How long an alert may take to fire, or to end.
const TOLD: Duration = Duration::from_secs(30);

/// The rules with all that takes minutes or days made to take seconds, the longer the longer; the names of what is recorded
/// stay.
fn shortened(rules: &str) -> String {
    let mut short = String::new();
    for line in rules.lines().filter(|line| !line.trim_start().starts_with('#')) {
        if line.contains("summary:") || line.contains("description:") {
            short += line;
        } else if let Some((before, _)) = line.split_once("for: ") {
            short += &format!("{before}for: 1s");
        } else {
            for part in line.split_inclusive([' ', '[', ']', ')']) {
                let word = part.trim_end_matches([' ', '[', ']', ')']);
                short += &seconds(word).unwrap_or_else(|| word.to_owned());
                short += &part[word.len()..];
            }
        }
        short.push('\n');
    }
    short
}

/// `1h` → `6s`; nothing for what is no duration.
fn seconds(word: &str) -> Option<String> {
    let units = [("m", 1), ("h", 60), ("d", 1440)];
    let minutes = units.iter().find_map(|(unit, minutes)| {
        let number: u32 = word.strip_suffix(unit)?.parse().ok()?;
        Some(number * minutes)
    })?;
    Some(format!("{}s", minutes.ilog2() + 1))
}

/// The admin interface of a program that shows it on its own loopback only, at a port of the wire's.
fn relay(world: &World, port: u16, to: &NetNs, at: SocketAddr) -> Server {
    let listener = world.wire().enter(|| TcpListener::bind(("127.0.0.1", port))).unwrap().unwrap();
    let to = to.clone();
    let carry: apps::Handler = Arc::new(move |mut client| {
        let mut server = connect_in(&to, at, Duration::from_secs(2))?;
        let (mut answers, mut back) = (server.try_clone()?, client.try_clone()?);
        let answers = thread::spawn(move || {
            // Either end may go first.
            let _ = io::copy(&mut answers, &mut back);
            let _ = back.shutdown(std::net::Shutdown::Both);
        });
        let _ = io::copy(&mut client, &mut server);
        let _ = server.shutdown(std::net::Shutdown::Both);
        answers.join().map_err(|_| io::Error::other("the relay"))
    });
    Server::start(vec![listener], carry).unwrap()
}

struct Scene {
    prometheus: Prometheus,
    /// Another, that keeps native histograms.
    native: Prometheus,
    _relays: Vec<Server>,
    // Last, so that the namespaces outlive what runs in them.
    world: World,
}

impl Scene {
    /// `shop/pay` is a service whose requests are read, and that `shop/db` answers.
    fn new() -> Self {
        // Every request is traced; of the collector, that nobody is, spans wait.
        let shop = World::shop().traced_by("http://127.0.0.1:9", "100%");
        let world = shop.service("shop/pay", "db", 80, 8080).build().unwrap();
        let route = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: pay}
spec:
  parentRefs: [{group: '', kind: Service, name: pay, port: 80}]
  rules: [{backendRefs: [{name: pay, port: 80}]}]
";
        world.yaml.write("route.yaml", route).unwrap();
        let programs = [
            ("agent", "a", world.agent("a").admin()),
            ("agent", "b", world.agent("b").admin()),
            ("controller", "c", world.controller().admin()),
        ];
        let (mut relays, mut targets) = (vec![], vec![]);
        for (port, (job, instance, (netns, at))) in (15030..).zip(programs) {
            relays.push(relay(&world, port, netns, at));
            targets.push(Target {
                job,
                instance: instance.to_owned(),
                address: ([127, 0, 0, 1], port).into(),
            });
        }
        let at = ([127, 0, 0, 1], 9090).into();
        let directory = world.directory().join("prometheus");
        let prometheus =
            Prometheus::start(world.wire(), at, &directory, &targets, &shortened(RULES)).unwrap();
        let at = ([127, 0, 0, 1], 9091).into();
        let directory = world.directory().join("native");
        let native = Prometheus::start_native(world.wire(), at, &directory, &targets).unwrap();
        Self { prometheus, native, _relays: relays, world }
    }

    /// A request of `shop/web` to the service: the status that it is answered with.
    fn ask(&self) -> Result<String, String> {
        let to = (self.world.service("shop/pay").v4, 80).into();
        let mut stream = self.world.workload("web").connect(to).map_err(|e| e.to_string())?;
        let mut answer = String::new();
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: pay\r\nConnection: close\r\n\r\n")
            .map_err(|e| e.to_string())?;
        stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
        answer.split(' ').nth(1).map(str::to_owned).ok_or(answer.clone())
    }

    /// The names of alerts that fire, while requests are made.
    fn firing(&self) -> Result<BTreeSet<String>, String> {
        // What it is answered is what the alerts are about.
        let _ = self.ask();
        let alerts = self.prometheus.firing().map_err(|error| format!("{error:#}"))?;
        Ok(alerts.iter().map(|alert| alert["labels"]["alertname"].as_str().unwrap().to_owned()).collect())
    }

    #[track_caller]
    fn await_firing(&self, wanted: &[&str]) -> Vec<Value> {
        until(&format!("{wanted:?} fire"), TOLD, || {
            let firing = self.firing()?;
            holds(wanted.iter().all(|name| firing.contains(*name)), || format!("{firing:?} fire"))
        });
        let alerts = self.prometheus.firing().unwrap();
        for alert in &alerts {
            let told = alert["annotations"].to_string();
            assert!(!told.contains("error expanding") && !told.contains("<no value>"), "{alert}");
        }
        alerts
    }

    /// What docs/operate/observe.md has its reader run, while requests fail; and whether it has every field of the log.
    fn follow_the_page(&self) {
        let blocks = page::blocks(OBSERVE).into_iter().filter(|it| it.section == "Why did a request fail?");
        let agent = self.world.agent("a");
        let places = [agent.admin().0, self.world.controller().admin().0];
        let seen = ["\"outcome\":\"refused\"", "HTTPRoute shop/pay"];
        let path = std::env::var("PATH").unwrap();
        let path = format!("{}:{path}", process::binaries().unwrap().display());
        let mut followed = 0;
        for ((block, place), seen) in blocks.zip(places).zip(seen) {
            let mut shell = place.command("sh");
            shell.env("PATH", &path).env("log", agent.access_log_file()).args(["-ec", &block.commands]);
            let said = netns::run(&mut shell, None).unwrap();
            assert!(said.contains(seen), "{}\n{said}", block.commands);
            followed += 1;
        }
        assert_eq!(followed, 2, "blocks of the page");
        for line in agent.access_log().unwrap() {
            let ends = [&line["source"], &line["destination"]].map(|end| end.as_object().unwrap().keys());
            for field in line.as_object().unwrap().keys().chain(ends.into_iter().flatten()) {
                assert!(OBSERVE.contains(&format!("`{field}`")), "docs/operate/observe.md lacks {field}");
            }
        }
    }

    /// Prometheus has an answer to all that dashboards ask, and to most of it more than an empty one.
    fn dashboards_show_something(&self) {
        let (mut asked, mut shown) = (0, 0);
        for file in fs::read_dir(Path::new(DASHBOARDS)).unwrap() {
            let dashboard: Value = serde_json::from_slice(&fs::read(file.unwrap().path()).unwrap()).unwrap();
            let panels = dashboard["panels"].as_array().unwrap().iter();
            for target in panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
                let mut expression = target["expr"].as_str().unwrap().replace("$__rate_interval", "10s");
                for choice in ["service", "workload", "route", "instance"] {
                    expression = expression.replace(&format!("${choice}\""), ".*\"");
                }
                assert!(!expression.contains('$'), "{expression}");
                shown += u32::from(!self.prometheus.query(&expression).unwrap().is_empty());
                asked += 1;
            }
        }
        assert!(asked > 80 && shown * 3 > asked * 2, "{shown} of {asked} expressions come to something");
    }

    /// What an expression comes to in one of them, if it is one number.
    fn number(of: &Prometheus, expression: &str) -> Result<f64, String> {
        let found = of.query(expression).map_err(|error| format!("{error:#}"))?;
        let [one] = &found[..] else { return Err(format!("{expression}: {found:?}")) };
        one["value"][1].as_str().and_then(|it| it.parse().ok()).ok_or_else(|| one.to_string())
    }

    /// The buckets of how long requests take lead to traces that the access log knows, and native histograms tell of the same
    /// requests as they do.
    fn durations_lead_to_traces_and_are_native(&self) {
        let Self { prometheus, native, world, .. } = self;
        let series = r#"nodemesh_request_duration_seconds{service="shop/pay",direction="outbound"}"#;
        let buckets = series.replace("_seconds", "_seconds_bucket");
        let found = until("a trace stands beside a bucket", TIMEOUT, || {
            let _ = self.ask();
            let found = prometheus.exemplars(&buckets).map_err(|error| format!("{error:#}"))?;
            found.last().cloned().ok_or_else(|| "none does".to_owned())
        });
        let trace = found["labels"]["trace_id"].as_str().unwrap().to_owned();
        world.agent("a").wait_log("the request of the trace", |line| line["trace_id"] == trace.as_str());

        // Some more, and then nobody asks any more, so both count the same.
        (0..4).for_each(|_| drop(self.ask()));
        let counted = |of: &Prometheus, expression: &str| Self::number(of, expression);
        let count = format!("sum({})", series.replace("_seconds", "_seconds_count"));
        until("both know of the same requests", TIMEOUT, || {
            let classic = counted(prometheus, &count)?;
            let native = counted(native, &format!("histogram_count(sum({series}))"))?;
            holds(classic > 3.0 && classic == native, || format!("{classic} and {native}"))
        });
        for quantile in ["0.5", "0.9", "1"] {
            let native = counted(native, &format!("histogram_quantile({quantile}, sum({series}))")).unwrap();
            let classic = |wanted: f64| {
                let least = format!("sum({}) ", buckets.replace('}', &format!(r#",le="{wanted:?}"}}"#)));
                counted(prometheus, &least).unwrap()
            };
            let all = counted(prometheus, &count).unwrap();
            let rank = quantile.parse::<f64>().unwrap() * all;
            // The bucket of fixed bounds in which that request is, and the native ones around it.
            let bounds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
            let place = bounds.iter().position(|bound| classic(*bound) >= rank).unwrap();
            let lower = if place == 0 { 0.0 } else { bounds[place - 1] };
            let (lower, upper) = (lower / 1.1, bounds[place] * 1.1);
            assert!((lower..=upper).contains(&native), "{quantile}: {native} is not in {lower}..{upper}");
        }
    }

    #[track_caller]
    fn await_calm(&self) {
        until("no alert fires", TOLD, || {
            let firing = self.firing()?;
            holds(firing.is_empty(), || format!("{firing:?} fire"))
        });
    }
}

#[test]
fn what_fails_is_told_while_it_fails_and_no_longer() {
    let scene = Scene::new();
    let Scene { world, prometheus, .. } = &scene;
    let app = world.workload("db").serve(8080, apps::http("db")).unwrap();
    until("the service answers", TIMEOUT, || {
        let status = scene.ask()?;
        holds(status == "200", || status.clone())
    });
    until("all are asked", TIMEOUT, || {
        let up = prometheus.query("sum(up)").map_err(|error| format!("{error:#}"))?;
        holds(up.iter().any(|it| it["value"][1] == "3"), || format!("{up:?}"))
    });
    scene.await_calm();
    scene.durations_lead_to_traces_and_are_native();

    // Nobody listens behind the service any more.
    drop(app);
    let alerts =
        scene.await_firing(&["NodemeshErrorBudgetBurnsFast", "NodemeshBackendFailing", "NodemeshRetryStorm"]);
    let burns = alerts.iter().find(|it| it["labels"]["alertname"] == "NodemeshErrorBudgetBurnsFast").unwrap();
    assert_eq!(burns["labels"]["service"], "shop/pay", "{burns}");
    scene.follow_the_page();
    scene.dashboards_show_something();
    let app = world.workload("db").serve(8080, apps::http("db")).unwrap();
    scene.await_calm();

    // A workload's capture is not whole: one of its addresses is gone, as far as its node can see.
    let api = world.workload("api");
    api.shell(&format!("ip -6 addr del {}/128 dev eth0", api.address.v6)).unwrap();
    let alerts = scene.await_firing(&["NodemeshUnprotected"]);
    let unprotected = alerts.iter().find(|it| it["labels"]["alertname"] == "NodemeshUnprotected").unwrap();
    assert_eq!(unprotected["labels"]["instance"], "a", "{unprotected}");
    api.shell(&format!("ip -6 addr add {}/128 dev eth0 nodad", api.address.v6)).unwrap();
    scene.await_calm();

    // The controller is away; what is known goes on.
    world.controller().kill().unwrap();
    scene.await_firing(&["NodemeshControllerAway", "NodemeshControllerDown", "NodemeshNoController"]);
    // Each agent is scraped at a time of its own.
    until("both agents say so", TOLD, || {
        let alerts = scene.prometheus.firing().map_err(|error| error.to_string())?;
        let away = alerts.iter().filter(|it| it["labels"]["alertname"] == "NodemeshControllerAway");
        holds(away.count() == 2, || format!("{alerts:?}"))
    });
    assert_eq!(scene.ask().as_deref(), Ok("200"));
    world.controller().start().unwrap();
    scene.await_calm();
    drop(app);
}

#[test]
fn what_takes_minutes_and_days_in_the_rules_takes_seconds_here() {
    let rules = "a\n  for: 15m\n expr: sum(rate(x:rate5m{a=\"5m\"}[5m])) > y unless z[1h] offset 10m\n summary: \"5m for: 1h\"\n w[3d]";
    let short = "a\n  for: 1s\n expr: sum(rate(x:rate5m{a=\"5m\"}[3s])) > y unless z[6s] offset 4s\n summary: \"5m for: 1h\"\n w[13s]\n";
    assert_eq!(shortened(rules), short);
}
