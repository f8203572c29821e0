//! Every short script of virtqueues that ask, wait, give up and go, under many small limits. The oracle keeps no level: it
//! looks at what went, and when.
//!
//! - **Never too much**: between two requests that went, the sum of those from the first to the one before the last is no
//!   more than the bucket's size and what leaks in that time (the definition of a leaky bucket). One request a virtqueue
//!   may be added where a rate of one direction makes a request wait that the total has counted already, and where one gave
//!   up: those behind it keep their times, and the next one goes beside the last of them.
//! - **Never too late**: where all rates count both directions, requests go at the times at which QEMU's algorithm lets a
//!   single queue of them go.
//! - **In turn**: those that wait for the same rates go in the order in which they asked.

use super::*;

const STEP: u64 = 250_000_000;
const RINGS: usize = 2;
const DEPTH: usize = 5;

/// A request that went or waits: who asked when, and its slot.
#[derive(Clone, Copy, Debug)]
struct Asked {
    ring: usize,
    asked: u64,
    slot: Slot,
}

struct Script<'a> {
    limits: &'a Limits,
    throttle: Throttle,
    now: u64,
    waiting: [Option<Asked>; RINGS],
    /// In the order in which they asked. Those that gave up are not among them.
    all: Vec<Asked>,
    gave_up: bool,
}

impl Script<'_> {
    fn ask(&mut self, ring: usize, direction: Direction, bytes: u64) {
        let slot = self.throttle.take(direction, bytes, self.now);
        let asked = Asked { ring, asked: self.now, slot };
        self.waiting[ring] = (slot.at > self.now).then_some(asked);
        self.all.push(asked);
    }

    fn give_up(&mut self, ring: usize) {
        let Some(asked) = self.waiting[ring].take() else { return };
        if asked.slot.at > self.now {
            self.throttle.give_back(asked.slot, self.now);
            self.all.retain(|other| other.ring != ring || other.slot != asked.slot || other.asked != asked.asked);
            self.gave_up = true;
        }
    }

    fn check(&self) {
        for rate in 0..RATES {
            self.check_rate(rate);
        }
        let is_one_queue = !self.limits.is_split();
        if is_one_queue && !self.gave_up {
            assert!(self.all.is_sorted_by_key(|asked| asked.slot.at), "{:?} {:?}", self.limits, self.all);
            assert_eq!(self.times(), qemu_times(self.limits, &self.all), "{:?} {:?}", self.limits, self.all);
        }
    }

    /// Never too much of one rate.
    fn check_rate(&self, index: usize) {
        let rate = self.limits.rates[index];
        if rate.average == 0 {
            return;
        }
        let units = |asked: &Asked| {
            self.throttle.units(asked.slot.direction, asked.slot.bytes).find(|(at, _)| *at == index).map(|(_, u)| u)
        };
        let mut went: Vec<(u64, u128)> =
            self.all.iter().filter_map(|asked| Some((asked.slot.at, units(asked)?))).collect();
        went.sort_by_key(|(at, _)| *at);
        let most = went.iter().map(|(_, units)| *units).max().unwrap_or_default();
        let early = if self.limits.is_split() || self.gave_up { most * RINGS as u128 } else { 0 };
        let size = if rate.max == 0 { u128::from(rate.average) * NANO / 10 } else { u128::from(rate.max) * NANO };
        let size = size * u128::from(rate.burst_seconds());
        for (first, (from, _)) in went.iter().enumerate() {
            let mut sum = 0;
            for (to, units) in &went[first..] {
                let leaked = u128::from(rate.average) * u128::from(to - from);
                assert!(sum <= size + leaked + early, "rate {index}: {:?} {:?}", self.limits, self.all);
                sum += units;
            }
        }
    }

    fn times(&self) -> Vec<u64> {
        self.all.iter().map(|asked| asked.slot.at / 1000).collect()
    }
}

