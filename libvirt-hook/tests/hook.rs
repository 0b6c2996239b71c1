// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hook as libvirt runs it. Whatever the daemon does: exit 0, empty stdout,
//! and an end.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Above the hook's own limit of 200 ms, for a machine that is busy.
const GENEROUS: Duration = Duration::from_secs(5);

/// A directory that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ept-virt-hook-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("sock")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs the hook and checks what must hold always.
fn run(socket: &Path, arguments: &[&OsStr], xml: &[u8]) -> Output {
    let started = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ept-virt-hook"))
        .args(arguments)
        .env("EPT_VIRT_SOCKET", socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The hook may end before it has read all.
    let _ = child.stdin.take().unwrap().write_all(xml);
    let output = child.wait_with_output().unwrap();
    assert!(started.elapsed() < GENEROUS, "took {:?}", started.elapsed());
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(output.stdout, b"");
    output
}

/// Runs the hook before a start, on the host below `root`; its exit code and stderr.
fn prepare(root: &Path, socket: &Path, xml: &str) -> (Option<i32>, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ept-virt-hook"))
        .args(["vm1", "prepare", "begin", "-"])
        .env("EPT_VIRT_SOCKET", socket)
        .env("EPT_VIRT_ROOT", root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(xml.as_bytes());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn started(domain: &OsStr) -> [&OsStr; 4] {
    [domain, OsStr::new("started"), OsStr::new("begin"), OsStr::new("-")]
}

/// `ept-virt hook` replaces and removes no file without it.
#[test]
fn its_file_can_be_told_from_those_of_others() {
    let bytes = std::fs::read(env!("CARGO_BIN_EXE_ept-virt-hook")).unwrap();
    let mark = ept_virt_core::wire::HOOK_MARK.as_bytes();
    assert!(bytes.starts_with(b"\x7fELF") && bytes.windows(mark.len()).any(|window| window == mark));
}

#[test]
fn sends_one_line_to_the_daemon() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.socket()).unwrap();
    let output = run(&scratch.socket(), &started(OsStr::new("vm1")), b"<domain/>");
    assert_eq!(output.stderr, b"");
    let mut lines = BufReader::new(listener.accept().unwrap().0).lines();
    let line = lines.next().unwrap().unwrap();
    assert_eq!(line, r#"{"v":1,"cmd":"nudge","op":"started","domain":"vm1"}"#);
    assert!(lines.next().is_none());
}

#[test]
fn no_daemon_is_no_failure() {
    let scratch = Scratch::new();
    let output = run(&scratch.socket(), &started(OsStr::new("vm1")), b"<domain/>");
    assert!(String::from_utf8(output.stderr).unwrap().contains("cannot nudge"));
    // Nor is a socket that nobody listens on any more, nor an impossible path.
    drop(UnixListener::bind(scratch.socket()).unwrap());
    run(&scratch.socket(), &started(OsStr::new("vm1")), b"<domain/>");
    run(&scratch.0.join("x".repeat(200)), &started(OsStr::new("vm1")), b"");
}

#[test]
fn a_daemon_that_never_accepts_does_not_hold_the_hook() {
    let scratch = Scratch::new();
    let _listener = UnixListener::bind(scratch.socket()).unwrap();
    let mut waiting = Vec::new();
    // Fill the backlog, until a further connect would block.
    let full = Instant::now();
    loop {
        let (sender, receiver) = std::sync::mpsc::channel();
        let path = scratch.socket();
        std::thread::spawn(move || sender.send(UnixStream::connect(path)));
        match receiver.recv_timeout(Duration::from_millis(300)) {
            Ok(stream) => waiting.push(stream.unwrap()),
            Err(_) => break,
        }
        assert!(full.elapsed() < Duration::from_secs(60), "the backlog never fills");
    }
    let output = run(&scratch.socket(), &started(OsStr::new("vm1")), b"<domain/>");
    assert!(String::from_utf8(output.stderr).unwrap().contains("cannot nudge"));
}

#[test]
fn survives_hostile_names_and_xml() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.socket()).unwrap();
    let long = vec![b'x'; 100_000];
    let names: [&[u8]; 5] = [b"", b"a\nb\"}", b"\xff\xfe/../..", b"--help", &long];
    for name in names {
        run(&scratch.socket(), &started(OsStr::from_bytes(name)), b"not XML \xff\x00");
        let mut line = String::new();
        BufReader::new(listener.accept().unwrap().0).read_line(&mut line).unwrap();
        assert!(line.starts_with(r#"{"v":1,"cmd":"nudge""#) && line.len() < 2000, "{line}");
    }
    run(&scratch.socket(), &started(OsStr::new("vm1")), &vec![b'<'; 10 << 20]);
}

#[test]
fn a_writer_that_never_ends_does_not_hold_the_hook() {
    let scratch = Scratch::new();
    for input in [Stdio::from(fs::File::open("/dev/zero").unwrap()), Stdio::piped()] {
        let started_at = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_ept-virt-hook"))
            .args(started(OsStr::new("vm1")))
            .env("EPT_VIRT_SOCKET", scratch.socket())
            .stdin(input)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Held open: wait() would close it.
        let _open = child.stdin.take();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(started_at.elapsed() < GENEROUS);
    }
}

#[test]
fn other_operations_and_wrong_calls_send_nothing() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.socket()).unwrap();
    listener.set_nonblocking(true).unwrap();
    for arguments in [
        &["vm1", "migrate", "begin", "-"][..],
        &["vm1", "restore", "begin", "-"],
        &["vm1", "prepare", "begin", "-"],
        &["vm1"],
        &[],
    ] {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        run(&scratch.socket(), &arguments, b"<domain><name>vm1</name></domain>");
        assert!(listener.accept().is_err(), "{arguments:?}");
    }
}

