// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sampling single accesses of one guest, as its policy asks for, beside its harvests.

use std::time::Duration;

use ept_virt_core::migrate::Backoff;
use ept_virt_core::policy::Sampling as Policy;
use ept_virt_core::sampler::SamplerError;
use ept_virt_core::samples::{AccessSet, Sample, SampleSource, SampleStats};
use ept_virt_core::wire::SamplingStatus;

/// Between tries to begin, at first and at most.
const WAITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Records that the ring holds, at least and at most: the module's own default and limit.
const RING_RECORDS: (u64, u64) = (16_384, 1 << 20);

/// Rounds' worth of samples that the ring holds, so that a late round loses none.
const RING_ROUNDS: u64 = 4;

/// Begins to sample these kinds of access at this rate in Hz, into a ring of so many
/// records; or says why that can not be.
pub type Begin = dyn FnMut(AccessSet, u32, u32) -> Result<Box<dyn SampleSource>, String> + Send;

/// What was sampled in a round.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// The accesses.
    pub samples: Vec<Sample>,
    /// What the module did meanwhile: differences, but for what holds now.
    pub stats: SampleStats,
}

/// The sampling of one guest.
pub struct Sampling {
    begin: Box<Begin>,
    source: Option<Box<dyn SampleSource>>,
    access: AccessSet,
    rate_hz: u32,
    retry: Backoff,
    problem: Option<String>,
    /// Of the present source, as of the last round.
    seen: SampleStats,
    samples: u64,
    lost: u64,
}

impl Sampling {
    /// Samples nothing yet.
    pub fn new(begin: Box<Begin>) -> Self {
        Self {
            begin,
            source: None,
            access: AccessSet::default(),
            rate_hz: 0,
            retry: Backoff::new(WAITS.0, WAITS.1),
            problem: None,
            seen: SampleStats::default(),
            samples: 0,
            lost: 0,
        }
    }

    /// Ends a round of `interval`: what was sampled in it. Begins, changes or ends
    /// sampling as `policy` asks. Whatever fails is told by the status, and tried again:
    /// harvests go on without.
    pub fn round(&mut self, policy: &Policy, interval: Duration, now: Duration) -> Round {
        let mut round = Round::default();
        if let Err(error) = self.collect(&mut round) {
            self.end(Some(error.to_string()), now);
        }
        self.follow(policy, interval, now);
        round
    }

    /// For people and programs; none when nothing is to be sampled.
    pub fn status(&self) -> Option<SamplingStatus> {
        (self.rate_hz > 0).then(|| SamplingStatus {
            rate_hz: self.rate_hz,
            access: self.access.to_string(),
            samples: self.samples,
            lost: self.lost,
            // The heat knows.
            unweighed: 0,
            problem: self.problem.clone(),
        })
    }

    fn collect(&mut self, round: &mut Round) -> Result<(), SamplerError> {
        let Some(source) = &mut self.source else { return Ok(()) };
        source.drain(&mut round.samples)?;
        let stats = source.stats()?;
        let before = std::mem::replace(&mut self.seen, stats);
        round.stats = SampleStats {
            samples: stats.samples.saturating_sub(before.samples),
            dropped: stats.dropped.saturating_sub(before.dropped),
            unwanted: stats.unwanted.saturating_sub(before.unwanted),
            armed: stats.armed.saturating_sub(before.armed),
            released: stats.released.saturating_sub(before.released),
            flushes: stats.flushes.saturating_sub(before.flushes),
            ..stats
        };
        self.samples += round.samples.len() as u64;
        self.lost += round.stats.dropped;
        Ok(())
    }

    fn follow(&mut self, policy: &Policy, interval: Duration, now: Duration) {
        let asked = (policy.access, policy.rate_hz);
        let is_as_asked = asked == (self.access, self.rate_hz);
        (self.access, self.rate_hz) = asked;
        let changed = match &mut self.source {
            _ if policy.rate_hz == 0 => return self.end(None, now),
            Some(_) if is_as_asked => Ok(()),
            Some(source) => source.set(policy.access, policy.rate_hz),
            None if is_as_asked && self.retry.left(now).is_some() => Ok(()),
            None => return self.start(interval, now),
        };
        if let Err(error) = changed {
            self.end(Some(error.to_string()), now);
        }
    }

    fn start(&mut self, interval: Duration, now: Duration) {
        let expected = u128::from(self.rate_hz) * interval.as_millis() / 1000 * u128::from(RING_ROUNDS);
        let records = u64::try_from(expected).unwrap_or(u64::MAX).clamp(RING_RECORDS.0, RING_RECORDS.1);
        match (self.begin)(self.access, self.rate_hz, records as u32) {
            Ok(source) => {
                self.source = Some(source);
                self.problem = None;
                self.seen = SampleStats::default();
                self.retry.succeed();
            }
            Err(problem) => self.end(Some(problem), now),
        }
    }

