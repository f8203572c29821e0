//! Messages from other threads to a queue: a list, and an eventfd that the queue watches.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::base::sync::{EventNotifier, Mutex};

/// A queue's mailbox. Any thread posts messages, and the queue's thread takes them.
pub(super) struct Mailbox<T> {
    notifier: EventNotifier,
    messages: Mutex<Vec<T>>,
}

impl<T> Mailbox<T> {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Mailbox { notifier: EventNotifier::new()?, messages: Mutex::new(Vec::new()) })
    }

    /// Adds a message and wakes the queue.
    pub(super) fn post(&self, message: T) {
        self.notifier.notify_after(|| {
            self.messages.lock().expect("no panic while held").push(message);
            true
        });
    }

    /// Takes all messages. Called after the queue woke up, which clears the notifier.
    pub(super) fn take(&self) -> Vec<T> {
        std::mem::take(&mut self.messages.lock().expect("no panic while held"))
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
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

    /// A queue that watches its mailbox while it sleeps, and takes all messages when it wakes, gets every message.
    #[test]
    fn a_sleeping_queue_misses_no_message() {
        let model = || {
            let mailbox = Arc::new(Mailbox::new().unwrap());
            let sender = |message| {
                let mailbox = mailbox.clone();
                thread::spawn(move || mailbox.post(message))
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
        holds(model, &[Mutant::NotifyBeforeMessage]);
    }
}
