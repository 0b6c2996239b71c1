// SPDX-License-Identifier: MIT OR Apache-2.0
//! A picture of a simulation, as SVG.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use crate::failure::Failure;

use super::report::{Report, Run};

/// Width and height.
const SIZE: (u32, u32) = (900, 640);

/// Blue and orange are told apart by all but everyone (Okabe and Ito, 2008).
const OURS: RGBColor = RGBColor(0, 114, 178);
const ORACLE: RGBColor = RGBColor(230, 159, 0);

/// Draws one run over time, or several against their DRAM.
pub fn draw(file: &Path, report: &Report) -> Result<(), Failure> {
    let mut svg = String::new();
    let drawn = match report.runs.as_slice() {
        [run] => draw_run(&mut svg, &report.guests, run),
        runs => draw_runs(&mut svg, &report.guests, runs),
    };
    drawn.map_err(|error| Failure::refused(format!("the picture can not be drawn: {error}")))?;
    std::fs::write(file, svg)
        .map_err(|error| Failure::unreachable(format!("cannot write {}: {error}", file.display())))
}

/// A line of a chart.
struct Line {
    name: &'static str,
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

/// A chart's words.
struct Words<'a> {
    title: &'a str,
    x: &'a str,
    y: &'a str,
}

fn percent(points: impl Iterator<Item = (f64, Option<f64>)>) -> Vec<(f64, f64)> {
    points.filter_map(|(x, part)| part.map(|part| (x, part * 100.0))).collect()
}

fn draw_run(svg: &mut String, guests: &str, run: &Run) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(SIZE.1 * 3 / 5);
    let rounds = || run.rounds.iter();
    let hits = [
        Line {
            name: "oracle",
            color: ORACLE,
            points: percent(rounds().map(|round| (round.end_s, round.oracle_hit_ratio))),
        },
        Line {
            name: "ept-virt",
            color: OURS,
            points: percent(rounds().map(|round| (round.end_s, round.hit_ratio))),
        },
    ];
    let title = format!("{guests}: DRAM {}", run.dram_share);
    chart(&upper, &Words { title: &title, x: "seconds", y: "hits in DRAM, %" }, Some(100.0), &hits)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let moved = [
        Line {
            name: "oracle",
            color: ORACLE,
            points: rounds().map(|round| (round.end_s, mib(round.oracle_moved_bytes))).collect(),
        },
        Line {
            name: "ept-virt",
            color: OURS,
            points: rounds().map(|round| (round.end_s, mib(round.moved_bytes))).collect(),
        },
    ];
    chart(&lower, &Words { title: "", x: "seconds", y: "MiB moved" }, None, &moved)?;
    root.present()?;
    Ok(())
}

fn draw_runs(svg: &mut String, guests: &str, runs: &[Run]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(SIZE.1 * 3 / 5);
    let share = |run: &Run| run.dram_share.trim_end_matches('%').parse::<f64>().unwrap_or_default();
    let mut runs: Vec<&Run> = runs.iter().collect();
    runs.sort_by(|a, b| share(a).total_cmp(&share(b)));
    let each = || runs.iter().map(|run| (share(run), &run.summary));
    let hits = [
        Line {
            name: "oracle",
            color: ORACLE,
            points: percent(each().map(|(x, total)| (x, total.late_oracle_hit_ratio))),
        },
        Line {
            name: "ept-virt",
            color: OURS,
            points: percent(each().map(|(x, total)| (x, total.late_hit_ratio))),
        },
    ];
    let words = Words { title: guests, x: "DRAM, % of memory", y: "hits in DRAM, %" };
    chart(&upper, &words, Some(100.0), &hits)?;
    let slower = each().filter_map(|(x, total)| total.slowdown.map(|slowdown| (x, slowdown)));
    let lines = [Line { name: "ept-virt", color: OURS, points: slower.collect() }];
    let words = Words { title: "", x: "DRAM, % of memory", y: "time of an access / DRAM's" };
    chart(&lower, &words, None, &lines)?;
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Lines over one axis, from 0 up to `top` or to the highest point.
fn chart(area: &Area<'_>, words: &Words<'_>, top: Option<f64>, lines: &[Line]) -> Result<(), Box<dyn Error>> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let right = points().map(|(x, _)| *x).fold(1.0, f64::max);
    let top = top.unwrap_or_else(|| points().map(|(_, y)| *y).fold(0.0, f64::max).max(0.001) * 1.05);
    let mut builder = ChartBuilder::on(area);
    builder.margin(12).x_label_area_size(36).y_label_area_size(64);
    if !words.title.is_empty() {
        builder.caption(words.title, ("sans-serif", 16));
    }
    let mut chart = builder.build_cartesian_2d(0.0..right, 0.0..top)?;
    chart.configure_mesh().x_desc(words.x).y_desc(words.y).light_line_style(TRANSPARENT).draw()?;
    for line in lines {
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), line.color.stroke_width(2)))?
            .label(line.name)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], line.color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}
