// SPDX-License-Identifier: MIT OR Apache-2.0
//! A thread of the fuzzer: does its steps on its own sessions and the shared one,
//! and compares each answer with the model's.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use ept_virt_core::uapi::{self, KesAttach, KesHarvest, KesInfo, KesMemslots, KesSampleSet, KesSampleStats};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::arguments::call;
use super::fuzz_check::{self, GUARD};
use super::fuzz_model::{self, Allowed, View, allowed};
use super::fuzz_steps::{Buffer, Call, FILES, HarvestStep, ROOM_PAGES, SHARED, SetStep, Step, Target};
use super::fuzz_world::{Life, Vm, World};
use super::places::{Place, Places, bytes_of};
use super::random::Random;

/// How many steps are shown when one fails.
const SHOWN: usize = 12;
/// Records that wait when the caller does not say how many may.
const DEFAULT_RING: u32 = 16384;

/// A thread that waits in a read, for the one that wakes it.
#[derive(Default)]
pub struct Waiting {
    pub thread: AtomicU64,
    /// Odd while it may wait for ever.
    pub count: AtomicU64,
    /// Sent to it so far.
    pub signals: AtomicU64,
}

/// A session of the thread's own, and all that is known of it.
struct Session {
    file: File,
    nonblock: bool,
    keeps_young: bool,
    vm: Option<Arc<Vm>>,
    ring: Option<u32>,
    may_have_records: bool,
    last_record_ns: u64,
}

/// A thread's state.
pub struct Player {
    random: Random,
    sessions: Vec<Session>,
    pub places: Places,
    /// Accessed, dirty, mapped, on nodes, levels.
    pub rooms: [Vec<u64>; 5],
    pub waiting: Arc<Waiting>,
    /// Signals to this thread before the last step.
    signals: u64,
    pub last_steps: VecDeque<String>,
    /// How often each call ended with each errno.
    pub seen: BTreeMap<(&'static str, i32), u64>,
}

impl Session {
    fn open(nonblock: bool) -> Result<Session> {
        let flags = if nonblock { libc::O_NONBLOCK } else { 0 };
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(uapi::PROC_PATH)?;
        let keeps_young = uapi::get_info(&file)?.features & uapi::FEATURE_KEEP_YOUNG != 0;
        Ok(Session {
            file,
            nonblock,
            keeps_young,
            vm: None,
            ring: None,
            may_have_records: false,
            last_record_ns: 0,
        })
    }

    /// What a call that succeeded changed.
    fn learn(&mut self, call: &Call, target: Option<Arc<Vm>>) {
        match *call {
            Call::Attach { .. } => self.vm = target,
            Call::Detach => {
                (self.vm, self.ring, self.may_have_records, self.last_record_ns) = (None, None, false, 0);
            }
            Call::Set(SetStep { freq_hz: 0, .. }) => self.ring = None,
            Call::Set(SetStep { ring_records, .. }) if self.ring.is_none() => {
                let records = if ring_records == 0 { DEFAULT_RING } else { ring_records };
                self.ring = Some(records.next_power_of_two());
                (self.may_have_records, self.last_record_ns) = (true, 0);
            }
            _ => {}
        }
    }

    fn view(&self, life: Life, target_life: Life) -> View {
        View {
            attached: self.vm.is_some(),
            life,
            ring: self.ring,
            may_have_records: self.may_have_records,
            nonblock: self.nonblock,
            target_life,
            keeps_young: self.keeps_young,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The file closes after this: until then its sampler is in the way of
        // others, and afterwards it may still be counted as one that may be.
        if let (Some(vm), Some(_)) = (&self.vm, self.ring) {
            vm.samplers.may_end();
            // Closed here, so that the count is right when it is lowered.
            if let Ok(nothing) = File::open("/dev/null") {
                drop(std::mem::replace(&mut self.file, nothing));
            }
            vm.samplers.ended(true);
        }
    }
}

/// From one moment of a VM's life to another: all that it may have been.
fn lives(from: Life, to: Life) -> Vec<Life> {
    match (from, to) {
        (Life::Alive, Life::Alive) => vec![Life::Alive],
        (Life::Dead, _) => vec![Life::Dead],
        _ => vec![Life::Alive, Life::Dying, Life::Dead],
    }
}

impl Player {
    pub fn new(seed: u64, number: u64) -> Result<Player> {
        Ok(Player {
            random: Random::new(seed, number),
            sessions: (0..FILES).map(|_| Session::open(true)).collect::<Result<_>>()?,
            places: Places::new(false)?,
            // Bytes of levels need less, and what is unaligned a little more.
            rooms: std::array::from_fn(|_| vec![GUARD; ROOM_PAGES as usize / 64 + 2]),
            signals: 0,
            waiting: Arc::default(),
            last_steps: VecDeque::new(),
            seen: BTreeMap::new(),
        })
    }

