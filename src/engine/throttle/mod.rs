//! PURE. Limits of a disk's rates: leaky buckets as QEMU has them (util/throttle.c), with the time passed in.
//!
//! A bucket's level is what was admitted and has not leaked yet; it leaks at the average rate. A request may go as soon as
//! the level is no higher than the bucket's size, and then adds itself. A bucket for bursts of several seconds has a second
//! level, which leaks at the burst's rate and bounds that. See docs/throttle.txt of QEMU.
//!
//! All quantities are integers: levels are in billionths of a byte or of an operation, times in nanoseconds, so that
//! a rate times a time is exact.
//!
//! **A request that must wait is counted at once** ([`Throttle::take`]), and gets the time at which it may go. The next one
//! waits behind it. So requests of several virtqueues, each of which asks for its foremost request, go in the order in which
//! they asked: the virtqueues take turns. None must be woken by another, and one that ends holds no other up.

#[cfg(test)]
mod explore;
mod limits;
#[cfg(test)]
mod tests;

pub use limits::{Limits, MAX_VALUE, Words};
use limits::{RATES, Rate};

/// Billionths in one: of a unit in a level, and of a second in a time.
const NANO: u128 = 1_000_000_000;

/// What a request does with the data, as far as limits distinguish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// It reads.
    Read = 0,
    /// It changes the disk.
    Write = 1,
}

impl Direction {
    /// The other one.
    pub fn other(self) -> Direction {
        match self {
            Direction::Read => Direction::Write,
            Direction::Write => Direction::Read,
        }
    }
}

/// A request as the limits count it, and when it may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// When it may go, in the caller's nanoseconds.
    pub at: u64,
    /// Whether it reads.
    pub direction: Direction,
    /// Its bytes.
    pub bytes: u64,
}

/// The levels of one rate's bucket, in billionths of a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Bucket {
    level: u128,
    /// What leaks at the burst's rate. Used if a burst may last longer than a second.
    burst_level: u128,
}

impl Bucket {
    fn leak(&mut self, rate: &Rate, nanoseconds: u64) {
        let leaked = |rate: u64| u128::from(rate) * u128::from(nanoseconds);
        self.level = self.level.saturating_sub(leaked(rate.average));
        self.burst_level = self.burst_level.saturating_sub(leaked(rate.max));
    }

    /// How many nanoseconds the next request must wait.
    fn wait(&self, rate: &Rate) -> u64 {
        let size = match rate.max {
            // A tenth of a second's worth, because otherwise every second request would wait.
            0 => u128::from(rate.average) * (NANO / 10),
            max => u128::from(max) * u128::from(rate.burst_seconds()) * NANO,
        };
        let mut wait = time_to_leak(self.level.saturating_sub(size), rate.average);
        if rate.burst_seconds() > 1 {
            let above = self.burst_level.saturating_sub(u128::from(rate.max) * (NANO / 10));
            wait = wait.max(time_to_leak(above, rate.max));
        }
        wait
    }

    fn add(&mut self, rate: &Rate, units: u128) {
        self.level += units;
        if rate.burst_seconds() > 1 {
            self.burst_level += units;
        }
    }

    fn remove(&mut self, units: u128) {
        self.level = self.level.saturating_sub(units);
        self.burst_level = self.burst_level.saturating_sub(units);
    }
}

/// How many nanoseconds `amount` takes to leak, rounded up.
fn time_to_leak(amount: u128, rate: u64) -> u64 {
    if amount == 0 {
        return 0;
    }
    u64::try_from(amount.div_ceil(u128::from(rate))).unwrap_or(u64::MAX)
}

/// The limits of a disk, and what was admitted under them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Throttle {
    limits: Limits,
    buckets: [Bucket; RATES],
    /// When the buckets leaked last.
    leaked_at: u64,
}

impl Throttle {
    /// Empty buckets, at the time `now`. `limits` passed [`Limits::check`].
    pub fn new(limits: Limits, now: u64) -> Self {
        Throttle { limits, buckets: [Bucket::default(); RATES], leaked_at: now }
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Counts a request, and returns when it may go: at once if that is not after `now`.
    pub fn take(&mut self, direction: Direction, bytes: u64, now: u64) -> Slot {
        self.leak(now);
        let wait = self.rates_of(direction).map(|index| self.buckets[index].wait(&self.limits.rates[index])).max();
        for (index, units) in self.units(direction, bytes) {
            self.buckets[index].add(&self.limits.rates[index], units);
        }
        let at = match wait {
            None | Some(0) => now,
            Some(wait) => self.leaked_at.saturating_add(wait),
        };
        Slot { at, direction, bytes }
    }

    /// Takes back a request that [`Throttle::take`] counted and that will not go. A request whose time has come stays
    /// counted: what leaked since then would otherwise be saved up beyond the bucket's size.
    pub fn give_back(&mut self, slot: Slot, now: u64) {
        self.leak(now);
        if slot.at <= now {
            return;
        }
        for (index, units) in self.units(slot.direction, slot.bytes) {
            self.buckets[index].remove(units);
        }
    }

    fn leak(&mut self, now: u64) {
        // Threads that read the clock at the same time may come here in the other order.
        let passed = now.saturating_sub(self.leaked_at);
        self.leaked_at += passed;
        for (bucket, rate) in self.buckets.iter_mut().zip(&self.limits.rates) {
            bucket.leak(rate, passed);
        }
    }

    /// The rates that are limited and count this direction.
    fn rates_of(&self, direction: Direction) -> impl Iterator<Item = usize> + use<> {
        let (own, rates) = (direction as usize + 1, self.limits.rates);
        (0..RATES).filter(move |index| (index % 3 == 0 || index % 3 == own) && rates[*index].average > 0)
    }

    /// What a request counts in each of its rates.
    fn units(&self, direction: Direction, bytes: u64) -> impl Iterator<Item = (usize, u128)> + use<> {
        let op_size = self.limits.op_size;
        let operations = match op_size {
            0 => NANO,
            size if bytes <= size => NANO,
            size => u128::from(bytes) * NANO / u128::from(size),
        };
        let bytes = u128::from(bytes) * NANO;
        self.rates_of(direction).map(move |index| (index, if index < RATES / 2 { bytes } else { operations }))
    }
}
