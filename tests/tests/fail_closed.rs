//! When the agent dies, or something of capture is taken away, a strict workload speaks to nobody rather than in the
//! clear; and everything is in order again soon afterwards.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mesh_tests::{
    Workload, World, apps,
    manifests::{Enrolment, Mode},
    until,
    workload::{TIMEOUT, connect_in},
};

/// How often the agent is killed.
const KILLS: usize = 50;
/// Within what new connections are refused while there is no agent: no more than a turn through the kernel.
const AT_ONCE: Duration = Duration::from_millis(50);
/// Within what everything works again, from the start of the next agent on.
const IN_ORDER: Duration = Duration::from_secs(1);
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
            let refused = [std::io::ErrorKind::ConnectionRefused, std::io::ErrorKind::ConnectionReset];
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
    assert!(refusal < AT_ONCE, "refused within {refusal:?}");
    assert!(healing < IN_ORDER, "in order within {healing:?}");
}
