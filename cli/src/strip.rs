// SPDX-License-Identifier: MIT OR Apache-2.0
//! A picture of a guest's memory in two rows: heat above, tier below.

use ept_virt_core::wire::StripCell;

use crate::style::Style;

/// From cold to hot, where there is no colour.
const ASCII_RAMP: &[&str] = &[".", ":", "-", "=", "+", "*", "#", "%", "@"];
const BAR_RAMP: &[&str] = &["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
/// From cold to hot: dark blue to yellow, of the 256 colours.
const COLOR_RAMP: &[u8] = &[17, 18, 54, 90, 126, 161, 196, 202, 208, 214, 226];

/// From this share of 255 on, one tier has it all, as far as the eye can see.
const MOSTLY: u32 = 230;

/// Joins neighbours so that no more than `width` cells are left. Of heat the
/// highest stays, so that a small hot block stays visible.
pub fn fit(cells: &[StripCell], width: usize) -> Vec<StripCell> {
    let columns = width.min(cells.len());
    (0..columns)
        .map(|column| join(&cells[column * cells.len() / columns..(column + 1) * cells.len() / columns]))
        .collect()
}

/// The two rows for `cells`, one mark for each.
pub fn rows(cells: &[StripCell], style: &Style) -> (String, String) {
    let heat = cells.iter().map(|cell| heat_mark(cell, style)).collect();
    let tier = cells.iter().map(|cell| tier_mark(cell, style)).collect();
    (heat, tier)
}

/// What the marks mean.
pub fn legend(style: &Style) -> String {
    let ramp: String = match (style.color, style.unicode) {
        (true, _) => COLOR_RAMP.iter().map(|color| block(*color)).collect(),
        (false, true) => BAR_RAMP.concat(),
        (false, false) => ASCII_RAMP.concat(),
    };
    let [dram, nvm, both] = ["D", "N", "m"].map(|mark| tier_color(mark, style));
    format!("cold {ramp} hot; {dram} DRAM, {nvm} NVM, {both} both, blank: not resident")
}

fn join(cells: &[StripCell]) -> StripCell {
    let sum = |value: fn(&StripCell) -> u32| cells.iter().map(value).sum::<u32>();
    let resident = sum(|cell| u32::from(cell.resident));
    let slow = sum(|cell| u32::from(cell.slow) * u32::from(cell.resident));
    // Means of bytes are bytes. Rounded up, so that little is not nothing.
    StripCell {
        heat: cells.iter().map(|cell| cell.heat).max().unwrap_or(0),
        slow: slow.div_ceil(resident.max(1)) as u8,
        resident: resident.div_ceil(cells.len().max(1) as u32) as u8,
    }
}

fn heat_mark(cell: &StripCell, style: &Style) -> String {
    if cell.resident == 0 && cell.heat == 0 {
        return " ".into();
    }
    let step = |steps: usize| usize::from(cell.heat) * (steps - 1) / 255;
    match (style.color, style.unicode) {
        (true, _) => block(COLOR_RAMP[step(COLOR_RAMP.len())]),
        (false, true) => BAR_RAMP[step(BAR_RAMP.len())].into(),
        (false, false) => ASCII_RAMP[step(ASCII_RAMP.len())].into(),
    }
}

fn tier_mark(cell: &StripCell, style: &Style) -> String {
    let slow = u32::from(cell.slow);
    let mark = match slow {
        _ if cell.resident == 0 => " ",
        MOSTLY.. => "N",
        _ if slow <= 255 - MOSTLY => "D",
        _ => "m",
    };
    tier_color(mark, style)
}

fn tier_color(mark: &str, style: &Style) -> String {
    match mark {
        "D" => style.paint("32", mark),
        "N" => style.paint("34", mark),
        "m" => style.paint("36", mark),
        _ => mark.into(),
    }
}

fn block(color: u8) -> String {
    format!("\x1b[48;5;{color}m \x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(heat: u8, slow: u8, resident: u8) -> StripCell {
        StripCell { heat, slow, resident }
    }

    #[test]
    fn a_small_hot_block_survives_a_narrow_terminal() {
        let mut cells = vec![cell(0, 0, 255); 1000];
        cells[700] = cell(255, 0, 255);
        let (heat, tier) = rows(&fit(&cells, 10), &Style::PLAIN);
        assert_eq!(heat, ".......@..");
        assert_eq!(tier, "DDDDDDDDDD");
    }

    #[test]
    fn tiers_are_weighted_by_what_is_resident() {
        let cells = [cell(0, 0, 255), cell(0, 255, 255), cell(0, 0, 0), cell(9, 255, 1)];
        assert_eq!(rows(&cells, &Style::PLAIN).1, "DN N");
        assert_eq!(rows(&fit(&cells, 2), &Style::PLAIN).1, "mN");
    }

    #[test]
    fn any_number_of_cells_fits_any_width() {
        for count in 0..40 {
            for width in 0..40 {
                assert_eq!(fit(&vec![cell(1, 255, 255); count], width).len(), count.min(width));
            }
        }
    }

    #[test]
    fn colour_ends_where_it_began() {
        let style = Style { color: true, ..Style::PLAIN };
        let (heat, tier) = rows(&[cell(255, 0, 255)], &style);
        assert_eq!((heat.as_str(), tier.as_str()), ("\x1b[48;5;226m \x1b[0m", "\x1b[32mD\x1b[0m"));
    }
}
