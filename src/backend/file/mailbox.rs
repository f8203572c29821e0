//! What other threads tell a queue: a list and an eventfd that its ring watches.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};

/// One message.
pub(super) enum Mail {
    /// The range lock with this id is held now.
    Granted(u64),
    /// The helper thread finished the discard of this key.
    Discarded(u64, io::Result<()>),
}

/// A queue's mailbox; any thread posts, the queue's takes.
pub(super) struct Mailbox {
    fd: OwnedFd,
    mail: Mutex<Vec<Mail>>,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Mailbox { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?, mail: Mutex::default() })
    }

    pub(super) fn post(&self, mail: Mail) {
        self.mail.lock().expect("no panic while held").push(mail);
        // The count is never read: it would be full after 2^64 messages, and then it is readable anyway.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    pub(super) fn take(&self) -> Vec<Mail> {
        std::mem::take(&mut self.mail.lock().expect("no panic while held"))
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
