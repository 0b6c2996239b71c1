// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt`: keeps the hot memory of KVM guests in DRAM and the cold memory in
//! NVM or CXL, under a policy in the domain's own libvirt XML.

mod attach;
mod client;
mod daemon;
mod failure;
#[cfg(test)]
mod golden;
mod list;
mod map;
mod memslots;
mod policy;
mod samples;
mod status;
mod strip;
mod style;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ept_virt_core::sampler::Sampler;
use ept_virt_core::wire::{self, DEFAULT_SOCKET};
use serde::Serialize;

use failure::Failure;
use style::{ColorChoice, Style};

/// Keep the hot memory of KVM guests in DRAM and the cold memory in NVM or CXL.
///
/// The policy stands in the <metadata> of each domain's XML; a domain without
/// one is observed and nothing of it is moved.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    /// The daemon's control socket.
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// When to use colour; `auto` honours NO_COLOR.
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t)]
    color: ColorChoice,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the daemon was asked and the request failed, as for a domain that does not run
  2  wrong usage, or the request could not be made: no daemon, no permission,
     no kernel module where the command itself needs it";

#[derive(Debug, Subcommand)]
enum Command {
    /// List the running domains with their heat and place.
    List(Output),
    /// Show what is known about all domains, or one, and about the daemon.
    Status {
        /// Name, id or UUID of one domain.
        domain: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Show the temperature and tier of all memory of a domain.
    Map {
        /// Name, id or UUID.
        domain: String,
        #[command(flatten)]
        output: Output,
    },
    /// Show single accesses of a domain as they happen: GPA, HVA, read, write or
    /// execute.
    Samples(samples::SamplesArgs),
    /// Show a domain's memory slots, as KVM knows them.
    Memslots {
        /// Name, id or UUID.
        domain: String,
        /// libvirt to talk to.
        #[arg(
            short,
            long,
            value_name = "URI",
            env = "LIBVIRT_DEFAULT_URI",
            default_value = "qemu:///system"
        )]
        connect: String,
        #[command(flatten)]
        output: Output,
    },
    /// Observe a domain again that was stopped.
    Start(Domain),
    /// Neither observe nor move a running domain, until `start` or until it ends.
    Stop(Domain),
    /// Go on observing a domain, but move nothing, until `resume` or until it ends.
    Pause(Domain),
    /// Move a domain's memory again that was paused.
    Resume(Domain),
    /// Show, change and check policies.
    Policy(policy::PolicyArgs),
    /// Observe the running domains and place their memory.
    Daemon(daemon::DaemonArgs),
}

/// Which domain.
#[derive(Clone, Debug, Args)]
struct Domain {
    /// Name, id or UUID.
    domain: String,
}

/// How the answer is printed.
#[derive(Clone, Copy, Debug, Args)]
struct Output {
    /// One line of JSON for programs.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // When even standard error is gone there is nobody left to tell.
            let _ = writeln!(io::stderr(), "ept-virt: {}", style::harmless(&failure.to_string()));
            failure.exit_code()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let style = Style::of_stdout(cli.color);
    match cli.command {
        Command::List(output) => {
            let status = client::status(&cli.socket, None)?;
            print(output, &list::entries(&status), || list::render(&status, &style))
        }
        Command::Status { domain: None, output } => {
            let status = client::status(&cli.socket, None)?;
            print(output, &status, || status::render(&status, &style))
        }
        Command::Status { domain: Some(name), output } => {
            let status = client::status(&cli.socket, Some(&name))?;
            print(output, &status, || status::render_domains(&status, &style))
        }
        Command::Map { domain, output } => {
            let map = client::map(&cli.socket, &domain)?;
            print(output, &map, || map::render(&map, &style))
        }
        Command::Samples(args) => samples::run(&args),
        Command::Memslots { domain, connect, output } => {
            let mut attached = attach::attach_named(&connect, &domain)?;
            let slots = attached.sampler.memslots().map_err(|error| Failure::refused(error.to_string()))?.1;
            let entries = memslots::entries(&slots);
            print(output, &entries, || memslots::render(&entries, &style))
        }
        Command::Start(Domain { domain }) => client::change(&cli.socket, wire::Command::Start { domain }),
        Command::Stop(Domain { domain }) => client::change(&cli.socket, wire::Command::Stop { domain }),
        Command::Pause(Domain { domain }) => client::change(&cli.socket, wire::Command::Pause { domain }),
        Command::Resume(Domain { domain }) => client::change(&cli.socket, wire::Command::Resume { domain }),
        Command::Policy(args) => policy::run(&args, &style),
        Command::Daemon(args) => daemon::run(args),
    }
}

/// Prints `value` as JSON or as text.
fn print<T: Serialize>(output: Output, value: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
    let text = match output.json {
        true => {
            serde_json::to_string(value)
                .map_err(|error| Failure::refused(format!("cannot write JSON: {error}")))?
                + "\n"
        }
        false => text(),
    };
    write_text(&text)
}

/// A reader that closes the pipe early, as `head` does, has what it wanted.
fn write_text(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::refused(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}
