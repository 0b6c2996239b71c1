// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one static program inside the lab's emulated hosts and their guests.

mod guest;
mod init_micro;
mod kernel_log;
mod microvm;
mod report;
mod scenario;
mod stuck;

use std::path::Path;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let (program, args) = args.split_first().map_or(("", [].as_slice()), |(program, rest)| (program, rest));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // As a hook of libvirt this program has another name.
    if Path::new(program).file_name().is_some_and(|name| name == scenario::RECORDER) {
        return scenario::record(&args);
    }
    match args.as_slice() {
        // The kernel also hands on what it does not know itself, as "nokaslr".
        [.., "guest"] => guest::run(),
        // Boot loaders add words of their own at the end, as "initrd=/initrd".
        args if args.contains(&"init-micro") => init_micro::run(),
        ["scenario", names @ ..] => scenario::run("", names),
        // The host is named in the verdicts.
        ["scenario-on", host, names @ ..] => scenario::run(&format!("{host}/"), names),
        ["demo"] => scenario::demo(),
        ["bench"] => scenario::bench(),
        ["bench-libvirt"] => scenario::bench_libvirt(),
        ["bench-placement", words @ ..] => scenario::bench_placement(words),
        ["example"] => scenario::example(),
        ["second-host"] => scenario::become_second(),
        ["microvm", host, names @ ..] => microvm_tests(host, names),
        ["microvm-victim"] => microvm::victim(),
        ["microvm-owner", words @ ..] => microvm::owner(words),
        ["microvm-child"] => microvm::child(),
        other => bail!(
            "usage: lab-agent guest|init-micro|scenario NAME...|demo|bench|bench-libvirt|bench-placement WORKLOAD MEMORY CONTESTANT...|example|microvm HOST [TEST...] (got {other:?})"
        ),
    }
}

/// Runs the tests named, or all, and prints a verdict line for each, with the
/// host in its name.
fn microvm_tests(host: &str, names: &[&str]) -> Result<()> {
    let all: Vec<&str> = microvm::names().collect();
    for test in if names.is_empty() { &all } else { names } {
        let name = format!("{host}/{test}");
        println!("{}", report::judge(&name, || microvm::run(test)).line());
    }
    Ok(())
}
