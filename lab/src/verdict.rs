// SPDX-License-Identifier: MIT OR Apache-2.0
//! Results of tests, as they come over the wire from the emulated hosts.
//!
//! `EPT-TEST {"name":"..","verdict":"pass|fail|skip","detail":"..","ms":123}`
//! for each test, `EPT-DONE` at the end; anything else is log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::proc::{Child, log_tail};
use crate::progress::Progress;

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It holds.
    Pass,
    /// It does not.
    Fail,
    /// It could not run; the detail says why.
    Skip,
}

/// One test's result.
#[derive(Clone, Debug, Deserialize)]
pub struct TestResult {
    /// Its name.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// Figures, or what went wrong.
    #[serde(default)]
    pub detail: String,
    /// How long it took, in milliseconds.
    #[serde(default)]
    pub ms: u64,
}

/// A line of the wire that means something.
#[derive(Clone, Debug)]
pub enum Line {
    /// A result.
    Test(TestResult),
    /// All tests have run.
    Done,
}

/// Reads a line of the wire.
pub fn parse(line: &str) -> Option<Line> {
    // Consoles end lines with CR LF.
    let line = line.trim();
    if line == "EPT-DONE" {
        return Some(Line::Done);
    }
    let json = line.strip_prefix("EPT-TEST ")?;
    match serde_json::from_str(json) {
        Ok(result) => Some(Line::Test(result)),
        Err(error) => Some(Line::Test(TestResult {
            name: "verdict wire".into(),
            verdict: Verdict::Fail,
            detail: format!("unreadable verdict {json}: {error}"),
            ms: 0,
        })),
    }
}

/// All results so far; each is printed as it comes, from several threads.
pub struct Tally<'a> {
    results: Mutex<Vec<TestResult>>,
    progress: &'a Progress,
}

impl<'a> Tally<'a> {
    /// No results yet; they will be printed above the steps under way.
    pub fn new(progress: &'a Progress) -> Self {
        Self { results: Mutex::default(), progress }
    }

    /// Counts and prints a result.
    pub fn add(&self, result: TestResult) {
        let mark = match result.verdict {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::Skip => "SKIP",
        };
        let seconds = result.ms as f64 / 1000.0;
        let text = format!("{mark} {} ({seconds:.1} s) {}", result.name, result.detail);
        self.progress.line(text.trim_end());
        self.results().push(result);
    }

    /// Runs a test on this machine: an error is a failure.
    pub fn check(&self, name: &str, test: impl FnOnce() -> Result<String>) {
        self.try_check(name, || test().map(Ok));
    }

    /// Runs a test on this machine that may find that it can not run here: the inner
    /// error says why.
    pub fn try_check(&self, name: &str, test: impl FnOnce() -> Result<Result<String, String>>) {
        let started = Instant::now();
        let (verdict, detail) = match test() {
            Ok(Ok(detail)) => (Verdict::Pass, detail),
            Ok(Err(why)) => (Verdict::Skip, why),
            Err(error) => (Verdict::Fail, format!("{error:#}")),
        };
        let result =
            TestResult { name: name.into(), verdict, detail, ms: started.elapsed().as_millis() as u64 };
        self.add(result);
    }

    /// How many results have this verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.results().iter().filter(|r| r.verdict == verdict).count()
    }

    /// A thread that panicked while it held the lock leaves whole results.
    fn results(&self) -> MutexGuard<'_, Vec<TestResult>> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What failed, again, each in a line as one looks for it at the end; then the
    /// counts.
    pub fn closing(&self) -> String {
        let mut failed = String::new();
        for result in self.results().iter().filter(|result| result.verdict == Verdict::Fail) {
            let reason = result.detail.lines().next().unwrap_or_default();
            failed += &format!("FAIL {} {reason}\n", result.name);
        }
        format!(
            "{failed}{} passed, {} failed, {} skipped",
            self.count(Verdict::Pass),
            self.count(Verdict::Fail),
            self.count(Verdict::Skip)
        )
    }
}

