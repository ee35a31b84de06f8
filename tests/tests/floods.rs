//! One workload asks for all there is, or the agent has little to give: what is too much is refused and says why, what
//! others ask for is served, and afterwards everything is as before.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use mesh_core::refusal::Reason;
use mesh_tests::{
    Workload, WorkloadSpec, World,
    agent::Agent,
    apps,
    load::{Load, short},
    log, until,
    wait::holds,
    workload::TIMEOUT,
};
use socket2::SockRef;

/// Open files of an agent that may open few: it has about as many without a connection as it then may have for them.
const FEW_FILES: u64 = 192;
/// Connections of a flood on such an agent, or on one with few files left.
const FLOOD: usize = 300;
/// Files that are left to an agent whose limit falls while it runs.
const LEFT: u64 = 20;
/// Connections that others make while there is a flood.
const OTHERS: usize = 100;

/// A connection that has carried a byte each way.
fn speak(from: &Workload, to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = from.connect(to)?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

/// Opens connections and keeps those that are served; the others must be refused, none left without an answer.
fn flood(from: &Workload, to: SocketAddr) -> (Vec<TcpStream>, usize) {
    let (mut held, mut refused) = (vec![], 0);
    for n in 0..FLOOD {
        match speak(from, to) {
            Ok(stream) => held.push(stream),
            Err(error) => {
                let kinds = [ErrorKind::ConnectionReset, ErrorKind::ConnectionRefused, ErrorKind::BrokenPipe];
                assert!(
                    kinds.contains(&error.kind()),
                    "connection {n} is neither served nor refused: {error}"
                );
                refused += 1;
            }
        }
    }
    (held, refused)
}

fn open_files(agent: &Agent) -> u64 {
    fs::read_dir(format!("/proc/{}/fd", agent.pid().unwrap())).unwrap().count() as u64
}

/// The limit of open files of a process that runs.
fn set_limit(pid: u32, files: u64) {
    let limit = libc::rlimit { rlim_cur: files, rlim_max: files };
    // SAFETY: the pointer is to a limit that lives for the call, and nothing is asked back.
    let result = unsafe {
        libc::prlimit(pid.cast_signed(), libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut())
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Floods db, whose agent has few files: it goes on, says what to raise, and is as before when the flood ends.
fn assert_flood_is_refused_and_over_afterwards(world: &World) {
    let (web, db) = (world.workload("web"), world.workload("db"));
    let agent = world.agent("b");
    let pid = agent.pid();
    let to = db.v4(8080);
    let mut before = until("a first connection", TIMEOUT, || speak(&web, to).map_err(|e| e.to_string()));

    let (held, refused) = flood(&web, to);
    assert!(refused > 0 && !held.is_empty(), "{refused} refused, {} served", held.len());
    agent.wait_log("the refusal", log::refused(log::INBOUND, Reason::LimitDescriptors));
    before.write_all(b"x").unwrap();
    before.read_exact(&mut [0]).unwrap();
    drop(held);

    until("connections are served as before", TIMEOUT, || {
        (0..20).try_for_each(|n| speak(&web, to).map(drop).map_err(|error| format!("{n}: {error}")))
    });
    let metrics = agent.metrics().unwrap();
    assert!(metrics.sum("nodemesh_limit_hits_total", &[("limit", "descriptors")]) > 0.0, "it is not counted");
    until("nothing is unprotected", TIMEOUT, || {
        let unprotected =
            agent.metrics().map_err(|e| e.to_string())?.sum("nodemesh_unprotected_workloads", &[]);
        holds(unprotected == 0.0, || format!("{unprotected} unprotected"))
    });
    assert_eq!(agent.pid(), pid, "it is the same process");
    assert!(agent.is_running());
}

#[test]
fn an_agent_that_may_open_few_files_refuses_what_is_too_much_and_comes_back() {
    let world = World::shop().build().unwrap();
    let _app = world.workload("db").serve(8080, apps::echo()).unwrap();
    let agent = world.agent("b");
    agent.stop().unwrap();
    agent.start_with_files(FEW_FILES).unwrap();
    agent.await_ready().unwrap();
    agent.await_enrolled(1, TIMEOUT).unwrap();
    assert_flood_is_refused_and_over_afterwards(&world);
}

/// Not one descriptor is left for what waits in the listeners: it is refused all the same.
#[test]
fn an_agent_without_a_file_left_refuses_at_once_and_comes_back() {
    let world = World::shop().build().unwrap();
    let _app = world.workload("db").serve(8080, apps::echo()).unwrap();
    let agent = world.agent("b");
    set_limit(agent.pid().unwrap(), open_files(agent) + LEFT);
    assert_flood_is_refused_and_over_afterwards(&world);
}

/// Connections that come and go as fast as they can, connections that are held, and handshakes that never end, all to
/// the one workload that others speak to as well: none of theirs is refused, lost or left waiting.
#[test]
fn a_flood_of_connections_and_handshakes_costs_no_other_workload_a_connection() {
    let world = World::shop().with(WorkloadSpec::new("shop/stranger", "a").outside()).build().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let stranger = world.workload("stranger");
    let _app = db.serve(8080, apps::echo()).unwrap();
    let to = db.v4(8080);

    let mut flood = Load::new();
    for _ in 0..4 {
        flood.run("a flood's", &api, to, |from, to| {
            // A reset leaves no port behind.
            speak(from, to).and_then(|stream| SockRef::from(&stream).set_linger(Some(Duration::ZERO)))
        });
    }
    let held: Vec<TcpStream> = (0..FLOOD).map(|_| speak(&api, to).unwrap()).collect();
    let unfinished: Vec<TcpStream> = (0..FLOOD)
        .map(|_| {
            let mut stream = stranger.connect(to).unwrap();
            // The first bytes of a ClientHello.
            stream.write_all(&[22, 3, 1, 0, 200, 1, 0, 0, 196]).unwrap();
            stream
        })
        .collect();
    let mut others = Load::new();
    others.run("another's", &web, to, short);
    others.run("another's, IPv6", &web, db.v6(8080), short);
    others.await_more(OTHERS);
    others.finish();
    flood.await_more(OTHERS);
    flood.finish();
    drop((held, unfinished));
}
