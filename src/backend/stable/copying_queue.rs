//! A virtqueue's queue that copies each write's data once, before the image's own queue gets it.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use super::super::buffer::IovecList;
use super::super::layer::LayerQueue;
use super::super::{Backend, Completion, Errno, IoBuf, IoQueue, Op, OpId, Wakeups};
use super::counters::QueueCounters;
use crate::backend::bounce_pool::{BounceBuffer, BouncePool, QueuePool};

/// The most parts in flight, on one queue, beyond one for each op. A long write is split into several parts.
const MAX_EXTRA_PARTS: usize = 16;

/// Long writes are split at multiples of this in the image. No medium has larger blocks.
const SPLIT_ALIGNMENT: u64 = 64 << 10;

/// The queue of a [`super::StableBackend`] that copies. Writes for which there is no memory wait here in their order. Other
/// ops pass them; the contract allows that, because it orders an op only after writes that have completed.
pub(super) struct CopyingQueue {
    inner: Box<dyn IoQueue>,
    pool: QueuePool,
    counters: Arc<QueueCounters>,
    /// The caller's ops that were pushed and not reaped.
    unreaped_ops: usize,
    depth: usize,
    writes: Vec<Option<Write>>,
    free_writes: Vec<usize>,
    /// The ops that the inner queue has. The index is the op's id there.
    inner_ops: Vec<InnerOp>,
    free_inner_ops: Vec<usize>,
    /// Parts in flight beyond the first of their write.
    extra_parts: usize,
    /// Writes of which not all data is copied, oldest first. Only the first may have parts in flight.
    waiting: VecDeque<usize>,
    /// An empty list, kept for reuse.
    finished: Vec<Completion>,
    /// Lists of iovecs for reuse.
    iovecs: Vec<IovecList>,
}

/// A write of the caller.
struct Write {
    id: OpId,
    offset: u64,
    /// The guest's buffer.
    guest: IoBuf,
    durable: bool,
    /// Bytes of `guest` that were copied and passed to the inner queue.
    copied: usize,
    parts_in_flight: usize,
    result: Result<(), Errno>,
}

/// An op of the inner queue.
enum InnerOp {
    None,
    /// An op of the caller, passed on as it is.
    Passed(OpId),
    /// A part of a write, in a bounce buffer.
    Part {
        write: usize,
        bounce: BounceBuffer,
        is_extra: bool,
    },
}

impl CopyingQueue {
    /// Fails as [`Backend::open_queue`] of `image` does.
    pub(super) fn open(
        image: &dyn Backend,
        depth: usize,
        bounce_pool: &Arc<BouncePool>,
        counters: Arc<QueueCounters>,
    ) -> io::Result<Self> {
        let inner_depth = depth + MAX_EXTRA_PARTS;
        Ok(CopyingQueue {
            inner: image.open_queue(inner_depth)?,
            pool: QueuePool::new(bounce_pool.clone(), 1),
            counters,
            unreaped_ops: 0,
            depth,
            writes: (0..depth).map(|_| None).collect(),
            free_writes: (0..depth).rev().collect(),
            inner_ops: (0..inner_depth).map(|_| InnerOp::None).collect(),
            free_inner_ops: (0..inner_depth).rev().collect(),
            extra_parts: 0,
            waiting: VecDeque::new(),
            finished: Vec::new(),
            iovecs: Vec::new(),
        })
    }

    /// Passes an op that needs no copy to the inner queue.
    fn pass(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        let index = self.free_inner_ops.pop().expect("there is one for each op");
        self.inner.push(op, OpId(index as u64)).inspect_err(|_| self.free_inner_ops.push(index))?;
        self.inner_ops[index] = InnerOp::Passed(id);
        Ok(())
    }

    /// Copies and pushes as much of a write as there is memory for. Returns whether that was all of the write.
    fn advance(&mut self, index: usize) -> bool {
        loop {
            let write = self.writes[index].as_ref().expect("a write that waits is in its slot");
            if write.copied == write.guest.len() || write.result.is_err() {
                return true;
            }
            let is_extra = write.parts_in_flight > 0;
            if is_extra && self.extra_parts == MAX_EXTRA_PARTS {
                return false;
            }
            let Some(bounce) = self.pool.take(write.guest.len() - write.copied) else { return false };
            if !self.push_part(index, bounce, is_extra) {
                return false;
            }
        }
    }

