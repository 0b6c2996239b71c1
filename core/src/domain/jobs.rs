// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which domains have a job of libvirt under way: a migration, a save, a dump.
//!
//! libvirt may wait half a minute for a QEMU that does not answer before it says
//! anything about its jobs. So they are asked for in a thread of their own, which
//! no one waits for: who wants to know gets what was found last.

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use log::debug;
use virt::connect::Connect;
use virt::domain::JobStats;
use virt::sys;

use super::{open, silence};

/// What is known of jobs.
pub struct Jobs {
    /// The last question, until the thread takes it.
    wanted: Arc<Mutex<Option<Vec<String>>>>,
    /// Wakes the thread; one ring is enough for any number of questions.
    bell: SyncSender<()>,
    busy: Arc<Mutex<BTreeSet<String>>>,
}

impl Jobs {
    /// Starts the thread; it calls `changed` when jobs began or ended.
    pub fn watch(uri: &str, changed: impl Fn() + Send + 'static) -> io::Result<Self> {
        silence();
        let uri = uri.to_owned();
        let mut connection = None;
        Self::start(move |uuid| has_job(&uri, &mut connection, uuid), changed)
    }

    fn start(
        look: impl FnMut(&str) -> bool + Send + 'static,
        changed: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let (bell, rings) = mpsc::sync_channel(1);
        let (wanted, busy) = (Arc::<Mutex<_>>::default(), Arc::default());
        let (asked, found) = (Arc::clone(&wanted), Arc::clone(&busy));
        thread::Builder::new().name("libvirt-jobs".into()).spawn(move || {
            run(&rings, &asked, &found, look, changed);
        })?;
        Ok(Self { wanted, bell, busy })
    }

    /// Has the thread look at the domains with these UUIDs, and no longer at
    /// others.
    pub fn ask(&self, uuids: Vec<String>) {
        *lock(&self.wanted) = Some(uuids);
        // A bell that still rings will do. The thread ends only with us, unless by a
        // fault that was logged.
        let _ = self.bell.try_send(());
    }

    /// Whether the domain had a job when it was looked at last.
    pub fn is_busy(&self, uuid: &str) -> bool {
        lock(&self.busy).contains(uuid)
    }
}

/// What is replaced as a whole is never half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(
    rings: &Receiver<()>,
    wanted: &Mutex<Option<Vec<String>>>,
    busy: &Mutex<BTreeSet<String>>,
    mut look: impl FnMut(&str) -> bool,
    changed: impl Fn(),
) {
    while rings.recv().is_ok() {
        let Some(uuids) = lock(wanted).take() else { continue };
        let found: BTreeSet<String> = uuids.into_iter().filter(|uuid| look(uuid)).collect();
        let mut known = lock(busy);
        let differs = *known != found;
        *known = found;
        drop(known);
        if differs {
            changed();
        }
    }
}

/// Asks libvirt. What it can not tell, as of a domain that migrates in, is no job:
/// dirty logging and the domain's state tell of migrations as well.
fn has_job(uri: &str, connection: &mut Option<Connect>, uuid: &str) -> bool {
    let connected = match connection.take().filter(|known| known.is_alive().unwrap_or(false)) {
        Some(connected) => Ok(connected),
        None => open(uri, true),
    };
    let connected = match connected {
        Ok(connected) => connection.insert(connected),
        Err(error) => {
            debug!("jobs are not known: {error}");
            return false;
        }
    };
    let job = connected.lookup_domain_by_uuid_string(uuid).and_then(|domain| domain.job_info());
    match job {
        Ok(job) => uses_memory(&job),
        Err(error) => {
            debug!("jobs of domain {uuid} are not known: {}", error.message());
            false
        }
    }
}

/// A backup runs for hours, and is about disks alone.
fn uses_memory(job: &JobStats) -> bool {
    let runs = [sys::VIR_DOMAIN_JOB_BOUNDED, sys::VIR_DOMAIN_JOB_UNBOUNDED].contains(&(job.r#type as u32));
    let of_disks = job.mem_total.unwrap_or(0) == 0 && job.disk_total.unwrap_or(0) > 0;
    runs && !of_disks
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn tells_when_jobs_begin_and_end() {
        let (answer, answers) = mpsc::channel::<bool>();
        let (sender, changes) = mpsc::channel();
        let changed = move || {
            let _ = sender.send(());
        };
        let jobs = Jobs::start(move |_| answers.recv().unwrap_or(false), changed).unwrap();
        jobs.ask(vec!["a".into()]);
        // Nobody waits for a domain that does not answer.
        assert!(!jobs.is_busy("a"));
        answer.send(true).unwrap();
        changes.recv_timeout(LONG).unwrap();
        assert!(jobs.is_busy("a") && !jobs.is_busy("b"));
        jobs.ask(vec!["a".into(), "b".into()]);
        answer.send(false).unwrap();
        answer.send(true).unwrap();
        changes.recv_timeout(LONG).unwrap();
        assert!(!jobs.is_busy("a") && jobs.is_busy("b"));
        jobs.ask(Vec::new());
        changes.recv_timeout(LONG).unwrap();
        assert!(!jobs.is_busy("b"));
    }

    #[test]
    fn what_was_asked_while_it_looked_is_one_question() {
        let (answer, answers) = mpsc::channel::<bool>();
        let (sender, looks) = mpsc::channel();
        let look = move |uuid: &str| {
            let _ = sender.send(uuid.to_owned());
            answers.recv().unwrap_or(false)
        };
        let jobs = Jobs::start(look, || {}).unwrap();
        jobs.ask(vec!["a".into()]);
        assert_eq!(looks.recv_timeout(LONG).unwrap(), "a");
        for number in 0..1000 {
            jobs.ask(vec![number.to_string()]);
        }
        answer.send(false).unwrap();
        assert_eq!(looks.recv_timeout(LONG).unwrap(), "999");
        answer.send(false).unwrap();
        drop((jobs, answer));
        assert_eq!(looks.recv_timeout(LONG), Err(mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn a_job_on_memory_counts() {
        let job = |kind: u32, mem_total, disk_total| {
            let (mem_total, disk_total) = (Some(mem_total), Some(disk_total));
            uses_memory(&JobStats { r#type: kind as i32, mem_total, disk_total, ..JobStats::default() })
        };
        assert!(!job(sys::VIR_DOMAIN_JOB_NONE, 0, 0));
        assert!(!job(sys::VIR_DOMAIN_JOB_COMPLETED, 1, 0));
        assert!(job(sys::VIR_DOMAIN_JOB_UNBOUNDED, 0, 0), "a migration that has just begun");
        assert!(job(sys::VIR_DOMAIN_JOB_UNBOUNDED, 1 << 30, 1 << 40));
        assert!(!job(sys::VIR_DOMAIN_JOB_UNBOUNDED, 0, 1 << 40), "a backup");
        assert!(job(sys::VIR_DOMAIN_JOB_BOUNDED, 1, 0));
    }

    /// libvirt's own test driver has no jobs.
    #[test]
    fn what_libvirt_can_not_tell_is_no_job() {
        let mut connection = None;
        for uuid in ["6695eb01-f6a4-8304-79aa-97f2502e193f", "6695eb01-f6a4-8304-79aa-97f2502e1930"] {
            assert!(!has_job("test:///default", &mut connection, uuid));
        }
        assert!(connection.is_some());
        assert!(!has_job("nonsense:///", &mut None, "6695eb01-f6a4-8304-79aa-97f2502e193f"));
    }
}
