//! Whether there is anything to sync: a flush after nothing was written costs no system call.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts changes of an image and remembers which a good sync has covered. One for all queues of a back-end.
///
/// Every change is counted before its op is reaped, and a sync reads the count before it begins. What a guest's flush
/// must cover was reaped, answered and seen by the driver before the flush was sent, and that order holds between
/// threads too.
pub(super) struct ChangeCounter {
    changes: AtomicU64,
    covered: AtomicU64,
}

/// What a sync that begins now will cover.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct ChangeStamp(u64);

impl Default for ChangeCounter {
    /// Not clean: what another process, maybe our own predecessor, acknowledged may still be in the cache.
    fn default() -> Self {
        ChangeCounter { changes: AtomicU64::new(1), covered: AtomicU64::new(0) }
    }
}

impl ChangeCounter {
    /// An op changed the image, or failed and may have.
    pub(super) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// A sync is asked for. `None`: everything is durable already.
    pub(super) fn begin(&self) -> Option<ChangeStamp> {
        let changes = self.changes.load(Ordering::SeqCst);
        (self.covered.load(Ordering::SeqCst) < changes).then_some(ChangeStamp(changes))
    }

    /// The sync that began with `upto` succeeded.
    pub(super) fn synced(&self, upto: ChangeStamp) {
        self.covered.fetch_max(upto.0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_covers_what_was_changed_before_it_began() {
        let unsynced = ChangeCounter::default();
        let first = unsynced.begin().expect("a fresh image may hold a predecessor's writes");
        unsynced.changed();
        unsynced.synced(first);
        let second = unsynced.begin().expect("changed while the first ran");
        assert!(unsynced.begin().is_some(), "a sync that runs covers nobody yet");
        unsynced.synced(second);
        unsynced.synced(first);
        assert!(unsynced.begin().is_none(), "a late answer takes nothing back");
        unsynced.changed();
        assert!(unsynced.begin().is_some());
    }
}
