//! Keeps the maps pinned: by the pins the next agent finds the maps that the attached programs use.
//!
//! An agent that found none would make maps of its own, and what its predecessor carries would not be known to its
//! programs.

use std::path::{Path, PathBuf};

use aya::maps::MapData;

/// Every map that outlives the agent.
const MAPS: [&str; 9] =
    ["DESTINATIONS", "BLOCKS", "LISTENERS", "GUARDED", "SOURCES", "PROBES", "REOPENED", "CONFIG", "REFUSED"];

/// The maps behind the pins.
#[derive(Debug)]
pub struct Pins {
    held: Vec<(PathBuf, MapData)>,
}

impl Pins {
    /// Takes hold of the pinned maps. They have to be loaded.
    pub fn hold(bpffs: &Path) -> anyhow::Result<Self> {
        let hold = |name: &str| {
            let path = bpffs.join(name);
            let map = MapData::from_pin(&path)
                .map_err(|error| anyhow::anyhow!("cannot open {}: {error}", path.display()))?;
            Ok((path, map))
        };
        Ok(Self { held: MAPS.into_iter().map(hold).collect::<anyhow::Result<_>>()? })
    }

    /// Pins again what was removed; how many that were.
    pub fn ensure(&self) -> anyhow::Result<usize> {
        let mut repaired = 0;
        for (path, map) in self.held.iter().filter(|(path, _)| !path.exists()) {
            map.pin(path)?;
            repaired += 1;
        }
        Ok(repaired)
    }
}