    /// Sessions that are attached now; each holds the module.
    pub fn attached(&self) -> usize {
        self.sessions.iter().filter(|session| session.vm.is_some()).count()
    }

    /// Sessions that are open.
    pub fn files(&self) -> usize {
        self.sessions.len()
    }

    /// Closes all sessions.
    pub fn end(&mut self) {
        self.sessions.clear();
    }

    /// Does `steps` steps.
    pub fn play(&mut self, world: &World, steps: u64) -> Result<()> {
        // SAFETY: asks for this thread's number.
        let thread = unsafe { libc::gettid() };
        self.waiting.thread.store(thread as u64, Ordering::SeqCst);
        for _ in 0..steps {
            let step = Step::draw(&mut self.random);
            self.remember(format!("{step:?}"));
            self.step(world, step)?;
        }
        Ok(())
    }

    fn remember(&mut self, text: String) {
        if self.last_steps.len() == SHOWN {
            self.last_steps.pop_front();
        }
        self.last_steps.push_back(text);
    }

    fn step(&mut self, world: &World, step: Step) -> Result<()> {
        match step {
            Step::Open { file: SHARED, .. } => world.renew_shared(),
            Step::Open { file, nonblock } => {
                self.sessions[file] = Session::open(nonblock)?;
                Ok(())
            }
            Step::Disturb { vm, how } => world.vm(vm).with_process(|process| process.disturb(how)),
            Step::Check { vm } => world.vm(vm).with_process(|process| process.check()),
            Step::Kill { vm } => world.renew(vm),
            Step::Call { file: SHARED, place, call } => self.call_shared(world, place, call),
            Step::Call { file, place, call } => self.call_own(world, file, place, call),
        }
    }

    fn record(&mut self, call: &Call, errno: i32) {
        let name = match call {
            Call::Info => "info",
            Call::Attach { .. } => "attach",
            Call::Detach => "detach",
            Call::Memslots { .. } => "memslots",
            Call::Harvest(_) => "harvest",
            Call::Set(_) => "set",
            Call::Stats => "stats",
            Call::Read { .. } => "read",
            Call::Poll => "poll",
            Call::Number(_) => "number",
        };
        *self.seen.entry((name, errno)).or_default() += 1;
        if let Some(last) = self.last_steps.back_mut() {
            last.push_str(&format!(" -> {errno}"));
        }
    }

    /// A call on a session that others use as well: all that can be in any state
    /// of it, and nothing is known afterwards.
    fn call_shared(&mut self, world: &World, place: Place, call: Call) -> Result<()> {
        let call = match call {
            Call::Attach { target: Target::Vm(_), flags, reserved } => {
                Call::Attach { target: Target::Vm(0), flags, reserved }
            }
            // Nobody would wake those that wait for another's samples.
            Call::Read { .. } => return Ok(()),
            call => call,
        };
        let file = world.shared();
        let target = target_vm(world, &call);
        let errno = self.run(&file, place, &call, target.as_deref())?.0;
        let mut right = Allowed::new();
        for attached in [false, true] {
            for life in [Life::Alive, Life::Dying, Life::Dead] {
                for ring in [None, Some(1), Some(2), Some(16384)] {
                    let view = View {
                        attached,
                        life,
                        ring,
                        may_have_records: true,
                        nonblock: true,
                        target_life: life,
                        keeps_young: self.sessions[0].keeps_young,
                    };
                    right.extend(allowed(&call, place, &view));
                }
            }
        }
        if matches!(call, Call::Set(_)) {
            fuzz_model::with_other_samplers(&mut right, true, false);
        }
        self.record(&call, errno);
        self.judge(&call, place, errno, &right, "the shared session")
    }

