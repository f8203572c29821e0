//! What other threads tell a queue of a file.

use std::io;

use super::super::uring::{Command, Transfer};
use super::super::{BlockingCall, Errno};
use super::queue::Job;

/// One message.
pub(super) enum Mail {
    /// The range lock with this id is held now.
    Granted(u64),
    /// The helper thread finished the discard of this key.
    Discarded(u64, io::Result<()>),
    /// The helper thread finished the transfer of this key.
    Transferred(u64, Transfer, Result<(), Errno>),
    /// A thread that had the queue before is back from this call.
    Returned(BlockingCall),
    /// And a command that its ring had is over.
    Finished(Job, Command, Result<(), Errno>),
}

/// Where it arrives.
pub(super) type Mailbox = super::super::mailbox::Mailbox<Mail>;
