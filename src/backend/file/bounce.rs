//! Bounced transfers, which go through memory of our own: O_DIRECT would refuse the guest's buffer, or a write covers
//! less than a block of the medium (read-modify-write).

use super::super::uring::{FileOp, Transfer, TransferKind};
use super::super::{Errno, IoBuf};
use crate::backend::bounce_pool::{BounceBuffer, QueuePool};

/// A read or write of the image in parts, each of which is copied. It extends the range to whole blocks of `align`. Of
/// a block that a write covers in part it reads the rest first; the caller holds the range lock for that.
pub(super) struct BounceOp {
    kind: TransferKind,
    offset: u64,
    guest: IoBuf,
    align: u64,
    /// Bytes of `guest` that are transferred.
    done: usize,
    stage: BounceStage,
    /// The memory, from `begin` on.
    memory: Option<BounceBuffer>,
}

/// What the file op in flight does.
#[derive(Clone, Copy, PartialEq)]
enum BounceStage {
    /// Reads the first block of the part, of which the guest writes a part.
    ReadHead,
    /// Reads the last block.
    ReadTail,
    /// Reads or writes the part itself.
    Body,
}

/// What an op does after a file op.
pub(super) enum BounceStep {
    Run(FileOp),
    Done(Result<(), Errno>),
}

/// The current part: `start..end` are whole blocks, and `from..to` the bytes of the guest in them.
struct BouncePart {
    start: u64,
    end: u64,
    from: u64,
    to: u64,
}

impl BounceOp {
    /// Creates a transfer that has not begun. `align` is a power of two.
    pub(super) fn new(kind: TransferKind, offset: u64, guest: IoBuf, align: u32) -> Self {
        BounceOp { kind, offset, guest, align: align.into(), done: 0, stage: BounceStage::Body, memory: None }
    }

    /// Returns the first file op. Returns `None` while there is no memory; the caller retries when memory was put back
    /// into `pool`.
    pub(super) fn begin(&mut self, pool: &mut QueuePool) -> Option<FileOp> {
        let part = self.part(usize::MAX);
        let memory = pool.take((part.end - part.start) as usize)?;
        let bounce = memory.lend(memory.len(), Vec::new());
        self.memory = Some(memory);
        Some(self.first(bounce))
    }

    /// Returns the guest's buffer at the end.
    pub(super) fn into_guest(self) -> IoBuf {
        self.guest
    }

    /// Handles the result of a file op. `bounce` is the part's memory, which came back with it.
    pub(super) fn after(&mut self, result: Result<(), Errno>, bounce: IoBuf, pool: &mut QueuePool) -> BounceStep {
        if let Err(errno) = result {
            // If the rest of a block cannot be read, nothing of this block is written.
            return self.end(Err(errno), bounce, pool);
        }
        let part = self.part(bounce.len());
        match self.stage {
            BounceStage::ReadHead if self.needs_tail(&part) => return BounceStep::Run(self.read_tail(&part, bounce)),
            BounceStage::ReadHead | BounceStage::ReadTail => return BounceStep::Run(self.body(&part, bounce)),
            BounceStage::Body => {}
        }
        let len = (part.to - part.from) as usize;
        if !self.kind.is_write() {
            self.guest.copy_between(self.done, &bounce, (part.from - part.start) as usize, len);
        }
        self.done += len;
        if self.done == self.guest.len() {
            return self.end(Ok(()), bounce, pool);
        }
        BounceStep::Run(self.first(bounce))
    }

    /// Ends the op and puts its memory back.
    fn end(&mut self, result: Result<(), Errno>, bounce: IoBuf, pool: &mut QueuePool) -> BounceStep {
        drop(bounce);
        pool.put_back(self.memory.take().expect("`begin` took it"));
        BounceStep::Done(result)
    }

    fn part(&self, max_len: usize) -> BouncePart {
        let from = self.offset + self.done as u64;
        let start = from & !(self.align - 1);
        let whole_end = (self.offset + self.guest.len() as u64).next_multiple_of(self.align);
        let end = whole_end.min(start.saturating_add(max_len as u64));
        BouncePart { start, end, from, to: end.min(self.offset + self.guest.len() as u64) }
    }

    fn needs_head(&self, part: &BouncePart) -> bool {
        part.from != part.start
    }

    /// Whether the guest writes a part of the last block, and that is not the block read as the head.
    fn needs_tail(&self, part: &BouncePart) -> bool {
        part.to != part.end && !(self.needs_head(part) && part.end - part.start == self.align)
    }

    fn first(&mut self, bounce: IoBuf) -> FileOp {
        let part = self.part(bounce.len());
        if self.kind.is_write() && self.needs_head(&part) {
            self.stage = BounceStage::ReadHead;
            return self.block(part.start, 0, bounce);
        }
        if self.kind.is_write() && self.needs_tail(&part) {
            return self.read_tail(&part, bounce);
        }
        self.body(&part, bounce)
    }

    fn read_tail(&mut self, part: &BouncePart, bounce: IoBuf) -> FileOp {
        self.stage = BounceStage::ReadTail;
        let last = part.end - self.align;
        self.block(last, (last - part.start) as usize, bounce)
    }

    fn body(&mut self, part: &BouncePart, bounce: IoBuf) -> FileOp {
        self.stage = BounceStage::Body;
        if self.kind.is_write() {
            let at = (part.from - part.start) as usize;
            bounce.copy_between(at, &self.guest, self.done, (part.to - part.from) as usize);
        }
        FileOp::Transfer(Transfer {
            kind: self.kind,
            offset: part.start,
            buf: bounce,
            from: 0,
            len: (part.end - part.start) as usize,
        })
    }

    fn block(&self, offset: u64, from: usize, bounce: IoBuf) -> FileOp {
        let len = self.align as usize;
        FileOp::Transfer(Transfer { kind: TransferKind::Read, offset, buf: bounce, from, len })
    }
}
