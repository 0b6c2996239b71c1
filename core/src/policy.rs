// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the administrator wants for a domain, as it stands in the `<metadata>`
//! of its XML. The grammar is `xml-schemas/placement.rng`; this module obeys it
//! and says more when something is wrong.

mod config;
mod exclude;
mod host;
mod layer;
mod parse;
mod serve;
mod settings;
mod words;

use std::fmt;
use std::time::Duration;

use crate::heat::HeatParams;
use crate::samples::{Access, AccessSet, Sample};
use crate::text::word;
use crate::topology::NodeSet;
use crate::units::{Bytes, BytesPerSecond, Share, format_duration};

pub use crate::xml::LONGEST_XML;
pub use config::{Config, ConfigError, DEFAULT_CONFIG};
pub use exclude::Excluded;
pub use host::{HOST_SETTINGS, HostLimits};
pub use layer::{Exclusion, Layer};
pub use parse::{NAMESPACE, PolicyError};
pub use serve::{Host, refusal};
pub use settings::{Kind, SETTINGS, Setting, Value};

/// The weight of domains whose policy says nothing: [`SETTINGS`] has it as well.
const USUAL_WEIGHT: u32 = 100;

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

/// A domain's policy with all defaults filled in. [`SETTINGS`] has the defaults
/// and what each setting means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What is done at all.
    pub mode: Mode,
    /// Refuse the domain's start when the policy is invalid or can not be
    /// served.
    pub required: bool,
    /// How the domain is observed.
    pub sampling: Sampling,
    /// Time after which an access weighs half.
    pub half_life: Duration,
    /// How much sampled accesses count.
    pub weights: Weights,
    /// NUMA nodes of the fast tier; `None`: what the host says.
    pub fast_nodes: Option<NodeSet>,
    /// NUMA nodes of the slow tier; `None`: what the host says.
    pub slow_nodes: Option<NodeSet>,
    /// How much of the domain may be on the fast tier.
    pub dram: Dram,
    /// How pages are moved.
    pub migration: Migration,
    /// What is never moved.
    pub exclude: Vec<Exclusion>,
}

/// How a domain is observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Time between harvests; `None`: ept-virt chooses.
    pub interval: Option<Duration>,
    /// One TLB flush at each harvest, so that cached translations hide no
    /// access.
    pub flush: bool,
    /// Kinds of access that sampling records.
    pub access: AccessSet,
    /// Accesses sampled in a second; 0: none.
    pub rate_hz: u32,
}

/// How much a sampled access of each kind counts, against a harvested bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    /// Reads.
    pub read: u32,
    /// Writes.
    pub write: u32,
    /// Fetches.
    pub execute: u32,
}

impl Weights {
    /// How much a sample counts. What the CPU did by itself, walking the guest's page
    /// tables, is a read: EPT calls it a write only because it may set their bits.
    pub fn of(&self, sample: &Sample) -> u32 {
        match sample.access {
            _ if sample.page_walk => self.read,
            Access::Read => self.read,
            Access::Write => self.write,
            Access::Exec => self.execute,
        }
    }
}

/// How much of a domain may be on the fast tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dram {
    /// Of the guest's current memory.
    pub share: Share,
    /// Part in the host's DRAM beside other domains.
    pub weight: u32,
    /// More than the share, up to `max`, while the guest is slowed down by more than
    /// this.
    pub max_slowdown: Option<Share>,
    /// Never less than this.
    pub min: Bytes,
    /// Never more than this; wins over `min`.
    pub max: Option<Bytes>,
}

/// How pages are moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// How much hotter, as a share of the scale of temperature, a page must be
    /// than the page that it drives out of DRAM.
    pub tolerance: Share,
    /// A page is demoted only when it was not accessed for this long.
    pub delay: Duration,
    /// Time between two plans; `None`: after each harvest.
    pub interval: Option<Duration>,
    /// At most this much is moved, both directions together.
    pub bandwidth: BytesPerSecond,
}

