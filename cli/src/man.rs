// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt man DIR`, for packages: manual pages from what `--help` is made of, and
//! those of policy and configuration from the table of settings.

mod policy;

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::failure::Failure;
use crate::{Cli, EXIT_CODES, output};

/// A page: the name of its file, and its text.
type Page = (String, Vec<u8>);

/// When what the pages tell was last changed. Not when they were made, by which two of
/// one version would differ.
const DATE: &str = "2026-11-27";

/// What else there is to read.
const SEE_ALSO: &str = ".SH SEE ALSO\n\\fBept\\-virt\\fR(1), \\fBkvm_ept_sample\\fR(4), \
                        \\fBept\\-virt.toml\\fR(5), \\fBept\\-virt\\-placement\\fR(7), \\fBvirsh\\fR(1)\n\
                        .PP\nOPERATING, POLICIES, KERNELS and SECURITY in \\fI/usr/share/doc/ept\\-virt\\fR\n";

/// What else is on a host, in the page of the program itself.
const FILES: &[(&str, &str)] = &[
    ("/etc/ept-virt/ept-virt.toml", "The host's configuration."),
    ("/run/ept-virt/ept-virt.sock", "The daemon's socket."),
    ("/var/lib/ept-virt", "Heat, and what is paused or stopped, over a restart of the daemon."),
    ("/etc/libvirt/hooks/qemu.d/ept-virt", "The hook that libvirt calls."),
    (
        "/usr/share/doc/ept-virt",
        "The documents, packed by gzip where they are long. OPERATING.md has every warning with its mend, \
         and what happens when a part ends; POLICIES.md has policies as they are in use; KERNELS.md says \
         what was tried on which kernel, and who tells what; SECURITY.md who may do what. Messages that \
         name docs/KERNELS.md mean the one there.",
    ),
];

/// Writes a page for each command that people use, and those of policy and
/// configuration, into `dir`.
pub fn write(dir: &Path) -> Result<(), Failure> {
    let cannot = |what: &str, error: std::io::Error| {
        Failure::unreachable(format!("cannot {what} {}: {error}", dir.display()))
    };
    fs::create_dir_all(dir).map_err(|error| cannot("make the directory", error))?;
    let pages = pages().map_err(|error| cannot("render the pages for", error))?;
    for (name, text) in &pages {
        fs::write(dir.join(name), text).map_err(|error| cannot("write into", error))?;
    }
    output::write_text(&format!("{} pages written to {}\n", pages.len(), dir.display()))
}

/// ept-virt(1), ept-virt-status(1), ept-virt-policy-set(1)... ept-virt.toml(5),
/// ept-virt-placement(7).
fn pages() -> Result<Vec<Page>, std::io::Error> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let mut pages = Vec::new();
    add(&root, "ept-virt", &mut pages)?;
    pages.push(("ept-virt.toml.5".into(), policy::configuration().into_bytes()));
    pages.push(("ept-virt-placement.7".into(), policy::placement().into_bytes()));
    Ok(pages)
}

fn add(command: &Command, name: &str, pages: &mut Vec<Page>) -> Result<(), std::io::Error> {
    let mut text = Vec::new();
    let page = Man::new(command.clone())
        .title(name.to_uppercase())
        .date(DATE)
        .source(format!("ept-virt {}", env!("CARGO_PKG_VERSION")))
        .manual("ept-virt");
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    text.extend_from_slice(exit_status().as_bytes());
    if name == "ept-virt" {
        text.extend_from_slice(files().as_bytes());
    }
    text.extend_from_slice(SEE_ALSO.as_bytes());
    pages.push((format!("{name}.1"), text));
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        add(below, &format!("{name}-{}", below.get_name()), pages)?;
    }
    Ok(())
}

/// What `--help` says about exit codes, as a section.
fn exit_status() -> String {
    let mut section = String::from(".SH EXIT STATUS\n");
    for line in EXIT_CODES.lines().skip(1) {
        section += &match line.trim().split_once("  ") {
            Some((code, meaning)) => format!(".TP\n{code}\n{meaning}\n"),
            None => format!("{}\n", line.trim()),
        };
    }
    section
}

