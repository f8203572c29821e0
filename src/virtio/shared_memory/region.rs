//! Maps memory that the front-end shares besides the guest's memory: the in-flight region, the dirty log.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::fstatfs;
use vhost::vhost_user::{Error, Result};
use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory};

use super::sigbus::{GuardedMapping, SessionSocket};
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use crate::upgrade::Descriptors;
use crate::upgrade::session_state;

/// HUGETLBFS_MAGIC (linux/magic.h).
const HUGETLBFS: u32 = 0x9584_58f6;

/// A mapped region. It is accessed by atomics only, because the front-end writes to it too.
pub(in crate::virtio) struct SharedRegion {
    /// Dropped before the region is unmapped.
    _guard: GuardedMapping,
    region: MmapRegion,
}

impl SharedRegion {
    /// Maps `len` bytes at `offset` of a file that the front-end sent. `what` names the region in the log. Refuses a range
    /// behind the end of the file. A file that is truncated later ends the session of `socket`. Called by the vhost-user
    /// thread.
    pub(in crate::virtio) fn map(
        what: &str,
        file: File,
        offset: u64,
        len: u64,
        socket: &Arc<SessionSocket>,
    ) -> Result<Self> {
        let refuse = |why: String| {
            log_limited!(FRONT_END_LOG, Error, "the front-end's {what}: {why}");
            Error::InvalidParam
        };
        let end = offset.checked_add(len).ok_or(Error::InvalidParam)?;
        let found = file.metadata().map_err(Error::ReqHandlerError)?.len();
        if len == 0 || found < end {
            return Err(refuse(format!("it is to have {len} bytes at {offset}, and its file has {found}")));
        }
        whole_pages(&file, len).map_err(refuse)?;
        let len = usize::try_from(len).map_err(|_| Error::InvalidParam)?;
        let region =
            MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(|error| refuse(error.to_string()))?;
        Ok(SharedRegion { _guard: GuardedMapping::new(region.as_ptr(), region.size(), socket), region })
    }

    /// What another process needs to map the same region.
    pub(in crate::virtio) fn record(&self, descriptors: &mut Descriptors) -> io::Result<session_state::RegionState> {
        let source = self.region.file_offset().expect("it was mapped from a file");
        let file = descriptors.add_copy(source.file())?;
        Ok(session_state::RegionState { offset: source.start(), len: self.region.size() as u64, file })
    }

    /// The atomic at byte `at`. `None`: it is not aligned, or lies outside. Any thread may call this.
    #[inline]
    pub(in crate::virtio) fn atomic<A: AtomicInteger>(&self, at: usize) -> Option<&A> {
        self.region.get_atomic_ref(at).ok()
    }
}

/// Checks that `len` bytes of `file` can be mapped, and be covered with zeroes later ([`super::sigbus`]). Only whole huge
/// pages can: for a part of one the kernel maps more than it was asked for, and cannot unmap it in part. `Err` says what is
/// wrong.
pub(in crate::virtio) fn whole_pages(file: &File, len: u64) -> std::result::Result<(), String> {
    let found = fstatfs(file).map_err(|error| format!("fstatfs(2) of its file failed: {error}"))?;
    let page = found.f_bsize as u64;
    if found.f_type as u32 == HUGETLBFS && !len.is_multiple_of(page) {
        return Err(format!("{len} bytes of a file whose huge pages have {page}; only whole ones can be shared"));
    }
    Ok(())
}
