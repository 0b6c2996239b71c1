// SPDX-License-Identifier: MIT OR Apache-2.0
//! ept-virt-placement(7) and ept-virt.toml(5), from the table of settings that XML,
//! configuration and command line are read by.

use ept_virt_core::policy::{DEFAULT_CONFIG, HOST_SETTINGS, NAMESPACE, SETTINGS, Setting};
use roff::{Inline, Roff, bold, italic, roman};

/// A policy in a domain's XML.
const POLICY: &str = "\
<domain type='kvm'>
  ...
  <metadata>
    <ev:placement xmlns:ev=\"NAMESPACE\" mode=\"place\">
      <ev:dram share=\"40%\"><ev:min unit=\"MiB\">512</ev:min></ev:dram>
    </ev:placement>
  </metadata>";

/// The same by the configuration, for who names the profile.
const CONFIGURATION: &str = "\
group = \"libvirt\"

[host]
dram-reserve = \"5%\"

[defaults]
mode = \"observe\"

[profiles.gold]
mode = \"place\"
dram.share = \"80%\"
dram.weight = 300";

/// The page of the policy.
pub fn placement() -> String {
    let mut page = page("EPT-VIRT-PLACEMENT", "7");
    section(
        &mut page,
        "NAME",
        "ept-virt-placement - the policy in a domain's XML by which its memory is placed",
    );
    section(
        &mut page,
        "DESCRIPTION",
        "A policy is one element of our namespace in the <metadata> of a libvirt domain, beside those of other \
         programs. Everything in it is optional. What it does not say, a profile that it names says, then the \
         host's ept-virt.toml(5), then what is written here as default. A domain without a policy is observed, \
         and nothing of it is moved.",
    );
    text(
        &mut page,
        "It can be changed while the domain runs, by `ept-virt policy set`, virsh-metadata or virsh-edit.",
    );
    example(&mut page, &POLICY.replace("NAMESPACE", NAMESPACE));
    control(&mut page, "SH", "SETTINGS");
    text(&mut page, "Each is shown as `ept-virt policy set` and the configuration name it.");
    settings(&mut page, SETTINGS);
    control(&mut page, "SS", "<exclude>");
    text(&mut page, "Memory that is never moved, and what lies in 2 MiB of QEMU's address space with it.");
    item(
        &mut page,
        &[bold("<range start="), italic("ADDRESS"), bold(" end="), italic("ADDRESS"), bold("/>")],
    );
    text(&mut page, "Guest physical addresses in bytes, from start up to, and without, end.");
    item(&mut page, &[bold("<memory alias="), italic("NAME"), bold("/>")]);
    text(&mut page, "A memory device of the domain, as dimm0.");
    section(
        &mut page,
        "UNITS",
        "In XML the unit is the attribute unit beside the number, as libvirt has it; in the configuration and \
         on the command line it stands behind the number, as \"512 MiB\". Times: ms, s, min, h. Sizes: bytes, \
         KiB, MiB, GiB, TiB, and KB, MB, GB, TB of powers of ten; rates the same with /s.",
    );
    section(
        &mut page,
        "ERRORS",
        "A policy that says what is not known here is not in force: the domain is observed, nothing of it is \
         moved, and `ept-virt status` names line, element and cause. With required=\"yes\" the domain is not \
         started, restored or taken in from another host then, nor while the daemon is stopped or the module \
         is not loaded; `ept-virt policy set DOMAIN required=no --config` lets it start, or `policy clear` \
         where the policy or the configuration can not be read.",
    );
    see_also(
        &mut page,
        &[("ept-virt", "1"), ("ept-virt-policy", "1"), ("ept-virt.toml", "5"), ("virsh", "1")],
    );
    page.render()
}

/// The page of the configuration.
pub fn configuration() -> String {
    let mut page = page("EPT-VIRT.TOML", "5");
    section(
        &mut page,
        "NAME",
        "ept-virt.toml - what a host's domains share, and what holds where their XML says nothing",
    );
    section(&mut page, "SYNOPSIS", DEFAULT_CONFIG);
    section(
        &mut page,
        "DESCRIPTION",
        "A file in TOML. Without it, or with an empty one, every domain is observed, nothing is moved, and only \
         root may ask the daemon. `ept-virt policy validate FILE` checks it; SIGHUP (`systemctl reload ept-virt`) \
         makes the daemon read it again. One that is wrong changes nothing then, which `ept-virt status` tells, \
         but no daemon starts with it: check it first.",
    );
    example(&mut page, CONFIGURATION);
    control(&mut page, "SH", "SETTINGS");
    item(&mut page, &[bold("group"), roman(" (a name; without it root alone)")]);
    text(
        &mut page,
        "The group whose members may ask the daemon for list, status and map. Changing takes root.",
    );
    control(&mut page, "SS", "[host]");
    text(&mut page, "What all domains share.");
    for setting in &HOST_SETTINGS {
        entry(&mut page, setting.name.into(), setting);
    }
    control(&mut page, "SS", "[defaults]");
    text(
        &mut page,
        "What holds for every domain, where neither its policy nor its profile says anything: settings of a policy.",
    );
    control(&mut page, "SS", "[profiles.NAME]");
    text(
        &mut page,
        "What holds for a domain whose policy names the profile: settings of a policy but for profile.",
    );
    control(&mut page, "SH", "SETTINGS OF A POLICY");
    for setting in SETTINGS {
        entry(&mut page, setting.path(), setting);
    }
    text(&mut page, "What a policy excludes can be said in a domain's XML alone.");
    see_also(&mut page, &[("ept-virt", "1"), ("ept-virt-policy", "1"), ("ept-virt-placement", "7")]);
    page.render()
}

