//! Resizes a file or block device that is open.
//!
//! The daemon does not notice a new size by itself while a guest runs: a block device reports none, and an operator who
//! grows a file may not want the guest to see that yet. It checks the size on `virtioblkctl resize`, and when a guest's
//! virtqueues start.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use rustix::fs::{SeekFrom, fstat, ftruncate, seek};

use super::image::FileImage;
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// Implements [`crate::backend::Backend::resize`].
pub(super) fn resize(image: &FileImage, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
    let refuse = |why: String| Err(io::Error::other(format!("{}: {why}", image.file.name)));
    let before = image.size.load(Ordering::Relaxed);
    let unit =
        u64::from(image.geometry.logical_block.max(if image.limits.direct { image.limits.align.offset } else { 1 }));
    if let Some(bytes) = grow_to {
        if image.file.is_device {
            return refuse(
                "a block device is grown by its own tools (lvextend, ...); then resize without a size".into(),
            );
        }
        if image.geometry.read_only {
            return refuse("it is served with --read-only and cannot be grown from here".into());
        }
        if !bytes.is_multiple_of(unit) {
            return refuse(format!("{bytes} bytes are not whole blocks of {unit}; use a multiple of that"));
        }
        if bytes < size_now(image)?.max(before) {
            return refuse(format!(
                "it has {before} bytes, more than {bytes}, and virtioblkd never truncates an image: when the guest no \
                 longer uses its end, truncate it (truncate -s) and then use resize --force"
            ));
        }
        // The new part is a hole; nothing is allocated.
        ftruncate(&image.file.fd, bytes).map_err(|error| {
            io::Error::other(format!("{}: it cannot be grown to {bytes} bytes: {error}", image.file.name))
        })?;
    }
    let found = size_now(image)?;
    let bytes = found - found % unit;
    if bytes == 0 {
        return refuse("it is empty now; restore its content, or stop its guest".into());
    }
    if bytes < before && !shrink {
        return refuse(format!(
            "it has {bytes} bytes now and had {before}: the guest would lose what it has behind the new end. Make the \
             image as large as it was, or, if the guest no longer uses that part, use --force"
        ));
    }
    image.size.store(bytes, Ordering::Relaxed);
    Ok(bytes)
}

/// Takes the size of an image that grew while no guest used it. An image that was truncated keeps its size, because the
/// guest that returns may know that size; requests for the missing part fail.
pub(super) fn notice_growth(image: &FileImage) {
    match resize(image, None, false) {
        Ok(_) => {}
        Err(error) => log_limited!(IMAGE_LOG, Warn, "{error}"),
    }
}

/// Returns an error if the image has fewer than `size` bytes now.
pub(super) fn check_not_truncated(image: &FileImage, size: u64) -> io::Result<()> {
    let found = size_now(image)?;
    if found < size {
        return Err(io::Error::other(format!("{}: it was truncated from {size} bytes to {found}", image.file.name)));
    }
    Ok(())
}

/// Returns the size in bytes that the kernel reports.
fn size_now(image: &FileImage) -> io::Result<u64> {
    if image.file.is_device {
        // Nothing else uses the position: all I/O names its offset.
        return Ok(seek(image.file.fd.as_fd(), SeekFrom::End(0))?);
    }
    Ok(u64::try_from(fstat(&image.file.fd)?.st_size).unwrap_or(0))
}
