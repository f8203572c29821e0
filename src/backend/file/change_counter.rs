//! Knows whether there is anything to sync, so that a flush costs no system call when nothing was written before it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts the changes of an image and how many of them a successful sync has covered. All queues of a back-end share
/// it.
///
/// Each change is counted before its op is reaped, and a sync reads the count before it begins. What a guest's flush
/// must cover was reaped, completed and seen by the driver before the driver sent the flush, and this order also holds
/// between threads.
pub(super) struct ChangeCounter {
    changes: AtomicU64,
    covered: AtomicU64,
}

/// The changes that a sync covers: all that were counted when it began.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct ChangeStamp(u64);

impl Default for ChangeCounter {
    /// Starts with one change: what an earlier process acknowledged may still be in the cache only.
    fn default() -> Self {
        ChangeCounter { changes: AtomicU64::new(1), covered: AtomicU64::new(0) }
    }
}

impl ChangeCounter {
    /// Counts an op that changed the image, or that failed and may have changed it.
    pub(super) fn add(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Begins a sync. Returns `None` when everything is durable already.
    pub(super) fn begin_sync(&self) -> Option<ChangeStamp> {
        let changes = self.changes.load(Ordering::SeqCst);
        (self.covered.load(Ordering::SeqCst) < changes).then_some(ChangeStamp(changes))
    }

    /// Records that the sync that began with `stamp` succeeded.
    pub(super) fn sync_succeeded(&self, stamp: ChangeStamp) {
        self.covered.fetch_max(stamp.0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_covers_what_was_changed_before_it_began() {
        let counter = ChangeCounter::default();
        let first = counter.begin_sync().expect("an earlier process may have written");
        counter.add();
        counter.sync_succeeded(first);
        let second = counter.begin_sync().expect("changed while the first one ran");
        assert!(counter.begin_sync().is_some(), "a running sync covers nothing yet");
        counter.sync_succeeded(second);
        counter.sync_succeeded(first);
        assert!(counter.begin_sync().is_none(), "an older sync that ends later takes nothing back");
        counter.add();
        assert!(counter.begin_sync().is_some());
    }
}
