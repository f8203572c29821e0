//! The threads of a running ring. One serves it; if that does not come back from a call that may block, another goes on.
//!
//! The thread that serves the ring holds the lock of all of it, and lets go of it only around such a call
//! ([`IoQueue::next_call`](crate::backend::IoQueue::next_call)). The watch of the connection looks at `calls` now and then
//! ([`Relay::look`]): where it finds the same call twice, a new thread takes the lock and serves on. The one that comes
//! back finds the lock held and another number of the thread in charge, hands in what it has, and ends.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, TryLockError};
use std::time::{Duration, Instant};

use super::stopped_ring::StoppedRing;
use super::{Setup, Worker};
use crate::backend::{BlockingCall, Caller};
use crate::base::rate_limit::LogLimit;
use crate::base::sync::mpsc::Sender;
use crate::base::sync::{Mutex, MutexGuard, reused, thread};
use crate::virtio::rings::RingThreads;
use crate::virtio::rings::counters::Counters;
use crate::virtio::virtqueue::split_ring::SplitRing;

/// How often to log that no thread can serve a ring.
const STRANDED_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A ring, from its start to its stop.
pub(in super::super) struct Relay {
    index: u32,
    /// `None` before the ring runs and after it has stopped.
    served: Mutex<Option<Served>>,
    /// Calls begun and calls returned, together: odd while the thread in charge is in one. It alone writes it.
    calls: AtomicU64,
    /// What `calls` was at the last look.
    seen: AtomicU64,
    /// Which thread is in charge: the threads before it. Changes with the lock held.
    shift: AtomicU64,
    /// Limits the line that no thread can serve the ring.
    stranded: LogLimit,
}

struct Served {
    worker: Worker,
    stopped: StoppedRing,
    /// Where the ring goes when it has stopped.
    ended: Sender<StoppedRing>,
}

type Guard<'a> = MutexGuard<'a, Option<Served>>;

impl Relay {
    /// Of a ring that does not run yet.
    pub(in super::super) fn new(index: u32) -> Arc<Relay> {
        Arc::new(Relay {
            index,
            served: Mutex::new(None),
            calls: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            shift: AtomicU64::new(0),
            stranded: LogLimit::of(1, STRANDED_LOG_INTERVAL),
        })
    }

    /// Serves the ring until [`super::Command::StopMode`], in this thread or in others after it, and hands it to `ended` with
    /// everything answered and published but what is kept ([`StoppedRing::kept`]). `hold`: the epoch of a hold that the ring is
    /// born into.
    pub(in super::super) fn run(
        &self,
        setup: Setup,
        ring: SplitRing,
        mut stopped: StoppedRing,
        (counters, hold): (Arc<Counters>, Option<u64>),
        ended: Sender<StoppedRing>,
    ) {
        let mut worker = Worker::new(setup, ring, &stopped, counters);
        if let Some(epoch) = hold {
            worker.close_gate(epoch);
        }
        worker.recover(std::mem::take(&mut stopped.kept));
        let mut served = self.served.lock().expect("no panic while held");
        *served = Some(Served { worker, stopped, ended });
        self.serve(served, 0);
    }

    fn cannot_go_on(&self, error: &std::io::Error) {
        if let Some(line) = self.stranded_line(error, Instant::now()) {
            log::error!("{line}");
        }
    }

    /// The log line that no thread can serve the ring, when it is due: it is tried again at each look.
    fn stranded_line(&self, error: &std::io::Error, now: Instant) -> Option<String> {
        let line = format_args!(
            "ring {}: a write does not return from the image's storage, and no thread can serve the ring meanwhile: \
             {error}; raise the limits on threads and files",
            self.index
        );
        self.stranded.admit(line, now)
    }

    /// A new thread of the ring's: serves it on, unless `call` has returned.
    fn go_on(&self, call: u64) {
        // Held: it has returned.
        let Ok(mut guard) = self.served.try_lock() else { return };
        if self.calls.load(Acquire) != call {
            return;
        }
        let Some(served) = &mut *guard else { return };
        if let Err(error) = served.worker.io.change_thread() {
            return self.cannot_go_on(&error);
        }
        log::debug!("ring {}: a write does not return; another thread serves the ring", self.index);
        let shift = self.shift.load(Relaxed) + 1;
        self.shift.store(shift, Release);
        self.calls.store(call + 1, Release);
        self.serve(guard, shift);
    }

