//! UNSAFE. A descriptor that was given by its number: the one way to reach it is by that number.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// A duplicate of the inherited descriptor, closed on exec. The number itself stays open until the end: it may be
/// anybody's in this process, so that closing it is nobody's right. Errors: EBADF, nothing is open there.
pub(super) fn duplicate(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes and returns numbers and touches no memory; a wrong number is answered with EBADF.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made this number for the call above; nobody else knows it, and it is closed by `OwnedFd` alone.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
