//! Inline I/O: requests over the page cache that need not wait are made by plain calls, in the queue's thread.
//!
//! For data in the cache a plain call is cheaper than io_uring, and much cheaper for writes: io_uring passes buffered
//! writes that *may* sleep to a kernel worker, and on most filesystems every buffered write may. What would sleep
//! still goes to the io_uring, so that it delays no other request:
//! - A read uses RWF_NOWAIT: it returns what is in the cache and never sleeps.
//! - A write uses RWF_NOWAIT where the filesystem supports it (XFS, btrfs). Elsewhere (ext4) it is made without, as
//!   long as writes have been fast. The first that takes longer than [`SLOW_WRITE`] sends all writes to the io_uring
//!   for a while, longer each time. The kernel throttles writers, and devices stall, for many requests in a row; this
//!   way only one of them waits in the queue's thread.
//! - In memory (tmpfs) nothing sleeps, and syncs are made inline, too.
//! - Where another process or host serves the file (FUSE, NFS), all writes go to the io_uring.
//!
//! A write may also never return, even with RWF_NOWAIT: pwritev2(2) waits for a frozen filesystem (file_start_write in
//! the kernel's fs/read_write.c), or for a device. So writes are [`BlockingCall`]s. If one does not return, another
//! thread continues with the queue, and gives writes to the io_uring until the call returns.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::super::buffer::IovecList;
use super::super::{BlockingCall, Errno, IoBuf};
use crate::backend::preadv;

/// A write that took longer has slept: copying the largest takes a tenth of this.
const SLOW_WRITE: Duration = Duration::from_millis(1);

/// How long the io_uring gets all writes after a slow one. Each further slow write doubles it, up to [`MAX_PAUSE`].
const MIN_PAUSE: Duration = Duration::from_millis(10);
/// The longest time for which the io_uring gets all writes after a slow one.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// After this many fast writes in a row, the next slow one costs [`MIN_PAUSE`] again.
const FAST_WRITES_TO_RESET: u32 = 4096;

/// Bytes of the longest transfer made inline. Requests behind it wait until it is copied.
const MAX_TRANSFER: usize = 256 << 10;
/// Bytes transferred inline between two reaps. Requests behind them wait until they are copied.
const MAX_BETWEEN_REAPS: usize = 2 << 20;

/// What the image's storage lets a thread do without sleeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InlinePolicy {
    /// O_DIRECT: a call waits for the device.
    Device,
    /// A filesystem or a block device over the page cache.
    Cache,
    /// A file over the page cache that another process or host serves: a write waits for that.
    RemoteCache,
    /// A file in memory (tmpfs): nothing sleeps.
    Memory,
}

/// Whether the filesystem supports RWF_NOWAIT for a kind of call.
#[derive(Clone, Copy, PartialEq)]
enum Nowait {
    /// No call has shown otherwise.
    Supported,
    /// It returned EOPNOTSUPP.
    Unsupported,
}

/// The result of an inline transfer.
#[derive(Debug, PartialEq)]
pub(super) enum InlineOutcome {
    /// It is complete.
    Complete(Result<(), Errno>),
    /// So many bytes are transferred. The rest may sleep, so it goes to the io_uring.
    Partial(usize),
    /// The call must be repeated: the filesystem does not support its flags.
    Repeat,
}

/// The inline I/O of one queue.
pub(super) struct InlineIo {
    policy: InlinePolicy,
    reads: Nowait,
    writes: Nowait,
    backoff: WriteBackoff,
    /// A write of an earlier thread has not returned.
    stuck: bool,
    /// Bytes that may still be transferred inline before the next reap.
    allowance: usize,
    scratch: IovecList,
}

impl InlineIo {
    pub(super) fn new(policy: InlinePolicy) -> Self {
        InlineIo {
            policy,
            reads: Nowait::Supported,
            writes: Nowait::Supported,
            backoff: WriteBackoff::default(),
            stuck: false,
            allowance: MAX_BETWEEN_REAPS,
            scratch: IovecList::default(),
        }
    }

    /// The owner has reaped, so the allowance is full again.
    pub(super) fn refill_allowance(&mut self) {
        self.allowance = MAX_BETWEEN_REAPS;
    }

    /// Whether to try a transfer of this buffer inline. The caller excludes durable writes, which wait for the medium.
    #[inline]
    pub(super) fn suits(&self, buf: &IoBuf) -> bool {
        self.policy != InlinePolicy::Device && buf.len() <= MAX_TRANSFER.min(self.allowance)
    }

    /// Whether to try a write of this buffer inline.
    #[inline]
    pub(super) fn suits_write(&self, buf: &IoBuf) -> bool {
        self.makes_writes() && self.suits(buf)
    }

    /// Whether any write is tried inline.
    #[inline]
    pub(super) fn makes_writes(&self) -> bool {
        matches!(self.policy, InlinePolicy::Cache | InlinePolicy::Memory)
    }

