// SPDX-License-Identifier: MIT OR Apache-2.0
//! `--watch`: the same answer again and again, until somebody has seen enough.

use std::io::{self, IsTerminal};
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use crate::failure::Failure;
use crate::output::write_or_end;
use crate::style::is_dumb;

/// Seconds between two answers, at least and at most.
const SECONDS: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

/// How long Ctrl-C waits for an answer that is being written, in steps.
const LAST_WORDS: (u32, Duration) = (20, Duration::from_millis(10));

/// Where the answers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A terminal: each answer takes the place of the one before.
    Screen,
    /// A file or pipe for people: an empty line between two answers.
    Pages,
    /// For programs: a line for each answer.
    Lines,
}

impl Place {
    /// Where standard output leads to.
    pub fn of_stdout(json: bool) -> Self {
        match json {
            true => Place::Lines,
            false if io::stdout().is_terminal() && !is_dumb() => Place::Screen,
            false => Place::Pages,
        }
    }
}

/// Reads the value of `--watch`.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.parse().ok().filter(|seconds| SECONDS.contains(seconds));
    let seconds = seconds.ok_or_else(|| format!("give seconds, {} to {}", SECONDS.start(), SECONDS.end()))?;
    Ok(Duration::from_secs_f64(seconds))
}

/// Shows what `answer` returns, until the reader goes, until SIGINT or SIGTERM
/// end the program with success, or until there is no answer.
pub fn watch(
    every: Duration,
    place: Place,
    mut answer: impl FnMut() -> Result<String, Failure>,
) -> Result<(), Failure> {
    let writing = Arc::new(Mutex::new(()));
    end_on_signals(Arc::clone(&writing))
        .map_err(|error| Failure::refused(format!("cannot watch for signals: {error}")))?;
    let mut first = true;
    loop {
        let text = answer()?;
        let text = match place {
            Place::Screen => screen(&text, height(), first),
            Place::Pages if !first => format!("\n{text}"),
            Place::Pages | Place::Lines => text,
        };
        let whole = writing.lock().unwrap_or_else(PoisonError::into_inner);
        if !write_or_end(&text)? {
            return Ok(());
        }
        drop(whole);
        first = false;
        thread::sleep(every);
    }
}

/// Ends the program at SIGINT and SIGTERM, not amid an answer; but a reader that
/// reads no more is not waited for.
pub fn end_on_signals(writing: Arc<Mutex<()>>) -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        let waited = signals.wait();
        let _whole = (0..LAST_WORDS.0).find_map(|_| {
            let whole = writing.try_lock().ok();
            if whole.is_none() {
                thread::sleep(LAST_WORDS.1);
            }
            whole
        });
        process::exit(if waited.is_ok() { 0 } else { 1 });
    })?;
    Ok(())
}

fn height() -> usize {
    terminal_size::terminal_size().map_or(usize::MAX, |(_, height)| usize::from(height.0))
}

/// `text` over what the screen showed before, without flicker: each line is
/// cleared to its end, and all below at last. What the screen has no room for is
/// counted.
fn screen(text: &str, height: usize, first: bool) -> String {
    let lines: Vec<&str> = text.trim_matches('\n').lines().collect();
    let room = height.saturating_sub(1).max(1);
    let shown = if lines.len() > room { room - 1 } else { lines.len() };
    let mut drawn = String::from(if first { "\x1b[2J\x1b[H" } else { "\x1b[H" });
    for line in &lines[..shown] {
        drawn += line;
        drawn += "\x1b[K\n";
    }
    if shown < lines.len() {
        drawn += &format!("... {} lines more\x1b[K\n", lines.len() - shown);
    }
    drawn + "\x1b[J"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_takes_the_place_of_the_one_before() {
        assert_eq!(screen("\na\nb\n", 10, true), "\x1b[2J\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        assert_eq!(screen("a\n", 10, false), "\x1b[Ha\x1b[K\n\x1b[J");
        assert_eq!(screen("", 10, false), "\x1b[H\x1b[J");
    }

    #[test]
    fn what_has_no_room_is_counted() {
        let text = "1\n2\n3\n4\n5\n";
        assert_eq!(screen(text, 6, false).lines().count(), 6);
        assert!(!screen(text, 6, false).contains("more"));
        assert_eq!(screen(text, 5, false), "\x1b[H1\x1b[K\n2\x1b[K\n3\x1b[K\n... 2 lines more\x1b[K\n\x1b[J");
        for height in 0..3 {
            assert_eq!(screen(text, height, false), "\x1b[H... 5 lines more\x1b[K\n\x1b[J");
        }
    }

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds("2"), Ok(Duration::from_secs(2)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["", "0", "0.01", "-1", "nan", "inf", "1e9", "2s"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
