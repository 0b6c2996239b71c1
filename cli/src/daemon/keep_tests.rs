// SPDX-License-Identifier: MIT OR Apache-2.0

use std::os::unix::fs::PermissionsExt;

use ept_virt_core::sampler::MemSlot;

use super::*;
use crate::scratch::Scratch;

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";
const HALF_LIFE: Duration = Duration::from_secs(30);
const PARAMS: HeatParams = HeatParams { half_life: HALF_LIFE, delay: Duration::from_secs(1) };
const HARVESTED_AT: Duration = Duration::from_secs(1000);

/// A keeper in a directory of its own.
struct Test {
    _scratch: Scratch,
    dir: PathBuf,
    keeper: Option<Arc<Keeper>>,
}

impl Test {
    fn new() -> Self {
        let scratch = Scratch::new();
        let dir = scratch.join("state");
        let keeper = Some(Arc::new(Keeper::open(&dir).unwrap()));
        Self { _scratch: scratch, dir, keeper }
    }

    fn file(&self) -> HeatFile {
        self.file_of(process(4711))
    }

    fn file_of(&self, process: ProcessIdentity) -> HeatFile {
        self.keeper.as_ref().unwrap().file(UUID, process)
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.dir.join(format!("{UUID}{suffix}"))
    }

    /// Names in the directory, without the lock.
    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.retain(|name| name != "lock");
        names.sort();
        names
    }
}

fn process(pid: i32) -> ProcessIdentity {
    ProcessIdentity { boot_id: "d7d2e4f0-8f0c-4a83-b0cd-2f3a8f3dbb1e".into(), pid, started_ticks: 99 }
}

/// Memory of two slots, one larger than a block.
fn memory() -> Mutex<GuestMemory> {
    let mut memory = GuestMemory::new(PARAMS);
    let slot = |gfn_start, page_count| MemSlot {
        gfn_start,
        page_count,
        hva: 0x7f00_0000_0000 + gfn_start * 4096,
        id: 0,
        read_only: false,
        dirty_log: false,
    };
    memory.adopt(1, vec![slot(0, 100), slot(1 << 20, BLOCK_CELLS as u64 + 10)]);
    let cells = |count: usize| (0..count).map(|page| (page * 5) as u16).collect();
    let heat: Vec<(SlotRange, Vec<u16>)> =
        memory.settle().into_iter().map(|slot| (slot, cells(slot.page_count as usize))).collect();
    assert_eq!(memory.recall(heat), 2);
    Mutex::new(memory)
}

fn all(memory: &Mutex<GuestMemory>) -> Vec<(SlotRange, Vec<u16>)> {
    let mut memory = lock(memory);
    let copy = |slot: SlotRange, memory: &GuestMemory| {
        let mut cells = Vec::new();
        assert!(memory.copy_cells(&slot, 0..usize::MAX, &mut cells));
        (slot, cells)
    };
    let slots = memory.settle();
    slots.into_iter().map(|slot| copy(slot, &memory)).collect()
}

fn recall(file: &HeatFile, age: Duration) -> Option<Recalled> {
    file.recall(HALF_LIFE, HARVESTED_AT + age, |_| true)
}

#[test]
fn what_was_kept_comes_back() {
    let test = Test::new();
    let memory = memory();
    assert!(recall(&test.file(), Duration::ZERO).is_none());
    let length = test.file().save(HARVESTED_AT, &memory, Haste::Last).unwrap();
    let metadata = fs::metadata(test.path(".heat")).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (length, 0o600));
    assert_eq!(test.names(), [format!("{UUID}.heat")]);
    assert_eq!(fs::metadata(&test.dir).unwrap().permissions().mode() & 0o777, 0o700);
    for _ in 0..2 {
        let recalled = recall(&test.file(), HALF_LIFE).unwrap();
        assert_eq!(recalled.harvested_at, HARVESTED_AT);
        assert!(recalled.slots == all(&memory));
    }
    // It is written anew as often as one likes.
    test.file().save(HARVESTED_AT * 2, &memory, Haste::Last).unwrap();
    let later = test.file().recall(HALF_LIFE, HARVESTED_AT * 2, |slot| slot.gfn_start == 0).unwrap();
    assert_eq!((later.harvested_at, later.slots.len()), (HARVESTED_AT * 2, 1));
}

