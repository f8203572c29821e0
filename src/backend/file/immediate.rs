//! Requests over the page cache that need no waiting are made at once, in the queue's thread.
//!
//! For data in the cache a plain call is cheaper than a trip through the ring, and much cheaper for writes: io_uring
//! hands buffered writes that *may* sleep to a kernel worker, and on most filesystems every buffered write may. What
//! would sleep goes to the ring all the same, so that it holds up nobody:
//! - A read is asked for with RWF_NOWAIT: it brings what is in the cache and never sleeps.
//! - A write is asked for with RWF_NOWAIT where the filesystem knows it (XFS, btrfs). Elsewhere (ext4) it is simply
//!   made, as long as writes have been cheap: the first that takes longer than [`SLOW`] sends all writes through the
//!   ring for a while, longer each time. The kernel throttles writers, and devices stall, for many requests in a row:
//!   one in a row pays.
//! - In memory (tmpfs) nothing sleeps, and syncs are made at once too.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::super::call;
use super::super::{Errno, IoBuf};

/// A write that took longer has slept. The copy of the largest takes a tenth.
const SLOW: Duration = Duration::from_millis(1);

/// After a slow write the ring has the writes for so long, twice as long after each further one, up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// So many cheap writes in a row, and the next slow one is the first again.
const FORGIVEN: u32 = 4096;

/// Longest transfer made at once, and bytes made at once between two reaps: what waits behind them waits for their
/// copying.
const MOST_AT_ONCE: usize = 256 << 10;
const MOST_BETWEEN_REAPS: usize = 2 << 20;

/// What the filesystem lets a thread do without sleeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// O_DIRECT: a call waits for the device.
    Device,
    /// A filesystem or a block device over the page cache.
    Cache,
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
}

/// One queue's way around the ring.
pub(super) struct Immediate {
    medium: Medium,
    reads: Nowait,
    writes: Nowait,
    pace: Pace,
    /// Bytes that may still be moved before the next reap.
    allowance: usize,
    scratch: Vec<libc::iovec>,
}

impl Immediate {
    pub(super) fn new(medium: Medium) -> Self {
        Immediate {
            medium,
            reads: Nowait::Offered,
            writes: Nowait::Offered,
            pace: Pace::default(),
            allowance: MOST_BETWEEN_REAPS,
            scratch: Vec::new(),
        }
    }

    /// The owner answers what is ready: a new round.
    pub(super) fn reaped(&mut self) {
        self.allowance = MOST_BETWEEN_REAPS;
    }

    /// Whether a transfer of this buffer is worth trying here. Not durable ones: they wait for the medium.
    #[inline]
    pub(super) fn suits(&self, buf: &IoBuf) -> bool {
        self.medium != Medium::Device && buf.len() <= MOST_AT_ONCE.min(self.allowance)
    }

    /// Moves what can be moved without waiting.
    #[inline]
    pub(super) fn transfer(&mut self, file: BorrowedFd<'_>, write: bool, buf: &IoBuf, offset: u64) -> Outcome {
        let moved = match (write, self.medium) {
            (_, Medium::Memory) => self.call(file, write, buf, offset, 0),
            (false, _) => self.read(file, buf, offset),
            (true, _) => self.write(file, buf, offset),
        };
        let moved = match moved {
            Ok(moved) => moved.min(buf.len()),
            // Would sleep, was interrupted, or is not known here.
            Err(Errno(libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP)) => 0,
            Err(errno) => return Outcome::Over(Err(errno)),
        };
        self.allowance -= moved;
        // The ring finds out what a transfer that stopped short means.
        if moved == buf.len() { Outcome::Over(Ok(())) } else { Outcome::Moved(moved) }
    }

    /// fdatasync(2), where it takes no waiting.
    pub(super) fn sync(&self, file: BorrowedFd<'_>) -> Option<Result<(), Errno>> {
        (self.medium == Medium::Memory)
            .then(|| rustix::fs::fdatasync(file).map_err(|error| Errno(error.raw_os_error())))
    }

    fn read(&mut self, file: BorrowedFd<'_>, buf: &IoBuf, offset: u64) -> Result<usize, Errno> {
        if self.reads == Nowait::Unknown {
            return Ok(0);
        }
        let result = self.call(file, false, buf, offset, libc::RWF_NOWAIT);
        if result == Err(Errno(libc::EOPNOTSUPP)) {
            self.reads = Nowait::Unknown;
        }
        result
    }

    fn write(&mut self, file: BorrowedFd<'_>, buf: &IoBuf, offset: u64) -> Result<usize, Errno> {
        if self.writes == Nowait::Offered {
            let result = self.call(file, true, buf, offset, libc::RWF_NOWAIT);
            if result != Err(Errno(libc::EOPNOTSUPP)) {
                return result;
            }
            self.writes = Nowait::Unknown;
        }
        let start = Instant::now();
        if !self.pace.allows(start) {
            return Ok(0);
        }
        let result = self.call(file, true, buf, offset, 0);
        self.pace.took(start, Instant::now());
        result
    }

    fn call(
        &mut self,
        file: BorrowedFd<'_>,
        write: bool,
        buf: &IoBuf,
        offset: u64,
        flags: i32,
    ) -> Result<usize, Errno> {
        call::transfer(file, write, buf, 0..buf.len(), offset, flags, &mut self.scratch)
    }
}

/// What writes cost lately.
#[derive(Default)]
struct Pace {
    /// Writes take the ring until then.
    until: Option<Instant>,
    pause: Duration,
    cheap: u32,
}

impl Pace {
    fn allows(&mut self, now: Instant) -> bool {
        if self.until.is_some_and(|until| now < until) {
            return false;
        }
        self.until = None;
        true
    }

    fn took(&mut self, start: Instant, end: Instant) {
        if end - start <= SLOW {
            self.cheap += 1;
            if self.cheap == FORGIVEN {
                self.cheap = 0;
                self.pause = Duration::ZERO;
            }
            return;
        }
        self.cheap = 0;
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.until = Some(end + self.pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_write_in_a_row_pays() {
        let mut pace = Pace::default();
        let mut now = Instant::now();
        let mut write = |pace: &mut Pace, wait: Duration, took: Duration| {
            now += wait;
            let allowed = pace.allows(now);
            if allowed {
                pace.took(now, now + took);
                now += took;
            }
            allowed
        };
        let (ms, none) = (Duration::from_millis, Duration::ZERO);
        assert!(write(&mut pace, none, SLOW));
        assert!(write(&mut pace, none, SLOW * 5), "cheap so far");
        assert!(!write(&mut pace, none, none) && !write(&mut pace, ms(9), none), "the ring has them now");
        assert!(write(&mut pace, ms(2), SLOW * 5), "tried again");
        assert!(!write(&mut pace, ms(19), none), "twice as long");
        for _ in 0..20 {
            write(&mut pace, LONGEST_PAUSE, SLOW * 5);
        }
        assert!(write(&mut pace, LONGEST_PAUSE, none), "never longer than that");
        for _ in 0..FORGIVEN {
            assert!(write(&mut pace, none, none));
        }
        assert!(write(&mut pace, none, SLOW * 5));
        assert!(write(&mut pace, FIRST_PAUSE, none), "forgiven");
    }
}
