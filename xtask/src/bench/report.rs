//! Results as JSON, and as a table for people and for docs/PERFORMANCE.md.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::{
    figures::{Figures, Goal, Row},
    systems::Kind,
};

/// Writes `results.json` and `table.md`.
pub(super) fn write(figures: &Figures, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    fs::write(directory.join("results.json"), serde_json::to_string_pretty(figures)?)?;
    fs::write(directory.join("table.md"), table(figures))?;
    Ok(())
}

/// Medians, with the ratio to no mesh within the rounds in brackets, and what was wanted.
pub(super) fn table(figures: &Figures) -> String {
    let mut text = format!("{}\n\n| |", figures.conditions());
    for system in &figures.systems {
        text += &format!(" {system} |");
    }
    text += &format!(" wanted of {} |\n|---|", figures.layer.judged());
    text += &"---|".repeat(figures.systems.len() + 1);
    text += "\n";
    for row in &figures.rows {
        text += &format!("| {}, {} |", row.figure.name, row.figure.unit);
        for system in &figures.systems {
            text += &format!(" {} |", cell(row, *system));
        }
        text += &format!(" {} |\n", wanted(row, figures.layer.judged()));
    }
    text
}

fn cell(row: &Row, system: Kind) -> String {
    let Some(median) = row.median(system) else { return "–".into() };
    let ratio = match row.ratio(system) {
        Some(ratio) if system != Kind::NoMesh => format!(" ({ratio:.2})"),
        _ => String::new(),
    };
    let spread = row.spread(system).map(|spread| format!(" ±{:.0} %", spread * 100.0)).unwrap_or_default();
    format!("{}{ratio}{spread}", number(median))
}

fn wanted(row: &Row, judged: Kind) -> String {
    let goal = match row.figure.goal {
        None => return String::new(),
        Some(Goal::OfNoMesh(share)) => format!("≥ ({share})"),
        Some(Goal::AtMost(limit)) => format!("≤ {limit}"),
        Some(Goal::AtMostMore(limit)) => format!("≤ no mesh + {limit}"),
    };
    match row.reached(judged) {
        Some(true) => format!("{goal}: reached"),
        Some(false) => format!("{goal}: **missed**"),
        None => goal,
    }
}

/// Three figures, or all before the point.
fn number(value: f64) -> String {
    match value {
        v if v >= 1e4 => format!("{:.1}k", v / 1e3),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}
