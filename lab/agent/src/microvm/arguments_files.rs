// SPDX-License-Identifier: MIT OR Apache-2.0
//! The other system calls on the module's file.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Result, ensure};
use ept_virt_core::uapi::{self, KesSample};
use libc::{EFAULT, EINVAL, EIO, ENODATA, ESPIPE};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::arguments::{Bench, State, open};
use super::places::{FILL, Place};

const RECORD: usize = size_of::<KesSample>();

pub fn all(bench: &mut Bench) -> Result<()> {
    for state in [State::Fresh, State::Attached, State::Orphaned] {
        reads(bench, state)?;
        others(bench, state)?;
    }
    reads_of_records(bench)?;
    closed(bench)
}

/// The errno of a system call, 0 when it succeeds.
fn errno(result: i64) -> i32 {
    if result >= 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(-1) }
}

fn read(file: &File, pointer: u64, bytes: usize) -> i64 {
    // SAFETY: the pointer is a room of `Places`, or one that the kernel must refuse.
    unsafe { libc::read(file.as_raw_fd(), pointer as *mut libc::c_void, bytes) as i64 }
}

/// Nothing is sampled: there is nothing to read, wherever it should go.
fn reads(bench: &mut Bench, state: State) -> Result<()> {
    for place in Place::ALL {
        for bytes in [0, 1, RECORD - 1, RECORD, RECORD + 1, 1 << 20, usize::MAX / 2, usize::MAX] {
            let pointer = bench.places.put(place, &[FILL; RECORD])?;
            let got = errno(read(bench.session(state), pointer, bytes));
            let mut want = vec![if bytes < RECORD { EINVAL } else { ENODATA }];
            if (bytes as isize) < 0 {
                want = vec![EINVAL, EFAULT];
            } else if place.in_kernel() {
                want = vec![EFAULT];
            } else if matches!(place, Place::End | Place::NonCanonical) || bytes > 1 << 20 {
                // Kernels differ in how much of this they look at before the file is asked.
                want.push(EFAULT);
            }
            ensure!(
                want.contains(&got),
                "a read of {bytes} bytes at {place:?} on a session that is {state:?}: errno {got}, \
                 expected {want:?}"
            );
            bench.counted += 1;
        }
    }
    Ok(())
}

/// With records to read: those that can not be handed over stay.
fn reads_of_records(bench: &mut Bench) -> Result<()> {
    uapi::sample_set(&bench.attached, uapi::ACCESS_WRITE, 2000, 0)?;
    for _ in 0..100 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        bench.machine.run_round()?;
        if uapi::sample_stats(&bench.attached)?.unread >= 8 {
            break;
        }
    }
    uapi::sample_set(&bench.attached, 0, 0, 0)?;
    let unread = |bench: &Bench| anyhow::Ok(uapi::sample_stats(&bench.attached)?.unread);
    let first = unread(bench)?;
    ensure!(first >= 8, "{first} records to read");
    for place in Place::ALL.into_iter().filter(|place| !place.writable()) {
        let pointer = bench.places.put(place, &[FILL; RECORD])?;
        let got = errno(read(&bench.attached, pointer, RECORD));
        ensure!(got == EFAULT, "a read of a record at {place:?}: errno {got}");
        ensure!(unread(bench)? == first, "a refused read took a record");
        bench.counted += 1;
    }
    // Whole records only: what is left of the buffer stays as it was.
    for (bytes, records) in [(RECORD, 1), (RECORD + 1, 1), (2 * RECORD - 1, 1), (2 * RECORD, 2)] {
        let (pointer, before) = (bench.places.put(Place::Unaligned, &[])?, unread(bench)?);
        let got = read(&bench.attached, pointer, bytes);
        ensure!(got == (records * RECORD) as i64, "a read of {bytes} bytes returned {got}");
        ensure!(before - unread(bench)? == records as u32, "{records} records were not taken");
        let content = bench.places.get(Place::Unaligned, records * RECORD)?;
        ensure!(content.chunks(RECORD).all(|record| record[RECORD - 1] == 0), "reserved bytes: {content:?}");
        bench.counted += 1;
    }
    Ok(())
}

fn others(bench: &mut Bench, state: State) -> Result<()> {
    let file = bench.session(state);
    let (fd, byte) = (file.as_raw_fd(), [0_u8; 64]);
    let mut room = [0_u8; 64];
    // SAFETY: system calls on an open file with buffers of ours; what mmap would
    // map is not touched.
    let results = unsafe {
        [
            ("write", errno(libc::write(fd, byte.as_ptr().cast(), 64) as i64), EIO),
            ("pwrite", errno(libc::pwrite(fd, byte.as_ptr().cast(), 64, 0) as i64), ESPIPE),
            ("pread", errno(libc::pread(fd, room.as_mut_ptr().cast(), 64, 0) as i64), ESPIPE),
            ("lseek", errno(libc::lseek(fd, 0, libc::SEEK_SET)), ESPIPE),
            (
                "mmap",
                {
                    let at = libc::mmap(std::ptr::null_mut(), 4096, 1, libc::MAP_SHARED, fd, 0);
                    if at == libc::MAP_FAILED { errno(-1) } else { 0 }
                },
                EIO,
            ),
            ("fallocate", errno(libc::fallocate(fd, 0, 0, 4096).into()), ESPIPE),
        ]
    };
    for (what, got, want) in results {
        // Of these the header promises only that they fail.
        let allowed = [want, libc::ENODEV, libc::EOPNOTSUPP, libc::EINVAL, ESPIPE, EIO];
        ensure!(allowed.contains(&got), "{what} on a session that is {state:?}: errno {got}");
    }
    let mut wait = [PollFd::new(file.as_fd(), PollFlags::all())];
    poll(&mut wait, PollTimeout::ZERO)?;
    let events = wait[0].revents().unwrap_or(PollFlags::empty());
    ensure!(events == PollFlags::POLLHUP, "poll on a session that is {state:?}: {events:?}");
    bench.counted += results.len() as u32 + 1;
    Ok(())
}

/// A descriptor that is closed, and one that can do nothing.
fn closed(bench: &mut Bench) -> Result<()> {
    let file = open()?;
    let fd = file.as_raw_fd();
    drop(file);
    // SAFETY: a descriptor that is not open any more; nothing else has opened one
    // since, as this is the only thread.
    let got = errno(unsafe { libc::ioctl(fd, uapi::number::GET_INFO, 8_u64) }.into());
    ensure!(got == libc::EBADF, "a closed session: errno {got}");
    let path = File::options().read(true).custom_flags(libc::O_PATH).open(uapi::PROC_PATH)?;
    let got = super::arguments::call(&path, uapi::number::GET_INFO, 8);
    ensure!(got == libc::EBADF, "a session that is a path only: errno {got}");
    bench.counted += 2;
    Ok(())
}
