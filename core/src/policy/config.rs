// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's configuration file: defaults for all domains, named profiles, and
//! what domains share.
//!
//! ```toml
//! [defaults]
//! mode = "observe"
//!
//! [profiles.gold]
//! mode = "place"
//! dram.share = "60%"
//! sampling.interval = "500 ms"
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use toml::{Table, Value as Toml};

use super::host::HostLimits;
use super::layer::Layer;
use super::words::suggestion;

/// Where the configuration stands unless told otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/ept-virt/ept-virt.toml";

/// What the configuration says about policies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// What holds where neither the domain nor its profile says anything.
    pub defaults: Layer,
    /// By name.
    profiles: BTreeMap<String, Layer>,
    /// What domains share, and what the host keeps for itself.
    pub host: HostLimits,
    /// The group that may ask the daemon; `None`: root alone.
    pub group: Option<String>,
}

/// Why a configuration can not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is there and can not be read.
    #[error("cannot read the configuration {}: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// The file says something wrong.
    #[error("the configuration {}: {problem}", .path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
}

impl Config {
    /// Reads a file. One that is not there says nothing.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = match fs::read_to_string(path) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text.map_err(|cause| ConfigError::Read { path: path.into(), cause })?,
        };
        Self::parse(&text).map_err(|problem| ConfigError::Bad { path: path.into(), problem })
    }

    /// Reads a text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let table: Table =
            text.parse().map_err(|error: toml::de::Error| error.to_string().trim_end().to_owned())?;
        let mut config = Config::default();
        for (name, value) in &table {
            match (name.as_str(), value) {
                ("defaults", Toml::Table(table)) => config.defaults = layer("defaults", table)?,
                ("profiles", Toml::Table(profiles)) => config.profiles = read_profiles(profiles)?,
                ("host", Toml::Table(table)) => {
                    config.host =
                        HostLimits::from_toml(table).map_err(|problem| format!("[host]: {problem}"))?;
                }
                ("group", Toml::String(group)) => config.group = Some(group.clone()),
                ("defaults" | "profiles" | "host", _) => {
                    return Err(format!("{name} is not a table: write [{name}]"));
                }
                ("group", _) => return Err("group is not the name of a group, in quotes".into()),
                _ => {
                    let known = ["defaults", "profiles", "host", "group"];
                    return Err(format!("there is no setting \"{name}\"{}", suggestion(name, &known)));
                }
            }
        }
        if let Some(name) = config.defaults.get("profile") {
            config.profile(&name.to_string())?;
        }
        Ok(config)
    }

    /// The profile `name`, or what there is instead.
    pub fn profile(&self, name: &str) -> Result<&Layer, String> {
        self.profiles.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.profiles.keys().map(String::as_str).collect();
            match known.is_empty() {
                true => format!("there is no profile \"{name}\": the host's configuration has none"),
                false => format!("there is no profile \"{name}\"{}", suggestion(name, &known)),
            }
        })
    }

    /// The names of all profiles.
    pub fn profile_names(&self) -> impl Iterator<Item = &str> {
        self.profiles.keys().map(String::as_str)
    }
}

fn read_profiles(table: &Table) -> Result<BTreeMap<String, Layer>, String> {
    let mut profiles = BTreeMap::new();
    for (name, value) in table {
        let place = format!("profiles.{name}");
        let Toml::Table(settings) = value else {
            return Err(format!("{place} is not a table: write [{place}]"));
        };
        // The domain's XML must be able to name it.
        Layer::default().assign("profile", name)?;
        let layer = layer(&place, settings)?;
        if layer.get("profile").is_some() {
            return Err(format!("[{place}]: a profile can not build upon another profile"));
        }
        profiles.insert(name.clone(), layer);
    }
    Ok(profiles)
}

fn layer(place: &str, table: &Table) -> Result<Layer, String> {
    let mut layer = Layer::default();
    for (name, value) in table {
        let problem = match value {
            Toml::Table(group) => group
                .iter()
                .try_for_each(|(inner, value)| assign(&mut layer, &format!("{name}.{inner}"), value)),
            value => assign(&mut layer, name, value),
        };
        problem.map_err(|problem| format!("[{place}]: {problem}"))?;
    }
    match layer.contradiction() {
        Some((element, problem)) => Err(format!("[{place}] {element}: {problem}")),
        None => Ok(layer),
    }
}

