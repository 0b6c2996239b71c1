// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guests that are simulated, as the command line names them.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::{Args, ValueEnum};
use ept_virt_core::policy::Policy;
use ept_virt_core::record::{Frame, MOST_PAGES, Reader, RecordError};
use ept_virt_core::simulate::{
    Domain, Guest, GuestParams, Host, Pattern, Replay, Start, Workload, WorkloadParams,
};
use ept_virt_core::units::{Bytes, Share, format_duration, parse_duration};

use crate::failure::Failure;

use super::report::Part;
use super::{Simulated, zero_or_more};

/// Time between harvests when the policy leaves it to us, as the daemon has it.
const AUTO_INTERVAL: Duration = Duration::from_secs(1);

/// Which guests.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// Recordings to simulate, each a guest: files that `ept-virt record` wrote. They
    /// know which pages were accessed, not how often: hit ratios count pages.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        conflicts_with_all = ["generate", "domains", "seed"]
    )]
    recording: Vec<PathBuf>,
    /// What guests do that are made up; of several, as zipf,idle, each guest does the
    /// next.
    #[arg(
        long,
        value_enum,
        value_name = "PATTERN",
        value_delimiter = ',',
        required_unless_present = "recording"
    )]
    generate: Vec<Kind>,
    /// Guests that are made up.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=500))]
    domains: u32,
    /// Memory of each, from 2 MiB up to 16 TiB.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    size: Bytes,
    /// Mapped by entries of 2 MiB, with one accessed bit for 512 pages.
    #[arg(long)]
    huge: bool,
    /// Accesses of a page in a second that no cache serves, the mean over all pages.
    #[arg(long, value_name = "HZ", default_value_t = 1.0, value_parser = zero_or_more)]
    rate: f64,
    /// Share of pages that are hot, for static, phase, scan and diurnal; default 20%.
    /// For hot-block and late-block: 0.1%.
    #[arg(long, value_name = "SHARE", value_parser = super::share)]
    hot: Option<Share>,
    /// Share of accesses that go to hot pages.
    #[arg(long, value_name = "SHARE", default_value = "90%", value_parser = super::share)]
    to_hot: Share,
    /// Steepness of zipf.
    #[arg(long, value_name = "NUMBER", default_value_t = 0.99, value_parser = zero_or_more)]
    theta: f64,
    /// How long a phase lasts, a scan takes, or a day is; when a late block turns hot.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time)]
    period: Duration,
    /// Pages of 4 KiB that lie together and are alike, a power of two. Without it 1; in
    /// huge pages 512; above 4 GiB 64 at least.
    #[arg(long, value_name = "PAGES", value_parser = granule)]
    granule: Option<u64>,
    /// DRAM that all guests share, as the daemon shares it: a size, or a share of the
    /// memory of all guests that are made up, as 25%. Without it each has what its
    /// policy grants.
    #[arg(long, value_name = "SIZE", value_parser = host_dram)]
    host_dram: Option<HostDram>,
    /// Weights by which they share it; of several, as 1,3, each guest has the next.
    /// Without it the policy's `dram.weight`.
    #[arg(
        long,
        value_name = "WEIGHT",
        value_delimiter = ',',
        requires = "host_dram",
        value_parser = clap::value_parser!(u32).range(1..=1000)
    )]
    weight: Vec<u32>,
}

/// DRAM of the host for guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostDram {
    Size(Bytes),
    /// Of the guests' memory.
    Share(Share),
}

/// Kinds of [`Pattern`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// All pages alike.
    Uniform,
    /// The k-th page as often as k^-theta says.
    Zipf,
    /// A part is hot, scattered over the memory.
    Static,
    /// A small part is hot, in one piece.
    HotBlock,
    /// The same, but all pages are alike until it turns hot.
    LateBlock,
    /// Other pages are hot after each period.
    Phase,
    /// All pages are gone over in each period, beside a hot part.
    Scan,
    /// The hot part grows and shrinks with the period.
    Diurnal,
    /// A thousandth is accessed once a second.
    Idle,
}

impl GuestArgs {
    /// What is simulated, in words.
    pub fn words(&self) -> String {
        if !self.recording.is_empty() {
            let names: Vec<String> = self.recording.iter().map(|file| file.display().to_string()).collect();
            return format!("recorded: {}", names.join(", "));
        }
        let name =
            |kind: &Kind| kind.to_possible_value().map_or(String::new(), |value| value.get_name().into());
        let kinds: Vec<String> = self.generate.iter().map(name).collect();
        let guests = if self.domains == 1 { "a guest".into() } else { format!("{} guests", self.domains) };
        let pages = if self.huge { "2 MiB" } else { "4 KiB" };
        format!("made up: {guests} of {} in pages of {pages}, {}", self.size, kinds.join(", "))
    }

    /// Whether the host has no DRAM but what is told.
    pub fn shares_dram(&self) -> bool {
        self.host_dram.is_some()
    }

