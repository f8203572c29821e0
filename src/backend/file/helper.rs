//! A queue's thread for what the ring cannot do on every kernel: ioctls that sleep.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use std::os::fd::AsFd;

use super::Shared;
use super::mailbox::{Mail, Mailbox};
use crate::sys;

struct Task {
    key: u64,
    offset: u64,
    len: u64,
}

/// Discards on a block device, one after the other. Dropping it waits for what was asked.
pub(super) struct Helper {
    tasks: Option<mpsc::Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    /// Starts the thread. Errors: no thread to be had.
    pub(super) fn start(shared: Arc<Shared>, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let (tasks, asked) = mpsc::channel::<Task>();
        let thread = thread::Builder::new().name("discard".into()).spawn(move || {
            for Task { key, offset, len } in asked {
                let result = loop {
                    match sys::discard(shared.fd.as_fd(), offset, len) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        result => break result,
                    }
                };
                mailbox.post(Mail::Discarded(key, result));
            }
        })?;
        Ok(Helper { tasks: Some(tasks), thread: Some(thread) })
    }

    /// Asks for a discard; `Mail::Discarded` with this key follows.
    pub(super) fn discard(&self, key: u64, offset: u64, len: u64) {
        let tasks = self.tasks.as_ref().expect("only drop takes it");
        tasks.send(Task { key, offset, len }).expect("the thread ends only when the sender is gone");
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.tasks.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the discard thread panicked");
        }
    }
}
