//! UNSAFE. Duplicates a descriptor that this process inherited and that an option names by its number.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Duplicates the inherited descriptor; the duplicate is closed on exec. The inherited one is never closed, because another
/// part of this process may own it. Fails with EBADF if no descriptor is open under this number.
pub(super) fn duplicate(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes and returns numbers and touches no memory; for a wrong number it returns EBADF.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above created this descriptor and nothing else has its number, so only the `OwnedFd` closes it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
