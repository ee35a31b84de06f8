//! One SVG of bars for every figure.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::figures::{Better, Figures, Row};

const WIDTH: u32 = 560;
const HEIGHT: u32 = 260;
/// The least that an axis reaches to: what nothing failed of has no bar.
const LEAST: f64 = 1e-6;

/// Writes a plot for each figure that more than one system has.
pub(super) fn write(figures: &Figures, directory: &Path) -> Result<()> {
    for row in &figures.rows {
        let file = directory.join(format!("{}.svg", file_name(row.figure.name)));
        draw(figures, row, &file).with_context(|| format!("drawing {}", file.display()))?;
    }
    Ok(())
}

/// `CPU per GB, 1 stream` → `cpu-per-gb-1-stream`.
fn file_name(figure: &str) -> String {
    let words = figure.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

fn draw(figures: &Figures, row: &Row, file: &Path) -> Result<()> {
    let bars: Vec<(String, f64)> = figures
        .systems
        .iter()
        .filter_map(|system| Some((system.to_string(), row.median(*system)?)))
        .collect();
    let highest = bars.iter().map(|(_, value)| *value).fold(LEAST, f64::max);
    let area = SVGBackend::new(file, (WIDTH, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let better = match row.figure.better {
        Better::More => "more is better",
        Better::Less => "less is better",
    };
    let caption = format!("{}, {} ({better})", row.figure.name, row.figure.unit);
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, ("sans-serif", 15))
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(56)
        .build_cartesian_2d((0..bars.len()).into_segmented(), 0.0..highest * 1.15)?;
    let name = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(place) => bars.get(*place).map(|bar| bar.0.clone()).unwrap_or_default(),
        _ => String::new(),
    };
    chart.configure_mesh().disable_x_mesh().x_labels(bars.len()).x_label_formatter(&name).draw()?;
    chart.draw_series(bars.iter().enumerate().map(|(place, (system, value))| {
        let colour =
            if system.starts_with("nodemesh") { RGBColor(200, 80, 40) } else { RGBColor(110, 130, 150) };
        let corners = [(SegmentValue::Exact(place), 0.0), (SegmentValue::Exact(place + 1), *value)];
        let mut bar = Rectangle::new(corners, colour.filled());
        bar.set_margin(0, 0, 14, 14);
        bar
    }))?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_gives_a_file_name() {
        assert_eq!(file_name("CPU per GB, 1 stream"), "cpu-per-gb-1-stream");
        assert_eq!(file_name("… p50"), "p50");
    }
}
