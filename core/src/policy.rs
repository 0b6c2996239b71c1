// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the administrator wants for a domain, as it stands in the `<metadata>`
//! of its XML. The grammar is `xml-schemas/placement.rng`; this module obeys it
//! and says more when something is wrong.

mod parse;

use std::fmt;
use std::time::Duration;

use crate::heat::HeatParams;
use crate::topology::NodeSet;
use crate::units::{Bytes, BytesPerSecond, Share, format_duration};

pub use parse::{NAMESPACE, PolicyError};

/// What is done with a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing.
    Off,
    /// Its memory is observed, nothing is moved.
    Observe,
    /// Its memory is observed, cold pages are demoted and hot ones promoted.
    Place,
}

/// A domain's policy with all defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Default: observe.
    pub mode: Mode,
    /// Refuse the domain's start when the policy is invalid or can not be
    /// served. Default: no. Nothing enforces it so far: the description says so.
    pub required: bool,
    /// How the domain is observed.
    pub sampling: Sampling,
    /// Time after which an access weighs half. Default: 30 s.
    pub half_life: Duration,
    /// NUMA nodes of the fast tier. Default: what the host says.
    pub fast_nodes: Option<NodeSet>,
    /// NUMA nodes of the slow tier. Default: what the host says.
    pub slow_nodes: Option<NodeSet>,
    /// How much of the domain may be on the fast tier.
    pub dram: Dram,
    /// How pages are moved.
    pub migration: Migration,
}

/// How a domain is observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Time between harvests. Default: 1 s.
    pub interval: Duration,
    /// One TLB flush at each harvest, so that cached translations hide no
    /// access. Default: yes.
    pub flush: bool,
}

/// How much of a domain may be on the fast tier.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dram {
    /// Of the guest's current memory. Default: all of it.
    pub share: Option<Share>,
    /// Never less than this. Default: nothing.
    pub min: Option<Bytes>,
    /// Never more than this; wins over `min`. Default: no limit.
    pub max: Option<Bytes>,
}

/// How pages are moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// How much hotter, as a share of the scale of temperature, a page must be
    /// than the page that it drives out of DRAM. Default: 10%.
    pub tolerance: Share,
    /// A page is demoted only when it was not accessed for this long.
    /// Default: 5 s.
    pub delay: Duration,
    /// At most this much is moved, both directions together. Default: 64 MiB/s.
    pub bandwidth: BytesPerSecond,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            mode: Mode::Observe,
            required: false,
            sampling: Sampling { interval: Duration::from_secs(1), flush: true },
            half_life: Duration::from_secs(30),
            fast_nodes: None,
            slow_nodes: None,
            dram: Dram::default(),
            migration: Migration {
                tolerance: Share::from_percent(10),
                delay: Duration::from_secs(5),
                bandwidth: BytesPerSecond(64 << 20),
            },
        }
    }
}

impl Policy {
    /// Reads the policy in the `<metadata>` of a domain's XML; `None` when there
    /// is none.
    pub fn from_domain_xml(xml: &str) -> Result<Option<Self>, PolicyError> {
        parse::domain(xml)
    }

    /// Reads a `<placement>` element that stands alone, as `virsh metadata`
    /// prints it.
    pub fn from_element_xml(xml: &str) -> Result<Self, PolicyError> {
        parse::element(xml)
    }

    /// The parameters of the heat map.
    pub fn heat_params(&self) -> HeatParams {
        HeatParams { half_life: self.half_life, delay: self.migration.delay }
    }

    /// What a domain of `memory` may have on the fast tier; `None` when that is
    /// all of it.
    pub fn dram_target(&self, memory: Bytes) -> Option<Bytes> {
        let share = self.dram.share.unwrap_or(Share::WHOLE).of(memory.0);
        let floored = share.max(self.dram.min.map_or(0, |min| min.0));
        let target = floored.min(self.dram.max.map_or(u64::MAX, |max| max.0));
        (target < memory.0).then_some(Bytes(target))
    }

    /// The effective policy in one line of plain words.
    pub fn describe(&self) -> String {
        let observed = format!(
            "harvest every {}{}, half-life {}",
            format_duration(self.sampling.interval),
            if self.sampling.flush { "" } else { " without TLB flush" },
            format_duration(self.half_life),
        );
        let mut text = match self.mode {
            Mode::Off => "off: neither observed nor moved".into(),
            Mode::Observe => format!("observe: {observed}; nothing is moved"),
            Mode::Place => format!(
                "place: {observed}; DRAM {}{}; demote after {} without access, exchange pages {} of the heat scale apart, move at most {}",
                self.dram,
                self.describe_nodes(),
                format_duration(self.migration.delay),
                self.migration.tolerance,
                self.migration.bandwidth,
            ),
        };
        if self.required {
            text += "; required=\"yes\" is not enforced by this version: the domain starts in any case";
        }
        text
    }

    fn describe_nodes(&self) -> String {
        match (&self.fast_nodes, &self.slow_nodes) {
            (None, None) => String::new(),
            (Some(fast), None) => format!(" on NUMA nodes {fast}"),
            (None, Some(slow)) => format!(", the rest on NUMA nodes {slow}"),
            (Some(fast), Some(slow)) => format!(" on NUMA nodes {fast}, the rest on {slow}"),
        }
    }
}

impl fmt::Display for Dram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.share {
            Some(share) => write!(f, "{share} of guest memory")?,
            None if self.min.is_none() && self.max.is_none() => return f.write_str("without limit"),
            None => f.write_str("all of guest memory")?,
        }
        if let Some(min) = self.min {
            write!(f, ", at least {min}")?;
        }
        if let Some(max) = self.max {
            write!(f, ", at most {max}")?;
        }
        Ok(())
    }
}
