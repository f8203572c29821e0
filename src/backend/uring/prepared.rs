//! Makes io_urings: restricted to the operations that a [`super::Ring`] uses, and all of them before the sandbox is
//! entered, whose filter of system calls takes no io_uring_setup(2).
//!
//! An io_uring belongs to the thread that enables it (IORING_SETUP_SINGLE_ISSUER), for ever. So the prepared ones are made
//! disabled, the thread of a virtqueue enables one, and threads are used again (`sync::reused`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

use io_uring::register::Restriction;
use io_uring::{IoUring, Parameters, opcode, squeue};

/// Entries of a prepared io_uring, and completions that it holds. A deeper queue submits in parts, and the kernel keeps
/// further completions elsewhere (IORING_FEAT_NODROP).
///
/// Measured on Linux 6.18: 17 KiB of kernel memory each, 8 KiB each of the small ones; 200 KiB for the deepest queue of
/// all, which is why that is no size for 256 of them. A user without CAP_IPC_LOCK has them counted against
/// RLIMIT_MEMLOCK (before Linux 5.12, and again since about 6.14).
const LARGE: Size = Size { entries: 128, completions: 256 };
/// For those that only guests with many virtqueues use, and then none of them is deep.
const SMALL: Size = Size { entries: 64, completions: 128 };
/// So many are large.
const MAX_LARGE: usize = 24;
/// Beside those of the virtqueues: a copy's, those of virtqueues that wait for an image which hangs, and those of threads
/// that do not come back from a write while another serves their virtqueue.
const SPARE: usize = 24;

#[derive(Clone, Copy)]
struct Size {
    entries: u32,
    completions: u32,
}

/// Of linux/io_uring.h.
const IORING_REGISTER_FILES: u8 = 2;
const IORING_UNREGISTER_FILES: u8 = 3;

/// The prepared io_urings that no thread has enabled; `None`: this process makes them when it needs them. One list for the
/// process, as its filter is.
static STORE: Mutex<Option<Vec<(OwnedFd, Parameters)>>> = Mutex::new(None);

fn store() -> MutexGuard<'static, Option<Vec<(OwnedFd, Parameters)>>> {
    STORE.lock().expect("no panic while held")
}

/// An io_uring that is restricted and disabled.
pub(super) enum Source {
    Made(IoUring),
    /// Not mapped here.
    Prepared(OwnedFd, Parameters),
}

/// Proves at start, before a guest waits, that queues can be made later. Errors: as [`super::Ring::new`].
pub(in crate::backend) fn probe() -> io::Result<()> {
    build(Size { entries: 8, completions: 16 }).map(drop)
}

/// Makes the io_urings of `queues` virtqueues; after this no other is made, and threads are used again. Returns for how
/// many virtqueues they are enough. Main, before the sandbox's filter. Errors: as [`super::Ring::new`], if there is none.
pub(in crate::backend) fn prepare(queues: u16) -> io::Result<u16> {
    let mut made = as_many(usize::from(queues) + SPARE, |index| {
        let ring = build(if index < MAX_LARGE { LARGE } else { SMALL })?;
        // Its memory is mapped by the thread that enables it.
        Ok((ring.as_fd().try_clone_to_owned()?, ring.params().clone()))
    })?;
    let spare = made.len().saturating_sub(usize::from(queues));
    if spare < SPARE {
        log::warn!(
            "only {spare} of {SPARE} spare io_urings could be made: copies, and rings whose image hangs, may find none; \
             raise RLIMIT_MEMLOCK (LimitMEMLOCK= in the systemd unit), which all daemons of a user share"
        );
    }
    let enough_for = u16::try_from(made.len()).unwrap_or(queues).min(queues);
    // The large ones are used first.
    made.reverse();
    *store() = Some(made);
    #[cfg(not(all(test, feature = "model")))]
    crate::base::sync::reused::keep_threads();
    Ok(enough_for)
}

/// Makes `wanted` things, or as many as there is memory for. Errors: there is not one, or a failure of another kind.
fn as_many<T>(wanted: usize, mut make: impl FnMut(usize) -> io::Result<T>) -> io::Result<Vec<T>> {
    let mut made = Vec::new();
    for index in 0..wanted {
        match make(index) {
            Ok(one) => made.push(one),
            Err(error) if error.kind() == io::ErrorKind::OutOfMemory && index > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(made)
}

/// Whether io_urings were prepared, so that one which is not used any more is worth keeping.
pub(super) fn in_use() -> bool {
    store().is_some()
}

/// An io_uring for so many entries, or the next prepared one.
pub(super) fn take(entries: usize) -> io::Result<Source> {
    if let Some(prepared) = &mut *store() {
        let (fd, parameters) = prepared.pop().ok_or_else(|| {
            io::Error::other(
                "all io_urings that were made at the start are in use: end copies, or start the daemon with a larger \
                 --num-queues",
            )
        })?;
        return Ok(Source::Prepared(fd, parameters));
    }
    // Every command and every watch has an entry, so none waits for another.
    let wanted = u32::try_from(entries).expect("a queue's depth is small").next_power_of_two();
    let ring = build(Size { entries: wanted, completions: 2 * wanted })?;
    if (ring.params().sq_entries() as usize) < entries {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("queue depth {entries} is too large")));
    }
    Ok(Source::Made(ring))
}

