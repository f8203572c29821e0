//! The counters of an image's queues, and the last changed buffers.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::base::rate_limit::RateLimiter;
use crate::disk::{ChangedWrite, Event, Events, StableWritesStatus};

/// The most changed writes that the status shows.
const MAX_CHANGES: usize = 8;

/// The counters of one queue. Only the queue's thread writes them.
#[derive(Default)]
pub(super) struct QueueCounters {
    pub(super) copied_writes: AtomicU64,
    pub(super) copied_bytes: AtomicU64,
    pub(super) waited_writes: AtomicU64,
    pub(super) checked_writes: AtomicU64,
    pub(super) changed_writes: AtomicU64,
}

impl QueueCounters {
    /// Adds to a counter. Only for the queue's thread: it does not exclude another writer.
    pub(super) fn add(counter: &AtomicU64, more: u64) {
        counter.store(counter.load(Relaxed) + more, Relaxed);
    }

    fn sum_into(&self, status: &mut StableWritesStatus) {
        status.copied_writes += self.copied_writes.load(Relaxed);
        status.copied_bytes += self.copied_bytes.load(Relaxed);
        status.waited_writes += self.waited_writes.load(Relaxed);
        status.checked_writes += self.checked_writes.load(Relaxed);
        status.changed_writes += self.changed_writes.load(Relaxed);
    }
}

/// The counters of all queues of an image, including queues that are closed.
pub(super) struct ImageCounters {
    events: Arc<Events>,
    state: Mutex<State>,
}

struct State {
    open: Vec<Arc<QueueCounters>>,
    /// The sums of the queues that are closed.
    closed: StableWritesStatus,
    recent: VecDeque<ChangedWrite>,
    event_limiter: RateLimiter,
}

impl ImageCounters {
    /// `events` receives an event for a changed buffer.
    pub(super) fn new(events: Arc<Events>) -> Arc<Self> {
        let state = State {
            open: Vec::new(),
            closed: StableWritesStatus::default(),
            recent: VecDeque::new(),
            event_limiter: RateLimiter::for_events(),
        };
        Arc::new(ImageCounters { events, state: Mutex::new(state) })
    }

    /// Creates the counters of a new queue.
    pub(super) fn add_queue(&self) -> Arc<QueueCounters> {
        let State { open, closed, .. } = &mut *self.state.lock().expect("no panic while held");
        open.retain(|queue| {
            let is_open = Arc::strong_count(queue) > 1;
            if !is_open {
                queue.sum_into(closed);
            }
            is_open
        });
        let queue = Arc::new(QueueCounters::default());
        open.push(queue.clone());
        queue
    }

    /// Records a write whose buffer changed in flight. Only the first one is logged, because a guest can cause any number.
    pub(super) fn record_change(&self, offset: u64, len: u64) {
        let when = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (is_first, admitted) = {
            let mut state = self.state.lock().expect("no panic while held");
            let is_first = state.recent.is_empty();
            if state.recent.len() == MAX_CHANGES {
                state.recent.pop_front();
            }
            state.recent.push_back(ChangedWrite { offset, length: len, when });
            (is_first, state.event_limiter.admit(Instant::now()))
        };
        if is_first {
            log::warn!(
                "the guest changed the buffer of a write of {len} bytes at {offset} while it was in flight; on a medium \
                 that reads a buffer twice use --stable-writes copy. The status counts further changes"
            );
        }
        if let Some(suppressed) = admitted {
            self.events.send(Event::BufferChanged { offset, len, suppressed });
        }
    }

    /// Returns a status with the sums and the last changes. The caller fills in the other fields.
    pub(super) fn status(&self) -> StableWritesStatus {
        let state = self.state.lock().expect("no panic while held");
        let mut status = state.closed.clone();
        state.open.iter().for_each(|queue| queue.sum_into(&mut status));
        status.last_changed = state.recent.iter().cloned().collect();
        status
    }
}
