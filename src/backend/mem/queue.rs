//! A queue of the RAM disk: it decides when ops are carried out.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{Completion, Errno, IoQueue, Op, OpId, Source, Wakeups};
use super::{CompletionOrder, MemOp, Shared};
use crate::backend::eventfd_poll::{Watches, deadline};
use crate::base::prng::Prng;

/// A queue of a [`MemBackend`](super::MemBackend).
pub(super) struct MemQueue {
    shared: Arc<Shared>,
    watches: Watches,
    prng: Prng,
    depth: usize,
    pending: VecDeque<PendingOp>,
    done: Vec<Completion>,
}

/// An op that is not carried out.
struct PendingOp {
    op: Op,
    id: OpId,
    /// `State::changes` when it was pushed.
    pushed: u64,
    /// `State::crashes` when it was pushed.
    crashes: u64,
}

impl MemQueue {
    pub(super) fn new(shared: Arc<Shared>, watches: Watches, prng: Prng, depth: usize) -> Self {
        MemQueue { shared, watches, prng, depth, pending: VecDeque::new(), done: Vec::new() }
    }

    /// Carries out the ops that may complete now.
    fn advance(&mut self) {
        match self.shared.order {
            CompletionOrder::InOrder => self.carry_out(self.pending.len(), false),
            CompletionOrder::Shuffled(_) => {
                let count = 1 + self.prng.below(self.pending.len() as u64 + 1) as usize;
                self.carry_out(count, true);
            }
            CompletionOrder::OnRequest => {
                // Under one lock: a queue that took all of `released` and returned a part would let another queue find
                // nothing meanwhile, and sleep.
                let mut state = self.shared.lock();
                let count = self.pending.len().min(usize::try_from(state.released).unwrap_or(usize::MAX));
                state.released -= count as u64;
                drop(state);
                self.carry_out(count, false);
            }
        }
    }

    fn carry_out(&mut self, count: usize, shuffled: bool) {
        for _ in 0..count.min(self.pending.len()) {
            let next = if shuffled { self.prng.below(self.pending.len() as u64) as usize } else { 0 };
            let PendingOp { op, id, pushed, crashes } = self.pending.remove(next).expect("`next` is below the length");
            let mut state = self.shared.lock();
            state.waiting -= 1;
            let has_crashed = crashes != state.crashes;
            let result = match &op {
                _ if has_crashed => Err(Errno(libc::EIO)),
                Op::Read { offset, buf } => state.read(*offset, buf),
                Op::Write { offset, buf, durable } => state.write(&self.shared, *offset, buf, *durable),
                Op::Sync => state.sync(&self.shared, pushed),
                Op::Discard { offset, len } => state.fill(&self.shared, MemOp::Discard, *offset, *len),
                Op::WriteZeroes { offset, len, .. } => state.fill(&self.shared, MemOp::WriteZeroes, *offset, *len),
            };
            drop(state);
            let buf = if let Op::Read { buf, .. } | Op::Write { buf, .. } = op { Some(buf) } else { None };
            self.done.push(Completion { id, result, buf });
        }
    }
}

impl IoQueue for MemQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if self.pending.len() + self.done.len() >= self.depth {
            return Err(op);
        }
        let mut state = self.shared.lock();
        state.waiting += 1;
        self.pending.push_back(PendingOp { op, id, pushed: state.changes, crashes: state.crashes });
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.advance();
        out.append(&mut self.done);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watches.watch(source, fd)
    }

    fn has_completions(&mut self) -> bool {
        !self.done.is_empty() || !self.pending.is_empty()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let deadline = deadline(timeout);
        loop {
            self.advance();
            let until = if self.done.is_empty() { deadline } else { Some(Instant::now()) };
            let wakeups = self.watches.sleep(until)?;
            if !self.done.is_empty()
                || wakeups != Wakeups::default()
                || deadline.is_some_and(|deadline| deadline <= Instant::now())
            {
                return Ok(wakeups);
            }
        }
    }
}

impl Drop for MemQueue {
    /// Carries out the ops in flight, as a device would.
    fn drop(&mut self) {
        self.carry_out(self.pending.len(), false);
    }
}
