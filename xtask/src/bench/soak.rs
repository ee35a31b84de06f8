//! Many idle connections, and churn for a long time, with the agents' memory and descriptors watched: an error unless
//! both stay flat.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Workload, World};

use super::{cost, load, systems::HTTP};
use crate::run::step;

/// How long and how much.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Arguments {
    /// Minutes of churn.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// New connections a second, each with one request.
    #[arg(long, default_value_t = 400)]
    rate: u64,
    /// Idle connections that stay open all the time. Each takes two descriptors at two of six agents.
    #[arg(long, default_value_t = 10_000)]
    idle: usize,
}

/// Clients and servers, with their nodes. So many because an agent gives a workload half of its descriptors at most.
const PAIRS: [(&str, &str, &str, &str); 6] = [
    ("one", "a", "store-1", "b"),
    ("two", "a", "store-2", "b"),
    ("three", "c", "store-3", "d"),
    ("four", "c", "store-4", "d"),
    ("five", "e", "store-5", "f"),
    ("six", "e", "store-6", "f"),
];
/// Threads that make connections, one for each pair.
const CHURNERS: u64 = PAIRS.len() as u64;
/// Time between two looks at the agents.
const LOOK: Duration = Duration::from_secs(10);
/// The first part of the churn, as a share: memory may still grow to what the load needs.
const WARM_UP: f64 = 0.2;
/// What may remain of growth after it: allocator noise.
const GROWTH: f64 = 0.05;
/// How many descriptors may come and go with tunnels that are kept for a while.
const LOOSE_DESCRIPTORS: usize = 600;

/// Runs it.
pub(super) fn soak(arguments: &Arguments) -> Result<()> {
    let world = step("Start a world of six nodes", || {
        let mut world = World::builder();
        for node in ["a", "b", "c", "d", "e", "f"] {
            world = world.node(node);
        }
        for (client, at, server, to) in PAIRS {
            world = world.workload(&format!("soak/{client}"), at).workload(&format!("soak/{server}"), to);
        }
        world.build()
    })?;
    let pairs = PAIRS.map(|(client, _, server, _)| (world.workload(client), world.workload(server)));
    let directory = world.directory().to_owned();
    let mut applications = vec![];
    for (_, server) in &pairs {
        let own = directory.join(&server.name);
        std::fs::create_dir_all(&own)?;
        applications.push(load::applications(server, &own)?);
    }
    let idle = step(&format!("Open {} idle connections", arguments.idle), || {
        let mut all = vec![];
        for (client, server) in &pairs {
            all.extend(load::idle(client, server.v4(HTTP), arguments.idle / pairs.len())?);
        }
        Ok(all)
    })?;
    println!("{}", Look::HEAD);
    let opened = Look::at(&world, 0);
    println!("{opened}");
    let looks =
        step(&format!("Churn for {} minutes", arguments.minutes), || churn(&world, &pairs, arguments))?;
    for (n, mut connection) in idle.into_iter().enumerate() {
        request(&mut connection).with_context(|| format!("idle connection {n} does not answer any more"))?;
    }
    println!("all idle connections still answer");
    judge(&looks)
}

/// New connections at a steady rate, until the time is over.
fn churn(world: &World, pairs: &[(Workload, Workload)], arguments: &Arguments) -> Result<Vec<Look>> {
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let between = Duration::from_secs(1) * u32::try_from(CHURNERS)? / u32::try_from(arguments.rate.max(1))?;
    let churners: Vec<_> = (0..CHURNERS)
        .map(|n| {
            let (client, server) = pairs[usize::try_from(n).unwrap_or(0) % pairs.len()].clone();
            let (stop, done) = (stop.clone(), done.clone());
            thread::spawn(move || -> Result<()> {
                let mut next = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    let mut connection = client.connect(server.v4(HTTP)).context("a new connection")?;
                    request(&mut connection)?;
                    done.fetch_add(1, Ordering::Relaxed);
                    next += between;
                    thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                Ok(())
            })
        })
        .collect();
    let end = Instant::now() + Duration::from_secs(60 * arguments.minutes);
    let mut looks = vec![];
    while Instant::now() < end && churners.iter().all(|churner| !churner.is_finished()) {
        thread::sleep(LOOK.min(end.saturating_duration_since(Instant::now())));
        let look = Look::at(world, done.load(Ordering::Relaxed));
        println!("{look}");
        looks.push(look);
    }
    stop.store(true, Ordering::Relaxed);
    for churner in churners {
        churner.join().map_err(|_| anyhow::anyhow!("a churning thread panicked"))??;
    }
    Ok(looks)
}

