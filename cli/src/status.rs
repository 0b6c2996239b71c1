// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt status`: all that is known, in words. A percentage always says of
//! what.

use std::time::Duration;

use ept_virt_core::units::Bytes;
use ept_virt_core::wire::{
    BudgetStatus, DaemonStatus, DomainState, DomainStatus, MoveTotals, RoundStatus, SamplingStatus,
    SlowdownStatus, Status,
};

use crate::strip;
use crate::style::{Style, harmless, wrapped};

/// Width of the first column.
const LABEL: usize = 10;

/// Columns before a value.
const INDENT: usize = LABEL + 3;

/// The daemon and all its domains.
pub fn render(status: &Status, style: &Style) -> String {
    let mut page = Page::new(style);
    daemon(&mut page, &status.daemon);
    if status.domains.is_empty() {
        page.blank();
        page.line("no domain is running");
    }
    page.text + &render_domains(status, style)
}

/// The domains alone.
pub fn render_domains(status: &Status, style: &Style) -> String {
    let mut page = Page::new(style);
    for domain_status in &status.domains {
        page.blank();
        domain(&mut page, domain_status);
    }
    page.text
}

/// The word for a state.
pub fn state_word(state: DomainState) -> &'static str {
    match state {
        DomainState::Observing => "observing",
        DomainState::Placing => "placing",
        DomainState::Off => "off",
        DomainState::Unobserved => "not observed",
    }
}

/// Text under way.
struct Page<'a> {
    style: &'a Style,
    text: String,
}

impl<'a> Page<'a> {
    fn new(style: &'a Style) -> Self {
        Page { style, text: String::new() }
    }

    fn line(&mut self, text: &str) {
        self.text += text.trim_end();
        self.text.push('\n');
    }

    fn blank(&mut self) {
        self.text.push('\n');
    }

    /// A line with a name before it. `value` may hold what others wrote.
    fn field(&mut self, label: &str, value: &str) {
        self.painted_field(label, value, "0");
    }

    /// As [`Page::field`], for what wants attention.
    fn alert(&mut self, label: &str, value: &str) {
        self.painted_field(label, value, "33");
    }

    fn painted_field(&mut self, label: &str, value: &str, sgr: &str) {
        let room = if self.style.wrap { self.style.width.saturating_sub(INDENT) } else { usize::MAX };
        let mut label = label;
        for line in wrapped(&harmless(value), room) {
            let line = if sgr == "0" { line } else { self.style.paint(sgr, &line) };
            self.drawn_field(label, &line);
            label = "";
        }
    }

    /// A line with a name before it, for a value that has its colours already.
    fn drawn_field(&mut self, label: &str, value: &str) {
        self.line(&format!("  {label:<LABEL$} {value}"));
    }
}

fn daemon(page: &mut Page, daemon: &DaemonStatus) {
    let uptime = coarse(daemon.uptime_s);
    page.line(&page.style.paint("1", &format!("ept-virt {}", harmless(&daemon.version))));
    page.field("daemon", &format!("pid {}, up {uptime}", daemon.pid));
    page.field("libvirt", &format!("{}: {}", daemon.libvirt_uri, daemon.libvirt));
    match (&daemon.module, &daemon.module_error) {
        (Some(module), _) => {
            let (abi, format, teller) = (&module.abi, &module.format, &module.back_end);
            let kvm = if module.patched_kvm { "; KVM is patched for samples" } else { "" };
            page.field("module", &format!("ABI {abi}, for {format}; tells accesses by {teller}{kvm}"));
        }
        (None, Some(error)) => page.alert("module", error),
        (None, None) => page.alert("module", "no answer yet"),
    }
    let tiers = match daemon.slow_nodes.as_slice() {
        [] => format!("DRAM on {}; no NVM ({})", nodes(&daemon.fast_nodes), daemon.tiers_from),
        slow => {
            format!("DRAM on {}, NVM on {} ({})", nodes(&daemon.fast_nodes), nodes(slow), daemon.tiers_from)
        }
    };
    page.field("tiers", &tiers);
    let last = daemon.last_nudge.as_ref().map_or(String::new(), |nudge| format!(", the last: {nudge}"));
    page.field("hook", &format!("{}{last}", counted(daemon.nudges, "call")));
    for warning in &daemon.warnings {
        page.alert("warning", warning);
    }
}

