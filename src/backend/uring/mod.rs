//! UNSAFE. One io_uring: commands on one file in a slab until their completion, and eventfds that wake its owner.
//!
//! Knows transfers, not requests: short reads go on by themselves, EINTR and EAGAIN are retried, everything else comes
//! back to the owner once, with the owner's note (`J`) that went in with it.
//!
//! A short write comes back for plain calls, and what the kernel says of it counts for nothing. io_write in the kernel's
//! io_uring/rw.c goes on by itself with a write of which the file system took a part, and reports EAGAIN if that ends
//! in a part, too, without the bytes that were stored. And over FUSE it may go on from the wrong byte of the buffer:
//! fuse_perform_write in fs/fuse/file.c has advanced past more than was stored.
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

/// What the kernel is asked to do with the file.
pub(super) enum Command {
    /// A read or a write of `len` bytes of `buf` from byte `from` on, at `offset` of the file.
    Transfer(Transfer),
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Fallocate {
        /// FALLOC_FL_*.
        mode: i32,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// See [`Command::Transfer`].
pub(super) struct Transfer {
    pub(super) write: bool,
    /// RWF_DSYNC.
    pub(super) durable: bool,
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
    pub(super) from: usize,
    pub(super) len: usize,
}

/// Which thread begins a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Submission {
    /// The one that submits it. Where the file system would wait, a kernel worker goes on.
    Inline,
    /// A kernel worker, for file systems that wait in spite of IOCB_NOWAIT.
    Worker,
}

/// What came out of the ring.
pub(super) enum Event<J> {
    /// A command is over; `Ok` means all of it. What is left of a transfer with EAGAIN is to be made by plain calls.
    Finished(J, Command, Result<(), Errno>),
    /// A watched eventfd was written to.
    Fired(u32),
}

/// A ring for one file. The kernel ties it to the thread that made it (IORING_SETUP_SINGLE_ISSUER): elsewhere it may be
/// kept, and what has not been shown to the kernel taken from it ([`Ring::take_queued`]), but not entered or dropped.
pub(super) struct Ring<J> {
    ring: ManuallyDrop<IoUring>,
    slots: Vec<Option<Active<J>>>,
    free: Vec<usize>,
    watches: Vec<Watch>,
    submission: Submission,
    /// Commands and watches that go into the submission queue at the next `enter`, by their user data.
    queued: Vec<u64>,
    /// Entries in the submission queue that the kernel has not been shown.
    unsubmitted: bool,
}

// SAFETY: the mapped queues belong to this value alone, and the iovecs point into buffers that its jobs own, which may be
// sent, too. Whatever touches them takes `&mut self`, so one thread at a time does, on every kernel. Which thread that may
// be is no question of memory: before Linux 6.1, without IORING_SETUP_SINGLE_ISSUER, the kernel takes entries from each;
// from then on it answers EEXIST to any but the one that enabled the ring. An `enter` that fails leaves the jobs in
// their slots, so no buffer is freed that the kernel still uses.
unsafe impl<J: Send> Send for Ring<J> {}

struct Active<J> {
    job: J,
    command: Command,
    /// Bytes transferred so far.
    done: usize,
    /// Bytes that the kernel was asked for last.
    asked: usize,
    /// The iovecs of what is left, when that is not simply all of the buffer.
    rest: Vec<libc::iovec>,
    retries: u32,
}

struct Watch {
    fd: OwnedFd,
    token: u32,
    /// The kernel has its poll, or will be shown it.
    armed: bool,
}

thread_local! {
    /// The io_uring that this thread is done with, for the next [`Ring`] that it makes: a prepared one cannot be replaced.
    static USED: Cell<Option<IoUring>> = const { Cell::new(None) };
}

/// Set in the user data of a watch's entries; the rest is its index.
const WATCH: u64 = 1 << 63;

/// The user data of a cancellation.
const CANCEL: u64 = WATCH - 1;

/// How often the end of the watches is waited for, and how long each time, before a ring is given up.
const MAX_CANCEL_WAITS: usize = 20;
const CANCEL_WAIT: Duration = Duration::from_millis(500);

/// Watches that fit beside the commands: kick, wake, the owner's mailbox.
const MAX_WATCHES: usize = 8;

/// The image, the one registered file.
const FILE: types::Fixed = types::Fixed(0);

/// iovecs in one call (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// EINTR in a row on one command, or EAGAIN on one that is no transfer, before it is given up.
const MAX_RETRIES: u32 = 1000;

impl<J> Ring<J> {
    /// A ring for at most `depth` commands at once on `file`, which the caller keeps open for longer than the ring.
    /// Call it in the thread that will use the ring. Errors name the cause and the mend.
    pub(super) fn new(depth: usize, file: BorrowedFd<'_>, submission: Submission) -> io::Result<Self> {
        let ring = match USED.take() {
            Some(used) => used,
            None => {
                let ring = match prepared::take(depth + MAX_WATCHES)? {
                    Source::Made(ring) => ring,
                    // SAFETY: `prepare` made this io_uring and has these parameters from the kernel; nothing else owns
                    // the descriptor.
                    Source::Prepared(fd, parameters) => unsafe { IoUring::from_fd(fd.into_raw_fd(), parameters) }?,
                };
                // From here on this thread, and no other, may use it.
                ring.submitter().register_enable_rings().map_err(prepared::explain)?;
                ring
            }
        };
        // The kernel looks the file up once, not for each command.
        ring.submitter().register_files(&[file.as_raw_fd()]).map_err(prepared::explain)?;
        Ok(Ring {
            ring: ManuallyDrop::new(ring),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            watches: Vec::new(),
            submission,
            queued: Vec::with_capacity(depth + MAX_WATCHES),
            unsubmitted: false,
        })
    }

