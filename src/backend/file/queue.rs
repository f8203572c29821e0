//! One ring's way to the image: ops in, completions out, over one [`Uring`].

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
use super::helper_thread::Helper;
use super::immediate::{Immediate, Outcome};
use super::mailbox::{Mail, Mailbox};
use super::range_locks::{QueueLocks, Ticket};
use super::range_op::{RangeOp, Step};
use crate::backend::bounce_pool::Pool;
use crate::backend::preadv;
use crate::base::rate_limit::{STORAGE_LOG, log_limited};

const KICK: u32 = 0;
const WAKE: u32 = 1;
const COPY: u32 = 2;
const MAIL: u32 = 3;

/// A queue of a [`super::FileBackend`]. `submit` and `wait` enter the kernel, which then shows what has finished; `reap`
/// makes no system call. Who polls instead of sleeping calls `submit` between two reaps. The order of the fields
/// matters: the ring goes first and waits for what is in flight, then the helper, and the file last.
pub(super) struct FileQueue {
    ring: Uring<Job>,
    /// To the thread that has the ring's caller: the ring, should another thread go on.
    leave: Option<mpsc::Sender<Uring<Job>>>,
    /// Writes that wait to be made by plain calls.
    calls: VecDeque<BlockingCall>,
    helper: Option<Helper>,
    /// With an open file description of its own, which remembers writeback errors for this queue.
    file: Arc<OwnedFd>,
    immediate: Immediate,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    /// Where the medium's blocks are larger than the guest's.
    locks: Option<Arc<QueueLocks>>,
    pool: Pool,
    /// Ops taken and not yet in `ready`.
    live: usize,
    depth: usize,
    /// Ops that wait for a range lock, by ticket, and how they begin.
    parked: HashMap<u64, (Job, Step)>,
    /// Ops that wait for memory, oldest first. They have their range lock already, and whoever has memory waits for the
    /// medium only, so none of them waits for another.
    hungry: VecDeque<Job>,
    /// Ops that the helper thread works on.
    helped: HashMap<u64, Job>,
    last_key: u64,
    ready: Vec<Completion>,
    wakeups: Wakeups,
}

/// An op on its way.
pub(super) struct Job {
    id: OpId,
    durable: bool,
    /// Whether there is something to sync afterwards.
    changes: bool,
    work: Work,
    /// Held until the op is over, however it ends.
    _ticket: Option<Ticket>,
}

enum Work {
    /// One command is all of it.
    Whole,
    /// A sync, and what it covers.
    Sync(ChangeStamp),
    BounceOp(Box<BounceOp>),
    RangeOp(Box<RangeOp>),
}

impl FileQueue {
    pub(super) fn open(shared: Arc<Shared>, file: OwnedFd, depth: usize) -> io::Result<Self> {
        let mut ring = Uring::new(depth, file.as_fd(), shared.submission)?;
        let mailbox = Arc::new(Mailbox::new()?);
        ring.watch(MAIL, mailbox.as_fd())?;
        let locks = shared.ranges.as_ref().map(|ranges| QueueLocks::new(Arc::clone(ranges), Arc::clone(&mailbox)));
        Ok(FileQueue {
            ring,
            leave: None,
            calls: VecDeque::new(),
            helper: None,
            file: Arc::new(file),
            immediate: Immediate::new(shared.medium),
            pool: Pool::new(shared.memory.clone(), shared.align.memory as usize),
            shared,
            mailbox,
            locks,
            live: 0,
            depth,
            parked: HashMap::new(),
            hungry: VecDeque::new(),
            helped: HashMap::new(),
            last_key: 0,
            ready: Vec::with_capacity(depth),
            wakeups: Wakeups::default(),
        })
    }

    /// A read that may need no ring: ready when this returns, or what is left of it is live.
    #[inline]
    fn read_at_once(&mut self, id: OpId, offset: u64, buf: IoBuf) {
        match self.immediate.read(self.file.as_fd(), &buf, offset) {
            Outcome::Over(result) => self.hand_back(id, false, result, Some(buf)),
            Outcome::Moved(from) => {
                self.live += 1;
                self.start_rest(id, false, offset, buf, from);
            }
            Outcome::Again => unreachable!("a read is tried once"),
        }
    }

    /// A write that may need no ring: live until its call was made.
    #[inline]
    fn write_at_once(&mut self, id: OpId, offset: u64, buf: IoBuf) {
        self.immediate.reserve(&buf);
        self.live += 1;
        self.calls.push_back(BlockingCall::new(id, offset, buf));
        if self.leave.is_none() {
            self.make_calls();
        }
    }

