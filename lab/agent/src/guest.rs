// SPDX-License-Identifier: MIT OR Apache-2.0
//! Process 1 of a test guest: a workload whose truth is known.
//!
//! Two blocks of memory: HOT, rewritten in a loop, and IDLE, written once. Both
//! hold a pattern that can be verified. Sizes come from the kernel command line
//! (`HOT_MIB=32 IDLE_MIB=64 PAUSE_MS=20`), which the kernel puts into our
//! environment. The guest says on its serial console which guest frames the
//! blocks lie in, and obeys one-word commands there:
//!
//! | command        | answer                                               |
//! |----------------|------------------------------------------------------|
//! | `frames`       | `frames BLOCK GFN PAGES` (hex) per run, then `frames end` |
//! | `check`        | `check BLOCK ok` or `check BLOCK bad PAGES`, then `check end` |
//! | `passes`       | `passes N`: passes over the hot block so far         |
//! | `heat on|off`  | `heat on|off`: whether the hot block is rewritten    |
//! | `touch-idle N` | `touch-idle N`: the first N MiB of IDLE are read in each pass |
//! | `poweroff`     | `poweroff`, then the guest ends                      |

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, stdin};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

const PAGE_BYTES: usize = 4096;
const HUGE_BYTES: usize = 2 << 20;
const WORDS_PER_PAGE: usize = PAGE_BYTES / 8;

/// One word of each cache line holds the pattern: the guest is emulated twice
/// over, and all words would take it minutes to verify.
const PATTERN_STRIDE: usize = 8;

/// The word of each hot page that the loop rewrites; not one of the pattern.
const COUNTER_WORD: usize = 1;

/// Pagemap entries: bit 63 is "present", bits 0 to 54 the frame (Linux,
/// Documentation/admin-guide/mm/pagemap.rst).
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_FRAME: u64 = (1 << 55) - 1;

/// Memory that is never freed, shared with the thread that heats it.
#[derive(Clone, Copy)]
struct Block {
    name: &'static str,
    words: &'static [AtomicU64],
}

/// What commands change while the loop runs.
struct Controls {
    heat: AtomicBool,
    idle_pages: AtomicU64,
    passes: AtomicU64,
}

static CONTROLS: Controls =
    Controls { heat: AtomicBool::new(true), idle_pages: AtomicU64::new(0), passes: AtomicU64::new(0) };

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
    let hot = Block::new("hot", mib_from_env("HOT_MIB", 32)?)?;
    let idle = Block::new("idle", mib_from_env("IDLE_MIB", 64)?)?;
    let pause = Duration::from_millis(number_from_env("PAUSE_MS", 20)?);
    print_frames(&[hot, idle])?;
    thread::spawn(move || heat(hot, idle, pause));
    println!("EPT-GUEST ready");
    for line in stdin().lock().lines() {
        obey(line.context("reading a command")?.trim(), hot, idle)?;
    }
    // The console has no other end: the workload goes on without commands.
    loop {
        thread::park();
    }
}

fn obey(command: &str, hot: Block, idle: Block) -> Result<()> {
    let words: Vec<&str> = command.split_whitespace().collect();
    match words.as_slice() {
        [] => {}
        ["frames"] => print_frames(&[hot, idle])?,
        ["check"] => {
            for block in [hot, idle] {
                match block.bad_pages() {
                    0 => println!("EPT-GUEST check {} ok", block.name),
                    bad => println!("EPT-GUEST check {} bad {bad}", block.name),
                }
            }
            println!("EPT-GUEST check end");
        }
        ["passes"] => println!("EPT-GUEST passes {}", CONTROLS.passes.load(Ordering::Relaxed)),
        ["heat", state @ ("on" | "off")] => {
            CONTROLS.heat.store(*state == "on", Ordering::Relaxed);
            println!("EPT-GUEST heat {state}");
        }
        ["touch-idle", mib] => {
            let mib: u64 = mib.parse().context("touch-idle takes a number of MiB")?;
            let pages = (mib << 20) / PAGE_BYTES as u64;
            let pages = pages.min((idle.words.len() / WORDS_PER_PAGE) as u64);
            CONTROLS.idle_pages.store(pages, Ordering::Relaxed);
            println!("EPT-GUEST touch-idle {mib}");
        }
        ["poweroff"] => {
            println!("EPT-GUEST poweroff");
            // Without ACPI only a reset ends the machine; libvirt's
            // on_reboot=destroy makes an end of it.
            reboot(RebootMode::RB_AUTOBOOT)?;
        }
        _ => println!("EPT-GUEST unknown command: {command}"),
    }
    Ok(())
}

