//! What other threads tell a queue: a list and an eventfd that the queue watches.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};

/// A queue's mailbox; any thread posts, the queue's takes.
pub(super) struct Mailbox<T> {
    fd: OwnedFd,
    mail: Mutex<Vec<T>>,
}

impl<T> Mailbox<T> {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Mailbox { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?, mail: Mutex::new(Vec::new()) })
    }

    pub(super) fn post(&self, mail: T) {
        self.mail.lock().expect("no panic while held").push(mail);
        // Nobody may read the count: it would be full after 2^64 messages, and then it is readable anyway.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    pub(super) fn take(&self) -> Vec<T> {
        std::mem::take(&mut self.mail.lock().expect("no panic while held"))
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
