// SPDX-License-Identifier: MIT OR Apache-2.0
//! The VMs that the fuzzer's threads share, and what is known of each while the
//! others change it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use anyhow::{Context, Result};

use super::arguments;
use super::child::GuestProcess;
use super::fuzz_steps::VMS;

/// Sessions of the module that belong to no thread.
pub const SHARED_FILES: usize = 1;

/// Whether a VM's process lives; it goes from the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Life {
    Alive,
    /// Being killed: both answers are right.
    Dying,
    Dead,
}

/// A VM in a process of its own.
pub struct Vm {
    pub index: usize,
    pub fd: OwnedFd,
    process: Mutex<GuestProcess>,
    life: AtomicU8,
    pub samplers: Samplers,
}

/// Who samples a VM. Counts that are raised too early and lowered too late tell
/// who may, counts the other way round who does.
#[derive(Default)]
pub struct Samplers {
    may: AtomicU32,
    begun: AtomicU64,
    sure: AtomicU32,
    changes: AtomicU64,
}

/// What was known of a VM's samplers before a call.
#[derive(Clone, Copy)]
pub struct Before {
    may: u32,
    begun: u64,
    sure: u32,
    changes: u64,
}

impl Samplers {
    /// Before a call that may begin to sample.
    pub fn may_begin(&self) -> Before {
        Before {
            may: self.may.fetch_add(1, Ordering::SeqCst),
            begun: self.begun.fetch_add(1, Ordering::SeqCst),
            changes: self.changes.load(Ordering::SeqCst),
            sure: self.sure.load(Ordering::SeqCst),
        }
    }

    /// After it; `began` when it did. Returns whether another sampler may, and
    /// whether another one must have been in its way.
    pub fn began(&self, before: Before, began: bool) -> (bool, bool) {
        let others = self.begun.load(Ordering::SeqCst) - before.begun > 1;
        let sure = before.sure > 0 && self.changes.load(Ordering::SeqCst) == before.changes;
        if began {
            self.sure.fetch_add(1, Ordering::SeqCst);
            self.changes.fetch_add(1, Ordering::SeqCst);
        } else {
            self.may.fetch_sub(1, Ordering::SeqCst);
        }
        (before.may > 0 || others, sure)
    }

    /// Before a call that may end a sampler.
    pub fn may_end(&self) {
        self.sure.fetch_sub(1, Ordering::SeqCst);
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// After it; `ended` when it did.
    pub fn ended(&self, ended: bool) {
        if ended {
            self.may.fetch_sub(1, Ordering::SeqCst);
        } else {
            self.sure.fetch_add(1, Ordering::SeqCst);
            self.changes.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Vm {
    fn start(index: usize) -> Result<Arc<Vm>> {
        let process = GuestProcess::start()?;
        Ok(Arc::new(Vm {
            index,
            fd: process.vm()?,
            process: Mutex::new(process),
            life: AtomicU8::new(0),
            samplers: Samplers::default(),
        }))
    }

    pub fn life(&self) -> Life {
        match self.life.load(Ordering::SeqCst) {
            0 => Life::Alive,
            1 => Life::Dying,
            _ => Life::Dead,
        }
    }

    /// Does something to the process, unless it is dead.
    pub fn with_process(&self, act: impl FnOnce(&mut GuestProcess) -> Result<()>) -> Result<()> {
        let mut process = self.lock();
        if self.life() == Life::Alive { act(&mut process) } else { Ok(()) }
    }

    fn lock(&self) -> MutexGuard<'_, GuestProcess> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the process; false when another thread did.
    pub fn kill(&self) -> Result<bool> {
        let mut process = self.lock();
        if self.life() != Life::Alive {
            return Ok(false);
        }
        self.life.store(1, Ordering::SeqCst);
        process.kill()?;
        self.life.store(2, Ordering::SeqCst);
        Ok(true)
    }
}

/// All VMs of the moment.
pub struct World {
    vms: [RwLock<Arc<Vm>>; VMS],
    dead: RwLock<Option<Arc<Vm>>>,
    pub killed: AtomicU32,
    shared: RwLock<Arc<File>>,
}

impl World {
    pub fn new() -> Result<World> {
        let vms = (0..VMS).map(|index| Ok(RwLock::new(Vm::start(index)?))).collect::<Result<Vec<_>>>()?;
        let vms = vms.try_into().ok().context("another number of VMs")?;
        let shared = RwLock::new(Arc::new(arguments::open()?));
        Ok(World { vms, dead: RwLock::default(), killed: AtomicU32::default(), shared })
    }

    /// The session that all threads use at once; it attaches to VM 0 only.
    pub fn shared(&self) -> Arc<File> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens another one in its place. The old one closes with its last call.
    pub fn renew_shared(&self) -> Result<()> {
        let new = Arc::new(arguments::open()?);
        *self.shared.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    pub fn vm(&self, index: usize) -> Arc<Vm> {
        self.vms[index].read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One of those whose process was killed.
    pub fn dead_vm(&self) -> Option<Arc<Vm>> {
        self.dead.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Kills a VM's process and starts another one in its place.
    pub fn renew(&self, index: usize) -> Result<()> {
        let old = self.vm(index);
        if old.kill()? {
            let new = Vm::start(index)?;
            *self.vms[index].write().unwrap_or_else(PoisonError::into_inner) = new;
            *self.dead.write().unwrap_or_else(PoisonError::into_inner) = Some(old);
            self.killed.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Compares the memory of all guests with what must stand there.
    pub fn check(&self) -> Result<()> {
        (0..VMS).try_for_each(|index| {
            self.vm(index).with_process(GuestProcess::check).with_context(|| format!("VM {index}"))
        })
    }
}
