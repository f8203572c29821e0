//! Discard and write-zeroes: what the filesystem or the device does itself, else zeroes are written.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::buffer::MAX_ZEROES;
use super::super::uring::{Command, Transfer};
use super::super::{Errno, IoBuf};
use super::Shared;
use super::bounce::{BounceOp, Next};
use crate::backend::bounce_pool::Pool;

/// What this image turned out not to be able to do.
#[derive(Default)]
pub(super) struct Unsupported {
    punch: AtomicBool,
    zero_range: AtomicBool,
    discard: AtomicBool,
}

impl Unsupported {
    /// Remembers, and says it the first time.
    fn note(&self, what: &AtomicBool, name: &str, shared: &Shared) {
        if !what.swap(true, Ordering::Relaxed) {
            log::info!("{}: the host cannot {name} here; doing without", shared.name);
        }
    }
}

/// One discard or write-zeroes on its way.
pub(super) struct RangeOp {
    what: RangeKind,
    /// To do, the last one first.
    parts: Vec<Part>,
    /// A part that is less than a block, through read-modify-write.
    copied: Option<BounceOp>,
    /// Tried in this request and refused.
    no_punch: bool,
    no_zero_range: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum RangeKind {
    Discard,
    Zeroes { unmap: bool },
}

#[derive(Clone, Copy)]
enum Part {
    /// By the kernel: fallocate, or the discard ioctl.
    Kernel { offset: u64, len: u64 },
    /// By writing zeroes.
    Write { offset: u64, len: u64 },
}

/// What comes next.
pub(super) enum Step {
    Run(Command),
    /// A copied transfer that begins as soon as there is memory: [`RangeOp::begin`], or the op's own.
    Copy,
    /// BLKDISCARD, by the helper thread.
    DiscardDevice {
        offset: u64,
        len: u64,
    },
    Done(Result<(), Errno>),
}

impl RangeOp {
    /// A discard. It may spare the ends: only whole units are discarded.
    pub(super) fn discard(offset: u64, len: u64, shared: &Shared) -> Self {
        let unit = u64::from(shared.range_unit.max(shared.align.offset));
        let (start, end) = (offset.next_multiple_of(unit), (offset + len) / unit * unit);
        let parts = if start < end { vec![Part::Kernel { offset: start, len: end - start }] } else { Vec::new() };
        Self::new(RangeKind::Discard, parts)
    }

    /// A write-zeroes. Every byte counts: ends that the kernel cannot do are written.
    pub(super) fn zeroes(offset: u64, len: u64, unmap: bool, shared: &Shared) -> Self {
        let unit = u64::from(shared.range_unit);
        let end = offset + len;
        let (inner, inner_end) = (offset.next_multiple_of(unit), end / unit * unit);
        let mut parts = Vec::new();
        if inner >= inner_end {
            parts.push(Part::Write { offset, len });
        } else {
            parts.push(Part::Write { offset: inner_end, len: end - inner_end });
            parts.push(Part::Kernel { offset: inner, len: inner_end - inner });
            parts.push(Part::Write { offset, len: inner - offset });
        }
        Self::new(RangeKind::Zeroes { unmap: unmap && shared.may_unmap }, parts)
    }

    fn new(what: RangeKind, parts: Vec<Part>) -> Self {
        RangeOp { what, parts, copied: None, no_punch: false, no_zero_range: false }
    }

    /// The next step, after the last one succeeded.
    pub(super) fn next(&mut self, shared: &Shared) -> Step {
        loop {
            match self.parts.pop() {
                None => return Step::Done(Ok(())),
                Some(Part::Write { len: 0, .. }) => {}
                Some(Part::Write { offset, len }) => return self.write(offset, len, shared),
                Some(Part::Kernel { offset, len }) => match self.kernel(offset, len, shared) {
                    Some(step) => return step,
                    None => self.parts.push(Part::Write { offset, len }),
                },
            }
        }
    }

