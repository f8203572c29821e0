//! The queue of one virtqueue: takes ops and returns completions, over one io_uring ([`Uring`]).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::super::buffer::IovecList;
use super::super::uring::{Command, Event, Transfer, Uring};
use super::super::{BlockingCall, Caller, Completion, Errno, IoBuf, IoQueue, Op, OpId, Source, Wakeups};
use super::Shared;
use super::bounce::{BounceOp, Next};
use super::change_counter::ChangeStamp;
use super::helper_thread::HelperThreads;
use super::inline::{InlineIo, Outcome};
use super::mailbox::{Mail, Mailbox};
use super::range_locks::{QueueLocks, Ticket};
use super::range_op::{RangeOp, Step};
use crate::backend::bounce_pool::QueuePool;
use crate::backend::preadv;
use crate::base::rate_limit::{STORAGE_LOG, log_limited};

const KICK: u32 = 0;
const WAKE: u32 = 1;
const COPY: u32 = 2;
const MAIL: u32 = 3;

/// A queue of a [`super::FileBackend`]. `submit` and `wait` enter the kernel, which then posts completions; `reap`
/// makes no system call. A caller that polls instead of sleeping calls `submit` between two reaps. Fields are dropped
/// in their order: first `uring`, which waits for what is in flight, then the helper thread, and the file last.
pub(super) struct FileQueue {
    uring: Uring<Job>,
    /// Sends the io_uring to the thread that makes the calls ([`FileCaller`]), should another thread take the queue.
    to_caller: Option<mpsc::Sender<Uring<Job>>>,
    /// Writes to be made by plain calls.
    pending_calls: VecDeque<BlockingCall>,
    helper: Option<HelperThreads>,
    /// An open file description of this queue alone: the kernel reports a writeback error once to each description.
    file: Arc<OwnedFd>,
    inline: InlineIo,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    /// Where the medium's blocks are larger than the guest's.
    locks: Option<Arc<QueueLocks>>,
    pool: QueuePool,
    /// Ops taken and not yet in `ready`.
    live: usize,
    /// The most ops taken and not reaped.
    depth: usize,
    /// Ops that wait for their range lock, by its claim, with their first step.
    waiting_for_lock: HashMap<u64, (Job, Step)>,
    /// Ops that wait for bounce memory, oldest first. They hold their range lock already, and an op that has memory
    /// waits for the medium only, so none of them waits for another.
    waiting_for_memory: VecDeque<Job>,
    /// Ops that the helper thread works on, by the key of their task.
    in_helper: HashMap<u64, Job>,
    last_key: u64,
    ready: Vec<Completion>,
    wakeups: Wakeups,
}

/// An op that was taken and is not complete.
pub(super) struct Job {
    id: OpId,
    durable: bool,
    /// The op changes the image, so a later sync has something to do.
    changes: bool,
    work: Work,
    /// The range lock, held until the op is complete, however it ends.
    _ticket: Option<Ticket>,
}

enum Work {
    /// The op is a single command.
    Whole,
    /// A sync, and the changes that it covers.
    Sync(ChangeStamp),
    BounceOp(Box<BounceOp>),
    RangeOp(Box<RangeOp>),
}

impl FileQueue {
    pub(super) fn open(shared: Arc<Shared>, file: OwnedFd, depth: usize) -> io::Result<Self> {
        let mut uring = Uring::new(depth, file.as_fd(), shared.submission)?;
        let mailbox = Arc::new(Mailbox::new()?);
        uring.watch(MAIL, mailbox.as_fd())?;
        let locks = shared.range_locks.as_ref().map(|locks| QueueLocks::new(Arc::clone(locks), Arc::clone(&mailbox)));
        Ok(FileQueue {
            uring,
            to_caller: None,
            pending_calls: VecDeque::new(),
            helper: None,
            file: Arc::new(file),
            inline: InlineIo::new(shared.inline_policy),
            pool: QueuePool::new(shared.memory.clone(), shared.align.memory as usize),
            shared,
            mailbox,
            locks,
            live: 0,
            depth,
            waiting_for_lock: HashMap::new(),
            waiting_for_memory: VecDeque::new(),
            in_helper: HashMap::new(),
            last_key: 0,
            ready: Vec::with_capacity(depth),
            wakeups: Wakeups::default(),
        })
    }

