//! A ring's way to the image: bounds, completions, and what their errors mean for the whole image.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{Completion, Errno, IoQueue, Op, OpId, Source, Wakeups};
use super::Shared;
use super::aio::{self, Inbox};
use crate::backend::eventfd_poll::{Watches, deadline};
use crate::base::rate_limit::{STORAGE_LOG, log_limited};

/// How long a queue that is dropped waits before it says for what.
const SILENT_WAIT: Duration = Duration::from_secs(5);

/// A queue of an RBD image. Ops go to librbd as they are pushed, and come back through the inbox.
pub(super) struct RbdQueue {
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    watches: Watches,
    depth: usize,
    /// Pushed and not reaped.
    in_flight: usize,
    /// Failed before librbd had them.
    refused: Vec<Completion>,
    /// Anything that changes the image was ever pushed.
    changes: bool,
    /// Syncs that librbd has. Their results count for the whole image.
    syncs: Vec<OpId>,
}

impl RbdQueue {
    pub(super) fn open(shared: Arc<Shared>, depth: usize) -> io::Result<Self> {
        let watches = Watches::new()?;
        let inbox = Inbox::new(watches.own());
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

/// Bytes that an op touches; `None`: none in particular.
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
        let verdict = match range(&op) {
            // librbd cuts a write off at the image's end and calls that a success.
            Some((offset, len)) => self.shared.check_range(offset, len),
            None => self.shared.check_sync(),
        };
        if let Err(errno) = verdict.and_then(|()| self.shared.trouble.check(changes)) {
            let buf = if let Op::Read { buf, .. } | Op::Write { buf, .. } = op { Some(buf) } else { None };
            self.refused.push(Completion { id, result: Err(errno), buf });
            return Ok(());
        }
        if is_sync {
            self.shared.flushes();
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
        // Before the caller may call them written, and not when they were pushed: a sync that began in between would
        // have reset the mark without covering them.
        if self.changes && out.len() > first {
            self.shared.changed();
        }
        for completion in &mut out[first..] {
            if let Some(at) = self.syncs.iter().position(|id| *id == completion.id) {
                self.syncs.swap_remove(at);
                completion.result = self.shared.judge_sync(completion.result);
            }
            self.shared.heed(completion.result);
        }
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watches.watch(source, fd)
    }

    fn has_news(&mut self) -> bool {
        self.has_finished()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let deadline = deadline(timeout);
        loop {
            // With something to reap it only looks what else there is.
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
    /// Waits for what is in flight, as long as that takes: the cluster has its memory.
    fn drop(&mut self) {
        let start = Instant::now();
        let mut said = false;
        let mut finished = Vec::new();
        while self.in_flight > 0 {
            if !said && start.elapsed() > SILENT_WAIT {
                said = true;
                log_limited!(
                    STORAGE_LOG,
                    Warn,
                    "{}: waiting for {} operations that the cluster still has",
                    self.shared.name,
                    self.in_flight
                );
            }
            if let Err(error) = self.wait(Some(SILENT_WAIT)) {
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

/// What librbd says of a blocklisted client's operations.
pub(super) const FENCED: Errno = Errno(libc::ESHUTDOWN);
/// What it says of one that another client keeps from writing.
pub(super) const LOCKED_OUT: Errno = Errno(libc::EROFS);
