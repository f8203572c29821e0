//! A queue on which every op fails: what a ring gets when its real queue cannot be opened, so that the guest sees I/O
//! errors instead of a disk that never answers.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Completion, Errno, IoQueue, Op, OpId, Source, Wakeups};

/// Fails every op with one error number.
pub struct FailingQueue {
    errno: Errno,
    failed: Vec<Completion>,
    watched: Vec<(Source, OwnedFd)>,
}

impl FailingQueue {
    /// A queue whose ops all fail with `errno`.
    pub fn new(errno: Errno) -> Self {
        FailingQueue { errno, failed: Vec::new(), watched: Vec::new() }
    }
}

impl IoQueue for FailingQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        let buf = match op {
            Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
            Op::Sync | Op::Discard { .. } | Op::WriteZeroes { .. } => None,
        };
        self.failed.push(Completion { id, result: Err(self.errno), buf });
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.failed);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watched.push((source, fd.try_clone_to_owned()?));
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let timeout = if self.failed.is_empty() { timeout } else { Some(Duration::ZERO) };
        let timeout = timeout.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut fds: Vec<PollFd> = self.watched.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)).collect();
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Wakeups::default()),
            result => result?,
        };
        let mut woken = Wakeups::default();
        for (poll, (source, fd)) in fds.iter().zip(&self.watched) {
            if poll.revents().is_empty() {
                continue;
            }
            match source {
                Source::Kick => woken.kick = true,
                Source::Wake => woken.wake = true,
            }
            // Consumed, or it would wake us for ever; somebody else's read having come first is as good.
            let _ = rustix::io::read(fd, &mut [0u8; 8]);
        }
        Ok(woken)
    }
}
