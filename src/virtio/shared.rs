//! Memory that the front-end shares for its own bookkeeping: the in-flight region, the dirty log.

use std::fs::File;

use rustix::fs::{SealFlags, fcntl_get_seals};
use vhost::vhost_user::{Error, Result};
use vm_memory::{FileOffset, MmapRegion};

/// Maps `len` bytes at `offset` of a file that the front-end handed over; `what` names it in the log. Refused: what lies
/// behind the end of the file, and a file that could be cut later, for touching what is no longer there would kill us
/// (SIGBUS). QEMU seals both of its own.
pub(super) fn map(what: &str, file: File, offset: u64, len: u64) -> Result<MmapRegion> {
    let refuse = |why: String| {
        log::error!("the front-end's {what}: {why}");
        Error::InvalidParam
    };
    let end = offset.checked_add(len).ok_or(Error::InvalidParam)?;
    let found = file.metadata().map_err(Error::ReqHandlerError)?.len();
    if len == 0 || found < end {
        return Err(refuse(format!("it is to have {len} bytes at {offset}, and its file has {found}")));
    }
    if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        return Err(refuse("its file can be cut while it is used; a memfd sealed against that is needed".into()));
    }
    let len = usize::try_from(len).map_err(|_| Error::InvalidParam)?;
    MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(|error| refuse(error.to_string()))
}