    /// Without a problem it was no longer asked for.
    fn end(&mut self, problem: Option<String>, now: Duration) {
        self.source = None;
        if problem.is_some() {
            self.retry.fail(now);
        }
        self.problem = problem;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use ept_virt_core::sampler::Level;
    use ept_virt_core::samples::Access;

    use super::super::state::lock;
    use super::*;

    #[derive(Default)]
    struct Module {
        refuse: Option<&'static str>,
        ends: bool,
        begun: Vec<(String, u32, u32)>,
        set: Vec<(String, u32)>,
        waiting: Vec<Sample>,
        stats: SampleStats,
    }

    struct Fake(Arc<Mutex<Module>>);

    impl SampleSource for Fake {
        fn set(&mut self, access: AccessSet, freq_hz: u32) -> Result<(), SamplerError> {
            lock(&self.0).set.push((access.to_string(), freq_hz));
            Ok(())
        }

        fn drain(&mut self, out: &mut Vec<Sample>) -> Result<(), SamplerError> {
            out.append(&mut lock(&self.0).waiting);
            if lock(&self.0).ends { Err(SamplerError::Busy) } else { Ok(()) }
        }

        fn stats(&self) -> Result<SampleStats, SamplerError> {
            Ok(lock(&self.0).stats)
        }
    }

    fn sampling() -> (Sampling, Arc<Mutex<Module>>) {
        let module = Arc::new(Mutex::new(Module::default()));
        let shared = Arc::clone(&module);
        let begin = move |access: AccessSet, hz, records| {
            let mut module = lock(&shared);
            module.begun.push((access.to_string(), hz, records));
            match module.refuse {
                Some(why) => Err(why.to_owned()),
                None => Ok(Box::new(Fake(Arc::clone(&shared))) as Box<dyn SampleSource>),
            }
        };
        (Sampling::new(Box::new(begin)), module)
    }

    fn policy(access: &str, rate_hz: u32) -> Policy {
        let access = AccessSet::from_letters(access).unwrap();
        Policy { rate_hz, access, ..ept_virt_core::policy::Policy::default().sampling }
    }

    fn sample() -> Sample {
        let (time, level) = (Duration::ZERO, Level::Page4K);
        Sample { gfn: 1, time, vcpu: 0, access: Access::Read, level, page_walk: false }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn follows_the_policy() {
        let (mut sampling, module) = sampling();
        sampling.round(&policy("rwx", 0), SECOND, SECOND);
        assert!(sampling.status().is_none() && lock(&module).begun.is_empty());
        sampling.round(&policy("w", 50_000), SECOND, SECOND);
        lock(&module).waiting = vec![sample(); 3];
        lock(&module).stats = SampleStats { samples: 5, dropped: 2, armed: 9, ..SampleStats::default() };
        let round = sampling.round(&policy("w", 50_000), SECOND, SECOND * 2);
        assert_eq!((round.samples.len(), round.stats.dropped, round.stats.armed), (3, 2, 9));
        sampling.round(&policy("rw", 100), SECOND, SECOND * 3);
        assert_eq!(lock(&module).begun, [("w".to_owned(), 50_000, 200_000)], "room for four rounds");
        assert_eq!(lock(&module).set, [("rw".to_owned(), 100)]);
        let status = sampling.status().unwrap();
        assert_eq!((status.samples, status.lost, status.access.as_str()), (3, 2, "rw"));
        // What is no longer asked for ends with its session.
        sampling.round(&policy("rw", 0), SECOND, SECOND * 4);
        assert!(sampling.source.is_none() && sampling.status().is_none());
    }

    #[test]
    fn failures_are_told_and_tried_again_now_and_then() {
        let (mut sampling, module) = sampling();
        lock(&module).refuse = Some("busy");
        for second in 0..60 {
            sampling.round(&policy("r", 10), SECOND, SECOND * second);
        }
        // After 1, 2, 4, 8, 16, 32 s.
        assert_eq!(lock(&module).begun.len(), 6);
        assert_eq!(sampling.status().unwrap().problem.as_deref(), Some("busy"));
        lock(&module).refuse = None;
        sampling.round(&policy("r", 10), SECOND, SECOND * 120);
        assert_eq!(sampling.status().unwrap().problem, None);
        lock(&module).ends = true;
        lock(&module).waiting = vec![sample()];
        let round = sampling.round(&policy("r", 10), SECOND, SECOND * 121);
        assert_eq!(round.samples.len(), 1, "what was read before it failed counts");
        assert!(sampling.status().unwrap().problem.unwrap().contains("another session"));
    }
}
