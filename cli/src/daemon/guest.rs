// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rounds of one guest: harvest, judge, move. No thread and no clock of its
//! own, so that tests drive it with a fake sampler and a fake mover.

pub(super) mod share;

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ept_virt_core::heat::store::SlotRange;
use ept_virt_core::heat::{self, COLD_BELOW, ClassCounts, HOT_FROM, Span};
use ept_virt_core::memory::{GuestMemory, Staying};
use ept_virt_core::migrate::{
    Backoff, MoveOutcome, Mover, Moves, ProcessGone, Refused, RefusedBytes, TokenBucket, keep_bytes,
    unit_bytes,
};
use ept_virt_core::plan::{MoveUnit, quota_pages};
use ept_virt_core::policy::{Excluded, Mode, Policy};
use ept_virt_core::sampler::{Harvest, HarvestRequest, HarvestStats, MemSlot, Sampler, SamplerError};
use ept_virt_core::samples::Sample;
use ept_virt_core::topology::{Latencies, Tiers};
use ept_virt_core::units::{BYTES_PER_2M, Bytes, PAGE_BYTES};
use ept_virt_core::wire::{MoveTotals, Place, RoundStatus, SamplingStatus, SlowdownStatus};

use super::sampling::{self, Sampling};
use super::slowdown::Watch;
use super::state::lock;
use super::tap::Tap;

use share::Share;

/// How long nothing is moved after the kernel forbade it.
const HOLD: Duration = Duration::from_secs(30);

/// How long nothing goes to a tier that has no room for it, at first and at most.
const FULL_WAITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Pages of which it is verified in each round that they lie where the harvest says.
const VERIFIED_PAGES: usize = 64;

/// Rounds come a little early or late; a plan is due all the same.
const PLAN_SLACK: Duration = Duration::from_millis(50);

/// Pages in one look at the places of unmapped pages.
const SURVEY_PAGES: usize = 512;

/// Pages that are harvested at once: 4 GiB. Their bitmaps are 128 KiB each, and still in
/// the cache when they are taken in; and nobody waits long for the guest's memory.
const PART_PAGES: usize = 1 << 20;

/// The parts in which a slot is harvested.
fn parts(slot: &MemSlot) -> impl Iterator<Item = Range<usize>> {
    let pages = slot.page_count as usize;
    (0..pages).step_by(PART_PAGES).map(move |start| start..(start + PART_PAGES).min(pages))
}

/// What to do with a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orders {
    /// The effective policy.
    pub policy: Policy,
    /// The effective tiers.
    pub tiers: Tiers,
    /// Why nothing is moved though the policy says so.
    pub obstacle: Option<String>,
    /// Memory that is left where it is.
    pub excluded: Excluded,
    /// Of the tiers, where the policy asks for what needs them.
    pub latencies: Option<Latencies>,
    /// The guest's CPUs stand still, and so does its heat.
    pub suspended: bool,
    /// What the guest has of its memory now, where libvirt tells.
    pub current_memory: Option<Bytes>,
    /// The host takes memory away by what it sees accessed: it must be told of what
    /// harvests clear.
    pub keep_young: bool,
}

impl Orders {
    /// What a policy asks for on these tiers; nothing is in its way.
    pub fn new(policy: Policy, tiers: Tiers) -> Self {
        Self {
            policy,
            tiers,
            obstacle: None,
            excluded: Excluded::default(),
            latencies: None,
            suspended: false,
            current_memory: None,
            keep_young: false,
        }
    }

    /// Whether pages are to be moved.
    pub fn place(&self) -> bool {
        self.policy.mode == Mode::Place && self.obstacle.is_none()
    }
}

/// How moving goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Nothing is left.
    Done,
    /// Some units were tried, more are left.
    More,
    /// The bandwidth is used up for this long.
    Wait(Duration),
}

