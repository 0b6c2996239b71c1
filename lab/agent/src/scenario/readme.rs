// SPDX-License-Identifier: MIT OR Apache-2.0
//! README's install section, followed to the letter: each command is run, and has to
//! say what README says that it does.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::host::{self, PAYLOAD};

/// The heading that the section has.
const SECTION: &str = "## On a real host";

/// How a block of commands and their output begins, and each command in it.
const FENCE: &str = "```console";
const PROMPT: &str = "$ ";

/// What stands for anything: within a line, or alone for any lines.
const ANYTHING: &str = "...";

/// What only asks. It is asked again until it says what README says: a host that has
/// just come so far may need a few seconds for that.
const QUESTIONS: [&str; 3] = ["ept-virt doctor", "ept-virt list", "ept-virt status"];
const QUESTION_TIMEOUT: Duration = Duration::from_secs(90);

/// A command, and the lines that it is to print.
#[derive(Debug, PartialEq)]
pub struct Step {
    /// What is typed.
    pub command: String,
    /// What README says that it prints, with dots for what is not told.
    pub output: Vec<String>,
}

/// The section's blocks, each of which is a few steps.
pub fn blocks() -> Result<Vec<Vec<Step>>> {
    let path = format!("{PAYLOAD}/README.md");
    parse(&fs::read_to_string(&path).with_context(|| format!("reading {path}"))?)
}

impl Step {
    /// Runs the command in a shell in `folder`.
    pub fn follow(&self, folder: &str, timeout: Duration) -> Result<()> {
        let mut wrong = None;
        let run = || {
            wrong = self.run(folder, timeout)?;
            ensure!(wrong.is_none() || self.asks(), "it said otherwise");
            Ok(wrong.is_none())
        };
        host::wait_until(&self.command, QUESTION_TIMEOUT, run).with_context(|| {
            let wanted = self.output.join("\n");
            format!("README says of `{}`:\n{wanted}\nIt said:\n{}", self.command, wrong.unwrap_or_default())
        })
    }

    fn asks(&self) -> bool {
        QUESTIONS.iter().any(|question| self.command.starts_with(question))
    }

    /// What it said, if README says something else. What it says beside, to whoever
    /// watches it, is not its output.
    fn run(&self, folder: &str, timeout: Duration) -> Result<Option<String>> {
        let mut shell = Command::new("sh");
        shell.args(["-c", &self.command]).current_dir(folder).env("DEBIAN_FRONTEND", "noninteractive");
        let said = match host::succeed_within(&mut shell, timeout) {
            Err(error) if self.asks() => return Ok(Some(format!("{error:#}"))),
            said => said?,
        };
        eprintln!("{PROMPT}{}\n{said}", self.command);
        let lines: Vec<&str> = said.lines().collect();
        let wanted: Vec<&str> = self.output.iter().map(String::as_str).collect();
        Ok((!same(&wanted, &lines)).then_some(said))
    }
}

/// Finds the blocks of the section.
fn parse(readme: &str) -> Result<Vec<Vec<Step>>> {
    let (_, section) = readme.split_once(SECTION).with_context(|| format!("README has no {SECTION:?}"))?;
    let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
    let blocks: Vec<&str> = section.split(FENCE).skip(1).collect();
    blocks.iter().map(|block| steps(block.split("```").next().unwrap_or_default())).collect()
}

fn steps(block: &str) -> Result<Vec<Step>> {
    let mut steps: Vec<Step> = Vec::new();
    for line in block.trim().lines() {
        match (line.strip_prefix(PROMPT), steps.last_mut()) {
            (Some(command), _) => steps.push(Step { command: command.to_owned(), output: Vec::new() }),
            (None, Some(step)) => step.output.push(line.to_owned()),
            (None, None) => bail!("a block of README's begins with {line:?}, and not with a command"),
        }
    }
    Ok(steps)
}

/// Whether lines are the wanted ones, whatever numbers are in them.
fn same(wanted: &[&str], lines: &[&str]) -> bool {
    match wanted.split_first() {
        None => lines.is_empty(),
        Some((&ANYTHING, rest)) => {
            let quiet = lines.iter().take_while(|line| !is_trouble(line)).count();
            (0..=quiet).any(|skipped| same(rest, &lines[skipped..]))
        }
        Some((first, rest)) => {
            lines.split_first().is_some_and(|(line, others)| alike(first, line) && same(rest, others))
        }
    }
}

/// Whether a line of doctor's tells of something that README's reader should see.
fn is_trouble(line: &str) -> bool {
    line.starts_with("warn ") || line.starts_with("fail ")
}