fn domain(page: &mut Page, domain: &DomainStatus) {
    let state = match domain.state {
        DomainState::Placing => "32",
        DomainState::Observing => "36",
        DomainState::Off => "2",
        DomainState::Unobserved => "33",
    };
    let state = page.style.paint(state, state_word(domain.state));
    page.line(&format!("{}  {state}", page.style.paint("1", &harmless(&domain.name))));
    if let Some(reason) = &domain.reason {
        page.alert("reason", reason);
    }
    page.field("uuid", &domain.uuid);
    if let Some(id) = domain.id {
        page.field("id", &id.to_string());
    }
    if let Some(pid) = domain.pid {
        page.field("pid", &pid.to_string());
    }
    page.field("policy", &format!("{} ({})", domain.policy, domain.policy_from));
    if let Some(error) = &domain.policy_error {
        page.alert("", &format!("the domain's own policy is not in force: {error}"));
    }
    for warning in &domain.policy_warnings {
        page.alert("", warning);
    }
    if domain.slots > 0 {
        let slots = counted(domain.slots.into(), "slot");
        page.field("memory", &format!("{} in {slots}", Bytes(domain.memory_bytes)));
    }
    if domain.excluded_bytes > 0 {
        let excluded = part(domain.excluded_bytes, domain.memory_bytes, "memory");
        page.field("excluded", &format!("{excluded}, by the policy: it is not moved"));
    }
    match &domain.round {
        Some(round_status) => {
            round(page, domain.memory_bytes, round_status);
            if let Some(status) = &domain.budget {
                budget(page, domain.memory_bytes, status);
            }
            if let Some(sampling) = &domain.sampling {
                sampled(page, sampling);
            }
            if let Some(slowdown) = &domain.slowdown {
                slowed(page, slowdown);
            }
            moves(page, &domain.moves);
        }
        None if domain.state == DomainState::Unobserved || domain.state == DomainState::Off => {}
        None => page.field("round", "the first has not ended yet"),
    }
    picture(page, domain);
}

fn round(page: &mut Page, memory: u64, round: &RoundStatus) {
    let interval = Duration::from_millis(round.interval_ms);
    page.field(
        "mapped",
        &format!(
            "{}, of it {} by huge pages",
            part(round.mapped_bytes, memory, "memory"),
            Bytes(round.mapped_huge_bytes)
        ),
    );
    // Nested guests, for one, access what their host has not mapped for itself.
    let accessed = if round.accessed_bytes > round.mapped_bytes {
        part(round.accessed_bytes, memory, "memory")
    } else {
        part(round.accessed_bytes, round.mapped_bytes, "mapped")
    };
    let written = match round.dirty_bytes {
        Some(bytes) => format!("{} written since last cleaned", Bytes(bytes)),
        None => "what was written is not known on this host".into(),
    };
    let watched = Duration::from_micros(round.watched_us);
    let time = match watched.is_zero() || watched >= interval {
        true => format!("the last round of {}", short(interval)),
        false => format!("the last {} of a round of {}", short(watched), short(interval)),
    };
    page.field("accessed", &format!("{accessed} in {time}; {written}"));
    if !round.back_end.is_empty() {
        page.field("back end", &round.back_end);
    }
    let mut heat = String::new();
    let classes = [
        (round.hot_bytes, "hot", 0),
        (round.warm_bytes, "warm", round.warm_age_ms),
        (round.cold_bytes, "cold", round.cold_age_ms),
    ];
    for (bytes, class, age_ms) in classes {
        let comma = if heat.is_empty() { "" } else { ", " };
        // As if it had been accessed all the time before that.
        let age = match age_ms {
            0 => String::new(),
            age_ms => format!(", for {} or more", short(Duration::from_millis(age_ms))),
        };
        heat += &format!("{comma}{} {class} ({}{age})", Bytes(bytes), percent(bytes, memory));
    }
    page.field("heat", &format!("{heat} of memory"));
    let resident = round.fast_bytes + round.slow_bytes;
    page.field(
        "place",
        &format!(
            "{} on DRAM ({}), {} on NVM ({}) of {} resident",
            Bytes(round.fast_bytes),
            percent(round.fast_bytes, resident),
            Bytes(round.slow_bytes),
            percent(round.slow_bytes, resident),
            Bytes(resident),
        ),
    );
    if let Some(target) = round.dram_target_bytes {
        page.field("DRAM limit", &part(target, memory, "memory"));
    }
    page.field(
        "round",
        &format!(
            "number {}, took {} ({} of its interval); harvest {}, {} read, {}",
            round.number,
            short(Duration::from_micros(round.took_us)),
            percent(round.took_us, round.interval_ms.saturating_mul(1000)),
            short(Duration::from_micros(round.harvest_us)),
            counted(round.entries_read, "table entry"),
            counted(round.flushes.into(), "TLB flush"),
        ),
    );
}

fn budget(page: &mut Page, memory: u64, budget: &BudgetStatus) {
    let granted = part(budget.grant_bytes, memory, "memory");
    page.field("DRAM grant", &format!("{granted}: {}", budget.grant_reason));
    let used = match budget.working_set_bytes {
        Some(bytes) => format!("about {}", part(bytes, memory, "memory")),
        None => "not known before a half-life has passed".into(),
    };
    page.field("in use", &format!("{used}; share by weight {}", Bytes(budget.fair_bytes)));
}

