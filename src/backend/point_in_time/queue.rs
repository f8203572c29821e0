//! A ring's queue with the copy in front of it: ops that would destroy what is not saved yet wait here.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::copy::Copy;
use super::{Mutant, Shared};
use crate::backend::mailbox::Mailbox;
use crate::backend::{BlockingCall, Caller, Completion, IoQueue, Op, OpId, Source, Wakeups};

/// A delayed op may wait this much longer for each [`EXTRA_DELAY_BYTES`] bytes: a long range needs time to be saved.
const EXTRA_DELAY: Duration = Duration::from_secs(1);
const EXTRA_DELAY_BYTES: u64 = 32 << 20;

/// See [`super::PointInTime`]. Towards the inner queue an op's name says, too, whether it changes the image.
pub(super) struct DelayingQueue {
    inner: Box<dyn IoQueue>,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox<u64>>,
    /// Ops taken and not reaped, and how many may be.
    live: usize,
    depth: usize,
    /// Ops taken that change the image and have not completed. Written by this thread alone.
    changes: Arc<AtomicU64>,
    /// The copy seen last.
    copy: Weak<Copy>,
    copy_number: u64,
    last_ticket: u64,
    delayed: HashMap<u64, Delayed>,
    /// Delayed no more, and the inner queue was full.
    released: VecDeque<(Op, OpId)>,
    /// Completed and not yet reaped by the caller.
    ready: Vec<Completion>,
}

/// The name of an op towards the inner queue.
fn inner_name(id: OpId, changes: bool) -> OpId {
    OpId(id.0 << 1 | u64::from(changes))
}

struct Delayed {
    op: Op,
    /// Towards the inner queue.
    name: OpId,
    deadline: Instant,
}

impl DelayingQueue {
    /// Errors: no file descriptor left.
    pub(super) fn new(mut inner: Box<dyn IoQueue>, depth: usize, shared: Arc<Shared>) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        inner.watch(Source::Copy, mailbox.as_fd())?;
        let changes = Arc::new(AtomicU64::new(0));
        shared.count(&changes);
        Ok(DelayingQueue {
            inner,
            shared,
            mailbox,
            live: 0,
            depth,
            changes,
            copy: Weak::new(),
            copy_number: 0,
            last_ticket: 0,
            delayed: HashMap::new(),
            released: VecDeque::new(),
            ready: Vec::new(),
        })
    }

    /// One op that changes the image more, or less. SeqCst where it matters: see [`Copy::begin`].
    fn count(&self, change: i64) {
        let now = self.changes.load(Ordering::Relaxed).wrapping_add_signed(change);
        self.changes.store(now, if change > 0 { Ordering::SeqCst } else { Ordering::Release });
    }

    /// Whether an op of these bytes waits for the copy; then its ticket is `last_ticket`.
    fn must_wait(&mut self, number: u64, changed: Range<u64>) -> bool {
        if self.copy_number != number {
            let Some(copy) = self.shared.running(number) else { return false };
            (self.copy, self.copy_number) = (Arc::downgrade(&copy), number);
        }
        let Some(copy) = self.copy.upgrade() else { return false };
        self.last_ticket += 1;
        copy.must_wait(changed, self.last_ticket, &self.mailbox)
    }

    fn delay(&mut self, op: Op, name: OpId, len: u64) {
        let timeout = self.shared.tuning.timeout;
        let timeout = match op {
            // Advice: after a while it is well done by not doing it.
            Op::Discard { .. } => timeout / 5,
            _ => timeout + EXTRA_DELAY.mul_f64(len as f64 / EXTRA_DELAY_BYTES as f64),
        };
        self.delayed.insert(self.last_ticket, Delayed { op, name, deadline: Instant::now() + timeout });
    }

    /// Starts the ops whose clusters are saved.
    fn open_mail(&mut self) {
        for ticket in self.mailbox.take() {
            // Not there: it was a discard that waited too long.
            if let Some(Delayed { op, name, .. }) = self.delayed.remove(&ticket) {
                self.released.push_back((op, name));
            }
        }
        while let Some((op, name)) = self.released.pop_front() {
            if let Err(op) = self.inner.push(op, name) {
                self.released.push_front((op, name));
                return;
            }
        }
    }

    /// Nothing of the guest's waits longer than it may: discards are skipped; for anything else the copy is given up.
    fn expire(&mut self) {
        let now = Instant::now();
        let late: Vec<u64> =
            self.delayed.iter().filter(|(_, op)| op.deadline <= now).map(|(&ticket, _)| ticket).collect();
        for ticket in late {
            let copy = self.copy.upgrade();
            if let Op::Discard { offset, len } = self.delayed[&ticket].op {
                log::debug!("a discard of {len} bytes at {offset} is left undone: a copy has not saved them yet");
                if let Some(copy) = copy {
                    copy.forget(ticket, &self.mailbox);
                }
                let Delayed { name, .. } = self.delayed.remove(&ticket).expect("looked at just now");
                let mut done = Completion { id: name, result: Ok(()), buf: None };
                self.finished(&mut done);
                self.ready.push(done);
            } else if let Some(copy) = copy {
                copy.fail(format!(
                    "a write of the guest waited {:?} for old data to be saved, and was let go: the target or the image \
                     is too slow; use a faster target",
                    self.shared.tuning.timeout
                ));
            }
        }
    }

    /// An op is over, and its completion gets the name that the caller knows.
    fn finished(&mut self, completion: &mut Completion) {
        let name = completion.id.0;
        completion.id = OpId(name >> 1);
        if name & 1 != 0 {
            self.count(-1);
        }
        self.live -= 1;
    }

    fn collect(&mut self) {
        let mut out = std::mem::take(&mut self.ready);
        self.reap_into(&mut out);
        self.ready = out;
    }

    fn reap_into(&mut self, out: &mut Vec<Completion>) {
        let first = out.len();
        self.inner.reap(out);
        out[first..].iter_mut().for_each(|completion| self.finished(completion));
    }

    /// `wait` while something is delayed: let it go when it may, and let the caller wait for the rest.
    fn wait_delayed(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.open_mail();
            self.expire();
            self.collect();
            let next = self.delayed.values().map(|op| op.deadline).chain(end).min();
            let left = match next {
                _ if !self.ready.is_empty() => Some(Duration::ZERO),
                next => next.map(|next| next.saturating_duration_since(Instant::now())),
            };
            let wakeups = self.inner.wait(left)?;
            self.open_mail();
            if wakeups.copy {
                self.inner.submit()?;
            }
            self.collect();
            let over = end.is_some_and(|end| end <= Instant::now());
            if wakeups.kick || wakeups.wake || over || !self.ready.is_empty() {
                return Ok(Wakeups { copy: false, ..wakeups });
            }
        }
    }
}

