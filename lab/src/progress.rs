// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is going on, with elapsed times: spinners in a terminal, plain lines
//! elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Where progress is shown: standard error.
#[derive(Clone)]
pub struct Progress {
    /// All steps under way, in a terminal: several threads may have one each.
    bars: Option<MultiProgress>,
    started: Instant,
}

/// One step under way. Dropping it without [`Step::done`] marks it as failed.
pub struct Step {
    what: String,
    started: Instant,
    bar: Option<ProgressBar>,
    bars: Option<MultiProgress>,
    finished: Cell<bool>,
}

impl Progress {
    /// Shows spinners when standard error is a terminal.
    pub fn new() -> Self {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { bars, started: Instant::now() }
    }

    /// Starts a step.
    pub fn step(&self, what: impl Into<String>) -> Step {
        let what = what.into();
        let bar = if let Some(bars) = &self.bars {
            let bar = bars.add(ProgressBar::new_spinner().with_message(what.clone()));
            bar.set_style(
                ProgressStyle::with_template("{spinner} {msg} [{elapsed}]")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.enable_steady_tick(Duration::from_millis(120));
            Some(bar)
        } else {
            eprintln!("[{:6.1} s] {what} ...", self.started.elapsed().as_secs_f64());
            None
        };
        Step { what, started: Instant::now(), bar, bars: self.bars.clone(), finished: Cell::new(false) }
    }

    /// Prints a line that stays, above the steps under way.
    pub fn line(&self, text: &str) {
        print_above(self.bars.as_ref(), text);
    }

    /// Time since the program started.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Step {
    /// Says what the step is at now.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{}: {text}", self.what)),
            None => eprintln!("           {text}"),
        }
    }

    /// Ends the step well; `detail` may be empty.
    pub fn done(self, detail: &str) {
        self.end("✓", detail);
    }

    fn end(&self, mark: &str, detail: &str) {
        self.finished.set(true);
        let took = self.started.elapsed().as_secs_f64();
        let detail = if detail.is_empty() { String::new() } else { format!(": {detail}") };
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        print_above(self.bars.as_ref(), &format!("{mark} {}{detail} ({took:.1} s)", self.what));
    }
}

fn print_above(bars: Option<&MultiProgress>, text: &str) {
    match bars {
        Some(bars) => bars.suspend(|| eprintln!("{text}")),
        None => eprintln!("{text}"),
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished.get() {
            self.end("✗", "failed");
        }
    }
}
