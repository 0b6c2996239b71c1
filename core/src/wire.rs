// SPDX-License-Identifier: MIT OR Apache-2.0
//! What travels over the daemon's control socket, and what `--json` prints.
//!
//! One JSON object per line in each direction, at most [`MAX_LINE_BYTES`]; the
//! daemon answers each line with one line, in order. docs/SOCKET.md is the manual.

use serde::{Deserialize, Serialize};

use crate::text;

/// Version of this protocol; a different major is refused.
pub const PROTOCOL_VERSION: u32 = 1;

/// Where the daemon listens unless it is told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/ept-virt/ept-virt.sock";

/// Stands in the file of libvirt's hook, of whatever version: begins what it
/// writes on standard error. `ept-virt hook` tells it by this from those of others.
pub const HOOK_MARK: &str = "ept-virt-hook: ";

/// Longest line either side accepts, in bytes, the newline included.
pub const MAX_LINE_BYTES: usize = 4 << 20;

/// Longest line the daemon accepts from a client, in bytes.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub v: u32,
    /// What is asked.
    #[serde(flatten)]
    pub command: Command,
}

impl Request {
    /// The line that asks for `command`, newline included.
    pub fn line(command: Command) -> Vec<u8> {
        to_line(&Request { v: PROTOCOL_VERSION, command })
    }

    /// Reads a line, with or without its newline, as the daemon does.
    pub fn read(line: &[u8]) -> Result<Command, WireError> {
        let bad = |message| WireError { kind: ErrorKind::BadRequest, message, hint: None };
        if line.len() > MAX_REQUEST_BYTES {
            return Err(bad(format!("a request is longer than {MAX_REQUEST_BYTES} bytes")));
        }
        let request: Request = serde_json::from_slice(line)
            .map_err(|cause| bad(format!("not a request: {}", text::shown(&cause.to_string(), 200))))?;
        match request.v {
            PROTOCOL_VERSION => Ok(request.command),
            v => Err(bad(format!(
                "the request is of protocol version {v}, the daemon speaks {PROTOCOL_VERSION}"
            ))),
        }
    }
}

/// What can be asked of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum Command {
    /// Answered with [`Reply::Status`].
    Status {
        /// Name, id or UUID; all domains without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        domain: Option<String>,
    },
    /// Answered with [`Reply::Map`]: the class and place of every page.
    Map {
        /// Name, id or UUID.
        domain: String,
    },
    /// Observe the domain again after [`Command::Stop`]; answered with
    /// [`Reply::Done`]. This and the next three change what is done, and only
    /// root may ask for them.
    Start {
        /// Name, id or UUID.
        domain: String,
    },
    /// Neither observe nor move the domain until it ends, or until
    /// [`Command::Start`]; answered with [`Reply::Done`].
    Stop {
        /// Name, id or UUID.
        domain: String,
    },
    /// Move nothing of the domain until it ends, or until [`Command::Resume`];
    /// answered with [`Reply::Done`].
    Pause {
        /// Name, id or UUID.
        domain: String,
    },
    /// Move its memory again after [`Command::Pause`]; answered with
    /// [`Reply::Done`].
    Resume {
        /// Name, id or UUID.
        domain: String,
    },
    /// Record the domain's rounds: answered with [`Reply::Done`], then with a recording
    /// ([`crate::record`]) until one side closes; no more lines on this connection. For
    /// root alone, as it shows what the guest does.
    Record {
        /// Name, id or UUID.
        domain: String,
    },
    /// The hook's word that something happened; answered with [`Reply::Done`]
    /// at once. The daemon then looks at libvirt itself.
    Nudge {
        /// libvirt's operation: started, stopped, release, reconnect...
        op: String,
        /// The domain's name.
        domain: String,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// [`PROTOCOL_VERSION`] of the daemon.
    pub v: u32,
    /// The result.
    #[serde(flatten)]
    pub reply: Reply,
}

impl Response {
    /// The line that answers with `reply`, newline included; with an error when
    /// that would be too long.
    pub fn line(reply: Reply) -> Vec<u8> {
        let line = to_line(&Response { v: PROTOCOL_VERSION, reply });
        if line.len() <= MAX_LINE_BYTES {
            return line;
        }
        let bytes = line.len();
        let message =
            format!("the answer has {bytes} bytes, more than the {MAX_LINE_BYTES} of this protocol");
        let error = WireError { kind: ErrorKind::Internal, message, hint: None };
        to_line(&Response { v: PROTOCOL_VERSION, reply: Reply::Error(error) })
    }
}

