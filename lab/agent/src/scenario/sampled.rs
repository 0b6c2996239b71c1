// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sampled accesses count in the heat by their kind: memory that is used as before
//! cools when what is sampled of it has no weight, and only then.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::wire::SamplingStatus;

use super::console::Console;
use super::daemon::{self, Daemon};
use super::domain::policy;
use super::host::{self, virsh};
use super::{tiny, truth};
use crate::report::Outcome;

const NAME: &str = "guest";

/// The tiny guest has so few pages mapped that nearly each access to one is sampled.
const POLICY: &str = "<ev:sampling access='rwx'><ev:interval unit='ms'>1000</ev:interval>\
    <ev:rate unit='Hz'>4000</ev:rate></ev:sampling>\
    <ev:temperature><ev:half-life unit='s'>2</ev:half-life></ev:temperature>";

const TIMEOUT: Duration = Duration::from_secs(60);

/// The scenario. The guest reads each hot page twice a second before it writes it, so
/// that what is sampled of these pages are reads.
pub fn run() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    tiny::define(&[NAME.to_owned()], policy("observe", POLICY).as_deref())?;
    Console::clear(NAME)?;
    virsh(&["start", NAME])?;
    let mut console = Console::connect(NAME)?;
    let truth = console.wait_ready()?;
    let mut recall = 0.0;
    let mut wait = |what: &str, good: &dyn Fn(f64) -> bool| -> Result<f64> {
        host::wait_until(what, TIMEOUT, || {
            recall = truth::score_hot(&truth, &daemon::map(NAME)?, 1).recall;
            Ok(good(recall))
        })
        .with_context(|| {
            let sampling = daemon::domain(NAME).map(|domain| domain.and_then(|d| d.sampling));
            format!("recall {recall:.2}; {sampling:?}; {}", daemon::log_tail())
        })?;
        Ok(recall)
    };
    let set = |weights: &[&str]| daemon::cli_text(&[&["policy", "set", "guest", "--live"], weights].concat());
    wait("the hot block is hot", &|recall| recall >= 0.95)?;
    set(&["temperature.read=0", "temperature.write=1"])?;
    let cool = wait("what is only seen read cools", &|recall| recall <= 0.3)?;
    set(&["temperature.read=1", "temperature.write=0"])?;
    let warm = wait("reads count again, writes do not", &|recall| recall >= 0.95)?;
    let status = daemon::domain(NAME)?.and_then(|d| d.sampling).context("nothing is sampled")?;
    let SamplingStatus { samples, lost, problem, .. } = &status;
    ensure!(problem.is_none() && *samples > 100 && *lost == 0, "{status:?}");
    console.check_data()?;
    Ok(Outcome::Pass(format!(
        "of the hot block {:.0} % is hot when reads have no weight, {:.0} % when writes have none; {samples} samples, {lost} lost",
        cool * 100.0,
        warm * 100.0
    )))
}
