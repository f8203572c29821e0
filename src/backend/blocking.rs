//! Writes that a queue's own thread makes by plain calls, and that may never return (a frozen file system, a FUSE
//! server that stopped). The thread borrows nothing of the queue during such a call, so that another thread can
//! continue with it.
//!
//! The owner of a queue asks it for the next call ([`super::IoQueue::next_call`]), makes the call, and returns it to
//! the queue ([`super::IoQueue::call_made`]). If the call does not return, another thread takes the queue
//! ([`super::IoQueue::change_thread`]). When the call does return, [`Caller::leave`] passes it to that thread.

use std::time::Instant;

use super::{Errno, IoBuf, OpId};

/// A write to be made by one plain call.
pub struct BlockingCall {
    pub(super) id: OpId,
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
    /// RWF_* of pwritev2(2).
    pub(super) flags: i32,
    /// When the call began, where the queue measures that.
    pub(super) began: Option<Instant>,
    /// When the call returned, where it has `began`.
    pub(super) ended: Option<Instant>,
    /// Bytes written; 0 before the call.
    pub(super) result: Result<usize, Errno>,
}

impl BlockingCall {
    pub(super) fn new(id: OpId, offset: u64, buf: IoBuf) -> Self {
        BlockingCall { id, offset, buf, flags: 0, began: None, ended: None, result: Ok(0) }
    }
}

/// Makes a queue's calls in one thread, without borrowing the queue.
pub trait Caller: Send {
    /// Makes the call. May never return.
    fn make(&mut self, call: &mut BlockingCall);

    /// Another thread has taken the queue since the call began. Passes it `call`, and the completions that only this
    /// thread can receive. Blocks until the last of them.
    fn leave(self: Box<Self>, call: BlockingCall);
}