fn request(connection: &mut std::net::TcpStream) -> Result<()> {
    let to: SocketAddr = connection.peer_addr()?;
    connection.write_all(format!("GET / HTTP/1.1\r\nHost: {to}\r\n\r\n").as_bytes())?;
    ensure!(connection.read(&mut [0; 4096])? > 0, "closed without an answer");
    Ok(())
}

/// All agents at one time.
#[derive(Debug)]
struct Look {
    connections: u64,
    resident_kib: u64,
    descriptors: usize,
}

impl Look {
    const HEAD: &str = "connections made | agents' memory, MB | agents' descriptors";

    fn at(world: &World, connections: u64) -> Self {
        let agents: Vec<u32> =
            world.nodes().iter().filter_map(|node| world.agent(&node.name).pid()).collect();
        Self {
            connections,
            resident_kib: agents.iter().map(|pid| cost::resident_kib(*pid)).sum(),
            descriptors: agents.iter().map(|pid| cost::descriptors(*pid)).sum(),
        }
    }
}

impl std::fmt::Display for Look {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:>16} | {:>18.1} | {:>19}",
            self.connections,
            self.resident_kib as f64 * 1024.0 / 1e6,
            self.descriptors
        )
    }
}

/// The second half against what was reached after the warm-up.
fn judge(looks: &[Look]) -> Result<()> {
    let warm = (looks.len() as f64 * WARM_UP) as usize;
    let middle = warm + (looks.len() - warm) / 2;
    ensure!(looks.len() >= 4, "too short to judge: {} looks", looks.len());
    let peak = |looks: &[Look], of: fn(&Look) -> u64| looks.iter().map(of).max().unwrap_or(0);
    let memory: fn(&Look) -> u64 = |look| look.resident_kib;
    let descriptors: fn(&Look) -> u64 = |look| look.descriptors as u64;
    let (first, second) = (&looks[warm..middle], &looks[middle..]);
    let (early, late) = (peak(first, memory), peak(second, memory));
    ensure!(
        late as f64 <= early as f64 * (1.0 + GROWTH),
        "memory is not flat: at most {early} KiB in the first half after the warm-up, {late} KiB in the second"
    );
    let (early, late) = (peak(first, descriptors), peak(second, descriptors));
    ensure!(
        late <= early + LOOSE_DESCRIPTORS as u64,
        "descriptors are not flat: at most {early} in the first half after the warm-up, {late} in the second"
    );
    println!("memory and descriptors are flat");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(memory: impl Fn(u64) -> u64, descriptors: impl Fn(usize) -> usize) -> Vec<Look> {
        (0..20)
            .map(|n| Look { connections: n, resident_kib: memory(n), descriptors: descriptors(n as usize) })
            .collect()
    }

    #[test]
    fn growth_after_the_warm_up_is_an_error() {
        assert!(judge(&looks(|n| 50_000 + n.min(4) * 5000, |_| 40_000)).is_ok());
        assert!(judge(&looks(|n| 50_000 + n * 1000, |_| 40_000)).is_err());
        assert!(judge(&looks(|_| 50_000, |n| 40_000 + n * 100)).is_err());
    }
}
