// SPDX-License-Identifier: MIT OR Apache-2.0
//! A test that does not end: what its threads, and those of the module, wait for.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Runs `test`. If it takes longer than `limit`, `tell` is given the kernel stacks of
/// this process's threads and of the module's, while `test` still runs.
pub fn watch<T>(limit: Duration, tell: impl FnOnce(String) + Send, test: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        let (ended, watched) = channel::<()>();
        scope.spawn(move || {
            // The sender is dropped when the test has ended.
            if watched.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                tell(format!("no end after {} s\n{}", limit.as_secs(), stacks()));
            }
        });
        let result = test();
        drop(ended);
        result
    })
}

/// The name, the state and the kernel stack of each thread that may be at fault.
fn stacks() -> String {
    let mut text = String::new();
    for task in own_threads().into_iter().chain(module_threads()) {
        let read = |file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
        // A String takes whatever is written.
        let _ = writeln!(
            text,
            "{} {}, system call {}{}",
            task.display(),
            read("comm").trim(),
            read("syscall"),
            read("stack")
        );
    }
    text
}

fn own_threads() -> Vec<PathBuf> {
    directories(Path::new("/proc/self/task"))
}

fn module_threads() -> Vec<PathBuf> {
    let mut all = directories(Path::new("/proc"));
    all.retain(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("kes-")));
    all
}

fn directories(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn only_what_does_not_end_is_told_of() {
        let told = AtomicBool::new(false);
        let tell = |text: String| {
            assert!(text.contains("/proc/self/task/"), "{text}");
            told.store(true, Ordering::SeqCst);
        };
        assert_eq!(watch(Duration::from_secs(60), tell, || 7), 7);
        assert!(!told.load(Ordering::SeqCst));
        let wait = || {
            while !told.load(Ordering::SeqCst) {
                thread::yield_now();
            }
        };
        watch(Duration::from_millis(5), tell, wait);
    }
}