/// These types have nothing that JSON can not hold, so there is no error to tell.
fn to_line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// More runs of a map than this are never in an answer: the shortest takes 56 bytes.
pub const MAX_MAP_RUNS: usize = MAX_LINE_BYTES / 56;

/// The result of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Command::Status`].
    Status(Box<Status>),
    /// To [`Command::Map`].
    Map(MemoryMap),
    /// Done, nothing to tell.
    Done,
    /// The request could not be served.
    Error(WireError),
}

/// Why a request could not be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    /// For programs.
    pub kind: ErrorKind,
    /// For people: the operation, the object, the cause.
    pub message: String,
    /// For people: what they can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Kinds of [`WireError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The line is not a request of this protocol.
    BadRequest,
    /// No such domain is running.
    NoDomain,
    /// The domain is known but not observed; the message says why.
    NotObserved,
    /// Only root may ask for this.
    NotPermitted,
    /// Something failed in the daemon.
    Internal,
}

/// The whole daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon itself.
    pub daemon: DaemonStatus,
    /// One entry for each running domain, sorted by name.
    pub domains: Vec<DomainStatus>,
}

/// The daemon itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Crate version.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// libvirt connection URI.
    pub libvirt_uri: String,
    /// "connected", or why not.
    pub libvirt: String,
    /// The kernel module, if it answers.
    pub module: Option<ModuleStatus>,
    /// Why the kernel module does not answer, and what to do.
    pub module_error: Option<String>,
    /// Nudges received from the hook.
    pub nudges: u64,
    /// The last nudge, as "OP DOMAIN".
    pub last_nudge: Option<String>,
    /// NUMA nodes of the fast tier.
    pub fast_nodes: Vec<u32>,
    /// NUMA nodes of the slow tier.
    pub slow_nodes: Vec<u32>,
    /// Where the tiers come from: "memory tiers of the kernel",
    /// "nodes without CPUs", or why there is only one tier.
    pub tiers_from: String,
    /// What stands in the way of good results on this host, in plain words.
    pub warnings: Vec<String>,
}

/// The kernel module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleStatus {
    /// ABI version, as "1.0".
    pub abi: String,
    /// "EPT" or "NPT".
    pub format: String,
    /// Who tells what guests access that run no guests themselves, by KVM's
    /// switches: words as in [`RoundStatus::back_end`], which says who told.
    pub back_end: String,
    /// KVM has the patch that makes samples cheap (`kernel_patch`).
    #[serde(default)]
    pub patched_kvm: bool,
}

/// What the daemon does with a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DomainState {
    /// Pages are observed; none is moved.
    Observing,
    /// Pages are observed and moved.
    Placing,
    /// The policy says off.
    Off,
    /// It can not be observed; `reason` says why. The guest runs on.
    Unobserved,
}

/// One domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainStatus {
    /// libvirt's name.
    pub name: String,
    /// libvirt's UUID.
    pub uuid: String,
    /// libvirt's number for it while it runs; none when the daemon is older.
    #[serde(default)]
    pub id: Option<u32>,
    /// Process id of QEMU.
    pub pid: Option<i32>,
    /// What is done with it.
    pub state: DomainState,
    /// Why it is not observed, or what is wrong, in plain words.
    pub reason: Option<String>,
    /// Where the policy comes from: "domain XML" or "default".
    pub policy_from: String,
    /// The effective policy in one line of plain words.
    pub policy: String,
    /// What is wrong with the policy and where, when it could not be read. The
    /// domain is then observed by default.
    pub policy_error: Option<String>,
    /// What is odd about the policy, though it is in force, in plain words.
    #[serde(default)]
    pub policy_warnings: Vec<String>,
    /// Guest memory by its memory slots, in bytes (ROMs left out).
    pub memory_bytes: u64,
    /// Of it, what the policy excludes from being moved, rounded outwards to 2 MiB of
    /// the VMM's address space: huge pages move as a whole.
    #[serde(default)]
    pub excluded_bytes: u64,
    /// Number of memory slots.
    pub slots: u32,
    /// The last round; none before the first has ended.
    pub round: Option<RoundStatus>,
    /// What it has of the host's DRAM beside other domains; none until the place of
    /// all its memory is known, or when the daemon is older.
    #[serde(default)]
    pub budget: Option<BudgetStatus>,
    /// Totals since the daemon found the domain.
    pub moves: MoveTotals,
    /// Sampling of single accesses; none when the policy asks for none.
    #[serde(default)]
    pub sampling: Option<SamplingStatus>,
    /// By how much the slow tier slows the guest down; none when the policy does not
    /// limit that, or nothing is known yet.
    #[serde(default)]
    pub slowdown: Option<SlowdownStatus>,
    /// Age of the heat, in seconds, that an earlier daemon had kept and that this
    /// one went on with; none if it began anew.
    #[serde(default)]
    pub restored_s: Option<u64>,
    /// Guest physical memory in equal parts, from the lowest slot to the
    /// highest, without holes: a picture for the terminal.
    pub strip: Vec<StripCell>,
}

