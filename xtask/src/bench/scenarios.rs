//! What is measured, and what we want to reach.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    cost,
    figures::{
        Better::{Less, More},
        Figure, Figures, Goal,
    },
    load::{self, Keep},
    systems::{Kind, Layer, System},
};

/// Idle connections whose memory is measured.
const IDLE: usize = 1000;
/// How long processes may take to give back what they do not need, before memory is measured.
const SETTLE: Duration = Duration::from_secs(2);
/// Connections that stall beside the measured ones.
const STALLED: usize = 16;
/// Connections of the measured ones then.
const BESIDE: u32 = 4;
/// Connections beside which rules change.
const WHILE_RULES_CHANGE: u32 = 64;
/// From one change of a rule to the next: a thousand a minute.
const BETWEEN_CHANGES: Duration = Duration::from_millis(60);

/// A scenario; each gives one or more figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scenario {
    /// iperf3, one stream.
    Bulk1,
    /// iperf3, eight streams.
    Bulk8,
    /// Small HTTP/1.1 requests on one connection.
    Requests1,
    /// On 16.
    Requests16,
    /// On 64.
    Requests64,
    /// A connection for each request, 16 at a time.
    Connections,
    /// Small requests while other connections stall.
    Stalled,
    /// Small requests by HTTP/2, 16 at once on each of 8 connections.
    Streams,
    /// Small requests on 64 connections while the rule that they fall under changes a thousand times a minute, with routes alone.
    Changes,
}

impl std::fmt::Display for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bulk1 => "bulk, 1 stream",
            Self::Bulk8 => "bulk, 8 streams",
            Self::Requests1 => "requests, 1 connection",
            Self::Requests16 => "requests, 16 connections",
            Self::Requests64 => "requests, 64 connections",
            Self::Connections => "new connections",
            Self::Stalled => "requests beside stalled connections",
            Self::Streams => "HTTP/2, 8 × 16 streams",
            Self::Changes => "requests beside 1,000 rule changes a minute",
        })
    }
}

const fn figure(
    name: &'static str,
    unit: &'static str,
    better: super::figures::Better,
    goal: Option<Goal>,
) -> Figure {
    Figure { name, unit, better, goal }
}

const IDLE_PROCESS: &str = "resident memory of a fresh process, idle";
const IDLE_CONNECTION: &str = "memory per idle connection, both processes";