fn heat(hot: Block, idle: Block, pause: Duration) {
    loop {
        if CONTROLS.heat.load(Ordering::Relaxed) {
            let pass = CONTROLS.passes.load(Ordering::Relaxed) + 1;
            for page in hot.pages() {
                page[COUNTER_WORD].store(pass, Ordering::Relaxed);
            }
            CONTROLS.passes.store(pass, Ordering::Relaxed);
        }
        let touched = CONTROLS.idle_pages.load(Ordering::Relaxed) as usize;
        for page in idle.pages().take(touched) {
            std::hint::black_box(page[0].load(Ordering::Relaxed));
        }
        thread::sleep(pause);
    }
}

impl Block {
    /// Maps and fills a block, aligned to 2 MiB and made of huge pages where
    /// the kernel has them, so that it lies in few runs of guest frames.
    fn new(name: &'static str, bytes: usize) -> Result<Self> {
        let length = NonZeroUsize::new(bytes + HUGE_BYTES).with_context(|| format!("block {name}"))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let map = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }
        .with_context(|| format!("mapping {bytes} bytes for block {name}"))?;
        let aligned = map.as_ptr() as usize;
        let aligned = aligned.next_multiple_of(HUGE_BYTES) - aligned;
        // SAFETY: the mapping is longer than `bytes` by one huge page, so the
        // aligned start and `bytes` behind it lie inside it.
        let start: NonNull<u64> = unsafe { map.byte_add(aligned).cast() };
        // SAFETY: the range lies inside the mapping; the advice changes no content.
        unsafe { madvise(start.cast(), bytes, MmapAdvise::MADV_HUGEPAGE) }
            .with_context(|| format!("asking for huge pages for block {name}"))?;
        // SAFETY: `bytes` zeroed, aligned bytes that are never unmapped and that
        // only these atomics refer to.
        let words = unsafe { std::slice::from_raw_parts(start.as_ptr().cast::<AtomicU64>(), bytes / 8) };
        let block = Self { name, words };
        block.fill();
        Ok(block)
    }

    /// Pages whose content is not what was written.
    fn bad_pages(&self) -> usize {
        let is_good = |(page, words): (usize, &[AtomicU64])| {
            words
                .iter()
                .step_by(PATTERN_STRIDE)
                .enumerate()
                .all(|(line, word)| word.load(Ordering::Relaxed) == pattern(page, line))
        };
        self.pages().enumerate().filter(|page| !is_good(*page)).count()
    }

    fn fill(&self) {
        for (page, words) in self.pages().enumerate() {
            for (line, word) in words.iter().step_by(PATTERN_STRIDE).enumerate() {
                word.store(pattern(page, line), Ordering::Relaxed);
            }
        }
    }

    fn pages(&self) -> std::slice::ChunksExact<'static, AtomicU64> {
        self.words.chunks_exact(WORDS_PER_PAGE)
    }

    /// Runs of guest frames, as (first frame, pages); frame 0 for what is not
    /// present.
    fn runs(&self) -> Result<Vec<(u64, u64)>> {
        let pagemap = File::open("/proc/self/pagemap").context("opening pagemap")?;
        let pages = self.words.len() / WORDS_PER_PAGE;
        let mut entries = vec![0u8; pages * 8];
        let first_page = self.words.as_ptr() as u64 / PAGE_BYTES as u64;
        pagemap
            .read_exact_at(&mut entries, first_page * 8)
            .with_context(|| format!("reading pagemap of block {}", self.name))?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for entry in entries.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into()?);
            let frame = if entry & PAGEMAP_PRESENT != 0 { entry & PAGEMAP_FRAME } else { 0 };
            match runs.last_mut() {
                Some((start, count)) if *start + *count == frame => *count += 1,
                _ => runs.push((frame, 1)),
            }
        }
        Ok(runs)
    }
}

/// A word that no other position holds and that a stray write would not make.
fn pattern(page: usize, line: usize) -> u64 {
    let position = (page * WORDS_PER_PAGE + line) as u64;
    position.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5555_AAAA_0F0F_F0F0
}

fn print_frames(blocks: &[Block]) -> Result<()> {
    for block in blocks {
        for (frame, pages) in block.runs()? {
            println!("EPT-GUEST frames {} {frame:x} {pages:x}", block.name);
        }
    }
    println!("EPT-GUEST frames end");
    Ok(())
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

fn mib_from_env(name: &str, default: u64) -> Result<usize> {
    Ok(usize::try_from(number_from_env(name, default)? << 20)?)
}

fn number_from_env(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => {
            text.parse().with_context(|| format!("{name}={text} on the kernel command line is no number"))
        }
        Err(_) => Ok(default),
    }
}
