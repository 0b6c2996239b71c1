// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hook as libvirt runs it. Whatever the operation, the daemon, the name and
//! the XML: exit 0, empty stdout, and an end.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use common::{DAEMONS, Daemon, GENEROUS, Hook, Scratch, words};

/// What libvirt does with a domain: operation, sub-operation, and EXTRA as
/// libvirt 9.0 and 11.3 give it.
const OPERATIONS: [(&str, &str, [&str; 2]); 9] = [
    ("prepare", "begin", ["-", "-"]),
    ("start", "begin", ["-", "-"]),
    ("started", "begin", ["-", "-"]),
    ("stopped", "end", ["-", "destroyed"]),
    ("release", "end", ["-", "from snapshot"]),
    ("migrate", "begin", ["-", "-"]),
    ("restore", "begin", ["-", "-"]),
    ("reconnect", "begin", ["-", "-"]),
    ("attach", "begin", ["-", "-"]),
];

/// Of which the daemon is told.
const NUDGED: [&str; 5] = ["started", "stopped", "release", "reconnect", "attach"];

/// `ept-virt hook` replaces and removes no file without it.
#[test]
fn its_file_can_be_told_from_those_of_others() {
    let bytes = std::fs::read(env!("CARGO_BIN_EXE_ept-virt-hook")).unwrap();
    let mark = ept_virt_core::wire::HOOK_MARK.as_bytes();
    assert!(bytes.starts_with(b"\x7fELF") && bytes.windows(mark.len()).any(|window| window == mark));
}

#[test]
fn every_operation_ends_well_whatever_the_daemon_does() {
    let xml = b"<domain type='kvm'><name>vm1</name></domain>";
    for kind in DAEMONS {
        let daemon = Daemon::new(kind);
        for (operation, sub, extras) in OPERATIONS {
            for extra in extras {
                let output = daemon.hook().run(&words(&["vm1", operation, sub, extra]), xml);
                let told = String::from_utf8(output.stderr).unwrap();
                let nudged = NUDGED.contains(&operation);
                assert_eq!(
                    told.contains("cannot nudge"),
                    nudged && !kind.takes(),
                    "{kind:?} {operation}: {told}"
                );
                assert!(told.is_empty() || !kind.takes(), "{kind:?} {operation}: {told}");
            }
        }
    }
}

#[test]
fn the_daemon_is_told_in_one_line_and_only_what_it_wants_to_know() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.socket()).unwrap();
    listener.set_nonblocking(true).unwrap();
    for (operation, sub, extras) in OPERATIONS {
        for extra in extras {
            scratch.hook().run(&words(&["vm1", operation, sub, extra]), b"<domain/>");
            let Ok((stream, _)) = listener.accept() else {
                assert!(!NUDGED.contains(&operation), "{operation}");
                continue;
            };
            stream.set_nonblocking(false).unwrap();
            let lines: Vec<String> = BufReader::new(stream).lines().map(Result::unwrap).collect();
            let expected = format!(r#"{{"v":1,"cmd":"nudge","op":"{operation}","domain":"vm1"}}"#);
            assert_eq!(lines, [expected]);
        }
    }
    // Not as libvirt calls it.
    for arguments in [&["vm1"][..], &[], &["vm1", "stardet", "begin", "-"], &["--help"]] {
        scratch.hook().run(&words(arguments), b"");
        assert!(listener.accept().is_err(), "{arguments:?}");
    }
}

#[test]
fn a_path_that_can_not_be_a_socket_is_no_failure() {
    let scratch = Scratch::new();
    fs::write(scratch.path("file"), "").unwrap();
    for path in ["x".repeat(200).as_str(), "file", "file/sock", ""] {
        let hook = Hook { socket: scratch.path(path), ..scratch.hook() };
        let output = hook.run(&words(&["vm1", "started", "begin", "-"]), b"<domain/>");
        assert!(String::from_utf8(output.stderr).unwrap().contains("cannot nudge"), "{path:?}");
    }
}

/// As when a host boots and starts all its domains.
#[test]
fn fifty_domains_at_once_do_not_wait_for_a_slow_daemon() {
    for kind in DAEMONS {
        let daemon = Daemon::new(kind);
        let started_at = Instant::now();
        thread::scope(|scope| {
            for number in 0..50 {
                let hook = daemon.hook();
                scope.spawn(move || {
                    let name = format!("vm{number}");
                    for operation in ["prepare", "started"] {
                        hook.run(&words(&[&name, operation, "begin", "-"]), b"<domain/>");
                    }
                });
            }
        });
        assert!(started_at.elapsed() < 2 * GENEROUS, "{kind:?} took {:?}", started_at.elapsed());
    }
}

#[test]
fn every_nudge_of_fifty_domains_arrives() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.socket()).unwrap();
    thread::scope(|scope| {
        for number in 0..50 {
            let hook = scratch.hook();
            let name = format!("vm{number}");
            scope.spawn(move || hook.run(&words(&[&name, "started", "begin", "-"]), b"<domain/>"));
        }
        let mut told: Vec<String> = (0..50)
            .map(|_| {
                let mut line = String::new();
                BufReader::new(listener.accept().unwrap().0).read_line(&mut line).unwrap();
                line
            })
            .collect();
        told.sort();
        told.dedup();
        assert_eq!(told.len(), 50);
    });
}