    /// Queues a command; `enter` starts it. The caller has at most `depth` in here at once.
    pub(super) fn start(&mut self, command: Command, job: J) {
        let slot = self.free.pop().expect("the caller counts");
        self.slots[slot] = Some(Active { job, command, done: 0, asked: 0, rest: Vec::new(), retries: 0 });
        self.queue(slot);
    }

    /// Reports each write to the eventfd `fd` as `Fired(token)`, and once at the start if its count is not zero.
    pub(super) fn watch(&mut self, token: u32, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.watches.len() == MAX_WATCHES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many watched descriptors"));
        }
        self.watches.push(Watch { fd: fd.try_clone_to_owned()?, token, armed: false });
        self.arm(self.watches.len() - 1);
        Ok(())
    }

    /// Whether `enter` has anything to do even without waiting.
    pub(super) fn wants_enter(&mut self) -> bool {
        let queue = self.ring.submission();
        self.unsubmitted || !self.queued.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Starts what was queued and, if `block`, sleeps until there is an event, a signal came or `timeout` passed.
    pub(super) fn enter(&mut self, block: bool, timeout: Option<Duration>) -> io::Result<()> {
        self.fill();
        self.enter_as_filled(block, timeout)
    }

    fn enter_as_filled(&mut self, block: bool, timeout: Option<Duration>) -> io::Result<()> {
        let submitter = self.ring.submitter();
        let entered = match timeout {
            // The kernel need not copy arguments that are not there.
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
                // The kernel is short of memory, or wants its completions read first: both pass.
                Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                _ => return Err(error),
            },
        }
        self.unsubmitted = !self.ring.submission().is_empty();
        Ok(())
    }

    /// The next thing that happened, without a system call.
    pub(super) fn next_event(&mut self) -> Option<Event<J>> {
        loop {
            let entry = self.ring.completion().next()?;
            let data = entry.user_data();
            if data & WATCH != 0 {
                let index = (data & !WATCH) as usize;
                if !cqueue::more(entry.flags()) {
                    self.arm(index);
                }
                return Some(Event::Fired(self.watches[index].token));
            }
            let slot = data as usize;
            let active = self.slots[slot].as_mut().expect("the kernel completes what was submitted");
            match active.after(entry.result()) {
                After::Again => self.queue(slot),
                After::Over(result) => {
                    let Active { job, command, .. } = self.slots[slot].take().expect("looked at just now");
                    self.free.push(slot);
                    return Some(Event::Finished(job, command, result));
                }
            }
        }
    }

    /// A ring for the calling thread, with the same watches and none of the commands.
    pub(super) fn successor(&self, file: BorrowedFd<'_>) -> io::Result<Self> {
        let mut ring = Self::new(self.slots.len(), file, self.submission)?;
        for Watch { fd, token, .. } in &self.watches {
            ring.watch(*token, fd.as_fd())?;
        }
        Ok(ring)
    }

    /// Takes the commands that the kernel was not shown; nothing of them was moved since the last completion.
    pub(super) fn take_queued(&mut self) -> Vec<(Command, J)> {
        let mut taken = Vec::new();
        for data in std::mem::take(&mut self.queued) {
            if data & WATCH != 0 {
                self.watches[(data & !WATCH) as usize].armed = false;
            } else if let Some(mut active) = self.slots[data as usize].take() {
                active.leave_rest();
                self.free.push(data as usize);
                taken.push((active.command, active.job));
            }
        }
        taken
    }

