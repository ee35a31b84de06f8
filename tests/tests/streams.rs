//! Byte-exact for everything that TCP can do: half close, reset, nothing at all, much, the server first, thousands idle.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use mesh_ebpf::abi::INNER_PORTS;
use mesh_tests::{
    Server, Workload, World, apps,
    apps::Handler,
    until,
    wait::{holds, scaled},
    workload::TIMEOUT,
};
use socket2::SockRef;

const BULK: usize = 40 << 20;
/// The longest that the end of one side may take to be seen by the other.
const SOON: Duration = Duration::from_secs(2);

/// A client on node a and a server on each side of the wire: everything holds on one node and between two.
struct Pair {
    world: World,
    web: Workload,
    servers: [Workload; 2],
}

fn pair() -> Pair {
    let world = World::shop().build().unwrap();
    Pair { web: world.workload("web"), servers: ["api", "db"].map(|name| world.workload(name)), world }
}

impl Pair {
    /// Runs `check` against a server of each place and family.
    fn each(&self, handler: &Handler, check: impl Fn(TcpStream)) {
        for server in &self.servers {
            let _app = server.serve(8080, handler.clone()).unwrap();
            for to in server.both(8080) {
                check(self.web.connect(to).unwrap());
            }
        }
    }
}

/// A server that hands its connections to the test.
fn handed(server: &Workload) -> (Server, mpsc::Receiver<TcpStream>) {
    let (sender, receiver) = mpsc::channel();
    let hand = move |stream: TcpStream| {
        stream.set_read_timeout(Some(scaled(TIMEOUT)))?;
        sender.send(stream).map_err(std::io::Error::other)
    };
    (server.serve(8080, Arc::new(hand)).unwrap(), receiver)
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

#[track_caller]
fn assert_reset(stream: &mut TcpStream) {
    let started = Instant::now();
    let error = stream.read(&mut [0; 1]).expect_err("a reset, not an orderly end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(started.elapsed() < scaled(SOON), "the reset took {:?}", started.elapsed());
}

#[test]
fn the_client_ends_its_half_and_still_gets_the_answer() {
    pair().each(&apps::hasher(), |mut stream| {
        let sent = apps::noise(100_000);
        stream.write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, apps::hash(&mut sent.as_slice()).unwrap());
    });
}

#[test]
fn the_server_ends_its_half_and_still_hears_the_client() {
    let pair = pair();
    for server in &pair.servers {
        let (_app, accepted) = handed(server);
        for to in server.both(8080) {
            let mut client = pair.web.connect(to).unwrap();
            let mut served = accepted.recv_timeout(TIMEOUT).unwrap();
            served.write_all(b"that is all").unwrap();
            served.shutdown(Shutdown::Write).unwrap();
            let mut heard = vec![];
            client.read_to_end(&mut heard).unwrap();
            assert_eq!(heard, b"that is all");
            client.write_all(b"not for me").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut heard = vec![];
            served.read_to_end(&mut heard).unwrap();
            assert_eq!(heard, b"not for me");
        }
    }
}

#[test]
fn a_reset_of_either_side_is_a_reset_at_the_other() {
    let pair = pair();
    for server in &pair.servers {
        let (_app, accepted) = handed(server);
        for to in server.both(8080) {
            for client_resets in [true, false] {
                let mut client = pair.web.connect(to).unwrap();
                client.write_all(b"x").unwrap();
                let mut served = accepted.recv_timeout(TIMEOUT).unwrap();
                served.read_exact(&mut [0; 1]).unwrap();
                if client_resets {
                    reset(client);
                    assert_reset(&mut served);
                } else {
                    reset(served);
                    assert_reset(&mut client);
                }
            }
        }
    }
}

/// The server does not read, so its side is full; the client's reset must come through all the same.
#[test]
fn a_reset_is_seen_while_the_other_direction_is_blocked() {
    let pair = pair();
    for server in &pair.servers {
        let (_app, accepted) = handed(server);
        let client = pair.web.connect(server.v4(8080)).unwrap();
        client.set_nonblocking(true).unwrap();
        let served = accepted.recv_timeout(TIMEOUT).unwrap();
        let block = vec![7; 1 << 20];
        // Full when a second passes without room for a byte.
        let mut last = Instant::now();
        until("every buffer on the way is full", 3 * TIMEOUT, || {
            if (&client).write(&block).is_ok() {
                last = Instant::now();
            }
            holds(last.elapsed() > Duration::from_secs(1), || "there is room".into())
        });
        reset(client);
        until("the reset arrives", SOON, || {
            let error = SockRef::from(&served).take_error().unwrap();
            holds(error.is_some_and(|e| e.kind() == ErrorKind::ConnectionReset), || "no error yet".into())
        });
    }
}

#[test]
fn a_connection_without_a_byte_ends_in_order() {
    pair().each(&apps::echo(), |mut stream| {
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    });
}

#[test]
fn the_server_speaks_first() {
    pair().each(&apps::greeter("220 mail.shop ready\r\n"), |mut stream| {
        let mut greeting = [0; 21];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"220 mail.shop ready\r\n");
        stream.write_all(b"HELO\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "you said: HELO\n");
    });
}

/// As a server's own TIME_WAIT allows it (RFC 6191): the agent's socket in the client's namespace is the one that
/// waits here.
#[test]
fn a_client_may_use_its_port_again_at_once_when_the_server_ended_first() {
    let pair = pair();
    for server in &pair.servers {
        let _app = server.serve(8080, apps::namer("again")).unwrap();
        for to in server.both(8080) {
            for _ in 0..5 {
                let mut said = String::new();
                // Its own kernel keeps the port until the last FIN is acknowledged.
                let mut stream =
                    until("the port is free", TIMEOUT, || match pair.web.connect_from(7000, to) {
                        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => Err(error.to_string()),
                        other => Ok(other),
                    });
                stream.as_mut().unwrap().read_to_string(&mut said).unwrap();
                assert_eq!(said, "again");
            }
        }
    }
}

#[test]
fn forty_megabytes_either_way_are_the_same_bytes() {
    let pair = pair();
    let sent = apps::noise(BULK);
    let sum = apps::hash(&mut sent.as_slice()).unwrap();
    pair.each(&apps::hasher(), |mut stream| {
        stream.write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, sum, "upload");
    });
    pair.each(&apps::source(BULK), |mut stream| {
        assert_eq!(apps::hash(&mut stream).unwrap(), sum, "download");
    });
}