    fn serve<'a>(&'a self, mut guard: Guard<'a>, shift: u64) {
        const RUNS: &str = "it runs while this thread is in charge";
        let mut caller = guard.as_mut().expect(RUNS).worker.io.caller();
        loop {
            guard.as_mut().expect(RUNS).worker.begin_turn();
            loop {
                let worker = &mut guard.as_mut().expect(RUNS).worker;
                let call = worker.io.next_call().or_else(|| {
                    worker.finish_the_finished();
                    // What was finished may have let more writes go.
                    worker.io.next_call()
                });
                let Some(call) = call else { break };
                match self.make(guard, shift, caller.as_mut().expect("a queue with calls has a caller"), call) {
                    Ok(still) => guard = still,
                    Err(call) => return caller.expect("it made the call").leave(call),
                }
            }
            let Served { worker, stopped, .. } = guard.as_mut().expect(RUNS);
            worker.end_turn();
            if worker.is_over(stopped) {
                break;
            }
            worker.sleep(stopped);
        }
        let Served { worker, stopped, ended } = guard.take().expect(RUNS);
        // The handler waits for it, or a panic ends the process.
        let _ = ended.send(worker.leave(stopped));
    }

    /// Makes one call with the lock let go. `Err`: another thread serves the ring by now.
    #[inline]
    fn make<'a>(
        &'a self,
        mut guard: Guard<'a>,
        shift: u64,
        caller: &mut Box<dyn Caller>,
        mut call: BlockingCall,
    ) -> Result<Guard<'a>, BlockingCall> {
        let number = self.calls.load(Relaxed) + 1;
        self.calls.store(number, Release);
        let Served { worker, .. } = guard.as_mut().expect("it runs while this thread is in charge");
        worker.setup.rings.call_begins();
        drop(guard);
        caller.make(&mut call);
        let Some(mut guard) = self.take_back(shift) else { return Err(call) };
        self.calls.store(number + 1, Release);
        guard.as_mut().expect("it runs while this thread is in charge").worker.io.call_made(call);
        Ok(guard)
    }

    /// The lock, if this thread is still in charge.
    #[inline]
    fn take_back(&self, shift: u64) -> Option<Guard<'_>> {
        loop {
            match self.served.try_lock() {
                Ok(guard) => return (self.shift.load(Relaxed) == shift).then_some(guard),
                Err(TryLockError::Poisoned(_)) => panic!("another thread of the ring panicked"),
                Err(TryLockError::WouldBlock) if self.shift.load(Acquire) != shift => return None,
                // One that wants to go on instead of this one looks whether it may.
                Err(TryLockError::WouldBlock) => thread::yield_now(),
            }
        }
    }
}

impl RingThreads for Relay {
    fn look(self: Arc<Self>) -> bool {
        let calls = self.calls.load(Acquire);
        let seen = self.seen.swap(calls, Relaxed);
        let in_call = calls % 2 == 1;
        if in_call && seen == calls {
            let relay = self.clone();
            let body = move || relay.go_on(calls);
            if let Err(error) = reused::spawn(format!("ring {}", self.index), body) {
                self.cannot_go_on(&error);
            }
        }
        in_call || seen != calls
    }

    fn was_taken_over(&self) -> bool {
        self.shift.load(Acquire) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_that_no_thread_can_serve_is_logged_again_with_a_count() {
        let (relay, start) = (Relay::new(3), Instant::now());
        let error = std::io::Error::from_raw_os_error(libc::EAGAIN);
        let line = |after| relay.stranded_line(&error, start + after);
        assert!(line(Duration::ZERO).unwrap().starts_with("ring 3: a write does not return"));
        // The watch looks four times a second.
        assert!((1..40).all(|at| line(Duration::from_millis(250) * at).is_none()));
        assert!(line(STRANDED_LOG_INTERVAL).unwrap().ends_with("(left out before it: 39 like it)"));
    }
}
