//! A queue's thread for what the ring cannot do on every kernel and file system: ioctls that sleep, and writes of which
//! the file system takes only a part at a time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::super::Errno;
use super::super::uring::Transfer;
use super::mailbox::{Mail, Mailbox};
use crate::backend::preadv;
use crate::base::syscalls;

/// EAGAIN in a row from plain calls, with [`PAUSE`] between them, before a transfer is given up.
const MAX_RETRIES: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(1);

enum Task {
    Discard { key: u64, offset: u64, len: u64 },
    Transfer { key: u64, transfer: Transfer },
}

/// Discards on a block device, and transfers by plain calls, one after the other. Dropping it waits for what was asked.
pub(super) struct Helper {
    tasks: Option<mpsc::Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    /// Starts the thread, for the queue's own description of the file. Errors: no thread to be had.
    pub(super) fn start(file: Arc<OwnedFd>, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let (tasks, asked) = mpsc::channel::<Task>();
        let thread = thread::Builder::new().name("helper".into()).spawn(move || {
            for task in asked {
                mailbox.post(match task {
                    Task::Discard { key, offset, len } => Mail::Discarded(key, discard(file.as_fd(), offset, len)),
                    Task::Transfer { key, transfer } => {
                        let result = move_all(file.as_fd(), &transfer);
                        Mail::Transferred(key, transfer, result)
                    }
                });
            }
        })?;
        Ok(Helper { tasks: Some(tasks), thread: Some(thread) })
    }

    /// Asks for a discard; `Mail::Discarded` with this key follows.
    pub(super) fn discard(&self, key: u64, offset: u64, len: u64) {
        self.ask(Task::Discard { key, offset, len });
    }

    /// Asks for a transfer; `Mail::Transferred` with this key follows.
    pub(super) fn transfer(&self, key: u64, transfer: Transfer) {
        self.ask(Task::Transfer { key, transfer });
    }

    fn ask(&self, task: Task) {
        let tasks = self.tasks.as_ref().expect("only drop takes it");
        assert!(tasks.send(task).is_ok(), "the thread ends only when the sender is gone");
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.tasks.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a queue's helper thread panicked");
        }
    }
}

fn discard(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    loop {
        match syscalls::discard(file, offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Call after call, for as long as any byte is moved.
fn move_all(file: BorrowedFd<'_>, transfer: &Transfer) -> Result<(), Errno> {
    let flags = if transfer.durable { libc::RWF_DSYNC } else { 0 };
    let (mut done, mut retries, mut scratch) = (0, 0, Vec::new());
    while done < transfer.len {
        let range = transfer.from + done..transfer.from + transfer.len;
        let offset = transfer.offset + done as u64;
        match preadv::transfer(file, transfer.write, &transfer.buf, range, offset, flags, &mut scratch) {
            // Inside the image: the file was cut short under us, or takes nothing for ever.
            Ok(0) => return Err(Errno(libc::EIO)),
            Ok(moved) => (done, retries) = (done + moved, 0),
            Err(Errno(libc::EINTR)) => {}
            Err(Errno(libc::EAGAIN)) if retries < MAX_RETRIES => {
                retries += 1;
                thread::sleep(PAUSE);
            }
            Err(Errno(libc::EAGAIN)) => return Err(Errno(libc::EIO)),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
