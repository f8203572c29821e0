//! What the queues of one image counted, and the changes that were seen.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::base::rate_limit::RateLimiter;
use crate::disk::{ChangedWrite, Event, Events, StableWritesStatus};

/// Changes shown in the status.
const MAX_CHANGES: usize = 8;

/// What one queue counts. Written by its thread alone.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) copied_writes: AtomicU64,
    pub(super) copied_bytes: AtomicU64,
    pub(super) waited_writes: AtomicU64,
    pub(super) checked_writes: AtomicU64,
    pub(super) changed_writes: AtomicU64,
}

impl Tally {
    /// The owner's way to count.
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

/// All queues of an image, those that are gone included.
pub(super) struct Tallies {
    events: Arc<Events>,
    state: Mutex<State>,
}

struct State {
    open: Vec<Arc<Tally>>,
    /// Of queues that are gone, and the last changes.
    gone: StableWritesStatus,
    recent: VecDeque<ChangedWrite>,
    /// Limits the events.
    events: RateLimiter,
}

impl Tallies {
    /// Changes are told to `events`.
    pub(super) fn new(events: Arc<Events>) -> Arc<Self> {
        let state = State {
            open: Vec::new(),
            gone: StableWritesStatus::default(),
            recent: VecDeque::new(),
            events: RateLimiter::for_events(),
        };
        Arc::new(Tallies { events, state: Mutex::new(state) })
    }

    /// For a new queue.
    pub(super) fn open(&self) -> Arc<Tally> {
        let State { open, gone, .. } = &mut *self.state.lock().expect("no panic while held");
        open.retain(|tally| {
            let is_open = Arc::strong_count(tally) > 1;
            if !is_open {
                tally.sum_into(gone);
            }
            is_open
        });
        let tally = Arc::new(Tally::default());
        open.push(tally.clone());
        tally
    }

    /// A write's buffer changed under way. The log gets the first one only: a guest can do this as often as it likes.
    pub(super) fn changed(&self, offset: u64, len: u64) {
        let when = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (is_first, admitted) = {
            let mut state = self.state.lock().expect("no panic while held");
            let is_first = state.recent.is_empty();
            if state.recent.len() == MAX_CHANGES {
                state.recent.pop_front();
            }
            state.recent.push_back(ChangedWrite { offset, length: len, when });
            (is_first, state.events.admit(Instant::now()))
        };
        if is_first {
            log::warn!(
                "the guest changed the buffer of a write of {len} bytes at {offset} while it was under way; over a medium \
                 that reads twice use --stable-writes copy. Further ones are counted in the status"
            );
        }
        if let Some(suppressed) = admitted {
            self.events.send(Event::BufferChanged { offset, len, suppressed });
        }
    }

    /// The sums and the last changes; the rest is the caller's.
    pub(super) fn status(&self) -> StableWritesStatus {
        let state = self.state.lock().expect("no panic while held");
        let mut status = state.gone.clone();
        state.open.iter().for_each(|tally| tally.sum_into(&mut status));
        status.last_changed = state.recent.iter().cloned().collect();
        status
    }
}
