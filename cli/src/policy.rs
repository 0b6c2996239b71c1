// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt policy`: reads and writes the policy in a domain's XML. Nothing
//! that is invalid is ever written.

mod edit;
pub mod show;

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use ept_virt_core::domain::{DefinedDomain, Description};
use ept_virt_core::policy::{Config, DEFAULT_CONFIG, Effective, Layer, NAMESPACE};

use crate::complete;
use crate::failure::Failure;
use crate::output::{Output, print, write_text};
use crate::style::Style;

/// The grammar, as it is installed.
const SCHEMA: &str = include_str!("../../xml-schemas/placement.rng");

/// What to do with policies.
#[derive(Debug, Args)]
pub struct PolicyArgs {
    /// The host's configuration, with its profiles and defaults.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_CONFIG)]
    config_file: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what holds for a domain, and where each value comes from.
    Show {
        /// Name, id or UUID; without it, what holds for a domain that says nothing.
        #[arg(add = complete::defined())]
        domain: Option<String>,
        /// The description for its next start, not the running one.
        #[arg(long)]
        config: bool,
        /// The element alone, as it stands in the domain's XML.
        #[arg(long, conflicts_with = "json")]
        xml: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Change some settings of a domain's policy.
    Set(SetArgs),
    /// Change a domain's policy in an editor ($VISUAL, $EDITOR, or vi).
    Edit {
        /// Name, id or UUID.
        #[arg(add = complete::defined())]
        domain: String,
        #[command(flatten)]
        scope: Scope,
    },
    /// Take the policy out of a domain's XML: it is observed, and nothing is moved.
    Clear {
        /// Name, id or UUID.
        #[arg(add = complete::defined())]
        domain: String,
        #[command(flatten)]
        scope: Scope,
    },
    /// Check a domain's XML, a bare element, or the host's configuration (.toml).
    Validate {
        /// The file; - for standard input.
        file: PathBuf,
    },
    /// Print the grammar (RELAX NG).
    Schema,
}

/// `policy set`.
#[derive(Debug, Args)]
struct SetArgs {
    /// Name, id or UUID.
    #[arg(add = complete::defined())]
    domain: String,
    /// Short for mode=MODE: off, observe or place.
    #[arg(long)]
    mode: Option<String>,
    /// Short for dram.share=SHARE, as 40%.
    #[arg(long, value_name = "SHARE")]
    dram: Option<String>,
    /// Short for profile=NAME.
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// Begin with the element or domain XML in this file, and forget what the
    /// domain said before; - for standard input.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Settings, as dram.min=512MiB; without a value the setting is taken away.
    /// `ept-virt policy show` lists them.
    #[arg(value_name = "SETTING=VALUE", add = complete::settings())]
    settings: Vec<String>,
    #[command(flatten)]
    scope: Scope,
}

/// Which description of a domain is changed.
#[derive(Clone, Copy, Debug, Args)]
struct Scope {
    /// The running domain alone.
    #[arg(long)]
    live: bool,
    /// Its next start alone. Without either: both, as far as the domain has them.
    #[arg(long)]
    config: bool,
}

/// Runs one of the commands, with the libvirt at `uri`.
pub fn run(args: &PolicyArgs, uri: &str, style: &Style) -> Result<(), Failure> {
    match &args.command {
        Command::Show { domain, config, xml, output } => {
            let layer = match domain {
                Some(domain) => said(&DefinedDomain::find(uri, domain, true)?, *config)?,
                None => None,
            };
            if *xml {
                return write_text(&layer.unwrap_or_default().to_xml());
            }
            let effective =
                Effective::new(&configuration(args)?, layer.as_ref()).map_err(Failure::refused)?;
            print(*output, &show::entries(&effective), || show::render(&effective, style))
        }
        Command::Set(set) => {
            let domain = DefinedDomain::find(uri, &set.domain, false)?;
            change(args, &domain, set.scope, |layer| set.apply(layer))
        }
        Command::Edit { domain, scope } => {
            let domain = DefinedDomain::find(uri, domain, false)?;
            let scopes = scope.descriptions(&domain)?;
            let config = configuration(args)?;
            let layer = read(&domain, scopes[0])?.unwrap_or_default();
            match edit::edit(&layer, &|layer| check(&config, layer))? {
                Some(layer) => write(&domain, &scopes, Some(&layer)),
                None => write_text("The policy is as it was.\n"),
            }
        }
        Command::Clear { domain, scope } => {
            let domain = DefinedDomain::find(uri, domain, false)?;
            write(&domain, &scope.descriptions(&domain)?, None)
        }
        Command::Validate { file } => validate(file, &configuration(args)),
        Command::Schema => write_text(SCHEMA),
    }
}

#[cfg(test)]
impl PolicyArgs {
    /// What `policy set` says to a domain that said nothing.
    pub fn said(&self) -> Option<Layer> {
        match &self.command {
            Command::Set(set) => set.apply(Layer::default()).ok(),
            _ => None,
        }
    }
}

impl SetArgs {
    fn apply(&self, before: Layer) -> Result<Layer, Failure> {
        let mut layer = match &self.file {
            Some(file) => read_file(file)?,
            None => before,
        };
        for (path, text) in [("mode", &self.mode), ("dram.share", &self.dram), ("profile", &self.profile)] {
            if let Some(text) = text {
                layer.assign(path, text).map_err(Failure::refused)?;
            }
        }
        for setting in &self.settings {
            let (path, text) = setting.split_once('=').ok_or_else(|| {
                Failure::refused(format!("\"{setting}\" is not of the form SETTING=VALUE, as dram.share=40%"))
            })?;
            let done = if text.is_empty() { layer.unset(path) } else { layer.assign(path, text) };
            done.map_err(Failure::refused)?;
        }
        Ok(layer)
    }

