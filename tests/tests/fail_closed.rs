//! When the agent dies, or something of capture is taken away, a strict workload speaks to nobody rather than in the
//! clear; and everything is in order again soon afterwards.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mesh_tests::{
    Workload, World, apps, attached,
    manifests::{Enrolment, Mode},
    netns::NetNs,
    until,
    wait::{holds, scaled},
    wire::Capture,
    workload::{TIMEOUT, connect_in},
};

/// How often the agent is killed.
const KILLS: usize = 50;
/// Within what new connections are refused while there is no agent: no more than a turn through the kernel.
const AT_ONCE: Duration = Duration::from_millis(50);
/// Within what everything works again, from the start of the next agent on.
const IN_ORDER: Duration = Duration::from_secs(1);
/// Within what anything that was taken away is back.
const REPAIR: Duration = Duration::from_secs(5);
/// How long an attempt may take that is neither refused nor answered: its packets are lost.
const A_MOMENT: Duration = Duration::from_millis(200);
/// What every connection of these tests carries, and what must never be readable between the nodes.
const SECRET: &[u8] = b"a secret of a strict workload";

fn strict_shop() -> World {
    World::shop().namespace("shop", Enrolment::Enrolled, Mode::Strict).build().unwrap()
}

/// Tries for at most so long; a connection that is neither made nor refused costs no more.
fn attempt(from: &Workload, to: SocketAddr, within: Duration) -> std::io::Result<()> {
    let mut stream = connect_in(&from.netns, to, within)?;
    stream.set_read_timeout(Some(within))?;
    stream.write_all(SECRET)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = vec![];
    stream.read_to_end(&mut answer)?;
    if answer == SECRET { Ok(()) } else { Err(std::io::Error::other("half an answer")) }
}