    /// Makes the calls here: the owner does not.
    fn make_calls(&mut self) {
        let mut scratch = Vec::new();
        while let Some(mut call) = self.next_call() {
            make(self.file.as_fd(), &mut call, &mut scratch);
            self.call_made(call);
        }
    }

    /// The rest of a transfer of which so many bytes were moved takes the ring.
    fn start_rest(&mut self, id: OpId, write: bool, offset: u64, buf: IoBuf, from: usize) {
        let len = buf.len() - from;
        let rest = Transfer { write, durable: false, offset: offset + from as u64, buf, from, len };
        let job = Job { id, durable: false, changes: write, work: Work::Whole, _ticket: None };
        self.ring.start(Command::Transfer(rest), job);
    }

    /// What waits to be made takes the ring: the owner is about to sleep.
    fn start_calls(&mut self) {
        while let Some(BlockingCall { id, offset, buf, .. }) = self.calls.pop_front() {
            self.start_rest(id, true, offset, buf, 0);
        }
    }

    /// How the op begins, and what is left of it afterwards.
    fn plan(&self, op: Op) -> (bool, Work, Step) {
        match op {
            Op::Read { offset, buf } => self.plan_transfer((false, false), offset, buf),
            Op::Write { offset, buf, durable } => self.plan_transfer((true, durable), offset, buf),
            Op::Sync => match self.shared.unsynced.begin() {
                Some(upto) => match self.immediate.sync(self.file.as_fd()) {
                    None => (false, Work::Sync(upto), Step::Run(Command::Sync)),
                    Some(result) => (false, Work::Whole, Step::Done(self.synced(upto, result))),
                },
                None => (false, Work::Whole, Step::Done(self.shared.latch.judge(Ok(()), &self.shared.name))),
            },
            Op::Discard { offset, len } => self.plan_ranged(RangeOp::discard(offset, len, &self.shared)),
            Op::WriteZeroes { offset, len, unmap } => {
                self.plan_ranged(RangeOp::zeroes(offset, len, unmap, &self.shared))
            }
        }
    }

