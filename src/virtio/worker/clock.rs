//! The worker's clock, which it reads at most once for a whole batch of completions and new requests.

use std::time::Instant;

use crate::disk::ticks;

/// The time of the present step of a turn, in [`ticks`] since `start`.
pub(super) struct TurnClock {
    /// The same for all virtqueues of a disk.
    start: Instant,
    now: Option<u64>,
}

impl TurnClock {
    pub(super) fn new(start: Instant) -> Self {
        TurnClock { start, now: None }
    }

    /// The time when this was called first since [`TurnClock::forget`]. So all requests that one turn pops or completes
    /// have one time, and a turn that does neither reads no clock.
    #[inline]
    pub(super) fn now(&mut self) -> u64 {
        *self.now.get_or_insert_with(|| ticks(self.start.elapsed()))
    }

    /// Time has passed: a turn began, or a call that may have taken a while was made.
    #[inline]
    pub(super) fn forget(&mut self) {
        self.now = None;
    }
}