    /// Reads what needs no waiting.
    #[inline]
    pub(super) fn read(&mut self, file: BorrowedFd<'_>, buf: &IoBuf, offset: u64) -> InlineOutcome {
        let flags = match (self.policy, self.reads) {
            (InlinePolicy::Memory, _) => 0,
            (_, Nowait::Supported) => libc::RWF_NOWAIT,
            (_, Nowait::Unsupported) => return InlineOutcome::Partial(0),
        };
        let result = preadv::transfer(file, false, buf, 0..buf.len(), offset, flags, &mut self.scratch.0);
        if result == Err(Errno(libc::EOPNOTSUPP)) {
            self.reads = Nowait::Unsupported;
        }
        let outcome = outcome_of(result, buf);
        if outcome == InlineOutcome::Complete(Ok(())) {
            self.allowance -= buf.len();
        }
        outcome
    }

    /// Takes the bytes of a write from the allowance, after [`InlineIo::suits_write`].
    #[inline]
    pub(super) fn reserve(&mut self, buf: &IoBuf) {
        self.allowance -= buf.len();
    }

    /// Whether to make a write now; sets its flags. Otherwise it goes to the io_uring.
    #[inline]
    pub(super) fn admits(&mut self, call: &mut BlockingCall) -> bool {
        if self.stuck {
            return false;
        }
        call.flags = 0;
        if self.policy == InlinePolicy::Memory {
            return true;
        }
        if self.writes == Nowait::Supported {
            call.flags = libc::RWF_NOWAIT;
            return true;
        }
        let now = Instant::now();
        call.began = Some(now);
        self.backoff.allows(now)
    }

    /// Returns what an admitted write's result means.
    #[inline]
    pub(super) fn handle_result(&mut self, call: &BlockingCall) -> InlineOutcome {
        if let (Some(began), Some(ended)) = (call.began, call.ended) {
            self.backoff.record(began, ended);
        }
        if call.result == Err(Errno(libc::EOPNOTSUPP)) && call.flags == libc::RWF_NOWAIT {
            self.writes = Nowait::Unsupported;
            return InlineOutcome::Repeat;
        }
        outcome_of(call.result, &call.buf)
    }

    /// The write that was admitted last has not returned, and another thread continues with the queue.
    pub(super) fn call_hangs(&mut self) {
        self.stuck = true;
    }

    /// That write has returned.
    pub(super) fn hung_call_returned(&mut self) {
        self.stuck = false;
    }

    /// Makes an fdatasync(2) where it need not wait.
    pub(super) fn sync(&self, file: BorrowedFd<'_>) -> Option<Result<(), Errno>> {
        (self.policy == InlinePolicy::Memory)
            .then(|| rustix::fs::fdatasync(file).map_err(|error| Errno(error.raw_os_error())))
    }
}

/// Returns what a call's result means for its transfer. After a short transfer the io_uring finds out the cause.
fn outcome_of(result: Result<usize, Errno>, buf: &IoBuf) -> InlineOutcome {
    match result {
        Ok(moved) if moved >= buf.len() => InlineOutcome::Complete(Ok(())),
        Ok(moved) => InlineOutcome::Partial(moved),
        // It would sleep, was interrupted, or is not supported.
        Err(Errno(libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP)) => InlineOutcome::Partial(0),
        Err(errno) => InlineOutcome::Complete(Err(errno)),
    }
}

/// How long recent writes took, and what follows from that.
#[derive(Default)]
struct WriteBackoff {
    /// Until when writes go to the io_uring; `None`: they do not.
    until: Option<Instant>,
    /// For how long writes went to the io_uring after the last slow one.
    pause: Duration,
    /// Fast writes in a row.
    fast: u32,
}

impl WriteBackoff {
    fn allows(&mut self, now: Instant) -> bool {
        if self.until.is_some_and(|until| now < until) {
            return false;
        }
        self.until = None;
        true
    }

    fn record(&mut self, start: Instant, end: Instant) {
        if end - start <= SLOW_WRITE {
            self.fast += 1;
            if self.fast == FAST_WRITES_TO_RESET {
                self.fast = 0;
                self.pause = Duration::ZERO;
            }
            return;
        }
        self.fast = 0;
        self.pause = (self.pause * 2).clamp(MIN_PAUSE, MAX_PAUSE);
        self.until = Some(end + self.pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_slow_write_in_a_row_is_made_inline() {
        let mut backoff = WriteBackoff::default();
        let mut now = Instant::now();
        let mut write = |backoff: &mut WriteBackoff, wait: Duration, took: Duration| {
            now += wait;
            let allowed = backoff.allows(now);
            if allowed {
                backoff.record(now, now + took);
                now += took;
            }
            allowed
        };
        let (ms, none) = (Duration::from_millis, Duration::ZERO);
        assert!(write(&mut backoff, none, SLOW_WRITE));
        assert!(write(&mut backoff, none, SLOW_WRITE * 5), "all were fast so far");
        assert!(!write(&mut backoff, none, none) && !write(&mut backoff, ms(9), none), "the io_uring gets them now");
        assert!(write(&mut backoff, ms(2), SLOW_WRITE * 5), "tried again");
        assert!(!write(&mut backoff, ms(19), none), "twice as long");
        for _ in 0..20 {
            write(&mut backoff, MAX_PAUSE, SLOW_WRITE * 5);
        }
        assert!(write(&mut backoff, MAX_PAUSE, none), "never longer than that");
        for _ in 0..FAST_WRITES_TO_RESET {
            assert!(write(&mut backoff, none, none));
        }
        assert!(write(&mut backoff, none, SLOW_WRITE * 5));
        assert!(write(&mut backoff, MIN_PAUSE, none), "the pause is short again");
    }
}
