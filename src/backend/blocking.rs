//! Writes that a queue's own thread makes by plain calls, and that may never return (a frozen file system, a FUSE server
//! that stopped): they are made while nothing of the queue is borrowed, so that another thread can go on with it.
//!
//! The owner of a queue asks it for the next call ([`super::IoQueue::next_call`]), has it made, and gives it back
//! ([`super::IoQueue::call_made`]). If it does not return, another thread takes the queue
//! ([`super::IoQueue::change_thread`]), and the call comes back by [`Caller::leave`] whenever it does.

use std::time::Instant;

use super::{Errno, IoBuf, OpId};

/// A write.
pub struct BlockingCall {
    pub(super) id: OpId,
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
    /// RWF_*.
    pub(super) flags: i32,
    /// When it began, where that is of interest, and when it returned.
    pub(super) began: Option<Instant>,
    pub(super) ended: Option<Instant>,
    /// Bytes stored; 0 before it was made.
    pub(super) result: Result<usize, Errno>,
}

impl BlockingCall {
    pub(super) fn new(id: OpId, offset: u64, buf: IoBuf) -> Self {
        BlockingCall { id, offset, buf, flags: 0, began: None, ended: None, result: Ok(0) }
    }
}

/// Makes a queue's calls in one thread, apart from the queue.
pub trait Caller: Send {
    /// Makes the call. May never return.
    fn make(&mut self, call: &mut BlockingCall);

    /// Another thread has the queue since the call was begun: hands it `call`, and whatever else of the queue this thread
    /// alone can finish. Blocks for as long as that takes.
    fn leave(self: Box<Self>, call: BlockingCall);
}
