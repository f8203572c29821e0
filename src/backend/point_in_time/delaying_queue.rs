//! A virtqueue's queue with the copy in front of it: ops that would overwrite unsaved data wait here.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::copy::Copy;
use super::waiters::DelayTicket;
use super::{Mutant, Shared};
use crate::backend::layer::LayerQueue;
use crate::backend::mailbox::Mailbox;
use crate::backend::{Completion, IoQueue, Op, OpId, Source, Wakeups};

/// How much longer a delayed op may wait for each [`EXTRA_DELAY_BYTES`] bytes of it, because a long range needs time to be
/// saved.
const EXTRA_DELAY: Duration = Duration::from_secs(1);

/// The number of bytes for which a delayed op may wait [`EXTRA_DELAY`] longer.
const EXTRA_DELAY_BYTES: u64 = 32 << 20;

/// The queue of a [`super::PointInTime`]. The id under which it passes an op to the inner queue also says whether the op
/// changes the image.
pub(super) struct DelayingQueue {
    inner: Box<dyn IoQueue>,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox<DelayTicket>>,
    /// Ops that were pushed and not reaped.
    unreaped_ops: usize,
    /// The most ops that may be live.
    depth: usize,
    /// Pushed ops that change the image and have not completed. Only this thread writes it.
    changes: Arc<AtomicU64>,
    /// The copy for which an op was last checked.
    copy: Weak<Copy>,
    copy_number: u64,
    /// By ticket: the ops that wait for the copy.
    delayed: HashMap<DelayTicket, DelayedOp>,
    /// The deadlines of these ops, earliest first.
    deadlines: BTreeSet<(Instant, DelayTicket)>,
    /// Ops that no longer wait for the copy, but that the inner queue had no room for.
    released: VecDeque<(Op, OpId)>,
    /// Completions that the caller has not reaped.
    ready: Vec<Completion>,
}

/// The id under which the inner queue gets an op.
fn inner_id(id: OpId, changes: bool) -> OpId {
    OpId(id.0 << 1 | u64::from(changes))
}

/// An op that waits until the copy has saved the clusters that it changes.
struct DelayedOp {
    op: Op,
    inner_id: OpId,
    deadline: Instant,
}