    fn judge(&self, call: &Call, place: Place, errno: i32, right: &Allowed, who: &str) -> Result<()> {
        ensure!(right.contains(&errno), "{call:?} at {place:?} on {who}: errno {errno}, expected {right:?}");
        Ok(())
    }

    fn call_own(&mut self, world: &World, index: usize, place: Place, call: Call) -> Result<()> {
        let target = target_vm(world, &call);
        let session = &self.sessions[index];
        let life = |vm: Option<&Arc<Vm>>| vm.map_or(Life::Alive, |vm| vm.life());
        let (from, target_from) = (life(session.vm.as_ref()), life(target.as_ref()));
        let before = session.view(from, target_from);
        let vm = session.vm.clone();
        // Which counts of samplers the call may change.
        let begins = matches!(&call, Call::Set(set) if fuzz_model::begins(set, &before));
        let ends = before.ring.is_some() && ends_sampling(&call);
        let samplers = vm.as_ref().map(|vm| &vm.samplers);
        let begun = samplers.filter(|_| begins).map(|samplers| samplers.may_begin());
        if let Some(samplers) = samplers.filter(|_| ends) {
            samplers.may_end();
        }
        let file = self.sessions[index].file.try_clone()?;
        let last_record_ns = self.sessions[index].last_record_ns;
        let (errno, count) = self.run(&file, place, &call, target.as_deref())?;
        drop(file);
        self.record(&call, errno);
        let mut record_ns = last_record_ns;
        if errno == 0 {
            record_ns = fuzz_check::result(self, place, &call, count, last_record_ns)
                .with_context(|| format!("{call:?} at {place:?} on {before:?}"))?;
        }

        let mut right = Allowed::new();
        for life in lives(from, life(vm.as_ref())) {
            for target_life in lives(target_from, target.as_ref().map_or(Life::Alive, |vm| vm.life())) {
                right.extend(allowed(&call, place, &View { life, target_life, ..before }));
            }
        }
        if let (Some(samplers), Some(begun)) = (samplers, begun) {
            let (may, must) = samplers.began(begun, errno == 0);
            // The shared session samples VM 0, and nobody knows when.
            let may = may || vm.as_ref().is_some_and(|vm| vm.index == 0);
            fuzz_model::with_other_samplers(&mut right, may, must);
        }
        if let Some(samplers) = samplers.filter(|_| ends) {
            samplers.ended(errno == 0);
        }
        let signals = self.waiting.signals.load(Ordering::SeqCst);
        if signals != std::mem::replace(&mut self.signals, signals) {
            // It may have been meant for the read before this call.
            right.insert(libc::EINTR);
        }
        self.judge(&call, place, errno, &right, &format!("{before:?}"))?;
        if errno == 0 {
            let session = &mut self.sessions[index];
            session.learn(&call, target);
            session.last_record_ns = session.last_record_ns.max(record_ns);
        }
        Ok(())
    }

    /// Makes the call with its structures. Returns its errno and, of a read, how
    /// many bytes came; of a poll, its events.
    fn run(&mut self, file: &File, place: Place, step: &Call, target: Option<&Vm>) -> Result<(i32, usize)> {
        let number = match *step {
            Call::Number(number) => number,
            Call::Info => uapi::number::GET_INFO,
            Call::Attach { .. } => uapi::number::ATTACH,
            Call::Detach => uapi::number::DETACH,
            Call::Memslots { .. } => uapi::number::GET_MEMSLOTS,
            Call::Harvest(_) => uapi::number::HARVEST,
            Call::Set(_) => uapi::number::SAMPLE_SET,
            Call::Stats => uapi::number::SAMPLE_STATS,
            Call::Read { bytes } => return self.read(file, place, bytes),
            Call::Poll => return Ok((0, poll(file)?.bits() as usize)),
        };
        let no_vm = File::open("/dev/null")?;
        let vm_fd = target.map_or(no_vm.as_raw_fd(), |vm| vm.fd.as_raw_fd());
        let content = self.content(step, vm_fd);
        let argument = self.places.put(place, &content)?;
        Ok((call(file, number, argument), 0))
    }

