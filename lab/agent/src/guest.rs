// SPDX-License-Identifier: MIT OR Apache-2.0
//! Process 1 of a test guest: a workload whose truth is known.
//!
//! Two blocks of memory: HOT, rewritten in a loop, and IDLE, written once. Both
//! hold a pattern that can be verified, and each pass over the hot block checks
//! that the last one's writes are there. Sizes come from the kernel command line
//! (`HOT_MIB=32 IDLE_MIB=64 PAUSE_MS=20`), which the kernel puts into our
//! environment. The guest says on its serial console which guest frames the
//! blocks lie in, and obeys one-line commands there:
//!
//! | command        | answer                                               |
//! |----------------|------------------------------------------------------|
//! | `frames`       | `frames BLOCK GFN PAGES` (hex) per run, then `frames end` |
//! | `check`        | `check BLOCK ok` or `check BLOCK bad PAGES`, and `check running ok` or `check running bad TIMES` for what passes found; then `check end` |
//! | `passes`       | `passes N`: passes over the hot block so far         |
//! | `heat on|off`  | `heat on|off`: whether the hot block is rewritten    |
//! | `touch-idle N` | `touch-idle N`: the first N MiB of IDLE are read in each pass |
//! | `patrol N`     | `patrol N`: N pages of IDLE are verified in each pass, in turn |
//! | `twins N`      | `twins N`: a block of N MiB of equal pages is made   |
//! | `part-twins N` | `part-twins N`: the first N MiB of it are written to, each page with another value |
//! | `scratch N`    | `scratch N`: N MiB are taken, written and given back |
//! | `scratch free` | `scratch free`: the same with all that is free, but for a little |
//! | `cpus N`       | `cpus N`: processors up to N are brought up; each new one rewrites a block of its own, and did so once |
//! | `insmod NAME`  | `insmod NAME`: the kernel module /NAME.ko is loaded  |
//! | `poweroff`     | `poweroff`, then the guest ends                      |
//!
//! With `WORKLOAD=` on the kernel command line it is the guest of the bench of
//! placement instead: see `guest/placement.rs`.

mod block;
mod choose;
pub mod layout;
mod placement;

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, stdin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use nix::unistd::Pid;

use block::{Block, Content, PAGE_BYTES};
pub use choose::hot_block;

/// What `scratch free` leaves to the guest's kernel.
const KEPT_BYTES: usize = 8 << 20;

/// What each additional processor rewrites.
const CPU_BLOCK_BYTES: usize = 256 << 10;

/// Between its passes: all processors share one real one, which is emulated.
const CPU_PAUSE: Duration = Duration::from_millis(200);

/// For a processor to appear, and to run. They are emulated twice over, and take
/// turns on one real processor.
const CPU_TIMEOUT: Duration = Duration::from_secs(60);

/// What commands change while the loops run, and what these find.
struct Controls {
    heat: AtomicBool,
    idle_pages: AtomicUsize,
    patrol_pages: AtomicUsize,
    passes: AtomicU64,
    /// Pages that did not hold what an earlier pass wrote.
    wrong: AtomicUsize,
}

static CONTROLS: Controls = Controls {
    heat: AtomicBool::new(true),
    idle_pages: AtomicUsize::new(0),
    patrol_pages: AtomicUsize::new(0),
    passes: AtomicU64::new(0),
    wrong: AtomicUsize::new(0),
};

/// What commands work on.
struct Workload {
    hot: Block,
    idle: Block,
    /// Made by commands.
    more: Vec<Block>,
    cpus: usize,
}

/// Runs the guest; returns only when something failed.
pub fn run() -> Result<()> {
    let outcome = run_workload();
    if let Err(error) = &outcome {
        println!("EPT-GUEST failed: {error:#}");
        // The kernel panics when we end, and drops what the console still holds.
        thread::sleep(Duration::from_secs(1));
    }
    outcome
}

