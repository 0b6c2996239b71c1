// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt daemon`: observes what libvirt says is running, and places it.
//!
//! The main thread reconciles: at start, when the hook nudges, on libvirt's events,
//! and on a slow timer. Each observed domain has a thread; so have the socket,
//! signals, libvirt's events, its jobs, and the watchdog.

mod guest;
mod keep;
mod logging;
mod memory;
mod reconcile;
mod server;
mod service;
mod state;
mod worker;

use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
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
use reconcile::Reconciler;
use server::Server;
use state::{Phase, Shared};

/// After a nudge libvirt needs a moment: the hook runs before the domain has
/// wholly come or gone.
const SECOND_LOOK: Duration = Duration::from_secs(1);

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
    /// libvirt to follow, qemu:///session for a user's own domains; the option is
    /// that of all commands.
    #[arg(skip)]
    pub connect: String,
    /// The host's configuration; SIGHUP reads it again.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_CONFIG)]
    config_file: PathBuf,
    /// Where heat is kept over a restart of the daemon.
    #[arg(long, value_name = "PATH", env = "STATE_DIRECTORY", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Seconds between looks at libvirt when nothing nudges.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    reconcile_interval: u64,
}

/// What wakes the main thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something may have changed.
    Look,
    /// Read the configuration again.
    Reload,
    /// End.
    Stop,
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// Every guest runs on when it ends, however it ends: all state in the kernel
/// dies with the daemon's descriptors, and pages stay where they are.
pub fn run(args: DaemonArgs) -> Result<(), Failure> {
    logging::start();
    let config = Config::read(&args.config_file).map_err(|error| {
        Failure::unreachable(error.to_string()).hint("mend it; `ept-virt policy validate` checks it too")
    })?;
    let (sender, receiver) = mpsc::channel();
    let failed = |what: &'static str| move |error| Failure::refused(format!("cannot {what}: {error}"));
    // Before any other thread, so that all threads leave signals to one.
    watch_signals(sender.clone()).map_err(failed("watch for signals"))?;
    let shared = Arc::new(Shared::new(&args.connect));
    let server = Server::bind(&args.socket, config.group.as_deref())?;
    let look = || {
        let sender = sender.clone();
        move || {
            let _ = sender.send(Event::Look);
        }
    };
    domain::watch(&args.connect, look()).map_err(failed("start a thread"))?;
    let jobs = Jobs::watch(&args.connect, look()).map_err(failed("start a thread"))?;
    server.start(Arc::clone(&shared), sender).map_err(failed("start a thread"))?;
    service::watch(Arc::clone(&shared)).map_err(failed("start a thread"))?;
    // Clients are answered from here on; libvirt may be away for long.
    service::tell(&[NotifyState::Ready]);
    let keeper = keeper(&args.state_dir, STATE_LIMIT);
    let mut reconciler = Reconciler::new(&args.connect, Arc::clone(&shared), config, keeper);
    reconciler.ask(jobs);
    info!("ept-virt {} follows {}", env!("CARGO_PKG_VERSION"), args.connect);
    follow(&mut reconciler, &shared, &server, &receiver, &args);
    info!("stopping");
    service::tell(&[NotifyState::Stopping]);
    reconciler.stop();
    Ok(())
}

/// Who keeps heat, if that can be: guests are observed and placed without, too.
fn keeper(dir: &Path, limit: Duration) -> Option<Keeper> {
    let opened = {
        let dir = dir.to_owned();
        bounded::within(limit, move || Keeper::open(&dir))
    };
    let keeper = opened.unwrap_or_else(|| Err(io::Error::other("the disk does not answer")));
    let explain = |error: &io::Error| {
        let dir = dir.display();
        warn!("heat will not outlive this daemon: {dir}: {error}; name another place with --state-dir");
    };
    keeper.inspect_err(explain).ok()
}

/// Looks again and again until it is told to stop.
fn follow(
    reconciler: &mut Reconciler,
    shared: &Shared,
    server: &Server,
    events: &Receiver<Event>,
    args: &DaemonArgs,
) {
    let interval = Duration::from_secs(args.reconcile_interval);
    let mut second_look = None;
    loop {
        shared.enter(Phase::Works(Instant::now()));
        reconciler.reconcile();
        shared.enter(Phase::Waits);
        let timer = Instant::now() + interval;
        let wake = second_look.take().map_or(timer, |at: Instant| at.min(timer));
        match events.recv_timeout(wake.saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) | Ok(Event::Stop) => return,
            Ok(Event::Look) => second_look = Some(Instant::now() + SECOND_LOOK),
            Ok(Event::Reload) => reload(reconciler, server, &args.config_file),
        }
        // One look serves all that waited.
        while let Ok(event) = events.try_recv() {
            match event {
                Event::Stop => return,
                Event::Look => {}
                Event::Reload => reload(reconciler, server, &args.config_file),
            }
        }
    }
}

/// A configuration that can not be read changes nothing.
fn reload(reconciler: &mut Reconciler, server: &Server, path: &Path) {
    service::tell(&[NotifyState::Reloading]);
    match Config::read(path) {
        Ok(config) => {
            info!("read {}", path.display());
            if let Err(failure) = server.open_to(config.group.as_deref()) {
                error!("{failure}");
            }
            reconciler.configure(config);
        }
        Err(error) => error!("going on with the configuration as it was: {error}"),
    }
    service::tell(&[NotifyState::Ready]);
}

/// Blocks the signals in this and all later threads, and takes them in one.
fn watch_signals(events: Sender<Event>) -> io::Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            match signals.wait() {
                Ok(Signal::SIGHUP) => {
                    let _ = events.send(Event::Reload);
                }
                Ok(_) => break,
                Err(errno) => {
                    error!("cannot wait for signals: {errno}");
                    return;
                }
            }
        }
        let _ = events.send(Event::Stop);
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
