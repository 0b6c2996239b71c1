// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt daemon`: observes what libvirt says is running, and places it.
//!
//! The main thread reconciles: at start, when the hook nudges, on libvirt's events,
//! and on a slow timer. Each observed domain has a thread; so have the socket,
//! signals, libvirt's events, its jobs, and the watchdog.

mod budget;
mod claim;
mod files;
mod guest;
mod holds;
mod keep;
mod logging;
mod mailbox;
mod reconcile;
mod sampling;
mod server;
mod service;
mod slowdown;
mod state;
mod tap;
mod worker;

use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use ept_virt_core::domain::{self, Jobs};
use ept_virt_core::policy::{Config, DEFAULT_CONFIG};
use ept_virt_core::wire::DEFAULT_SOCKET;
use log::{error, info, warn};
use nix::sys::signal::{SigSet, Signal};
use sd_notify::NotifyState;

use crate::bounded;
use crate::failure::Failure;
use keep::{DEFAULT_STATE_DIR, Keeper};
use mailbox::{Event, Mail, Mailbox};
use reconcile::Reconciler;
use server::Server;
use state::{Phase, Shared};

pub use tap::header;

/// After a nudge libvirt needs a moment: the hook runs before the domain has
/// wholly come or gone.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// Least time between the starts of two looks, whoever asks for them.
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);

/// How long a clean stop may take.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// How long the disk with the kept heat may take to answer at first.
const STATE_LIMIT: Duration = Duration::from_secs(5);

