//! UNSAFE. System calls that no library wraps safely: locks of open file descriptions, ioctls of block devices,
//! clones of a part of a file, a file's extents, and descriptor tables.
//! Each function is one call.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// `_IO(0x12, 120)`.
const BLKIOMIN: libc::c_ulong = 0x1278;
/// `_IO(0x12, 121)`.
const BLKIOOPT: libc::c_ulong = 0x1279;
/// `_IO(0x12, 122)`.
const BLKALIGNOFF: libc::c_ulong = 0x127a;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One byte at `start`, for a lock of type `kind`.
fn one_byte(kind: libc::c_int, start: u64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as libc::off_t,
        l_len: 1,
        l_pid: 0,
    }
}

/// Takes a shared lock on the byte at `start`, owned by the open file description (fcntl(2), F_OFD_SETLK); closing the
/// description releases it. Errors: EAGAIN if another description holds it exclusively; EINVAL, ENOLCK or EOPNOTSUPP if
/// the kernel or the filesystem has no such locks.
pub(crate) fn lock_byte_shared(fd: BorrowedFd<'_>, start: u64) -> io::Result<()> {
    let lock = one_byte(libc::F_RDLCK, start);
    // SAFETY: `fd` is open and `lock` lives through the call, which only reads it.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

/// Releases the lock on the byte at `start`, of either type (F_OFD_SETLK with F_UNLCK).
pub(crate) fn unlock_byte(fd: BorrowedFd<'_>, start: u64) -> io::Result<()> {
    let lock = one_byte(libc::F_UNLCK, start);
    // SAFETY: `fd` is open and `lock` lives through the call, which only reads it.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

/// Whether another open file description holds any lock on the byte at `start` (F_OFD_GETLK).
pub(crate) fn byte_is_locked(fd: BorrowedFd<'_>, start: u64) -> io::Result<bool> {
    let mut lock = one_byte(libc::F_WRLCK, start);
    // SAFETY: `fd` is open and `lock` lives through the call, which writes a struct flock to it.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// Discards bytes of a block device; blocks (ioctl BLKDISCARD). Errors: EOPNOTSUPP if the device cannot; EINVAL if
/// the range is not whole logical blocks.
pub(crate) fn discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 from the pointer, which live through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) })
}

/// A block device's smallest preferred I/O, in bytes.
pub(crate) fn min_io(fd: BorrowedFd<'_>) -> io::Result<u32> {
    get(fd, BLKIOMIN)
}

/// A block device's optimal I/O size in bytes; 0: it does not report one.
pub(crate) fn opt_io(fd: BorrowedFd<'_>) -> io::Result<u32> {
    get(fd, BLKIOOPT)
}

/// How far a block device's first physical block is displaced, in bytes; 0 too where the kernel says "misaligned" (-1).
pub(crate) fn alignment_offset(fd: BorrowedFd<'_>) -> io::Result<u32> {
    get(fd, BLKALIGNOFF).map(|offset| if offset > i32::MAX as u32 { 0 } else { offset })
}

/// Makes `target` share the first `len` bytes of `source` (ioctl_ficlonerange(2)); 0: all of them. Errors: EOPNOTSUPP,
/// ENOTTY or EINVAL if the filesystem cannot share blocks; EXDEV if the files are on different filesystems.
pub(crate) fn clone_start(target: BorrowedFd<'_>, source: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    let range =
        libc::file_clone_range { src_fd: source.as_raw_fd().into(), src_offset: 0, src_length: len, dest_offset: 0 };
    // SAFETY: FICLONERANGE reads one struct file_clone_range from the pointer, which lives through the call; both
    // descriptors are open.
    check(unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE as _, &raw const range) })
}

/// `struct fiemap` of linux/fiemap.h, without the extents that may follow it.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;

/// How many extents a file has in its first `len` bytes (ioctl FS_IOC_FIEMAP, which only counts where there is room for
/// no extent). Errors: EOPNOTSUPP or ENOTTY if the filesystem does not report it.
pub(crate) fn extents(fd: BorrowedFd<'_>, len: u64) -> io::Result<u64> {
    let mut map = Fiemap { start: 0, length: len, flags: 0, mapped_extents: 0, extent_count: 0, reserved: 0 };
    // SAFETY: FS_IOC_FIEMAP reads and writes one struct fiemap at the pointer, which lives through the call, and no
    // extent behind it, since `extent_count` is 0.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) })?;
    Ok(map.mapped_extents.into())
}

/// Gives the calling thread, and those that it starts from now on, a descriptor table of their own, in which only
/// descriptors 0 to 2 are open (close_range(2), CLOSE_RANGE_UNSHARE). The process's other threads keep theirs.
///
/// The caller owns no descriptor and never drops, uses or is sent one of the old table: its number means something
/// else.
pub(crate) fn leave_descriptor_table() -> io::Result<()> {
    let (first, last) = (3 as libc::c_uint, libc::c_uint::MAX);
    // SAFETY: it changes no memory. The table is a new one that only this thread has, so no owner of a descriptor loses
    // it; that this thread is no such owner is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn get(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<u32> {
    let mut value: libc::c_uint = 0;
    // SAFETY: these requests write one int to the pointer, which lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw mut value) })?;
    Ok(value)
}

/// Makes `descriptor`, which still belongs to its owner, refer to the open file of `by` (dup3(2)); its previous file is
/// closed. For owners that cannot give up their descriptor.
pub(crate) fn replace(descriptor: &impl AsRawFd, by: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both are open, since their owners are borrowed, and the number is the same owner's before and after.
    check(unsafe { libc::dup3(by.as_raw_fd(), descriptor.as_raw_fd(), libc::O_CLOEXEC) })
}

/// Runs `child` in a new process (fork(2)) that ends with it, and in which only `socket` is open. Returns its id.
///
/// `child` makes system calls and nothing else: another thread may have held a lock, the allocator's too, when the
/// process was copied.
pub(crate) fn fork(socket: BorrowedFd<'_>, child: impl FnOnce(BorrowedFd<'_>)) -> io::Result<rustix::process::Pid> {
    // SAFETY: the child calls async-signal-safe functions only, which for `child` is the caller's promise. It closes
    // the copies of descriptors that it was given, whose owners it never drops: it ends by _exit(2).
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            if libc::dup3(socket.as_raw_fd(), 0, libc::O_CLOEXEC) == 0
                && libc::syscall(libc::SYS_close_range, 1 as libc::c_uint, libc::c_uint::MAX, 0) == 0
            {
                child(BorrowedFd::borrow_raw(0));
            }
            libc::_exit(0);
        }
        rustix::process::Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error)
    }
}

/// Ends the process at once (_exit(2)): no exit handler of a library and no destructor of a static runs.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: no memory is involved, and the call does not return.
    unsafe { libc::_exit(status) }
}

/// Has the kernel reap this process's children, those that have not ended yet (sigaction(2), SIGCHLD set to SIG_IGN).
/// For a process that starts no more of them: waiting for one fails with ECHILD from then on.
pub(crate) fn ignore_children() -> io::Result<()> {
    // SAFETY: no handler is installed, so nothing of ours is called.
    match unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Adds one to the eventfd `fd`. Not by glibc's write(2), which is a cancellation point: that costs a tenth of the
/// call.
pub(crate) fn signal(fd: impl AsFd) -> io::Result<()> {
    rustix::io::write(fd, &1u64.to_ne_bytes())?;
    Ok(())
}