/// Complete lines of a file that another process is still writing.
pub struct Follower {
    path: PathBuf,
    offset: u64,
    rest: Vec<u8>,
}

impl Follower {
    /// From the start of the file, which need not exist yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.into(), offset: 0, rest: Vec::new() }
    }

    /// The lines that were completed since the last call.
    pub fn lines(&mut self) -> Result<Vec<String>> {
        let Ok(mut file) = File::open(&self.path) else {
            return Ok(Vec::new());
        };
        file.seek(SeekFrom::Start(self.offset))
            .and_then(|_| file.read_to_end(&mut self.rest))
            .map(|read| self.offset += read as u64)
            .with_context(|| format!("reading {}", self.path.display()))?;
        let Some(end) = self.rest.iter().rposition(|b| *b == b'\n') else {
            return Ok(Vec::new());
        };
        let complete: Vec<u8> = self.rest.drain(..=end).collect();
        Ok(String::from_utf8_lossy(&complete).lines().map(|l| l.trim_end_matches('\r').to_string()).collect())
    }
}

/// Collects verdicts from `wire`, the file that the emulator `child` writes,
/// until `EPT-DONE`, the emulator's end, or `timeout`. Ending without
/// `EPT-DONE` is a failure named `what` that shows the end of `console`.
/// Returns whether nothing failed.
pub fn collect(
    what: &str,
    wire: &Path,
    console: &Path,
    child: &mut Child,
    timeout: Duration,
    tally: &Tally,
) -> Result<bool> {
    let started = Instant::now();
    let mut well = true;
    let mut follower = Follower::new(wire);
    let mut last = String::from("before its first test");
    let reason = loop {
        // Looked at before the wire is read: what it wrote last is then there.
        let ended = child.try_wait()?;
        for line in follower.lines()? {
            match parse(&line) {
                Some(Line::Test(result)) => {
                    well &= result.verdict != Verdict::Fail;
                    tally.add(result);
                }
                Some(Line::Done) => return Ok(well),
                None if line.starts_with("running ") => last = line,
                None => {}
            }
        }
        if let Some(status) = ended {
            break format!("the emulator {}", crate::proc::describe(status));
        }
        if started.elapsed() > timeout {
            child.kill();
            break format!("no end after {} s", timeout.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    };
    let result = TestResult {
        name: what.into(),
        verdict: Verdict::Fail,
        detail: format!("{reason}, {last}\nwire:\n{}\nconsole:\n{}", log_tail(wire), log_tail(console)),
        ms: started.elapsed().as_millis() as u64,
    };
    tally.add(result);
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn reads_verdicts_and_ignores_the_rest() {
        let line = r#"EPT-TEST {"name":"a","verdict":"skip","detail":"no","ms":7}"#;
        let Some(Line::Test(result)) = parse(&format!("{line}\r")) else {
            panic!("not read");
        };
        assert_eq!((result.verdict, result.ms), (Verdict::Skip, 7));
        assert!(matches!(parse("EPT-DONE"), Some(Line::Done)));
        assert!(parse("[    1.0] EPT-TEST is a word").is_none());
    }

    #[test]
    fn an_unreadable_verdict_is_a_failure() {
        let Some(Line::Test(result)) = parse("EPT-TEST {\"name\":") else {
            panic!("not read");
        };
        assert_eq!(result.verdict, Verdict::Fail);
    }

    #[test]
    fn follows_only_complete_lines() {
        let path = std::env::temp_dir().join(format!("ept-virt-follow-{}", std::process::id()));
        let mut file = File::create(&path).unwrap();
        let mut follower = Follower::new(&path);
        file.write_all(b"one\r\ntw").unwrap();
        assert_eq!(follower.lines().unwrap(), ["one"]);
        file.write_all(b"o\n").unwrap();
        assert_eq!(follower.lines().unwrap(), ["two"]);
        std::fs::remove_file(path).unwrap();
    }
}
