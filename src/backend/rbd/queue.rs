//! A virtqueue's queue of the image: it checks bounds, passes on ops and completions, and records what an error means for
//! the whole image.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{Completion, Errno, IoQueue, Op, OpId, Source, Wakeups};
use super::Shared;
use super::aio::{self, CompletionInbox};
use crate::backend::eventfd_poll::{Watches, deadline};
use crate::base::rate_limit::{STORAGE_LOG, log_limited};

/// How long a queue that is dropped waits before it logs for what.
const LOG_DELAY: Duration = Duration::from_secs(5);

/// A queue of an RBD image. librbd gets an op as soon as it is pushed; its completion comes through the inbox.
pub(super) struct RbdQueue {
    shared: Arc<Shared>,
    inbox: Arc<CompletionInbox>,
    watches: Watches,
    depth: usize,
    /// Ops that were pushed and not reaped.
    in_flight: usize,
    /// Completions of ops that failed before librbd got them.
    refused: Vec<Completion>,
    /// An op that changes the image was pushed to this queue.
    changes: bool,
    /// The syncs that librbd has. Their results matter for the whole image.
    syncs: Vec<OpId>,
}

impl RbdQueue {
    pub(super) fn open(shared: Arc<Shared>, depth: usize) -> io::Result<Self> {
        let watches = Watches::new()?;
        let inbox = CompletionInbox::new(watches.own());
        Ok(RbdQueue {
            shared,
            inbox,
            watches,
            depth,
            in_flight: 0,
            refused: Vec::new(),
            changes: false,
            syncs: Vec::new(),
        })
    }

    fn has_finished(&self) -> bool {
        !self.refused.is_empty() || !self.inbox.is_empty()
    }
}

/// The offset and length of an op; `None` for a sync.
fn range(op: &Op) -> Option<(u64, u64)> {
    match op {
        Op::Read { offset, buf } | Op::Write { offset, buf, .. } => Some((*offset, buf.len() as u64)),
        Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => Some((*offset, *len)),
        Op::Sync => None,
    }
}

impl IoQueue for RbdQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if self.in_flight >= self.depth {
            return Err(op);
        }
        self.in_flight += 1;
        let is_sync = matches!(op, Op::Sync);
        let changes = !matches!(op, Op::Sync | Op::Read { .. });
        let checked = match range(&op) {
            // librbd truncates a write at the image's end and reports success.
            Some((offset, len)) => self.shared.check_range(offset, len),
            None => self.shared.check_sync(),
        };
        if let Err(errno) = checked.and_then(|()| self.shared.health.check(changes)) {
            let buf = if let Op::Read { buf, .. } | Op::Write { buf, .. } = op { Some(buf) } else { None };
            self.refused.push(Completion { id, result: Err(errno), buf });
            return Ok(());
        }
        if is_sync {
            self.shared.mark_flushed();
            self.syncs.push(id);
        } else if changes {
            self.changes = true;
        }
        if let Err(completion) = aio::start(&self.shared.image, &self.inbox, op, id, !self.shared.zeroes_may_unmap) {
            self.refused.push(completion);
        }
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let first = out.len();
        out.append(&mut self.refused);
        self.inbox.take(out);
        self.in_flight -= out.len() - first;
        // Before the caller sees the completions, and not when the ops were pushed: a sync that started in between would
        // have reset the flag without covering them.
        if self.changes && out.len() > first {
            self.shared.mark_changed();
        }
        for completion in &mut out[first..] {
            if let Some(at) = self.syncs.iter().position(|id| *id == completion.id) {
                self.syncs.swap_remove(at);
                completion.result = self.shared.record_sync(completion.result);
            }
            self.shared.record_result(completion.result);
        }
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watches.watch(source, fd)
    }

    fn has_completions(&mut self) -> bool {
        self.has_finished()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let deadline = deadline(timeout);
        loop {
            // If there is something to reap, only check the other sources without waiting.
            let until = if self.has_finished() { Some(Instant::now()) } else { deadline };
            let wakeups = self.watches.sleep(until)?;
            if self.has_finished()
                || wakeups != Wakeups::default()
                || deadline.is_some_and(|deadline| deadline <= Instant::now())
            {
                return Ok(wakeups);
            }
        }
    }
}

impl Drop for RbdQueue {
    /// Waits for the ops in flight, as long as that takes, because librbd uses their memory.
    fn drop(&mut self) {
        let start = Instant::now();
        let mut logged = false;
        let mut finished = Vec::new();
        while self.in_flight > 0 {
            if !logged && start.elapsed() > LOG_DELAY {
                logged = true;
                log_limited!(
                    STORAGE_LOG,
                    Warn,
                    "{}: waiting for {} operations that the cluster still has",
                    self.shared.name,
                    self.in_flight
                );
            }
            if let Err(error) = self.wait(Some(LOG_DELAY)) {
                log_limited!(
                    STORAGE_LOG,
                    Error,
                    "{}: cannot wait for the cluster ({error}): trying again",
                    self.shared.name
                );
                std::thread::sleep(Duration::from_millis(100));
            }
            self.reap(&mut finished);
            finished.clear();
        }
    }
}

/// librbd's error for the operations of a blocklisted client.
pub(super) const FENCED: Errno = Errno(libc::ESHUTDOWN);

/// librbd's error for a write of a client while another client has the lock.
pub(super) const LOCKED_OUT: Errno = Errno(libc::EROFS);