    fn plan_transfer(&self, (write, durable): (bool, bool), offset: u64, buf: IoBuf) -> (bool, Work, Step) {
        let align = self.shared.align;
        // An aligned list of parts may still add up to less than a block of the medium, or start inside one.
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

    /// Locks the blocks of an op that changes the image, where blocks of the medium are larger than the guest's. False: the
    /// op must wait until it is granted.
    fn lock(&self, op: &Op) -> Option<(Ticket, bool)> {
        let locks = self.locks.as_ref()?;
        Some(match op {
            Op::Read { .. } | Op::Sync => return None,
            Op::Write { offset, buf, .. } => locks.lock_written(*offset..*offset + buf.len() as u64),
            Op::WriteZeroes { offset, len, .. } => locks.lock_written(*offset..*offset + *len),
            // Of blocks that the guest discards in part nothing is discarded.
            Op::Discard { offset, len } => locks.lock_inside(*offset..*offset + *len),
        })
    }

    fn run(&mut self, job: Job, step: Step) {
        match step {
            Step::Run(command) => self.ring.start(command, job),
            Step::Copy => {
                self.hungry.push_back(job);
                self.feed();
            }
            Step::DiscardDevice { offset, len } => self.discard_device(job, offset, len),
            Step::Done(result) => self.finish(job, result, None),
        }
    }

    /// Begins the copied transfers that there is memory for.
    fn feed(&mut self) {
        while let Some(job) = self.hungry.front_mut() {
            let begun = match &mut job.work {
                Work::BounceOp(copied) => copied.begin(&mut self.pool),
                Work::RangeOp(ranged) => ranged.begin(&mut self.pool),
                Work::Whole | Work::Sync(_) => unreachable!("it needs no memory"),
            };
            let Some(command) = begun else { return };
            let job = self.hungry.pop_front().expect("looked at just now");
            self.ring.start(command, job);
        }
    }

    fn discard_device(&mut self, mut job: Job, offset: u64, len: u64) {
        if self.start_helper("a discard") {
            let key = self.help(job);
            self.helper.as_mut().expect("started just now").discard(key, offset, len);
        } else {
            job.work = Work::Whole;
            self.finish(job, Err(Errno(libc::ENOMEM)), None);
        }
    }

    /// The ring does not get a transfer done.
    fn by_plain_calls(&mut self, job: Job, transfer: Transfer) {
        if self.start_helper("a transfer") {
            let key = self.help(job);
            self.helper.as_mut().expect("started just now").transfer(key, transfer);
        } else {
            self.after(job, Command::Transfer(transfer), Err(Errno(libc::ENOMEM)));
        }
    }

    /// Whether there is a helper thread.
    fn start_helper(&mut self, what: &str) -> bool {
        if self.helper.is_none() {
            match Helper::start(Arc::clone(&self.file), Arc::clone(&self.mailbox)) {
                Ok(helper) => self.helper = Some(helper),
                Err(error) => log_limited!(
                    STORAGE_LOG,
                    Error,
                    "{}: no thread for {what}: {error}; raise the limit",
                    self.shared.name
                ),
            }
        }
        self.helper.is_some()
    }

    /// Keeps a job while the helper thread works on it, under the key returned.
    fn help(&mut self, job: Job) -> u64 {
        self.last_key += 1;
        self.helped.insert(self.last_key, job);
        self.last_key
    }

    /// A command came out of the ring, or out of the one of a thread before.
    fn finished(&mut self, job: Job, command: Command, result: Result<(), Errno>) {
        match (command, result) {
            (Command::Transfer(transfer), Err(Errno(libc::EAGAIN))) => self.by_plain_calls(job, transfer),
            (command, result) => self.after(job, command, result),
        }
    }

    /// A command is over: the op goes on, or is over.
    fn after(&mut self, mut job: Job, command: Command, result: Result<(), Errno>) {
        match (&mut job.work, command) {
            (Work::Whole, Command::Transfer(transfer)) => {
                if self.shared.direct && result == Err(Errno(libc::EINVAL)) {
                    return self.bounce_after_all(job, transfer);
                }
                self.finish(job, result, Some(transfer.buf));
            }
            (Work::Sync(upto), _) => {
                let result = self.synced(*upto, result);
                self.finish(job, result, None);
            }
            (Work::Whole, _) => unreachable!("a range has its own work, and so has a sync"),
            (Work::BounceOp(copied), Command::Transfer(transfer)) => {
                match copied.after(result, transfer.buf, &mut self.pool) {
                    Next::Run(command) => self.ring.start(command, job),
                    Next::Done(result) => self.finish(job, result, None),
                }
                self.feed();
            }
            (Work::BounceOp(_), _) => unreachable!("a copied transfer runs transfers only"),
            (Work::RangeOp(ranged), command) => {
                let step = ranged.after(command, result, &self.shared, &mut self.pool);
                self.run(job, step);
                self.feed();
            }
        }
    }

    /// What a sync that began with `upto` is worth.
    fn synced(&self, upto: ChangeStamp, result: Result<(), Errno>) -> Result<(), Errno> {
        if result.is_ok() {
            self.shared.unsynced.synced(upto);
        }
        self.shared.latch.judge(result, &self.shared.name)
    }

    /// The kernel refused a buffer that looked aligned: a filesystem that asks for more than it tells.
    fn bounce_after_all(&mut self, mut job: Job, transfer: Transfer) {
        let Transfer { write, durable, offset, from, buf, .. } = transfer;
        // All of it again, if some was moved.
        let offset = offset - from as u64;
        let align = self.shared.align.offset;
        job.work = Work::BounceOp(Box::new(BounceOp::new((write, durable), offset, buf, align)));
        self.run(job, Step::Copy);
    }

    fn finish(&mut self, job: Job, mut result: Result<(), Errno>, buf: Option<IoBuf>) {
        if job.durable {
            result = match result {
                // Over the page cache the data may be lost and its pages marked clean, as after a failed fdatasync.
                Err(_) if !self.shared.direct => self.shared.latch.judge(result, &self.shared.name),
                Err(errno) => Err(errno),
                Ok(()) => self.shared.latch.judge(Ok(()), &self.shared.name),
            };
        }
        let buf = match job.work {
            Work::BounceOp(copied) => Some(copied.into_guest()),
            Work::Whole | Work::Sync(_) | Work::RangeOp(_) => buf,
        };
        self.live -= 1;
        self.hand_back(job.id, job.changes, result, buf);
    }

    /// An op is over.
    #[inline]
    fn hand_back(&mut self, id: OpId, changes: bool, result: Result<(), Errno>, buf: Option<IoBuf>) {
        if changes {
            // Also what failed: some of it may have been stored.
            self.shared.unsynced.changed();
        }
        self.ready.push(Completion { id, result, buf });
    }

    /// Works off what the ring has, without a system call.
    fn collect(&mut self) {
        while let Some(event) = self.ring.next_event() {
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
                    // Not there: the queue is being dropped, or it was granted in `push`.
                    if let Some((job, step)) = self.parked.remove(&ticket) {
                        self.run(job, step);
                    }
                }
                Mail::Discarded(key, result) => {
                    let mut job = self.helped.remove(&key).expect("the helper answers each task once");
                    let result = result.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)));
                    let Work::RangeOp(ranged) = &mut job.work else { unreachable!("only a range is helped") };
                    let step = ranged.discarded(result, &self.shared);
                    self.run(job, step);
                }
                Mail::Returned(call) => {
                    self.immediate.is_back();
                    self.call_made(call);
                }
                Mail::Finished(job, command, result) => self.finished(job, command, result),
                Mail::Transferred(key, transfer, result) => {
                    let job = self.helped.remove(&key).expect("the helper answers each task once");
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
        // An op counts until it was reaped: what was finished on the spot must not pile up either.
        if self.live + self.ready.len() >= self.depth {
            return Err(op);
        }
        let op = match op {
            Op::Read { offset, buf } if self.immediate.suits(&buf) => {
                self.read_at_once(id, offset, buf);
                return Ok(());
            }
            Op::Write { offset, buf, durable: false }
                if !self.shared.geometry.read_only && self.immediate.suits_write(&buf) =>
            {
                self.write_at_once(id, offset, buf);
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
                self.parked.insert(key, (Job { id, durable, changes, work, _ticket: Some(ticket) }, step));
            }
        }
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        self.start_calls();
        if self.ring.wants_enter() {
            self.ring.enter(false, None)?;
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.collect();
        self.immediate.reaped();
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
        self.ring.watch(token, fd)
    }

    fn has_news(&mut self) -> bool {
        // What fails here fails in `wait`, too, which says so.
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
            self.ring.enter(true, left)?;
            self.collect();
            if left == Some(Duration::ZERO) {
                return Ok(std::mem::take(&mut self.wakeups));
            }
        }
    }

    fn caller(&mut self) -> Option<Box<dyn Caller>> {
        let (leave, left) = mpsc::channel();
        self.leave = Some(leave);
        let (file, mailbox) = (Arc::clone(&self.file), Arc::clone(&self.mailbox));
        Some(Box::new(FileCaller { file, mailbox, left, scratch: IovecList::default() }))
    }

    #[inline]
    fn next_call(&mut self) -> Option<BlockingCall> {
        while let Some(mut call) = self.calls.pop_front() {
            if self.immediate.admits(&mut call) {
                return Some(call);
            }
            self.start_rest(call.id, true, call.offset, call.buf, 0);
        }
        None
    }

    #[inline]
    fn call_made(&mut self, call: BlockingCall) {
        match self.immediate.made(&call) {
            Outcome::Over(result) => {
                self.live -= 1;
                self.hand_back(call.id, true, result, Some(call.buf));
            }
            Outcome::Moved(from) => self.start_rest(call.id, true, call.offset, call.buf, from),
            Outcome::Again => self.calls.push_front(call),
        }
    }

    fn change_thread(&mut self) -> io::Result<()> {
        let ring = self.ring.successor(self.file.as_fd())?;
        let mut left = std::mem::replace(&mut self.ring, ring);
        for (command, job) in left.take_queued() {
            self.ring.start(command, job);
        }
        self.immediate.is_stuck();
        let leave = self.leave.take().expect("the thread before has the caller, and is in one of its calls");
        // It waits for nothing else once its call has returned.
        assert!(leave.send(left).is_ok(), "the caller ends only after it has the ring");
        Ok(())
    }
}

