//! A file or block device that gets another size while it is open.
//!
//! While a guest uses it nothing is noticed by itself: a block device tells nobody, and an operator who grows a file may
//! not want the guest to see it yet. `virtioblkctl resize` makes the daemon look, and so does the start of a guest's rings.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use rustix::fs::{SeekFrom, fstat, ftruncate, seek};

use super::Shared;
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// [`crate::backend::Backend::resize`] of a file.
pub(super) fn resize(shared: &Shared, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
    let refuse = |why: String| Err(io::Error::other(format!("{}: {why}", shared.name)));
    let before = shared.size.load(Ordering::Relaxed);
    let unit = u64::from(shared.geometry.logical_block.max(if shared.direct { shared.align.offset } else { 1 }));
    if let Some(bytes) = grow_to {
        if shared.is_device {
            return refuse(
                "a block device is grown by its own tools (lvextend, ...); then resize without a size".into(),
            );
        }
        if shared.geometry.read_only {
            return refuse("it is served with --read-only and cannot be grown from here".into());
        }
        if !bytes.is_multiple_of(unit) {
            return refuse(format!("{bytes} bytes are not whole blocks of {unit}; use a multiple of that"));
        }
        if bytes < size(shared)?.max(before) {
            return refuse(format!(
                "it has {before} bytes, more than {bytes}, and is never cut from here: when the guest no longer uses its \
                 end, cut it (truncate -s) and let the daemon see that (resize --force)"
            ));
        }
        // Not allocated: as sparse as it was made.
        ftruncate(&shared.fd, bytes).map_err(|error| {
            io::Error::other(format!("{}: it cannot be grown to {bytes} bytes: {error}", shared.name))
        })?;
    }
    let found = size(shared)?;
    let bytes = found - found % unit;
    if bytes == 0 {
        return refuse("it is empty now; give it its content back, or stop its guest".into());
    }
    if bytes < before && !shrink {
        return refuse(format!(
            "it has {bytes} bytes now and had {before}: what the guest keeps behind the new end is lost to it. Make the \
             image as large as it was, or, if the guest no longer uses that part, use --force"
        ));
    }
    shared.size.store(bytes, Ordering::Relaxed);
    Ok(bytes)
}

/// A guest begins to use the image: what it grew by meanwhile is there. One that was cut is served as it was, for the guest
/// that comes back may know it as that; what is missing fails.
pub(super) fn notice_growth(shared: &Shared) {
    match resize(shared, None, false) {
        Ok(_) => {}
        Err(error) => log_limited!(IMAGE_LOG, Warn, "{error}"),
    }
}

/// Bytes that the kernel says it has.
fn size(shared: &Shared) -> io::Result<u64> {
    if shared.is_device {
        // The position is nobody's: all I/O names its offset.
        return Ok(seek(shared.fd.as_fd(), SeekFrom::End(0))?);
    }
    Ok(u64::try_from(fstat(&shared.fd)?.st_size).unwrap_or(0))
}
