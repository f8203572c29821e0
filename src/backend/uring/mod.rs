//! UNSAFE. One io_uring: operations on one file, kept in a slab until they complete, and eventfds that wake the owner.
//!
//! It knows transfers, not requests. It continues short reads, retries EINTR and EAGAIN, and returns everything else to
//! the owner exactly once, with the tag (`T`) that the owner passed in.
//!
//! A short write is returned to the owner, which makes it again with plain calls. The kernel's count of stored bytes is
//! not used, because it cannot be trusted. If a filesystem stores a part of a write, io_write in the kernel's
//! io_uring/rw.c continues the write itself; if that is short again, it reports EAGAIN without the bytes that were stored.
//! Over FUSE it may also continue from the wrong byte of the buffer: fuse_perform_write in fs/fuse/file.c has advanced by
//! more than was stored.
#![allow(unsafe_code)]

mod file_op;
mod prepared;

use std::cell::Cell;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::Errno;
use file_op::{ActiveOp, FollowUp};
pub(super) use file_op::{FileOp, Transfer, TransferKind};
use prepared::DisabledUring;
pub(super) use prepared::{prepare, probe};

/// Which thread starts an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Submission {
    /// The thread that submits it. If the filesystem would block, a kernel worker continues.
    Inline,
    /// A kernel worker, for filesystems that block in spite of IOCB_NOWAIT.
    Worker,
}

/// An event of the uring.
pub(super) enum Event<T> {
    /// An operation is over; `Ok`: all of it was done. A transfer with EAGAIN holds the part that the owner must make with
    /// plain calls.
    Finished(T, FileOp, Result<(), Errno>),
    /// The watched eventfd with this token was written to.
    Fired(u32),
}

/// An io_uring for one file. The kernel ties it to the thread that enabled it (IORING_SETUP_SINGLE_ISSUER). Another thread
/// may own it and take from it what has not been submitted ([`Uring::take_queued`]), but must not enter or drop it.
pub(super) struct Uring<T> {
    io_uring: ManuallyDrop<IoUring>,
    /// The operations until they complete. The index is their user data.
    slots: Vec<Option<ActiveOp<T>>>,
    free_slots: Vec<usize>,
    watches: Vec<Watch>,
    submission: Submission,
    /// The user data of the operations and watches that the next `enter` puts into the submission queue.
    queued: Vec<u64>,
    /// The submission queue has entries that are not submitted.
    unsubmitted: bool,
}

// SAFETY: the mapped queues belong to this value alone, and the iovecs point into buffers that its operations own, which may be
// sent, too. Everything that touches them takes `&mut self`, so one thread at a time does, on every kernel. Memory safety
// does not depend on which thread that is: before Linux 6.1, without IORING_SETUP_SINGLE_ISSUER, the kernel takes entries
// from every thread; from then on it answers EEXIST to every thread but the one that enabled the io_uring. An `enter` that
// fails leaves the operations in their slots, so no buffer is freed that the kernel still uses.
unsafe impl<T: Send> Send for Uring<T> {}

/// An eventfd that wakes the owner.
struct Watch {
    fd: OwnedFd,
    token: u32,
    /// The kernel has its poll, or the poll is queued.
    armed: bool,
}

thread_local! {
    /// The io_uring that this thread no longer uses, for the next [`Uring`] that it creates. A prepared one cannot be
    /// created again.
    static UNUSED: Cell<Option<IoUring>> = const { Cell::new(None) };
}

/// The bit that is set in the user data of a watch's entries; the other bits are the watch's index.
const WATCH: u64 = 1 << 63;

/// The user data of a cancellation.
const CANCEL: u64 = WATCH - 1;

/// How often to wait [`CANCEL_WAIT`] for the end of the watches before an io_uring is discarded.
const MAX_CANCEL_WAITS: usize = 20;

/// How long one wait for the end of the watches lasts.
const CANCEL_WAIT: Duration = Duration::from_millis(500);

/// The number of watches that have an entry beside the operations: kick, wake and the owner's mailboxes.
const MAX_WATCHES: usize = 8;

/// The index of the image, which is the only registered file.
const FILE: types::Fixed = types::Fixed(0);
/// IORING_ENTER_GETEVENTS: also fetch completions (io_uring_enter(2)). The crate sets it only with something to wait for.
const ENTER_GETEVENTS: u32 = 1;

