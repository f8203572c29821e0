//! Reads the ends of an image file, which show its format.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::super::image_format::{HEAD, TAIL, recognize};
use super::super::{ImageEnds, IoBuf};
use super::geometry::{self, Alignment};
use crate::backend::preadv;

/// How long to wait for the format of an image that cannot be served.
const FORMAT_TIMEOUT: Duration = Duration::from_secs(2);

/// Reads the first and the last bytes of a file of `size` bytes, which need not be whole blocks. May block.
pub(super) fn read(file: BorrowedFd<'_>, size: u64, align: Alignment) -> io::Result<ImageEnds> {
    let unit = u64::from(align.offset);
    let read_at = |offset: u64, len: u64| -> io::Result<Vec<u8>> {
        let len = usize::try_from(len.next_multiple_of(unit)).expect("a few KiB");
        if len == 0 {
            return Ok(Vec::new());
        }
        let buf = IoBuf::owned(len, (align.memory as usize).max(HEAD), 0);
        let read = preadv::transfer(file, false, &buf, 0..len, offset, 0, &mut Vec::new())
            .map_err(|errno| io::Error::from_raw_os_error(errno.0))?;
        let mut bytes = vec![0; read];
        buf.copy_to(0, &mut bytes);
        Ok(bytes)
    };
    let last = size.saturating_sub(TAIL as u64) / unit * unit;
    let mut tail = read_at(last, size - last)?;
    // A file may have grown meanwhile.
    tail.truncate(usize::try_from(size - last).expect("a few KiB"));
    Ok(ImageEnds { head: read_at(0, HEAD as u64)?, tail })
}

/// Returns the format of a file that cannot be served as raw, for the error's text. Waits for [`FORMAT_TIMEOUT`] at most;
/// the thread that reads may continue until the error ends the process.
pub(super) fn format_in_time(path: &Path, file: BorrowedFd<'_>, size: u64) -> Option<&'static str> {
    let file = geometry::reopen(file, rustix::fs::OFlags::RDONLY).ok()?;
    let (sender, found) = mpsc::channel();
    let work = move || {
        let ends = read(file.as_fd(), size, Alignment { memory: 1, offset: 1 });
        // The receiver may have stopped waiting.
        let _ = sender.send(ends.ok().and_then(|ends| recognize(&ends)));
    };
    if let Err(error) = thread::Builder::new().name("format".into()).spawn(work) {
        log::debug!("{}: cannot start a thread to read its format: {error}", path.display());
        return None;
    }
    found.recv_timeout(FORMAT_TIMEOUT).ok().flatten()
}
