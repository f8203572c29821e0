//! Looking for work a little longer before going to sleep (`--poll-max-ns`): a guest that has the next request ready a
//! few microseconds after the last answer need not wake us, which on real hardware is the dearest part of a small
//! request; and while we look it need not even kick.
//!
//! It takes processor time that the guest could use, so it is off unless asked for, bounded, and given up where it does
//! not pay: after a look that found nothing, sleeps go unprepared, twice as many after each further one.

use std::time::{Duration, Instant};

use super::Worker;
use crate::virtio::rings::counters::add;

/// Sleeps without a look before them, at most, after many that found nothing.
const MAX_SKIPPED: u32 = 1024;

/// Looks at memory between two looks at the clock. In a model one, so that a look often ends just when something comes.
const SPINS_PER_CLOCK: u32 = if cfg!(all(test, feature = "model")) { 1 } else { 16 };

/// Turns in a row without asking the back-end's `wait` for wake-ups: a command must not wait for the guest to pause.
const MAX_TURNS_WITHOUT_WAIT: u32 = 64;

/// When a look before a sleep is worth its while.
#[derive(Debug)]
pub(super) struct Polling {
    /// Longest look; zero: never.
    longest: Duration,
    /// Sleeps that go unprepared before the next look.
    skip: u32,
    /// What `skip` was after the last look that found nothing.
    penalty: u32,
    /// Turns since the back-end was last asked for wake-ups.
    deaf: u32,
}

impl Polling {
    pub(super) fn new(longest: Duration) -> Self {
        Polling { longest, skip: 0, penalty: 0, deaf: 0 }
    }

    /// Whether a look before the next sleep may pay.
    fn is_due(&self) -> bool {
        self.skip == 0 && !self.longest.is_zero()
    }

    /// A sleep without a look.
    fn slept(&mut self) {
        self.deaf = 0;
        self.skip = self.skip.saturating_sub(1);
    }

    /// A look was taken.
    fn looked(&mut self, found: bool) {
        self.penalty = if found { 0 } else { (self.penalty * 2).clamp(1, MAX_SKIPPED) };
        self.skip = self.penalty;
    }

    /// Whether one more turn may begin without asking for wake-ups.
    fn may_stay_deaf(&mut self) -> bool {
        self.deaf = (self.deaf + 1) % MAX_TURNS_WITHOUT_WAIT;
        self.deaf != 0
    }
}

impl Worker {
    /// Whether the guest should be left without a wish for kicks at the end of this turn, because we look ourselves: not
    /// while something keeps us from taking what we would see.
    pub(super) fn leaves_kicks_off(&self) -> bool {
        let takes_requests = !self.held && !self.broken && self.stopping.is_none() && self.backlog.is_empty();
        takes_requests && self.polling.is_due()
    }

    /// Between two turns: whether the next can begin without asking the back-end's `wait` first.
    pub(super) fn finds_work(&mut self) -> bool {
        if !std::mem::take(&mut self.unarmed) {
            self.polling.slept();
            return false;
        }
        // Who makes a sync is a thread of the kernel's or of librbd's, and may want this very processor.
        let looks = !self.engine.is_syncing();
        let found = looks && self.look_around();
        if looks {
            self.polling.looked(found);
        }
        if found {
            add(&self.counters.polled, 1);
        } else {
            // From here on the guest kicks again. What it made available meanwhile it told nobody of.
            let more = self.ring.enable_kicks();
            #[cfg(all(test, feature = "model"))]
            let more = more
                && !crate::base::sync::interleavings::planted(
                    crate::base::sync::interleavings::Mutant::SleepsUnlooking,
                );
            self.more |= more;
        }
        self.more |= found;
        self.more && self.polling.may_stay_deaf()
    }

    /// Watches the ring and the back-end for as long as a look may last. Whether anything came.
    fn look_around(&mut self) -> bool {
        // What fails here fails in `wait` as well, which says so.
        let _ = self.io.submit();
        let start = Instant::now();
        loop {
            for _ in 0..SPINS_PER_CLOCK {
                if self.ring.has_more() || self.io.has_news() {
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
    fn looks_that_find_nothing_become_rare_and_one_that_does_makes_up_for_all() {
        let mut polling = Polling::new(Duration::from_micros(50));
        let mut unprepared = 0;
        for _ in 0..20 {
            while !polling.is_due() {
                polling.slept();
                unprepared += 1;
            }
            polling.looked(false);
        }
        assert_eq!(unprepared, (1..19).map(|n| (1 << n).min(MAX_SKIPPED)).sum::<u32>() + 1);
        while !polling.is_due() {
            polling.slept();
        }
        polling.looked(true);
        assert!(polling.is_due());
        polling.looked(false);
        polling.slept();
        assert!(polling.is_due(), "the first miss costs one look");
    }

    #[test]
    fn it_never_stays_deaf_for_long() {
        let mut polling = Polling::new(Duration::from_micros(50));
        let asked = (0..10 * MAX_TURNS_WITHOUT_WAIT).filter(|_| !polling.may_stay_deaf()).count();
        assert_eq!(asked, 10);
    }

    #[test]
    fn not_asked_for_it_is_never_done() {
        assert!(!Polling::new(Duration::ZERO).is_due());
    }
}
