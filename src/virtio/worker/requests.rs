//! The requests of one virtqueue between their pop and their completion.

use std::collections::VecDeque;

use vm_memory::GuestAddress;

use crate::backend::{IoBuf, Op};
use crate::disk::FailedRequest;
use crate::engine::Kind;
use crate::virtio::virtqueue::guest_memory::Segment;

/// A request from its pop to its completion.
pub(super) struct PendingRequest {
    pub(super) kind: Kind,
    /// The op, until the engine says `Submit`, and again while the request is retained.
    pub(super) op: Option<Op>,
    /// The transfer failed, and the request waits for a retry.
    pub(super) retained: bool,
    /// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP was set.
    pub(super) unmap: bool,
    pub(super) status_at: GuestAddress,
    /// The number of bytes that the used ring says the device wrote: the data of a read, and the status byte.
    pub(super) written: u32,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// When the request's batch was popped, on the worker's clock.
    pub(super) popped: u64,
    /// When its op was given to the back-end, or when the request was retried last. A flush: when it was popped.
    pub(super) since: u64,
    /// How long the back-end took. `None`: it has not completed the op, or there is none (a flush).
    pub(super) backend_took: Option<u64>,
    /// The guest memory that the request writes, for the dirty log. Empty without a log.
    pub(super) writes: Vec<Segment>,
}

/// All requests of a virtqueue that are not completed.
pub(super) struct Requests {
    /// Indexed by head, which identifies a request until its completion.
    pub(super) pending: Vec<Option<PendingRequest>>,
    /// The number of requests in `pending`.
    pub(super) in_flight: u64,
    /// Heads that an earlier server took and did not complete, oldest first. They are resubmitted before anything new.
    pub(super) resubmit: VecDeque<u16>,
    /// A write waits at the head of the virtqueue (or of `resubmit`) for the gate to open.
    pub(super) blocked: bool,
    /// When `blocked` was set last, on the worker's clock.
    pub(super) blocked_since: u64,
    /// The retained request that `Event::IoStopped` named: the first change, or the first request while no change is
    /// retained.
    pub(super) stopped_by: Option<FailedRequest>,
    /// `Event::IoStalled` was reported, and `Event::IoResumed` was not.
    pub(super) stall_reported: bool,
}

impl Requests {
    /// No requests, for a virtqueue of `size` descriptors.
    pub(super) fn new(size: u16) -> Self {
        Requests {
            pending: (0..size).map(|_| None).collect(),
            in_flight: 0,
            resubmit: VecDeque::new(),
            blocked: false,
            blocked_since: 0,
            stopped_by: None,
            stall_reported: false,
        }
    }

    /// Whether a request may begin at `head`: the head lies inside the virtqueue and is not in use.
    #[inline]
    pub(super) fn is_free(&self, head: u16) -> bool {
        self.pending.get(usize::from(head)).is_some_and(Option::is_none)
    }

    /// Adds a request at a free head.
    #[inline]
    pub(super) fn insert(&mut self, head: u16, request: PendingRequest) {
        self.pending[usize::from(head)] = Some(request);
        self.in_flight += 1;
    }

    /// The request at `head`, which the engine has not finished.
    #[inline]
    pub(super) fn get_mut(&mut self, head: u16) -> &mut PendingRequest {
        self.pending[usize::from(head)].as_mut().expect("a request stays pending until the engine is done with it")
    }

    /// Forgets a request that is being completed.
    #[inline]
    pub(super) fn remove(&mut self, head: u16) {
        self.pending[usize::from(head)] = None;
        self.in_flight -= 1;
    }

    /// Takes the op of a request that is being submitted `now`.
    #[inline]
    pub(super) fn take_op(&mut self, head: u16, now: u64) -> Op {
        let request = self.get_mut(head);
        request.retained = false;
        request.since = now;
        request.op.take().expect("the engine submits an op once")
    }

    /// Restores the op of a request whose transfer failed and which is retained. `buf`: the buffer that the back-end
    /// returned.
    pub(super) fn restore_op(&mut self, head: u16, buf: Option<IoBuf>) {
        let request = self.get_mut(head);
        let (offset, len, unmap) = (request.offset, request.len, request.unmap);
        request.op = match (request.kind, buf) {
            (Kind::Read, Some(buf)) => Some(Op::Read { offset, buf }),
            (Kind::Write, Some(buf)) => Some(Op::Write { offset, buf, durable: false }),
            (Kind::Discard, _) => Some(Op::Discard { offset, len }),
            (Kind::WriteZeroes, _) => Some(Op::WriteZeroes { offset, len, unmap }),
            (kind, _) => unreachable!("the back-end returned no buffer for a {}, or transferred one", kind.name()),
        };
    }
}