    /// Runs them; all their rounds, as one guest's, and their memory.
    pub fn simulate(&self, policy: Policy, start: Start, seed: u64, most: u32) -> Result<Simulated, Failure> {
        let interval = policy.sampling.interval.unwrap_or(AUTO_INTERVAL);
        let params = |index: usize| {
            let mut policy = policy.clone();
            policy.dram.weight = self.weight(index).unwrap_or(policy.dram.weight);
            GuestParams { policy, interval, start }
        };
        let warnings = Warnings::default();
        let files = self.recording.iter().enumerate();
        let domains: Result<Vec<Domain>, Failure> = match self.recording.is_empty() {
            true => {
                Ok((0..self.domains).map(|index| self.made_up(params(index as usize), seed, index)).collect())
            }
            false => files.map(|(index, file)| recorded(file, &params(index), &warnings)).collect(),
        };
        let mut host = Host::new(domains?);
        let total = self.total_dram(&host)?;
        if let Some(total) = total {
            host = host.with_dram(total);
        }
        let rounds = std::iter::from_fn(|| host.round()).take(most as usize).collect::<Vec<_>>();
        if rounds.is_empty() {
            return Err(Failure::refused("there is not one round in what was recorded")
                .hint("record again, for longer: `ept-virt record DOMAIN FILE`"));
        }
        let said = std::mem::take(&mut *warnings.0.lock().unwrap_or_else(PoisonError::into_inner));
        let part = |(index, domain): (usize, &Domain)| Part {
            weight: self.weight(index).unwrap_or(policy.dram.weight),
            memory_bytes: domain.memory().0,
            granted_bytes: domain.granted().0,
            fast_bytes: domain.fast().0,
        };
        let parts = host.domains().iter().enumerate().map(part).collect();
        Ok(Simulated { rounds, memory: host.memory(), host_dram: total, parts, warnings: said })
    }

    fn weight(&self, index: usize) -> Option<u32> {
        self.weight.get(index % self.weight.len().max(1)).copied()
    }

    fn total_dram(&self, host: &Host) -> Result<Option<Bytes>, Failure> {
        match self.host_dram {
            Some(HostDram::Share(_)) if !self.recording.is_empty() => Err(Failure::refused(
                "how much memory recorded guests have is known at the end only, and so is a share of it",
            )
            .hint("give --host-dram as a size, as 4GiB")),
            Some(HostDram::Share(share)) => Ok(Some(Bytes(share.of(host.memory().0)))),
            Some(HostDram::Size(size)) => Ok(Some(size)),
            None => Ok(None),
        }
    }

    fn made_up(&self, params: GuestParams, seed: u64, index: u32) -> Domain {
        // clap asks for one at least.
        let kind = self.generate.get(index as usize % self.generate.len().max(1)).unwrap_or(&Kind::Uniform);
        let workload = WorkloadParams {
            pattern: self.pattern(*kind),
            pages: self.size.pages(),
            huge: self.huge,
            rate_hz: self.rate,
            granule_pages: self.granule,
        };
        let workload = Workload::new(workload, seed, index.into());
        Domain::Guest(Box::new(Guest::new(params, workload)))
    }

    fn pattern(&self, kind: Kind) -> Pattern {
        const PARTS: u64 = 10_000;
        let part = |share: Share| share.of(PARTS) as f64 / PARTS as f64;
        let hot = self.hot.map_or(0.2, part);
        let (to_hot, period) = (part(self.to_hot), self.period);
        match kind {
            Kind::Uniform => Pattern::Uniform,
            Kind::Zipf => Pattern::Zipf { theta: self.theta },
            Kind::Static => Pattern::Static { hot, to_hot },
            Kind::HotBlock => Pattern::HotBlock { hot: self.hot.map_or(0.001, part), to_hot },
            Kind::LateBlock => {
                Pattern::LateBlock { hot: self.hot.map_or(0.001, part), to_hot, after: period }
            }
            Kind::Phase => Pattern::Phase { hot, to_hot, period },
            Kind::Scan => Pattern::Scan { hot, to_hot, period },
            Kind::Diurnal => Pattern::Diurnal { hot, to_hot, period },
            Kind::Idle => Pattern::Idle,
        }
    }
}

/// What is to be said when all is done.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

/// A guest that a file tells about. What is wrong at the file's end is told, and what
/// comes before is used.
fn recorded(file: &Path, params: &GuestParams, warnings: &Warnings) -> Result<Domain, Failure> {
    let name = file.display().to_string();
    let input = File::open(file)
        .map_err(|error| Failure::unreachable(format!("cannot read the recording {name}: {error}")))?;
    let mut reader = Reader::new(BufReader::new(input))
        .map_err(|error| Failure::refused(format!("the recording {name} can not be used: {error}")))?;
    let warnings = warnings.clone();
    let next = move || -> Option<Frame> {
        let frame = reader.frame();
        frame.unwrap_or_else(|error: RecordError| {
            let mut said = warnings.0.lock().unwrap_or_else(PoisonError::into_inner);
            said.push(format!("the recording {name} is used in part: {error}"));
            None
        })
    };
    Ok(Domain::Replay(Box::new(Replay::new(params)), Box::new(next)))
}

/// Splits the unit from its number.
fn quantity(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

fn size(text: &str) -> Result<Bytes, String> {
    let (number, unit) = quantity(text);
    let size = Bytes::parse(number, unit).map_err(|error| error.to_string())?;
    match (2 << 20..=Bytes::of_pages(MOST_PAGES).0).contains(&size.0) {
        true => Ok(size),
        false => Err(format!("{size} is out of range: give 2 MiB to {}", Bytes::of_pages(MOST_PAGES))),
    }
}

fn host_dram(text: &str) -> Result<HostDram, String> {
    if text.trim_end().ends_with('%') {
        return super::share(text.trim()).map(HostDram::Share);
    }
    let (number, unit) = quantity(text);
    let size = Bytes::parse(number, unit).map_err(|error| error.to_string())?;
    Ok(HostDram::Size(size))
}

/// A time with its unit, above zero.
pub fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = quantity(text);
    let time = parse_duration(number, unit).map_err(|error| error.to_string())?;
    if time.is_zero() { Err(format!("give a time above {}", format_duration(time))) } else { Ok(time) }
}

fn granule(text: &str) -> Result<u64, String> {
    let pages = text.parse().ok().filter(|pages: &u64| pages.is_power_of_two() && *pages <= 1 << 20);
    pages.ok_or_else(|| "give a power of two, at most 1048576".into())
}