/// Connections that come and go, whatever becomes of them.
struct Load {
    stop: Arc<AtomicBool>,
    carried: Arc<AtomicUsize>,
    workers: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(ways: &[(&Workload, SocketAddr)]) -> Self {
        let (stop, carried) = <(Arc<AtomicBool>, Arc<AtomicUsize>)>::default();
        let worker = |(from, to): &(&Workload, SocketAddr)| {
            let (from, to, stop, carried) = ((*from).clone(), *to, stop.clone(), carried.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if attempt(&from, to, TIMEOUT).is_ok() {
                        carried.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        };
        let workers = ways.iter().map(worker).collect();
        Self { stop, carried, workers }
    }

    fn finish(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            worker.join().unwrap();
        }
        self.carried.load(Ordering::Relaxed)
    }
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort();
    times[(times.len() - 1) * percent / 100]
}

#[test]
fn fifty_kills_under_load_show_no_plaintext_refuse_at_once_and_heal_within_a_second() {
    let world = strict_shop();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let _apps = [&web, &api, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    let agent = world.agent("a");
    let mut wire = world.capture().unwrap();
    let ways = [(&web, db.v4(8080)), (&web, api.v6(8080)), (&db, web.v6(8080)), (&api, db.v6(8080))];
    let load = Load::start(&ways);
    let (mut refusals, mut healings) = (vec![], vec![]);
    for kill in 1..=KILLS {
        agent.kill().unwrap();
        // Whatever was on its way is behind us; from here on nothing new may leave the node.
        let opened = |frame: &[u8]| {
            mesh_tests::wire::parse(frame).is_some_and(|p| {
                p.opens
                    && [web.v4(0), web.v6(0), api.v4(0), api.v6(0)].iter().any(|a| a.ip() == p.source.ip())
            })
        };
        assert!(wire.frames_with(SECRET).unwrap().is_empty(), "kill {kill}");
        for (from, to) in ways {
            let started = Instant::now();
            let error = attempt(from, to, TIMEOUT).unwrap_err();
            refusals.push(started.elapsed());
            let kind = error.kind();
            // The last is what shutdown(2) says of a connection that was reset just before.
            let refused = [ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset, ErrorKind::NotConnected];
            assert!(refused.contains(&kind), "kill {kill}: {} to {to}: {error}", from.name);
        }
        let bare = wire.sift(|frame| opened(frame) || frame.windows(SECRET.len()).any(|w| w == SECRET));
        assert!(bare.unwrap().is_empty(), "kill {kill}: something left the node");
        let started = Instant::now();
        agent.start().unwrap();
        for (from, to) in ways {
            until(&format!("kill {kill}: {} reaches {to}", from.name), TIMEOUT, || {
                attempt(from, to, TIMEOUT).map_err(|e| e.to_string())
            });
        }
        healings.push(started.elapsed());
        assert!(wire.frames_with(SECRET).unwrap().is_empty(), "kill {kill}: plaintext");
    }
    let carried = load.finish();
    let (slowest_refusal, slowest_healing) = (refusals.iter().max().copied(), healings.iter().max().copied());
    let (refusal, healing) = (percentile(&mut refusals, 95), percentile(&mut healings, 95));
    eprintln!(
        "{carried} connections carried; refused within {refusal:?} (at most {slowest_refusal:?}); in order within \
         {healing:?} (at most {slowest_healing:?})"
    );
    assert!(refusal < scaled(AT_ONCE), "refused within {refusal:?}");
    assert!(healing < scaled(IN_ORDER), "in order within {healing:?}");
}

/// Something that somebody takes away, or puts in the way.
struct Damage {
    what: &'static str,
    /// The label of the repair.
    repair: &'static str,
    inflict: fn(&World, &Workload),
}

fn detach(netns: &NetNs, device: &str) {
    for program in attached::programs(netns, device).unwrap() {
        program.detach().unwrap();
    }
}

fn in_workload(line: &'static str) -> impl Fn(&World, &Workload) {
    move |_, web| drop(web.shell(line).unwrap())
}

const DAMAGES: &[Damage] = &[
    Damage {
        what: "the rule of IPv4",
        repair: "rule",
        inflict: |w, web| in_workload("ip -4 rule del pref 100")(w, web),
    },
    Damage {
        what: "the rule of IPv6",
        repair: "rule",
        inflict: |w, web| in_workload("ip -6 rule del pref 100")(w, web),
    },
    Damage {
        what: "the routes",
        repair: "route",
        inflict: |w, web| in_workload("ip -4 route flush table 1501; ip -6 route flush table 1501")(w, web),
    },
    Damage { what: "lo", repair: "lo", inflict: |w, web| in_workload("ip link set lo down")(w, web) },
    Damage {
        what: "accept_local",
        repair: "sysctl",
        inflict: |_, web| web.netns.sysctl("net/ipv4/conf/lo/accept_local", "0").unwrap(),
    },
    Damage {
        what: "rp_filter",
        repair: "sysctl",
        inflict: |_, web| web.netns.sysctl("net/ipv4/conf/lo/rp_filter", "1").unwrap(),
    },
    Damage {
        what: "tcp_syncookies",
        repair: "sysctl",
        inflict: |_, web| web.netns.sysctl("net/ipv4/tcp_syncookies", "2").unwrap(),
    },
    Damage {
        what: "the listeners",
        repair: "listener",
        inflict: |w, web| {
            in_workload("ss -K state listening '( src 127.0.0.1 or src [::1] )' || true")(w, web)
        },
    },
    Damage { what: "the capture programs", repair: "program", inflict: |_, web| detach(&web.netns, "eth0") },
    Damage { what: "the delivery program", repair: "program", inflict: |_, web| detach(&web.netns, "lo") },
    Damage {
        what: "the guard, by the node's root",
        repair: "program",
        inflict: |world, web| detach(&world.node("a").netns, &web.device),
    },
    Damage {
        what: "the pins of all links, by the node's root",
        repair: "program",
        inflict: |world, _| {
            let records = if attached::has_tcx() { "links" } else { "filters" };
            fs::remove_dir_all(world.agent("a").bpffs().join(records)).unwrap();
        },
    },
    Damage {
        what: "the pins of the lookups, by the node's root",
        repair: "program",
        inflict: |world, _| fs::remove_dir_all(world.agent("a").bpffs().join("lookups")).unwrap(),
    },
    Damage {
        what: "the pins of the maps, by the node's root",
        repair: "pin",
        inflict: |world, _| {
            for map in ["LISTENERS", "GUARDED", "CONFIG"] {
                fs::remove_file(world.agent("a").bpffs().join(map)).unwrap();
            }
        },
    },
];

/// What is missing is refused by the guard, seen, put back and counted; and not one byte is readable meanwhile.
#[test]
fn what_is_taken_away_is_refused_repaired_within_five_seconds_and_counted() {
    let world = strict_shop();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let _apps = [&web, &api, &db].map(|workload| workload.serve(8080, apps::echo()).unwrap());
    let agent = world.agent("a");
    let mut wire = world.capture().unwrap();
    let mut neighbour = Capture::start_at(&api.netns, "eth0").unwrap();
    for damage in DAMAGES {
        let repairs = || agent.metrics().unwrap().sum("nodemesh_repairs_total", &[("what", damage.repair)]);
        let before = repairs();
        (damage.inflict)(&world, &web);
        let started = Instant::now();
        let mut unprotected = damage.repair == "pin";
        until(&format!("{} is repaired", damage.what), REPAIR, || {
            // Whatever state it is in: nothing may be readable.
            for to in [db.v4(8080), db.v6(8080), api.v4(8080)] {
                let _ = attempt(&web, to, A_MOMENT);
            }
            let metrics = agent.metrics().map_err(|e| e.to_string())?;
            let now = metrics.sum("nodemesh_unprotected_workloads", &[]);
            unprotected |= now > 0.0;
            holds(unprotected && now == 0.0 && repairs() > before, || {
                format!("unprotected now {now}, before {unprotected}; {} repairs", repairs() - before)
            })
        });
        let took = started.elapsed();
        assert!(took < scaled(REPAIR), "{}: {took:?}", damage.what);
        for (from, to) in [(&web, db.v4(8080)), (&web, api.v6(8080)), (&db, web.v6(8080))] {
            attempt(from, to, TIMEOUT).unwrap_or_else(|e| panic!("{} repaired, yet {to}: {e}", damage.what));
        }
        for seen in [&mut wire, &mut neighbour] {
            assert!(seen.frames_with(SECRET).unwrap().is_empty(), "{}: plaintext", damage.what);
        }
    }
}
