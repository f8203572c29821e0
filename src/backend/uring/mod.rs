//! UNSAFE. One io_uring: operations on one file, kept in a slab until they complete, and eventfds that wake the owner.
//!
//! It knows transfers, not requests. It continues short reads, retries EINTR and EAGAIN, and returns everything else to
//! the owner exactly once, with the value (`J`) that the owner passed in.
//!
//! A short write is returned to the owner, which makes it again with plain calls. The kernel's count of stored bytes is
//! not used, because it cannot be trusted. If a file system stores a part of a write, io_write in the kernel's
//! io_uring/rw.c continues the write itself; if that is short again, it reports EAGAIN without the bytes that were stored.
//! Over FUSE it may also continue from the wrong byte of the buffer: fuse_perform_write in fs/fuse/file.c has advanced by
//! more than was stored.
#![allow(unsafe_code)]

mod prepared;

use std::cell::Cell;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::{Errno, IoBuf};
use prepared::Source;
pub(super) use prepared::{prepare, probe};

/// An operation on the file.
pub(super) enum Command {
    /// A read or a write.
    Transfer(Transfer),
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Fallocate {
        /// FALLOC_FL_*.
        mode: i32,
        /// Byte offset in the file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A read or a write of `len` bytes of `buf`, starting at byte `from` of the buffer and at `offset` of the file.
pub(super) struct Transfer {
    pub(super) write: bool,
    /// The write is durable when it completes (RWF_DSYNC).
    pub(super) durable: bool,
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
    pub(super) from: usize,
    pub(super) len: usize,
}

/// Which thread starts an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Submission {
    /// The thread that submits it. If the file system would block, a kernel worker continues.
    Inline,
    /// A kernel worker, for file systems that block in spite of IOCB_NOWAIT.
    Worker,
}

/// An event of the uring.
pub(super) enum Event<J> {
    /// An operation is over; `Ok`: all of it was done. A transfer with EAGAIN holds the part that the owner must make with
    /// plain calls.
    Finished(J, Command, Result<(), Errno>),
    /// The watched eventfd with this token was written to.
    Fired(u32),
}

/// An io_uring for one file. The kernel ties it to the thread that enabled it (IORING_SETUP_SINGLE_ISSUER). Another thread
/// may own it and take from it what has not been submitted ([`Ring::take_queued`]), but must not enter or drop it.
pub(super) struct Ring<J> {
    io_uring: ManuallyDrop<IoUring>,
    /// The operations until they complete. The index is their user data.
    slots: Vec<Option<Active<J>>>,
    free_slots: Vec<usize>,
    watches: Vec<Watch>,
    submission: Submission,
    /// The user data of the operations and watches that the next `enter` puts into the submission queue.
    queued: Vec<u64>,
    /// The submission queue has entries that are not submitted.
    unsubmitted: bool,
}

// SAFETY: the mapped queues belong to this value alone, and the iovecs point into buffers that its jobs own, which may be
// sent, too. Everything that touches them takes `&mut self`, so one thread at a time does, on every kernel. Memory safety
// does not depend on which thread that is: before Linux 6.1, without IORING_SETUP_SINGLE_ISSUER, the kernel takes entries
// from every thread; from then on it answers EEXIST to every thread but the one that enabled the io_uring. An `enter` that
// fails leaves the jobs in their slots, so no buffer is freed that the kernel still uses.
unsafe impl<J: Send> Send for Ring<J> {}

/// An operation that has not completed.
struct Active<J> {
    job: J,
    command: Command,
    /// Bytes transferred so far.
    done: usize,
    /// Bytes that the last submission asked for.
    asked: usize,
    /// The iovecs of the remaining bytes, when these are not all of the buffer.
    iovecs: Vec<libc::iovec>,
    retries: u32,
}

/// An eventfd that wakes the owner.
struct Watch {
    fd: OwnedFd,
    token: u32,
    /// The kernel has its poll, or the poll is queued.
    armed: bool,
}

thread_local! {
    /// The io_uring that this thread no longer uses, for the next [`Ring`] that it creates. A prepared one cannot be
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

/// The most iovecs in one call (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// How often in a row an operation is retried after EINTR or EAGAIN before it fails with EIO.
const MAX_RETRIES: u32 = 1000;

impl<J> Ring<J> {
    /// Creates a uring for at most `depth` operations at once on `file`, which the caller keeps open for longer than the
    /// uring. Called in the thread that will use it. An error says the cause and how to fix it.
    pub(super) fn new(depth: usize, file: BorrowedFd<'_>, submission: Submission) -> io::Result<Self> {
        let io_uring = match UNUSED.take() {
            Some(unused) => unused,
            None => {
                let io_uring = match prepared::take(depth + MAX_WATCHES)? {
                    Source::New(io_uring) => io_uring,
                    // SAFETY: `prepare` created this io_uring and has these parameters from the kernel; nothing else owns
                    // the descriptor.
                    Source::Prepared(fd, parameters) => unsafe { IoUring::from_fd(fd.into_raw_fd(), parameters) }?,
                };
                // From here on only this thread may use it.
                io_uring.submitter().register_enable_rings().map_err(prepared::explain)?;
                io_uring
            }
        };
        // With a registered file the kernel looks the file up once, not for each operation.
        io_uring.submitter().register_files(&[file.as_raw_fd()]).map_err(prepared::explain)?;
        Ok(Ring {
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
    pub(super) fn start(&mut self, command: Command, job: J) {
        let slot = self.free_slots.pop().expect("the caller starts at most `depth` operations");
        self.slots[slot] = Some(Active { job, command, done: 0, asked: 0, iovecs: Vec::new(), retries: 0 });
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

    /// Submits the entries of the submission queue. If `block`, then sleeps as [`Ring::enter`] does.
    fn submit(&mut self, block: bool, timeout: Option<Duration>) -> io::Result<()> {
        let submitter = self.io_uring.submitter();
        let entered = match timeout {
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
    pub(super) fn next_event(&mut self) -> Option<Event<J>> {
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
                Next::Resubmit => self.queue(slot),
                Next::Finish(result) => {
                    let Active { job, command, .. } = self.slots[slot].take().expect("found just now");
                    self.free_slots.push(slot);
                    return Some(Event::Finished(job, command, result));
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
    pub(super) fn take_queued(&mut self) -> Vec<(Command, J)> {
        let mut taken = Vec::new();
        for data in std::mem::take(&mut self.queued) {
            if data & WATCH != 0 {
                self.watches[(data & !WATCH) as usize].armed = false;
            } else if let Some(mut active) = self.slots[data as usize].take() {
                active.drop_done();
                self.free_slots.push(data as usize);
                taken.push((active.command, active.job));
            }
        }
        taken
    }

    /// Waits for the submitted operations and passes each to `finished`. Called in the thread that created the uring.
    pub(super) fn finish(&mut self, mut finished: impl FnMut(J, Command, Result<(), Errno>)) -> io::Result<()> {
        while self.free_slots.len() < self.slots.len() {
            self.enter(true, None)?;
            while let Some(event) = self.next_event() {
                if let Event::Finished(job, command, result) = event {
                    finished(job, command, result);
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
        // SAFETY: what the entry points to (iovecs, guest memory) belongs to an `Active` in `slots`, which stays there
        // until its completion was read; `drop` waits for that, or leaks the slots. The file and the watched descriptors
        // stay open for longer than the io_uring.
        while unsafe { self.io_uring.submission().push(entry) }.is_err() {
            self.empty_submission_queue();
        }
        self.unsubmitted = true;
    }

    /// Ends the polls of the watches, so that the io_uring is empty for the thread's next [`Ring`]. Returns whether it is.
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

impl<J> Drop for Ring<J> {
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

/// What to do after a completion.
enum Next {
    /// Submit the operation, or its remaining part, again.
    Resubmit,
    /// Return the operation to the owner with this result.
    Finish(Result<(), Errno>),
}

impl<J> Active<J> {
    /// Decides what to do after a completion. A transfer of no bytes fails, because it would never end: inside the image, a
    /// read that returns 0 means that another process truncated the file.
    fn handle_result(&mut self, result: i32) -> Next {
        // A retry ran in a kernel worker, which may block; so EAGAIN means a short write.
        if result == -libc::EAGAIN && self.retries > 0 && self.drop_done() {
            return Next::Finish(Err(Errno(libc::EAGAIN)));
        }
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.retries += 1;
            return if self.retries < MAX_RETRIES { Next::Resubmit } else { Next::Finish(Err(Errno(libc::EIO))) };
        }
        if result < 0 {
            return Next::Finish(Err(Errno(-result)));
        }
        let Command::Transfer(transfer) = &self.command else {
            return Next::Finish(Ok(()));
        };
        let left = transfer.len - self.done;
        match result as usize {
            moved if transfer.write && moved < self.asked => {
                self.drop_done();
                Next::Finish(Err(Errno(libc::EAGAIN)))
            }
            moved if moved == left => Next::Finish(Ok(())),
            moved if moved == 0 || moved > left => Next::Finish(Err(Errno(libc::EIO))),
            moved => {
                self.done += moved;
                self.retries = 0;
                Next::Resubmit
            }
        }
    }

    /// Shortens a transfer by the bytes that are done. Returns whether the operation is a transfer.
    fn drop_done(&mut self) -> bool {
        let Command::Transfer(transfer) = &mut self.command else { return false };
        let done = std::mem::take(&mut self.done);
        transfer.offset += done as u64;
        transfer.from += done;
        transfer.len -= done;
        true
    }

    /// Builds the submission queue entry of what is left of the operation.
    fn entry(&mut self, file: types::Fixed, submission: Submission) -> squeue::Entry {
        // A retry runs in a kernel worker, which may sleep; here it would spin.
        let by_worker = self.retries > 0 || submission == Submission::Worker;
        let flags = if by_worker { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = match &self.command {
            Command::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Command::Fallocate { mode, offset, len } => {
                opcode::Fallocate::new(file, *len).offset(*offset).mode(*mode).build()
            }
            Command::Transfer(transfer) => {
                let whole = self.done == 0 && transfer.from == 0 && transfer.len == transfer.buf.len();
                let iovecs = if whole && transfer.buf.iovecs().len() <= MAX_IOVECS {
                    transfer.buf.iovecs()
                } else {
                    self.iovecs.clear();
                    transfer.buf.push_range(transfer.from + self.done, transfer.len - self.done, &mut self.iovecs);
                    // With more iovecs this is a part of the transfer; the next submission continues it.
                    self.iovecs.truncate(MAX_IOVECS);
                    &self.iovecs
                };
                let (entry, asked) = transfer.entry(file, iovecs, transfer.offset + self.done as u64);
                self.asked = asked;
                entry
            }
        };
        entry.flags(flags)
    }
}

impl Transfer {
    /// Builds the submission queue entry that transfers `iovecs` at `offset`. Returns it with the number of bytes that it
    /// asks for.
    fn entry(&self, file: types::Fixed, iovecs: &[libc::iovec], offset: u64) -> (squeue::Entry, usize) {
        let flags = if self.durable { libc::RWF_DSYNC } else { 0 };
        let asked = match iovecs {
            [one] => clamp(one.iov_len) as usize,
            // All of the buffer, whose length is known.
            all if std::ptr::eq(all, self.buf.iovecs()) => self.buf.len(),
            some => some.iter().map(|part| part.iov_len).sum(),
        };
        let entry = match (iovecs, self.write) {
            // With one iovec the kernel need not copy a list. A longer iovec is clamped and continued as a short transfer.
            ([one], true) => {
                opcode::Write::new(file, one.iov_base.cast(), clamp(one.iov_len)).offset(offset).rw_flags(flags).build()
            }
            ([one], false) => opcode::Read::new(file, one.iov_base.cast(), clamp(one.iov_len)).offset(offset).build(),
            (many, true) => {
                opcode::Writev::new(file, many.as_ptr(), many.len() as u32).offset(offset).rw_flags(flags).build()
            }
            (many, false) => opcode::Readv::new(file, many.as_ptr(), many.len() as u32).offset(offset).build(),
        };
        (entry, asked)
    }
}

/// Limits a length to 1 GiB, which is in whole blocks and below what the kernel moves at once (MAX_RW_COUNT).
fn clamp(len: usize) -> u32 {
    len.min(0x4000_0000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_continues_finishes_or_fails_by_its_result() {
        let transfer =
            Transfer { write: false, durable: false, offset: 0, buf: IoBuf::owned(8192, 512, 0), from: 0, len: 8192 };
        let command = Command::Transfer(transfer);
        let mut active = Active { job: (), command, done: 0, asked: 0, iovecs: Vec::new(), retries: 0 };
        assert!(matches!(active.handle_result(512), Next::Resubmit));
        assert!(matches!(active.handle_result(-libc::EINTR), Next::Resubmit));
        assert!(
            matches!(active.handle_result(0), Next::Finish(Err(Errno(libc::EIO)))),
            "no byte moved: none ever will"
        );
        assert!(matches!(active.handle_result(-libc::ENOSPC), Next::Finish(Err(Errno(libc::ENOSPC)))));
        assert!(matches!(active.handle_result(8192), Next::Finish(Err(Errno(libc::EIO)))), "more than was asked");
        assert!(matches!(active.handle_result(512), Next::Resubmit));
        assert!(matches!(active.handle_result(-libc::EAGAIN), Next::Resubmit), "a kernel worker may block for it");
        assert!(matches!(active.handle_result(7168), Next::Finish(Ok(()))));
    }

    #[test]
    fn a_short_write_is_returned_from_where_the_last_whole_submission_ended() {
        for result in [0, 512, -libc::EAGAIN] {
            let buf = IoBuf::owned(8192, 512, 0);
            let transfer = Transfer { write: true, durable: false, offset: 4096, buf, from: 0, len: 8192 };
            let command = Command::Transfer(transfer);
            let mut active = Active { job: (), command, done: 0, asked: 4096, iovecs: Vec::new(), retries: 0 };
            assert!(matches!(active.handle_result(4096), Next::Resubmit), "there were more iovecs than one call takes");
            if result < 0 {
                assert!(matches!(active.handle_result(result), Next::Resubmit), "a kernel worker may block");
            }
            assert!(matches!(active.handle_result(result), Next::Finish(Err(Errno(libc::EAGAIN)))));
            let Command::Transfer(transfer) = active.command else { unreachable!("the command is a transfer") };
            assert_eq!((transfer.offset, transfer.from, transfer.len), (8192, 4096, 4096));
        }
    }
}