/// Sampling of single accesses, which weigh in the heat by their kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplingStatus {
    /// Accesses that are to be sampled in a second.
    pub rate_hz: u32,
    /// Their kinds: some of the letters r, w and x.
    pub access: String,
    /// Those that were read since the daemon found the domain.
    pub samples: u64,
    /// Those that were lost, because a round came too late for the ring.
    pub lost: u64,
    /// Those that counted as an accessed bit although they weigh more: too many came
    /// before temperatures took them in.
    #[serde(default)]
    pub unweighed: u64,
    /// Why nothing is sampled now, in plain words.
    pub problem: Option<String>,
}

/// How much of its CPU time a guest loses to the latency of the slow tier, as an estimate
/// from what is accessed there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SlowdownStatus {
    /// What the policy allows, in percent.
    pub limit_percent: f64,
    /// The estimate of the last round, in percent; none when the guest did next to
    /// nothing, and while what is known of its memory changes from round to round.
    pub estimate_percent: Option<f64>,
    /// What it is at least, as far as chance goes.
    pub low_percent: Option<f64>,
    /// What it is at most, as far as chance goes; none where only a lower bound is known.
    pub high_percent: Option<f64>,
    /// "low": by accessed bits, a lower bound; "medium": by samples.
    pub confidence: Option<String>,
    /// By how much an access to the slow tier takes longer, in nanoseconds.
    pub gap_ns: u64,
    /// Where this is known from, in plain words.
    pub gap_from: String,
    /// Bytes of DRAM that the domain may have beyond its share for this.
    pub given_bytes: u64,
}

/// One round of observing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundStatus {
    /// Rounds since the daemon found the domain.
    pub number: u64,
    /// Time between this round and the one before, in milliseconds.
    pub interval_ms: u64,
    /// For how long of that, up to this round, accesses were watched, in microseconds:
    /// all of it, or a window at its end.
    #[serde(default)]
    pub watched_us: u64,
    /// Time that this round took, in microseconds, wall clock.
    pub took_us: u64,
    /// Of it, time in the kernel's harvest and flush, in microseconds.
    pub harvest_us: u64,
    /// Who told what was accessed: "table walk", "KVM's notifier" or both.
    #[serde(default)]
    pub back_end: String,
    /// Table entries read.
    pub entries_read: u64,
    /// TLB flushes.
    pub flushes: u32,
    /// Bytes mapped in the second-level tables.
    pub mapped_bytes: u64,
    /// Of them, by entries of 2 MiB and above.
    pub mapped_huge_bytes: u64,
    /// Bytes accessed while they were watched.
    pub accessed_bytes: u64,
    /// Bytes written since last cleaned, by the dirty bit; none where nothing on
    /// the host tells it.
    pub dirty_bytes: Option<u64>,
    /// Bytes by class of temperature. Cold includes what was never seen.
    pub hot_bytes: u64,
    /// See [`RoundStatus::hot_bytes`].
    pub warm_bytes: u64,
    /// See [`RoundStatus::hot_bytes`].
    pub cold_bytes: u64,
    /// Age of the warm class: for how long a page that was accessed all the time must
    /// not have been accessed to be warm. 0 when a window of each round is watched only.
    #[serde(default)]
    pub warm_age_ms: u64,
    /// The same of the cold class.
    #[serde(default)]
    pub cold_age_ms: u64,
    /// Bytes known to lie on the fast tier by now: pages move between rounds.
    pub fast_bytes: u64,
    /// Bytes known to lie on the slow tier.
    pub slow_bytes: u64,
    /// Bytes that are not resident, or not known yet.
    pub absent_bytes: u64,
    /// DRAM that the policy grants, in bytes; none without a limit.
    pub dram_target_bytes: Option<u64>,
}

/// A domain's part in the DRAM of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetStatus {
    /// Bytes that it may have there now: within what its policy allows and what is
    /// granted beside the other domains.
    pub grant_bytes: u64,
    /// Its share by weight, minimum and maximum, if all domains used all they can.
    pub fair_bytes: u64,
    /// What it uses, by estimate: pages that are not cold, raised at once and
    /// lowered slowly; none until it was observed for a half-life.
    pub working_set_bytes: Option<u64>,
    /// Why it is granted what it is, in plain words.
    pub grant_reason: String,
}

