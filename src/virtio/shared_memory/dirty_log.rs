//! The dirty log of a live migration (LOG_SHMFD, VHOST_F_LOG_ALL): one bit for each page of guest memory. The server sets it
//! after it has written to the page, and the front-end then sends the page again. vm-memory does not see what io_uring
//! writes, so workers mark pages themselves, before the guest can see the completion: the data of a read, the status byte,
//! the used ring.
//!
//! A worker has the log, or none, for as long as it runs. To switch the log, the rings are stopped and started, so no request
//! is logged in part. Without a log this costs one branch a request.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserLog;
use vm_memory::GuestAddress;

use super::region::SharedRegion;
use super::sigbus::SessionSocket;
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};

/// How many bytes of guest memory a bit stands for (QEMU's VHOST_LOG_PAGE).
const PAGE: u64 = 4096;

/// The mapped log. The handler and the workers share it.
pub(in crate::virtio) struct DirtyLog {
    region: SharedRegion,
    /// It was logged that the log is too short.
    warned: AtomicBool,
}

impl DirtyLog {
    /// Maps the log that SET_LOG_BASE describes, for the session of `socket`.
    pub(in crate::virtio) fn map(log: &VhostUserLog, file: File, socket: &Arc<SessionSocket>) -> Result<Self> {
        let region = SharedRegion::map("dirty log", file, log.mmap_offset, log.mmap_size, socket)?;
        Ok(DirtyLog { region, warned: AtomicBool::new(false) })
    }

    /// The mapped region.
    pub(in crate::virtio) fn region(&self) -> &SharedRegion {
        &self.region
    }

    /// Marks the pages of `len` bytes of guest memory from `at` on, which were written. Any worker may call this.
    pub(in crate::virtio) fn mark(&self, at: GuestAddress, len: u64) {
        if len == 0 {
            return;
        }
        let last = at.0.saturating_add(len - 1) / PAGE;
        for page in at.0 / PAGE..=last {
            let byte = usize::try_from(page / 8).ok();
            match byte.and_then(|byte| self.region.atomic::<AtomicU8>(byte)) {
                // The front-end reads bits with an atomic exchange. The write to the page comes before the bit.
                Some(byte) => drop(byte.fetch_or(1 << (page % 8), Ordering::SeqCst)),
                _ if self.warned.swap(true, Ordering::Relaxed) => return,
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
    fn exactly_the_pages_that_were_written_are_marked() {
        let (socket, _peer) = SessionSocket::pair();
        let map = |message: &VhostUserLog, file: &File| DirtyLog::map(message, file.try_clone().unwrap(), &socket);
        let file: File = memfd_create("log", MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(8192).unwrap();
        let message = VhostUserLog { mmap_size: 16, mmap_offset: 4096 };
        assert!(map(&VhostUserLog { mmap_size: 4097, ..message }, &file).is_err());
        let log = map(&message, &file).unwrap();
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
