//! How an op continues: its steps, the results of its file ops, and its end.

use super::super::bounce::{BounceOp, BounceStep};
use super::super::range_op::OpStep;
use super::{FileQueue, OpState, PendingOp};
use crate::backend::uring::{FileOp, Transfer};
use crate::backend::{Errno, IoBuf};
use crate::base::rate_limit::{STORAGE_LOG, log_limited};

impl FileQueue {
    pub(super) fn run(&mut self, op: PendingOp, step: OpStep) {
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
    pub(super) fn start_bounce_ops(&mut self) {
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

    /// Has a helper thread make a discard on a block device.
    fn discard_device(&mut self, mut op: PendingOp, offset: u64, len: u64) {
        if self.start_helpers("a discard") {
            self.helpers.discard(op, offset, len);
        } else {
            op.state = OpState::Single;
            self.finish(op, Err(Errno(libc::ENOMEM)), None);
        }
    }

    /// Has a helper thread make a transfer that the io_uring cannot finish.
    fn transfer_in_helper(&mut self, op: PendingOp, transfer: Transfer) {
        if self.start_helpers("a transfer") {
            self.helpers.transfer(op, transfer);
        } else {
            self.after(op, FileOp::Transfer(transfer), Err(Errno(libc::ENOMEM)));
        }
    }

    /// Starts a helper thread if there is none. Returns whether there is one. `what` is for the log.
    fn start_helpers(&mut self, what: &str) -> bool {
        let started = self.helpers.start(&self.file, &self.mailbox);
        if let Err(error) = &started {
            log_limited!(
                STORAGE_LOG,
                Error,
                "{}: cannot start a thread for {what}: {error}; raise the limit of threads (ulimit -u, TasksMax=)",
                self.image.file.name
            );
        }
        started.is_ok()
    }

    /// Handles a file op that this io_uring, or that of an earlier thread, has completed.
    #[inline]
    pub(super) fn finished(&mut self, op: PendingOp, file_op: FileOp, result: Result<(), Errno>) {
        match (file_op, result) {
            (FileOp::Transfer(transfer), Err(Errno(libc::EAGAIN))) => self.transfer_in_helper(op, transfer),
            (file_op, result) => self.after(op, file_op, result),
        }
    }

    /// Handles the result of a file op: starts the op's next file op, or completes the op.
    pub(super) fn after(&mut self, mut op: PendingOp, file_op: FileOp, result: Result<(), Errno>) {
        match (&mut op.state, file_op) {
            (OpState::Single, FileOp::Transfer(transfer)) => {
                if self.image.limits.direct && result == Err(Errno(libc::EINVAL)) {
                    return self.bounce_instead(op, transfer);
                }
                self.finish(op, result, Some(transfer.buf));
            }
            (OpState::Sync(stamp), _) => {
                let result = self.image.end_sync(*stamp, result);
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
                let step = range_op.after(file_op, result, &self.image, &mut self.pool);
                self.run(op, step);
                self.start_bounce_ops();
            }
        }
    }

    /// Repeats a transfer through bounce memory: the kernel refused a buffer that met the alignment that the file
    /// system reported.
    fn bounce_instead(&mut self, mut op: PendingOp, transfer: Transfer) {
        let Transfer { kind, offset, from, buf, .. } = transfer;
        // The whole transfer again, even if a part succeeded.
        let offset = offset - from as u64;
        let align = self.image.limits.align.offset;
        op.state = OpState::Bounce(Box::new(BounceOp::new(kind, offset, buf, align)));
        self.run(op, OpStep::Copy);
    }

    pub(super) fn finish(&mut self, op: PendingOp, mut result: Result<(), Errno>, buf: Option<IoBuf>) {
        if op.durable {
            result = match result {
                // Over the page cache the data may be lost and its pages marked clean, as after a failed fdatasync.
                Err(_) if !self.image.limits.direct => self.image.record_durability(result),
                Err(errno) => Err(errno),
                Ok(()) => self.image.record_durability(Ok(())),
            };
        }
        let buf = match op.state {
            OpState::Bounce(bounce_op) => Some(bounce_op.into_guest()),
            OpState::Single | OpState::Sync(_) | OpState::Range(_) => buf,
        };
        self.ops_in_flight -= 1;
        self.complete(op.id, op.changes, result, buf);
    }
}
