//! The queue of one virtqueue: takes ops and returns completions, over one io_uring ([`Uring`]).

mod helper_tasks;
mod plain_calls;
mod plan;
mod progress;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::bounce::BounceOp;
use super::change_counter::ChangeStamp;
use super::image::FileImage;
use super::inline::{InlineIo, InlineOutcome};
use super::mail::{Mail, Mailbox};
use super::range_locks::{LockTicket, QueueLocks};
use super::range_op::{OpStep, RangeOp};
use crate::backend::bounce_pool::QueuePool;
use crate::backend::uring::{Event, FileOp, Uring};
use crate::backend::{BlockingCall, Caller, Completion, Errno, IoBuf, IoQueue, Op, OpId, Source, Wakeups};
use helper_tasks::HelperTasks;
use plain_calls::FileCaller;

/// The tokens of the watched eventfds.
const KICK: u32 = 0;
const WAKE: u32 = 1;
const COPY: u32 = 2;
const MAIL: u32 = 3;

/// A queue of a [`super::FileBackend`]. `submit` and `wait` enter the kernel, which then posts completions; `reap`
/// makes no system call. A caller that polls instead of sleeping calls `submit` between two reaps. Fields are dropped
/// in their order: first `uring`, which waits for what is in flight, then the helper threads, and the file last.
pub(super) struct FileQueue {
    uring: Uring<PendingOp>,
    /// Sends the io_uring to the thread that makes the calls ([`FileCaller`]), should another thread take the queue.
    to_caller: Option<mpsc::Sender<Uring<PendingOp>>>,
    /// Writes to be made by plain calls.
    pending_calls: VecDeque<BlockingCall>,
    /// Calls that are over, whose memory new ones reuse.
    spare_calls: Vec<BlockingCall>,
    helpers: HelperTasks,
    /// An open file description of this queue alone: the kernel reports a writeback error once to each description.
    file: Arc<OwnedFd>,
    inline: InlineIo,
    image: Arc<FileImage>,
    mailbox: Arc<Mailbox>,
    /// Where the medium's blocks are larger than the guest's.
    locks: Option<Arc<QueueLocks>>,
    pool: QueuePool,
    /// Ops taken and not yet in `ready`.
    ops_in_flight: usize,
    /// The most ops taken and not reaped.
    depth: usize,
    /// Ops that wait for their range lock, by its claim, with their first step.
    waiting_for_lock: HashMap<u64, (PendingOp, OpStep)>,
    /// Ops that wait for bounce memory, oldest first. They hold their range lock already, and an op that has memory
    /// waits for the medium only, so none of them waits for another.
    waiting_for_memory: VecDeque<PendingOp>,
    ready: Vec<Completion>,
    wakeups: Wakeups,
}

/// An op that was taken and is not complete.
pub(super) struct PendingOp {
    id: OpId,
    /// The op is a durable write.
    durable: bool,
    /// The op changes the image, so a later sync has something to do.
    changes: bool,
    state: OpState,
    /// The range lock, held until the op is complete, however it ends.
    _ticket: Option<LockTicket>,
}

/// What is left to do of an op.
enum OpState {
    /// The op is a single file op.
    Single,
    /// A sync, and the changes that it covers.
    Sync(ChangeStamp),
    Bounce(Box<BounceOp>),
    Range(Box<RangeOp>),
}

impl FileQueue {
    pub(super) fn open(image: Arc<FileImage>, file: OwnedFd, depth: usize) -> io::Result<Self> {
        let mut uring = Uring::new(depth, file.as_fd(), image.submission)?;
        let mailbox = Arc::new(Mailbox::new()?);
        uring.watch(MAIL, mailbox.as_fd())?;
        let locks = image.range_locks.as_ref().map(|locks| QueueLocks::new(Arc::clone(locks), Arc::clone(&mailbox)));
        Ok(FileQueue {
            uring,
            to_caller: None,
            pending_calls: VecDeque::new(),
            spare_calls: Vec::new(),
            helpers: HelperTasks::default(),
            file: Arc::new(file),
            inline: InlineIo::new(image.inline_policy),
            pool: QueuePool::new(image.bounce_pool.clone(), image.limits.align.memory as usize),
            image,
            mailbox,
            locks,
            ops_in_flight: 0,
            depth,
            waiting_for_lock: HashMap::new(),
            waiting_for_memory: VecDeque::new(),
            ready: Vec::with_capacity(depth),
            wakeups: Wakeups::default(),
        })
    }

    /// Queues the completion of an op.
    #[inline]
    fn complete(&mut self, id: OpId, changes: bool, result: Result<(), Errno>, buf: Option<IoBuf>) {
        if changes {
            // A failed op counts too: a part of it may have been stored.
            self.image.changes.add();
        }
        self.ready.push(Completion { id, result, buf });
    }

    /// Handles all events of the io_uring, without a system call.
    fn collect(&mut self) {
        while let Some(event) = self.uring.next_event() {
            match event {
                Event::Finished(op, file_op, result) => self.finished(op, file_op, result),
                Event::Fired(KICK) => self.wakeups.kick = true,
                Event::Fired(WAKE) => self.wakeups.wake = true,
                Event::Fired(COPY) => self.wakeups.copy = true,
                Event::Fired(_) => self.open_mail(),
            }
        }
    }

