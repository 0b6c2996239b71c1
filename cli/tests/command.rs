// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program as a shell sees it: exit codes, closed pipes, colour.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ept-virt");

fn fixture(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

/// A daemon that answers every request with one line made of a fixture.
struct Daemon(PathBuf);

impl Daemon {
    fn answering(name: &str, reply: &str, json: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ept-virt-command-{}-{name}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let mut answer: serde_json::Value = serde_json::from_str(json).unwrap();
        answer["v"] = 1.into();
        answer["reply"] = reply.into();
        let answer = answer.to_string() + "\n";
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let mut request = String::new();
                stream.read_line(&mut request).unwrap();
                let _ = stream.get_mut().write_all(answer.as_bytes());
            }
        });
        Daemon(path)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--socket").arg(&self.0).args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn output_into_a_pipe_is_plain_and_json_is_one_line() {
    let daemon = Daemon::answering("plain", "status", &fixture("busy.json"));
    let output = daemon.run(&["status"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stdout), fixture("busy-status.txt"));
    assert_eq!(text(&daemon.run(&["list"]).stdout), fixture("busy-list.txt"));

    let json = daemon.run(&["status", "--json"]).stdout;
    assert_eq!(text(&json).lines().count(), 1);
    let same = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(same(text(&json)), same(&fixture("busy.json")));
    assert_eq!(same(text(&daemon.run(&["list", "--json"]).stdout)), same(&fixture("busy-list.json")));
}

#[test]
fn a_map_is_shown_and_colour_can_be_forced() {
    let daemon = Daemon::answering("map", "map", &fixture("map.json"));
    assert_eq!(text(&daemon.run(&["map", "web-1"]).stdout), fixture("map.txt"));
    let forced = daemon.run(&["map", "web-1", "--color", "always"]).stdout;
    assert!(text(&forced).contains("\x1b[48;5;226m"));
}

#[test]
fn failures_have_their_exit_codes_and_say_what_to_do() {
    let error = r#"{"kind":"no-domain","message":"no domain is called \"x\""}"#;
    let daemon = Daemon::answering("codes", "error", error);
    let output = daemon.run(&["status", "x"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""));
    assert_eq!(
        text(&output.stderr),
        "ept-virt: no domain is called \"x\": `ept-virt list` shows the running domains\n"
    );

    let nobody = Command::new(PROGRAM).args(["--socket", "/nonexistent/socket", "list"]).output().unwrap();
    assert_eq!(nobody.status.code(), Some(2));
    assert!(text(&nobody.stderr).contains("ept-virt daemon"));

    assert_eq!(daemon.run(&["sttaus"]).status.code(), Some(2));
    assert_eq!(daemon.run(&["--help"]).status.code(), Some(0));
    assert!(text(&daemon.run(&["--help"]).stdout).contains("Exit codes:"));
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let mut json: serde_json::Value = serde_json::from_str(&fixture("map.json")).unwrap();
    // More than a pipe holds.
    let run = json["runs"][0].clone();
    json["runs"] = vec![run; 20_000].into();
    let daemon = Daemon::answering("pipe", "map", &json.to_string());
    let mut child =
        daemon.command(&["map", "x"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
}

#[test]
fn watching_goes_on_until_the_reader_has_enough() {
    let daemon = Daemon::answering("watch", "status", &fixture("busy.json"));
    let watch =
        |args: &[&str]| daemon.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // For programs: a line each time.
    let mut child = watch(&["status", "--watch=0.1", "--json"]);
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    for _ in 0..3 {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap()["daemon"]["pid"], 812);
    }
    drop(reader);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));

    // For people who keep it: plain, with an empty line between. Ctrl-C is no failure.
    let mut child = watch(&["status", "--watch=0.1"]);
    let once = fixture("busy-status.txt");
    let expected = format!("{once}\n{once}");
    let mut first = vec![0; expected.len()];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(text(&first), expected);
    signal(&child, nix::sys::signal::Signal::SIGINT);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    assert!(output.stdout.is_empty() || output.stdout.ends_with(b"\n"));
}

