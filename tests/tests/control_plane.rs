//! The controller is killed, cut off, slow, or comes back with an older state: everything known goes on, and views
//! converge afterwards within a known time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_tests::{Workload, World, agent::Agent, apps, until, wait::holds, workload::TIMEOUT};

/// Until an agent knows that its controller is silent: a probe after 5 s, 5 s for its answer, and the machine's load.
const NOTICED: Duration = Duration::from_secs(15);
/// Until the controller knows that an agent is: 10 s and 10 s.
const NOTICED_BY_CONTROLLER: Duration = Duration::from_secs(30);
/// Until views are the newest again: the agent's longest pause and longest connect, 5 s each, and the machine's load.
const CONVERGED: Duration = Duration::from_secs(20);

/// What is said on new connections: so long that ciphertext does not have it by chance.
const NEW: &[u8] = b"said on a new connection";

/// A connection that stands; whoever asks pings through it.
struct Held(TcpStream);

impl Held {
    fn open(from: &Workload, to: &Workload) -> Self {
        let mut held = Self(from.connect(to.v4(8080)).unwrap());
        held.ping();
        held
    }

    fn ping(&mut self) {
        self.0.write_all(b"ping").unwrap();
        let mut answer = [0; 4];
        self.0.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ping");
    }
}

/// New connections both ways and on both families.
#[track_caller]
fn all_exchange(pairs: &[(&Workload, &Workload)]) {
    for (from, to) in pairs {
        for address in to.both(8080) {
            let answer = from.exchange(address, NEW);
            assert_eq!(answer.unwrap_or_else(|e| panic!("{} to {address}: {e}", from.name)), NEW);
        }
    }
}

fn connected(agent: &Agent) -> Result<bool, String> {
    let metrics = agent.metrics().map_err(|e| format!("{e:#}"))?;
    Ok(metrics.sum("nodemesh_controller_connected", &[]) == 1.0)
}

fn watched(world: &World) -> Result<f64, String> {
    let metrics = world.controller().metrics().map_err(|e| format!("{e:#}"))?;
    Ok(metrics.sum("nodemesh_agents_connected", &[]))
}

/// Nobody may connect to anybody in the namespace.
const CLOSED: &str = "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: closed\nspec:\n  action: Allow\n  rules: []\n";

fn refuses(from: &Workload, to: &Workload) -> Result<(), String> {
    holds(from.exchange(to.v4(8080), b"x").is_err(), || "it is allowed".into())
}

/// Every file below a directory.
fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

/// The private keys that an agent has: hex, as its files have them.
fn keys(agent: &Agent) -> Vec<String> {
    let mut kept = vec![];
    files(agent.run_dir(), &mut kept);
    let json = kept.iter().filter(|file| file.extension().is_some_and(|e| e == "json"));
    let values =
        json.map(|file| serde_json::from_slice::<serde_json::Value>(&fs::read(file).unwrap()).unwrap());
    values.filter_map(|value| Some(value["key_pkcs8"].as_str()?.to_owned())).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digit).collect()
}

