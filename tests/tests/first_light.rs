//! One connection, kernel to controller: what the wire, the application, the access log and the metrics say of it, in
//! both CNI shapes, both families, on one node and between two.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::net::SocketAddr;

use mesh_tests::{Shape, Workload, World, apps, log, until, wait::holds, workload::TIMEOUT};

const SECRET: &[u8] = b"GET /account?card=4929-secret HTTP/1.0\r\n\r\n";

fn carries(shape: Shape) {
    let world = World::shop().shape(shape).rp_filter().build().unwrap();
    let mut wire = world.capture().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    for server in [&api, &db] {
        let app = server.serve(8080, apps::http(&server.name)).unwrap();
        for to in server.both(8080) {
            sees_its_client(&web, to, &server.name);
        }
        let clients: Vec<_> = app.peers().iter().map(SocketAddr::ip).collect();
        assert_eq!(clients, web.address.both(), "the application sees its clients' own addresses");
    }
    for (own, to) in web.address.both().into_iter().zip(db.both(8080)) {
        let packets = wire.tcp_between(own, to.ip(), 8080).unwrap();
        assert!(packets.iter().any(|p| p.opens && p.destination == to), "no SYN to {to}: {packets:#?}");
        assert!(packets.iter().any(|p| p.is_client_hello()), "no ClientHello: {packets:#?}");
    }
    assert!(wire.plaintext(b"card=4929-secret").unwrap().is_empty());
    assert!(wire.plaintext(b" saw 10.").unwrap().is_empty());
    is_logged_and_counted(&world, &web, &db);
}

#[track_caller]
fn sees_its_client(web: &Workload, to: SocketAddr, name: &str) {
    let answer = web.exchange(to, SECRET).unwrap();
    let own = if to.is_ipv4() { web.v4(0).ip() } else { web.v6(0).ip() };
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.contains(&format!("{name} saw {own}\n")), "{to} answered {answer:?}");
}

#[track_caller]
fn is_logged_and_counted(world: &World, web: &Workload, db: &Workload) {
    for (node, direction) in [("a", log::OUTBOUND), ("b", log::INBOUND)] {
        let is = log::is(direction, web, db);
        let sent_secret =
            |line: &serde_json::Value| is(line) && line["bytes_sent"].as_u64() == Some(SECRET.len() as u64);
        let line = world.agent(node).wait_log("the request to db", sent_secret);
        assert_eq!(line["source"]["identity"], web.identity(), "{line}");
        assert_eq!(line["destination"]["identity"], db.identity(), "{line}");
        assert_eq!(line["outcome"], "ok", "{line}");
        assert_eq!(line["transport"], "tunnel", "{line}");
        assert_eq!(line["node"], node, "{line}");
        assert!(line["bytes_received"].as_u64().is_some_and(|n| n > 0), "{line}");
        let metrics = world.agent(node).metrics().unwrap();
        let labels = [("direction", direction), ("outcome", "ok"), ("transport", "tunnel")];
        assert!(metrics.sum("nodemesh_connections_total", &labels) >= 2.0, "{metrics:#?}");
        assert!(metrics.sum("nodemesh_bytes_total", &[("direction", direction)]) > 0.0, "{metrics:#?}");
    }
}

#[test]
fn a_request_crosses_nodes_of_routed_workloads_encrypted() {
    carries(Shape::Routed);
}

#[test]
fn a_request_crosses_nodes_of_bridged_workloads_encrypted() {
    carries(Shape::Bridge);
}

/// Traffic of a workload to itself, to loopback and to the mesh's outside is none of the mesh's business.
#[test]
fn a_workload_reaches_itself_and_the_outside() {
    let world = World::shop().build().unwrap();
    let web = world.workload("web");
    let _own = web.serve(8080, apps::http("web")).unwrap();
    for to in web.both(8080) {
        sees_its_client(&web, to, "web");
    }
    assert!(web.exchange("127.0.0.1:8080".parse().unwrap(), SECRET).is_ok());
    assert!(web.exchange("[::1]:8080".parse().unwrap(), SECRET).is_ok());
    let outside = world.wire().enter(|| std::net::TcpListener::bind("0.0.0.0:9999")).unwrap().unwrap();
    let address = SocketAddr::new(world.outside().v4.into(), 9999);
    let server = mesh_tests::Server::start(vec![outside], apps::echo()).unwrap();
    assert_eq!(web.exchange(address, b"hello out there").unwrap(), b"hello out there");
    assert_eq!(server.peers()[0].ip(), web.v4(0).ip());
}

/// The kubelet probes pods from the node, agent or not.
#[test]
fn the_node_probes_its_workloads_even_when_the_agent_is_dead() {
    let world = World::shop().build().unwrap();
    let web = world.workload("web");
    let _app = web.serve(8080, apps::http("web")).unwrap();
    let probe = |to| mesh_tests::http::get(&world.node("a").netns, to, "/healthz").unwrap().status;
    assert_eq!(web.both(8080).map(probe), [200, 200]);
    world.agent("a").kill().unwrap();
    assert_eq!(web.both(8080).map(probe), [200, 200]);
}

/// What is on the wire is still "web to db:8080", so what the node's firewall says of that still decides.
#[test]
fn the_node_firewall_decides_over_tunnels() {
    let world = World::shop().shape(Shape::Bridge).build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let _other = db.serve(9090, apps::echo()).unwrap();
    let rule = "iptables -I FORWARD -p tcp -d DB --dport 9090 -j REJECT --reject-with tcp-reset";
    world.node("a").netns.shell(&rule.replace("DB", &db.address.v4.to_string())).unwrap();
    assert_eq!(web.exchange(db.v4(8080), b"x").unwrap(), b"x");
    web.assert_refused(db.v4(9090));
}

#[test]
fn a_port_where_nobody_listens_is_refused_and_logged() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    for to in db.both(8081) {
        web.assert_refused(to);
    }
    let line = world.agent("a").wait_log("the failed connection", |line| {
        log::is(log::OUTBOUND, &web, &db)(line) && line["outcome"] != "ok"
    });
    assert!(line["reason"].is_string() && line["step"].is_string(), "{line}");
    until("it is counted", TIMEOUT, || {
        let metrics = world.agent("a").metrics().map_err(|e| e.to_string())?;
        let all = metrics.sum("nodemesh_connections_total", &[("direction", "outbound")]);
        let ok = metrics.sum("nodemesh_connections_total", &[("direction", "outbound"), ("outcome", "ok")]);
        holds(all > ok, || format!("{metrics:?}"))
    });
}
