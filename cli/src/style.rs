// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the place that text goes to can show.

use std::env;
use std::io::{self, IsTerminal};

use clap::ValueEnum;
use ept_virt_core::text::printable;

/// When to use colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always, also into a file or pipe.
    Always,
    /// Never.
    Never,
}

/// What can be shown. Text for files and pipes is plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Escape sequences for colour.
    pub color: bool,
    /// Characters beyond ASCII.
    pub unicode: bool,
    /// Columns.
    pub width: usize,
    /// Break long lines; text for programs keeps them whole.
    pub wrap: bool,
}

impl Style {
    /// Narrowest and widest line; a picture of the memory gains nothing beyond.
    const WIDTHS: (usize, usize) = (40, 160);

    /// No colour, ASCII, pictures of 80 columns.
    pub const PLAIN: Style = Style { color: false, unicode: false, width: 80, wrap: false };

    /// The style of standard output.
    pub fn of_stdout(choice: ColorChoice) -> Self {
        let terminal = io::stdout().is_terminal();
        let set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let utf8 = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| env::var(name).ok().filter(|value| !value.is_empty()))
            .is_some_and(|locale| locale.to_ascii_lowercase().replace('-', "").contains("utf8"));
        let (color, unicode) = match choice {
            ColorChoice::Always => (true, true),
            ColorChoice::Never => (false, terminal && utf8),
            ColorChoice::Auto => (terminal && !is_dumb() && !set("NO_COLOR"), terminal && utf8),
        };
        let width = terminal_size::terminal_size()
            .map(|(width, _)| usize::from(width.0))
            .or_else(|| env::var("COLUMNS").ok()?.parse().ok())
            .unwrap_or(Style::PLAIN.width)
            .clamp(Style::WIDTHS.0, Style::WIDTHS.1);
        Style { color, unicode, width, wrap: terminal }
    }

    /// `text` with an SGR sequence around it, as "1" for bold.
    pub fn paint(&self, sgr: &str, text: &str) -> String {
        match self.color {
            true => format!("\x1b[{sgr}m{text}\x1b[0m"),
            false => text.into(),
        }
    }
}

/// Whether the terminal, if there is one, takes no escape sequences, as far as is known.
pub fn is_dumb() -> bool {
    env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb")
}

/// `text` without control characters: names and messages come from others and
/// must not steer the terminal. Not every terminal has a letter beyond ASCII.
pub fn harmless(text: &str) -> String {
    printable(text, '?')
}

/// `text` in lines of at most `room` letters, broken between words.
pub fn wrapped(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.len() - 1;
        let used = lines[last].chars().count();
        if used > 0 && used + 1 + word.chars().count() > room {
            lines.push(word.into());
        } else {
            let space = if used > 0 { " " } else { "" };
            lines[last] += &format!("{space}{word}");
        }
    }
    lines
}
