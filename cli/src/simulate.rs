// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt simulate`: what a policy would do, without touching a guest.

pub mod guests;
mod picture;
pub mod report;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ept_virt_core::policy::{Layer, Policy};
use ept_virt_core::simulate::{self, Round};
use ept_virt_core::units::{Bytes, Share};

use crate::complete;
use crate::failure::Failure;
use crate::output::{json_line, write_text};
use crate::policy::read_file;
use crate::style::Style;

use report::{Part, Report, Run};

/// What to simulate.
///
/// Heat, plan and bandwidth are the daemon's own. Compared is with an oracle that has
/// the best pages of each round in DRAM from the round's beginning on.
#[derive(Debug, Args)]
pub struct SimulateArgs {
    #[command(flatten)]
    guests: guests::GuestArgs,
    /// DRAM, as a share of the guests' memory; several, as 10%,20%,30%, for a run each.
    /// Without it the policy's, and if that says nothing 30%, or all with --host-dram.
    #[arg(long, value_name = "SHARE", value_delimiter = ',', value_parser = share)]
    dram: Vec<Share>,
    /// Begin with the policy in this file, an element or a domain's XML. What it says of
    /// mode, sampling, tiers and exclusions does not matter here.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Settings of the policy, as temperature.half-life=10s; `ept-virt policy show`
    /// lists them.
    #[arg(long = "set", value_name = "SETTING=VALUE", add = complete::settings())]
    settings: Vec<String>,
    /// Rounds to simulate; a recording also ends with its file.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rounds: u32,
    /// Names the run: the same seed gives the same numbers.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where pages lie at first: in DRAM from low addresses on until it is used up, or
    /// all on one tier.
    #[arg(long, value_enum, value_name = "WHERE", default_value_t = Start::FirstTouch)]
    start: Start,
    #[command(flatten)]
    tiers: TierArgs,
    #[command(flatten)]
    format: Format,
    /// Also draw a picture into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What the tiers are like.
#[derive(Clone, Copy, Debug, Args)]
struct TierArgs {
    /// Time of an access to DRAM that no cache serves, in nanoseconds.
    #[arg(long, value_name = "NS", default_value_t = 100.0, value_parser = above_zero)]
    fast_ns: f64,
    /// The same of the slow tier.
    #[arg(long, value_name = "NS", default_value_t = 250.0, value_parser = above_zero)]
    slow_ns: f64,
    /// Price of a GiB of DRAM, in whatever money.
    #[arg(long, value_name = "PRICE", requires = "slow_cost", value_parser = zero_or_more)]
    fast_cost: Option<f64>,
    /// Price of a GiB of the slow tier.
    #[arg(long, value_name = "PRICE", requires = "fast_cost", value_parser = zero_or_more)]
    slow_cost: Option<f64>,
}

#[derive(Clone, Copy, Debug, Args)]
#[group(multiple = false)]
struct Format {
    /// One line of JSON for programs.
    #[arg(long)]
    json: bool,
    /// A line of comma-separated values for each round of each run.
    #[arg(long)]
    csv: bool,
}

/// Where pages lie at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Start {
    /// In DRAM until that is used up.
    FirstTouch,
    /// In DRAM.
    Fast,
    /// On the slow tier.
    Slow,
}

impl From<Start> for simulate::Start {
    fn from(start: Start) -> Self {
        match start {
            Start::FirstTouch => Self::FirstTouch,
            Start::Fast => Self::Fast,
            Start::Slow => Self::Slow,
        }
    }
}

/// DRAM when nobody says how much.
const DEFAULT_DRAM: Share = Share::from_percent(30);

/// Runs and prints all that was asked for.
pub fn run(args: &SimulateArgs, style: &Style) -> Result<(), Failure> {
    let (report, warnings) = report(args)?;
    if let Some(file) = &args.svg {
        picture::draw(file, &report)?;
    }
    for warning in warnings {
        // For people who read along; the numbers themselves may go into a pipe.
        let _ = writeln!(io::stderr(), "ept-virt: {warning}");
    }
    write_text(&match args.format {
        Format { json: true, .. } => json_line(&report)?,
        Format { csv: true, .. } => report.csv(),
        _ => report.render(style),
    })
}

/// All runs, and what is to be said beside them.
fn report(args: &SimulateArgs) -> Result<(Report, Vec<String>), Failure> {
    let layer = args.layer()?;
    let says_dram = ["dram.share", "dram.min", "dram.max"].iter().any(|path| layer.get(path).is_some());
    let shares = match (args.dram.is_empty(), says_dram) {
        (false, _) => args.dram.iter().copied().map(Some).collect(),
        (true, false) if !args.guests.shares_dram() => vec![Some(DEFAULT_DRAM)],
        (true, _) => vec![None],
    };
    let mut runs = Vec::new();
    let mut warnings = Vec::new();
    for share in shares {
        let mut layer = layer.clone();
        if let Some(share) = share {
            layer.assign("dram.share", &share.to_string()).map_err(Failure::refused)?;
        }
        if let Some((element, problem)) = layer.contradiction() {
            return Err(Failure::refused(format!("<{element}>: {problem}")));
        }
        let policy = Policy::of(&layer);
        let share = policy.dram.share;
        let mut simulated = args.guests.simulate(policy, args.start.into(), args.seed, args.rounds)?;
        warnings = std::mem::take(&mut simulated.warnings);
        runs.push(Run::new(share, simulated, args.tiers.into()));
    }
    Ok((Report::new(args.guests.words(), args.seed, runs), warnings))
}

impl SimulateArgs {
    /// The policy's settings, as they were given.
    fn layer(&self) -> Result<Layer, Failure> {
        let mut layer = match &self.policy {
            Some(file) => read_file(file)?,
            None => Layer::default(),
        };
        for setting in &self.settings {
            let (path, text) = setting.split_once('=').ok_or_else(|| {
                Failure::refused(format!(
                    "\"{setting}\" is not of the form SETTING=VALUE, as temperature.half-life=10s"
                ))
            })?;
            layer.assign(path, text).map_err(Failure::refused)?;
        }
        Ok(layer)
    }
}

impl From<TierArgs> for report::Tiers {
    fn from(args: TierArgs) -> Self {
        let TierArgs { fast_ns, slow_ns, fast_cost, slow_cost } = args;
        let tiers = simulate::Tiers {
            fast_ns,
            slow_ns,
            fast_per_gib: fast_cost.unwrap_or_default(),
            slow_per_gib: slow_cost.unwrap_or_default(),
        };
        report::Tiers { tiers, priced: fast_cost.is_some() }
    }
}

/// One run.
pub struct Simulated {
    /// Of all guests, as one.
    rounds: Vec<Round>,
    /// Memory of all guests.
    memory: Bytes,
    /// DRAM that they shared.
    host_dram: Option<Bytes>,
    /// How the guests ended.
    parts: Vec<Part>,
    /// What is to be said beside it.
    warnings: Vec<String>,
}

fn share(text: &str) -> Result<Share, String> {
    Share::parse(text).map_err(|error| error.to_string())
}

fn above_zero(text: &str) -> Result<f64, String> {
    zero_or_more(text).and_then(|number| match number > 0.0 {
        true => Ok(number),
        false => Err("give a number above 0".into()),
    })
}

fn zero_or_more(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "give a number, 0 or more".into())
}

#[cfg(test)]
#[path = "simulate/tests.rs"]
pub mod tests;
