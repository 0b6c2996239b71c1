// SPDX-License-Identifier: MIT OR Apache-2.0
//! What people asked for beside the policy, kept over a restart of the daemon: who paused
//! a guest does not expect an upgrade to go on with it.
//!
//! One small file for all domains, written by threads of their own: the disk may hang.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind as Io, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use ept_virt_core::process;
use log::warn;
use serde::{Deserialize, Serialize};

use super::files;
use super::state::{Hold, lock};

/// The file's name in the daemon's directory.
const FILE: &str = "holds.json";

/// More than ten thousand domains take. What is longer is none of ours.
const MAX_BYTES: u64 = 1 << 20;

/// What is asked of one run of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    /// libvirt's number of this run: the next has another, but for one that comes after
    /// both daemons, ours and libvirt's, were away for its whole end and beginning.
    id: u32,
    hold: Hold,
}

/// The file's content.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    /// The boot of the host in which it was written; libvirt counts anew in each.
    boot_id: String,
    /// By UUID; domains of which nothing is asked are not there.
    domains: BTreeMap<String, Held>,
    /// How often it has been changed by this daemon.
    #[serde(skip)]
    changes: u64,
}

/// What is asked of all domains.
pub struct Holds {
    dir: PathBuf,
    content: Mutex<Content>,
    /// How many changes the file has. Locked while it is written, before `content`, so
    /// that the newest is written last.
    written: Mutex<u64>,
    /// A thread waits to write, and will find what has changed until then.
    waiting: AtomicBool,
}

impl Holds {
    /// Reads what an earlier daemon left in its directory. What can not be used is told,
    /// and holds nothing up.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let boot_id = process::boot_id()?;
        let path = dir.join(FILE);
        let found = match read(&path) {
            Ok(found) => found.filter(|found| found.boot_id == boot_id),
            Err(error) => {
                warn!("what was paused or stopped is not known any more: {}: {error}", path.display());
                None
            }
        };
        let domains = found.map(|found| found.domains).unwrap_or_default();
        let content = Mutex::new(Content { boot_id, domains, changes: 0 });
        Ok(Self { dir: dir.to_owned(), content, written: Mutex::default(), waiting: AtomicBool::new(false) })
    }

    /// What was asked of this run of a domain.
    pub fn of(&self, uuid: &str, id: Option<u32>) -> Hold {
        let content = lock(&self.content);
        let held = content.domains.get(uuid).filter(|held| Some(held.id) == id);
        held.map_or(Hold::None, |held| held.hold)
    }

    /// Keeps what is asked of a run of a domain.
    pub fn keep(self: &Arc<Self>, uuid: &str, id: Option<u32>, hold: Hold) {
        let held = id.filter(|_| hold != Hold::None).map(|id| Held { id, hold });
        self.change(|domains| match held {
            Some(held) => domains.insert(uuid.to_owned(), held) != Some(held),
            None => domains.remove(uuid).is_some(),
        });
    }

    /// Forgets domains that do not run.
    pub fn retain(self: &Arc<Self>, running: &BTreeSet<String>) {
        self.change(|domains| {
            let before = domains.len();
            domains.retain(|uuid, _| running.contains(uuid));
            domains.len() != before
        });
    }

    /// Changes the content, and has it written if that changed anything.
    fn change(self: &Arc<Self>, change: impl FnOnce(&mut BTreeMap<String, Held>) -> bool) {
        let mut content = lock(&self.content);
        if !change(&mut content.domains) {
            return;
        }
        content.changes += 1;
        drop(content);
        if self.waiting.swap(true, Ordering::Relaxed) {
            return;
        }
        let holds = Arc::clone(self);
        let spawned = thread::Builder::new().name("holds".into()).spawn(move || holds.write());
        if let Err(error) = spawned {
            warn!("cannot start a thread that keeps what is paused: {error}");
            self.waiting.store(false, Ordering::Relaxed);
        }
    }

    /// Writes what has changed since the last time.
    pub fn write(&self) {
        let mut written = lock(&self.written);
        // Before the content is locked: who changes it later has to see this.
        self.waiting.store(false, Ordering::Relaxed);
        let content = lock(&self.content);
        let (changes, text) = (content.changes, serde_json::to_vec(&*content));
        drop(content);
        if changes == *written {
            return;
        }
        let path = self.dir.join(FILE);
        match text.map_err(Into::into).and_then(|text| replace(&path, &text)) {
            Ok(()) => *written = changes,
            Err(error) => {
                warn!("what is paused or stopped now is lost with this daemon: {}: {error}", path.display());
            }
        }
    }
}

fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    files::create_anew(&new)?.write_all(text)?;
    std::fs::rename(&new, path)
}

/// What a file says; none without one.
fn read(path: &Path) -> io::Result<Option<Content>> {
    let file = match files::open(path) {
        Err(error) if error.kind() == Io::NotFound => return Ok(None),
        file => file?,
    };
    let mut text = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::scratch::Scratch;

    const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

    struct Dir(Scratch);

    impl Dir {
        fn open(&self) -> Arc<Holds> {
            Arc::new(Holds::open(&self.0).unwrap())
        }

        /// The next daemon's, once the file says what is expected.
        fn reopen(&self, id: u32, expected: Hold) -> Arc<Holds> {
            let begun = Instant::now();
            loop {
                let holds = self.open();
                if holds.of(UUID, Some(id)) == expected {
                    return holds;
                }
                assert!(begun.elapsed() < Duration::from_secs(60), "{expected:?} is not kept");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn what_is_asked_of_a_run_outlives_the_daemon() {
        let dir = Dir(Scratch::new());
        dir.open().keep(UUID, Some(3), Hold::Paused);
        let next = dir.reopen(3, Hold::Paused);
        for (uuid, id) in [(UUID, Some(4)), (UUID, None), ("other", Some(3))] {
            assert_eq!(next.of(uuid, id), Hold::None, "{uuid} {id:?}");
        }
        next.keep(UUID, Some(3), Hold::Stopped);
        let next = dir.reopen(3, Hold::Stopped);
        next.keep(UUID, Some(3), Hold::None);
        dir.reopen(3, Hold::None);
    }

    #[test]
    fn the_newest_is_written_last() {
        let dir = Dir(Scratch::new());
        let holds = dir.open();
        for round in 0..50 {
            holds.keep(UUID, Some(round), Hold::Paused);
            holds.keep(UUID, Some(round), Hold::Stopped);
        }
        // As at the daemon's end, whichever threads have not come to it yet.
        holds.write();
        assert_eq!(dir.open().of(UUID, Some(49)), Hold::Stopped);
        while Arc::strong_count(&holds) > 1 {
            thread::yield_now();
        }
        assert_eq!(dir.open().of(UUID, Some(49)), Hold::Stopped);
        let names = fs::read_dir(&*dir.0).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.collect::<Vec<_>>(), [FILE]);
    }

    #[test]
    fn who_ended_is_forgotten() {
        let dir = Dir(Scratch::new());
        let holds = dir.open();
        holds.keep(UUID, Some(3), Hold::Paused);
        holds.retain(&BTreeSet::from([UUID.to_owned()]));
        assert_eq!(holds.of(UUID, Some(3)), Hold::Paused);
        holds.retain(&BTreeSet::new());
        assert_eq!(holds.of(UUID, Some(3)), Hold::None);
    }

    #[test]
    fn a_file_of_no_use_holds_nothing_up() {
        let dir = Dir(Scratch::new());
        let other_boot =
            format!(r#"{{"boot_id":"other","domains":{{"{UUID}":{{"id":3,"hold":"paused"}}}}}}"#);
        for text in ["", "[]", &other_boot, &"x".repeat(3 << 20)] {
            fs::write(dir.0.join(FILE), text).unwrap();
            assert_eq!(dir.open().of(UUID, Some(3)), Hold::None, "{text:.80}");
        }
        dir.open().keep(UUID, Some(3), Hold::Paused);
        dir.reopen(3, Hold::Paused);
    }
}