    /// Waits for the commands that the kernel has, and hands each to `over`. In the thread that made the ring.
    pub(super) fn finish(&mut self, mut over: impl FnMut(J, Command, Result<(), Errno>)) -> io::Result<()> {
        while self.free.len() < self.slots.len() {
            self.enter(true, None)?;
            while let Some(event) = self.next_event() {
                if let Event::Finished(job, command, result) = event {
                    over(job, command, result);
                }
            }
        }
        Ok(())
    }

    fn arm(&mut self, index: usize) {
        self.watches[index].armed = true;
        self.queued.push(WATCH | index as u64);
    }

    fn queue(&mut self, slot: usize) {
        self.queued.push(slot as u64);
    }

    /// Puts what is queued into the submission queue.
    fn fill(&mut self) {
        for at in 0..self.queued.len() {
            let data = self.queued[at];
            let entry = if data & WATCH != 0 {
                let fd = types::Fd(self.watches[(data & !WATCH) as usize].fd.as_raw_fd());
                opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build()
            } else {
                let active = self.slots[data as usize].as_mut().expect("queued once, when filled or looked at");
                active.entry(FILE, self.submission)
            };
            self.push_entry(&entry.user_data(data));
        }
        self.queued.clear();
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the entry points to (iovecs, guest memory) belongs to an `Active` in `slots`, which stays there
        // until the kernel's completion was read; `drop` waits for that, or leaks the slots. The file and the watched
        // descriptors stay open as long as the ring.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.make_room();
        }
        self.unsubmitted = true;
    }

    /// Ends the polls of the watches, so that the thread's next [`Ring`] finds the io_uring empty. Whether it is.
    fn end_watches(&mut self) -> bool {
        self.fill();
        let mut cancels = 0;
        for index in 0..self.watches.len() {
            if self.watches[index].armed {
                let cancel = opcode::AsyncCancel::new(WATCH | index as u64).build().user_data(CANCEL);
                self.push_entry(&cancel);
                cancels += 1;
            }
        }
        for _ in 0..MAX_CANCEL_WAITS {
            while let Some(entry) = self.ring.completion().next() {
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
        log::warn!("an io_uring does not let go of its watches and is given up; a prepared one is used instead");
        false
    }

    /// Submits what the full queue holds: a prepared ring has fewer entries than a deep queue has commands.
    #[cold]
    fn make_room(&mut self) {
        if let Err(error) = self.enter_as_filled(false, None) {
            // Only a broken process gets here, as in `enter`'s callers.
            panic!("cannot submit I/O: {error}");
        }
    }
}

impl<J> Drop for Ring<J> {
    fn drop(&mut self) {
        while self.free.len() < self.slots.len() {
            if let Err(error) = self.enter(true, None) {
                // The kernel may still use the memory: it must stay for ever.
                log::error!("cannot wait for I/O in flight ({error}); its memory is leaked");
                std::mem::forget(std::mem::take(&mut self.slots));
                // The io_uring, too.
                return;
            }
            while let Some(entry) = self.ring.completion().next() {
                let data = entry.user_data();
                if data & WATCH == 0 {
                    self.slots[data as usize] = None;
                    self.free.push(data as usize);
                } else if !cqueue::more(entry.flags()) {
                    self.watches[(data & !WATCH) as usize].armed = false;
                }
            }
        }
        // The kernel tears rings down later; the image is to be closed when its owner closes it.
        let closed = self.ring.submitter().unregister_files();
        if let Err(error) = &closed {
            log::debug!("the image stays open until its ring is gone: {error}");
        }
        let reusable = prepared::in_use() && closed.is_ok() && self.end_watches();
        // SAFETY: taken once, here; nothing uses it afterwards.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        if reusable {
            USED.set(Some(ring));
        }
    }
}

enum After {
    Again,
    Over(Result<(), Errno>),
}

