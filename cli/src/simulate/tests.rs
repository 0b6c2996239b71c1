// SPDX-License-Identifier: MIT OR Apache-2.0

use clap::Parser;

use super::*;

/// As the command line has it.
#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: SimulateArgs,
}

fn parse(line: &str) -> Result<SimulateArgs, String> {
    let words = std::iter::once("simulate").chain(line.split_whitespace());
    Line::try_parse_from(words).map(|line| line.args).map_err(|error| error.to_string())
}

/// What is printed for a command line.
fn report(line: &str) -> Report {
    super::report(&parse(line).unwrap()).unwrap().0
}

/// For `docs/CLI.md`.
pub fn any_report() -> Report {
    report(SMALL)
}

const SMALL_GUESTS: &str = "--generate uniform --size 16MiB";

const SMALL: &str = "--generate zipf --size 4MiB --rounds 6";

#[test]
fn the_same_line_prints_the_same() {
    let text = |line: &str| report(line).render(&Style::PLAIN);
    let once = text(SMALL);
    assert_eq!(once, text(&format!("{SMALL} --seed 1")));
    assert_ne!(once, text(&format!("{SMALL} --seed 2")));
    assert!(once.starts_with("made up: a guest of 4 MiB in pages of 4 KiB, zipf\n"), "{once}");
    assert!(once.contains("DRAM granted          1.2 MiB of 4 MiB\n"), "{once}");
    // A head, and a line for each round.
    assert_eq!(once.lines().filter(|line| line.trim_start().starts_with(char::is_numeric)).count(), 6);
}

#[test]
fn several_shares_are_compared() {
    let report = report(&format!("{SMALL} --dram 10%,50% --fast-cost 4 --slow-cost 1"));
    let text = report.render(&Style::PLAIN);
    let lines: Vec<&str> = text.lines().skip(3).collect();
    assert!(lines.len() == 3 && lines[1].trim_start().starts_with("10%"), "{text}");
    // 3.6 MiB at 3 for each GiB.
    assert!(lines[1].ends_with("0.01") && report.runs.len() == 2, "{text}");
}

#[test]
fn dram_is_what_the_policy_says_unless_told_otherwise() {
    let share = |line: &str| report(&format!("{SMALL} {line}")).runs[0].dram_share.clone();
    assert_eq!(share(""), "30%");
    assert_eq!(share("--set dram.share=40%"), "40%");
    assert_eq!(share("--set dram.share=40% --dram 20%"), "20%");
    let min = report(&format!("{SMALL} --set dram.min=1MiB --set dram.share=0%"));
    assert!(min.render(&Style::PLAIN).contains("DRAM granted          1 MiB of 4 MiB\n"));
}

#[test]
fn guests_share_the_hosts_dram_by_weight() {
    let shared = "--domains 2 --host-dram 50% --rate 8 --rounds 30 --set temperature.half-life=5s";
    let report = report(&format!("{SMALL_GUESTS} {shared} --weight 1,3"));
    let run = &report.runs[0];
    assert_eq!((run.dram_share.as_str(), run.host_dram_bytes), ("100%", Some(16 << 20)));
    assert_eq!(run.domains.iter().map(|part| part.weight).collect::<Vec<_>>(), [1, 3]);
    // What the budget grants is what is told, guest by guest and in sum.
    assert_eq!(run.domains.iter().map(|part| part.granted_bytes >> 20).collect::<Vec<_>>(), [4, 12]);
    let value = serde_json::to_value(&report).unwrap();
    let rounds = value["runs"][0]["rounds"].as_array().unwrap();
    assert!(rounds.iter().all(|round| round["fast_bytes"].as_u64().unwrap() <= 16 << 20));
    assert!(rounds.iter().all(|round| round["granted_bytes"].as_u64().unwrap() <= 16 << 20));
    let text = report.render(&Style::PLAIN);
    assert!(text.contains("guests of weight 3    12 MiB in DRAM at the end, 12 MiB granted"), "{text}");
    // A size, and the policy's weight for all.
    let report = super::report(&parse(&format!("{SMALL} --host-dram 1MiB")).unwrap()).unwrap().0;
    assert_eq!((report.runs[0].host_dram_bytes, report.runs[0].domains[0].weight), (Some(1 << 20), 100));
}

