//! How threads hand work to each other: a mutex, channels, threads, and a [`Bell`], which poll(2) can wait for.
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

/// An eventfd beside a queue: the thread that adds to the queue rings it, and the thread that takes from the queue
/// polls it.
pub(crate) struct Bell(OwnedFd);

impl Bell {
    /// A bell that was not rung. An error: no file descriptor is left.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Calls `post`, which adds to the queue, and rings if it returns `true`. The order matters: a thread that wakes up
    /// before the item is in the queue finds nothing and sleeps again. Called by any thread; does not block.
    pub(crate) fn ring_after(&self, post: impl FnOnce() -> bool) {
        #[cfg(all(test, feature = "model"))]
        if interleavings::planted(interleavings::Mutant::BellBeforeMessage) {
            self.ring();
            post();
            return;
        }
        if post() {
            self.ring();
        }
    }

    /// Wakes the thread that polls the bell.
    pub(crate) fn ring(&self) {
        let_others_run();
        // The only error is a full counter (2^64 - 2), and then the descriptor is readable as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Silences the bell and then calls `take`, which takes all that is in the queue. The order matters: an item that
    /// is added between the two rings the bell again. Called by the thread that polls.
    pub(crate) fn silence_before<T>(&self, take: impl FnOnce() -> T) -> T {
        #[cfg(all(test, feature = "model"))]
        if interleavings::planted(interleavings::Mutant::SilenceAfterTake) {
            let taken = take();
            self.was_rung();
            return taken;
        }
        // It may be silent already: an earlier wake-up was enough.
        self.was_rung();
        take()
    }

    /// Silences the bell. Returns whether it was rung since it was silenced last. Never blocks.
    pub(crate) fn was_rung(&self) -> bool {
        let_others_run();
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }
}

impl AsFd for Bell {
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
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let readable = poll(&mut polled, Some(&now)).expect("poll(2) of open descriptors, which does not sleep");
        if readable > 0 || until.is_some_and(|until| until <= std::time::Instant::now()) {
            return;
        }
        thread::yield_now();
    }
}
