//! What an operator does to agents and controller, and what they take of a machine.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    time::Duration,
};

use mesh_agent::privileges::NEEDED;
use mesh_tests::{WorkloadSpec, World, agent::Agent, apps, until, wait::holds, workload::TIMEOUT};
use serde_json::{Value, json};

/// What the issue gives the agent to repair.
const REPAIR: Duration = Duration::from_secs(5);

/// The capability sets of all threads of a process, as `/proc` prints them.
fn capabilities(pid: u32) -> Vec<BTreeMap<String, u64>> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let sets = |thread: fs::DirEntry| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap();
        let set = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_owned(), u64::from_str_radix(value.trim(), 16).ok()?))
        };
        let wanted = |line: &&str| line.starts_with("Cap") || line.starts_with("NoNewPrivs");
        status.lines().filter(wanted).filter_map(set).collect()
    };
    threads.map(|thread| sets(thread.unwrap())).collect()
}

#[test]
fn the_agent_keeps_the_documented_capabilities_only_and_everything_works() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let needed: u64 = NEEDED.iter().map(|(capability, _)| capability.bitmask()).sum();
    let check = || {
        for thread in capabilities(world.agent("a").pid().unwrap()) {
            for set in ["CapEff", "CapPrm", "CapBnd"] {
                assert_eq!(thread[set], needed, "{set}: {thread:x?}");
            }
            assert_eq!((thread["CapInh"], thread["CapAmb"], thread["NoNewPrivs"]), (0, 0, 1), "{thread:x?}");
        }
    };
    check();
    assert_eq!(web.exchange(db.v4(8080), b"x").unwrap(), b"x");

    // A workload that comes, something to repair, and a restart: each needs what was kept.
    let more = world.add_workload(&WorkloadSpec::new("shop/more", "a")).unwrap();
    world.agent("a").await_enrolled(3, TIMEOUT).unwrap();
    world.await_tunnel(&more, &db).unwrap();
    let rules = || web.shell("ip -4 rule").unwrap();
    let whole = rules();
    let removed = web.shell("ip -4 rule | grep -c fwmark").unwrap();
    assert_ne!(removed.trim(), "0", "{whole}");
    web.shell("ip -4 rule | grep fwmark | cut -d: -f1 | xargs -n1 ip -4 rule del pref").unwrap();
    until("the rules are put back", REPAIR, || holds(rules() == whole, rules));
    world.agent("a").stop().unwrap();
    world.agent("a").start().unwrap();
    world.agent("a").await_ready().unwrap();
    check();
    world.await_tunnel(&web, &db).unwrap();
}

/// Everything of a namespace that an agent could leave something in.
fn traces(shell: impl Fn(&str) -> String) -> String {
    [
        "ip -4 rule; ip -6 rule",
        // Neighbours and counters change by themselves; addresses, links, routes do not.
        "ip -4 route show table all | sort; ip -6 route show table all | grep -v '^multicast' | sort",
        "ip -o link | sed 's/state [A-Z]*//' | sort",
        "ls /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf",
        "grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf 2>/dev/null | grep -v stable_secret | sort",
        "ss -Hltn | awk '{print $4}' | sort",
    ]
    .map(shell)
    .join("\n--\n")
}

/// Lines of the one that the other does not have.
fn difference(before: &str, after: &str) -> Vec<String> {
    let lacks = |text: &str, line: &str| !text.lines().any(|it| it == line);
    let gone = before.lines().filter(|line| lacks(after, line)).map(|line| format!("- {line}"));
    gone.chain(after.lines().filter(|line| lacks(before, line)).map(|line| format!("+ {line}"))).collect()
}

fn present(path: &Path) -> bool {
    path.exists()
}

#[test]
fn uninstall_leaves_the_machine_as_it_was_before() {
    let old = WorkloadSpec::new("shop/late", "a").outside();
    let world = World::shop().with(old).build().unwrap();
    let late = world.workload("late");
    let inside = || traces(|line| late.shell(line).unwrap());
    let before = inside();
    world.write_workload(&WorkloadSpec::new("shop/late", "a")).unwrap();
    world.agent("a").await_enrolled(3, TIMEOUT).unwrap();
    assert_ne!(difference(&before, &inside()), Vec::<String>::new(), "enrolment shows");
    assert!(present(world.agent("a").bpffs()));
    world.agent("a").stop().unwrap();
    world.agent("a").uninstall().unwrap();
    assert_eq!(difference(&before, &inside()), Vec::<String>::new(), "nothing is left in the workload");
    assert!(!present(world.agent("a").bpffs()) && !present(world.agent("a").run_dir()));
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let cgroup = Path::new(root).join(world.agent("a").cgroup());
        assert!(!present(&cgroup), "{} is left", cgroup.display());
    }
}

/// What `meshctl connections` shows on an agent's node.
fn connections(agent: &Agent, arguments: &[&str]) -> Result<Value, String> {
    let shown = agent.meshctl(&[&["--output", "json", "connections"], arguments].concat());
    let shown = shown.map_err(|error| format!("{error:#}"))?;
    serde_json::from_str(&shown.stdout).map_err(|error| format!("{error}: {shown:?}"))
}

/// Sends as many bytes and reads them back.
fn echoed(stream: &mut TcpStream, bytes: usize) {
    stream.write_all(&vec![7; bytes]).unwrap();
    stream.read_exact(&mut vec![0; bytes]).unwrap();
}

