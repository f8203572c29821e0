//! How threads hand work to each other: a mutex, channels, threads, and an [`EventNotifier`] for poll(2).
//!
//! They are the standard library's. In unit tests with the feature `model` they are shuttle's, whose scheduler runs one
//! thread at a time and tries orders. The models beside the hand-offs (`interleavings.rs`) then find lost wake-ups.
//! Code that hands nothing to another thread, and the counters of the request path, use the standard library directly.

#[cfg(all(test, feature = "model"))]
pub(crate) mod interleavings;
pub(crate) mod reused;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

#[cfg(all(test, feature = "model"))]
pub(crate) use shuttle::{
    sync::{Mutex, MutexGuard, mpsc},
    thread,
};
#[cfg(not(all(test, feature = "model")))]
pub(crate) use std::{
    sync::{Mutex, MutexGuard, mpsc},
    thread,
};

/// An eventfd beside a queue: the thread that adds to the queue notifies, and the thread that takes from the queue
/// polls. QEMU and vmm-sys-util have the same thing under this name.
pub(crate) struct EventNotifier(OwnedFd);

impl EventNotifier {
    /// A notifier on which `notify` was not called yet. An error: no file descriptor is left.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(EventNotifier(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Calls `post`, which adds to the queue, and notifies if it returns `true`. The order matters: a thread that wakes up
    /// before the item is in the queue finds nothing and sleeps again. Called by any thread; does not block.
    pub(crate) fn notify_after(&self, post: impl FnOnce() -> bool) {
        #[cfg(all(test, feature = "model"))]
        if interleavings::planted(interleavings::Mutant::NotifyBeforeMessage) {
            self.notify();
            post();
            return;
        }
        if post() {
            self.notify();
        }
    }

    /// Wakes the thread that polls the notifier.
    pub(crate) fn notify(&self) {
        let_others_run();
        // The only error is a full counter (2^64 - 2), and then the descriptor is readable as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Clears the notifier and then calls `take`, which takes all that is in the queue. The order matters: for an item
    /// that is added between the two, the notifier is set again. Called by the thread that polls.
    pub(crate) fn clear_before<T>(&self, take: impl FnOnce() -> T) -> T {
        #[cfg(all(test, feature = "model"))]
        if interleavings::planted(interleavings::Mutant::ClearAfterTake) {
            let taken = take();
            self.test_and_clear();
            return taken;
        }
        // It may be clear already: an earlier wake-up was enough.
        self.test_and_clear();
        take()
    }

    /// Clears the notifier. Returns whether it was notified since it was cleared last. Never blocks.
    pub(crate) fn test_and_clear(&self) -> bool {
        let_others_run();
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }
}

impl AsFd for EventNotifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Lets the other threads of a model run, because shuttle does not see system calls.
#[inline]
pub(crate) fn let_others_run() {
    #[cfg(all(test, feature = "model"))]
    thread::yield_now();
}

/// Lets the other threads of a model run until one of `fds` is readable or the time `until` has come. No thread of a
/// model may sleep in poll(2), because one thread of the kernel runs all of them.
#[cfg(all(test, feature = "model"))]
pub(crate) fn yield_until_readable(fds: &[BorrowedFd<'_>], until: Option<std::time::Instant>) {
    use rustix::event::PollFlags;

    use super::wait::is_ready;
    let is_readable = |fd: &BorrowedFd<'_>| is_ready(fd, PollFlags::IN).expect("poll(2) of an open descriptor");
    loop {
        if fds.iter().any(is_readable) || until.is_some_and(|until| until <= std::time::Instant::now()) {
            return;
        }
        thread::yield_now();
    }
}