fn page(title: &str, section: &str) -> Roff {
    let mut page = Roff::new();
    let source = format!("ept-virt {}", env!("CARGO_PKG_VERSION"));
    page.control("TH", [title, section, super::DATE, source.as_str(), "ept-virt"]);
    page
}

fn section(page: &mut Roff, title: &str, words: &str) {
    control(page, "SH", title);
    text(page, words);
}

fn control(page: &mut Roff, name: &str, argument: &str) {
    page.control(name, [argument]);
}

fn text(page: &mut Roff, words: &str) {
    page.text([roman(words)]);
}

/// The head of what the next text explains.
fn item(page: &mut Roff, head: &[Inline]) {
    page.control("TP", []);
    page.text(head.to_vec());
}

fn example(page: &mut Roff, lines: &str) {
    page.control("PP", []).control("RS", ["4"]).control("EX", []);
    lines.lines().for_each(|line| text(page, line));
    page.control("EE", []).control("RE", []);
}

/// All settings of a policy, by element.
fn settings(page: &mut Roff, settings: &[Setting]) {
    let mut element = None;
    for setting in settings {
        if element != Some(setting.element) {
            let of = if setting.element.is_empty() { "placement" } else { setting.element };
            control(page, "SS", &format!("<{of}>"));
            element = Some(setting.element);
        }
        entry(page, setting.path(), setting);
    }
}

/// A setting: its name, where it stands, what it may say, its default and its meaning.
fn entry(page: &mut Roff, name: String, setting: &Setting) {
    let auto = if setting.auto { ", or auto" } else { "" };
    let default = if setting.default.is_empty() { "none" } else { setting.default };
    item(page, &[bold(name), roman(format!(" ({}{auto}; default: {default})", setting.kind))]);
    let form = match setting.is_element {
        true => format!(" In XML the element <{}>.", setting.name),
        false => String::new(),
    };
    text(page, &format!("{}.{form}", sentence(setting.help)));
}

/// With a capital letter, unless it begins with a word of a setting.
fn sentence(words: &str) -> String {
    let mut letters = words.chars();
    match letters.next() {
        Some(first) if !words.starts_with("off:") => first.to_uppercase().chain(letters).collect(),
        _ => words.to_owned(),
    }
}

fn see_also(page: &mut Roff, pages: &[(&str, &str)]) {
    control(page, "SH", "SEE ALSO");
    let mut words = Vec::new();
    for (index, (name, section)) in pages.iter().enumerate() {
        let comma = if index + 1 < pages.len() { ", " } else { "" };
        words.extend([bold(*name), roman(format!("({section}){comma}"))]);
    }
    page.text(words);
}

#[cfg(test)]
mod tests {
    use ept_virt_core::policy::{Config, Layer};

    use super::*;

    fn plain(page: &str) -> String {
        page.replace("\\-", "-")
            .replace("\\fB", "")
            .replace("\\fR", "")
            .replace("\\&", "")
            .replace("\\*(Aq", "'")
    }

    #[test]
    fn every_setting_is_there_with_its_default_and_meaning() {
        let (policy, configuration) = (plain(&placement()), plain(&configuration()));
        for setting in SETTINGS {
            let head = format!(".TP\n{} ({}", setting.path(), setting.kind);
            for page in [&policy, &configuration] {
                let (_, rest) = page.split_once(&head).unwrap_or_else(|| panic!("{head} in {page}"));
                let entry = rest.split(".TP").next().unwrap();
                assert!(entry.contains(&sentence(setting.help)), "{entry}");
                assert!(entry.contains(setting.default), "{entry}");
            }
        }
        for setting in &HOST_SETTINGS {
            assert!(configuration.contains(&format!(".TP\n{} (", setting.name)), "{}", setting.name);
        }
    }

    #[test]
    fn the_examples_are_valid() {
        let config = Config::parse(CONFIGURATION).unwrap();
        assert_eq!(config.profile_names().collect::<Vec<_>>(), ["gold"]);
        let domain = POLICY.replace("NAMESPACE", NAMESPACE).replace("...", "") + "</domain>";
        let layer = Layer::from_domain_xml(&domain).unwrap().unwrap();
        assert_eq!(layer.get("dram.min").unwrap().to_string(), "512 MiB");
    }
}
