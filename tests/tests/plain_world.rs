//! A world without a mesh: what the other tests stand on. If one of these fails, no failure elsewhere means anything.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::IpAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use mesh_tests::{Shape, World, apps, netns::NetNs, slot::Slot, until, wait::holds};
use nix::sched::{CloneFlags, setns};

fn pings_everywhere(shape: Shape) {
    let world = World::builder()
        .shape(shape)
        .rp_filter()
        .node("a")
        .node("b")
        .workload("shop/web", "a")
        .workload("shop/api", "a")
        .workload("shop/db", "b")
        .without_mesh()
        .build()
        .unwrap();
    let mut wire = world.capture().unwrap();
    let web = world.workload("web");
    for server in [world.workload("api"), world.workload("db")] {
        let app = server.serve(8080, apps::http(&server.name)).unwrap();
        for to in server.both(8080) {
            let answer = web.exchange(to, b"GET /in-the-clear HTTP/1.0\r\n\r\n").unwrap();
            let answer = String::from_utf8(answer).unwrap();
            let own: IpAddr = web.address.both().into_iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).unwrap();
            assert!(answer.contains(&format!("{} saw {own}", server.name)), "{answer}");
        }
        assert_eq!(app.peers().len(), 2);
    }
    let db = world.workload("db");
    for (own, to) in web.address.both().into_iter().zip(db.both(8080)) {
        let packets = wire.tcp_between(own, to.ip(), 8080).unwrap();
        assert_eq!(packets.iter().filter(|packet| packet.opens).count(), 1, "{packets:#?}");
        assert!(packets.iter().any(|packet| packet.contains(b"GET /in-the-clear")), "{packets:#?}");
        assert!(!packets.iter().any(|packet| packet.is_client_hello()));
    }
    let api = world.workload("api");
    assert!(wire.tcp_between(web.address.v4.into(), api.address.v4.into(), 8080).unwrap().is_empty());
}

#[test]
fn routed_workloads_reach_each_other() {
    pings_everywhere(Shape::Routed);
}

#[test]
fn bridged_workloads_reach_each_other() {
    pings_everywhere(Shape::Bridge);
}

#[test]
fn a_refused_connection_is_refused_and_the_node_firewall_decides() {
    let world = World::builder()
        .shape(Shape::Bridge)
        .node("a")
        .workload("shop/web", "a")
        .workload("shop/api", "a")
        .without_mesh()
        .build()
        .unwrap();
    let (web, api) = (world.workload("web"), world.workload("api"));
    let refused = web.connect(api.v4(8080)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let _app = api.serve(8080, apps::echo()).unwrap();
    assert_eq!(web.exchange(api.v4(8080), b"x").unwrap(), b"x");
    // Both hang on one bridge: only br_netfilter shows their frames to iptables.
    let rule = "iptables -I FORWARD -p tcp --dport 8080 -j REJECT --reject-with tcp-reset";
    world.node("a").netns.shell(rule).unwrap();
    assert!(web.connect(api.v4(8080)).is_err());
}

#[test]
fn nothing_is_left_behind() {
    let world = World::builder()
        .node("a")
        .workload("shop/web", "a")
        .workload("shop/api", "a")
        .without_mesh()
        .build()
        .unwrap();
    let directory = world.directory().to_owned();
    let prefix = format!("{}-", directory.file_name().unwrap().to_string_lossy());
    let names = || -> Vec<String> {
        let entries = fs::read_dir("/run/netns").unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(&prefix)).collect()
    };
    // Wire, node and two workloads; then one workload less.
    assert_eq!(names().len(), 4);
    let mut inside = world.workload("api").command("sleep").arg("1000").spawn().unwrap();
    world.remove_workload("web").unwrap();
    assert_eq!(names().len(), 3);
    drop(world);
    assert!(names().is_empty() && !directory.exists());
    until("the program inside has ended", Duration::from_secs(5), || {
        holds(inside.try_wait().unwrap().is_some(), || "it runs".into())
    });
}

/// Set for the run of this program that is to crash.
const CRASH: &str = "NODEMESH_TEST_CRASH";

/// The program runs itself, builds a world there with a process inside, and is killed; the next world removes all of
/// it, processes included.
#[test]
fn the_next_world_removes_what_a_crashed_run_left() {
    let build = || World::builder().node("a").workload("shop/web", "a").without_mesh().build().unwrap();
    if std::env::var_os(CRASH).is_some() {
        let world = build();
        let inside = world.workload("web").command("sleep").arg("1000").spawn().unwrap();
        fs::write(
            std::env::var_os(CRASH).unwrap(),
            format!("{} {}", world.directory().display(), inside.id()),
        )
        .unwrap();
        std::process::abort();
    }
    let told = std::env::temp_dir().join(format!("nodemesh-crash-{}", std::process::id()));
    let mut crashing = Command::new(std::env::current_exe().unwrap());
    crashing.args(["--exact", "the_next_world_removes_what_a_crashed_run_left"]).env(CRASH, &told);
    assert!(!crashing.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let left = fs::read_to_string(&told).unwrap();
    fs::remove_file(&told).unwrap();
    let (directory, inside) = left.split_once(' ').unwrap();

    let world = build();
    let taken_again = world.directory() == Path::new(directory);
    assert!(taken_again || !Path::new(directory).exists(), "{directory} is still there");
    until("the process of the crashed run is gone", Duration::from_secs(5), || {
        // A killed process stays listed until its parent, now process 1, has read its status.
        let status = fs::read_to_string(format!("/proc/{inside}/status")).unwrap_or_default();
        holds(status.is_empty() || status.contains("State:\tZ"), || status)
    });
}

/// Set for the run of this program that looks into a namespace: the namespace that it comes from.
const LOOKS: &str = "NODEMESH_TEST_LOOKS";

/// Agents look for addresses in all namespaces of the machine, also in those of a world that goes meanwhile. Here it is
/// this program itself that has one thread inside for so long, its first one, and another where it belongs.
#[test]
fn who_only_looks_into_a_namespace_outlives_its_world_and_who_lives_there_does_not() {
    if let Some(home) = std::env::var_os(LOOKS) {
        let home = File::open(home).unwrap();
        let elsewhere = std::thread::spawn(move || {
            setns(&home, CloneFlags::CLONE_NEWNET).unwrap();
            std::io::stderr().write_all(b"!").unwrap();
            std::io::stdin().read_exact(&mut [0]).unwrap();
        });
        return elsewhere.join().unwrap();
    }
    let slot = Slot::take().unwrap();
    let namespace = NetNs::create(&format!("{}-web", slot.prefix()), false).unwrap();
    let mut lives = namespace.command("sleep").arg("1000").spawn().unwrap();
    let mut looking = namespace.command(std::env::current_exe().unwrap());
    looking
        .args(["--exact", "who_only_looks_into_a_namespace_outlives_its_world_and_who_lives_there_does_not"]);
    looking
        .args(["--nocapture", "--test-threads=2"])
        .env(LOOKS, format!("/proc/{}/ns/net", std::process::id()));
    let mut looks =
        looking.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    looks.stderr.as_mut().unwrap().read_exact(&mut [0]).unwrap();

    slot.sweep().unwrap();
    until("who lives there is gone", Duration::from_secs(5), || {
        holds(lives.try_wait().unwrap().is_some(), || "it runs".into())
    });
    assert!(NetNs::open(namespace.name()).is_err(), "the namespace has a name");
    looks.stdin.take().unwrap().write_all(b"!").unwrap();
    assert!(looks.wait().unwrap().success(), "who only looked was ended with the world");
}