/// The microsecond at which each of `all` goes by QEMU's algorithm, as one queue: the foremost waits for
/// `throttle_compute_wait`, is accounted, and only then the next is looked at. Both of a burst's conditions hold.
fn qemu_times(limits: &Limits, all: &[Asked]) -> Vec<u64> {
    let mut levels = [(0.0f64, 0.0f64); RATES];
    let mut now = 0.0f64;
    let mut times = Vec::new();
    for asked in all {
        let mut leak = |levels: &mut [(f64, f64); RATES], to: f64| {
            for (level, rate) in levels.iter_mut().zip(&limits.rates) {
                level.0 = (level.0 - rate.average as f64 * (to - now)).max(0.0);
                level.1 = (level.1 - rate.max as f64 * (to - now)).max(0.0);
            }
            now = to;
        };
        let arrived = (asked.asked as f64 / 1e9).max(now_of(&times));
        leak(&mut levels, arrived);
        let wait = levels.iter().zip(&limits.rates).filter(|(_, rate)| rate.average > 0).map(|(level, rate)| {
            let max = rate.max as f64;
            let size = if rate.max == 0 { rate.average as f64 / 10.0 } else { max * rate.burst_seconds() as f64 };
            let main = ((level.0 - size) / rate.average as f64).max(0.0);
            let burst = if rate.burst_seconds() > 1 { ((level.1 - max / 10.0) / max).max(0.0) } else { 0.0 };
            main.max(burst)
        });
        let goes = arrived + wait.fold(0.0, f64::max);
        leak(&mut levels, goes);
        let bytes = asked.slot.bytes as f64;
        let operations = if limits.op_size > 0 { (bytes / limits.op_size as f64).max(1.0) } else { 1.0 };
        for (index, level) in levels.iter_mut().enumerate() {
            let units = if index < 3 { bytes } else { operations };
            *level = (level.0 + units, level.1 + units);
        }
        times.push(goes);
    }
    times.iter().map(|seconds| (seconds * 1e6 + 0.01) as u64).collect()
}

fn now_of(times: &[f64]) -> f64 {
    times.last().copied().unwrap_or(0.0)
}

fn explore(script: &Script<'_>, depth: usize, scripts: &mut u64) {
    *scripts += 1;
    script.check();
    if depth == 0 {
        return;
    }
    let fork =
        || Script { limits: script.limits, throttle: script.throttle.clone(), all: script.all.clone(), ..*script };
    for ring in 0..RINGS {
        if script.waiting[ring].is_some_and(|asked| asked.slot.at > script.now) {
            let mut next = fork();
            next.give_up(ring);
            explore(&next, depth - 1, scripts);
            continue;
        }
        for (direction, bytes) in [(Direction::Read, 1), (Direction::Write, 1), (Direction::Write, 3)] {
            let mut next = fork();
            next.ask(ring, direction, bytes);
            explore(&next, depth - 1, scripts);
        }
    }
    for steps in [1, 5] {
        let mut next = fork();
        next.now += steps * STEP;
        explore(&next, depth - 1, scripts);
    }
}

#[test]
fn every_short_script_keeps_every_small_limit() {
    let mut cases: Vec<Limits> = Vec::new();
    for (average, max, max_length) in [(1, 0, 0), (20, 0, 0), (1, 2, 1), (2, 3, 2)] {
        let rate = Rate { average, max, max_length };
        for (rates, op_size) in
            [(&[0][..], 0), (&[3], 0), (&[3], 2), (&[0, 3], 0), (&[1], 0), (&[5], 0), (&[2, 3], 0), (&[1, 2, 4, 5], 2)]
        {
            let mut limits = Limits { op_size, ..Limits::default() };
            rates.iter().for_each(|index| limits.rates[*index] = rate);
            assert_eq!(limits.check(Words::Libvirt), Ok(()));
            cases.push(limits);
        }
    }
    let mut scripts = 0;
    for limits in &cases {
        let throttle = Throttle::new(*limits, 0);
        let script = Script { limits, throttle, now: 0, waiting: [None; RINGS], all: Vec::new(), gave_up: false };
        explore(&script, DEPTH, &mut scripts);
    }
    assert!(scripts > 300_000, "{scripts}");
}
