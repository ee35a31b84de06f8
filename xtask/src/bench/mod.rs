//! `bench`: what the mesh costs, as ratios to no mesh and to peers, measured side by side on this machine.
//!
//! Every system has the same world (two nodes, a client on one, a server on the other, each in its own namespace) and
//! the same load; all stand at once, and in every round each figure is taken from one system after the other, so that
//! what disturbs the machine disturbs all of them. Medians over the rounds are told, with the spread beside them.
//!
//! | module | what |
//! |---|---|
//! | [`systems`] | no mesh, Nodemesh, and the peers, each started over a world of its own |
//! | [`peers`] | Envoy, HAProxy and nginx as pairs of sidecars with mutual TLS, for connections or for requests |
//! | [`scenarios`] | what is measured |
//! | [`load`] | iperf3, wrk and raw connections, and what they say |
//! | [`cost`] | CPU time, memory and descriptors of the systems' processes |
//! | [`figures`] | samples, medians, ratios |
//! | [`report`], [`plot`] | JSON and tables; SVG |
//! | [`scale`] | a large Kubernetes of fake nodes and pods, and the controller that serves it |
//! | [`soak`] | many idle connections, and churn for as long as one likes, with memory and descriptors watched |

mod cost;
mod figures;
mod load;
mod peers;
mod plot;
mod report;
mod scale;
mod scenarios;
mod soak;
mod systems;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};

use self::{
    figures::Figures,
    scenarios::Scenario,
    systems::{Kind, Layer, System},
};
use crate::{
    check, ebpf,
    run::{step, target},
    setup,
};

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Read requests, as routes want it, beside peers that read them too.
    #[arg(long)]
    http: bool,
    /// With `--http`: rules of the mesh's route by other paths, beside the one that all requests fall under.
    #[arg(long, default_value_t = 0)]
    rules: usize,
    /// Systems, besides no mesh; all of the layer unless named.
    #[arg(long, value_delimiter = ',')]
    systems: Vec<Kind>,
    /// Scenarios; all of the layer unless named.
    #[arg(long, value_delimiter = ',')]
    scenarios: Vec<Scenario>,
    /// Rounds; figures are medians over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each load runs, in seconds.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Where results go: results.json, table.md and the plots.
    #[arg(long)]
    output: Option<PathBuf>,
    /// A directory of Nodemesh's binaries, instead of building them: to compare two builds.
    #[arg(long)]
    binaries: Option<PathBuf>,
    #[command(subcommand)]
    long: Option<Long>,
}

#[derive(Debug, clap::Subcommand)]
enum Long {
    /// Ten thousand idle connections, then churn, with flat memory and descriptors or an error.
    Soak(soak::Arguments),
    /// A large cluster of fake nodes and pods: what it costs the controller, how long changes take.
    Scale(scale::Arguments),
}

/// Runs it.
pub(crate) fn bench(arguments: &Arguments) -> Result<()> {
    setup::everything()?;
    let with_peers = arguments.long.is_none();
    setup::bench(with_peers && arguments.systems().iter().any(|kind| kind.is_envoy()))?;
    ebpf::build()?;
    let binaries = match &arguments.binaries {
        Some(directory) => directory.clone(),
        None => check::build_release()?,
    };
    prepare(&binaries)?;
    match &arguments.long {
        Some(Long::Soak(arguments)) => soak::soak(arguments),
        Some(Long::Scale(arguments)) => scale::scale(arguments),
        None => compare(arguments),
    }
}

/// Worlds run these programs from now on, as users do.
fn prepare(binaries: &Path) -> Result<()> {
    // SAFETY: no other thread runs yet that could read the environment.
    unsafe { std::env::set_var("NODEMESH_BIN_DIR", binaries) };
    if std::env::var_os("RUST_LOG").is_none() {
        // SAFETY: as above. Debug lines of the tests' default level would be measured too.
        unsafe { std::env::set_var("RUST_LOG", "info") };
    }
    cost::raise_descriptor_limit()
}

/// Has agents among these programs do what is measured, and ends them in order.
pub(crate) fn exercise(binaries: &Path) -> Result<()> {
    const EACH: Duration = Duration::from_secs(4);
    use Scenario::{Bulk1, Connections, Requests1, Requests64, Streams};
    setup::bench(false)?;
    prepare(binaries)?;
    for (kind, layer, scenarios) in [
        (Kind::Nodemesh, Layer::Connections, &[Bulk1, Requests1, Requests64, Connections, Streams][..]),
        (Kind::NodemeshHttp, Layer::Requests, &[Requests1, Requests64, Connections, Streams]),
    ] {
        let systems = [step(&format!("Start {kind}"), || System::start(kind, 0))?];
        let mut figures = Figures::new(&systems, layer, 1, EACH.as_secs())?;
        let [system] = systems;
        for scenario in scenarios {
            step(&format!("{kind}: {scenario}"), || scenario.measure(&system, EACH, &mut figures))?;
        }
        step(&format!("End {kind}"), || system.end())?;
    }
    Ok(())
}

impl Arguments {
    fn layer(&self) -> Layer {
        if self.http { Layer::Requests } else { Layer::Connections }
    }

    fn systems(&self) -> &[Kind] {
        if self.systems.is_empty() { self.layer().systems() } else { &self.systems }
    }
}

fn compare(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.rounds > 0 && arguments.seconds > 0, "at least one round of one second");
    let scenarios: &[Scenario] =
        if arguments.scenarios.is_empty() { Scenario::of(arguments.layer()) } else { &arguments.scenarios };
    let directory = arguments.output.clone().unwrap_or_else(|| target().join("bench"));
    let mut kinds = vec![Kind::NoMesh];
    kinds.extend(arguments.systems().iter().filter(|kind| **kind != Kind::NoMesh));
    let systems: Vec<System> = kinds
        .iter()
        .map(|kind| step(&format!("Start {kind}"), || System::start(*kind, arguments.rules)))
        .collect::<Result<_>>()?;
    let duration = Duration::from_secs(arguments.seconds);
    let mut figures = Figures::new(&systems, arguments.layer(), arguments.rounds, arguments.seconds)?;
    for system in &systems {
        step(&format!("{} at rest", system.kind), || scenarios::at_rest(system, &mut figures))?;
    }
    for round in 1..=arguments.rounds {
        for scenario in scenarios {
            step(&format!("Round {round} of {}: {scenario}", arguments.rounds), || {
                // Another one begins in each round: who comes first may find a cooler machine.
                for place in 0..systems.len() {
                    let system = &systems[(place + round) % systems.len()];
                    scenario.measure(system, duration, &mut figures)?;
                }
                Ok(())
            })?;
        }
        // Written after each round: an interrupted run has its figures.
        report::write(&figures, &directory)?;
    }
    plot::write(&figures, &directory)?;
    println!("{}", report::table(&figures));
    println!("written to {}", directory.display());
    Ok(())
}