#[test]
fn columns_are_fields() {
    let report = report(SMALL);
    let csv = report.csv();
    let head: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    let value = serde_json::to_value(&report).unwrap();
    let entry = value["runs"][0]["rounds"][0].as_object().unwrap();
    let mut fields: Vec<&str> = entry.keys().map(String::as_str).collect();
    fields.push("dram_share");
    let mut sorted = head.clone();
    sorted.sort_unstable();
    fields.sort_unstable();
    assert_eq!(sorted, fields);
    assert_eq!(csv.lines().count(), 7);
    for (line, entry) in csv.lines().skip(1).zip(value["runs"][0]["rounds"].as_array().unwrap()) {
        let cells: Vec<&str> = line.split(',').collect();
        assert_eq!(cells.len(), head.len());
        for (name, cell) in head.iter().zip(cells).filter(|(name, _)| **name != "dram_share") {
            let expected = entry[name].as_f64().map_or(String::new(), |number| number.to_string());
            assert_eq!(cell.parse::<f64>().ok(), expected.parse::<f64>().ok(), "{name}");
        }
    }
}

#[test]
fn wrong_lines_say_what_is_wrong() {
    let told = |line: &str| match parse(line) {
        Ok(args) => super::report(&args).map(|_| ()).unwrap_err().to_string(),
        Err(error) => error,
    };
    for (line, words) in [
        ("", "--generate"),
        ("--generate zipf --size 1KiB", "out of range"),
        ("--generate zipf --size 32TiB", "out of range"),
        ("--generate zipf --period 0s", "a time above"),
        ("--generate zipf --granule 3", "power of two"),
        ("--generate zipf --rate nan", "a number"),
        ("--generate zipf --fast-cost 3", "--slow-cost"),
        ("--generate zipf --domains 501", "501"),
        ("--generate zipf --json --csv", "cannot be used with"),
        ("--generate zipf --recording f", "cannot be used with"),
        ("--generate zipf --set dram.shre=3%", "dram.share"),
        ("--generate zipf --set dram.share", "SETTING=VALUE"),
        ("--generate zipf --set dram.min=2GiB --set dram.max=1GiB", "<dram>"),
        ("--recording /nonexistent", "/nonexistent"),
        ("--generate zipf --weight 1,3", "--host-dram"),
        ("--generate zipf --host-dram 1GiB --weight 0", "1..=1000"),
        ("--generate zipf --host-dram 120%", "percentage"),
        ("--generate zipf --host-dram 12", "unknown unit"),
        ("--recording /proc/self/maps --host-dram 20%", "recording"),
    ] {
        assert!(told(line).contains(words), "{line}: {}", told(line));
    }
}

#[test]
fn pictures_show_what_the_numbers_say() {
    let dir = std::env::temp_dir().join(format!("ept-virt-simulate-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (line, words) in [("", ["seconds", "MiB moved"]), ("--dram 10%,30%", ["DRAM, % of memory", "oracle"])]
    {
        let file = dir.join("picture.svg");
        picture::draw(&file, &report(&format!("{SMALL} {line}"))).unwrap();
        let svg = std::fs::read_to_string(&file).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(words.iter().all(|word| svg.contains(word)), "{svg}");
        // Two charts, one of them at least with two lines.
        assert!(svg.matches("<polyline").count() > 3);
    }
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(picture::draw(&dir.join("none/picture.svg"), &report(SMALL)).is_err());
}

#[test]
fn a_recording_that_was_cut_off_is_used_as_far_as_it_goes() {
    use ept_virt_core::record::{Frame, FrameSlot, Header, Writer};
    let slot =
        FrameSlot { page_count: 512, accessed: vec![7; 8], mapped: vec![!0; 8], ..FrameSlot::default() };
    let mut writer = Writer::new(Vec::new(), &Header::default()).unwrap();
    for second in 0..4 {
        let time = std::time::Duration::from_secs(second);
        writer.append(Frame { time, slots: vec![slot.clone()] }).unwrap();
    }
    let mut bytes = writer.into_inner();
    bytes.truncate(bytes.len() - 1);
    let file = std::env::temp_dir().join(format!("ept-virt-cut-off-{}", std::process::id()));
    std::fs::write(&file, bytes).unwrap();
    let args = parse(&format!("--recording {}", file.display())).unwrap();
    let (report, warnings) = super::report(&args).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(report.runs[0].rounds.len(), 3);
    assert!(warnings.len() == 1 && warnings[0].contains("cut off after 3 whole rounds"), "{warnings:?}");
    let value = serde_json::to_value(&report).unwrap();
    assert_eq!((&value["basis"], &value["memory_bytes"]), (&"bits".into(), &(2 << 20).into()));
}