/// Where a setting's effective value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The domain's XML.
    Domain,
    /// This profile of the configuration.
    Profile(String),
    /// The configuration's defaults for all domains.
    Host,
    /// Nobody said anything.
    BuiltIn,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Domain => f.pad("domain XML"),
            Origin::Profile(name) => f.pad(&format!("profile {name}")),
            Origin::Host => f.pad("host defaults"),
            Origin::BuiltIn => f.pad("built in"),
        }
    }
}

/// A policy, and where each of its settings comes from.
#[derive(Clone, Debug)]
pub struct Effective {
    /// The policy.
    pub policy: Policy,
    /// All layers as one.
    pub layer: Layer,
    /// Uppermost first.
    origins: Vec<(Origin, Layer)>,
}

impl Effective {
    /// What holds for a domain whose XML says `domain`, on a host with this
    /// configuration. Fails when the profile is not there, or when layers that
    /// are right for themselves contradict each other.
    pub fn new(config: &Config, domain: Option<&Layer>) -> Result<Self, String> {
        let mut origins = vec![(Origin::Domain, domain.cloned().unwrap_or_default())];
        let named = origins.iter().map(|(_, layer)| layer).chain([&config.defaults]);
        let profile = named.filter_map(|layer| layer.get("profile")).next().map(Value::to_string);
        if let Some(name) = profile {
            let layer = config.profile(&name)?.clone();
            origins.push((Origin::Profile(name), layer));
        }
        origins.push((Origin::Host, config.defaults.clone()));
        origins.push((Origin::BuiltIn, Layer::built_in()));
        let mut layer = Layer::default();
        for (_, lower) in origins.iter().rev() {
            layer.overlay(lower);
        }
        let effective = Self { policy: Policy::from_layer(&layer), layer, origins };
        match effective.layer.contradiction() {
            Some((element, problem)) => {
                Err(format!("<{element}>: {problem}, as {}", effective.sources(element)))
            }
            None => Ok(effective),
        }
    }

    /// Where the value at `path` comes from.
    pub fn origin(&self, path: &str) -> &Origin {
        let found = self.origins.iter().find(|(_, layer)| layer.get(path).is_some());
        found.map_or(&Origin::BuiltIn, |(origin, _)| origin)
    }

    /// Where the exclusions come from.
    pub fn origin_of_exclusions(&self) -> &Origin {
        let found = self.origins.iter().find(|(_, layer)| layer.exclude.is_some());
        found.map_or(&Origin::BuiltIn, |(origin, _)| origin)
    }

    /// Who says what about an element, in words.
    fn sources(&self, element: &str) -> String {
        let said = self.layer.values().filter(|(setting, _)| setting.element == element);
        let words = said.map(|(setting, value)| (setting, value, self.origin(&setting.path())));
        let words = words.filter(|(.., origin)| **origin != Origin::BuiltIn);
        let words: Vec<_> =
            words.map(|(s, v, origin)| format!("{} {} ({origin})", s.name, word(&v.to_string()))).collect();
        words.join(", ")
    }
}

impl Default for Policy {
    fn default() -> Self {
        Policy::from_layer(&Layer::built_in())
    }
}

impl Policy {
    /// The policy of a domain on a host without configuration.
    pub fn of(domain: &Layer) -> Self {
        let mut layer = Layer::built_in();
        layer.overlay(domain);
        Policy::from_layer(&layer)
    }

    /// Reads a `<placement>` element that stands alone, on a host without
    /// configuration.
    pub fn from_element_xml(xml: &str) -> Result<Self, PolicyError> {
        Layer::from_element_xml(xml).map(|layer| Policy::of(&layer))
    }

