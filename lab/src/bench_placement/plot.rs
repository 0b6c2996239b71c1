// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pictures: the share of accesses that DRAM served, over time.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;

use super::cell::{Cell, Period};

const SIZE: (u32, u32) = (900, 420);

/// Colours that differ for those who see few colours too (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];

/// Draws all cells of one workload in one kind of memory, with the oracle of the
/// first.
pub fn draw(path: &Path, title: &str, cells: &[&Cell]) -> Result<()> {
    let mut svg = String::new();
    draw_into(&mut svg, title, cells).map_err(|error| anyhow!("drawing {}: {error}", path.display()))?;
    fs::write(path, svg).with_context(|| format!("writing {}", path.display()))
}

fn draw_into(svg: &mut String, title: &str, cells: &[&Cell]) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let end = cells.iter().map(|cell| cell.seconds()).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..end, 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc("seconds from the contestant's start (emulated)")
        .y_desc("% of accesses served by DRAM")
        .x_labels(10)
        .y_labels(11)
        .light_line_style(WHITE)
        .draw()?;
    let longest = cells.iter().max_by_key(|cell| cell.periods.len());
    if let Some(cell) = longest {
        let points = line(cell, |period| period.best);
        chart
            .draw_series(DashedLineSeries::new(points, 5, 4, BLACK.stroke_width(1)))?
            .label("oracle: best pages of the phase")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK));
    }
    for (cell, colour) in cells.iter().zip(COLOURS.iter().cycle()) {
        chart
            .draw_series(LineSeries::new(line(cell, |period| period.dram), colour.stroke_width(2)))?
            .label(cell.contestant.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}

fn line(cell: &Cell, what: impl Fn(&Period) -> f64) -> Vec<(f64, f64)> {
    let point =
        |period: &Period| (period.end_ms as f64 / 1e3, 100.0 * what(period) / period.accesses.max(1) as f64);
    cell.periods.iter().map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_placement::figures::tests::cell;

    #[test]
    fn every_contestant_has_a_line() {
        let cells = [cell("static", "ept-virt"), cell("static", "damon")];
        let mut svg = String::new();
        draw_into(&mut svg, "static in memfd", &cells.iter().collect::<Vec<_>>()).unwrap();
        for words in ["static in memfd", "ept-virt", "damon", "oracle"] {
            assert!(svg.contains(words), "{words}");
        }
        assert!(svg.matches("<polyline").count() >= 2);
        draw_into(&mut String::new(), "nothing", &[]).unwrap();
    }
}
