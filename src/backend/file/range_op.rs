//! Discard and write-zeroes: by the filesystem or the device where it can, otherwise by writing zeroes.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::buffer::MAX_ZEROES;
use super::super::uring::{FileOp, Transfer, TransferKind};
use super::super::{Errno, IoBuf};
use super::bounce::{BounceOp, BounceStep};
use super::image::FileImage;
use crate::backend::bounce_pool::QueuePool;

/// The operations that the image's storage has refused as unsupported.
#[derive(Default)]
pub(super) struct UnsupportedOps {
    punch: AtomicBool,
    zero_range: AtomicBool,
    discard: AtomicBool,
}

impl UnsupportedOps {
    /// Records that `what` is unsupported. Logs it the first time.
    fn record(&self, what: &AtomicBool, name: &str, image: &FileImage) {
        if !what.swap(true, Ordering::Relaxed) {
            log::info!("{}: the host cannot {name} here; virtioblkd does without", image.file.name);
        }
    }
}

/// A discard or write-zeroes in progress.
pub(super) struct RangeOp {
    kind: RangeKind,
    /// The parts left to do, the next one last.
    parts: Vec<RangePart>,
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
enum RangePart {
    /// By the kernel: fallocate, or the discard ioctl.
    Kernel { offset: u64, len: u64 },
    /// By writing zeroes.
    Write { offset: u64, len: u64 },
}

/// What an op does next.
pub(super) enum OpStep {
    Run(FileOp),
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
    pub(super) fn discard(offset: u64, len: u64, image: &FileImage) -> Self {
        let unit = u64::from(image.limits.range_unit.max(image.limits.align.offset));
        let (start, end) = (offset.next_multiple_of(unit), (offset + len) / unit * unit);
        let parts = if start < end { vec![RangePart::Kernel { offset: start, len: end - start }] } else { Vec::new() };
        Self::new(RangeKind::Discard, parts)
    }

    /// Creates a write-zeroes. It covers every byte: zeroes are written to the ends that the kernel cannot zero.
    pub(super) fn zeroes(offset: u64, len: u64, unmap: bool, image: &FileImage) -> Self {
        let unit = u64::from(image.limits.range_unit);
        let end = offset + len;
        let (inner, inner_end) = (offset.next_multiple_of(unit), end / unit * unit);
        let mut parts = Vec::new();
        if inner >= inner_end {
            parts.push(RangePart::Write { offset, len });
        } else {
            parts.push(RangePart::Write { offset: inner_end, len: end - inner_end });
            parts.push(RangePart::Kernel { offset: inner, len: inner_end - inner });
            parts.push(RangePart::Write { offset, len: inner - offset });
        }
        Self::new(RangeKind::Zeroes { unmap: unmap && image.limits.may_unmap }, parts)
    }

    fn new(kind: RangeKind, parts: Vec<RangePart>) -> Self {
        RangeOp { kind, parts, bounce: None, punch_refused: false, zero_range_refused: false }
    }

    /// Returns the next step, after the previous one succeeded.
    pub(super) fn next(&mut self, image: &FileImage) -> OpStep {
        loop {
            match self.parts.pop() {
                None => return OpStep::Done(Ok(())),
                Some(RangePart::Write { len: 0, .. }) => {}
                Some(RangePart::Write { offset, len }) => return self.write(offset, len, image),
                Some(RangePart::Kernel { offset, len }) => match self.kernel(offset, len, image) {
                    Some(step) => return step,
                    None => self.parts.push(RangePart::Write { offset, len }),
                },
            }
        }
    }

    /// Returns the best step of the kernel's that was not refused yet; `None` when none is left.
    fn kernel(&self, offset: u64, len: u64, image: &FileImage) -> Option<OpStep> {
        let punch = !self.punch_refused && !image.unsupported.punch.load(Ordering::Relaxed);
        let zero_range = !self.zero_range_refused && !image.unsupported.zero_range.load(Ordering::Relaxed);
        let mode = match self.kind {
            RangeKind::Discard if image.unsupported.discard.load(Ordering::Relaxed) => {
                return Some(OpStep::Done(Ok(())));
            }
            RangeKind::Discard if image.file.is_device => return Some(OpStep::DiscardDevice { offset, len }),
            RangeKind::Discard => libc::FALLOC_FL_PUNCH_HOLE,
            RangeKind::Zeroes { unmap: true } if punch => libc::FALLOC_FL_PUNCH_HOLE,
            RangeKind::Zeroes { .. } if zero_range => libc::FALLOC_FL_ZERO_RANGE,
            RangeKind::Zeroes { .. } => return None,
        };
        Some(OpStep::Run(FileOp::Fallocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, offset, len }))
    }