    /// Tries a read without the io_uring. The op is in `ready` when this returns, or the io_uring has the rest of it.
    #[inline]
    fn read_inline(&mut self, id: OpId, offset: u64, buf: IoBuf) {
        match self.inline.read(self.file.as_fd(), &buf, offset) {
            Outcome::Over(result) => self.complete(id, false, result, Some(buf)),
            Outcome::Moved(from) => {
                self.live += 1;
                self.start_rest(id, false, offset, buf, from);
            }
            Outcome::Again => unreachable!("a read is tried once"),
        }
    }

    /// Queues a write that may need no io_uring. It is live until its call has returned.
    #[inline]
    fn write_inline(&mut self, id: OpId, offset: u64, buf: IoBuf) {
        self.inline.reserve(&buf);
        self.live += 1;
        self.pending_calls.push_back(BlockingCall::new(id, offset, buf));
        if self.to_caller.is_none() {
            self.make_calls();
        }
    }

    /// Makes the queued calls in this thread, where the owner has not taken that on itself.
    fn make_calls(&mut self) {
        let mut scratch = Vec::new();
        while let Some(mut call) = self.next_call() {
            make(self.file.as_fd(), &mut call, &mut scratch);
            self.call_made(call);
        }
    }

    /// Gives the io_uring what is left of a transfer after `from` bytes.
    fn start_rest(&mut self, id: OpId, write: bool, offset: u64, buf: IoBuf, from: usize) {
        let len = buf.len() - from;
        let rest = Transfer { write, durable: false, offset: offset + from as u64, buf, from, len };
        let job = Job { id, durable: false, changes: write, work: Work::Whole, _ticket: None };
        self.uring.start(Command::Transfer(rest), job);
    }

    /// Gives the queued calls to the io_uring, because the owner is about to sleep.
    fn start_calls(&mut self) {
        while let Some(BlockingCall { id, offset, buf, .. }) = self.pending_calls.pop_front() {
            self.start_rest(id, true, offset, buf, 0);
        }
    }

    /// Returns whether the op is a durable write, its state, and its first step.
    fn plan(&self, op: Op) -> (bool, Work, Step) {
        match op {
            Op::Read { offset, buf } => self.plan_transfer((false, false), offset, buf),
            Op::Write { offset, buf, durable } => self.plan_transfer((true, durable), offset, buf),
            Op::Sync => match self.shared.changes.begin_sync() {
                Some(stamp) => match self.inline.sync(self.file.as_fd()) {
                    None => (false, Work::Sync(stamp), Step::Run(Command::Sync)),
                    Some(result) => (false, Work::Whole, Step::Done(self.synced(stamp, result))),
                },
                None => (false, Work::Whole, Step::Done(self.shared.sync_error.record(Ok(()), &self.shared.name))),
            },
            Op::Discard { offset, len } => self.plan_ranged(RangeOp::discard(offset, len, &self.shared)),
            Op::WriteZeroes { offset, len, unmap } => {
                self.plan_ranged(RangeOp::zeroes(offset, len, unmap, &self.shared))
            }
        }
    }

    fn plan_transfer(&self, (write, durable): (bool, bool), offset: u64, buf: IoBuf) -> (bool, Work, Step) {
        let align = self.shared.align;
        // Aligned iovecs may still add up to less than a block of the medium, or start inside one.
        let whole_blocks = (offset | buf.len() as u64) & u64::from(align.offset - 1) == 0;
        if whole_blocks && buf.is_aligned(align.memory as usize, align.offset as usize) {
            let len = buf.len();
            let transfer = Transfer { write, durable, offset, buf, from: 0, len };
            return (durable, Work::Whole, Step::Run(Command::Transfer(transfer)));
        }
        let copied = BounceOp::new((write, durable), offset, buf, align.offset);
        (durable, Work::BounceOp(Box::new(copied)), Step::Copy)
    }

    fn plan_ranged(&self, mut ranged: RangeOp) -> (bool, Work, Step) {
        let step = ranged.next(&self.shared);
        (false, Work::RangeOp(Box::new(ranged)), step)
    }