impl DelayingQueue {
    /// Fails when no file descriptor is left.
    pub(super) fn new(mut inner: Box<dyn IoQueue>, depth: usize, shared: Arc<Shared>) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        inner.watch(Source::Copy, mailbox.as_fd())?;
        let changes = Arc::new(AtomicU64::new(0));
        shared.add_change_counter(&changes);
        Ok(DelayingQueue {
            inner,
            shared,
            mailbox,
            unreaped_ops: 0,
            depth,
            changes,
            copy: Weak::new(),
            copy_number: 0,
            delayed: HashMap::new(),
            deadlines: BTreeSet::new(),
            released: VecDeque::new(),
            ready: Vec::new(),
        })
    }

    /// Counts one more (`1`) or one fewer (`-1`) op that changes the image. An increment is SeqCst, which
    /// [`Copy::begin`] needs.
    fn count_change(&self, change: i64) {
        let now = self.changes.load(Ordering::Relaxed).wrapping_add_signed(change);
        self.changes.store(now, if change > 0 { Ordering::SeqCst } else { Ordering::Release });
    }

    /// Checks whether an op that changes these bytes must wait for the copy of this number. `Some`: until this ticket
    /// arrives.
    fn must_wait(&mut self, number: u64, changed: Range<u64>) -> Option<DelayTicket> {
        if self.copy_number != number {
            let copy = self.shared.running(number)?;
            (self.copy, self.copy_number) = (Arc::downgrade(&copy), number);
        }
        self.copy.upgrade()?.must_wait(changed, &self.mailbox)
    }

    fn delay(&mut self, op: Op, inner_id: OpId, len: u64, ticket: DelayTicket) {
        let timeout = self.shared.tuning.timeout;
        let timeout = match op {
            // A discard is only advice: it may be skipped, so it need not wait as long.
            Op::Discard { .. } => timeout / 5,
            _ => timeout + EXTRA_DELAY.mul_f64(len as f64 / EXTRA_DELAY_BYTES as f64),
        };
        let deadline = Instant::now() + timeout;
        self.delayed.insert(ticket, DelayedOp { op, inner_id, deadline });
        self.deadlines.insert((deadline, ticket));
    }

    /// Takes a delayed op; `None`: it no longer waits.
    fn take_delayed(&mut self, ticket: DelayTicket) -> Option<DelayedOp> {
        let delayed = self.delayed.remove(&ticket)?;
        self.deadlines.remove(&(delayed.deadline, ticket));
        Some(delayed)
    }

    /// Passes the ops whose clusters are saved to the inner queue.
    fn start_released(&mut self) {
        for ticket in self.mailbox.take() {
            // A ticket without an op is of a discard that waited too long and was skipped.
            if let Some(DelayedOp { op, inner_id, .. }) = self.take_delayed(ticket) {
                self.released.push_back((op, inner_id));
            }
        }
        while let Some((op, inner_id)) = self.released.pop_front() {
            if let Err(op) = self.inner.push(op, inner_id) {
                self.released.push_front((op, inner_id));
                return;
            }
        }
    }

    /// Ends the waits whose deadline has passed: a discard is skipped; for any other op the copy fails, which releases it.
    fn expire_delays(&mut self) {
        let now = Instant::now();
        let late: Vec<DelayTicket> =
            self.deadlines.iter().take_while(|(deadline, _)| *deadline <= now).map(|&(_, ticket)| ticket).collect();
        for ticket in late {
            let copy = self.copy.upgrade();
            if let Op::Discard { offset, len } = self.delayed[&ticket].op {
                log::debug!("a discard of {len} bytes at {offset} is skipped: a copy has not saved them in time");
                if let Some(copy) = copy {
                    copy.forget(ticket);
                }
                let DelayedOp { inner_id, .. } = self.take_delayed(ticket).expect("found just now");
                let mut done = Completion { id: inner_id, result: Ok(()), buf: None };
                self.finish_op(&mut done);
                self.ready.push(done);
            } else if let Some(copy) = copy {
                copy.fail(format!(
                    "a write of the guest waited {:?} for old data to be saved and then went ahead: the target or the \
                     image is too slow; use a faster target",
                    self.shared.tuning.timeout
                ));
            }
        }
    }

    /// Counts an op as done and gives its completion the id that the caller knows.
    fn finish_op(&mut self, completion: &mut Completion) {
        let inner_id = completion.id.0;
        completion.id = OpId(inner_id >> 1);
        if inner_id & 1 != 0 {
            self.count_change(-1);
        }
        self.unreaped_ops -= 1;
    }

    /// Reaps the inner queue into `ready`.
    fn collect(&mut self) {
        let mut out = std::mem::take(&mut self.ready);
        self.reap_into(&mut out);
        self.ready = out;
    }

    fn reap_into(&mut self, out: &mut Vec<Completion>) {
        let first = out.len();
        self.inner.reap(out);
        out[first..].iter_mut().for_each(|completion| self.finish_op(completion));
    }

    /// [`IoQueue::wait`] while ops are delayed: starts those that are released, and returns when there is something for
    /// the caller.
    fn wait_delayed(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.start_released();
            self.expire_delays();
            self.collect();
            let next = self.deadlines.first().map(|&(deadline, _)| deadline).into_iter().chain(end).min();
            let left = match next {
                _ if !self.ready.is_empty() => Some(Duration::ZERO),
                next => next.map(|next| next.saturating_duration_since(Instant::now())),
            };
            let wakeups = self.inner.wait(left)?;
            self.start_released();
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

impl LayerQueue for DelayingQueue {
    fn inner(&mut self) -> &mut dyn IoQueue {
        &mut *self.inner
    }

    fn layer_push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        debug_assert!(id.0 < 1 << 63, "the contract of OpId");
        if self.unreaped_ops == self.depth {
            return Err(op);
        }
        let changed = match &op {
            Op::Read { .. } | Op::Sync => None,
            Op::Write { offset, buf, .. } => Some(*offset..*offset + buf.len() as u64),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => Some(*offset..*offset + *len),
        };
        let changes = changed.is_some();
        let inner_id = inner_id(id, changes);
        if let Some(changed) = changed {
            // Before `delaying` is loaded: either a copy that starts now sees this op, or this op sees the copy.
            self.count_change(1);
            let copy = self.shared.delaying.load(Ordering::SeqCst);
            let forgets = self.shared.tuning.mutant == Some(Mutant::ForgetsRanges) && !matches!(op, Op::Write { .. });
            let len = changed.end - changed.start;
            if copy != 0
                && !forgets
                && let Some(ticket) = self.must_wait(copy, changed)
            {
                self.unreaped_ops += 1;
                self.delay(op, inner_id, len, ticket);
                return Ok(());
            }
        }
        match self.inner.push(op, inner_id) {
            Ok(()) => {
                self.unreaped_ops += 1;
                Ok(())
            }
            Err(op) => {
                if changes {
                    self.count_change(-1);
                }
                Err(op)
            }
        }
    }

    fn layer_submit(&mut self) -> io::Result<()> {
        if !self.delayed.is_empty() || !self.released.is_empty() {
            self.start_released();
            self.expire_delays();
        }
        self.inner.submit()
    }

    fn layer_reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.ready);
        self.reap_into(out);
    }

    fn layer_watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        if source == Source::Copy {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this queue already has a copy in front of it"));
        }
        self.inner.watch(source, fd)
    }

    fn layer_has_completions(&mut self) -> bool {
        !self.ready.is_empty() || self.inner.has_completions()
    }

    fn layer_wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        if !self.delayed.is_empty() || !self.released.is_empty() || !self.ready.is_empty() {
            return self.wait_delayed(timeout);
        }
        let wakeups = self.inner.wait(timeout)?;
        Ok(Wakeups { copy: false, ..wakeups })
    }
}

impl Drop for DelayingQueue {
    /// Carries out every pushed op, delayed or not (clause 3). That takes no longer than an op may be delayed.
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