    fn says_something(&self) -> bool {
        let flags = [&self.mode, &self.dram, &self.profile];
        flags.iter().any(|flag| flag.is_some()) || self.file.is_some() || !self.settings.is_empty()
    }
}

impl Scope {
    /// The descriptions to change; one at least.
    fn descriptions(self, domain: &DefinedDomain) -> Result<Vec<Description>, Failure> {
        let refuse = |what: &str, hint: &str| {
            Err(Failure::refused(format!("domain \"{}\" {what}", domain.name)).hint(hint))
        };
        if self.live && !domain.is_active {
            return refuse("does not run", "leave out --live");
        }
        if self.config && !domain.is_persistent {
            return refuse("is transient: it has no next start", "leave out --config");
        }
        let both = !self.live && !self.config;
        let wanted = [
            (Description::Live, domain.is_active && (self.live || both)),
            (Description::Config, domain.is_persistent && (self.config || both)),
        ];
        Ok(wanted.into_iter().filter(|(_, wanted)| *wanted).map(|(description, _)| description).collect())
    }
}

/// Changes each description from what it says itself.
fn change(
    args: &PolicyArgs,
    domain: &DefinedDomain,
    scope: Scope,
    edit: impl Fn(Layer) -> Result<Layer, Failure>,
) -> Result<(), Failure> {
    match &args.command {
        Command::Set(set) if !set.says_something() => {
            let hint = "give settings, as dram.share=40%, or --file";
            return Err(Failure::refused("nothing to set").hint(hint));
        }
        _ => {}
    }
    let config = configuration(args)?;
    // All are judged before one is written.
    let mut changed = Vec::new();
    for description in scope.descriptions(domain)? {
        let layer = edit(read(domain, description)?.unwrap_or_default())?;
        check(&config, &layer).map_err(Failure::refused)?;
        changed.push((description, layer));
    }
    for (description, layer) in &changed {
        write(domain, &[*description], Some(layer))?;
    }
    Ok(())
}

/// Whether a domain on this host could say this.
fn check(config: &Config, layer: &Layer) -> Result<(), String> {
    if let Some((element, problem)) = layer.contradiction() {
        return Err(format!("<{element}>: {problem}"));
    }
    Effective::new(config, Some(layer)).map(|_| ())
}

fn write(domain: &DefinedDomain, scopes: &[Description], layer: Option<&Layer>) -> Result<(), Failure> {
    let element = layer.map(Layer::to_metadata);
    for scope in scopes {
        domain.set_policy(element.as_deref(), *scope)?;
        let (what, whose) = match (layer, scope) {
            (Some(_), Description::Live) => ("changed", "running"),
            (Some(_), Description::Config) => ("changed", "next start of"),
            (None, Description::Live) => ("removed", "running"),
            (None, Description::Config) => ("removed", "next start of"),
        };
        write_text(&format!(
            "Policy {what} for the {whose} domain '{}'.\n",
            crate::style::harmless(&domain.name)
        ))?;
    }
    Ok(())
}

/// What the running domain says, or with `config`, or when it does not run, what
/// it says for its next start.
fn said(domain: &DefinedDomain, config: bool) -> Result<Option<Layer>, Failure> {
    match domain.is_active && !config {
        true => read(domain, Description::Live),
        false => read(domain, Description::Config),
    }
}

fn read(domain: &DefinedDomain, description: Description) -> Result<Option<Layer>, Failure> {
    let xml = domain.xml(description)?;
    Layer::from_domain_xml(&xml).map_err(|error| {
        Failure::refused(format!("the policy of domain \"{}\" can not be read: {error}", domain.name))
            .hint("`ept-virt policy clear` takes it away, `policy set --file` replaces it")
    })
}

fn configuration(args: &PolicyArgs) -> Result<Config, Failure> {
    Config::read(&args.config_file).map_err(|error| Failure::refused(error.to_string()))
}

fn read_text(file: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read = match file.to_str() {
        Some("-") => io::stdin().read_to_string(&mut text).map(|_| text),
        _ => fs::read_to_string(file),
    };
    read.map_err(|error| Failure::unreachable(format!("cannot read {}: {error}", file.display())))
}

/// The policy in a file with a bare element or a domain's XML.
pub fn read_file(file: &Path) -> Result<Layer, Failure> {
    let text = read_text(file)?;
    let wrong = |problem: String| Failure::refused(format!("{}: {problem}", file.display()));
    if !is_domain(&text) {
        return Layer::from_element_xml(&text).map_err(|error| wrong(error.to_string()));
    }
    let found = Layer::from_domain_xml(&text).map_err(|error| wrong(error.to_string()))?;
    found.ok_or_else(|| wrong(format!("the domain's metadata has no element of {NAMESPACE}")))
}

/// Whether the XML is a whole domain's rather than an element; broken XML is
/// neither, and said so by who reads it.
fn is_domain(xml: &str) -> bool {
    Layer::from_domain_xml(xml).is_ok()
        || Layer::from_domain_xml(xml).is_err_and(|error| error.element.as_deref() != Some("placement"))
            && xml.contains("<domain")
}

fn validate(file: &Path, config: &Result<Config, Failure>) -> Result<(), Failure> {
    let is_config = file.extension().is_some_and(|extension| extension == "toml");
    if is_config {
        let text = read_text(file)?;
        Config::parse(&text).map_err(|problem| Failure::refused(format!("{}: {problem}", file.display())))?;
        return write_text(&format!("{}: valid\n", file.display()));
    }
    let layer = read_file(file)?;
    // A profile of another host may be meant: its absence here is said, and is no error.
    let note = match config {
        Ok(config) => Effective::new(config, Some(&layer)).err(),
        Err(failure) => Some(failure.to_string()),
    };
    let note = note.map(|note| format!(" by itself; on this host: {note}")).unwrap_or_default();
    write_text(&format!("{}: valid{note}\n", file.display()))
}
