// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who places the guest's memory, each set up as its own documentation says.

use std::fs;

use anyhow::{Context, Result, bail};
use ept_virt_core::wire::RoundStatus;

use super::damon::Damon;
use super::guest_memory::read;
use crate::scenario::daemon::{self, Daemon};

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// Nobody: pages stay where they were first written to.
    FirstTouch,
    /// The product.
    EptVirt,
    /// DAMON's migrate_hot and migrate_cold.
    Damon,
    /// NUMA balancing in tiering mode, with demotion by reclaim.
    NumaBalancing,
}

/// On by default; `ept-virt doctor` advises to turn it off.
const BALANCING_SWITCH: &str = "/proc/sys/kernel/numa_balancing";

/// Turns NUMA balancing off, before a guest starts: the contestant that it is begins
/// with a guest that it does not know, and the others are left alone.
pub fn stop_balancing() -> Result<()> {
    fs::write(BALANCING_SWITCH, "0").with_context(|| format!("writing 0 to {BALANCING_SWITCH}"))
}

/// Switches of NUMA balancing as a memory-tiering system, and what they are set to.
/// The first two: Documentation/admin-guide/sysctl/kernel.rst and
/// Documentation/ABI/testing/sysfs-kernel-mm-numa of Linux 6.12. The third as in the
/// comparison that DAMON's author published beside
/// <https://lkml.kernel.org/r/20250420194030.75838-1-sj@kernel.org>: node 0 makes room
/// by itself.
const BALANCING: [(&str, &str); 3] = [
    (BALANCING_SWITCH, "2"),
    ("/sys/kernel/mm/numa/demotion_enabled", "1"),
    ("/proc/sys/vm/zone_reclaim_mode", "7"),
];

/// What a contestant leaves to its kernel; printed with its settings.
const BALANCING_DEFAULTS: [&str; 6] = [
    "/proc/sys/kernel/numa_balancing_promote_rate_limit_MBps",
    "/sys/kernel/debug/sched/numa_balancing/hot_threshold_ms",
    "/sys/kernel/debug/sched/numa_balancing/scan_delay_ms",
    "/sys/kernel/debug/sched/numa_balancing/scan_period_min_ms",
    "/sys/kernel/debug/sched/numa_balancing/scan_size_mb",
    "/proc/sys/vm/watermark_scale_factor",
];

impl Contestant {
    /// By the name that the bench gives it.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "first-touch" => Self::FirstTouch,
            "ept-virt" => Self::EptVirt,
            "damon" => Self::Damon,
            "numa-balancing" => Self::NumaBalancing,
            other => bail!("no contestant is called {other:?}"),
        })
    }

    /// Lets it begin. `policy` is what the domain's XML says, for ept-virt.
    pub fn start(self, policy: &str) -> Result<Running> {
        let switches = Switches::set(if self == Self::NumaBalancing { &BALANCING } else { &[] })?;
        let work = match self {
            Self::FirstTouch | Self::NumaBalancing => Work::InKernel,
            Self::EptVirt => Work::EptVirt(Daemon::start()?),
            Self::Damon => Work::Damon(Damon::start()?),
        };
        let mut settings = match switches.0.as_slice() {
            [] => vec![shown(BALANCING_SWITCH)],
            set => set.iter().map(|(path, _)| shown(path)).collect(),
        };
        match &work {
            Work::EptVirt(_) => settings.push(policy.to_owned()),
            Work::Damon(damon) => settings.extend_from_slice(damon.settings()),
            Work::InKernel if self == Self::NumaBalancing => settings.extend(BALANCING_DEFAULTS.map(shown)),
            Work::InKernel => {}
        }
        Ok(Running { work, settings, _switches: switches })
    }
}

/// A setting of the kernel as it is.
fn shown(path: &str) -> String {
    let value =
        fs::read_to_string(path).map_or_else(|error| error.to_string(), |text| text.trim().to_owned());
    format!("{path} = {value}")
}

/// A contestant at work; it ends when this is dropped.
pub struct Running {
    work: Work,
    /// How it is set up.
    pub settings: Vec<String>,
    _switches: Switches,
}

enum Work {
    /// Whatever is to be done the kernel does by itself.
    InKernel,
    EptVirt(Daemon),
    Damon(Damon),
}

impl Running {
    /// Its own process, with a name for it.
    pub fn process(&self) -> Option<(&'static str, u32)> {
        match &self.work {
            Work::EptVirt(daemon) => Some(("ept-virt", daemon.pid())),
            _ => None,
        }
    }

    /// Its last round, and bytes that it says it moved.
    pub fn progress(&self, domain: &str) -> Result<(Option<RoundStatus>, Option<u64>)> {
        if !matches!(self.work, Work::EptVirt(_)) {
            return Ok((None, None));
        }
        let status = daemon::status_on(std::path::Path::new("/"))?;
        let Some(domain) = status.domains.into_iter().find(|known| known.name == domain) else {
            return Ok((None, None));
        };
        let moves = domain.moves;
        Ok((domain.round, Some(moves.demoted_bytes + moves.promoted_bytes)))
    }

    /// Ends it, and fails if it can not have worked.
    pub fn stop(self) -> Result<Vec<String>> {
        match self.work {
            Work::InKernel => Ok(Vec::new()),
            Work::EptVirt(daemon) => {
                let warnings = daemon::status_on(std::path::Path::new("/"))?.daemon.warnings;
                daemon.stop()?;
                Ok(warnings)
            }
            Work::Damon(damon) => damon.stop(),
        }
    }
}

/// Settings of the kernel that go back to what they were when this is dropped.
struct Switches(Vec<(String, String)>);

impl Switches {
    fn set(wanted: &[(&str, &str)]) -> Result<Self> {
        let mut old = Self(Vec::new());
        for (path, value) in wanted {
            old.0.push(((*path).to_owned(), read(path)?.trim().to_owned()));
            fs::write(path, value).with_context(|| format!("writing {value} to {path}"))?;
        }
        Ok(old)
    }
}

impl Drop for Switches {
    fn drop(&mut self) {
        for (path, value) in self.0.iter().rev() {
            let _ = fs::write(path, value);
        }
    }
}