/// Where on a host things are, as a section.
fn files() -> String {
    let escaped = |text: &str| text.replace('-', "\\-");
    let entries =
        FILES.iter().map(|(path, what)| format!(".TP\n\\fI{}\\fR\n{}\n", escaped(path), escaped(what)));
    entries.fold(".SH FILES\n".to_owned(), |section, entry| section + &entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text of each page without roff's escapes.
    fn plain() -> Vec<(String, String)> {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace("\\-", "-").replace("\\fB", "");
        pages().unwrap().into_iter().map(|(name, bytes)| (name, text(bytes))).collect()
    }

    fn check(command: &Command, name: &str, pages: &[(String, String)]) {
        let (_, text) = pages.iter().find(|(page, _)| *page == format!("{name}.1")).unwrap();
        for section in [".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION", ".SH OPTIONS"] {
            assert!(text.contains(section), "{name} has no {section}");
        }
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            let word = match argument.get_long() {
                Some(long) => format!("--{long}"),
                None => argument.get_value_names().unwrap()[0].to_string(),
            };
            assert!(text.contains(&word), "{name} does not mention {word}");
        }
        for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
            check(below, &format!("{name}-{}", below.get_name()), pages);
        }
    }

    #[test]
    fn every_command_has_a_page_with_every_option() {
        let pages = plain();
        let mut root = Cli::command().disable_help_subcommand(true);
        root.build();
        check(&root, "ept-virt", &pages);
        for name in ["ept-virt.1", "ept-virt-status.1", "ept-virt-policy-set.1", "ept-virt-hook-install.1"] {
            assert!(pages.iter().any(|(page, _)| page == name), "{name}");
        }
        // What only packages use has none.
        assert!(pages.iter().all(|(page, _)| page != "ept-virt-man.1"));
        let (_, main) = &pages[0];
        assert!(main.contains(".SH EXIT STATUS\n.TP\n0\ndone\n.TP\n1\n"), "{main}");
        let has_files = |page: &&(String, String)| page.1.contains(".SH FILES");
        assert_eq!(pages.iter().filter(has_files).count(), 1);
        assert!(main.contains("/usr/share/doc/ept-virt"), "{main}");
    }

    /// Whoever has the packages alone finds there what the pages and messages name.
    #[test]
    fn packages_have_the_documents() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for list in ["debian/ept-virt.docs", "rpm/ept-virt.spec"] {
            let list = fs::read_to_string(root.join(list)).unwrap();
            for document in ["docs/OPERATING.md", "docs/POLICIES.md", "docs/KERNELS.md", "SECURITY.md"] {
                assert!(root.join(document).exists() && list.contains(document), "{document}");
            }
        }
    }

    /// What mandoc finds wrong with them; pages are also those that are not made here.
    #[test]
    fn pages_are_well_formed() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut pages = pages().unwrap();
        pages.push(("kvm_ept_sample.4".into(), fs::read(root.join("docs/kvm_ept_sample.4")).unwrap()));
        let dir = std::env::temp_dir().join(format!("ept-virt-man-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in &pages {
            fs::write(dir.join(name), text).unwrap();
        }
        let lint = std::process::Command::new("mandoc")
            .args(["-T", "lint", "-W", "warning"])
            .args(pages.iter().map(|(name, _)| dir.join(name)))
            .output();
        fs::remove_dir_all(&dir).unwrap();
        match lint {
            Err(_) => println!("SKIP pages_are_well_formed: no mandoc; install it"),
            Ok(lint) => {
                let found = String::from_utf8_lossy(&lint.stdout);
                // clap_mangen breaks lines at ends of paragraphs, which does no harm.
                let bad: Vec<_> =
                    found.lines().filter(|line| !line.contains("skipping paragraph macro: br")).collect();
                assert!(bad.is_empty(), "{bad:#?}");
            }
        }
    }

    #[test]
    fn pages_do_not_depend_on_who_makes_them() {
        for (name, text) in plain() {
            assert!(!text.contains("LIBVIRT_DEFAULT_URI="), "{name}");
        }
    }
}
