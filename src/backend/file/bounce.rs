//! Transfers that go through memory of our own: buffers that O_DIRECT would refuse, and writes of less than a block
//! of the medium (read-modify-write).

use super::super::uring::{Command, Transfer};
use super::super::{Errno, IoBuf};
use crate::backend::bounce_pool::{BounceBuffer, Pool};

/// A read or write of the image in parts, each of which is copied. The range that is read or written is extended to
/// whole blocks of `align`; for a write the caller holds the range lock, and what surrounds the data is read first.
pub(super) struct BounceOp {
    write: bool,
    durable: bool,
    offset: u64,
    guest: IoBuf,
    align: u64,
    /// Bytes of `guest` that are through.
    done: usize,
    stage: Stage,
    /// The memory, once begun.
    memory: Option<BounceBuffer>,
}

/// What the command in flight does for the current part.
#[derive(Clone, Copy, PartialEq)]
enum Stage {
    ReadHead,
    ReadTail,
    Body,
}

/// What comes next.
pub(super) enum Next {
    Run(Command),
    Done(Result<(), Errno>),
}

/// The current part: `start..end` in whole blocks, of which `from..to` are the guest's bytes.
struct Part {
    start: u64,
    end: u64,
    from: u64,
    to: u64,
}

impl BounceOp {
    /// A transfer that has not begun; `align` is a power of two.
    pub(super) fn new((write, durable): (bool, bool), offset: u64, guest: IoBuf, align: u32) -> Self {
        BounceOp { write, durable, offset, guest, align: align.into(), done: 0, stage: Stage::Body, memory: None }
    }

    /// The first command. None: there is no memory now; try again when a piece was given back to `pool`.
    pub(super) fn begin(&mut self, pool: &mut Pool) -> Option<Command> {
        let part = self.part(usize::MAX);
        let piece = pool.take((part.end - part.start) as usize)?;
        let bounce = piece.lend(piece.len(), Vec::new());
        self.memory = Some(piece);
        Some(self.first(bounce))
    }

    /// The guest's buffer, when all is over.
    pub(super) fn into_guest(self) -> IoBuf {
        self.guest
    }

    /// A command is over; `bounce` is the part's memory, which came back with it.
    pub(super) fn after(&mut self, result: Result<(), Errno>, bounce: IoBuf, pool: &mut Pool) -> Next {
        if let Err(errno) = result {
            // If what surrounds the data cannot be read, nothing of this block is stored.
            return self.end(Err(errno), bounce, pool);
        }
        let part = self.part(bounce.len());
        match self.stage {
            Stage::ReadHead if self.needs_tail(&part) => return Next::Run(self.read_tail(&part, bounce)),
            Stage::ReadHead | Stage::ReadTail => return Next::Run(self.body(&part, bounce)),
            Stage::Body => {}
        }
        let len = (part.to - part.from) as usize;
        if !self.write {
            self.guest.copy_between(self.done, &bounce, (part.from - part.start) as usize, len);
        }
        self.done += len;
        if self.done == self.guest.len() {
            return self.end(Ok(()), bounce, pool);
        }
        Next::Run(self.first(bounce))
    }

    /// All is over: the memory goes back.
    fn end(&mut self, result: Result<(), Errno>, bounce: IoBuf, pool: &mut Pool) -> Next {
        drop(bounce);
        pool.give(self.memory.take().expect("it was begun"));
        Next::Done(result)
    }

    fn part(&self, room: usize) -> Part {
        let from = self.offset + self.done as u64;
        let start = from & !(self.align - 1);
        let whole_end = (self.offset + self.guest.len() as u64).next_multiple_of(self.align);
        let end = whole_end.min(start.saturating_add(room as u64));
        Part { start, end, from, to: end.min(self.offset + self.guest.len() as u64) }
    }

    fn needs_head(&self, part: &Part) -> bool {
        part.from != part.start
    }

    /// Whether the last block is partly the guest's, and is not the one read as the head.
    fn needs_tail(&self, part: &Part) -> bool {
        part.to != part.end && !(self.needs_head(part) && part.end - part.start == self.align)
    }

    fn first(&mut self, bounce: IoBuf) -> Command {
        let part = self.part(bounce.len());
        if self.write && self.needs_head(&part) {
            self.stage = Stage::ReadHead;
            return self.block(part.start, 0, bounce);
        }
        if self.write && self.needs_tail(&part) {
            return self.read_tail(&part, bounce);
        }
        self.body(&part, bounce)
    }

    fn read_tail(&mut self, part: &Part, bounce: IoBuf) -> Command {
        self.stage = Stage::ReadTail;
        let last = part.end - self.align;
        self.block(last, (last - part.start) as usize, bounce)
    }

    fn body(&mut self, part: &Part, bounce: IoBuf) -> Command {
        self.stage = Stage::Body;
        if self.write {
            let at = (part.from - part.start) as usize;
            bounce.copy_between(at, &self.guest, self.done, (part.to - part.from) as usize);
        }
        Command::Transfer(Transfer {
            write: self.write,
            durable: self.durable,
            offset: part.start,
            buf: bounce,
            from: 0,
            len: (part.end - part.start) as usize,
        })
    }

    fn block(&self, offset: u64, from: usize, bounce: IoBuf) -> Command {
        let len = self.align as usize;
        Command::Transfer(Transfer { write: false, durable: false, offset, buf: bounce, from, len })
    }
}