impl<T> Uring<T> {
    /// Creates a uring for at most `depth` operations at once on `file`, which the caller keeps open for longer than the
    /// uring. Called in the thread that will use it. An error says the cause and how to fix it.
    pub(super) fn new(depth: usize, file: BorrowedFd<'_>, submission: Submission) -> io::Result<Self> {
        let io_uring = match UNUSED.take() {
            Some(unused) => unused,
            None => {
                let io_uring = match prepared::take(depth + MAX_WATCHES)? {
                    DisabledUring::New(io_uring) => io_uring,
                    DisabledUring::Prepared(fd, parameters) => {
                        // SAFETY: `prepare` created this io_uring and has these parameters from the kernel; nothing else owns
                        // the descriptor.
                        unsafe { IoUring::from_fd(fd.into_raw_fd(), parameters) }?
                    }
                };
                // From here on only this thread may use it.
                io_uring.submitter().register_enable_rings().map_err(prepared::explain)?;
                io_uring
            }
        };
        // With a registered file the kernel looks the file up once, not for each operation.
        io_uring.submitter().register_files(&[file.as_raw_fd()]).map_err(prepared::explain)?;
        Ok(Uring {
            io_uring: ManuallyDrop::new(io_uring),
            slots: (0..depth).map(|_| None).collect(),
            free_slots: (0..depth).rev().collect(),
            watches: Vec::new(),
            submission,
            queued: Vec::with_capacity(depth + MAX_WATCHES),
            unsubmitted: false,
        })
    }

    /// Queues an operation; `enter` starts it. The caller has at most `depth` operations here at once.
    pub(super) fn start(&mut self, file_op: FileOp, tag: T) {
        let slot = self.free_slots.pop().expect("the caller starts at most `depth` operations");
        self.slots[slot] = Some(ActiveOp::new(tag, file_op));
        self.queue(slot);
    }