/// One guest under observation.
pub struct Guest {
    sampler: Box<dyn Sampler>,
    mover: Box<dyn Mover>,
    memory: Arc<Mutex<GuestMemory>>,
    orders: Orders,
    share: Share,
    harvest: Harvest,
    sampling: Option<Sampling>,
    watch: Option<Watch>,
    bucket: TokenBucket,
    refused: RefusedBytes,
    totals: MoveTotals,
    rounds: u64,
    /// Times are on the caller's clock.
    harvested_at: Option<Duration>,
    /// What was accessed before does not count in the round that comes.
    watched_from: Option<Duration>,
    /// Time from here on is none for the guest.
    suspended_since: Option<Duration>,
    planned_at: Option<Duration>,
    /// The kernel forbade moves; until when they are not tried again.
    forbidden_until: Option<Duration>,
    /// The kernel found no room on the slow, on the fast tier.
    full: [Backoff; 2],
    slow_is_full: bool,
    /// More lies on the fast tier than granted, and none of it can leave: why.
    stays: Option<Staying>,
    /// Somebody records the rounds.
    tap: Option<Tap>,
}

impl Guest {
    /// A guest of which nothing is known yet.
    pub fn new(
        sampler: Box<dyn Sampler>,
        mover: Box<dyn Mover>,
        memory: Arc<Mutex<GuestMemory>>,
        orders: Orders,
        now: Duration,
    ) -> Self {
        let mut blank = GuestMemory::new(orders.policy.heat_params());
        blank.exclude(&orders.excluded);
        *lock(&memory) = blank;
        Self {
            sampler,
            mover,
            memory,
            suspended_since: orders.suspended.then_some(now),
            bucket: TokenBucket::new(orders.policy.migration.bandwidth.0, now),
            orders,
            share: Share::default(),
            harvest: Harvest::default(),
            sampling: None,
            watch: None,
            refused: RefusedBytes::default(),
            totals: MoveTotals::default(),
            rounds: 0,
            harvested_at: None,
            watched_from: None,
            planned_at: None,
            forbidden_until: None,
            full: Self::not_full(),
            slow_is_full: false,
            stays: None,
            tap: None,
        }
    }

    fn not_full() -> [Backoff; 2] {
        [Backoff::new(FULL_WAITS.0, FULL_WAITS.1); 2]
    }

    /// Gives what rounds find to somebody who records it, from the next one on.
    pub fn record(&mut self, tap: Tap) {
        self.tap = Some(tap);
    }

    /// Lets accesses be sampled as the policy asks for.
    pub fn sample_by(&mut self, sampling: Sampling) {
        self.sampling = Some(sampling);
    }

    /// Lets the guest have more DRAM while it is slowed down too much.
    pub fn watch_by(&mut self, watch: Watch) {
        self.watch = Some(watch);
    }

    /// By how much it is slowed down; none when the policy does not limit that.
    pub fn slowdown(&self) -> Option<SlowdownStatus> {
        self.watch.as_ref()?.status(&self.orders.policy, self.orders.latencies.as_ref())
    }

    /// How sampling goes; none when nothing is to be sampled.
    pub fn sampling(&self) -> Option<SamplingStatus> {
        let status = self.sampling.as_ref().and_then(Sampling::status)?;
        Some(SamplingStatus { unweighed: lock(&self.memory).unweighed(), ..status })
    }

    /// What is done with the guest.
    pub fn orders(&self) -> &Orders {
        &self.orders
    }

    /// Goes on with other orders.
    pub fn obey(&mut self, orders: Orders, now: Duration) {
        let mut memory = lock(&self.memory);
        memory.set_params(orders.policy.heat_params());
        memory.exclude(&orders.excluded);
        if orders.tiers != self.orders.tiers {
            memory.survey_again();
            self.full = Self::not_full();
        }
        drop(memory);
        self.bucket.set_rate(orders.policy.migration.bandwidth.0, now);
        (self.forbidden_until, self.planned_at) = (None, None);
        match (self.suspended_since, orders.suspended) {
            (None, true) => self.suspended_since = Some(now),
            (Some(_), false) => {
                self.harvested_at = self.harvested_at(now);
                self.watched_from = self.without_rest(self.watched_from, now);
                self.suspended_since = None;
            }
            _ => {}
        }
        self.orders = orders;
    }

    /// When the last round was, as if the guest had never stood still since.
    pub fn harvested_at(&self, now: Duration) -> Option<Duration> {
        self.without_rest(self.harvested_at, now)
    }

    /// A time, as if the guest had never stood still since.
    fn without_rest(&self, at: Option<Duration>, now: Duration) -> Option<Duration> {
        let stood = self.suspended_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        at.map(|at| at + stood)
    }

    /// Whether rounds would find nothing new.
    pub fn rests(&self) -> bool {
        self.suspended_since.is_some() && self.rounds > 0
    }

