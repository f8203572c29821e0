//! QEMU's image locks (block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes): one byte a permission.
//!
//! A user of the image holds a shared lock on byte 100 + i for each permission i that it uses, and on byte 200 + i for
//! each that it does not let others use. Then it asks whether anybody's locks contradict its own.

use std::io;
use std::os::fd::BorrowedFd;

use crate::base::syscalls;

/// RAW_LOCK_PERM_BASE.
const USED: u64 = 100;
/// RAW_LOCK_SHARED_BASE.
const NOT_SHARED: u64 = 200;

/// BLK_PERM_CONSISTENT_READ.
const READ: (u64, &str) = (0, "consistent read");
/// BLK_PERM_WRITE.
const WRITE: (u64, &str) = (1, "write");

/// Why an image could not be locked.
#[derive(Debug)]
pub(super) enum LockError {
    /// Somebody uses what we do not share, or does not share what we use: the permission's name.
    InUse(&'static str),
    /// The filesystem or the kernel has no such locks.
    Unavailable(io::Error),
    /// It has, and they failed.
    Failed(io::Error),
}

impl From<io::Error> for LockError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            // ENOLCK: NFS without a lock daemon.
            Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOLCK) => LockError::Unavailable(error),
            _ => LockError::Failed(error),
        }
    }
}

/// Takes the locks of a virtio-blk device with `share-rw=off`: it reads (and writes) and shares all but writing. They
/// live as long as the open file description behind `fd`, or until [`unlock_image`]. On an error none is held.
pub(super) fn lock_image(fd: BorrowedFd<'_>, read_only: bool) -> Result<(), LockError> {
    hold_and_look(fd, read_only).inspect_err(|_| unlock_image(fd))
}

/// Lets go of all of them.
pub(super) fn unlock_image(fd: BorrowedFd<'_>) {
    for byte in [USED + READ.0, USED + WRITE.0, NOT_SHARED + WRITE.0] {
        if let Err(error) = syscalls::unlock_byte(fd, byte) {
            log::debug!("the lock on byte {byte} of the image cannot be given back: {error}");
        }
    }
}

/// Whether no other process uses the image at `path` in a way that contradicts our use, by the same locks. They are
/// released again at once. For libvirt's hook; the error says what to do.
pub fn check_unused(path: &std::path::Path, read_only: bool) -> Result<(), String> {
    let image =
        std::fs::File::open(path).map_err(|error| format!("cannot open the image '{}': {error}", path.display()))?;
    match hold_and_look(std::os::fd::AsFd::as_fd(&image), read_only) {
        Err(LockError::InUse(permission)) => Err(format!(
            "another process uses the image '{}' (QEMU's lock for \"{permission}\"): end it first, or give the guest \
             another image",
            path.display()
        )),
        // The daemon warns about a file system without locks.
        _ => Ok(()),
    }
}

fn hold_and_look(fd: BorrowedFd<'_>, read_only: bool) -> Result<(), LockError> {
    let used: &[_] = if read_only { &[READ] } else { &[READ, WRITE] };
    let not_shared = [WRITE];
    // First hold, then look: of two that start together at least one sees the other.
    let hold = |byte, name| {
        syscalls::lock_byte_shared(fd, byte).map_err(|error| match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => LockError::InUse(name),
            _ => LockError::from(error),
        })
    };
    for &(bit, name) in used {
        hold(USED + bit, name)?;
    }
    for (bit, name) in not_shared {
        hold(NOT_SHARED + bit, name)?;
    }
    let free = |byte, name| match syscalls::byte_is_locked(fd, byte) {
        Ok(false) => Ok(()),
        Ok(true) => Err(LockError::InUse(name)),
        Err(error) => Err(LockError::from(error)),
    };
    for (bit, name) in not_shared {
        free(USED + bit, name)?;
    }
    for &(bit, name) in used {
        free(NOT_SHARED + bit, name)?;
    }
    Ok(())
}
