//! Samples of all rounds, and what is told of them.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use super::systems::{Kind, Layer, System};

/// Whether more is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Better {
    More,
    Less,
}

/// A thing that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Figure {
    pub(super) name: &'static str,
    pub(super) unit: &'static str,
    pub(super) better: Better,
    /// What we want to reach.
    pub(super) goal: Option<Goal>,
}

/// A goal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    /// At least this share of no mesh.
    OfNoMesh(f64),
    /// At most this, in the figure's unit.
    AtMost(f64),
    /// At most this much more than no mesh, in the figure's unit.
    AtMostMore(f64),
}

/// All samples.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    machine: BTreeMap<&'static str, String>,
    rounds: usize,
    seconds: u64,
    versions: Vec<(String, String)>,
    #[serde(skip)]
    pub(super) systems: Vec<Kind>,
    #[serde(skip)]
    pub(super) layer: Layer,
    pub(super) rows: Vec<Row>,
}

/// One figure of all systems.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    #[serde(flatten)]
    pub(super) figure: Figure,
    /// By system, one value a round.
    samples: BTreeMap<String, Vec<f64>>,
}

impl Figures {
    pub(super) fn new(systems: &[System], layer: Layer, rounds: usize, seconds: u64) -> Result<Self> {
        let kernel = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
        let processors = std::thread::available_parallelism()?.to_string();
        let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = model.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
        let machine = [
            ("kernel", kernel),
            ("processors", processors),
            ("model", model.unwrap_or("unknown").to_owned()),
        ];
        Ok(Self {
            machine: machine.into(),
            rounds,
            seconds,
            versions: systems.iter().map(|s| (s.kind.to_string(), s.version.clone())).collect(),
            systems: systems.iter().map(|s| s.kind).collect(),
            layer,
            rows: vec![],
        })
    }

    pub(super) fn add(&mut self, system: Kind, figure: Figure, value: f64) {
        let row = match self.rows.iter_mut().position(|row| row.figure.name == figure.name) {
            Some(place) => &mut self.rows[place],
            None => {
                self.rows.push(Row { figure, samples: BTreeMap::new() });
                self.rows.last_mut().expect("a row was just pushed")
            }
        };
        row.samples.entry(system.to_string()).or_default().push(value);
    }

    /// What it was measured on, in one line.
    pub(super) fn conditions(&self) -> String {
        let versions: Vec<String> = self
            .versions
            .iter()
            .filter(|(_, version)| !version.is_empty())
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        format!(
            "Linux {}, {} × {}; {} rounds of {} s; {}",
            self.machine["kernel"],
            self.machine["processors"],
            self.machine["model"],
            self.rounds,
            self.seconds,
            versions.join(", ")
        )
    }
}

impl Row {
    /// The median over the rounds.
    pub(super) fn median(&self, system: Kind) -> Option<f64> {
        let mut values = self.samples.get(&system.to_string())?.clone();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        Some(if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        })
    }

    /// The median of the ratios to no mesh, each within its round.
    pub(super) fn ratio(&self, system: Kind) -> Option<f64> {
        let base = self.samples.get(&Kind::NoMesh.to_string())?;
        let values = self.samples.get(&system.to_string())?;
        let mut ratios: Vec<f64> = values
            .iter()
            .zip(base)
            .filter(|(_, base)| **base > 0.0)
            .map(|(value, base)| value / base)
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios.get(ratios.len() / 2).copied()
    }

    /// Half the distance between the extremes, as a share of the median.
    pub(super) fn spread(&self, system: Kind) -> Option<f64> {
        let values = self.samples.get(&system.to_string())?;
        let (low, high) =
            values.iter().fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
        let median = self.median(system)?;
        (values.len() > 1 && median != 0.0).then(|| (high - low) / 2.0 / median)
    }

    /// Whether a system reached the goal.
    pub(super) fn reached(&self, judged: Kind) -> Option<bool> {
        match self.figure.goal? {
            Goal::OfNoMesh(share) => Some(self.ratio(judged)? >= share),
            Goal::AtMost(limit) => Some(self.median(judged)? <= limit),
            Goal::AtMostMore(limit) => Some(self.median(judged)? - self.median(Kind::NoMesh)? <= limit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIGURE: Figure =
        Figure { name: "bulk", unit: "Gbit/s", better: Better::More, goal: Some(Goal::OfNoMesh(0.5)) };

    #[test]
    fn ratios_are_taken_within_a_round() {
        let row = Row {
            figure: FIGURE,
            samples: BTreeMap::from([
                ("no mesh".into(), vec![10.0, 20.0, 40.0]),
                ("nodemesh".into(), vec![6.0, 10.0, 24.0]),
            ]),
        };
        assert_eq!(row.median(Kind::Nodemesh), Some(10.0));
        assert_eq!(row.ratio(Kind::Nodemesh), Some(0.6));
        assert_eq!(row.reached(Kind::Nodemesh), Some(true));
        assert_eq!(row.spread(Kind::Nodemesh), Some(0.9));
        assert_eq!(row.median(Kind::Envoy), None);
    }
}