impl Scenario {
    /// Those of a layer, in the order of the table.
    pub(super) fn of(layer: Layer) -> &'static [Self] {
        match layer {
            Layer::Connections => &[
                Self::Bulk1,
                Self::Bulk8,
                Self::Requests1,
                Self::Requests16,
                Self::Requests64,
                Self::Connections,
                Self::Streams,
                Self::Stalled,
            ],
            Layer::Requests => &[
                Self::Requests1,
                Self::Requests16,
                Self::Requests64,
                Self::Connections,
                Self::Streams,
                Self::Changes,
            ],
        }
    }

    /// Takes one sample of each figure.
    pub(super) fn measure(self, system: &System, duration: Duration, figures: &mut Figures) -> Result<()> {
        let of_layer = |connections: Option<Goal>, requests: Goal| match figures.layer {
            Layer::Connections => connections,
            Layer::Requests => Some(requests),
        };
        match self {
            Self::Bulk1 => bulk(
                system,
                1,
                duration,
                figures,
                [
                    figure("bulk, 1 stream", "Gbit/s", More, Some(Goal::OfNoMesh(0.42))),
                    figure("CPU per GB, 1 stream", "s", Less, Some(Goal::AtMost(1.5))),
                ],
            ),
            Self::Bulk8 => bulk(
                system,
                8,
                duration,
                figures,
                [
                    figure("bulk, 8 streams", "Gbit/s", More, Some(Goal::OfNoMesh(0.45))),
                    figure("CPU per GB, 8 streams", "s", Less, Some(Goal::AtMost(1.5))),
                ],
            ),
            Self::Requests1 => requests(
                system,
                1,
                Keep::Alive,
                duration,
                figures,
                &[
                    (figure("requests, 1 connection", "1/s", More, None), Said::Rate),
                    (figure("… p50", "µs", Less, of_layer(None, Goal::AtMostMore(100.0))), Said::P50),
                ],
            ),
            Self::Requests16 => requests(
                system,
                16,
                Keep::Alive,
                duration,
                figures,
                &[
                    (figure("requests, 16 connections", "1/s", More, None), Said::Rate),
                    (figure("… p99, 16 connections", "µs", Less, None), Said::P99),
                ],
            ),
            Self::Requests64 => requests(
                system,
                64,
                Keep::Alive,
                duration,
                figures,
                &[
                    (
                        figure("requests, 64 connections", "1/s", More, of_layer(None, Goal::OfNoMesh(0.30))),
                        Said::Rate,
                    ),
                    (figure("… p99, 64 connections", "µs", Less, None), Said::P99),
                    (
                        figure(
                            "CPU per 1M requests, 64 connections",
                            "s",
                            Less,
                            of_layer(Some(Goal::AtMost(28.0)), Goal::AtMost(34.0)),
                        ),
                        Said::CpuPerMillion,
                    ),
                ],
            ),
            Self::Connections => requests(
                system,
                16,
                Keep::Close,
                duration,
                figures,
                &[
                    (
                        figure(
                            "new connections",
                            "1/s",
                            More,
                            of_layer(Some(Goal::OfNoMesh(0.28)), Goal::OfNoMesh(0.45)),
                        ),
                        Said::Rate,
                    ),
                    (
                        figure("CPU per 1M connections", "s", Less, Some(Goal::AtMost(110.0))),
                        Said::CpuPerMillion,
                    ),
                ],
            ),
            Self::Stalled => stalled(system, duration, figures),
            Self::Changes => changes(system, duration, figures),
            Self::Streams => {
                let rate =
                    figure("HTTP/2, 8 × 16 streams", "1/s", More, of_layer(None, Goal::OfNoMesh(0.70)));
                let cost = figure("CPU per 1M requests, HTTP/2", "s", Less, None);
                let load = || load::streams(&system.client, system.http2(), duration);
                let (said, cpu) = costing(system, load)?;
                figures.add(system.kind, rate, said.per_second);
                if let Some(cpu) = cpu {
                    figures.add(system.kind, cost, cpu / said.count * 1e6);
                }
                Ok(())
            }
        }
    }
}

/// Memory of processes that have done nothing yet, and then of connections that do nothing. Once, before any load:
/// an allocator that has grown would hide it.
pub(super) fn at_rest(system: &System, figures: &mut Figures) -> Result<()> {
    let processes = system.processes();
    if processes.is_empty() {
        return Ok(());
    }
    // What requests need is told, and nothing is wanted of it.
    let of_connections = |limit| (figures.layer == Layer::Connections).then_some(Goal::AtMost(limit));
    let process = figure(IDLE_PROCESS, "MB", Less, of_connections(15.0));
    let connection = figure(IDLE_CONNECTION, "KB", Less, of_connections(16.0));
    thread::sleep(SETTLE);
    let largest = processes.iter().map(|pid| cost::resident_kib(*pid)).max().unwrap_or(0);
    figures.add(system.kind, process, largest as f64 * 1024.0 / 1e6);
    let before = cost::memory_kib(&processes);
    let idle = load::idle(&system.client, system.http(), IDLE)?;
    thread::sleep(SETTLE);
    let grown = cost::memory_kib(&system.processes()).saturating_sub(before);
    figures.add(system.kind, connection, grown as f64 / idle.len() as f64);
    Ok(())
}

fn bulk(
    system: &System,
    streams: u32,
    duration: Duration,
    figures: &mut Figures,
    [rate, cost]: [Figure; 2],
) -> Result<()> {
    let (said, cpu) = costing(system, || load::bulk(&system.client, &system.server, streams, duration))?;
    figures.add(system.kind, rate, said.gigabits_per_second);
    if let Some(cpu) = cpu {
        figures.add(system.kind, cost, cpu / said.gigabytes);
    }
    Ok(())
}

/// Which of wrk's figures.
#[derive(Debug, Clone, Copy)]
enum Said {
    Rate,
    P50,
    P99,
    CpuPerMillion,
}

