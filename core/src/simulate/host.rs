// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many guests on one host, round by round.

use std::num::NonZero;
use std::thread;
use std::time::Duration;

use crate::budget::Claim;
use crate::record::Frame;
use crate::units::Bytes;

use super::dram::{self, Allowance};
use super::{Guest, Replay, Round, Served};

/// A guest, made up or recorded.
pub enum Domain {
    /// Made up.
    Guest(Box<Guest>),
    /// Recorded: its next frames come from here, which says `None` at their end.
    Replay(Box<Replay>, Box<dyn FnMut() -> Option<Frame> + Send>),
}

impl Domain {
    /// The guest's memory; of a recorded one as much as was seen so far.
    pub fn memory(&self) -> Bytes {
        match self {
            Domain::Guest(guest) => guest.memory(),
            Domain::Replay(replay, _) => replay.memory(),
        }
    }

    /// What of it lies in DRAM.
    pub fn fast(&self) -> Bytes {
        match self {
            Domain::Guest(guest) => guest.fast(),
            Domain::Replay(replay, _) => replay.fast(),
        }
    }

    /// DRAM that is granted now.
    pub fn granted(&self) -> Bytes {
        match self {
            Domain::Guest(guest) => guest.granted(),
            Domain::Replay(replay, _) => replay.granted(),
        }
    }

    fn claim(&self) -> Claim {
        match self {
            Domain::Guest(guest) => guest.claim(),
            Domain::Replay(replay, _) => replay.claim(),
        }
    }

    /// Before the first round: there is no more DRAM for it than `dram`.
    fn begin_within(&mut self, dram: Bytes) {
        match self {
            Domain::Guest(guest) => guest.begin_within(dram),
            Domain::Replay(replay, _) => replay.set_reachable(dram),
        }
    }

    fn policy_target(&self) -> Bytes {
        match self {
            Domain::Guest(guest) => guest.policy_target(),
            Domain::Replay(replay, _) => replay.policy_target(),
        }
    }

    fn run(&mut self) -> Option<Round> {
        match self {
            Domain::Guest(guest) => Some(guest.run()),
            Domain::Replay(replay, next) => next().map(|frame| replay.run(frame)),
        }
    }

    fn plan(&mut self, Allowance { granted, reachable }: Allowance, interval: Duration) {
        match self {
            Domain::Guest(guest) => guest.plan(granted, reachable),
            Domain::Replay(replay, _) => {
                replay.set_reachable(reachable);
                replay.plan(granted, reachable, interval);
            }
        }
    }
}

/// The guests of one host.
pub struct Host {
    domains: Vec<Domain>,
    /// DRAM for all of them; as much as their policies grant without it.
    dram: Option<Bytes>,
    threads: usize,
}

impl Host {
    /// A host with these guests. Each has its own random numbers, so that the number
    /// of threads changes nothing.
    pub fn new(domains: Vec<Domain>) -> Self {
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        Self { domains, dram: None, threads }
    }

    /// Before the first round: `total` is the DRAM that all guests share, without what
    /// the host keeps for itself. What of their memory begins in DRAM and does not fit
    /// begins on the slow tier.
    pub fn with_dram(mut self, total: Bytes) -> Self {
        let want = |domain: &Domain| match domain {
            Domain::Guest(guest) => guest.fast(),
            // Nobody knows yet what will come up.
            Domain::Replay(..) => total,
        };
        let begin = dram::begin(total, self.domains.iter().map(want));
        self.domains.iter_mut().zip(begin).for_each(|(domain, dram)| domain.begin_within(dram));
        self.dram = Some(total);
        self
    }

    /// The guests.
    pub fn domains(&self) -> &[Domain] {
        &self.domains
    }

    /// Memory of all guests.
    pub fn memory(&self) -> Bytes {
        Bytes(self.domains.iter().map(|domain| domain.memory().0).sum())
    }

    /// One round of each guest that has not ended, as one; `None` when all have.
    pub fn round(&mut self) -> Option<Round> {
        let rounds = self.each(Domain::run);
        // A guest that has ended holds nothing and wants nothing.
        let runs: Vec<&Domain> = self
            .domains
            .iter()
            .zip(&rounds)
            .filter_map(|(domain, round)| round.as_ref().and(Some(domain)))
            .collect();
        let mut allowances = self.allow(&runs).into_iter();
        let asked: Vec<Option<(Allowance, Duration)>> = rounds
            .iter()
            .map(|round| round.as_ref().and_then(|round| Some((allowances.next()?, round.interval))))
            .collect();
        self.each_with(
            |domain, asked| {
                if let Some((allowance, interval)) = asked {
                    domain.plan(allowance, interval);
                }
            },
            &mut asked.into_iter(),
        );
        rounds.into_iter().flatten().reduce(together)
    }

    /// What these guests may have until the next round, in their order.
    fn allow(&self, domains: &[&Domain]) -> Vec<Allowance> {
        match self.dram {
            Some(total) => {
                let claims: Vec<Claim> = domains.iter().map(|domain| domain.claim()).collect();
                dram::share(total, &claims)
            }
            None => {
                let alone = |domain: &&Domain| Allowance {
                    granted: domain.policy_target(),
                    reachable: Bytes(u64::MAX),
                };
                domains.iter().map(alone).collect()
            }
        }
    }

    fn each<T: Send>(&mut self, work: impl Fn(&mut Domain) -> T + Sync) -> Vec<T> {
        self.each_with(|domain, ()| work(domain), &mut std::iter::repeat(()))
    }

    /// Does the same for all guests, on all CPUs; the answers in the guests' order.
    fn each_with<I: Send, T: Send>(
        &mut self,
        work: impl Fn(&mut Domain, I) -> T + Sync,
        inputs: &mut dyn Iterator<Item = I>,
    ) -> Vec<T> {
        let share = self.domains.len().div_ceil(self.threads).max(1);
        let work = &work;
        thread::scope(|scope| {
            let handles: Vec<_> = self
                .domains
                .chunks_mut(share)
                .map(|domains| {
                    let inputs: Vec<I> = inputs.take(domains.len()).collect();
                    scope.spawn(move || {
                        domains.iter_mut().zip(inputs).map(|(domain, input)| work(domain, input)).collect()
                    })
                })
                .collect();
            let done = handles.into_iter().flat_map(|handle: thread::ScopedJoinHandle<'_, Vec<T>>| {
                handle.join().unwrap_or_else(|fault| std::panic::resume_unwind(fault))
            });
            done.collect()
        })
    }
}

/// Two guests' rounds as one.
fn together(mut sum: Round, other: Round) -> Round {
    sum.end = sum.end.max(other.end);
    sum.interval = sum.interval.max(other.interval);
    sum.expected = match (sum.expected, other.expected) {
        (None, None) => None,
        // Who has counts alone is judged by them.
        (a, b) => Some(a.unwrap_or(sum.served).plus(&b.unwrap_or(other.served))),
    };
    sum.served = sum.served.plus(&other.served);
    if sum.basis != other.basis {
        sum.basis = super::Basis::Rates;
    }
    sum.demoted_pages += other.demoted_pages;
    sum.promoted_pages += other.promoted_pages;
    sum.oracle_moved_pages += other.oracle_moved_pages;
    sum.fast_pages += other.fast_pages;
    sum.target_pages += other.target_pages;
    sum.accessed_pages += other.accessed_pages;
    sum
}

impl Served {
    fn plus(mut self, other: &Served) -> Served {
        self.add(other);
        self
    }
}
