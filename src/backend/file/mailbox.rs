//! What other threads tell a queue of a file.

use std::io;

/// One message.
pub(super) enum Mail {
    /// The range lock with this id is held now.
    Granted(u64),
    /// The helper thread finished the discard of this key.
    Discarded(u64, io::Result<()>),
}

/// Where it arrives.
pub(super) type Mailbox = super::super::mailbox::Mailbox<Mail>;
