// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMs and the module coming and going under a session.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::process::{Process, find_vm_fd};
use ept_virt_core::sampler::{Harvest, HarvestRequest, KernelSampler, Sampler, SamplerError};
use ept_virt_core::samples::{AccessSet, Sampling};
use ept_virt_core::topology::NodeSet;
use nix::kmod::{DeleteModuleFlags, delete_module};

use super::Outcome;
use super::arguments::module_references;
use super::machine::{ALL, ALL_CLEAR, Machine, PAGE, PAGES, SPREAD, Touch, harvest, round_program};
use super::sampling_calls::expect_gone;

/// A process with a VM. Kills and reaps on drop.
pub struct Victim(Child);

impl Victim {
    /// Starts it and waits until its guest has done its round.
    pub fn start() -> Result<Victim> {
        let child = Command::new("/proc/self/exe").arg("microvm-victim").stdout(Stdio::piped()).spawn()?;
        let mut victim = Victim(child);
        let mut ready = String::new();
        let output = victim.0.stdout.take().context("no pipe")?;
        BufReader::new(output).read_line(&mut ready)?;
        ensure!(ready.trim() == "ready", "the victim said {ready:?}");
        Ok(victim)
    }

    /// The VM's descriptor, taken from the process.
    pub fn vm(&self) -> Result<OwnedFd> {
        Ok(find_vm_fd(&Process::open(self.0.id() as i32)?)?)
    }

    /// The number that the VM's descriptor has in the process.
    pub fn vm_number(&self) -> Result<i32> {
        for entry in fs::read_dir(format!("/proc/{}/fd", self.0.id()))? {
            let entry = entry?;
            if fs::read_link(entry.path())?.to_string_lossy() == "anon_inode:kvm-vm" {
                return Ok(entry.file_name().to_string_lossy().parse()?);
            }
        }
        bail!("the victim has no VM")
    }

    /// A session attached to its VM.
    pub fn observe(&self) -> Result<KernelSampler> {
        let vm = self.vm()?;
        let mut sampler = KernelSampler::open()?;
        sampler.attach(vm.as_fd())?;
        Ok(sampler)
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing left to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A session outlives the VM's process: from then on it says so, and nothing else.
pub fn vm_exit() -> Result<Outcome> {
    let mut victim = Victim::start()?;
    let mut sampler = victim.observe()?;
    ensure!(harvest(&mut sampler, ALL)?.stats.accessed == 201, "the living VM shows its pages");
    victim.kill()?;
    let request = HarvestRequest { clear_accessed: true, ..ALL };
    let results = [
        sampler.harvest(&request, &NodeSet::default(), &mut Harvest::default()),
        sampler.memslots().map(|_| ()),
    ];
    for result in results {
        ensure!(matches!(result, Err(SamplerError::VmGone)), "after the process exited: {result:?}");
    }
    Ok(Outcome::Pass("201 pages while it lived, ESRCH afterwards".into()))
}

/// The process that [`vm_exit`] kills: runs one round and waits.
pub fn victim() -> Result<()> {
    // So that the VM's number is none that the test's process uses.
    let _others = (0..100).map(|_| File::open("/dev/null")).collect::<std::io::Result<Vec<_>>>()?;
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    println!("ready");
    std::io::stdout().flush()?;
    std::thread::sleep(Duration::from_secs(600));
    Ok(())
}

/// A VM that is closed by a process that lives on is not there any more either, and
/// goes with the last session.
pub fn vm_closed() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let mut sampler = machine.observe()?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, 1000, 0)?;
    ensure!(harvest(&mut sampler, ALL)?.stats.accessed == 201, "the open VM shows its pages");
    // Nobody else makes VMs here: its folder is the only one.
    let kept = || -> Result<usize> {
        let entries = fs::read_dir("/sys/kernel/debug/kvm")?.collect::<std::io::Result<Vec<_>>>()?;
        Ok(entries.iter().filter(|entry| entry.path().is_dir()).count())
    };
    ensure!(kept()? == 1, "{} VMs, expected one", kept()?);
    let Machine { vcpu, vm, memory } = machine;
    drop((vcpu, vm));
    let seen = sampler.harvest(&ALL, &NodeSet::default(), &mut Harvest::default());
    ensure!(matches!(seen, Err(SamplerError::VmGone)), "a harvest of the closed VM: {seen:?}");
    expect_gone(&mut sampling)?;
    drop(sampler);
    drop(sampling);
    ensure!(kept()? == 0, "the VM was not destroyed with its last session");
    drop(memory);
    Ok(Outcome::Pass("201 pages while it was open, ESRCH afterwards; gone with its last session".into()))
}