    /// Locks the blocks of an op that changes the image, where the medium's blocks are larger than the guest's. The
    /// flag is false if the op must wait for its lock.
    fn lock(&self, op: &Op) -> Option<(Ticket, bool)> {
        let locks = self.locks.as_ref()?;
        Some(match op {
            Op::Read { .. } | Op::Sync => return None,
            Op::Write { offset, buf, .. } => locks.lock_written(*offset..*offset + buf.len() as u64),
            Op::WriteZeroes { offset, len, .. } => locks.lock_written(*offset..*offset + *len),
            // A block that the guest discards in part is left alone.
            Op::Discard { offset, len } => locks.lock_inside(*offset..*offset + *len),
        })
    }

    fn run(&mut self, job: Job, step: Step) {
        match step {
            Step::Run(command) => self.uring.start(command, job),
            Step::Copy => {
                self.waiting_for_memory.push_back(job);
                self.start_bounce_ops();
            }
            Step::DiscardDevice { offset, len } => self.discard_device(job, offset, len),
            Step::Done(result) => self.finish(job, result, None),
        }
    }

    /// Starts the bounced transfers for which there is memory.
    fn start_bounce_ops(&mut self) {
        while let Some(job) = self.waiting_for_memory.front_mut() {
            let begun = match &mut job.work {
                Work::BounceOp(copied) => copied.begin(&mut self.pool),
                Work::RangeOp(ranged) => ranged.begin(&mut self.pool),
                Work::Whole | Work::Sync(_) => unreachable!("it needs no memory"),
            };
            let Some(command) = begun else { return };
            let job = self.waiting_for_memory.pop_front().expect("it is the front");
            self.uring.start(command, job);
        }
    }

    fn discard_device(&mut self, mut job: Job, offset: u64, len: u64) {
        if self.start_helper("a discard") {
            let key = self.give_to_helper(job);
            self.helper.as_mut().expect("started just now").discard(key, offset, len);
        } else {
            job.work = Work::Whole;
            self.finish(job, Err(Errno(libc::ENOMEM)), None);
        }
    }

    /// Has the helper thread make a transfer that the io_uring cannot finish.
    fn transfer_in_helper(&mut self, job: Job, transfer: Transfer) {
        if self.start_helper("a transfer") {
            let key = self.give_to_helper(job);
            self.helper.as_mut().expect("started just now").transfer(key, transfer);
        } else {
            self.after(job, Command::Transfer(transfer), Err(Errno(libc::ENOMEM)));
        }
    }

    /// Starts the helper thread if there is none. Returns whether there is one. `what` is for the log.
    fn start_helper(&mut self, what: &str) -> bool {
        if self.helper.is_none() {
            match HelperThreads::start(Arc::clone(&self.file), Arc::clone(&self.mailbox)) {
                Ok(helper) => self.helper = Some(helper),
                Err(error) => log_limited!(
                    STORAGE_LOG,
                    Error,
                    "{}: cannot start a thread for {what}: {error}; raise the limit of threads (ulimit -u, TasksMax=)",
                    self.shared.name
                ),
            }
        }
        self.helper.is_some()
    }

    /// Stores a job while the helper thread works on it. Returns its key.
    fn give_to_helper(&mut self, job: Job) -> u64 {
        self.last_key += 1;
        self.in_helper.insert(self.last_key, job);
        self.last_key
    }

    /// Handles a command that this io_uring, or that of an earlier thread, has completed.
    fn finished(&mut self, job: Job, command: Command, result: Result<(), Errno>) {
        match (command, result) {
            (Command::Transfer(transfer), Err(Errno(libc::EAGAIN))) => self.transfer_in_helper(job, transfer),
            (command, result) => self.after(job, command, result),
        }
    }

    /// Handles the result of a command: starts the op's next command, or completes the op.
    fn after(&mut self, mut job: Job, command: Command, result: Result<(), Errno>) {
        match (&mut job.work, command) {
            (Work::Whole, Command::Transfer(transfer)) => {
                if self.shared.direct && result == Err(Errno(libc::EINVAL)) {
                    return self.bounce_instead(job, transfer);
                }
                self.finish(job, result, Some(transfer.buf));
            }
            (Work::Sync(stamp), _) => {
                let result = self.synced(*stamp, result);
                self.finish(job, result, None);
            }
            (Work::Whole, _) => unreachable!("a range op and a sync have their own work"),
            (Work::BounceOp(copied), Command::Transfer(transfer)) => {
                match copied.after(result, transfer.buf, &mut self.pool) {
                    Next::Run(command) => self.uring.start(command, job),
                    Next::Done(result) => self.finish(job, result, None),
                }
                self.start_bounce_ops();
            }
            (Work::BounceOp(_), _) => unreachable!("a bounced op runs transfers only"),
            (Work::RangeOp(ranged), command) => {
                let step = ranged.after(command, result, &self.shared, &mut self.pool);
                self.run(job, step);
                self.start_bounce_ops();
            }
        }
    }