#[test]
fn while_the_controller_is_dead_everything_known_goes_on_and_an_agent_restarts_from_memory() {
    let world = World::shop().build().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let _apps = [&web, &api, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    let pairs = [(&web, &db), (&api, &db), (&db, &web), (&web, &api)];
    all_exchange(&pairs);
    let mut held = Held::open(&web, &db);
    let version = || world.agent("a").state().unwrap()["view_version"].clone();
    let before = version();
    world.controller().kill().unwrap();
    until("the agents know", TIMEOUT, || holds(!connected(world.agent("a"))?, || "it is connected".into()));
    let mut wire = world.capture().unwrap();
    all_exchange(&pairs);
    held.ping();

    world.agent("a").kill().unwrap();
    world.agent("a").start().unwrap();
    world.agent("a").await_ready().unwrap();
    world.agent("a").await_enrolled(2, TIMEOUT).unwrap();
    assert_eq!(version(), before, "the last good view is in force");
    all_exchange(&pairs);
    let readable = wire.plaintext(NEW).unwrap();
    assert!(readable.is_empty(), "what was captured stays so: {readable:?}");

    // What the agents keep: keys on tmpfs only, in no file of theirs on a disk.
    let secrets: Vec<_> = ["a", "b"].iter().flat_map(|node| keys(world.agent(node))).collect();
    assert!(secrets.len() >= 5, "two nodes' and three workloads' keys: {}", secrets.len());
    let mut on_disk = vec![];
    files(world.directory(), &mut on_disk);
    on_disk.retain(|file| !file.starts_with(world.controller().state()));
    assert!(on_disk.len() >= 6, "{on_disk:?}");
    for file in on_disk {
        let content = fs::read(&file).unwrap();
        let has = |secret: &[u8]| content.windows(secret.len()).any(|window| window == secret);
        let found = secrets.iter().any(|key| has(key.as_bytes()) || has(&bytes(key)));
        assert!(!found, "a key in {}", file.display());
    }

    world.yaml.write("policy.yaml", CLOSED).unwrap();
    world.controller().start().unwrap();
    until("what changed meanwhile is in force", CONVERGED, || refuses(&web, &db).and(refuses(&db, &web)));
}

#[test]
fn a_partition_is_noticed_at_both_ends_and_views_converge_after_it() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _apps = [&web, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    let mut held = Held::open(&web, &db);
    world.controller().cut_off().unwrap();
    for node in ["a", "b"] {
        until("the agent notices", NOTICED, || holds(!connected(world.agent(node))?, || "not yet".into()));
    }
    all_exchange(&[(&web, &db), (&db, &web)]);
    until("the controller notices", NOTICED_BY_CONTROLLER, || {
        watched(&world).and_then(|agents| holds(agents == 0.0, || format!("{agents} agents")))
    });
    world.yaml.write("policy.yaml", CLOSED).unwrap();
    held.ping();
    world.controller().reconnect().unwrap();
    until("views converge", CONVERGED, || refuses(&web, &db).and(refuses(&db, &web)));
    until("both agents watch", CONVERGED, || {
        watched(&world).and_then(|agents| holds(agents == 2.0, || format!("{agents} agents")))
    });
}

#[test]
fn a_controller_that_hangs_or_is_hard_to_reach_costs_nothing_that_is_known() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _apps = [&web, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    let mut held = Held::open(&web, &db);
    // Its kernel still takes connections and acknowledges what is sent: only the probes tell.
    world.controller().freeze().unwrap();
    until("the agent notices", NOTICED, || holds(!connected(world.agent("a"))?, || "not yet".into()));
    all_exchange(&[(&web, &db), (&db, &web)]);
    held.ping();
    world.controller().thaw().unwrap();
    until("the agent is back", CONVERGED, || holds(connected(world.agent("a"))?, || "not yet".into()));

    // A quarter of the packets lost each way, over a thin line.
    world.controller().lose(0.25).unwrap();
    world
        .controller()
        .netns()
        .shell("tc qdisc add dev uplink root tbf rate 256kbit burst 4kb latency 400ms")
        .unwrap();
    world.yaml.write("policy.yaml", CLOSED).unwrap();
    until("a change comes through", 3 * CONVERGED, || refuses(&web, &db).and(refuses(&db, &web)));
}

/// Exchanges without end, from another thread, until it is told to stop; every one must succeed.
struct Traffic {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

impl Traffic {
    fn start(from: &Workload, to: &Workload) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (from, to, told) = (from.clone(), to.clone(), stop.clone());
        let thread = thread::spawn(move || {
            let mut exchanges = 0;
            while !told.load(Ordering::Relaxed) {
                all_exchange(&[(&from, &to)]);
                exchanges += 1;
            }
            exchanges
        });
        Self { stop, thread }
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn copy(from: &Path, to: &Path) {
    let output = std::process::Command::new("cp").arg("-a").arg(from).arg(to).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_controller_restored_from_an_older_state_says_so_and_sends_nobody_back() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _apps = [&web, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    let (state, backup) = (world.controller().state().to_owned(), world.directory().join("backup"));
    let token = world.controller().token("a").unwrap();
    copy(&state, &backup);
    // The backup is from before the workloads were captured.
    fs::remove_file(backup.join("reports.json")).unwrap();

    // Meanwhile: the token is used, the root is rotated, certificates are issued under the new one, restarts.
    world.agent("a").kill().unwrap();
    fs::remove_file(world.agent("a").run_dir().join("node.json")).unwrap();
    world.agent("a").give_token(&token).unwrap();
    world.agent("a").start().unwrap();
    world.agent("a").await_ready().unwrap();
    let issued = || world.controller().metrics().unwrap().sum("nodemesh_certificates_issued_total", &[]);
    let before = issued();
    world.controller().rotate_root().unwrap();
    until("all five identities have new certificates", 3 * TIMEOUT, || {
        holds(issued() >= before + 5.0, || format!("{} issued", issued() - before))
    });
    for _ in 0..2 {
        world.controller().kill().unwrap();
        world.controller().start().unwrap();
    }
    for node in ["a", "b"] {
        until("the agent is back", CONVERGED, || holds(connected(world.agent(node))?, || "not yet".into()));
    }

    let mut wire = world.capture().unwrap();
    let traffic = Traffic::start(&web, &db);
    world.controller().kill().unwrap();
    fs::rename(&state, world.directory().join("newer")).unwrap();
    copy(&backup, &state);
    world.controller().start().unwrap();
    for node in ["a", "b"] {
        until("the agent takes the restored controller's view, and tells", CONVERGED, || {
            let metrics = world.agent(node).metrics().map_err(|e| format!("{e:#}"))?;
            let told = metrics.sum("nodemesh_views_restored_total", &[]);
            holds(told == 1.0, || format!("told {told} times"))
        });
    }
    let status = world.meshctl(&["status"]).unwrap().stdout;
    assert!(status.contains("restored from an older state"), "{status}");
    assert_eq!(world.controller().metrics().unwrap().sum("nodemesh_controller_restored", &[]), 1.0);
    world.yaml.write("service.yaml", "apiVersion: v1\nkind: Service\nmetadata:\n  namespace: shop\n  name: late\nspec:\n  clusterIP: 10.99.0.1\n  ports:\n    - port: 80\n").unwrap();
    until("agents are in sync with it", CONVERGED, || {
        let status = world.meshctl(&["--output", "json", "status"]).map_err(|e| format!("{e:#}"))?.stdout;
        holds(status.matches("\"in_sync\": true").count() == 2, || status.clone())
    });
    assert!(traffic.end() > 10, "certificates issued meanwhile are good");
    assert!(wire.plaintext(NEW).unwrap().is_empty(), "no captured workload was taken for one that is not");

    // The token that was used after the backup was made is in the backup: it must not work again.
    world.agent("a").kill().unwrap();
    fs::remove_file(world.agent("a").run_dir().join("node.json")).unwrap();
    world.agent("a").give_token(&token).unwrap();
    world.agent("a").start().unwrap();
    until("the agent is turned away", TIMEOUT, || {
        let log = fs::read_to_string(world.agent("a").log()).unwrap();
        holds(!world.agent("a").is_running() && log.contains("was used before"), || "it runs".into())
    });
}

#[test]
fn a_certificate_that_runs_out_while_the_controller_is_away_ends_new_connections_only_and_a_token_cures_it() {
    let life = Duration::from_secs(10);
    let world = World::shop().certificate_ttl(life).build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let mut held = Held::open(&web, &db);
    world.controller().kill().unwrap();
    let killed = Instant::now();
    until("the certificates have run out", 3 * life, || refuses(&web, &db));
    assert!(killed.elapsed() < life + Duration::from_secs(5), "{:?}", killed.elapsed());
    world.agent("a").wait_log("the refusal", |line| line["reason"] == "no_certificate");
    held.ping();
    for node in ["a", "b"] {
        let token = world.controller().token(node).unwrap();
        world.agent(node).give_token(&token).unwrap();
    }
    world.controller().start().unwrap();
    // The pause between two attempts at a certificate grows to 30 s.
    until("it works again by itself", 3 * TIMEOUT, || {
        let answer = web.exchange(db.v4(8080), b"x").map_err(|e| e.to_string())?;
        holds(answer == b"x", || format!("{answer:?}"))
    });
    held.ping();
}