#[test]
fn a_live_connection_is_shown_with_its_bytes_and_is_gone_when_it_ends() {
    let world = World::shop().service("shop/db", "db", 80, 8080).build().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let [a, b] = ["a", "b"].map(|node| world.agent(node));
    let service = world.service("shop/db").v4;

    let mut through_service = web.connect((service, 80).into()).unwrap();
    echoed(&mut through_service, 5000);
    let ends = |service: Value| {
        let address = |address| format!("{address}");
        let mut destination =
            json!({"workload": "shop/db", "identity": db.identity(), "address": address(db.v4(8080))});
        if !service.is_null() {
            destination["service"] = service;
        }
        let source = address(through_service.local_addr().unwrap());
        let source = json!({"workload": "shop/web", "identity": web.identity(), "address": source});
        (source, destination)
    };
    for (agent, node, direction, service) in
        [(a, "a", "outbound", json!("shop/db")), (b, "b", "inbound", Value::Null)]
    {
        let (source, destination) = ends(service);
        let shown = until(&format!("it is shown on {node}"), TIMEOUT, || {
            let shown = connections(agent, &["shop/web"])?;
            let row = &shown["connections"][0];
            holds(row["bytes_sent"] == 5000 && row["bytes_received"] == 5000, || shown.to_string())?;
            Ok(shown)
        });
        assert_eq!((&shown["node"], &shown["total"]), (&json!(node), &json!(1)), "{shown}");
        let row = &shown["connections"][0];
        assert_eq!((&row["source"], &row["destination"]), (&source, &destination), "{shown}");
        assert_eq!((&row["direction"], &row["transport"]), (&json!(direction), &json!("tunnel")), "{shown}");
        assert_eq!(row["state"], "open", "{shown}");
    }
    echoed(&mut through_service, 100);
    until("its bytes go on", TIMEOUT, || {
        let shown = connections(a, &[])?;
        holds(shown["connections"][0]["bytes_received"] == 5100, || shown.to_string())
    });

    // More than what is asked for, and a table that says so; another workload's are not those of this one.
    let others: Vec<TcpStream> = (0..3).map(|_| api.connect(db.v6(8080)).unwrap()).collect();
    until("four are open", TIMEOUT, || {
        let shown = connections(b, &["shop/db"])?;
        holds(shown["total"] == 4, || shown.to_string())
    });
    let cut = b.meshctl(&["connections", "--limit", "2"]).unwrap().stdout;
    assert!(cut.contains("the newest 2 of 4") && cut.matches("inbound").count() == 2, "{cut}");
    assert_eq!(connections(a, &["shop/web"]).unwrap()["total"], 1);
    let wrong = a.meshctl(&["connections", "web"]).unwrap();
    assert!(!wrong.success && wrong.stderr.contains("NAMESPACE/NAME"), "{wrong:?}");

    drop((through_service, others));
    for agent in [a, b] {
        until("all are gone", TIMEOUT, || {
            let shown = connections(agent, &[])?;
            holds(shown["total"] == 0 && shown["connections"] == json!([]), || shown.to_string())
        });
    }
}

#[test]
fn how_full_maps_are_is_counted_and_in_the_controllers_status() {
    let world = World::shop().build().unwrap();
    let agent = world.agent("a");
    until("what was enrolled is counted", 2 * TIMEOUT, || {
        let metrics = agent.metrics().map_err(|error| format!("{error:#}"))?;
        let map = |map| {
            ["entries", "limit"].map(|it| metrics.sum(&format!("nodemesh_kernel_map_{it}"), &[("map", map)]))
        };
        // Two workloads, each with an address of either family, and two directions.
        let counted = [map("guarded"), map("sources"), map("listeners"), map("destinations")];
        let expected = [[2.0, 1024.0], [4.0, 4096.0], [8.0, 4096.0], [6.0, 65536.0]];
        holds(counted == expected, || format!("{counted:?}"))
    });
    until("the controller has heard of it", TIMEOUT, || {
        let status = world.meshctl(&["--output", "json", "status"]).map_err(|error| format!("{error:#}"))?;
        let status: Value = serde_json::from_str(&status.stdout).map_err(|error| error.to_string())?;
        let fills = status["agents"][0]["fills"].as_array().cloned().unwrap_or_default();
        let wanted = json!({"what": "kernel_map_listeners", "entries": 8, "limit": 4096});
        holds(fills.contains(&wanted), || status.to_string())
    });
    assert!(world.meshctl(&["status"]).unwrap().stdout.contains("FULLEST"));
}

#[test]
fn a_nodes_bundle_has_its_view_and_no_key() {
    let world = World::shop().build().unwrap();
    let agent = world.agent("a");
    let file = world.directory().join("bundle.tar.gz");
    let made = agent.meshctl(&["bundle", file.to_str().unwrap()]).unwrap();
    assert!(made.success, "{made:?}");
    let output = std::process::Command::new("tar").arg("-xzOf").arg(&file).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let all = output.stdout;
    let has = |part: &[u8]| all.windows(part.len()).any(|window| window == part);
    for part in ["\"policies\":[]", "shop/db", "kernel_map_destinations", "nodemesh_kernel_map_entries"] {
        assert!(has(part.as_bytes()), "{part} is not in it");
    }
    let mut secrets: Vec<Vec<u8>> = vec![b"PRIVATE KEY".to_vec()];
    secrets.push(fs::read(world.directory().join("token-a")).unwrap().trim_ascii().to_vec());
    let mut folders = vec![agent.run_dir().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let content: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap_or_default();
            let Some(hex) = content["key_pkcs8"].as_str() else { continue };
            let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            secrets.push(hex.as_bytes().to_vec());
            secrets.push((0..hex.len()).step_by(2).map(digit).collect());
        }
    }
    assert!(secrets.len() >= 8, "the node's key and its two workloads', each in two forms");
    assert!(secrets.iter().all(|secret| !secret.is_empty() && !has(secret)), "a secret is in it");
}
