// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench placement`: who places a guest's memory best. Each workload in
//! each kind of memory is a start of the emulated AMD host from its snapshot, on which
//! the contestants take turns (lab/agent/src/scenario/bench_placement.rs). Every
//! result is kept under .lab-cache/bench/placement, so a run can be made in parts; the
//! table is made of all that is there.

mod cell;
mod figures;
mod goals;
mod plot;
mod report;

use std::collections::VecDeque;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::Lab;
use crate::amd::{AmdHost, Payload};
use crate::{demo, prepare};
use cell::{Cell, MARK};

/// From the start of a guest to its end, without its periods.
const CELL_OVERHEAD: Duration = Duration::from_secs(180);

/// Emulated seconds pass as real ones do, but a busy machine takes longer.
const PERIOD_TIMEOUT: Duration = Duration::from_secs(4);

/// What is to be measured; without any option everything.
#[derive(Args, Clone)]
pub struct Options {
    /// Only these workloads.
    #[arg(long, value_name = "NAME", num_args = 1.., value_enum)]
    workload: Vec<Workload>,
    /// Only these contestants.
    #[arg(long, value_name = "NAME", num_args = 1.., value_enum)]
    contestant: Vec<Contestant>,
    /// Only these kinds of memory.
    #[arg(long, value_name = "KIND", num_args = 1.., value_enum)]
    memory: Vec<Memory>,
    /// So many periods (of a second) for each contestant, in place of its own; after
    /// the jump of a workload as many again.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=600))]
    periods: Option<u32>,
    /// What stands in ept-virt's <placement> element, but for the DRAM it may have:
    /// elements with the prefix ev.
    #[arg(long, value_name = "XML")]
    policy: Option<String>,
    /// Leave out what was measured before.
    #[arg(long)]
    resume: bool,
    /// Hosts that run at a time: each keeps one CPU busy.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    jobs: u8,
    /// Measure nothing: show what was measured before.
    #[arg(long, conflicts_with_all = ["resume", "periods", "policy"])]
    report: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Workload {
    Static,
    Zipf,
    Phase,
    Scan,
    HotBlock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Contestant {
    FirstTouch,
    EptVirt,
    Damon,
    NumaBalancing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Memory {
    /// 4 KiB pages on the host.
    Memfd,
    /// Transparent huge pages.
    Thp,
}

impl Workload {
    /// Periods before and after the jump. The hot block appears at once; before that
    /// contestants only need to be at work.
    fn periods(self, contestant: Contestant) -> [u32; 2] {
        let converge = contestant.periods();
        match self {
            Self::Static | Self::Zipf | Self::Scan => [converge, 0],
            Self::Phase => [converge, converge],
            Self::HotBlock => [10, converge],
        }
    }
}

impl Contestant {
    /// Periods in which it should have placed what it will. DAMON calls memory cold
    /// after 30 s, NUMA balancing scans a guest in some seconds.
    fn periods(self) -> u32 {
        match self {
            Self::FirstTouch => 8,
            Self::EptVirt => 30,
            Self::NumaBalancing => 45,
            Self::Damon => 60,
        }
    }
}

/// The name on the command line, in files, and to the agent.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn chosen<T: ValueEnum + Clone>(some: &[T]) -> Vec<T> {
    if some.is_empty() { T::value_variants().to_vec() } else { some.to_vec() }
}

/// Measures and reports; an error if a run broke.
pub fn run(lab: &Lab, options: &Options) -> Result<bool> {
    let results = Results::open(lab)?;
    if !options.report {
        measure(lab, options, &results)?;
    }
    // What one run measured of a workload stands beside what others did.
    let all = Options { resume: false, contestant: Vec::new(), ..options.clone() };
    report::show(&results.folder, &results.some(Job::all(&all, &results))?)?;
    Ok(true)
}

/// What one host is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Job {
    workload: Workload,
    memory: Memory,
    contestant: Contestant,
    /// Before and after the jump.
    periods: [u32; 2],
}

impl Job {
    /// All that the options ask for, but for what is there when that is to be left out.
    fn all(options: &Options, results: &Results) -> VecDeque<Self> {
        let mut jobs = VecDeque::new();
        for memory in chosen(&options.memory) {
            for workload in chosen(&options.workload) {
                for contestant in chosen(&options.contestant) {
                    let own = workload.periods(contestant);
                    let periods = own.map(|own| options.periods.filter(|_| own > 0).unwrap_or(own));
                    let job = Self { workload, memory, contestant, periods };
                    if !(options.resume && results.path(&job.name()).exists()) {
                        jobs.push_back(job);
                    }
                }
            }
        }
        jobs
    }

    fn name(&self) -> String {
        format!("{}-{}-{}", name(self.workload), name(self.memory), name(self.contestant))
    }