fn run_workload() -> Result<()> {
    mount_fs("proc", "/proc")?;
    mount_fs("sysfs", "/sys")?;
    quiet_console();
    // The kernel turns huge pages off in machines below 512 MiB.
    std::fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "madvise")
        .context("turning huge pages on")?;
    if let Some(name) = placement::wanted() {
        return placement::run(&name);
    }
    let mut workload = Workload {
        hot: Block::new("hot", bytes(number_from_env("HOT_MIB", 32)?)?, Content::Distinct)?,
        idle: Block::new("idle", bytes(number_from_env("IDLE_MIB", 64)?)?, Content::Distinct)?,
        more: Vec::new(),
        cpus: 1,
    };
    workload.print_frames()?;
    let Workload { hot, idle, .. } = workload;
    let pause = Duration::from_millis(number_from_env("PAUSE_MS", 20)?);
    thread::spawn(move || heat(hot, idle, pause));
    println!("EPT-GUEST ready");
    for line in stdin().lock().lines() {
        workload.obey(line.context("reading a command")?.trim())?;
    }
    // The console has no other end: the workload goes on without commands.
    loop {
        thread::park();
    }
}

impl Workload {
    fn obey(&mut self, command: &str) -> Result<()> {
        let words: Vec<&str> = command.split_whitespace().collect();
        match words.as_slice() {
            [] => return Ok(()),
            ["frames"] => return self.print_frames(),
            ["check"] => {
                self.check();
                return Ok(());
            }
            ["passes"] => {
                println!("EPT-GUEST passes {}", CONTROLS.passes.load(Ordering::Relaxed));
                return Ok(());
            }
            ["heat", state @ ("on" | "off")] => CONTROLS.heat.store(*state == "on", Ordering::Relaxed),
            ["touch-idle", mib] => {
                let pages = bytes(number(mib)?)? / PAGE_BYTES;
                CONTROLS.idle_pages.store(pages.min(self.idle.len()), Ordering::Relaxed);
            }
            ["patrol", pages] => {
                CONTROLS.patrol_pages.store(usize::try_from(number(pages)?)?, Ordering::Relaxed);
            }
            ["twins", mib] => self.more.push(Block::new("twins", bytes(number(mib)?)?, Content::Twins)?),
            ["part-twins", mib] => self.part_twins(bytes(number(mib)?)? / PAGE_BYTES)?,
            ["scratch", "free"] => scratch(free_bytes()?.saturating_sub(KEPT_BYTES)),
            ["scratch", mib] => scratch(bytes(number(mib)?)?),
            ["cpus", count] => self.bring_up(usize::try_from(number(count)?)?)?,
            ["insmod", name] => insert_module(name)?,
            ["poweroff"] => {
                println!("EPT-GUEST poweroff");
                // Without ACPI only a reset ends the machine; libvirt's
                // on_reboot=destroy makes an end of it.
                reboot(RebootMode::RB_AUTOBOOT)?;
            }
            _ => bail!("unknown command: {command}"),
        }
        println!("EPT-GUEST {command}");
        Ok(())
    }

    fn check(&self) {
        let verdict = |what: &str, bad: usize| match bad {
            0 => println!("EPT-GUEST check {what} ok"),
            bad => println!("EPT-GUEST check {what} bad {bad}"),
        };
        for block in [&self.hot, &self.idle].into_iter().chain(&self.more) {
            verdict(block.name, block.bad_pages());
        }
        verdict("running", CONTROLS.wrong.load(Ordering::Relaxed));
        println!("EPT-GUEST check end");
    }

    /// Gives each of the first pages of the twins a counter of its own, and
    /// checks that all other counters are as they were.
    fn part_twins(&self, pages: usize) -> Result<()> {
        let twins = self.more.iter().find(|block| block.name == "twins").context("there are no twins")?;
        let wrong = twins.number_pages(pages);
        CONTROLS.wrong.fetch_add(wrong, Ordering::Relaxed);
        Ok(())
    }

    fn bring_up(&mut self, count: usize) -> Result<()> {
        for cpu in self.cpus..count {
            switch_on(cpu)?;
            let block = Block::new("cpu", CPU_BLOCK_BYTES, Content::Distinct)?;
            self.more.push(block);
            let (first_pass, done) = mpsc::channel();
            thread::spawn(move || {
                let outcome = heat_on(cpu, block);
                let go_on = outcome.is_ok();
                // Whoever waited too long is gone.
                let _ = first_pass.send(outcome);
                if go_on {
                    heat_block(block);
                }
            });
            done.recv_timeout(CPU_TIMEOUT).with_context(|| format!("processor {cpu} does not run"))??;
            self.cpus = cpu + 1;
        }
        Ok(())
    }