    /// By the kernel, in the best way that was not refused yet; None: it has no way.
    fn kernel(&self, offset: u64, len: u64, shared: &Shared) -> Option<Step> {
        let punch = !self.no_punch && !shared.unable.punch.load(Ordering::Relaxed);
        let zero_range = !self.no_zero_range && !shared.unable.zero_range.load(Ordering::Relaxed);
        let mode = match self.what {
            RangeKind::Discard if shared.unable.discard.load(Ordering::Relaxed) => return Some(Step::Done(Ok(()))),
            RangeKind::Discard if shared.is_device => return Some(Step::DiscardDevice { offset, len }),
            RangeKind::Discard => libc::FALLOC_FL_PUNCH_HOLE,
            RangeKind::Zeroes { unmap: true } if punch => libc::FALLOC_FL_PUNCH_HOLE,
            RangeKind::Zeroes { .. } if zero_range => libc::FALLOC_FL_ZERO_RANGE,
            RangeKind::Zeroes { .. } => return None,
        };
        Some(Step::Run(Command::Fallocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, offset, len }))
    }

    fn write(&mut self, offset: u64, len: u64, shared: &Shared) -> Step {
        let unit = u64::from(shared.align.offset);
        let mut now = len.min(MAX_ZEROES as u64);
        if now < len {
            // Only the first and the last block of the range may be partial: the op has locked those for that.
            now -= (offset + now) % unit;
        }
        self.parts.push(Part::Write { offset: offset + now, len: len - now });
        let buf = IoBuf::zeroes(now as usize);
        if (offset | now) & (unit - 1) != 0 {
            self.copied = Some(BounceOp::new((true, false), offset, buf, shared.align.offset));
            return Step::Copy;
        }
        let transfer = Transfer { write: true, durable: false, offset, buf, from: 0, len: now as usize };
        Step::Run(Command::Transfer(transfer))
    }

    /// After [`Step::Copy`]: as [`BounceOp::begin`].
    pub(super) fn begin(&mut self, pool: &mut Pool) -> Option<Command> {
        self.copied.as_mut().expect("the step was `Copy`").begin(pool)
    }

    /// A command of this request is over.
    pub(super) fn after(
        &mut self,
        command: Command,
        result: Result<(), Errno>,
        shared: &Shared,
        pool: &mut Pool,
    ) -> Step {
        match (command, self.copied.as_mut()) {
            (Command::Transfer(transfer), Some(copied)) => match copied.after(result, transfer.buf, pool) {
                Next::Run(command) => return Step::Run(command),
                Next::Done(Err(errno)) => return Step::Done(Err(errno)),
                Next::Done(Ok(())) => self.copied = None,
            },
            (Command::Fallocate { mode, offset, len }, _) => match result {
                Err(errno) if is_unsupported(errno) => return self.refused(mode, (offset, len), errno, shared),
                Err(errno) => return Step::Done(Err(errno)),
                Ok(()) => {}
            },
            _ => {
                if let Err(errno) = result {
                    return Step::Done(Err(errno));
                }
            }
        }
        self.next(shared)
    }

    /// A discard ioctl is over.
    pub(super) fn discarded(&mut self, result: Result<(), Errno>, shared: &Shared) -> Step {
        match result {
            Ok(()) => self.next(shared),
            Err(errno) if is_unsupported(errno) => {
                shared.unable.note(&shared.unable.discard, "discard", shared);
                Step::Done(Ok(()))
            }
            Err(errno) => Step::Done(Err(errno)),
        }
    }

    /// A fallocate was refused: discard is advice and well done without; zeroes go on in the next best way.
    fn refused(&mut self, mode: i32, at: (u64, u64), errno: Errno, shared: &Shared) -> Step {
        if self.what == RangeKind::Discard {
            shared.unable.note(&shared.unable.discard, "discard (fallocate PUNCH_HOLE)", shared);
            return Step::Done(Ok(()));
        }
        // EINVAL may be about this range only (FUSE filesystems): another may do.
        let for_good = errno.0 != libc::EINVAL;
        if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            self.no_punch = true;
            if for_good {
                shared.unable.note(&shared.unable.punch, "deallocate zeroes (fallocate PUNCH_HOLE)", shared);
            }
        } else {
            self.no_zero_range = true;
            if for_good {
                shared.unable.note(&shared.unable.zero_range, "zero a range (fallocate ZERO_RANGE)", shared);
            }
        }
        self.parts.push(Part::Kernel { offset: at.0, len: at.1 });
        self.next(shared)
    }
}

/// What "cannot" looks like; QEMU's block/file-posix.c (translate_err and its callers) has the same list.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno.0, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY | libc::EINVAL)
}