/// See [`Caller`].
struct FileCaller {
    file: Arc<OwnedFd>,
    mailbox: Arc<Mailbox>,
    left: mpsc::Receiver<Uring<Job>>,
    scratch: IovecList,
}

impl Caller for FileCaller {
    fn make(&mut self, call: &mut BlockingCall) {
        make(self.file.as_fd(), call, &mut self.scratch.0);
    }

    fn leave(self: Box<Self>, call: BlockingCall) {
        self.mailbox.post(Mail::Returned(call));
        // Gone without a ring: so is the queue.
        let Ok(mut ring) = self.left.recv() else { return };
        let over = |job, command, result| self.mailbox.post(Mail::Finished(job, command, result));
        if let Err(error) = ring.finish(over) {
            log::error!("cannot wait for I/O in flight: {error}; requests stay unanswered");
        }
    }
}

fn make(file: BorrowedFd<'_>, call: &mut BlockingCall, scratch: &mut Vec<libc::iovec>) {
    call.result = preadv::transfer(file, true, &call.buf, 0..call.buf.len(), call.offset, call.flags, scratch);
    if call.began.is_some() {
        call.ended = Some(Instant::now());
    }
}

impl Drop for FileQueue {
    /// What was taken is carried out (clause 3), in all its parts; except what waits for a range that another queue has,
    /// which may be this thread's own and then never lets go.
    fn drop(&mut self) {
        self.start_calls();
        while self.live > self.parked.len() {
            if let Err(error) = self.ring.enter(true, None) {
                log::error!("{}: cannot wait for I/O ({error}); {} ops are lost", self.shared.name, self.live);
                return;
            }
            self.collect();
        }
    }
}