fn build(size: Size) -> io::Result<IoUring> {
    let ring = build_newest(size).map_err(explain)?;
    // Resource tagging came with 5.13, as did the multishot polls that watches are made of.
    if !(ring.params().is_feature_ext_arg() && ring.params().is_feature_resource_tagging()) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel's io_uring is too old: Linux 5.13 or newer is needed",
        ));
    }
    restrict(&ring).map_err(explain)?;
    Ok(ring)
}

/// Allows the operations of [`super::Ring`] and no other, for good (IORING_REGISTER_RESTRICTIONS): an intruder who has the
/// descriptor opens no socket or file with it.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let operations = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::AsyncCancel::CODE,
    ];
    let registrations = [IORING_REGISTER_FILES, IORING_UNREGISTER_FILES];
    let flags = squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC;
    let mut restrictions: Vec<Restriction> = operations
        .map(Restriction::sqe_op)
        .into_iter()
        .chain(registrations.map(Restriction::register_op))
        .chain([Restriction::sqe_flags_allowed(flags.bits())])
        .collect();
    ring.submitter().register_restrictions(&mut restrictions)
}

/// The best set of flags that this kernel knows: it says EINVAL to one it does not.
fn build_newest(size: Size) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_r_disabled().setup_cqsize(size.completions);
    // 6.1: completions are worked off in `wait`, by the thread that waits.
    let mut newest = builder.clone();
    newest.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    // 5.19: no interrupt to work them off.
    let mut middle = builder.clone();
    middle.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    for candidate in [newest, middle] {
        match candidate.build(size.entries) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            decided => return decided,
        }
    }
    builder.build(size.entries)
}

/// An error of io_uring_setup(2) in words that say what to change.
pub(super) fn explain(error: io::Error) -> io::Error {
    let why = match error.raw_os_error() {
        Some(libc::ENOSYS) => {
            "io_uring is not available (ENOSYS): use a kernel built with CONFIG_IO_URING, or allow io_uring_setup, \
             io_uring_enter and io_uring_register in the container's seccomp profile"
        }
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden (EPERM): set the sysctl kernel.io_uring_disabled to 0 (or to 1 and join \
             kernel.io_uring_group), or allow io_uring_setup, io_uring_enter and io_uring_register in the container's \
             seccomp profile"
        }
        Some(libc::ENOMEM) => {
            "no memory for an io_uring (ENOMEM): raise the limit of locked memory (RLIMIT_MEMLOCK; ulimit -l, or \
             LimitMEMLOCK= in the systemd unit)"
        }
        Some(libc::EMFILE | libc::ENFILE) => {
            "no file descriptor left for an io_uring: raise the limit of open files (RLIMIT_NOFILE; ulimit -n, or \
             LimitNOFILE= in the systemd unit)"
        }
        _ => return io::Error::new(error.kind(), format!("cannot set up an io_uring: {error}")),
    };
    io::Error::new(error.kind(), why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_memory_means_fewer_io_urings_and_none_is_an_error() {
        let make = |room, errno| {
            as_many(
                4,
                move |index| if index < room { Ok(index) } else { Err(explain(io::Error::from_raw_os_error(errno))) },
            )
        };
        for room in 1..=5 {
            assert_eq!(make(room, libc::ENOMEM).unwrap().len(), room.min(4));
        }
        assert!(make(0, libc::ENOMEM).unwrap_err().to_string().contains("LimitMEMLOCK="));
        assert!(make(2, libc::EMFILE).unwrap_err().to_string().contains("RLIMIT_NOFILE"));
    }

    #[test]
    fn an_io_uring_that_is_not_to_be_had_says_what_to_change() {
        for (errno, words) in [
            (libc::ENOSYS, &["CONFIG_IO_URING", "seccomp"][..]),
            (libc::EPERM, &["kernel.io_uring_disabled", "seccomp"]),
            (libc::ENOMEM, &["RLIMIT_MEMLOCK", "LimitMEMLOCK="]),
            (libc::EMFILE, &["RLIMIT_NOFILE", "LimitNOFILE="]),
            (libc::EIO, &["io_uring", "os error 5"]),
        ] {
            let message = explain(io::Error::from_raw_os_error(errno)).to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{errno}: {message}");
        }
    }
}
