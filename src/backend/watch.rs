//! Sleeping without a ring: poll(2) over the watched eventfds and one of our own. For `mem` and `null`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Source, Wakeups};

/// What a queue sleeps on.
pub(super) struct Watches {
    /// Written to by whoever has news for the queue.
    own: Arc<OwnedFd>,
    kick: Option<OwnedFd>,
    wake: Option<OwnedFd>,
    copy: Option<OwnedFd>,
}

impl Watches {
    pub(super) fn new() -> io::Result<Self> {
        let own = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Watches { own: Arc::new(own), kick: None, wake: None, copy: None })
    }

    /// The eventfd to wake the queue with, for as long as there is a queue.
    pub(super) fn own(&self) -> Weak<OwnedFd> {
        Arc::downgrade(&self.own)
    }

    pub(super) fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        let place = match source {
            Source::Kick => &mut self.kick,
            Source::Wake => &mut self.wake,
            Source::Copy => &mut self.copy,
        };
        *place = Some(fd.try_clone_to_owned()?);
        Ok(())
    }

    /// The body of a queue's `wait`: sleeps until something is readable, a signal came, or the time is up, and empties
    /// what was readable. With `until` in the past it only looks.
    pub(super) fn sleep(&self, until: Option<Instant>) -> io::Result<Wakeups> {
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let mut fds = vec![PollFd::new(&*self.own, PollFlags::IN)];
        fds.extend([&self.kick, &self.wake, &self.copy].into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)));
        #[cfg(feature = "model")]
        {
            let places = [Some(&*self.own), self.kick.as_ref(), self.wake.as_ref(), self.copy.as_ref()];
            let places: Vec<BorrowedFd<'_>> = places.into_iter().flatten().map(AsFd::as_fd).collect();
            crate::sync::yield_until_readable(&places, until);
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Wakeups::default()),
            Err(error) => return Err(error.into()),
        }
        let fired: Vec<bool> = fds.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
        let mut fired = fired.into_iter();
        let mut empty = |fd: Option<BorrowedFd<'_>>| match fd {
            Some(fd) if fired.next() == Some(true) => rustix::io::read(fd, &mut [0u8; 8]).map(|_| true),
            _ => Ok(false),
        };
        empty(Some(self.own.as_fd()))?;
        let kick = empty(self.kick.as_ref().map(AsFd::as_fd))?;
        let wake = empty(self.wake.as_ref().map(AsFd::as_fd))?;
        let copy = empty(self.copy.as_ref().map(AsFd::as_fd))?;
        Ok(Wakeups { kick, wake, copy })
    }
}

/// When `timeout` is over; None: never.
pub(super) fn deadline(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}