impl<J> Active<J> {
    /// Decides what a completion means. A transfer that moved nothing will never end: inside the image a read that
    /// returns 0 means that the file was cut short under us.
    fn after(&mut self, result: i32) -> After {
        // A kernel worker has tried it.
        if result == -libc::EAGAIN && self.retries > 0 && self.leave_rest() {
            return After::Over(Err(Errno(libc::EAGAIN)));
        }
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.retries += 1;
            return if self.retries < MAX_RETRIES { After::Again } else { After::Over(Err(Errno(libc::EIO))) };
        }
        if result < 0 {
            return After::Over(Err(Errno(-result)));
        }
        let Command::Transfer(transfer) = &self.command else {
            return After::Over(Ok(()));
        };
        let left = transfer.len - self.done;
        match result as usize {
            moved if transfer.write && moved < self.asked => {
                self.leave_rest();
                After::Over(Err(Errno(libc::EAGAIN)))
            }
            moved if moved == left => After::Over(Ok(())),
            moved if moved == 0 || moved > left => After::Over(Err(Errno(libc::EIO))),
            moved => {
                self.done += moved;
                self.retries = 0;
                After::Again
            }
        }
    }

    /// Takes what was moved off the command. Whether it is a transfer.
    fn leave_rest(&mut self) -> bool {
        let Command::Transfer(transfer) = &mut self.command else { return false };
        let done = std::mem::take(&mut self.done);
        transfer.offset += done as u64;
        transfer.from += done;
        transfer.len -= done;
        true
    }

    fn entry(&mut self, file: types::Fixed, submission: Submission) -> squeue::Entry {
        // A retry runs in a kernel worker, where it may sleep instead of spinning here.
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
                    self.rest.clear();
                    transfer.buf.push_range(transfer.from + self.done, transfer.len - self.done, &mut self.rest);
                    // More than that comes back as a short transfer and goes on.
                    self.rest.truncate(MAX_IOVECS);
                    &self.rest
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
    /// And the bytes that it asks for.
    fn entry(&self, file: types::Fixed, iovecs: &[libc::iovec], offset: u64) -> (squeue::Entry, usize) {
        let flags = if self.durable { libc::RWF_DSYNC } else { 0 };
        let asked = match iovecs {
            [one] => clamp(one.iov_len) as usize,
            // All of the buffer: its sum is known.
            all if std::ptr::eq(all, self.buf.iovecs()) => self.buf.len(),
            some => some.iter().map(|part| part.iov_len).sum(),
        };
        let entry = match (iovecs, self.write) {
            // One part needs no list to be copied in. A length over u32 is cut and goes on as a short transfer.
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

/// Bytes for one call: the kernel moves at most this much at once (MAX_RW_COUNT), in whole blocks.
fn clamp(len: usize) -> u32 {
    len.min(0x4000_0000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_goes_on_ends_or_fails() {
        let transfer =
            Transfer { write: false, durable: false, offset: 0, buf: IoBuf::owned(8192, 512, 0), from: 0, len: 8192 };
        let command = Command::Transfer(transfer);
        let mut active = Active { job: (), command, done: 0, asked: 0, rest: Vec::new(), retries: 0 };
        assert!(matches!(active.after(512), After::Again));
        assert!(matches!(active.after(-libc::EINTR), After::Again));
        assert!(matches!(active.after(0), After::Over(Err(Errno(libc::EIO)))), "nothing moved: it never will");
        assert!(matches!(active.after(-libc::ENOSPC), After::Over(Err(Errno(libc::ENOSPC)))));
        assert!(matches!(active.after(8192), After::Over(Err(Errno(libc::EIO)))), "more than was asked");
        assert!(matches!(active.after(512), After::Again));
        assert!(matches!(active.after(-libc::EAGAIN), After::Again), "a kernel worker may wait for it");
        assert!(matches!(active.after(7168), After::Over(Ok(()))));
    }

    #[test]
    fn a_short_write_comes_back_for_plain_calls_from_where_the_last_whole_one_ended() {
        for result in [0, 512, -libc::EAGAIN] {
            let buf = IoBuf::owned(8192, 512, 0);
            let transfer = Transfer { write: true, durable: false, offset: 4096, buf, from: 0, len: 8192 };
            let command = Command::Transfer(transfer);
            let mut active = Active { job: (), command, done: 0, asked: 4096, rest: Vec::new(), retries: 0 };
            assert!(matches!(active.after(4096), After::Again), "the rest of more iovecs than one call takes");
            if result < 0 {
                assert!(matches!(active.after(result), After::Again), "a kernel worker may wait");
            }
            assert!(matches!(active.after(result), After::Over(Err(Errno(libc::EAGAIN)))));
            let Command::Transfer(transfer) = active.command else { unreachable!("it is one") };
            assert_eq!((transfer.offset, transfer.from, transfer.len), (8192, 4096, 4096));
        }
    }
}