    /// Copies as much as `bounce` holds and pushes it. Returns `false` when the inner queue is full.
    fn push_part(&mut self, index: usize, bounce: BounceBuffer, is_extra: bool) -> bool {
        let write = self.writes[index].as_mut().expect("the caller found it");
        let offset = write.offset + write.copied as u64;
        let left = write.guest.len() - write.copied;
        let len = if left <= bounce.len() {
            left
        } else {
            // Whole blocks of the medium, so that no block is written in two parts.
            (((offset + bounce.len() as u64) & !(SPLIT_ALIGNMENT - 1)) - offset) as usize
        };
        let buf = bounce.lend(len, self.iovecs.pop().unwrap_or_default().0);
        buf.copy_between(0, &write.guest, write.copied, len);
        let inner_op = self.free_inner_ops.pop().expect("there is one for each op and each extra part");
        if let Err(op) = self.inner.push(Op::Write { offset, buf, durable: write.durable }, OpId(inner_op as u64)) {
            self.free_inner_ops.push(inner_op);
            drop(op);
            self.pool.put_back(bounce);
            return false;
        }
        write.copied += len;
        write.parts_in_flight += 1;
        self.extra_parts += usize::from(is_extra);
        self.inner_ops[inner_op] = InnerOp::Part { write: index, bounce, is_extra };
        QueueCounters::add(&self.counters.copied_bytes, len as u64);
        true
    }

    /// Counts one part of a write as done. Returns the write's completion if it is over.
    fn finish_part(&mut self, index: usize, result: Result<(), Errno>) -> Option<Completion> {
        let write = self.writes[index].as_mut().expect("a write with parts in flight is in its slot");
        write.parts_in_flight -= 1;
        write.result = write.result.and(result);
        let no_part_follows = write.copied == write.guest.len() || write.result.is_err();
        if write.parts_in_flight > 0 || !no_part_follows {
            return None;
        }
        // A write that failed before all of it was copied still waits for memory.
        if self.waiting.front() == Some(&index) {
            self.waiting.pop_front();
        }
        let Write { id, guest, result, .. } = self.writes[index].take().expect("found just now");
        self.free_writes.push(index);
        QueueCounters::add(&self.counters.copied_writes, 1);
        Some(Completion { id, result, buf: Some(guest) })
    }

    /// Handles a completion of the inner queue. Returns the caller's completion if an op of the caller is over.
    fn finish(&mut self, completion: Completion) -> Option<Completion> {
        let index = completion.id.0 as usize;
        self.free_inner_ops.push(index);
        match mem::replace(&mut self.inner_ops[index], InnerOp::None) {
            InnerOp::None => unreachable!("each op completes once"),
            InnerOp::Passed(id) => Some(Completion { id, ..completion }),
            InnerOp::Part { write, bounce, is_extra } => {
                self.extra_parts -= usize::from(is_extra);
                self.iovecs.extend(completion.buf.map(|buf| IovecList(buf.into_iovecs())));
                self.pool.put_back(bounce);
                self.finish_part(write, completion.result)
            }
        }
    }

    /// Continues the waiting writes as far as there is memory now.
    fn advance_waiting(&mut self) {
        while let Some(&index) = self.waiting.front() {
            if !self.advance(index) {
                return;
            }
            self.waiting.pop_front();
        }
    }
}

impl LayerQueue for CopyingQueue {
    fn inner(&mut self) -> &mut dyn IoQueue {
        &mut *self.inner
    }

    fn layer_push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if self.unreaped_ops == self.depth {
            return Err(op);
        }
        match op {
            Op::Write { offset, buf: guest, durable } if !guest.is_empty() => {
                let index = self.free_writes.pop().expect("there is one for each op");
                let write = Write { id, offset, guest, durable, copied: 0, parts_in_flight: 0, result: Ok(()) };
                self.writes[index] = Some(write);
                if !self.waiting.is_empty() || !self.advance(index) {
                    self.waiting.push_back(index);
                    QueueCounters::add(&self.counters.waited_writes, 1);
                }
            }
            op => self.pass(op, id)?,
        }
        self.unreaped_ops += 1;
        Ok(())
    }

    fn layer_reap(&mut self, out: &mut Vec<Completion>) {
        let mut finished = mem::take(&mut self.finished);
        self.inner.reap(&mut finished);
        let before = out.len();
        out.extend(finished.drain(..).filter_map(|completion| self.finish(completion)));
        self.unreaped_ops -= out.len() - before;
        self.finished = finished;
        self.advance_waiting();
    }

    /// May return when only a part of a write is done, with nothing to reap: the caller's `reap` then continues the write.
    fn layer_wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        self.inner.wait(timeout)
    }
}

impl Drop for CopyingQueue {
    /// Carries out the writes that wait here (clause 3). The inner queue carries out those that it has.
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