#[test]
fn heat_of_another_time_or_process_is_not_taken() {
    let test = Test::new();
    let memory = memory();
    let gone_after = |age: Duration, file: HeatFile| {
        test.file().save(HARVESTED_AT, &memory, Haste::Last).unwrap();
        assert!(recall(&file, age).is_none());
        assert_eq!(test.names(), [""; 0]);
    };
    gone_after(HALF_LIFE + Duration::from_nanos(1), test.file());
    gone_after(Duration::ZERO, test.file_of(process(4712)));
    gone_after(Duration::ZERO, test.file_of(ProcessIdentity { started_ticks: 100, ..process(4711) }));
    let other_boot = ProcessIdentity { boot_id: "another".into(), ..process(4711) };
    gone_after(Duration::ZERO, test.file_of(other_boot));
    // From the future, as no file of this boot can be.
    test.file().save(HARVESTED_AT, &memory, Haste::Last).unwrap();
    assert!(test.file().recall(HALF_LIFE, HARVESTED_AT / 2, |_| true).is_none());
    assert_eq!(test.names(), [""; 0]);
    // Of other memory.
    test.file().save(HARVESTED_AT, &memory, Haste::Last).unwrap();
    assert!(test.file().recall(HALF_LIFE, HARVESTED_AT, |slot| slot.gfn_start == 1).is_none());
    assert_eq!(test.names(), [""; 0]);
}

#[test]
fn a_damaged_file_is_set_aside() {
    let test = Test::new();
    let memory = memory();
    test.file().save(HARVESTED_AT, &memory, Haste::Last).unwrap();
    let good = fs::read(test.path(".heat")).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    let mut other_version = good.clone();
    other_version[7] += 1;
    for bad in
        [&flipped, &good[..good.len() / 2].to_vec(), &Vec::new(), &b"nonsense".to_vec(), &other_version]
    {
        fs::write(test.path(".heat"), bad).unwrap();
        assert!(recall(&test.file(), Duration::ZERO).is_none());
        assert_eq!(test.names(), [format!("{UUID}.heat.bad")]);
        assert_eq!(fs::read(test.path(".heat.bad")).unwrap(), *bad);
    }
    // It goes on as if nothing had been.
    test.file().save(HARVESTED_AT, &memory, Haste::Last).unwrap();
    assert!(recall(&test.file(), Duration::ZERO).is_some());
}

#[test]
fn files_of_domains_that_ended_are_removed() {
    let test = Test::new();
    let other = "11111111-f6a4-8304-79aa-97f2502e193f";
    for name in [".heat", ".heat.new", ".heat.bad"].map(|suffix| format!("{other}{suffix}")) {
        fs::write(test.dir.join(name), "x").unwrap();
    }
    fs::write(test.dir.join("notes.txt"), "not ours").unwrap();
    test.file().save(HARVESTED_AT, &memory(), Haste::Last).unwrap();
    let keeper = test.keeper.as_ref().unwrap();
    let retain = |running: &[&str], tidy| {
        let begun = keeper.retain(running.iter().map(|uuid| String::from(*uuid)).collect(), tidy);
        while keeper.tidying.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
        begun
    };
    assert!(retain(&[UUID, other], true));
    assert_eq!(test.names().len(), 5);
    assert!(!retain(&[UUID], false), "only noted");
    assert_eq!(test.names().len(), 5);
    assert!(retain(&[UUID], true));
    assert_eq!(test.names(), [format!("{UUID}.heat"), "notes.txt".into()]);
    // One that hangs is not joined by others, and has to be asked for again.
    keeper.tidying.store(true, Ordering::Relaxed);
    assert!(!keeper.retain(BTreeSet::new(), true));
    assert_eq!(test.names().len(), 2);
}

