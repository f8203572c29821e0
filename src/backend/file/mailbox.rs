//! What other threads tell a queue of a file.

use std::io;

use super::super::Errno;
use super::super::uring::Transfer;

/// One message.
pub(super) enum Mail {
    /// The range lock with this id is held now.
    Granted(u64),
    /// The helper thread finished the discard of this key.
    Discarded(u64, io::Result<()>),
    /// The helper thread finished the transfer of this key.
    Transferred(u64, Transfer, Result<(), Errno>),
}

/// Where it arrives.
pub(super) type Mailbox = super::super::mailbox::Mailbox<Mail>;
