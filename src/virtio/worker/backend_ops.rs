//! The ops that a worker gave to its back-end's queue, and those that the queue had no room for.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use super::Setup;
use crate::backend::null;
use crate::backend::{Completion, IoBuf, IoQueue, Op, OpId, Source};
use crate::disk::Event;
use crate::engine::Token;
use crate::virtio::rings::errno_of;

/// How many ops the back-end gets at once, whatever the size of the virtqueue; more wait in the backlog. An io_uring
/// holds 32768.
const MAX_OPS: usize = 4096;

/// The id of the engine's sync. It is no head: those have sixteen bits.
pub(super) const SYNC: OpId = OpId(1 << 16);

/// The id of what the engine submits.
#[inline]
pub(super) fn op_id(token: Token) -> OpId {
    match token {
        Token::Data(head) => OpId(u64::from(head)),
        Token::Sync => SYNC,
    }
}

/// The engine's token for an id of [`op_id`].
#[inline]
pub(super) fn token(id: OpId) -> Token {
    if id == SYNC { Token::Sync } else { Token::Data(id.0 as u16) }
}

/// The back-end's queue and the ops of one worker.
pub(super) struct BackendOps {
    pub(super) io: Box<dyn IoQueue>,
    /// How many ops the back-end took and did not return.
    in_backend: usize,
    /// Ops that the full queue refused, oldest first.
    backlog: VecDeque<(Op, OpId)>,
    /// An empty list whose memory the next [`BackendOps::reap`] reuses.
    completions: Vec<Completion>,
    /// Buffers that new requests reuse.
    pub(super) spare_buffers: Vec<IoBuf>,
}

impl BackendOps {
    /// Opens a queue of the back-end for a virtqueue of `size` descriptors, which watches the worker's notifier and `kick`.
    /// When the back-end cannot open one, reports that, and every request fails.
    pub(super) fn open(setup: &Setup, size: u16, kick: Option<&File>) -> Self {
        // One more than the virtqueue holds: the engine's sync.
        let depth = usize::from(size).min(MAX_OPS) + 1;
        let mut io = setup.rings.backend().open_queue(depth).unwrap_or_else(|error| {
            let what = format!("queue {}: the image cannot be opened for it: {error}; all I/O fails", setup.index);
            setup.rings.report(Event::ProtocolError(what));
            // Without a descriptor even for that the process ends, which the front-end sees.
            null::failing_queue(depth, errno_of(&error)).unwrap_or_else(|error| abort(setup.index, &error))
        });
        watch(&mut *io, setup.index, Source::Wake, setup.wake.as_fd());
        if let Some(kick) = kick {
            watch(&mut *io, setup.index, Source::Kick, kick.as_fd());
        }
        BackendOps { io, in_backend: 0, backlog: VecDeque::new(), completions: Vec::new(), spare_buffers: Vec::new() }
    }

    /// Whether the back-end has ops.
    #[inline]
    pub(super) fn has_ops(&self) -> bool {
        self.in_backend > 0
    }

    /// Whether ops wait because the back-end's queue was full.
    #[inline]
    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Gives an op to the back-end, or appends it to the backlog.
    #[inline]
    pub(super) fn push(&mut self, op: Op, id: OpId) {
        if self.has_backlog() {
            return self.backlog.push_back((op, id));
        }
        match self.io.push(op, id) {
            Ok(()) => self.in_backend += 1,
            Err(op) => self.backlog.push_back((op, id)),
        }
    }

    /// Gives the backlog to the back-end, as far as that has room.
    #[inline]
    pub(super) fn retry_backlog(&mut self) {
        while let Some((op, id)) = self.backlog.pop_front() {
            if let Err(op) = self.io.push(op, id) {
                return self.backlog.push_front((op, id));
            }
            self.in_backend += 1;
        }
    }

    /// What the back-end has finished. The caller returns the list, emptied, with [`BackendOps::recycle`].
    #[inline]
    pub(super) fn reap(&mut self) -> Vec<Completion> {
        let mut completions = std::mem::take(&mut self.completions);
        self.io.reap(&mut completions);
        self.in_backend -= completions.len();
        completions
    }

    /// Keeps the memory of an emptied list of completions for the next [`BackendOps::reap`].
    #[inline]
    pub(super) fn recycle(&mut self, completions: Vec<Completion>) {
        self.completions = completions;
    }
}

fn watch(io: &mut dyn IoQueue, ring: u32, source: Source, fd: BorrowedFd<'_>) {
    io.watch(source, fd).unwrap_or_else(|error| abort(ring, &error));
}

/// Ends the process. Without its wake-ups the ring would hang silently, while the front-end sees that its server is gone.
/// This is a limit and not a bug, so it is no panic.
fn abort(ring: u32, error: &std::io::Error) -> ! {
    log::error!(
        "queue {ring} cannot be watched: {error}; raise the limit of open files (RLIMIT_NOFILE; ulimit -n, or LimitNOFILE= \
         in the systemd unit: ten for each queue), or allow fewer queues (--num-queues). Ended at once so that no guest \
         hangs silently"
    );
    log::logger().flush();
    std::process::abort()
}
