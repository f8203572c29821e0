//! An operation on the file: its submission queue entries, and what to do after each completion.

use io_uring::{opcode, squeue, types};

use super::Submission;
use crate::backend::{Errno, IoBuf};

/// The most iovecs in one call (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// How often in a row an operation is retried after EINTR or EAGAIN before it fails with EIO.
const MAX_RETRIES: u32 = 1000;

/// An operation on the file.
pub(in crate::backend) enum FileOp {
    /// A read or a write.
    Transfer(Transfer),
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Fallocate {
        /// FALLOC_FL_*.
        mode: i32,
        /// Byte offset in the file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) enum TransferKind {
    Read,
    Write,
    /// A write that is durable when it completes (RWF_DSYNC).
    DurableWrite,
}

impl TransferKind {
    #[inline]
    pub(in crate::backend) fn is_write(self) -> bool {
        self != TransferKind::Read
    }

    #[inline]
    pub(in crate::backend) fn is_durable(self) -> bool {
        self == TransferKind::DurableWrite
    }
}

/// A read or a write of `len` bytes of `buf`, starting at byte `from` of the buffer and at `offset` of the file.
pub(in crate::backend) struct Transfer {
    pub(in crate::backend) kind: TransferKind,
    pub(in crate::backend) offset: u64,
    pub(in crate::backend) buf: IoBuf,
    pub(in crate::backend) from: usize,
    pub(in crate::backend) len: usize,
}

/// An operation that has not completed.
pub(super) struct ActiveOp<T> {
    pub(super) tag: T,
    pub(super) file_op: FileOp,
    /// Bytes transferred so far.
    done: usize,
    /// Bytes that the last submission asked for.
    asked: usize,
    /// The iovecs of the remaining bytes, when these are not all of the buffer.
    iovecs: Vec<libc::iovec>,
    retries: u32,
}

/// What to do after a completion.
pub(super) enum FollowUp {
    /// Submit the operation, or its remaining part, again.
    Resubmit,
    /// Return the operation to the owner with this result.
    Finish(Result<(), Errno>),
}

impl<T> ActiveOp<T> {
    pub(super) fn new(tag: T, file_op: FileOp) -> Self {
        ActiveOp { tag, file_op, done: 0, asked: 0, iovecs: Vec::new(), retries: 0 }
    }

    /// Decides what to do after a completion. A transfer of no bytes fails, because it would never end: inside the image, a
    /// read that returns 0 means that another process truncated the file.
    pub(super) fn handle_result(&mut self, result: i32) -> FollowUp {
        // A retry ran in a kernel worker, which may block; so EAGAIN means a short write.
        if result == -libc::EAGAIN && self.retries > 0 && self.drop_done() {
            return FollowUp::Finish(Err(Errno(libc::EAGAIN)));
        }
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.retries += 1;
            return if self.retries < MAX_RETRIES {
                FollowUp::Resubmit
            } else {
                FollowUp::Finish(Err(Errno(libc::EIO)))
            };
        }
        if result < 0 {
            return FollowUp::Finish(Err(Errno(-result)));
        }
        let FileOp::Transfer(transfer) = &self.file_op else {
            return FollowUp::Finish(Ok(()));
        };
        let left = transfer.len - self.done;
        match result as usize {
            moved if transfer.kind.is_write() && moved < self.asked => {
                self.drop_done();
                FollowUp::Finish(Err(Errno(libc::EAGAIN)))
            }
            moved if moved == left => FollowUp::Finish(Ok(())),
            moved if moved == 0 || moved > left => FollowUp::Finish(Err(Errno(libc::EIO))),
            moved => {
                self.done += moved;
                self.retries = 0;
                FollowUp::Resubmit
            }
        }
    }

    /// Shortens a transfer by the bytes that are done. Returns whether the operation is a transfer.
    pub(super) fn drop_done(&mut self) -> bool {
        let FileOp::Transfer(transfer) = &mut self.file_op else { return false };
        let done = std::mem::take(&mut self.done);
        transfer.offset += done as u64;
        transfer.from += done;
        transfer.len -= done;
        true
    }

