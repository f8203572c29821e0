//! Creates io_urings that are restricted to the operations of a [`super::Uring`]. The daemon creates all of them before it
//! enters the sandbox, whose system call filter denies io_uring_setup(2).
//!
//! An io_uring belongs for ever to the thread that enables it (IORING_SETUP_SINGLE_ISSUER). Prepared ones are therefore
//! created disabled, a virtqueue's thread enables one, and threads are reused (`sync::reused`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

use io_uring::register::Restriction;
use io_uring::{IoUring, Parameters, opcode, squeue};

/// The size of the first [`MAX_LARGE`] prepared io_urings. A deeper virtqueue submits in parts, and the kernel keeps further
/// completions elsewhere (IORING_FEAT_NODROP).
///
/// Measured on Linux 6.18, one takes 17 KiB of kernel memory, a [`SMALL`] one 8 KiB, and one for the deepest virtqueue
/// 200 KiB, which is too much for 256 of them. They count against a user's RLIMIT_MEMLOCK unless it has CAP_IPC_LOCK (before
/// Linux 5.12, and again since about 6.14).
const LARGE: Size = Size { entries: 128, completions: 256 };

/// The size of the other prepared io_urings. Only a guest with many virtqueues uses them, and then none of them is deep.
const SMALL: Size = Size { entries: 64, completions: 128 };

/// The number of large prepared io_urings.
const MAX_LARGE: usize = 24;

/// The number of prepared io_urings beyond one for each virtqueue. They are for a copy, for virtqueues that wait for an
/// image that hangs, and for threads that hang in a write while another thread serves their virtqueue.
const SPARE: usize = 24;

/// The number of entries of an io_uring's two queues.
#[derive(Clone, Copy)]
struct Size {
    entries: u32,
    completions: u32,
}

/// From linux/io_uring.h.
const IORING_REGISTER_FILES: u8 = 2;
/// From linux/io_uring.h.
const IORING_UNREGISTER_FILES: u8 = 3;

/// The prepared io_urings that no thread has enabled. `None`: this process creates them on demand. There is one list for
/// the process, because there is one system call filter for the process.
static STORE: Mutex<Option<Vec<(OwnedFd, Parameters)>>> = Mutex::new(None);

fn store() -> MutexGuard<'static, Option<Vec<(OwnedFd, Parameters)>>> {
    STORE.lock().expect("no panic while held")
}

/// An io_uring that is restricted and disabled.
pub(super) enum DisabledUring {
    /// Created on demand.
    New(IoUring),
    /// Prepared before the sandbox. Its memory is not mapped.
    Prepared(OwnedFd, Parameters),
}

/// Checks at start, before a guest waits, that queues can be created later. Fails as [`super::Uring::new`] does.
pub(in crate::backend) fn probe() -> io::Result<()> {
    build(Size { entries: 8, completions: 16 }).map(drop)
}

/// Creates the io_urings for `queues` virtqueues. After this, no other is created, and threads are reused. Returns for how
/// many virtqueues they suffice. Called by main before the system call filter. Fails as [`super::Uring::new`] does if not
/// one can be created.
pub(in crate::backend) fn prepare(queues: u16) -> io::Result<u16> {
    let mut prepared = create_up_to(usize::from(queues) + SPARE, |index| {
        let io_uring = build(if index < MAX_LARGE { LARGE } else { SMALL })?;
        // The thread that enables it maps its memory.
        Ok((io_uring.as_fd().try_clone_to_owned()?, io_uring.params().clone()))
    })?;
    let spare = prepared.len().saturating_sub(usize::from(queues));
    if spare < SPARE {
        log::warn!(
            "only {spare} of {SPARE} spare io_urings could be created: copies, and virtqueues whose image hangs, may have \
             none; raise RLIMIT_MEMLOCK (LimitMEMLOCK= in the systemd unit), which all daemons of a user share"
        );
    }
    let enough_for = u16::try_from(prepared.len()).unwrap_or(queues).min(queues);
    // `take` pops from the end: the large ones are used first.
    prepared.reverse();
    *store() = Some(prepared);
    #[cfg(not(all(test, feature = "model")))]
    crate::base::sync::reused::keep_threads();
    Ok(enough_for)
}