    fn print_frames(&self) -> Result<()> {
        for block in [&self.hot, &self.idle] {
            for (frame, pages) in block.runs()? {
                println!("EPT-GUEST frames {} {frame:x} {pages:x}", block.name);
            }
        }
        println!("EPT-GUEST frames end");
        Ok(())
    }
}

fn heat(hot: Block, idle: Block, pause: Duration) {
    let mut patrol_at = 0;
    loop {
        if CONTROLS.heat.load(Ordering::Relaxed) {
            let before = CONTROLS.passes.load(Ordering::Relaxed);
            count_pass(&hot, before);
            CONTROLS.passes.store(before + 1, Ordering::Relaxed);
        }
        idle.touch(CONTROLS.idle_pages.load(Ordering::Relaxed));
        let patrol = CONTROLS.patrol_pages.load(Ordering::Relaxed);
        CONTROLS.wrong.fetch_add(idle.bad_pages_in(patrol_at, patrol), Ordering::Relaxed);
        patrol_at = if patrol_at + patrol >= idle.len() { 0 } else { patrol_at + patrol };
        thread::sleep(pause);
    }
}

/// Brings up a processor, which the firmware may tell the kernel of only now.
fn switch_on(cpu: usize) -> Result<()> {
    let switch = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    let mut state = std::fs::read_to_string(&switch);
    for _ in 0..CPU_TIMEOUT.as_secs() * 10 {
        if state.is_ok() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
        state = std::fs::read_to_string(&switch);
    }
    // One that was there at boot is up already.
    if state.with_context(|| format!("reading {switch}"))?.trim() == "0" {
        std::fs::write(&switch, "1").with_context(|| format!("bringing up processor {cpu}"))?;
    }
    Ok(())
}

/// Binds this thread to a processor and makes the first pass over `block`.
fn heat_on(cpu: usize, block: Block) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).context("naming a processor")?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("running on processor {cpu}"))?;
    count_pass(&block, 0);
    Ok(())
}

/// Passes over a block, from the second on.
fn heat_block(block: Block) {
    for before in 1.. {
        count_pass(&block, before);
        thread::sleep(CPU_PAUSE);
    }
}

/// A pass over a block: the one `before` must have left its number in each page.
fn count_pass(block: &Block, before: u64) {
    let wrong = block.count_pass(before, before + 1);
    CONTROLS.wrong.fetch_add(wrong, Ordering::Relaxed);
}

/// Takes memory, writes to each page and gives it back.
fn scratch(bytes: usize) {
    let mut memory = vec![0_u8; bytes];
    for page in memory.chunks_mut(PAGE_BYTES) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
}

/// What is free in the guest, but for what its kernel keeps for itself.
fn free_bytes() -> Result<usize> {
    let path = "/proc/meminfo";
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    let kib = number(line.trim().trim_end_matches(" kB"))?;
    Ok(usize::try_from(kib << 10)?)
}

fn insert_module(name: &str) -> Result<()> {
    let path = format!("/{name}.ko");
    let file = File::open(&path).with_context(|| format!("opening {path}"))?;
    finit_module(&file, c"", ModuleInitFlags::empty()).with_context(|| format!("loading {path}"))
}

/// Commands are not echoed, so that the log holds only what the guest says.
fn quiet_console() {
    // A console that is no terminal has no echo.
    if let Ok(mut termios) = tcgetattr(stdin()) {
        termios.local_flags.remove(LocalFlags::ECHO);
        let _ = tcsetattr(stdin(), SetArg::TCSANOW, &termios);
    }
}

fn mount_fs(kind: &str, target: &str) -> Result<()> {
    let path = CString::new(target)?;
    // The initramfs holds this program only.
    let _ = nix::unistd::mkdir(path.as_c_str(), nix::sys::stat::Mode::S_IRWXU);
    mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mounting {kind} on {target}"))
}

fn bytes(mib: u64) -> Result<usize> {
    Ok(usize::try_from(mib << 20)?)
}

fn number(text: &str) -> Result<u64> {
    text.parse().with_context(|| format!("{text} is no number"))
}

fn number_from_env(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => number(&text).with_context(|| format!("{name} on the kernel command line")),
        Err(_) => Ok(default),
    }
}