#[test]
fn only_a_required_policy_keeps_a_domain_from_starting() {
    let domain = |attributes: &str| {
        format!(
            "<domain type='kvm'><name>vm1</name><metadata><placement \
             xmlns='https://ept-virt.org/xmlns/placement/1.0' {attributes}/></metadata></domain>"
        )
    };
    let scratch = Scratch::new();
    let (root, socket) = (&scratch.0, scratch.socket());
    for harmless in [domain("mode='observe'"), domain("mode='plase'"), "<domain/>".into(), "<domain".into()] {
        assert_eq!(prepare(root, &socket, &harmless), (Some(0), String::new()), "{harmless}");
    }
    let refused = |attributes: &str, why: &str| {
        let (code, said) = prepare(root, &socket, &domain(attributes));
        assert_eq!(code, Some(1), "{attributes}: {said}");
        assert!(said.contains("is required, and can not be served") && said.contains(why), "{said}");
    };
    refused("required='yes' mode='plase'", "did you mean \"place\"?");
    refused("required='yes'", "modprobe kvm_ept_sample");
    fs::create_dir(root.join("proc")).unwrap();
    fs::write(root.join("proc/kvm_ept_sample"), "").unwrap();
    refused("required='yes'", "systemctl start ept-virt");
    let _daemon = UnixListener::bind(&socket).unwrap();
    assert_eq!(prepare(root, &socket, &domain("required='yes'")), (Some(0), String::new()));
    refused("required='yes' mode='place'", "the host's memory is not known");
    fs::create_dir_all(root.join("etc/ept-virt")).unwrap();
    fs::write(root.join("etc/ept-virt/ept-virt.toml"), "nonsense").unwrap();
    refused("required='yes'", "ept-virt.toml");
    // A broken configuration is no domain's fault.
    assert_eq!(prepare(root, &socket, &domain("mode='place'")), (Some(0), String::new()));
}

/// The largest XML that is still read, and one that is not.
#[test]
fn a_doubt_is_no_veto() {
    let scratch = Scratch::new();
    let head =
        "<domain><metadata><placement xmlns='https://ept-virt.org/xmlns/placement/1.0' required='yes'/>";
    let huge = format!("{head}</metadata><!--{}--></domain>", "x".repeat(17 << 20));
    let (code, said) = prepare(&scratch.0, &scratch.socket(), &huge);
    assert_eq!(code, Some(0));
    assert!(said.contains("could not be read in time"), "{said}");
}
