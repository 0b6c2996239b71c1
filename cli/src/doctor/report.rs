// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the checks say, for people and as JSON.

use serde::Serialize;

use crate::style::{Style, harmless, wrapped};

/// How it stands with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Guests are observed, but something is lost, or could not be looked at.
    Warn,
    /// Guests can not be observed.
    Fail,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        }
    }

    fn color(self) -> &'static str {
        match self {
            Verdict::Ok => "32",
            Verdict::Warn => "33",
            Verdict::Fail => "31",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at; each name comes once.
    pub check: &'static str,
    /// How it stands.
    pub verdict: Verdict,
    /// What was found.
    pub text: String,
    /// What to do about it; null when nothing needs to be done.
    pub mend: Option<String>,
}

impl Check {
    /// All is well.
    pub fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, text: text.into(), mend: None }
    }

    /// Something is lost.
    pub fn warn(check: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warn, text: text.into(), mend: Some(mend.into()) }
    }

    /// It does not work so.
    pub fn fail(check: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Fail, text: text.into(), mend: Some(mend.into()) }
    }
}

/// All checks, as `--json` prints them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst of all.
    pub verdict: Verdict,
    /// In the order in which things build on each other.
    pub checks: Vec<Check>,
}

impl Report {
    /// Judges by the worst check.
    pub fn new(checks: Vec<Check>) -> Self {
        let has = |verdict| checks.iter().any(|check: &Check| check.verdict == verdict);
        let verdict = [Verdict::Fail, Verdict::Warn].into_iter().find(|verdict| has(*verdict));
        Self { verdict: verdict.unwrap_or(Verdict::Ok), checks }
    }
}

/// Width of the names.
const NAME: usize = 14;

/// Columns before a text: the verdict, the name, and what is between.
const INDENT: usize = 4 + 2 + NAME + 1;

/// A line for each check, with the mend below it.
pub fn render(report: &Report, style: &Style) -> String {
    let room = if style.wrap { style.width.saturating_sub(INDENT) } else { usize::MAX };
    let mut text = String::new();
    for check in &report.checks {
        let verdict = style.paint(check.verdict.color(), &format!("{:<4}", check.verdict.word()));
        let mut head = format!("{verdict}  {:<NAME$} ", check.check);
        let mend = check.mend.iter().map(|mend| format!("mend: {mend}"));
        for part in [check.text.clone()].into_iter().chain(mend) {
            for line in wrapped(&harmless(&part), room) {
                text += format!("{head}{line}").trim_end();
                text.push('\n');
                head = " ".repeat(INDENT);
            }
        }
    }
    let count = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    let [ok, warn, fail] = [Verdict::Ok, Verdict::Warn, Verdict::Fail].map(count);
    text + &format!("{ok} ok, {warn} warn, {fail} fail\n")
}
