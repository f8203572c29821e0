//! A ring's queue that copies each write's data, once, before the image's own queue sees it.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use super::super::buffer::IovecList;
use super::super::{Backend, BlockingCall, Caller, Completion, Errno, IoBuf, IoQueue, Op, OpId, Source, Wakeups};
use super::status::Tally;
use crate::backend::bounce_pool::{BounceBuffer, BouncePool, Pool};

/// Pieces at work at once, on one queue, beyond one for each op: long writes go in several.
const SPARE: usize = 16;

/// Where long writes are cut: at multiples of this in the image, which no medium's blocks exceed.
const CUT: u64 = 64 << 10;

/// See [`super::StableBackend`]. Writes that find no memory wait here in their order; everything else passes them, as the
/// contract allows: only a write that has completed comes before anything.
pub(super) struct CopyingQueue {
    inner: Box<dyn IoQueue>,
    pool: Pool,
    tally: Arc<Tally>,
    /// The caller's ops that are not reaped.
    live: usize,
    depth: usize,
    writes: Vec<Option<Write>>,
    free_writes: Vec<usize>,
    /// What the inner queue works on: an index is its op's name there.
    tasks: Vec<Task>,
    free_tasks: Vec<usize>,
    /// Pieces at work that are not the only one of their write.
    extra: usize,
    /// Writes of which not all data was copied yet, oldest first. Only the first may have pieces at work.
    waiting: VecDeque<usize>,
    /// For reuse.
    finished: Vec<Completion>,
    iovecs: Vec<IovecList>,
}

/// A write on its way.
struct Write {
    id: OpId,
    offset: u64,
    guest: IoBuf,
    durable: bool,
    /// Bytes of `guest` that were copied and handed on.
    taken: usize,
    /// Pieces that the inner queue has.
    at_work: usize,
    result: Result<(), Errno>,
}

/// An op of the inner queue's.
enum Task {
    None,
    /// The caller's, as it is.
    Passed(OpId),
    /// A part of a write, out of memory of ours.
    Part {
        write: usize,
        piece: BounceBuffer,
        is_extra: bool,
    },
}

impl CopyingQueue {
    /// Errors: those of `image`'s queue.
    pub(super) fn open(
        image: &dyn Backend,
        depth: usize,
        depot: &Arc<BouncePool>,
        tally: Arc<Tally>,
    ) -> io::Result<Self> {
        let tasks = depth + SPARE;
        Ok(CopyingQueue {
            inner: image.open_queue(tasks)?,
            pool: Pool::new(depot.clone(), 1),
            tally,
            live: 0,
            depth,
            writes: (0..depth).map(|_| None).collect(),
            free_writes: (0..depth).rev().collect(),
            tasks: (0..tasks).map(|_| Task::None).collect(),
            free_tasks: (0..tasks).rev().collect(),
            extra: 0,
            waiting: VecDeque::new(),
            finished: Vec::new(),
            iovecs: Vec::new(),
        })
    }

    fn pass(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        let task = self.free_tasks.pop().expect("there are more than ops");
        self.inner.push(op, OpId(task as u64)).inspect_err(|_| self.free_tasks.push(task))?;
        self.tasks[task] = Task::Passed(id);
        Ok(())
    }

    /// Copies and hands on what there is memory for. True: that was all of the write.
    fn advance(&mut self, index: usize) -> bool {
        loop {
            let write = self.writes[index].as_ref().expect("a write that waits is there");
            if write.taken == write.guest.len() || write.result.is_err() {
                return true;
            }
            let is_extra = write.at_work > 0;
            if is_extra && self.extra == SPARE {
                return false;
            }
            let Some(piece) = self.pool.take(write.guest.len() - write.taken) else { return false };
            if !self.hand_on(index, piece, is_extra) {
                return false;
            }
        }
    }

