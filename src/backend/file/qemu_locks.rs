//! QEMU's image locks (block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes): one byte for each
//! permission.
//!
//! A user of the image holds a shared lock on byte 100 + i for each permission i that it uses, and on byte 200 + i for
//! each that it does not let others use. Then it checks whether another user's locks contradict its own.

use std::io;
use std::os::fd::BorrowedFd;

use crate::base::syscalls;

/// The first byte for permissions in use (RAW_LOCK_PERM_BASE).
const USED: u64 = 100;
/// The first byte for permissions that are not shared (RAW_LOCK_SHARED_BASE).
const NOT_SHARED: u64 = 200;

/// Number and name of the permission BLK_PERM_CONSISTENT_READ.
const READ: (u64, &str) = (0, "consistent read");
/// Number and name of the permission BLK_PERM_WRITE.
const WRITE: (u64, &str) = (1, "write");

/// Why an image could not be locked.
#[derive(Debug)]
pub(super) enum LockError {
    /// Another user has a permission that we do not share, or does not share one that we have: its name.
    InUse(&'static str),
    /// The filesystem or the kernel has no such locks.
    Unavailable(io::Error),
    /// The locks exist, and locking failed.
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

/// Takes the locks of a virtio-blk device with `share-rw=off`: it reads (and writes), and shares everything but
/// writing. The locks last as long as the open file description behind `fd`, or until [`unlock_image`]. After an error
/// none is held.
pub(super) fn lock_image(fd: BorrowedFd<'_>, read_only: bool) -> Result<(), LockError> {
    lock_and_check(fd, read_only).inspect_err(|_| unlock_image(fd))
}

/// Releases all image locks.
pub(super) fn unlock_image(fd: BorrowedFd<'_>) {
    for byte in [USED + READ.0, USED + WRITE.0, NOT_SHARED + WRITE.0] {
        if let Err(error) = syscalls::unlock_byte(fd, byte) {
            log::debug!("cannot release the lock on byte {byte} of the image: {error}");
        }
    }
}

/// Checks by the same locks that no other process uses the image at `path` in a way that contradicts our use. Releases
/// them at once. For libvirt's hook; the error says how to fix it.
pub fn check_unused(path: &std::path::Path, read_only: bool) -> Result<(), String> {
    let image =
        std::fs::File::open(path).map_err(|error| format!("cannot open the image '{}': {error}", path.display()))?;
    match lock_and_check(std::os::fd::AsFd::as_fd(&image), read_only) {
        Err(LockError::InUse(permission)) => Err(format!(
            "another process uses the image '{}' (QEMU's lock for \"{permission}\"): end it first, or give the guest \
             another image",
            path.display()
        )),
        // The daemon warns about a filesystem without locks.
        _ => Ok(()),
    }
}

fn lock_and_check(fd: BorrowedFd<'_>, read_only: bool) -> Result<(), LockError> {
    let used: &[_] = if read_only { &[READ] } else { &[READ, WRITE] };
    let not_shared = [WRITE];
    // First lock, then check: of two users that start together at least one sees the other.
    let lock = |byte, name| {
        syscalls::lock_byte_shared(fd, byte).map_err(|error| match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => LockError::InUse(name),
            _ => LockError::from(error),
        })
    };
    for &(bit, name) in used {
        lock(USED + bit, name)?;
    }
    for (bit, name) in not_shared {
        lock(NOT_SHARED + bit, name)?;
    }
    let check = |byte, name| match syscalls::byte_is_locked(fd, byte) {
        Ok(false) => Ok(()),
        Ok(true) => Err(LockError::InUse(name)),
        Err(error) => Err(LockError::from(error)),
    };
    for (bit, name) in not_shared {
        check(USED + bit, name)?;
    }
    for &(bit, name) in used {
        check(NOT_SHARED + bit, name)?;
    }
    Ok(())
}