    /// Learns which memory slots there are.
    pub fn learn_slots(&mut self) -> Result<Vec<SlotRange>, SamplerError> {
        let (generation, infos) = self.sampler.memslots()?;
        let mut memory = lock(&self.memory);
        memory.adopt(generation, infos);
        Ok(memory.slots().map(|(_, slot)| SlotRange::from(slot)).collect())
    }

    /// Goes on with heat from before this daemon, whose last round was at
    /// `harvested_at`: what was accessed since then the tables still know.
    pub fn recall(&mut self, heat: Vec<(SlotRange, Vec<u16>)>, harvested_at: Duration) -> usize {
        let slots = lock(&self.memory).recall(heat);
        if slots > 0 {
            self.harvested_at = Some(harvested_at);
            self.share.recall(self.orders.policy.half_life);
        }
        slots
    }

    /// Bytes moved and refused since the start.
    pub fn totals(&self) -> MoveTotals {
        MoveTotals { refused: self.refused.to_wire(), ..self.totals.clone() }
    }

    /// Size and number of the memory slots.
    pub fn size(&self) -> (Bytes, u32) {
        let memory = lock(&self.memory);
        (memory.bytes(), memory.slots().count() as u32)
    }

    /// What is excluded, and what is odd about that, in plain words.
    pub fn excluded(&self) -> (Bytes, Vec<String>) {
        let memory = lock(&self.memory);
        let mut warnings = self.orders.excluded.warnings.clone();
        // Before the first round there is no memory at all.
        let in_vain = memory.excluded_in_vain().filter(|_| self.rounds > 0);
        warnings.extend(in_vain.map(|frames| {
            let [start, end] = [frames.start, frames.end].map(|frame| frame * PAGE_BYTES);
            format!("the policy excludes {start:#x} to {end:#x}, where the guest has no memory")
        }));
        (memory.excluded_bytes(), warnings)
    }

    /// Harvests all of the guest's memory once, and gives each part of a slot, by the
    /// slot's index, to `take`.
    fn harvest(
        &mut self,
        clear: bool,
        mut take: impl FnMut(&mut Self, usize, &MemSlot, Range<usize>),
    ) -> Result<HarvestStats, SamplerError> {
        let (generation, infos) = self.sampler.memslots()?;
        let slots: Vec<_> = {
            let mut memory = lock(&self.memory);
            if memory.adopt(generation, infos) {
                // What was planned may lie where other memory is now.
                self.planned_at = None;
            }
            memory.slots().map(|(index, info)| (index, *info)).collect()
        };
        let mut stats = HarvestStats::default();
        for (index, info) in &slots {
            for pages in parts(info) {
                let request = HarvestRequest {
                    gfn_start: info.gfn_start + pages.start as u64,
                    gfn_count: pages.len() as u64,
                    clear_accessed: clear,
                    // Nobody here asks what was written since when.
                    clear_dirty: false,
                    // One flush, at the end, serves the whole VM.
                    flush: clear
                        && self.orders.policy.sampling.flush
                        && index + 1 == slots.len()
                        && pages.end as u64 == info.page_count,
                    keep_young: clear && self.orders.keep_young,
                };
                self.sampler.harvest(&request, &self.orders.tiers.slow, &mut self.harvest)?;
                stats.add(&self.harvest.stats);
                take(self, *index, info, pages);
            }
        }
        Ok(stats)
    }

    /// Begins the window of the next round: what was accessed until now does not count in
    /// it. `clock` says when that was done.
    pub fn open_window(&mut self, clock: impl FnOnce() -> Duration) -> Result<(), SamplerError> {
        self.harvest(true, |_, _, _, _| ())?;
        self.watched_from = Some(clock());
        Ok(())
    }

    /// What was accessed since the last round, or since the window began; nothing changes.
    pub fn look(&mut self) -> Result<Bytes, SamplerError> {
        let stats = self.harvest(false, |_, _, _, _| ())?;
        Ok(Bytes::of_pages(stats.accessed))
    }

