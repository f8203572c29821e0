//! A sync that failed never succeeds again (clause 5; QEMU's `page_cache_inconsistent`).

use std::sync::atomic::{AtomicI32, Ordering};

use super::Errno;

/// The first failure to make data durable. One for all queues of a back-end. A cache that failed to write back (the
/// page cache, librbd's) does not know afterwards what it lost.
///
/// Linux marks pages clean whose writeback failed, and the next fdatasync succeeds: what the medium holds is then
/// unknown for good. QEMU remembers this over the page cache only. We do so in the O_DIRECT modes as well: filesystems
/// fall back from O_DIRECT to the page cache silently (ext4 with data=journal, btrfs with checksums), and a device that
/// failed to flush its cache once may have lost what was in it.
#[derive(Default)]
pub(super) struct StickyError(AtomicI32);

impl StickyError {
    /// Why syncs fail, if they do.
    pub(super) fn get(&self) -> Option<Errno> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            errno => Some(Errno(errno)),
        }
    }

    /// Remembers a failure and says so once.
    pub(super) fn fail(&self, errno: Errno, image: &str) {
        if self.0.compare_exchange(0, errno.0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            let cause = std::io::Error::from_raw_os_error(errno.0);
            log::error!(
                "{image}: making data durable failed ({cause}); what the medium holds is unknown, so every later sync \
                 fails too. Mend the storage, check the guest's filesystems, and start virtioblkd again"
            );
        }
    }

    /// The outcome of a sync: what the kernel said, unless an earlier sync (maybe another queue's) failed.
    pub(super) fn judge(&self, result: Result<(), Errno>, image: &str) -> Result<(), Errno> {
        if let Err(errno) = result {
            self.fail(errno, image);
        }
        match self.get() {
            None => Ok(()),
            Some(first) => Err(result.err().unwrap_or(first)),
        }
    }
}
