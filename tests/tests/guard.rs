//! What a workload with root in its namespace tries around the capture: refused out of its reach, counted, logged.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use mesh_ebpf::abi::AGENT_MARK;
use mesh_tests::{
    Workload, World, apps,
    manifests::{self, Enrolment, Mode},
    until,
    wait::{holds, scaled},
    workload::TIMEOUT,
};
use socket2::{Domain, Socket, Type};

fn refused(world: &World, reason: &str) -> f64 {
    world.agent("a").metrics().unwrap().sum("nodemesh_kernel_refused_total", &[("reason", reason)])
}

#[track_caller]
fn await_refused(world: &World, reason: &str, least: f64) {
    until(reason, TIMEOUT, || {
        let count = refused(world, reason);
        holds(count >= least, || format!("{count} counted, at least {least} expected"))
    });
}

#[test]
fn a_forged_mark_does_not_pass_for_the_agents() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let app = db.serve(8080, apps::echo()).unwrap();
    let mut wire = world.capture().unwrap();
    for to in db.both(8080) {
        let forge = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.set_mark(AGENT_MARK)?;
            socket.connect_timeout(&to.into(), TIMEOUT)
        };
        let error = web.netns.enter(forge).unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}: {error}");
    }
    await_refused(&world, "not_captured", 2.0);
    assert!(app.peers().is_empty(), "the application was reached");
    let opened = |p: &mesh_tests::wire::Packet| p.opens && web.address.both().contains(&p.source.ip());
    assert!(!wire.packets().unwrap().iter().any(opened), "a SYN left the node");
}

/// Sends one datagram from `source` inside a workload's namespace.
fn send(from: &Workload, source: SocketAddr, to: SocketAddr, text: &[u8]) {
    let send = || UdpSocket::bind(source)?.send_to(text, to);
    from.netns.enter(send).unwrap().unwrap();
}

/// What arrives until the datagram `end`, which must arrive; the path keeps the order.
fn received(socket: &UdpSocket, end: &[u8]) -> Vec<Vec<u8>> {
    socket.set_read_timeout(Some(scaled(TIMEOUT))).unwrap();
    let mut all = vec![];
    let mut buffer = [0; 4096];
    loop {
        let (n, _) = socket.recv_from(&mut buffer).expect("the last datagram arrives");
        if &buffer[..n] == end {
            return all;
        }
        all.push(buffer[..n].to_vec());
    }
}

fn any(to: SocketAddr) -> SocketAddr {
    let unspecified: IpAddr = if to.is_ipv4() { "0.0.0.0".parse().unwrap() } else { "::".parse().unwrap() };
    SocketAddr::new(unspecified, 0)
}

#[test]
fn spoofed_sources_are_dropped_counted_and_logged_sparingly() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    web.shell("ip addr add 10.99.99.99/32 dev lo; ip addr add fd99::99/128 dev lo nodad").unwrap();
    let spoofed: [SocketAddr; 2] = ["10.99.99.99:0".parse().unwrap(), "[fd99::99]:0".parse().unwrap()];
    for (to, spoofed) in db.both(9000).into_iter().zip(spoofed) {
        let socket = db.netns.enter(|| UdpSocket::bind(to)).unwrap().unwrap();
        for _ in 0..500 {
            send(&web, spoofed, to, b"spoofed");
        }
        send(&web, any(to), to, b"end");
        assert!(received(&socket, b"end").is_empty(), "a spoofed datagram arrived at {to}");
    }
    await_refused(&world, "spoofed_source", 1000.0);
    let log = world.agent("a").log();
    let lines = || fs::read_to_string(&log).unwrap().lines().filter(|l| l.contains("spoofed_source")).count();
    until("the refusals are in the agent's log", TIMEOUT, || holds(lines() > 0, || "no line".to_owned()));
    assert!(lines() < 100, "{} lines for 1000 packets", lines());
}

#[test]
fn a_strict_workload_sends_nothing_but_tcp_and_dns_to_the_mesh() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let to = db.v4(9000);
    let udp = db.netns.enter(|| UdpSocket::bind(to)).unwrap().unwrap();
    send(&web, any(to), to, b"end");
    assert!(received(&udp, b"end").is_empty(), "permissive: UDP passes");

    let text = manifests::namespace("shop", Enrolment::Enrolled, Mode::Strict);
    world.yaml.write("namespace-shop.yaml", &text).unwrap();
    let before = refused(&world, "not_tcp");
    until("the guard is strict", TIMEOUT, || {
        send(&web, any(to), to, b"secret");
        holds(refused(&world, "not_tcp") > before, || "still passes".to_owned())
    });
    let dns = db.netns.enter(|| UdpSocket::bind(db.v4(53))).unwrap().unwrap();
    let mut wire = world.capture().unwrap();
    send(&web, any(to), to, b"a secret of strict");
    send(&web, any(to), db.v4(53), b"end");
    assert!(received(&dns, b"end").is_empty());
    assert!(
        wire.plaintext(b"a secret of strict").unwrap().is_empty(),
        "UDP of a strict workload left its node"
    );
}

#[test]
fn fragments_do_not_pass() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    for to in db.both(9000) {
        let socket = db.netns.enter(|| UdpSocket::bind(to)).unwrap().unwrap();
        send(&web, any(to), to, &[7; 3000]);
        send(&web, any(to), to, b"end");
        assert!(received(&socket, b"end").is_empty(), "a fragmented datagram arrived at {to}");
    }
    await_refused(&world, "unparsable", 4.0);
}
