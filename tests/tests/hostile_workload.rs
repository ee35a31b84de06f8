//! A workload with root in its namespace tries everything that it can reach: each attempt is refused under its own
//! reason, and its neighbours notice nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
};

use mesh_ebpf::abi::{INNER_PORTS, MAX_PROBES};
use mesh_tests::{
    Server, Shape, Workload, World, apps,
    frame::{self, Mac},
    load::{Load, short},
    log,
    manifests::{Enrolment, Mode},
    netns::NetNs,
    until,
    wait::holds,
    wire::Capture,
    workload::{TIMEOUT, connect_in},
};
use socket2::{Domain, Socket, Type};

/// What a hostile frame carries, and what no neighbour may receive.
const SECRET: &[u8] = b"a secret of a strict workload";
const SYN: u8 = 0x02;
const PUSH_ACK: u8 = 0x18;

/// A strict shop on bridges, where workloads of a node share a link; `web` is hostile, `api` is its neighbour.
struct Scene {
    world: World,
    web: Workload,
    api: Workload,
    db: Workload,
    _apps: [Server; 3],
}

impl Scene {
    fn new() -> Self {
        let shop = World::shop().shape(Shape::Bridge).namespace("shop", Enrolment::Enrolled, Mode::Strict);
        let world = shop.build().unwrap();
        let [web, api, db] = ["web", "api", "db"].map(|name| world.workload(name));
        let _apps = [&web, &api, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
        Self { world, web, api, db, _apps }
    }

    /// The neighbours' connections, which go on whatever web does.
    fn neighbours(&self) -> Load {
        let mut load = Load::new();
        load.run("a neighbour's", &self.api, self.db.v4(8080), short);
        load.run("to a neighbour", &self.db, self.api.v6(8080), short);
        load
    }

    fn refused(&self, reason: &str) -> f64 {
        let labels = [("reason", reason)];
        self.world.agent("a").metrics().unwrap().sum("nodemesh_kernel_refused_total", &labels)
    }

    fn connections(&self, reason: &str) -> f64 {
        let labels = [("reason", reason)];
        self.world.agent("a").metrics().unwrap().sum("nodemesh_connections_total", &labels)
    }
}

fn v4(of: &Workload) -> IpAddr {
    of.address.v4.into()
}

fn v6(of: &Workload) -> IpAddr {
    of.address.v6.into()
}

/// What frames are made of.
struct Ends {
    own: Mac,
    neighbour: Mac,
    from: [IpAddr; 2],
    to: [IpAddr; 2],
}

impl Ends {
    fn frame(&self, ethertype: u16, payload: &[u8]) -> Vec<u8> {
        frame::ethernet(self.neighbour, self.own, ethertype, payload)
    }

    fn ipv4(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        self.frame(frame::IPV4, &frame::ip(self.from[0], self.to[0], protocol, 0, &[], payload))
    }

    fn ipv6(&self, next: u8, payload: &[u8]) -> Vec<u8> {
        self.frame(frame::IPV6, &frame::ip(self.from[1], self.to[1], next, 0, &[], payload))
    }

