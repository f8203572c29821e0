//! Waits for several descriptors at once, until a deadline or until the caller's operation is cancelled.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::base::wait::wait_until;

/// A descriptor that becomes readable when the operation is cancelled, because a signal arrived or the parent process
/// ended. `None`: the operation must be finished in any case (resume, thaw).
pub type CancelFd<'a> = Option<BorrowedFd<'a>>;

/// Why a wait ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitEnd {
    /// At least one descriptor is readable, or closed at the other end: `true` at its index.
    Ready(Vec<bool>),
    /// The [`CancelFd`] is readable. Other descriptors may be, too.
    Cancelled,
    /// The deadline has passed.
    TimedOut,
}

/// Sleeps until one of `fds` or `cancel` is readable, at most until `deadline`.
pub fn wait(fds: &[BorrowedFd<'_>], cancel: CancelFd<'_>, deadline: Instant) -> io::Result<WaitEnd> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().copied().chain(cancel).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    if !wait_until(&mut polled, Some(deadline))? {
        return Ok(WaitEnd::TimedOut);
    }
    let mut ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
    if cancel.is_some() && ready.pop() == Some(true) {
        return Ok(WaitEnd::Cancelled);
    }
    Ok(WaitEnd::Ready(ready))
}

/// Sleeps for `time`. Returns `false` if `cancel` became readable first.
pub fn pause(time: Duration, cancel: CancelFd<'_>) -> io::Result<bool> {
    Ok(wait(&[], cancel, Instant::now() + time)? != WaitEnd::Cancelled)
}