    /// Harvests all of the guest's memory once, and takes in what it tells.
    pub fn round(&mut self, now: Duration) -> Result<RoundStatus, SamplerError> {
        let started = Instant::now();
        let elapsed = self.harvested_at(now).map(|before| now.saturating_sub(before));
        let watched_from = self.watched_from.take().map(|from| now.saturating_sub(from));
        let span = elapsed.map(|elapsed| Span {
            elapsed,
            watched: watched_from.map_or(elapsed, |watched| watched.min(elapsed)),
        });
        let sampled = self.weigh_samples(elapsed.unwrap_or_default(), now);
        let stats = self.harvest(true, |guest, index, info, pages| {
            guest.tap.iter_mut().for_each(|tap| tap.add(info, &guest.harvest));
            lock(&guest.memory).observe_part(index, pages, &guest.harvest, span);
        })?;
        lock(&self.memory).end_round(span);
        self.tap.take_if(|tap| !tap.end(elapsed));
        if let (Some(watch), Some(elapsed)) = (&mut self.watch, elapsed) {
            let Orders { policy, latencies, .. } = &self.orders;
            watch.round(policy, latencies.as_ref(), &lock(&self.memory), &sampled, elapsed, now);
        }
        let classes = lock(&self.memory).classes();
        if let Some(elapsed) = elapsed {
            self.observe_use(classes.used(), elapsed);
        }
        self.harvested_at = Some(self.suspended_since.unwrap_or(now));
        self.rounds += 1;
        Ok(self.round_status(&stats, &classes, span, started))
    }

    /// What was sampled since the last round counts in the heat by its kind.
    fn weigh_samples(&mut self, interval: Duration, now: Duration) -> sampling::Round {
        let Some(sampling) = &mut self.sampling else { return sampling::Round::default() };
        let policy = &self.orders.policy;
        let round = sampling.round(&policy.sampling, interval, now);
        let weigh = |sample: &Sample| (sample.gfn, sample.level, policy.weights.of(sample));
        lock(&self.memory).weigh(round.samples.iter().map(weigh));
        round
    }

    fn round_status(
        &self,
        stats: &HarvestStats,
        classes: &ClassCounts,
        span: Option<Span>,
        started: Instant,
    ) -> RoundStatus {
        let span = span.unwrap_or_default();
        let target = self.dram_target(lock(&self.memory).bytes());
        let half_life = self.orders.policy.half_life;
        // Of what is accessed outside of windows the heat does not know.
        let age = |temperature| match span.watched < span.elapsed {
            true => 0,
            false => heat::age(temperature, half_life).as_millis() as u64,
        };
        let bytes = |pages: u64| Bytes::of_pages(pages).0;
        RoundStatus {
            number: self.rounds,
            interval_ms: span.elapsed.as_millis() as u64,
            watched_us: span.watched.as_micros() as u64,
            harvest_us: stats.time_ns / 1000,
            back_end: stats.sources.words().into(),
            entries_read: stats.entries_read,
            flushes: stats.flushes,
            mapped_bytes: bytes(stats.mapped_4k + stats.mapped_2m + stats.mapped_1g),
            mapped_huge_bytes: bytes(stats.mapped_2m + stats.mapped_1g),
            accessed_bytes: bytes(stats.accessed),
            dirty_bytes: (!stats.dirty_untold).then(|| bytes(stats.dirty)),
            hot_bytes: bytes(classes.hot),
            warm_bytes: bytes(classes.warm),
            cold_bytes: bytes(classes.cold),
            warm_age_ms: age(HOT_FROM),
            cold_age_ms: age(COLD_BELOW),
            dram_target_bytes: target.map(|target| target.0),
            took_us: started.elapsed().as_micros() as u64,
            ..self.with_places(RoundStatus::default())
        }
    }

    /// A round's figures, with where the memory lies by now: pages move between rounds.
    pub fn with_places(&self, round: RoundStatus) -> RoundStatus {
        let places = lock(&self.memory).places();
        let bytes = |pages: u64| Bytes::of_pages(pages).0;
        RoundStatus {
            fast_bytes: bytes(places.fast),
            slow_bytes: bytes(places.slow),
            absent_bytes: bytes(places.absent),
            ..round
        }
    }

    /// Verifies of some pages that they lie where the harvest says.
    pub fn verify_places(&mut self) -> Result<(), ProcessGone> {
        let pages = lock(&self.memory).draw_mapped(VERIFIED_PAGES);
        let addresses: Vec<u64> = pages.iter().map(|page| page.hva).collect();
        let mut nodes = Vec::new();
        self.mover.places(&addresses, &mut nodes)?;
        let places = nodes.iter().map(|node| self.place(*node));
        let wrong = lock(&self.memory).verify_places(&pages, places);
        self.totals.places_verified += nodes.iter().flatten().count() as u64;
        self.totals.places_wrong += wrong;
        Ok(())
    }

