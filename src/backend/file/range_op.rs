//! Discard and write-zeroes: by the file system or the device where it can, otherwise by writing zeroes.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::buffer::MAX_ZEROES;
use super::super::uring::{Command, Transfer};
use super::super::{Errno, IoBuf};
use super::Shared;
use super::bounce::{BounceOp, Next};
use crate::backend::bounce_pool::QueuePool;

/// The operations that the image's storage has refused as unsupported.
#[derive(Default)]
pub(super) struct Unsupported {
    punch: AtomicBool,
    zero_range: AtomicBool,
    discard: AtomicBool,
}

impl Unsupported {
    /// Records that `what` is unsupported. Logs it the first time.
    fn record(&self, what: &AtomicBool, name: &str, shared: &Shared) {
        if !what.swap(true, Ordering::Relaxed) {
            log::info!("{}: the host cannot {name} here; virtioblkd does without", shared.name);
        }
    }
}

/// A discard or write-zeroes in progress.
pub(super) struct RangeOp {
    kind: RangeKind,
    /// The parts left to do, the next one last.
    parts: Vec<Part>,
    /// A part that is less than a block, in progress by read-modify-write.
    bounce: Option<BounceOp>,
    /// The kernel refused to punch a hole for this request.
    punch_refused: bool,
    /// The kernel refused to zero a range for this request.
    zero_range_refused: bool,
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

/// What an op does next.
pub(super) enum Step {
    Run(Command),
    /// Begins a bounced transfer as soon as there is memory, by [`RangeOp::begin`] or [`BounceOp::begin`].
    Copy,
    /// BLKDISCARD, which the helper thread makes.
    DiscardDevice {
        offset: u64,
        len: u64,
    },
    Done(Result<(), Errno>),
}

impl RangeOp {
    /// Creates a discard. It leaves the ends alone: only whole units can be discarded.
    pub(super) fn discard(offset: u64, len: u64, shared: &Shared) -> Self {
        let unit = u64::from(shared.range_unit.max(shared.align.offset));
        let (start, end) = (offset.next_multiple_of(unit), (offset + len) / unit * unit);
        let parts = if start < end { vec![Part::Kernel { offset: start, len: end - start }] } else { Vec::new() };
        Self::new(RangeKind::Discard, parts)
    }

    /// Creates a write-zeroes. It covers every byte: zeroes are written to the ends that the kernel cannot zero.
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

    fn new(kind: RangeKind, parts: Vec<Part>) -> Self {
        RangeOp { kind, parts, bounce: None, punch_refused: false, zero_range_refused: false }
    }

    /// Returns the next step, after the previous one succeeded.
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

    /// Returns the best step of the kernel's that was not refused yet; `None` when none is left.
    fn kernel(&self, offset: u64, len: u64, shared: &Shared) -> Option<Step> {
        let punch = !self.punch_refused && !shared.unsupported.punch.load(Ordering::Relaxed);
        let zero_range = !self.zero_range_refused && !shared.unsupported.zero_range.load(Ordering::Relaxed);
        let mode = match self.kind {
            RangeKind::Discard if shared.unsupported.discard.load(Ordering::Relaxed) => {
                return Some(Step::Done(Ok(())));
            }
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
            // Only the first and the last block of the range may be written in part: the op has locked those alone for
            // it.
            now -= (offset + now) % unit;
        }
        self.parts.push(Part::Write { offset: offset + now, len: len - now });
        let buf = IoBuf::zeroes(now as usize);
        if (offset | now) & (unit - 1) != 0 {
            self.bounce = Some(BounceOp::new((true, false), offset, buf, shared.align.offset));
            return Step::Copy;
        }
        let transfer = Transfer { write: true, durable: false, offset, buf, from: 0, len: now as usize };
        Step::Run(Command::Transfer(transfer))
    }

    /// Begins the bounced transfer of [`Step::Copy`], as [`BounceOp::begin`] does.
    pub(super) fn begin(&mut self, pool: &mut QueuePool) -> Option<Command> {
        self.bounce.as_mut().expect("the step was `Copy`").begin(pool)
    }

    /// Handles the result of a command of this request.
    pub(super) fn after(
        &mut self,
        command: Command,
        result: Result<(), Errno>,
        shared: &Shared,
        pool: &mut QueuePool,
    ) -> Step {
        match (command, self.bounce.as_mut()) {
            (Command::Transfer(transfer), Some(bounce)) => match bounce.after(result, transfer.buf, pool) {
                Next::Run(command) => return Step::Run(command),
                Next::Done(Err(errno)) => return Step::Done(Err(errno)),
                Next::Done(Ok(())) => self.bounce = None,
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

    /// Handles the result of the discard ioctl.
    pub(super) fn discarded(&mut self, result: Result<(), Errno>, shared: &Shared) -> Step {
        match result {
            Ok(()) => self.next(shared),
            Err(errno) if is_unsupported(errno) => {
                shared.unsupported.record(&shared.unsupported.discard, "discard", shared);
                Step::Done(Ok(()))
            }
            Err(errno) => Step::Done(Err(errno)),
        }
    }

    /// Handles a refused fallocate. A discard is advice, so it counts as done; a write-zeroes tries the next best way.
    fn refused(&mut self, mode: i32, at: (u64, u64), errno: Errno, shared: &Shared) -> Step {
        if self.kind == RangeKind::Discard {
            shared.unsupported.record(&shared.unsupported.discard, "discard (fallocate PUNCH_HOLE)", shared);
            return Step::Done(Ok(()));
        }
        // EINVAL may concern this range only (FUSE file systems), so the next request tries again.
        let for_all = errno.0 != libc::EINVAL;
        if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            self.punch_refused = true;
            if for_all {
                shared.unsupported.record(
                    &shared.unsupported.punch,
                    "deallocate zeroes (fallocate PUNCH_HOLE)",
                    shared,
                );
            }
        } else {
            self.zero_range_refused = true;
            if for_all {
                shared.unsupported.record(
                    &shared.unsupported.zero_range,
                    "zero a range (fallocate ZERO_RANGE)",
                    shared,
                );
            }
        }
        self.parts.push(Part::Kernel { offset: at.0, len: at.1 });
        self.next(shared)
    }
}

/// Whether an error means that the operation is unsupported. QEMU's block/file-posix.c (translate_err and its callers)
/// has the same list.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno.0, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY | libc::EINVAL)
}