/// Pages moved. Tried = moved + refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveTotals {
    /// Bytes that were to be moved to the slow tier.
    pub demote_tried_bytes: u64,
    /// Bytes that the kernel moved to the slow tier.
    pub demoted_bytes: u64,
    /// Bytes that were to be moved to the fast tier.
    pub promote_tried_bytes: u64,
    /// Bytes that the kernel moved to the fast tier.
    pub promoted_bytes: u64,
    /// Why the rest was not moved; sorted by reason.
    pub refused: Vec<Refusal>,
    /// Pages of which the host's kernel was asked where they lie, to compare it with
    /// what the harvest had told. Drawn from all mapped ones in each round.
    #[serde(default)]
    pub places_verified: u64,
    /// Of them, those that lay on another tier.
    #[serde(default)]
    pub places_wrong: u64,
}

/// Pages that were not moved, for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs: "not-permitted", "node-full", "hugetlb-full", "busy",
    /// "not-present", "shared", "too-large", "already-there", "failed".
    pub reason: String,
    /// Bytes.
    pub bytes: u64,
    /// For people: what it means and what can be done.
    pub explanation: String,
}

/// One part of [`DomainStatus::strip`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StripCell {
    /// Mean temperature of the hottest eighth of the part's pages, 0 to 255.
    pub heat: u8,
    /// Share of its resident pages on the slow tier, 0 to 255.
    pub slow: u8,
    /// Share of its pages that are resident, 0 to 255.
    pub resident: u8,
}

/// The class and place of every page of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// The domain's name.
    pub name: String,
    /// The round that it shows.
    pub round: u64,
    /// Runs in ascending order, without overlaps; holes between slots are left out.
    pub runs: Vec<MapRun>,
}

/// Neighbouring pages of one class, place and slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapRun {
    /// First guest frame number.
    pub gfn: u64,
    /// Number of 4 KiB pages.
    pub pages: u64,
    /// Address in the QEMU process.
    pub hva: u64,
    /// Temperature.
    pub class: Class,
    /// Tier.
    pub place: Place,
}

/// Class of temperature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Accessed in most of the rounds of the last half-life.
    Hot,
    /// Accessed now and then.
    Warm,
    /// Not accessed for several half-lives, or never.
    Cold,
}

/// Where a page lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On the fast tier.
    Fast,
    /// On the slow tier.
    Slow,
    /// Not resident, or not known yet.
    Absent,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_too_long_becomes_an_error() {
        let error = |message| Reply::Error(WireError { kind: ErrorKind::BadRequest, message, hint: None });
        let run = MapRun { gfn: 0, pages: 1, hva: 0, class: Class::Hot, place: Place::Slow };
        let shortest = serde_json::to_string(&run).unwrap().len();
        assert!(shortest * MAX_MAP_RUNS > MAX_LINE_BYTES - 4096, "{shortest}");
        let line = Response::line(error("x".repeat(MAX_LINE_BYTES)));
        assert!(line.len() < 1000 && line.ends_with(b"\n"));
        let response: Response = serde_json::from_slice(&line).unwrap();
        let Reply::Error(told) = response.reply else { panic!("{response:?}") };
        assert_eq!((response.v, told.kind), (PROTOCOL_VERSION, ErrorKind::Internal));
        // The longest that fits is sent as it is.
        let room = MAX_LINE_BYTES - Response::line(error(String::new())).len();
        assert_eq!(Response::line(error("x".repeat(room))).len(), MAX_LINE_BYTES);
    }

    #[test]
    fn a_request_is_read_as_it_is_written() {
        let command = Command::Nudge { op: "started".into(), domain: "a\n\"}{".into() };
        let line = Request::line(command.clone());
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert_eq!(Request::read(&line), Ok(command));
    }

    #[test]
    fn what_is_no_request_is_told_in_few_words() {
        let told = |line: &str| Request::read(line.as_bytes()).unwrap_err().message;
        assert!(told("{\"v\":2,\"cmd\":\"status\"}").contains("version 2"));
        assert!(told(&" ".repeat(MAX_REQUEST_BYTES + 1)).contains("longer than 65536"));
        let unknown = told(&format!("{{\"v\":1,\"cmd\":\"\\u001b[2J{}\"}}", "x".repeat(60_000)));
        assert!(unknown.contains("\u{fffd}[2Jx") && unknown.chars().count() < 250, "{unknown}");
    }
}
