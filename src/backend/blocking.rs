//! Writes that a queue's own thread makes by plain calls, and that may never return (a frozen filesystem, a FUSE
//! server that stopped). The thread borrows nothing of the queue during such a call, so that another thread can
//! continue with it.
//!
//! The owner of a queue asks it for the next call ([`super::IoQueue::next_call`]), makes the call, and returns it to
//! the queue ([`super::IoQueue::call_made`]). If the call does not return, another thread takes the queue
//! ([`super::IoQueue::change_thread`]). When the call does return, [`Caller::leave`] passes it to that thread.

use std::ops::{Deref, DerefMut};
use std::time::Instant;

use super::{Errno, IoBuf, OpId};

/// A write to be made by one plain call. A queue, its layers and the ring's thread pass it on several times, so it is a
/// pointer, and the queue reuses the memory (`BlockingCall::reuse`).
pub struct BlockingCall(Box<WriteCall>);

/// The content of a [`BlockingCall`].
pub struct WriteCall {
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

impl WriteCall {
    #[inline]
    fn new(id: OpId, offset: u64, buf: IoBuf) -> Self {
        WriteCall { id, offset, buf, flags: 0, began: None, ended: None, result: Ok(0) }
    }
}

impl BlockingCall {
    pub(super) fn new(id: OpId, offset: u64, buf: IoBuf) -> Self {
        BlockingCall(Box::new(WriteCall::new(id, offset, buf)))
    }

    /// Makes a new call of one that is over and whose buffer was taken.
    #[inline]
    pub(super) fn reuse(mut self, id: OpId, offset: u64, buf: IoBuf) -> Self {
        *self.0 = WriteCall::new(id, offset, buf);
        self
    }
}

impl Deref for BlockingCall {
    type Target = WriteCall;

    #[inline]
    fn deref(&self) -> &WriteCall {
        &self.0
    }
}

impl DerefMut for BlockingCall {
    #[inline]
    fn deref_mut(&mut self) -> &mut WriteCall {
        &mut self.0
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