#[test]
fn forty_megabytes_both_ways_at_once_are_the_same_bytes() {
    let pair = pair();
    let sent = apps::noise(BULK);
    pair.each(&apps::echo(), |stream| {
        let mut reader = stream.try_clone().unwrap();
        let reading = std::thread::spawn(move || apps::hash(&mut reader).unwrap());
        (&stream).write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(reading.join().unwrap(), apps::hash(&mut sent.as_slice()).unwrap());
    });
}

/// Many connections one after the other: leases are returned and taken again, and no byte of one is another's.
#[test]
fn a_thousand_connections_in_turn_get_their_own_bytes() {
    let pair = pair();
    let db = &pair.servers[1];
    let _app = db.serve(8080, apps::echo()).unwrap();
    for round in 0..1000 {
        let text = format!("round {round}");
        let answer = pair.web.exchange(db.v4(8080), text.as_bytes());
        assert_eq!(answer.unwrap_or_else(|e| panic!("round {round}: {e}")), text.as_bytes());
    }
    let metrics = pair.world.agent("a").metrics().unwrap();
    let handshakes = metrics.sum("nodemesh_handshakes_total", &[]);
    assert!(handshakes < 500.0, "leases are not used again: {handshakes} handshakes");
}

/// A workload may take its local ports from where it likes; tunnels stay away from those of the connections inside.
#[test]
fn a_workload_with_any_range_of_local_ports_gets_its_connections() {
    let pair = pair();
    let [web, db] = [&pair.web, &pair.servers[1]];
    for (port, range) in [(8081, "10000 65535"), (8082, "1024 32100"), (8083, "10000 31999")] {
        // A port for each range, so that none goes through a tunnel that the last one has left behind.
        let _app = db.serve(port, apps::echo()).unwrap();
        web.netns.sysctl("net/ipv4/ip_local_port_range", range).unwrap();
        let mut wire = pair.world.capture().unwrap();
        // One after the other, so that an emulated machine has done one handshake before the next; and all are kept, so
        // that none goes through the tunnel of another.
        let connect = |n: usize| {
            let mut stream = web.connect(db.both(port)[n % 2])?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            std::io::Result::Ok(stream)
        };
        let _open: Vec<TcpStream> =
            (0..60).map(|n| connect(n).unwrap_or_else(|e| panic!("{range}, connection {n}: {e}"))).collect();
        let tunnels =
            wire.packets().unwrap().iter().filter(|packet| packet.opens && packet.destination.port() == port);
        let ports: Vec<u16> = tunnels.map(|packet| packet.source.port()).collect();
        assert!(ports.len() >= 60, "{range}: only {} tunnels", ports.len());
        let inner: Vec<&u16> = ports.iter().filter(|port| INNER_PORTS.contains(port)).collect();
        assert!(inner.is_empty(), "{range}: tunnels from {inner:?}");
    }
}

#[test]
fn two_thousand_idle_connections_all_still_work() {
    raise_open_files();
    let pair = pair();
    let db = &pair.servers[1];
    let _app = db.serve(8080, apps::echo()).unwrap();
    let wake = |n: usize, stream: &mut TcpStream| {
        stream.write_all(b"awake?").unwrap_or_else(|e| panic!("connection {n}: {e}"));
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap_or_else(|e| panic!("connection {n}: {e}"));
        assert_eq!(&answer, b"awake?");
    };
    let mut open: Vec<TcpStream> = vec![];
    for n in 0..2000 {
        open.push(pair.web.connect(db.v4(8080)).unwrap_or_else(|e| panic!("connection {n}: {e}")));
        // No more handshakes at once than a slow machine gets done in time.
        if open.len().is_multiple_of(100) {
            open.iter_mut().enumerate().skip(n + 1 - 100).for_each(|(n, stream)| wake(n, stream));
        }
    }
    open.iter_mut().enumerate().for_each(|(n, stream)| wake(n, stream));
    let active = |direction| {
        let metrics = pair.world.agent(if direction == "outbound" { "a" } else { "b" }).metrics().unwrap();
        metrics.sum("nodemesh_connections_active", &[("direction", direction)])
    };
    assert!(active("outbound") >= 2000.0 && active("inbound") >= 2000.0);
    drop(open);
    until("all are closed", 3 * TIMEOUT, || {
        let left = active("outbound") + active("inbound");
        holds(left == 0.0, || format!("{left} are open"))
    });
}

/// Two thousand connections have four thousand ends in this process.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    assert!(most >= 8192, "this test needs 8192 open files, and the hard limit is {most}");
}