    fn place(&self, node: Option<u32>) -> Place {
        match node {
            None => Place::Absent,
            Some(node) if self.orders.tiers.slow.contains(node) => Place::Slow,
            Some(_) => Place::Fast,
        }
    }

    /// Looks where unmapped pages lie, until all were looked at or `until`, or until the
    /// kernel does not tell.
    pub fn survey(&mut self, until: Instant) -> Result<(), ProcessGone> {
        let mut nodes = Vec::new();
        loop {
            let pages = lock(&self.memory).next_unmapped(SURVEY_PAGES);
            let addresses: Vec<u64> = pages.iter().map(|page| page.hva).collect();
            self.mover.places(&addresses, &mut nodes)?;
            let places = nodes.iter().map(|node| self.place(*node));
            let mut memory = lock(&self.memory);
            memory.record_places(&pages, places);
            if nodes.len() < pages.len() || memory.survey_came_round() || Instant::now() >= until {
                return Ok(());
            }
        }
    }

    /// Whether the place of every page has been looked at once.
    pub fn surveyed(&self) -> bool {
        lock(&self.memory).surveyed()
    }

    /// Why nothing, or not all, is moved now, though the orders say so, in plain words.
    pub fn hindrance(&self, now: Duration) -> Option<String> {
        if let Some(stop) = self.stop(now) {
            return Some(stop);
        }
        let again = |left: Duration| format!("tried again in {} s", left.as_secs() + 1);
        let [slow, fast] = self.full.map(|full| full.left(now).filter(|_| self.orders.place()));
        if let Some(left) = slow {
            Some(format!(
                "the kernel found no room on the slow tier for what should be demoted; {}",
                again(left)
            ))
        } else if let Some(left) = fast {
            Some(format!("the kernel found no room in DRAM for what should come there; {}", again(left)))
        } else if self.slow_is_full {
            Some("the slow tier has no room for what should be demoted".into())
        } else {
            let stays = self.stays.filter(|_| self.orders.place())?;
            let causes = Some(stays.to_string()).filter(|causes| !causes.is_empty());
            let causes = causes.map_or(String::new(), |causes| format!(": {causes}; huge pages count whole"));
            Some(format!("more lies in DRAM than the guest may have, and can not leave it now{causes}"))
        }
    }

    /// Why nothing at all is moved now.
    fn stop(&self, now: Duration) -> Option<String> {
        let memory = lock(&self.memory);
        if self.orders.suspended {
            Some("the guest is suspended: until it goes on its heat rests, and nothing is moved".into())
        } else if !self.orders.place() {
            self.orders.obstacle.clone()
        } else if memory.mostly_logged() {
            Some("placement pauses: the guest's writes are being logged, as for a live migration".into())
        } else if self.forbidden_until.is_some_and(|until| now < until) {
            Some(format!("placement pauses: not permitted: {}", Refused::NotPermitted.explanation()))
        } else if self.rounds > 0 && !memory.surveyed() {
            Some("placement waits until the place of every page is known".into())
        } else {
            None
        }
    }

    /// What the domain may have in DRAM: what the policy grants, and more while it is
    /// slowed down too much; `None` when that is all of its memory.
    fn dram_target(&self, memory: Bytes) -> Option<Bytes> {
        // A share is one of what the guest has, not of what a balloon keeps from it.
        let current = self.orders.current_memory.map_or(memory, |current| current.min(memory));
        let granted = self.orders.policy.dram_target(current)?;
        let wanted = self.watch.as_ref().map_or(granted, |watch| watch.wanted(granted));
        (wanted < memory).then_some(wanted)
    }

    /// Plans what to move from now on, if it is time to; else goes on with `moves`,
    /// unless nothing may move any more. `interval` is the time to the next round.
    pub fn plan_if_due(&mut self, moves: Moves, now: Duration, interval: Duration) -> Moves {
        let asked = self.orders.policy.migration.interval.unwrap_or_default();
        let is_due = self.planned_at.is_none_or(|at| now + PLAN_SLACK >= at + asked);
        match is_due || self.stop(now).is_some() {
            true => self.plan(now, interval.max(asked)),
            false => moves,
        }
    }