    fn data(&self) -> Vec<u8> {
        frame::tcp(40_000, 8080, PUSH_ACK, SECRET)
    }
}

/// Something that is tried.
struct Attack {
    what: &'static str,
    /// What it is refused as.
    reason: &'static str,
    make: fn(&Ends) -> Vec<u8>,
}

const fn attack(what: &'static str, reason: &'static str, make: fn(&Ends) -> Vec<u8>) -> Attack {
    Attack { what, reason, make }
}

const ATTACKS: &[Attack] = &[
    attack("a SYN past the capture", "not_captured", |e| e.ipv4(6, &frame::tcp(40_000, 8080, SYN, SECRET))),
    attack("data past the capture", "plaintext_of_strict", |e| e.ipv4(6, &e.data())),
    attack("data past the capture, IPv6", "plaintext_of_strict", |e| e.ipv6(6, &e.data())),
    attack("another's address", "spoofed_source", |e| {
        let other = IpAddr::from(Ipv4Addr::new(10, 99, 99, 99));
        e.frame(frame::IPV4, &frame::ip(other, e.to[0], 6, 0, &[], &e.data()))
    }),
    attack("the neighbour's address", "spoofed_source", |e| {
        e.frame(frame::IPV6, &frame::ip(e.to[1], e.to[1], 6, 0, &[], &e.data()))
    }),
    attack("another's hardware address", "spoofed_mac", |e| {
        let packet = frame::ip(e.from[0], e.to[0], 1, 0, &[], SECRET);
        frame::ethernet(e.neighbour, [2, 9, 9, 9, 9, 9], frame::IPV4, &packet)
    }),
    attack("a VLAN tag", "not_ip", |e| {
        let packet = frame::ip(e.from[0], e.to[0], 6, 0, &[], &e.data());
        e.frame(frame::VLAN, &[&[0, 5], &frame::IPV4.to_be_bytes()[..], &packet].concat())
    }),
    attack("two VLAN tags", "not_ip", |e| {
        let packet = frame::ip(e.from[0], e.to[0], 6, 0, &[], &e.data());
        let inner = [&[0, 6], &frame::IPV4.to_be_bytes()[..], &packet].concat();
        e.frame(frame::VLAN, &[&[0, 5], &frame::VLAN.to_be_bytes()[..], &inner].concat())
    }),
    attack("a protocol beside IP", "not_ip", |e| e.frame(0x88b5, SECRET)),
    attack("ARP for the neighbour's address", "spoofed_neighbour", |e| {
        let (IpAddr::V4(who), IpAddr::V4(to)) = (e.to[0], e.from[0]) else { unreachable!() };
        e.frame(frame::ARP, &[&frame::arp(who, e.own, to), SECRET].concat())
    }),
    attack("a neighbour advertisement for another's address", "spoofed_neighbour", |e| {
        let IpAddr::V6(target) = e.to[1] else { unreachable!() };
        e.ipv6(58, &[&[136, 0, 0, 0, 0x60, 0, 0, 0], &target.octets()[..], SECRET].concat())
    }),
    attack("a router advertisement", "spoofed_neighbour", |e| {
        e.ipv6(58, &[&[134, 0, 0, 0], SECRET].concat())
    }),
    attack("the first fragment", "unparsable", |e| {
        e.frame(frame::IPV4, &frame::ip(e.from[0], e.to[0], 6, 0x2000, &[], &e.data()))
    }),
    attack("a later fragment", "unparsable", |e| {
        e.frame(frame::IPV4, &frame::ip(e.from[0], e.to[0], 6, 0x0010, &[], SECRET))
    }),
    attack("a source route", "unparsable", |e| {
        let lsrr = [131, 7, 4, 10, 0, 0, 1, 0];
        e.frame(frame::IPV4, &frame::ip(e.from[0], e.to[0], 6, 0, &lsrr, &e.data()))
    }),
    attack("a fragment header", "unparsable", |e| {
        e.ipv6(44, &[&[6, 0, 0, 1, 0, 0, 0, 1], &e.data()[..]].concat())
    }),
    attack("destination options", "unparsable", |e| {
        e.ipv6(60, &[&[6, 0, 1, 4, 0, 0, 0, 0], &e.data()[..]].concat())
    }),
    attack("hop-by-hop options before TCP", "unparsable", |e| {
        e.ipv6(0, &[&[6, 0, 1, 4, 0, 0, 0, 0], &e.data()[..]].concat())
    }),
    attack("half a TCP header", "unparsable", |e| e.ipv4(6, &e.data()[..12])),
    attack("UDP", "not_tcp", |e| e.ipv4(17, &frame::udp(40_000, 8080, SECRET))),
    attack("UDP over IPv6", "not_tcp", |e| e.ipv6(17, &frame::udp(40_000, 8080, SECRET))),
    attack("SCTP", "not_tcp", |e| e.ipv4(132, SECRET)),
    attack("GRE", "not_tcp", |e| e.ipv4(47, SECRET)),
    attack("IP in IP", "not_tcp", |e| e.ipv4(4, &frame::ip(e.to[0], e.to[0], 6, 0, &[], &e.data()))),
];

#[test]
fn no_frame_made_by_hand_reaches_a_neighbour() {
    let scene = Scene::new();
    let Scene { web, api, .. } = &scene;
    let ends = Ends {
        own: frame::mac(&web.netns, "eth0").unwrap(),
        neighbour: frame::mac(&api.netns, "eth0").unwrap(),
        from: [v4(web), v6(web)],
        to: [v4(api), v6(api)],
    };
    let mut seen = Capture::start_at(&api.netns, "eth0").unwrap();
    let mut wire = scene.world.capture().unwrap();
    let load = scene.neighbours();
    // What is allowed does arrive, so that a silent capture means something.
    frame::send(&web.netns, "eth0", &[ends.ipv4(1, &frame::echo(SECRET))]).unwrap();
    until("ICMP arrives", TIMEOUT, || {
        holds(!seen.frames_with(SECRET).unwrap().is_empty(), || "not yet".to_owned())
    });
    let reasons: BTreeSet<&str> = ATTACKS.iter().map(|attack| attack.reason).collect();
    for reason in reasons {
        let before = scene.refused(reason);
        let tried: Vec<&Attack> = ATTACKS.iter().filter(|attack| attack.reason == reason).collect();
        for Attack { what, make, .. } in &tried {
            frame::send(&web.netns, "eth0", &vec![make(&ends); 3]).unwrap();
            for capture in [&mut seen, &mut wire] {
                assert!(capture.frames_with(SECRET).unwrap().is_empty(), "{what} got through");
            }
        }
        let all: Vec<&str> = tried.iter().map(|attack| attack.what).collect();
        until(&format!("{all:?} are refused as {reason}"), TIMEOUT, || {
            let count = scene.refused(reason) - before;
            #[expect(clippy::cast_precision_loss, reason = "a few frames")]
            let expected = 3.0 * all.len() as f64;
            holds(count >= expected, || format!("{count} of {expected}"))
        });
    }
    load.await_more(5);
    load.finish();
}

#[test]
fn the_agents_own_sockets_give_a_workload_nothing() {
    let scene = Scene::new();
    let load = scene.neighbours();
    let Scene { world, web, .. } = &scene;
    let listed = web.shell("ss -Hltn").unwrap();
    let listeners: Vec<SocketAddr> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3)?.parse().ok())
        .filter(|address: &SocketAddr| address.ip().is_loopback())
        .collect();
    assert_eq!(listeners.len(), 4, "two directions, two families: {listed}");
    let before = scene.connections("loop_to_listener");
    for listener in &listeners {
        web.assert_refused(*listener);
    }
    until("they are counted", TIMEOUT, || {
        let count = scene.connections("loop_to_listener") - before;
        holds(count >= 4.0, || format!("{count} of 4"))
    });
    // The admin port is on the node's loopback: in the workload's namespace it is another's, and nobody's.
    let node = world.node("a").address;
    for ip in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), node.v4.into(), node.v6.into()] {
        web.assert_refused(SocketAddr::new(ip, 15021));
    }
    load.await_more(5);
    load.finish();
}

