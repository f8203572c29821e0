//! Reads and writes that are tried by plain calls, and the thread that makes the calls. What would sleep goes to the
//! io_uring; see `inline`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use super::super::inline::InlineOutcome;
use super::super::mail::{Mail, Mailbox};
use super::{FileQueue, OpState, PendingOp};
use crate::backend::buffer::IovecList;
use crate::backend::preadv;
use crate::backend::uring::{FileOp, Transfer, TransferKind, Uring};
use crate::backend::{BlockingCall, Caller, IoBuf, IoQueue, OpId};

impl FileQueue {
    /// Tries a read without the io_uring. The op is in `ready` when this returns, or the io_uring has the rest of it.
    #[inline]
    pub(super) fn read_inline(&mut self, id: OpId, offset: u64, buf: IoBuf) {
        match self.inline.read(self.file.as_fd(), &buf, offset) {
            InlineOutcome::Complete(result) => self.complete(id, false, result, Some(buf)),
            InlineOutcome::Partial(from) => {
                self.ops_in_flight += 1;
                self.start_rest(id, TransferKind::Read, offset, buf, from);
            }
            InlineOutcome::Repeat => unreachable!("a read is tried once"),
        }
    }

    /// Queues a write that may need no io_uring. It counts as in flight until its call has returned.
    #[inline]
    pub(super) fn write_inline(&mut self, id: OpId, offset: u64, buf: IoBuf) {
        self.inline.reserve(&buf);
        self.ops_in_flight += 1;
        let call = match self.spare_calls.pop() {
            Some(spare) => spare.reuse(id, offset, buf),
            None => BlockingCall::new(id, offset, buf),
        };
        self.pending_calls.push_back(call);
        if self.to_caller.is_none() {
            self.make_calls();
        }
    }

    /// Makes the queued calls in this thread, where the owner has not taken that on itself.
    fn make_calls(&mut self) {
        let mut scratch = Vec::new();
        while let Some(mut call) = self.next_call() {
            make(self.file.as_fd(), &mut call, &mut scratch);
            self.call_made(call);
        }
    }

    /// Gives the io_uring what is left of a transfer after `from` bytes.
    pub(super) fn start_rest(&mut self, id: OpId, kind: TransferKind, offset: u64, buf: IoBuf, from: usize) {
        let len = buf.len() - from;
        let rest = Transfer { kind, offset: offset + from as u64, buf, from, len };
        let op = PendingOp { id, durable: false, changes: kind.is_write(), state: OpState::Single, _ticket: None };
        self.uring.start(FileOp::Transfer(rest), op);
    }

    /// Returns the first queued call that may be made now. Apart from `next_call`, which has nothing to return in most cases,
    /// and would save and restore registers for this.
    #[inline(never)]
    pub(super) fn next_admitted_call(&mut self) -> Option<BlockingCall> {
        while let Some(mut call) = self.pending_calls.pop_front() {
            if self.inline.admits(&mut call) {
                return Some(call);
            }
            self.continue_call(call, 0);
        }
        None
    }

    /// Gives the io_uring what is left of a write after `from` bytes.
    pub(super) fn continue_call(&mut self, mut call: BlockingCall, from: usize) {
        let buf = call.buf.take();
        self.start_rest(call.id, TransferKind::Write, call.offset, buf, from);
        self.spare_calls.push(call);
    }

    /// Gives the queued calls to the io_uring, because the owner is about to sleep.
    pub(super) fn start_calls(&mut self) {
        while let Some(call) = self.pending_calls.pop_front() {
            self.continue_call(call, 0);
        }
    }
}

/// Makes the calls of one queue; see [`Caller`].
pub(super) struct FileCaller {
    file: Arc<OwnedFd>,
    mailbox: Arc<Mailbox>,
    /// Gets the queue's io_uring when another thread takes the queue.
    old_uring: mpsc::Receiver<Uring<PendingOp>>,
    scratch: IovecList,
}

impl FileCaller {
    pub(super) fn new(file: Arc<OwnedFd>, mailbox: Arc<Mailbox>, old_uring: mpsc::Receiver<Uring<PendingOp>>) -> Self {
        FileCaller { file, mailbox, old_uring, scratch: IovecList::default() }
    }
}

impl Caller for FileCaller {
    fn make(&mut self, call: &mut BlockingCall) {
        make(self.file.as_fd(), call, &mut self.scratch.0);
    }

    fn leave(self: Box<Self>, call: BlockingCall) {
        self.mailbox.post(Mail::Returned(call));
        // Without an io_uring the queue was dropped.
        let Ok(mut uring) = self.old_uring.recv() else { return };
        let finished = |op, file_op, result| self.mailbox.post(Mail::Finished(op, file_op, result));
        if let Err(error) = uring.finish(finished) {
            log::error!("cannot wait for I/O in flight: {error}; its requests never complete; restart virtioblkd");
        }
    }
}

/// Makes one call and records its result.
fn make(file: BorrowedFd<'_>, call: &mut BlockingCall, scratch: &mut Vec<libc::iovec>) {
    call.result = preadv::transfer(file, true, &call.buf, 0..call.buf.len(), call.offset, call.flags, scratch);
    if call.began.is_some() {
        call.ended = Some(Instant::now());
    }
}
