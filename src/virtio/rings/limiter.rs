//! The limits of a disk's rates, shared by its rings: the buckets of [`crate::engine::throttle`], a lock and a clock.

use std::time::{Duration, Instant};

use crate::base::sync::Mutex;
use crate::engine::throttle::{Direction, Limits, Slot, Throttle};

/// The buckets that all rings of a disk fill. Without limits there is no limiter. Another set of limits is another limiter.
pub(in crate::virtio) struct Limiter {
    start: Instant,
    throttle: Mutex<Throttle>,
}

impl Limiter {
    /// Empty buckets. `limits` are checked.
    pub(super) fn new(limits: Limits) -> Self {
        Limiter { start: Instant::now(), throttle: Mutex::new(Throttle::new(limits, 0)) }
    }

    /// The limits.
    pub(in crate::virtio) fn limits(&self) -> Limits {
        *self.lock().limits()
    }

    /// The time, as the slots have it.
    pub(in crate::virtio) fn now(&self) -> u64 {
        // This wraps after 584 years.
        self.start.elapsed().as_nanos() as u64
    }

    /// How long it is until `at`. Zero: it is over.
    pub(in crate::virtio) fn time_until(&self, at: u64) -> Duration {
        Duration::from_nanos(at.saturating_sub(self.now()))
    }

    /// Counts a request. Returns when it may go.
    pub(in crate::virtio) fn take(&self, direction: Direction, bytes: u64, now: u64) -> Slot {
        self.lock().take(direction, bytes, now)
    }

    /// Takes back a request that will not go.
    pub(in crate::virtio) fn give_back(&self, slot: Slot, now: u64) {
        self.lock().give_back(slot, now);
    }

    fn lock(&self) -> crate::base::sync::MutexGuard<'_, Throttle> {
        self.throttle.lock().expect("no panic while held")
    }
}
