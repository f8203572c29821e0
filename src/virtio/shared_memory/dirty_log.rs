//! The dirty log of a live migration (LOG_SHMFD, VHOST_F_LOG_ALL): a bit a page of guest memory that we wrote to, so that
//! the front-end sends the page again. io_uring writes behind vm-memory's back, so pages are marked by hand, after they
//! were written and before the guest can see that: what a read stored, the status byte, the used ring.
//!
//! A ring's worker has the log, or none, for as long as it runs: to switch it, the rings are stopped and started, so
//! that no request is half logged. Without a log it costs one branch a request.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserLog;
use vm_memory::GuestAddress;

use super::region::SharedRegion;
use super::sigbus::SessionSocket;
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};

/// Bytes of guest memory that a bit stands for (QEMU's VHOST_LOG_PAGE).
const PAGE: u64 = 4096;

/// The log, mapped. Shared by the handler and the workers.
pub(in crate::virtio) struct DirtyLog {
    region: SharedRegion,
    /// It was said that the log is too short.
    told: AtomicBool,
}

impl DirtyLog {
    /// SET_LOG_BASE on the connection of `wire`.
    pub(in crate::virtio) fn map(told: &VhostUserLog, file: File, wire: &Arc<SessionSocket>) -> Result<Self> {
        let region = SharedRegion::map("dirty log", file, told.mmap_offset, told.mmap_size, wire)?;
        Ok(DirtyLog { region, told: AtomicBool::new(false) })
    }

    /// The memory.
    pub(in crate::virtio) fn shared(&self) -> &SharedRegion {
        &self.region
    }

    /// `len` bytes of guest memory from `at` on were written. Any worker.
    pub(in crate::virtio) fn mark(&self, at: GuestAddress, len: u64) {
        if len == 0 {
            return;
        }
        let last = at.0.saturating_add(len - 1) / PAGE;
        for page in at.0 / PAGE..=last {
            let byte = usize::try_from(page / 8).ok();
            match byte.and_then(|byte| self.region.cell::<AtomicU8>(byte)) {
                // The front-end takes bits with an atomic exchange; what we wrote to the page comes before the bit.
                Some(byte) => drop(byte.fetch_or(1 << (page % 8), Ordering::SeqCst)),
                _ if self.told.swap(true, Ordering::Relaxed) => return,
                _ => {
                    log_limited!(
                        FRONT_END_LOG,
                        Error,
                        "the front-end's dirty log has no bit for guest page {page:#x}: its migration is incomplete"
                    );
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn every_page_that_is_touched_is_marked_and_no_other() {
        let (wire, _peer) = SessionSocket::pair();
        let map = |told: &VhostUserLog, file: &File| DirtyLog::map(told, file.try_clone().unwrap(), &wire);
        let file: File = memfd_create("log", MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(8192).unwrap();
        let told = VhostUserLog { mmap_size: 16, mmap_offset: 4096 };
        assert!(map(&VhostUserLog { mmap_size: 4097, ..told }, &file).is_err());
        let log = map(&told, &file).unwrap();
        log.mark(GuestAddress(0), 0);
        log.mark(GuestAddress(4095), 1);
        log.mark(GuestAddress(3 * 4096 - 1), 2);
        log.mark(GuestAddress(8 * 4096), 9 * 4096);
        log.mark(GuestAddress(127 * 4096), 4096);
        // Behind the end of the log.
        log.mark(GuestAddress(128 * 4096), 1);
        log.mark(GuestAddress(u64::MAX), 2);
        let mut bits = [0; 4096];
        file.read_exact_at(&mut bits, 4096).unwrap();
        let mut wanted = [0; 4096];
        wanted[..3].copy_from_slice(&[0b1101, 0xff, 1]);
        wanted[15] = 0x80;
        assert!(bits == wanted, "{:?}", &bits[..16]);
        let mut before = [0; 4096];
        file.read_exact_at(&mut before, 0).unwrap();
        assert_eq!(before, [0; 4096]);
    }
}