fn requests(
    system: &System,
    connections: u32,
    keep: Keep,
    duration: Duration,
    figures: &mut Figures,
    wanted: &[(Figure, Said)],
) -> Result<()> {
    let load = || load::requests(&system.client, system.http(), connections, keep, duration);
    let (said, cpu) = costing(system, load)?;
    for (figure, which) in wanted {
        let value = match which {
            Said::Rate => said.per_second,
            Said::P50 => said.p50_us,
            Said::P99 => said.p99_us,
            Said::CpuPerMillion => match cpu {
                Some(cpu) => cpu / said.count * 1e6,
                None => continue,
            },
        };
        figures.add(system.kind, *figure, value);
    }
    Ok(())
}

fn stalled(system: &System, duration: Duration, figures: &mut Figures) -> Result<()> {
    const RATIO: Figure =
        figure("p99 beside 16 stalled connections, to without", "×", Less, Some(Goal::AtMost(1.25)));
    let load = || load::requests(&system.client, system.http(), BESIDE, Keep::Alive, duration);
    let alone = load()?;
    let stalled = load::stalled(&system.client, &system.server, STALLED)?;
    let beside = load()?;
    drop(stalled);
    figures.add(system.kind, RATIO, beside.p99_us / alone.p99_us);
    Ok(())
}

/// Requests without changes, and then beside them. Of systems without rules nothing is told.
fn changes(system: &System, duration: Duration, figures: &mut Figures) -> Result<()> {
    const RATE: Figure =
        figure("beside 1,000 rule changes a minute: requests, 64 connections", "1/s", More, None);
    const RATE_RATIO: Figure = figure("… to without", "×", More, None);
    const P99: Figure = figure("… p99, 64 connections, beside changes", "µs", Less, None);
    const P99_RATIO: Figure = figure("… p99 to without", "×", Less, None);
    const FAILED: Figure = figure("… requests that failed", "of all", Less, Some(Goal::AtMost(0.0)));
    const CHANGES: Figure = figure("… changes", "1/min", More, None);
    if system.kind != Kind::NodemeshHttp {
        return Ok(());
    }
    system.change_rule(Some(0))?;
    system.await_change(0)?;
    let load =
        || load::some_requests(&system.client, system.http(), WHILE_RULES_CHANGE, Keep::Alive, duration);
    let alone = load()?;
    let (stop, stopped) = mpsc::channel::<()>();
    let (beside, changed) = thread::scope(|scope| {
        let changing = scope.spawn(move || change_rules(system, &stopped));
        let beside = load();
        drop(stop);
        (beside, changing.join().expect("whoever changes rules does not panic"))
    });
    let (beside, (count, took)) = (beside?, changed?);
    system.await_change(count)?;
    system.change_rule(None)?;
    for (figure, value) in [
        (RATE, beside.per_second),
        (RATE_RATIO, beside.per_second / alone.per_second),
        (P99, beside.p99_us),
        (P99_RATIO, beside.p99_us / alone.p99_us),
        (FAILED, alone.failed + beside.failed),
        (CHANGES, f64::from(count) / took.as_secs_f64() * 60.0),
    ] {
        figures.add(system.kind, figure, value);
    }
    Ok(())
}

/// Changes the rule at a steady pace until it is told to stop: how often, and in which time.
fn change_rules(system: &System, stopped: &mpsc::Receiver<()>) -> Result<(u32, Duration)> {
    let (began, mut count) = (Instant::now(), 0);
    loop {
        count += 1;
        system.change_rule(Some(count))?;
        let wait = (BETWEEN_CHANGES * count).saturating_sub(began.elapsed());
        if stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
            return Ok((count, began.elapsed()));
        }
    }
}

/// Runs a load, and says the CPU time that the system's processes took for it, if it has any.
fn costing<T>(system: &System, load: impl FnOnce() -> Result<T>) -> Result<(T, Option<f64>)> {
    let processes = system.processes();
    let before = cost::cpu_seconds(&processes);
    let said = load()?;
    let used = cost::cpu_seconds(&processes) - before;
    Ok((said, (!processes.is_empty()).then_some(used)))
}