    /// Plans what to move in the next `interval`.
    pub fn plan(&mut self, now: Duration, interval: Duration) -> Moves {
        (self.slow_is_full, self.stays) = (false, None);
        if !self.orders.place() || self.stop(now).is_some() {
            return Moves::default();
        }
        self.planned_at = Some(now);
        let mut memory = lock(&self.memory);
        memory.release_held(now);
        let Orders { policy, tiers, .. } = &self.orders;
        // The host's own needs come before the policy's share.
        let fast = Bytes::of_pages(memory.places().fast).0;
        let reachable = fast.saturating_add(self.mover.room(&tiers.fast));
        let granted = self.share.granted().map_or(reachable, |granted| granted.0.min(reachable));
        let target = self.dram_target(memory.bytes()).map_or(granted, |target| target.0.min(granted));
        // The bucket keeps the pace.
        let quota_pages = quota_pages(policy.migration.bandwidth, interval);
        let mut plan = memory.plan(Some(Bytes(target)), policy.migration.tolerance, quota_pages);
        let [slow_is_closed, fast_is_closed] = self.full.map(|full| full.left(now).is_some());
        // Neither direction may count on the room that the other would have made.
        if slow_is_closed {
            plan.demote.clear();
            keep_bytes(&mut plan.promote, target.saturating_sub(fast));
        }
        if fast_is_closed {
            plan.promote.clear();
            keep_bytes(&mut plan.demote, fast.saturating_sub(target));
        }
        let none_leaves = fast >= target + BYTES_PER_2M && plan.demote.is_empty() && !slow_is_closed;
        self.stays = none_leaves.then(|| memory.staying());
        let wanted = plan.demote.len();
        keep_bytes(&mut plan.demote, self.mover.room(&tiers.slow));
        self.slow_is_full = plan.demote.len() < wanted;
        if !slow_is_closed && !fast_is_closed && !self.slow_is_full {
            memory.accept(&plan, quota_pages);
        }
        // Without the room that the demotions were to make, nothing comes.
        if self.slow_is_full {
            plan.promote.clear();
        }
        Moves::new(plan)
    }

    /// Moves as much as the bandwidth allows at once.
    pub fn move_some(
        &mut self,
        moves: &mut Moves,
        now: Duration,
        stop: &AtomicBool,
    ) -> Result<Pace, ProcessGone> {
        if self.planned_at.is_none() {
            *moves = Moves::default();
        }
        let burst = self.share.burst_bytes();
        let (place, units) = moves.slice(self.bucket.burst_bytes().min(burst));
        if units.is_empty() {
            return Ok(Pace::Done);
        }
        let bytes = units.iter().map(unit_bytes).sum();
        match self.take(bytes, now) {
            Err(Some(wait)) => return Ok(Pace::Wait(wait)),
            Err(None) => return Ok(Pace::Done),
            Ok(()) => {}
        }
        let tiers = &self.orders.tiers;
        let target = if place == Place::Slow { &tiers.slow } else { &tiers.fast };
        let outcome = self.mover.apply(units, target, stop)?;
        let tried = units.len() - outcome.left;
        self.charge(outcome.along_bytes(), now);
        self.account(&outcome, place, now);
        let is_full = |(_, result): &(MoveUnit, Result<(), Refused>)| *result == Err(Refused::NodeFull);
        let full = &mut self.full[usize::from(place == Place::Fast)];
        if outcome.units.iter().any(is_full) {
            full.fail(now);
            // What would come needs the room that what would go leaves.
            return Ok(Pace::Done);
        } else if outcome.moved_bytes() > 0 {
            full.succeed();
        }
        moves.done(place, tried, outcome.moved_bytes());
        if outcome.units.iter().any(|(_, result)| *result == Err(Refused::NotPermitted)) {
            self.forbidden_until = Some(now + HOLD);
            return Ok(Pace::Done);
        }
        Ok(Pace::More)
    }

    fn account(&mut self, outcome: &MoveOutcome, target: Place, now: Duration) {
        lock(&self.memory).record_moves(outcome, target, now);
        self.tell_held();
        self.refused.add(outcome);
        let (tried, moved) = match target {
            Place::Slow => (&mut self.totals.demote_tried_bytes, &mut self.totals.demoted_bytes),
            _ => (&mut self.totals.promote_tried_bytes, &mut self.totals.promoted_bytes),
        };
        *tried += outcome.tried_bytes();
        *moved += outcome.moved_bytes();
    }
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
