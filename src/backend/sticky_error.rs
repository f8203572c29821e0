//! After a sync has failed, no later sync succeeds (clause 5; QEMU's `page_cache_inconsistent`).

use std::sync::atomic::{AtomicI32, Ordering};

use super::Errno;

/// The first failure to make data durable, for all queues of a back-end. After a cache (the page cache, librbd's)
/// failed to write back, it does not know what it lost.
///
/// Linux marks pages clean whose writeback failed, and the next fdatasync succeeds: what the medium holds is then
/// unknown from then on. QEMU remembers this over the page cache only. We do so in the O_DIRECT modes as well:
/// filesystems fall back from O_DIRECT to the page cache silently (ext4 with data=journal, btrfs with checksums), and a
/// device that failed to flush its cache once may have lost what was in it.
#[derive(Default)]
pub(super) struct StickyError(AtomicI32);

impl StickyError {
    /// Returns the error that makes every sync fail, if there is one.
    pub(super) fn get(&self) -> Option<Errno> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            errno => Some(Errno(errno)),
        }
    }

    /// Records a failure. Logs the first one.
    pub(super) fn fail(&self, errno: Errno, image: &str) {
        if self.0.compare_exchange(0, errno.0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            let cause = std::io::Error::from_raw_os_error(errno.0);
            log::error!(
                "{image}: making data durable failed ({cause}); what the medium holds is unknown, so every later sync \
                 fails too. Repair the storage, check the guest's filesystems, and start virtioblkd again"
            );
        }
    }

    /// Records the result of a sync and returns what to report: the error of this sync, or that of an earlier one,
    /// perhaps of another queue.
    pub(super) fn record(&self, result: Result<(), Errno>, image: &str) -> Result<(), Errno> {
        if let Err(errno) = result {
            self.fail(errno, image);
        }
        match self.get() {
            None => Ok(()),
            Some(first) => Err(result.err().unwrap_or(first)),
        }
    }
}
