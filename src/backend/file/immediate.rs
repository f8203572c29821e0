//! Requests over the page cache that need no waiting are made at once, in the queue's thread.
//!
//! For data in the cache a plain call is cheaper than a trip through the ring, and much cheaper for writes: io_uring
//! hands buffered writes that *may* sleep to a kernel worker, and on most filesystems every buffered write may. What
//! would sleep goes to the ring all the same, so that it holds up nobody:
//! - A read is asked for with RWF_NOWAIT: it brings what is in the cache and never sleeps.
//! - A write is asked for with RWF_NOWAIT where the filesystem knows it (XFS, btrfs). Elsewhere (ext4) it is simply
//!   made, as long as writes have been cheap: the first that takes longer than [`SLOW_WRITE`] sends all writes through the
//!   ring for a while, longer each time. The kernel throttles writers, and devices stall, for many requests in a row:
//!   one in a row pays.
//! - In memory (tmpfs) nothing sleeps, and syncs are made at once too.
//! - Where another process or host answers (FUSE, NFS), the ring has all writes.
//!
//! A write may also never return, with RWF_NOWAIT too: pwritev2(2) waits for a frozen file system (file_start_write in the
//! kernel's fs/read_write.c), or for a device. So writes are [`BlockingCall`]s, and if one does not return, another thread
//! goes on with the queue and gives writes to the ring until it does.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::super::buffer::IovecList;
use super::super::{BlockingCall, Errno, IoBuf};
use crate::backend::preadv;

/// A write that took longer has slept. The copy of the largest takes a tenth.
const SLOW_WRITE: Duration = Duration::from_millis(1);

/// After a slow write the ring has the writes for so long, twice as long after each further one, up to the last.
const MIN_PAUSE: Duration = Duration::from_millis(10);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// So many cheap writes in a row, and the next slow one is the first again.
const FORGIVING_INTERVAL: u32 = 4096;

/// Longest transfer made at once, and bytes made at once between two reaps: what waits behind them waits for their
/// copying.
const MAX_AT_ONCE: usize = 256 << 10;
const MAX_BETWEEN_REAPS: usize = 2 << 20;

/// What the filesystem lets a thread do without sleeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InlinePolicy {
    /// O_DIRECT: a call waits for the device.
    Device,
    /// A filesystem or a block device over the page cache.
    Cache,
    /// The same, of another process or host: a write waits for that one.
    CacheElsewhere,
    /// Nothing but memory.
    Memory,
}

/// Whether a kind of call is worth trying.
#[derive(Clone, Copy, PartialEq)]
enum Nowait {
    Offered,
    /// The filesystem said EOPNOTSUPP.
    Unknown,
}

/// What became of a transfer.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// It is over.
    Over(Result<(), Errno>),
    /// So many bytes are moved, and what is left may sleep: through the ring.
    Moved(usize),
    /// A call to make again: it was asked for in a way that the filesystem does not know.
    Again,
}

/// One queue's way around the ring.
pub(super) struct Immediate {
    medium: InlinePolicy,
    reads: Nowait,
    writes: Nowait,
    pace: WriteBackoff,
    /// A write of a thread before this one has not returned.
    stuck: bool,
    /// Bytes that may still be moved before the next reap.
    allowance: usize,
    scratch: IovecList,
}

impl Immediate {
    pub(super) fn new(medium: InlinePolicy) -> Self {
        Immediate {
            medium,
            reads: Nowait::Offered,
            writes: Nowait::Offered,
            pace: WriteBackoff::default(),
            stuck: false,
            allowance: MAX_BETWEEN_REAPS,
            scratch: IovecList::default(),
        }
    }

    /// The owner answers what is ready: a new round.
    pub(super) fn reaped(&mut self) {
        self.allowance = MAX_BETWEEN_REAPS;
    }

    /// Whether a transfer of this buffer is worth trying here. Not durable ones: they wait for the medium.
    #[inline]
    pub(super) fn suits(&self, buf: &IoBuf) -> bool {
        self.medium != InlinePolicy::Device && buf.len() <= MAX_AT_ONCE.min(self.allowance)
    }

    /// Whether a write of this buffer is worth trying here.
    #[inline]
    pub(super) fn suits_write(&self, buf: &IoBuf) -> bool {
        self.medium != InlinePolicy::CacheElsewhere && self.suits(buf)
    }

    /// Reads what can be read without waiting.
    #[inline]
    pub(super) fn read(&mut self, file: BorrowedFd<'_>, buf: &IoBuf, offset: u64) -> Outcome {
        let flags = match (self.medium, self.reads) {
            (InlinePolicy::Memory, _) => 0,
            (_, Nowait::Offered) => libc::RWF_NOWAIT,
            (_, Nowait::Unknown) => return Outcome::Moved(0),
        };
        let result = preadv::transfer(file, false, buf, 0..buf.len(), offset, flags, &mut self.scratch.0);
        if result == Err(Errno(libc::EOPNOTSUPP)) {
            self.reads = Nowait::Unknown;
        }
        let outcome = judge(result, buf);
        if outcome == Outcome::Over(Ok(())) {
            self.allowance -= buf.len();
        }
        outcome
    }