#[test]
fn a_directory_has_one_keeper() {
    let mut test = Test::new();
    let second = Keeper::open(&test.dir).map(drop).unwrap_err();
    assert!(second.to_string().contains("another daemon"), "{second}");
    test.keeper = None;
    test.keeper = Some(Arc::new(Keeper::open(&test.dir).unwrap()));
    assert!(Keeper::open(Path::new("/proc/ept-virt")).is_err());
    test.keeper = None;
    fs::set_permissions(&test.dir, fs::Permissions::from_mode(0o777)).unwrap();
    let error = Keeper::open(&test.dir).map(drop).unwrap_err();
    assert!(error.to_string().contains("others may write"), "{error}");
}

#[test]
fn nothing_half_written_is_left() {
    let test = Test::new();
    let file = test.file();
    let memory = memory();
    let header = Header {
        uuid: UUID.into(),
        process: process(4711),
        harvested_at: HARVESTED_AT,
        slots: vec![SlotRange { gfn_start: 7, page_count: 7 }],
    };
    let error = file.encode(&header, &memory, None).unwrap_err();
    assert!(error.to_string().contains("slots have just changed"), "{error}");
    // A directory in its place: the file can not be renamed to it.
    fs::create_dir(test.path(".heat")).unwrap();
    assert!(file.save(HARVESTED_AT, &memory, Haste::Last).is_err());
    assert_eq!(test.names(), [format!("{UUID}.heat")]);
    // Whatever is wrong with a disk, the guest is observed.
    let mut saver = Saver::new(test.file(), Duration::ZERO);
    let memory = Arc::new(memory);
    saver.save_if_due(HALF_LIFE, PARAMS, Some(HARVESTED_AT), &memory);
    saver.join();
    assert!(saver.failed);
    fs::remove_dir(test.path(".heat")).unwrap();
    saver.finish(Some(HARVESTED_AT), &memory);
    assert_eq!(test.names(), [format!("{UUID}.heat")]);
}

/// As when a worker was left to itself, and the next one writes the same file.
#[test]
fn who_is_no_longer_wanted_writes_nothing() {
    let test = Test::new();
    let (file, memory) = (test.file(), memory());
    file.void.store(true, Ordering::Relaxed);
    fs::write(test.path(".heat.new"), "another one's").unwrap();
    assert!(file.save(HARVESTED_AT, &memory, Haste::Last).is_err());
    assert_eq!(fs::read(test.path(".heat.new")).unwrap(), b"another one's");
    // What is being written is never written to by a second one.
    let mut before = File::create(test.path(".heat.new")).unwrap();
    test.file().save(HARVESTED_AT, &memory, Haste::Last).unwrap();
    io::Write::write_all(&mut before, b"nonsense").unwrap();
    assert!(recall(&test.file(), Duration::ZERO).is_some());
}

#[test]
fn heat_is_written_when_it_is_due() {
    let test = Test::new();
    let memory = Arc::new(memory());
    let mut saver = Saver::new(test.file(), HARVESTED_AT);
    saver.save_if_due(HARVESTED_AT + HALF_LIFE, PARAMS, None, &memory);
    saver.save_if_due(HARVESTED_AT + HALF_LIFE / 3, PARAMS, Some(HARVESTED_AT), &memory);
    saver.join();
    assert_eq!(test.names(), [""; 0]);
    saver.save_if_due(HARVESTED_AT + HALF_LIFE, PARAMS, Some(HARVESTED_AT), &memory);
    saver.join();
    assert_eq!(test.names(), [format!("{UUID}.heat")]);
    assert_eq!(pause(HALF_LIFE, 0), HALF_LIFE / 2, "what a crash leaves is not too old");
    assert_eq!(pause(Duration::from_millis(100), 0), SHORTEST_PAUSE);
    assert_eq!(pause(HALF_LIFE, 1 << 30), Duration::from_secs(256));
}

