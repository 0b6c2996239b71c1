// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests whose vCPUs run without end, each on a CPU of its own: what a guest
//! notices of the host, it notices by itself.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::machine::{CODE_GFN, Machine, Memory, PAGE, Pages, Touch, begin_at, jump, program};

/// Each vCPU has a page of code below the first MiB, and counts its rounds here.
const COUNTER: usize = 0x800;
/// More do not fit below what the programs go over.
const MAX_VCPUS: usize = 8;
/// `hlt`: the one instruction that ends a vCPU's run.
const HLT: u8 = 0xF4;

/// A machine with several vCPUs.
pub struct Crew {
    pub machine: Machine,
    more: Vec<VcpuFd>,
}

fn code_gfn(vcpu: usize) -> u64 {
    CODE_GFN + vcpu as u64
}

impl Crew {
    /// `machine` with `vcpus` vCPUs in all.
    pub fn new(machine: Machine, vcpus: usize) -> Result<Crew> {
        ensure!((1..=MAX_VCPUS).contains(&vcpus), "{vcpus} vCPUs");
        let more = (1..vcpus)
            .map(|id| machine.vm.create_vcpu(id as u64).context("KVM_CREATE_VCPU"))
            .collect::<Result<_>>()?;
        Ok(Crew { machine, more })
    }

    pub fn vcpus(&self) -> usize {
        1 + self.more.len()
    }

    /// Puts vCPU `vcpu` before `code`, in its own page.
    pub fn load(&self, vcpu: usize, code: &[u8]) -> Result<()> {
        ensure!(code.len() <= COUNTER, "{} bytes of code", code.len());
        let fd = if vcpu == 0 { &self.machine.vcpu } else { &self.more[vcpu - 1] };
        self.machine.memory.write(code_gfn(vcpu) as usize * PAGE, code);
        begin_at(fd, code_gfn(vcpu))
    }

    /// Gives all vCPUs the work of going over `pages` without end.
    pub fn load_spin(&self, pages: Pages, touch: Touch) -> Result<()> {
        (0..self.vcpus()).try_for_each(|vcpu| self.load(vcpu, &spin_program(vcpu, pages, touch)))
    }

    /// Runs all vCPUs while `observe` runs, those after the first CPU pinned as
    /// far as there are CPUs: the first is the host's own.
    pub fn while_spinning<T>(&mut self, observe: impl FnOnce(&Memory) -> Result<T>) -> Result<T> {
        let memory = &self.machine.memory;
        let vcpus = 1 + self.more.len();
        let cpus = std::thread::available_parallelism()?.get();
        let stop = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            let all = std::iter::once(&mut self.machine.vcpu).chain(&mut self.more).enumerate();
            let threads: Vec<_> = all
                .map(|(id, fd)| scope.spawn(move || pin_to((id + 1) % cpus).and_then(|()| run(fd, stop))))
                .collect();
            let observed = observe(memory);
            stop.store(true, Ordering::Relaxed);
            (0..vcpus).for_each(|id| memory.write(code_gfn(id) as usize * PAGE, &[HLT; COUNTER]));
            for thread in threads {
                thread.join().map_err(|_| anyhow!("a vCPU's thread panicked"))??;
            }
            observed
        })
    }
}

/// Runs a vCPU until its program ends, or is made to.
fn run(vcpu: &mut VcpuFd, stop: &AtomicBool) -> Result<()> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(()),
            Ok(other) => bail!("the guest left with {other:?}"),
            Err(error) if error.errno() != libc::EINTR => return Err(error).context("KVM_RUN"),
            Err(_) if stop.load(Ordering::Relaxed) => return Ok(()),
            Err(_) => {}
        }
    }
}

pub fn pin_to(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on CPU {cpu}"))
}

/// Rounds that vCPU `vcpu` did since its page of code was last zero there.
pub fn rounds(memory: &Memory, vcpu: usize) -> u32 {
    memory.read_u32(code_gfn(vcpu) as usize * PAGE + COUNTER)
}

/// Goes over `pages` without leaving the guest, and counts.
fn spin_program(vcpu: usize, pages: Pages, touch: Touch) -> Vec<u8> {
    let mut tail = vec![0xFF, 0x05]; // inc dword [counter]
    tail.extend(((code_gfn(vcpu) as usize * PAGE + COUNTER) as u32).to_le_bytes());
    program(pages, touch, &tail)
}

