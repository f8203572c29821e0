//! Waits for several descriptors at once, until a deadline or until the caller's operation is cancelled.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// A descriptor that becomes readable when the operation is cancelled, because a signal arrived or the parent process
/// ended. `None`: the operation must be finished in any case (resume, thaw).
pub type Stop<'a> = Option<BorrowedFd<'a>>;

/// Why a wait ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wake {
    /// At least one descriptor is readable, or closed at the other end: `true` at its index.
    Ready(Vec<bool>),
    /// The [`Stop`] is readable. Other descriptors may be, too.
    Stopped,
    /// The deadline has passed.
    TimedOut,
}

/// Sleeps until one of `fds` or `stop` is readable, at most until `deadline`.
pub fn wait(fds: &[BorrowedFd<'_>], stop: Stop<'_>, deadline: Instant) -> io::Result<Wake> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().copied().chain(stop).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return Ok(Wake::TimedOut),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let mut ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        if stop.is_some() && ready.pop() == Some(true) {
            return Ok(Wake::Stopped);
        }
        return Ok(Wake::Ready(ready));
    }
}

/// Sleeps for `time`. Returns `false` if `stop` became readable first.
pub fn pause(time: Duration, stop: Stop<'_>) -> io::Result<bool> {
    Ok(wait(&[], stop, Instant::now() + time)? != Wake::Stopped)
}