#[test]
fn all_domains_together_keep_to_one_rate() {
    let test = Test::new();
    let keeper = test.keeper.as_ref().unwrap();
    // An hour's bytes at once leave a debt to all.
    assert_eq!(keeper.pace(HOST_WRITE_RATE * 3600), None);
    let wait = keeper.pace(1).unwrap();
    assert!(wait > Duration::ZERO && wait <= Duration::from_secs(3600), "{wait:?}");
    // As if others had written for years.
    *lock(&keeper.bucket) = TokenBucket::new(1, Duration::ZERO);
    assert_eq!(keeper.pace(1 << 40), None);
    let file = Arc::new(test.file());
    let paced = thread::spawn({
        let file = Arc::clone(&file);
        move || file.save(HARVESTED_AT, &memory(), Haste::Paced { delay: HALF_LIFE })
    });
    while !test.path(".heat.new").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    file.void.store(true, Ordering::Relaxed);
    assert!(paced.join().unwrap().is_err());
    assert!(!test.path(".heat").exists());
    // Somebody waits for the last write, so that waits for nothing.
    let mut saver = Saver::new(test.file(), Duration::ZERO);
    let memory = Arc::new(memory());
    saver.save_if_due(HARVESTED_AT, PARAMS, Some(HARVESTED_AT), &memory);
    assert!(saver.writing.is_some());
    saver.finish(Some(HARVESTED_AT), &memory);
    assert!(recall(&test.file(), Duration::ZERO).is_some());
}

#[test]
fn cells_of_one_file_are_of_one_time() {
    assert_eq!(Haste::Paced { delay: HALF_LIFE }.skew(), Some(HALF_LIFE / 2));
    assert_eq!(Haste::Paced { delay: Duration::ZERO }.skew(), Some(SMALLEST_SKEW));
    assert_eq!(Haste::Last.skew(), None);
    let (test, memory) = (Test::new(), memory());
    let slots = lock(&memory).settle();
    let header = Header { uuid: UUID.into(), process: process(4711), harvested_at: HARVESTED_AT, slots };
    let error = test.file().encode(&header, &memory, Some(Duration::ZERO)).unwrap_err();
    assert!(error.to_string().contains("half of the policy's delay"), "{error}");
    assert!(test.file().encode(&header, &memory, None).is_ok());
}

/// On a file system of its own that holds less than the file takes.
#[test]
fn a_full_disk_costs_the_kept_heat_alone() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    const NONE: Option<&str> = None;
    let mut test = Test::new();
    test.keeper = None;
    // A mount that this thread alone sees.
    let is_mounted = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE))
        .and_then(|()| {
            mount(Some("tmpfs"), &test.dir, Some("tmpfs"), MsFlags::empty(), Some("size=16k,mode=0700"))
        });
    if let Err(errno) = is_mounted {
        println!("SKIP a_full_disk_costs_the_kept_heat_alone: cannot mount a small file system: {errno}");
        return;
    }
    let keeper = Arc::new(Keeper::open(&test.dir).unwrap());
    let (file, memory) = (keeper.file(UUID, process(4711)), memory());
    let error = file.save(HARVESTED_AT, &memory, Haste::Last).unwrap_err();
    assert_eq!(error.kind(), Io::StorageFull);
    assert_eq!(test.names(), [""; 0], "nothing half written is left");
    let mut saver = Saver::new(file, Duration::ZERO);
    // The last write fails as well, and says so; who observes the guest gets no error.
    saver.take_note(Err(error));
    assert!(saver.failed);
    saver.finish(Some(HARVESTED_AT), &memory);
    drop(keeper);
    umount2(&test.dir, MntFlags::MNT_DETACH).unwrap();
}