    /// Records the result of a sync that began with `stamp`, and returns the result to report.
    fn synced(&self, stamp: ChangeStamp, result: Result<(), Errno>) -> Result<(), Errno> {
        if result.is_ok() {
            self.shared.changes.sync_succeeded(stamp);
        }
        self.shared.sync_error.record(result, &self.shared.name)
    }

    /// Repeats a transfer through bounce memory: the kernel refused a buffer that met the alignment that the file
    /// system reported.
    fn bounce_instead(&mut self, mut job: Job, transfer: Transfer) {
        let Transfer { write, durable, offset, from, buf, .. } = transfer;
        // The whole transfer again, even if a part succeeded.
        let offset = offset - from as u64;
        let align = self.shared.align.offset;
        job.work = Work::BounceOp(Box::new(BounceOp::new((write, durable), offset, buf, align)));
        self.run(job, Step::Copy);
    }

    fn finish(&mut self, job: Job, mut result: Result<(), Errno>, buf: Option<IoBuf>) {
        if job.durable {
            result = match result {
                // Over the page cache the data may be lost and its pages marked clean, as after a failed fdatasync.
                Err(_) if !self.shared.direct => self.shared.sync_error.record(result, &self.shared.name),
                Err(errno) => Err(errno),
                Ok(()) => self.shared.sync_error.record(Ok(()), &self.shared.name),
            };
        }
        let buf = match job.work {
            Work::BounceOp(copied) => Some(copied.into_guest()),
            Work::Whole | Work::Sync(_) | Work::RangeOp(_) => buf,
        };
        self.live -= 1;
        self.complete(job.id, job.changes, result, buf);
    }

    /// Queues the completion of an op.
    #[inline]
    fn complete(&mut self, id: OpId, changes: bool, result: Result<(), Errno>, buf: Option<IoBuf>) {
        if changes {
            // A failed op counts too: a part of it may have been stored.
            self.shared.changes.add();
        }
        self.ready.push(Completion { id, result, buf });
    }