/// Options of `ept-virt daemon`.
#[derive(Clone, Debug, Args)]
pub struct DaemonArgs {
    /// Where to listen.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// libvirt to follow; the option is that of all commands.
    #[arg(skip)]
    pub connect: String,
    /// The host's configuration; SIGHUP reads it again.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_CONFIG)]
    config_file: PathBuf,
    /// Where heat, and what is paused or stopped, is kept over a restart of the daemon.
    #[arg(long, value_name = "PATH", env = "STATE_DIRECTORY", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Seconds between looks at libvirt when nothing nudges.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    reconcile_interval: u64,
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// Every guest runs on when it ends, however it ends: all state in the kernel
/// dies with the daemon's descriptors, and pages stay where they are.
pub fn run(args: DaemonArgs) -> Result<(), Failure> {
    logging::start();
    let config = Config::read(&args.config_file).map_err(|error| {
        let path = args.config_file.display();
        Failure::unreachable(error.to_string())
            .hint(format!("mend it; `ept-virt policy validate {path}` checks it too"))
    })?;
    let mailbox = Mailbox::default();
    let failed = |what: &'static str| move |error| Failure::refused(format!("cannot {what}: {error}"));
    // Before any other thread, so that all threads leave signals to one.
    watch_signals(mailbox.clone()).map_err(failed("watch for signals"))?;
    let shared = Arc::new(Shared::new(&args.connect));
    let server = Server::bind(&args.socket)?;
    let problem = open(&server, &config);
    let look = || {
        let mailbox = mailbox.clone();
        move || mailbox.post(Event::Look)
    };
    domain::watch(&args.connect, look()).map_err(failed("start a thread"))?;
    let jobs = Jobs::watch(&args.connect, look()).map_err(failed("start a thread"))?;
    server.start(Arc::clone(&shared), mailbox.clone()).map_err(failed("start a thread"))?;
    service::watch(Arc::clone(&shared)).map_err(failed("start a thread"))?;
    // Clients are answered from here on; libvirt may be away for long.
    service::tell(&[NotifyState::Ready]);
    let keeper = keeper(&args.state_dir, STATE_LIMIT);
    let mut reconciler = Reconciler::new(&args.connect, Arc::clone(&shared), config, keeper);
    reconciler.ask(jobs);
    reconciler.misconfigured(problem);
    info!("ept-virt {} follows {}", env!("CARGO_PKG_VERSION"), args.connect);
    follow(&mut reconciler, &shared, &server, &mailbox, &args);
    info!("stopping");
    service::tell(&[NotifyState::Stopping]);
    reconciler.stop();
    Ok(())
}

/// Who keeps heat and holds, if that can be: guests are observed and placed without, too.
fn keeper(dir: &Path, limit: Duration) -> Option<Keeper> {
    let opened = {
        let dir = dir.to_owned();
        bounded::within(limit, move || Keeper::open(&dir))
    };
    let keeper = opened.unwrap_or_else(|| Err(io::Error::other("the disk does not answer")));
    let explain = |error: &io::Error| {
        let dir = dir.display();
        warn!(
            "heat, and what is paused or stopped, will not outlive this daemon: {dir}: {error}; name another \
             place with --state-dir"
        );
    };
    keeper.inspect_err(explain).ok()
}

/// Looks again and again until it is told to stop.
fn follow(
    reconciler: &mut Reconciler,
    shared: &Shared,
    server: &Server,
    mailbox: &Mailbox,
    args: &DaemonArgs,
) {
    let interval = Duration::from_secs(args.reconcile_interval);
    let mut second_look = None;
    loop {
        let begun = Instant::now();
        shared.enter(Phase::Works(begun));
        reconciler.reconcile();
        shared.enter(Phase::Waits);
        let timer = Instant::now() + interval;
        let wake = second_look.map_or(timer, |at: Instant| at.min(timer));
        let mail = mailbox.wait(begun + SHORTEST_PAUSE, wake);
        if mail.stop {
            return;
        }
        second_look = next_second_look(second_look, mail, Instant::now());
        if mail.reload {
            shared.enter(Phase::Works(Instant::now()));
            reload(reconciler, server, &args.config_file);
        }
    }
}

/// When to look once more after the look that comes now.
fn next_second_look(planned: Option<Instant>, mail: Mail, now: Instant) -> Option<Instant> {
    match mail.look {
        // Whatever woke us, somebody asked.
        true => Some(now + SECOND_LOOK),
        false => planned.filter(|at| *at > now),
    }
}

/// Lets the configured group ask, or says why it can not: guests matter more.
fn open(server: &Server, config: &Config) -> Option<String> {
    let problem = server.open_to(config.group.as_deref()).err()?.to_string();
    error!("{problem}");
    Some(problem)
}

/// A configuration that can not be read changes nothing.
fn reload(reconciler: &mut Reconciler, server: &Server, path: &Path) {
    service::tell(&[NotifyState::Reloading]);
    match Config::read(path) {
        Ok(config) => {
            info!("read {}", path.display());
            let problem = open(server, &config);
            reconciler.configure(config);
            reconciler.misconfigured(problem);
        }
        Err(error) => {
            error!("going on with the configuration as it was: {error}");
            let problem =
                format!("{error}; what was read before is in force, and no daemon starts with this");
            reconciler.misconfigured(Some(problem));
        }
    }
    service::tell(&[NotifyState::Ready]);
}

/// Blocks the signals in this and all later threads, and takes them in one.
fn watch_signals(mailbox: Mailbox) -> io::Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            match signals.wait() {
                Ok(Signal::SIGHUP) => mailbox.post(Event::Reload),
                Ok(_) => break,
                Err(errno) => {
                    error!("cannot wait for signals: {errno}");
                    return;
                }
            }
        }
        mailbox.post(Event::Stop);
        // libvirt may never return from a call, and the main thread with it.
        thread::sleep(STOP_LIMIT);
        error!("a clean stop takes longer than {} s: ending now", STOP_LIMIT.as_secs());
        process::exit(1);
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_a_look_gets_a_second_one() {
        let now = Instant::now();
        let (look, none) = (Mail { look: true, ..Mail::default() }, Mail::default());
        let reload = Mail { reload: true, ..Mail::default() };
        let second = Some(now + SECOND_LOOK);
        assert_eq!(next_second_look(None, look, now), second);
        assert_eq!(next_second_look(None, Mail { reload: true, ..look }, now), second);
        // The timer's look came at the time of the second one; a nudge came as well.
        assert_eq!(next_second_look(Some(now), look, now), second);
        assert_eq!(next_second_look(Some(now), none, now), None);
        // A look for another reason does not take its place.
        assert_eq!(next_second_look(second, reload, now), second);
    }

    /// Opening a FIFO for writing waits for a reader, as a disk may for ever.
    #[test]
    fn a_disk_that_hangs_does_not_keep_the_daemon_from_its_work() {
        let dir = std::env::temp_dir().join(format!("ept-virt-daemon-{}", process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        nix::unistd::mkfifo(&dir.join("lock"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(keeper(&dir, Duration::from_millis(20)).is_none());
        std::fs::remove_file(dir.join("lock")).unwrap();
        assert!(keeper(&dir, Duration::from_secs(60)).is_some());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