#[test]
fn hostile_names_reach_the_daemon_as_one_line() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.socket()).unwrap();
    let long = vec![b'x'; 100_000];
    let worst = vec![0x01; 100_000];
    let names: [&[u8]; 11] = [
        b"",
        b" ",
        b"a\nb\"}",
        b"{\"v\":1}\n",
        b"\xff\xfe/../..",
        b"../../etc/passwd",
        b"--help",
        b"$(reboot);`reboot`",
        b"\x1b]0;x\x07",
        &long,
        &worst,
    ];
    for name in names {
        scratch.hook().run(
            &[OsStr::from_bytes(name), OsStr::new("started"), OsStr::new("begin"), OsStr::new("-")],
            b"not XML \xff\x00",
        );
        let lines: Vec<String> =
            BufReader::new(listener.accept().unwrap().0).lines().map(Result::unwrap).collect();
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert!(line.starts_with(r#"{"v":1,"cmd":"nudge""#) && line.len() < 2000, "{line}");
        scratch.hook().run(
            &[OsStr::from_bytes(name), OsStr::new("prepare"), OsStr::new("begin"), OsStr::new("-")],
            b"<domain/>",
        );
    }
}

/// Reads to the end, so that libvirt can write it all.
#[test]
fn ten_mebibytes_of_xml_are_taken_by_every_operation() {
    let scratch = Scratch::new();
    let xml = format!("<domain><description>{}</description></domain>", "x".repeat(10 << 20));
    for (operation, sub, [extra, _]) in OPERATIONS {
        scratch.hook().run(&words(&["vm1", operation, sub, extra]), xml.as_bytes());
    }
}

/// Each would keep the reader of the XML busy for long, or deep in its stack.
#[test]
fn ten_mebibytes_of_hostile_xml_keep_no_domain_from_starting() {
    const SIZE: usize = 10 << 20;
    let scratch = Scratch::new();
    let namespace = "xmlns='https://ept-virt.org/xmlns/placement/1.0'";
    let fill = |part: &str| part.repeat(SIZE / part.len());
    let count = |part: fn(usize) -> String| (0..SIZE / 12).map(part).collect::<String>();
    for xml in [
        fill("<"),
        fill("<a>"),
        fill("<a/>"),
        fill("&amp;"),
        fill("\0"),
        format!(
            "<domain><metadata><placement {namespace} {}/></metadata></domain>",
            count(|n| format!(" a{n}='x'"))
        ),
        format!(
            "<domain {}>{}</domain>",
            (0..60_000).map(|n| format!(" xmlns:a{n}='{n}'")).collect::<String>(),
            fill("<a xmlns='b'/>")
        ),
        format!("<domain>{}</domain>", fill("<![CDATA[x]]>")),
        format!("<domain>{}</domain>", fill("<!---->")),
        format!("<!DOCTYPE d [<!ENTITY a '{}'>]><domain>{}</domain>", "a".repeat(1 << 20), fill("&a;")),
        format!("<domain><metadata><placement {namespace} mode='{}'/></metadata></domain>", fill("x")),
        format!(
            "<domain><metadata><placement {namespace}>{}</placement></metadata></domain>",
            fill("<dram/>")
        ),
    ] {
        scratch.hook().run(&words(&["vm1", "prepare", "begin", "-"]), xml.as_bytes());
    }
}

#[test]
fn a_writer_that_never_ends_does_not_hold_the_hook() {
    let scratch = Scratch::new();
    for operation in ["started", "prepare", "migrate"] {
        for endless in [true, false] {
            let input = match endless {
                true => fs::File::open("/dev/zero").unwrap().into(),
                false => std::process::Stdio::piped(),
            };
            let started_at = Instant::now();
            let mut child = scratch
                .hook()
                .command(&words(&["vm1", operation, "begin", "-"]))
                .stdin(input)
                .spawn()
                .unwrap();
            // Held open, with a part of an XML in it: wait() would close it.
            let mut open = child.stdin.take();
            if let Some(input) = &mut open {
                input.write_all(b"<domain>").unwrap();
            }
            assert_eq!(child.wait().unwrap().code(), Some(0));
            assert!(started_at.elapsed() < GENEROUS);
        }
    }
}

/// The hook waits no longer than it may, and no shorter than it must: in the
/// fastest of several runs, as the machine may be busy.
#[test]
fn the_limit_is_kept_when_the_backlog_is_full() {
    let daemon = Daemon::new(common::Kind::Full);
    let took = (0..5).map(|_| {
        let started_at = Instant::now();
        daemon.hook().run(&words(&["vm1", "started", "begin", "-"]), b"<domain/>");
        started_at.elapsed()
    });
    let fastest = took.min().unwrap();
    let limit = ept_virt_hook::TIME_LIMIT;
    assert!(fastest >= limit / 2 && fastest < limit + Duration::from_millis(200), "{fastest:?}");
}