    /// Builds the submission queue entry of what is left of the operation.
    pub(super) fn entry(&mut self, file: types::Fixed, submission: Submission) -> squeue::Entry {
        // A retry runs in a kernel worker, which may sleep; here it would spin.
        let by_worker = self.retries > 0 || submission == Submission::Worker;
        let flags = if by_worker { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = match &self.file_op {
            FileOp::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            FileOp::Fallocate { mode, offset, len } => {
                opcode::Fallocate::new(file, *len).offset(*offset).mode(*mode).build()
            }
            FileOp::Transfer(transfer) => {
                let whole = self.done == 0 && transfer.from == 0 && transfer.len == transfer.buf.len();
                let iovecs = if whole && transfer.buf.iovecs().len() <= MAX_IOVECS {
                    transfer.buf.iovecs()
                } else {
                    self.iovecs.clear();
                    transfer.buf.push_range(transfer.from + self.done, transfer.len - self.done, &mut self.iovecs);
                    // With more iovecs this is a part of the transfer; the next submission continues it.
                    self.iovecs.truncate(MAX_IOVECS);
                    &self.iovecs
                };
                let (entry, asked) = transfer.entry(file, iovecs, transfer.offset + self.done as u64);
                self.asked = asked;
                entry
            }
        };
        entry.flags(flags)
    }
}

impl Transfer {
    /// Builds the submission queue entry that transfers `iovecs` at `offset`. Returns it with the number of bytes that it
    /// asks for.
    fn entry(&self, file: types::Fixed, iovecs: &[libc::iovec], offset: u64) -> (squeue::Entry, usize) {
        let flags = if self.kind.is_durable() { libc::RWF_DSYNC } else { 0 };
        let asked = match iovecs {
            [one] => clamp(one.iov_len) as usize,
            // All of the buffer, whose length is known.
            all if std::ptr::eq(all, self.buf.iovecs()) => self.buf.len(),
            some => some.iter().map(|part| part.iov_len).sum(),
        };
        let entry = match (iovecs, self.kind.is_write()) {
            // With one iovec the kernel need not copy a list. A longer iovec is clamped and continued as a short transfer.
            ([one], true) => {
                opcode::Write::new(file, one.iov_base.cast(), clamp(one.iov_len)).offset(offset).rw_flags(flags).build()
            }
            ([one], false) => opcode::Read::new(file, one.iov_base.cast(), clamp(one.iov_len)).offset(offset).build(),
            (many, true) => {
                opcode::Writev::new(file, many.as_ptr(), many.len() as u32).offset(offset).rw_flags(flags).build()
            }
            (many, false) => opcode::Readv::new(file, many.as_ptr(), many.len() as u32).offset(offset).build(),
        };
        (entry, asked)
    }
}

/// Limits a length to 1 GiB, which is in whole blocks and below what the kernel moves at once (MAX_RW_COUNT).
fn clamp(len: usize) -> u32 {
    len.min(0x4000_0000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_continues_finishes_or_fails_by_its_result() {
        let transfer =
            Transfer { kind: TransferKind::Read, offset: 0, buf: IoBuf::owned(8192, 512, 0), from: 0, len: 8192 };
        let file_op = FileOp::Transfer(transfer);
        let mut active = ActiveOp { tag: (), file_op, done: 0, asked: 0, iovecs: Vec::new(), retries: 0 };
        assert!(matches!(active.handle_result(512), FollowUp::Resubmit));
        assert!(matches!(active.handle_result(-libc::EINTR), FollowUp::Resubmit));
        assert!(
            matches!(active.handle_result(0), FollowUp::Finish(Err(Errno(libc::EIO)))),
            "no byte moved: none ever will"
        );
        assert!(matches!(active.handle_result(-libc::ENOSPC), FollowUp::Finish(Err(Errno(libc::ENOSPC)))));
        assert!(matches!(active.handle_result(8192), FollowUp::Finish(Err(Errno(libc::EIO)))), "more than was asked");
        assert!(matches!(active.handle_result(512), FollowUp::Resubmit));
        assert!(matches!(active.handle_result(-libc::EAGAIN), FollowUp::Resubmit), "a kernel worker may block for it");
        assert!(matches!(active.handle_result(7168), FollowUp::Finish(Ok(()))));
    }

    #[test]
    fn a_short_write_is_returned_from_where_the_last_whole_submission_ended() {
        for result in [0, 512, -libc::EAGAIN] {
            let buf = IoBuf::owned(8192, 512, 0);
            let transfer = Transfer { kind: TransferKind::Write, offset: 4096, buf, from: 0, len: 8192 };
            let file_op = FileOp::Transfer(transfer);
            let mut active = ActiveOp { tag: (), file_op, done: 0, asked: 4096, iovecs: Vec::new(), retries: 0 };
            assert!(
                matches!(active.handle_result(4096), FollowUp::Resubmit),
                "there were more iovecs than one call takes"
            );
            if result < 0 {
                assert!(matches!(active.handle_result(result), FollowUp::Resubmit), "a kernel worker may block");
            }
            assert!(matches!(active.handle_result(result), FollowUp::Finish(Err(Errno(libc::EAGAIN)))));
            let FileOp::Transfer(transfer) = active.file_op else { unreachable!("the file_op is a transfer") };
            assert_eq!((transfer.offset, transfer.from, transfer.len), (8192, 4096, 4096));
        }
    }
}