    /// A write of this buffer waits to be made: see [`Immediate::suits_write`].
    #[inline]
    pub(super) fn reserve(&mut self, buf: &IoBuf) {
        self.allowance -= buf.len();
    }

    /// Whether a write is to be made now, and how; if not, it takes the ring.
    #[inline]
    pub(super) fn admits(&mut self, call: &mut BlockingCall) -> bool {
        if self.stuck {
            return false;
        }
        call.flags = 0;
        if self.medium == InlinePolicy::Memory {
            return true;
        }
        if self.writes == Nowait::Offered {
            call.flags = libc::RWF_NOWAIT;
            return true;
        }
        let now = Instant::now();
        call.began = Some(now);
        self.pace.allows(now)
    }

    /// What became of a write that was admitted.
    #[inline]
    pub(super) fn made(&mut self, call: &BlockingCall) -> Outcome {
        if let (Some(began), Some(ended)) = (call.began, call.ended) {
            self.pace.took(began, ended);
        }
        if call.result == Err(Errno(libc::EOPNOTSUPP)) && call.flags == libc::RWF_NOWAIT {
            self.writes = Nowait::Unknown;
            return Outcome::Again;
        }
        judge(call.result, &call.buf)
    }

    /// The last write that was admitted has not returned, and this thread goes on.
    pub(super) fn is_stuck(&mut self) {
        self.stuck = true;
    }

    /// It has returned.
    pub(super) fn is_back(&mut self) {
        self.stuck = false;
    }

    /// fdatasync(2), where it takes no waiting.
    pub(super) fn sync(&self, file: BorrowedFd<'_>) -> Option<Result<(), Errno>> {
        (self.medium == InlinePolicy::Memory)
            .then(|| rustix::fs::fdatasync(file).map_err(|error| Errno(error.raw_os_error())))
    }
}

/// What a call's result means for its transfer. The ring finds out what one that stopped short means.
fn judge(result: Result<usize, Errno>, buf: &IoBuf) -> Outcome {
    match result {
        Ok(moved) if moved >= buf.len() => Outcome::Over(Ok(())),
        Ok(moved) => Outcome::Moved(moved),
        // Would sleep, was interrupted, or is not known here.
        Err(Errno(libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP)) => Outcome::Moved(0),
        Err(errno) => Outcome::Over(Err(errno)),
    }
}

/// What writes cost lately.
#[derive(Default)]
struct WriteBackoff {
    /// Writes take the ring until then.
    until: Option<Instant>,
    pause: Duration,
    cheap: u32,
}

impl WriteBackoff {
    fn allows(&mut self, now: Instant) -> bool {
        if self.until.is_some_and(|until| now < until) {
            return false;
        }
        self.until = None;
        true
    }

    fn took(&mut self, start: Instant, end: Instant) {
        if end - start <= SLOW_WRITE {
            self.cheap += 1;
            if self.cheap == FORGIVING_INTERVAL {
                self.cheap = 0;
                self.pause = Duration::ZERO;
            }
            return;
        }
        self.cheap = 0;
        self.pause = (self.pause * 2).clamp(MIN_PAUSE, MAX_PAUSE);
        self.until = Some(end + self.pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_write_in_a_row_pays() {
        let mut pace = WriteBackoff::default();
        let mut now = Instant::now();
        let mut write = |pace: &mut WriteBackoff, wait: Duration, took: Duration| {
            now += wait;
            let allowed = pace.allows(now);
            if allowed {
                pace.took(now, now + took);
                now += took;
            }
            allowed
        };
        let (ms, none) = (Duration::from_millis, Duration::ZERO);
        assert!(write(&mut pace, none, SLOW_WRITE));
        assert!(write(&mut pace, none, SLOW_WRITE * 5), "cheap so far");
        assert!(!write(&mut pace, none, none) && !write(&mut pace, ms(9), none), "the ring has them now");
        assert!(write(&mut pace, ms(2), SLOW_WRITE * 5), "tried again");
        assert!(!write(&mut pace, ms(19), none), "twice as long");
        for _ in 0..20 {
            write(&mut pace, MAX_PAUSE, SLOW_WRITE * 5);
        }
        assert!(write(&mut pace, MAX_PAUSE, none), "never longer than that");
        for _ in 0..FORGIVING_INTERVAL {
            assert!(write(&mut pace, none, none));
        }
        assert!(write(&mut pace, none, SLOW_WRITE * 5));
        assert!(write(&mut pace, MIN_PAUSE, none), "forgiven");
    }
}
