//! Sleeping without an io_uring: poll(2) on the watched eventfds and one of the queue itself. For `mem`, `null` and `rbd`.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::base::wait::poll_until;

use super::{Source, Wakeups};

/// The eventfds on which a queue sleeps.
pub(super) struct Watches {
    /// The queue's own eventfd, with which the back-end wakes it.
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

    /// The eventfd that wakes the queue. It exists as long as the queue.
    pub(super) fn own(&self) -> Weak<OwnedFd> {
        Arc::downgrade(&self.own)
    }

    pub(super) fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        let watch = match source {
            Source::Kick => &mut self.kick,
            Source::Wake => &mut self.wake,
            Source::Copy => &mut self.copy,
        };
        *watch = Some(fd.try_clone_to_owned()?);
        Ok(())
    }

    /// The body of a queue's `wait`: sleeps until an eventfd is readable, a signal came or `until` has passed. Empties the
    /// eventfds that were readable. With `until` in the past it does not sleep.
    pub(super) fn sleep(&self, until: Option<Instant>) -> io::Result<Wakeups> {
        let mut fds = vec![PollFd::new(&*self.own, PollFlags::IN)];
        fds.extend([&self.kick, &self.wake, &self.copy].into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)));
        #[cfg(all(test, feature = "model"))]
        {
            let eventfds = [Some(&*self.own), self.kick.as_ref(), self.wake.as_ref(), self.copy.as_ref()];
            let eventfds: Vec<BorrowedFd<'_>> = eventfds.into_iter().flatten().map(AsFd::as_fd).collect();
            crate::base::sync::yield_until_readable(&eventfds, until);
        }
        if !poll_until(&mut fds, until)? {
            return Ok(Wakeups::default());
        }
        let fired: Vec<bool> = fds.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
        let mut fired = fired.into_iter();
        let mut empty = |fd: Option<BorrowedFd<'_>>| match fd {
            Some(fd) if fired.next() == Some(true) => read_count(fd).map(|()| true),
            _ => Ok(false),
        };
        empty(Some(self.own.as_fd()))?;
        let kick = empty(self.kick.as_ref().map(AsFd::as_fd))?;
        let wake = empty(self.wake.as_ref().map(AsFd::as_fd))?;
        let copy = empty(self.copy.as_ref().map(AsFd::as_fd))?;
        Ok(Wakeups { kick, wake, copy })
    }
}

/// Empties an eventfd that was readable.
///
/// A front-end may share one eventfd between two virtqueues, or read it itself. Another reader may then have emptied it
/// first, although it was written to. The front-end may also make it blocking, because O_NONBLOCK is shared between its
/// descriptor and ours; a read of the empty eventfd would then stop the virtqueue's thread. RWF_NOWAIT prevents that
/// (supported by eventfds from Linux 5.8 on).
fn read_count(fd: BorrowedFd<'_>) -> io::Result<()> {
    /// The offset that means "the current position", because an eventfd has no offsets.
    const NO_OFFSET: u64 = u64::MAX;
    let mut count = [0u8; 8];
    match preadv2(fd, &mut [IoSliceMut::new(&mut count)], NO_OFFSET, ReadWriteFlags::NOWAIT) {
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The instant at which `timeout` has passed; `None`: never.
pub(super) fn deadline(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    /// A front-end may share an eventfd, blocking or not, between two virtqueues: neither fails, and neither waits for the
    /// other.
    #[test]
    fn two_queues_may_share_an_eventfd() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let kick = eventfd(0, EventfdFlags::CLOEXEC | flags).unwrap();
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                let queues = [(); 2].map(|()| {
                    scope.spawn(|| {
                        let mut watches = Watches::new().unwrap();
                        watches.watch(Source::Kick, kick.as_fd()).unwrap();
                        let mut kicks = 0;
                        while !over.load(Ordering::Relaxed) {
                            let until = Instant::now() + Duration::from_millis(1);
                            kicks += u32::from(watches.sleep(Some(until)).unwrap().kick);
                        }
                        kicks
                    })
                });
                for _ in 0..20_000 {
                    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
                    thread::yield_now();
                }
                over.store(true, Ordering::Relaxed);
                assert!(queues.map(|queue| queue.join().unwrap()).iter().sum::<u32>() > 0);
            });
        }
    }
}