    /// Handles all events of the io_uring, without a system call.
    fn collect(&mut self) {
        while let Some(event) = self.uring.next_event() {
            match event {
                Event::Finished(job, command, result) => self.finished(job, command, result),
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
                    if let Some((job, step)) = self.waiting_for_lock.remove(&ticket) {
                        self.run(job, step);
                    }
                }
                Mail::Discarded(key, result) => {
                    let mut job = self.in_helper.remove(&key).expect("the helper thread reports each task once");
                    let result = result.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)));
                    let Work::RangeOp(ranged) = &mut job.work else { unreachable!("only a range op is discarded") };
                    let step = ranged.discarded(result, &self.shared);
                    self.run(job, step);
                }
                Mail::Returned(call) => {
                    self.inline.is_back();
                    self.call_made(call);
                }
                Mail::Finished(job, command, result) => self.finished(job, command, result),
                Mail::Transferred(key, transfer, result) => {
                    let job = self.in_helper.remove(&key).expect("the helper thread reports each task once");
                    self.after(job, Command::Transfer(transfer), result);
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
        if self.live + self.ready.len() >= self.depth {
            return Err(op);
        }
        let op = match op {
            Op::Read { offset, buf } if self.inline.suits(&buf) => {
                self.read_inline(id, offset, buf);
                return Ok(());
            }
            Op::Write { offset, buf, durable: false }
                if !self.shared.geometry.read_only && self.inline.suits_write(&buf) =>
            {
                self.write_inline(id, offset, buf);
                return Ok(());
            }
            op => op,
        };
        self.live += 1;
        let refused = self.shared.geometry.read_only && !matches!(op, Op::Read { .. } | Op::Sync);
        if refused {
            let buf = if let Op::Write { buf, .. } = op { Some(buf) } else { None };
            let job = Job { id, durable: false, changes: false, work: Work::Whole, _ticket: None };
            self.finish(job, Err(Errno(libc::EROFS)), buf);
            return Ok(());
        }
        let changes = !matches!(op, Op::Read { .. } | Op::Sync);
        let ticket = self.lock(&op);
        let (durable, work, step) = self.plan(op);
        match ticket {
            None => self.run(Job { id, durable, changes, work, _ticket: None }, step),
            Some((ticket, true)) => self.run(Job { id, durable, changes, work, _ticket: Some(ticket) }, step),
            Some((ticket, false)) => {
                let key = ticket.claim().expect("only a claim waits");
                self.waiting_for_lock.insert(key, (Job { id, durable, changes, work, _ticket: Some(ticket) }, step));
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
        self.inline.reaped();
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
        let (to_caller, old_uring) = mpsc::channel();
        self.to_caller = Some(to_caller);
        let (file, mailbox) = (Arc::clone(&self.file), Arc::clone(&self.mailbox));
        Some(Box::new(FileCaller { file, mailbox, old_uring, scratch: IovecList::default() }))
    }

    #[inline]
    fn next_call(&mut self) -> Option<BlockingCall> {
        while let Some(mut call) = self.pending_calls.pop_front() {
            if self.inline.admits(&mut call) {
                return Some(call);
            }
            self.start_rest(call.id, true, call.offset, call.buf, 0);
        }
        None
    }

    #[inline]
    fn call_made(&mut self, call: BlockingCall) {
        match self.inline.made(&call) {
            Outcome::Over(result) => {
                self.live -= 1;
                self.complete(call.id, true, result, Some(call.buf));
            }
            Outcome::Moved(from) => self.start_rest(call.id, true, call.offset, call.buf, from),
            Outcome::Again => self.pending_calls.push_front(call),
        }
    }

    fn change_thread(&mut self) -> io::Result<()> {
        let uring = self.uring.successor(self.file.as_fd())?;
        let mut old_uring = std::mem::replace(&mut self.uring, uring);
        for (command, job) in old_uring.take_queued() {
            self.uring.start(command, job);
        }
        self.inline.is_stuck();
        let to_caller = self.to_caller.take().expect("the old thread has the caller and is in one of its calls");
        assert!(to_caller.send(old_uring).is_ok(), "the old thread waits for the io_uring once its call returns");
        Ok(())
    }
}

/// Makes the calls of one queue; see [`Caller`].
struct FileCaller {
    file: Arc<OwnedFd>,
    mailbox: Arc<Mailbox>,
    /// Gets the queue's io_uring when another thread takes the queue.
    old_uring: mpsc::Receiver<Uring<Job>>,
    scratch: IovecList,
}

impl Caller for FileCaller {
    fn make(&mut self, call: &mut BlockingCall) {
        make(self.file.as_fd(), call, &mut self.scratch.0);
    }

    fn leave(self: Box<Self>, call: BlockingCall) {
        self.mailbox.post(Mail::Returned(call));
        // Without an io_uring the queue was dropped.
        let Ok(mut uring) = self.old_uring.recv() else { return };
        let finished = |job, command, result| self.mailbox.post(Mail::Finished(job, command, result));
        if let Err(error) = uring.finish(finished) {
            log::error!("cannot wait for I/O in flight: {error}; its requests never complete; restart virtioblkd");
        }
    }
}

/// Makes one call and records its result.
fn make(file: BorrowedFd<'_>, call: &mut BlockingCall, scratch: &mut Vec<libc::iovec>) {
    call.result = preadv::transfer(file, true, &call.buf, 0..call.buf.len(), call.offset, call.flags, scratch);
    if call.began.is_some() {
        call.ended = Some(Instant::now());
    }
}

impl Drop for FileQueue {
    /// Carries out every op that was taken (clause 3), except those that wait for a range lock: another queue of this
    /// very thread may hold it, and would then never release it.
    fn drop(&mut self) {
        self.start_calls();
        while self.live > self.waiting_for_lock.len() {
            if let Err(error) = self.uring.enter(true, None) {
                log::error!("{}: cannot wait for I/O ({error}); {} ops are lost", self.shared.name, self.live);
                return;
            }
            self.collect();
        }
    }
}
