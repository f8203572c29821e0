//! How a new op begins: the range lock that it needs, its state, and its first step.

use std::os::fd::AsFd;

use super::super::bounce::BounceOp;
use super::super::range_locks::LockTicket;
use super::super::range_op::{OpStep, RangeOp};
use super::{FileQueue, OpState};
use crate::backend::uring::{FileOp, Transfer, TransferKind};
use crate::backend::{IoBuf, Op};

impl FileQueue {
    /// Returns the op's state and its first step.
    pub(super) fn plan(&self, op: Op) -> (OpState, OpStep) {
        match op {
            Op::Read { offset, buf } => self.plan_transfer(TransferKind::Read, offset, buf),
            Op::Write { offset, buf, durable: true } => self.plan_transfer(TransferKind::DurableWrite, offset, buf),
            Op::Write { offset, buf, durable: false } => self.plan_transfer(TransferKind::Write, offset, buf),
            Op::Sync => match self.image.changes.begin_sync() {
                Some(stamp) => match self.inline.sync(self.file.as_fd()) {
                    None => (OpState::Sync(stamp), OpStep::Run(FileOp::Sync)),
                    Some(result) => (OpState::Single, OpStep::Done(self.image.end_sync(stamp, result))),
                },
                None => (OpState::Single, OpStep::Done(self.image.record_durability(Ok(())))),
            },
            Op::Discard { offset, len } => self.plan_range_op(RangeOp::discard(offset, len, &self.image)),
            Op::WriteZeroes { offset, len, unmap } => {
                self.plan_range_op(RangeOp::zeroes(offset, len, unmap, &self.image))
            }
        }
    }

    fn plan_transfer(&self, kind: TransferKind, offset: u64, buf: IoBuf) -> (OpState, OpStep) {
        let align = self.image.limits.align;
        // Aligned iovecs may still add up to less than a block of the medium, or start inside one.
        let whole_blocks = (offset | buf.len() as u64) & u64::from(align.offset - 1) == 0;
        if whole_blocks && buf.is_aligned(align.memory as usize, align.offset as usize) {
            let len = buf.len();
            let transfer = Transfer { kind, offset, buf, from: 0, len };
            return (OpState::Single, OpStep::Run(FileOp::Transfer(transfer)));
        }
        let bounce_op = BounceOp::new(kind, offset, buf, align.offset);
        (OpState::Bounce(Box::new(bounce_op)), OpStep::Copy)
    }

    fn plan_range_op(&self, mut range_op: RangeOp) -> (OpState, OpStep) {
        let step = range_op.next(&self.image);
        (OpState::Range(Box::new(range_op)), step)
    }

    /// Locks the blocks of an op that changes the image, where the medium's blocks are larger than the guest's. The
    /// flag is false if the op must wait for its lock.
    pub(super) fn lock(&self, op: &Op) -> Option<(LockTicket, bool)> {
        let locks = self.locks.as_ref()?;
        Some(match op {
            Op::Read { .. } | Op::Sync => return None,
            Op::Write { offset, buf, .. } => locks.lock_written(*offset..*offset + buf.len() as u64),
            Op::WriteZeroes { offset, len, .. } => locks.lock_written(*offset..*offset + *len),
            // A block that the guest discards in part is left alone.
            Op::Discard { offset, len } => locks.lock_inside(*offset..*offset + *len),
        })
    }
}