/// Whether a line is the wanted one but for figures, spaces and what dots stand for.
fn alike(wanted: &str, line: &str) -> bool {
    // How many checks of doctor's had which verdict is what README is about.
    if wanted.ends_with(" fail") {
        return wanted == line;
    }
    fits(&shape(wanted), &shape(line))
}

fn fits(wanted: &str, line: &str) -> bool {
    let Some((start, rest)) = wanted.split_once(ANYTHING) else { return wanted == line };
    let Some(left) = line.strip_prefix(start) else { return false };
    let ends = left.char_indices().map(|(at, _)| at).chain([left.len()]);
    ends.into_iter().any(|at| fits(rest, &left[at..]))
}

/// A line with `0` for each number, `B` and `s` for units of memory and time behind one,
/// and one space for each run of them.
fn shape(line: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    for word in line.split_whitespace() {
        let after_number = words.last().is_some_and(|last| last.ends_with('0'));
        let (unit, mark) = word.split_at(word.trim_end_matches([',', ';', ':', ')']).len());
        words.push(match unit {
            "KiB" | "MiB" | "GiB" if after_number => format!("B{mark}"),
            "ns" | "us" | "ms" | "min" | "h" if after_number => format!("s{mark}"),
            _ => without_numbers(word),
        });
    }
    words.join(" ")
}

/// A word with `0` for each number in it, fractions included.
fn without_numbers(word: &str) -> String {
    let mut shape = String::new();
    let mut letters = word.chars().peekable();
    while let Some(letter) = letters.next() {
        let in_number = shape.ends_with('0');
        match letter {
            '0'..='9' if in_number => {}
            '0'..='9' => shape.push('0'),
            '.' if in_number && letters.peek().is_some_and(char::is_ascii_digit) => {}
            _ => shape.push(letter),
        }
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;

    const README: &str = "\
# x\n```console\n$ not this\n```\n## On a real host\nText.\n\n```console\n$ a --b\none\n\ntwo 1.5 GiB\n$ c\n```\n\
More.\n```\nno block\n```\n```console\n$ d\n...\n```\n## Next\n```console\n$ not this\n```\n";

    fn step(command: &str, output: &[&str]) -> Step {
        Step { command: command.into(), output: output.iter().map(|&line| line.into()).collect() }
    }

    #[test]
    fn finds_the_commands_of_the_section() {
        let wanted =
            [vec![step("a --b", &["one", "", "two 1.5 GiB"]), step("c", &[])], vec![step("d", &["..."])]];
        assert_eq!(parse(README).unwrap(), wanted);
        assert!(parse("## On another host\n").is_err());
        assert!(steps("says\n$ command\n").is_err());
    }

    #[test]
    fn the_projects_own_can_be_followed() {
        let blocks = parse(include_str!("../../../../README.md")).unwrap();
        let steps: Vec<&Step> = blocks.iter().flatten().collect();
        for start in ["apt install ./", "ept-virt status ", "ept-virt policy set "] {
            assert!(steps.iter().any(|step| step.command.starts_with(start)), "README has no {start}");
        }
    }

    #[test]
    fn numbers_and_dots_may_be_others() {
        for (wanted, line, fits) in [
            ("hot 12 MiB", "hot   7.25 MiB", true),
            ("hot 12 MiB, 3 ms", "hot 7.25 GiB, 0.5 s", true),
            ("hot 12 MiB", "hot 7.25 pages", false),
            ("Linux 6.12.117+deb13-amd64", "Linux 6.1.0-41-amd64", false),
            ("Linux ...", "Linux 6.1.0-41-amd64", true),
            ("ok ... twice", "ok once, twice and twice", true),
            ("ok ... twice", "ok twice more", false),
            ("ok", "ok?", false),
            ("", "", true),
        ] {
            assert_eq!(alike(wanted, line), fits, "{wanted:?} {line:?}");
        }
        assert!(same(&["a", "...", "b"], &["a", "b"]));
        assert!(same(&["a", "...", "b"], &["a", "c", "d", "b"]));
        assert!(!same(&["a", "...", "b"], &["a", "c"]));
        assert!(!same(&["a"], &["a", "c"]));
        assert!(!same(&["a", "...", "b"], &["a", "warn  c", "b"]));
        assert!(same(&["a", "...", "warn  c", "b"], &["a", "x", "warn  c", "b"]));
        assert!(!alike("17 ok, 1 warn, 0 fail", "16 ok, 2 warn, 0 fail"));
        assert!(!same(&["a", "c"], &["a"]));
    }
}