    fn read(&mut self, file: &File, place: Place, bytes: usize) -> Result<(i32, usize)> {
        let pointer = self.places.put(place, &[])?;
        // From here on a signal comes, in case nothing else ends the call.
        self.waiting.count.fetch_add(1, Ordering::SeqCst);
        // SAFETY: a room of `Places`, or an address that the kernel must refuse.
        let got = unsafe { libc::read(file.as_raw_fd(), pointer as *mut libc::c_void, bytes) };
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(-1);
        self.waiting.count.fetch_add(1, Ordering::SeqCst);
        Ok(usize::try_from(got).map_or((errno, 0), |got| (0, got)))
    }

    /// The structure that a step hands over.
    fn content(&mut self, step: &Call, vm_fd: RawFd) -> Vec<u8> {
        match *step {
            Call::Info => bytes_of(&KesInfo::default()),
            Call::Stats => bytes_of(&KesSampleStats::default()),
            Call::Attach { target: to, flags, reserved } => {
                let vm_fd = if let Target::Number(number) = to { number } else { vm_fd };
                bytes_of(&KesAttach { vm_fd, flags, reserved: [0, reserved, 0] })
            }
            Call::Memslots { capacity, slots, reserved } => {
                let slots = self.pointer(slots, 0);
                let reserved = [reserved, 0];
                bytes_of(&KesMemslots { slots, capacity, reserved, ..Default::default() })
            }
            Call::Harvest(ref step) => bytes_of(&self.harvest_request(step)),
            Call::Set(SetStep { access, freq_hz, ring_records, flags, reserved }) => {
                let reserved = [0, 0, reserved];
                bytes_of(&KesSampleSet { access, freq_hz, ring_records, flags, reserved })
            }
            Call::Detach | Call::Number(_) | Call::Read { .. } | Call::Poll => vec![0; 512],
        }
    }

    /// The address of a buffer; each good one has a room of its own.
    fn pointer(&mut self, buffer: Buffer, room: usize) -> u64 {
        match buffer {
            Buffer::None => 0,
            Buffer::Good | Buffer::At(Place::Good) => self.rooms[room].as_mut_ptr() as u64,
            Buffer::At(Place::Unaligned) => self.rooms[room].as_mut_ptr() as u64 + 1,
            Buffer::At(place) => self.places.address(place),
        }
    }

    fn harvest_request(&mut self, step: &HarvestStep) -> KesHarvest {
        static NODES: [u64; 16] = [1; 16];
        let pointers: [u64; 5] = std::array::from_fn(|index| {
            self.rooms[index].fill(GUARD);
            self.pointer(step.buffers[index], index)
        });
        let nodes = match step.nodes {
            Buffer::Good | Buffer::At(Place::Good | Place::Unaligned | Place::ReadOnly) => {
                NODES.as_ptr() as u64
            }
            other => self.pointer(other, 0),
        };
        KesHarvest {
            gfn_start: step.gfn_start,
            gfn_count: step.gfn_count,
            accessed: pointers[0],
            dirty: pointers[1],
            mapped: pointers[2],
            on_nodes: pointers[3],
            levels: pointers[4],
            nodes,
            nodes_bits: step.nodes_bits,
            flags: step.flags,
            // Nobody waits for 64 TiB of nothing.
            budget_ns: if step.gfn_count > ROOM_PAGES { 1_000_000 } else { 0 },
            reserved: [0, 0, 0, step.reserved],
            ..Default::default()
        }
    }
}

/// The VM that a call names.
fn target_vm(world: &World, call: &Call) -> Option<Arc<Vm>> {
    match *call {
        Call::Attach { target: Target::Vm(index), .. } => Some(world.vm(index)),
        // Until the first one is killed, one that lives.
        Call::Attach { target: Target::DeadVm, .. } => Some(world.dead_vm().unwrap_or_else(|| world.vm(0))),
        _ => None,
    }
}

fn ends_sampling(call: &Call) -> bool {
    matches!(call, Call::Detach | Call::Set(SetStep { freq_hz: 0, .. }))
}

fn poll(file: &File) -> Result<PollFlags> {
    let mut wait = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut wait, PollTimeout::ZERO)?;
    wait[0].revents().context("poll returned unknown events")
}
