// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that checks its memory: each vCPU goes over pages of its own, compares
//! each with what it must hold by now, and counts it up. One wrong word and it
//! says so. The host checks the rest of each page, which nobody writes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::machine::{CODE_GFN, Machine, Memory, PAGE, Pages, enter_protected_mode};
use super::settings::patience;

const ROUND_PORT: u16 = 0x10;
const WRONG_PORT: u16 = 0x11;
pub const MAX_VCPUS: usize = 8;

/// ebx: first page, edx: their number, ebp: from one to the next, esi: rounds.
/// The word of the page with ecx more to come, itself included, holds esi + ecx.
const PROGRAM: [u8; 31] = [
    0x89,
    0xDF, // start: mov edi, ebx
    0x89,
    0xD1, // mov ecx, edx
    0x8D,
    0x04,
    0x0E, // next: lea eax, [esi + ecx]
    0x39,
    0x07, // cmp [edi], eax
    0x75,
    0x0D, // jne wrong
    0x40, // inc eax
    0x89,
    0x07, // mov [edi], eax
    0x01,
    0xEF, // add edi, ebp
    0x49, // dec ecx
    0x75,
    0xF1, // jnz next
    0x46, // inc esi
    0xE6,
    ROUND_PORT as u8, // out round, al
    0xEB,
    0xE8, // jmp start
    0xE6,
    WRONG_PORT as u8, // wrong: out wrong, al
    0xEB,
    0xFC, // jmp wrong
    0x90,
    0x90,
    0x90,
];

/// The pages of each vCPU: 200, scattered over the standard machine's 64 MiB.
fn pages_of(vcpu: usize) -> Pages {
    Pages { base: 0x20_0000 + vcpu as u32 * 0x3000, stride: 0x4_0000, count: 200 }
}

/// What the words of a page that no guest writes hold: the same in pages of the
/// same place in their vCPUs' order, so that the host can merge those of vCPUs
/// that do not run yet.
fn filler(index: usize, word: usize) -> u32 {
    (index as u32).wrapping_mul(0x9E37_79B1) ^ (word as u32).wrapping_mul(0x85EB_CA77)
}

