//! A mesh at work, shown: real programs in namespaces, real agents, and what they, the wire and the log say.

use std::{
    sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use mesh_tests::{Server, Workload, WorkloadSpec, World, apps, log, wait};
use nix::sys::signal::{SigSet, Signal};

use crate::{check, ebpf, run, setup};

/// When the demo ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// After showing everything.
    Once,
    /// When interrupted.
    OnInterrupt,
}

/// How often the demo looks whether an agent was killed.
const LOOK: Duration = Duration::from_millis(200);
/// How long a killed agent stays dead, so that one can see what that means.
const DEAD: Duration = Duration::from_secs(15);
/// How long a line may take to be in the access log.
const LOGGED: Duration = Duration::from_secs(10);
/// Requests to the balanced service.
const REQUESTS: usize = 20;

/// Runs it.
pub(crate) fn demo(end: End) -> Result<()> {
    let started = Instant::now();
    setup::everything()?;
    ebpf::build()?;
    let binaries = check::build_binaries()?;
    // SAFETY: no other thread runs yet that could read the environment.
    unsafe { std::env::set_var("NODEMESH_BIN_DIR", binaries) };
    let interrupts = interrupts()?;

    let world = run::step("Make a world: 2 nodes, 6 workloads, a controller, 2 agents", world)?;
    let shown = applications(&world).and_then(|_running| {
        show(&world, started, &interrupts)?;
        match end {
            End::Once => Ok(()),
            End::OnInterrupt => linger(&world, &interrupts),
        }
    });
    if let Err(error) = &shown {
        if error.is::<Interrupted>() {
            eprintln!("\ninterrupted; taking the world down");
            return Ok(());
        }
        eprintln!("{}", world.logs());
    }
    eprintln!("\ntaking the world down");
    shown
}

/// The world that is shown: a shop on two nodes.
fn world() -> Result<World> {
    World::builder()
        .node("a")
        .node("b")
        .workload("shop/web", "a")
        .workload("shop/db", "b")
        .workload("shop/mail", "b")
        .with(WorkloadSpec::new("shop/pay-1", "a").app("pay"))
        .with(WorkloadSpec::new("shop/pay-2", "b").app("pay"))
        .with(WorkloadSpec::new("shop/old", "b").outside())
        .service("shop/pay", "pay", 80, 8080)
        .build()
}

/// Applications of the shop; they end with it.
fn applications(world: &World) -> Result<Vec<Server>> {
    let mut servers = vec![];
    for name in ["db", "pay-1", "pay-2", "old"] {
        servers.push(world.workload(name).serve(8080, apps::http(name))?);
    }
    servers.push(world.workload("mail").serve(2525, apps::greeter("220 mail.shop ready\r\n"))?);
    Ok(servers)
}

fn show(world: &World, started: Instant, interrupts: &Receiver<()>) -> Result<()> {
    let shows: [&dyn Fn() -> Result<()>; 7] = [
        &|| request(world, started),
        &|| server_first(world),
        &|| service(world),
        &|| throughput(world),
        &|| outside(world),
        &|| log_lines(world),
        &|| metrics_and_command(world),
    ];
    for show in shows {
        show()?;
        interrupted(interrupts)?;
    }
    poke(world)
}

/// One HTTP request by curl, with the wire beside it.
fn request(world: &World, started: Instant) -> Result<()> {
    let (web, db) = (world.workload("web"), world.workload("db"));
    let mut wire = world.capture()?;
    heading("An HTTP request, web on node a → db on node b, by curl");
    let answer = shell(&web, &format!("curl -sS http://{}/", db.v4(8080)))?;
    let took = started.elapsed();
    println!("{}", answer.trim_end());
    println!("(db saw web's own address, {})", web.address.v4);
    println!("first request over mutual TLS {:.1} s after the start of this run", took.as_secs_f32());

    heading("The same request on the wire between the nodes: web → db:8080, but TLS; no tunnel port");
    let packets = wire.tcp_between(web.v4(0).ip(), db.v4(0).ip(), 8080)?;
    for packet in packets.iter().filter(|p| p.opens || !p.payload.is_empty()).take(8) {
        println!("{packet}");
    }
    let readable = wire.plaintext(b"GET / HTTP")?.len() + wire.plaintext(b"db saw")?.len();
    println!("segments with readable HTTP: {readable}");
    if readable > 0 || !packets.iter().any(mesh_tests::wire::Packet::is_client_hello) {
        bail!("the request was not encrypted");
    }
    Ok(())
}

fn server_first(world: &World) -> Result<()> {
    let (web, mail) = (world.workload("web"), world.workload("mail"));
    heading("A protocol in which the server speaks first, web → mail:2525, by ncat, over IPv6");
    println!("{}", shell(&web, &format!("echo HELO | ncat {} 2525", mail.address.v6))?.trim_end());
    Ok(())
}

fn service(world: &World) -> Result<()> {
    let web = world.workload("web");
    let address = world.service("shop/pay").v4;
    heading(&format!("A service, shop/pay at {address}:80, over pay-1 (node a) and pay-2 (node b)"));
    let line = format!("for i in $(seq {REQUESTS}); do curl -sS http://{address}/; done | sort | uniq -c");
    println!("{}", shell(&web, &line)?.trim_end());
    Ok(())
}

fn throughput(world: &World) -> Result<()> {
    let (web, db) = (world.workload("web"), world.workload("db"));
    heading("iperf3, web → db, for 2 s");
    let mut server = db.command("iperf3").args(["-s", "-1"]).stdout(std::process::Stdio::null()).spawn()?;
    wait::try_until(LOGGED, || {
        let listening = shell(&db, "ss -Hltn sport = :5201").map_err(|e| format!("{e:#}"))?;
        wait::holds(!listening.is_empty(), || "iperf3 does not listen".into())
    })
    .map_err(anyhow::Error::msg)?;
    let report = shell(&web, &format!("iperf3 -c {} -t 2 | grep -E 'sender|receiver'", db.address.v4));
    if report.is_err() {
        server.kill()?;
    }
    server.wait()?;
    println!("{}", report?.trim_end());
    Ok(())
}