fn sampled(page: &mut Page, sampling: &SamplingStatus) {
    let SamplingStatus { rate_hz, access, samples, lost, unweighed, problem } = sampling;
    let lost = if *lost > 0 { format!(", {lost} lost as rounds came too late") } else { String::new() };
    let number = counted(*samples, "access");
    let light = if *unweighed > 0 { format!(", {unweighed} too many to weigh") } else { String::new() };
    page.field("sampled", &format!("{number} ({access}, {rate_hz} Hz){lost}{light}"));
    if let Some(problem) = problem {
        page.alert("", &format!("nothing is sampled now: {problem}"));
    }
}

fn slowed(page: &mut Page, slowdown: &SlowdownStatus) {
    let SlowdownStatus { limit_percent, gap_ns, gap_from, given_bytes, .. } = slowdown;
    let estimate = match (slowdown.estimate_percent, slowdown.low_percent, slowdown.high_percent) {
        (None, ..) => "not known: it did next to nothing, or turned to other memory".to_owned(),
        (Some(likely), Some(low), Some(high)) => {
            format!("{likely:.1}% of its CPU time ({low:.1} to {high:.1}%)")
        }
        (Some(likely), ..) => format!("{likely:.1}% of its CPU time or more"),
    };
    let confidence =
        slowdown.confidence.as_ref().map_or(String::new(), |word| format!(", confidence {word}"));
    let given = match given_bytes {
        0 => String::new(),
        bytes => format!("; for that it may have {} of DRAM more", Bytes(*bytes)),
    };
    page.field(
        "slowed by",
        &format!(
            "{estimate}{confidence}; limit {limit_percent}%{given}; NVM takes {gap_ns} ns longer, by {gap_from}"
        ),
    );
}

fn moves(page: &mut Page, moves: &MoveTotals) {
    let moved = |moved, tried| format!("{} of {} tried", Bytes(moved), Bytes(tried));
    page.field(
        "moved",
        &format!(
            "to NVM {}, to DRAM {}",
            moved(moves.demoted_bytes, moves.demote_tried_bytes),
            moved(moves.promoted_bytes, moves.promote_tried_bytes),
        ),
    );
    if moves.places_verified > 0 {
        let checked = format!("places verified {}, wrong {}", moves.places_verified, moves.places_wrong);
        page.field("", &checked);
    }
    for refusal in &moves.refused {
        let text = format!("{} {}: {}", Bytes(refusal.bytes), refusal.reason, refusal.explanation);
        page.alert("refused", &text);
    }
}

fn picture(page: &mut Page, domain: &DomainStatus) {
    let cells = strip::fit(&domain.strip, page.style.width.saturating_sub(INDENT));
    if cells.is_empty() {
        return;
    }
    let (heat, tier) = strip::rows(&cells, page.style);
    page.drawn_field("picture", &heat);
    page.drawn_field("", &tier);
    let each = Bytes(domain.memory_bytes / cells.len() as u64);
    page.drawn_field("", &format!("each mark {each}, low addresses left"));
    page.drawn_field("", &strip::legend(page.style));
}

/// `32 MiB (20% of memory)`.
fn part(bytes: u64, whole: u64, of: &str) -> String {
    format!("{} ({} of {of})", Bytes(bytes), percent(bytes, whole))
}

/// Whole percent; little is not nothing, and nearly all is not all.
pub fn percent(bytes: u64, whole: u64) -> String {
    match (bytes, whole) {
        (0, _) | (_, 0) => "0%".into(),
        _ if bytes == whole => "100%".into(),
        _ => match bytes as f64 * 100.0 / whole as f64 {
            share if share < 1.0 => "under 1%".into(),
            share if share > 99.0 && share < 100.0 => "over 99%".into(),
            share => format!("{share:.0}%"),
        },
    }
}

/// `1 slot`, `5 slots`; thousands are set apart.
fn counted(number: u64, noun: &str) -> String {
    let plural = match noun {
        _ if noun.ends_with('y') => format!("{}ies", &noun[..noun.len() - 1]),
        _ if noun.ends_with('h') || noun.ends_with('s') => format!("{noun}es"),
        _ => format!("{noun}s"),
    };
    let plural = if number == 1 { noun.to_owned() } else { plural };
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{grouped} {plural}")
}

fn nodes(nodes: &[u32]) -> String {
    let list: Vec<String> = nodes.iter().map(u32::to_string).collect();
    format!("NUMA node{} {}", if nodes.len() == 1 { "" } else { "s" }, list.join(", "))
}

/// Two or three digits: a duration to look at.
fn short(time: Duration) -> String {
    let us = time.as_micros() as f64;
    let (value, unit) = match us {
        ..1e3 => return format!("{us:.0} us"),
        ..1e6 => (us / 1e3, "ms"),
        _ => (us / 1e6, "s"),
    };
    match value {
        ..10.0 => format!("{} {unit}", format!("{value:.1}").trim_end_matches(".0")),
        _ => format!("{value:.0} {unit}"),
    }
}

/// The two largest units.
fn coarse(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} days {} h", seconds / 86400, seconds / 3600 % 24),
    }
}