    fn open_mail(&mut self) {
        for mail in self.mailbox.take() {
            match mail {
                Mail::Granted(ticket) => {
                    // The op is missing if the queue is being dropped.
                    if let Some((op, step)) = self.waiting_for_lock.remove(&ticket) {
                        self.run(op, step);
                    }
                }
                Mail::Discarded(key, result) => {
                    let mut op = self.helpers.take(key);
                    let result = result.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)));
                    let OpState::Range(range_op) = &mut op.state else { unreachable!("only a range op is discarded") };
                    let step = range_op.discarded(result, &self.image);
                    self.run(op, step);
                }
                Mail::Returned(call) => {
                    self.inline.hung_call_returned();
                    self.call_made(call);
                }
                Mail::Finished(op, file_op, result) => self.finished(op, file_op, result),
                Mail::Transferred(key, transfer, result) => {
                    let op = self.helpers.take(key);
                    self.after(op, FileOp::Transfer(transfer), result);
                }
            }
        }
    }

    fn has_collected(&self) -> bool {
        !self.ready.is_empty() || self.wakeups != Wakeups::default()
    }
}

impl IoQueue for FileQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        // An op counts until it is reaped, also one that completed inline, so that `ready` stays bounded.
        if self.ops_in_flight + self.ready.len() >= self.depth {
            return Err(op);
        }
        let op = match op {
            Op::Read { offset, buf } if self.inline.suits(&buf) => {
                self.read_inline(id, offset, buf);
                return Ok(());
            }
            Op::Write { offset, buf, durable: false }
                if !self.image.geometry.read_only && self.inline.suits_write(&buf) =>
            {
                self.write_inline(id, offset, buf);
                return Ok(());
            }
            op => op,
        };
        self.ops_in_flight += 1;
        let refused = self.image.geometry.read_only && !matches!(op, Op::Read { .. } | Op::Sync);
        if refused {
            let buf = if let Op::Write { buf, .. } = op { Some(buf) } else { None };
            let op = PendingOp { id, durable: false, changes: false, state: OpState::Single, _ticket: None };
            self.finish(op, Err(Errno(libc::EROFS)), buf);
            return Ok(());
        }
        let changes = !matches!(op, Op::Read { .. } | Op::Sync);
        let durable = matches!(op, Op::Write { durable: true, .. });
        let ticket = self.lock(&op);
        let (state, step) = self.plan(op);
        match ticket {
            None => self.run(PendingOp { id, durable, changes, state, _ticket: None }, step),
            Some((ticket, true)) => self.run(PendingOp { id, durable, changes, state, _ticket: Some(ticket) }, step),
            Some((ticket, false)) => {
                let key = ticket.claim().expect("only a claim waits");
                self.waiting_for_lock
                    .insert(key, (PendingOp { id, durable, changes, state, _ticket: Some(ticket) }, step));
            }
        }
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        self.start_calls();
        if self.uring.wants_enter() {
            self.uring.enter(false, None)?;
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.collect();
        self.inline.refill_allowance();
        if out.is_empty() {
            std::mem::swap(out, &mut self.ready);
        } else {
            out.append(&mut self.ready);
        }
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        let token = match source {
            Source::Kick => KICK,
            Source::Wake => WAKE,
            Source::Copy => COPY,
        };
        self.uring.watch(token, fd)
    }

    fn has_completions(&mut self) -> bool {
        // An error here comes again in `wait`, which reports it.
        let _ = self.submit();
        self.collect();
        !self.ready.is_empty() || self.wakeups.wake || self.wakeups.copy
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.start_calls();
        self.collect();
        loop {
            if self.has_collected() {
                self.submit()?;
                return Ok(std::mem::take(&mut self.wakeups));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            self.uring.enter(true, left)?;
            self.collect();
            if left == Some(Duration::ZERO) {
                return Ok(std::mem::take(&mut self.wakeups));
            }
        }
    }

    fn caller(&mut self) -> Option<Box<dyn Caller>> {
        if !self.inline.makes_writes() {
            return None;
        }
        let (to_caller, old_uring) = mpsc::channel();
        self.to_caller = Some(to_caller);
        let (file, mailbox) = (Arc::clone(&self.file), Arc::clone(&self.mailbox));
        Some(Box::new(FileCaller::new(file, mailbox, old_uring)))
    }

    fn next_call(&mut self) -> Option<BlockingCall> {
        if self.pending_calls.is_empty() { None } else { self.next_admitted_call() }
    }

    #[inline]
    fn call_made(&mut self, mut call: BlockingCall) {
        match self.inline.handle_result(&call) {
            InlineOutcome::Complete(result) => {
                self.ops_in_flight -= 1;
                let buf = call.buf.take();
                self.complete(call.id, true, result, Some(buf));
                self.spare_calls.push(call);
            }
            InlineOutcome::Partial(from) => self.continue_call(call, from),
            InlineOutcome::Repeat => self.pending_calls.push_front(call),
        }
    }

    fn change_thread(&mut self) -> io::Result<()> {
        let uring = self.uring.successor(self.file.as_fd())?;
        let mut old_uring = std::mem::replace(&mut self.uring, uring);
        for (file_op, op) in old_uring.take_queued() {
            self.uring.start(file_op, op);
        }
        self.inline.call_hangs();
        let to_caller = self.to_caller.take().expect("the old thread has the caller and is in one of its calls");
        assert!(to_caller.send(old_uring).is_ok(), "the old thread waits for the io_uring once its call returns");
        Ok(())
    }
}

impl Drop for FileQueue {
    /// Carries out every op that was taken (clause 3), except those that wait for a range lock: another queue of this
    /// very thread may hold it, and would then never release it.
    fn drop(&mut self) {
        self.start_calls();
        while self.ops_in_flight > self.waiting_for_lock.len() {
            if let Err(error) = self.uring.enter(true, None) {
                log::error!(
                    "{}: cannot wait for I/O ({error}); {} ops are lost",
                    self.image.file.name,
                    self.ops_in_flight
                );
                return;
            }
            self.collect();
        }
    }
}