/// Calls `create` for each index below `count`, until there is no more memory. Fails if there is no memory for the first
/// one, or for another reason.
fn create_up_to<T>(count: usize, mut create: impl FnMut(usize) -> io::Result<T>) -> io::Result<Vec<T>> {
    let mut created = Vec::new();
    for index in 0..count {
        match create(index) {
            Ok(one) => created.push(one),
            Err(error) if error.kind() == io::ErrorKind::OutOfMemory && index > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(created)
}

/// Whether io_urings were prepared. An unused one is then kept for reuse.
pub(super) fn in_use() -> bool {
    store().is_some()
}

/// Takes the next prepared io_uring, or creates one with so many entries.
pub(super) fn take(entries: usize) -> io::Result<DisabledUring> {
    if let Some(prepared) = &mut *store() {
        let (fd, parameters) = prepared.pop().ok_or_else(|| {
            io::Error::other(
                "all io_urings that were created at the start are in use: end copies, or start the daemon with a larger \
                 --num-queues",
            )
        })?;
        return Ok(DisabledUring::Prepared(fd, parameters));
    }
    // Every operation and every watch has an entry, so that none waits for another.
    let rounded = u32::try_from(entries).expect("a queue's depth is small").next_power_of_two();
    let io_uring = build(Size { entries: rounded, completions: 2 * rounded })?;
    if (io_uring.params().sq_entries() as usize) < entries {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("queue depth {entries} is too large")));
    }
    Ok(DisabledUring::New(io_uring))
}

/// Creates an io_uring that is restricted and disabled.
fn build(size: Size) -> io::Result<IoUring> {
    let io_uring = build_newest(size).map_err(explain)?;
    // Resource tagging came with Linux 5.13, as did the multishot polls that watches use.
    if !(io_uring.params().is_feature_ext_arg() && io_uring.params().is_feature_resource_tagging()) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel's io_uring is too old: Linux 5.13 or newer is needed",
        ));
    }
    restrict(&io_uring).map_err(explain)?;
    Ok(io_uring)
}

/// Allows only the operations of [`super::Uring`], for ever (IORING_REGISTER_RESTRICTIONS): an intruder who has the
/// descriptor can open no socket or file with it.
fn restrict(io_uring: &IoUring) -> io::Result<()> {
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
    io_uring.submitter().register_restrictions(&mut restrictions)
}

/// Creates an io_uring with the best set of flags that this kernel supports; it rejects an unknown flag with EINVAL.
fn build_newest(size: Size) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_r_disabled().setup_cqsize(size.completions);
    // Linux 6.1: the thread that waits processes completions, in `wait`.
    let mut newest = builder.clone();
    newest.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    // Linux 5.19: the thread is not interrupted to process completions.
    let mut middle = builder.clone();
    middle.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    for candidate in [newest, middle] {
        match candidate.build(size.entries) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            built => return built,
        }
    }
    builder.build(size.entries)
}

/// Explains an error of io_uring_setup(2) or io_uring_register(2): what failed, why and how to fix it.
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
    fn low_memory_means_fewer_io_urings_and_none_is_an_error() {
        let create =
            |limit, errno| {
                create_up_to(4, move |index| {
                    if index < limit { Ok(index) } else { Err(explain(io::Error::from_raw_os_error(errno))) }
                })
            };
        for limit in 1..=5 {
            assert_eq!(create(limit, libc::ENOMEM).unwrap().len(), limit.min(4));
        }
        assert!(create(0, libc::ENOMEM).unwrap_err().to_string().contains("LimitMEMLOCK="));
        assert!(create(2, libc::EMFILE).unwrap_err().to_string().contains("RLIMIT_NOFILE"));
    }

    #[test]
    fn an_io_uring_error_says_what_to_change() {
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