#[test]
fn a_workload_sees_neither_pins_nor_maps() {
    let scene = Scene::new();
    let Scene { world, web, .. } = &scene;
    let pins = world.agent("a").bpffs().display().to_string();
    // As a container has it: its own users and mounts. A bpf file system that it mounts is its own, if it may at all.
    let look = format!(
        "umount -l /sys/fs/bpf; test ! -e {pins}; mkdir -p /tmp/nm && mount -t tmpfs none /tmp/nm && mkdir /tmp/nm/b && \
         {{ mount -t bpf bpf /tmp/nm/b; ls -A /tmp/nm/b; }}"
    );
    let seen =
        web.shell(&format!("unshare --user --map-root-user --mount sh -c '{look}' 2>/dev/null || true"));
    assert_eq!(seen.unwrap().trim(), "", "something is in a workload's own bpffs");
    // By id: asking for maps takes CAP_SYS_ADMIN of the machine, not of a namespace.
    let ask = || -> Result<(), std::io::Error> {
        let mut attributes = [0_u32; 3];
        // SAFETY: BPF_MAP_GET_NEXT_ID (12) reads and writes these twelve bytes alone.
        let result = unsafe { libc::syscall(libc::SYS_bpf, 12, attributes.as_mut_ptr(), 12) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    assert!(ask().is_ok(), "the machine's root may");
    let as_workload = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        // Capabilities are a thread's: this one gives up what a container's root does not have on the machine.
        // SAFETY: setresuid of the thread alone, by the system call itself.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        ask()
    });
    assert_eq!(as_workload.join().unwrap().unwrap_err().kind(), ErrorKind::PermissionDenied);
}

