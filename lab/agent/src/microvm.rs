// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of the kernel module against virtual machines of a few pages.
//!
//! A micro VM is a KVM guest without firmware or kernel: a dozen instructions
//! that touch exactly known pages. What the hardware marked accessed or dirty
//! can therefore be compared page by page. The same tests run on AMD and Intel.

mod abi;
mod abi_2019;
mod abi_2019_rights;
mod admin;
mod arguments;
mod arguments_descriptors;
mod arguments_fields;
mod arguments_files;
mod child;
mod cost;
mod disturb;
mod exact;
mod fire;
mod fire_end;
mod flush;
mod fuzz;
mod fuzz_check;
mod fuzz_model;
mod fuzz_player;
mod fuzz_steps;
mod fuzz_world;
mod huge;
mod leaks;
mod lifecycle;
mod machine;
mod nested;
mod nested_vmx;
mod notifier;
mod patched;
mod pattern;
mod place;
mod places;
pub mod random;
mod reclaim;
mod rights;
mod sampling;
mod sampling_calls;
mod sampling_cost;
mod sampling_fair;
mod sampling_nx;
mod sampling_rate;
mod sampling_settle;
mod sampling_writes;
mod settings;
mod several;
mod spin;
mod writeback;

use anyhow::{Result, bail};

use crate::kernel_log::KernelLog;
pub use crate::report::Outcome;

type Test = (&'static str, fn() -> Result<Outcome>);

/// All tests by name.
const TESTS: &[Test] = &[
    ("harvest-exact", exact::rounds),
    ("harvest-peek", exact::peek),
    ("harvest-unaligned", exact::unaligned_ranges),
    ("dirty-exact", exact::dirty),
    ("dirty-writeback", writeback::dirty_writeback),
    ("levels-2m", huge::levels_2m),
    ("levels-1g", huge::levels_1g),
    ("on-nodes", place::on_nodes),
    ("keep-young", reclaim::keep_young),
    ("memslots", abi::memslots),
    ("refusals", abi::refusals),
    ("arguments", arguments::all),
    ("arguments-32-bit", arguments::compat),
    ("unprivileged", rights::unprivileged),
    ("no-addresses", rights::no_addresses),
    ("own-vm-only", rights::own_vm_only),
    ("vm-exit", lifecycle::vm_exit),
    ("vm-closed", lifecycle::vm_closed),
    ("module-in-use", lifecycle::module_in_use),
    ("churn", lifecycle::churn),
    ("flush-proof", flush::proof),
    ("nested-exact", nested::exact),
    ("nested-tracked", nested::tracked),
    ("nested-twice", nested::twice),
    ("nested-huge", nested::huge),
    ("nested-direct", nested::direct),
    ("nested-churn", nested::churn),
    ("sample-types", sampling::types),
    ("sample-dirty-log", sampling_writes::dirty_log),
    ("sample-end", sampling_writes::end),
    ("sample-nx", sampling_nx::switched),
    ("sample-refusals", sampling_calls::refusals),
    ("sample-vm-exit", sampling_calls::vm_exit),
    ("abi-2019", abi_2019::life),
    ("abi-2019-types", abi_2019::types),
    ("abi-2019-refusals", abi_2019_rights::refusals),
    ("abi-2019-rights", abi_2019_rights::rights),
    ("several", several::vms_and_sessions),
    ("statistics", admin::statistics),
    ("quiet", admin::quiet),
    ("tracepoints", admin::tracepoints),
    ("self-check", admin::self_check),
    ("refuses-unknown-kernel", admin::unknown_kernel),
    ("back-end", patched::back_end),
];

/// Run by name only: measurements, what needs a host of a certain kind, and what
/// counts samples in time, which only a host that counts instructions tells apart
/// from a slow machine.
const BY_NAME: &[Test] = &[
    ("harvest-cost", cost::harvest_cost),
    ("holds", cost::holds),
    ("harvest-cost-2m", cost::harvest_cost_2m),
    ("fault-cost", patched::of_a_fault),
    ("sample-in-place", patched::in_place),
    ("sample-overflow", sampling_calls::overflow),
    ("sample-read", sampling_calls::reads),
    ("sample-churn", sampling_writes::churn),
    ("sample-cold", sampling_rate::cold_pages),
    ("sample-rate", sampling_rate::settles),
    ("sample-fair", sampling_fair::each_page_alike),
    ("sample-cost", sampling_cost::of_a_sample),
    ("flush-cost", sampling_cost::of_a_flush),
    ("guest-slowdown", sampling_cost::of_the_whole),
    ("sample-settle-fast", sampling_settle::fast),
    ("sample-settle-slow", sampling_settle::slow),
    ("sample-harvest", sampling::beside_harvest),
    ("sample-huge", sampling::huge),
    ("sample-chosen", sampling::chosen_types),
    ("churn-accessed", lifecycle::churn_accessed),
    ("no-ad-bits", notifier::no_ad_bits),
    ("shadow-exact", notifier::shadow_mmu),
    ("shadow-huge", notifier::shadow_huge),
    ("fuzz", fuzz::run),
    ("leaks", leaks::cycles),
    ("fire-small", fire::small_pages),
    ("fire-huge", fire::huge_pages),
    ("fire-hugetlb", fire::hugetlb),
    ("fire-killed", fire_end::killed),
    ("fire-closed", fire_end::closed),
    ("fire-unloaded", fire_end::unloaded),
];

/// Names of the tests that every host runs.
pub fn names() -> impl Iterator<Item = &'static str> {
    TESTS.iter().map(|(name, _)| *name)
}

/// Runs one test or measurement.
pub fn run(name: &str) -> Result<Outcome> {
    match TESTS.iter().chain(BY_NAME).find(|(known, _)| *known == name) {
        Some((_, test)) => run_and_judge(*test),
        None => bail!("there is no test {name:?}; there are: {}", names().collect::<Vec<_>>().join(" ")),
    }
}

/// A test in which the kernel complained has failed, whatever else it saw.
fn run_and_judge(test: fn() -> Result<Outcome>) -> Result<Outcome> {
    let mut log = KernelLog::from_now()?;
    let outcome = test();
    match (outcome, log.judge()) {
        (outcome, Ok(())) => outcome,
        (Ok(_), Err(complaint)) => Err(complaint),
        (Err(error), Err(complaint)) => Err(error.context(format!("{complaint:#}"))),
    }
}

/// The process that [`lifecycle::vm_exit`] starts and kills.
pub fn victim() -> Result<()> {
    lifecycle::victim()
}

/// The process that the tests of the interface of 2019 start.
pub fn owner(words: &[&str]) -> Result<()> {
    abi_2019::owner(words)
}

/// The process that [`child::GuestProcess`] starts.
pub fn child() -> Result<()> {
    child::run()
}
