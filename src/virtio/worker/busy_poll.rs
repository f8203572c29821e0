//! Spins for a little while before the worker sleeps (`--poll-max-ns`). A guest that has the next request ready a few
//! microseconds after a completion then need not wake the worker, and on real hardware that wake-up is the most expensive
//! part of a small request. While the worker spins, the guest need not even kick.
//!
//! Spinning takes processor time that the guest could use. So it is off by default, bounded, and given up where it does not
//! pay: after a spin that found nothing the worker sleeps without one, twice as often after each further such spin.

use std::time::{Duration, Instant};

use super::Worker;
#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};
use crate::disk::add;

/// How many sleeps in a row go without a spin, at most, after many spins that found nothing.
const MAX_SKIPPED: u32 = 1024;

/// How many times a spin reads memory between two reads of the clock. One in a model, so that a spin often ends just when
/// something arrives.
const SPINS_PER_CLOCK: u32 = if cfg!(all(test, feature = "model")) { 1 } else { 16 };

/// How many turns in a row may go without the back-end's `wait`, which reports wake-ups. Commands must be obeyed though the
/// guest never pauses.
const MAX_TURNS_WITHOUT_WAIT: u32 = 64;

/// Decides when to spin before a sleep.
#[derive(Debug)]
pub(super) struct Polling {
    /// The longest spin; zero: the worker never spins.
    longest: Duration,
    /// How many sleeps go without a spin before the next one.
    skip: u32,
    /// The value that `skip` got after the last spin that found nothing.
    backoff: u32,
    /// How many turns have passed since the back-end's `wait`.
    turns_without_wait: u32,
}

impl Polling {
    pub(super) fn new(longest: Duration) -> Self {
        Polling { longest, skip: 0, backoff: 0, turns_without_wait: 0 }
    }

    /// Whether a spin before the next sleep may pay.
    fn is_due(&self) -> bool {
        self.skip == 0 && !self.longest.is_zero()
    }

    /// Notes that the worker sleeps without a spin.
    fn record_sleep(&mut self) {
        self.turns_without_wait = 0;
        self.skip = self.skip.saturating_sub(1);
    }

    /// Notes a spin, and whether it found something.
    fn record_spin(&mut self, found: bool) {
        self.backoff = if found { 0 } else { (self.backoff * 2).clamp(1, MAX_SKIPPED) };
        self.skip = self.backoff;
    }

    /// Whether one more turn may begin without the back-end's `wait`.
    fn may_skip_wait(&mut self) -> bool {
        self.turns_without_wait = (self.turns_without_wait + 1) % MAX_TURNS_WITHOUT_WAIT;
        self.turns_without_wait != 0
    }
}

impl Worker {
    /// Whether this turn leaves the guest's kicks disabled, because the worker is about to poll. It does not while
    /// something keeps it from taking what it would find.
    pub(super) fn will_poll(&self) -> bool {
        self.takes_requests() && self.polling.is_due() && !self.is_limited()
    }

    /// Whether nothing but the limits can keep the worker from popping.
    #[inline]
    pub(super) fn takes_requests(&self) -> bool {
        !self.requests.blocked && !self.broken && self.is_serving() && !self.backend.has_backlog()
    }

    /// Spins if this turn left kicks disabled. Returns whether the next turn can begin without the back-end's `wait`.
    pub(super) fn skips_sleep(&mut self) -> bool {
        if !std::mem::take(&mut self.turn.notifications_disabled) {
            self.polling.record_sleep();
            return false;
        }
        // A thread of the kernel or of librbd makes the sync, and may need this very processor.
        let spins = !self.engine.is_syncing();
        let found = spins && self.spin();
        if spins {
            self.polling.record_spin(found);
        }
        if found {
            add(&self.counters.polled, 1);
        } else {
            // From here on the guest kicks again. It did not kick for what it has made available until now.
            let more = self.ring.enable_kicks();
            #[cfg(all(test, feature = "model"))]
            let more = more && !planted(Mutant::SleepsWithoutCheck);
            self.turn.poll_again |= more;
        }
        self.turn.poll_again |= found;
        self.turn.poll_again && self.polling.may_skip_wait()
    }

    /// Watches the virtqueue and the back-end for as long as a spin may last. Returns whether anything arrived.
    fn spin(&mut self) -> bool {
        // What fails here fails in `wait` as well, which reports it.
        let _ = self.backend.io.submit();
        let start = Instant::now();
        loop {
            for _ in 0..SPINS_PER_CLOCK {
                if self.ring.has_more() || self.backend.io.has_completions() {
                    return true;
                }
                std::hint::spin_loop();
                crate::base::sync::let_others_run();
            }
            if start.elapsed() >= self.polling.longest {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spins_that_find_nothing_become_rare_and_one_that_finds_something_resets_that() {
        let mut polling = Polling::new(Duration::from_micros(50));
        let mut sleeps_without_spin = 0;
        for _ in 0..20 {
            while !polling.is_due() {
                polling.record_sleep();
                sleeps_without_spin += 1;
            }
            polling.record_spin(false);
        }
        assert_eq!(sleeps_without_spin, (1..19).map(|n| (1 << n).min(MAX_SKIPPED)).sum::<u32>() + 1);
        while !polling.is_due() {
            polling.record_sleep();
        }
        polling.record_spin(true);
        assert!(polling.is_due());
        polling.record_spin(false);
        polling.record_sleep();
        assert!(polling.is_due(), "the first spin that finds nothing costs one spin");
    }

    #[test]
    fn a_polling_worker_waits_once_in_every_64_turns() {
        let mut polling = Polling::new(Duration::from_micros(50));
        let waits = (0..10 * MAX_TURNS_WITHOUT_WAIT).filter(|_| !polling.may_skip_wait()).count();
        assert_eq!(waits, 10);
    }

    #[test]
    fn polling_is_disabled_by_a_zero_limit() {
        assert!(!Polling::new(Duration::ZERO).is_due());
    }
}
