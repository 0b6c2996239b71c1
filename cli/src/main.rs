// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt`: keeps the hot memory of KVM guests in DRAM and the cold memory in
//! NVM or CXL, under a policy in the domain's own libvirt XML.

mod attach;
mod bounded;
mod client;
mod complete;
mod daemon;
#[cfg(test)]
mod docs_tests;
mod doctor;
mod failure;
#[cfg(test)]
mod golden;
mod hook;
mod list;
mod man;
mod map;
mod memslots;
mod output;
mod policy;
mod record;
mod samples;
#[cfg(test)]
mod schema_tests;
#[cfg(test)]
mod scratch;
mod simulate;
mod status;
mod strip;
mod style;
mod version;
mod watch;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ept_virt_core::domain::DEFAULT_URI;
use ept_virt_core::sampler::Sampler;
use ept_virt_core::wire::{self, DEFAULT_SOCKET};

use failure::Failure;
use output::{Output, json_line, print};
use style::{ColorChoice, Style};
use watch::Place;

/// Keep the hot memory of KVM guests in DRAM and the cold memory in NVM or CXL.
///
/// The policy stands in the <metadata> of each domain's XML; a domain without
/// one is observed and nothing of it is moved.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    /// libvirt to talk to, for the commands that do; the variable LIBVIRT_DEFAULT_URI
    /// names it as well.
    #[arg(
        short,
        long,
        global = true,
        value_name = "URI",
        env = "LIBVIRT_DEFAULT_URI",
        hide_env = true,
        default_value = DEFAULT_URI,
        display_order = 900
    )]
    connect: String,
    /// The daemon's control socket.
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET, display_order = 901)]
    socket: PathBuf,
    /// When to use colour; `auto` honours NO_COLOR.
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t, display_order = 902)]
    color: ColorChoice,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  asked, and the answer is no: a request that failed, as for a domain that does
     not run; a check of `doctor` that failed; no hook, for `hook status`
  2  wrong usage, or the request could not be made: no daemon, no libvirt, no
     permission, no kernel module where the command itself needs it";

#[derive(Debug, Subcommand)]
enum Command {
    /// List the running domains with their heat and place.
    List(Output),
    /// Show what is known about all domains, or some, and about the daemon.
    Status(StatusArgs),
    /// Show the temperature and tier of all memory of a domain.
    Map {
        /// Name, id or UUID.
        #[arg(add = complete::running())]
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
        #[arg(add = complete::running())]
        domain: String,
        #[command(flatten)]
        output: Output,
    },
    /// Observe a domain again that was stopped.
    Start(Domain),
    /// Neither observe nor move a running domain, until `start` or until it ends, also
    /// over a restart of the daemon.
    Stop(Domain),
    /// Go on observing a domain, but move nothing, until `resume` or until it ends, also
    /// over a restart of the daemon.
    Pause(Domain),
    /// Move a domain's memory again that was paused.
    Resume(Domain),
    /// Show, change and check policies.
    Policy(policy::PolicyArgs),
    /// Record what a domain accesses, round by round, for `simulate`.
    Record(record::RecordArgs),
    /// Try a policy on guests that are made up or were recorded: hit ratio, moves,
    /// slowdown, money.
    Simulate(simulate::SimulateArgs),
    /// Look for what is wrong with this host, and say what mends it; exits with 1
    /// when guests can not be observed so.
    Doctor(Output),
    /// Install libvirt's hook, which tells the daemon of changes at once.
    Hook(hook::HookArgs),
    /// Show the versions of all parts that have to fit together.
    Version(Output),
    /// Print the script that completes commands, options and domains in a shell.
    Completion {
        /// The shell; each says where its script goes.
        shell: complete::Shell,
    },
    /// Write the manual pages, for packages.
    #[command(hide = true)]
    Man {
        /// The directory to write to.
        dir: PathBuf,
    },
    /// Observe the running domains and place their memory.
    Daemon(daemon::DaemonArgs),
}

/// Which domain.
#[derive(Clone, Debug, Args)]
struct Domain {
    /// Name, id or UUID.
    #[arg(add = complete::running())]
    domain: String,
}

/// `status`.
#[derive(Clone, Debug, Args)]
struct StatusArgs {
    /// Names, ids or UUIDs; without them all domains, and the daemon.
    #[arg(value_name = "DOMAIN", add = complete::running())]
    domains: Vec<String>,
    /// Show it again every so many seconds (2), until Ctrl-C; with --json a line
    /// each time.
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2",
        value_parser = watch::seconds
    )]
    watch: Option<Duration>,
    #[command(flatten)]
    output: Output,
}

fn main() -> ExitCode {
    complete::answer_shell();
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            // When even standard error is gone there is nobody left to tell.
            let _ = writeln!(io::stderr(), "ept-virt: {}", style::harmless(&failure.to_string()));
            failure.exit_code()
        }
    }
}

fn run(mut cli: Cli) -> Result<ExitCode, Failure> {
    // As virsh has it: an empty variable says nothing.
    if cli.connect.is_empty() {
        cli.connect = DEFAULT_URI.to_owned();
    }
    let style = Style::of_stdout(cli.color);
    let done = match cli.command {
        Command::List(output) => {
            let status = client::status(&cli.socket, &[])?;
            print(output, &list::entries(&status), || list::render(&status, &style))
        }
        Command::Status(args) => {
            let answer = || {
                let status = client::status(&cli.socket, &args.domains)?;
                // A terminal may change its size while it is watched.
                let style = Style::of_stdout(cli.color);
                match (args.output.json, args.domains.is_empty()) {
                    (true, _) => json_line(&status),
                    (false, true) => Ok(status::render(&status, &style)),
                    (false, false) => Ok(status::render_domains(&status, &style)),
                }
            };
            match args.watch {
                Some(every) => watch::watch(every, Place::of_stdout(args.output.json), answer),
                None => output::write_text(&answer()?),
            }
        }
        Command::Map { domain, output } => {
            let map = client::map(&cli.socket, &domain)?;
            print(output, &map, || map::render(&map, &style))
        }
        Command::Samples(args) => samples::run(&args, &cli.connect),
        Command::Memslots { domain, output } => {
            let mut attached = attach::attach_named(&cli.connect, &domain)?;
            let slots = attached.sampler.memslots().map_err(|error| Failure::refused(error.to_string()))?.1;
            let entries = memslots::entries(&slots);
            print(output, &entries, || memslots::render(&entries, &style))
        }
        Command::Start(Domain { domain }) => client::change(&cli.socket, wire::Command::Start { domain }),
        Command::Stop(Domain { domain }) => client::change(&cli.socket, wire::Command::Stop { domain }),
        Command::Pause(Domain { domain }) => client::change(&cli.socket, wire::Command::Pause { domain }),
        Command::Resume(Domain { domain }) => client::change(&cli.socket, wire::Command::Resume { domain }),
        Command::Policy(args) => policy::run(&args, &cli.connect, &style),
        Command::Record(args) => record::run(&args, &cli.connect, &cli.socket),
        Command::Simulate(args) => simulate::run(&args, &style),
        Command::Doctor(output) => return doctor::run(&cli.connect, &cli.socket, output, &style),
        Command::Version(output) => {
            let parts = version::Parts::ask(&cli.connect, &cli.socket);
            print(output, &parts, || version::render(&parts, &style))
        }
        Command::Completion { shell } => complete::script(shell),
        Command::Man { dir } => man::write(&dir),
        Command::Hook(args) => return hook::run(&args, &style),
        Command::Daemon(mut args) => {
            args.connect = cli.connect;
            daemon::run(args)
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}
