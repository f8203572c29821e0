//! The queue of one virtqueue: takes ops and returns completions, over one io_uring ([`Uring`]).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::super::buffer::IovecList;
use super::super::uring::{Event, FileOp, Transfer, TransferKind, Uring};
use super::super::{BlockingCall, Caller, Completion, Errno, IoBuf, IoQueue, Op, OpId, Source, Wakeups};
use super::Shared;
use super::bounce::{BounceOp, BounceStep};
use super::change_counter::ChangeStamp;
use super::helper_thread::HelperThreads;
use super::inline::{InlineIo, InlineOutcome};
use super::mailbox::{Mail, Mailbox};
use super::range_locks::{LockTicket, QueueLocks};
use super::range_op::{OpStep, RangeOp};
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
    uring: Uring<PendingOp>,
    /// Sends the io_uring to the thread that makes the calls ([`FileCaller`]), should another thread take the queue.
    to_caller: Option<mpsc::Sender<Uring<PendingOp>>>,
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
    ops_in_flight: usize,
    /// The most ops taken and not reaped.
    depth: usize,
    /// Ops that wait for their range lock, by its claim, with their first step.
    waiting_for_lock: HashMap<u64, (PendingOp, OpStep)>,
    /// Ops that wait for bounce memory, oldest first. They hold their range lock already, and an op that has memory
    /// waits for the medium only, so none of them waits for another.
    waiting_for_memory: VecDeque<PendingOp>,
    /// Ops that the helper thread works on, by the key of their task.
    in_helper: HashMap<u64, PendingOp>,
    last_key: u64,
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
            ops_in_flight: 0,
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
            InlineOutcome::Complete(result) => self.complete(id, false, result, Some(buf)),
            InlineOutcome::Partial(from) => {
                self.ops_in_flight += 1;
                self.start_rest(id, TransferKind::Read, offset, buf, from);
            }
            InlineOutcome::Repeat => unreachable!("a read is tried once"),
        }
    }

    /// Queues a write that may need no io_uring. It is live until its call has returned.
    #[inline]
    fn write_inline(&mut self, id: OpId, offset: u64, buf: IoBuf) {
        self.inline.reserve(&buf);
        self.ops_in_flight += 1;
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
    fn start_rest(&mut self, id: OpId, kind: TransferKind, offset: u64, buf: IoBuf, from: usize) {
        let len = buf.len() - from;
        let rest = Transfer { kind, offset: offset + from as u64, buf, from, len };
        let op = PendingOp { id, durable: false, changes: kind.is_write(), state: OpState::Single, _ticket: None };
        self.uring.start(FileOp::Transfer(rest), op);
    }

    /// Gives the queued calls to the io_uring, because the owner is about to sleep.
    fn start_calls(&mut self) {
        while let Some(BlockingCall { id, offset, buf, .. }) = self.pending_calls.pop_front() {
            self.start_rest(id, TransferKind::Write, offset, buf, 0);
        }
    }

    /// Returns the op's state and its first step.
    fn plan(&self, op: Op) -> (OpState, OpStep) {
        match op {
            Op::Read { offset, buf } => self.plan_transfer(TransferKind::Read, offset, buf),
            Op::Write { offset, buf, durable: true } => self.plan_transfer(TransferKind::DurableWrite, offset, buf),
            Op::Write { offset, buf, durable: false } => self.plan_transfer(TransferKind::Write, offset, buf),
            Op::Sync => match self.shared.changes.begin_sync() {
                Some(stamp) => match self.inline.sync(self.file.as_fd()) {
                    None => (OpState::Sync(stamp), OpStep::Run(FileOp::Sync)),
                    Some(result) => (OpState::Single, OpStep::Done(self.synced(stamp, result))),
                },
                None => (OpState::Single, OpStep::Done(self.shared.sync_error.record(Ok(()), &self.shared.name))),
            },
            Op::Discard { offset, len } => self.plan_range_op(RangeOp::discard(offset, len, &self.shared)),
            Op::WriteZeroes { offset, len, unmap } => {
                self.plan_range_op(RangeOp::zeroes(offset, len, unmap, &self.shared))
            }
        }
    }

    fn plan_transfer(&self, kind: TransferKind, offset: u64, buf: IoBuf) -> (OpState, OpStep) {
        let align = self.shared.align;
        // Aligned iovecs may still add up to less than a block of the medium, or start inside one.
        let whole_blocks = (offset | buf.len() as u64) & u64::from(align.offset - 1) == 0;
        if whole_blocks && buf.is_aligned(align.memory as usize, align.offset as usize) {
            let len = buf.len();
            let transfer = Transfer { kind, offset, buf, from: 0, len };
            return (OpState::Single, OpStep::Run(FileOp::Transfer(transfer)));
        }
        let bounce_op = BounceOp::new(kind, offset, buf, align.offset);
        (OpState::Bounce(Box::new(bounce_op)), OpStep::Copy)
    }

    fn plan_range_op(&self, mut range_op: RangeOp) -> (OpState, OpStep) {
        let step = range_op.next(&self.shared);
        (OpState::Range(Box::new(range_op)), step)
    }

    /// Locks the blocks of an op that changes the image, where the medium's blocks are larger than the guest's. The
    /// flag is false if the op must wait for its lock.
    fn lock(&self, op: &Op) -> Option<(LockTicket, bool)> {
        let locks = self.locks.as_ref()?;
        Some(match op {
            Op::Read { .. } | Op::Sync => return None,
            Op::Write { offset, buf, .. } => locks.lock_written(*offset..*offset + buf.len() as u64),
            Op::WriteZeroes { offset, len, .. } => locks.lock_written(*offset..*offset + *len),
            // A block that the guest discards in part is left alone.
            Op::Discard { offset, len } => locks.lock_inside(*offset..*offset + *len),
        })
    }

    fn run(&mut self, op: PendingOp, step: OpStep) {
        match step {
            OpStep::Run(file_op) => self.uring.start(file_op, op),
            OpStep::Copy => {
                self.waiting_for_memory.push_back(op);
                self.start_bounce_ops();
            }
            OpStep::DiscardDevice { offset, len } => self.discard_device(op, offset, len),
            OpStep::Done(result) => self.finish(op, result, None),
        }
    }

    /// Starts the bounced transfers for which there is memory.
    fn start_bounce_ops(&mut self) {
        while let Some(op) = self.waiting_for_memory.front_mut() {
            let begun = match &mut op.state {
                OpState::Bounce(bounce_op) => bounce_op.begin(&mut self.pool),
                OpState::Range(range_op) => range_op.begin(&mut self.pool),
                OpState::Single | OpState::Sync(_) => unreachable!("it needs no memory"),
            };
            let Some(file_op) = begun else { return };
            let op = self.waiting_for_memory.pop_front().expect("it is the front");
            self.uring.start(file_op, op);
        }
    }

    fn discard_device(&mut self, mut op: PendingOp, offset: u64, len: u64) {
        if self.start_helper("a discard") {
            let key = self.give_to_helper(op);
            self.helper.as_mut().expect("started just now").discard(key, offset, len);
        } else {
            op.state = OpState::Single;
            self.finish(op, Err(Errno(libc::ENOMEM)), None);
        }
    }

    /// Has the helper thread make a transfer that the io_uring cannot finish.
    fn transfer_in_helper(&mut self, op: PendingOp, transfer: Transfer) {
        if self.start_helper("a transfer") {
            let key = self.give_to_helper(op);
            self.helper.as_mut().expect("started just now").transfer(key, transfer);
        } else {
            self.after(op, FileOp::Transfer(transfer), Err(Errno(libc::ENOMEM)));
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

    /// Stores an op while the helper thread works on it. Returns its key.
    fn give_to_helper(&mut self, op: PendingOp) -> u64 {
        self.last_key += 1;
        self.in_helper.insert(self.last_key, op);
        self.last_key
    }

    /// Handles a file op that this io_uring, or that of an earlier thread, has completed.
    fn finished(&mut self, op: PendingOp, file_op: FileOp, result: Result<(), Errno>) {
        match (file_op, result) {
            (FileOp::Transfer(transfer), Err(Errno(libc::EAGAIN))) => self.transfer_in_helper(op, transfer),
            (file_op, result) => self.after(op, file_op, result),
        }
    }

    /// Handles the result of a file op: starts the op's next file op, or completes the op.
    fn after(&mut self, mut op: PendingOp, file_op: FileOp, result: Result<(), Errno>) {
        match (&mut op.state, file_op) {
            (OpState::Single, FileOp::Transfer(transfer)) => {
                if self.shared.direct && result == Err(Errno(libc::EINVAL)) {
                    return self.bounce_instead(op, transfer);
                }
                self.finish(op, result, Some(transfer.buf));
            }
            (OpState::Sync(stamp), _) => {
                let result = self.synced(*stamp, result);
                self.finish(op, result, None);
            }
            (OpState::Single, _) => unreachable!("a range op and a sync have their own state"),
            (OpState::Bounce(bounce_op), FileOp::Transfer(transfer)) => {
                match bounce_op.after(result, transfer.buf, &mut self.pool) {
                    BounceStep::Run(file_op) => self.uring.start(file_op, op),
                    BounceStep::Done(result) => self.finish(op, result, None),
                }
                self.start_bounce_ops();
            }
            (OpState::Bounce(_), _) => unreachable!("a bounced op runs transfers only"),
            (OpState::Range(range_op), file_op) => {
                let step = range_op.after(file_op, result, &self.shared, &mut self.pool);
                self.run(op, step);
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
    fn bounce_instead(&mut self, mut op: PendingOp, transfer: Transfer) {
        let Transfer { kind, offset, from, buf, .. } = transfer;
        // The whole transfer again, even if a part succeeded.
        let offset = offset - from as u64;
        let align = self.shared.align.offset;
        op.state = OpState::Bounce(Box::new(BounceOp::new(kind, offset, buf, align)));
        self.run(op, OpStep::Copy);
    }

    fn finish(&mut self, op: PendingOp, mut result: Result<(), Errno>, buf: Option<IoBuf>) {
        if op.durable {
            result = match result {
                // Over the page cache the data may be lost and its pages marked clean, as after a failed fdatasync.
                Err(_) if !self.shared.direct => self.shared.sync_error.record(result, &self.shared.name),
                Err(errno) => Err(errno),
                Ok(()) => self.shared.sync_error.record(Ok(()), &self.shared.name),
            };
        }
        let buf = match op.state {
            OpState::Bounce(bounce_op) => Some(bounce_op.into_guest()),
            OpState::Single | OpState::Sync(_) | OpState::Range(_) => buf,
        };
        self.ops_in_flight -= 1;
        self.complete(op.id, op.changes, result, buf);
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
                    let mut op = self.in_helper.remove(&key).expect("the helper thread reports each task once");
                    let result = result.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)));
                    let OpState::Range(range_op) = &mut op.state else { unreachable!("only a range op is discarded") };
                    let step = range_op.discarded(result, &self.shared);
                    self.run(op, step);
                }
                Mail::Returned(call) => {
                    self.inline.hung_call_returned();
                    self.call_made(call);
                }
                Mail::Finished(op, file_op, result) => self.finished(op, file_op, result),
                Mail::Transferred(key, transfer, result) => {
                    let op = self.in_helper.remove(&key).expect("the helper thread reports each task once");
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
                if !self.shared.geometry.read_only && self.inline.suits_write(&buf) =>
            {
                self.write_inline(id, offset, buf);
                return Ok(());
            }
            op => op,
        };
        self.ops_in_flight += 1;
        let refused = self.shared.geometry.read_only && !matches!(op, Op::Read { .. } | Op::Sync);
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
            self.start_rest(call.id, TransferKind::Write, call.offset, call.buf, 0);
        }
        None
    }

    #[inline]
    fn call_made(&mut self, call: BlockingCall) {
        match self.inline.handle_result(&call) {
            InlineOutcome::Complete(result) => {
                self.ops_in_flight -= 1;
                self.complete(call.id, true, result, Some(call.buf));
            }
            InlineOutcome::Partial(from) => self.start_rest(call.id, TransferKind::Write, call.offset, call.buf, from),
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

/// Makes the calls of one queue; see [`Caller`].
struct FileCaller {
    file: Arc<OwnedFd>,
    mailbox: Arc<Mailbox>,
    /// Gets the queue's io_uring when another thread takes the queue.
    old_uring: mpsc::Receiver<Uring<PendingOp>>,
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
        let finished = |op, file_op, result| self.mailbox.post(Mail::Finished(op, file_op, result));
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
        while self.ops_in_flight > self.waiting_for_lock.len() {
            if let Err(error) = self.uring.enter(true, None) {
                log::error!("{}: cannot wait for I/O ({error}); {} ops are lost", self.shared.name, self.ops_in_flight);
                return;
            }
            self.collect();
        }
    }
}