    /// Watches the eventfd `fd`: each write to it is reported as `Fired(token)`, and once at the start if its count is not
    /// zero.
    pub(super) fn watch(&mut self, token: u32, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.watches.len() == MAX_WATCHES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many watched descriptors"));
        }
        self.watches.push(Watch { fd: fd.try_clone_to_owned()?, token, armed: false });
        self.arm(self.watches.len() - 1);
        Ok(())
    }

    /// Whether `enter` has something to do even without waiting.
    pub(super) fn wants_enter(&mut self) -> bool {
        let queue = self.io_uring.submission();
        self.unsubmitted || !self.queued.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Starts what was queued. If `block`, then sleeps until there is an event, a signal came or `timeout` has passed.
    pub(super) fn enter(&mut self, block: bool, timeout: Option<Duration>) -> io::Result<()> {
        self.fill_submission_queue();
        self.submit(block, timeout)
    }

    /// Submits the entries of the submission queue. If `block`, then sleeps as [`Uring::enter`] does. With a timeout of
    /// zero the kernel only fetches completions: a timer of zero would make it switch to another thread.
    fn submit(&mut self, block: bool, timeout: Option<Duration>) -> io::Result<()> {
        let queued = self.io_uring.submission().len();
        let submitter = self.io_uring.submitter();
        let entered = match timeout {
            // SAFETY: no argument is passed, so the kernel reads no memory of ours but the rings.
            Some(Duration::ZERO) => unsafe { submitter.enter::<()>(queued as u32, 0, ENTER_GETEVENTS, None) },
            // Without a timeout the kernel need not copy extended arguments.
            None => submitter.submit_and_wait(usize::from(block)),
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&timespec);
                submitter.submit_with_args(usize::from(block), &args)
            }
        };
        match entered {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::ETIME) => {}
                // The kernel is short of memory, or the owner must read completions first. Both pass.
                Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                _ => return Err(error),
            },
        }
        self.unsubmitted = !self.io_uring.submission().is_empty();
        Ok(())
    }

    /// Returns the next event, without a system call.
    pub(super) fn next_event(&mut self) -> Option<Event<T>> {
        loop {
            let entry = self.io_uring.completion().next()?;
            let data = entry.user_data();
            if data & WATCH != 0 {
                let index = (data & !WATCH) as usize;
                if !cqueue::more(entry.flags()) {
                    self.arm(index);
                }
                return Some(Event::Fired(self.watches[index].token));
            }
            let slot = data as usize;
            let active = self.slots[slot].as_mut().expect("the kernel completes only what was submitted");
            match active.handle_result(entry.result()) {
                FollowUp::Resubmit => self.queue(slot),
                FollowUp::Finish(result) => {
                    let ActiveOp { tag, file_op, .. } = self.slots[slot].take().expect("found just now");
                    self.free_slots.push(slot);
                    return Some(Event::Finished(tag, file_op, result));
                }
            }
        }
    }

    /// Creates a uring for the calling thread, with the same watches and without the operations.
    pub(super) fn successor(&self, file: BorrowedFd<'_>) -> io::Result<Self> {
        let mut uring = Self::new(self.slots.len(), file, self.submission)?;
        for Watch { fd, token, .. } in &self.watches {
            uring.watch(*token, fd.as_fd())?;
        }
        Ok(uring)
    }

    /// Takes the operations that are not submitted. A transfer holds the part that is not done.
    pub(super) fn take_queued(&mut self) -> Vec<(FileOp, T)> {
        let mut taken = Vec::new();
        for data in std::mem::take(&mut self.queued) {
            if data & WATCH != 0 {
                self.watches[(data & !WATCH) as usize].armed = false;
            } else if let Some(mut active) = self.slots[data as usize].take() {
                active.drop_done();
                self.free_slots.push(data as usize);
                taken.push((active.file_op, active.tag));
            }
        }
        taken
    }

    /// Waits for the submitted operations and passes each to `finished`. Called in the thread that created the uring.
    pub(super) fn finish(&mut self, mut finished: impl FnMut(T, FileOp, Result<(), Errno>)) -> io::Result<()> {
        while self.free_slots.len() < self.slots.len() {
            self.enter(true, None)?;
            while let Some(event) = self.next_event() {
                if let Event::Finished(tag, file_op, result) = event {
                    finished(tag, file_op, result);
                }
            }
        }
        Ok(())
    }

    /// Queues the poll of a watch.
    fn arm(&mut self, index: usize) {
        self.watches[index].armed = true;
        self.queued.push(WATCH | index as u64);
    }

    fn queue(&mut self, slot: usize) {
        self.queued.push(slot as u64);
    }

    /// Puts what is queued into the submission queue.
    fn fill_submission_queue(&mut self) {
        for at in 0..self.queued.len() {
            let data = self.queued[at];
            let entry = if data & WATCH != 0 {
                let fd = types::Fd(self.watches[(data & !WATCH) as usize].fd.as_raw_fd());
                opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build()
            } else {
                let active = self.slots[data as usize].as_mut().expect("a queued operation is in its slot");
                active.entry(FILE, self.submission)
            };
            self.push_entry(&entry.user_data(data));
        }
        self.queued.clear();
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the entry points to (iovecs, guest memory) belongs to an `ActiveOp` in `slots`, which stays there
        // until its completion was read; `drop` waits for that, or leaks the slots. The file and the watched descriptors
        // stay open for longer than the io_uring.
        while unsafe { self.io_uring.submission().push(entry) }.is_err() {
            self.empty_submission_queue();
        }
        self.unsubmitted = true;
    }

    /// Ends the polls of the watches, so that the io_uring is empty for the thread's next [`Uring`]. Returns whether it is.
    fn end_watches(&mut self) -> bool {
        self.fill_submission_queue();
        let mut cancels = 0;
        for index in 0..self.watches.len() {
            if self.watches[index].armed {
                let cancel = opcode::AsyncCancel::new(WATCH | index as u64).build().user_data(CANCEL);
                self.push_entry(&cancel);
                cancels += 1;
            }
        }
        for _ in 0..MAX_CANCEL_WAITS {
            while let Some(entry) = self.io_uring.completion().next() {
                match entry.user_data() {
                    CANCEL => cancels -= 1,
                    data if !cqueue::more(entry.flags()) => self.watches[(data & !WATCH) as usize].armed = false,
                    _ => {}
                }
            }
            if cancels == 0 && self.watches.iter().all(|watch| !watch.armed) {
                return true;
            }
            if self.enter(true, Some(CANCEL_WAIT)).is_err() {
                break;
            }
        }
        log::warn!("an io_uring did not end its polls and cannot be used again; a prepared one is used instead");
        false
    }

    /// Submits the entries of a full submission queue. A prepared io_uring has fewer entries than a deep virtqueue has
    /// operations.
    #[cold]
    fn empty_submission_queue(&mut self) {
        if let Err(error) = self.submit(false, None) {
            // Only a broken process fails here, as in the callers of `enter`.
            panic!("cannot submit I/O: {error}");
        }
    }
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        while self.free_slots.len() < self.slots.len() {
            if let Err(error) = self.enter(true, None) {
                // The kernel may still use the memory, so it is never freed. Neither is the io_uring.
                log::error!("cannot wait for I/O in flight ({error}); its memory is leaked");
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while let Some(entry) = self.io_uring.completion().next() {
                let data = entry.user_data();
                if data & WATCH == 0 {
                    self.slots[data as usize] = None;
                    self.free_slots.push(data as usize);
                } else if !cqueue::more(entry.flags()) {
                    self.watches[(data & !WATCH) as usize].armed = false;
                }
            }
        }
        // The kernel tears an io_uring down later, but the image must be closed when its owner closes it.
        let unregistered = self.io_uring.submitter().unregister_files();
        if let Err(error) = &unregistered {
            log::debug!("the image stays open until the kernel has closed its io_uring: {error}");
        }
        let reusable = prepared::in_use() && unregistered.is_ok() && self.end_watches();
        // SAFETY: taken once, here; nothing uses the field afterwards.
        let io_uring = unsafe { ManuallyDrop::take(&mut self.io_uring) };
        if reusable {
            UNUSED.set(Some(io_uring));
        }
    }
}
