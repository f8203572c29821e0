//! Transfers that go through memory of our own: buffers that O_DIRECT would refuse, and writes of less than a block
//! of the medium (read-modify-write).

use super::super::uring::{Command, Transfer};
use super::super::{Errno, IoBuf};
use super::geometry::Alignment;

/// Bytes of the two sizes of pieces.
const SMALL: usize = 64 << 10;
const LARGE: usize = 1 << 20;

/// Large pieces lent out at once; then small ones must do. Bounds the memory of a queue of depth d to
/// 8 MiB + d * 64 KiB.
const MOST_LARGE: usize = 8;

/// Pieces of each size kept for reuse.
const KEPT: usize = 8;

/// Aligned memory for one queue.
pub(super) struct Pool {
    align: usize,
    small: Vec<IoBuf>,
    large: Vec<IoBuf>,
    large_lent: usize,
}

impl Pool {
    pub(super) fn new(alignment: Alignment) -> Self {
        Pool { align: (alignment.memory as usize).max(4096), small: Vec::new(), large: Vec::new(), large_lent: 0 }
    }

    fn take(&mut self, wanted: usize) -> IoBuf {
        if wanted > SMALL && self.large_lent < MOST_LARGE {
            self.large_lent += 1;
            return self.large.pop().unwrap_or_else(|| IoBuf::owned(LARGE, self.align, 0));
        }
        self.small.pop().unwrap_or_else(|| IoBuf::owned(SMALL, self.align, 0))
    }

    fn give(&mut self, piece: IoBuf) {
        let kept = if piece.len() == LARGE {
            self.large_lent -= 1;
            &mut self.large
        } else {
            &mut self.small
        };
        if kept.len() < KEPT {
            kept.push(piece);
        }
    }
}

/// A read or write of the image in pieces, each of which is copied. The range that is read or written is extended to
/// whole blocks of `align`; for a write the caller holds the range lock, and what surrounds the data is read first.
pub(super) struct Copied {
    write: bool,
    durable: bool,
    offset: u64,
    guest: IoBuf,
    align: u64,
    /// Bytes of `guest` that are through.
    done: usize,
    stage: Stage,
}

/// What the command in flight does for the current piece.
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

/// The current piece: `start..end` in whole blocks, of which `from..to` are the guest's bytes.
struct Piece {
    start: u64,
    end: u64,
    from: u64,
    to: u64,
}

impl Copied {
    /// Begins; `align` is a power of two.
    pub(super) fn begin(
        (write, durable): (bool, bool),
        offset: u64,
        guest: IoBuf,
        align: u32,
        pool: &mut Pool,
    ) -> (Self, Command) {
        let align = u64::from(align);
        let mut this = Copied { write, durable, offset, guest, align, done: 0, stage: Stage::Body };
        let bounce = this.new_piece(pool);
        let command = this.first(bounce);
        (this, command)
    }

    /// The guest's buffer, when all is over.
    pub(super) fn into_guest(self) -> IoBuf {
        self.guest
    }

    /// A command is over; `bounce` is the piece's memory, which came back with it.
    pub(super) fn after(&mut self, result: Result<(), Errno>, bounce: IoBuf, pool: &mut Pool) -> Next {
        if let Err(errno) = result {
            // If what surrounds the data cannot be read, nothing of this block is stored.
            pool.give(bounce);
            return Next::Done(Err(errno));
        }
        let piece = self.piece(bounce.len());
        match self.stage {
            Stage::ReadHead if self.needs_tail(&piece) => return Next::Run(self.read_tail(&piece, bounce)),
            Stage::ReadHead | Stage::ReadTail => return Next::Run(self.body(&piece, bounce)),
            Stage::Body => {}
        }
        let len = (piece.to - piece.from) as usize;
        if !self.write {
            self.guest.copy_between(self.done, &bounce, (piece.from - piece.start) as usize, len);
        }
        self.done += len;
        if self.done == self.guest.len() {
            pool.give(bounce);
            return Next::Done(Ok(()));
        }
        Next::Run(self.first(bounce))
    }

    fn new_piece(&self, pool: &mut Pool) -> IoBuf {
        // At most two blocks more than the data.
        pool.take(self.guest.len() + 2 * self.align as usize * usize::from(self.align > 1))
    }

    fn piece(&self, room: usize) -> Piece {
        let from = self.offset + self.done as u64;
        let start = from & !(self.align - 1);
        let whole_end = (self.offset + self.guest.len() as u64).next_multiple_of(self.align);
        let end = whole_end.min(start + room as u64);
        Piece { start, end, from, to: end.min(self.offset + self.guest.len() as u64) }
    }

    fn needs_head(&self, piece: &Piece) -> bool {
        piece.from != piece.start
    }

    /// Whether the last block is partly the guest's, and is not the one read as the head.
    fn needs_tail(&self, piece: &Piece) -> bool {
        piece.to != piece.end && !(self.needs_head(piece) && piece.end - piece.start == self.align)
    }

    fn first(&mut self, bounce: IoBuf) -> Command {
        let piece = self.piece(bounce.len());
        if self.write && self.needs_head(&piece) {
            self.stage = Stage::ReadHead;
            return self.block(piece.start, 0, bounce);
        }
        if self.write && self.needs_tail(&piece) {
            return self.read_tail(&piece, bounce);
        }
        self.body(&piece, bounce)
    }

    fn read_tail(&mut self, piece: &Piece, bounce: IoBuf) -> Command {
        self.stage = Stage::ReadTail;
        let last = piece.end - self.align;
        self.block(last, (last - piece.start) as usize, bounce)
    }

    fn body(&mut self, piece: &Piece, bounce: IoBuf) -> Command {
        self.stage = Stage::Body;
        if self.write {
            let at = (piece.from - piece.start) as usize;
            bounce.copy_between(at, &self.guest, self.done, (piece.to - piece.from) as usize);
        }
        Command::Transfer(Transfer {
            write: self.write,
            durable: self.durable,
            offset: piece.start,
            buf: bounce,
            from: 0,
            len: (piece.end - piece.start) as usize,
        })
    }

    fn block(&self, offset: u64, from: usize, bounce: IoBuf) -> Command {
        let len = self.align as usize;
        Command::Transfer(Transfer { write: false, durable: false, offset, buf: bounce, from, len })
    }
}
