// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the configuration says about the host as a whole: the section `[host]`.

use toml::Table;

use super::config::plain;
use super::settings::{Kind, Setting, Value, setting};
use super::words::suggestion;
use crate::units::{BytesPerSecond, Share};

/// The least cap on what all domains move: a twentieth of it, by which any one
/// second may exceed it, is a huge page.
const LEAST_BANDWIDTH: u64 = 40 << 20;

/// All settings of `[host]`.
#[rustfmt::skip]
pub const HOST_SETTINGS: [Setting; 3] = [
    setting("host", "dram-reserve", false, Kind::Percent, "3%",
        "part of each node of the fast tier that guests leave free"),
    setting("host", "bandwidth", false, Kind::Rate(LEAST_BANDWIDTH), "",
        "most that is moved of all domains together, both directions"),
    setting("host", "cpu", false, Kind::Percent, "1%",
        "part of one CPU that the rounds of a domain may take for each 64 GiB of its memory, where its sampling.interval is auto"),
];

/// What domains share, and what the host keeps for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLimits {
    /// Part of each node of the fast tier that guests leave free.
    pub dram_reserve: Share,
    /// Most that is moved of all domains together; `None`: no limit.
    pub bandwidth: Option<BytesPerSecond>,
    /// Part of one CPU that the rounds of a domain may take for each 64 GiB of its
    /// memory, where the interval between them is left to us.
    pub cpu: Share,
}

impl Default for HostLimits {
    fn default() -> Self {
        Self { dram_reserve: Share::from_percent(3), bandwidth: None, cpu: Share::from_percent(1) }
    }
}

impl HostLimits {
    /// Reads the section.
    pub(super) fn from_toml(table: &Table) -> Result<Self, String> {
        let mut limits = Self::default();
        for (name, value) in table {
            let known = HOST_SETTINGS.iter().find(|setting| setting.name == name).ok_or_else(|| {
                let names = HOST_SETTINGS.each_ref().map(|setting| setting.name);
                format!("there is no setting \"{name}\"{}", suggestion(name, &names))
            })?;
            let text = plain(name, value)?;
            let value = known.parse_plain(&text).map_err(|problem| format!("{name}: {problem}"))?;
            match (known.name, value) {
                ("dram-reserve", Value::Share(share)) => limits.dram_reserve = share,
                ("cpu", Value::Share(share)) => limits.cpu = share,
                (_, Value::Rate(rate)) => limits.bandwidth = Some(rate),
                _ => {}
            }
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Config;

    #[test]
    fn says_what_the_host_keeps() {
        let host = |text: &str| Config::parse(&format!("[host]\n{text}")).map(|config| config.host);
        assert_eq!(host(""), Ok(HostLimits::default()));
        let all = "dram-reserve = \"12.5%\"\nbandwidth = \"1 GiB/s\"\ncpu = \"2%\"";
        let limits = HostLimits {
            dram_reserve: Share::parse("12.5%").unwrap(),
            bandwidth: Some(BytesPerSecond(1 << 30)),
            cpu: Share::from_percent(2),
        };
        assert_eq!(host(all), Ok(limits));
        let problem = |text: &str| host(text).unwrap_err();
        assert_eq!(
            problem("bandwith = \"1 GiB/s\""),
            "[host]: there is no setting \"bandwith\"; did you mean \"bandwidth\"?"
        );
        assert!(problem("bandwidth = \"32 MiB/s\"").contains("give 40 MiB/s or more"));
        assert!(problem("cpu = 0.5").contains("in quotes"));
        assert!(problem("dram-reserve = \"3\"").contains("[host]: dram-reserve: \"3\" is not"));
        assert!(Config::parse("host = 3").unwrap_err().contains("write [host]"));
    }

    #[test]
    fn the_defaults_are_those_of_the_table() {
        let text: String = HOST_SETTINGS
            .iter()
            .filter(|setting| !setting.default.is_empty())
            .map(|setting| format!("{} = \"{}\"\n", setting.name, setting.default))
            .collect();
        assert_eq!(HostLimits::from_toml(&text.parse().unwrap()), Ok(HostLimits::default()));
    }
}
