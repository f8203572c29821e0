//! A queue's helper threads, for what io_uring cannot do on every kernel and filesystem: ioctls that sleep, and writes of
//! which the filesystem takes only a part at a time. A task that hangs holds up no other until [`MAX_THREADS`] hang.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::super::Errno;
use super::super::uring::Transfer;
use super::mail::{Mail, Mailbox};
use crate::backend::preadv;
use crate::base::syscalls;

/// How often in a row a plain call may fail with EAGAIN before its transfer fails.
const MAX_RETRIES: u32 = 1000;
/// The delay before each of these retries.
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// The most threads of one queue. A further one is started when a task comes while all are busy.
const MAX_THREADS: usize = 8;

enum HelperTask {
    Discard {
        key: u64,
        offset: u64,
        len: u64,
    },
    Transfer {
        key: u64,
        transfer: Transfer,
    },
    /// Hangs until the sender is dropped.
    #[cfg(test)]
    Hang {
        key: u64,
        until: mpsc::Receiver<()>,
    },
}

/// Makes discards on a block device, and transfers by plain calls, in any order. Dropping it waits for its tasks.
pub(super) struct HelperThreads {
    tasks: Option<mpsc::Sender<HelperTask>>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

struct Shared {
    file: Arc<OwnedFd>,
    mailbox: Arc<Mailbox>,
    /// One thread at a time waits for the next task.
    tasks: Mutex<mpsc::Receiver<HelperTask>>,
    /// Tasks that were queued and are not done.
    unfinished: AtomicUsize,
}

impl HelperThreads {
    /// Starts the first thread, for the queue's own description of the file. Fails when no thread can be started.
    pub(super) fn start(file: Arc<OwnedFd>, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let (tasks, queued) = mpsc::channel::<HelperTask>();
        let shared = Shared { file, mailbox, tasks: Mutex::new(queued), unfinished: AtomicUsize::new(0) };
        let mut helpers = HelperThreads { tasks: Some(tasks), threads: Vec::new(), shared: Arc::new(shared) };
        helpers.start_thread()?;
        Ok(helpers)
    }

    fn start_thread(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        self.threads.push(thread::Builder::new().name("helper".into()).spawn(move || shared.serve())?);
        Ok(())
    }

    /// Queues a discard. `Mail::Discarded` with this key follows.
    pub(super) fn discard(&mut self, key: u64, offset: u64, len: u64) {
        self.queue(HelperTask::Discard { key, offset, len });
    }

    /// Queues a transfer. `Mail::Transferred` with this key follows.
    pub(super) fn transfer(&mut self, key: u64, transfer: Transfer) {
        self.queue(HelperTask::Transfer { key, transfer });
    }

    fn queue(&mut self, task: HelperTask) {
        let unfinished = self.shared.unfinished.fetch_add(1, Ordering::Relaxed);
        if unfinished >= self.threads.len() && self.threads.len() < MAX_THREADS {
            // The task then waits for those before it.
            if let Err(error) = self.start_thread() {
                log::debug!("no further helper thread: {error}");
            }
        }
        let tasks = self.tasks.as_ref().expect("only `drop` takes it");
        assert!(tasks.send(task).is_ok(), "the threads end only after the sender was dropped");
    }
}

impl Shared {
    /// A thread's main function: carries out one task after the other, until the queue is dropped.
    fn serve(&self) {
        loop {
            // A thread that panicked leaves the channel in order.
            let task = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let mail = match task {
                Err(mpsc::RecvError) => return,
                Ok(HelperTask::Discard { key, offset, len }) => {
                    Mail::Discarded(key, discard(self.file.as_fd(), offset, len))
                }
                Ok(HelperTask::Transfer { key, transfer }) => {
                    let result = transfer_all(self.file.as_fd(), &transfer);
                    Mail::Transferred(key, transfer, result)
                }
                #[cfg(test)]
                Ok(HelperTask::Hang { key, until }) => {
                    let _ = until.recv();
                    Mail::Discarded(key, Ok(()))
                }
            };
            self.unfinished.fetch_sub(1, Ordering::Relaxed);
            self.mailbox.post(mail);
        }
    }
}

impl Drop for HelperThreads {
    fn drop(&mut self) {
        drop(self.tasks.take());
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a queue's helper thread panicked");
            }
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

/// Makes call after call, as long as each transfers something.
fn transfer_all(file: BorrowedFd<'_>, transfer: &Transfer) -> Result<(), Errno> {
    let flags = if transfer.kind.is_durable() { libc::RWF_DSYNC } else { 0 };
    let (mut done, mut retries, mut scratch) = (0, 0, Vec::new());
    while done < transfer.len {
        let range = transfer.from + done..transfer.from + transfer.len;
        let offset = transfer.offset + done as u64;
        match preadv::transfer(file, transfer.kind.is_write(), &transfer.buf, range, offset, flags, &mut scratch) {
            // Inside the image this means that another process truncated the file, or that it takes no more data.
            Ok(0) => return Err(Errno(libc::EIO)),
            Ok(moved) => (done, retries) = (done + moved, 0),
            Err(Errno(libc::EINTR)) => {}
            Err(Errno(libc::EAGAIN)) if retries < MAX_RETRIES => {
                retries += 1;
                thread::sleep(RETRY_DELAY);
            }
            Err(Errno(libc::EAGAIN)) => return Err(Errno(libc::EIO)),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Waits until so many tasks are done.
    fn collect(mailbox: &Mailbox, done: &mut Vec<u64>, wanted: usize) {
        let end = Instant::now() + Duration::from_secs(60);
        while done.len() < wanted {
            assert!(Instant::now() < end, "only {done:?} are done");
            let keys = mailbox.take().into_iter().map(|mail| match mail {
                Mail::Discarded(key, _) => key,
                _ => unreachable!("nothing else was queued"),
            });
            done.extend(keys);
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn tasks_that_hang_hold_up_no_other() {
        let file = tempfile::tempfile().unwrap();
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let mut helpers = HelperThreads::start(Arc::new(file.into()), Arc::clone(&mailbox)).unwrap();
        let mut held = Vec::new();
        for key in 1..MAX_THREADS as u64 {
            let (release, until) = mpsc::channel();
            held.push(release);
            helpers.queue(HelperTask::Hang { key, until });
        }
        let mut done = Vec::new();
        for key in 100..103 {
            // A regular file takes no discard ioctl; the task is done all the same.
            helpers.discard(key, 0, 4096);
        }
        collect(&mailbox, &mut done, 3);
        assert!(done.iter().all(|key| *key >= 100), "{done:?}");
        drop(held);
        collect(&mailbox, &mut done, 3 + MAX_THREADS - 1);
        assert_eq!(helpers.threads.len(), MAX_THREADS);
    }
}
