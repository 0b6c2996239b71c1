// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verdicts as they travel out of an emulated host: one line each.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

/// How a test ended, if it did not fail.
#[derive(Debug)]
pub enum Outcome {
    /// What was seen, in figures.
    Pass(String),
    /// Why it could not be run here.
    Skip(String),
}

/// One test's result.
#[derive(Debug, Serialize)]
pub struct Verdict<'a> {
    pub name: &'a str,
    /// "pass", "fail" or "skip".
    pub verdict: &'static str,
    pub detail: String,
    pub ms: u64,
}

impl Verdict<'_> {
    /// The line that the lab looks for, without its end.
    pub fn line(&self) -> String {
        // A structure of strings and a number always serialises.
        format!("EPT-TEST {}", serde_json::to_string(self).unwrap_or_default())
    }
}

/// Runs `test`; an error or a panic is a failure.
pub fn judge<'a>(name: &'a str, test: impl FnOnce() -> Result<Outcome>) -> Verdict<'a> {
    let start = Instant::now();
    let (verdict, detail) = match catch_unwind(AssertUnwindSafe(test)) {
        Ok(Ok(Outcome::Pass(detail))) => ("pass", detail),
        Ok(Ok(Outcome::Skip(why))) => ("skip", why),
        Ok(Err(error)) => ("fail", format!("{error:#}")),
        Err(panic) => ("fail", format!("panicked: {}", panic_message(panic.as_ref()))),
    };
    Verdict { name, verdict, detail, ms: start.elapsed().as_millis() as u64 }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