#[test]
fn a_nested_namespace_is_the_workload_or_nobody() {
    let scene = Scene::new();
    let load = scene.neighbours();
    let Scene { web, api, db, .. } = &scene;
    let nested = NetNs::create(&format!("{}-nested", web.netns.name()), false).unwrap();
    let mut seen = Capture::start_at(&api.netns, "eth0").unwrap();
    // A macvlan has an address of its own on the link.
    let to = api.address.v4;
    let neighbour = frame::mac(&api.netns, "eth0").unwrap().map(|byte| format!("{byte:02x}")).join(":");
    web.shell(&format!(
        "ip link add link eth0 name mv0 type macvlan mode bridge && ip link set mv0 netns {}",
        nested.name()
    ))
    .unwrap();
    nested
        .shell(&format!(
            "ip addr add {}/32 dev mv0 && ip link set mv0 up && ip route add {to} dev mv0 && ip neigh replace {to} \
             lladdr {neighbour} dev mv0",
            web.address.v4
        ))
        .unwrap();
    // A connection is captured like the workload's own, or refused like any other frame from there: nobody is reached.
    let error = connect_in(&nested, api.v4(8080), std::time::Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::HostUnreachable), "{error}");
    let before = scene.refused("spoofed_mac");
    let datagram = || UdpSocket::bind("0.0.0.0:0")?.send_to(SECRET, api.v4(8080));
    nested.enter(datagram).unwrap().unwrap();
    until("the frame of another hardware address is counted", TIMEOUT, || {
        holds(scene.refused("spoofed_mac") > before, || "not yet".to_owned())
    });
    assert!(seen.frames_with(SECRET).unwrap().is_empty(), "it arrived");
    // Behind a veth and the workload's own forwarding it has an address that is not the workload's.
    web.shell(&format!(
        "ip link del mv0 2>/dev/null; ip link add v0 type veth peer name v1 && ip link set v1 netns {} && \
         ip addr add 10.77.0.1/24 dev v0 && ip link set v0 up && sysctl -qw net.ipv4.ip_forward=1",
        nested.name()
    ))
    .unwrap();
    nested
        .shell("ip link del mv0; ip addr add 10.77.0.2/24 dev v1 && ip link set v1 up && ip route add default via 10.77.0.1")
        .unwrap();
    let before = scene.refused("spoofed_source");
    let error = connect_in(&nested, db.v4(8080), std::time::Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::HostUnreachable), "{error}");
    until("it is counted", TIMEOUT, || {
        holds(scene.refused("spoofed_source") > before, || "not yet".to_owned())
    });
    // In the headers: any four bytes come by chance in what is encrypted.
    let of_nested = |frame: &[u8]| frame[..frame.len().min(54)].windows(4).any(|w| w == [10, 77, 0, 2]);
    let passed = seen.sift(of_nested).unwrap();
    assert!(passed.is_empty(), "{passed:02x?}");
    load.await_more(5);
    load.finish();
    nested.delete().unwrap();
}

#[test]
fn the_agents_source_ports_can_be_taken_without_harm() {
    let scene = Scene::new();
    let Scene { world, web, db, .. } = &scene;
    let mut load = scene.neighbours();
    load.run("to the hostile one", db, web.v4(8080), short);
    // Connections to the address from which the agent's connections to web's application come, from its ports, and
    // listeners on them.
    let mut held: Vec<TcpListener> = vec![];
    for port in INNER_PORTS.step_by(150) {
        let from_port = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(v4(web), port).into())?;
            socket.connect_timeout(&db.v4(8080).into(), TIMEOUT)?;
            let mut stream = std::net::TcpStream::from(socket);
            stream.write_all(b"hello")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut answer = vec![];
            stream.read_to_end(&mut answer)?;
            std::io::Result::Ok(answer)
        };
        assert_eq!(web.netns.enter(from_port).unwrap().unwrap(), b"hello", "from port {port}");
        held.push(web.listen(v4(web), port + 1).unwrap());
    }
    load.await_more(10);
    load.finish();
    world.agent("a").wait_log("of web", log::is(log::OUTBOUND, web, db));
}

#[test]
fn a_flood_of_probes_to_one_workload_breaks_no_others_probe() {
    let scene = Scene::new();
    let Scene { world, web, api, .. } = &scene;
    let load = scene.neighbours();
    let node = &world.node("a").netns;
    let probe = |to: SocketAddr| connect_in(node, to, TIMEOUT).unwrap();
    let mut held = probe(api.v4(8080));
    let mut ping = || {
        held.write_all(b"alive?").unwrap();
        let mut answer = [0; 6];
        held.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"alive?");
    };
    ping();
    for _ in 0..MAX_PROBES + MAX_PROBES / 4 {
        let stream = probe(web.v4(8080));
        // A reset leaves no port behind.
        socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
    ping();
    assert_eq!(scene.refused("plaintext_of_strict"), 0.0);
    load.await_more(5);
    load.finish();
}