    fn write(&mut self, offset: u64, len: u64, image: &FileImage) -> OpStep {
        let unit = u64::from(image.limits.align.offset);
        let mut now = len.min(MAX_ZEROES as u64);
        if now < len {
            // Only the first and the last block of the range may be written in part: the op has locked those alone for
            // it.
            now -= (offset + now) % unit;
        }
        self.parts.push(RangePart::Write { offset: offset + now, len: len - now });
        let buf = IoBuf::zeroes(now as usize);
        if (offset | now) & (unit - 1) != 0 {
            self.bounce = Some(BounceOp::new(TransferKind::Write, offset, buf, image.limits.align.offset));
            return OpStep::Copy;
        }
        let transfer = Transfer { kind: TransferKind::Write, offset, buf, from: 0, len: now as usize };
        OpStep::Run(FileOp::Transfer(transfer))
    }

    /// Begins the bounced transfer of [`OpStep::Copy`], as [`BounceOp::begin`] does.
    pub(super) fn begin(&mut self, pool: &mut QueuePool) -> Option<FileOp> {
        self.bounce.as_mut().expect("the step was `Copy`").begin(pool)
    }

    /// Handles the result of a file op of this request.
    pub(super) fn after(
        &mut self,
        file_op: FileOp,
        result: Result<(), Errno>,
        image: &FileImage,
        pool: &mut QueuePool,
    ) -> OpStep {
        match (file_op, self.bounce.as_mut()) {
            (FileOp::Transfer(transfer), Some(bounce)) => match bounce.after(result, transfer.buf, pool) {
                BounceStep::Run(file_op) => return OpStep::Run(file_op),
                BounceStep::Done(Err(errno)) => return OpStep::Done(Err(errno)),
                BounceStep::Done(Ok(())) => self.bounce = None,
            },
            (FileOp::Fallocate { mode, offset, len }, _) => match result {
                Err(errno) if is_unsupported(errno) => return self.refused(mode, offset, len, errno, image),
                Err(errno) => return OpStep::Done(Err(errno)),
                Ok(()) => {}
            },
            _ => {
                if let Err(errno) = result {
                    return OpStep::Done(Err(errno));
                }
            }
        }
        self.next(image)
    }

    /// Handles the result of the discard ioctl.
    pub(super) fn discarded(&mut self, result: Result<(), Errno>, image: &FileImage) -> OpStep {
        match result {
            Ok(()) => self.next(image),
            Err(errno) if is_unsupported(errno) => {
                image.unsupported.record(&image.unsupported.discard, "discard", image);
                OpStep::Done(Ok(()))
            }
            Err(errno) => OpStep::Done(Err(errno)),
        }
    }

    /// Handles a refused fallocate. A discard is advice, so it counts as done; a write-zeroes tries the next best way.
    fn refused(&mut self, mode: i32, offset: u64, len: u64, errno: Errno, image: &FileImage) -> OpStep {
        if self.kind == RangeKind::Discard {
            image.unsupported.record(&image.unsupported.discard, "discard (fallocate PUNCH_HOLE)", image);
            return OpStep::Done(Ok(()));
        }
        // EINVAL may concern this range only (FUSE filesystems), so the next request tries again.
        let for_all = errno.0 != libc::EINVAL;
        if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            self.punch_refused = true;
            if for_all {
                image.unsupported.record(&image.unsupported.punch, "deallocate zeroes (fallocate PUNCH_HOLE)", image);
            }
        } else {
            self.zero_range_refused = true;
            if for_all {
                image.unsupported.record(&image.unsupported.zero_range, "zero a range (fallocate ZERO_RANGE)", image);
            }
        }
        self.parts.push(RangePart::Kernel { offset, len });
        self.next(image)
    }
}

/// Whether an error means that the operation is unsupported. QEMU's block/file-posix.c (translate_err and its callers)
/// has the same list.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno.0, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY | libc::EINVAL)
}