    /// Copies as much as `piece` holds and pushes it. False: the inner queue is full.
    fn hand_on(&mut self, index: usize, piece: BounceBuffer, is_extra: bool) -> bool {
        let write = self.writes[index].as_mut().expect("the caller looked");
        let offset = write.offset + write.taken as u64;
        let left = write.guest.len() - write.taken;
        let len = if left <= piece.len() {
            left
        } else {
            // Whole blocks of the medium, so that no block is written in two parts.
            (((offset + piece.len() as u64) & !(CUT - 1)) - offset) as usize
        };
        let buf = piece.lend(len, self.iovecs.pop().unwrap_or_default().0);
        buf.copy_between(0, &write.guest, write.taken, len);
        let task = self.free_tasks.pop().expect("one for each op, and for each that is extra");
        if let Err(op) = self.inner.push(Op::Write { offset, buf, durable: write.durable }, OpId(task as u64)) {
            self.free_tasks.push(task);
            drop(op);
            self.pool.give(piece);
            return false;
        }
        write.taken += len;
        write.at_work += 1;
        self.extra += usize::from(is_extra);
        self.tasks[task] = Task::Part { write: index, piece, is_extra };
        Tally::add(&self.tally.copied_bytes, len as u64);
        true
    }

    /// Part of a write is over; the completion, if that was the last.
    fn part_done(&mut self, index: usize, result: Result<(), Errno>) -> Option<Completion> {
        let write = self.writes[index].as_mut().expect("it has parts at work");
        write.at_work -= 1;
        write.result = write.result.and(result);
        let all_taken = write.taken == write.guest.len() || write.result.is_err();
        if write.at_work > 0 || !all_taken {
            return None;
        }
        // Given up before all of it was taken.
        if self.waiting.front() == Some(&index) {
            self.waiting.pop_front();
        }
        let Write { id, guest, result, .. } = self.writes[index].take().expect("looked at just now");
        self.free_writes.push(index);
        Tally::add(&self.tally.copied_writes, 1);
        Some(Completion { id, result, buf: Some(guest) })
    }

    fn finish(&mut self, completion: Completion) -> Option<Completion> {
        let task = completion.id.0 as usize;
        self.free_tasks.push(task);
        match mem::replace(&mut self.tasks[task], Task::None) {
            Task::None => unreachable!("each op comes back once"),
            Task::Passed(id) => Some(Completion { id, ..completion }),
            Task::Part { write, piece, is_extra } => {
                self.extra -= usize::from(is_extra);
                self.iovecs.extend(completion.buf.map(|buf| IovecList(buf.into_iovecs())));
                self.pool.give(piece);
                self.part_done(write, completion.result)
            }
        }
    }

    /// Goes on with the writes that wait, as far as there is memory now.
    fn feed(&mut self) {
        while let Some(&index) = self.waiting.front() {
            if !self.advance(index) {
                return;
            }
            self.waiting.pop_front();
        }
    }
}

impl IoQueue for CopyingQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if self.live == self.depth {
            return Err(op);
        }
        match op {
            Op::Write { offset, buf: guest, durable } if !guest.is_empty() => {
                let index = self.free_writes.pop().expect("one for each op");
                let write = Write { id, offset, guest, durable, taken: 0, at_work: 0, result: Ok(()) };
                self.writes[index] = Some(write);
                if !self.waiting.is_empty() || !self.advance(index) {
                    self.waiting.push_back(index);
                    Tally::add(&self.tally.waited_writes, 1);
                }
            }
            op => self.pass(op, id)?,
        }
        self.live += 1;
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        self.inner.submit()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let mut finished = mem::take(&mut self.finished);
        self.inner.reap(&mut finished);
        let before = out.len();
        out.extend(finished.drain(..).filter_map(|completion| self.finish(completion)));
        self.live -= out.len() - before;
        self.finished = finished;
        self.feed();
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.inner.watch(source, fd)
    }

    fn has_news(&mut self) -> bool {
        self.inner.has_news()
    }

    /// May return for a part of a write, with nothing to reap yet: the caller's `reap` then goes on with the rest.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        self.inner.wait(timeout)
    }

    fn caller(&mut self) -> Option<Box<dyn Caller>> {
        self.inner.caller()
    }

    fn next_call(&mut self) -> Option<BlockingCall> {
        self.inner.next_call()
    }

    fn call_made(&mut self, call: BlockingCall) {
        self.inner.call_made(call);
    }

    fn change_thread(&mut self) -> io::Result<()> {
        self.inner.change_thread()
    }
}

impl Drop for CopyingQueue {
    /// What was taken is carried out (clause 3): the inner queue does so with what it has.
    fn drop(&mut self) {
        let mut finished = Vec::new();
        while !self.waiting.is_empty() {
            if let Err(error) = self.inner.wait(None) {
                log::error!("cannot wait for I/O ({error}); {} writes are lost", self.waiting.len());
                return;
            }
            self.reap(&mut finished);
            finished.clear();
        }
    }
}