/// A guest that runs.
pub struct Guest {
    pub machine: Arc<Machine>,
    /// Held for reading during a round, for writing while all rest.
    gate: Arc<RwLock<()>>,
    stop: Arc<AtomicBool>,
    rounds: Arc<[AtomicU64; MAX_VCPUS]>,
    /// After each round.
    rest: Duration,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Guest {
    /// A guest with the memory of a standard machine, which is filled here, and
    /// with one vCPU. It runs all the time.
    pub fn start(memory: Memory) -> Result<Guest> {
        Guest::start_resting(memory, Duration::ZERO)
    }

    /// As [`Guest::start`], and after each round each vCPU rests for `rest`.
    pub fn start_resting(memory: Memory, rest: Duration) -> Result<Guest> {
        // Its own vCPU never runs: those that do are added.
        let machine = Machine::new(memory)?;
        machine.memory.write(CODE_GFN as usize * PAGE, &PROGRAM);
        let mut guest = Guest {
            machine: Arc::new(machine),
            gate: Arc::default(),
            stop: Arc::default(),
            rounds: Arc::default(),
            rest,
            threads: Vec::new(),
        };
        for vcpu in 0..MAX_VCPUS {
            guest.fill(vcpu);
        }
        guest.add_vcpu()?;
        Ok(guest)
    }

    pub fn vcpus(&self) -> usize {
        self.threads.len()
    }

    /// Adds a vCPU, which runs at once; one of [`MAX_VCPUS`].
    pub fn add_vcpu(&mut self) -> Result<()> {
        let index = self.threads.len();
        ensure!(index < MAX_VCPUS, "a guest has {MAX_VCPUS} vCPUs at most");
        let mut vcpu = self.machine.vm.create_vcpu(index as u64 + 1).context("KVM_CREATE_VCPU")?;
        let pages = pages_of(index);
        enter_protected_mode(
            &vcpu,
            kvm_regs {
                rip: CODE_GFN * PAGE as u64,
                rbx: pages.base.into(),
                rdx: pages.count.into(),
                rbp: pages.stride.into(),
                ..Default::default()
            },
        )?;
        let (gate, stop, rounds) = (self.gate.clone(), self.stop.clone(), self.rounds.clone());
        let rest = self.rest;
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // A panic of another thread ends this guest's rounds as well.
                let running = gate.read().map_err(|_| anyhow::anyhow!("another thread panicked"))?;
                run_round(&mut vcpu)?;
                rounds[index].fetch_add(1, Ordering::Relaxed);
                drop(running);
                if !rest.is_zero() {
                    std::thread::sleep(rest);
                }
            }
            Ok(())
        }));
        Ok(())
    }

    /// Rounds of all vCPUs together.
    pub fn rounds(&self) -> u64 {
        self.rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed)).sum()
    }

    /// Runs `f` while no vCPU is in a round.
    pub fn at_rest<T>(&self, f: impl FnOnce(&Machine) -> Result<T>) -> Result<T> {
        let _resting = self.gate.write().map_err(|_| anyhow::anyhow!("a vCPU's thread panicked"))?;
        f(&self.machine)
    }

    /// Waits until each vCPU did `more` rounds, and fails when one does not.
    pub fn wait_rounds(&self, more: u64) -> Result<()> {
        let start = Instant::now();
        let before: Vec<u64> = self.rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed)).collect();
        for (vcpu, (rounds, before)) in self.rounds.iter().zip(before).take(self.threads.len()).enumerate() {
            while rounds.load(Ordering::Relaxed) < before + more {
                self.is_alive()?;
                ensure!(
                    start.elapsed() < patience(Duration::from_secs(60)),
                    "vCPU {vcpu} does not get on: {} rounds, it had {before}",
                    rounds.load(Ordering::Relaxed)
                );
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    /// Fails when a vCPU's thread has ended: it saw something wrong.
    pub fn is_alive(&self) -> Result<()> {
        let ended = self.threads.iter().position(JoinHandle::is_finished);
        ensure!(ended.is_none(), "vCPU {ended:?} ended by itself; stop() says why");
        Ok(())
    }

    /// Drops `bytes` of the memory from `offset` on, and puts there what the
    /// guest must find.
    pub fn drop_memory(&self, offset: usize, bytes: usize, advice: i32) -> Result<()> {
        self.at_rest(|machine| {
            machine.memory.advise(offset, bytes, advice)?;
            (0..MAX_VCPUS).for_each(|vcpu| self.fill(vcpu));
            Ok(())
        })
    }

    /// Writes a vCPU's pages as they must be after its rounds.
    fn fill(&self, vcpu: usize) {
        let (pages, rounds) = (pages_of(vcpu), self.rounds[vcpu].load(Ordering::Relaxed));
        for (index, gfn) in pages.gfns().into_iter().enumerate() {
            let word = (rounds as u32).wrapping_add(pages.count - index as u32);
            self.machine.memory.write_u32(gfn as usize * PAGE, word);
            for other in 1..PAGE / 4 {
                self.machine.memory.write_u32(gfn as usize * PAGE + other * 4, filler(index, other));
            }
        }
    }

    /// Compares all pages of all vCPUs, word by word, while they rest.
    pub fn check(&self) -> Result<()> {
        self.at_rest(|machine| {
            for vcpu in 0..MAX_VCPUS {
                let (pages, rounds) = (pages_of(vcpu), self.rounds[vcpu].load(Ordering::Relaxed));
                for (index, gfn) in pages.gfns().into_iter().enumerate() {
                    let counted = (rounds as u32).wrapping_add(pages.count - index as u32);
                    for word in 0..PAGE / 4 {
                        let want = if word == 0 { counted } else { filler(index, word) };
                        let got = machine.memory.read_u32(gfn as usize * PAGE + word * 4);
                        ensure!(
                            got == want,
                            "the guest's memory is wrong: page {gfn}, word {word}: {got:#x}, expected \
                             {want:#x} after {rounds} rounds of vCPU {vcpu}"
                        );
                    }
                }
            }
            Ok(())
        })
    }

    /// Ends the guest, checks what it left, and returns how many rounds it did.
    pub fn stop(&mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let start = Instant::now();
        for (vcpu, thread) in self.threads.drain(..).enumerate() {
            while !thread.is_finished() {
                ensure!(start.elapsed() < patience(Duration::from_secs(60)), "vCPU {vcpu} does not end");
                std::thread::sleep(Duration::from_millis(1));
            }
            let ended = thread.join().map_err(|_| anyhow::anyhow!("the thread of vCPU {vcpu} panicked"))?;
            ended.with_context(|| format!("vCPU {vcpu}"))?;
        }
        self.check()?;
        Ok(self.rounds())
    }
}

fn run_round(vcpu: &mut VcpuFd) -> Result<()> {
    for _ in 0..10_000 {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(ROUND_PORT, _)) => return Ok(()),
            Ok(VcpuExit::IoOut(WRONG_PORT, _)) => {
                let regs = vcpu.get_regs().context("KVM_GET_REGS")?;
                bail!(
                    "the guest read a wrong word at {:#x} in round {}, expected {:#x}",
                    regs.rdi,
                    regs.rsi,
                    regs.rax
                );
            }
            Ok(other) => bail!("the guest left with {other:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(error).context("KVM_RUN"),
        }
    }
    bail!("the guest was interrupted ten thousand times and did not end a round")
}