impl IoQueue for DelayingQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        debug_assert!(id.0 < 1 << 63, "the contract");
        if self.live == self.depth {
            return Err(op);
        }
        let changed = match &op {
            Op::Read { .. } | Op::Sync => None,
            Op::Write { offset, buf, .. } => Some(*offset..*offset + buf.len() as u64),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => Some(*offset..*offset + *len),
        };
        let changes = changed.is_some();
        let name = inner_name(id, changes);
        if let Some(changed) = changed {
            // Before the look: a copy that starts now sees this op, or this op sees the copy.
            self.count(1);
            let copy = self.shared.delaying.load(Ordering::SeqCst);
            let forgets = self.shared.tuning.mutant == Some(Mutant::ForgetsRanges) && !matches!(op, Op::Write { .. });
            let len = changed.end - changed.start;
            if copy != 0 && !forgets && self.must_wait(copy, changed) {
                self.live += 1;
                self.delay(op, name, len);
                return Ok(());
            }
        }
        match self.inner.push(op, name) {
            Ok(()) => {
                self.live += 1;
                Ok(())
            }
            Err(op) => {
                if changes {
                    self.count(-1);
                }
                Err(op)
            }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        if !self.delayed.is_empty() || !self.released.is_empty() {
            self.open_mail();
            self.expire();
        }
        self.inner.submit()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.ready);
        self.reap_into(out);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        if source == Source::Copy {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this queue has a copy in front of it already"));
        }
        self.inner.watch(source, fd)
    }

    fn has_news(&mut self) -> bool {
        !self.ready.is_empty() || self.inner.has_news()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        if !self.delayed.is_empty() || !self.released.is_empty() || !self.ready.is_empty() {
            return self.wait_delayed(timeout);
        }
        let wakeups = self.inner.wait(timeout)?;
        Ok(Wakeups { copy: false, ..wakeups })
    }

    fn caller(&mut self) -> Option<Box<dyn Caller>> {
        self.inner.caller()
    }

    fn next_call(&mut self) -> Option<BlockingCall> {
        self.inner.next_call()
    }

    fn call_made(&mut self, call: BlockingCall) {
        self.inner.call_made(call);
    }

    fn change_thread(&mut self) -> io::Result<()> {
        self.inner.change_thread()
    }
}

impl Drop for DelayingQueue {
    /// What was taken is carried out (clause 3), delayed or not; that takes no longer than an op may be delayed.
    fn drop(&mut self) {
        while !self.delayed.is_empty() || !self.released.is_empty() {
            if let Err(error) = self.wait_delayed(Some(Duration::from_secs(1))) {
                log::error!("cannot wait for I/O ({error}); {} ops are lost", self.delayed.len() + self.released.len());
                return;
            }
            self.ready.clear();
        }
    }
}