fn outside(world: &World) -> Result<()> {
    let (web, old) = (world.workload("web"), world.workload("old"));
    heading("For contrast: old is not enrolled, so web speaks plaintext to it");
    let mut wire = world.capture()?;
    println!("{}", shell(&web, &format!("curl -sS http://{}/", old.v4(8080)))?.trim_end());
    println!("segments with readable HTTP: {}", wire.plaintext(b"GET / HTTP")?.len());
    Ok(())
}

fn log_lines(world: &World) -> Result<()> {
    let (web, db) = (world.workload("web"), world.workload("db"));
    heading("Access log: one line per connection, at the source's agent and at the destination's");
    for (node, direction) in [("a", log::OUTBOUND), ("b", log::INBOUND)] {
        let wanted = log::is(direction, &web, &db);
        // The first lines are those of the check that the world is settled; the last is iperf3's.
        let line = wait::try_until(LOGGED, || {
            let lines = world.agent(node).access_log().map_err(|e| format!("{e:#}"))?;
            lines.into_iter().rfind(&wanted).ok_or_else(|| "no line yet".to_owned())
        });
        println!("node {node}: {}", line.map_err(anyhow::Error::msg)?);
    }
    Ok(())
}

fn metrics_and_command(world: &World) -> Result<()> {
    heading("Metrics of the agent on node a (http://127.0.0.1:15021/metrics in its namespace)");
    let wanted = ["nodemesh_connections_total", "nodemesh_bytes_total", "nodemesh_enrolled_workloads"];
    for line in world.agent("a").get("/metrics")?.body.lines() {
        if wanted.iter().any(|name| line.starts_with(name)) {
            println!("{line}");
        }
    }
    let to = world.workload("db").v4(8080).to_string();
    for arguments in [&["status"][..], &["get", "workloads"], &["why", "shop/web", &to]] {
        heading(&format!("meshctl {}", arguments.join(" ")));
        let output = world.meshctl(arguments)?;
        print!("{}{}", output.stdout, output.stderr);
    }
    Ok(())
}

/// How to go on from here.
fn poke(world: &World) -> Result<()> {
    let (web, db) = (world.workload("web"), world.workload("db"));
    let yaml = world.yaml.directory().display();
    let inside = format!("ip netns exec {}", web.netns.name());
    heading("Poke at it, from another terminal");
    println!("be a workload:       {inside} curl http://{}/", db.v4(8080));
    println!("look at the wire:    ip netns exec {} tcpdump -ni br0 tcp port 8080", world.wire().name());
    println!("refuse web at db:    cat > {yaml}/deny.yaml <<'END'\n{}END", deny(&web));
    println!("allow it again:      rm {yaml}/deny.yaml");
    println!("enrol old:           sed -i '/nodemesh.io.enroll/d' {yaml}/workload-old.yaml");
    let meshctl = mesh_tests::process::binaries()?.join("meshctl");
    let ctl = format!("ip netns exec {} {}", world.controller().netns().name(), meshctl.display());
    println!("ask why:             {ctl} why shop/web {}", db.v4(8080));
    if let Some(pid) = world.agent("a").pid() {
        println!(
            "kill node a's agent: kill -9 {pid}   (everything is refused until it is started again, in {} s)",
            DEAD.as_secs()
        );
    }
    println!("logs:                {}", world.directory().display());
    Ok(())
}

fn deny(web: &Workload) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: deny-web\nspec:\n  selector:\n    matchLabels:\n      app: db\n  action: Deny\n  rules:\n    - from:\n        - identities: [\"{}\"]\n",
        web.identity()
    )
}

/// Keeps the world until interrupted, and starts killed agents again after a while.
fn linger(world: &World, interrupts: &Receiver<()>) -> Result<()> {
    println!("\nCtrl-C ends it.");
    let mut dead: Vec<(String, Instant)> = vec![];
    loop {
        match interrupts.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return Err(Interrupted.into()),
        }
        for node in world.nodes() {
            let agent = world.agent(&node.name);
            let since = dead.iter().position(|(name, _)| *name == node.name);
            match since {
                None if !agent.is_running() => {
                    println!("node {}: the agent has ended; its workloads are refused everything", node.name);
                    dead.push((node.name.clone(), Instant::now()));
                }
                Some(place) if dead[place].1.elapsed() >= DEAD => {
                    agent.start()?;
                    agent.await_ready()?;
                    println!("node {}: the agent is back", node.name);
                    dead.swap_remove(place);
                }
                _ => {}
            }
        }
    }
}

/// The person has seen enough.
#[derive(Debug)]
struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// SIGINT and SIGTERM as messages. Blocked in this and all later threads; child processes get them as usual.
fn interrupts() -> Result<Receiver<()>> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("blocking signals")?;
    let (sender, receiver) = mpsc::channel();
    let wait = move || while signals.wait().is_ok() && sender.send(()).is_ok() {};
    thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(receiver)
}

fn interrupted(interrupts: &Receiver<()>) -> Result<()> {
    match interrupts.try_recv() {
        Err(TryRecvError::Empty) => Ok(()),
        Ok(()) | Err(TryRecvError::Disconnected) => Err(Interrupted.into()),
    }
}

fn shell(workload: &Workload, line: &str) -> Result<String> {
    workload.shell(line).with_context(|| format!("in {}: {line}", workload.name))
}

fn heading(text: &str) {
    println!("\n━━ {text}");
}