/// Writes to all of `tour` without leaving the guest.
pub fn tour_program(tour: &[Pages]) -> Vec<u8> {
    let mut code = Vec::new();
    for pages in tour {
        let one = program(*pages, Touch::Write, &[]);
        // Without its jump to the start, it goes on with the next.
        code.extend(&one[..one.len() - 2]);
    }
    code.extend([0xEB, jump(code.len() + 2, 0)]); // jmp start
    code
}

/// Where a program writes down numbers of 32 bits.
#[derive(Clone, Copy)]
pub struct Log {
    pub address: u32,
    pub entries: u32,
}

impl Log {
    fn end(self) -> u32 {
        self.address + 4 * self.entries
    }

    /// What was written so far; the log must have been zero before.
    pub fn read(self, memory: &Memory) -> Vec<u32> {
        let at = |i| memory.read_u32((self.address + 4 * i) as usize);
        (0..self.entries).map(at).take_while(|value| *value != 0).collect()
    }

    /// All numbers in it, wherever the program is by now.
    pub fn read_all(self, memory: &Memory) -> Vec<u32> {
        let at = |i| memory.read_u32((self.address + 4 * i) as usize);
        (0..self.entries).map(at).filter(|value| *value != 0).collect()
    }

    pub fn clear(self, memory: &Memory) {
        memory.write(self.address as usize, &vec![0; 4 * self.entries as usize]);
    }

    /// Writes EAX down if it is at least `from`, and ends when the log is full.
    fn code(self, from: u32) -> Vec<u8> {
        let mut code = vec![0x3D]; // cmp eax, from
        code.extend(from.to_le_bytes());
        code.extend([0x72, 15]); // jb over
        code.extend([0x89, 0x45, 0x00]); // mov [ebp], eax
        code.extend([0x83, 0xC5, 0x04]); // add ebp, 4
        code.extend([0x81, 0xFD]); // cmp ebp, end
        code.extend(self.end().to_le_bytes());
        code.extend([0x72, 0x01, HLT]); // jb over; hlt
        code
    }

    /// Puts EBP at the log's start.
    fn begin(self) -> Vec<u8> {
        let mut code = vec![0xBD]; // mov ebp, address
        code.extend(self.address.to_le_bytes());
        code
    }
}

/// Goes over `pages` and writes down the ticks of each access, from the
/// instruction before it to the one after it, that took at least `from`.
pub fn timing_program(pages: Pages, touch: Touch, log: Log, from: u32) -> Result<Vec<u8>> {
    let mut code = log.begin();
    let start = code.len();
    code.push(0xBF); // mov edi, base
    code.extend(pages.base.to_le_bytes());
    code.push(0xB9); // mov ecx, count
    code.extend(pages.count.to_le_bytes());
    let next = code.len();
    if touch == Touch::Exec {
        // mov ebx, the second rdtsc: 5 bytes, then rdtsc, mov and jmp of 6.
        code.push(0xBB);
        code.extend(((CODE_GFN as usize * PAGE + code.len() + 4 + 6) as u32).to_le_bytes());
    }
    code.extend([0x0F, 0x31, 0x89, 0xC6]); // rdtsc; mov esi, eax
    code.extend(match touch {
        Touch::Read => [0x8B, 0x07],  // mov eax, [edi]
        Touch::Write => [0xFF, 0x07], // inc dword [edi]
        Touch::Store => [0x89, 0x0F], // mov [edi], ecx
        Touch::Exec => [0xFF, 0xE7],  // jmp edi
    });
    code.extend([0x0F, 0x31, 0x29, 0xF0]); // rdtsc; sub eax, esi
    code.extend(log.code(from));
    code.extend([0x81, 0xC7]); // add edi, stride
    code.extend(pages.stride.to_le_bytes());
    code.push(0x49); // dec ecx
    code.extend([0x75, jump(code.len() + 2, next)]); // jnz next
    code.extend([0xEB, jump(code.len() + 2, start)]); // jmp start
    Ok(code)
}

/// Reads at `address` without end, and writes down each gap of at least `from`
/// ticks between two rounds: what the host took from the guest.
pub fn gap_program(address: u32, log: Log, from: u32) -> Vec<u8> {
    let mut code = log.begin();
    code.extend([0x0F, 0x31, 0x89, 0xC6]); // rdtsc; mov esi, eax
    let next = code.len();
    code.push(0xA1); // mov eax, [address]
    code.extend(address.to_le_bytes());
    code.extend([0x0F, 0x31, 0x89, 0xC2]); // rdtsc; mov edx, eax
    code.extend([0x29, 0xF0, 0x89, 0xD6]); // sub eax, esi; mov esi, edx
    code.extend(log.code(from));
    code.extend([0xEB, jump(code.len() + 2, next)]); // jmp next
    code
}