fn signal(child: &std::process::Child, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
}

#[test]
fn domains_are_shown_once_and_watching_ends_without_an_answer() {
    let daemon = Daemon::answering("several", "status", &fixture("busy.json"));
    let json = daemon.run(&["status", "web-1", "12", "--json"]).stdout;
    let status: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(status["domains"].as_array().unwrap().len(), 3);

    let error = r#"{"kind":"no-domain","message":"no domain is called \"x\""}"#;
    let daemon = Daemon::answering("gone", "error", error);
    let output = daemon.run(&["status", "x", "--watch"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""));
    for wrong in ["--watch=0", "--watch=x", "--watch=1e9"] {
        assert_eq!(daemon.run(&["status", wrong]).status.code(), Some(2));
    }
}

/// libvirt's own test driver has a domain "test" with the id 1, and forgets all
/// that was changed.
#[test]
fn libvirt_is_named_as_virsh_has_it() {
    let run = |args: &[&str], variable: &str| {
        Command::new(PROGRAM).args(args).env("LIBVIRT_DEFAULT_URI", variable).output().unwrap()
    };
    let show = ["policy", "show", "1"];
    assert_eq!(run(&show, "test:///default").status.code(), Some(0));
    for args in [
        ["-c", "test:///default", "policy", "show", "test"],
        ["policy", "-c", "test:///default", "show", "6695eb01-f6a4-8304-79aa-97f2502e193f"],
        ["policy", "show", "test", "--connect", "test:///default"],
    ] {
        assert_eq!(run(&args, "qemu+unix:///system?socket=/nonexistent").status.code(), Some(0), "{args:?}");
    }
    let output = run(&show, "qemu+unix:///system?socket=/nonexistent");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("Is libvirtd or virtqemud running?"));
    let output = run(&["daemon", "--socket", "/proc/none", "--reconcile-interval", "1"], "test:///default");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_host_without_a_daemon_is_not_well() {
    let args = ["--socket", "/nonexistent/socket", "-c", "test:///default", "doctor", "--json"];
    let output = Command::new(PROGRAM).args(args).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), ""));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["verdict"], "fail");
    let verdict = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|check| check["check"] == name).unwrap()["verdict"].clone()
    };
    assert_eq!((verdict("daemon"), verdict("libvirt")), ("fail".into(), "ok".into()));
}

/// What the script of a shell asks.
fn completed(args: &[&str]) -> String {
    let mut command = Command::new(PROGRAM);
    command.args(["--", "ept-virt"]).args(args);
    command.env("EPT_VIRT_COMPLETE", "fish").env("LIBVIRT_DEFAULT_URI", "test:///default");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    text(&output.stdout).to_owned()
}

#[test]
fn shells_complete_commands_options_and_domains() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(PROGRAM).args(["completion", shell]).output().unwrap();
        let script = text(&output.stdout);
        assert!(script.contains("EPT_VIRT_COMPLETE") && script.contains("ept-virt"), "{script}");
    }
    assert!(completed(&["pol"]).contains("policy"));
    assert!(completed(&["status", "--wat"]).contains("--watch"));
    assert!(completed(&["policy", "set", "x", "dram.sh"]).contains("dram.share="));
    // Names come only in time, which a busy machine may not have.
    let finds = |args: &[&str], name: &str| (0..50).any(|_| completed(args).contains(name));
    assert!(finds(&["policy", "show", ""], "test"));
    let daemon = Daemon::answering("complete", "status", &fixture("busy.json"));
    assert!(finds(&["--socket", daemon.0.to_str().unwrap(), "map", ""], "web-1"));
}

#[test]
fn a_daemon_that_hangs_does_not_hang_the_shell() {
    let path = std::env::temp_dir().join(format!("ept-virt-complete-{}.sock", std::process::id()));
    let _hangs = UnixListener::bind(&path).unwrap();
    let finds = (0..50).any(|_| completed(&["--socket", path.to_str().unwrap(), "map", ""]).contains("test"));
    let _ = fs::remove_file(&path);
    assert!(finds, "libvirt knows it");
}
