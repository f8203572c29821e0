//! UNSAFE. One read or write by a plain system call, in the caller's thread.
#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Errno, IoBuf};

/// The most iovecs in one call (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// Reads or writes `range` of `buf` at `offset` of the file, with preadv2(2) or pwritev2(2), or with pread(2) or
/// pwrite(2) where those suffice. Returns how many bytes were transferred, which may be fewer than asked for. `scratch`
/// holds the iovecs where a list must be built.
pub(super) fn transfer(
    file: BorrowedFd<'_>,
    write: bool,
    buf: &IoBuf,
    range: Range<usize>,
    offset: u64,
    flags: i32,
    scratch: &mut Vec<libc::iovec>,
) -> Result<usize, Errno> {
    let iovecs = if range == (0..buf.len()) && buf.iovecs().len() <= MAX_IOVECS {
        buf.iovecs()
    } else {
        scratch.clear();
        buf.push_range(range.start, range.len(), scratch);
        scratch.truncate(MAX_IOVECS);
        scratch
    };
    let fd = file.as_raw_fd();
    // Not by glibc's wrappers: they are cancellation points, which costs a tenth of a cached read in a program with
    // threads.
    let moved = match iovecs {
        // A list of one iovec would cost 4 % more. Kernels of 32 bits take the offset in halves.
        [one] if flags == 0 && cfg!(target_pointer_width = "64") => {
            let call = if write { libc::SYS_pwrite64 } else { libc::SYS_pread64 };
            // SAFETY: the iovec is memory that `buf`, borrowed for longer than the call, keeps mapped. No reference to
            // that memory exists, and the kernel returns EFAULT if its pages are gone.
            unsafe { libc::syscall(call, fd, one.iov_base, one.iov_len, offset) }
        }
        list => {
            let call = if write { libc::SYS_pwritev2 } else { libc::SYS_preadv2 };
            // SAFETY: as above, for every iovec; the list outlives the call and has `list.len()` entries. The offset's
            // upper half is for kernels of 32 bits.
            unsafe { libc::syscall(call, fd, list.as_ptr(), list.len(), offset, 0u64, flags) }
        }
    };
    // -1 is the only negative result.
    usize::try_from(moved).map_err(|_| Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)))
}