    fn script(&self) -> String {
        let [first, second] = self.periods;
        let (workload, memory) = (name(self.workload), name(self.memory));
        let contestant = name(self.contestant);
        format!("exec ./lab-agent bench-placement {workload} {memory} {first} {second} {contestant}")
    }

    fn timeout(&self) -> Duration {
        CELL_OVERHEAD + PERIOD_TIMEOUT * self.periods.iter().sum()
    }
}

fn measure(lab: &Lab, options: &Options, results: &Results) -> Result<()> {
    let (host, files) = prepare::amd(lab)?;
    let jobs = Mutex::new(Job::all(options, results));
    let next = || jobs.lock().ok().and_then(|mut jobs| jobs.pop_front());
    let work = || -> Result<()> {
        while let Some(job) = next() {
            let name = job.name();
            let step = lab.progress.step(name.clone());
            let mut payload = files.payload(&job.script())?;
            if let Some(policy) = &options.policy {
                payload = payload.content("bench-policy", policy.as_bytes())?;
            }
            let lines = lines(lab, &host, &job, payload).with_context(|| name.clone())?;
            results.keep(&name, &lines)?;
            step.done("");
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..options.jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("a worker panicked"),
        })
    })
}

/// Starts a host for a job; the JSON of its cell.
fn lines(lab: &Lab, host: &AmdHost, job: &Job, payload: Payload) -> Result<String> {
    let mut cell = None;
    demo::follow(lab, host, &format!("bench-{}", job.name()), payload, job.timeout(), |line| {
        match line.strip_prefix(MARK) {
            Some(json) => cell = Some(json.to_owned()),
            None if line.contains(" failed: ") => bail!("{line}"),
            None => println!("{line}"),
        }
        Ok(())
    })?;
    cell.context("the host gave no result")
}

/// What was measured, a file for each cell.
struct Results {
    folder: PathBuf,
}

impl Results {
    fn open(lab: &Lab) -> Result<Self> {
        let folder = lab.cache.dir().join("bench/placement");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        Ok(Self { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }

    fn keep(&self, name: &str, json: &str) -> Result<()> {
        // What can not be read is not kept.
        let cell: Cell = serde_json::from_str(json).with_context(|| format!("reading {json:.200}"))?;
        let path = self.path(name);
        fs::write(&path, serde_json::to_string_pretty(&cell)?)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// All that is there of these, in their order.
    fn some(&self, jobs: impl IntoIterator<Item = Job>) -> Result<Vec<Cell>> {
        let paths = jobs.into_iter().map(|job| self.path(&job.name())).filter(|path| path.exists());
        let read = |path: PathBuf| {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            serde_json::from_str(&text)
                .with_context(|| format!("{} is of another version of this bench: remove it", path.display()))
        };
        paths.map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn jobs(line: &[&str], results: &Results) -> Vec<Job> {
        let options = Line::try_parse_from([&["placement"], line].concat()).unwrap().options;
        Job::all(&options, results).into()
    }

    fn results(name: &str) -> Results {
        let folder = std::env::temp_dir().join(format!("ept-virt-bench-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Results { folder }
    }

    #[test]
    fn a_part_of_the_whole_can_be_asked_for() {
        let results = results("part");
        assert_eq!(jobs(&[], &results).len(), 5 * 2 * 4);
        let one = jobs(&["--workload", "zipf", "--contestant", "ept-virt", "--memory", "memfd"], &results);
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].name(), "zipf-memfd-ept-virt");
        assert_eq!(one[0].script(), "exec ./lab-agent bench-placement zipf memfd 30 0 ept-virt");
        assert_eq!(jobs(&["--workload", "phase", "--periods", "7"], &results)[0].periods, [7, 7]);
        fs::remove_dir_all(results.folder).unwrap();
    }

    #[test]
    fn what_is_there_is_left_out_and_read() {
        let results = results("resume");
        let json = serde_json::to_string(&Cell { workload: "zipf".into(), ..Cell::default() }).unwrap();
        results.keep("zipf-memfd-ept-virt", &json).unwrap();
        assert!(results.keep("zipf-memfd-damon", "{").is_err());
        let line = ["--workload", "zipf", "--memory", "memfd"];
        assert_eq!(jobs(&[&line[..], &["--resume"]].concat(), &results).len(), 3);
        let cells = results.some(jobs(&line, &results)).unwrap();
        assert_eq!(cells.iter().map(|cell| cell.workload.as_str()).collect::<Vec<_>>(), ["zipf"]);
        fs::write(results.path("zipf-memfd-damon"), "[]").unwrap();
        assert!(results.some(jobs(&line, &results)).is_err());
        fs::remove_dir_all(results.folder).unwrap();
    }
}
