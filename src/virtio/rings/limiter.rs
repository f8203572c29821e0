//! The limits of a disk's rates, shared by its rings: the buckets of [`crate::engine::throttle`], a lock and a clock.

use std::time::{Duration, Instant};

use crate::base::sync::Mutex;
use crate::engine::throttle::{Direction, Limits, Slot, Throttle};

/// The buckets that all rings of a disk fill. Without limits there is no limiter. Another set of limits is another limiter.
pub(in crate::virtio) struct Limiter {
    start: Instant,
    state: Mutex<State>,
}

struct State {
    throttle: Throttle,
    /// Until when nothing may be set aside.
    in_debt_until: u64,
}

impl Limiter {
    /// Empty buckets. `limits` are checked.
    pub(super) fn new(limits: Limits) -> Self {
        let state = State { throttle: Throttle::new(limits, 0), in_debt_until: 0 };
        Limiter { start: Instant::now(), state: Mutex::new(state) }
    }

    /// The limits.
    pub(in crate::virtio) fn limits(&self) -> Limits {
        *self.lock().throttle.limits()
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
        self.lock().throttle.take(direction, bytes, now)
    }

    /// Takes back a request that will not go.
    pub(in crate::virtio) fn give_back(&self, slot: Slot, now: u64) {
        self.lock().throttle.give_back(slot, now);
    }

    /// Whether requests may be popped and set aside while they wait: reads and writes have limits of their own, and no
    /// virtqueue that stopped had requests go before their time that have not leaked yet. A guest that queues requests
    /// and resets the device, again and again, would otherwise never wait.
    pub(in crate::virtio) fn may_set_aside(&self) -> bool {
        let now = self.now();
        let state = self.lock();
        state.throttle.limits().is_split() && state.in_debt_until <= now
    }

    /// Has nothing set aside until then.
    pub(in crate::virtio) fn owe_until(&self, at: u64) {
        let mut state = self.lock();
        state.in_debt_until = state.in_debt_until.max(at);
    }

    fn lock(&self) -> crate::base::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }
}
