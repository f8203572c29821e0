//! A ring's queue that copies nothing and looks whether a write's buffer is the same after the write as before.
//!
//! A CRC-32 of the buffer, taken before the image's queue gets the write and again when it gives the buffer back: before
//! the guest is told that the write is over, so a guest that keeps to the rules never looks guilty. One change in four
//! billion goes unseen; a hostile guest can hide all of its changes, and hurts only itself.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use super::super::{Backend, BlockingCall, Caller, Completion, IoBuf, IoQueue, Op, OpId, Source, Wakeups};
use super::status::{Tallies, Tally};

/// Bytes looked at at once: they stay in the processor's first cache.
const SCRATCH: usize = 16 << 10;

/// See [`super::StableBackend`].
pub(super) struct DetectingQueue {
    inner: Box<dyn IoQueue>,
    tallies: Arc<Tallies>,
    tally: Arc<Tally>,
    /// What the inner queue works on: an index is its op's name there.
    slots: Vec<Slot>,
    free: Vec<usize>,
    scratch: Box<[u8]>,
}

#[derive(Clone, Copy)]
struct Slot {
    id: OpId,
    /// Of a write: where it goes, and its checksum before.
    write: Option<(u64, u32)>,
}

impl DetectingQueue {
    /// Errors: those of `image`'s queue.
    pub(super) fn open(image: &dyn Backend, depth: usize, tallies: &Arc<Tallies>) -> io::Result<Self> {
        Ok(DetectingQueue {
            inner: image.open_queue(depth)?,
            tallies: tallies.clone(),
            tally: tallies.open(),
            slots: vec![Slot { id: OpId(0), write: None }; depth],
            free: (0..depth).rev().collect(),
            scratch: vec![0; SCRATCH].into(),
        })
    }

    fn checksum(&mut self, buf: &IoBuf) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        buf.visit(&mut self.scratch, |bytes| hasher.update(bytes));
        hasher.finalize()
    }

    fn finished(&mut self, completion: &mut Completion) {
        let slot = completion.id.0 as usize;
        let Slot { id, write } = self.slots[slot];
        completion.id = id;
        self.free.push(slot);
        // A failed write that lost its buffer cannot be judged.
        if let (Some((offset, before)), Some(buf)) = (write, &completion.buf) {
            Tally::add(&self.tally.checked_writes, 1);
            if self.checksum(buf) != before {
                Tally::add(&self.tally.changed_writes, 1);
                self.tallies.changed(offset, buf.len() as u64);
            }
        }
    }
}

impl IoQueue for DetectingQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        let Some(slot) = self.free.pop() else { return Err(op) };
        let write = match &op {
            Op::Write { offset, buf, .. } => Some((*offset, self.checksum(buf))),
            _ => None,
        };
        self.slots[slot] = Slot { id, write };
        self.inner.push(op, OpId(slot as u64)).inspect_err(|_| self.free.push(slot))
    }

    fn submit(&mut self) -> io::Result<()> {
        self.inner.submit()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let before = out.len();
        self.inner.reap(out);
        out[before..].iter_mut().for_each(|completion| self.finished(completion));
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.inner.watch(source, fd)
    }

    fn has_news(&mut self) -> bool {
        self.inner.has_news()
    }

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