    /// Takes the values of a layer that says everything.
    fn from_layer(layer: &Layer) -> Self {
        Policy {
            mode: match layer.get("mode") {
                Some(Value::Word(word)) if word == "off" => Mode::Off,
                Some(Value::Word(word)) if word == "place" => Mode::Place,
                _ => Mode::Observe,
            },
            required: layer.flag("required"),
            sampling: Sampling {
                interval: layer.time("sampling.interval"),
                flush: layer.flag("sampling.flush"),
                access: match layer.get("sampling.access") {
                    Some(Value::Access(access)) => *access,
                    _ => AccessSet::default(),
                },
                rate_hz: layer.number("sampling.rate"),
            },
            half_life: layer.time("temperature.half-life").unwrap_or_default(),
            weights: Weights {
                read: layer.number("temperature.read"),
                write: layer.number("temperature.write"),
                execute: layer.number("temperature.execute"),
            },
            fast_nodes: layer.nodes("tiers.fast"),
            slow_nodes: layer.nodes("tiers.slow"),
            dram: Dram {
                share: layer.share("dram.share"),
                weight: layer.number("dram.weight"),
                max_slowdown: layer.get("dram.max-slowdown").map(|_| layer.share("dram.max-slowdown")),
                min: layer.size("dram.min").unwrap_or_default(),
                max: layer.size("dram.max"),
            },
            migration: Migration {
                tolerance: layer.share("migration.tolerance"),
                delay: layer.time("migration.delay").unwrap_or_default(),
                interval: layer.time("migration.interval"),
                bandwidth: match layer.get("migration.bandwidth") {
                    Some(Value::Rate(rate)) => *rate,
                    _ => BytesPerSecond::default(),
                },
            },
            exclude: layer.exclude.clone().unwrap_or_default(),
        }
    }

    /// The parameters of the heat map.
    pub fn heat_params(&self) -> HeatParams {
        HeatParams { half_life: self.half_life, delay: self.migration.delay }
    }

    /// What a domain of `memory` may have on the fast tier; `None` when that is
    /// all of it.
    pub fn dram_target(&self, memory: Bytes) -> Option<Bytes> {
        let floored = self.dram.share.of(memory.0).max(self.dram.min.0);
        let target = floored.min(self.dram.max.map_or(u64::MAX, |max| max.0));
        (target < memory.0).then_some(Bytes(target))
    }

    /// The most that a domain of `memory` may be given beyond its target.
    pub fn dram_most(&self, memory: Bytes) -> Bytes {
        Bytes(self.dram.max.map_or(memory.0, |max| max.0.min(memory.0)))
    }

    /// The effective policy in one line of plain words.
    pub fn describe(&self) -> String {
        let observed = format!(
            "harvest {}{}, half-life {}",
            self.sampling
                .interval
                .map_or("at its own pace".into(), |time| format!("every {}", format_duration(time))),
            if self.sampling.flush { "" } else { " without TLB flush" },
            format_duration(self.half_life),
        );
        match self.mode {
            Mode::Off => "off: neither observed nor moved".into(),
            Mode::Observe => format!("observe: {observed}; nothing is moved"),
            Mode::Place => format!(
                "place: {observed}; DRAM {}{}{}; {}{}exchange pages {} of the heat scale apart, move at most {}",
                self.dram,
                self.describe_nodes(),
                match self.dram.weight {
                    USUAL_WEIGHT => String::new(),
                    weight => format!(", with weight {weight} beside other domains"),
                },
                self.migration
                    .interval
                    .map_or(String::new(), |time| format!("plan every {}, ", format_duration(time))),
                match self.migration.delay {
                    Duration::ZERO => String::new(),
                    delay => format!("demote after {} without access, ", format_duration(delay)),
                },
                self.migration.tolerance,
                self.migration.bandwidth,
            ),
        }
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
        match (self.share, self.min, self.max) {
            (Share::WHOLE, Bytes(0), None) => return f.write_str("without limit"),
            (Share::WHOLE, ..) => f.write_str("all of guest memory")?,
            (share, ..) => write!(f, "{share} of guest memory")?,
        }
        if self.min.0 > 0 {
            write!(f, ", at least {}", self.min)?;
        }
        if let Some(max) = self.max {
            write!(f, ", at most {max}")?;
        }
        if let Some(limit) = self.max_slowdown {
            write!(f, ", more while that slows it down by over {limit}")?;
        }
        Ok(())
    }
}
