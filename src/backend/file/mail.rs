//! The messages that other threads send to a queue of a file.

use std::io;

use super::super::uring::{FileOp, Transfer};
use super::super::{BlockingCall, Errno};
use super::queue::PendingOp;

/// A message to a queue.
pub(super) enum Mail {
    /// The range lock of this claim is granted.
    Granted(u64),
    /// The helper thread finished the discard of this key.
    Discarded(u64, io::Result<()>),
    /// The helper thread finished the transfer of this key.
    Transferred(u64, Transfer, Result<(), Errno>),
    /// The call of the thread that had the queue before has returned.
    Returned(BlockingCall),
    /// A file op of the io_uring of that thread is complete.
    Finished(PendingOp, FileOp, Result<(), Errno>),
}

/// A queue's mailbox.
pub(super) type Mailbox = super::super::mailbox::Mailbox<Mail>;
