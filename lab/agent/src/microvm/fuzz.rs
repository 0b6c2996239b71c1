// SPDX-License-Identifier: MIT OR Apache-2.0
//! A fuzzer of the module: several threads call what they like on several
//! sessions of several VMs, which run, are disturbed, die and are born, and each
//! answer must be one that the model allows.
//!
//! `ept.fuzz_seed`, `ept.fuzz_steps` and `ept.fuzz_seconds` on the kernel command
//! line choose the steps, how many each thread does, and when to end at the
//! latest. The same seed gives each thread the same steps; how the threads' steps
//! fall together is up to the host.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ept_virt_core::uapi;

use super::Outcome;
use super::arguments::{self, module_references};
use super::fuzz_player::{Player, Waiting};
use super::fuzz_world::{SHARED_FILES, World};
use super::settings::number;
use crate::kernel_log::{KernelLog, scan_for_leaks};

const THREADS: u64 = 3;
/// Steps of each thread between two looks at all there is.
const EPOCH: u64 = 100;
const SEED: u64 = 1;
const STEPS: u64 = 1_000_000;
const SECONDS: u64 = 60;
/// A read that nothing ends is interrupted after this long.
const WAIT: Duration = Duration::from_millis(20);

pub fn run() -> Result<Outcome> {
    let seed = number("fuzz_seed")?.unwrap_or(SEED);
    let steps = number("fuzz_steps")?.unwrap_or(STEPS);
    let limit = Duration::from_secs(number("fuzz_seconds")?.unwrap_or(SECONDS));
    interrupt_by_signal()?;
    let before = module_references()?;
    let world = World::new()?;
    let mut players = (1..=THREADS).map(|number| Player::new(seed, number)).collect::<Result<Vec<_>>>()?;
    let (start, mut done, mut log) = (Instant::now(), 0, KernelLog::from_now()?);
    while done < steps && start.elapsed() < limit {
        let more = EPOCH.min(steps - done);
        epoch(&world, &mut players, more)
            .and_then(|()| look(&world, &players, before))
            .and_then(|()| log.judge())
            .with_context(|| history(seed, done + more, &players))?;
        done += more;
    }
    players.iter_mut().for_each(Player::end);
    let killed = world.killed.load(Ordering::SeqCst);
    drop(world);
    let after = module_references()?;
    ensure!(after == before, "the module's references went from {before} to {after}");
    let sessions = uapi::get_info(&arguments::open()?)?.sessions;
    ensure!(sessions == 0, "{sessions} sessions are attached after all were closed");
    super::leaks::no_worker_is_left()?;
    scan_for_leaks()?;
    let seconds = start.elapsed().as_secs();
    Ok(Outcome::Pass(format!(
        "seed {seed}: {done} steps of each of {THREADS} threads in {seconds} s, {killed} VMs killed; {}",
        summary(&players)
    )))
}

/// All threads do their next steps.
fn epoch(world: &World, players: &mut [Player], steps: u64) -> Result<()> {
    let waiting: Vec<Arc<Waiting>> = players.iter().map(|player| player.waiting.clone()).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| interrupt_waiting(&waiting, &stop));
        let threads: Vec<_> = players
            .iter_mut()
            .enumerate()
            .map(|(number, player)| {
                scope.spawn(move || {
                    player.play(world, steps).with_context(|| format!("thread {}", number + 1))
                })
            })
            .collect();
        let mut result = Ok(());
        for thread in threads {
            let ended = thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")));
            result = result.and(ended);
        }
        stop.store(true, Ordering::SeqCst);
        result
    })
}

/// While nothing happens: everything adds up.
fn look(world: &World, players: &[Player], before: i64) -> Result<()> {
    // Who is attached to the shared session nobody knows.
    world.renew_shared()?;
    let files: usize = SHARED_FILES + players.iter().map(Player::files).sum::<usize>();
    let references = module_references()?;
    ensure!(references == before + files as i64, "{references} references, {files} files are open");
    let attached: usize = players.iter().map(Player::attached).sum();
    let sessions = uapi::get_info(&arguments::open()?)?.sessions;
    ensure!(sessions as usize == attached, "GET_INFO counts {sessions} sessions, {attached} are attached");
    world.check()
}

/// A signal whose handler does nothing but end a system call that waits.
fn interrupt_by_signal() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = nix::sys::signal::SigAction::new(
        nix::sys::signal::SigHandler::Handler(nothing),
        nix::sys::signal::SaFlags::empty(),
        nix::sys::signal::SigSet::empty(),
    );
    // SAFETY: the handler touches nothing.
    unsafe { nix::sys::signal::sigaction(nix::sys::signal::SIGUSR1, &action) }.context("sigaction")?;
    Ok(())
}

fn interrupt_waiting(threads: &[Arc<Waiting>], stop: &AtomicBool) {
    let mut last = vec![0; threads.len()];
    while !stop.load(Ordering::SeqCst) {
        std::thread::sleep(WAIT);
        for (thread, last) in threads.iter().zip(&mut last) {
            let count = thread.count.load(Ordering::SeqCst);
            if count & 1 == 1 && count == *last {
                thread.signals.fetch_add(1, Ordering::SeqCst);
                let number = thread.thread.load(Ordering::SeqCst);
                // SAFETY: a signal to a thread of this process; one that has
                // ended is not there, and no other can have its number yet.
                unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), number, libc::SIGUSR1) };
            }
            *last = count;
        }
    }
}

/// How to get here again, and what each thread did last.
fn history(seed: u64, steps: u64, players: &[Player]) -> String {
    let mut text = format!("again with ept.fuzz_seed={seed} ept.fuzz_steps={steps}; the last steps:");
    for (number, player) in players.iter().enumerate() {
        for step in &player.last_steps {
            text += &format!("\n  thread {}: {step}", number + 1);
        }
    }
    text
}

/// How often each call ended with each errno.
fn summary(players: &[Player]) -> String {
    let mut all: BTreeMap<&str, BTreeMap<i32, u64>> = BTreeMap::new();
    for ((call, errno), count) in players.iter().flat_map(|player| &player.seen) {
        *all.entry(call).or_default().entry(*errno).or_default() += count;
    }
    let call = |(name, errnos): (&&str, &BTreeMap<i32, u64>)| {
        let errnos = errnos.iter().map(|(errno, count)| format!("{errno}: {count}"));
        format!("{name} {{{}}}", errnos.collect::<Vec<_>>().join(", "))
    };
    all.iter().map(call).collect::<Vec<_>>().join(" ")
}
