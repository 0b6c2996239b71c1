// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for a domain, as a table.

use ept_virt_core::policy::{Effective, Exclusion, SETTINGS};
use serde::Serialize;

use crate::style::Style;

/// A setting, as `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// As `dram.share`.
    setting: String,
    /// As `policy set` takes it; null: no limit.
    value: Option<String>,
    /// Where the value comes from.
    from: String,
    /// What it means.
    help: &'static str,
}

/// All settings, in the order in which they stand in the grammar.
pub fn entries(effective: &Effective) -> Vec<Entry> {
    let settings = SETTINGS.iter().map(|setting| {
        let path = setting.path();
        Entry {
            value: effective.layer.get(&path).map(ToString::to_string),
            from: effective.origin(&path).to_string(),
            setting: path,
            help: setting.help,
        }
    });
    let exclude = &effective.policy.exclude;
    let exclusions = Entry {
        setting: "exclude".into(),
        value: (!exclude.is_empty()).then(|| exclude.iter().map(word).collect::<Vec<_>>().join(", ")),
        from: effective.origin_of_exclusions().to_string(),
        help: "memory that is never moved",
    };
    settings.chain([exclusions]).collect()
}

fn word(exclusion: &Exclusion) -> String {
    match exclusion {
        Exclusion::Range { start, end } => format!("{start:#x}-{end:#x}"),
        Exclusion::Device(alias) => alias.clone(),
    }
}

/// A line for each setting; what somebody said stands out.
pub fn render(effective: &Effective, style: &Style) -> String {
    let entries = entries(effective);
    let value = |entry: &Entry| crate::style::harmless(entry.value.as_deref().unwrap_or("-"));
    let width =
        |of: &dyn Fn(&Entry) -> usize, least: usize| entries.iter().map(of).max().unwrap_or(0).max(least);
    let (first, second) = (width(&|e| e.setting.len(), 7), width(&|e| value(e).chars().count(), 5));
    let third = width(&|e| e.from.len(), 4);
    let mut text =
        style.paint("1", &format!("{:first$}  {:second$}  {:third$}  MEANING", "SETTING", "VALUE", "FROM"));
    text.push('\n');
    for entry in &entries {
        let line = format!(
            "{:first$}  {:second$}  {:third$}  {}",
            entry.setting,
            value(entry),
            entry.from,
            entry.help
        );
        let line: String = line.chars().take(if style.wrap { style.width } else { usize::MAX }).collect();
        let dim = entry.from == "built in";
        text += &if dim { style.paint("2", line.trim_end()) } else { line.trim_end().to_owned() };
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use ept_virt_core::policy::{Config, Layer};

    use super::*;

    #[test]
    fn says_what_holds_and_who_said_it() {
        let config = Config::parse("[defaults]\nmigration.delay = \"9 s\"").unwrap();
        let mut layer = Layer::default();
        layer.assign("dram.share", "40%").unwrap();
        let effective = Effective::new(&config, Some(&layer)).unwrap();
        let text = render(&effective, &Style::PLAIN);
        let line = |start: &str| {
            let line = text.lines().find(|line| line.starts_with(start)).unwrap();
            line.split_whitespace().take(5).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("dram.share"), "dram.share 40% domain XML part");
        assert_eq!(line("migration.delay"), "migration.delay 9 s host defaults");
        assert_eq!(line("mode"), "mode observe built in off:");
        assert_eq!(line("dram.max "), "dram.max - built in never");
        assert!(text.lines().all(|line| line == line.trim_end()));
        assert_eq!(entries(&effective).len(), SETTINGS.len() + 1);
    }
}