#[test]
fn a_flood_of_openings_to_one_workload_leaves_the_others_alone() {
    let scene = Scene::new();
    let Scene { world, web, .. } = &scene;
    let load = scene.neighbours();
    // From a host outside of the mesh, from addresses that answer nothing: more than the listener's queue holds.
    let node = world.node("a").address.v4;
    let wire = world.wire();
    let first = |netns: &NetNs, line: String| netns.shell(&line).unwrap().trim().to_owned();
    let device = first(wire, format!("ip route get {node} | grep -o 'dev [^ ]*' | cut -d' ' -f2"));
    let of_node = &world.node("a").netns;
    let nodes_device = first(of_node, format!("ip -o -4 addr show to {node} | awk '{{print $2}}'"));
    let to_node = frame::mac(of_node, &nodes_device).unwrap();
    let own = frame::mac(wire, &device).unwrap();
    let flood: Vec<Vec<u8>> = (0..6000_u32)
        .map(|n| {
            let from = IpAddr::from(Ipv4Addr::from(0xc612_0000 + n));
            let mut syn = frame::tcp((1024 + n % 50_000) as u16, 8080, SYN, b"");
            frame::check_tcp(from, v4(web), &mut syn);
            frame::ethernet(to_node, own, frame::IPV4, &frame::ip(from, v4(web), 6, 0, &[], &syn))
        })
        .collect();
    let number = |line: &str| web.shell(line).unwrap().trim().parse::<usize>().unwrap();
    // The kernel keeps the last quarter for those it knows (`tcp_conn_request`); a small machine has few in all.
    let many = (number("cat /proc/sys/net/ipv4/tcp_max_syn_backlog") / 2).min(1000);
    frame::send(wire, &device, &flood).unwrap();
    until("the flood has arrived", TIMEOUT, || {
        let count = number("ss -Htn state syn-recv | wc -l");
        holds(count >= many, || format!("{count} half-open of {many}"))
    });
    load.await_more(50);
    load.finish();
}

/// Its own address is a workload's to remove; its guard is not.
#[test]
fn a_workload_that_takes_its_address_away_stays_guarded() {
    let scene = Scene::new();
    let Scene { world, web, api, .. } = &scene;
    let load = scene.neighbours();
    let agent = world.agent("a");
    let ends = Ends {
        own: frame::mac(&web.netns, "eth0").unwrap(),
        neighbour: frame::mac(&api.netns, "eth0").unwrap(),
        from: [v4(web), v6(web)],
        to: [v4(api), v6(api)],
    };
    web.shell("ip -4 addr flush dev eth0; ip -6 addr flush dev eth0 scope global").unwrap();
    until("the loss is seen", TIMEOUT, || {
        let now = agent.metrics().map_err(|e| e.to_string())?.sum("nodemesh_unprotected_workloads", &[]);
        holds(now == 1.0, || format!("{now} unprotected"))
    });
    let mut seen = Capture::start_at(&api.netns, "eth0").unwrap();
    let before = scene.refused("plaintext_of_strict");
    // With a packet socket it can send from an address that it does not have.
    frame::send(&web.netns, "eth0", &[ends.ipv4(6, &ends.data())]).unwrap();
    until("the guard refuses", TIMEOUT, || {
        holds(scene.refused("plaintext_of_strict") > before, || "not yet".to_owned())
    });
    assert!(seen.frames_with(SECRET).unwrap().is_empty());
    load.finish();
}

/// A neighbour's address on a hostile workload's interface does not make it the neighbour.
#[test]
fn a_workload_that_gives_itself_a_neighbours_address_is_not_taken_for_it() {
    let scene = Scene::new();
    let Scene { world, web, api, db, .. } = &scene;
    let take = format!("ip addr add {}/32 dev eth0; ip addr add {}/128 dev eth0 nodad", v4(api), v6(api));
    web.shell(&format!("ip -4 addr flush dev eth0; ip -6 addr flush dev eth0 scope global; {take}")).unwrap();
    // A new agent knows nothing of who is where.
    let agent = world.agent("a");
    agent.kill().unwrap();
    agent.start().unwrap();
    let reached_as = |from: &Workload| {
        let line = world.agent("b").wait_log("a connection to db", log::is(log::INBOUND, from, db));
        line["source"]["identity"].as_str().map(str::to_owned)
    };
    until("api reaches db", TIMEOUT, || api.exchange(db.v4(8080), b"x").map(drop).map_err(|e| e.to_string()));
    assert_eq!(reached_as(api), Some(api.identity()));
    let spoof = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(v4(api), 0).into())?;
        socket.connect_timeout(&db.v4(8080).into(), std::time::Duration::from_millis(500))
    };
    // Every attempt of api's has its line before that of the one that got through.
    agent
        .wait_log("that connection", |line| log::is(log::OUTBOUND, api, db)(line) && line["outcome"] == "ok");
    let lines = || agent.access_log().unwrap().len();
    let before = lines();
    assert!(web.netns.enter(spoof).unwrap().is_err(), "web spoke as api");
    assert_eq!(lines(), before, "it got to the agent");
}
