//! A virtqueue's queue that copies nothing and checks whether a write's buffer is the same after the write as before.
//!
//! It computes a CRC-32 of the buffer before the image's queue gets the write, and again when that queue returns the
//! buffer. The second one comes before the write completes to the guest, so a guest that follows the rules is never
//! reported. One change in four billion is not detected. A hostile guest can hide all of its changes, and harms only
//! itself.

use std::io;
use std::sync::Arc;

use super::super::layer::LayerQueue;
use super::super::{Backend, Completion, IoBuf, IoQueue, Op, OpId};
use super::counters::{ImageCounters, QueueCounters};

/// How many bytes are hashed at once: they fit into the processor's first-level cache.
const SCRATCH: usize = 16 << 10;

/// The queue of a [`super::StableBackend`] that detects changed buffers.
pub(super) struct DetectingQueue {
    inner: Box<dyn IoQueue>,
    image_counters: Arc<ImageCounters>,
    counters: Arc<QueueCounters>,
    /// The ops that the inner queue has. The index is the op's id there.
    inner_ops: Vec<InnerOp>,
    free_inner_ops: Vec<usize>,
    scratch: Box<[u8]>,
}

/// An op that the inner queue has.
#[derive(Clone, Copy)]
struct InnerOp {
    /// The caller's id of the op.
    id: OpId,
    /// `None`: the op is no write.
    write: Option<WriteCheck>,
}

/// What is known of a write before the inner queue gets it.
#[derive(Clone, Copy)]
struct WriteCheck {
    offset: u64,
    /// The checksum of the write's buffer.
    checksum: u32,
}

impl DetectingQueue {
    /// Fails as [`Backend::open_queue`] of `image` does.
    pub(super) fn open(image: &dyn Backend, depth: usize, counters: &Arc<ImageCounters>) -> io::Result<Self> {
        Ok(DetectingQueue {
            inner: image.open_queue(depth)?,
            image_counters: counters.clone(),
            counters: counters.add_queue(),
            inner_ops: vec![InnerOp { id: OpId(0), write: None }; depth],
            free_inner_ops: (0..depth).rev().collect(),
            scratch: vec![0; SCRATCH].into(),
        })
    }

    fn checksum(&mut self, buf: &IoBuf) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        buf.visit(&mut self.scratch, |bytes| hasher.update(bytes));
        hasher.finalize()
    }

    /// Gives a completion the caller's id, and checks the buffer of a write.
    fn finish_op(&mut self, completion: &mut Completion) {
        let index = completion.id.0 as usize;
        let InnerOp { id, write } = self.inner_ops[index];
        completion.id = id;
        self.free_inner_ops.push(index);
        // A failed write that lost its buffer cannot be checked.
        if let (Some(WriteCheck { offset, checksum }), Some(buf)) = (write, &completion.buf) {
            QueueCounters::add(&self.counters.checked_writes, 1);
            if self.checksum(buf) != checksum {
                QueueCounters::add(&self.counters.changed_writes, 1);
                self.image_counters.record_change(offset, buf.len() as u64);
            }
        }
    }
}

impl LayerQueue for DetectingQueue {
    fn inner(&mut self) -> &mut dyn IoQueue {
        &mut *self.inner
    }

    fn layer_push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        let Some(index) = self.free_inner_ops.pop() else { return Err(op) };
        let write = match &op {
            Op::Write { offset, buf, .. } => Some(WriteCheck { offset: *offset, checksum: self.checksum(buf) }),
            _ => None,
        };
        self.inner_ops[index] = InnerOp { id, write };
        self.inner.push(op, OpId(index as u64)).inspect_err(|_| self.free_inner_ops.push(index))
    }

    fn layer_reap(&mut self, out: &mut Vec<Completion>) {
        let before = out.len();
        self.inner.reap(out);
        out[before..].iter_mut().for_each(|completion| self.finish_op(completion));
    }
}