fn assign(layer: &mut Layer, path: &str, value: &Toml) -> Result<(), String> {
    layer.assign(path, &plain(path, value)?)
}

/// A value as the command line would write it.
pub(super) fn plain(path: &str, value: &Toml) -> Result<String, String> {
    match value {
        Toml::String(text) => Ok(text.clone()),
        Toml::Integer(number) => Ok(number.to_string()),
        Toml::Boolean(flag) => Ok(if *flag { "yes" } else { "no" }.into()),
        _ => Err(format!("{path}: write the value in quotes, as \"30 s\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_defaults_and_profiles() {
        let config = Config::parse(
            "group = \"libvirt\"\n[defaults]\nmode = \"observe\"\nprofile = \"bronze\"\n\
             [profiles.gold]\ndram.share = \"60%\"\nsampling = { interval = \"500 ms\", flush = false }\n\
             [profiles.bronze.dram]\nweight = 10",
        )
        .unwrap();
        assert_eq!(config.group.as_deref(), Some("libvirt"));
        assert_eq!(config.profile_names().collect::<Vec<_>>(), ["bronze", "gold"]);
        let gold = config.profile("gold").unwrap();
        assert_eq!(gold.get("dram.share").unwrap().to_string(), "60%");
        assert_eq!(gold.get("sampling.flush").unwrap().to_string(), "no");
        assert_eq!(config.profile("god").unwrap_err(), "there is no profile \"god\"; did you mean \"gold\"?");
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        let problem = |text: &str| Config::parse(text).unwrap_err();
        assert!(problem("defaults = 3").contains("write [defaults]"));
        assert!(problem("[profile.gold]").contains("did you mean \"profiles\"?"));
        assert_eq!(
            problem("[profiles.gold]\ndram.shere = \"60%\""),
            "[profiles.gold]: there is no setting \"dram.shere\"; did you mean \"dram.share\"?"
        );
        assert!(problem("[defaults]\ndram.share = 0.6").contains("in quotes"));
        assert!(problem("[defaults]\nprofile = \"gold\"").contains("has none"));
        assert!(problem("[profiles.a]\nprofile = \"b\"").contains("can not build upon"));
        assert!(problem("[profiles.\"a b\"]\nmode = \"off\"").contains("not a profile's name"));
        assert!(
            problem("[profiles.a]\ndram = { min = \"2 GiB\", max = \"1 GiB\" }").contains("min is 2 GiB")
        );
        assert!(problem("[defaults\n").contains("TOML parse error at line 1"));
    }

    /// The example, as it is and with all that is commented out in it.
    #[test]
    fn the_example_is_valid() {
        let example = include_str!("../../../cli/dist/ept-virt.toml");
        assert_eq!(Config::parse(example).unwrap(), Config::default());
        let is_setting =
            |line: &&str| line.starts_with("#[") || line.contains(" = ") && !line.starts_with("# ");
        let settings: Vec<&str> = example.lines().filter(is_setting).map(|line| &line[1..]).collect();
        let config = Config::parse(&settings.join("\n")).unwrap();
        assert_eq!(config.profile_names().collect::<Vec<_>>(), ["bronze", "gold"]);
        assert_eq!(config.group.as_deref(), Some("libvirt"));
        // What is commented out there are the defaults, but for the cap.
        assert!(config.host.bandwidth.is_some());
        assert_eq!(HostLimits { bandwidth: None, ..config.host }, HostLimits::default());
    }

    #[test]
    fn a_file_that_is_not_there_says_nothing() {
        let config = Config::read(Path::new("/nonexistent/ept-virt.toml")).unwrap();
        assert_eq!(config, Config::default());
        assert!(Config::read(Path::new("/proc/self")).unwrap_err().to_string().contains("/proc/self"));
    }
}