/// The module can not be removed while a session is open, attached or not.
pub fn module_in_use() -> Result<Outcome> {
    let before = module_references()?;
    let machine = Machine::standard()?;
    let sampler = machine.observe()?;
    let idle = KernelSampler::open()?;
    let now = module_references()?;
    ensure!(now == before + 2, "references went from {before} to {now}");
    drop(sampler);
    match delete_module(c"kvm_ept_sample", DeleteModuleFlags::O_NONBLOCK) {
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EBUSY) => {}
        other => anyhow::bail!("removing the module in use: {other:?}"),
    }
    drop(idle);
    ensure!(module_references()? == before, "a closed session left a reference");
    Ok(Outcome::Pass("removal refused while a file is open, no reference left afterwards".into()))
}

/// A guest runs, its memory is dropped and its slots come and go, and two
/// readers harvest and clear all the while. The kernel must stay silent and the
/// guest must go on.
pub fn churn() -> Result<Outcome> {
    churn_standard(HarvestRequest { clear_dirty: true, ..ALL_CLEAR })
}

/// As [`churn`], where nothing tells what was written.
pub fn churn_accessed() -> Result<Outcome> {
    churn_standard(ALL_CLEAR)
}

fn churn_standard(request: HarvestRequest) -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    churn_on(machine, request, PAGES)
}

/// Memory is dropped from 2 MiB to `end_gfn`; the rest holds programs.
pub fn churn_on(mut machine: Machine, request: HarvestRequest, end_gfn: u64) -> Result<Outcome> {
    const FOR: Duration = Duration::from_millis(1500);
    let taint_before = fs::read_to_string("/proc/sys/kernel/tainted")?;
    let samplers = (0..2).map(|_| machine.observe()).collect::<Result<Vec<_>>>()?;
    let (stop, harvests) = (AtomicBool::new(false), AtomicU64::new(0));
    let rounds = std::thread::scope(|scope| -> Result<u64> {
        let readers: Vec<_> = samplers
            .into_iter()
            .map(|mut sampler| {
                let (stop, harvests) = (&stop, &harvests);
                scope.spawn(move || -> Result<()> {
                    while !stop.load(Ordering::Relaxed) {
                        harvest(&mut sampler, request)?;
                        harvests.fetch_add(1, Ordering::Relaxed);
                        // Each harvest kicks the guest: without a pause it would not get on.
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    Ok(())
                })
            })
            .collect();
        let rounds = churn_rounds(&mut machine, FOR, end_gfn);
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
        }
        rounds
    })?;
    let taint = fs::read_to_string("/proc/sys/kernel/tainted")?;
    ensure!(taint == taint_before, "the kernel's taint went from {taint_before} to {taint}: see its log");
    Ok(Outcome::Pass(format!("{rounds} rounds of the guest, {} harvests beside them", harvests.into_inner())))
}

fn churn_rounds(machine: &mut Machine, how_long: Duration, end_gfn: u64) -> Result<u64> {
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed() < how_long {
        machine.run_round()?;
        rounds += 1;
        let (from, bytes) = (512 * PAGE, (end_gfn as usize - 512) * PAGE);
        if rounds % 3 == 0 {
            machine.memory.advise(from, bytes, libc::MADV_DONTNEED)?;
        }
        if rounds % 7 == 0 {
            machine.set_slot(0, 0, &machine.memory, 0)?;
            machine.set_slot(0, 0, &machine.memory, machine.memory.bytes())?;
        }
    }
    Ok(rounds)
}
