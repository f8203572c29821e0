//! What other threads tell a queue: a list and an eventfd that the queue watches.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::base::sync::{Bell, Mutex};

/// A queue's mailbox; any thread posts, the queue's takes.
pub(super) struct Mailbox<T> {
    bell: Bell,
    mail: Mutex<Vec<T>>,
}

impl<T> Mailbox<T> {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Mailbox { bell: Bell::new()?, mail: Mutex::new(Vec::new()) })
    }

    pub(super) fn post(&self, mail: T) {
        self.bell.ring_after(|| {
            self.mail.lock().expect("no panic while held").push(mail);
            true
        });
    }

    /// All there is. After the queue, which silences the bell, was woken.
    pub(super) fn take(&self) -> Vec<T> {
        std::mem::take(&mut self.mail.lock().expect("no panic while held"))
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(all(test, feature = "model"))]
mod interleavings {
    use std::sync::Arc;

    use super::super::Source;
    use super::*;
    use crate::backend::eventfd_poll::Watches;
    use crate::base::sync::interleavings::{Mutant, holds};
    use crate::base::sync::thread;

    /// A queue that sleeps with its mailbox watched, and takes what there is when it wakes, gets everything.
    #[test]
    fn no_mail_is_slept_over() {
        let model = || {
            let mailbox = Arc::new(Mailbox::new().unwrap());
            let sender = |mail| {
                let mailbox = mailbox.clone();
                thread::spawn(move || mailbox.post(mail))
            };
            let senders = [sender(1), sender(2)];
            let mut watches = Watches::new().unwrap();
            watches.watch(Source::Copy, mailbox.as_fd()).unwrap();
            let mut taken = 0;
            while taken < senders.len() {
                assert!(watches.sleep(None).unwrap().copy);
                taken += mailbox.take().len();
            }
            senders.into_iter().for_each(|sender| sender.join().unwrap());
        };
        holds(model, &[Mutant::RingsFirst]);
    }
}
